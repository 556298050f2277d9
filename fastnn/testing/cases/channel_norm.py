"""Batch, group and instance norm: layouts, shapes around the tile sizes, statistics, options."""

import torch

from fastnn.testing import Case, randn

F32 = (torch.float32,)
BF16 = (torch.bfloat16,)


def last(x):
    return x.contiguous(
        memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    )


def channels_last(*shape):
    """A leaf that is channels last."""
    return lambda dtype, device: last(randn(*shape)(dtype, device).detach()).requires_grad_()


def positive(*shape):
    return lambda dtype, device: torch.rand(shape).add(0.5).to(device, dtype)


def given(C, grad=False):
    """Running mean and variance."""
    return randn(C, grad=grad), positive(C)


CASES: list[Case] = [
    # ---- group norm
    *(
        Case("GroupNorm", (randn(*shape),), {"num_groups": G, "num_channels": shape[1], **options})
        for shape, G, options in (
            ((2, 6, 5, 4), 3, {}),
            ((2, 12, 7, 7), 2, {}),
            ((3, 8, 16), 8, {}),
            ((2, 10, 8, 8), 2, {"affine": False}),
            ((5, 12), 4, {}),  # no positions: runs of channels
            ((2, 4, 2, 3, 4), 1, {"eps": 0.1}),
            ((1, 2, 1, 1, 2, 2), 2, {"bias": False}),
        )
    ),
    *(
        Case(
            "GroupNorm",
            (randn(*shape, shift=shift),),
            {"num_groups": G, "num_channels": shape[1]},
            view=last,
            dtypes=dtypes,
        )
        for shape, G, shift, dtypes in (
            ((2, 6, 5, 4), 3, 0.0, BF16),  # a sector holds several groups
            ((2, 32, 3, 5), 2, 0.0, (torch.float32, torch.float16)),
            ((2, 6, 3, 5, 2), 2, 0.0, F32),
            ((2, 20, 20, 33), 1, 1e3, F32),  # in chunks
        )
    ),
    Case("group_norm", (randn(1, 4, 90, 93), 2, randn(4), randn(4)), dtypes=BF16),
    Case("group_norm", (randn(1, 4, 64, 128, shift=1e3), 1, randn(4), None), dtypes=F32),
    Case("group_norm", (randn(3, 4, 30, shift=1e3), 2)),
    Case("group_norm", (randn(3, 4, 30, scale=1e-4), 2)),
    Case("group_norm", (randn(3, 4, 5), 2, randn(4), randn(4)), view=lambda x: x.expand(3, 4, 5)),
    Case("group_norm", (randn(3, 5, 4), 2, randn(4)), view=lambda x: x.transpose(1, 2)),
    Case("group_norm", (randn(2, 4, 6, 5), 2), view=lambda x: last(x)[:, :, ::2]),
    Case("group_norm", (randn(0, 4, 6), 2), stock="empty"),
    Case("group_norm", (randn(2, 4, 6), 2), dtypes=(torch.float64,), stock="dtype"),
    # ---- instance norm
    Case("InstanceNorm1d", (randn(3, 5, 17),), {"num_features": 5}),
    Case("InstanceNorm1d", (randn(5, 17),), {"num_features": 5, "affine": True}),
    Case("InstanceNorm2d", (randn(2, 3, 7, 7),), {"num_features": 3, "affine": True}),
    Case("InstanceNorm2d", (randn(3, 8, 8),), {"num_features": 3, "track_running_stats": True}),
    Case(
        "InstanceNorm2d",
        (randn(2, 3, 8, 8),),
        {"num_features": 3, "track_running_stats": True, "affine": True},
        train=False,
    ),
    Case("InstanceNorm3d", (randn(2, 3, 2, 3, 4),), {"num_features": 3, "momentum": None}),
    Case("InstanceNorm2d", (randn(2, 4, 3, 5),), {"num_features": 4}, view=last, dtypes=F32),
    Case("instance_norm", (randn(2, 2, 5, 7), *given(2), None, None, False), dtypes=F32),
    Case("instance_norm", (randn(3, 2, 5, 7), *given(2), randn(2), None, True, 0.3)),
    Case("instance_norm", (randn(1, 2, 100, 101, shift=1e3),), dtypes=F32),
    Case("instance_norm", (randn(1, 2, 0),), stock="empty"),
    # ---- batch norm, in training
    *(
        Case(f"BatchNorm{d}d", (randn(*shape),), {"num_features": shape[1], **options})
        for d, shape, options in (
            (1, (40, 6), {}),
            (1, (2, 130), {"affine": False}),
            (1, (7, 5, 11), {"bias": False}),
            (2, (4, 6, 5, 4), {}),
            (2, (3, 5, 7, 7), {"track_running_stats": False}),
            (2, (1, 3, 8, 8), {"momentum": None}),
            (3, (2, 4, 3, 2, 4), {}),
        )
    ),
    Case("BatchNorm2d", (randn(4, 6, 5, 4),), {"num_features": 6}, view=last),
    Case("BatchNorm3d", (randn(2, 8, 3, 2, 4),), {"num_features": 8}, view=last, dtypes=F32),
    # In chunks: planes of several tiles, tiles of several planes, channels last.
    Case("BatchNorm2d", (randn(2, 2, 70, 120),), {"num_features": 2}, dtypes=BF16),
    Case("BatchNorm2d", (randn(170, 2, 7, 7, shift=1e3),), {"num_features": 2}, dtypes=F32),
    Case("BatchNorm2d", (randn(2, 16, 24, 24),), {"num_features": 16}, view=last, dtypes=BF16),
    Case("BatchNorm1d", (randn(2000, 9, shift=1e3),), {"num_features": 9}, dtypes=F32),
    # Small planes, of several channels in a run of memory.
    Case("BatchNorm2d", (randn(5, 16, 7, 7),), {"num_features": 16}),
    Case("BatchNorm2d", (randn(8, 16, 7, 7, shift=1e3),), {"num_features": 16}, dtypes=F32),
    Case("batch_norm", (randn(9, 8, 50), *given(8), None, randn(8), True, 0.3), dtypes=BF16),
    *(
        Case(
            "batch_norm",
            (randn(6, 4, 9, scale=scale, shift=shift), None, None, randn(4), randn(4), True),
        )
        for scale, shift in ((1.0, 1e3), (1e-4, 0.0), (1e4, 0.0))
    ),
    *(
        Case(
            "batch_norm",
            (randn(6, 3, 9, grad=x), None, None, randn(3, grad=w), randn(3, grad=b), True),
        )
        for x, w, b in (
            (False, True, True),
            (False, False, True),
            (False, True, False),
            (True, False, False),
            (True, True, False),
            (True, False, True),
        )
    ),
    Case(
        "batch_norm",
        (randn(5, 4, 6), None, None),
        {"training": True},
        view=lambda x: x.transpose(0, 2),
    ),
    # Running statistics, which are compared as results are: in one pass, and in chunks.
    Case("batch_norm", (randn(5, 3, 6, shift=1.0), *given(3), None, None, True, 0.3)),
    Case(
        "batch_norm",
        (randn(2, 3, 71, 64, shift=1.0), *given(3), None, None, True, 1.0),
        dtypes=F32,
    ),
    # ---- batch norm, in eval mode
    Case("BatchNorm1d", (randn(5, 6),), {"num_features": 6}, train=False),
    Case("BatchNorm2d", (randn(3, 6, 4, 5),), {"num_features": 6}, train=False, view=last),
    Case(
        "BatchNorm2d",
        (randn(3, 6, 4, 5),),
        {"num_features": 6, "track_running_stats": False},
        train=False,
    ),
    Case("BatchNorm3d", (randn(1, 2, 3, 4, 5),), {"num_features": 2, "affine": False}, train=False),
    *(
        Case("batch_norm", (randn(6, 3, 9, grad=x), *given(3), randn(3, grad=w), randn(3, grad=b)))
        for x, w, b in (
            (True, True, True),
            (False, True, True),
            (False, False, True),
            (False, True, False),
            (True, False, False),
        )
    ),
    Case("batch_norm", (randn(1, 3), *given(3), None, randn(3))),
    # ---- with an activation: its gradient from y, from x, and an activation with parameters
    *(
        Case("batch_norm_act", (randn(4, 6, 5, 4), *stats, randn(6), randn(6), training), options)
        for stats, training in (((None, None), True), (given(6), False))
        for options in ({}, {"activation": "silu"}, {"activation": "elu", "a": 0.5, "b": 1.0})
    ),
    Case("batch_norm_act", (randn(3, 6, 5, 4), None, None, None, randn(6), True), view=last),
    Case(
        "batch_norm_act",
        (randn(8, 16, 7, 7), None, None, randn(16), randn(16), True),
        {"activation": "silu"},
        dtypes=F32,
    ),
    Case(
        "batch_norm_add_relu",
        (randn(4, 16, 7, 9), randn(4, 16, 7, 9), None, None, randn(16), randn(16), True),
        dtypes=BF16,
    ),
    # The result twice, with two gradients: in one pass, of small planes, and in chunks.
    *(
        Case(
            "batch_norm_add_relu",
            (x, r, *stats, *parameters),
            {"twice": True},
        )
        for x, r, stats, parameters in (
            (randn(4, 6, 5, 4), randn(4, 6, 5, 4), (None, None), (randn(6), randn(6), True)),
            (randn(4, 6, 5, grad=False), randn(4, 6, 5), given(6), (None, None)),
            (randn(8, 16, 7, 7), randn(8, 16, 7, 7), (None, None), (randn(16), None, True)),
            (randn(2, 2, 70, 65), randn(2, 2, 70, 65), given(2), (randn(2), randn(2))),
            (
                channels_last(2, 16, 24, 24),
                channels_last(2, 16, 24, 24),
                (None, None),
                (randn(16), randn(16), True),
            ),
        )
    ),
    # Without relu: the residual has the gradient of the result, or the sum of two.
    *(
        Case("batch_norm_add_relu", (x, r, *stats, *parameters), {"relu": False, "twice": twice})
        for x, r, stats, parameters, twice in (
            (randn(4, 6, 5, 4), randn(4, 6, 5, 4), (None, None), (randn(6), randn(6), True), False),
            (randn(4, 6, 5, 4), randn(4, 6, 5, 4), given(6), (randn(6), randn(6), True), True),
            (randn(4, 6, 5, grad=False), randn(4, 6, 5), given(6), (None, None), True),
            (randn(4, 6, 5), randn(4, 6, 5, grad=False), given(6), (randn(6), None), True),
            (randn(8, 16, 7, 7), randn(8, 16, 7, 7), (None, None), (randn(16), None, True), True),
            (randn(2, 2, 70, 65), randn(2, 2, 70, 65), given(2), (randn(2), randn(2)), False),
            (randn(2, 2, 70, 65), randn(2, 2, 70, 65), given(2), (randn(2), None, True), True),
        )
    ),
    # The means of the planes, too: at once, of small planes, in chunks, in eval mode.
    *(
        Case(
            "batch_norm_act",
            (x, *stats, *parameters),
            {"means": True, "activation": act},
            view=view,
        )
        for x, stats, parameters, act, view in (
            (randn(4, 6, 5, 4), (None, None), (randn(6), randn(6), True), "silu", None),
            (randn(3, 6, 5), (None, None), (None, randn(6), True), "relu", None),
            (randn(4, 6, 5, 4), given(6), (randn(6), randn(6)), "hardswish", None),
            (randn(8, 16, 7, 7), (None, None), (randn(16), randn(16), True), "silu", None),
            (randn(3, 2, 70, 65), (None, None), (randn(2), randn(2), True), "hardswish", None),
            (randn(3, 6, 40, 36), (None, None), (randn(6), randn(6), True), "silu", last),
            (
                randn(3, 2, 70, 65, grad=False),
                (None, None),
                (randn(2), randn(2), True),
                "relu",
                None,
            ),
        )
    ),
    Case(
        "batch_norm_act",
        (randn(4, 6), None, None, None, None, True),
        {"means": True},
        stock="shape",
    ),
    *(
        Case(
            "batch_norm_act",
            (randn(2, 2, 70, 65, grad=x), None, None, randn(2, grad=w), randn(2, grad=b), True),
            {"activation": "sigmoid"},
            dtypes=F32,
        )
        for x, w, b in ((True, True, True), (False, False, True), (True, False, False))
    ),
    Case("group_norm_act", (randn(2, 6, 5, 4), 3, randn(6), randn(6))),
    Case("group_norm_act", (randn(2, 6, 5, 4), 2, randn(6), None, 1e-5, "mish"), view=last),
    Case("group_norm_act", (randn(2, 2, 90, 47), 1, randn(2), randn(2)), dtypes=F32),
    # The input, too, with a gradient of its own: at once, in chunks, in groups of one channel.
    *(
        Case("group_norm_act", (x, G, *given), {"skip": True, "activation": act}, view=view)
        for x, G, given, act, view in (
            (randn(2, 6, 5, 4), 3, (randn(6), randn(6)), "silu", None),
            (randn(3, 8, 16), 8, (None, None), None, None),
            (randn(2, 32, 3, 5), 2, (randn(32), randn(32)), "gelu", last),
            (randn(1, 4, 90, 93), 2, (randn(4), None), None, None),
            (randn(2, 2, 90, 47), 2, (randn(2), randn(2)), "silu", None),
            (randn(2, 20, 20, 33), 1, (randn(20), randn(20)), None, last),
            (randn(2, 6, 5, 4, grad=False), 3, (randn(6), randn(6)), "silu", None),
        )
    ),
    Case(
        "group_norm_act",
        (randn(2, 6, 5, 4), 3, randn(6), randn(6)),
        {"skip": True},
        view=lambda x: x.transpose(2, 3),
        stock="layout",
    ),
    *(
        Case(
            "batch_norm_add_relu",
            (
                randn(4, 6, 5, 4, grad=x),
                randn(4, 6, 5, 4, grad=r),
                *stats,
                randn(6),
                None,
                training,
            ),
        )
        for x, r, stats, training in (
            (True, True, (None, None), True),
            (True, False, (None, None), True),
            (False, True, (None, None), True),
            (True, True, given(6), False),
            (False, True, given(6), False),
        )
    ),
    Case(
        "batch_norm_add_relu",
        (randn(2, 2, 70, 66), randn(2, 2, 70, 66), None, None, randn(2), randn(2), True),
        dtypes=F32,
    ),
    Case(
        "batch_norm_add_relu",
        (randn(2, 3), randn(1, 3), *given(3)),
        stock="shape",
    ),
    # ---- declined
    Case("batch_norm", (randn(0, 3, 2), *given(3)), stock="empty"),
    Case("batch_norm", (randn(2, 3), *given(3)), dtypes=(torch.float64,), stock="dtype"),
]
