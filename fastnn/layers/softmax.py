"""Softmax and related layers, which in PyTorch are in torch/nn/modules/activation.py."""

import torch.nn as stock

import fastnn.functional as F
from fastnn.layers._layer import Layer

__all__ = ["LogSoftmax", "Softmax", "Softmax2d", "Softmin"]

# `_stacklevel` is one more than in PyTorch, because forward lies one frame deeper. So a warning
# about `dim` names the same line as in PyTorch.


class Softmin(stock.Softmin, metaclass=Layer):
    def forward(self, input):
        return F.softmin(input, self.dim, _stacklevel=6)


class Softmax(stock.Softmax, metaclass=Layer):
    def forward(self, input):
        return F.softmax(input, self.dim, _stacklevel=6)


class Softmax2d(stock.Softmax2d, metaclass=Layer):
    def forward(self, input):
        if input.dim() not in (3, 4):  # the check and the words of PyTorch
            raise ValueError(
                f"Softmax2d: expected input to be 3D or 4D, got {input.dim()}D instead"
            )
        return F.softmax(input, -3, _stacklevel=6)


class LogSoftmax(stock.LogSoftmax, metaclass=Layer):
    def forward(self, input):
        return F.log_softmax(input, self.dim, _stacklevel=6)
