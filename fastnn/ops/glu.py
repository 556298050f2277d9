"""Gated units: GLU, and the product of an activation with a tensor."""

import torch
import torch.nn.functional as stock

from fastnn import kernels
from fastnn._op import Function, Invalid, Stock, op, run, second_order
from fastnn._shards import Split, beside
from fastnn.ops.activation import refuse_numbers
from fastnn.ops.channel_norm import checked_activation
from fastnn.ops.linear import ACTIVATIONS, stock_activation


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


def _beside(input, dim=-1, **others):
    return beside(input, dim)


@op(stock=stock.glu, strided=("input",), split=_beside, source="arXiv:1612.08083")
def glu(input, dim=-1):
    """Fused for every dimension and layout."""
    rank = input.dim()
    if type(dim) is not int or not -rank <= dim < rank or input.shape[dim] % 2:
        return Invalid("option", f"dim={dim!r} of {tuple(input.shape)}")
    return run(GLU, input, dim % rank)


class ActMul(Function):
    """x, z -> act(x) * z.

    It keeps x, and z if x wants a gradient. PyTorch keeps act(x) as well, or in place of x.
    """

    strided = ("dy",)

    @staticmethod
    def forward(ctx, x, z, activation, a, b):
        # If only z wants a gradient, PyTorch keeps act(x), and x may be edited afterwards.
        of_x, of_z = ctx.needs_input_grad[:2]
        kept = x if of_x or not of_z else x.clone()
        ctx.save_for_backward(kept, z if of_x else None)
        ctx.rest = activation, a, b
        return kernels.glu.act_mul_fwd(x, z, ACTIVATIONS[activation].value, a, b)

    @staticmethod
    def backward(ctx, dy):
        x, z = ctx.saved_tensors
        activation, a, b = ctx.rest
        if z is None:  # only the gradient of x depends on its values
            z = x.detach().requires_grad_()
        if torch.is_grad_enabled():
            act = stock_activation(activation)
            needs = ctx.needs_input_grad[:2]
            grads = second_order(lambda x, z: act(x, a, b) * z, (x, z), dy, needs)
        else:
            formula = ACTIVATIONS[activation]
            grads = kernels.glu.act_mul_bwd(
                dy, x, z, formula.value, formula.gradient, formula.keeps == "y", a, b
            )
        return *grads, None, None, None


class ActGLU(Function):
    """x, of even size along dim -> act(one half) * the other half. It keeps x."""

    strided = ("dy",)

    @staticmethod
    def forward(ctx, x, dim, activation, a, b, first):
        ctx.save_for_backward(x)
        ctx.rest = dim, activation, a, b, first
        return kernels.glu.act_glu_fwd(x, dim, ACTIVATIONS[activation].value, first, a, b)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dim, activation, a, b, first = ctx.rest
        if torch.is_grad_enabled():
            (dx,) = second_order(
                lambda x: _act_of_half(x, dim, activation, a, b, first), (x,), dy, (True,)
            )
        else:
            formula = ACTIVATIONS[activation]
            dx = kernels.glu.act_glu_bwd(
                dy, x, dim, formula.value, formula.gradient, formula.keeps == "y", first, a, b
            )
        return dx, None, None, None, None, None


def _act_of_half(input, dim=-1, activation="silu", a=0.0, b=0.0, first=False):
    act = checked_activation("act_glu", activation, a, b)
    one, other = input.chunk(2, dim)
    return act(one) * other if first else one * act(other)


@op(stock=_act_of_half, strided=("input",), split=_beside, source="arXiv:2002.05202")
def act_glu(input, dim=-1, activation="silu", a=0.0, b=0.0, first=False):
    """`act_mul` of the halves of `input` along `dim`, one pass per direction: SwiGLU, GEGLU, ReGLU.

    The activation is of the second half, as in GLU, or of the first half if `first`. Both halves
    are read in place, for every dimension and layout, and their gradients are written in place.
    Raises ValueError for any other activation than those of `linear_act`.
    """
    if activation not in ACTIVATIONS:
        return Invalid("option", f"activation={activation!r}")
    why = refuse_numbers(a, b, activation=activation)
    if why is not None:
        return why
    rank = input.dim()
    if type(dim) is not int or not -rank <= dim < rank or input.shape[dim] % 2:
        return Invalid("shape", f"dim={dim!r} of {tuple(input.shape)}")
    return run(ActGLU, input, dim % rank, activation, float(a), float(b), bool(first))


def _act_then_mul(input, other, activation="silu", a=0.0, b=0.0):
    return checked_activation("act_mul", activation, a, b)(input) * other


def _elements(input, other, **others):
    return [Split({"input": d, "other": d}, d) for d in range(input.dim())]


@op(
    stock=_act_then_mul,
    strided=("input", "other"),
    split=_elements,
    source="arXiv:2002.05202",
)
def act_mul(input, other, activation="silu", a=0.0, b=0.0):
    """`activation(input, a, b) * other`, one pass per direction: SwiGLU, GEGLU, ReGLU.

    It takes two tensors of one shape and dtype, contiguous or both channels-last. The activations,
    and a and b, are those of `linear_act`. Keeps input for the backward, where stock keeps the
    activation of it, and for some activations no input: an input edited before the backward then
    raises autograd's error here alone. Raises ValueError for any other activation.
    """
    if activation not in ACTIVATIONS:
        return Invalid("option", f"activation={activation!r}")
    why = refuse_numbers(a, b, activation=activation)
    if why is not None:
        return why
    if not isinstance(other, torch.Tensor) or not isinstance(input, torch.Tensor):
        return Stock("option", "one of the factors is a number")
    if input.shape != other.shape or input.dtype != other.dtype:
        return Stock(
            "dtype", f"{tuple(input.shape)} of {input.dtype}, {tuple(other.shape)} of {other.dtype}"
        )
    last = torch.channels_last if input.dim() == 4 else torch.contiguous_format
    if not any(
        input.is_contiguous(memory_format=f) and other.is_contiguous(memory_format=f)
        for f in (torch.contiguous_format, last)
    ):
        return Stock("layout", f"strides {input.stride()} and {other.stride()}")
    return run(ActMul, input, other, activation, float(a), float(b))
