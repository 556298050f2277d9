"""Pads: each mode and number of dimensions, the largest and negative ones, layouts, views."""

import torch

from fastnn.testing import Case, randn, values

F32, BF16 = (torch.float32,), (torch.bfloat16,)
CL = torch.channels_last
NAN, INF = float("nan"), float("inf")


def last(x):
    return x.to(memory_format=CL if x.dim() == 4 else torch.channels_last_3d)


def pad(made, pads, mode="constant", value=None, **fields):
    fields = {"dtypes": BF16, **fields}
    return Case("pad", (made, tuple(pads), mode, value), **fields)


MODES = ("constant", "reflect", "replicate", "circular")

CASES: list[Case] = [
    Case("ConstantPad1d", (randn(2, 3, 7),), {"padding": (2, 1), "value": 1.7}),
    Case("ConstantPad2d", (randn(2, 3, 5, 65),), {"padding": (1, 2, 3, 0), "value": -0.3}),
    Case("ConstantPad3d", (randn(1, 2, 3, 4, 5),), {"padding": 1, "value": INF}, dtypes=BF16),
    Case("ZeroPad1d", (randn(3, 8),), {"padding": 8}, dtypes=BF16),
    Case("ZeroPad2d", (randn(2, 8, 6, 8),), {"padding": (8, 0, 0, 1)}, dtypes=BF16),
    Case("ZeroPad3d", (randn(2, 3, 4, 5),), {"padding": (-1, -2, 3, -4, 0, 1)}, dtypes=F32),
    Case("ReflectionPad1d", (randn(2, 3, 7),), {"padding": (6, 6)}),
    Case("ReflectionPad2d", (randn(2, 3, 5, 66),), {"padding": (1, 1, 4, 2)}),
    Case("ReflectionPad3d", (randn(2, 3, 2, 4, 5),), {"padding": 1}, dtypes=F32),
    Case("ReplicationPad1d", (randn(3, 1),), {"padding": (3, 2)}, dtypes=BF16),
    Case("ReplicationPad2d", (randn(2, 3, 5, 7),), {"padding": (1, 9, 2, 0)}),
    Case("ReplicationPad3d", (randn(1, 2, 3, 2, 1),), {"padding": 2}, dtypes=F32),
    Case("CircularPad1d", (randn(2, 3, 7),), {"padding": (7, 7)}, dtypes=F32),
    Case("CircularPad2d", (randn(2, 3, 5, 7),), {"padding": (1, 2, 5, 0)}),
    Case("CircularPad3d", (randn(2, 2, 3, 4),), {"padding": (1, 0, 2, 1, 0, 2)}, dtypes=F32),
    *(pad(randn(2, 8, 4, 5), (1, 2, 1, 0), mode, view=last) for mode in MODES),
    *(pad(randn(2, 3, 3, 4, 5), (1, 2, 1, 0, 2, 1), mode, view=last) for mode in MODES),
    *(
        pad(values(1.0, NAN, 3.0, -INF, 5.0, 6.0), (2, 1), mode, view=lambda x: x.view(2, 3))
        for mode in MODES
    ),
    *(pad(randn(2, 3, 4), (-1, 2), mode, dtypes=F32) for mode in MODES[:3]),
    *(pad(randn(2, 3, 4), (-4, 2), mode, dtypes=F32) for mode in MODES[:3]),
    *(pad(randn(1, 2, 4, 3), (0, 1, 2, -3), mode, dtypes=F32) for mode in MODES[1:3]),
    *(
        pad(randn(4, 9, 6), (1, 1, 2, 2), mode, view=lambda x: x[:, ::2].transpose(0, 2))
        for mode in MODES
    ),
    pad(randn(1, 3, 4), (2, 1), "reflect", view=lambda x: x.expand(2, 3, 4)),
    pad(
        randn(2, 4, 1, 6),
        (1, 1, 0, 0),
        "replicate",
        view=lambda x: x.as_strided((2, 4, 1, 6), (24, 1, 7, 4)),
    ),
    pad(randn(2, 3), (0, 0), value=5.0, view=lambda x: x.t(), stock="gate"),
    pad(randn(), (), stock="gate"),
    pad(randn(2, 3, 4, 5), (0, 1, 1, 0, 2, -1, 1, 1), value=0.1, dtypes=F32),
    pad(randn(0, 3, 4), (1, 1)),
    pad(randn(2, 3, 0), (1, 2), value=2.0),
    pad(randn(1, 1, 4), (-3, -1), stock="gate"),
    pad(randn(2, 3, 4), (1, 1), "reflect", autocast=torch.bfloat16),
    pad(randn(2, 3, 4, 5), (1, 1, 1, 1), "reflect", autocast=torch.bfloat16, dtypes=F32),
    pad(randn(2, 2, 3, 3), (1,) * 6, "reflect", autocast=torch.bfloat16),
    pad(randn(2, 3, 4), (1, 1), "circular", autocast=torch.bfloat16),
    pad(randn(0, 3, 4, 4), (1,) * 4, "reflect"),
    pad(randn(0, 3, 4), (1, 1), "circular", dtypes=F32),
    pad(randn(0, 4, 4), (1,) * 4, "circular", dtypes=F32, stock="empty"),  # one sample
    pad(randn(1, 1, 1, 1, 1, 2), (1, 1), stock="shape"),
    pad(randn(2, 3), (1, 1), dtypes=(torch.float64,), stock="dtype"),
    pad(randn(1, 2, 5), (-1, 1), "circular", stock="option"),
]
