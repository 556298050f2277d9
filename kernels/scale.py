"""Product with a scale that is broadcast, and the sum with a residual: y = x * w[c] (+ r).

    dx = dy * w[c]        dw[c] = sum of dy * x over the elements that have w[c]        dr = dy

Layer scale (arXiv:2103.17239) has a scale for each channel, stochastic depth (arXiv:1603.09382) one
for each sample, and squeeze-and-excitation (arXiv:1709.01507) one for each channel of a sample.
Memory-bound; passes over the elements (R read, W write; r in brackets):

    stock   forward 1R 1W (2R 1W); backward 1R 1W, and 2R 1W for dy * x, and 1R to sum it
    here    forward 1R 1W (1R); backward 2R 1W, with dw summed on the way, in fp32 and a fixed order

The kernels see the tensor as N times C scales times S elements that lie together, as prelu.py does.
"""

import torch
import triton.language as tl

from fastnn.kernels import prelu
from fastnn.kernels._config import tunable
from fastnn.kernels._launch import kernel
from fastnn.kernels._tl import dense_like, empty_as
from fastnn.kernels.prelu import COLUMNS, ROWS, tile, weights


@kernel(do_not_specialize=["N"])
def _scale_fwd_kernel(
    X, W, RESIDUAL, Y, N, C, S, LAYOUT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):
    """A program computes one tile of y.

    X, RESIDUAL, Y (N, C, S): float, contiguous. RESIDUAL may be None. W (C,): float.
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
        y = tl.load(X + offs).to(tl.float32) * w
        if RESIDUAL is not None:
            y += tl.load(RESIDUAL + base + offs).to(tl.float32)
        tl.store(Y + offs, y.to(Y.dtype.element_ty))
    else:
        mask = (rows < rows_left) & (cols < cols_left)
        y = tl.load(X + offs, mask=mask, other=0.0).to(tl.float32) * w
        if RESIDUAL is not None:
            y += tl.load(RESIDUAL + base + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(Y + offs, y.to(Y.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["N", "tiles"])
def _scale_bwd_kernel(
    DY, X, W, DX, PARTIAL, N, C, S, tiles,
    LAYOUT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program has a block of scales, and loops over every G-th tile of them.

    DY, X, DX (N, C, S): float, contiguous. W (C,): float. PARTIAL (G, C): fp32 sums of dw. DX may
    be None; so may X and PARTIAL.
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
            if DX is not None:
                tl.store(DX + base + offs, (dy * w).to(DX.dtype.element_ty))
            if PARTIAL is not None:
                dw += dy * tl.load(X + base + offs).to(tl.float32)
        else:
            mask = (rows < rows_left) & (cols < cols_left)
            dy = tl.load(DY + base + offs, mask=mask, other=0.0).to(tl.float32)
            if DX is not None:
                tl.store(DX + base + offs, (dy * w).to(DX.dtype.element_ty), mask=mask)
            if PARTIAL is not None:
                dw += dy * tl.load(X + base + offs, mask=mask, other=0.0).to(tl.float32)
    if PARTIAL is not None:
        PARTIAL += tl.program_id(1).to(tl.int64) * C + c
        if LAYOUT == COLUMNS:
            k = tl.arange(0, BLOCK_K)
            tl.store(PARTIAL + k, tl.sum(dw, 0), mask=k < C - c)
        else:
            r = tl.arange(0, BLOCK_R)
            tl.store(PARTIAL + r, tl.sum(dw, 1), mask=r < C - c)


@tunable("BLOCK_R", "BLOCK_K")
def _config(N, C, S, itemsize):
    return prelu.tile_config(N, C, S, itemsize)


def fwd(x, w, residual, sizes):
    """x, not empty; w, contiguous; a residual shaped as x, or None -> y, with the layout of x.

    sizes: (N, C, S) of the memory of y, where w has C elements.
    """
    y = empty_as(x)
    N, C, S = sizes
    config = _config(N, C, S, x.element_size())
    blocks, tiles = prelu.blocks_of(N, C, S, config)
    other = None if residual is None else dense_like(residual, y)
    _scale_fwd_kernel((blocks * tiles,), dense_like(x, y), w, other, y, N, C, S, **config)
    return y


def bwd(dy, x, w, like, sizes, needs_dx, needs_dw):
    """dy; x and w as in `fwd` -> dx, and dw as w. x may be None without dw. None if not needed.

    like: (shape, strides) of y, which dx has, too.
    """
    dx = torch.empty_strided(*like, dtype=dy.dtype, device=dy.device)
    N, C, S = sizes
    config = _config(N, C, S, dx.element_size())
    blocks, tiles = prelu.blocks_of(N, C, S, config)
    G = prelu.summing_programs(blocks, tiles, config)
    partial = torch.empty((G, C), dtype=torch.float32, device=dx.device) if needs_dw else None
    _scale_bwd_kernel(
        (blocks, G), dense_like(dy, dx), dense_like(x, dx) if needs_dw else None, w,
        dx if needs_dx else None, partial, N, C, S, tiles, **config,
    )  # fmt: skip
    dw = None
    if needs_dw:
        dw = torch.empty_like(w)
        prelu.sum_weights(partial, dw)
    return dx if needs_dx else None, dw


def sizes_of(y, w):
    """(N, C, S) of the memory of y, shaped as x, for a scale w; None if no three numbers tell it.

    The dimensions along which w is not broadcast must lie beside each other in memory, in order.
    """
    at = [d + y.dim() - w.dim() for d in range(w.dim()) if w.shape[d] != 1]
    order = sorted((d for d in range(y.dim()) if y.shape[d] != 1), key=lambda d: -y.stride(d))
    if not at:
        return 1, 1, y.numel()
    first = order.index(at[0])
    if order[first : first + len(at)] != at:
        return None
    S = 1
    for d in order[first + len(at) :]:
        S *= y.shape[d]
    C = w.numel()
    return y.numel() // (C * S), C, S
