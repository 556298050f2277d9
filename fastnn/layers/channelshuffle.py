"""Channel shuffle. Mirrors torch/nn/modules/channelshuffle.py."""

import torch.nn as stock

import fastnn.functional as F
from fastnn.layers._layer import Layer

__all__ = ["ChannelShuffle"]


class ChannelShuffle(stock.ChannelShuffle, metaclass=Layer, op=F.channel_shuffle):
    def forward(self, input):
        return F.channel_shuffle(input, self.groups)
