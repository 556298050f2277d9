"""Scaled dot product attention."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as stock
from torch import Tensor

from fastnn import _rng, kernels
from fastnn._op import Function, Invalid, Stock, Work, op, run, second_order
from fastnn._shards import Split
from fastnn.kernels import _gpus
from fastnn.ops.dropout import native_scales
from fastnn.ops.linear import matmul_precision, tf32_setting

# The backends that PyTorch may choose, values of `torch.nn.attention.SDPBackend`.
_MATH, _EFFICIENT, _ERROR = 0, 2, -1


class How(NamedTuple):
    """How a call is computed; everything that its tensors do not say."""

    lead: tuple[int, ...]
    """The dims of the result before the last two. The last dim in `lead` is the heads."""
    scale: float
    causal: bool
    gqa: bool
    p: float
    noise: Any  # kernels.attention.WeightDropout, whose state is None
    grad_scale: float
    backend: int
    precision: str
    arch: str

    @property
    def batch(self) -> tuple[int, ...]:
        return self.lead[:-1]

    @property
    def heads(self) -> int:
        return self.lead[-1] if self.lead else 1


def _four(x: Tensor, plan: How, heads: int) -> Tensor:
    """x (..., N, D), broadcast to the batch -> (B, heads, N, D); a view if possible."""
    N, D = x.shape[-2:]
    batch = plan.batch
    if x.dim() == 4 and len(batch) == 1 and x.shape[0] == batch[0] and x.shape[1] == heads:
        return x
    return x.expand(*batch, heads, N, D).reshape(math.prod(batch), heads, N, D)


def _heads_of_keys(k: Tensor, v: Tensor, plan: How) -> int:
    """The number of heads of k and v. One head that broadcasts is a group and is not expanded."""
    if plan.gqa or (k.shape[-3:-2] in ((), (1,)) and v.shape[-3:-2] in ((), (1,))):
        return k.shape[-3] if k.dim() > 2 else 1
    return plan.heads


def _four_of_mask(mask: Tensor, batch: tuple[int, ...]) -> Tensor | None:
    """mask (..., L, S) -> 4-D, with size 1 where it broadcasts; None if that is impossible."""
    shape = (1,) * max(0, 3 - mask.dim()) + mask.shape
    lead = shape[:-3]
    if math.prod(lead) == 1:
        return mask.view(1, *shape[-3:])
    if lead == batch:
        return mask if len(lead) == 1 else mask.reshape(math.prod(lead), *shape[-3:])
    return None


def _output(q: Tensor, L: int, E: int, plan: How) -> Tensor:
    """Uninitialised, with the layout of the backend that PyTorch would choose."""
    shape = (*plan.lead, L, E)
    if plan.backend == _EFFICIENT:
        H = shape[1]
        return q.new_empty_strided(shape, (H * L * E, E, H * E, 1))
    if plan.backend != _MATH and shape == q.shape:
        out = torch.empty_like(q)
        if E == 1 or out.stride(-1) == 1:
            return out
    return q.new_empty(shape)


class Attention(Function):
    """q (..., L, D), k (..., S, D), v (..., S, E), mask (..., L, S) or None -> out (..., L, E)."""

    strided = ("dout",)

    @staticmethod
    def forward(ctx, q, k, v, mask, plan):
        heads = _heads_of_keys(k, v, plan)
        out = _output(q, q.shape[-2], v.shape[-1], plan)
        noise, state = plan.noise, None
        if noise is not None:
            state = noise.draw.new_state(q)
            noise = noise._replace(state=state)
        fours = _four(q, plan, plan.heads), _four(k, plan, heads), _four(v, plan, heads)
        _, stats = kernels.attention.fwd(
            *fours, None if mask is None else _four_of_mask(mask, plan.batch), scale=plan.scale,
            causal=plan.causal, noise=noise, out=_four(out, plan, plan.heads),
            precision=plan.precision, arch=plan.arch,
        )  # fmt: skip
        # If `out` is not kept, the user may edit it in place, as in PyTorch if its backend does not
        # keep it.
        keeps_out = not kernels.attention.fits(*fours, mask, plan.causal, noise, plan.arch)
        ctx.save_for_backward(q, k, v, mask, out if keeps_out else None, stats, state)
        if noise is not None:
            plan = plan._replace(noise=plan.noise._replace(draw=noise.draw.kept()))
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, mask, out, stats, state = ctx.saved_tensors
        plan = ctx.plan
        needs = ctx.needs_input_grad
        noise = plan.noise
        if noise is not None:
            noise = noise._replace(draw=noise.draw.from_state(state), scale=plan.grad_scale)
        if torch.is_grad_enabled():  # create_graph=True: a kernel's gradient would carry no graph

            def formula(q, k, v, mask):
                return _math(q, k, v, mask, plan, noise)

            return *second_order(formula, (q, k, v, mask), dout, needs[:4]), None
        heads = _heads_of_keys(k, v, plan)
        fours = _four(q, plan, plan.heads), _four(k, plan, heads), _four(v, plan, heads)
        # The gradients of inputs that a batch shares are summed in fp32.
        grads = [
            x4.new_empty(x4.shape, dtype=torch.float32)
            if need and x4.numel() != x.numel()
            else None
            for x, x4, need in zip((q, k, v), fours, needs, strict=False)
        ]
        mask4 = dmask = dmask4 = None
        if mask is not None:
            mask4 = _four_of_mask(mask, plan.batch)
            if needs[3]:
                dmask = torch.empty_like(mask, memory_format=torch.contiguous_format)
                dmask4 = _four_of_mask(dmask, plan.batch)
        grads = kernels.attention.bwd(
            _four(dout, plan, plan.heads), *fours, mask4,
            None if out is None else _four(out, plan, plan.heads), stats, scale=plan.scale,
            causal=plan.causal, noise=noise, dq=grads[0], dk=grads[1], dv=grads[2], dmask=dmask4,
            want=needs[:3], precision=plan.precision, arch=plan.arch,
        )  # fmt: skip
        return *(
            None if dx is None else _sum_to(dx, x, plan)
            for dx, x in zip(grads, (q, k, v), strict=True)
        ), dmask, None  # fmt: skip


def _sum_to(dx: Tensor, x: Tensor, plan: How) -> Tensor:
    """dx (B, heads, N, D) -> the gradient of x, with the shape and dtype of x."""
    if dx.shape == x.shape:
        return dx
    if dx.numel() == x.numel():
        return dx.view(x.shape)
    return dx.view(*plan.batch, *dx.shape[1:]).sum_to_size(x.shape).to(x.dtype)


def _math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, plan: How, noise) -> Tensor:
    """PyTorch's formula, with the noise of this call."""
    dtype = q.dtype
    q, k, v = q.float(), k.float(), v.float()
    if plan.gqa:
        k = k.repeat_interleave(plan.heads // k.shape[-3], -3)
        v = v.repeat_interleave(plan.heads // v.shape[-3], -3)
    t = (q * plan.scale) @ k.transpose(-2, -1)
    if plan.causal:
        t = t.masked_fill(torch.ones_like(t, dtype=torch.bool).triu(1), -math.inf)
    if mask is not None and mask.dtype == torch.bool:
        t = t.masked_fill(~mask, -math.inf)
    elif mask is not None:
        t = t + mask
    p = torch.ops.aten._safe_softmax(t, -1)
    if noise is not None:
        p = p * (kernels.attention.keep(p, noise) * noise.scale)
    return (p @ v).to(dtype)


def _shapes(q, k, v, mask, gqa: bool) -> tuple[int, ...] | Stock:
    """The dims of the result before the last two, or what is wrong with the shapes."""
    shapes = f"shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
    if min(q.dim(), k.dim(), v.dim()) < (3 if gqa else 2):
        return Invalid("shape", shapes)
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        return Invalid("shape", shapes)
    lead: tuple[int, ...]
    try:
        if gqa:
            H = q.shape[-3]
            if not H:
                return Stock("empty", "no heads of queries")
            if not k.shape[-3] or not v.shape[-3] or H % k.shape[-3] or H % v.shape[-3]:
                return Invalid("shape", shapes)
            if k.shape[-3] != v.shape[-3]:
                return Stock("shape", f"{k.shape[-3]} heads of keys, {v.shape[-3]} of values")
            lead = (*torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3]), H)
        else:
            lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
        if mask is not None:
            # PyTorch adds the mask in place to products whose shape depends only on q and k.
            scores = lead if gqa else torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
            scores = (*scores, q.shape[-2], k.shape[-2])
            if mask.dim() > len(scores) or torch.broadcast_shapes(scores, mask.shape) != scores:
                return Invalid("shape", f"mask {tuple(mask.shape)} for {scores}")
    except RuntimeError:
        return Invalid("shape", shapes)
    return lead


def _noise(q: Tensor, S: int, p: float) -> tuple[Any, float] | str:
    """(a `WeightDropout`, the scale of the gradient), or why nothing can be drawn."""
    bound = kernels._philox.bound(1.0 - p)
    if p == 1:  # nothing is drawn
        return kernels.attention.WeightDropout(
            _rng.draw_nothing(1, q.get_device()), bound, 0.0
        ), 0.0
    draw = _rng.draw_own(kernels.attention.increment(S), q.get_device())
    if isinstance(draw, str):
        return draw
    scale, grad_scale = native_scales(p)
    return kernels.attention.WeightDropout(draw, bound, scale), grad_scale


BESIDE_FUSED = "beside a fused kernel of PyTorch"


def _weights(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None,
    enable_gqa=False,
) -> Work | Stock:  # fmt: skip
    """The gate's policy: the size is the number of attention weights.

    PyTorch's math formula writes these weights to memory. Its fused kernels do not, so the variant
    says whether PyTorch has a fused kernel for this call.
    """
    cuda = torch.backends.cuda
    if not (cuda.flash_sdp_enabled() and cuda.mem_efficient_sdp_enabled()):
        return Stock("option", "the user chose among PyTorch's backends (sdpa_kernel)")
    weights = query.shape[:-1].numel() * key.shape[-2]
    backend = torch._fused_sdp_choice(
        query, key, value, attn_mask, dropout_p, bool(is_causal), scale=scale,
        enable_gqa=bool(enable_gqa),
    )  # fmt: skip
    if backend not in (_MATH, _ERROR):
        return Work(weights, "attention weights", BESIDE_FUSED)
    precision = matmul_precision(query.get_device())
    if query.dtype == torch.float32 and precision == "ieee" and query.is_cuda:
        return Stock("gate", "float32 products without TF32: cuBLAS is faster than a kernel")
    return Work(weights, "attention weights")


# `torch.backends.cuda` calls them, at three times the cost.
_may_flash, _may_efficient, _may_math, _may_cudnn, _is_deterministic = (
    torch._C._get_flash_sdp_enabled, torch._C._get_mem_efficient_sdp_enabled,
    torch._C._get_math_sdp_enabled, torch._C._get_cudnn_sdp_enabled,
    torch._C._get_deterministic_algorithms,
)  # fmt: skip
_order: Any = getattr(torch._C, "_get_sdp_priority_order", tuple)


def _settings():
    allowed = _may_flash(), _may_efficient(), _may_math(), _may_cudnn()
    return allowed, tuple(_order()), _is_deterministic(), tf32_setting()


_settings.questions = (  # type: ignore[attr-defined]
    _may_flash, _may_efficient, _may_math, _may_cudnn, _order, _is_deterministic,
    *tf32_setting.questions,
)  # fmt: skip


def _splits(query, key, value, attn_mask=None, dropout_p=0.0, **others):
    """By batches and heads. A mask is whole, and the same for all of them."""
    q, k, v, m = query, key, value, attn_mask
    if dropout_p or q.dim() != k.dim() or q.dim() != v.dim():
        return []
    same = [d for d in range(q.dim() - 2) if q.shape[d] == k.shape[d] == v.shape[d]]
    if m is not None:
        first = q.dim() - m.dim()  # of the mask's dimensions
        same = [d for d in same if d < first or m.shape[d - first] == 1]
    return [Split({"query": d, "key": d, "value": d}, d) for d in same]


@op(
    stock=stock.scaled_dot_product_attention,
    split=_splits,
    strided=("query", "key", "value", "attn_mask"),
    integers=(torch.bool,),
    autocast="lower",
    autocast_cpu="lower",
    policy=_weights,
    at_most="query.numel() // (_its_shape := key.shape)[-1] * _its_shape[-2]",
    settings=_settings,
    variants=("", BESIDE_FUSED),
    source="arXiv:2307.08691 (FlashAttention-2)",
)
def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None,
    enable_gqa=False,
):  # fmt: skip
    """Fused, with any mask read as it is, broadcast batches and grouped heads, both ways.

    Keeps query, key, value and mask for the backward, as the fused kernels of stock do; where stock
    would take its formula, an edit of one of them before the backward raises here alone.
    """
    q, k, v, mask = query, key, value, attn_mask
    if q.dtype != k.dtype or q.dtype != v.dtype or q.dtype == torch.bool:
        return Invalid("dtype", f"dtypes {q.dtype}, {k.dtype}, {v.dtype}")
    if mask is not None and mask.dtype not in (torch.bool, torch.float32, q.dtype):
        return Invalid("dtype", f"mask of {mask.dtype} for {q.dtype}")
    if type(dropout_p) not in (float, int) or not isinstance(scale, (float, int, type(None))):
        return Stock("option", f"dropout_p={dropout_p!r}, scale={scale!r}")
    if not 0 <= dropout_p <= 1:
        return Invalid("option", f"dropout_p={dropout_p}")
    gqa, causal = bool(enable_gqa), bool(is_causal)
    lead = _shapes(q, k, v, mask, gqa)
    if isinstance(lead, Stock):
        return lead
    if not (q.numel() and k.numel() and v.numel()):
        return Stock("empty", "no elements")  # PyTorch fills the result, and keeps nothing
    D, (S, E) = q.shape[-1], v.shape[-2:]
    if not 0 < D <= 256 or not 0 < E <= 256:
        return Stock("size", f"heads of size {max(D, E)}; kernels take at most 256")
    if mask is not None:
        if _four_of_mask(mask, lead[:-1]) is None:
            return Stock(
                "shape", f"mask {tuple(mask.shape)}, constant in some of the dims of the batch"
            )
        if mask.requires_grad and S > 1 and mask.shape[-1:] in ((), (1,)):
            return Stock("autograd", "the gradient of a mask that is one column")
    # The backend also determines the layout of the result.
    backend = torch._fused_sdp_choice(q, k, v, mask, dropout_p, causal, scale=scale, enable_gqa=gqa)
    if backend == _ERROR or (backend == _MATH and causal and mask is not None):
        return Invalid("option", "no backend of PyTorch takes this call")
    if backend != _MATH and mask is not None and mask.dim() < 2:
        return Invalid("shape", f"mask {tuple(mask.shape)}, of fewer than two dims")
    precision = matmul_precision(q.get_device())
    arch = _gpus.architecture(q.get_device())
    noise, grad_scale = None, 1.0
    if dropout_p > 0:
        drawn = _noise(q, S, dropout_p)
        if isinstance(drawn, str):
            return Stock("random", drawn)
        noise, grad_scale = drawn
    plan = How(
        lead, 1 / math.sqrt(D) if scale is None else float(scale), causal, gqa,
        float(dropout_p), noise, grad_scale, backend, precision, arch,
    )  # fmt: skip
    return run(Attention, q, k, v, mask, plan)
