"""Query, key and value of one product."""

import torch

from fastnn import kernels
from fastnn._op import Function, Invalid, Stock, Work, is_dense, op, run
from fastnn.ops.residual_norm import WithBias, too_many_rows


def _views(x, parts, heads):
    if heads is None:
        return tuple(x.chunk(parts, -1))
    return x.unflatten(-1, (parts, heads, -1)).unbind(-3)


class SplitFeatures(Function):
    """x, which contains the bias c or None -> views of its parts."""

    strided = ("gradients",)

    @staticmethod
    def forward(ctx, x, c, parts, heads):
        ctx.rest = heads, None if c is None else c.dtype
        ctx.set_materialize_grads(False)
        return _views(x, parts, heads)

    @staticmethod
    def backward(ctx, *gradients):
        heads, c_dtype = ctx.rest
        of_x, of_c = ctx.needs_input_grad[:2]
        known = next((g for g in gradients if g is not None), None)
        if known is None:
            return None, None, None, None
        gradients = tuple(torch.zeros_like(known) if g is None else g for g in gradients)
        if torch.is_grad_enabled():
            dx = torch.cat([g.flatten(-2) for g in gradients] if heads else gradients, -1)
            dc = dx.reshape(-1, dx.shape[-1]).sum(0, dtype=c_dtype) if of_c else None
        else:
            dx, dc = kernels.split.join(gradients, heads is not None, of_x, of_c)
            dc = dc if dc is None else dc.to(c_dtype)
        return dx if of_x else None, dc, None, None


def _composed(input, input_bias=None, parts=3, heads=None):
    if input_bias is not None:
        input = WithBias.apply(input, input_bias)
    return _views(input, parts, heads)


def _elements(input, input_bias=None, parts=3, heads=None):
    """The gate's policy."""
    if input_bias is None or not (torch.is_grad_enabled() and input_bias.requires_grad):
        return Stock("gate", "without the gradient of a bias, PyTorch needs one kernel, too")
    return Work(input.numel())


@op(stock=_composed, policy=_elements, strided=("input",))
def split_features(input, input_bias=None, parts=3, heads=None):
    """`input.chunk(parts, -1)`, or `input.unflatten(-1, (parts, heads, -1)).unbind(-3)`.

    input: (..., parts * N), contiguous. The results are views, as in PyTorch: the query, key and
    value of one product. `input_bias` (parts * N,) is a bias that `input` contains, added without a
    gradient. The backward puts the two or three gradients together, which it reads through any
    strides, and sums them for the bias in the same pass.
    """
    if type(parts) is not int or not 2 <= parts <= kernels.split.MOST:
        return Stock("option", f"parts={parts!r}; kernels take 2 and {kernels.split.MOST}")
    if heads is not None and (type(heads) is not int or heads < 1):
        return Invalid("option", f"heads={heads!r}")
    if input.dim() == 0 or input.shape[-1] % (parts * (heads or 1)):
        return Stock("shape", f"{tuple(input.shape)} in {parts} parts, {heads} heads")
    if not input.numel():
        return Stock("empty", "no elements")
    if input.is_inference():
        return Stock("mode", "autograd does not follow views of an inference tensor")
    if not is_dense(input):  # the results are views of it
        return Stock("layout", f"strides {input.stride()}")
    if input_bias is not None and input_bias.shape != input.shape[-1:]:
        return Stock("shape", f"input_bias {tuple(input_bias.shape)} for {tuple(input.shape)}")
    if why := too_many_rows(input):
        return why
    return run(SplitFeatures, input, input_bias, parts, heads)
