"""Embeddings. Mirrors torch/nn/modules/sparse.py."""

import torch.nn as stock

import fastnn.functional as F
from fastnn.layers._layer import Layer, attributes

__all__ = ["Embedding", "EmbeddingBag"]


class Embedding(
    stock.Embedding,
    metaclass=Layer,
    op=F.embedding,
    mirrors=True,
    direct=(
        "self.max_norm is None and self.padding_idx is None",
        "_torch.embedding(weight, input, -1, self.scale_grad_by_freq, self.sparse)",
    ),
):
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


class EmbeddingBag(stock.EmbeddingBag, metaclass=Layer):
    def forward(self, input, offsets=None, per_sample_weights=None):
        return F.embedding_bag(
            input,
            self.weight,
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )
