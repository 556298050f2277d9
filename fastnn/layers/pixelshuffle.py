"""Pixel shuffles. Mirrors torch/nn/modules/pixelshuffle.py."""

import torch.nn as stock

import fastnn.functional as F
from fastnn.layers._layer import Layer

__all__ = ["PixelShuffle", "PixelUnshuffle"]


class PixelShuffle(stock.PixelShuffle, metaclass=Layer, op=F.pixel_shuffle):
    def forward(self, input):
        return F.pixel_shuffle(input, self.upscale_factor)


class PixelUnshuffle(stock.PixelUnshuffle, metaclass=Layer, op=F.pixel_unshuffle):
    def forward(self, input):
        return F.pixel_unshuffle(input, self.downscale_factor)
