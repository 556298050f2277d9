"""The backward kernels of attention: delta, then dk with dv, dq, and dmask, one launch each.

attention.py has the formulas and the traffic. Each kernel computes the scores of its tiles again.
All of them use these pointers:

    Q, DQ (B, H, L, D)     K, DK (B, H / G, S, D)     V, DV (B, H / G, S, E)
    OUT, DOUT (B, H, L, E): one float dtype, unit stride in the last dim; what is written may have
        another dtype
    MASK (B, H, L, S) or None: uint8 (0 where masked) if KEEP, else float, added
    STATS (2, B * H, L) fp32: the largest t of each row, and the logarithm of its sum
    DELTA (B * H, L) fp32, or None if FITS
    DW (B, H, L, S) float, or None: the gradient of the weights, if they were returned
    SEED, OFFSET: int64, one element, or None
"""

import triton
import triton.language as tl

from fastnn.kernels import _philox
from fastnn.kernels.attention_tiles import (
    LOG2E,
    PAST_END,
    at_head,
    attention_kernel,
    broadcast_tile,
    kept_tile,
    key_range,
    logits,
    query_block,
    row_tile,
    store_rows,
    weights_of,
)


@attention_kernel()
def _attention_delta_kernel(
    Q, K, MASK, OUT, DOUT, STATS, DW, DELTA, SEED, OFFSET, H, G, L, S,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_ob, stride_oh, stride_om, stride_db, stride_dh, stride_dm,
    stride_mb, stride_mh, stride_mm, stride_mn, stride_wb, stride_wh, stride_wm, stride_wn,
    scale, noise_scale, w_scale, seed: tl.int64, offset: tl.int64, blocks, bound: tl.uint32,
    KEEP: tl.constexpr, BY_ROW: tl.constexpr, BY_COL: tl.constexpr, CAUSAL: tl.constexpr,
    EXACT: tl.constexpr, VEC: tl.constexpr, BY_FOUR: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, MASK_UNIT: tl.constexpr, W_UNIT: tl.constexpr, W_COL: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A program computes delta of BLOCK_M queries of one head. If DW is given, it loops over keys.

    DELTA (B * H, L) fp32 is written.
    """
    i, b, h, m0 = query_block(L, H, BLOCK_M, False)
    stride_om *= UNIT
    stride_dm *= UNIT
    OUT = at_head(OUT, b, h, stride_ob, stride_oh, UNIT) + m0.to(tl.int64) * stride_om
    DOUT = at_head(DOUT, b, h, stride_db, stride_dh, UNIT) + m0 * stride_dm.to(tl.int64)
    at = i.to(tl.int64) * L + m0
    out = row_tile(OUT, stride_om, L - m0, E, BLOCK_M, BLOCK_E).to(tl.float32)
    dout = row_tile(DOUT, stride_dm, L - m0, E, BLOCK_M, BLOCK_E).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    stats = tl.arange(0, BLOCK_M)
    if DW is not None:  # the weights' own gradient has no part in out
        rows = tl.arange(0, BLOCK_M)[:, None]
        cols = tl.arange(0, BLOCK_N)[None, :]
        stride_qm *= UNIT
        stride_kn *= UNIT
        stride_mm *= MASK_UNIT
        stride_wm *= W_UNIT
        Q = at_head(Q, b, h, stride_qb, stride_qh, UNIT) + m0 * stride_qm.to(tl.int64)
        K = at_head(K, b, h // G, stride_kb, stride_kh, UNIT)
        DW = at_head(DW, b, h, stride_wb, stride_wh, W_UNIT)
        if MASK is not None:
            MASK = at_head(MASK, b, h, stride_mb, stride_mh, MASK_UNIT)
        if VEC:
            seed, offset = _philox.load_state(seed, offset, SEED, OFFSET)
        q = row_tile(Q, stride_qm, L - m0, D, BLOCK_M, BLOCK_D)
        heads = tl.num_programs(0) // tl.cdiv(L, BLOCK_M)
        top = tl.load(STATS + at + stats, mask=stats < L - m0, other=float("inf"))
        STATS += heads.to(tl.int64) * L
        rest = tl.load(STATS + at + stats, mask=stats < L - m0, other=0.0)
        end = tl.minimum(S, m0 + BLOCK_M) if CAUSAL else S
        for n0 in range(0, end, BLOCK_N):
            k = row_tile(K, stride_kn, S - n0, D, BLOCK_N, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            t = logits(
                s, m0, n0, rows, cols, L, S, MASK, stride_mm, stride_mn, scale,
                KEEP, BY_ROW, BY_COL, CAUSAL, EXACT, PAST_END,
            )  # fmt: skip
            p = weights_of(t, top[:, None], rest[:, None], scale, EXACT)
            dw = broadcast_tile(
                DW, m0, n0, rows, cols, L, S, stride_wm, stride_wn, 1, W_COL, PAST_END
            )
            dp = dw.to(tl.float32) * w_scale
            if VEC:
                keep = kept_tile(
                    i, m0, n0, L, S, seed, offset, blocks, bound, VEC, BY_FOUR, BLOCK_M, BLOCK_N
                )
                dp *= tl.where(keep, noise_scale, 0.0)
            delta += tl.sum(p * dp, 1)
            K += BLOCK_N * stride_kn
    tl.store(DELTA + at + stats, delta, mask=stats < L - m0)


@triton.jit
def _row_statistics(TOP, REST, DELTA, row, L, FITS: tl.constexpr):
    """Largest t, logarithm of the sum, and delta of each row. Rows past the end get weight 0."""
    if FITS:
        top = row.to(tl.float32)  # not used
        rest = top
        delta = top
    else:
        top = tl.load(TOP + row, mask=row < L, other=float("inf"))
        rest = tl.load(REST + row, mask=row < L, other=0.0)
        delta = tl.load(DELTA + row, mask=row < L, other=0.0)
    return top, rest, delta


@triton.jit
def _weights_again(
    t, top, rest, m0, rows, L, scale,
    EXACT: tl.constexpr, FITS: tl.constexpr, SAFE: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """p of a tile in the backward.

    FITS: the tile has all keys, and p is computed from the tile's own sums. A row that sees only
    one key then has a weight of exactly 1, and with `_dscores` a gradient of exactly 0, as in
    PyTorch.
    """
    AXIS: tl.constexpr = 0 if KEYS_FIRST else 1
    if FITS:
        top = tl.max(t, AXIS, keep_dims=True)
        top = tl.where(top == -float("inf"), 0.0, top)
        p = tl.exp2((t - top) * LOG2E)
        total = tl.sum(p, AXIS, keep_dims=True)
        if SAFE:
            total = tl.where(total == 0.0, 1.0, total)
        p = tl.where(rows < L - m0, p / total, 0.0)
    else:
        p = weights_of(t, top, rest, scale, EXACT)
    return p


@triton.jit
def _dscores(
    p, dp, keep, delta, m0, n0, rows, cols, L, S, DW, stride_wm, stride_wn, noise_scale, w_scale,
    VEC: tl.constexpr, FITS: tl.constexpr, W_COL: tl.constexpr, EDGE: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """ds of a tile. `dp` is dout v^T of the tile; `keep` is not used without dropout."""
    if DW is not None:
        dw = broadcast_tile(DW, m0, n0, rows, cols, L, S, stride_wm, stride_wn, 1, W_COL, EDGE)
        dp += dw.to(tl.float32) * w_scale
    if VEC:
        # a product, as in PyTorch: a dropped inf becomes nan
        dp *= tl.where(keep, noise_scale, 0.0)
    if FITS:
        delta = tl.sum(p * dp, 0 if KEYS_FIRST else 1, keep_dims=True)
    return p * (dp - delta)


@triton.jit
def _dkdv_loop(
    dk, dv, k, v, Q, DOUT, MASK, STATS, REST, DELTA, DW, i, start, end, n0, L, S,
    stride_qm, stride_dm, stride_mm, stride_mn, stride_wm, stride_wn,
    scale, noise_scale, w_scale, seed, offset, blocks, bound,
    KEEP: tl.constexpr, BY_ROW: tl.constexpr, BY_COL: tl.constexpr, CAUSAL: tl.constexpr,
    EXACT: tl.constexpr, EDGE: tl.constexpr, VEC: tl.constexpr, BY_FOUR: tl.constexpr,
    FITS: tl.constexpr, SAFE: tl.constexpr, W_COL: tl.constexpr, PRECISION: tl.constexpr,
    WANT_DK: tl.constexpr, WANT_DV: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """(dk, dv) of the keys from n0 on, after the queries from start to end of one head."""
    rows = tl.arange(0, BLOCK_M)[None, :]
    cols = tl.arange(0, BLOCK_N)[:, None]
    stats = tl.arange(0, BLOCK_M)
    Q += start.to(tl.int64) * stride_qm
    DOUT += start.to(tl.int64) * stride_dm
    for m0 in range(start, end, BLOCK_M):
        q = row_tile(Q, stride_qm, L - m0, D, BLOCK_M, BLOCK_D)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        t = logits(
            s, m0, n0, rows, cols, L, S, MASK, stride_mm, stride_mn, scale,
            KEEP, BY_ROW, BY_COL, CAUSAL, EXACT, EDGE,
        )  # fmt: skip
        top, rest, delta = _row_statistics(STATS, REST, DELTA, m0 + stats, L, FITS)
        p = _weights_again(
            t, top[None, :], rest[None, :], m0, rows, L, scale, EXACT, FITS, SAFE, True
        )
        keep = 0
        if VEC:
            keep = kept_tile(
                i, m0, n0, L, S, seed, offset, blocks, bound, VEC, BY_FOUR, BLOCK_M, BLOCK_N
            )
            keep = tl.trans(keep)
        dout = row_tile(DOUT, stride_dm, L - m0, E, BLOCK_M, BLOCK_E)
        if WANT_DV:
            kept = tl.where(keep, p, 0.0) if VEC else p
            dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision=PRECISION)
        if WANT_DK:
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            ds = _dscores(
                p, dp, keep, delta[None, :], m0, n0, rows, cols, L, S, DW, stride_wm, stride_wn,
                noise_scale, w_scale, VEC, FITS, W_COL, EDGE, True,
            )  # fmt: skip
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        Q += BLOCK_M * stride_qm
        DOUT += BLOCK_M * stride_dm
    return dk, dv


@attention_kernel()
def _attention_bwd_dkdv_kernel(
    Q, K, V, MASK, DOUT, STATS, DELTA, DW, DK, DV, SEED, OFFSET, H, G, L, S,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_db, stride_dh, stride_dm,
    stride_mb, stride_mh, stride_mm, stride_mn, stride_wb, stride_wh, stride_wm, stride_wn,
    scale, noise_scale, w_scale, seed: tl.int64, offset: tl.int64, blocks, bound: tl.uint32,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    KEEP: tl.constexpr, BY_ROW: tl.constexpr, BY_COL: tl.constexpr, CAUSAL: tl.constexpr,
    EXACT: tl.constexpr, LAST: tl.constexpr, FITS: tl.constexpr, SAFE: tl.constexpr,
    VEC: tl.constexpr, BY_FOUR: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, MASK_UNIT: tl.constexpr, W_UNIT: tl.constexpr, W_COL: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A program computes dk and dv of BLOCK_N keys of one head, and loops over all their queries.

    These are the queries of the G heads of a group. DK or DV is None if it is not wanted.
    """
    blocks_n = tl.cdiv(S, BLOCK_N)
    j = tl.program_id(0) // blocks_n
    n0 = tl.program_id(0) % blocks_n * BLOCK_N
    heads_k = H // G
    b = (j // heads_k).to(tl.int64)
    h_k = (j % heads_k).to(tl.int64)
    stride_qm *= UNIT
    stride_kn *= UNIT
    stride_vn *= UNIT
    stride_dm *= UNIT
    stride_mm *= MASK_UNIT
    stride_wm *= W_UNIT
    K = at_head(K, b, h_k, stride_kb, stride_kh, UNIT) + n0.to(tl.int64) * stride_kn
    V = at_head(V, b, h_k, stride_vb, stride_vh, UNIT) + n0.to(tl.int64) * stride_vn
    if VEC:
        seed, offset = _philox.load_state(seed, offset, SEED, OFFSET)
    k = row_tile(K, stride_kn, S - n0, D, BLOCK_N, BLOCK_D)
    v = row_tile(V, stride_vn, S - n0, E, BLOCK_N, BLOCK_E)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    begin = n0 // BLOCK_M * BLOCK_M if CAUSAL else n0 * 0
    batch_heads = (tl.num_programs(0) // blocks_n * G).to(tl.int64)
    for g in range(G):
        h = h_k * G + g
        i = (b * H + h).to(tl.int32)
        q_ptr = at_head(Q, b, h, stride_qb, stride_qh, UNIT)
        do_ptr = at_head(DOUT, b, h, stride_db, stride_dh, UNIT)
        mask_ptr = MASK
        if MASK is not None:
            mask_ptr = at_head(MASK, b, h, stride_mb, stride_mh, MASK_UNIT)
        dw_ptr = DW
        if DW is not None:
            dw_ptr = at_head(DW, b, h, stride_wb, stride_wh, W_UNIT)
        delta_ptr = DELTA if FITS else DELTA + i.to(tl.int64) * L
        top_ptr = STATS + i.to(tl.int64) * L
        rest_ptr = top_ptr + batch_heads * L
        dk, dv = _dkdv_loop(
            dk, dv, k, v, q_ptr, do_ptr, mask_ptr, top_ptr, rest_ptr, delta_ptr, dw_ptr, i,
            begin, L, n0, L, S, stride_qm, stride_dm, stride_mm, stride_mn, stride_wm,
            stride_wn, scale, noise_scale, w_scale, seed, offset, blocks, bound, KEEP, BY_ROW,
            BY_COL, CAUSAL, EXACT, LAST, VEC, BY_FOUR, FITS, SAFE, W_COL, PRECISION,
            DK is not None, DV is not None, D, E, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
        )  # fmt: skip
    if DK is not None:
        DK += b * stride_dkb + h_k * stride_dkh + n0.to(tl.int64) * stride_dkn
        store_rows(DK, dk * scale, stride_dkn, S - n0, D, BLOCK_N, BLOCK_D)
    if DV is not None:
        DV += b * stride_dvb + h_k * stride_dvh + n0.to(tl.int64) * stride_dvn
        store_rows(DV, dv * noise_scale, stride_dvn, S - n0, E, BLOCK_N, BLOCK_E)


@triton.jit
def _dq_loop(
    dq, q, dout, top, rest, delta, K, V, MASK, DW, i, m0, start, end, L, S,
    stride_kn, stride_vn, stride_mm, stride_mn, stride_wm, stride_wn,
    scale, noise_scale, w_scale, seed, offset, blocks, bound,
    KEEP: tl.constexpr, BY_ROW: tl.constexpr, BY_COL: tl.constexpr, CAUSAL: tl.constexpr,
    EXACT: tl.constexpr, EDGE: tl.constexpr, VEC: tl.constexpr, BY_FOUR: tl.constexpr,
    FITS: tl.constexpr, SAFE: tl.constexpr, W_COL: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dq after the keys from start to end."""
    rows = tl.arange(0, BLOCK_M)[:, None]
    cols = tl.arange(0, BLOCK_N)[None, :]
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
        p = _weights_again(
            t, top[:, None], rest[:, None], m0, rows, L, scale, EXACT, FITS, SAFE, False
        )
        keep = 0
        if VEC:
            keep = kept_tile(
                i, m0, n0, L, S, seed, offset, blocks, bound, VEC, BY_FOUR, BLOCK_M, BLOCK_N
            )
        v = row_tile(V, stride_vn, left, E, BLOCK_N, BLOCK_E)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = _dscores(
            p, dp, keep, delta[:, None], m0, n0, rows, cols, L, S, DW, stride_wm, stride_wn,
            noise_scale, w_scale, VEC, FITS, W_COL, EDGE, False,
        )  # fmt: skip
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        K += BLOCK_N * stride_kn
        V += BLOCK_N * stride_vn
    return dq


@attention_kernel()
def _attention_bwd_dq_kernel(
    Q, K, V, MASK, DOUT, STATS, DELTA, DW, DQ, SEED, OFFSET, H, G, L, S,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_db, stride_dh, stride_dm,
    stride_mb, stride_mh, stride_mm, stride_mn, stride_wb, stride_wh, stride_wm, stride_wn,
    scale, noise_scale, w_scale, seed: tl.int64, offset: tl.int64, blocks, bound: tl.uint32,
    stride_dqb, stride_dqh, stride_dqm,
    KEEP: tl.constexpr, BY_ROW: tl.constexpr, BY_COL: tl.constexpr, CAUSAL: tl.constexpr,
    EXACT: tl.constexpr, LAST: tl.constexpr, FITS: tl.constexpr, SAFE: tl.constexpr,
    VEC: tl.constexpr, BY_FOUR: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, MASK_UNIT: tl.constexpr, W_UNIT: tl.constexpr, W_COL: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A program computes BLOCK_M rows of dq of one head, and loops over the keys that they see."""
    i, b, h, m0 = query_block(L, H, BLOCK_M, CAUSAL)
    stride_qm *= UNIT
    stride_kn *= UNIT
    stride_vn *= UNIT
    stride_dm *= UNIT
    stride_mm *= MASK_UNIT
    stride_wm *= W_UNIT
    Q = at_head(Q, b, h, stride_qb, stride_qh, UNIT) + m0 * stride_qm.to(tl.int64)
    K = at_head(K, b, h // G, stride_kb, stride_kh, UNIT)
    V = at_head(V, b, h // G, stride_vb, stride_vh, UNIT)
    DOUT = at_head(DOUT, b, h, stride_db, stride_dh, UNIT) + m0 * stride_dm.to(tl.int64)
    if MASK is not None:
        MASK = at_head(MASK, b, h, stride_mb, stride_mh, MASK_UNIT)
    if DW is not None:
        DW = at_head(DW, b, h, stride_wb, stride_wh, W_UNIT)
    if VEC:
        seed, offset = _philox.load_state(seed, offset, SEED, OFFSET)
    q = row_tile(Q, stride_qm, L - m0, D, BLOCK_M, BLOCK_D)
    dout = row_tile(DOUT, stride_dm, L - m0, E, BLOCK_M, BLOCK_E)
    at = i.to(tl.int64) * L
    REST = STATS + (tl.num_programs(0) // tl.cdiv(L, BLOCK_M)).to(tl.int64) * L + at
    top, rest, delta = _row_statistics(
        STATS + at, REST, DELTA if FITS else DELTA + at, m0 + tl.arange(0, BLOCK_M), L, FITS
    )
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    inner, end = key_range(S, m0, CAUSAL, BLOCK_M, BLOCK_N)
    dq = _dq_loop(
        dq, q, dout, top, rest, delta, K, V, MASK, DW, i, m0, inner * 0, inner, L, S,
        stride_kn, stride_vn, stride_mm, stride_mn, stride_wm, stride_wn, scale, noise_scale,
        w_scale, seed, offset, blocks, bound, KEEP, BY_ROW, BY_COL, CAUSAL, EXACT, 0, VEC,
        BY_FOUR, FITS, SAFE, W_COL, PRECISION, D, E, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
    )  # fmt: skip
    if LAST:
        dq = _dq_loop(
            dq, q, dout, top, rest, delta, K, V, MASK, DW, i, m0, inner, end, L, S,
            stride_kn, stride_vn, stride_mm, stride_mn, stride_wm, stride_wn, scale, noise_scale,
            w_scale, seed, offset, blocks, bound, KEEP, BY_ROW, BY_COL, CAUSAL, EXACT, LAST, VEC,
            BY_FOUR, FITS, SAFE, W_COL, PRECISION, D, E, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_E,
        )  # fmt: skip
    DQ += b * stride_dqb + h * stride_dqh + m0.to(tl.int64) * stride_dqm
    store_rows(DQ, dq * scale, stride_dqm, L - m0, D, BLOCK_M, BLOCK_D)


@attention_kernel("B", "over_b", "over_h", "stride_gb", "stride_gh", "stride_gm", "stride_gn")
def _attention_bwd_dmask_kernel(
    Q, K, V, MASK, DOUT, STATS, DELTA, DW, DMASK, SEED, OFFSET, B, H, G, L, S,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_db, stride_dh, stride_dm,
    stride_mb, stride_mh, stride_mm, stride_mn, stride_wb, stride_wh, stride_wm, stride_wn,
    scale, noise_scale, w_scale, seed: tl.int64, offset: tl.int64, blocks, bound: tl.uint32,
    over_b, over_h, stride_gb, stride_gh, stride_gm, stride_gn,
    SUM_ROWS: tl.constexpr, KEEP: tl.constexpr, BY_ROW: tl.constexpr, BY_COL: tl.constexpr,
    CAUSAL: tl.constexpr, EXACT: tl.constexpr, LAST: tl.constexpr,
    FITS: tl.constexpr, SAFE: tl.constexpr,
    VEC: tl.constexpr, BY_FOUR: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, MASK_UNIT: tl.constexpr, W_UNIT: tl.constexpr, W_COL: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A program computes a tile of dmask, and loops over the batches and heads that share the mask.

    With SUM_ROWS it also loops over the rows. The mask has B // over_b batches and H // over_h
    heads. over_b is B or 1, and over_h is H or 1. DMASK: float, with the mask's shape.
    """
    blocks_n = tl.cdiv(S, BLOCK_N)
    blocks_m = 1 if SUM_ROWS else tl.cdiv(L, BLOCK_M)
    n0 = tl.program_id(0) % blocks_n * BLOCK_N
    m_first = tl.program_id(0) // blocks_n % blocks_m * BLOCK_M
    which = tl.program_id(0) // blocks_n // blocks_m
    heads = H // over_h
    b_first = which // heads
    h_first = which % heads
    stride_qm *= UNIT
    stride_kn *= UNIT
    stride_vn *= UNIT
    stride_dm *= UNIT
    stride_mm *= MASK_UNIT
    stride_wm *= W_UNIT
    if VEC:
        seed, offset = _philox.load_state(seed, offset, SEED, OFFSET)
    rows = tl.arange(0, BLOCK_M)[:, None]
    cols = tl.arange(0, BLOCK_N)[None, :]
    REST = STATS + (B * H).to(tl.int64) * L
    m_end = L if SUM_ROWS else m_first + 1
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for z in range(over_b * over_h):
        b = (b_first + z // over_h).to(tl.int64)
        h = (h_first + z % over_h).to(tl.int64)
        i = (b * H + h).to(tl.int32)
        k_ptr = at_head(K, b, h // G, stride_kb, stride_kh, UNIT) + n0.to(tl.int64) * stride_kn
        v_ptr = at_head(V, b, h // G, stride_vb, stride_vh, UNIT) + n0.to(tl.int64) * stride_vn
        k = row_tile(k_ptr, stride_kn, S - n0, D, BLOCK_N, BLOCK_D)
        v = row_tile(v_ptr, stride_vn, S - n0, E, BLOCK_N, BLOCK_E)
        mask_ptr = at_head(MASK, b, h, stride_mb, stride_mh, MASK_UNIT)
        dw_ptr = DW
        if DW is not None:
            dw_ptr = at_head(DW, b, h, stride_wb, stride_wh, W_UNIT)
        for m0 in range(m_first, m_end, BLOCK_M):
            q_ptr = at_head(Q, b, h, stride_qb, stride_qh, UNIT) + m0 * stride_qm.to(tl.int64)
            do_ptr = at_head(DOUT, b, h, stride_db, stride_dh, UNIT) + m0 * stride_dm.to(tl.int64)
            q = row_tile(q_ptr, stride_qm, L - m0, D, BLOCK_M, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            t = logits(
                s, m0, n0, rows, cols, L, S, mask_ptr, stride_mm, stride_mn, scale,
                KEEP, BY_ROW, BY_COL, CAUSAL, EXACT, LAST,
            )  # fmt: skip
            at = i.to(tl.int64) * L
            top, rest, delta = _row_statistics(
                STATS + at, REST + at, DELTA if FITS else DELTA + at, m0 + tl.arange(0, BLOCK_M),
                L, FITS,
            )  # fmt: skip
            dout = row_tile(do_ptr, stride_dm, L - m0, E, BLOCK_M, BLOCK_E)
            dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            p = _weights_again(
                t, top[:, None], rest[:, None], m0, rows, L, scale, EXACT, FITS, SAFE, False
            )
            keep = 0
            if VEC:
                keep = kept_tile(
                    i, m0, n0, L, S, seed, offset, blocks, bound, VEC, BY_FOUR, BLOCK_M, BLOCK_N
                )
            ds = _dscores(
                p, dp, keep, delta[:, None], m0, n0, rows, cols, L, S, dw_ptr, stride_wm,
                stride_wn, noise_scale, w_scale, VEC, FITS, W_COL, LAST, False,
            )  # fmt: skip
            acc += ds
    DMASK += b_first.to(tl.int64) * stride_gb + h_first.to(tl.int64) * stride_gh
    DMASK += m_first.to(tl.int64) * stride_gm + n0.to(tl.int64) * stride_gn
    if SUM_ROWS:
        n = tl.arange(0, BLOCK_N)
        total = tl.sum(acc, 0).to(DMASK.dtype.element_ty)
        tl.store(DMASK + n * stride_gn, total, mask=n < S - n0)
    else:
        at = rows.to(tl.int64) * stride_gm + cols * stride_gn
        there = (rows < L - m_first) & (cols < S - n0)
        tl.store(DMASK + at, acc.to(DMASK.dtype.element_ty), mask=there)
