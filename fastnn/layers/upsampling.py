"""Upsampling. Mirrors torch/nn/modules/upsampling.py."""

import torch.nn as stock

import fastnn.functional as F
from fastnn.layers._layer import Layer

__all__ = ["Upsample", "UpsamplingBilinear2d", "UpsamplingNearest2d"]


def _forward(self, input):
    return F.interpolate(
        input,
        self.size,
        self.scale_factor,
        self.mode,
        self.align_corners,
        recompute_scale_factor=self.recompute_scale_factor,
    )


class Upsample(stock.Upsample, metaclass=Layer, op=F.interpolate):
    forward = _forward


class UpsamplingNearest2d(stock.UpsamplingNearest2d, metaclass=Layer, op=F.interpolate):
    forward = _forward


class UpsamplingBilinear2d(stock.UpsamplingBilinear2d, metaclass=Layer, op=F.interpolate):
    forward = _forward
