"""Rows of length 1: y = x / max(n, eps), where n is the length of the row.

    n = sqrt(sum(x * x)), or sum(abs(x))
    dx = (dy - sum(dy * x / d) * slope) / d       d = max(n, eps); no second term if n < eps
    slope = x / d; or sign(x)

A row is the dimension C of a tensor (B, C, S), as in kernels/_classes.py. Memory-bound; passes over
the elements (R read, W write):
    stock   forward 2R 1W, in 3 launches; backward 8R 4W, in about 10
    here    forward 1R 1W, backward 2R 1W, in one launch each; rows that do not fit the registers of
            a program are read twice, the second time mostly from L2
Forward keeps n, one float for each row. Sums are fp32 in each lane, and fp64 across lanes.
"""

import torch
import triton
import triton.language as tl

from fastnn.kernels._classes import common, multiple, tiles, unit
from fastnn.kernels._launch import kernel
from fastnn.kernels._sizes import cdiv, next_power_of_2
from fastnn.kernels._tl import dense, dense_like


@triton.jit
def _read(X, cols, rows, live, C, stride, CLASSES_LAST: tl.constexpr, UNIT: tl.constexpr):
    """A tile (GROUP, LANES, ROWS) in fp32, 0 outside."""
    at = _at(cols, rows, stride, CLASSES_LAST, UNIT)
    return tl.load(X + at, mask=live & (cols < C), other=0.0).to(tl.float32)


@triton.jit
def _at(cols, rows, stride, CLASSES_LAST: tl.constexpr, UNIT: tl.constexpr):
    if CLASSES_LAST:
        return cols.to(tl.int64) + rows * multiple(stride, UNIT)
    else:
        return cols.to(tl.int64) * multiple(stride, UNIT) + rows


@triton.jit
def _whole(parts):
    """The sum over lanes (LANES, ROWS) -> (1, 1, ROWS)."""
    return tl.sum(parts.to(tl.float64), 0).to(tl.float32)[None, None, :]


@triton.jit
def _size(x, NORM: tl.constexpr):
    return tl.sum(x * x if NORM == 2 else tl.abs(x), 0)


@triton.jit
def _quotient(x, d):
    return tl.div_rn(x, tl.broadcast_to(d, x.shape))


@kernel(do_not_specialize=["C", "S", "stride_xb", "stride_yb", "row_blocks"])
def _normalize_fwd_kernel(
    X, Y, LENGTH, C, S: tl.int64, stride_xb: tl.int64, stride_x, stride_yb: tl.int64, stride_y,
    row_blocks, eps, NORM: tl.constexpr, ONCE: tl.constexpr, CLASSES_LAST: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A program computes ROWS rows of y; it holds them if ONCE, and else reads them twice.

    X, Y (B, C, S): float, their classes or their positions contiguous. LENGTH (B, S): fp32.
    """
    pid = tl.program_id(0)
    b = (pid // row_blocks).to(tl.int64)
    X += b * multiple(stride_xb, UNIT)
    Y += b * multiple(stride_yb, UNIT)
    if CLASSES_LAST:
        C = multiple(C, UNIT)
    row = (pid % row_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if not CLASSES_LAST:
        S = multiple(S, UNIT)
    rows = row[None, None, :]
    live = rows < S
    offs = tl.arange(0, GROUP)[:, None, None] * LANES + tl.arange(0, LANES)[None, :, None]
    x = _read(X, offs, rows, live, C, stride_x, CLASSES_LAST, UNIT)
    parts = _size(x, NORM)
    if not ONCE:
        for c in range(GROUP * LANES, C, GROUP * LANES):
            more = _read(X, c + offs, rows, live, C, stride_x, CLASSES_LAST, UNIT)
            parts += _size(more, NORM)
    n = _whole(parts)
    if NORM == 2:
        n = tl.sqrt_rn(n)
    tl.store(LENGTH + b * S + rows, n, mask=live)
    d = tl.maximum(n, eps, propagate_nan=tl.PropagateNan.ALL)
    out = Y.dtype.element_ty
    at = _at(offs, rows, stride_y, CLASSES_LAST, UNIT)
    tl.store(Y + at, _quotient(x, d).to(out), mask=live & (offs < C))
    if not ONCE:
        for c in range(GROUP * LANES, C, GROUP * LANES):
            x = _read(X, c + offs, rows, live, C, stride_x, CLASSES_LAST, UNIT)
            at = _at(c + offs, rows, stride_y, CLASSES_LAST, UNIT)
            tl.store(Y + at, _quotient(x, d).to(out), mask=live & (c + offs < C))


@triton.jit
def _gradient(dy, x, q, d, t, NORM: tl.constexpr):
    """q: x / d. t: the sum of dy * q over the row; 0 if d is not the length."""
    if NORM == 2:
        slope = q
    else:
        slope = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
    # of a row of one element, the difference is 0
    z = tl.fma(slope, tl.broadcast_to(-t, x.shape), dy)
    # The reciprocal of a very small d would be infinite, and that of a very large one subnormal.
    scale = tl.where(d < 1e-30, 2.0**64, tl.where(d > 1e30, 2.0**-64, 1.0))
    return z * scale * tl.div_rn(1.0, d * scale)


@kernel(do_not_specialize=["C", "S", "stride_xb", "stride_db", "stride_gb", "row_blocks"])
def _normalize_bwd_kernel(
    DY, X, LENGTH, DX, C, S: tl.int64, stride_gb: tl.int64, stride_g, stride_xb: tl.int64, stride_x,
    stride_db: tl.int64, stride_d, row_blocks, eps, NORM: tl.constexpr, ONCE: tl.constexpr,
    CLASSES_LAST: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """A program computes ROWS rows of dx; it holds them if ONCE, and else reads them twice.

    DY, X, DX (B, C, S): float, their classes or their positions contiguous. LENGTH (B, S): fp32.
    """
    pid = tl.program_id(0)
    b = (pid // row_blocks).to(tl.int64)
    DY += b * multiple(stride_gb, UNIT)
    X += b * multiple(stride_xb, UNIT)
    DX += b * multiple(stride_db, UNIT)
    if CLASSES_LAST:
        C = multiple(C, UNIT)
    else:
        S = multiple(S, UNIT)
    rows = ((pid % row_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS))[None, None, :]
    live = rows < S
    n = tl.load(LENGTH + b * S + rows, mask=live, other=1.0)
    d = tl.maximum(n, eps, propagate_nan=tl.PropagateNan.ALL)
    offs = tl.arange(0, GROUP)[:, None, None] * LANES + tl.arange(0, LANES)[None, :, None]
    x = _read(X, offs, rows, live, C, stride_x, CLASSES_LAST, UNIT)
    dy = _read(DY, offs, rows, live, C, stride_g, CLASSES_LAST, UNIT)
    q = _quotient(x, d)
    parts = tl.sum(dy * q, 0)
    if not ONCE:
        for c in range(GROUP * LANES, C, GROUP * LANES):
            x2 = _read(X, c + offs, rows, live, C, stride_x, CLASSES_LAST, UNIT)
            dy2 = _read(DY, c + offs, rows, live, C, stride_g, CLASSES_LAST, UNIT)
            parts += tl.sum(dy2 * _quotient(x2, d), 0)
    t = tl.where(n >= eps, _whole(parts), 0.0)
    out = DX.dtype.element_ty
    at = _at(offs, rows, stride_d, CLASSES_LAST, UNIT)
    tl.store(DX + at, _gradient(dy, x, q, d, t, NORM).to(out), mask=live & (offs < C))
    if not ONCE:
        for c in range(GROUP * LANES, C, GROUP * LANES):
            x = _read(X, c + offs, rows, live, C, stride_x, CLASSES_LAST, UNIT)
            dy = _read(DY, c + offs, rows, live, C, stride_g, CLASSES_LAST, UNIT)
            at = _at(c + offs, rows, stride_d, CLASSES_LAST, UNIT)
            dx = _gradient(dy, x, _quotient(x, d), d, t, NORM).to(out)
            tl.store(DX + at, dx, mask=live & (c + offs < C))


def _tiles(sizes, classes_last, wide, itemsize, light):
    """{ROWS, LANES, GROUP, num_warps}, as `tiles` has it, but that warps share the classes of a run
    of 128 bytes of positions, where positions would not fill the GPU."""
    B, C, S = sizes
    config = tiles(sizes, classes_last, wide, itemsize, light=light)
    if classes_last or C < 64 or S < 32 or B * S >= 1 << 18:
        return config
    rows = min(next_power_of_2(S), 128 // itemsize)
    lanes = min(256 * 16 // itemsize // rows, next_power_of_2(C))
    group = min(next_power_of_2(cdiv(C, lanes)), 4 if light else 2)
    return {"ROWS": rows, "LANES": lanes, "GROUP": group, "num_warps": 8}


def _launch(one, tensors, length, sizes, classes_last, strides, eps, norm, light, place):
    """place: where the lengths stand among the tensors."""
    B, C, S = sizes
    wide = unit(sizes, classes_last, strides, *tensors)
    itemsize = min(t.element_size() for t in tensors)
    config = _tiles(sizes, classes_last, wide, itemsize, light)
    row_blocks = cdiv(S, config["ROWS"])
    steps = [s for pair in strides for s in pair]
    given = [*tensors[:place], length, *tensors[place:]]
    one(
        (B * row_blocks,), *given, C, S, *steps, row_blocks, eps, NORM=norm,
        ONCE=config["LANES"] * config["GROUP"] >= C, CLASSES_LAST=classes_last, UNIT=wide, **config,
    )  # fmt: skip


def fwd(x, y, eps, norm):
    """x, y (C,) or (N, C, ...), norm 1 or 2 -> fills y; the lengths of the rows, fp32."""
    made, view = y, common(x, y)
    if view is None:
        x = dense(x)
        made = torch.empty_like(x, dtype=y.dtype)
        view = common(x, made)
    sizes, classes_last, strides = view
    length = x.new_empty(sizes[0] * sizes[2], dtype=torch.float32)
    _launch(
        _normalize_fwd_kernel, [x, made], length, sizes, classes_last, strides, eps, norm, True, 2
    )
    if made is not y:
        y.copy_(made)
    return length


def bwd(dy, x, length, eps, norm):
    """dy, and what `fwd` was given and returned -> dx, in the layout of x if that is dense."""
    dx = torch.empty_like(x)
    made, view = dx, common(dy, x, dx)
    if view is None:
        dy, x = dense(dy), dense(x)
        made = torch.empty_like(x)
        view = common(dy, x, made)
    sizes, classes_last, strides = view
    _launch(
        _normalize_bwd_kernel, [dy, x, made], length, sizes, classes_last, strides, eps, norm,
        False, 2,
    )  # fmt: skip
    return dense_like(made, dx)
