"""Activations. Mirrors torch/nn/modules/activation.py."""

import torch
import torch.nn as stock
from torch import Tensor

import fastnn.functional as F
from fastnn.layers._layer import Layer, rebound

__all__ = [
    "CELU",
    "ELU",
    "GELU",
    "GLU",
    "SELU",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "LogSigmoid",
    "Mish",
    "MultiheadAttention",
    "PReLU",
    "RReLU",
    "ReLU",
    "ReLU6",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Softshrink",
    "Softsign",
    "Tanh",
    "Tanhshrink",
    "Threshold",
]


class Threshold(stock.Threshold, metaclass=Layer):
    def forward(self, input):
        return F.threshold(input, self.threshold, self.value, self.inplace)


class ReLU(stock.ReLU, metaclass=Layer):
    def forward(self, input):
        return F.relu(input, inplace=self.inplace)


class RReLU(stock.RReLU, metaclass=Layer):
    def forward(self, input):
        return F.rrelu(input, self.lower, self.upper, self.training, self.inplace)


class Hardtanh(stock.Hardtanh, metaclass=Layer):
    def forward(self, input):
        return F.hardtanh(input, self.min_val, self.max_val, self.inplace)


class ReLU6(stock.ReLU6, metaclass=Layer):
    def forward(self, input):
        return F.hardtanh(input, self.min_val, self.max_val, self.inplace)


class Sigmoid(stock.Sigmoid, metaclass=Layer):
    def forward(self, input):
        if not isinstance(input, Tensor):
            # as PyTorch's layer does: its error differs from that of F.sigmoid
            return torch.sigmoid(input)
        return F.sigmoid(input)


class Hardsigmoid(stock.Hardsigmoid, metaclass=Layer):
    def forward(self, input):
        return F.hardsigmoid(input, self.inplace)


class Tanh(stock.Tanh, metaclass=Layer):
    def forward(self, input):
        if not isinstance(input, Tensor):
            return torch.tanh(input)  # as in Sigmoid
        return F.tanh(input)


class SiLU(stock.SiLU, metaclass=Layer):
    def forward(self, input):
        return F.silu(input, inplace=self.inplace)


class Mish(stock.Mish, metaclass=Layer):
    def forward(self, input):
        return F.mish(input, inplace=self.inplace)


class Hardswish(stock.Hardswish, metaclass=Layer):
    def forward(self, input):
        return F.hardswish(input, self.inplace)


class ELU(stock.ELU, metaclass=Layer):
    def forward(self, input):
        return F.elu(input, self.alpha, self.inplace)


class CELU(stock.CELU, metaclass=Layer):
    def forward(self, input):
        return F.celu(input, self.alpha, self.inplace)


class SELU(stock.SELU, metaclass=Layer):
    def forward(self, input):
        return F.selu(input, self.inplace)


class GLU(stock.GLU, metaclass=Layer):
    def forward(self, input):
        return F.glu(input, self.dim)


class GELU(stock.GELU, metaclass=Layer):
    def forward(self, input):
        return F.gelu(input, approximate=self.approximate)


class Hardshrink(stock.Hardshrink, metaclass=Layer):
    def forward(self, input):
        return F.hardshrink(input, self.lambd)


class LeakyReLU(stock.LeakyReLU, metaclass=Layer):
    def forward(self, input):
        return F.leaky_relu(input, self.negative_slope, self.inplace)


class LogSigmoid(stock.LogSigmoid, metaclass=Layer):
    def forward(self, input):
        return F.logsigmoid(input)


class Softplus(stock.Softplus, metaclass=Layer):
    def forward(self, input):
        return F.softplus(input, self.beta, self.threshold)


class Softshrink(stock.Softshrink, metaclass=Layer):
    def forward(self, input):
        return F.softshrink(input, self.lambd)


class MultiheadAttention(stock.MultiheadAttention, metaclass=Layer):
    # The code of PyTorch's forward, which keeps its inference kernel and its nested tensors.
    forward = rebound(stock.MultiheadAttention.forward, F=F)


class PReLU(stock.PReLU, metaclass=Layer):
    def forward(self, input):
        return F.prelu(input, self.weight)


class Softsign(stock.Softsign, metaclass=Layer):
    def forward(self, input):
        return F.softsign(input)


class Tanhshrink(stock.Tanhshrink, metaclass=Layer):
    def forward(self, input):
        return F.tanhshrink(input)
