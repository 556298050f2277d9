"""Cross entropy of the output of a linear layer. All its logits are never in memory at once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as stock

from fastnn import kernels
from fastnn._op import Function, Invalid, Stock, Work, op, run, second_order

CHUNK_BYTES = 1 << 28  # of logits at a time: large enough for fast products, small beside a model


def _composed(
    input, linear_weight, target, *, linear_bias=None, weight=None, reduction="mean",
    ignore_index=None, label_smoothing=0.0, options=None,
):  # fmt: skip
    """What PyTorch has under this name since 2.13, for an older PyTorch."""
    if options is not None:
        raise NotImplementedError("linear_cross_entropy: this torch has no options")
    classes, *positions, features = linear_weight.shape
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    logits = stock.linear(input, linear_weight.reshape(-1, features), bias)
    logits = logits.reshape(*input.shape[:-1], classes, *positions)
    if ignore_index is not None and target.shape == logits.shape:
        raise RuntimeError("ignore_index with class probabilities")
    return stock.cross_entropy(
        logits,
        target,
        weight,
        reduction=reduction,
        ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
    )


_reference = getattr(stock, "linear_cross_entropy", _composed)


def chunk_rows(N, C, itemsize):
    """Rows of logits (N, C) to hold at a time: a power of two, or all N rows if they are few."""
    rows = max(CHUNK_BYTES // (C * itemsize), 64)
    return min(1 << (rows.bit_length() - 1), max(N, 1))


def _divisor(target, weight, ignore_index):
    """The divisor of a mean: kept rows, or the sum of their class weights. fp32, 0-d, no sync."""
    kept = target != ignore_index
    if weight is None:
        return kept.sum(dtype=torch.float32)
    inside = kept & (target >= 0) & (target < weight.numel())
    each = weight.float()[torch.where(inside, target, 0)]
    return torch.where(inside, each, 0.0).sum()


class _Gradients:
    """Sums the gradients of the chunks, in order; dW and db in fp32."""

    def __init__(self, x, w, b, needs, chunks):
        self.x, self.w, self.needs = x, w, needs
        self.dx = torch.empty_like(x) if needs[0] else None
        # One chunk needs no sum: its product is rounded once, as in PyTorch.
        summed = needs[1] and chunks > 1
        self.dw = torch.zeros_like(w, dtype=torch.float32) if summed else None
        self.db = x.new_zeros(w.shape[0], dtype=torch.float32) if needs[2] else None

    def add(self, rows, dlogits):
        x = self.x[rows]
        if self.dx is not None:
            torch.mm(dlogits, self.w, out=self.dx[rows])
        if self.needs[1]:
            if self.dw is None:
                self.dw = dlogits.t() @ x
            elif x.dtype is torch.float32:
                self.dw.addmm_(dlogits.t(), x)
            elif x.is_cuda:
                self.dw += torch.mm(dlogits.t(), x, out_dtype=torch.float32)
            else:  # on the CPU, where the interpreter runs, PyTorch has no such product
                self.dw.addmm_(dlogits.t().float(), x.float())
        if self.db is not None:
            self.db += dlogits.sum(0, dtype=torch.float32)


class LinearCrossEntropy(Function):
    """The loss, (N, *shape) or a scalar. P is the product of `shape`.

    Where the loss is one number, its gradients are made with it, chunk by chunk, but for the factor
    that comes from above, and saved as tensors are. Else the backward multiplies the logits again.
    """

    @staticmethod
    def forward(ctx, x, w, b, target, weight, shape, ignore_index, smoothing, reduction, dtype):
        N = x.shape[0]
        needs = ctx.needs_input_grad[:3]
        size = chunk_rows(N, w.shape[0], x.element_size())
        losses = x.new_empty((N, *shape), dtype=torch.float32)
        divisor = made = None
        late = False
        if reduction == "mean" and target.is_floating_point():
            divisor = losses.new_full((), float(losses.numel()))
        elif reduction == "mean":
            divisor = _divisor(target, weight, ignore_index)
        if reduction != "none" and any(needs):
            made = _Gradients(x, w, b, needs, math.ceil(N / size))
            # In float16, gradients may underflow if they are divided before they are scaled.
            late = divisor is not None and x.dtype is torch.float16
            seed = x.new_ones((), dtype=torch.float32)
            if divisor is not None and not late:
                seed = seed / divisor
        for start in range(0, N, size):
            rows = slice(start, start + size)
            logits = _logits(x[rows], w, b, shape)
            loss, stats = _loss(logits, target[rows], weight, ignore_index, smoothing)
            losses[rows] = loss
            if made is not None:
                dlogits = _dlogits(
                    seed, logits, target[rows], weight, stats, ignore_index, smoothing, "sum"
                )
                made.add(rows, dlogits)
        found: tuple = (None, None, None, None)
        if made is not None:
            dw = made.dw
            if dw is not None and not late:
                dw = dw.to(w.dtype)
            found = made.dx, dw, made.db, divisor if late else None
        ctx.save_for_backward(x, w, b, target, weight, *found)
        ctx.options = shape, ignore_index, smoothing, reduction
        if reduction == "none":
            return losses.to(dtype)
        loss = losses.sum()
        return (loss if divisor is None else loss / divisor).to(dtype)

    @staticmethod
    def backward(ctx, dloss):
        x, w, b, target, weight, *made, divisor = ctx.saved_tensors
        shape, ignore_index, smoothing, reduction = ctx.options
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():

            def formula(x, w, b):
                dtype = dloss.dtype
                return stock.cross_entropy(
                    _logits(x, w, b, shape).to(dtype),
                    target.to(dtype) if target.is_floating_point() else target,
                    None if weight is None else weight.to(dtype),
                    ignore_index=ignore_index,
                    reduction=reduction,
                    label_smoothing=smoothing,
                )

            return *second_order(formula, (x, w, b), dloss, needs), *[None] * 7
        if reduction == "none":
            found = _gradients_of_rows(ctx, dloss, x, w, b, target, weight)
        else:
            scale = dloss.float() if divisor is None else dloss.float() / divisor
            found = (t if t is None else t * scale for t in made)
        grads = (
            t.to(like.dtype) if need else None
            for t, like, need in zip(found, (x, w, b), needs, strict=True)
        )
        return *grads, *[None] * 7


def _logits(x, w, b, shape):
    """Logits (rows, C, *shape)."""
    with torch.autocast(x.device.type, enabled=False):
        return stock.linear(x, w, b).view(x.shape[0], w.shape[0] // math.prod(shape), *shape)


def _loss(logits, target, weight, ignore_index, smoothing):
    """Losses in fp32, not summed, and the stats that `_dlogits` needs."""
    return kernels.cross_entropy.fwd(
        logits, target, weight, ignore_index, smoothing, "none", torch.float32
    )


def _dlogits(dloss, logits, target, weight, stats, *options):
    """Gradients of the logits, (rows, C * P)."""
    (found,) = kernels.cross_entropy.bwd(
        dloss, logits, target, weight, stats, *options, True, False
    )
    return found.reshape(logits.shape[0], -1)


def _gradients_of_rows(ctx, dloss, x, w, b, target, weight):
    """The gradients of losses kept apart: each chunk's logits once more."""
    shape, *options, reduction = ctx.options
    size = chunk_rows(x.shape[0], w.shape[0], x.element_size())
    made = _Gradients(x, w, b, ctx.needs_input_grad[:3], math.ceil(x.shape[0] / size))
    for start in range(0, x.shape[0], size):
        rows = slice(start, start + size)
        logits = _logits(x[rows], w, b, shape)
        _, stats = _loss(logits, target[rows], weight, *options)
        dlogits = _dlogits(dloss[rows], logits, target[rows], weight, stats, *options, reduction)
        made.add(rows, dlogits)
    return made.dx, made.dw, made.db


def _logits_of(input, linear_weight, *rest, **options):
    """The gate's policy: the number of logits, which is rows times classes."""
    features = input.shape[-1]
    return Work(input.numel() // features * (linear_weight.numel() // features), "logits")


def _unfit(x, w, b, target, weight, reduction, ignore_index, smoothing, shape):
    """Why PyTorch gets the call, in most cases to reject it; None if the arguments fit."""
    N, C = x.shape[0], w.shape[0]
    if x.shape[-1] != w.shape[-1]:
        return Invalid("shape", f"{x.shape[-1]} features, a weight for {w.shape[-1]}")
    if b is not None and b.shape != w.shape[:-1]:
        return Invalid("shape", "a bias that is not one value per class")
    if target.is_floating_point():
        if target.shape != (N, C, *shape) or ignore_index is not None:
            return Invalid("shape", "class probabilities of another shape, or with ignore_index")
        if target.requires_grad and torch.is_grad_enabled():
            return Stock("autograd", "class probabilities that require grad")
    elif target.dtype is not torch.int64 or target.shape != (N, *shape):
        return Invalid("dtype", f"a target of shape {tuple(target.shape)}, {target.dtype}")
    if not N or not w.numel():
        return Stock("empty", "no rows, classes or features")
    if target.shape == (N, C, *shape) and not target.is_floating_point():
        return Stock("shape", "class indices of the shape of probabilities")
    if reduction not in ("none", "mean", "sum"):
        return Invalid("option", f"reduction={reduction!r}")
    if not isinstance(smoothing, (int, float)) or smoothing > 1.0:
        return Invalid("option", f"label_smoothing={smoothing!r}")
    if ignore_index is not None and not isinstance(ignore_index, int):
        return Invalid("option", f"ignore_index={ignore_index!r}")
    if weight is not None:
        if weight.shape != (C,):
            return Invalid("shape", "a weight that is not one value per class")
        if weight.requires_grad and torch.is_grad_enabled():
            return Stock("autograd", "a class weight that requires grad")
    return None


@op(
    stock=_reference,
    strided=("input", "linear_weight"),
    integers=(torch.int64,),
    policy=_logits_of,
    at_most="input.numel() // input.shape[-1] * (linear_weight.numel() // input.shape[-1])",
    source="arXiv:2410.10989 (gradients with the loss, in chunks of rows)",
)
def linear_cross_entropy(
    input, linear_weight, target, *, linear_bias=None, weight=None, reduction="mean",
    ignore_index=None, label_smoothing=0.0, options=None,
):  # fmt: skip
    """Fused for every shape, class indices and probabilities, in chunks of at most 256 MiB of
    logits.

    In `auto` from 2**30 logits on, where memory decides. It makes the products that stock makes,
    and with `reduction="none"` that of the logits twice. `options` asks for stock's own chunks.
    What differs from stock is what `cross_entropy` says of targets and of ignored positions; and
    input and weight are kept for the backward even where stock keeps the logits alone.
    """
    if options is not None:
        return Stock("option", "options: only PyTorch has its chunked path")
    if not (isinstance(linear_weight, torch.Tensor) and isinstance(target, torch.Tensor)):
        return Invalid("option", "the weight or the target is not a tensor")
    shape = tuple(linear_weight.shape[1:-1])
    single = input.dim() == 1
    if input.dim() not in (1, 2) or linear_weight.dim() < 2 or (single and shape):
        return Invalid(
            "shape", f"input and weight of {input.dim()} and {linear_weight.dim()} dimensions"
        )
    x, w, b, t, dtype = input, linear_weight, linear_bias, target, input.dtype
    if single:
        x, t = x.unsqueeze(0), t.unsqueeze(0)
    why = _unfit(x, w, b, t, weight, reduction, ignore_index, label_smoothing, shape)
    if why is not None:
        return why
    device = input.device.type
    if torch.is_autocast_enabled(device):  # a product in 16 bits, then a loss in float32
        low = torch.get_autocast_dtype(device)
        x, w = x.to(low), w.to(low)
        b = b if b is None else b.to(low)
        dtype = torch.float32
    elif t.is_floating_point():
        dtype = torch.promote_types(dtype, t.dtype)
        dtype = dtype if weight is None else torch.promote_types(dtype, weight.dtype)
    elif weight is not None and weight.dtype != dtype:
        return Invalid("dtype", f"a weight in {weight.dtype}")
    if x.dtype != w.dtype or (b is not None and b.dtype != w.dtype):
        return Invalid("dtype", "input, weight and bias in several dtypes")
    w = w.reshape(-1, w.shape[-1])
    if b is not None:
        b = b.reshape(-1)
        if torch.is_grad_enabled() and any(v.requires_grad for v in (x, w, b)):
            b = b.clone()  # which stock does not keep: an edit of the bias given is harmless
    ignored = -100 if ignore_index is None else ignore_index
    smoothing = float(label_smoothing) if label_smoothing > 0 else 0.0  # nan also means none
    options = shape, ignored, smoothing, reduction, dtype
    loss = run(LinearCrossEntropy, x, w, b, t, weight, *options)
    return loss.squeeze(0) if single and reduction == "none" else loss
