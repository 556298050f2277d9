"""GLU."""

import torch
import torch.nn.functional as stock

from fastnn import kernels
from fastnn._op import Function, Invalid, op, run, second_order


class GLU(Function):
    """x, of even size along dim -> a * sigmoid(b), where a and b are its halves."""

    strided = ("dy",)

    @staticmethod
    def forward(ctx, x, dim):
        ctx.save_for_backward(x)
        ctx.dim = dim
        return kernels.glu.fwd(x, dim)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *second_order(lambda x: stock.glu(x, ctx.dim), (x,), dy, (True,)), None
        return kernels.glu.bwd(dy, x, ctx.dim), None


@op(stock=stock.glu, strided=("input",), source="arXiv:1612.08083")
def glu(input, dim=-1):
    """Fused for every dimension and layout."""
    rank = input.dim()
    if type(dim) is not int or not -rank <= dim < rank or input.shape[dim] % 2:
        return Invalid(f"dim={dim!r} of {tuple(input.shape)}")
    return run(GLU, input, dim % rank)
