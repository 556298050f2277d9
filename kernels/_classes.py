"""Rows that are a dimension C of a tensor: (N, C, d1, ...) as (B, C, S).

C are the classes of logits, or the elements of a vector; S are the positions. Kernels that reduce
along C take their tiles from here. For rows that are the last dimensions of a dense
tensor, see _rows.py.
"""

import functools

import triton
import triton.language as tl

from fastnn.kernels._config import tunable
from fastnn.kernels._sizes import cdiv, next_power_of_2

# ---- The layout ----------------------------------------------------------------------------------


def split(x):
    """Sizes (B, C, S) of x (C,), (N, C) or (N, C, d1, ...), and their strides. S are the positions.

    Returns None if d1, ... cannot be one dimension with one stride. (N, C) is one batch entry of N
    positions.
    """
    return _split(x.shape, x.stride())


@functools.lru_cache(maxsize=4096)
def _split(shape, strides):
    if 0 in shape:  # nothing is read, whatever the strides
        strides = (0,) * len(shape)
    if len(shape) == 1:
        return (1, shape[0], 1), (0, strides[0], 0)
    S, stride_s = 1, 0
    for size, stride in zip(shape[:1:-1], strides[:1:-1], strict=True):
        if size == 1:
            continue
        if S == 1:
            stride_s = stride
        elif stride != S * stride_s:
            return None
        S *= size
    if S == 1:
        return (1, shape[1], shape[0]), (0, strides[1], strides[0])
    return (shape[0], shape[1], S), (strides[0], strides[1], stride_s)


def common(*tensors):
    """(B, C, S); whether classes (else positions) are contiguous; (batch, other) strides of each.

    Returns None if neither is contiguous in all tensors. The lanes of a tile run along the
    contiguous dimension.
    """
    return _common(tuple([(t.shape, t.stride()) for t in tensors]))


@functools.lru_cache(maxsize=4096)
def _common(layouts):
    views = [_split(*layout) for layout in layouts]
    if None in views:
        return None
    (B, C, S), _ = views[0]
    if not B * C * S:
        return (B, C, S), False, ((0, 0),) * len(views)
    strides = [strides for _, strides in views]
    if all(b == S * s for b, _, s in strides):
        B, S, strides = 1, B * S, [(0, c, s) for _, c, s in strides]
    if all(s == 1 for *_, s in strides) and (S > 1 or C == 1):
        return (B, C, S), False, tuple([(b, c) for b, c, _ in strides])
    if all(c == 1 for _, c, _ in strides):
        return (B, C, S), True, tuple([(b, s) for b, _, s in strides])
    return None


def unit(sizes, classes_last, strides, *tensors):
    """Elements in 128 bits of the narrowest tensor, if they divide counts and strides; else 1."""
    return _unit(sizes, classes_last, strides, 16 // min([t.element_size() for t in tensors]))


@functools.lru_cache(maxsize=4096)
def _unit(sizes, classes_last, strides, wide):
    counts = (sizes[1 if classes_last else 2], *(v for pair in strides for v in pair))
    return wide if all(v % wide == 0 for v in counts) else 1


@tunable("ROWS", "GROUP")
def tiles(sizes, classes_last, unit, itemsize, light=True):
    """{ROWS, LANES, GROUP, num_warps}: ROWS positions by LANES * GROUP classes.

    A lane holds a running statistic. The GROUP classes of a lane are LANES apart, so that one
    thread has them all. Small rows share a program, each within a warp. `light`: only one tensor is
    read.
    """
    B, C, S = sizes
    values = 16 if light or unit > 1 else 8  # values per thread; more would spill
    if light and unit == 8:
        values = 32
    vector = 32 * 16 // itemsize  # elements of one 128-bit access of a warp
    if not classes_last:
        num_warps = 4 if B * S >= 1 << 18 else 1
        rows = min(next_power_of_2(max(S, 1)), vector * num_warps)
        group = min(next_power_of_2(C), 32 * values * num_warps // rows)
        return {"ROWS": rows, "LANES": 1, "GROUP": group, "num_warps": num_warps}
    num_warps = 4 if C <= 4096 else 8
    block = min(next_power_of_2(C), 32 * values * num_warps)
    # Small rows have a quarter of the values, because a thread then has the statistics of several
    # rows.
    small = 1024 if light or unit > 1 else 256
    rows = min(max(small // block, min(4, 128 * values // block), 1), 64)
    lanes = min(block, vector * num_warps // min(rows, num_warps))
    return {"ROWS": rows, "LANES": lanes, "GROUP": block // lanes, "num_warps": num_warps}


def class_programs(C, cols, classes_last):
    """How many programs share a block of rows in the backward.

    One if positions are contiguous: a tile then has few classes, and each tile would have to read
    the data of each position again.
    """
    return cdiv(C, cols) if classes_last else 1


@triton.jit
def multiple(n, UNIT: tl.constexpr):
    """n, which UNIT divides, in a form that shows the compiler the factor; for 128-bit accesses."""
    return n // UNIT * UNIT
