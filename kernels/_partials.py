"""Partial sums: each program leaves its own, and the kernels here add them up in a fixed order.

Sums for each column (gradients of weights and biases, products whose sum several programs share)
are fp32. Sums for a whole tensor (losses) are fp64.
"""

import math

import triton
import triton.language as tl

from fastnn.kernels._config import tunable
from fastnn.kernels._launch import kernel
from fastnn.kernels._sizes import cdiv, next_power_of_2

# ---- Sums for each column ------------------------------------------------------------------------


@triton.jit
def store_sum(P, acc, offs, mask):
    """Store the sum of the rows of `acc`, if P is given."""
    if P is not None:
        tl.store(P + offs, tl.sum(acc, 0).to(P.dtype.element_ty), mask=mask)


@triton.jit
def _sum_columns(PARTIALS, OUT, G, N, cols, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr):
    acc = tl.zeros((BLOCK_G, BLOCK_N), tl.float32)
    row = tl.arange(0, BLOCK_G)
    for g in range(0, G, BLOCK_G):
        mask = (g + row < G)[:, None] & (cols < N)[None, :]
        offs = (g + row).to(tl.int64)[:, None] * N + cols[None, :]
        acc += tl.load(PARTIALS + offs, mask=mask, other=0.0)
    store_sum(OUT, acc, cols, cols < N)


@kernel(do_not_specialize=["G", "N_units"])
def _sum_partials_kernel(
    PARTIALS, FIRST, SECOND, G, N_units,
    UNIT: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program sums BLOCK_N columns of one or two results, and loops over their G partial sums.

    PARTIALS (1 or 2, G, N): fp32, of FIRST and then of SECOND, of those that are given. FIRST,
    SECOND (N,): float, or None.
    """
    N = N_units * UNIT
    cols = tl.program_id(0).to(N.dtype) * BLOCK_N + tl.arange(0, BLOCK_N)
    if FIRST is not None:
        _sum_columns(PARTIALS, FIRST, G, N, cols, BLOCK_G, BLOCK_N)
        PARTIALS += G.to(tl.int64) * N
    if SECOND is not None:
        _sum_columns(PARTIALS, SECOND, G, N, cols, BLOCK_G, BLOCK_N)


@tunable("BLOCK_G", "BLOCK_N")
def _sum_tile(G):
    """Few columns, so that there are many programs, and few turns, each of which waits for memory.

    A row of 16 columns fills two sectors of memory.
    """
    block_g = max(32, min(next_power_of_2(G), 256))
    return {"BLOCK_G": block_g, "BLOCK_N": 16, "num_warps": 8 if block_g > 64 else 2}


def add_up(partials, first, second, G, N, tile=None):
    """partials (1 or 2, G, N) fp32, contiguous -> their sums over G, in `first` (N,) and `second`.

    Both are contiguous. One of them may be None, and then has no partial sums. tile: the options of
    the kernel, if not those for the gradients of a norm.
    """
    config = _sum_tile(G) if tile is None else tile
    unit = math.gcd(N, 8) if N < 2**31 else 1  # so that a size of 64 bits arrives as one
    _sum_partials_kernel(
        (cdiv(N, config["BLOCK_N"]),), partials, first, second, G, N // unit, UNIT=unit, **config
    )


IN_ORDER = {"BLOCK_G": 1, "BLOCK_N": 256, "num_warps": 4}  # few partial sums of many columns


def in_order(partials, out):
    """partials (G, ...) fp32, contiguous, added up one after the other -> out (...), contiguous."""
    add_up(partials, out, None, partials.shape[0], out.numel(), IN_ORDER)
    return out


# ---- Sums for a whole tensor ---------------------------------------------------------------------


@kernel(do_not_specialize=["G", "divisor"])
def _loss_finish_kernel(
    PARTIAL, LOSS, COUNT, G, divisor: tl.int64, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr
):
    """The one program adds up all partial sums, and loops over them.

    PARTIAL (1 or 2, G): fp64. LOSS: float, one element. COUNT: fp32, one element, the sum of
    weights, or None.
    """
    offs = tl.arange(0, BLOCK)
    loss = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.float64)
    for g in range(0, G, BLOCK):
        mask = g + offs < G
        loss += tl.load(PARTIAL + g + offs, mask=mask, other=0.0)
        if WEIGHTS:
            count += tl.load(PARTIAL + G + g + offs, mask=mask, other=0.0)
    total = tl.sum(loss, 0)
    if WEIGHTS:
        by = tl.sum(count, 0)
        tl.store(COUNT, by.to(tl.float32))
    else:
        by = divisor.to(tl.float64)
    total /= by
    tl.store(LOSS, total.to(tl.float32).to(LOSS.dtype.element_ty))


def finish(partial, loss, count, divisor, block=None, num_warps=8):
    """partial (1 or 2, G) fp64, sums of losses and of weights -> loss / divisor.

    If `count` (0-d fp32) is given, the divisor is the sum of the weights, and is stored in `count`.
    """
    G = partial.shape[1]
    if block is None:
        block = 256 if G <= 256 else 2048
    _loss_finish_kernel(
        (1,), partial, loss, count, G, divisor,
        WEIGHTS=count is not None, BLOCK=block, num_warps=num_warps,
    )  # fmt: skip


# ---- Two gradients of one result -----------------------------------------------------------------


@triton.jit
def gradient_of(DY, MORE, offs, mask):
    """Gradients at `offs`, in float32. With MORE, the sum of two, rounded as PyTorch rounds it."""
    dy = tl.load(DY + offs, mask=mask, other=0.0).to(tl.float32)
    if MORE is not None:
        dy += tl.load(MORE + offs, mask=mask, other=0.0).to(tl.float32)
        dy = dy.to(DY.dtype.element_ty).to(tl.float32)
    return dy
