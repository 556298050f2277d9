"""Embedding: columns past a tile, runs past a block, frequent and absent rows, padding."""

import torch

from fastnn.testing import Case, classes, randn


def skewed(*shape, high):
    """Maker of indices most of which are 1: a run over several blocks."""

    def make(dtype, device):
        t = torch.randint(high, shape)
        return torch.where(torch.rand(shape) < 0.8, 1, t).to(device)

    return make


def int32(maker):
    return lambda dtype, device: maker(dtype, device).to(torch.int32)


def exactly(*indices):
    return lambda dtype, device: torch.tensor(indices, device=device, dtype=torch.int64)


def rows(V, D, **options):
    return {"num_embeddings": V, "embedding_dim": D, **options}


CASES: list[Case] = [
    Case("Embedding", (classes(3, 5, high=7),), rows(7, 24)),
    Case("Embedding", (int32(classes(3, 5, high=7)),), rows(7, 24, padding_idx=2)),
    Case("Embedding", (classes(2, 2, high=3),), rows(3, 1025)),
    Case("Embedding", (skewed(400, high=5),), rows(5, 16)),
    Case("Embedding", (skewed(300, high=5),), rows(6, 3, scale_grad_by_freq=True, padding_idx=0)),
    Case("Embedding", (exactly(*[0] * 64, *[2] * 128, *[3] * 65),), rows(4, 8)),
    Case("Embedding", (classes(9, high=1),), rows(1, 33)),
    Case("Embedding", (classes(2, high=1),), rows(1, 1)),
    Case("Embedding", (classes(high=5),), rows(5, 6)),
    Case("Embedding", (classes(2, 0, high=5),), rows(5, 6)),
    Case("Embedding", (classes(4, high=5),), rows(5, 0)),
    Case("Embedding", (classes(6, 4, high=5),), rows(5, 6, padding_idx=-1), view=lambda x: x.t()),
    Case("Embedding", (classes(4, high=5),), rows(5, 6, padding_idx=-5)),
    Case("embedding", (exactly(0, 2, 2), randn(4, 10)), {"padding_idx": 2}),
    Case("Embedding", (classes(4, high=5),), rows(5, 6), autocast=torch.bfloat16),
    Case("Embedding", (classes(4, high=5),), rows(5, 6, max_norm=1.0), stock="option"),
    Case("Embedding", (classes(4, high=5),), rows(5, 6, sparse=True), stock="option"),
]
