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

from fastnn.kernels._launch import kernel
from fastnn.kernels._libdevice import power
from fastnn.kernels._sizes import cdiv, next_power_of_2
from fastnn.kernels._tl import empty_as

PROGRAMS = 2048  # programs of one warp; enough to fill a GPU


@triton.jit
def _put(window, row, values, BLOCK_W: tl.constexpr):
    """The window with `values` as its row `row`."""
    return tl.where(tl.arange(0, BLOCK_W)[:, None] == row, values[None, :], window)


@triton.jit
def _get(window, row, BLOCK_W: tl.constexpr):
    """The row, as a sum of bits, which keeps -0.0."""
    bits = window.to(tl.int32, bitcast=True)
    found = tl.sum(tl.where(tl.arange(0, BLOCK_W)[:, None] == row, bits, 0), 0)
    return found.to(tl.float32, bitcast=True)


@triton.jit
def _rows(X, first, stop, S, s, STEP: tl.constexpr, BLOCK_W: tl.constexpr):
    """X at STEP channels from `first` on, as rows in fp32; 0 where there is no channel.

    All loads of a step are asked for before any result is used.
    """
    row = tl.arange(0, BLOCK_W)
    c = first + row
    mask = ((row < STEP) & (c >= 0) & (c < stop))[:, None] & (s < S)[None, :]
    return tl.load(X + c[:, None] * S + s[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _power(u, beta, QUARTERS: tl.constexpr):
    """u**beta. For a beta of 1 to 4 quarters, roots are cheaper, and as exact."""
    if QUARTERS == 1:
        y = tl.sqrt_rn(tl.sqrt_rn(u))
    elif QUARTERS == 2:
        y = tl.sqrt_rn(u)
    elif QUARTERS == 3:
        root = tl.sqrt_rn(u)
        y = root * tl.sqrt_rn(root)
    elif QUARTERS == 4:
        y = u
    else:
        y = power(u, beta)
    return y


# Channel j is in row (j - start) % SIZE of a window. If STEP is SIZE, then a loop over the rows is
# unrolled, so that each row is a register by its name. A loop over a longer window is not unrolled.


@kernel(do_not_specialize=["C", "S_units", "span", "blocks"])
def _lrn_fwd_kernel(
    X, Y, C, S_units, span, blocks, alpha, beta, k,
    SIZE: tl.constexpr, STEP: tl.constexpr, QUARTERS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program has BLOCK positions of one sample, and loops over its span of channels.

    X, Y (N, C, S): float, contiguous.
    """
    S = S_units * UNIT  # so that the compiler sees the factor
    n = (tl.program_id(0) // blocks).to(tl.int64)
    s = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(1) * span
    stop = tl.minimum(first + span, C)
    AFTER: tl.constexpr = (SIZE - 1) // 2
    X += n * C * S
    Y += n * C * S
    window = tl.zeros((BLOCK_W, BLOCK), tl.float32)
    start = tl.maximum(first - SIZE // 2, 0)
    for j in range(start, stop + AFTER, STEP):
        xs = _rows(X, j, C, S, s, STEP, BLOCK_W)
        for i in tl.static_range(STEP):
            row = i if STEP == SIZE else (j - start) % SIZE
            window = _put(window, row, _get(xs, i, BLOCK_W), BLOCK_W)
            c = j + i - AFTER
            u = k + alpha * tl.sum(window * window, 0)
            x = _get(window, (row + SIZE - AFTER) % SIZE, BLOCK_W)
            y = tl.div_rn(x, _power(u, beta, QUARTERS))
            there = (s < S) & (c >= first) & (c < stop)
            tl.store(Y + c * S + s, y.to(Y.dtype.element_ty), mask=there)


@kernel(do_not_specialize=["C", "S_units", "span", "blocks"])
def _lrn_bwd_kernel(
    DY, X, DX, C, S_units, span, blocks, alpha, beta, k,
    SIZE: tl.constexpr, STEP: tl.constexpr, QUARTERS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program has BLOCK positions of one sample, and loops over its span of channels.

    DY, X, DX (N, C, S): float, contiguous.
    """
    S = S_units * UNIT
    n = (tl.program_id(0) // blocks).to(tl.int64)
    s = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(1) * span
    stop = tl.minimum(first + span, C)
    AFTER: tl.constexpr = (SIZE - 1) // 2
    DY += n * C * S
    X += n * C * S
    DX += n * C * S
    xs = tl.zeros((BLOCK_W, BLOCK), tl.float32)
    parts = tl.zeros((BLOCK_W, BLOCK), tl.float32)  # dy / u**beta
    ts = tl.zeros((BLOCK_W, BLOCK), tl.float32)
    start = tl.maximum(first - SIZE + 1, 0)
    for j in range(start, stop + SIZE - 1, STEP):
        fresh = _rows(X, j, C, S, s, STEP, BLOCK_W)
        dys = _rows(DY, j - AFTER, C, S, s, STEP, BLOCK_W)
        for i in tl.static_range(STEP):
            row = i if STEP == SIZE else (j - start) % SIZE
            xs = _put(xs, row, _get(fresh, i, BLOCK_W), BLOCK_W)
            c = j + i - AFTER
            at = (row + SIZE - AFTER) % SIZE
            # Channels before the first complete window give no t that is used.
            there = (c >= tl.maximum(first - AFTER, 0)) & (c < C)
            u = k + alpha * tl.sum(xs * xs, 0)
            part = tl.div_rn(_get(dys, i, BLOCK_W), _power(u, beta, QUARTERS))
            t = tl.where(there, tl.div_rn(part * _get(xs, at, BLOCK_W), u), 0.0)
            parts = _put(parts, at, part, BLOCK_W)
            ts = _put(ts, at, t, BLOCK_W)
            last = (row + 1) % SIZE
            along = 2.0 * alpha * beta * tl.sum(ts, 0)
            dx = _get(parts, last, BLOCK_W) - along * _get(xs, last, BLOCK_W)
            c = j + i - SIZE + 1
            there = (s < S) & (c >= first) & (c < stop)
            tl.store(DX + c * S + s, dx.to(DX.dtype.element_ty), mask=there)


UNROLLED = 8  # the longest window whose loop is unrolled


def _launch(x, size, tensors, alpha, beta, k):
    """((programs), sizes, tile) for contiguous x."""
    N, C = x.shape[:2]
    S = math.prod(x.shape[2:])
    widest = max(t.element_size() for t in tensors)
    # As wide as the registers allow. The compiler must see no more alignment than that: it would
    # give the elements of a wider access to one thread, and the rows of a position to several.
    unit = min(math.gcd(S, 8), 16 // widest, 8 // len(tensors) * 2)
    # At least two positions for each thread, which then compares channels and adds addresses once
    # for both. One warp, so that the rows of a position stay in one thread.
    block = max(32, min(next_power_of_2(S), 32 * max(unit, 2)))
    blocks = cdiv(S, block)
    # Chunks along the channels read the same windows twice, so they are used only if programs are
    # few.
    chunks = max(1, min(PROGRAMS // (N * blocks), C // (20 * size)))
    span = cdiv(C, chunks)
    quarters = int(4 * beta) if beta in (0.25, 0.5, 0.75, 1.0) else 0
    return (
        (N * blocks, cdiv(C, span)),
        (C, S // unit, span, blocks, alpha / size, beta, k),
        {
            "SIZE": size,
            "STEP": size if size <= UNROLLED else 1,
            # The root of -inf is nan, but its power is inf. With these numbers no u is -inf.
            "QUARTERS": quarters if alpha >= 0 and k > -math.inf else 0,
            "UNIT": unit,
            "BLOCK_W": next_power_of_2(size),
            "BLOCK": block,
            "num_warps": 1,
        },
    )


def fwd(x, size, alpha, beta, k, out_dtype=None):
    """x (N, C, *) contiguous and not empty -> y, contiguous."""
    y = empty_as(x, out_dtype)
    grid, sizes, tile = _launch(x, size, (x,), alpha, beta, k)
    _lrn_fwd_kernel(grid, x, y, *sizes, **tile)
    return y


def bwd(dy, x, size, alpha, beta, k):
    """dy and x (N, C, *) contiguous -> dx, in x's dtype."""
    dx = torch.empty_like(x)
    grid, sizes, tile = _launch(x, size, (x, dy, dx), alpha, beta, k)
    _lrn_bwd_kernel(grid, dy, x, dx, *sizes, **tile)
    return dx
