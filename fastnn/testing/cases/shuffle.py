"""Shuffles of pixels and channels: factors, ranks, layouts, views."""

import torch

from fastnn.testing import Case, randn

F32, BF16 = (torch.float32,), (torch.bfloat16,)


def last(x):
    return x.to(memory_format=torch.channels_last)


def strided(x):
    return x[:, ::2, 1:].transpose(-1, -2)


CASES: list[Case] = [
    Case("PixelShuffle", (randn(2, 12, 3, 5),), {"upscale_factor": 2}),
    Case("PixelShuffle", (randn(2, 27, 1, 3),), {"upscale_factor": 3}, view=last, dtypes=BF16),
    Case("PixelShuffle", (randn(1, 80, 2, 3),), {"upscale_factor": 2}, view=last, dtypes=F32),
    Case("PixelShuffle", (randn(2, 8, 4, 3),), {"upscale_factor": 2}, view=strided, dtypes=BF16),
    Case("pixel_shuffle", (randn(3, 2, 4, 2, 3), 2), dtypes=BF16),
    Case("pixel_shuffle", (randn(4, 1, 1), 1), dtypes=BF16),
    Case("PixelUnshuffle", (randn(2, 3, 4, 6),), {"downscale_factor": 2}),
    Case("PixelUnshuffle", (randn(2, 5, 3, 6),), {"downscale_factor": 3}, view=last, dtypes=BF16),
    Case("PixelUnshuffle", (randn(1, 20, 4, 2),), {"downscale_factor": 2}, view=last, dtypes=F32),
    Case("pixel_unshuffle", (randn(2, 6, 5, 4), 2), view=strided, dtypes=BF16),
    Case("pixel_unshuffle", (randn(2, 1, 3, 4, 2), 2), dtypes=BF16),
    Case("ChannelShuffle", (randn(2, 6, 3, 5),), {"groups": 3}),
    Case("ChannelShuffle", (randn(2, 32, 3, 3),), {"groups": 2}, view=last, dtypes=BF16),
    Case("channel_shuffle", (randn(2, 4, 5), 2), dtypes=BF16),
    Case("channel_shuffle", (randn(2, 4, 2, 1, 3), 4), dtypes=BF16),
    Case("channel_shuffle", (randn(2, 8, 3, 4), 2), view=strided, dtypes=F32),
    Case("pixel_unshuffle", (randn(0, 1, 4, 2, grad=False), 2), dtypes=F32, stock="empty"),
    Case("channel_shuffle", (randn(1, 1, 1, 2, 1, 1), 1), dtypes=F32, stock="shape"),
]
