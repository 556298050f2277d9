"""Distances. Mirrors torch/nn/modules/distance.py."""

import torch.nn as stock

import fastnn.functional as F
from fastnn.layers._layer import Layer

__all__ = ["CosineSimilarity", "PairwiseDistance"]


class PairwiseDistance(stock.PairwiseDistance, metaclass=Layer, op=F.pairwise_distance):
    def forward(self, x1, x2):
        return F.pairwise_distance(x1, x2, self.norm, self.eps, self.keepdim)


class CosineSimilarity(stock.CosineSimilarity, metaclass=Layer, op=F.cosine_similarity):
    def forward(self, x1, x2):
        return F.cosine_similarity(x1, x2, self.dim, self.eps)
