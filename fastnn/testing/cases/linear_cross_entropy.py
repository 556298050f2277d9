"""Linear cross entropy: every option, chunks, autocast, the calls that run stock."""

import torch

from fastnn.testing import Case, classes, randn
from fastnn.testing.cases.cross_entropy import probabilities, weights

F32 = (torch.float32,)


def row(N=9, K=12, C=17, ignore=None, **options):
    inputs = (randn(N, K), randn(C, K, scale=0.3), classes(N, high=C, ignore=ignore))
    return Case("linear_cross_entropy", inputs, options)


CLUSTERS = {"in_features": 16, "n_classes": 23, "cutoffs": [5, 11]}


def among(*targets):
    return lambda dtype, device: torch.tensor(targets, device=device)


def one(target):
    return lambda dtype, device: torch.tensor(target, device=device)


CASES: list[Case] = [
    *(row(reduction=r) for r in ("mean", "sum", "none")),
    *(row(linear_bias=randn(17), reduction=r) for r in ("mean", "none")),
    *(row(ignore=-100, reduction=r) for r in ("mean", "sum", "none")),
    row(ignore=3, ignore_index=3),
    *(row(weight=weights(17), ignore=-100, reduction=r) for r in ("mean", "none")),
    *(row(label_smoothing=0.1, weight=w, ignore=-100) for w in (None, weights(17))),
    row(N=1, K=1, C=1),
    row(N=3, K=5, C=1030),
    *(
        Case(
            "linear_cross_entropy",
            (randn(7, 12, grad=x), randn(17, 12, grad=w), classes(7, high=17)),
            {"linear_bias": randn(17, grad=b)},
        )
        for x, w, b in (
            (True, False, False),
            (False, True, False),
            (False, False, True),
            (False, False, False),
        )
    ),
    Case(
        "linear_cross_entropy",
        (randn(12, 7), randn(17, 12), classes(7, high=17)),
        view=lambda x: x.t(),
    ),
    Case(
        "linear_cross_entropy",
        (randn(7, 12), randn(17, 12), classes(7, high=17)),
        {"linear_bias": randn(17)},
        autocast=torch.bfloat16,
        dtypes=F32,
    ),
    *(
        Case(
            "linear_cross_entropy",
            (randn(12), randn(17, 12), classes(high=17)),
            {"reduction": r, "linear_bias": randn(17)},
        )
        for r in ("mean", "none")
    ),
    *(
        Case(
            "linear_cross_entropy",
            (randn(4, 12), randn(17, *shape, 12), classes(4, *shape, high=17)),
            {"reduction": r, "linear_bias": randn(17, *shape), "weight": weights(17)},
        )
        for r in ("mean", "none")
        for shape in ((2,), (3, 1, 2))
    ),
    *(
        Case(
            "linear_cross_entropy",
            (randn(4, 12), randn(17, *shape, 12), probabilities(4, 17, *shape)),
            {"reduction": r, "label_smoothing": 0.1 if shape else 0.0},
        )
        for r in ("mean", "none")
        for shape in ((), (2,))
    ),
    Case(
        "linear_cross_entropy",
        (randn(4, 12), randn(17, 12), probabilities(4, 17, grad=True)),
        stock="autograd",
    ),
    Case("linear_cross_entropy", (randn(0, 12), randn(17, 12), classes(0, high=17)), stock="empty"),
    *(
        Case("LinearCrossEntropyLoss", (randn(6, 10), classes(6, high=13)), options)
        for options in (
            {"in_features": 10, "num_classes": 13},
            {"in_features": 10, "num_classes": 13, "bias": True, "reduction": "sum"},
            {"in_features": 10, "num_classes": 13, "weight": weights(13), "label_smoothing": 0.2},
        )
    ),
    # an adaptive softmax: clusters without rows, one row, no batch, a bias, several clusters
    Case("AdaptiveLogSoftmaxWithLoss", (randn(33, 16), classes(33, high=23)), CLUSTERS),
    Case("AdaptiveLogSoftmaxWithLoss", (randn(4, 16), among(0, 3, 4, 1)), CLUSTERS),
    Case(
        "AdaptiveLogSoftmaxWithLoss",
        (randn(4, 16), among(11, 22, 12, 0)),
        {**CLUSTERS, "head_bias": True, "div_value": 2.0},
    ),
    Case("AdaptiveLogSoftmaxWithLoss", (randn(16), one(7)), CLUSTERS),
    Case("AdaptiveLogSoftmaxWithLoss", (randn(1, 16), among(22)), CLUSTERS),
    Case(
        "AdaptiveLogSoftmaxWithLoss", (randn(3, 16), among(1, 9, 9)), {**CLUSTERS, "cutoffs": [22]}
    ),
]
