"""Pointwise activations."""

import torch
import torch.nn.functional as stock

from fastnn import kernels
from fastnn._op import Invalid, Stock, op, run, second_order


class Pointwise(torch.autograd.Function):
    """y = formula(x; a, b), elementwise; `reference` is stock's function of x alone."""

    @staticmethod
    def forward(ctx, x, formula, reference, a, b, keeps, inplace, out_dtype):
        if inplace:
            ctx.mark_dirty(x)
            torch.autograd.graph.increment_version(x)
        y = kernels.pointwise.fwd(x, formula, a, b, out_dtype, inplace)
        ctx.save_for_backward(x if keeps == "x" else y)
        ctx.rest = formula, reference, a, b, keeps, x.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        (saved,) = ctx.saved_tensors
        formula, reference, a, b, keeps, dtype = ctx.rest
        if torch.is_grad_enabled():
            if keeps == "x":
                (dx,) = second_order(reference, (saved,), dy, (True,))
            else:
                dx = reference(dy, saved)
        else:
            dx = kernels.pointwise.bwd(dy, saved, formula, a, b, dtype)
        return dx, None, None, None, None, None, None, None


def _pointwise(x, formula, reference, a=0.0, b=0.0, keeps="x", inplace=False, out_dtype=None):
    if not x.is_floating_point():
        return Stock(f"{x.dtype}")
    if inplace:
        if x.requires_grad and x.is_leaf and torch.is_grad_enabled():
            return Invalid("a leaf that requires grad, in place")
        if keeps == "x":
            return Stock("inplace=True")
    return run(Pointwise, x, formula, reference, a, b, keeps, inplace, out_dtype)


def _relu_grad(dy, y):
    return torch.ops.aten.threshold_backward(dy, y, 0)


@op(stock=stock.relu)
def relu(input, inplace=False):
    """Fused for every dense or strided floating tensor, in place too."""
    return _pointwise(input, "relu", _relu_grad, keeps="y", inplace=inplace)


@op(stock=stock.gelu, source="arXiv:1606.08415")
def gelu(input, *, approximate="none"):
    """Fused for both the erf and the tanh formula."""
    if approximate not in ("none", "tanh"):
        return Invalid(f"approximate={approximate!r}")
    formula = "gelu" if approximate == "none" else "gelu_tanh"
    return _pointwise(input, formula, lambda x: stock.gelu(x, approximate=approximate))
