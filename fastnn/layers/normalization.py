"""Normalisation. Mirrors torch/nn/modules/normalization.py."""

import torch.nn as stock

import fastnn.functional as F
from fastnn.layers._layer import Layer, attributes, weight_and_bias

__all__ = ["GroupNorm", "LayerNorm", "LocalResponseNorm", "RMSNorm"]


class LocalResponseNorm(stock.LocalResponseNorm, metaclass=Layer, op=F.local_response_norm):
    def forward(self, input):
        return F.local_response_norm(input, self.size, self.alpha, self.beta, self.k)


class LayerNorm(
    stock.LayerNorm,
    metaclass=Layer,
    op=F.layer_norm,
    mirrors=True,
    given="input, self.normalized_shape, weight, bias, self.eps",
    # PyTorch's operator ignores its last argument, whether cuDNN is enabled.
    direct=(
        "type(weight) is type(bias) is _Parameter",
        "_torch.layer_norm(input, self.normalized_shape, weight, bias, self.eps, True)",
    ),
):
    def forward(self, input):
        weight, bias = weight_and_bias(self)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class GroupNorm(
    stock.GroupNorm,
    metaclass=Layer,
    op=F.group_norm,
    mirrors=True,
    given="input, self.num_groups, weight, bias, self.eps",
):
    def forward(self, input):
        weight, bias = weight_and_bias(self)
        return F.group_norm(input, self.num_groups, weight, bias, self.eps)


class RMSNorm(
    stock.RMSNorm,
    metaclass=Layer,
    op=F.rms_norm,
    mirrors=True,
    given="x, self.normalized_shape, *_attributes(self, 'weight'), self.eps",
):
    def forward(self, x):
        (weight,) = attributes(self, "weight")
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)
