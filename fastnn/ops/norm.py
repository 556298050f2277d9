"""Normalisation of rows: layer norm and RMS norm."""

import math

import torch
import torch.nn.functional as stock

from fastnn import kernels
from fastnn._op import Function, Invalid, Stock, Work, launcher, op, run, second_order
from fastnn._shards import Split
from fastnn.ops.nll_loss import too_long

# RMS norm is composed for every input in torch 2.8, and not in 2.11
_COMPOSED = torch.__version__ < "2.11"

FINFO_EPS = torch.finfo(torch.float32).eps  # PyTorch's default, also for 16-bit inputs


def _fwd_fake(x, weight, bias, dims, eps, center, out_dtype):
    y = torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device)
    rows = math.prod(x.shape[:-dims])
    return [y, *(y.new_empty(rows, dtype=torch.float32) for _ in range(1 + center))]


def _bwd_fake(dy, x, weight, mean, rstd, dims, need_dx, dw_dtype, db_dtype):
    dx = [torch.empty(x.shape, dtype=x.dtype, device=x.device)] if need_dx else []
    return dx + [x.new_empty(x.shape[-dims:], dtype=t) for t in (dw_dtype, db_dtype) if t]


_fwd = launcher(
    "norm",
    "fwd",
    "(Tensor x, Tensor? weight, Tensor? bias, int dims, float eps, bool center, "
    "ScalarType? out_dtype) -> Tensor[]",
    _fwd_fake,
)
_bwd = launcher(
    "norm",
    "bwd",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor? mean, Tensor rstd, int dims, bool need_dx, "
    "ScalarType? dw_dtype, ScalarType? db_dtype) -> Tensor[]",
    _bwd_fake,
)


class Norm(Function):
    """Normalises over the last `dims` dimensions, about the mean if `center`, else about zero.

    It saves what PyTorch saves: x, weight, bias, mean, rstd.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, dims, eps, center, out_dtype):
        y, *statistics = _fwd(x, weight, bias, dims, eps, center, out_dtype)
        ctx.save_for_backward(x, weight, bias, *statistics)
        ctx.rest = dims, eps, center, y.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, *statistics = ctx.saved_tensors
        dims, eps, center, out_dtype = ctx.rest
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():

            def formula(x, *parameters):
                x = x.to(out_dtype)
                weight, bias = (t if t is None else t.to(out_dtype) for t in parameters)
                if center:
                    return stock.layer_norm(x, x.shape[-dims:], weight, bias, eps)
                return stock.rms_norm(x, x.shape[-dims:], weight, eps)

            grads = second_order(formula, (x, weight, bias), dy, needs)
            return *grads, None, None, None, None
        found = iter(
            _bwd(
                dy,
                x,
                weight,
                statistics[0] if center else None,
                statistics[-1],
                dims,
                needs[0],
                weight.dtype if needs[1] else None,
                bias.dtype if needs[2] else None,
            )
        )
        return *(next(found) if need else None for need in needs), None, None, None, None


def unfit(input, normalized_shape, eps, *parameters):
    """Why PyTorch would reject the call, or takes it by a path that is not worth a kernel."""
    if not isinstance(normalized_shape, (tuple, list)) or not normalized_shape:
        return Invalid("shape", f"normalized_shape={normalized_shape!r}")
    shape = tuple(normalized_shape)
    if tuple(input.shape[-len(shape) :]) != shape:
        return Invalid("shape", f"normalized_shape={shape}, input {tuple(input.shape)}")
    if any(p is not None and tuple(p.shape) != shape for p in parameters):
        return Invalid("shape", f"normalized_shape={shape}, a parameter of another shape")
    if type(eps) not in (float, int):
        return Invalid("option", f"eps={eps!r}")
    return too_long(math.prod(shape))


LONG = "long rows"  # the variant that reads each row twice, as PyTorch does


def _in_rows(input, normalized_shape, *rest, **options):
    """The gate's policy: the number of elements, and whether a row is held in registers."""
    once = kernels.norm.reads_once(math.prod(normalized_shape), input.element_size())
    return Work(input.numel(), variant="" if once else LONG)


def _between_rows(input, normalized_shape, **others):
    return [Split({"input": d}, d) for d in range(input.dim() - len(normalized_shape))]


@op(
    stock=stock.layer_norm,
    strided=("input",),
    policy=_in_rows,
    split=_between_rows,
    variants=("", LONG),
    autocast="fp32",
    opaque=True,
    source="arXiv:1607.06450; statistics: Chan, Golub, LeVeque (1979)",
)
def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, *, out_dtype=None):
    """Fused for every normalized_shape, with or without weight and bias; statistics in fp32."""
    declined = unfit(input, normalized_shape, eps, weight, bias)
    if declined:
        return declined
    if out_dtype is None and any(p is not None and p.dtype != input.dtype for p in (weight, bias)):
        # CUDA rejects every mixture. (The CPU accepts float32 parameters with a 16-bit input. But
        # on the CPU only the interpreter runs kernels.)
        return Invalid("dtype", "parameters in another dtype than the input")
    return run(Norm, input, weight, bias, len(normalized_shape), eps, True, out_dtype)


@op(
    stock=stock.rms_norm,
    strided=("input",),
    policy=_in_rows,
    split=_between_rows,
    variants=("", LONG),
    autocast="fp32",
    opaque=True,
    source="arXiv:1910.07467",
)
def rms_norm(input, normalized_shape, weight=None, eps=None, *, out_dtype=None):
    """Fused for every normalized_shape and any mixture of dtypes; statistics in fp32.

    Keeps input and weight for the backward, as stock's fused kernel does; where stock composes the
    norm of operators, an edit of one of them before the backward may raise here alone.
    """
    if eps is None:
        eps = FINFO_EPS
    declined = unfit(input, normalized_shape, eps, weight)
    if declined:
        return declined
    if not input.numel():
        return Stock(
            "empty", "no elements"
        )  # their strides depend on how PyTorch composes the result
    # If PyTorch composes RMS norm of other operators, the result has the strides of the input.
    if not input.is_contiguous():
        if input.dim() in (4, 5) and input.stride(1) <= input.stride(-1):
            return Stock("layout", "channels_last input")
        if _COMPOSED:
            return Stock("layout", "a strided input: this torch keeps its layout")
    return run(Norm, input, weight, None, len(normalized_shape), eps, False, out_dtype)
