"""Activations: past a block, one element, empty, 0-d, layouts, special values, in place."""

from typing import Any

import torch

from fastnn.testing import Case, randn, values

SPECIAL = values(0.0, -0.0, 1e-6, -3.0, 3.0, 1e4, -1e4, float("inf"), -float("inf"), float("nan"))
WIDE = randn(3, 1025, scale=4.0)  # past a block in float32; into the tails of every formula


def fresh(x):
    """A copy that is not a leaf, so that it may be written to."""
    return x * 1


def transposed(x):
    return fresh(x).t()


def strided(x):
    return fresh(x)[:, ::2]


def channels_last(x):
    return fresh(x).contiguous(memory_format=torch.channels_last)


IN_PLACE: list[tuple[str, dict[str, Any]]] = [
    ("ReLU", {}),
    ("ReLU6", {}),
    ("LeakyReLU", {"negative_slope": 0.3}),
    ("RReLU", {}),
    ("ELU", {"alpha": 0.7}),
    ("CELU", {"alpha": 1.5}),
    ("SELU", {}),
    ("SiLU", {}),
    ("Mish", {}),
    ("Hardtanh", {"min_val": -0.7, "max_val": 1.3}),
    ("Hardsigmoid", {}),
    ("Hardswish", {}),
    ("Threshold", {"threshold": 0.1, "value": -2.5}),
]
ALL: list[tuple[str, dict[str, Any]]] = [
    *IN_PLACE,
    ("GELU", {}),
    ("GELU", {"approximate": "tanh"}),
    ("Sigmoid", {}),
    ("Tanh", {}),
    ("LogSigmoid", {}),
    ("Hardshrink", {"lambd": 0.3}),
    ("Softshrink", {"lambd": 0.3}),
    ("Softplus", {}),
    ("Softplus", {"beta": 2.5, "threshold": 4.0}),
    ("Softsign", {}),
    ("Tanhshrink", {}),
]

CASES: list[Case] = [
    *(
        Case(name, (shape,), options, train=False)
        for name, options in ALL
        for shape in (WIDE, randn(), SPECIAL)
    ),
    *(
        Case(name, (x,), {**options, "inplace": True}, view=view, train=False)
        for name, options in IN_PLACE
        for x, view in ((randn(3, 5), fresh), (SPECIAL, fresh), (randn(4, 6), strided))
    ),
    *(
        Case(name, (x,), view=view)
        for name in ("ReLU", "GELU", "Softsign", "Tanhshrink")
        for x, view in (
            (randn(0, 4), None),
            (randn(5, 7), transposed),
            (randn(5, 70), strided),
            (randn(2, 3, 4, 5), channels_last),
            (randn(5, 1), lambda x: x.expand(5, 9)),
        )
    ),
    Case("relu", (randn(2, 3, 4, 5),), {"inplace": True}, view=channels_last),
    Case("silu", (randn(0, 3),), {"inplace": True}, view=fresh),
    Case("mish", (randn(4, 6, 5),), {"inplace": True}, view=lambda x: fresh(x)[1]),
    Case("relu", (randn(3, 4, grad=False),)),
    Case("softplus", (randn(3, 5),), autocast=torch.bfloat16),
    Case("gelu", (randn(3, 5),), autocast=torch.float16),
    Case("GELU", (randn(3, 4),), dtypes=(torch.float64,), stock="dtype"),
    Case("RReLU", (randn(3, 4),), stock="random"),
    Case("relu6", (randn(3, 40, scale=4.0),)),  # the layer calls hardtanh
    Case("leaky_relu", (randn(3, 4),), {"negative_slope": -0.1}),
    Case("leaky_relu", (randn(3, 4, grad=False),), {"negative_slope": -0.1, "inplace": True},
         stock="autograd"),
    Case("elu", (randn(3, 4, grad=False),), {"alpha": -1.0, "inplace": True},
         stock="autograd"),
]  # fmt: skip
