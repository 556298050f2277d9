"""Layer scale, stochastic depth, gates of channels: the product with a scale that is broadcast."""

import torch

from fastnn import kernels
from fastnn._op import Function, Stock, op, run
from fastnn.kernels._tl import empty_as


def _scaled(input, scale, residual=None):
    product = input * scale
    return product if residual is None else residual + product


class Scale(Function):
    """x, a scale, a residual or None -> residual + x * scale. It keeps x only for the scale."""

    strided = ("dy",)

    @staticmethod
    def forward(ctx, x, scale, residual, sizes):
        needs = ctx.needs_input_grad
        y = kernels.scale.fwd(x, scale.view(-1), residual, sizes)
        ctx.save_for_backward(x if needs[1] else None, scale if needs[0] else None)
        ctx.rest = sizes, (y.shape, y.stride()), scale.shape, scale.dtype, scale.device
        return y

    @staticmethod
    def backward(ctx, dy):
        needs = ctx.needs_input_grad
        dr = dy if needs[2] else None
        if not (needs[0] or needs[1]):  # nothing was kept, so that a second backward runs, too
            return None, None, dr, None
        x, scale = ctx.saved_tensors
        sizes, like, shape, dtype, device = ctx.rest
        if torch.is_grad_enabled():
            dx = dy * scale if needs[0] else None
            ds = (dy * x).sum_to_size(shape) if needs[1] else None
            return dx, ds, dr, None
        w = torch.empty(shape, dtype=dtype, device=device) if scale is None else scale
        dx, ds = kernels.scale.bwd(dy, x, w.view(-1), like, sizes, needs[0], needs[1])
        return dx, None if ds is None else ds.view(shape), dr, None


@op(stock=_scaled, strided=("input", "residual"), source="arXiv:2103.17239")
def scale_add(input, scale, residual=None):
    """`input * scale`, or `residual + input * scale`; one pass for both gradients.

    input, and residual if given: of one shape, dtype and layout. scale: of the same dtype, with
    fewer elements, broadcast against input; the dimensions that it has must lie beside each other
    in memory. So layer scale (a scale per channel), stochastic depth (one per sample), and gates of
    channels (one per channel and sample) run in one kernel per direction; the gradient of the scale
    takes one small kernel more. The sum is rounded once; PyTorch also rounds the product.
    """
    if not all(isinstance(t, torch.Tensor) for t in (input, scale)):
        return Stock("option", "one of the factors is a number")
    if residual is not None and not isinstance(residual, torch.Tensor):
        return Stock("option", "the residual is a number")
    others = [t for t in (scale, residual) if t is not None]
    if any(t.dtype != input.dtype for t in others):
        return Stock("dtype", f"{', '.join(str(t.dtype) for t in (input, *others))}")
    sizes = zip(scale.shape[::-1], input.shape[::-1], strict=False)
    if scale.dim() > input.dim() or any(s not in (1, x) for s, x in sizes):
        return Stock("shape", f"{tuple(input.shape)} times {tuple(scale.shape)}")
    if scale.numel() == input.numel():
        return Stock("shape", "the scale is not broadcast")
    if not input.numel():
        return Stock("empty", "no elements")
    y = empty_as(input, device="meta")
    if residual is not None:
        if residual.shape != input.shape:
            return Stock("shape", f"a residual {tuple(residual.shape)}")
        if empty_as(residual, device="meta").stride() != y.stride():
            return Stock("layout", f"strides {input.stride()} and {residual.stride()}")
    sizes = kernels.scale.sizes_of(y, scale)
    if sizes is None:
        apart = "in which dimensions of the scale lie apart"
        return Stock("layout", f"strides {y.stride()}, {apart}")
    if sizes[1] >= 2**31 or sizes[2] >= 2**31:  # kernels count them in 32 bits
        many = f"{sizes[1]:,} scales of {sizes[2]:,} elements"
        return Stock("size", f"{many}; kernels take less than 2^31")
    return run(Scale, input, scale, residual, sizes)
