"""y = x W^T + b and its gradients: one GEMM kernel, C = A B, whose operands may be transposed.

    forward     y[M, N]  = x[M, K] W[N, K]^T + b[N]; then, fused, z = y, y = dropout(act(z))
    backward    dx[M, K] = dy[M, N] W[N, K]
                dW[N, K] = dy[M, N]^T x[M, K]
                db[N]    = sum over m of dy[m, N]

Each product takes 2MNK FLOPs, and moves MK + NK + MN elements. It is compute-bound for K above a
few hundred. W stays [N, K]: a transpose is only another stride. Products accumulate in fp32 for
every dtype.
"""

import torch
import triton
import triton.language as tl

from fastnn.kernels import _philox, pointwise
from fastnn.kernels._config import tunable
from fastnn.kernels._gemm import largest_tile, shares, tile_of
from fastnn.kernels._gpus import multiprocessors
from fastnn.kernels._launch import kernel
from fastnn.kernels._partials import in_order
from fastnn.kernels._sizes import cdiv
from fastnn.kernels.epilogue import follow, width


@triton.jit
def _product(
    A, B, m0, n0, k0, k1, M, N, lda, ldb,
    A_KMAJOR: tl.constexpr, B_KMAJOR: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) fp32: rows m0... of A times columns n0... of B, over k in [k0, k1)."""
    # Rows and columns past the end read valid ones again, so the loop needs no mask for them.
    ks = tl.arange(0, BLOCK_K)
    if A_KMAJOR:
        rows = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - m0)
        A += m0.to(tl.int64) * lda + k0
        a_pointers = A + rows[:, None] * lda + ks[None, :]
        a_step = BLOCK_K
    else:
        rows = (m0 + tl.arange(0, BLOCK_M)) % M
        A += k0.to(tl.int64) * lda
        a_pointers = A + rows[:, None] + ks[None, :] * lda
        a_step = BLOCK_K * lda
    if B_KMAJOR:
        cols = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - n0)
        B += n0.to(tl.int64) * ldb + k0
        b_pointers = B + cols[None, :] * ldb + ks[:, None]
        b_step = BLOCK_K
    else:
        cols = (n0 + tl.arange(0, BLOCK_N)) % N
        B += k0.to(tl.int64) * ldb
        b_pointers = B + cols[None, :] + ks[:, None] * ldb
        b_step = BLOCK_K * ldb
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(k0, k1, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_pointers)
            b = tl.load(b_pointers)
        else:
            a = tl.load(a_pointers, mask=ks[None, :] < k1 - k, other=0.0)
            b = tl.load(b_pointers, mask=ks[:, None] < k1 - k, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_pointers += a_step
        b_pointers += b_step
    return acc


_RUNTIME = ["m", "n", "k", "lda", "ldb", "k_split", "seed", "offset", "blocks", "bound"]


@kernel(do_not_specialize=_RUNTIME)
def _gemm_kernel(
    A, B, C, BIAS, Z, m, n, k, lda, ldb, k_split, a, b, scale, seed: tl.int64, offset: tl.int64,
    SEED, OFFSET, STATE, blocks, bound: tl.uint32,
    M_VEC: tl.constexpr, N_VEC: tl.constexpr, K_VEC: tl.constexpr, A_VEC: tl.constexpr,
    B_VEC: tl.constexpr, A_KMAJOR: tl.constexpr, B_KMAJOR: tl.constexpr, EVEN_K: tl.constexpr,
    FORMULA: tl.constexpr, VEC: tl.constexpr, BY_FOUR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """A program computes one tile of C, and loops over its share of K.

    A (M, K), B (K, N): one float dtype, contiguous along K if A_KMAJOR or B_KMAJOR, else along M or
    N. C (splits, M, N): float; fp32 partial sums if splits > 1. BIAS (N,): float, or None. Z (M,
    N): float, C before FORMULA and dropout, or None. SEED, OFFSET, STATE: int64, or None; see
    _philox.load_state and save_state.
    """
    # Sizes are passed divided by a factor of them. So the compiler sees the factor, and makes
    # accesses 128 bits wide. Triton's own test, for 16, would miss all sizes such as 1000 or 72.
    M = m * M_VEC
    N = n * N_VEC
    K = k * K_VEC
    lda = lda.to(tl.int64) * A_VEC
    ldb = ldb.to(tl.int64) * B_VEC
    pid = tl.program_id(0)
    row, column = tile_of(pid, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m0 = row * BLOCK_M
    n0 = column * BLOCK_N
    split = tl.program_id(1)
    k0 = split * k_split * BLOCK_K
    k1 = tl.minimum(K, k0 + k_split * BLOCK_K)
    acc = _product(
        A, B, m0, n0, k0, k1, M, N, lda, ldb, A_KMAJOR, B_KMAJOR, EVEN_K, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    mask = (rows[:, None] < M - m0) & (cols[None, :] < N - n0)
    start = (split.to(tl.int64) * M + m0) * N + n0
    offs = rows[:, None] * N + cols[None, :]
    if BIAS is not None:
        BIAS += n0
    if Z is not None:
        Z += start
    acc = follow(
        acc, Z, offs, mask, cols, cols < N - n0, BIAS, None, None, None, None, 0.0, a, b, FORMULA
    )
    if VEC:
        seed, offset = _philox.load_state(seed, offset, SEED, OFFSET)
        _philox.save_state(STATE, seed, offset)
        keep = _philox.keep_tile(
            m0, n0, N, seed, offset, blocks, bound, VEC, BY_FOUR, BLOCK_M, BLOCK_N
        )
        acc *= tl.where(keep, scale, 0.0)
    tl.store(C + start + offs, acc.to(C.dtype.element_ty), mask=mask)


# ---- Configurations ------------------------------------------------------------------------------


@tunable("BLOCK_M", "BLOCK_N", "BLOCK_K")
def _config(M, N, itemsize, precision, arch, sms, aligned, epilogue):
    block_m, block_n, block_k, warps, stages = largest_tile(
        M, N, itemsize, precision, arch, sms, aligned, epilogue
    )
    config = {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k * 2 // itemsize,
        "GROUP_M": 8,
        "num_warps": warps,
        "num_stages": stages,
    }
    if arch == "sm_120" or (itemsize == 4 and precision == "ieee" and warps == 4):
        # Without a limit, ptxas spills a few registers of some layouts, so that another block fits.
        config["maxnreg"] = 128 if warps == 8 else 255 if itemsize == 2 and epilogue else 168
    return config


# ---- Launchers -----------------------------------------------------------------------------------


def _matrix(t):
    """(t or a copy, its leading stride, whether the last dim has unit stride)."""
    rows, cols = t.shape
    if t.stride(1) == 1 or cols <= 1:
        return t, t.stride(0), True
    if t.stride(0) == 1 or rows <= 1:
        return t, t.stride(1), False
    return t.contiguous(), cols, True


def _gemm(a, b, precision, arch, split=False, bias=None, y=None, z=None, act=None, noise=None):
    """a (M, K), b (K, N), any strides -> a b (M, N), contiguous. For the rest, see `fwd`."""
    (M, K), N = a.shape, b.shape[1]
    a, lda, a_kmajor = _matrix(a)
    b, ldb, b_nmajor = _matrix(b)
    v = 16 // a.element_size()
    a_vec, b_vec = width(v, lda), width(v, ldb)
    aligned = (
        a_vec == b_vec == v
        and (K if a_kmajor else M) % v == 0
        and (N if b_nmajor else K) % v == 0
        and a.data_ptr() % 16 == 0
        and b.data_ptr() % 16 == 0
    )
    follows = "noise" if noise else "act" if act else None
    sms = multiprocessors(a.get_device())
    config = _config(M, N, a.element_size(), precision, arch, sms, aligned, follows)
    # If no operand runs along K, its factors do not matter.
    k_vec = width(v, K) if a_kmajor or not b_nmajor else 1
    m_vec = 1 if a_kmajor else width(v, M)
    n_vec = width(v, N)
    block_k = config["BLOCK_K"]
    steps = cdiv(K, block_k)
    tiles = cdiv(M, config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"])
    each, splits = shares(tiles, steps, sms) if split and K else (steps, 1)
    if y is None:
        y = a.new_empty((M, N))
    out = a.new_empty((splits, M, N), dtype=torch.float32) if splits > 1 else y
    formula, fa, fb = act or (None, 0.0, 0.0)
    draw, bound, scale, state = noise or (None, 0, 1.0, None)
    seed, offset, SEED, OFFSET, blocks, bound = _philox.random_arguments(draw, bound)
    _gemm_kernel(
        (tiles, splits), a, b, out, bias, z, M // m_vec, N // n_vec, K // k_vec, lda // a_vec,
        ldb // b_vec, each, fa, fb, scale, seed, offset, SEED, OFFSET, state, blocks, bound,
        M_VEC=m_vec, N_VEC=n_vec, K_VEC=k_vec, A_VEC=a_vec, B_VEC=b_vec, A_KMAJOR=a_kmajor,
        B_KMAJOR=not b_nmajor, EVEN_K=K % block_k == 0,
        FORMULA=formula and getattr(pointwise, formula), VEC=draw.vec if draw else 0,
        BY_FOUR=_philox.by_four(N, draw), PRECISION=precision, **config,
    )  # fmt: skip
    return in_order(out, y) if splits > 1 else y


def fwd(x, weight, bias, precision, arch, y=None, z=None, act=None, noise=None):
    """x (M, K), weight (N, K), bias (N,) or None, any strides -> y (M, N), in `y` if given.

    act: (formula, a, b), applied to the sum z. z is also stored, if `z` is given. noise: (draw,
    bound, scale, state) of the dropout that follows.
    """
    return _gemm(x, weight.t(), precision, arch, bias=bias, y=y, z=z, act=act, noise=noise)


def bwd_dx(dy, weight, precision, arch, dx=None):
    """dy (M, N), weight (N, K) -> dx (M, K), in `dx` if given."""
    return _gemm(dy, weight, precision, arch, split=True, y=dx)


def bwd_dw(dy, x, precision, arch, dw=None):
    """dy (M, N), x (M, K) -> dW (N, K), in `dw` if given."""
    return _gemm(dy.t(), x, precision, arch, split=True, y=dw)
