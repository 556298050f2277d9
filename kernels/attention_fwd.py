"""The forward kernel of attention. attention.py has the formulas and the traffic."""

import triton
import triton.language as tl

from fastnn.kernels import _philox
from fastnn.kernels.attention_tiles import (
    LOG2E,
    PAST_END,
    at_head,
    attention_kernel,
    kept_tile,
    key_range,
    logits,
    query_block,
    row_tile,
    store_rows,
)


@triton.jit
def _fwd_loop(
    acc, top, total, q, K, V, MASK, i, m0, start, end, L, S, stride_kn, stride_vn, stride_mm,
    stride_mn, scale, seed, offset, blocks, bound,
    KEEP: tl.constexpr, BY_ROW: tl.constexpr, BY_COL: tl.constexpr, CAUSAL: tl.constexpr,
    EXACT: tl.constexpr, EDGE: tl.constexpr, VEC: tl.constexpr, BY_FOUR: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """(acc, top, total) after the keys from start to end.

    acc: the sums of p v. top: the largest t of each row. total: the sum of p.
    """
    rows = tl.arange(0, BLOCK_M)[:, None]
    cols = tl.arange(0, BLOCK_N)[None, :]
    unit = LOG2E if EXACT else scale * LOG2E
    K += start.to(tl.int64) * stride_kn
    V += start.to(tl.int64) * stride_vn
    for n0 in range(start, end, BLOCK_N):
        left = S - n0 if EDGE == PAST_END else BLOCK_N
        k = row_tile(K, stride_kn, left, D, BLOCK_N, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        t = logits(
            s, m0, n0, rows, cols, L, S, MASK, stride_mm, stride_mn, scale,
            KEEP, BY_ROW, BY_COL, CAUSAL, EXACT, EDGE,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(t, 1))
        # A row that has only seen -inf would otherwise take exp(-inf + inf), which is nan.
        base = tl.where(new == -float("inf"), 0.0, new)
        if EXACT:
            p = tl.exp2((t - base[:, None]) * unit)
        else:
            p = tl.exp2(t * unit - (base * unit)[:, None])
        decay = tl.exp2((top - base) * unit)
        total = total * decay + tl.sum(p, 1)
        top = new
        if VEC:
            keep = kept_tile(
                i, m0, n0, L, S, seed, offset, blocks, bound, VEC, BY_FOUR, BLOCK_M, BLOCK_N
            )
            p = tl.where(keep, p, 0.0)
        v = row_tile(V, stride_vn, left, E, BLOCK_N, BLOCK_E)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        K += BLOCK_N * stride_kn
        V += BLOCK_N * stride_vn
    return acc, top, total


@attention_kernel()
def _attention_fwd_kernel(
    Q, K, V, MASK, OUT, STATS, SEED, OFFSET, STATE, H, G, L, S,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
    stride_mb, stride_mh, stride_mm, stride_mn,
    scale, noise_scale, seed: tl.int64, offset: tl.int64, blocks, bound: tl.uint32,
    KEEP: tl.constexpr, BY_ROW: tl.constexpr, BY_COL: tl.constexpr, CAUSAL: tl.constexpr,
    EXACT: tl.constexpr, SAFE: tl.constexpr, LAST: tl.constexpr, VEC: tl.constexpr,
    BY_FOUR: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, MASK_UNIT: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A program computes BLOCK_M rows of out of one head, and loops over the keys that they see.

    Q, OUT (B, H, L, D or E), K, V (B, H / G, S, D or E): one float dtype, unit stride in the last
    dim. MASK (B, H, L, S) or None: uint8 (0 where masked) if KEEP, else float, added. STATS (2, B *
    H, L) fp32: the largest t of each row, and the logarithm of its sum. SEED, OFFSET: int64, one
    element each, or None. STATE (2,) int64 or None: keeps seed and offset for the backward.
    """
    # In a causal call the last blocks have the most keys, so they start first.
    i, b, h, m0 = query_block(L, H, BLOCK_M, CAUSAL)
    stride_qm *= UNIT
    stride_kn *= UNIT
    stride_vn *= UNIT
    stride_om *= UNIT
    stride_mm *= MASK_UNIT
    Q = at_head(Q, b, h, stride_qb, stride_qh, UNIT) + m0 * stride_qm.to(tl.int64)
    K = at_head(K, b, h // G, stride_kb, stride_kh, UNIT)
    V = at_head(V, b, h // G, stride_vb, stride_vh, UNIT)
    OUT = at_head(OUT, b, h, stride_ob, stride_oh, UNIT) + m0.to(tl.int64) * stride_om
    if MASK is not None:
        MASK = at_head(MASK, b, h, stride_mb, stride_mh, MASK_UNIT)
    if VEC:
        seed, offset = _philox.load_state(seed, offset, SEED, OFFSET)
        _philox.save_state(STATE, seed, offset)
    q = row_tile(Q, stride_qm, L - m0, D, BLOCK_M, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    inner, end = key_range(S, m0, CAUSAL, BLOCK_M, BLOCK_N)
    acc, top, total = _fwd_loop(
        acc, top, total, q, K, V, MASK, i, m0, inner * 0, inner, L, S, stride_kn, stride_vn,
        stride_mm, stride_mn, scale, seed, offset, blocks, bound, KEEP, BY_ROW, BY_COL, CAUSAL,
        EXACT, 0, VEC, BY_FOUR, PRECISION, D, E, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
    )  # fmt: skip
    if LAST:
        acc, top, total = _fwd_loop(
            acc, top, total, q, K, V, MASK, i, m0, inner, end, L, S, stride_kn, stride_vn,
            stride_mm, stride_mn, scale, seed, offset, blocks, bound, KEEP, BY_ROW, BY_COL, CAUSAL,
            EXACT, LAST, VEC, BY_FOUR, PRECISION, D, E, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
        )  # fmt: skip
    if not EXACT:
        top *= scale
    rest = tl.log(total)
    masked = top == -float("inf")
    top = tl.where(masked, 0.0, top)
    if SAFE:
        masked = masked & (total == 0.0)
        total = tl.where(masked, 1.0, total)
        rest = tl.where(masked, 0.0, rest)
    acc *= (noise_scale / total)[:, None]
    store_rows(OUT, acc, stride_om, L - m0, E, BLOCK_M, BLOCK_E)
    rows = tl.arange(0, BLOCK_M)
    STATS += i.to(tl.int64) * L + m0
    tl.store(STATS + rows, top, mask=rows < L - m0)
    STATS += (tl.num_programs(0) // tl.cdiv(L, BLOCK_M)).to(tl.int64) * L
    tl.store(STATS + rows, rest, mask=rows < L - m0)
