"""Connectionist temporal classification."""

import itertools

import torch
import torch.nn.functional as stock
from torch import Tensor

from fastnn import kernels
from fastnn._op import Function, Invalid, Stock, impossible, in_backward, op, run, second_order

INTEGERS = (torch.int64, torch.int32)


class CTCLoss(Function):
    """The loss of x (T, N, C) in float32. Differentiable in x, as often as in PyTorch."""

    strided = ("dloss",)

    @staticmethod
    def forward(ctx, x, target, lengths, options):
        save = ctx.needs_input_grad[0]
        table = torch.tensor(lengths, device=x.device)
        loss, nll, alpha = kernels.ctc.fwd(x, target, table, max(lengths[1]), *options, save)
        ctx.save_for_backward(x, target, nll, alpha)
        ctx.rest = lengths, options
        return loss

    @staticmethod
    def backward(ctx, dloss):
        x, target, nll, alpha = ctx.saved_tensors
        lengths, options = ctx.rest
        if torch.is_grad_enabled():

            def formula(x):
                return stock.ctc_loss(x.float(), target, *lengths[:2], *options)

            (dx,) = second_order(formula, (x,), dloss, (True,))
        else:
            # PyTorch, too, keeps the lengths on the host, and copies them again
            table = torch.tensor(lengths, device=x.device)
            dx = kernels.ctc.bwd(dloss, x, target, table, nll, alpha, *options)
        return dx, None, None, None


def _numbers(lengths):
    """Lengths as a list of integers; None if they are something else."""
    if isinstance(lengths, Tensor):
        if lengths.dtype not in INTEGERS or lengths.dim() > 1:
            return None
        return lengths.reshape(-1).tolist()
    if not isinstance(lengths, (tuple, list)) or any(type(n) is not int for n in lengths):
        return None
    return list(lengths)


@op(
    stock=stock.ctc_loss,
    strided=("log_probs", "targets"),
    integers=INTEGERS,
    on_host=("input_lengths", "target_lengths"),
    autocast="fp32",
    autocast_cpu="fp32",
    alerts=in_backward,
)
def ctc_loss(
    log_probs, targets, input_lengths, target_lengths, blank=0, reduction="mean",
    zero_infinity=False, *, out_dtype=None,
):  # fmt: skip
    """Fused over all steps of a sequence, up to 1023 labels; always deterministic.

    PyTorch raises RuntimeError in the backward on a GPU under `use_deterministic_algorithms`; there
    `auto` runs the kernels, too. The
    gradient is that of a log_softmax that was applied, as in PyTorch. A label outside [0, C) makes
    the loss of its sequence and the gradients of the sequence nan; PyTorch reads stray memory.
    """
    if not isinstance(log_probs, Tensor) or not isinstance(targets, Tensor):
        return Invalid("option", "log_probs or targets that are not tensors")
    if log_probs.dim() not in (2, 3) or targets.dim() not in (1, 2):
        return Invalid("shape", "log_probs that are not (T, N, C) or (T, C)")
    if out_dtype is None and log_probs.dtype is not torch.float32:
        return Invalid(
            "dtype", f"log_probs in {log_probs.dtype}, which PyTorch has for float32 only"
        )
    if targets.dtype not in INTEGERS:
        return Stock("dtype", f"targets in {targets.dtype}; kernels take integers")
    if type(blank) is not int or type(zero_infinity) is not bool:
        return Stock("option", f"blank={blank!r}, zero_infinity={zero_infinity!r}")
    if reduction not in ("none", "mean", "sum"):
        return Invalid("option", f"reduction={reduction!r}")
    if log_probs.numel() == 0:
        return Stock("empty", "no log_probs")
    x, target = log_probs, targets
    if log_probs.dim() == 2:
        if targets.dim() != 1:
            return Stock("shape", "2-d targets of one sequence")
        x = x.unsqueeze(1)  # the targets are concatenated ones
    T, N, C = x.shape
    if not 0 <= blank < C:
        return Invalid("option", f"blank={blank} of {C} classes")
    impossible("it reads the lengths of its sequences")
    steps, labels = _numbers(input_lengths), _numbers(target_lengths)
    if steps is None or labels is None or len(steps) != N or len(labels) != N:
        return Invalid("shape", "lengths that are not one integer for each sequence")
    if min(steps) < 0 or max(steps) > T or min(labels) < 0:
        return Invalid("option", f"an input length outside [0, {T}], or a negative target length")
    if target.dtype is not torch.int64:
        target = target.clone()  # as PyTorch, which converts it, so that users may edit theirs
    # The offsets follow from the strides of the clone: that of a strided view is dense.
    if target.dim() == 1:
        if sum(labels) != target.numel():
            return Invalid(
                "shape", f"{target.numel()} concatenated targets for lengths of {sum(labels)}"
            )
        first = itertools.accumulate(labels[:-1], initial=0)
        offsets = [target.stride(0) * n for n in first]
    else:
        if target.shape[0] != N or max(labels) > target.shape[1]:
            return Invalid("shape", "targets that are not (N, at least the longest target length)")
        offsets = [target.stride(0) * n for n in range(N)]
    if max(labels) > kernels.ctc.MOST:
        return Stock("size", f"{max(labels)} labels; kernels take at most {kernels.ctc.MOST}")
    lengths = steps, labels, offsets
    loss = run(CTCLoss, x, target, lengths, (blank, reduction, zero_infinity))
    if reduction == "none" and log_probs.dim() == 2:
        loss = loss.squeeze(0)
    return loss
