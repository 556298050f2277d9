"""Pooling: windows over the border, ties, nan, infinities, layouts, indices, empty batches."""

import math

import torch

from fastnn.testing import Case, randn, values

F32 = (torch.float32,)
BF16 = (torch.bfloat16,)
NAN, INF = math.nan, math.inf


def last(x):
    """The same values, channels last."""
    format = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return x.contiguous(memory_format=format)


def every_other(x):
    return x[..., ::2]


def swapped(x):
    """(N, L, C) seen as (N, C, L)."""
    return x.transpose(1, 2)


def odd_strides(x):
    """The one sample and the one channel have strides that no dense tensor has."""
    return x.as_strided(x.shape, (7, 1, *x.stride()[2:]))


def image(*shape):
    return lambda x: x.view(shape)


# A window of -inf, one with two nans, ties, an infinity in a corner.
SPECIAL = values(
    *(-INF, -INF, 1.0, NAN, 2.0, 2.0, -INF, -INF, NAN, 0.0, 2.0, 2.0),
    *(3.0, 3.0, -INF, 5.0, -0.0, 0.0, 3.0, 3.0, 5.0, INF, 0.0, -0.0),
)

CASES: list[Case] = [
    # ---- max
    Case("MaxPool2d", (randn(2, 3, 7, 9),), {"kernel_size": 2}),
    Case("MaxPool2d", (randn(2, 5, 9, 7),), {"kernel_size": 3, "stride": 2, "padding": 1}),
    Case(
        "MaxPool2d",
        (randn(2, 16, 9, 7),),
        {"kernel_size": 3, "stride": 2, "padding": 1, "return_indices": True},
        view=last,
    ),
    Case("MaxPool2d", (randn(1, 130, 4, 4),), {"kernel_size": 2}, view=last, dtypes=BF16),
    Case(
        "max_pool2d",
        (randn(1, 2, 7, 8), (3, 2), (1, 2), (1, 0), (2, 1), True, True),
        dtypes=F32,
    ),
    Case("max_pool2d", (randn(3, 8, 12), 2, 3, 1), view=every_other, dtypes=F32),
    Case("max_pool2d", (randn(1, 1, 5, 5), 2), view=odd_strides, dtypes=F32),
    Case("max_pool2d", (randn(0, 3, 4, 4), 2), dtypes=F32),
    Case("max_pool1d", (randn(1, 1, 300), 260, 100, 130), dtypes=F32),  # more than a byte counts
    Case(
        "max_pool2d",
        (SPECIAL, 2, 2, 1),
        {"return_indices": True},
        view=image(1, 1, 4, 6),
    ),
    Case(
        "max_pool2d",
        (SPECIAL, 2),
        {"return_indices": True},
        view=lambda x: last(x.view(1, 2, 2, 6)),
        dtypes=BF16,
    ),
    Case("MaxPool1d", (randn(2, 3, 21),), {"kernel_size": 4, "stride": 3}, dtypes=F32),
    Case("max_pool1d", (randn(2, 9, 3), 2), view=swapped, dtypes=F32),
    Case("max_pool1d", (randn(2, 9, 3, grad=False), 2), view=swapped, dtypes=F32),
    Case(
        "MaxPool3d",
        (randn(1, 2, 4, 5, 3),),
        {"kernel_size": 2, "ceil_mode": True, "return_indices": True},
        dtypes=F32,
    ),
    Case("MaxPool3d", (randn(1, 8, 3, 4, 5),), {"kernel_size": (1, 2, 3)}, view=last, dtypes=BF16),
    Case("max_pool3d", (randn(1, 2, 2, 2, 2), 2), autocast=torch.bfloat16, dtypes=BF16),
    Case("max_pool2d", (randn(1, 1, 4, 4), 2), dtypes=(torch.float64,), stock="float64"),
    Case(
        "max_pool1d", (randn(1, 1, 2), 2, 3, 1, 3, True), dtypes=F32, stock="in the padding alone"
    ),
]
