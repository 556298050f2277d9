"""Adaptive softmax: clusters without rows, one row, no batch, a bias, several clusters."""

import torch

from fastnn.testing import Case, classes, randn

ROWS = {"in_features": 16, "n_classes": 23, "cutoffs": [5, 11]}


def among(*targets):
    return lambda dtype, device: torch.tensor(targets, device=device)


def one(target):
    return lambda dtype, device: torch.tensor(target, device=device)


CASES: list[Case] = [
    Case("AdaptiveLogSoftmaxWithLoss", (randn(33, 16), classes(33, high=23)), ROWS),
    Case("AdaptiveLogSoftmaxWithLoss", (randn(4, 16), among(0, 3, 4, 1)), ROWS),
    Case("AdaptiveLogSoftmaxWithLoss", (randn(4, 16), among(11, 22, 12, 0)),
         {**ROWS, "head_bias": True, "div_value": 2.0}),
    Case("AdaptiveLogSoftmaxWithLoss", (randn(16), one(7)), ROWS),
    Case("AdaptiveLogSoftmaxWithLoss", (randn(1, 16), among(22)), ROWS),
    Case("AdaptiveLogSoftmaxWithLoss", (randn(3, 16), among(1, 9, 9)), {**ROWS, "cutoffs": [22]}),
]  # fmt: skip
