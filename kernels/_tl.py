"""How tensors and results lie in memory: what several kernel files share."""

import torch


def is_dense(t):
    """Whether `t` has the strides of a new tensor of its shape."""
    if not t.is_contiguous():
        return False
    shape = t.shape
    # in these cases a contiguous tensor may have any stride in some dimensions
    if 1 in shape or 0 in shape:
        expected = 1
        for size, stride in zip(shape[::-1], t.stride()[::-1], strict=True):
            if stride != expected:
                return False
            expected *= max(size, 1)
    return True


def dense(t):
    """`t` with the strides of a new tensor of its shape; copies only if no view has them.

    `t.contiguous()` is not enough: it keeps odd strides in dimensions of size 1, and the strides of
    a tensor with at most one element.
    """
    if is_dense(t):
        return t
    if t.is_contiguous() and t.numel() > 1:
        return t.flatten().view(t.shape)
    return t.clone(memory_format=torch.contiguous_format)


def empty_as(x, dtype=None, device=None):
    """An uninitialised tensor with the layout that ATen gives a pointwise result of `x`."""
    # A contiguous tensor may have any stride in a dimension of size 1. ATen does not keep those.
    layout = torch.contiguous_format if x.is_contiguous() else torch.preserve_format
    return torch.empty_like(x, dtype=dtype, device=device, memory_format=layout)


def empty_in_layout(shape, like, dtype, channels_last):
    """An uninitialised dense tensor, and the order of its dimensions in memory."""
    dims = len(shape)
    if not channels_last:
        return like.new_empty(shape, dtype=dtype), range(dims)
    layout = torch.channels_last if dims == 4 else torch.channels_last_3d
    empty = torch.empty(shape, dtype=dtype, device=like.device, memory_format=layout)
    return empty, (0, *range(2, dims), 1)


def empty_as_product(x, noise_is_dense):
    """An uninitialised tensor with the layout that ATen gives the product of `x` and a noise.

    noise_is_dense: whether the noise is contiguous and has the shape of `x`. If `x` is contiguous,
    too, the product does not keep odd strides in dimensions of size 1.
    """
    layout = torch.preserve_format
    if noise_is_dense and x.is_contiguous():
        layout = torch.contiguous_format
    return torch.empty_like(x, memory_format=layout)


def dense_like(t, like):
    """`t` with the memory layout of the dense tensor `like`; copies only if the layout differs."""
    if t.shape == like.shape:
        if t.stride() == like.stride() or (t.is_contiguous() and like.is_contiguous()):
            return t
    return torch.empty_like(like, dtype=t.dtype).copy_(t)
