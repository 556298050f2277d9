"""Convolutions. Mirrors torch/nn/modules/conv.py.

The methods are those of PyTorch, which call our functions: they pad, and check `output_size`.
"""

import torch.nn as stock

import fastnn.functional as F
from fastnn.layers._layer import Layer, rebound

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "LazyConv1d",
    "LazyConv2d",
    "LazyConv3d",
    "LazyConvTranspose1d",
    "LazyConvTranspose2d",
    "LazyConvTranspose3d",
]


def _direct(dims):
    """What a call of `_conv_forward` comes to, unless it pads in another way than by zeros."""
    options = "self.stride, self.padding, self.dilation, self.groups"
    return "self.padding_mode == 'zeros'", f"_torch.conv{dims}d(input, weight, bias, {options})"


class Conv1d(stock.Conv1d, metaclass=Layer, op=F.conv1d, direct=_direct(1)):
    _conv_forward = rebound(stock.Conv1d._conv_forward, F=F)


class Conv2d(stock.Conv2d, metaclass=Layer, op=F.conv2d, direct=_direct(2)):
    _conv_forward = rebound(stock.Conv2d._conv_forward, F=F)


class Conv3d(stock.Conv3d, metaclass=Layer, op=F.conv3d, direct=_direct(3)):
    _conv_forward = rebound(stock.Conv3d._conv_forward, F=F)


class ConvTranspose1d(stock.ConvTranspose1d, metaclass=Layer, op=F.conv_transpose1d):
    forward = rebound(stock.ConvTranspose1d.forward, F=F)


class ConvTranspose2d(stock.ConvTranspose2d, metaclass=Layer, op=F.conv_transpose2d):
    forward = rebound(stock.ConvTranspose2d.forward, F=F)


class ConvTranspose3d(stock.ConvTranspose3d, metaclass=Layer, op=F.conv_transpose3d):
    forward = rebound(stock.ConvTranspose3d.forward, F=F)


class LazyConv1d(stock.LazyConv1d, metaclass=Layer, op=F.conv1d, direct=_direct(1)):
    cls_to_become = Conv1d  # type: ignore[assignment]
    _conv_forward = rebound(stock.Conv1d._conv_forward, F=F)


class LazyConv2d(stock.LazyConv2d, metaclass=Layer, op=F.conv2d, direct=_direct(2)):
    cls_to_become = Conv2d  # type: ignore[assignment]
    _conv_forward = rebound(stock.Conv2d._conv_forward, F=F)


class LazyConv3d(stock.LazyConv3d, metaclass=Layer, op=F.conv3d, direct=_direct(3)):
    cls_to_become = Conv3d  # type: ignore[assignment]
    _conv_forward = rebound(stock.Conv3d._conv_forward, F=F)


class LazyConvTranspose1d(stock.LazyConvTranspose1d, metaclass=Layer, op=F.conv_transpose1d):
    cls_to_become = ConvTranspose1d  # type: ignore[assignment]
    forward = rebound(stock.ConvTranspose1d.forward, F=F)


class LazyConvTranspose2d(stock.LazyConvTranspose2d, metaclass=Layer, op=F.conv_transpose2d):
    cls_to_become = ConvTranspose2d  # type: ignore[assignment]
    forward = rebound(stock.ConvTranspose2d.forward, F=F)


class LazyConvTranspose3d(stock.LazyConvTranspose3d, metaclass=Layer, op=F.conv_transpose3d):
    cls_to_become = ConvTranspose3d  # type: ignore[assignment]
    forward = rebound(stock.ConvTranspose3d.forward, F=F)
