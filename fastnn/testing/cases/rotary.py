"""Rotary embedding: layouts of heads, shapes of the angles, odd units, calls that run stock."""

import torch

from fastnn.testing import Case, randn


def angles(*shape):
    return randn(*shape, grad=False)


def heads(x):
    """(batch, length, heads, width) -> (batch, heads, length, width)"""
    return x.transpose(1, 2)


CASES: list[Case] = [
    *(
        Case("rotary", (randn(*shape), angles(*cos), angles(*sin)), view=view)
        for shape, cos, sin, view in (
            ((2, 7, 3, 16), (1, 1, 7, 16), (1, 1, 7, 16), heads),
            ((2, 3, 5, 64), (2, 1, 5, 64), (2, 1, 5, 64), None),
            ((2, 5, 3, 8), (2, 5, 1, 8), (5, 1, 8), None),
            ((3, 40, 6), (40, 6), (3, 1, 6), None),
            ((33, 10), (10,), (33, 10), None),
            ((2,), (2,), (2,), None),
        )
    ),
    Case("rotary", (randn(2, 70, 3, 40), angles(35, 1, 40), angles(40)), view=lambda x: x[:, ::2]),
    Case("rotary", (randn(2, 5, 24), angles(5, 16), angles(5, 16)), view=lambda x: x[..., 4:20]),
    Case(
        "rotary",
        (randn(2, 16, 5), angles(5, 16), angles(5, 16)),
        view=lambda x: x.mT,
        stock="layout",
    ),
    Case("rotary", (randn(4, 600), angles(4, 600), angles(4, 600)), dtypes=(torch.float32,)),
    Case("rotary", (randn(4, 6, grad=False), angles(4, 6), angles(4, 6))),
    # Calls that run stock.
    Case("rotary", (randn(4, 6), randn(4, 6), angles(4, 6)), stock="autograd"),
    Case("rotary", (randn(0, 6), angles(6), angles(6)), stock="empty"),
    Case("rotary", (randn(4, 6), angles(4, 1), angles(4, 6)), stock="shape"),
    Case("rotary", (randn(4, 6), angles(2, 4, 6), angles(4, 6)), stock="shape"),
    Case("rotary", (randn(2, 5000), angles(5000), angles(5000)), stock="size"),
]
