"""PReLU: one slope and a slope per channel, layouts, gradients of some inputs, many tiles."""

import torch

from fastnn.testing import Case, randn
from fastnn.testing.cases.activation import SPECIAL, WIDE, channels_last

CASES: list[Case] = [
    *(
        Case("PReLU", (x,), options, view=view)
        for x, options, view in (
            (WIDE, {}, None),
            (WIDE, {"num_parameters": 1025}, None),
            (SPECIAL, {}, None),
            (randn(), {}, None),
            (randn(7), {}, None),
            (randn(0, 4), {"num_parameters": 4}, None),
            (randn(0, 4), {}, None),
            (randn(3, 2, 1100), {"num_parameters": 2}, None),
            (randn(5, 3), {"num_parameters": 3}, None),
            (randn(2, 5, 300), {"num_parameters": 5}, None),  # several blocks of channels
            (randn(40, 3), {"num_parameters": 3}, lambda x: x.view(3, 40).t()),
            (randn(3, 5, 7, 7), {"num_parameters": 5}, None),
            (randn(2, 6, 4, 4), {"num_parameters": 6}, channels_last),
            (randn(2, 6, 4), {"num_parameters": 6}, lambda x: x[:, :, ::2]),
            (randn(4, 2, 3), {"num_parameters": 4}, lambda x: x.permute(2, 0, 1)),
            (randn(5, 1), {}, lambda x: x.expand(5, 9)),
        )
    ),
    Case("PReLU", (randn(548, 64),), {"num_parameters": 64}, dtypes=(torch.float32,)),  # many tiles
    Case("prelu", (randn(4, 3), randn(3))),
    Case("prelu", (randn(4, 3), randn(3, grad=False))),
    Case("prelu", (randn(4, 3, grad=False), randn(3))),
    Case("prelu", (randn(4, 3), randn())),
    Case("PReLU", (randn(4, 3),), {"num_parameters": 3}, autocast=torch.bfloat16),
]  # fmt: skip
