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


def places(*shape, high):
    """Maker of positions below `high`, in each plane of ([N], C, *) all different."""

    def make(dtype, device):
        plane = shape[1:] if len(shape) == 2 else shape[2:]
        order = [torch.randperm(high)[: math.prod(plane)] for _ in range(math.prod(shape))]
        return torch.stack(order).flatten()[: math.prod(shape)].view(shape).to(device)

    return make


def repeated(dtype, device):
    """Positions of which some occur more than once: the last of their elements is taken."""
    return torch.tensor([[4, 4, 1, 0, 4, 1, 8, 8, 4], [0] * 9]).view(1, 2, 3, 3).to(device)


def samples(dtype, device):
    """Those that shift the windows of (2, 3) planes."""
    return torch.rand(2, 3, 2).to(device, dtype)


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
    # more elements than a byte counts
    Case("max_pool1d", (randn(1, 1, 600), 260, 100, 130), view=every_other, dtypes=F32),
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
    Case("max_pool2d", (randn(1, 1, 4, 4), 2), dtypes=(torch.float64,), stock="dtype"),
    Case("max_pool1d", (randn(1, 1, 2), 2, 3, 1, 3, True), dtypes=F32, stock="option"),
    # ---- mean
    Case(
        "AvgPool2d",
        (randn(2, 3, 7, 8),),
        {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
    ),
    Case(
        "AvgPool2d",
        (randn(1, 8, 5, 6),),
        {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False},
        view=last,
        dtypes=BF16,
    ),
    Case("avg_pool2d", (randn(2, 5, 6), 2, 3, 0, True, True, -3), dtypes=F32),
    Case("avg_pool2d", (SPECIAL, 2, 1), view=image(1, 1, 4, 6), dtypes=F32),
    Case("AvgPool1d", (randn(2, 5, 3),), {"kernel_size": 3}, view=swapped, dtypes=F32),
    Case("avg_pool1d", (randn(1, 1, 80), 40, 7, 20), dtypes=BF16),  # a sum of float64
    Case(
        "AvgPool3d", (randn(1, 4, 4, 5, 3),), {"kernel_size": 2, "stride": 1}, view=last, dtypes=F32
    ),
    Case("avg_pool3d", (randn(1, 2, 2, 3, 2), 2, 1, 1), dtypes=F32),
    Case("avg_pool3d", (randn(1, 1, 2, 2, 2), 2), autocast=torch.bfloat16, dtypes=BF16),
    # ---- adaptive
    Case("AdaptiveAvgPool2d", (randn(2, 3, 7, 5),), {"output_size": 1}, view=last),
    Case("AdaptiveAvgPool2d", (randn(1, 3, 7, 5),), {"output_size": (3, None)}, dtypes=F32),
    Case("adaptive_avg_pool1d", (randn(2, 4), 7), dtypes=F32),  # more windows than elements
    Case("AdaptiveAvgPool3d", (randn(1, 2, 4, 3, 5),), {"output_size": 1}, view=last, dtypes=F32),
    Case(
        "adaptive_avg_pool3d",
        (randn(1, 2, 4, 3, 5), 2),
        view=last,
        autocast=torch.bfloat16,
        dtypes=BF16,
    ),
    Case(
        "AdaptiveMaxPool2d",
        (randn(2, 3, 7, 5),),
        {"output_size": (3, 2), "return_indices": True},
        view=last,
    ),
    Case("adaptive_max_pool2d", (SPECIAL, (2, 4), True), view=image(1, 1, 4, 6), dtypes=F32),
    Case("AdaptiveMaxPool1d", (randn(2, 6, 3),), {"output_size": 3}, view=swapped, dtypes=F32),
    Case("AdaptiveMaxPool3d", (randn(2, 3, 4, 5),), {"output_size": 2}, dtypes=F32),
    Case("adaptive_avg_pool3d", (randn(1, 1, 2, 3, 3), (1, 2, 2)), dtypes=F32),
    Case("adaptive_max_pool1d", (randn(2, 7), 3), dtypes=F32),
    Case("adaptive_max_pool2d", (randn(1, 2, 4, 5), (2, 3)), dtypes=F32),
    Case("adaptive_avg_pool2d", (randn(1, 2, 3, 3, grad=False), 0), dtypes=F32, stock="empty"),
    # ---- power means
    Case("LPPool2d", (randn(2, 3, 5, 7),), {"norm_type": 2, "kernel_size": 2, "ceil_mode": True}),
    Case("LPPool2d", (randn(1, 8, 4, 5),), {"norm_type": 1, "kernel_size": 2}, view=last),
    Case("lp_pool2d", (randn(1, 1, 4, 4, shift=3.0), 3.5, (2, 3), 1), dtypes=F32),
    Case("lp_pool2d", (SPECIAL, 2, 2), view=image(1, 1, 4, 6), dtypes=F32),
    Case("LPPool1d", (randn(2, 3, 9),), {"norm_type": math.inf, "kernel_size": 2}, dtypes=F32),
    Case("lp_pool1d", (SPECIAL, -math.inf, 3, 2), view=image(1, 2, 12), dtypes=BF16),
    Case("LPPool3d", (randn(1, 2, 3, 4, 5),), {"norm_type": 2, "kernel_size": 2}, dtypes=F32),
    Case("lp_pool3d", (randn(1, 2, 2, 2, 2), 2, 2), autocast=torch.bfloat16, dtypes=BF16),
    # ---- fractional
    Case("fractional_max_pool2d", (randn(2, 3, 9, 8), 2), {"output_size": (4, 5)}),
    Case("fractional_max_pool3d", (randn(0, 1, 4, 5, 4), 2), {"output_size": 2}, dtypes=F32),
    Case(
        "fractional_max_pool2d",
        (randn(2, 3, 9, 8), 2),
        {"output_size": (4, 5), "return_indices": True, "_random_samples": samples},
        view=last,
        dtypes=F32,
    ),
    Case(
        "fractional_max_pool2d",
        (SPECIAL, (2, 4)),
        {"output_size": (1, 2), "return_indices": True},
        view=image(1, 1, 4, 6),
        dtypes=F32,
    ),
    Case(
        "FractionalMaxPool2d",
        (randn(2, 3, 9, 8),),
        {"kernel_size": 3, "output_ratio": (0.5, 0.6)},
        view=last,
        autocast=torch.bfloat16,
        dtypes=BF16,
    ),
    Case(
        "FractionalMaxPool3d",
        (randn(2, 5, 6, 7),),
        {"kernel_size": 2, "output_size": (2, 4, 3), "return_indices": True},
        dtypes=F32,
    ),
    # ---- unpooling
    Case("max_unpool2d", (randn(2, 3, 2, 3), places(2, 3, 2, 3, high=24), 2), view=last),
    Case(
        "max_unpool2d",
        (randn(1, 2, 3, 3), repeated, 3, 1, 1, [3, 3]),
        dtypes=F32,
    ),
    Case("MaxUnpool1d", (randn(3, 4), places(3, 4, high=11)), {"kernel_size": 3}, dtypes=F32),
    Case(
        "max_unpool3d",
        (randn(1, 2, 2, 1, 2), places(1, 2, 2, 1, 2, high=32), 2),
        dtypes=F32,
    ),
    Case(
        "MaxUnpool3d",
        (randn(1, 2, 2, 1, 2), places(1, 2, 2, 1, 2, high=32)),
        {"kernel_size": 2},
        autocast=torch.bfloat16,
        dtypes=BF16,
    ),
]
