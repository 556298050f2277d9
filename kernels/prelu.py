"""PReLU: y = x if x > 0 else w[c] * x, with one weight, or one for each channel c.

    dx = dy if x > 0 else w[c] * dy        dw[c] = sum of dy * x over x <= 0

Memory-bound; passes over the elements (R read, W write):
    stock   forward 1R 1W; backward 2R 2W, and 1R to sum the table of weight gradients
    here    forward 1R 1W; backward 2R 1W, with dw summed on the way, in fp32 and a fixed order
The kernels see the tensor as N times C channels of S elements that lie together. S is 1 if channels
are last. With one weight for all, the tensor is one channel.
"""

import torch
import triton
import triton.language as tl

from fastnn.kernels._config import tunable
from fastnn.kernels._launch import kernel
from fastnn.kernels._partials import add_up
from fastnn.kernels._sizes import cdiv, next_power_of_2
from fastnn.kernels._tl import dense_like

# A tile has: elements of the only channel; channels by S elements; or N by channels.
ONE = tl.constexpr(0)
ROWS = tl.constexpr(1)
COLUMNS = tl.constexpr(2)


@triton.jit
def tile(n, c, s, N, C, S, LAYOUT: tl.constexpr):
    """The tile that starts at (n, c, s): its offset, rows left, columns left, row stride."""
    base = (n * C + c) * S + s
    if LAYOUT == COLUMNS:
        return base, N - n, C - c, C
    else:
        return base, C - c, S - s, S


@triton.jit
def weights(W, c, C, LAYOUT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    if LAYOUT == COLUMNS:
        cols = tl.arange(0, BLOCK_K)[None, :]
        return tl.load(W + c + cols, mask=cols < C - c, other=0.0).to(tl.float32)
    else:
        rows = tl.arange(0, BLOCK_R)[:, None]
        return tl.load(W + c + rows, mask=rows < C - c, other=0.0).to(tl.float32)


@kernel(do_not_specialize=["N"])
def _prelu_fwd_kernel(
    X, W, Y, N, C, S, LAYOUT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):
    """A program computes one tile of y.

    X, Y (N, C, S): float, contiguous. W (C,): float.
    """
    pid = tl.program_id(0)
    if LAYOUT == COLUMNS:
        blocks = tl.cdiv(C, BLOCK_K)
        n = (pid // blocks).to(tl.int64) * BLOCK_R
        c = pid % blocks * BLOCK_K
        s = 0
    elif LAYOUT == ROWS:
        blocks = tl.cdiv(S, BLOCK_K)
        s = pid % blocks * BLOCK_K
        blocks_c = tl.cdiv(C, BLOCK_R)
        c = pid // blocks % blocks_c * BLOCK_R
        n = (pid // blocks // blocks_c).to(tl.int64)
    else:
        n = 0
        c = 0
        s = pid.to(tl.int64) * BLOCK_K
    w = weights(W, c, C, LAYOUT, BLOCK_R, BLOCK_K)
    base, rows_left, cols_left, stride = tile(n, c, s, N, C, S, LAYOUT)
    rows = tl.arange(0, BLOCK_R)[:, None]
    cols = tl.arange(0, BLOCK_K)[None, :]
    offs = rows * stride + cols
    X += base
    Y += base
    if (BLOCK_R <= rows_left) & (BLOCK_K <= cols_left):
        x = tl.load(X + offs).to(tl.float32)
        tl.store(Y + offs, tl.where(x > 0, x, w * x).to(Y.dtype.element_ty))
    else:
        mask = (rows < rows_left) & (cols < cols_left)
        x = tl.load(X + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(Y + offs, tl.where(x > 0, x, w * x).to(Y.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["N", "tiles"])
def _prelu_bwd_kernel(
    DY, X, W, DX, PARTIAL, N, C, S, tiles,
    LAYOUT: tl.constexpr, NEEDS_DX: tl.constexpr, NEEDS_DW: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program has a block of channels, and loops over every G-th tile of them.

    DY, X, DX (N, C, S): float, contiguous. W (C,): float. PARTIAL (G, C): fp32 sums of dw, if
    NEEDS_DW.
    """
    c = tl.program_id(0) * (BLOCK_K if LAYOUT == COLUMNS else BLOCK_R)
    w = weights(W, c, C, LAYOUT, BLOCK_R, BLOCK_K)
    rows = tl.arange(0, BLOCK_R)[:, None]
    cols = tl.arange(0, BLOCK_K)[None, :]
    dw = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for t in range(tl.program_id(1), tiles, tl.num_programs(1)):
        if LAYOUT == COLUMNS:
            base, rows_left, cols_left, stride = tile(
                tl.cast(t, tl.int64) * BLOCK_R, c, 0, N, C, S, LAYOUT
            )
        elif LAYOUT == ROWS:
            blocks = tl.cdiv(S, BLOCK_K)
            base, rows_left, cols_left, stride = tile(
                tl.cast(t // blocks, tl.int64), c, t % blocks * BLOCK_K, N, C, S, LAYOUT
            )
        else:
            base, rows_left, cols_left, stride = tile(
                0, 0, tl.cast(t, tl.int64) * BLOCK_K, N, C, S, LAYOUT
            )
        offs = rows * stride + cols
        if (BLOCK_R <= rows_left) & (BLOCK_K <= cols_left):
            dy = tl.load(DY + base + offs).to(tl.float32)
            x = tl.load(X + base + offs).to(tl.float32)
            if NEEDS_DX:
                dx = tl.where(x > 0, dy, w * dy)
                tl.store(DX + base + offs, dx.to(DX.dtype.element_ty))
        else:
            mask = (rows < rows_left) & (cols < cols_left)
            dy = tl.load(DY + base + offs, mask=mask, other=0.0).to(tl.float32)
            x = tl.load(X + base + offs, mask=mask, other=0.0).to(tl.float32)
            if NEEDS_DX:
                dx = tl.where(x > 0, dy, w * dy)
                tl.store(DX + base + offs, dx.to(DX.dtype.element_ty), mask=mask)
        dw += tl.where(x > 0, 0.0, x * dy)
    if NEEDS_DW:
        PARTIAL += tl.program_id(1).to(tl.int64) * C + c
        if LAYOUT == COLUMNS:
            k = tl.arange(0, BLOCK_K)
            tl.store(PARTIAL + k, tl.sum(dw, 0), mask=k < C - c)
        else:
            r = tl.arange(0, BLOCK_R)
            tl.store(PARTIAL + r, tl.sum(dw, 1), mask=r < C - c)


PROGRAMS = 1024  # in the backward: several per multiprocessor, but few partial sums


def tile_config(N, C, S, itemsize):
    """How the elements around one weight make up a tile."""
    size = 4096 // itemsize  # 32 bytes per lane of 4 warps
    if C == 1:
        layout, block_r, block_k = ONE, 1, size
    elif S == 1:
        layout, block_k = COLUMNS, min(next_power_of_2(C), 128)
        if size // block_k * C >= 2**31:  # 32 bits would not hold the offsets within a tile
            block_k = size
        block_r = size // block_k
    else:
        layout, block_k = ROWS, min(next_power_of_2(S), size)
        block_r = min(next_power_of_2(C), size // block_k)
    return {"LAYOUT": layout.value, "BLOCK_R": block_r, "BLOCK_K": block_k, "num_warps": 4}


@tunable("BLOCK_R", "BLOCK_K")
def _config(N, C, S, itemsize):
    return tile_config(N, C, S, itemsize)


def blocks_of(N, C, S, config):
    """(blocks of channels, tiles per block)."""
    r, k = config["BLOCK_R"], config["BLOCK_K"]
    if config["LAYOUT"] == COLUMNS.value:
        return cdiv(C, k), cdiv(N, r)
    return cdiv(C, r), N * cdiv(S, k)


def summing_programs(blocks, tiles, config):
    """How many programs share the tiles of a block, each with partial sums of its own."""
    in_tile = config["BLOCK_K" if config["LAYOUT"] == COLUMNS.value else "BLOCK_R"]
    least = max(1, in_tile // 32)  # tiles per program, so that partial sums are few in comparison
    return max(1, min(PROGRAMS // blocks, tiles // least))


def sum_weights(partial, dw):
    """partial (G, C), fp32 -> their sums, into dw (C), contiguous."""
    G, C = partial.shape
    block_c = min(next_power_of_2(C), 64)
    add_up(
        partial, dw, None, G, C, {"BLOCK_G": 1024 // block_c, "BLOCK_N": block_c, "num_warps": 4}
    )


def _sizes(dense, w):
    """(N, C, S) of a dense tensor with the weights `w`."""
    if w.numel() == 1:
        return 1, 1, dense.numel()
    C, S = w.numel(), dense.stride(1)
    return dense.numel() // (C * S), C, S


def fwd(x, w):
    """x, any shape and strides; w (1) or (x.shape[1]) -> y, with the layout of PyTorch's result."""
    y = torch.empty_like(x)
    if y.numel():
        N, C, S = _sizes(y, w)
        config = _config(N, C, S, x.element_size())
        blocks, tiles = blocks_of(N, C, S, config)
        _prelu_fwd_kernel((blocks * tiles,), dense_like(x, y), w, y, N, C, S, **config)
    return y


def bwd(dy, x, w, needs_dx=True, needs_dw=True):
    """dy and x, of one shape; w as in `fwd` -> dx, dw in their dtypes; None if not needed."""
    dx = torch.empty_like(x)
    if not x.numel():
        return dx if needs_dx else None, torch.zeros_like(w) if needs_dw else None
    N, C, S = _sizes(dx, w)
    config = _config(N, C, S, x.element_size())
    blocks, tiles = blocks_of(N, C, S, config)
    G = summing_programs(blocks, tiles, config)
    partial = torch.empty((G, C) if needs_dw else (1, 1), dtype=torch.float32, device=x.device)
    _prelu_bwd_kernel(
        (blocks, G), dense_like(dy, dx), dense_like(x, dx), w, dx, partial,
        N, C, S, tiles, NEEDS_DX=needs_dx, NEEDS_DW=needs_dw, **config,
    )  # fmt: skip
    dw = None
    if needs_dw:
        dw = torch.empty_like(w, memory_format=torch.contiguous_format)
        sum_weights(partial, dw)
    return dx if needs_dx else None, dw
