"""Softmax, log-softmax and softmin."""

from typing import Any

import torch
import torch.nn.functional as stock

from fastnn import _rng, kernels
from fastnn._front import FRAMES, depth
from fastnn._op import FLOATS, Function, Invalid, Stock, impossible, launcher, op, run
from fastnn._shards import beside
from fastnn.ops.loss import number
from fastnn.ops.nll_loss import too_long

_fwd = launcher(
    "softmax",
    "fwd",
    "(Tensor x, int dim, bool log, bool negate, ScalarType dtype) -> Tensor",
    lambda x, dim, log, negate, dtype: torch.empty(x.shape, dtype=dtype, device=x.device),
)
_bwd = launcher(
    "softmax",
    "bwd",
    "(Tensor dy, Tensor y, int dim, bool log, bool negate, ScalarType dtype) -> Tensor",
    lambda dy, y, dim, log, negate, dtype: torch.empty(y.shape, dtype=dtype, device=y.device),
)


class Softmax(Function):
    """y = softmax of x or of -x, or its logarithm, computed and returned in `dtype`. Saves y."""

    @staticmethod
    def forward(ctx, x, dim, log, negate, dtype):
        y = _fwd(x, dim, log, negate, dtype)
        ctx.save_for_backward(y)
        ctx.rest = dim, log, negate, x.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        dim, log, negate, dtype = ctx.rest
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            aten = torch.ops.aten
            formula = aten._log_softmax_backward_data if log else aten._softmax_backward_data
            dx = formula(dy, y, dim, y.dtype).to(dtype)
            dx = -dx if negate else dx
        else:
            dx = _bwd(dy, y, dim, log, negate, dtype)
        return dx, None, None, None, None


def _softmax(name, x, dim, stacklevel, dtype, out_dtype, log=False, negate=False):
    if dim is None:
        # `stacklevel` is 3 by default: the caller of PyTorch's softmax, which calls
        # _get_softmax_dim.
        level = depth() + 1 + stacklevel - FRAMES - 3
        impossible("it warns")
        dim = stock._get_softmax_dim(name, x.dim(), level)  # type: ignore[attr-defined]
    if not isinstance(dim, int) or isinstance(dim, bool):
        return Invalid("option", f"dim={dim!r}")
    dims = max(x.dim(), 1)
    if not -dims <= dim < dims:
        return Invalid("option", f"dim={dim}, input {tuple(x.shape)}")
    if x.dim() and (why := too_long(x.shape[dim])):
        return why
    if dtype is None:
        dtype = out_dtype or x.dtype  # autocast sets a dtype only if the caller has not
    if dtype not in FLOATS:
        return Stock("dtype", f"dtype={dtype}; kernels write float32, float16 and bfloat16")
    return run(Softmax, x, dim % dims, log, negate, dtype)


def _beside(input, dim=None, **others):
    return beside(input, dim)


_RECORD: dict[str, Any] = {
    "strided": ("input",),
    "autocast": "fp32",
    "split": _beside,
    "opaque": True,
}


@op(
    stock=stock.softmax,
    source="arXiv:1805.02867 (online normalizer, for long rows)",
    **_RECORD,
)
def softmax(input, dim=None, _stacklevel=3, dtype=None, *, out_dtype=None):
    """Fused over any dim, with the cast to dtype."""
    return _softmax("softmax", input, dim, _stacklevel, dtype, out_dtype)


@op(stock=stock.log_softmax, source="arXiv:1805.02867", **_RECORD)
def log_softmax(input, dim=None, _stacklevel=3, dtype=None, *, out_dtype=None):
    """Fused over any dim, with the cast to dtype."""
    return _softmax("log_softmax", input, dim, _stacklevel, dtype, out_dtype, log=True)


@op(stock=stock.softmin, source="arXiv:1805.02867", **_RECORD)
def softmin(input, dim=None, _stacklevel=3, dtype=None, *, out_dtype=None):
    """Fused over any dim, with the negation and the cast to dtype."""
    return _softmax("softmin", input, dim, _stacklevel, dtype, out_dtype, negate=True)


class Gumbel(Function):
    """x, exponential noise -> softmax of (x - log(noise)) / tau along `dim`. Saves the result."""

    @staticmethod
    def forward(ctx, x, noise, tau, dim):
        z = kernels.pointwise.bwd(x, noise, "gumbel", tau)
        y = _fwd(z, dim, False, False, x.dtype)
        ctx.save_for_backward(y)
        ctx.rest = tau, dim
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        tau, dim = ctx.rest
        if torch.is_grad_enabled():
            dz = torch.ops.aten._softmax_backward_data(dy, y, dim, y.dtype)
        else:
            dz = _bwd(dy, y, dim, False, False, y.dtype)
        return dz if tau == 1 else dz / tau, None, None, None


@op(stock=stock.gumbel_softmax, source="arXiv:1611.01144")
def gumbel_softmax(logits, tau=1, hard=False, eps=1e-10, dim=-1):
    """Fused: PyTorch draws the noise, so seeds give what they give there; then one kernel for the
    noise and tau, and one for the softmax.

    PyTorch has four kernels before the softmax. `hard` adds PyTorch's own operators.
    """
    if not number(tau) or isinstance(tau, bool) or tau == 0 or type(hard) is not bool:
        return Stock("option", f"tau={tau!r}, hard={hard!r}")
    if eps != 1e-10:
        return Stock("option", f"eps={eps!r}, of which PyTorch warns")
    dims = max(logits.dim(), 1)
    if not isinstance(dim, int) or isinstance(dim, bool) or not -dims <= dim < dims:
        return Invalid("option", f"dim={dim!r}, logits {tuple(logits.shape)}")
    if not logits.numel():
        return Stock("empty", "no logits")
    if torch.is_autocast_enabled(logits.device.type):
        return Stock("autocast", "autocast, in which PyTorch adds noise in float32 to the logits")
    impossible("it draws noise by an operator of PyTorch")
    y = run(Gumbel, logits, _rng.exponential(logits), float(tau), dim % dims)
    if not hard:
        return y
    at = y.max(dim, keepdim=True)[1]
    return torch.zeros_like(y).scatter_(dim, at, 1.0) - y.detach() + y
