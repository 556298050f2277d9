"""Local response norm of (N, C, *), over a window of channels.

    y[c] = x[c] / u[c]**beta,  u[c] = k + alpha / size * sum of x[j]**2 over c's window
    t[c] = dy[c] * x[c] / u[c]**(beta + 1)
    dx[j] = dy[j] / u[j]**beta - 2 * alpha * beta / size * x[j] * sum of t[c] whose window has j

The window of c is c - size // 2 <= j <= c + (size - 1) // 2, limited to existing channels.
Memory-bound; passes over the elements (R read, W write):
    stock   22 operators                        56
    here    forward 1R 1W; backward 2R 1W        5
A program goes through the channels of some neighbouring positions. It keeps the last `size`
channels in registers, as rows of a tile that it uses as a ring buffer.
"""

import math

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from fastnn.kernels._launch import kernel
from fastnn.kernels._sizes import cdiv, next_power_of_2
from fastnn.kernels._tl import empty_as

PROGRAMS = 2048  # programs of one warp; enough to fill a GPU


@triton.jit
def _put(window, at, values, size, BLOCK_W: tl.constexpr):
    """Write the row of channel `at` into the window; nothing if `at` is negative."""
    row = tl.arange(0, BLOCK_W)[:, None]
    return tl.where(row == at % size, values[None, :], window)


@triton.jit
def _get(window, at, size, BLOCK_W: tl.constexpr):
    """The row of channel `at`, as a sum of bits, which keeps -0.0."""
    row = tl.arange(0, BLOCK_W)[:, None]
    bits = tl.where(row == at % size, window.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 0).to(tl.float32, bitcast=True)


@kernel(do_not_specialize=["C", "S_units", "span", "blocks"])
def _lrn_fwd_kernel(
    X, Y, C, S_units, span, blocks, size, alpha, beta, k,
    UNIT: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program has BLOCK positions of one sample, and loops over its span of channels.

    X, Y (N, C, S): float, contiguous.
    """
    S = S_units * UNIT  # so that the compiler sees the factor
    n = (tl.program_id(0) // blocks).to(tl.int64)
    s = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(1) * span
    stop = tl.minimum(first + span, C)
    after = (size - 1) // 2
    X += n * C * S
    Y += n * C * S
    window = tl.zeros((BLOCK_W, BLOCK), tl.float32)
    for j in range(tl.maximum(first - size // 2, 0), stop + after):
        x = tl.load(X + j * S + s, mask=(s < S) & (j < C), other=0.0)
        window = _put(window, j, x.to(tl.float32), size, BLOCK_W)
        c = j - after
        u = k + alpha * tl.sum(window * window, 0)
        y = tl.div_rn(_get(window, c, size, BLOCK_W), libdevice.pow(u, beta))
        there = (s < S) & (c >= first)
        tl.store(Y + c * S + s, y.to(Y.dtype.element_ty), mask=there)


@kernel(do_not_specialize=["C", "S_units", "span", "blocks"])
def _lrn_bwd_kernel(
    DY, X, DX, C, S_units, span, blocks, size, alpha, beta, k,
    UNIT: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program has BLOCK positions of one sample, and loops over its span of channels.

    DY, X, DX (N, C, S): float, contiguous.
    """
    S = S_units * UNIT
    n = (tl.program_id(0) // blocks).to(tl.int64)
    s = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(1) * span
    stop = tl.minimum(first + span, C)
    after = (size - 1) // 2
    DY += n * C * S
    X += n * C * S
    DX += n * C * S
    xs = tl.zeros((BLOCK_W, BLOCK), tl.float32)
    parts = tl.zeros((BLOCK_W, BLOCK), tl.float32)  # dy / u**beta
    ts = tl.zeros((BLOCK_W, BLOCK), tl.float32)
    for j in range(tl.maximum(first - size + 1, 0), stop + size - 1):
        x = tl.load(X + j * S + s, mask=(s < S) & (j < C), other=0.0)
        xs = _put(xs, j, x.to(tl.float32), size, BLOCK_W)
        c = j - after
        # Channels before the first complete window give no t that is used.
        there = (s < S) & (c >= tl.maximum(first - after, 0)) & (c < C)
        dy = tl.load(DY + c * S + s, mask=there, other=0.0).to(tl.float32)
        u = k + alpha * tl.sum(xs * xs, 0)
        part = tl.div_rn(dy, libdevice.pow(u, beta))
        t = tl.where(there, tl.div_rn(part * _get(xs, c, size, BLOCK_W), u), 0.0)
        parts = _put(parts, c, part, size, BLOCK_W)
        ts = _put(ts, c, t, size, BLOCK_W)
        i = j - size + 1
        along = 2.0 * alpha * beta * tl.sum(ts, 0)
        dx = _get(parts, i, size, BLOCK_W) - along * _get(xs, i, size, BLOCK_W)
        there = (s < S) & (i >= first)
        tl.store(DX + i * S + s, dx.to(DX.dtype.element_ty), mask=there)


def _launch(x, size, tensors):
    """((programs), sizes, tile) for contiguous x."""
    N, C = x.shape[:2]
    S = math.prod(x.shape[2:])
    unit = math.gcd(S, 8)
    widest = max(t.element_size() for t in tensors)
    lanes = 32 * min(16 // widest, unit, 8 // len(tensors) * 2)
    # one warp, so that the rows of a position stay in one thread
    block = max(32, min(next_power_of_2(S), lanes))
    blocks = cdiv(S, block)
    # Chunks along the channels read the same windows twice, so they are used only if programs are
    # few.
    chunks = max(1, min(PROGRAMS // (N * blocks), C // (20 * size)))
    span = cdiv(C, chunks)
    return (
        (N * blocks, cdiv(C, span)),
        (C, S // unit, span, blocks, size),
        {
            "UNIT": unit,
            "BLOCK_W": next_power_of_2(size),
            "BLOCK": block,
            "num_warps": max(1, block // lanes),
        },
    )


def fwd(x, size, alpha, beta, k, out_dtype=None):
    """x (N, C, *) contiguous and not empty -> y, contiguous."""
    y = empty_as(x, out_dtype)
    grid, sizes, tile = _launch(x, size, (x,))
    _lrn_fwd_kernel(grid, x, y, *sizes, alpha / size, beta, k, **tile)
    return y


def bwd(dy, x, size, alpha, beta, k):
    """dy and x (N, C, *) contiguous -> dx, in x's dtype."""
    dx = torch.empty_like(x)
    grid, sizes, tile = _launch(x, size, (x, dy, dx))
    _lrn_bwd_kernel(grid, dy, x, dx, *sizes, alpha / size, beta, k, **tile)
    return dx
