"""Shuffles of pixels and channels."""

import torch

from fastnn import kernels
from fastnn._op import Invalid, Stock, op, run
from fastnn.ops._linear_map import LinearMap, Maps, channels_last


def _shuffled(input, there, back, keeps):
    """`input` split and reordered by `there`, which `back` undoes; both as `shuffle` takes them."""
    if not input.numel():
        return Stock("empty", "no elements")  # PyTorch raises in the backward
    if input.numel() >= kernels.gather.MOST:
        return Stock("size", f"{input.numel():,} elements; 32 bits cannot index so many")
    last = channels_last(input)

    def forward(x):
        return kernels.gather.shuffle(x, *there, last and keeps)

    def backward(dy):
        return kernels.gather.shuffle(dy, *back, last)

    return run(LinearMap, input, Maps(forward, backward, forward), False)


def _pixels(lead, c, r, h, w):
    """(split, order) of the shuffle by r of (*lead, c * r * r, h, w), and of what undoes it."""
    n = len(lead)
    whole, same = [(size,) for size in lead], [(d,) for d in range(n)]
    shuffle = (*whole, (c, r, r), (h,), (w,)), (*same, (n,), (n + 3, n + 1), (n + 4, n + 2))
    back = (*whole, (c,), (h, r), (w, r)), (*same, (n, n + 2, n + 4), (n + 1,), (n + 3,))
    return shuffle, back


def _too_many(input):
    """`Stock`, where the dimensions are more than kernels walk."""
    most = kernels.gather.AXES
    return (
        Stock("shape", f"{input.dim()} dimensions; kernels take at most {most}")
        if input.dim() > most
        else None
    )


@op(stock=torch.pixel_shuffle, strided=("input",), source="arXiv:1609.05158")
def pixel_shuffle(input, upscale_factor):
    """Fused for up to 5 dimensions: one kernel each way, as in PyTorch."""
    r = upscale_factor
    if type(r) is not int:
        return Stock("option", f"upscale_factor={r!r}")
    if input.dim() < 3 or r < 1 or input.shape[-3] % (r * r):
        return Invalid("shape", f"upscale_factor={r} for {tuple(input.shape)}")
    if (declined := _too_many(input)) is not None:
        return declined
    *lead, c, h, w = input.shape
    # On CUDA the result is plain, on a CPU it has the layout of the input.
    there, back = _pixels(lead, c // (r * r), r, h, w)
    return _shuffled(input, there, back, keeps=not input.is_cuda)


@op(stock=torch.pixel_unshuffle, strided=("input",), source="arXiv:1609.05158")
def pixel_unshuffle(input, downscale_factor):
    """Fused for up to 5 dimensions: one kernel each way, as in PyTorch."""
    r = downscale_factor
    if type(r) is not int:
        return Stock("option", f"downscale_factor={r!r}")
    if input.dim() < 3 or r < 1 or input.shape[-2] % r or input.shape[-1] % r:
        return Invalid("shape", f"downscale_factor={r} for {tuple(input.shape)}")
    if (declined := _too_many(input)) is not None:
        return declined
    *lead, c, h, w = input.shape
    back, there = _pixels(lead, c, r, h // r, w // r)
    return _shuffled(input, there, back, keeps=True)


@op(stock=torch.channel_shuffle, strided=("input",), source="arXiv:1707.01083")
def channel_shuffle(input, groups):
    """Fused for up to 5 dimensions: one kernel each way, as in PyTorch."""
    g = groups
    if type(g) is not int:
        return Stock("option", f"groups={g!r}")
    if input.dim() < 3 or g < 1 or input.shape[1] % g:
        return Invalid("shape", f"groups={g} for {tuple(input.shape)}")
    if (declined := _too_many(input)) is not None:
        return declined
    n, c, *rest = input.shape
    order = (0,), (2, 1), *((d + 3,) for d in range(len(rest)))
    there, back = (
        ((n,), channels, *((size,) for size in rest)) for channels in ((g, c // g), (c // g, g))
    )
    return _shuffled(input, (there, order), (back, order), keeps=not input.is_cuda)
