"""Distances and losses of rows: short and long rows, every reduction, broadcasting, layouts."""

import torch

from fastnn.testing import Case, classes, randn, values
from fastnn.testing.cases.loss import (
    REDUCTIONS,
    channels_last,
    halved,
    of,
    signs,
    transposed,
    uniform,
)

INF, NAN = float("inf"), float("nan")


def duplicate(*shape):
    """Maker of rows of which the first is zero."""

    def make(dtype, device):
        x = torch.randn(shape)
        x[0] = 0.0
        return x.to(device, dtype).requires_grad_()

    return make


EMBEDDINGS = (randn(9, 40), randn(9, 40), signs(9))
TRIPLET = (randn(9, 40), randn(9, 40), randn(9, 40))
PAIRWISE = {"distance_function": lambda dtype, device: torch.pairwise_distance}

CASES: list[Case] = [
    # rows of one element, one past a block, many short ones; one row, none; vectors
    *(
        Case("CosineSimilarity", (randn(*shape), randn(*shape)))
        for shape in ((9, 40), (3, 2), (2, 4097), (1030, 10), (1, 16), (0, 5))
    ),
    Case("CosineSimilarity", (randn(17), randn(17)), {"dim": 0}),
    Case("CosineSimilarity", (randn(17, 3), randn(17, 3)), {"dim": 0}),
    # a row of zeros without an eps: the cosine and its gradient are nan
    Case("CosineSimilarity", (duplicate(3, 7), randn(3, 7)), {"eps": 0.0}),
    Case("CosineSimilarity", (randn(2, 5, 24), randn(2, 5, 24)), {"dim": -1}),
    Case("CosineSimilarity", (randn(2, 11, 6, 8), randn(2, 11, 6, 8))),
    Case("CosineSimilarity", (randn(2, 11, 6, 8), randn(2, 11, 6, 8)), view=channels_last),
    Case("CosineSimilarity", (randn(3, 1, grad=False), randn(3, 1, grad=False))),
    Case("CosineSimilarity", (randn(2, 3, 4, 5), randn(2, 3, 4, 5)), {"dim": 2},
         view=channels_last),
    Case("CosineSimilarity", (randn(9, 4), randn(4, 9)), view=transposed),
    Case("CosineSimilarity", (randn(4, 18), randn(4, 9)), view=halved),
    Case("CosineSimilarity", (randn(4, 1, 24), randn(1, 3, 24)), {"dim": -1}),
    Case("CosineSimilarity", (randn(4, 24), randn(24))),
    Case("CosineSimilarity", (randn(4, 24), randn(4, 1))),
    Case("CosineSimilarity", (duplicate(3, 8), randn(3, 8)), {"eps": 1e-3}),
    Case("CosineSimilarity", (randn(3, 8, scale=1e-3), randn(3, 8)), {"eps": 0.1}),
    Case("CosineSimilarity", (randn(3, 8, scale=1e4), randn(3, 8, scale=1e-4))),
    Case("CosineSimilarity", (randn(3, 8, shift=30.0), randn(3, 8, shift=30.0))),
    Case("CosineSimilarity", (values(1.0, NAN), values(1.0, 2.0)), {"dim": 0}),
    Case("CosineSimilarity", (randn(3, 8, grad=False), randn(3, 8))),
    Case("CosineSimilarity", (randn(3, 8), of(randn(3, 8), torch.float32))),
    Case("CosineSimilarity", (randn(3, 8), randn(3, 8)), autocast=torch.bfloat16),
    Case("cosine_similarity", (randn(), randn()), {"dim": 0}, stock="shape"),
    Case("cosine_similarity", (randn(3, 0), randn(3, 0)), stock="empty"),
    # distances of every exponent
    *(
        Case("PairwiseDistance", (randn(9, 40), randn(9, 40)), {"p": p, "keepdim": keepdim})
        for p, keepdim in ((2.0, False), (1.0, True), (3.0, False), (1.5, False), (0.5, False))
    ),
    Case("PairwiseDistance", (randn(2, 4097), randn(2, 4097))),
    Case("PairwiseDistance", (randn(1030, 10), randn(1030, 10)), {"p": 1.0}),
    Case("PairwiseDistance", (randn(17), randn(17))),
    Case("PairwiseDistance", (randn(0, 5), randn(0, 5)), {"keepdim": True}),
    Case("PairwiseDistance", (randn(2, 5, 24), randn(24))),
    Case("PairwiseDistance", (randn(4, 1, 24), randn(3, 24))),
    Case("PairwiseDistance", (randn(9, 4), randn(4, 9)), view=transposed),
    Case("PairwiseDistance", (duplicate(3, 8), duplicate(3, 8)), {"eps": 0.0}),
    Case("PairwiseDistance", (duplicate(3, 8), duplicate(3, 8)), {"eps": 0.0, "p": 3.0}),
    Case("PairwiseDistance", (values(1.0, INF), values(1.0, 2.0))),
    Case("PairwiseDistance", (randn(3, 8), randn(3, 8)), autocast=torch.bfloat16),
    Case("PairwiseDistance", (randn(3, 8), randn(3, 8)), {"p": INF}, stock="option"),
    # triplets
    *(
        Case("TripletMarginLoss", TRIPLET, {"p": p, "swap": swap, "reduction": r, "margin": 2.0})
        for p, swap, r in (
            (2.0, False, "mean"),
            (2.0, True, "none"),
            (1.0, True, "sum"),
            (3.0, True, "mean"),
            (0.5, False, "none"),
        )
    ),
    Case("TripletMarginLoss", (randn(2, 4097), randn(2, 4097), randn(2, 4097)), {"swap": True}),
    Case("TripletMarginLoss", (randn(300, 6), randn(300, 6), randn(300, 6))),
    Case("TripletMarginLoss", (randn(17), randn(17), randn(17))),
    # both distances to the negative are the same
    Case("TripletMarginLoss", (values(1.0, 2.0), values(1.0, 2.0), values(3.0, 1.0)),
         {"swap": True, "margin": 5.0}),
    Case("TripletMarginLoss", (randn(0, 5), randn(0, 5), randn(0, 5))),
    Case("TripletMarginLoss", (randn(2, 5, 8), randn(2, 5, 8), randn(2, 1, 8))),
    Case("TripletMarginLoss", (randn(3, 8), randn(3, 8), randn(3, 8)), autocast=torch.bfloat16),
    *(
        Case("TripletMarginWithDistanceLoss", TRIPLET, {"swap": swap, "reduction": r})
        for swap, r in ((False, "mean"), (True, "none"), (True, "sum"))
    ),
    Case("TripletMarginWithDistanceLoss", (randn(2, 5, 8), randn(2, 5, 8), randn(2, 1, 8))),
    Case("TripletMarginWithDistanceLoss", (randn(3, 8), randn(3, 8), randn(3, 8)),
         autocast=torch.bfloat16),
    Case("triplet_margin_with_distance_loss", TRIPLET,
         PAIRWISE),
    Case("triplet_margin_with_distance_loss", TRIPLET,
         {"distance_function": lambda dtype, device: torch.cosine_similarity},
         stock="option"),
    # cosine embedding
    *(Case("CosineEmbeddingLoss", EMBEDDINGS, {"reduction": r, "margin": 0.2}) for r in REDUCTIONS),
    Case("CosineEmbeddingLoss", (randn(5, 8), randn(5, 8), values(1, -1, 0, 2, 1, grad=False))),
    Case("CosineEmbeddingLoss", (randn(17), randn(17), signs())),
    Case("CosineEmbeddingLoss", (randn(2, 4097), randn(2, 4097), signs(2, dtype=torch.int64))),
    Case("CosineEmbeddingLoss", (randn(0, 5), randn(0, 5), signs(0))),
    Case("CosineEmbeddingLoss", (duplicate(3, 8), randn(3, 8), signs(3)),
         dtypes=(torch.float32, torch.bfloat16)),  # in float16 a gradient overflows
    Case("CosineEmbeddingLoss", (randn(3, 8), randn(3, 8), signs(3)), autocast=torch.bfloat16),
    # multi margin
    *(
        Case(
            "MultiMarginLoss", (randn(9, 40), classes(9, high=40)),
            {"p": p, "margin": 0.7, "reduction": r, "weight": weight},
            dtypes=(torch.float32,),
        )
        for p, r, weight in (
            (1, "mean", None),
            (2, "sum", None),
            (1, "none", torch.arange(40) / 10),
            (2, "mean", torch.arange(40) / 10),
        )
    ),
    Case("MultiMarginLoss", (randn(2, 4097), classes(2, high=4097)), dtypes=(torch.float32,)),
    Case("MultiMarginLoss", (randn(300, 3), classes(300, high=3)), dtypes=(torch.float32,)),
    Case("MultiMarginLoss", (randn(17), classes(high=17)), dtypes=(torch.float32,)),
    Case("MultiMarginLoss", (randn(40, 9), classes(9, high=40)), view=transposed,
         dtypes=(torch.float32,)),
    Case("MultiMarginLoss", (randn(3, 8), classes(3, high=8)), autocast=torch.bfloat16),
    # multi-label soft margin
    *(
        Case("MultiLabelSoftMarginLoss", (randn(9, 40), uniform(9, 40)),
             {"reduction": r, "weight": w})
        for r in REDUCTIONS
        for w in (None, torch.arange(40) / 10)
    ),
    Case("multilabel_soft_margin_loss", (randn(9, 40), uniform(9, 40)),
         {"reduction": "none", "weight": uniform(40)}),
    Case("MultiLabelSoftMarginLoss", (randn(2, 3, 7), uniform(2, 3, 7)), {"reduction": "none"}),
    Case("MultiLabelSoftMarginLoss", (randn(7), uniform(7)), {"reduction": "none"}),
    Case("MultiLabelSoftMarginLoss", (randn(7), uniform(7))),
    Case("MultiLabelSoftMarginLoss", (randn(2, 7), uniform(7)), {"reduction": "sum"}),
    *(
        Case("MultiLabelSoftMarginLoss",
             (values(-80.0, -20.0, 20.0, 80.0, INF, -INF, NAN), values(*(t,) * 7, grad=False)),
             {"reduction": "none"})
        for t in (0.0, 1.0)
    ),
    Case("MultiLabelSoftMarginLoss", (randn(3, 8), uniform(3, 8)), autocast=torch.bfloat16),
]  # fmt: skip
