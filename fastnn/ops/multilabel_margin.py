"""Multi-label margin loss."""

import torch
import torch.nn.functional as stock

from fastnn import kernels
from fastnn._op import Function, Invalid, Stock, op, run, second_order
from fastnn.ops.distance import row_divisor
from fastnn.ops.loss import refuse
from fastnn.ops.nll_loss import resolve_reduction


class MultiLabelMargin(Function):
    """The loss, reduced if there is a divisor. Differentiable in x, as often as in PyTorch."""

    @staticmethod
    def forward(ctx, x, target, divisor, dtype):
        y = x.new_empty(x.shape[:-1] if divisor is None else (), dtype=dtype)
        kernels.multilabel_margin.fwd(x.contiguous(), target, divisor, y)
        ctx.save_for_backward(x, target)
        ctx.rest = divisor, dtype
        return y

    @staticmethod
    def backward(ctx, dloss):
        x, target = ctx.saved_tensors
        divisor, dtype = ctx.rest
        if torch.is_grad_enabled():

            def formula(x):
                y = stock.multilabel_margin_loss(x.to(dtype), target, reduction="none")
                return y if divisor is None else y.sum() / divisor

            (dx,) = second_order(formula, (x,), dloss, (True,))
        else:
            dx = kernels.multilabel_margin.bwd(dloss, x.contiguous(), target, divisor)
        return dx, None, None, None


@op(stock=stock.multilabel_margin_loss, strided=("input",),
    integers=(torch.int64,), autocast="fp32",
    autocast_cpu="fp32")  # fmt: skip
def multilabel_margin_loss(
    input, target, size_average=None, reduce=None, reduction="mean", *, out_dtype=None
):
    """Fused with its reduction, up to 8192 classes.

    A target of C or more makes the loss and its gradients nan. PyTorch fails an assertion, after
    which the process cannot use CUDA any more, or raises RuntimeError on a CPU. With TRITON_DEBUG=1
    the kernels assert as well.
    """
    why = refuse((input, target), reduction)
    if why is not None:
        return why
    if not 1 <= input.dim() <= 2 or target.dtype != torch.int64 or target.shape != input.shape:
        return Invalid(
            "dtype", "an input that is not (N, C) or (C,), or a target that is not so in int64"
        )
    if input.shape[-1] == 0:
        return Stock("empty", "no classes")
    if input.shape[-1] > kernels.multilabel_margin.MOST:
        most = kernels.multilabel_margin.MOST
        return Stock("size", f"{input.shape[-1]:,} classes; kernels take at most {most:,}")
    if size_average is not None or reduce is not None:
        reduction = resolve_reduction(size_average, reduce, reduction)
    divisor = row_divisor(reduction, input.shape[:-1].numel())
    return run(MultiLabelMargin, input, target, divisor, out_dtype or input.dtype)
