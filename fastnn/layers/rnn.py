"""Recurrent layers. Mirrors torch/nn/modules/rnn.py.

PyTorch's `forward` does everything but the call of `_VF`, which is ours.
"""

import torch.nn as stock

import fastnn.functional as F
from fastnn.layers._layer import Layer, rebound

__all__ = ["GRUCell", "LSTMCell", "RNNCell"]


class RNNCell(stock.RNNCell, metaclass=Layer):
    forward = rebound(stock.RNNCell.forward, _VF=F)


class LSTMCell(stock.LSTMCell, metaclass=Layer):
    forward = rebound(stock.LSTMCell.forward, _VF=F)


class GRUCell(stock.GRUCell, metaclass=Layer):
    forward = rebound(stock.GRUCell.forward, _VF=F)
