"""Pointwise activations of one tensor.

A `Formula` says which device functions compute an activation and its gradient, and which tensor is
kept for the gradient. It is the tensor that PyTorch keeps. So an in-place edit after the call
raises an error exactly where it does in PyTorch.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as stock
from torch import Tensor
from torch._C._autograd import CreationMeta, _get_creation_meta  # type: ignore[attr-defined]

from fastnn import kernels
from fastnn._op import Function, Invalid, Stock, op, rounded, run, second_order
from fastnn._shards import elements

aten = torch.ops.aten
_FLOAT_MAX = torch.finfo(torch.float32).max


class Formula(NamedTuple):
    """An activation and its gradient, by their names in kernels/pointwise.py."""

    value: str
    gradient: str
    keeps: Literal["x", "y"]
    stock: Callable[..., Any]
    """If x is kept: PyTorch's y from (x, a, b). If y is kept: PyTorch's dx from (dy, y, a, b).
    Differentiable."""


def _of_x(value: str, reference: Callable) -> Formula:
    return Formula(value, f"{value}_grad", "x", reference)


RELU = Formula("relu", "relu_grad", "y", lambda dy, y, a, b: aten.threshold_backward(dy, y, 0))
SIGMOID = Formula("sigmoid", "sigmoid_grad", "y", lambda dy, y, a, b: aten.sigmoid_backward(dy, y))
TANH = Formula("tanh", "tanh_grad", "y", lambda dy, y, a, b: aten.tanh_backward(dy, y))
THRESHOLD = _of_x("threshold", lambda x, a, b: stock.threshold(x, a, b))
LEAKY_RELU = _of_x("leaky_relu", lambda x, a, b: stock.leaky_relu(x, a))
ELU = _of_x("elu", lambda x, a, b: aten.elu(x, a, 1, b))
SELU = _of_x("selu", lambda x, a, b: stock.selu(x))
HARDTANH = _of_x("hardtanh", lambda x, a, b: stock.hardtanh(x, a, b))
HARDSIGMOID = _of_x("hardsigmoid", lambda x, a, b: stock.hardsigmoid(x))
HARDSWISH = _of_x("hardswish", lambda x, a, b: stock.hardswish(x))
HARDSHRINK = _of_x("hardshrink", lambda x, a, b: stock.hardshrink(x, a))
SOFTSHRINK = _of_x("softshrink", lambda x, a, b: stock.softshrink(x, a))
GELU = _of_x("gelu", lambda x, a, b: stock.gelu(x))
GELU_TANH = _of_x("gelu_tanh", lambda x, a, b: stock.gelu(x, approximate="tanh"))
SILU = _of_x("silu", lambda x, a, b: stock.silu(x))
MISH = _of_x("mish", lambda x, a, b: stock.mish(x))
SOFTSIGN = _of_x("softsign", lambda x, a, b: stock.softsign(x))
SOFTPLUS = _of_x("softplus", lambda x, a, b: stock.softplus(x, a, b))
LOGSIGMOID = _of_x("logsigmoid", lambda x, a, b: stock.logsigmoid(x))

# In place, PyTorch keeps the output if the function can be inverted, else a copy of the input.
_SELU = 1.6732632423543772, 1.0507009873554805
IN_PLACE = {
    LEAKY_RELU: Formula(
        "leaky_relu",
        "leaky_relu_grad",
        "y",
        lambda dy, y, a, b: aten.leaky_relu_backward(dy, y, a, True),
    ),
    ELU: Formula(
        "elu", "elu_grad_of_y", "y", lambda dy, y, a, b: aten.elu_backward(dy, a, 1, b, True, y)
    ),
    SELU: Formula(
        "selu",
        "selu_grad_of_y",
        "y",
        lambda dy, y, a, b: aten.elu_backward(dy, *_SELU, 1, True, y),
    ),
}


class Pointwise(Function):
    """y = formula(x; a, b). If `inplace`, y is written to x, and computed from `copy` if given."""

    strided = ("dy",)

    @staticmethod
    def forward(ctx, x, copy, formula, a, b, inplace, out_dtype):
        source = x if copy is None else copy
        if inplace:
            y = kernels.pointwise.fwd_into(x, source, formula.value, a, b)
            ctx.mark_dirty(x)
        else:
            y = kernels.pointwise.fwd(x, formula.value, a, b, out_dtype)
        ctx.save_for_backward(source if formula.keeps == "x" else y)
        ctx.rest = formula, a, b, x.dtype, out_dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        (saved,) = ctx.saved_tensors
        formula, a, b, dtype, out_dtype = ctx.rest
        if not torch.is_grad_enabled():
            dx = kernels.pointwise.bwd(dy, saved, formula.gradient, a, b, dtype)
        elif formula.keeps == "y":
            dx = formula.stock(dy, saved, a, b)
        else:
            (dx,) = second_order(
                lambda x: formula.stock(x.to(out_dtype or dtype), a, b), (saved,), dy, (True,)
            )
        return dx, None, None, None, None, None, None


_X = ("input",)


def refuse_numbers(*numbers, activation: str = "") -> Stock | None:
    """Why no kernel takes these parameters of an activation."""
    if (
        activation == "hardtanh"
        and isinstance(numbers[0], (int, float))
        and numbers[0] > numbers[1]
    ):
        return Invalid("option", f"limits {numbers}")
    for number in numbers:
        if isinstance(number, Tensor):
            return Stock("option", "a parameter is a tensor")
        if not isinstance(number, (int, float)) or _FLOAT_MAX < abs(number) < math.inf:
            return Invalid("dtype", f"a parameter is not a float32 number: {number!r}")
    return None


def _pointwise(x, formula, a=0.0, b=0.0, inplace=False, out_dtype=None):
    why = refuse_numbers(a, b)
    if why is not None:
        return why
    copy = None
    if inplace:
        not_writable = _not_writable(x)
        if not_writable is not None:
            return Invalid("autograd", not_writable)
        formula = IN_PLACE.get(formula, formula)
        if formula.keeps == "x" and x.requires_grad and torch.is_grad_enabled():
            copy = x.clone()  # recorded by autograd, so that second derivatives pass through it
    return run(Pointwise, x, copy, formula, float(a), float(b), bool(inplace), out_dtype)


def _not_writable(x) -> str | None:
    """Why PyTorch is going to refuse to write into `x`. We ask before anything is written."""
    if x.is_inference() and not torch.is_inference_mode_enabled():
        return "an inference tensor, in place"
    if torch._debug_has_internal_overlap(x) == 1:
        return "a tensor that overlaps itself, in place"
    if x.requires_grad and torch.is_grad_enabled():
        if x.is_leaf:
            return "a leaf that requires grad, in place"
        if x._is_view():
            if x._base.is_leaf:
                return "a view of a leaf that requires grad, in place"
            if _get_creation_meta(x) != CreationMeta.DEFAULT:
                return "a view that autograd cannot follow, in place"
    return None


@op(stock=stock.relu, strided=_X, split=elements)
def relu(input, inplace=False):
    """Fused, also in place."""
    return _pointwise(input, RELU, inplace=inplace)


@op(stock=stock.relu6, strided=_X)
def relu6(input, inplace=False):
    """Fused, also in place."""
    return _pointwise(input, HARDTANH, 0.0, 6.0, inplace)


@op(stock=stock.leaky_relu, strided=_X, split=elements)
def leaky_relu(input, negative_slope=0.01, inplace=False):
    """Fused, also in place if the slope is not negative."""
    return _leaky_relu(input, negative_slope, inplace)


def _leaky_relu(x, slope, inplace):
    if inplace and isinstance(slope, (int, float)) and slope < 0:
        return Stock(
            "autograd", f"negative_slope={slope} in place"
        )  # PyTorch's backward refuses it
    return _pointwise(x, LEAKY_RELU, slope, inplace=inplace)


@op(stock=stock.rrelu, strided=_X, split=elements, source="arXiv:1505.00853")
def rrelu(input, lower=1.0 / 8, upper=1.0 / 3, training=False, inplace=False):
    """Fused in eval mode for contiguous inputs, and in place for all. In training PyTorch runs: it
    draws the slopes and applies them in one kernel."""
    if training:
        return Stock("random", "training=True: PyTorch draws and applies slopes in one kernel")
    if not (isinstance(lower, (int, float)) and isinstance(upper, (int, float))):
        return Stock("option", f"lower={lower!r}, upper={upper!r}")
    if not (lower <= upper and math.isfinite(lower) and math.isfinite(upper)):
        return Invalid("option", f"lower={lower}, upper={upper}")
    if not (inplace or input.is_contiguous()):
        return Stock(
            "layout", "an input that is not contiguous, whose result PyTorch makes contiguous"
        )
    return _leaky_relu(input, (lower + upper) / 2, inplace)


@op(stock=stock.threshold, strided=_X, split=elements)
def threshold(input, threshold, value, inplace=False):
    """Fused, also in place."""
    dtype = input.dtype
    return _pointwise(input, THRESHOLD, rounded(threshold, dtype), rounded(value, dtype), inplace)


@op(stock=stock.hardtanh, strided=_X)
def hardtanh(input, min_val=-1.0, max_val=1.0, inplace=False):
    """Fused, also in place."""
    if isinstance(min_val, (int, float)) and isinstance(max_val, (int, float)):
        if min_val > max_val:
            return Invalid("option", f"min_val={min_val} above max_val={max_val}")
    return _pointwise(input, HARDTANH, min_val, max_val, inplace)


@op(stock=stock.elu, strided=_X, split=elements, source="arXiv:1511.07289")
def elu(input, alpha=1.0, inplace=False):
    """Fused, also in place if alpha is not negative."""
    return _elu(input, alpha, 1.0, inplace)


def _elu(x, alpha, input_scale, inplace):
    if inplace and isinstance(alpha, (int, float)) and alpha < 0:
        return Stock("autograd", f"alpha={alpha} in place")  # PyTorch's backward refuses it
    return _pointwise(x, ELU, alpha, input_scale, inplace)


@op(stock=stock.celu, strided=_X, split=elements, source="arXiv:1704.07483")
def celu(input, alpha=1.0, inplace=False):
    """Fused, also in place if alpha is not negative."""
    if not isinstance(alpha, (int, float)):
        return _elu(input, alpha, 1.0, inplace)
    if alpha == 0:
        return Invalid("option", "alpha=0")
    return _elu(input, alpha, 1.0 / alpha, inplace)


@op(stock=stock.selu, strided=_X, split=elements, source="arXiv:1706.02515")
def selu(input, inplace=False):
    """Fused, also in place."""
    return _pointwise(input, SELU, inplace=inplace)


@op(stock=stock.gelu, strided=_X, split=elements, source="arXiv:1606.08415")
def gelu(input, *, approximate="none"):
    """Fused for the erf formula and for the tanh formula."""
    if approximate not in ("none", "tanh"):
        return Invalid("option", f"approximate={approximate!r}")
    return _pointwise(input, GELU if approximate == "none" else GELU_TANH)


@op(stock=stock.silu, strided=_X, split=elements, source="arXiv:1702.03118")
def silu(input, inplace=False):
    """Fused, also in place."""
    return _pointwise(input, SILU, inplace=inplace)


@op(stock=stock.mish, strided=_X, split=elements, source="arXiv:1908.08681")
def mish(input, inplace=False):
    """Fused, also in place."""
    return _pointwise(input, MISH, inplace=inplace)


@op(stock=stock.sigmoid, strided=_X, split=elements)
def sigmoid(input):
    """Fused."""
    return _pointwise(input, SIGMOID)


@op(stock=stock.tanh, strided=_X, split=elements)
def tanh(input):
    """Fused."""
    return _pointwise(input, TANH)


@op(stock=stock.logsigmoid, strided=_X)
def logsigmoid(input):
    """Fused."""
    return _pointwise(input, LOGSIGMOID)


@op(stock=stock.hardsigmoid, strided=_X)
def hardsigmoid(input, inplace=False):
    """Fused, also in place."""
    return _pointwise(input, HARDSIGMOID, inplace=inplace)


@op(stock=stock.hardswish, strided=_X, source="arXiv:1905.02244")
def hardswish(input, inplace=False):
    """Fused, also in place."""
    return _pointwise(input, HARDSWISH, inplace=inplace)


@op(stock=stock.hardshrink, strided=_X)
def hardshrink(input, lambd=0.5):
    """Fused."""
    return _pointwise(input, HARDSHRINK, rounded(lambd, input.dtype))


@op(stock=stock.softshrink, strided=_X)
def softshrink(input, lambd=0.5):
    """Fused."""
    if isinstance(lambd, (int, float)) and not 0 <= lambd <= torch.finfo(input.dtype).max:
        return Invalid("option", f"lambd={lambd}")
    return _pointwise(input, SOFTSHRINK, rounded(lambd, input.dtype))


@op(stock=stock.softplus, strided=_X, split=elements, autocast="fp32")
def softplus(input, beta=1, threshold=20, *, out_dtype=None):
    """Fused; under autocast with the conversion to float32."""
    return _pointwise(input, SOFTPLUS, beta, threshold, out_dtype=out_dtype)


@op(stock=stock.softsign, strided=_X, split=elements)
def softsign(input):
    """Fused: one kernel per direction. PyTorch needs three and eight."""
    return _pointwise(input, SOFTSIGN)


class Tanhshrink(Function):
    """x -> x - t with t = tanh(x). t is an output with its own graph, as PyTorch keeps only t."""

    strided = ("dy", "dt")

    @staticmethod
    def forward(ctx, x):
        y, t = kernels.pointwise.fwd_keep(x, "tanhshrink", "tanh")
        ctx.save_for_backward(t)
        ctx.set_materialize_grads(False)
        return y, t

    @staticmethod
    def backward(ctx, dy, dt):
        (t,) = ctx.saved_tensors
        dx = None
        if dy is not None and torch.is_grad_enabled():
            dx = dy - aten.tanh_backward(dy, t)
        elif dy is not None:
            dx = kernels.pointwise.bwd(dy, t, "tanhshrink_grad")
        if dt is not None:  # from a second derivative
            through_t = aten.tanh_backward(dt, t)
            dx = through_t if dx is None else dx + through_t
        return dx


@op(stock=stock.tanhshrink, strided=_X, split=elements)
def tanhshrink(input):
    """Fused: one kernel per direction. PyTorch needs two and three."""
    if input.requires_grad and torch.is_grad_enabled():
        return run(Tanhshrink, input)[0]
    return kernels.pointwise.fwd(input, "tanhshrink")
