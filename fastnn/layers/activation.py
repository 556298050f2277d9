"""Activations. Mirrors torch/nn/modules/activation.py."""

import torch.nn as stock

import fastnn.functional as F
from fastnn.layers._layer import Layer

__all__ = ["GELU", "ReLU"]


class ReLU(stock.ReLU, metaclass=Layer):
    def forward(self, input):
        return F.relu(input, inplace=self.inplace)


class GELU(stock.GELU, metaclass=Layer):
    def forward(self, input):
        return F.gelu(input, approximate=self.approximate)
