"""Multi-label margin loss: lists of classes that end early, every reduction, layouts."""

import torch

from fastnn.testing import Case, randn
from fastnn.testing.cases.loss import REDUCTIONS, transposed


def lists(*shape):
    """Maker of class indices that end with -1 in every row but the first."""

    def make(dtype, device):
        C = shape[-1]
        rows = [torch.randperm(C) for _ in range(shape[0] if len(shape) > 1 else 1)]
        for i, row in enumerate(rows[1:]):
            row[i % C] = -1
        return torch.stack(rows).view(shape).to(device)

    return make


CASES: list[Case] = [
    *(
        Case("MultiLabelMarginLoss", (randn(5, 7), lists(5, 7)), {"reduction": r},
             dtypes=(torch.float32,))
        for r in REDUCTIONS
    ),
    *(
        Case("MultiLabelMarginLoss", inputs, dtypes=(torch.float32,))
        for inputs in (
            (randn(2, 33, scale=3.0), lists(2, 33)),
            (randn(7), lambda dtype, device: torch.tensor([3, 3, 0, -1, 6, 5, 1]).to(device)),
        )
    ),
    Case("MultiLabelMarginLoss", (randn(6, 4), lists(4, 6)), view=transposed,
         dtypes=(torch.float32,)),
    Case("MultiLabelMarginLoss", (randn(3, 5), lists(3, 5)), autocast=torch.bfloat16),
]  # fmt: skip
