"""Negative log likelihood; and the options that cross entropy shares with it."""

import torch
import torch.nn.functional as stock
from torch import Tensor
from torch.nn._reduction import legacy_get_string

from fastnn import kernels
from fastnn._op import Function, Invalid, Stock, Work, impossible, op, run, second_order

INDICES = (torch.int64, torch.uint8)
MOST_CLASSES = 2**30  # kernels count classes in 32 bits, also those of a block past the end


def too_long(count, what="elements"):
    """The refusal of rows of so many elements or classes, if a kernel cannot count them."""
    if count < MOST_CLASSES:
        return None
    return Stock("size", f"rows of {count:,} {what}; kernels take less than 2^30")


def refuse_options(input, weight, ignore_index, reduction, out_dtype):
    """Why the options that both losses share cannot be taken; None if they can."""
    if not isinstance(input, Tensor) or not input.is_floating_point() or input.dim() == 0:
        return Invalid("dtype", "an input without classes, or not floating")
    C = input.shape[min(input.dim() - 1, 1)]
    if C == 0:
        return Stock("empty", "no classes")
    if why := too_long(C, "classes"):
        return why
    if weight is not None:
        if not isinstance(weight, Tensor) or weight.shape != (C,):
            return Invalid("shape", "a weight that is not one value per class")
        if not weight.is_floating_point():
            return Invalid("dtype", f"a weight in {weight.dtype}")
        if weight.requires_grad and torch.is_grad_enabled():
            return Stock("autograd", "a weight that requires grad")
    if type(ignore_index) is not int:
        return Invalid("option", f"ignore_index={ignore_index!r}")
    if reduction not in ("none", "mean", "sum"):
        return Stock("option", f"reduction={reduction!r}")
    return None


def refuse_indices(input, target, weight, out_dtype):
    """Why `target` cannot be taken as class indices; None if it can."""
    if not isinstance(target, Tensor) or target.dtype not in INDICES:
        return Invalid("dtype", "a target that is neither int64 nor uint8")
    shape = (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()
    if target.shape != shape:
        if not shape and target.shape == (1,):
            return Stock("shape", "a 1-d target of a 1-d input")
        return Invalid("shape", f"a target of shape {tuple(target.shape)}, not {tuple(shape)}")
    if target.dtype is torch.uint8 and input.dim() > 2:
        return Invalid("shape", "a uint8 target of more than one dimension")
    if out_dtype is None and weight is not None and weight.dtype != input.dtype:
        return Invalid("dtype", f"a weight in {weight.dtype}")
    return None


def resolve_reduction(size_average, reduce, reduction):
    """`reduction`, or the meaning of the deprecated arguments, with PyTorch's warning."""
    if size_average is None and reduce is None:
        return reduction
    impossible("it warns")
    return legacy_get_string(size_average, reduce)


class NLLLoss(Function):
    """-weight[target] * input[target], reduced. Differentiable in input, as often as in PyTorch."""

    @staticmethod
    def forward(ctx, x, target, weight, ignore_index, reduction, dtype):
        loss, count = kernels.nll_loss.fwd(x, target, weight, ignore_index, reduction, dtype)
        ctx.save_for_backward(x, target, weight, count)
        ctx.options = {"ignore_index": ignore_index, "reduction": reduction}
        return loss

    @staticmethod
    def backward(ctx, dloss):
        x, target, weight, count = ctx.saved_tensors
        if torch.is_grad_enabled():

            def formula(x):
                w = None if weight is None else weight.to(dloss.dtype)
                return stock.nll_loss(x.to(dloss.dtype), target, w, **ctx.options)

            (dx,) = second_order(formula, (x,), dloss, (True,))
        else:
            dx = kernels.nll_loss.bwd(dloss, x, target, weight, count, **ctx.options)
        return dx, None, None, None, None, None


def _positions(input, target, *rest, **options):
    """The gate's policy: the loss reads one logit for each target."""
    return Work(target.numel(), "targets")


@op(
    stock=stock.nll_loss,
    strided=("input", "target"),
    integers=INDICES,
    autocast="fp32",
    autocast_cpu="fp32",
    policy=_positions,
    at_most="target.numel()",
    alerts=lambda input, *rest: input.dim() > 2,
)
def nll_loss(
    input, target, weight=None, size_average=None, ignore_index=-100, reduce=None,
    reduction="mean", *, out_dtype=None,
):  # fmt: skip
    """Fused for every shape, weight, ignore_index and reduction; always deterministic.

    A target outside [0, C) that is not `ignore_index` makes the loss and its gradients nan. Nothing
    outside the input is read. PyTorch fails an assertion, after which the process cannot use CUDA
    any more, or raises IndexError on a CPU. With TRITON_DEBUG=1 the kernels assert as well.
    """
    why = refuse_options(input, weight, ignore_index, reduction, out_dtype)
    why = why or refuse_indices(input, target, weight, out_dtype)
    if why is not None:
        return why
    reduction = resolve_reduction(size_average, reduce, reduction)
    return run(NLLLoss, input, target, weight, ignore_index, reduction, out_dtype or input.dtype)
