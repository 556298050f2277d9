"""What several kernel files share: dense layouts, block sizes."""

import torch


def empty_as(x, dtype=None, device=None):
    """Uninitialised, laid out as ATen lays out a pointwise result of `x`."""
    # A contiguous tensor may have any stride where it has a size of 1; ATen does not keep those.
    layout = torch.contiguous_format if x.is_contiguous() else torch.preserve_format
    return torch.empty_like(x, dtype=dtype, device=device, memory_format=layout)


def dense_like(t, like):
    """`t` with its memory laid out as in the dense tensor `like`; a copy only if it is not."""
    if t.shape == like.shape:
        if t.stride() == like.stride() or (t.is_contiguous() and like.is_contiguous()):
            return t
    return torch.empty_like(like, dtype=t.dtype).copy_(t)
