"""Embedding. Mirrors torch/nn/modules/sparse.py. EmbeddingBag stays PyTorch's class."""

import torch.nn as stock

import fastnn.functional as F
from fastnn.layers._layer import Layer, attributes

__all__ = ["Embedding"]


class Embedding(stock.Embedding, metaclass=Layer):
    def forward(self, input):
        (weight,) = attributes(self, "weight")
        return F.embedding(
            input,
            weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )
