"""Product with a broadcast scale: layouts of tiles, gradients of some inputs, stock calls."""

import torch

from fastnn.testing import Case, randn, values
from fastnn.testing.cases.activation import channels_last

CASES: list[Case] = [
    *(
        Case("scale_add", given, view=view)
        for given, view in (
            # One scale; a scale for each row, column, channel, sample, channel of a sample.
            ((randn(3, 1025), randn()), None),
            ((randn(3, 1025), randn(1, 1), randn(3, 1025)), None),
            ((randn(40, 3), randn(3), randn(40, 3)), None),
            ((randn(2, 300, 7), randn(300, 1)), None),
            ((randn(2, 5, 40, 55), randn(5, 1, 1), randn(2, 5, 40, 55)), None),
            ((randn(3, 2, 4, 4), randn(3, 1, 1, 1), randn(3, 2, 4, 4)), None),
            ((randn(2, 6, 4, 4), randn(2, 6, 1, 1)), None),
            ((randn(5, 1), randn(1, 8)), lambda x: x.expand(5, 8) if x.shape[0] == 5 else x),
        )
    ),
    *(
        Case("scale_add", (randn(2, 6, 4, 4), randn(*scale)), view=channels_last)
        for scale in ((1, 6, 1, 1), (2, 1, 1, 1))
    ),
    Case("scale_add", (randn(548, 64), randn(64)), dtypes=(torch.float32,)),  # many tiles
    Case("scale_add", (randn(4, 3), randn(3, grad=False), randn(4, 3))),
    Case("scale_add", (randn(4, 3, grad=False), randn(3), randn(4, 3))),
    Case("scale_add", (randn(4, 3, grad=False), randn(3, grad=False), randn(4, 3))),
    Case("scale_add", (values(1.0, float("nan"), float("inf"), -float("inf"), 0.0), randn(1))),
    # Calls that run stock.
    Case("scale_add", (randn(0, 4), randn(4)), stock="empty"),
    Case("scale_add", (randn(2, 6, 4, 4), randn(6, 1, 1), randn(2, 6, 4, 4)), view=channels_last,
         stock="layout"),
    Case("scale_add", (randn(4, 3), randn(4, 3)), stock="shape"),
    Case("scale_add", (randn(4, 1), randn(4, 3)), stock="shape"),
    Case("scale_add", (randn(2, 3, 4), randn(2, 1, 4)), stock="layout"),
]  # fmt: skip
