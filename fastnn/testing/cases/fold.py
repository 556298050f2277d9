"""Fold and unfold: windows over the border, gaps, dilation, layouts, views."""

import torch

from fastnn.testing import Case, randn

F32, BF16 = (torch.float32,), (torch.bfloat16,)


def last(x):
    return x.to(memory_format=torch.channels_last)


def window(kernel_size, dilation=1, padding=0, stride=1, **size):
    return size | {
        "kernel_size": kernel_size, "dilation": dilation, "padding": padding, "stride": stride,
    }  # fmt: skip


CASES: list[Case] = [
    Case("Unfold", (randn(2, 3, 5, 7),), window(3, padding=1)),
    Case("Unfold", (randn(2, 3, 6, 18),), window((2, 3), (2, 1), (0, 3), (1, 2)), dtypes=BF16),
    Case("Unfold", (randn(3, 6, 5),), window((1, 4), 1, 2, 3), dtypes=F32),
    Case("Unfold", (randn(2, 8, 4, 4),), window(2, padding=1), view=last, dtypes=BF16),
    Case("unfold", (randn(0, 2, 4, 4), 2), dtypes=BF16),
    Case("unfold", (randn(1, 2, 5, 4), 2), view=lambda x: x.expand(3, 2, 5, 4), dtypes=BF16),
    Case("unfold", (randn(4, 3, 1, 1), 1), view=lambda x: x[::2, 1:], dtypes=BF16),
    Case("Fold", (randn(2, 27, 35),), window(3, padding=1, output_size=(5, 7))),
    Case("Fold", (randn(2, 12, 8),), window(2, 2, (1, 0), (1, 3), output_size=(4, 8)), dtypes=F32),
    Case("Fold", (randn(4, 4),), window(2, stride=3, output_size=5), dtypes=BF16),  # gaps
    Case(
        "fold",
        (randn(9, 16, 2), (4, 4), 3),
        view=lambda x: x.permute(2, 0, 1)[..., ::4],
        dtypes=BF16,
    ),
    Case("fold", (randn(0, 4, 9), (4, 4), 2), dtypes=BF16),
]
