"""Fold and unfold. Mirrors torch/nn/modules/fold.py."""

import torch.nn as stock

import fastnn.functional as F
from fastnn.layers._layer import Layer

__all__ = ["Fold", "Unfold"]


class Fold(stock.Fold, metaclass=Layer, op=F.fold):
    def forward(self, input):
        return F.fold(
            input, self.output_size, self.kernel_size, self.dilation, self.padding, self.stride
        )


class Unfold(stock.Unfold, metaclass=Layer, op=F.unfold):
    def forward(self, input):
        return F.unfold(input, self.kernel_size, self.dilation, self.padding, self.stride)
