"""PReLU."""

import torch
import torch.nn.functional as stock

from fastnn import kernels
from fastnn._op import Function, Invalid, Stock, op, run, second_order


class PReLU(Function):
    """x, w (1) or (x.shape[1]) -> y. Differentiable in both."""

    strided = ("dy",)

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return kernels.prelu.fwd(x, w)

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        if torch.is_grad_enabled():
            return second_order(stock.prelu, (x, w), dy, ctx.needs_input_grad)
        return kernels.prelu.bwd(dy, x, w, *ctx.needs_input_grad)


@op(
    stock=stock.prelu,
    strided=("input",),
    autocast="lower",
    autocast_cpu="lower",
    source="arXiv:1502.01852",
)
def prelu(input, weight):
    """Fused; one backward pass computes the input's gradient and sums that of the weight."""
    if weight.dtype != input.dtype or weight.dim() > 1:
        return Invalid("dtype", f"a weight of {weight.dtype} and {weight.dim()} dimensions")
    channels = input.shape[1] if input.dim() > 1 else 1
    if weight.numel() not in (1, channels):
        return Invalid("shape", f"{weight.numel()} weights for {channels} channels")
    if channels >= 2**31 or input.shape[2:].numel() >= 2**31:  # kernels count them in 32 bits
        many = f"{channels:,} channels of {input.shape[2:].numel():,} elements"
        return Stock("size", f"{many}; kernels take less than 2^31 of each")
    return run(PReLU, input, weight)
