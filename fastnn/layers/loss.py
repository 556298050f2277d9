"""Losses. Mirrors torch/nn/modules/loss.py."""

import warnings

import torch.nn as stock
from typing_extensions import deprecated  # torch depends on it

import fastnn.functional as F
from fastnn.layers._layer import Layer

__all__ = ["CrossEntropyLoss", "NLLLoss", "NLLLoss2d"]


class NLLLoss(stock.NLLLoss, metaclass=Layer):
    def forward(self, input, target):
        return F.nll_loss(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )


with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # said when subclassed; ours says it when made

    @deprecated(vars(stock.NLLLoss2d)["__deprecated__"], category=FutureWarning)
    class NLLLoss2d(stock.NLLLoss2d, metaclass=Layer):
        forward = NLLLoss.forward


class CrossEntropyLoss(stock.CrossEntropyLoss, metaclass=Layer):
    def forward(self, input, target):
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
