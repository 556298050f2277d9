"""Interpolation: each mode, both ways, odd ratios, given scales, layouts, views, special values."""

from dataclasses import replace

import torch

from fastnn.testing import Case, randn, values

F32, BF16 = (torch.float32,), (torch.bfloat16,)
NAN, INF = float("nan"), float("inf")


def last(x):
    return x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def resize(made, mode, size=None, scale_factor=None, align_corners=None, recompute=None, **fields):
    options = {"mode": mode, "size": size, "scale_factor": scale_factor}
    options |= {"align_corners": align_corners, "recompute_scale_factor": recompute}
    given = {k: v for k, v in options.items() if v is not None}
    return Case("interpolate", (made,), given, **{"dtypes": BF16, **fields})


def smooth(made, mode, **fields):
    """Antialiased. PyTorch has it in float32 alone on a CPU."""
    row = resize(made, mode, **{"dtypes": F32, **fields})
    return replace(row, options=row.options | {"antialias": True})


def flat(x):
    return x.view(1, 1, 1, -1)


CASES: list[Case] = [
    Case("Upsample", (randn(1, 2, 3, 33),), {"scale_factor": 2, "mode": "bilinear"}),
    Case("Upsample", (randn(2, 3, 7),), {"size": 16, "mode": "linear", "align_corners": True}),
    Case("UpsamplingNearest2d", (randn(2, 3, 4, 5),), {"scale_factor": 3}, dtypes=BF16),
    Case("UpsamplingBilinear2d", (randn(2, 3, 4, 5),), {"size": (7, 9)}),
    resize(randn(2, 3, 10), "nearest", scale_factor=0.35),
    resize(randn(2, 3, 10), "nearest", scale_factor=0.35, recompute=True),
    resize(randn(1, 2, 10), "nearest-exact", scale_factor=1 / 3),
    resize(randn(1, 2, 7, 5), "nearest-exact", size=(3, 17)),
    resize(randn(1, 2, 3, 4, 5), "nearest", size=(2, 9, 5), dtypes=F32),
    resize(randn(2, 3, 11), "linear", size=4),
    resize(randn(2, 3, 3), "linear", scale_factor=2.7, dtypes=F32),
    resize(randn(1, 2, 9, 11), "bilinear", size=(5, 3)),
    resize(randn(1, 2, 9, 5), "bilinear", size=(20, 2), align_corners=True),
    resize(randn(1, 2, 1, 6), "bilinear", size=(4, 1), align_corners=True, dtypes=F32),
    resize(randn(1, 2, 1, 6), "bilinear", size=(1, 13), dtypes=F32),
    resize(randn(1, 2, 4, 4), "bilinear", scale_factor=(2.5, 0.6)),
    resize(randn(1, 1, 2, 3), "bilinear", size=(17, 20), dtypes=F32),
    resize(randn(1, 2, 3, 4), "bicubic", scale_factor=2, dtypes=(torch.float32, torch.bfloat16)),
    resize(randn(1, 1, 7, 9), "bicubic", size=(3, 4)),
    resize(randn(1, 1, 3, 2), "bicubic", size=(5, 6), align_corners=True),
    resize(randn(1, 1, 2, 3, 2), "trilinear", scale_factor=2),
    resize(randn(1, 2, 4, 3, 5), "trilinear", size=(2, 7, 1), align_corners=True, dtypes=F32),
    *(
        resize(randn(1, 24, 2, 3), mode, size=(4, 2), view=last)
        for mode in ("nearest", "bilinear", "bicubic")
    ),
    resize(randn(2, 3, 3, 5), "bilinear", scale_factor=2, view=last),
    resize(randn(1, 8, 2, 3, 2), "trilinear", size=3, view=last),
    resize(randn(4, 6, 10), "linear", size=7, view=lambda x: x[::2, 1:].transpose(1, 2)),
    resize(randn(2, 1, 4, 3), "bilinear", size=6, view=lambda x: x.expand(2, 5, 4, 3)),
    resize(
        randn(2, 4, 1, 6), "bilinear", size=3,
        view=lambda x: x.as_strided((2, 4, 1, 6), (24, 1, 7, 4)),
    ),
    resize(values(1.0, NAN, 3.0, -INF, 5.0), "linear", size=7, view=lambda x: x.view(1, 1, 5)),
    resize(values(1.0, NAN, 3.0, 4.0, 5.0), "linear", size=5, view=lambda x: x.view(1, 1, 5)),
    resize(values(1.0, INF, 3.0, 2.0), "bicubic", size=(1, 6), view=lambda x: x.view(1, 1, 1, 4)),
    resize(randn(0, 2, 4, 4), "bilinear", size=3),
    resize(randn(1, 2, 3, 3), "bicubic", size=3),
    resize(randn(2, 3, 4, 4), "bilinear", scale_factor=2, autocast=torch.bfloat16),
    resize(randn(2, 3, 4, 6), "area", size=2),
    resize(randn(2, 3, 7), "area", scale_factor=0.6, dtypes=F32),
    resize(randn(1, 8, 5, 4), "area", size=(3, 7), view=last),
    resize(randn(1, 2, 3, 4, 5), "area", size=(2, 3, 4), autocast=torch.bfloat16, dtypes=F32),
    Case(
        "interpolate", (randn(1, 2, 4, 4),), {"size": 2, "mode": "lanczos", "antialias": True},
        dtypes=F32, stock="option",
    ),
    resize(randn(2, 3, 4, 4), "nearest", size=2, dtypes=(torch.float64,), stock="dtype"),
    smooth(randn(1, 2, 9, 7), "bilinear", size=(4, 3)),
    smooth(randn(2, 3, 5, 4), "bilinear", size=(7, 9)),
    smooth(randn(1, 1, 13, 3), "bilinear", size=(1, 2), align_corners=True),
    smooth(randn(1, 2, 6, 11), "bilinear", scale_factor=(0.55, 1.3)),
    smooth(randn(1, 2, 6, 11), "bilinear", scale_factor=0.3, recompute=True),
    smooth(randn(1, 2, 8, 17), "bicubic", size=(5, 3)),
    smooth(randn(1, 1, 3, 4), "bicubic", size=(8, 5), align_corners=True),
    smooth(randn(1, 1, 70, 2), "bicubic", size=(3, 2)),
    smooth(randn(1, 2, 4, 5), "bicubic", size=(4, 5)),
    smooth(randn(1, 8, 6, 5), "bilinear", size=(2, 7), view=last),
    smooth(randn(2, 3, 5, 6), "bicubic", scale_factor=0.5, view=last),
    smooth(randn(6, 2, 7, 5), "bilinear", size=3, view=lambda x: x[::2, :, 1:].transpose(2, 3)),
    smooth(randn(0, 2, 4, 4), "bilinear", size=3),
    smooth(values(1.0, NAN, 3.0, -INF, 5.0, 2.0), "bilinear", size=(1, 4), view=flat),
    smooth(randn(1, 2, 4, 4), "bilinear", scale_factor=1.2, stock="option"),
]  # fmt: skip
