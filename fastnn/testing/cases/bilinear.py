"""Bilinear: one output, one feature, no bias, batch dimensions, layouts."""

import torch

from fastnn.testing import Case, randn


def sizes(first, second, out, **options):
    return {"in1_features": first, "in2_features": second, "out_features": out, **options}


CASES: list[Case] = [
    Case("Bilinear", (randn(5, 7), randn(5, 9)), sizes(7, 9, 4)),
    Case("Bilinear", (randn(5, 7), randn(5, 9)), sizes(7, 9, 1, bias=False)),
    Case("Bilinear", (randn(2, 3, 4), randn(2, 3, 1)), sizes(4, 1, 6)),
    Case("Bilinear", (randn(1, 1), randn(1, 65)), sizes(1, 65, 3)),
    Case("Bilinear", (randn(8), randn(3)), sizes(8, 3, 2)),
    Case("Bilinear", (randn(6, 5), randn(5, 4)), sizes(6, 4, 3), view=lambda x: x.t()),
    Case("bilinear", (randn(3, 4), randn(3, 5), randn(2, 4, 5))),
    Case(
        "Bilinear",
        (randn(3, 4), randn(3, 5)),
        sizes(4, 5, 2),
        autocast=torch.bfloat16,
        stock="autocast",
    ),
    Case("Bilinear", (randn(0, 4), randn(0, 5)), sizes(4, 5, 2), stock="empty"),
]
