"""Activations. Mirrors torch/nn/modules/activation.py."""

import torch
import torch.nn as stock

import fastnn.functional as F
from fastnn.layers._layer import Layer, attributes, rebound

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


class Threshold(
    stock.Threshold,
    metaclass=Layer,
    op=F.threshold,
    given="input, self.threshold, self.value, self.inplace",
):
    def forward(self, input):
        return F.threshold(input, self.threshold, self.value, self.inplace)


class ReLU(
    stock.ReLU,
    metaclass=Layer,
    op=F.relu,
    given="input, self.inplace",
    direct=("", "_torch.relu_(input) if self.inplace else _torch.relu(input)"),
):
    def forward(self, input):
        return F.relu(input, inplace=self.inplace)


class RReLU(stock.RReLU, metaclass=Layer, op=F.rrelu):
    def forward(self, input):
        return F.rrelu(input, self.lower, self.upper, self.training, self.inplace)


class Hardtanh(
    stock.Hardtanh,
    metaclass=Layer,
    op=F.hardtanh,
    given="input, self.min_val, self.max_val, self.inplace",
):
    def forward(self, input):
        return F.hardtanh(input, self.min_val, self.max_val, self.inplace)


class ReLU6(
    stock.ReLU6,
    metaclass=Layer,
    op=F.hardtanh,
    given="input, self.min_val, self.max_val, self.inplace",
):
    def forward(self, input):
        return F.hardtanh(input, self.min_val, self.max_val, self.inplace)


class Sigmoid(stock.Sigmoid, metaclass=Layer, op=F.sigmoid, given="input"):
    def forward(self, input):
        if torch.compiler.is_exporting():  # PyTorch's layer does not call F.sigmoid
            return torch.sigmoid(input)
        return F.sigmoid(input)


class Hardsigmoid(
    stock.Hardsigmoid, metaclass=Layer, op=F.hardsigmoid, given="input, self.inplace"
):
    def forward(self, input):
        return F.hardsigmoid(input, self.inplace)


class Tanh(stock.Tanh, metaclass=Layer, op=F.tanh, given="input"):
    def forward(self, input):
        if torch.compiler.is_exporting():
            return torch.tanh(input)  # as in Sigmoid
        return F.tanh(input)


class SiLU(
    stock.SiLU,
    metaclass=Layer,
    op=F.silu,
    given="input, self.inplace",
    direct=("", "_nn.silu_(input) if self.inplace else _nn.silu(input)"),
):
    def forward(self, input):
        return F.silu(input, inplace=self.inplace)


class Mish(stock.Mish, metaclass=Layer, op=F.mish, given="input, self.inplace"):
    def forward(self, input):
        return F.mish(input, inplace=self.inplace)


class Hardswish(stock.Hardswish, metaclass=Layer, op=F.hardswish, given="input, self.inplace"):
    def forward(self, input):
        return F.hardswish(input, self.inplace)


class ELU(stock.ELU, metaclass=Layer, op=F.elu, given="input, self.alpha, self.inplace"):
    def forward(self, input):
        return F.elu(input, self.alpha, self.inplace)


class CELU(stock.CELU, metaclass=Layer, op=F.celu, given="input, self.alpha, self.inplace"):
    def forward(self, input):
        return F.celu(input, self.alpha, self.inplace)


class SELU(stock.SELU, metaclass=Layer, op=F.selu, given="input, self.inplace"):
    def forward(self, input):
        return F.selu(input, self.inplace)


class GLU(stock.GLU, metaclass=Layer, op=F.glu):
    def forward(self, input):
        return F.glu(input, self.dim)


class GELU(
    stock.GELU,
    metaclass=Layer,
    op=F.gelu,
    given="input, self.approximate",
    direct=("", "_nn.gelu(input, approximate=self.approximate)"),
):
    def forward(self, input):
        return F.gelu(input, approximate=self.approximate)


class Hardshrink(stock.Hardshrink, metaclass=Layer, op=F.hardshrink, given="input, self.lambd"):
    def forward(self, input):
        return F.hardshrink(input, self.lambd)


class LeakyReLU(
    stock.LeakyReLU,
    metaclass=Layer,
    op=F.leaky_relu,
    given="input, self.negative_slope, self.inplace",
    direct=(
        "",
        "(_nn.leaky_relu_ if self.inplace else _nn.leaky_relu)(input, self.negative_slope)",
    ),
):
    def forward(self, input):
        return F.leaky_relu(input, self.negative_slope, self.inplace)


class LogSigmoid(stock.LogSigmoid, metaclass=Layer, op=F.logsigmoid, given="input"):
    def forward(self, input):
        return F.logsigmoid(input)


class Softplus(
    stock.Softplus, metaclass=Layer, op=F.softplus, given="input, self.beta, self.threshold"
):
    def forward(self, input):
        return F.softplus(input, self.beta, self.threshold)


class Softshrink(stock.Softshrink, metaclass=Layer, op=F.softshrink, given="input, self.lambd"):
    def forward(self, input):
        return F.softshrink(input, self.lambd)


class MultiheadAttention(stock.MultiheadAttention, metaclass=Layer, boxes=("out_proj",)):
    # The code of PyTorch's forward, which keeps its inference kernel and its nested tensors.
    forward = rebound(stock.MultiheadAttention.forward, F=F)


class PReLU(stock.PReLU, metaclass=Layer, op=F.prelu, mirrors=True):
    def forward(self, input):
        (weight,) = attributes(self, "weight")
        return F.prelu(input, weight)


class Softsign(stock.Softsign, metaclass=Layer, op=F.softsign, given="input"):
    def forward(self, input):
        return F.softsign(input)


class Tanhshrink(stock.Tanhshrink, metaclass=Layer, op=F.tanhshrink, given="input"):
    def forward(self, input):
        return F.tanhshrink(input)
