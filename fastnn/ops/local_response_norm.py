"""Local response norm."""

import math

import torch
import torch.nn.functional as stock

from fastnn import kernels
from fastnn._op import Function, Invalid, Stock, in_backward, op, rounded, run, second_order

_WIDEST = 8  # the most channels of a window that fit in registers


class LocalResponseNorm(Function):
    """x (N, C, *) contiguous -> y. Keeps only x, from which the backward computes the rest."""

    @staticmethod
    def forward(ctx, x, size, alpha, beta, k, out_dtype):
        ctx.save_for_backward(x)
        ctx.rest = (size, alpha, beta, k), out_dtype
        return kernels.local_response_norm.fwd(x, size, alpha, beta, k, out_dtype)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        options, out_dtype = ctx.rest
        if torch.is_grad_enabled():  # create_graph=True: a kernel's gradient would carry no graph

            def formula(x):
                return stock.local_response_norm(x.to(out_dtype or x.dtype), *options)

            (dx,) = second_order(formula, (x,), dy, (True,))
        else:
            dx = kernels.local_response_norm.bwd(dy, x, *options)
        return dx, None, None, None, None, None


@op(
    stock=stock.local_response_norm,
    strided=("input",),
    autocast="fp32",
    autocast_cpu="fp32",
    alerts=lambda input, *rest: input.dim() > 3 and in_backward(input),
    source="Krizhevsky, Sutskever, Hinton (2012), section 3.3",
)
def local_response_norm(input, size, alpha=1e-4, beta=0.75, k=1.0, *, out_dtype=None):
    """Fused for contiguous input and windows of up to 8 channels, one pass per direction."""
    if input.dim() < 3:
        return Invalid("shape", f"{input.dim()} dimensions")
    if type(size) is not int or size <= 0:
        return Invalid("option", f"size={size!r}")
    if any(type(v) not in (int, float) for v in (alpha, beta, k)):
        return Stock("option", f"alpha={alpha!r}, beta={beta!r}, k={k!r}")
    # Other numbers can make PyTorch's chain compute inf - inf or 0 * inf, or sums that cancel.
    if not (alpha >= 0 and k >= 0 and beta and all(map(math.isfinite, (alpha, beta, k)))):
        return Stock("option", f"alpha={alpha!r}, beta={beta!r}, k={k!r}")
    if not input.numel():
        return Stock("empty", "no elements")
    if input.numel() >= 2**31:
        return Stock("size", f"{input.numel():,} elements; 32 bits cannot index so many")
    if size > _WIDEST:
        return Stock("size", f"a window of size={size} channels; kernels take at most {_WIDEST}")
    if not input.is_contiguous():
        return Stock("layout", "input that is not contiguous")
    if input.dim() == 3 and input.device.type == "cpu":
        # for 3-D input on the CPU, autocast does not list the pooling that PyTorch uses
        out_dtype = None
    exponent = rounded(beta, out_dtype or input.dtype)
    if exponent is None:
        return Invalid("dtype", f"beta={beta!r} in {input.dtype}")
    return run(LocalResponseNorm, input, size, float(alpha), exponent, float(k), out_dtype)
