"""Normalize: rows of one element, in one tile and in several, every dimension, layouts, zeros."""

import torch

from fastnn.testing import Case, randn, values
from fastnn.testing.cases.distance import duplicate
from fastnn.testing.cases.loss import channels_last, halved, transposed

F32 = (torch.float32,)
NAN = float("nan")

CASES: list[Case] = [
    *(
        Case("normalize", (randn(*shape),), {"p": p, "dim": dim})
        for shape, dim in (
            ((9, 40), 1),
            ((3, 1), 1),
            ((130, 10), -1),
            ((2, 5, 24), -1),
            ((2, 19, 6, 8), 1),
            ((7, 3), 0),
        )
        for p in (2.0, 1)
    ),
    Case("normalize", (randn(2, 4097),)),
    Case("normalize", (randn(1, 4100, 3),), {"p": 1}),
    # warps share the classes of a run of positions
    Case("normalize", (randn(1, 70, 5, 7),), {"p": 1}),
    Case("normalize", (randn(2, 130, 4, 16),)),
    Case("normalize", (randn(17),), {"dim": 0}),
    Case("normalize", (randn(2, 16, 6, 8),), view=channels_last),
    Case("normalize", (randn(2, 3, 4, 5),), {"dim": 2}, view=channels_last),
    Case("normalize", (randn(9, 4),), view=transposed),
    Case("normalize", (randn(4, 18),), view=halved),
    Case("normalize", (randn(3, 8, scale=1e-3),), {"eps": 0.1}),
    Case("normalize", (randn(3, 8, scale=1e4),)),
    # a row of zeros; of float16, PyTorch rounds eps to 0 and makes it nan
    Case("normalize", (duplicate(3, 7),), dtypes=(torch.float32, torch.bfloat16)),
    Case("normalize", (duplicate(3, 7),), {"p": 1, "eps": 1e-3}),
    Case("normalize", (duplicate(3, 7),), {"eps": 0.0}, dtypes=F32),
    Case("normalize", (values(1.0, NAN),), {"dim": 0}),
    Case("normalize", (randn(2, 8),), autocast=torch.bfloat16),
    Case("normalize", (randn(0, 5),), stock="empty"),
    Case("normalize", (randn(3, 0),), stock="empty"),
    Case("normalize", (randn(),), {"dim": 0}, stock="shape"),
    Case("normalize", (randn(3, 4),), {"p": 3}, stock="option"),
    Case("normalize", (randn(3, 4, 2),), {"dim": (1, 2)}, stock="option"),
]
