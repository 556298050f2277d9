"""Bags of embeddings."""

import torch
import torch.nn.functional as stock
from torch import Tensor

from fastnn import kernels
from fastnn._op import (
    Function,
    Invalid,
    Stock,
    Work,
    impossible,
    in_backward,
    op,
    run,
    second_order,
)
from fastnn.ops.embedding import padding_row

INTEGERS = (torch.int64, torch.int32)
MODES = {"sum": 0, "mean": 1, "max": 2}


class EmbeddingBag(Function):
    """weight (V, D), sample (N,) or None, indices (N,) -> (bags, D)."""

    @staticmethod
    def forward(ctx, weight, sample, indices, offsets, bags, width, mode, padding_idx):
        saves = any(ctx.needs_input_grad[:2])
        y, bag, count, place = kernels.embedding_bag.fwd(
            weight, indices, offsets, bags, width, sample, mode, padding_idx, saves
        )
        # PyTorch keeps the weight only for the gradient of the samples
        kept = weight if ctx.needs_input_grad[1] else None
        # and the offsets, which this backward does not read
        ctx.save_for_backward(kept, sample, indices, bag, count, place, offsets)
        ctx.rest = weight.shape[0], padding_idx
        return y

    @staticmethod
    def backward(ctx, dy):
        weight, sample, indices, bag, count, place, _ = ctx.saved_tensors
        V, padding_idx = ctx.rest
        needs = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            # it is linear in the weight, so without samples any weight has its gradient
            w = weight
            if w is None:
                w = dy.new_zeros((V, dy.shape[1]), requires_grad=True)

            def formula(w, sample):
                return _formula(w, sample, indices, bag, count, place, dy, padding_idx)

            dw, dsample = second_order(formula, (w, sample), dy, needs)
        else:
            dw = dsample = None
            if needs[0]:
                dw = kernels.embedding_bag.bwd(
                    dy, indices, V, padding_idx, bag, count, sample, place
                )
            if needs[1]:
                dsample = kernels.embedding_bag.bwd_sample(dy, weight, indices, bag, padding_idx)
        return dw, dsample, *[None] * 6


def _formula(w, sample, indices, bag, count, place, like, padding_idx):
    """The bags in differentiable operators, from what the forward found."""
    bag = bag.long()
    if place is not None:
        there = _positions(place, indices.numel())
        at = indices[there.clamp_min(0).flatten()].view_as(place).long()
        return torch.where((there >= 0) & (at != padding_idx), w.gather(0, at), 0)
    rows = stock.embedding(indices, w)
    kept = (indices != padding_idx) & (bag >= 0)
    rows = torch.where(kept[:, None], rows, 0)
    if sample is not None:
        rows = rows * sample[:, None]
    if count is not None:
        rows = rows / count[bag.clamp_min(0)].clamp_min(1)[:, None]
    return torch.zeros_like(like).index_add(0, bag.clamp_min(0), rows.to(like.dtype))


def _positions(place, count):
    """Where the maxima are among the indices; -1, or padding, if a bag has none but padding."""
    if place.dtype is not torch.uint8:
        return place.long()
    width = max(count // max(place.shape[0], 1), 1)  # all bags have it
    begin = torch.arange(0, count, width, device=place.device)[:, None]
    return begin + ((place.long() - begin) & 255).clamp_max(width - 1)


def _rows_read(input, weight, *rest, **options):
    """The gate's policy: the number of elements of the rows that are read."""
    return Work(input.numel() * weight.shape[-1])


def _bags(input, offsets, include_last_offset):
    """(indices (N,), offsets or None, number of bags, their width), or why there are none."""
    if input.dim() == 2:
        if offsets is not None:
            return Invalid("shape", "offsets for 2-d indices")
        if not input.shape[1]:
            return Invalid("shape", "2-d indices of width 0")
        return input.reshape(-1), None, *input.shape
    if input.dim() != 1 or not isinstance(offsets, Tensor) or offsets.dim() != 1:
        return Invalid("shape", "indices that are not 2-d, or 1-d with 1-d offsets")
    if offsets.dtype not in INTEGERS:
        return Invalid("dtype", f"offsets in {offsets.dtype}")
    bags = offsets.numel() - bool(include_last_offset)
    if bags < 0:
        return Invalid("option", "include_last_offset=True without offsets")
    if offsets.device.type == "cpu" and offsets.numel():
        # PyTorch looks at them there, and on a GPU it does not
        impossible("it reads offsets, which are on the CPU")
        first, last = int(offsets[0]), int(offsets[-1])
        if first or last > input.numel():
            return Invalid("option", f"offsets from {first} to {last}")
    return input, offsets, bags, 0


def _raises(
    input, weight, offsets=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False,
    mode="mean", *rest,
):  # fmt: skip
    return mode == "max" and in_backward(weight)


@op(
    stock=stock.embedding_bag,
    alerts=_raises,
    strided=("weight", "input", "offsets", "per_sample_weights"),
    integers=INTEGERS,
    policy=_rows_read,
    at_most="input.numel() * weight.shape[-1]",
)
def embedding_bag(
    input, weight, offsets=None, max_norm=None, norm_type=2, scale_grad_by_freq=False,
    mode="mean", sparse=False, per_sample_weights=None, include_last_offset=False,
    padding_idx=None,
):  # fmt: skip
    """Fused for dense gradients, in every mode, with weights; always deterministic.

    PyTorch raises RuntimeError in the backward of `mode="max"` on a GPU under
    `use_deterministic_algorithms`. An index outside [0, V) makes its bag nan, and has no part in
    the gradient. Offsets that do not begin with 0, or that pass the last index, read nothing
    outside the tensors. PyTorch fails an assertion that ends the process's CUDA context, reads
    stray memory, or raises RuntimeError on a CPU. Indices past the last offset belong to the last
    bag, as in PyTorch on a GPU; on a CPU PyTorch leaves some of them out.
    """
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        return Invalid("shape", "a weight that is not a 2-d tensor of floats")
    if input.is_floating_point():
        return Invalid("dtype", f"indices in {input.dtype}")
    sample = per_sample_weights
    if sample is not None:
        if not isinstance(sample, Tensor) or sample.shape != input.shape or mode != "sum":
            return Invalid("shape", f"per_sample_weights of another shape, or with mode={mode!r}")
        if sample.dtype != weight.dtype:
            return Invalid(
                "dtype", f"per_sample_weights in {sample.dtype}, a weight in {weight.dtype}"
            )
        sample = sample.reshape(-1)
    if mode not in MODES:
        return Invalid("option", f"mode={mode!r}")
    found = _bags(input, offsets, include_last_offset)
    if isinstance(found, Stock):
        return found
    indices, offsets, bags, width = found
    if mode == "max" and (scale_grad_by_freq or sparse):
        return Invalid("option", "mode='max' with scale_grad_by_freq or sparse")
    padding = padding_row(weight, indices, padding_idx, max_norm, sparse)
    if isinstance(padding, Stock):
        return padding
    if scale_grad_by_freq:
        return Stock(
            "option",
            "scale_grad_by_freq=True: PyTorch divides by other counts on a CPU than on CUDA",
        )
    options = bags, width, MODES[mode], padding
    return run(EmbeddingBag, weight, sample, indices, offsets, *options)
