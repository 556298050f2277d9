"""Upsampling. Mirrors torch/nn/modules/upsampling.py."""

import torch.nn as stock

import fastnn.functional as F
from fastnn.layers._layer import Layer

__all__ = ["Upsample", "UpsamplingBilinear2d", "UpsamplingNearest2d"]


def _interpolated(layer, input):
    recompute = layer.recompute_scale_factor
    how = layer.size, layer.scale_factor, layer.mode, layer.align_corners
    return F.interpolate(input, *how, recompute_scale_factor=recompute)


class Upsample(stock.Upsample, metaclass=Layer):
    def forward(self, input):
        return _interpolated(self, input)


class UpsamplingNearest2d(stock.UpsamplingNearest2d, metaclass=Layer):
    def forward(self, input):
        return _interpolated(self, input)


class UpsamplingBilinear2d(stock.UpsamplingBilinear2d, metaclass=Layer):
    def forward(self, input):
        return _interpolated(self, input)
