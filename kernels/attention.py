"""Attention that never stores an L x S tensor, and its gradients. For each batch and head:

    t = scale * q k^T + mask      p = softmax(t)      out = (p * noise) v
    dp = (dout v^T + dw) * noise  ds = p * (dp - delta)     delta[l] = sum over s of p dp
    dq = scale * ds k     dk = scale * ds^T q     dv = (p * noise)^T dout     dmask = ds

noise is the scale of dropout where a weight is kept, else 0. dw is the gradient of the weights p *
noise, if they were returned.

q is (L, D), k (S, D), v (S, E). The forward takes 2LS(D + E) FLOPs, the backward 2LS(4D + 3E); a
causal call takes half of that. Bytes: q, k, v and out once; keys and values again for each block of
queries, from L2. The forward keeps, in fp32, the largest t of each row and the logarithm of its
sum. The backward computes the scores again from them: dk and dv by blocks of keys, dq by blocks of
queries, each sum in a fixed order.

This file has the launchers. The kernels are in attention_fwd.py and attention_bwd.py, and what they
share is in attention_tiles.py. attention_config.py chooses their tiles, warps and stages.
"""

from typing import Any, NamedTuple

import torch
import triton.language as tl

from fastnn.kernels import _philox, attention_bwd, attention_config, attention_fwd
from fastnn.kernels._launch import kernel
from fastnn.kernels._sizes import cdiv, next_power_of_2
from fastnn.kernels._tl import dense
from fastnn.kernels.attention_config import Shape
from fastnn.kernels.attention_tiles import DIAGONAL, PAST_END, ROWS, kept_tile
from fastnn.kernels.epilogue import width


class WeightDropout(NamedTuple):
    """Dropout of the weights.

    draw: a `_philox.Draw`. If its `vec` is 0, the weight at (batch and head i, row l, column s) has
        word s % 4 of the Philox call at counter offset/4 + s // 4, subsequence (l, i). This needs
        no division, has no size limit, and advances the generator by `increment(S)`. Else the
        weight has the word that `native_dropout` would give it; for fewer than 2**31 weights.
    bound: a weight is kept if its word is below `bound`.
    scale: the factor of the kept weights.
    state: see `_philox.save_state`.
    """

    draw: Any
    bound: int
    scale: float
    state: torch.Tensor | None = None


def increment(S):
    """By how much a draw with `vec` 0 advances the generator."""
    return 4 * cdiv(S, 4)


@kernel(do_not_specialize=["L", "S", "seed", "offset", "blocks", "bound"])
def _attention_keep_kernel(
    OUT, SEED, OFFSET, L, S, seed: tl.int64, offset: tl.int64, blocks, bound: tl.uint32,
    VEC: tl.constexpr, BY_FOUR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program decides on a tile of one batch and head.

    OUT (B * H, L, S): uint8, 1 where kept. SEED, OFFSET: int64, one element each, or None.
    """
    blocks_n = tl.cdiv(S, BLOCK_N)
    blocks_m = tl.cdiv(L, BLOCK_M)
    n0 = tl.program_id(0) % blocks_n * BLOCK_N
    m0 = tl.program_id(0) // blocks_n % blocks_m * BLOCK_M
    i = tl.program_id(0) // blocks_n // blocks_m
    seed, offset = _philox.load_state(seed, offset, SEED, OFFSET)
    keep = kept_tile(i, m0, n0, L, S, seed, offset, blocks, bound, VEC, BY_FOUR, BLOCK_M, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)[:, None]
    cols = tl.arange(0, BLOCK_N)[None, :]
    OUT += (i.to(tl.int64) * L + m0) * S + n0
    tl.store(OUT + rows.to(tl.int64) * S + cols, keep, mask=(rows < L - m0) & (cols < S - n0))


def _last(S, causal, config):
    """The constexpr `EDGE` of the last tiles of a row."""
    if S % config["BLOCK_N"]:
        return PAST_END.value
    return DIAGONAL.value if causal else 0


def _shape(q, k, v, mask, causal, noise, arch):
    added = mask is not None and mask.dtype != torch.bool
    return Shape(
        q.shape[2], q.shape[3], v.shape[3], q.element_size(), arch, mask is not None, causal,
        noise is not None, k.shape[1] != q.shape[1], mask.element_size() if added else 0,
    )  # fmt: skip


# ---- Launchers -----------------------------------------------------------------------------------


# Elements between rows or columns, below which 32 bits hold the offsets in a tile, of at most 128.
_APART = 2**24


def _rows(x):
    """x (B, H, N, D), or a copy of x if its rows are not dense or are too far apart."""
    if (x.stride(3) == 1 or x.shape[3] <= 1) and x.stride(2) < _APART:
        return x
    return dense(x)


def _near(x):
    """x (B, H, L, S), or a copy of x if its rows or columns are too far apart."""
    rows, cols = (s if n > 1 else 0 for n, s in zip(x.shape[2:], x.stride()[2:], strict=True))
    return x if rows < _APART and cols < _APART else dense(x)


def _strides(x, unit=1):
    return tuple(s // unit for s in x.stride()[:3])


def _like_rows(q, E):
    """Uninitialised (B, H, L, E), in memory order (B, L, H, E) for a following projection."""
    B, H, L, _ = q.shape
    return q.new_empty_strided((B, H, L, E), (H * L * E, E, H * E, 1))


def _like(x):
    """Uninitialised, with the layout of x, and unit stride in the last dim."""
    y = torch.empty_like(x)
    return y if y.stride(3) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward_configs(shape):
    return {kind: attention_config.config(kind, shape) for kind in ("dkdv", "dq", "dmask")}


def fits(q, k, v, mask, causal, noise, arch):
    """Whether a backward tile has all keys. If so, `bwd` with these arguments needs no `out`."""
    return _fit(_backward_configs(_shape(q, k, v, mask, causal, noise, arch)), k.shape[2])


def _fit(configs, S):
    return min(config["BLOCK_N"] for config in configs.values()) >= S


class _Call(NamedTuple):
    """The arguments that all kernels of a call share."""

    causal: bool
    safe: bool
    exact: bool
    unit: int
    mask: torch.Tensor | None
    mask_strides: tuple
    constexprs: dict
    random: tuple
    noise: WeightDropout | None


def _prepare(tensors, mask, causal, scale, noise, safe, precision):
    """`tensors` are those whose strides the kernels read: q, k, v and so on."""
    v = 16 // tensors[0].element_size()
    unit = width(v, *(s for t in tensors for s in _strides(t)))
    strides, mask_unit, keep, by_row, by_col = (0, 0, 0, 0), 1, False, 0, 0
    exact = v == 4 or not 0.0 < scale < float("inf")
    if mask is not None:
        keep = mask.dtype == torch.bool
        exact = exact or not keep
        mask = _near(mask)
        shape, (mb, mh, mm, mn) = mask.shape, mask.stride()
        mb, mh, mm, mn = (s if n > 1 else 0 for n, s in zip(shape, (mb, mh, mm, mn), strict=True))
        mask_unit = width(16 // mask.element_size(), mb, mh, mm) if mm else 1
        by_row, by_col = int(mm != 0), (1 if mn == 1 else 2) if mn else 0
        strides = mb // mask_unit, mh // mask_unit, mm // mask_unit, mn
        if keep:
            mask = mask.view(torch.uint8)
    S = tensors[1].shape[2]
    draw = noise.draw if noise else None
    seed, offset, SEED, OFFSET, blocks, bound = _philox.random_arguments(
        draw, noise.bound if noise else 0
    )
    constexprs = {
        "KEEP": keep,
        "BY_ROW": by_row,
        "BY_COL": by_col,
        "CAUSAL": causal,
        "VEC": 0 if draw is None else draw.vec or ROWS.value,
        "BY_FOUR": _philox.by_four(S, draw),
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

    out is (B, H, L, E), in the given `out`, or else in memory order (B, L, H, E). stats is (2, B,
    H, L) fp32, for `bwd`: the largest t of each row, and the logarithm of the sum of exp(t -
    largest t). Their sum is the usual lse. q, k or v is copied only if its last dim has no unit
    stride, or its rows are too far apart.

    mask: bool (True to keep) or float (added); 4-D; size 1 or stride 0 where it broadcasts.
    causal: query l sees keys 0 to l.
    noise: a `WeightDropout`.
    safe: rows without a key give 0, else nan.
    precision: of fp32 products, "ieee" or "tf32".
    """
    q, k, v = _rows(q), _rows(k), _rows(v)
    (B, H, L, _), (H_k, S, E) = q.shape, v.shape[1:]
    if out is None:
        out = _like_rows(q, E)
    stats = q.new_empty((2, B, H, L), dtype=torch.float32)
    c = _prepare((q, k, v, out), mask, causal, scale, noise, safe, precision)
    shape = _shape(q, k, v, mask, causal, noise, arch)
    config = attention_config.config("fwd", shape)
    random, numbers = c.random
    attention_fwd._attention_fwd_kernel(
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
    """Gradients for the arguments and results of `fwd`: (dq, dk, dv), None for those not in `want`.

    dout: as out, any strides.
    dq, dk, dv: written if given (any dtype and strides, unit stride in the last dim); else new,
        with the layouts of q, k and v.
    dmask: written if given; any float dtype, 4-D, with size 1 in the dims to sum over, which may
        not include the last one.
    out: may be None if `fits(...)`, or if delta is given.
    dweights: the gradient of returned weights, any strides: (B, L, S) for weights averaged over the
        heads, or (B, H, L, S). `weights_scale` times it is added to dp of each head.
    delta: (B, H, L) fp32, if it is already known; it includes the share of dweights.
    noise: as in `fwd`, with the scale of the gradient.
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
        dweights = _near(dweights)
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
        attention_bwd._attention_delta_kernel(
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
        apart = attention_config.apart(shape)
        for of_k, of_v in ((dk, None), (None, dv)) if apart else ((dk, dv),):
            if of_k is None and of_v is None:
                continue
            attention_bwd._attention_bwd_dkdv_kernel(
                (cdiv(S, config["BLOCK_N"]) * B * H_k,), *tensors, of_k, of_v, *random,
                *heads, *given, *_strides(dv if dk is None else dk),
                *_strides(dk if dv is None else dv), **same, LAST=_last(S, causal, config),
                **config,
            )  # fmt: skip
    if want[0]:
        config = configs["dq"]
        dq = _like(q) if dq is None else dq
        attention_bwd._attention_bwd_dq_kernel(
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
        attention_bwd._attention_bwd_dmask_kernel(
            (tiles * (B // over_b) * (H // over_h),), *tensors, dmask, *random, B, *heads, *given,
            over_b, over_h, *(s if one else 0 for s, one in zip(g, once, strict=True)), **same,
            SUM_ROWS=not once[2], LAST=_last(S, causal, config), **config,
        )  # fmt: skip
    return dq if want[0] else None, dk if want[1] else None, dv if want[2] else None


def keep(like, noise):
    """Which weights, of those like (..., L, S), a `WeightDropout` keeps: bool, contiguous."""
    out = torch.empty(like.shape, dtype=torch.bool, device=like.device)
    L, S = like.shape[-2:]
    seed, offset, SEED, OFFSET, blocks, bound = _philox.random_arguments(noise.draw, noise.bound)
    tiles = cdiv(L, 32) * cdiv(S, 32)
    _attention_keep_kernel(
        (out.numel() // max(L * S, 1) * tiles,), out.view(torch.uint8), SEED, OFFSET, L, S, seed,
        offset, blocks, bound, VEC=noise.draw.vec or ROWS.value,
        BY_FOUR=_philox.by_four(S, noise.draw), BLOCK_M=32, BLOCK_N=32, num_warps=4,
    )  # fmt: skip
    return out
