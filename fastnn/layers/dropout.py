"""Dropout. Mirrors torch/nn/modules/dropout.py."""

import torch.nn as stock

import fastnn.functional as F
from fastnn.layers._layer import Layer

__all__ = [
    "AlphaDropout",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "FeatureAlphaDropout",
]


class Dropout(
    stock.Dropout,
    metaclass=Layer,
    op=F.dropout,
    given="input, self.p, self.training, self.inplace",
    direct=(
        "not (self.p < 0.0 or self.p > 1.0)",  # asked as PyTorch asks it
        "(_torch.dropout_ if self.inplace else _torch.dropout)(input, self.p, self.training)",
    ),
):
    def forward(self, input):
        return F.dropout(input, self.p, self.training, self.inplace)


class Dropout1d(stock.Dropout1d, metaclass=Layer, op=F.dropout1d):
    def forward(self, input):
        return F.dropout1d(input, self.p, self.training, self.inplace)


class Dropout2d(stock.Dropout2d, metaclass=Layer, op=F.dropout2d):
    def forward(self, input):
        return F.dropout2d(input, self.p, self.training, self.inplace)


class Dropout3d(stock.Dropout3d, metaclass=Layer, op=F.dropout3d):
    def forward(self, input):
        return F.dropout3d(input, self.p, self.training, self.inplace)


class AlphaDropout(stock.AlphaDropout, metaclass=Layer, op=F.alpha_dropout):
    def forward(self, input):
        return F.alpha_dropout(input, self.p, self.training)


class FeatureAlphaDropout(stock.FeatureAlphaDropout, metaclass=Layer, op=F.feature_alpha_dropout):
    def forward(self, input):
        return F.feature_alpha_dropout(input, self.p, self.training)
