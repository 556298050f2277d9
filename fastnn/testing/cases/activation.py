"""Activations: past a block, one element, empty, 0-d, layouts, special values."""

import torch

from fastnn.testing import Case, randn, values

SPECIAL = values(0.0, -0.0, 1e-6, -3.0, 3.0, 1e4, -1e4, float("inf"), -float("inf"), float("nan"))

CASES: list[Case] = [
    *(
        Case(name, (shape,), options)
        for name, options in (
            ("ReLU", {}),
            ("ReLU", {"inplace": False}),
            ("GELU", {}),
            ("GELU", {"approximate": "tanh"}),
        )
        for shape in (randn(3, 1025), randn(1), randn(0, 4), randn(), SPECIAL)
    ),
    Case("ReLU", (randn(5, 7),), view=lambda x: x.t()),
    Case("GELU", (randn(5, 70),), view=lambda x: x[:, ::2]),
    Case("gelu", (randn(5, 1),), view=lambda x: x.expand(5, 9)),
    Case("GELU", (randn(2, 3, 4, 5),), view=lambda x: x.to(memory_format=torch.channels_last)),
    Case("relu", (randn(3, 4),), {"inplace": True}, view=lambda x: x * 1),
    Case("GELU", (randn(3, 4),), dtypes=(torch.float64,), stock="float64"),
]
