"""Rotary embedding of queries and keys."""

import torch

from fastnn import kernels
from fastnn._op import Function, Stock, op, run
from fastnn.kernels._tl import empty_as


def _turned(input, cos, sin):
    first, second = input.chunk(2, -1)
    return input * cos + torch.cat((-second, first), -1) * sin


class Rotary(Function):
    """x, cos, sin -> x turned by the angles. The gradient is turned back."""

    strided = ("dy",)

    @staticmethod
    def forward(ctx, x, cos, sin):
        y = empty_as(x)
        kernels.rotary.turn(x, cos, sin, y)
        ctx.save_for_backward(cos, sin)
        ctx.like = y.shape, y.stride()
        return y

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        if torch.is_grad_enabled():
            first, second = (dy * sin).chunk(2, -1)
            return dy * cos + torch.cat((second, -first), -1), None, None
        dx = torch.empty_strided(*ctx.like, dtype=dy.dtype, device=dy.device)
        kernels.rotary.turn(_with_rows(dy), cos, sin, dx, back=True)
        return dx, None, None


def _with_rows(t):
    """`t` with unit stride in the last dimension."""
    return t if t.stride(-1) == 1 else t.contiguous()


@op(
    stock=_turned,
    strided=("input", "cos", "sin"),
    source="arXiv:2104.09864, section 3.4",
)
def rotary(input, cos, sin):
    """`input * cos + cat((-second, first), -1) * sin`; first and second are the halves of input.

    This is the rotary embedding of queries and keys: one pass in each direction. input (..., D): D
    is even, and there are at most four dimensions. cos and sin: of the same dtype, broadcast
    against input, with D columns, and without a gradient. The result is rounded once; PyTorch also
    rounds the products.
    """
    tensors = input, cos, sin
    if not all(isinstance(t, torch.Tensor) for t in tensors):
        return Stock("option", "an argument is no tensor")
    if any(t.dtype != input.dtype for t in tensors):
        return Stock("dtype", ", ".join(str(t.dtype) for t in tensors))
    if not 1 <= input.dim() <= 4 or input.shape[-1] % 2:
        return Stock("shape", f"{tuple(input.shape)}: not one to four dimensions, or an odd size")
    for t in (cos, sin):
        fits = zip(t.shape[::-1], input.shape[::-1], strict=False)
        if t.dim() > input.dim() or not t.dim() or any(s not in (1, n) for s, n in fits):
            return Stock("shape", f"{tuple(t.shape)} for {tuple(input.shape)}")
        if t.shape[-1] != input.shape[-1]:
            return Stock("shape", f"{tuple(t.shape)} for {tuple(input.shape)}")
    if not input.numel():
        return Stock("empty", "no elements")
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return Stock("autograd", "cos or sin requires a gradient")
    if input.shape[-1] > 2 * kernels.rotary.LONGEST:
        most = 2 * kernels.rotary.LONGEST
        return Stock("size", f"rows of {input.shape[-1]:,} elements; kernels take up to {most:,}")
    if input.numel() >= 2**31:  # kernels count rows in 32 bits
        return Stock("size", f"{input.numel():,} elements; kernels take less than 2^31")
    if empty_as(input, device="meta").stride(-1) != 1:
        return Stock("layout", f"strides {input.stride()}: the columns lie apart")
    return run(Rotary, *map(_with_rows, tensors))
