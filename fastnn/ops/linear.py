"""Linear, and Linear with the activation and dropout that follow it."""

import torch
import torch.nn.functional as stock

from fastnn import _op, kernels
from fastnn._op import Invalid, op, run


def matmul_precision() -> str:
    """How products of float32 matrices are to be computed, by torch's settings: "tf32" or "ieee".

    Reading the old setting after the new one was written raises, hence new before old.
    """
    matmul = torch.backends.cuda.matmul
    try:
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    except AttributeError:
        return "tf32" if matmul.allow_tf32 else "ieee"


def _matrix(x):
    """x (..., K) -> (M, K); a copy only where leading dims do not collapse."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


class Linear(torch.autograd.Function):
    """x (..., K), weight (N, K), bias (N,) or None -> y (..., N)."""

    @staticmethod
    def forward(ctx, x, weight, bias, precision, arch):
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None
        )
        ctx.rest = x.shape, precision, arch
        y = kernels.linear.fwd(_matrix(x), weight, bias, precision, arch)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        shape, precision, arch = ctx.rest
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        dx = dw = db = None
        if torch.is_grad_enabled():  # create_graph=True: a kernel's gradient would carry no graph
            dx = dy @ weight if need_x else None
            dw = _matrix(dy).t() @ _matrix(x) if need_w else None
            db = _matrix(dy).sum(0) if need_b else None
        else:
            dy = _matrix(dy)
            if dy.stride(-1) != 1:
                dy = dy.contiguous()
            if need_x:
                dx = kernels.linear.bwd_dx(dy, weight, precision, arch).view(shape)
            if need_w:
                dw = kernels.linear.bwd_dw(dy, _matrix(x), precision, arch)
            if need_b:
                db = kernels.linear.bwd_db(dy, arch)
        return dx, dw, db, None, None


def _declined(input, weight, bias):
    """Why kernels do not take these operands of `linear`, if they do not."""
    if weight.dim() != 2 or input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        return Invalid(f"input {tuple(input.shape)}, weight {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        return Invalid(f"bias {tuple(bias.shape)} for {weight.shape[0]} features")
    if input.dtype != weight.dtype or (bias is not None and bias.dtype != input.dtype):
        return Invalid("several dtypes")
    return None


@op(stock=stock.linear, autocast="lower", autocast_cpu="lower")
def linear(input, weight, bias=None):
    """Fused with its bias, for a (N, K) weight and input of any leading shape."""
    why = _declined(input, weight, bias)
    if why is not None:
        return why
    arch = _op.architecture(input.get_device())
    return run(Linear, input, weight, bias, matmul_precision(), arch)
