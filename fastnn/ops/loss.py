"""Losses that are computed element by element, and then reduced.

A `Loss` says which device functions compute a loss and its gradients, and which PyTorch formula
they stand for. Each op below says what its tensors and numbers are, and which calls it declines.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as stock
from torch import Tensor

from fastnn import kernels
from fastnn._front import warn
from fastnn._op import Function, Invalid, Stock, Work, is_dense, op, rounded, run, second_order
from fastnn.ops.nll_loss import resolve_reduction

aten = torch.ops.aten
INTEGERS = (torch.int64, torch.int32)


class Loss(NamedTuple):
    """A loss and its gradients, by their names in kernels/loss.py."""

    value: str
    stock: Callable[..., Tensor]
    """The losses of (a, b, c, p, q), not reduced. Differentiable as often as in PyTorch."""
    reads_a: bool = True
    """Whether the gradient of a reads a; else a is not kept for it."""
    keep: Literal["difference", "slope"] | None = None
    """What is kept in place of a and b, as stock does: a - b, of which the losses are a function
    (`stock`, with None for b), or their derivative by a. That by b is the negative."""
    like_a: bool = False
    """Whether PyTorch allocates the losses like a, and not like all tensors together. Its formula
    for tensors without memory then has other strides."""

    @property
    def gradient(self):
        return f"{self.value}_of_{self.keep}" if self.keep else f"{self.value}_grad"


def _difference(a, b):
    return a if b is None else a - b


def _gaussian(d, v):
    return 0.5 * (torch.log(v) + d**2 / v)


MSE = Loss("square", lambda a, b, c, p, q: aten.mse_loss(a, b, 0))
MSE_WEIGHTED = Loss(
    "square", lambda a, b, c, p, q: torch.square(_difference(a, b)), keep="difference"
)
L1 = Loss("absolute", lambda a, b, c, p, q: _difference(a, b).abs(), keep="difference")
SMOOTH_L1 = Loss("smooth_l1", lambda a, b, c, p, q: aten.smooth_l1_loss(a, b, 0, p))
HUBER = Loss("huber", lambda a, b, c, p, q: aten.huber_loss(a, b, 0, p))
BCE = Loss("bce", lambda a, b, c, p, q: aten.binary_cross_entropy(a, b, None, 0), like_a=True)
BCE_WITH_LOGITS = Loss(
    "bce_with_logits",
    lambda a, b, c, p, q: aten.binary_cross_entropy_with_logits(a, b, None, c, 0),
)
KL_DIV = Loss("kl_div", lambda a, b, c, p, q: torch.kl_div(a, b, 0), reads_a=False)
KL_DIV_LOG = Loss(
    "kl_div_log", lambda a, b, c, p, q: torch.kl_div(a, b, 0, log_target=True), reads_a=False
)
KL_DIV_LOG_OF_FROZEN = KL_DIV_LOG._replace(keep="slope")  # if the target requires no grad
POISSON = {
    (log_input, full): Loss(
        f"poisson{'_log' if log_input else ''}{'_full' if full else ''}",
        lambda a, b, c, p, q, log_input=log_input, full=full: torch.poisson_nll_loss(
            a, b, log_input, full, p, 0
        ),
    )
    for log_input in (False, True)
    for full in (False, True)
}
GAUSSIAN = Loss(
    "gaussian",
    lambda a, b, c, p, q: _gaussian(_difference(a, b), c + (c.clamp(p) - c).detach()) + q,
    keep="difference",
)
GAUSSIAN_SCALAR = Loss(
    "gaussian_scalar",
    lambda a, b, c, p, q: 0.5 * _difference(a, b) ** 2 / p + q,
    keep="difference",
)
HINGE_EMBEDDING = Loss(
    "hinge_embedding", lambda a, b, c, p, q: torch.hinge_embedding_loss(a, b, p, 0), keep="slope"
)
SOFT_MARGIN = Loss("soft_margin", lambda a, b, c, p, q: aten.soft_margin_loss(a, b, 0))
MARGIN_RANKING = Loss(
    "margin_ranking",
    lambda a, b, c, p, q: (-c * _difference(a, b) + p).clamp_min(0),
    keep="slope",
)
MARGIN_RANKING_TARGET = MARGIN_RANKING._replace(keep="difference")
MULTILABEL_SOFT_MARGIN = Loss(
    "multilabel_soft_margin",
    lambda a, b, c, p, q: -(b * stock.logsigmoid(a) + (1 - b) * stock.logsigmoid(-a)),
)


def _reduced(*args, **options):
    """The gate's policy for a loss that needs only one PyTorch kernel if it is not reduced."""
    if options.get("reduction") == "none" or any(type(v) is str and v == "none" for v in args):
        return Stock(
            "gate", "reduction='none': PyTorch already needs one kernel, so nothing can be saved"
        )
    return Work(args[0].numel())


class Elementwise(Function):
    """weight * loss(a, b, c; p, q) in `dtype`, reduced if `divisor` is not None.

    The divisor is a number, or with `by_weight` the sum of the weights. A difference that is kept
    is an output, so that a second derivative finds its way through it; else that output is None.
    """

    strided = ("dloss", "dkept")

    @staticmethod
    def forward(ctx, a, b, c, weight, loss, p, q, divisor, by_weight, dtype):
        inputs = (a, b, c, weight)
        result = _result(loss, inputs, p, q, divisor, dtype)
        keep = None
        if loss.keep and any(ctx.needs_input_grad):
            keep = "difference" if loss.keep == "difference" else f"{loss.value}_slope"
        result, count, kept = kernels.loss.fwd(
            inputs, loss.value, p, q, result, divisor, by_weight, keep, dtype
        )
        if loss.keep:
            ctx.save_for_backward(kept, None, None if loss.keep == "slope" else c, weight, count)
        else:
            keeps_a = loss.reads_a or a.shape != b.shape or any(ctx.needs_input_grad[1:3])
            ctx.save_for_backward(a if keeps_a else None, b, c, weight, count)
        kinds = [t if t is None else (t.shape, t.dtype) for t in (a, b, c)]
        ctx.rest = loss, p, q, divisor, dtype, kinds
        ctx.set_materialize_grads(False)
        return result, kept if loss.keep == "difference" else None

    @staticmethod
    def backward(ctx, dloss, dkept):
        *inputs, weight, count = ctx.saved_tensors
        loss, p, q, divisor, dtype, kinds = ctx.rest
        needs = ctx.needs_input_grad[:3]
        if loss.keep and (dloss is None or torch.is_grad_enabled()):
            da, dc = dkept, None
            if dloss is not None:
                through, dc = _through_kept(ctx, dloss, inputs[0], inputs[2], weight, count)
                da = through if da is None else through + da
            return da if needs[0] else None, -da if needs[1] else None, dc, *(None,) * 7
        if torch.is_grad_enabled():
            if inputs[0] is None:  # the derivatives do not depend on its values
                inputs[0] = torch.zeros(
                    kinds[0][0], dtype=kinds[0][1], device=dloss.device, requires_grad=True
                )

            def formula(*inputs):
                a, b, c, w = (t if t is None else t.to(dtype) for t in (*inputs, weight))
                losses = loss.stock(a, b, c, p, q)
                return _reduce(losses, w, divisor, count)

            grads = second_order(formula, tuple(inputs), dloss, needs)
        else:
            wanted = [kind if need else None for kind, need in zip(kinds, needs, strict=True)]
            grads = kernels.loss.bwd(
                dloss, (*inputs, weight), wanted, loss.gradient, p, q, divisor, count
            )
        return *grads, *(None,) * 7


def _reduce(losses, w, divisor, count):
    losses = losses if w is None else losses * w
    if divisor is None:
        return losses
    return losses.sum() / (divisor if count is None else w.sum())


def _through_kept(ctx, dloss, kept, c, weight, count):
    """The gradients of a, by way of what was kept, and of c, with graphs of their own."""
    loss, p, q, divisor, dtype, _ = ctx.rest
    differs = loss.keep == "difference"

    def formula(k, c):
        c, w = (t if t is None else t.to(dtype) for t in (c, weight))
        losses = loss.stock(k, None, c, p, q) if differs else k * kept
        return _reduce(losses, w, divisor, count)

    of = kept if differs else torch.zeros_like(kept, requires_grad=True)
    return second_order(formula, (of, c), dloss, (True, ctx.needs_input_grad[2]))


def _result(loss, inputs, p, q, divisor, dtype):
    """Uninitialised: 0-d, or losses with the layout of PyTorch's."""
    first = inputs[0]
    if divisor is not None:
        return first.new_empty((), dtype=dtype)
    present = [t for t in inputs if t is not None]
    if all(t.shape == first.shape and is_dense(t) for t in present):
        return first.new_empty(first.shape, dtype=dtype)
    if loss.like_a:
        return torch.empty_like(first, dtype=dtype)
    layouts = tuple([t if t is None else (t.shape, t.stride()) for t in inputs])
    shape, strides = _layout(loss, layouts, p, q)
    return torch.empty_strided(shape, strides, dtype=dtype, device=first.device)


@functools.lru_cache(maxsize=4096)
def _layout(loss, layouts, p, q):
    """(shape, strides) of PyTorch's losses, found without allocating them.

    The first call for a layout takes hundreds of us.
    """
    *metas, w = (
        layout if layout is None else torch.empty_strided(*layout, device="meta")
        for layout in layouts
    )
    with torch.no_grad():
        losses = loss.stock(*metas, p, q)
        losses = losses if w is None else losses * w
    return losses.shape, losses.stride()


def common_dtype(*tensors):
    """The dtype in which PyTorch's chain of operators computes, or why we cannot follow it."""
    floating = [t for t in tensors if t is not None and t.is_floating_point()]
    dtype = floating[0].dtype
    for t in floating[1:]:
        if t.dtype != dtype:
            if not all(t.dim() for t in floating):
                return Stock("dtype", "mixed dtypes, and a tensor without dimensions")
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def refuse(tensors, reduction, optional=()):
    """Why no loss of these tensors can be computed, else None. The first tensor is the input."""
    given = [*tensors, *(t for t in optional if t is not None)]
    for t in given:
        if not isinstance(t, Tensor):
            return Invalid("option", f"an argument is not a tensor: {type(t).__name__}")
    if not tensors[0].is_floating_point():
        return Stock("dtype", f"an input in {tensors[0].dtype}")
    if reduction not in ("none", "mean", "sum"):
        return Invalid("option", f"reduction={reduction!r}")
    return None


def broadcast(*tensors):
    """The broadcast shape, or None if the tensors do not broadcast."""
    shapes = [t.shape for t in tensors if t is not None]
    if all(s == shapes[0] for s in shapes):
        return shapes[0]
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        return None


def own(x, *others):
    """x, or where x wants no gradient and others do, a copy of it.

    For a gradient that reads x where stock's reads what was made of x, so that users may edit x.
    """
    if not torch.is_grad_enabled() or x.requires_grad or not any(t.requires_grad for t in others):
        return x
    return x.clone()


def number(value):
    return isinstance(value, (int, float)) and abs(value) < 3e38


def _loss(loss, a, b, c, w, p, q, shape, reduction, dtype, by_weight=False):
    divisor = {"none": None, "sum": 1, "mean": shape.numel()}[reduction]
    by_weight = by_weight and w is not None and reduction == "mean"
    numbers = float(p), float(q)
    return run(Elementwise, a, b, c, w, loss, *numbers, divisor, by_weight, dtype)[0]


def _regression(loss, input, target, weight, p, legacy, reduction, out_dtype, by_weight=True):
    """The losses that warn about broadcasting, because they broadcast before they compute."""
    why = refuse((input, target), reduction, (weight,))
    if why is not None:
        return why
    shape = broadcast(input, target)
    if shape is None:
        return Invalid("shape", "an input and a target that do not broadcast")
    if not number(p):
        return Invalid("option", f"a threshold of {p!r}")
    if weight is not None:
        if weight.shape != input.shape:
            return Invalid("shape", "a weight without the input's shape")
        if target.shape != input.shape:
            return Stock("shape", "a weight together with broadcasting")
        if weight.requires_grad and torch.is_grad_enabled():
            return Stock("autograd", "a weight that requires grad")
        if out_dtype is not None and by_weight:
            return Stock(
                "autocast", "a weight under autocast"
            )  # PyTorch's chain leaves float32 there
    dtype = out_dtype or common_dtype(input, target, weight)
    if isinstance(dtype, Stock):
        return dtype
    threshold = rounded(p, dtype)
    if threshold is None:
        return Stock("dtype", f"a threshold of {p!r} in {dtype}")
    if target.shape != input.shape:
        _warn_of_broadcasting(input, target)
    size_average, reduce = legacy
    reduction = resolve_reduction(size_average, reduce, reduction)
    inputs = input, target, None, weight
    return _loss(loss, *inputs, threshold, 0.0, shape, reduction, dtype, by_weight)


def _warn_of_broadcasting(input, target):
    warn(
        f"Using a target size ({target.size()}) that is different to the input size "
        f"({input.size()}). This will likely lead to incorrect results due to broadcasting. "
        "Please ensure they have the same size."
    )


@op(
    stock=stock.mse_loss,
    strided=("input", "target", "weight"),
    policy=_reduced,
    integers=INTEGERS,
    autocast="fp32",
    autocast_cpu="fp32",
)
def mse_loss(
    input, target, size_average=None, reduce=None, reduction="mean", weight=None, *, out_dtype=None
):  # fmt: skip
    """Fused with its reduction, with weights and broadcasting."""
    legacy = size_average, reduce
    loss = MSE if weight is None else MSE_WEIGHTED
    return _regression(loss, input, target, weight, 0.0, legacy, reduction, out_dtype)


@op(
    stock=stock.l1_loss,
    strided=("input", "target", "weight"),
    integers=INTEGERS,
    autocast="fp32",
    autocast_cpu="fp32",
)
def l1_loss(
    input, target, size_average=None, reduce=None, reduction="mean", weight=None, *, out_dtype=None
):  # fmt: skip
    """Fused with its reduction, with weights and broadcasting."""
    legacy = size_average, reduce
    return _regression(L1, input, target, weight, 0.0, legacy, reduction, out_dtype)


@op(stock=stock.smooth_l1_loss, strided=("input", "target"),
    policy=_reduced, integers=INTEGERS, autocast="fp32",
    autocast_cpu="fp32", source="arXiv:1504.08083")  # fmt: skip
def smooth_l1_loss(
    input, target, size_average=None, reduce=None, reduction="mean", beta=1.0, *, out_dtype=None
):  # fmt: skip
    """Fused with its reduction and with broadcasting."""
    if not isinstance(beta, (int, float)) or not beta >= 0:
        return Invalid("option", f"beta={beta!r}")
    legacy = size_average, reduce
    loss = SMOOTH_L1 if beta else L1
    return _regression(loss, input, target, None, beta, legacy, reduction, out_dtype)


@op(stock=stock.huber_loss, strided=("input", "target", "weight"),
    policy=_reduced, integers=INTEGERS, autocast="fp32", autocast_cpu="fp32",
    source="doi:10.1214/aoms/1177703732")  # fmt: skip
def huber_loss(input, target, reduction="mean", delta=1.0, weight=None, *, out_dtype=None):
    """Fused with its reduction, with weights and broadcasting."""
    if not isinstance(delta, (int, float)) or not delta > 0:
        return Invalid("option", f"delta={delta!r}")
    if isinstance(target, Tensor) and target.dtype != input.dtype and out_dtype is None:
        return Stock("dtype", f"a target in {target.dtype}")  # PyTorch's backward fails with it
    legacy = None, None
    return _regression(HUBER, input, target, weight, delta, legacy, reduction, out_dtype, False)


def _refuse_binary(input, target, weights, reduction, out_dtype):
    """Why neither of the two binary cross entropies can be computed; None if they can."""
    why = refuse((input, target), reduction, weights)
    if why is not None:
        return why
    if target.shape != input.shape:
        return Invalid("shape", "a target without the input's shape")
    if target.dtype != input.dtype and (out_dtype is None or not target.is_floating_point()):
        return Invalid("dtype", f"a target in {target.dtype}")
    for w in weights:
        if w is not None:
            if not w.is_floating_point():
                return Stock("dtype", f"a weight in {w.dtype}")
            if broadcast(input, w) != input.shape:
                return Invalid("shape", "a weight that does not broadcast to the input's shape")
            if w.requires_grad and torch.is_grad_enabled():
                return Invalid("autograd", "a weight that requires grad")
    return None


@op(
    stock=stock.binary_cross_entropy,
    strided=("input", "target", "weight"),
    policy=_reduced,
    integers=INTEGERS,
    autocast_cpu="fp32",
)
def binary_cross_entropy(
    input, target, weight=None, size_average=None, reduce=None, reduction="mean", *, out_dtype=None
):  # fmt: skip
    """Fused with its reduction and a weight that broadcasts.

    An input or target outside [0, 1] makes the loss nan. PyTorch fails an assertion, after which
    the process cannot use CUDA any more, or raises RuntimeError on a CPU. With TRITON_DEBUG=1 the
    kernel asserts as well.
    """
    why = _refuse_binary(input, target, (weight,), reduction, out_dtype)
    if why is not None:
        return why
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        return Invalid("autocast", "binary_cross_entropy under autocast")
    reduction = resolve_reduction(size_average, reduce, reduction)
    dtype = out_dtype or input.dtype
    return _loss(BCE, input, target, None, weight, 0.0, 0.0, input.shape, reduction, dtype)


@op(
    stock=stock.binary_cross_entropy_with_logits,
    strided=("input", "target", "weight", "pos_weight"),
    integers=INTEGERS,
    autocast="fp32",
    autocast_cpu="fp32",
)
def binary_cross_entropy_with_logits(
    input, target, weight=None, size_average=None, reduce=None, reduction="mean", pos_weight=None,
    *, out_dtype=None,
):  # fmt: skip
    """Fused with its reduction, and with weights that broadcast."""
    if isinstance(target, Tensor) and target.dtype != input.dtype and out_dtype is None:
        if target.is_floating_point():
            return Stock("dtype", f"a target in {target.dtype}")
    why = _refuse_binary(input, target, (weight, pos_weight), reduction, out_dtype)
    if why is not None:
        return why
    reduction = resolve_reduction(size_average, reduce, reduction)
    dtype = out_dtype or input.dtype
    loss = BCE_WITH_LOGITS
    return _loss(loss, input, target, pos_weight, weight, 0.0, 0.0, input.shape, reduction, dtype)


@op(
    stock=stock.kl_div,
    strided=("input", "target"),
    integers=INTEGERS,
    autocast="fp32",
    autocast_cpu="fp32",
)
def kl_div(
    input, target, size_average=None, reduce=None, reduction="mean", log_target=False, *,
    out_dtype=None,
):  # fmt: skip
    """Fused with every reduction, for probabilities and log-probabilities as targets."""
    batchmean = reduction == "batchmean"
    why = refuse((input, target), "sum" if batchmean else reduction)
    if why is not None:
        return why
    if not target.is_floating_point():
        return Invalid("dtype", f"a target in {target.dtype}")
    shape = broadcast(input, target)
    if shape is None:
        return Invalid("shape", "an input and a target that do not broadcast")
    dtype = out_dtype or common_dtype(input, target)
    if isinstance(dtype, Stock):
        return dtype
    if size_average is not None or reduce is not None:
        if batchmean:
            return Stock("option", "reduction='batchmean' with deprecated arguments")
        reduction = resolve_reduction(size_average, reduce, reduction)
    elif reduction == "mean":
        _warn_of_mean()
    loss = KL_DIV
    if log_target:  # ATen keeps neither tensor, but what it makes of them
        loss = KL_DIV_LOG_OF_FROZEN
        if target.requires_grad and torch.is_grad_enabled():
            loss, input, target = KL_DIV_LOG, input.clone(), target.clone()
    divisor = None
    if reduction != "none":
        divisor = shape.numel() if reduction == "mean" else 1
        if batchmean and input.dim():
            divisor = input.shape[0]
    numbers = 0.0, 0.0
    return run(Elementwise, input, target, None, None, loss, *numbers, divisor, False, dtype)[0]


def _warn_of_mean():
    warn(
        "reduction: 'mean' divides the total loss by both the batch size and the support size."
        "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
        "'mean' will be changed to behave the same as 'batchmean' in the next major release."
    )


@op(
    stock=stock.poisson_nll_loss,
    strided=("input", "target"),
    integers=INTEGERS,
    autocast="fp32",
    autocast_cpu="fp32",
)
def poisson_nll_loss(
    input, target, log_input=True, full=False, size_average=None, eps=1e-8, reduce=None,
    reduction="mean", *, out_dtype=None,
):  # fmt: skip
    """Fused with its reduction, with broadcasting, and with Stirling's term.

    Keeps the input for the backward, where stock keeps its exponential, or the input plus eps: an
    input edited before the backward raises autograd's error here alone.
    """
    if not number(eps):
        return Invalid("option", f"eps={eps!r}")
    loss = POISSON[bool(log_input), bool(full)]
    legacy = size_average, reduce
    return _chain(loss, (input, target, None), None, eps, 0.0, legacy, reduction, out_dtype)


def multilabel(input, target, weight, divisor, dtype):
    """multilabel_soft_margin_loss, summed over all elements of all rows and divided."""
    inputs = input, target, None, weight
    return run(Elementwise, *inputs, MULTILABEL_SOFT_MARGIN, 0.0, 0.0, divisor, False, dtype)[0]


def _chain(loss, inputs, weight, p, q, legacy, reduction, out_dtype):
    """The losses that are a chain of operators in PyTorch: they broadcast and promote dtypes."""
    why = refuse(inputs[:2], reduction, (*inputs[2:], weight))
    if why is not None:
        return why
    shape = broadcast(*inputs)
    if shape is None:
        return Invalid("shape", "tensors that do not broadcast")
    dtype = out_dtype or common_dtype(*inputs, weight)
    if isinstance(dtype, Stock):
        return dtype
    size_average, reduce = legacy
    reduction = resolve_reduction(size_average, reduce, reduction)
    a, b, c = inputs
    return _loss(loss, a, b, c, weight, p, q, shape, reduction, dtype)


_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@op(stock=stock.gaussian_nll_loss, strided=("input", "target", "var"),
    integers=INTEGERS, autocast="fp32",
    source="doi:10.1109/ICNN.1994.374138")  # fmt: skip
def gaussian_nll_loss(
    input, target, var, full=False, eps=1e-6, reduction="mean", *, out_dtype=None
):
    """Fused with its reduction, for a variance that is a tensor or a float.

    A negative variance in a tensor makes the loss nan. PyTorch raises ValueError. For that, the
    host would have to wait for the device.
    """
    if not number(eps):
        return Invalid("option", f"eps={eps!r}")
    constant = _HALF_LOG_2PI if full else 0.0
    if isinstance(var, float):
        if not 0 <= var < 3e38:
            return Invalid("option", f"var={var}")
        kept = rounded(var, input.dtype)  # PyTorch puts it in a tensor like the input
        if kept is None:
            return Stock("dtype", f"var={var} in {input.dtype}")
        var = max(kept, eps)
        if var <= 0:
            return Stock("option", f"var={var}")
        constant += 0.5 * math.log(var)
        inputs, loss, p = (input, target, None), GAUSSIAN_SCALAR, var
    else:
        why = refuse((input, target, var), reduction)
        if why is not None:
            return why
        if not var.is_floating_point():
            return Stock("dtype", f"a variance in {var.dtype}")
        if var.shape != input.shape:
            if var.shape == input.shape[:-1]:
                var = var.unsqueeze(-1)
            elif var.dim() != input.dim() or (
                sum(v for x, v in zip(input.shape, var.shape, strict=True) if x != v) != 1
            ):
                return Invalid("shape", "a variance of incorrect size")
        if torch.is_grad_enabled():
            var = var.clone()  # as stock, which clamps it: an edit of the tensor given is harmless
        inputs, loss, p = (input, target, var), GAUSSIAN, eps
    return _chain(loss, inputs, None, p, constant, (None, None), reduction, out_dtype)


@op(
    stock=stock.hinge_embedding_loss,
    strided=("input", "target"),
    integers=INTEGERS,
    autocast="fp32",
    autocast_cpu="fp32",
)
def hinge_embedding_loss(
    input, target, margin=1.0, size_average=None, reduce=None, reduction="mean", *, out_dtype=None
):  # fmt: skip
    """Fused with its reduction and with broadcasting."""
    if not number(margin):
        return Invalid("option", f"margin={margin!r}")
    why = refuse((input, target), reduction)
    if why is not None:
        return why
    target = target.detach()  # it is only compared, so it has no gradient
    legacy = size_average, reduce
    out_dtype = out_dtype or input.dtype
    inputs = input, target, None
    filled = rounded(margin, out_dtype)
    if filled is None:
        return Invalid("dtype", f"margin={margin!r} in {out_dtype}")
    return _chain(HINGE_EMBEDDING, inputs, None, filled, 0.0, legacy, reduction, out_dtype)


@op(
    stock=stock.soft_margin_loss,
    strided=("input", "target"),
    integers=INTEGERS,
    autocast="fp32",
    autocast_cpu="fp32",
)
def soft_margin_loss(
    input, target, size_average=None, reduce=None, reduction="mean", *, out_dtype=None
):
    """Fused with its reduction and with a target that broadcasts."""
    why = refuse((input, target), reduction)
    if why is not None:
        return why
    if target.requires_grad and torch.is_grad_enabled():
        return Invalid("autograd", "a target that requires grad")
    if broadcast(input, target) != input.shape:
        return Invalid("shape", "a target that does not broadcast to the input's shape")
    legacy = size_average, reduce
    out_dtype = out_dtype or input.dtype
    inputs = input, target, None
    return _chain(SOFT_MARGIN, inputs, None, 0.0, 0.0, legacy, reduction, out_dtype)


@op(
    stock=stock.margin_ranking_loss,
    strided=("input1", "input2", "target"),
    integers=INTEGERS,
    autocast="fp32",
    autocast_cpu="fp32",
)
def margin_ranking_loss(
    input1, input2, target, margin=0, size_average=None, reduce=None, reduction="mean", *,
    out_dtype=None,
):  # fmt: skip
    """Fused with its reduction and with broadcasting."""
    if not number(margin):
        return Invalid("option", f"margin={margin!r}")
    why = refuse((input1, input2, target), reduction)
    if why is not None:
        return why
    if not input2.is_floating_point():
        return Stock("dtype", f"an input in {input2.dtype}")
    if not input1.dim() == input2.dim() == target.dim():
        return Invalid("shape", "tensors of different dimensions")
    loss = MARGIN_RANKING
    if target.requires_grad and torch.is_grad_enabled():
        loss, target = MARGIN_RANKING_TARGET, target.clone()  # as stock, which negates it
    inputs = input1, input2, target
    legacy = size_average, reduce
    return _chain(loss, inputs, None, margin, 0.0, legacy, reduction, out_dtype)
