"""Rows divided by their lengths."""

import torch
import torch.nn.functional as stock

from fastnn import kernels
from fastnn._op import Function, Invalid, Stock, op, run, second_order
from fastnn.kernels._tl import empty_as
from fastnn.ops.distance import classes_back, classes_second, in_rows
from fastnn.ops.loss import number
from fastnn.ops.nll_loss import too_long


class Normalize(Function):
    """x -> x / max(length, eps) along `dim`, in `dtype`. p: the norm. Saves x, as PyTorch does."""

    strided = ("dy",)

    @staticmethod
    def forward(ctx, x, p, dim, eps, dtype):
        y = empty_as(x, dtype=dtype)
        length = kernels.normalize.fwd(classes_second(x, dim), classes_second(y, dim), eps, p)
        ctx.save_for_backward(x, length)
        ctx.rest = p, dim, eps, dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        x, length = ctx.saved_tensors
        p, dim, eps, dtype = ctx.rest
        if torch.is_grad_enabled():

            def formula(x):
                return stock.normalize(x.to(dtype), p, dim, eps)

            (dx,) = second_order(formula, (x,), dy, ctx.needs_input_grad[:1])
        else:
            given = classes_second(dy, dim), classes_second(x, dim)
            dx = classes_back(kernels.normalize.bwd(*given, length, eps, p), dim)
        return dx, None, None, None, None


def _along(input, p=2.0, dim=1, *rest, **options):
    return in_rows(input, dim=dim)


@op(
    stock=stock.normalize,
    strided=("input",),
    policy=_along,
    autocast="fp32",
)
def normalize(input, p=2.0, dim=1, eps=1e-12, out=None, *, out_dtype=None):
    """Fused over one dimension, for p of 1 and 2: one kernel per direction. PyTorch has 3 and 10.

    In 16 bits PyTorch rounds the lengths, and eps: in float16 the default eps is 0, so a row of
    zeros is nan. Here it is zeros, as in float32.
    """
    if out is not None:
        return Stock("option", "out=")
    if isinstance(dim, (tuple, list)):
        return Stock("option", f"dim={dim!r}; kernels take one dimension")
    if isinstance(dim, bool) or not isinstance(dim, int) or not number(eps):
        return Invalid("option", f"dim={dim!r}, eps={eps!r}")
    if not input.dim():
        return Stock("shape", "a tensor without dimensions")
    if not -input.dim() <= dim < input.dim():
        return Invalid("option", f"dim={dim} of {tuple(input.shape)}")
    if not input.numel():
        return Stock("empty", "no elements")
    if why := too_long(input.shape[dim]):
        return why
    if isinstance(p, bool) or p not in (1, 2):
        return Stock("option", f"p={p!r}; kernels take 1 and 2")
    dtype = out_dtype or input.dtype
    return run(Normalize, input, int(p), dim % input.dim(), float(eps), dtype)
