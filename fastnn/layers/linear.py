"""Linear layers. Mirrors torch/nn/modules/linear.py."""

import torch.nn as stock

import fastnn.functional as F
from fastnn.layers._layer import Layer, weight_and_bias

__all__ = ["Bilinear", "LazyLinear", "Linear"]


class Linear(
    stock.Linear,
    metaclass=Layer,
    op=F.linear,
    mirrors=True,
    direct=("", "_nn.linear(input, weight, bias)"),
):
    def forward(self, input):
        weight, bias = weight_and_bias(self)
        return F.linear(input, weight, bias)


class LazyLinear(stock.LazyLinear, metaclass=Layer, op=F.linear):
    cls_to_become = Linear  # type: ignore[assignment]

    def forward(self, input):
        return F.linear(input, self.weight, self.bias)


class Bilinear(stock.Bilinear, metaclass=Layer):
    def forward(self, input1, input2):
        return F.bilinear(input1, input2, self.weight, self.bias)
