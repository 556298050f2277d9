"""What follows a product: y = noise * act(z), and its backward.

    dz[m, n] = act'(z[m, n]) * noise[m, n] * dy[m, n]        db[n] = sum over m of dz[m, n]

noise is the scale of dropout where an element is kept, else 0. Memory-bound. Passes over the M*N
elements (R read, W write; a mask is a byte each):
    stock   act 1R 1W, dropout 1R 1W + mask; dropout 1R 1W + mask, act 2R 1W, db 1R     11 + 2 masks
    here    1R 1W; 2R 1W                                                                 5
The backward draws the random words again (`_philox`), so no mask is kept.
"""

import torch
import triton
import triton.language as tl

from fastnn.kernels import _philox, pointwise
from fastnn.kernels._gpus import multiprocessors
from fastnn.kernels._launch import kernel
from fastnn.kernels._partials import in_order
from fastnn.kernels._sizes import cdiv, next_power_of_2


@triton.jit
def follow(
    acc, Z, offs, mask, cols, there, BIAS, MEAN, VAR, SCALE, SHIFT, eps, a, b,
    FORMULA: tl.constexpr,
):  # fmt: skip
    """What follows a tile of sums, acc (rows, columns): y of the tile, in fp32.

    z = acc + bias is stored at `offs` of Z, if Z is given; then z is normalised, if MEAN is given,
    and FORMULA is applied, if there is one. BIAS, MEAN, VAR, SCALE and SHIFT: float, of all
    columns, or None. cols: those of the tile, of which those exist that are `there`.
    """
    if BIAS is not None:
        acc += tl.load(BIAS + cols, mask=there, other=0.0).to(tl.float32)[None, :]
    if Z is not None:
        tl.store(Z + offs, acc.to(Z.dtype.element_ty), mask=mask)
    if MEAN is not None:
        mean = tl.load(MEAN + cols, mask=there, other=0.0).to(tl.float32)
        var = tl.load(VAR + cols, mask=there, other=1.0).to(tl.float32)
        # Not one factor of the sum: the product of a large scale and a small rstd is rounded last.
        acc = (acc - mean[None, :]) * tl.div_rn(1.0, tl.sqrt_rn(var + eps))[None, :]
        if SCALE is not None:
            acc *= tl.load(SCALE + cols, mask=there, other=0.0).to(tl.float32)[None, :]
        if SHIFT is not None:
            acc += tl.load(SHIFT + cols, mask=there, other=0.0).to(tl.float32)[None, :]
    if FORMULA is not None:
        acc = FORMULA(acc, a, b)
    return acc


_RANDOM = ["seed", "offset", "blocks", "bound"]


@kernel(do_not_specialize=["n", *_RANDOM])
def _epilogue_fwd_kernel(
    Z, Y, n: tl.int64, a, b, scale, seed: tl.int64, offset: tl.int64, SEED, OFFSET, STATE, blocks,
    bound: tl.uint32, FORMULA: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program computes y of one block of BLOCK elements of z.

    Z, Y (n,): float. SEED, OFFSET, STATE: int64, or None; see _philox.load_state and save_state.
    """
    seed, offset = _philox.load_state(seed, offset, SEED, OFFSET)
    _philox.save_state(STATE, seed, offset)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    keep = _philox.keep_mask(start, seed, offset, blocks, bound, VEC, BLOCK)
    Z += start
    Y += start
    offs = tl.arange(0, BLOCK)
    # A product with the noise, not a select: a dropped inf becomes nan, as in PyTorch.
    if start + BLOCK <= n:  # no mask, so that accesses are 128 bits wide for every n
        y = FORMULA(tl.load(Z + offs).to(tl.float32), a, b) * tl.where(keep, scale, 0.0)
        tl.store(Y + offs, y.to(Y.dtype.element_ty))
    else:
        mask = offs < n - start
        z = tl.load(Z + offs, mask=mask, other=0.0).to(tl.float32)
        y = FORMULA(z, a, b) * tl.where(keep, scale, 0.0)
        tl.store(Y + offs, y.to(Y.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["m", "n", "ld", "rows_each", *_RANDOM])
def _epilogue_bwd_kernel(
    DY, S, DZ, PARTIALS, m, n, ld, rows_each, a, b, scale, seed: tl.int64, offset: tl.int64, SEED,
    OFFSET, blocks, bound: tl.uint32, N_VEC: tl.constexpr, LD_VEC: tl.constexpr,
    FORMULA: tl.constexpr, GRADIENT: tl.constexpr, VEC: tl.constexpr, BY_FOUR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program computes dz of rows_each rows of BLOCK_N columns, and loops over those rows.

    DY (m, N): float, rows ld apart. S, DZ (m, N): float, contiguous, or None. PARTIALS (parts, N):
    fp32 sums of dz over the rows of a program, or None. SEED, OFFSET: int64, or None; see
    _philox.load_state.
    """
    # n is passed divided by a factor of it, so that the compiler sees the factor: see linear.py.
    N = n * N_VEC
    ld = ld.to(tl.int64) * LD_VEC
    part = tl.program_id(1)
    n0 = tl.program_id(0) * BLOCK_N
    m0 = part * rows_each
    m1 = tl.minimum(m, m0 + rows_each)
    rows = tl.arange(0, BLOCK_M)[:, None]
    cols = tl.arange(0, BLOCK_N)[None, :]
    start = m0.to(tl.int64) * N + n0
    DY += m0.to(tl.int64) * ld + n0
    if VEC:
        seed, offset = _philox.load_state(seed, offset, SEED, OFFSET)
    if GRADIENT is not None:
        S += start
    if DZ is not None:
        DZ += start
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(m0, m1, BLOCK_M):
        mask = (rows < m1 - i) & (cols < N - n0)
        dz = tl.load(DY + rows * ld + cols, mask=mask, other=0.0).to(tl.float32)
        if VEC:
            keep = _philox.keep_tile(
                i, n0, N, seed, offset, blocks, bound, VEC, BY_FOUR, BLOCK_M, BLOCK_N
            )
            dz *= tl.where(keep, scale, 0.0)
        if GRADIENT is not None:
            s = tl.load(S + rows * N + cols, mask=mask, other=0.0).to(tl.float32)
            if FORMULA is not None:  # the gradient's formula takes y, and only z was kept
                s = FORMULA(s, a, b)
            dz = GRADIENT(dz, s, a, b)
            S += BLOCK_M * N
        if DZ is not None:
            tl.store(DZ + rows * N + cols, dz.to(DZ.dtype.element_ty), mask=mask)
            DZ += BLOCK_M * N
        if PARTIALS is not None:
            acc += tl.where(mask, dz, 0.0)  # past the edge act'(0) may give nan
        DY += BLOCK_M * ld
    if PARTIALS is not None:
        offs = n0 + tl.arange(0, BLOCK_N)
        tl.store(PARTIALS + part.to(tl.int64) * N + offs, tl.sum(acc, 0), mask=offs < N)


def width(v, *sizes):
    """v if it divides every size, else 1."""
    return v if not any(size % v for size in sizes) else 1


def fwd(z, y, formula, a, b, draw, bound, scale, state=None):
    """z contiguous -> y = noise * formula(z; a, b), in `y`. Without a draw, no dropout."""
    n = z.numel()
    if draw is None:
        return pointwise.fwd_into(y, z, formula, a, b)
    BLOCK = 4096 // z.element_size()
    seed, offset, SEED, OFFSET, blocks, bound = _philox.random_arguments(draw, bound)
    _epilogue_fwd_kernel(
        (cdiv(n, BLOCK),), z, y, n, a, b, scale, seed, offset, SEED, OFFSET, state, blocks,
        bound, FORMULA=getattr(pointwise, formula), VEC=draw.vec, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return y


def bwd(
    dy, s=None, gradient=None, formula=None, a=0.0, b=0.0, draw=None, bound=0, scale=1.0,
    want_dz=True, want_db=True,
):  # fmt: skip
    """dy (M, N) with unit stride in N -> (dz, db), each None unless wanted.

    s is the contiguous tensor that `gradient` takes; or z, from which `formula` computes it. db is
    summed from fp32 partial sums.
    """
    M, N = dy.shape
    v = 16 // dy.element_size()
    n_vec, ld_vec = width(v, N), width(v, dy.stride(0))
    block_n = min(128, max(16, next_power_of_2(N)))
    # Narrow accesses need many small programs in flight. A larger tile would spill in both cases.
    block_m = max(1, (2048 if n_vec > 1 else 1024 // dy.element_size()) // block_n)
    columns = cdiv(N, block_n)
    # The partial sums are 1/64 of what is read.
    sms = multiprocessors(dy.get_device())
    parts = max(1, min(4 * sms // max(columns, 1), cdiv(M, 64)))
    rows_each = max(block_m, cdiv(cdiv(M, parts), block_m) * block_m)
    parts = max(1, cdiv(M, rows_each))
    dz = dy.new_empty((M, N)) if want_dz else None
    partials = dy.new_empty((parts, N), dtype=torch.float32) if want_db else None
    _epilogue_bwd_kernel(
        (columns, parts), dy, s, dz, partials, M, N // n_vec, dy.stride(0) // ld_vec, rows_each,
        a, b, scale, *_philox.random_arguments(draw, bound), N_VEC=n_vec, LD_VEC=ld_vec,
        FORMULA=formula and getattr(pointwise, formula),
        GRADIENT=gradient and getattr(pointwise, gradient),
        VEC=draw.vec if draw else 0, BY_FOUR=_philox.by_four(N, draw),
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return dz, in_order(partials, dy.new_empty(N)) if want_db else None
