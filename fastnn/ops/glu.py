"""Gated units: GLU, and the product of an activation with a tensor."""

import torch
import torch.nn.functional as stock

from fastnn import kernels
from fastnn._op import Function, Invalid, Stock, op, run, second_order
from fastnn._shards import Split, beside
from fastnn.ops.activation import refuse_numbers
from fastnn.ops.channel_norm import checked_activation
from fastnn.ops.linear import ACTIVATIONS, stock_activation
from fastnn.ops.residual_norm import WithBias, too_many_rows


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


class BiasedActGLU(Function):
    """x, which contains the bias c -> as `ActGLU`, of halves of the last dimension, and x.

    x is an output, so that a second derivative with respect to c can pass through x.
    """

    strided = ("dx",)

    @staticmethod
    def forward(ctx, x, c, activation, a, b, first):
        kept = x.view_as(x)
        ctx.save_for_backward(kept)
        ctx.rest = activation, a, b, first, c.dtype
        ctx.set_materialize_grads(False)
        value = ACTIVATIONS[activation].value
        return kernels.glu.act_glu_fwd(x, x.dim() - 1, value, first, a, b), kept

    @staticmethod
    def backward(ctx, dy, dx):
        (x,) = ctx.saved_tensors
        activation, a, b, first, dtype = ctx.rest
        of_x, of_c = ctx.needs_input_grad[:2]
        formula = ACTIVATIONS[activation]
        how = formula.value, formula.gradient, formula.keeps == "y", first, a, b
        if dx is None and not torch.is_grad_enabled():
            dx, dc = kernels.glu.act_glu_bwd_sums(dy, x, *how)
            dc = dc.to(dtype)
        else:
            if dy is not None and not torch.is_grad_enabled():
                dx = dx + kernels.glu.act_glu_bwd(dy, x, x.dim() - 1, *how)
            elif dy is not None:
                (of_y,) = second_order(
                    lambda x: _act_of_half(x, -1, activation, a, b, first), (x,), dy, (True,)
                )
                dx = of_y if dx is None else dx + of_y
            dc = dx.reshape(-1, dx.shape[-1]).sum(0, dtype=dtype) if of_c else None
        return dx if of_x else None, dc if of_c else None, None, None, None, None


def _act_of_half(
    input, dim=-1, activation="silu", a=0.0, b=0.0, first=False, input_bias=None
):  # fmt: skip
    act = checked_activation("act_glu", activation, a, b)
    if input_bias is not None:
        input = WithBias.apply(input, input_bias)
    one, other = input.chunk(2, dim)
    return act(one) * other if first else one * act(other)


def _beside_without_bias(input, dim=-1, input_bias=None, **others):
    return beside(input, dim) if input_bias is None else []


@op(stock=_act_of_half, strided=("input",), split=_beside_without_bias, source="arXiv:2002.05202")
def act_glu(input, dim=-1, activation="silu", a=0.0, b=0.0, first=False, input_bias=None):
    """`act_mul` of the halves of `input` along `dim`, one pass per direction: SwiGLU, GEGLU, ReGLU.

    The activation is of the second half, as in GLU, or of the first half if `first`. Both halves
    are read in place, for every dimension and layout, and their gradients are written in place.
    `input_bias` (N,) is a bias that `input` contains, added without a gradient; the halves are then
    those of the last dimension. Its values are not read. Its gradient is that of `input`, summed
    over the rows, in the same pass. Raises ValueError for any other activation than those of
    `linear_act`.
    """
    if activation not in ACTIVATIONS:
        return Invalid("option", f"activation={activation!r}")
    why = refuse_numbers(a, b, activation=activation)
    if why is not None:
        return why
    rank = input.dim()
    if type(dim) is not int or not -rank <= dim < rank or input.shape[dim] % 2:
        return Invalid("shape", f"dim={dim!r} of {tuple(input.shape)}")
    if input_bias is not None:
        if dim % rank != rank - 1 or input_bias.shape != input.shape[-1:]:
            shapes = f"{tuple(input_bias.shape)} for {tuple(input.shape)}"
            return Stock("shape", f"input_bias {shapes}, halves of dimension {dim}")
        if not input.numel():
            return Stock("empty", "no elements")
        if not input.is_contiguous():
            return Stock("layout", f"strides {input.stride()} and input_bias")
        if why := too_many_rows(input):
            return why
        return run(BiasedActGLU, input, input_bias, activation, float(a), float(b), bool(first))[0]
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
