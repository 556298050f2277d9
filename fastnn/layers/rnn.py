"""Recurrent layers. Mirrors torch/nn/modules/rnn.py.

PyTorch's `forward` does everything but the call of `_VF`, which is ours.
"""

import copy

import torch.nn as stock

import fastnn.functional as F
from fastnn.layers._layer import Layer, rebound

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]


def _of_pytorch(self):
    """What TorchScript compiles in place of a layer: the stock layer with the same parameters.

    PyTorch declares the types of a packed and of an unpacked call as overloads of `forward`, which
    TorchScript finds only in the class that declares them.
    """
    twin = copy.copy(self)
    twin.__class__ = type(self).__base__
    return twin


class RNN(stock.RNN, metaclass=Layer):
    __prepare_scriptable__ = _of_pytorch
    forward = rebound(stock.RNN.forward, _VF=F)


class LSTM(stock.LSTM, metaclass=Layer):
    __prepare_scriptable__ = _of_pytorch
    forward = rebound(stock.LSTM.forward, _VF=F)


class GRU(stock.GRU, metaclass=Layer):
    __prepare_scriptable__ = _of_pytorch
    forward = rebound(stock.GRU.forward, _VF=F)


class RNNCell(stock.RNNCell, metaclass=Layer):
    forward = rebound(stock.RNNCell.forward, _VF=F)


class LSTMCell(stock.LSTMCell, metaclass=Layer):
    forward = rebound(stock.LSTMCell.forward, _VF=F)


class GRUCell(stock.GRUCell, metaclass=Layer):
    forward = rebound(stock.GRUCell.forward, _VF=F)
