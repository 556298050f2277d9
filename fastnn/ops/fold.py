"""Fold and unfold."""

import math

import torch.nn.functional as stock

from fastnn import kernels
from fastnn._op import Invalid, Stock, op, run
from fastnn.ops._linear_map import LinearMap, Maps


def _pairs(**sizes):
    """[(height, width), ...] of sizes given as one number or two; `Stock`, or `Invalid`."""
    least = {"kernel_size": 1, "dilation": 1, "stride": 1, "padding": 0}
    pairs = []
    for name, size in sizes.items():
        pair = (size, size) if type(size) is int else size
        if not isinstance(pair, (list, tuple)) or any(type(n) is not int for n in pair):
            return Stock("option", f"{name}={size!r}")
        if len(pair) != 2 or min(pair) < least.get(name, 1):
            return Invalid("option", f"{name}={size!r}")
        pairs.append(tuple(pair))
    return pairs


def _maps(size, pairs):
    """Unfold of an image of that size, and fold."""

    def unfold(x):
        return kernels.gather.unfold(x, *pairs)

    def fold(x):
        return kernels.gather.fold(x, size, *pairs)

    return Maps(unfold, fold, unfold)


@op(stock=stock.unfold, strided=("input",))
def unfold(input, kernel_size, dilation=1, padding=0, stride=1):
    """Fused; the gradient is a fold, one kernel, in fp32."""
    pairs = _pairs(kernel_size=kernel_size, dilation=dilation, padding=padding, stride=stride)
    if isinstance(pairs, Stock):
        return pairs
    if input.dim() not in (3, 4) or 0 in input.shape[-3:]:
        return Invalid("shape", f"an image of {tuple(input.shape)}")
    H, W = input.shape[-2:]
    blocks = kernels.gather.blocks((H, W), *pairs)
    if min(blocks) < 1:
        return Invalid("shape", f"no block within {tuple(input.shape)}")
    elements = input.numel() // (H * W) * math.prod(pairs[0]) * math.prod(blocks)
    if max(elements, input.numel()) >= kernels.gather.MOST:
        return Stock("size", f"a result of {elements:,} elements; 32 bits cannot index so many")
    return run(LinearMap, input, _maps((H, W), pairs), False)


@op(stock=stock.fold, strided=("input",))
def fold(input, output_size, kernel_size, dilation=1, padding=0, stride=1):
    """Fused; what blocks share is summed in fp32 and rounded once."""
    pairs = _pairs(
        output_size=output_size, kernel_size=kernel_size, dilation=dilation, padding=padding,
        stride=stride,
    )  # fmt: skip
    if isinstance(pairs, Stock):
        return pairs
    size, *pairs = pairs
    if input.dim() not in (2, 3) or 0 in input.shape[-2:]:
        return Invalid("shape", f"blocks of {tuple(input.shape)}")
    count, length = input.shape[-2:]
    blocks = kernels.gather.blocks(size, *pairs)
    if count % math.prod(pairs[0]) or min(blocks) < 1 or length != math.prod(blocks):
        return Invalid("shape", f"blocks of {tuple(input.shape)} for {size}")
    elements = input.numel() // (math.prod(pairs[0]) * length) * math.prod(size)
    if max(elements, input.numel()) >= kernels.gather.MOST:
        return Stock("size", f"a result of {elements:,} elements; 32 bits cannot index so many")
    unfold, fold, *_ = _maps(size, pairs)
    return run(LinearMap, input, Maps(fold, unfold, fold), False)
