"""Bags: columns past a tile, bags past a block, empty bags, padding, equal values, weights."""

import torch

from fastnn.testing import Case, classes, randn
from fastnn.testing.cases.embedding import exactly, int32, rows, skewed


def equal_rows(dtype, device):
    """A table in which each value occurs several times: maxima are equal."""
    return torch.randint(-1, 2, (6, 9)).to(device, dtype).requires_grad_()


def spoilt(dtype, device):
    """A table with nan, and with nothing but -inf in a column."""
    w = torch.randn(5, 4)
    w[1], w[:, 3] = float("nan"), -float("inf")
    return w.to(device, dtype)


CASES: list[Case] = [
    *(
        case
        for mode in ("sum", "mean", "max")
        for case in (
            # empty bags, one in the middle and one at the end; a row that occurs twice in a bag
            Case("EmbeddingBag", (exactly(1, 2, 2, 4, 2, 0, 1, 3), exactly(0, 3, 3, 7, 8)),
                 rows(5, 24, mode=mode)),
            Case("EmbeddingBag", (classes(3, 5, high=7),), rows(7, 257, mode=mode)),
            Case("EmbeddingBag", (skewed(150, high=3), exactly(0, 1, 140)),
                 rows(3, 5, mode=mode, padding_idx=0)),
            Case("EmbeddingBag", (int32(exactly(1, 0, 1, 1)), exactly(0, 2, 4)),
                 rows(2, 1, mode=mode, padding_idx=1, include_last_offset=True)),
            Case("EmbeddingBag", (classes(0, high=5), exactly(0, 0)), rows(5, 6, mode=mode)),
        )
    ),
    Case("embedding_bag", (classes(4, 5, high=6), randn(6, 40)),
         {"mode": "sum", "per_sample_weights": randn(4, 5), "padding_idx": 2}),
    Case("embedding_bag", (exactly(3, 0, 3, 3, 1), randn(4, 130), int32(exactly(0, 4))),
         {"mode": "sum", "per_sample_weights": randn(5), "padding_idx": -3}),
    Case("embedding_bag", (classes(4, 30, high=6), equal_rows), {"mode": "max"}),
    Case("embedding_bag", (exactly(0, 1, 2, 1, 3, 4, 1), spoilt, exactly(0, 3, 6)),
         {"mode": "max"}),
    Case("EmbeddingBag", (classes(6, 4, high=5),), rows(5, 6), view=lambda x: x.t()),
    Case("EmbeddingBag", (classes(0, 4, high=5),), rows(5, 6)),
    Case("EmbeddingBag", (classes(2, 4, high=5),), rows(5, 6), autocast=torch.bfloat16),
    Case("EmbeddingBag", (classes(2, 4, high=5),), rows(5, 6, max_norm=1.0), stock="option"),
    Case("EmbeddingBag", (classes(2, 4, high=5),), rows(5, 6, sparse=True), stock="option"),
    Case("EmbeddingBag", (classes(2, 4, high=5),), rows(5, 6, scale_grad_by_freq=True),
         stock="option"),
]  # fmt: skip
