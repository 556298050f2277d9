"""Multi-head attention: its projections, and attention that returns its weights."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as stock
from torch import Tensor

from fastnn import _rng, kernels
from fastnn._op import Function, Invalid, Stock, Work, op, run, second_order
from fastnn.kernels import _gpus
from fastnn.ops.attention import scaled_dot_product_attention
from fastnn.ops.dropout import native_scales
from fastnn.ops.linear import matmul_precision


class How(NamedTuple):
    """What attention returns, and how it is computed."""

    heads: int
    average: bool
    noise: Any  # kernels.attention.WeightDropout, whose state is None
    grad_scale: float  # the factor of a kept weight's gradient
    precision: str
    arch: str
    weights_dtype: torch.dtype


def _heads(sources, E, H):
    """(L, B, n * E) projections, in the order q, k, v -> (B, H, L, D) views of each."""
    views = [part for t in sources for part in ([t] if t.shape[-1] == E else t.split(E, -1))]
    return [t.unflatten(-1, (H, E // H)).permute(1, 2, 0, 3) for t in views]


class WeightedAttention(Function):
    """mask (4-D) or None, projections as in `_heads` -> out (L, B, E), weights (B[, H], L, S)."""

    strided = ("dout", "dweights")

    @staticmethod
    def forward(ctx, mask, how, E, *sources):
        q, k, v = _heads(sources, E, how.heads)
        B, H, L, D = q.shape
        noise = how.noise
        if noise is not None:
            noise = noise._replace(state=noise.draw.new_state(q))
        scale = math.sqrt(1.0 / D)
        out = q.new_empty((L, B, E))
        _, stats = kernels.attention.fwd(
            q, k, v, mask, scale=scale, noise=noise, safe=False, precision=how.precision,
            arch=how.arch, out=_heads([out], E, H)[0],
        )  # fmt: skip
        weights = kernels.attention_weights.fwd(
            q, k, mask, stats, how.weights_dtype, scale=scale, average=how.average, noise=noise,
            precision=how.precision,
        )  # fmt: skip
        ctx.save_for_backward(mask, out, stats, noise and noise.state, *sources)
        if noise is not None:
            how = how._replace(noise=how.noise._replace(draw=noise.draw.kept()))
        ctx.rest = how, E
        ctx.set_materialize_grads(False)
        return out, weights

    @staticmethod
    def backward(ctx, dout, dweights):
        mask, out, stats, state, *sources = ctx.saved_tensors
        how, E = ctx.rest
        H = how.heads
        noise = how.noise
        if noise is not None:
            draw = noise.draw.from_state(state)
            noise = noise._replace(draw=draw, scale=how.grad_scale)
        needs = ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():
            given = [g for g in (dout, dweights) if g is not None]

            def formula(mask, *sources):
                outs = _composed(mask, sources, E, how, noise)
                return [t for t, g in zip(outs, (dout, dweights), strict=True) if g is not None]

            grads = second_order(formula, (mask, *sources), given, needs)
            return grads[0], None, None, *grads[1:]
        q, k, v = _heads(sources, E, H)
        if dout is None:
            dout = torch.zeros_like(out)
        pairs = list(zip(sources, needs[1:], strict=True))
        dsources = [torch.empty_like(t) if need else None for t, need in pairs]
        want = tuple(need for t, need in pairs for _ in range(t.shape[-1] // E))
        # A source that needs no gradient stands in for its gradient, to keep the order of q, k and
        # v.
        filled = [t if d is None else d for (t, _), d in zip(pairs, dsources, strict=True)]
        views = _heads(filled, E, H)
        dmask = torch.empty_like(mask) if needs[0] else None
        kernels.attention.bwd(
            _heads([dout], E, H)[0], q, k, v, mask, _heads([out], E, H)[0], stats,
            scale=math.sqrt(1.0 / (E // H)), noise=noise, safe=False, dweights=dweights,
            weights_scale=1.0 / H if how.average else 1.0, want=want, dmask=dmask,
            precision=how.precision, arch=how.arch,
            **{f"d{x}": t for x, t, w in zip("qkv", views, want, strict=True) if w},
        )  # fmt: skip
        return dmask, None, None, *dsources


def _composed(mask, sources, E, how, noise):
    """PyTorch's formula, with noise that is already drawn."""
    q, k, v = _heads(sources, E, how.heads)
    scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(-2, -1)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(mask.logical_not(), -math.inf)
    elif mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1)
    if noise is not None:
        weights = weights * (kernels.attention.keep(weights, noise) * noise.scale)
    out = (weights.to(v.dtype) @ v).permute(2, 0, 1, 3).flatten(2)
    weights = weights.to(how.weights_dtype)
    return out, weights.mean(1) if how.average else weights


class Parts(Function):
    """(..., n * E) -> n views (..., E). PyTorch's gradient of such views adds n full tensors."""

    strided = ("grads",)

    @staticmethod
    def forward(ctx, x, E):
        return x.split(E, -1)

    @staticmethod
    def backward(ctx, *grads):
        return torch.cat(grads, -1), None


# ---- The call -----------------------------------------------------------------------------------


def _project(x, weight, bias):
    """`linear`, without a copy if the two leading dimensions of x are swapped in memory."""
    if x.is_contiguous() or not x.transpose(0, 1).is_contiguous():
        return stock.linear(x, weight, bias)
    return stock.linear(x.transpose(0, 1), weight, bias).transpose(0, 1)


def _mask(attn_mask, key_padding_mask, H) -> Tensor | None:
    """The two masks as one 4-D mask: float, which is added, or bool, True to keep.

    It broadcasts over the heads, except where PyTorch's masks do not.
    """
    mask = None
    if attn_mask is not None:
        mask = attn_mask.unflatten(0, (-1, H)) if attn_mask.dim() == 3 else attn_mask[None, None]
    if key_padding_mask is not None:
        padding = key_padding_mask[:, None, None]
        if mask is None:
            mask = padding
        else:
            mask = mask | padding if mask.dtype == torch.bool else mask + padding
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.logical_not()
    return mask


def _rejected(
    query, key, value, embed_dim, num_heads, packed, separate, bias, out_weight, out_bias, p,
    key_padding_mask, attn_mask, is_causal,
):  # fmt: skip
    """Whether PyTorch would raise an error."""
    if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
        return True
    batched = query.dim() == 3
    L, S, E = query.shape[0], key.shape[0], query.shape[-1]
    B = query.shape[1] if batched else 1
    if E != embed_dim or num_heads <= 0 or E % num_heads:
        return True
    if batched and (key.shape[1] != B or value.shape[1] != B):
        return True
    if separate is None:
        if packed is None or key.shape != value.shape or key.shape[-1] != E:
            return True
        if tuple(packed.shape) != (3 * E, E):
            return True
    elif value.shape[:-1] != key.shape[:-1] or any(
        w is None or tuple(w.shape) != (E, x.shape[-1])
        for w, x in zip(separate, (query, key, value), strict=True)
    ):
        return True
    if bias is not None and tuple(bias.shape) != (3 * E,):
        return True
    if out_weight.dim() != 2 or out_weight.shape[1] != E:
        return True
    if out_bias is not None and out_bias.shape != out_weight.shape[:1]:
        return True
    if not 0 <= p <= 1 or (is_causal and attn_mask is None):
        return True
    if key_padding_mask is not None and tuple(key_padding_mask.shape) != (
        (B, S) if batched else (S,)
    ):
        return True
    return attn_mask is not None and tuple(attn_mask.shape) not in (
        (L, S),
        (B * num_heads, L, S),
    )


def _scores(query, key, value, embed_dim_to_check, num_heads, *rest, **options):
    """The gate's policy: the number of attention weights of all heads."""
    if query.is_cuda:
        low = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        dtype = low or query.dtype
        if dtype == torch.float32 and matmul_precision(query.get_device()) == "ieee":
            return Stock("gate", "float32 products without TF32: cuBLAS is faster than a kernel")
    batch = query.shape[1] if query.dim() == 3 else 1
    return Work(batch * num_heads * query.shape[0] * key.shape[0], "attention weights")


_TENSORS = (
    "query", "key", "value", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v",
    "out_proj_weight", "out_proj_bias", "key_padding_mask", "attn_mask", "q_proj_weight",
    "k_proj_weight", "v_proj_weight",
)  # fmt: skip


@op(
    stock=stock.multi_head_attention_forward,
    strided=_TENSORS,
    integers=(torch.bool,),
    policy=_scores,
    at_most="query.numel() // query.shape[-1] * num_heads * key.shape[0]",
    source="arXiv:1706.03762, section 3.2; arXiv:2205.14135; arXiv:2307.08691",
)
def multi_head_attention_forward(
    query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v,
    add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training=True, key_padding_mask=None,
    need_weights=True, attn_mask=None, use_separate_proj_weight=False, q_proj_weight=None,
    k_proj_weight=None, v_proj_weight=None, static_k=None, static_v=None,
    average_attn_weights=True, is_causal=False,
):  # fmt: skip
    """Fused with its weights, averaged or not, in memory of their size; masks are read in place.

    One product projects q, k and v if PyTorch uses one, and they are read from its result. Without
    weights, it calls `scaled_dot_product_attention`.
    """
    if static_k is not None or static_v is not None:
        return Stock("option", "static_k or static_v")
    if type(dropout_p) not in (float, int) or type(num_heads) is not int:
        return Stock("option", f"dropout_p={dropout_p!r}, num_heads={num_heads!r}")
    separate = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None
    if _rejected(
        query, key, value, embed_dim_to_check, num_heads, in_proj_weight, separate, in_proj_bias,
        out_proj_weight, out_proj_bias, dropout_p, key_padding_mask, attn_mask, is_causal,
    ):  # fmt: skip
        return Invalid("shape", "shapes or options that PyTorch rejects")
    masks = [m for m in (key_padding_mask, attn_mask) if m is not None]
    if len({m.dtype for m in masks}) > 1:
        return Stock("dtype", "masks of two dtypes: PyTorch warns")
    device = query.device.type
    if (bias_k is None) != (bias_v is None):
        return Invalid("option", "one of bias_k and bias_v")
    more = [t for t in (bias_k, bias_v) if t is not None]
    if any(tuple(t.shape) != (1, 1, query.shape[-1]) for t in more):
        return Stock(
            "shape", f"bias_k of shape {tuple(bias_k.shape)}; kernels take the shape of the layer"
        )
    given = [*more, query, key, value, *(separate or (in_proj_weight,)), out_proj_weight]
    given += [t for t in (in_proj_bias, out_proj_bias) if t is not None]
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if low is None:
        if any(t.dtype != query.dtype for t in given):
            return Invalid("dtype", "several dtypes")
        if masks and masks[0].dtype not in (torch.bool, query.dtype):
            return Stock(
                "dtype", f"a mask in {masks[0].dtype}; kernels take bool and {query.dtype}"
            )
    elif more or add_zero_attn:
        return Stock("autocast", "bias_k or add_zero_attn under autocast")
    dtype = low or query.dtype
    precision = "ieee" if dtype != torch.float32 else matmul_precision(query.get_device())
    arch = _gpus.architecture(query.get_device())
    B = query.shape[1] if query.dim() == 3 else 1
    L, S, E, H = query.shape[0], key.shape[0], query.shape[-1], num_heads
    added = (bias_k is not None) + bool(add_zero_attn)
    S += added
    if not B * L * S:
        return Stock("empty", "no elements")
    if E // H > 256:
        return Stock("size", f"heads of size {E // H}; kernels take at most 256")
    p = float(dropout_p) if training else 0.0
    if need_weights:
        weights_dtype = torch.float32 if low is not None and device == "cuda" else dtype
        noise, grad_scale = None, 1.0
        if p > 0.0:
            found = _noise(p, B * H * L * S, weights_dtype, query.get_device())
            if isinstance(found, Stock):
                return found
            noise, grad_scale = found
        how = How(H, average_attn_weights, noise, grad_scale, precision, arch, weights_dtype)
    with torch.autocast(device, enabled=False) if low is not None else _nothing:
        sources, out_weight, out_bias = _projected(
            query, key, value, in_proj_weight, separate, in_proj_bias, out_proj_weight,
            out_proj_bias, low,
        )  # fmt: skip
        if is_causal and key_padding_mask is None and not need_weights:
            attn_mask = None
        else:
            is_causal = False
        if key_padding_mask is not None and query.dim() == 2:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        if added:
            sources = _with_more_keys(sources, E, bias_k, bias_v, add_zero_attn)
            attn_mask, key_padding_mask = (
                m if m is None else stock.pad(m, (0, added)) for m in (attn_mask, key_padding_mask)
            )
        mask = _mask(attn_mask, key_padding_mask, H)
        weights = None
        if need_weights:
            out, weights = run(WeightedAttention, mask, how, E, *sources)
        else:
            q, k, v = _separated(sources, E, H)
            if mask is not None and mask.dtype != torch.bool:
                mask = mask.to(q.dtype)
            out = scaled_dot_product_attention(q, k, v, mask, p, is_causal)
            out = out.permute(2, 0, 1, 3)
        out = stock.linear(out.reshape(L * B, E), out_weight, out_bias).view(L, B, -1)
    if query.dim() == 2:
        out = out.squeeze(1)
        weights = None if weights is None else weights.squeeze(0)
    return out, weights


class _Nothing:
    def __enter__(self):
        pass

    def __exit__(self, *exc):
        pass


_nothing = _Nothing()


def _noise(p, n, dtype, device):
    """(noise of attention, scale of its gradient): what PyTorch's dropout of n weights draws."""
    if n >= 2**31:
        return Stock("size", f"dropout of {n:,} weights; 32 bits cannot index so many")
    bound = kernels._philox.bound(1.0 - p)
    if p == 1:
        draw: Any = _rng.draw_nothing(n, device)
        return kernels.attention.WeightDropout(draw, bound, 0.0), 0.0
    draw = _rng.draw_native_of_new(n, dtype.itemsize, device)
    if isinstance(draw, str):
        return Stock("random", draw)
    scale, grad_scale = native_scales(p)
    return kernels.attention.WeightDropout(draw, bound, scale), grad_scale


def _projected(query, key, value, packed, separate, bias, out_weight, out_bias, low):
    """([(L, B, n * E) projections], parameters of out_proj), in dtype `low` if given."""
    E = query.shape[-1]
    k_is_v, q_is_k = key is value, query is key

    def cast(t):
        return t if t is None or low is None else t.to(low)

    packed, bias, out_weight, out_bias = map(cast, (packed, bias, out_weight, out_bias))
    if query.dim() == 2:
        query, key, value = (t.unsqueeze(1) for t in (query, key, value))
    query = cast(query)
    if separate is None and k_is_v and q_is_k:
        return [_project(query, packed, bias)], out_weight, out_bias
    key = cast(key)
    if separate is None and k_is_v:
        weights = packed.split([E, 2 * E])
        biases = (None, None) if bias is None else bias.split([E, 2 * E])
        inputs: tuple = query, key
    else:
        weights = packed.chunk(3) if separate is None else map(cast, separate)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        inputs = query, key, key if k_is_v else cast(value)
    sources = [_project(*each) for each in zip(inputs, weights, biases, strict=True)]
    return sources, out_weight, out_bias


def _parts(sources, E):
    """q, k and v as (L, B, E)."""
    parts: list[Tensor] = []
    for t in sources:
        parts += [t] if t.shape[-1] == E else run(Parts, t, E)
    return parts


def _separated(sources, E, H):
    """q, k and v as (B, H, L, D)."""
    return _heads(_parts(sources, E), E, H)


def _with_more_keys(sources, E, bias_k, bias_v, zero):
    """q, k and v; k and v have PyTorch's additional keys at the end."""
    q, k, v = _parts(sources, E)
    extra_k, extra_v = [k], [v]
    if bias_k is not None:
        extra_k.append(bias_k.expand(1, *k.shape[1:]))
        extra_v.append(bias_v.expand(1, *v.shape[1:]))
    if zero:
        extra_k.append(k.new_zeros((1, *k.shape[1:])))
        extra_v.append(v.new_zeros((1, *v.shape[1:])))
    return [q, torch.cat(extra_k), torch.cat(extra_v)]
