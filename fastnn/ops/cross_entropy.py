"""Cross entropy of logits with class indices or class probabilities."""

import torch
import torch.nn.functional as stock

from fastnn._op import Function, Invalid, Stock, launcher, op, run, second_order
from fastnn.ops.nll_loss import INDICES, refuse_indices, refuse_options, resolve_reduction


def _fake_fwd(x, target, weight, ignore_index, smoothing, reduction, dtype):
    shape = (*x.shape[:1], *x.shape[2:]) if reduction == "none" and x.dim() > 1 else ()
    M = x.numel() // x.shape[min(x.dim() - 1, 1)]
    rows = 3 if target.is_floating_point() or smoothing > 0.0 else 2
    return x.new_empty(shape, dtype=dtype), x.new_empty(rows * M + 1, dtype=torch.float32)


def _fake_bwd(dloss, x, target, *options):
    *_, need_x, need_target = options
    return [torch.empty_like(t) for t, need in ((x, need_x), (target, need_target)) if need]


_fwd = launcher(
    "cross_entropy",
    "fwd",
    "(Tensor x, Tensor target, Tensor? weight, int ignore_index, float smoothing, str reduction, "
    "ScalarType dtype) -> (Tensor, Tensor)",
    _fake_fwd,
)
_bwd = launcher(
    "cross_entropy",
    "bwd",
    "(Tensor dloss, Tensor x, Tensor target, Tensor? weight, Tensor stats, int ignore_index, "
    "float smoothing, str reduction, bool need_x, bool need_target) -> Tensor[]",
    _fake_bwd,
)


class CrossEntropy(Function):
    """Cross entropy, reduced. Differentiable in input and probabilities, as often as in PyTorch."""

    @staticmethod
    def forward(ctx, x, target, weight, ignore_index, smoothing, reduction, dtype):
        loss, stats = _fwd(x, target, weight, ignore_index, smoothing, reduction, dtype)
        # The gradient of probabilities does not depend on them.
        kept = target if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(x, kept, weight, stats)
        ctx.options = ignore_index, smoothing, reduction, target.dtype
        return loss

    @staticmethod
    def backward(ctx, dloss):
        x, target, weight, stats = ctx.saved_tensors
        ignore_index, smoothing, reduction, target_dtype = ctx.options
        need_x, need_target = ctx.needs_input_grad[:2]
        if target is None:
            target = torch.empty_like(x, dtype=target_dtype)  # not read
        if torch.is_grad_enabled():
            dtype = dloss.dtype

            def formula(x, target):
                return stock.cross_entropy(
                    x.to(dtype),
                    target.to(dtype) if target.is_floating_point() else target,
                    None if weight is None else weight.to(dtype),
                    ignore_index=ignore_index,
                    reduction=reduction,
                    label_smoothing=smoothing,
                )

            dx, dt = second_order(formula, (x, target), dloss, (need_x, need_target))
        else:
            grads = _bwd(
                dloss, x, target, weight, stats, ignore_index, smoothing, reduction, need_x,
                need_target,
            )  # fmt: skip
            dx = grads[0] if need_x else None
            dt = grads[-1] if need_target else None
        return dx, dt, None, None, None, None, None


def _refuse(input, target, weight, ignore_index, smoothing, reduction, out_dtype):
    why = refuse_options(input, weight, ignore_index, reduction, out_dtype)
    if why is not None:
        return why
    if not isinstance(smoothing, (int, float)) or smoothing > 1.0:
        return Invalid("option", f"label_smoothing={smoothing!r}")
    if isinstance(target, torch.Tensor) and target.shape == input.shape:
        if not target.is_floating_point():
            return Invalid("dtype", "a target of the input's shape that is not floating")
        if ignore_index >= 0:
            return Invalid("option", "ignore_index with class probabilities")
        return None
    if smoothing > 0.0 and isinstance(target, torch.Tensor) and target.dtype is torch.uint8:
        return Stock("dtype", "uint8 targets with label smoothing")
    return refuse_indices(input, target, weight, out_dtype)


def _tracked(input):
    return torch.is_grad_enabled() and input.requires_grad


@op(
    stock=stock.cross_entropy,
    strided=("input", "target"),
    integers=INDICES,
    autocast="fp32",
    autocast_cpu="fp32",
    opaque=True,
    alerts=lambda input, target, *rest: input.dim() > 2 and not target.is_floating_point(),
    source="arXiv:1805.02867 (online softmax)",
)
def cross_entropy(
    input, target, weight=None, size_average=None, ignore_index=-100, reduce=None,
    reduction="mean", label_smoothing=0.0, *, out_dtype=None,
):  # fmt: skip
    """Fused for class indices and class probabilities, every shape and option; deterministic.

    What differs from stock:
    - A target outside [0, C) that is not `ignore_index` makes the loss and its gradients nan.
      Nothing outside the input is read. PyTorch fails an assertion, after which the process cannot
      use CUDA any more, or raises IndexError on a CPU. With TRITON_DEBUG=1 the kernels assert as
      well.
    - Logits of an ignored position are not used, and not read if classes are contiguous. A nan
      there stays out of the gradient; in PyTorch the gradient becomes nan.
    - The backward reads the logits; PyTorch keeps a table of log-probabilities of the same size.
      So logits that are edited in place between forward and backward raise autograd's error; in
      PyTorch they do not. Only the error differs: a gradient from edited logits is never computed.
    - 16-bit logits are not rounded to 16-bit log-probabilities on the way to the loss.
    """
    why = _refuse(input, target, weight, ignore_index, label_smoothing, reduction, out_dtype)
    if why is not None:
        return why
    dtype = out_dtype
    if dtype is None:
        dtype = input.dtype
        if target.is_floating_point():
            dtype = torch.promote_types(dtype, target.dtype)
            if weight is not None:
                dtype = torch.promote_types(dtype, weight.dtype)
    reduction = resolve_reduction(size_average, reduce, reduction)
    # as in ATen, where nan also means none
    smoothing = float(label_smoothing) if label_smoothing > 0 else 0.0
    if smoothing > 0.0 and target.is_floating_point() and _tracked(input):
        target = target.clone()  # ATen keeps new, smoothed probabilities: users may edit theirs
    return run(CrossEntropy, input, target, weight, ignore_index, smoothing, reduction, dtype)
