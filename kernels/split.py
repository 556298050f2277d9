"""Equal parts of the last dimension: their gradients in one tensor, and the sum of its rows.

    dx[m, p N + n] = d_p[m, n]        db[p N + n] = sum over m of d_p[m, n]

The parts are the query, key and value of one product, or the key and value. x has a bias whose
gradient is db. Memory-bound; passes over the elements (R read, W write):

    stock   cat or stack 1R 1W, sum 1R      3
    here    1R 1W                           2, and partial sums in fp32, in a fixed order
"""

import math

import torch
import triton
import triton.language as tl

from fastnn.kernels._config import tunable
from fastnn.kernels._gpus import multiprocessors
from fastnn.kernels._launch import kernel
from fastnn.kernels._partials import in_order
from fastnn.kernels._sizes import cdiv, next_power_of_2

MOST = 3  # parts


@triton.jit
def _copy(
    X, x_i, x_l, x_h, DX, SUMS, h, d0, m0, m1, L, D, row,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copy rows m0 to m1 of head h from column d0 on, to rows of DX that lie `row` apart."""
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    X += h * x_h * UNIT + d0
    for i in range(m0, m1, BLOCK_M):
        m = i + rows
        mask = (m < m1)[:, None] & (cols < D - d0)[None, :]
        at = ((m // L) * x_i + (m % L) * x_l) * UNIT
        x = tl.load(X + at[:, None] + cols[None, :], mask=mask, other=0.0)
        if DX is not None:
            tl.store(DX + m.to(tl.int64)[:, None] * row + cols[None, :], x, mask=mask)
        if SUMS is not None:
            acc += x.to(tl.float32)
    if SUMS is not None:
        tl.store(SUMS + cols, tl.sum(acc, 0), mask=cols < D - d0)


@kernel(do_not_specialize=["M", "L", "H", "D_units", "rows_each"])
def _join_kernel(
    A, B, C, DX, PARTIALS, M, L, H, D_units, rows_each, a_i: tl.int64, a_l: tl.int64,
    a_h: tl.int64, b_i: tl.int64, b_l: tl.int64, b_h: tl.int64, c_i: tl.int64, c_l: tl.int64,
    c_h: tl.int64, PARTS: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program copies rows_each rows of BLOCK_D columns of one head, and loops over the rows.

    A, B, C (I, L, H, D): float, with strides in units of UNIT; C is None if there are two parts.
    M is I times L. DX (M, parts, H, D): float, contiguous, or None. PARTIALS (G, parts, H, D): fp32
    sums over the rows of a program, or None.
    """
    D = D_units * UNIT  # so that the compiler sees the factor
    blocks = tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0)
    d0 = pid % blocks * BLOCK_D
    h = pid // blocks % H
    p = pid // blocks // H
    m0 = tl.program_id(1) * rows_each
    m1 = tl.minimum(M, m0 + rows_each)
    row = PARTS * H * D
    to = (p * H + h) * D + d0
    if DX is not None:
        DX += to
    if PARTIALS is not None:
        PARTIALS += tl.program_id(1).to(tl.int64) * row + to
    # A loop for each part: of one loop, the compiler would select the pointer where it is stored.
    if p == 0:
        _copy(A, a_i, a_l, a_h, DX, PARTIALS, h, d0, m0, m1, L, D, row, UNIT, BLOCK_M, BLOCK_D)
    elif p == 1:
        _copy(B, b_i, b_l, b_h, DX, PARTIALS, h, d0, m0, m1, L, D, row, UNIT, BLOCK_M, BLOCK_D)
    elif PARTS == 3:
        _copy(C, c_i, c_l, c_h, DX, PARTIALS, h, d0, m0, m1, L, D, row, UNIT, BLOCK_M, BLOCK_D)


@tunable("BLOCK_M", "BLOCK_D")
def _config(D, vector):
    """vector: how many elements an access has. Narrow ones need smaller tiles, or they spill."""
    block = min(128, next_power_of_2(D))
    return {"BLOCK_M": max(1, min(32, 256 * vector // block)), "BLOCK_D": block, "num_warps": 4}


def _as_one(sizes, strides):
    """Sizes and strides of each tensor, with dimensions joined that can be one in all of them."""
    found = [(n, s) for n, *s in zip(sizes, *strides, strict=True) if n != 1]
    joined: list = []
    for n, s in reversed(found):
        if joined:
            size, inner = joined[0]
            if all(o == size * t for o, t in zip(s, inner, strict=True)):
                joined[0] = n * size, inner
                continue
        joined.insert(0, (n, s))
    return joined


def join(parts, heads, want_dx=True, want_db=True):
    """parts, two or three of one shape (..., N), or (..., H, D) with `heads` -> (dx, db).

    dx (..., parts * N) is contiguous. db (parts * N,) is summed in fp32. None unless wanted.
    """
    count, shape, nothing = len(parts), parts[0].shape, [0] * len(parts)
    parts = [t if t.stride(-1) == 1 or shape[-1] == 1 else t.contiguous() for t in parts]
    lead = len(shape) - (2 if heads else 1)
    rows = _as_one(shape[:lead], [t.stride()[:lead] for t in parts])
    if len(rows) > 2:
        parts = [t.contiguous() for t in parts]
        rows = _as_one(shape[:lead], [t.stride()[:lead] for t in parts])
    (many, outer), (L, inner) = [(1, nothing), (1, nothing), *rows][-2:]
    H, D, of_head = 1, shape[-1], nothing
    if heads:
        H, of_head = shape[-2], [t.stride(-2) for t in parts]
        if all(s == D for s in of_head):
            H, D, of_head = 1, H * D, nothing
    strides = [s for three in zip(outer, inner, of_head, strict=True) for s in three]
    like, M, N = parts[0], many * L, math.prod(shape[lead:])
    unit = math.gcd(D, *strides, 16 // like.element_size())
    config = _config(D, unit)
    columns = count * H * cdiv(D, config["BLOCK_D"])
    # The partial sums are at most 1/32 of what is read.
    G = max(1, min(8 * multiprocessors(like.get_device()) // columns, cdiv(M, 64)))
    rows_each = cdiv(cdiv(M, G), config["BLOCK_M"]) * config["BLOCK_M"]
    G = cdiv(M, rows_each)
    dx = like.new_empty((*shape[:lead], count * N)) if want_dx else None
    partials = like.new_empty((G, count * N), dtype=torch.float32) if want_db else None
    more = [0] * 3 * (MOST - count)
    _join_kernel(
        (columns, G), *parts, *[None] * (MOST - count), dx, partials, M, L, H, D // unit,
        rows_each, *(s // unit for s in strides), *more, PARTS=count, UNIT=unit, **config,
    )  # fmt: skip
    return dx, in_order(partials, like.new_empty(count * N)) if want_db else None
