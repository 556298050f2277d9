"""Attention that never holds a tensor of L x S, and its gradients. For each batch and head

    t = scale * q k^T + mask      p = softmax(t)      out = (p * noise) v
    dp = (dout v^T + dw) * noise  ds = p * (dp - delta)     delta[l] = sum over s of p dp
    dq = scale * ds k     dk = scale * ds^T q     dv = (p * noise)^T dout     dmask = ds

with noise the scale of dropout or 0, and dw the gradient, if any, of the weights p * noise.

q is (L, D), k (S, D), v (S, E). 2LS(D + E) FLOPs forward, 2LS(4D + 3E) backward, half of that where
causal; bytes: q, k, v and out once, keys and values again for each block of queries, from L2.
Forward keeps, in fp32, the largest t of each row and the logarithm of its sum. Scores are computed
again from them: dk and dv by blocks of keys, dq by blocks of queries, each sum in a fixed order.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastnn.kernels._config import tunable
from fastnn.kernels._launch import kernel
from fastnn.kernels._sizes import cdiv, next_power_of_2
from fastnn.kernels._tl import dense
from fastnn.kernels.epilogue import keep_tile, width

from fastnn.kernels import _philox, epilogue

LOG2E = tl.constexpr(1.4426950408889634)

# Which draw decides on an element, as the constexpr VEC of the kernels: 0 for no dropout, ROWS, or
# the width that `native_dropout` has over the contiguous (B * H, L, S).
ROWS = tl.constexpr(-1)

# What a tile may reach over, as the constexpr EDGE: nothing (0), the diagonal, the last key too.
DIAGONAL = tl.constexpr(1)
PAST_END = tl.constexpr(2)


class Noise(NamedTuple):
    """Dropout of the weights.

    draw: a `_philox.Draw`. With its `vec` 0, the weight at (batch and head i, row l, column s) has
    word s % 4 of the Philox call at counter offset/4 + s // 4, subsequence (l, i): no division, no
    limit on the size, `calls(S)` numbers of the generator. Else it has what `native_dropout` would
    give it, for fewer than 2**31 weights.
    bound: kept where the word is below; scale: of what is kept; state: see `_philox.save_state`.
    """

    draw: Any
    bound: int
    scale: float
    state: torch.Tensor | None = None


def increment(S):
    """By how much a draw of `vec` 0 advances the generator."""
    return 4 * cdiv(S, 4)


# ---- Tiles ---------------------------------------------------------------------------------------
#
# `rows` and `cols` index a tile from its corner (m0, n0), each with a dimension of 1 where the
# other one runs: so the same code makes tiles of queries by keys, and of keys by queries.


@triton.jit
def _row_tile(X, stride, left, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK, BLOCK_D): rows from X on, of which `left` are there; zeros elsewhere."""
    r = tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    if D == BLOCK_D:
        return tl.load(X + r * stride + d, mask=r < left, other=0.0)
    return tl.load(X + r * stride + d, mask=(r < left) & (d < D), other=0.0)


@triton.jit
def _store_rows(X, x, stride, left, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    r = tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(X + r * stride + d, x.to(X.dtype.element_ty), mask=(r < left) & (d < D))


@triton.jit
def _broadcast_tile(
    X, m0, n0, rows, cols, L, S, stride_m, stride_n,
    BY_ROW: tl.constexpr, BY_COL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """What X, (L, S) through its strides, holds at the tile; as small as the tile is constant.

    BY_ROW, BY_COL: 0 where the stride is 0; BY_COL 1 where that is 1.
    """
    X += m0 * stride_m.to(tl.int64)
    if BY_ROW:
        X += tl.minimum(rows, L - 1 - m0) * stride_m  # rows past the end read the last one again
    if BY_COL:
        if BY_COL == 1:
            X += n0 + cols
        else:
            X += n0 * stride_n.to(tl.int64)
            X += cols * stride_n
        if EDGE == PAST_END:
            x = tl.load(X, mask=cols < S - n0, other=0.0)
        else:
            x = tl.load(X)
    else:
        x = tl.load(X)
    return x


@triton.jit
def _logits(
    s, m0, n0, rows, cols, L, S, MASK, stride_mm, stride_mn, scale,
    KEEP: tl.constexpr, BY_ROW: tl.constexpr, BY_COL: tl.constexpr, CAUSAL: tl.constexpr,
    EXACT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """t of a tile whose products are s; divided by `scale` unless EXACT."""
    if EXACT:
        s *= scale
    if MASK is not None:
        mask = _broadcast_tile(
            MASK, m0, n0, rows, cols, L, S, stride_mm, stride_mn, BY_ROW, BY_COL, EDGE
        )
        if KEEP:  # a sum, as in stock: what is nan stays so
            s += tl.where(mask != 0, 0.0, -float("inf"))
        else:
            s += mask.to(tl.float32)
    if EDGE == PAST_END:
        s = tl.where(cols < S - n0, s, -float("inf"))
    if EDGE and CAUSAL:
        s = tl.where(rows + m0 >= cols + n0, s, -float("inf"))
    return s


@triton.jit
def _weights(t, top, rest, scale, EXACT: tl.constexpr):
    """p out of t and the two statistics of its row; for EXACT, p of a lone key is 1 to the bit."""
    if EXACT:
        return tl.exp2((t - top - rest) * LOG2E)
    return tl.exp2(t * (scale * LOG2E) - (top + rest) * LOG2E)


@triton.jit
def _kept(
    i, m0, n0, L, S, seed, offset, blocks, bound,
    VEC: tl.constexpr, BY_FOUR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Which weights of a tile, of batch and head i, are kept: int1 (BLOCK_M, BLOCK_N)."""
    if VEC == ROWS:
        zero = tl.zeros((BLOCK_M, BLOCK_N // 4), tl.int32)
        row = (m0 + tl.arange(0, BLOCK_M))[:, None] + zero
        call = (n0 // 4 + tl.arange(0, BLOCK_N // 4))[None, :] + zero
        counter = offset // 4 + call.to(tl.int64)
        lo = (counter & 0xFFFFFFFF).to(tl.uint32)
        hi = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
        a, b, c, d = tl.philox(seed, lo, hi, row.to(tl.uint32), (i + zero).to(tl.uint32))
        word = tl.join(tl.join(a, c), tl.join(b, d)).reshape([BLOCK_M, BLOCK_N])
        keep = word < bound
    else:
        keep = keep_tile(
            i * L + m0, n0, S, seed, offset, blocks, bound, VEC, BY_FOUR, BLOCK_M, BLOCK_N
        )
    return keep


# ---- Forward -------------------------------------------------------------------------------------


@triton.jit
def _fwd_loop(
    acc, top, total, q, K, V, MASK, i, m0, start, end, L, S, stride_kn, stride_vn, stride_mm,
    stride_mn, scale, seed, offset, blocks, bound,
    KEEP: tl.constexpr, BY_ROW: tl.constexpr, BY_COL: tl.constexpr, CAUSAL: tl.constexpr,
    EXACT: tl.constexpr, EDGE: tl.constexpr, VEC: tl.constexpr, BY_FOUR: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_M)[:, None]
    cols = tl.arange(0, BLOCK_N)[None, :]
    unit = LOG2E if EXACT else scale * LOG2E
    K += start.to(tl.int64) * stride_kn
    V += start.to(tl.int64) * stride_vn
    for n0 in range(start, end, BLOCK_N):
        left = S - n0 if EDGE == PAST_END else BLOCK_N
        k = _row_tile(K, stride_kn, left, D, BLOCK_N, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        t = _logits(
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
            keep = _kept(
                i, m0, n0, L, S, seed, offset, blocks, bound, VEC, BY_FOUR, BLOCK_M, BLOCK_N
            )
            p = tl.where(keep, p, 0.0)
        v = _row_tile(V, stride_vn, left, E, BLOCK_N, BLOCK_E)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        K += BLOCK_N * stride_kn
        V += BLOCK_N * stride_vn
    return acc, top, total


# Not G: where that is 1, and known to be, there is no loop over a group's heads, and sums need not
# leave the tensor cores' own memory or layout between two loops.
_RUNTIME = [
    "H", "L", "S", "seed", "offset", "blocks", "bound",
    *(f"stride_{x}" for x in (
        "qb", "qh", "qm", "kb", "kh", "kn", "vb", "vh", "vn", "ob", "oh", "om", "mb", "mh", "mm",
        "mn", "db", "dh", "dm", "wb", "wh", "wm", "wn",
    )),
]  # fmt: skip


def _runtime(*more):
    """`do_not_specialize` for a kernel, whose parameters are some of these."""

    def decorate(fn):
        names = fn.__code__.co_varnames[: fn.__code__.co_argcount]
        return kernel(fn, do_not_specialize=[n for n in (*_RUNTIME, *more) if n in names])

    return decorate


@_runtime()
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
    blocks_m = tl.cdiv(L, BLOCK_M)
    i = tl.program_id(0) // blocks_m
    m = tl.program_id(0) % blocks_m
    if CAUSAL:
        m = blocks_m - 1 - m  # those with the most keys start first
    m0 = m * BLOCK_M
    b = (i // H).to(tl.int64)
    h = (i % H).to(tl.int64)
    # Strides come divided by what divides them, so that the compiler sees the factor.
    stride_qm *= UNIT
    stride_kn *= UNIT
    stride_vn *= UNIT
    stride_om *= UNIT
    stride_mm *= MASK_UNIT
    Q += (b * stride_qb + h * stride_qh) * UNIT + m0 * stride_qm.to(tl.int64)
    K += (b * stride_kb + h // G * stride_kh) * UNIT
    V += (b * stride_vb + h // G * stride_vh) * UNIT
    OUT += (b * stride_ob + h * stride_oh) * UNIT + m0.to(tl.int64) * stride_om
    if MASK is not None:
        MASK += (b * stride_mb + h * stride_mh) * MASK_UNIT
    if VEC:
        seed, offset = _philox.load_state(seed, offset, SEED, OFFSET)
        _philox.save_state(STATE, seed, offset)
    q = _row_tile(Q, stride_qm, L - m0, D, BLOCK_M, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    end = S
    inner = S // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = tl.minimum(S, m0 + BLOCK_M)
        inner = tl.minimum(inner, (m0 + 1) // BLOCK_N * BLOCK_N)
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
    _store_rows(OUT, acc, stride_om, L - m0, E, BLOCK_M, BLOCK_E)
    rows = tl.arange(0, BLOCK_M)
    STATS += i.to(tl.int64) * L + m0
    tl.store(STATS + rows, top, mask=rows < L - m0)
    STATS += (tl.num_programs(0) // blocks_m).to(tl.int64) * L
    tl.store(STATS + rows, rest, mask=rows < L - m0)


# ---- Backward ------------------------------------------------------------------------------------


@_runtime()
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
    blocks_m = tl.cdiv(L, BLOCK_M)
    i = tl.program_id(0) // blocks_m
    m0 = tl.program_id(0) % blocks_m * BLOCK_M
    b = (i // H).to(tl.int64)
    h = (i % H).to(tl.int64)
    stride_om *= UNIT
    stride_dm *= UNIT
    OUT += (b * stride_ob + h * stride_oh) * UNIT + m0.to(tl.int64) * stride_om
    DOUT += (b * stride_db + h * stride_dh) * UNIT + m0 * stride_dm.to(tl.int64)
    at = i.to(tl.int64) * L + m0
    out = _row_tile(OUT, stride_om, L - m0, E, BLOCK_M, BLOCK_E).to(tl.float32)
    dout = _row_tile(DOUT, stride_dm, L - m0, E, BLOCK_M, BLOCK_E).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    stats = tl.arange(0, BLOCK_M)
    if DW is not None:  # out has no trace of the weights' own gradient
        rows = tl.arange(0, BLOCK_M)[:, None]
        cols = tl.arange(0, BLOCK_N)[None, :]
        stride_qm *= UNIT
        stride_kn *= UNIT
        stride_mm *= MASK_UNIT
        stride_wm *= W_UNIT
        Q += (b * stride_qb + h * stride_qh) * UNIT + m0 * stride_qm.to(tl.int64)
        K += (b * stride_kb + h // G * stride_kh) * UNIT
        DW += (b * stride_wb + h * stride_wh) * W_UNIT
        if MASK is not None:
            MASK += (b * stride_mb + h * stride_mh) * MASK_UNIT
        if VEC:
            seed, offset = _philox.load_state(seed, offset, SEED, OFFSET)
        q = _row_tile(Q, stride_qm, L - m0, D, BLOCK_M, BLOCK_D)
        heads = tl.num_programs(0) // blocks_m
        top = tl.load(STATS + at + stats, mask=stats < L - m0, other=float("inf"))
        STATS += heads.to(tl.int64) * L
        rest = tl.load(STATS + at + stats, mask=stats < L - m0, other=0.0)
        end = tl.minimum(S, m0 + BLOCK_M) if CAUSAL else S
        for n0 in range(0, end, BLOCK_N):
            k = _row_tile(K, stride_kn, S - n0, D, BLOCK_N, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            t = _logits(
                s, m0, n0, rows, cols, L, S, MASK, stride_mm, stride_mn, scale,
                KEEP, BY_ROW, BY_COL, CAUSAL, EXACT, PAST_END,
            )  # fmt: skip
            p = _weights(t, top[:, None], rest[:, None], scale, EXACT)
            dw = _broadcast_tile(
                DW, m0, n0, rows, cols, L, S, stride_wm, stride_wn, 1, W_COL, PAST_END
            )
            dp = dw.to(tl.float32) * w_scale
            if VEC:
                keep = _kept(
                    i, m0, n0, L, S, seed, offset, blocks, bound, VEC, BY_FOUR, BLOCK_M, BLOCK_N
                )
                dp *= tl.where(keep, noise_scale, 0.0)
            delta += tl.sum(p * dp, 1)
            K += BLOCK_N * stride_kn
    tl.store(DELTA + at + stats, delta, mask=stats < L - m0)


@triton.jit
def _row_statistics(TOP, REST, DELTA, row, L, FITS: tl.constexpr):
    """Largest t, logarithm of the sum, delta of each row; rows past the end have weights of 0."""
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

    FITS: the tile has all keys there are, and p comes of its own sums: as in stock, a row that sees
    but one key gets a weight of 1, and with `_dscores` a gradient of 0, to the bit.
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
        p = _weights(t, top, rest, scale, EXACT)
    return p


@triton.jit
def _dscores(
    p, dp, keep, delta, m0, n0, rows, cols, L, S, DW, stride_wm, stride_wn, noise_scale, w_scale,
    VEC: tl.constexpr, FITS: tl.constexpr, W_COL: tl.constexpr, EDGE: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """ds of a tile, of which `dp` is dout v^T; `keep` is nothing without dropout."""
    if DW is not None:
        dw = _broadcast_tile(DW, m0, n0, rows, cols, L, S, stride_wm, stride_wn, 1, W_COL, EDGE)
        dp += dw.to(tl.float32) * w_scale
    if VEC:
        dp *= tl.where(keep, noise_scale, 0.0)  # a product, as in stock: a dropped inf is nan
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
    rows = tl.arange(0, BLOCK_M)[None, :]
    cols = tl.arange(0, BLOCK_N)[:, None]
    stats = tl.arange(0, BLOCK_M)
    Q += start.to(tl.int64) * stride_qm
    DOUT += start.to(tl.int64) * stride_dm
    for m0 in range(start, end, BLOCK_M):
        q = _row_tile(Q, stride_qm, L - m0, D, BLOCK_M, BLOCK_D)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        t = _logits(
            s, m0, n0, rows, cols, L, S, MASK, stride_mm, stride_mn, scale,
            KEEP, BY_ROW, BY_COL, CAUSAL, EXACT, EDGE,
        )  # fmt: skip
        top, rest, delta = _row_statistics(STATS, REST, DELTA, m0 + stats, L, FITS)
        p = _weights_again(
            t, top[None, :], rest[None, :], m0, rows, L, scale, EXACT, FITS, SAFE, True
        )
        keep = 0
        if VEC:
            keep = tl.trans(
                _kept(i, m0, n0, L, S, seed, offset, blocks, bound, VEC, BY_FOUR, BLOCK_M, BLOCK_N)
            )
        dout = _row_tile(DOUT, stride_dm, L - m0, E, BLOCK_M, BLOCK_E)
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


@_runtime()
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
    K += (b * stride_kb + h_k * stride_kh) * UNIT + n0.to(tl.int64) * stride_kn
    V += (b * stride_vb + h_k * stride_vh) * UNIT + n0.to(tl.int64) * stride_vn
    if VEC:
        seed, offset = _philox.load_state(seed, offset, SEED, OFFSET)
    k = _row_tile(K, stride_kn, S - n0, D, BLOCK_N, BLOCK_D)
    v = _row_tile(V, stride_vn, S - n0, E, BLOCK_N, BLOCK_E)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    begin = n0 // BLOCK_M * BLOCK_M if CAUSAL else n0 * 0
    batch_heads = (tl.num_programs(0) // blocks_n * G).to(tl.int64)
    for g in range(G):
        h = h_k * G + g
        i = (b * H + h).to(tl.int32)
        q_ptr = Q + (b * stride_qb + h * stride_qh) * UNIT
        do_ptr = DOUT + (b * stride_db + h * stride_dh) * UNIT
        mask_ptr = MASK
        if MASK is not None:
            mask_ptr = MASK + (b * stride_mb + h * stride_mh) * MASK_UNIT
        dw_ptr = DW
        if DW is not None:
            dw_ptr = DW + (b * stride_wb + h * stride_wh) * W_UNIT
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
        _store_rows(DK, dk * scale, stride_dkn, S - n0, D, BLOCK_N, BLOCK_D)
    if DV is not None:
        DV += b * stride_dvb + h_k * stride_dvh + n0.to(tl.int64) * stride_dvn
        _store_rows(DV, dv * noise_scale, stride_dvn, S - n0, E, BLOCK_N, BLOCK_E)


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
    rows = tl.arange(0, BLOCK_M)[:, None]
    cols = tl.arange(0, BLOCK_N)[None, :]
    K += start.to(tl.int64) * stride_kn
    V += start.to(tl.int64) * stride_vn
    for n0 in range(start, end, BLOCK_N):
        left = S - n0 if EDGE == PAST_END else BLOCK_N
        k = _row_tile(K, stride_kn, left, D, BLOCK_N, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        t = _logits(
            s, m0, n0, rows, cols, L, S, MASK, stride_mm, stride_mn, scale,
            KEEP, BY_ROW, BY_COL, CAUSAL, EXACT, EDGE,
        )  # fmt: skip
        p = _weights_again(
            t, top[:, None], rest[:, None], m0, rows, L, scale, EXACT, FITS, SAFE, False
        )
        keep = 0
        if VEC:
            keep = _kept(
                i, m0, n0, L, S, seed, offset, blocks, bound, VEC, BY_FOUR, BLOCK_M, BLOCK_N
            )
        v = _row_tile(V, stride_vn, left, E, BLOCK_N, BLOCK_E)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = _dscores(
            p, dp, keep, delta[:, None], m0, n0, rows, cols, L, S, DW, stride_wm, stride_wn,
            noise_scale, w_scale, VEC, FITS, W_COL, EDGE, False,
        )  # fmt: skip
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        K += BLOCK_N * stride_kn
        V += BLOCK_N * stride_vn
    return dq


@_runtime()
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
    blocks_m = tl.cdiv(L, BLOCK_M)
    i = tl.program_id(0) // blocks_m
    m = tl.program_id(0) % blocks_m
    if CAUSAL:
        m = blocks_m - 1 - m
    m0 = m * BLOCK_M
    b = (i // H).to(tl.int64)
    h = (i % H).to(tl.int64)
    stride_qm *= UNIT
    stride_kn *= UNIT
    stride_vn *= UNIT
    stride_dm *= UNIT
    stride_mm *= MASK_UNIT
    stride_wm *= W_UNIT
    Q += (b * stride_qb + h * stride_qh) * UNIT + m0 * stride_qm.to(tl.int64)
    K += (b * stride_kb + h // G * stride_kh) * UNIT
    V += (b * stride_vb + h // G * stride_vh) * UNIT
    DOUT += (b * stride_db + h * stride_dh) * UNIT + m0 * stride_dm.to(tl.int64)
    if MASK is not None:
        MASK += (b * stride_mb + h * stride_mh) * MASK_UNIT
    if DW is not None:
        DW += (b * stride_wb + h * stride_wh) * W_UNIT
    if VEC:
        seed, offset = _philox.load_state(seed, offset, SEED, OFFSET)
    q = _row_tile(Q, stride_qm, L - m0, D, BLOCK_M, BLOCK_D)
    dout = _row_tile(DOUT, stride_dm, L - m0, E, BLOCK_M, BLOCK_E)
    at = i.to(tl.int64) * L
    REST = STATS + (tl.num_programs(0) // blocks_m).to(tl.int64) * L + at
    top, rest, delta = _row_statistics(
        STATS + at, REST, DELTA if FITS else DELTA + at, m0 + tl.arange(0, BLOCK_M), L, FITS
    )
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    end = S
    inner = S // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = tl.minimum(S, m0 + BLOCK_M)
        inner = tl.minimum(inner, (m0 + 1) // BLOCK_N * BLOCK_N)
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
    _store_rows(DQ, dq * scale, stride_dqm, L - m0, D, BLOCK_M, BLOCK_D)


@_runtime("B", "over_b", "over_h", "stride_gb", "stride_gh", "stride_gm", "stride_gn")
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
    """A tile of dmask, summed over the batches and heads (and rows) that share the mask.

    The mask has B // over_b batches and H // over_h heads, where `over` is all of them or 1.
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
        k_ptr = K + (b * stride_kb + h // G * stride_kh) * UNIT + n0.to(tl.int64) * stride_kn
        v_ptr = V + (b * stride_vb + h // G * stride_vh) * UNIT + n0.to(tl.int64) * stride_vn
        k = _row_tile(k_ptr, stride_kn, S - n0, D, BLOCK_N, BLOCK_D)
        v = _row_tile(v_ptr, stride_vn, S - n0, E, BLOCK_N, BLOCK_E)
        mask_ptr = MASK + (b * stride_mb + h * stride_mh) * MASK_UNIT
        dw_ptr = DW
        if DW is not None:
            dw_ptr = DW + (b * stride_wb + h * stride_wh) * W_UNIT
        for m0 in range(m_first, m_end, BLOCK_M):
            q_ptr = Q + (b * stride_qb + h * stride_qh) * UNIT + m0 * stride_qm.to(tl.int64)
            do_ptr = DOUT + (b * stride_db + h * stride_dh) * UNIT + m0 * stride_dm.to(tl.int64)
            q = _row_tile(q_ptr, stride_qm, L - m0, D, BLOCK_M, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            t = _logits(
                s, m0, n0, rows, cols, L, S, mask_ptr, stride_mm, stride_mn, scale,
                KEEP, BY_ROW, BY_COL, CAUSAL, EXACT, LAST,
            )  # fmt: skip
            at = i.to(tl.int64) * L
            top, rest, delta = _row_statistics(
                STATS + at, REST + at, DELTA if FITS else DELTA + at, m0 + tl.arange(0, BLOCK_M),
                L, FITS,
            )  # fmt: skip
            dout = _row_tile(do_ptr, stride_dm, L - m0, E, BLOCK_M, BLOCK_E)
            dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            p = _weights_again(
                t, top[:, None], rest[:, None], m0, rows, L, scale, EXACT, FITS, SAFE, False
            )
            keep = 0
            if VEC:
                keep = _kept(
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
        at = rows * stride_gm + cols * stride_gn
        there = (rows < L - m_first) & (cols < S - n0)
        tl.store(DMASK + at, acc.to(DMASK.dtype.element_ty), mask=there)


@kernel(do_not_specialize=["L", "S", "seed", "offset", "blocks", "bound"])
def _attention_keep_kernel(
    OUT, SEED, OFFSET, L, S, seed: tl.int64, offset: tl.int64, blocks, bound: tl.uint32,
    VEC: tl.constexpr, BY_FOUR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks_n = tl.cdiv(S, BLOCK_N)
    blocks_m = tl.cdiv(L, BLOCK_M)
    n0 = tl.program_id(0) % blocks_n * BLOCK_N
    m0 = tl.program_id(0) // blocks_n % blocks_m * BLOCK_M
    i = tl.program_id(0) // blocks_n // blocks_m
    seed, offset = _philox.load_state(seed, offset, SEED, OFFSET)
    keep = _kept(i, m0, n0, L, S, seed, offset, blocks, bound, VEC, BY_FOUR, BLOCK_M, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)[:, None]
    cols = tl.arange(0, BLOCK_N)[None, :]
    OUT += (i.to(tl.int64) * L + m0) * S + n0
    tl.store(OUT + rows * S + cols, keep, mask=(rows < L - m0) & (cols < S - n0))


# ---- Configurations ------------------------------------------------------------------------------


class Shape(NamedTuple):
    """What tiles are chosen by."""

    L: int
    D: int
    E: int
    itemsize: int
    arch: str
    masked: bool = False
    causal: bool = False
    noisy: bool = False
    grouped: bool = False


@tunable("BLOCK_M", "BLOCK_N")
def _config(kind, shape):
    """Tiles of "fwd", "dkdv", "dq" and "dmask": compiled, not yet timed.

    None of what the tests compile spills on sm_80, sm_86, sm_89, sm_90, sm_100 and sm_120.
    """
    d = max(next_power_of_2(max(shape.D, shape.E)), 16)
    plain = not (shape.masked or shape.noisy)
    ragged = max(shape.D, shape.E) != d  # so that its accesses are masked too
    # Without wgmma or tcgen05, operands and scores share the registers with the sums.
    narrow = shape.arch not in ("sm_90", "sm_100")
    if shape.itemsize == 4:
        wide = {"fwd": d > 64, "dkdv": d > 128}.get(kind, 64 < d <= 128)
        m, n, stages = 32 if wide else 16, 16, 1 if kind == "dkdv" and d > 64 else 2
        most = {"fwd": True, "dq": d > 16 or shape.noisy, "dkdv": d > 16}
        few = d <= 64 and most.get(kind, False)
        warps = 4 if few else 8
    elif kind == "fwd":
        if d <= 64:
            m, n, warps, stages = 128, 64, 4 if plain and not narrow else 8, 3
            if narrow and (d < 64 if plain else shape.masked and shape.noisy):
                m, warps = 64, 4 if plain else 8
        elif d <= 128:
            m, n, warps, stages = 128, 64, 8, 3
            if narrow and (shape.causal or not plain):
                m, n, warps, stages = (64, 64, 4, 3) if plain else (64, 32, 8, 2)
            elif shape.masked and shape.noisy:
                m = 64
        else:
            m, n, warps, stages = 64, 32, 8, 2
    elif kind == "dkdv":
        if d <= 64:
            tight = narrow and (shape.noisy or (shape.masked and ragged))
            m, n = 64 if plain and not narrow else 32, 64 if tight else 128
        else:
            tight = narrow and (ragged or (shape.masked and shape.noisy))
            m, n = 32, 128 if d <= 128 and not tight else 64
        warps, stages = 8, 2
    elif d <= 64:
        m, n, warps, stages = 128, 64, 8, 2
        if narrow and shape.noisy:
            m, n, warps = 64, 32, 8 if shape.masked and ragged else 4
        elif shape.masked and (narrow or (kind == "dmask" and shape.noisy)):
            m = 64
    else:
        m, n, warps, stages = 64, 64 if d <= 128 else 32, 8, 2
        if narrow and kind == "dmask":
            n = 32
        elif shape.noisy and (d > 128 or shape.masked) and kind == "dq" and not narrow:
            m = 32
    if d <= 16 and shape.itemsize == 2 and kind in ("fwd", "dq"):  # narrow accesses
        m, n = 64, 32 if kind == "dq" and shape.noisy else n
    if shape.arch == "sm_100" and shape.itemsize == 2:  # where masks take more
        if kind == "fwd" and ((shape.masked and d != 64) or (shape.noisy and d < 64)):
            m, n, warps = 64 if d <= 128 else 32, 64 if d <= 128 else 32, 8
        elif shape.masked and kind == "dkdv" and d <= 64:
            n = 64
        elif shape.masked and kind == "dq" and (d > 128 or (d < 64 and shape.noisy)):
            m = 64 if d < 64 else 32
        elif kind == "dmask" and d > 128:
            stages = 1
    if shape.grouped and shape.itemsize == 2:  # one more loop, around those of dk and dv
        if kind == "dkdv":
            n = 64 if plain and d <= 64 else 32
        elif kind == "dmask" or (narrow and shape.masked and kind == "dq"):
            m = min(m, 64)
    if shape.arch == "sm_100" and shape.itemsize == 2 and d <= 16:
        m, n, warps, stages = (32, 64, 8, 2) if kind == "dkdv" else (64, 32, 8, 2)
    if shape.arch == "gfx942" and shape.itemsize == 2:  # 64 KiB of shared memory
        stages = 1
        if d > 64:
            m, n = min(m, 64), min(n, 64 if kind == "dkdv" else 32)
    small = shape.arch in ("sm_86", "sm_89", "sm_120")
    if small and shape.itemsize == 2:  # 99 KiB of shared memory
        if kind == "fwd" and plain and 64 < d <= 128:
            m, n, warps, stages = 64, 64, 4, 3
        elif kind == "dkdv" and shape.masked and 64 < d <= 128:
            n = min(n, 64)
        elif kind == "dq" and shape.masked and shape.noisy and d <= 64:
            warps = 8
        elif kind != "fwd" and d > 128:
            stages = 1
    if shape.arch == "sm_120" and shape.itemsize == 2:  # where a thread spills sooner
        if kind == "fwd" and d <= 128 and (plain or shape.noisy):
            m, n, warps, stages = 64, 32, 8, 2
        elif kind == "dkdv" and d <= 128:
            n = 32 if d > 64 or not plain else 64
        elif kind in ("dq", "dmask") and d <= 64 and shape.masked:
            m, n, warps = 32, 16 if kind == "dmask" and shape.noisy else 32, 8
    config = {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    alone = shape.arch == "sm_100" and (d <= 16 or (d > 64 and kind == "dq"))
    alone = alone or (small and not plain and (d <= 16 or (d > 64 and kind == "fwd")))
    alone = alone or (shape.arch == "sm_120" and (d <= 16 or (d > 64 and kind == "dkdv")))
    if shape.itemsize == 4 or alone:
        config["maxnreg"] = 255  # else ptxas spills a few to hold another block
    return config


def _apart(shape):
    """Whether dk and dv are made by two launches, as their sums do not fit beside all the rest."""
    d = max(shape.D, shape.E)
    if shape.arch in ("sm_90", "sm_100"):
        return d > 128 or (d > 64 and (shape.noisy or (shape.masked and shape.causal)))
    return d > 128 or (shape.noisy and shape.masked) or (d > 64 and (shape.noisy or shape.masked))


def _last(S, causal, config):
    """`EDGE` of the last tiles of a row."""
    if S % config["BLOCK_N"]:
        return PAST_END.value
    return DIAGONAL.value if causal else 0


def _shape(q, k, v, mask, causal, noise, arch):
    return Shape(
        q.shape[2], q.shape[3], v.shape[3], q.element_size(), arch, mask is not None, causal,
        noise is not None, k.shape[1] != q.shape[1],
    )  # fmt: skip


# ---- Launchers -----------------------------------------------------------------------------------


def _rows(x):
    """x (B, H, N, D) or, where its rows are not dense or lie too far apart, a copy."""
    if (x.stride(3) == 1 or x.shape[3] <= 1) and x.stride(2) < 2**24:
        return x
    return dense(x)


def _strides(x, unit=1):
    return tuple(s // unit for s in x.stride()[:3])


def _like_rows(q, E):
    """Uninitialised (B, H, L, E), in the order (B, L, H, E) of a projection that follows."""
    B, H, L, _ = q.shape
    return q.new_empty_strided((B, H, L, E), (H * L * E, E, H * E, 1))


def _like(x):
    """Uninitialised, laid out as x, its last dim with unit stride."""
    y = torch.empty_like(x)
    return y if y.stride(3) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward_configs(shape):
    return {kind: _config(kind, shape) for kind in ("dkdv", "dq", "dmask")}


def fits(q, k, v, mask, causal, noise, arch):
    """Whether a backward tile has all keys, so that `bwd`, given the same, needs no out."""
    return _fit(_backward_configs(_shape(q, k, v, mask, causal, noise, arch)), k.shape[2])


def _fit(configs, S):
    return min(config["BLOCK_N"] for config in configs.values()) >= S


class _Call(NamedTuple):
    """What all kernels of a call are given."""

    causal: bool
    safe: bool
    exact: bool
    unit: int
    mask: torch.Tensor | None
    mask_strides: tuple
    constexprs: dict
    random: tuple
    noise: Noise | None


def _prepare(tensors, mask, causal, scale, noise, safe, precision):
    """`tensors` are those whose strides are to be read: q, k, v and so on."""
    v = 16 // tensors[0].element_size()
    unit = width(v, *(s for t in tensors for s in _strides(t)))
    strides, mask_unit, keep, by_row, by_col = (0, 0, 0, 0), 1, False, 0, 0
    exact = v == 4 or not 0.0 < scale < float("inf")
    if mask is not None:
        keep = mask.dtype == torch.bool
        exact = exact or not keep
        shape, (mb, mh, mm, mn) = mask.shape, mask.stride()
        mb, mh, mm, mn = (s if n > 1 else 0 for n, s in zip(shape, (mb, mh, mm, mn), strict=True))
        mask_unit = width(16 // mask.element_size(), mb, mh, mm) if mm else 1
        by_row, by_col = int(mm != 0), (1 if mn == 1 else 2) if mn else 0
        strides = mb // mask_unit, mh // mask_unit, mm // mask_unit, mn
        if keep:
            mask = mask.view(torch.uint8)
    S = tensors[1].shape[2]
    draw = noise.draw if noise else None
    seed, offset, SEED, OFFSET, blocks, bound = epilogue.random_arguments(
        draw, noise.bound if noise else 0
    )
    constexprs = {
        "KEEP": keep,
        "BY_ROW": by_row,
        "BY_COL": by_col,
        "CAUSAL": causal,
        "VEC": (draw.vec or ROWS.value) if noise else 0,
        "BY_FOUR": epilogue.by_four(S, draw),
        "PRECISION": precision,
        "UNIT": unit,
        "MASK_UNIT": mask_unit,
        "D": tensors[0].shape[3],
        "E": tensors[2].shape[3],
        "BLOCK_D": max(next_power_of_2(tensors[0].shape[3]), 16),
        "BLOCK_E": max(next_power_of_2(tensors[2].shape[3]), 16),
    }
    random = (SEED, OFFSET), (seed, offset, blocks, bound)
    return _Call(causal, safe, exact, unit, mask, strides, constexprs, random, noise)


def fwd(
    q, k, v, mask=None, *, scale, causal=False, noise=None, safe=True, out=None,
    precision="ieee", arch="",
):  # fmt: skip
    """q (B, H, L, D), k (B, H/G, S, D), v (B, H/G, S, E), any strides -> (out, stats).

    out (B, H, L, E), in `out` if given, else in memory order (B, L, H, E); stats (2, B, H, L) fp32:
    the largest t of each row, and the logarithm of the sum of exp(t - that), for `bwd`; their sum
    is the usual lse. Copies q, k or v only where their last dim has no unit stride.
    mask: bool, True to keep, or float, added; 4-D with sizes of 1, or strides of 0, where it
    broadcasts. causal: query l sees keys 0 to l. noise: a `Noise`. safe: rows without a key give 0
    (else nan). precision: of fp32 products, "ieee" or "tf32".
    """
    q, k, v = _rows(q), _rows(k), _rows(v)
    (B, H, L, _), (H_k, S, E) = q.shape, v.shape[1:]
    if out is None:
        out = _like_rows(q, E)
    stats = q.new_empty((2, B, H, L), dtype=torch.float32)
    c = _prepare((q, k, v, out), mask, causal, scale, noise, safe, precision)
    shape = _shape(q, k, v, mask, causal, noise, arch)
    config = _config("fwd", shape)
    random, numbers = c.random
    _attention_fwd_kernel(
        (cdiv(L, config["BLOCK_M"]) * B * H,), q, k, v, c.mask, out, stats, *random,
        noise.state if noise else None, H, H // max(H_k, 1), L, S, *_strides(q, c.unit),
        *_strides(k, c.unit), *_strides(v, c.unit), *_strides(out, c.unit), *c.mask_strides,
        scale, noise.scale if noise else 1.0, *numbers, **c.constexprs, EXACT=c.exact, SAFE=safe,
        LAST=_last(S, causal, config), **config,
    )  # fmt: skip
    return out, stats


def bwd(
    dout, q, k, v, mask, out, stats, *, scale, causal=False, noise=None, safe=True,
    dweights=None, weights_scale=1.0, delta=None, dq=None, dk=None, dv=None, dmask=None,
    want=(True, True, True), precision="ieee", arch="",
):  # fmt: skip
    """Gradients for what `fwd` was given and gave: (dq, dk, dv), None for those not in `want`.

    dout: as out, any strides. dq, dk and dv are written where given (any dtype and strides, but a
    unit one in the last dim), else laid out as q, k and v. dmask: any float dtype, 4-D, of size 1
    in the dims that are to be summed over, which may not be the last one. out may be None where
    `fits(...)`, or delta is given.
    dweights: the gradient of weights that were returned, (B, L, S) for weights averaged over heads
    or (B, H, L, S), any strides; times `weights_scale` it is added to dp of each head. delta:
    (B, H, L) fp32, if it is known already; it includes what dweights add. noise: as of `fwd`, with
    the scale of the gradient.
    """
    q, k, v, dout = _rows(q), _rows(k), _rows(v), _rows(dout)
    out = dout if out is None else _rows(out)
    (B, H, L, _), (H_k, S, _) = q.shape, v.shape[1:]
    G = H // max(H_k, 1)
    c = _prepare((q, k, v, out, dout), mask, causal, scale, noise, safe, precision)
    shape = _shape(q, k, v, mask, causal, noise, arch)
    configs = _backward_configs(shape)
    in_one_tile = delta is None and _fit(configs, S)
    w_strides, w_unit, w_col = (0, 0, 0, 0), 1, 1
    if dweights is not None:
        if dweights.dim() == 3:
            dweights = dweights.unsqueeze(1)
        wb, wh, wm, wn = dweights.expand(B, H, L, S).stride()
        w_unit = width(16 // dweights.element_size(), wb, wh, wm)
        w_strides = wb // w_unit, wh // w_unit, wm // w_unit, wn
        w_col = 1 if wn == 1 else 2
    random, numbers = c.random
    scales = scale, noise.scale if noise else 1.0, weights_scale
    heads = H, G, L, S
    strides = {"q": q, "k": k, "v": v, "o": out, "d": dout}
    strides = {name: _strides(t, c.unit) for name, t in strides.items()}
    exact = {"EXACT": c.exact or in_one_tile, "W_UNIT": w_unit, "W_COL": w_col}
    if not in_one_tile and delta is None:
        config = configs["dq"]
        delta = stats.new_empty((B, H, L))
        _attention_delta_kernel(
            (cdiv(L, config["BLOCK_M"]) * B * H,), q, k, c.mask, out, dout, stats, dweights,
            delta, *random, *heads, *strides["q"], *strides["k"], *strides["o"], *strides["d"],
            *c.mask_strides, *w_strides, *scales, *numbers, **c.constexprs, **exact, **config,
        )  # fmt: skip
    given = (
        *strides["q"], *strides["k"], *strides["v"], *strides["d"], *c.mask_strides, *w_strides,
        *scales, *numbers,
    )  # fmt: skip
    same = c.constexprs | exact | {"FITS": in_one_tile, "SAFE": safe or not in_one_tile}
    tensors = q, k, v, c.mask, dout, stats, delta, dweights
    if want[1] or want[2]:
        config = configs["dkdv"]
        dk = (_like(k) if dk is None else dk) if want[1] else None
        dv = (_like(v) if dv is None else dv) if want[2] else None
        for of_k, of_v in ((dk, None), (None, dv)) if _apart(shape) else ((dk, dv),):
            if of_k is None and of_v is None:
                continue
            _attention_bwd_dkdv_kernel(
                (cdiv(S, config["BLOCK_N"]) * B * H_k,), *tensors, of_k, of_v, *random,
                *heads, *given, *_strides(dv if dk is None else dk),
                *_strides(dk if dv is None else dv), **same, LAST=_last(S, causal, config),
                **config,
            )  # fmt: skip
    if want[0]:
        config = configs["dq"]
        dq = _like(q) if dq is None else dq
        _attention_bwd_dq_kernel(
            (cdiv(L, config["BLOCK_M"]) * B * H,), *tensors, dq, *random, *heads, *given,
            *_strides(dq), **same, LAST=_last(S, causal, config), **config,
        )  # fmt: skip
    if dmask is not None:
        config = configs["dmask"]
        g = dmask.stride()
        once = [n > 1 for n in dmask.shape]
        over_b, over_h = (1 if one else n for one, n in zip(once, (B, H), strict=False))
        tiles = cdiv(S, config["BLOCK_N"])
        tiles *= cdiv(L, config["BLOCK_M"]) if once[2] else 1
        _attention_bwd_dmask_kernel(
            (tiles * (B // over_b) * (H // over_h),), *tensors, dmask, *random, B, *heads, *given,
            over_b, over_h, *(s if one else 0 for s, one in zip(g, once, strict=True)), **same,
            SUM_ROWS=not once[2], LAST=_last(S, causal, config), **config,
        )  # fmt: skip
    return dq if want[0] else None, dk if want[1] else None, dv if want[2] else None


def keep(like, noise):
    """Which elements of the weights, like (..., L, S), a `Noise` keeps: bool, contiguous."""
    out = torch.empty(like.shape, dtype=torch.bool, device=like.device)
    L, S = like.shape[-2:]
    seed, offset, SEED, OFFSET, blocks, bound = epilogue.random_arguments(noise.draw, noise.bound)
    tiles = cdiv(L, 32) * cdiv(S, 32)
    _attention_keep_kernel(
        (out.numel() // max(L * S, 1) * tiles,), out.view(torch.uint8), SEED, OFFSET, L, S, seed,
        offset, blocks, bound, VEC=noise.draw.vec or ROWS.value,
        BY_FOUR=epilogue.by_four(S, noise.draw), BLOCK_M=32, BLOCK_N=32, num_warps=4,
    )  # fmt: skip
    return out
