"""The attention weights that a layer returns: of each head, or averaged over the heads.

    w[b, h, l, s] = noise * exp(t - lse[b, h, l])        a[b, l, s] = sum over h of w / H

t are the scores. noise is the scale of dropout where a weight is kept, else 0. attention.py
computes lse.

Passes (R read, W write; a mask is a byte) over the B*H*L*S elements (E) and B*L*S elements (A),
with dropout:
    stock   scores W (and R W for a mask), softmax R W, dropout R W + mask, product with v R,
            mean R, A W; backward R W (mean), 2R W (product), 2R W, dropout 2R W, softmax 2R W
    here    A W, or E W for the weights of each head; backward A R or E R, by attention.py
The scores are multiplied out once more: 2 of attention's 4 L S D operations per head. q and k come
from L2, because the tiles that share them run side by side.
"""

import triton.language as tl

from fastnn.kernels import _philox, attention
from fastnn.kernels._config import tunable
from fastnn.kernels._launch import kernel
from fastnn.kernels._sizes import cdiv
from fastnn.kernels.attention_tiles import (
    PAST_END,
    at_head,
    kept_tile,
    logits,
    row_tile,
    weights_of,
)

_STRIDES = ["qb", "qh", "qm", "kb", "kh", "kn", "mb", "mh", "mm", "mn"]


@kernel(
    do_not_specialize=[
        *("H", "heads", "L", "S", "S_units", "seed", "offset", "blocks", "bound"),
        *(f"stride_{name}" for name in _STRIDES),
    ]
)
def _attention_weights_kernel(
    Q, K, MASK, STATS, WEIGHTS, SEED, OFFSET, H, heads, L, S, S_units,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_mb, stride_mh, stride_mm, stride_mn, scale, noise_scale,
    seed: tl.int64, offset: tl.int64, blocks, bound: tl.uint32, batch_heads: tl.int64,
    KEEP: tl.constexpr, BY_ROW: tl.constexpr, BY_COL: tl.constexpr, VEC: tl.constexpr,
    BY_FOUR: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, MASK_UNIT: tl.constexpr,
    S_UNIT: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program computes a tile of an average over heads, and loops over the heads.

    `heads` is their number: all H, or one. Q (B, H, L, D), K (B, H, S, D): one float dtype, unit
    stride in the last dim. MASK (B, H, L, S) or None: uint8 (0 where masked) if KEEP, else float,
    added. STATS (2, B * H, L) fp32, from the forward. WEIGHTS (B * H / heads, L, S) float. SEED,
    OFFSET: int64, one element each, or None.
    """
    blocks_n = tl.cdiv(S, BLOCK_N)
    blocks_m = tl.cdiv(L, BLOCK_M)
    n0 = tl.program_id(0) % blocks_n * BLOCK_N
    m0 = tl.program_id(0) // blocks_n % blocks_m * BLOCK_M
    which = tl.program_id(0) // blocks_n // blocks_m
    stride_qm *= UNIT
    stride_kn *= UNIT
    stride_mm *= MASK_UNIT
    if VEC:
        seed, offset = _philox.load_state(seed, offset, SEED, OFFSET)
    rows = tl.arange(0, BLOCK_M)[:, None]
    cols = tl.arange(0, BLOCK_N)[None, :]
    stats = tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for head in range(heads):
        i = which * heads + head
        b = (i // H).to(tl.int64)
        h = (i % H).to(tl.int64)
        q_ptr = at_head(Q, b, h, stride_qb, stride_qh, UNIT) + m0 * stride_qm.to(tl.int64)
        k_ptr = at_head(K, b, h, stride_kb, stride_kh, UNIT) + n0 * stride_kn.to(tl.int64)
        q = row_tile(q_ptr, stride_qm, L - m0, D, BLOCK_M, BLOCK_D)
        k = row_tile(k_ptr, stride_kn, S - n0, D, BLOCK_N, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        mask_ptr = MASK
        if MASK is not None:
            mask_ptr = at_head(MASK, b, h, stride_mb, stride_mh, MASK_UNIT)
        t = logits(
            s, m0, n0, rows, cols, L, S, mask_ptr, stride_mm, stride_mn, scale,
            KEEP, BY_ROW, BY_COL, False, True, PAST_END,
        )  # fmt: skip
        at = STATS + i.to(tl.int64) * L + m0
        top = tl.load(at + stats, mask=stats < L - m0, other=float("inf"))
        rest = tl.load(at + batch_heads * L + stats, mask=stats < L - m0, other=0.0)
        p = weights_of(t, top[:, None], rest[:, None], scale, True)
        if VEC:  # a product, as in PyTorch: a nan stays nan
            keep = kept_tile(
                i, m0, n0, L, S, seed, offset, blocks, bound, VEC, BY_FOUR, BLOCK_M, BLOCK_N
            )
            p *= tl.where(keep, noise_scale, 0.0)
        acc += p
    stride_wm = S_units * S_UNIT  # S, in a form that shows the compiler its factor
    WEIGHTS += (which.to(tl.int64) * L + m0) * stride_wm + n0
    w = tl.div_rn(acc, heads.to(tl.float32)).to(WEIGHTS.dtype.element_ty)
    there = (rows < L - m0) & (cols < stride_wm - n0)
    tl.store(WEIGHTS + rows * stride_wm.to(tl.int64) + cols, w, mask=there)


@tunable("BLOCK_M", "BLOCK_N")
def _config(D, itemsize, narrow):
    """`narrow`: the random words are drawn one by one, which takes registers."""
    if itemsize == 4:
        block, warps = (32, 4) if D <= 32 else (16, 4 if D <= 64 else 8)
        return {"BLOCK_M": block, "BLOCK_N": block, "num_warps": warps, "num_stages": 1}
    m = 128 if 16 < D <= 32 and not narrow else 64
    n = 64 if 16 < D <= 64 or (D > 64 and not narrow) else 32
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": 8, "num_stages": 2 if D <= 128 else 1}


def fwd(q, k, mask, stats, dtype, *, scale, average, noise=None, precision="ieee"):
    """The arguments of `attention.fwd`, and its stats -> (B, L, S) if `average`, else (B, H, L, S).

    The result has dtype `dtype` and is contiguous. There are as many key heads as query heads. The
    call is not causal.
    """
    q, k = attention._rows(q), attention._rows(k)
    (B, H, L, D), S = q.shape, k.shape[2]
    out = q.new_empty((B, L, S) if average else (B, H, L, S), dtype=dtype)
    c = attention._prepare((q, k, k), mask, False, scale, noise, False, precision)
    config = _config(D, q.element_size(), noise is not None and not c.constexprs["BY_FOUR"])
    heads = H if average else 1
    tiles = cdiv(L, config["BLOCK_M"]) * cdiv(S, config["BLOCK_N"])
    constexprs = {n: v for n, v in c.constexprs.items() if n not in ("CAUSAL", "E", "BLOCK_E")}
    (SEED, OFFSET), numbers = c.random
    unit = 8 if S % 8 == 0 else 1
    _attention_weights_kernel(
        (tiles * (B * H // heads),), q, k, c.mask, stats, out, SEED, OFFSET, H, heads, L, S,
        S // unit, *attention._strides(q, c.unit), *attention._strides(k, c.unit),
        *c.mask_strides, scale, noise.scale if noise else 1.0, *numbers, B * H, **constexprs,
        S_UNIT=unit, **config,
    )  # fmt: skip
    return out
