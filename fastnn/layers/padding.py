"""Pads. Mirrors torch/nn/modules/padding.py."""

import torch.nn as stock

import fastnn.functional as F
from fastnn.layers._layer import Layer

__all__ = [
    "CircularPad1d",
    "CircularPad2d",
    "CircularPad3d",
    "ConstantPad1d",
    "ConstantPad2d",
    "ConstantPad3d",
    "ReflectionPad1d",
    "ReflectionPad2d",
    "ReflectionPad3d",
    "ReplicationPad1d",
    "ReplicationPad2d",
    "ReplicationPad3d",
    "ZeroPad1d",
    "ZeroPad2d",
    "ZeroPad3d",
]


class CircularPad1d(stock.CircularPad1d, metaclass=Layer, op=F.pad):
    def forward(self, input):
        self._check_input_dim(input)
        return F.pad(input, self.padding, "circular")


class CircularPad2d(stock.CircularPad2d, metaclass=Layer, op=F.pad):
    def forward(self, input):
        self._check_input_dim(input)
        return F.pad(input, self.padding, "circular")


class CircularPad3d(stock.CircularPad3d, metaclass=Layer, op=F.pad):
    def forward(self, input):
        self._check_input_dim(input)
        return F.pad(input, self.padding, "circular")


class ConstantPad1d(stock.ConstantPad1d, metaclass=Layer, op=F.pad):
    def forward(self, input):
        return F.pad(input, self.padding, "constant", self.value)


class ConstantPad2d(stock.ConstantPad2d, metaclass=Layer, op=F.pad):
    def forward(self, input):
        return F.pad(input, self.padding, "constant", self.value)


class ConstantPad3d(stock.ConstantPad3d, metaclass=Layer, op=F.pad):
    def forward(self, input):
        return F.pad(input, self.padding, "constant", self.value)


class ReflectionPad1d(stock.ReflectionPad1d, metaclass=Layer, op=F.pad):
    def forward(self, input):
        return F.pad(input, self.padding, "reflect")


class ReflectionPad2d(stock.ReflectionPad2d, metaclass=Layer, op=F.pad):
    def forward(self, input):
        return F.pad(input, self.padding, "reflect")


class ReflectionPad3d(stock.ReflectionPad3d, metaclass=Layer, op=F.pad):
    def forward(self, input):
        return F.pad(input, self.padding, "reflect")


class ReplicationPad1d(stock.ReplicationPad1d, metaclass=Layer, op=F.pad):
    def forward(self, input):
        return F.pad(input, self.padding, "replicate")


class ReplicationPad2d(stock.ReplicationPad2d, metaclass=Layer, op=F.pad):
    def forward(self, input):
        return F.pad(input, self.padding, "replicate")


class ReplicationPad3d(stock.ReplicationPad3d, metaclass=Layer, op=F.pad):
    def forward(self, input):
        return F.pad(input, self.padding, "replicate")


class ZeroPad1d(stock.ZeroPad1d, metaclass=Layer, op=F.pad):
    def forward(self, input):
        return F.pad(input, self.padding, "constant", self.value)


class ZeroPad2d(stock.ZeroPad2d, metaclass=Layer, op=F.pad):
    def forward(self, input):
        return F.pad(input, self.padding, "constant", self.value)


class ZeroPad3d(stock.ZeroPad3d, metaclass=Layer, op=F.pad):
    def forward(self, input):
        return F.pad(input, self.padding, "constant", self.value)
