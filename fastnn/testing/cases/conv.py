"""Convolutions: groups, edges of the taps, strides, dilations, layouts, one sample, no elements."""

from typing import Any

import torch

from fastnn.testing import Case, randn
from fastnn.testing.cases.channel_norm import given as statistics

F32 = (torch.float32,)
BF16 = (torch.bfloat16,)
LOW = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *LOW)


def last(x):
    """x with its channels last in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def layer(name, shape, K, kernel, *, view=None, dtypes=F32, autocast=None, **options):
    options = {"in_channels": shape[-len(kernel) - 1], "out_channels": K, **options}
    options["kernel_size"] = kernel
    return Case(name, (randn(*shape),), options, view=view, dtypes=dtypes, autocast=autocast)


def function(name, x, w, b=None, *, stock=None, view=None, dtypes=F32, **options):
    """A call with makers for input and weight of these shapes. The bias has `b` elements."""
    inputs = (randn(*x), randn(*w), *((randn(b),) if b else ()))
    return Case(name, inputs, options, stock=stock, view=view, dtypes=dtypes)


DEPTHWISE = [
    layer("Conv1d", (2, 3, 9), 3, (3,), groups=3, padding=1, dtypes=BF16),
    layer("Conv1d", (3, 5), 3, (4,), groups=3, padding="same", dilation=2),
    layer("Conv2d", (1, 3, 5, 4), 3, (3, 3), groups=3, padding=1, dtypes=LOW),
    layer("Conv2d", (1, 5, 4, 3), 10, (2, 3), groups=5, stride=(2, 1), padding=(1, 2), dilation=2),
    layer("Conv2d", (2, 8, 5, 4), 8, (3, 3), groups=8, padding=1, view=last),
    layer("Conv2d", (2, 9, 4, 5), 9, (1, 3), groups=9, bias=False, view=last, dtypes=BF16),
    layer("Conv2d", (1, 3, 3, 4), 6, (2, 3), groups=3, view=last),
    layer(
        "Conv3d", (1, 2, 3, 2, 4), 2, (2, 2, 3), groups=2, padding=1, view=last, dilation=(2, 1, 1)
    ),
    layer("ConvTranspose1d", (2, 4, 3), 8, (3,), groups=4, stride=2, output_padding=1),
    layer("ConvTranspose2d", (1, 3, 3, 2), 3, (3, 2), groups=3, stride=(2, 3), padding=1),
    layer("ConvTranspose3d", (1, 2, 2, 1, 2), 2, (1, 2, 2), groups=2, stride=2, view=last),
    # wider than the kernels whose columns are unrolled, and more taps than a program sums
    layer("Conv1d", (1, 2, 80), 2, (70,), groups=2, padding="valid"),
    # more positions than a program has
    layer("Conv1d", (2, 2, 1100), 2, (3,), groups=2, padding=2),
    layer("Conv2d", (1, 80, 3, 2), 80, (3, 1), groups=80, padding=(1, 0), view=last),
]

DENSE = [
    # few pairs of channels
    function("conv1d", (2, 4, 9), (6, 2, 3), 6, stride=2, groups=2, dtypes=(*F32, *BF16)),
    layer("Conv1d", (2, 5, 9), 6, (3,), padding=1, dtypes=BF16),
    layer("Conv2d", (2, 5, 6, 4), 6, (3, 2), stride=2, padding=1, dilation=2, dtypes=LOW),
    layer("Conv2d", (1, 10, 4, 3), 12, (2, 2), groups=2, padding="valid", view=last),
    layer("Conv2d", (2, 16, 3, 4), 8, (3, 3), padding="same", view=last),
    layer("Conv2d", (3, 5, 8), 17, (1, 1), bias=False),
    layer("Conv2d", (2, 9, 4, 3), 8, (1, 1), view=last),  # the product of two matrices
    layer(
        "Conv3d",
        (2, 5, 2, 3, 2),
        5,
        (2, 1, 2),
        stride=(1, 2, 1),
        padding=(1, 0, 0),
        view=last,
        dilation=(2, 1, 1),
    ),
    layer("Conv2d", (1, 70, 3, 4), 66, (1, 2)),  # past a tile of both channels
    layer("Conv1d", (1, 5, 300), 4, (2,)),  # positions in several parts
    layer("ConvTranspose1d", (6, 4), 5, (3,), stride=2, padding=1, output_padding=1),
    layer("ConvTranspose2d", (2, 8, 2, 3), 16, (2, 3), stride=(2, 1), dilation=(1, 2), view=last),
    layer("ConvTranspose3d", (1, 6, 2, 1, 2), 10, (2, 1, 2), groups=2, stride=2, bias=False),
    *(
        layer("Conv2d", (1, 5, 4, 3), 6, (2, 2), autocast=low, padding_mode=mode, padding=1)
        for low, mode in ((torch.bfloat16, "circular"), (torch.float16, "zeros"))
    ),
]

# Shapes of input, weight and bias, and whether channels are last.
FOLLOWED: list[tuple[Any, ...]] = [
    ((2, 3, 9), (3, 1, 3), 3, None, {"groups": 3, "padding": 1}),
    ((2, 8, 5, 4), (8, 1, 3, 3), None, last, {"groups": 8, "padding": "same"}),
    ((1, 2, 3, 2, 4), (2, 1, 2, 2, 3), 2, last, {"groups": 2, "stride": (1, 2, 1)}),
    ((2, 5, 6, 4), (6, 5, 3, 2), 6, None, {"stride": 2, "padding": 1, "dilation": (1, 2)}),
    ((2, 16, 3, 4), (8, 16, 2, 2), 8, last, {}),
    ((2, 16, 3, 4), (24, 16, 1, 1), 24, last, {}),  # the product of two matrices
]
ACTS: list[dict[str, Any]] = [{}, {"activation": "silu"}, {"activation": "elu", "a": 0.5, "b": 1.0}]


def followed(name, shape, act, grad=True, dtypes=FLOATS):
    """A row of `FOLLOWED`. A norm has statistics, weight and bias."""
    x, w, b, view, options = shape
    K = w[0]
    norm = (*statistics(K), randn(K, grad=grad), randn(K, grad=grad))
    bias = randn(b, grad=grad) if b else None
    inputs = (randn(*x, grad=grad), randn(*w, grad=grad), bias)
    given = (*inputs, *(norm if name == "conv_batch_norm_act" else ()))
    return Case(name, given, {**options, **act}, view=view, dtypes=dtypes)


AFTER = [
    *(
        followed(name, shape, act, dtypes=dtypes)
        for name in ("conv_act", "conv_batch_norm_act")
        for i, shape in enumerate(FOLLOWED)
        for act, dtypes in ((ACTS[i % 3], (FLOATS[i % 3],)), (ACTS[(i + 1) % 3], F32))
    ),
    *(
        followed("conv_batch_norm_act", shape, {}, dtypes=BF16 if i else F32)
        for i, shape in enumerate(FOLLOWED[1:5])
    ),
    # no gradient is wanted, so that nothing is kept; only some are wanted
    *(
        followed(name, shape, {}, grad=False, dtypes=BF16)
        for name in ("conv_act", "conv_batch_norm_act")
        for shape in (FOLLOWED[1], FOLLOWED[4])
    ),
    *(
        Case(
            "conv_batch_norm_act",
            (
                randn(1, 4, 5, grad=x), randn(4, 4 // groups, 2, grad=w), None,
                *statistics(4), randn(4, grad=s), randn(4, grad=not s),
            ),
            {"groups": groups, "activation": "tanh"},
            dtypes=F32,
        )
        for groups, x, w, s in (
            (4, False, False, True), (1, True, False, False), (4, False, True, False),
        )
    ),
    function("conv_act", (3, 5, 4), (5, 3, 2, 2), 5, activation="relu"),  # one sample
    Case(
        "conv_batch_norm_act",
        (randn(3, 4), randn(4, 3, 2), None, *statistics(3)),
        stock="shape",
    ),
]  # fmt: skip

STOCK = [
    function("conv2d", (0, 3, 4, 4), (3, 1, 3, 3), 3, groups=3, stock="empty"),
    function("conv1d", (1, 3, 4), (3, 1, 3), groups=3, dtypes=(torch.float64,), stock="dtype"),
]

CASES: list[Case] = [*DEPTHWISE, *DENSE, *AFTER, *STOCK]
