"""Negative log likelihood: positions around a block, spatial shapes, layouts, every option."""

import torch

from fastnn.testing import Case, classes, randn
from fastnn.testing.cases.cross_entropy import IMAGE, PIXELS, byte, channels_last, weights


def log_probabilities(*shape):
    """Maker of log-softmax values over dimension 1; a leaf with a gradient."""

    def make(dtype, device):
        x = torch.randn(shape).log_softmax(1 if len(shape) > 1 else 0)
        return x.to(device, dtype).requires_grad_()

    return make


CASES: list[Case] = [
    Case("NLLLoss", (log_probabilities(257, 10), classes(257, high=10))),
    Case("NLLLoss", (log_probabilities(2, 4097), classes(2, high=4097))),
    Case("NLLLoss", (log_probabilities(9, 1000), classes(9, high=1000)), {"reduction": "none"}),
    Case("NLLLoss", (log_probabilities(17), classes(high=17))),
    Case("NLLLoss", (log_probabilities(17), classes(high=17)), {"reduction": "none"}),
    Case("NLLLoss", (log_probabilities(5, 1), classes(5, high=1))),
    *(
        Case("NLLLoss", (randn(*shape), classes(shape[0], *shape[2:], high=10)), {"reduction": r})
        for shape in ((0, 10), (0, 10, 3), (2, 10, 0))
        for r in ("mean", "sum", "none")
    ),
    Case("nll_loss", (log_probabilities(6, 10), byte(6, high=10)), {"ignore_index": 3}),
    Case("nll_loss", (log_probabilities(17), classes(1, high=17)), stock="shape"),
    *(
        Case("NLLLoss", (log_probabilities(*IMAGE), classes(*PIXELS, high=10)), {"reduction": r})
        for r in ("mean", "sum", "none")
    ),
    Case("NLLLoss", (log_probabilities(2, 11, 24, 24), classes(2, 24, 24, high=11))),
    Case("NLLLoss", (log_probabilities(3, 300, 4), classes(3, 4, high=300))),
    Case("NLLLoss", (log_probabilities(2, 4, 3, 5, 2), classes(2, 3, 5, 2, high=4))),
    # Without a gradient, because the stock backward raises here on a CPU.
    Case("NLLLoss", (randn(*IMAGE, grad=False), classes(*PIXELS, high=10)), view=channels_last),
    Case("NLLLoss", (randn(40, 9), classes(9, high=40)), view=lambda x: x.t()),
    Case("NLLLoss", (randn(9, 40), classes(9, high=20)), view=lambda x: x[:, ::2]),
    Case("NLLLoss", (log_probabilities(1, 4), classes(9, high=4)), view=lambda x: x.expand(9, 4)),
    Case("NLLLoss", (randn(3, 10, 6, 4), classes(3, 3, 4, high=10)), view=lambda x: x[:, :, ::2]),
    Case("NLLLoss", (randn(4, 3), classes(4, high=3)), {"weight": torch.arange(3.0)}),
    *(
        Case(
            "nll_loss",
            (randn(*shape), classes(shape[0], *shape[2:], high=10, ignore=ignore), weights(10)),
            {"ignore_index": ignore, "reduction": reduction},
        )
        for shape in ((9, 10), (2, 10, 5))
        for ignore in (-100, 3)
        for reduction in ("mean", "sum", "none")
    ),
    Case("NLLLoss", (randn(4, 10), classes(4, high=1)), {"ignore_index": 0}),
    *(
        Case("NLLLoss", (log_probabilities(*shape), target), autocast=dtype)
        for dtype in (torch.bfloat16, torch.float16)
        for shape, target in (((4, 10), classes(4, high=10)), (IMAGE, classes(*PIXELS, high=10)))
    ),
    Case("NLLLoss", (randn(4, 10), classes(4, high=10)), dtypes=(torch.float64,), stock="dtype"),
]
