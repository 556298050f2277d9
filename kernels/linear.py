"""y = x W^T + b and its gradients: one GEMM kernel, C = A B, whose operands may be transposed.

    forward     y[M, N]  = x[M, K] W[N, K]^T + b[N]; then, fused, z = y, y = dropout(act(z))
    backward    dx[M, K] = dy[M, N] W[N, K]
                dW[N, K] = dy[M, N]^T x[M, K]
                db[N]    = sum over m of dy[m, N]

2MNK FLOPs and, in elements, MK + NK + MN bytes moved each; compute-bound past K of a few hundred.
W stays [N, K]: a transpose is only another stride. Products accumulate in fp32 for every dtype.
"""

import torch
import triton
import triton.language as tl
from fastnn.kernels._launch import kernel


@triton.jit
def _product(
    A, B, m0, n0, k0, k1, M, N, lda, ldb,
    A_KMAJOR: tl.constexpr, B_KMAJOR: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) fp32: rows m0... of A times columns n0... of B, over k in [k0, k1)."""
    # Rows and columns past the end read valid ones again, so that the loop needs no mask for them.
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


@kernel(do_not_specialize=["m", "n", "k", "lda", "ldb", "k_split"])
def _gemm_kernel(
    A, B, C, BIAS, Z, m, n, k, lda, ldb, k_split, a, b,
    M_VEC: tl.constexpr, N_VEC: tl.constexpr, K_VEC: tl.constexpr, A_VEC: tl.constexpr,
    B_VEC: tl.constexpr, A_KMAJOR: tl.constexpr, B_KMAJOR: tl.constexpr, EVEN_K: tl.constexpr,
    FORMULA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Sizes come divided by what divides them, so that the compiler sees the factor and makes
    # accesses 128 bits wide; its own test, for 16, would miss every width such as 1000 or 72.
    M = m * M_VEC
    N = n * N_VEC
    K = k * K_VEC
    lda = lda.to(tl.int64) * A_VEC
    ldb = ldb.to(tl.int64) * B_VEC
    # GROUP_M rows of tiles are walked column by column: their A and B tiles meet in L2.
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    m0 = (group * GROUP_M + within % height) * BLOCK_M
    n0 = (within // height) * BLOCK_N
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
        acc += tl.load(BIAS + n0 + cols, mask=cols < N - n0, other=0.0).to(tl.float32)[None, :]
    if Z is not None:
        tl.store(Z + start + offs, acc.to(Z.dtype.element_ty), mask=mask)
    if FORMULA is not None:
        acc = FORMULA(acc, a, b)
    tl.store(C + start + offs, acc.to(C.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["g"])
def _sum_partials_kernel(PARTIALS, OUT, g, n, BLOCK: tl.constexpr):
    """out[n] = sum over g of partials[g, n], in the order of g."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    PARTIALS += offs
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(g):
        acc += tl.load(PARTIALS, mask=mask, other=0.0)
        PARTIALS += n
    tl.store(OUT + offs, acc.to(OUT.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["m", "n", "ld", "rows_each"])
def _column_sum_kernel(
    X, PARTIALS, m, n, ld, rows_each,
    N_VEC: tl.constexpr, LD_VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partials[g, n] = sum of x[m, n] over the rows of part g."""
    N = n * N_VEC
    ld = ld.to(tl.int64) * LD_VEC
    part = tl.program_id(1)
    n0 = tl.program_id(0) * BLOCK_N
    m0 = part * rows_each
    m1 = tl.minimum(m, m0 + rows_each)
    cols = tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    mask = cols < N - n0
    X += m0.to(tl.int64) * ld + n0
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(m0, m1, BLOCK_M):
        inside = (rows[:, None] < m1 - i) & mask[None, :]
        x = tl.load(X + rows[:, None] * ld + cols[None, :], mask=inside, other=0.0)
        acc += x.to(tl.float32)
        X += BLOCK_M * ld
    tl.store(PARTIALS + part.to(tl.int64) * N + n0 + cols, tl.sum(acc, 0), mask=mask)


# ---- Configurations ------------------------------------------------------------------------------

# Per architecture: (BLOCK_M, BLOCK_N, BLOCK_K of 16-bit inputs, num_warps, num_stages), largest
# first. None spills, and all fit in shared memory: compiled, not yet timed.
_TILES = {
    "sm_80": ((128, 256, 32, 8, 3), (128, 128, 32, 4, 4), (64, 64, 64, 4, 4)),
    "sm_90": ((128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (64, 64, 64, 4, 5)),
    "sm_100": ((128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (64, 64, 64, 4, 5)),
    "gfx942": ((256, 128, 32, 8, 2), (128, 128, 32, 4, 2), (64, 64, 64, 4, 2)),
}
_TILES_ELSEWHERE = ((128, 128, 32, 8, 3), (64, 64, 32, 4, 3))
_PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
_PROCESSORS_ELSEWHERE = 100


def _tile(M, N, itemsize, precision, arch, aligned):
    """The largest tile that still gives every multiprocessor one."""
    if itemsize == 4 and precision == "ieee":  # no tensor cores: operands sit in registers
        return (64, 64, 32, 8, 2) if aligned else (64, 64, 32, 4, 3)
    if not aligned:  # loads of one element each, which no copy to shared memory can take over
        return 64, 64, 32, 4, 2
    tiles = _TILES.get(arch, _TILES_ELSEWHERE)
    least = _PROCESSORS.get(arch, _PROCESSORS_ELSEWHERE)
    for tile in tiles:
        if itemsize == 4 and tile[0] * tile[1] > 128 * 128:
            continue  # tf32 operands that do not run along K pass through registers, and spill
        if triton.cdiv(M, tile[0]) * triton.cdiv(N, tile[1]) >= least:
            return tile
    return tiles[-1]


def _config(M, N, itemsize, precision, arch, aligned):
    block_m, block_n, block_k, warps, stages = _tile(M, N, itemsize, precision, arch, aligned)
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k * 2 // itemsize,
        "GROUP_M": 8,
        "num_warps": warps,
        "num_stages": stages,
    }


def _splits(tiles, K, block_k, arch):
    """How many programs share one tile's K: enough to fill the GPU, each at least 8 steps long."""
    wanted = _PROCESSORS.get(arch, _PROCESSORS_ELSEWHERE) // max(tiles, 1)
    return max(1, min(wanted, triton.cdiv(K, 8 * block_k), 32))


# ---- Launchers -----------------------------------------------------------------------------------


def _matrix(t):
    """(t or a copy, its leading stride, whether its last dim is the one with unit stride)."""
    rows, cols = t.shape
    if t.stride(1) == 1 or cols <= 1:
        return t, t.stride(0), True
    if t.stride(0) == 1 or rows <= 1:
        return t, t.stride(1), False
    return t.contiguous(), cols, True


def _width(v, *sizes):
    """v if every size is a multiple of it, else 1."""
    return v if not any(size % v for size in sizes) else 1


def _gemm(a, b, precision, arch, bias=None, z=None, formula=None, fa=0.0, fb=0.0, split=False):
    (M, K), N = a.shape, b.shape[1]
    a, lda, a_kmajor = _matrix(a)
    b, ldb, b_nmajor = _matrix(b)
    v = 16 // a.element_size()
    a_vec, b_vec = _width(v, lda), _width(v, ldb)
    aligned = (
        a_vec == b_vec == v
        and (K if a_kmajor else M) % v == 0
        and (N if b_nmajor else K) % v == 0
        and a.data_ptr() % 16 == 0
        and b.data_ptr() % 16 == 0
    )
    config = _config(M, N, a.element_size(), precision, arch, aligned)
    k_major = a_kmajor or not b_nmajor  # else k runs along strides, and its divisor is no matter
    m_vec = 1 if a_kmajor else _width(v, M)
    n_vec = _width(v, N)
    k_vec = _width(v, K) if k_major else 1
    block_k = config["BLOCK_K"]
    tiles = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"])
    splits = _splits(tiles, K, block_k, arch) if split else 1
    steps = triton.cdiv(K, block_k)
    k_split = triton.cdiv(steps, splits)
    splits = triton.cdiv(steps, k_split) if K else 1
    c = a.new_empty((M, N))
    out = a.new_empty((splits, M, N), dtype=torch.float32) if splits > 1 else c
    _gemm_kernel(
        (tiles, splits), a, b, out, bias, z, M // m_vec, N // n_vec, K // k_vec, lda // a_vec,
        ldb // b_vec, k_split, fa, fb, M_VEC=m_vec, N_VEC=n_vec, K_VEC=k_vec, A_VEC=a_vec,
        B_VEC=b_vec, A_KMAJOR=a_kmajor, B_KMAJOR=not b_nmajor, EVEN_K=K % block_k == 0,
        FORMULA=formula, PRECISION=precision, **config,
    )  # fmt: skip
    if splits > 1:
        sum_partials(out, c)
    return c


def sum_partials(partials, out):
    """partials (G, ...) fp32 contiguous, summed over G in order into out (...) contiguous."""
    n = out.numel()
    _sum_partials_kernel(
        (triton.cdiv(n, 256),), partials, out, partials.shape[0], n, BLOCK=256, num_warps=4
    )
    return out


def fwd(x, weight, bias, precision, arch):
    """x (M, K), weight (N, K), bias (N,) or None, any strides -> y (M, N) contiguous."""
    return _gemm(x, weight.t(), precision, arch, bias)


def bwd_dx(dy, weight, precision, arch):
    """dy (M, N), weight (N, K) -> dx (M, K)."""
    return _gemm(dy, weight, precision, arch, split=True)


def bwd_dw(dy, x, precision, arch):
    """dy (M, N), x (M, K) -> dW (N, K)."""
    return _gemm(dy.t(), x, precision, arch, split=True)


def bwd_db(dy, arch):
    """dy (M, N) with unit stride in N -> db (N,), summed in fp32 and in one order."""
    M, N = dy.shape
    v = 16 // dy.element_size()
    n_vec, ld_vec = _width(v, N), _width(v, dy.stride(0))
    block_m, block_n = 32, 128
    columns = triton.cdiv(N, block_n)
    parts = 4 * _PROCESSORS.get(arch, _PROCESSORS_ELSEWHERE) // max(columns, 1)
    parts = max(1, min(parts, triton.cdiv(M, 4 * block_m)))
    rows_each = triton.cdiv(triton.cdiv(M, parts), block_m) * block_m
    parts = max(1, triton.cdiv(M, rows_each)) if M else 1
    partials = dy.new_empty((parts, N), dtype=torch.float32)
    _column_sum_kernel(
        (columns, parts), dy, partials, M, N // n_vec, dy.stride(0) // ld_vec, rows_each,
        N_VEC=n_vec, LD_VEC=ld_vec, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return sum_partials(partials, dy.new_empty(N))
