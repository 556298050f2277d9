"""Dropout: every width of access, past a block, odd and single elements, layouts, no-ops."""

import torch

from fastnn.testing import Case, randn, values

SPECIAL = values(0.0, -0.0, 1e4, -1e4, float("inf"), -float("inf"), float("nan"), 1.0)


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


CASES: list[Case] = [
    *(
        Case("Dropout", (shape,), {"p": 0.3})
        for shape in (
            randn(1032),  # accesses 8 wide in 16 bits, past a block
            randn(2, 1030),  # accesses 4 and 2 wide
            randn(3, 343),  # accesses 1 wide
            randn(2, 3, 5),
            randn(1),
            randn(),
            randn(0, 4),
            SPECIAL,
        )
    ),
    Case("Dropout", (randn(4, 6),), {"p": 1}),
    Case("Dropout", (SPECIAL,), {"p": 1.0}),
    Case("Dropout", (randn(4, 6),), {"p": 0.0}),
    Case("Dropout", (randn(4, 6),), train=False),
    Case("Dropout", (randn(4, 6),), view=lambda x: x.t()),
    Case("Dropout", (randn(2, 4, 3, 5),), view=channels_last),
    Case("Dropout", (randn(65),), view=lambda x: x[1:]),  # a pointer that is not aligned
    Case("Dropout", (randn(4, 6),), view=lambda x: x[:, ::2], stock="layout"),
    Case("Dropout", (randn(4, 1),), view=lambda x: x.expand(4, 6), stock="layout"),
    Case("Dropout", (randn(5, 3),), view=lambda x: x.t(), stock="layout"),
    Case("Dropout", (randn(4, 6),), autocast=torch.bfloat16),
    Case("Dropout", (randn(4, 6),), dtypes=(torch.float64,), stock="dtype"),
    Case("dropout", (randn(3, 350),), {"p": 0.6, "inplace": True}, view=lambda x: x * 1),
    Case("dropout", (randn(3, 5),), {"p": 1.0, "inplace": True}, view=lambda x: x * 1),
    Case(
        "dropout", (randn(3, 5),), {"inplace": True}, view=lambda x: (x * 1)[:2], stock="autograd"
    ),
    Case("Dropout1d", (randn(3, 5, 9),)),
    Case("Dropout1d", (randn(40, 9),), {"p": 0.3}),
    Case("Dropout1d", (randn(3, 5, 8),), view=lambda x: x.transpose(0, 1), stock="layout"),
    Case("Dropout2d", (randn(3, 11, 7, 7),), {"p": 0.3}),
    Case("Dropout2d", (randn(2, 3, 33, 64),)),  # a channel past a tile
    Case("Dropout2d", (randn(2, 130, 3, 11),), view=channels_last),  # channels past a tile
    Case("Dropout2d", (randn(2, 3, 4, 4),), {"p": 1.0}),
    Case("Dropout2d", (randn(2, 3, 4, 4),), {"p": 0.0}),
    Case("Dropout2d", (randn(2, 3, 4, 4),), train=False),
    Case("Dropout2d", (randn(0, 3, 4, 4),)),
    Case("Dropout2d", (randn(2, 3, 4, 4),), autocast=torch.float16),
    Case("dropout2d", (randn(4, 5, 3, 3),), {"inplace": True}, view=lambda x: x * 1),
    Case("Dropout3d", (randn(2, 3, 2, 3, 4),)),
    Case("Dropout3d", (randn(9, 2, 3, 4),), {"p": 0.3}),
    Case("AlphaDropout", (randn(3, 700),), {"p": 0.2}),
    Case("AlphaDropout", (SPECIAL,)),
    Case("AlphaDropout", (randn(4, 6),), {"p": 1.0}),
    Case("AlphaDropout", (randn(4, 6),), train=False),
    Case("AlphaDropout", (randn(4, 6),), view=lambda x: x.t()),
    Case(
        "alpha_dropout", (randn(5, 7),), {"training": True, "inplace": True}, view=lambda x: x * 1
    ),
    Case("FeatureAlphaDropout", (randn(3, 5, 9),)),
    Case("FeatureAlphaDropout", (randn(7, 9),), {"p": 0.2}),
    Case("FeatureAlphaDropout", (randn(2, 9, 3, 4),), {"p": 0.2}, view=channels_last),
]
