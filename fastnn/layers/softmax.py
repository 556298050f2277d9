"""Softmax and its kin, which torch/nn/modules/activation.py keeps among the activations."""

import torch.nn as stock

import fastnn.functional as F
from fastnn.layers._layer import Layer

__all__ = ["LogSoftmax", "Softmax", "Softmax2d", "Softmin"]

# A warning about `dim` names the line that it would in stock: forward lies one frame deeper.


class Softmin(stock.Softmin, metaclass=Layer):
    def forward(self, input):
        return F.softmin(input, self.dim, _stacklevel=6)


class Softmax(stock.Softmax, metaclass=Layer):
    def forward(self, input):
        return F.softmax(input, self.dim, _stacklevel=6)


class Softmax2d(stock.Softmax2d, metaclass=Layer):
    def forward(self, input):
        if input.dim() not in (3, 4):  # in stock's words
            raise ValueError(
                f"Softmax2d: expected input to be 3D or 4D, got {input.dim()}D instead"
            )
        return F.softmax(input, -3, _stacklevel=6)


class LogSoftmax(stock.LogSoftmax, metaclass=Layer):
    def forward(self, input):
        return F.log_softmax(input, self.dim, _stacklevel=6)
