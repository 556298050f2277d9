"""Cross entropy: rows around a block, spatial shapes and layouts, every option, special values."""

import torch

from fastnn.testing import Case, classes, randn, values

INF, NAN = float("inf"), float("nan")


def probabilities(*shape, grad=False, dtype=None):
    """Maker of distributions over dimension 1, in the row's dtype or in `dtype`."""

    def make(row_dtype, device):
        t = torch.randn(shape).softmax(1 if len(shape) > 1 else 0)
        return t.to(device, dtype or row_dtype).requires_grad_(grad)

    return make


def weights(n):
    def make(dtype, device):
        return (torch.arange(n) / 4).to(device, dtype)

    return make


def byte(*shape, high):
    def make(dtype, device):
        return torch.randint(high, shape, dtype=torch.uint8).to(device)

    return make


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


IMAGE = (2, 10, 5, 7)
PIXELS = (2, 5, 7)

CASES: list[Case] = [
    # class indices: one past a block, a vocabulary, an odd one, packed rows, one row, one class
    Case("CrossEntropyLoss", (randn(3, 4097), classes(3, high=4097))),
    Case("CrossEntropyLoss", (randn(1, 262144), classes(1, high=262144)), dtypes=(torch.bfloat16,)),
    Case("CrossEntropyLoss", (randn(2, 8195, scale=8.0), classes(2, high=8195))),
    Case("CrossEntropyLoss", (randn(9, 1000), classes(9, high=1000))),
    Case("CrossEntropyLoss", (randn(1030, 10), classes(1030, high=10))),
    Case("CrossEntropyLoss", (randn(70, 2), classes(70, high=2))),
    Case("CrossEntropyLoss", (randn(3, 1), classes(3, high=1))),
    Case("CrossEntropyLoss", (randn(17), classes(high=17))),
    Case("CrossEntropyLoss", (randn(19), classes(high=19)), {"reduction": "none"}),
    Case("CrossEntropyLoss", (randn(5, 33, 1), classes(5, 1, high=33)), {"reduction": "none"}),
    *(
        Case("CrossEntropyLoss", (randn(*shape), classes(shape[0], *shape[2:], high=10)), options)
        for shape in ((0, 10), (0, 10, 3), (2, 10, 0))
        for options in ({}, {"reduction": "none"}, {"reduction": "sum", "label_smoothing": 0.1})
    ),
    Case("cross_entropy", (randn(6, 10), byte(6, high=10)), {"ignore_index": 3}),
    Case(
        "cross_entropy",
        (randn(6, 10), byte(6, high=10)),
        {"label_smoothing": 0.1},
        stock="dtype",
    ),
    Case("cross_entropy", (randn(17), classes(1, high=17)), stock="shape"),
    # spatial: several tiles of positions, few positions, more than two dimensions of them
    *(
        Case("CrossEntropyLoss", (randn(*IMAGE), classes(*PIXELS, high=10)), {"reduction": r})
        for r in ("mean", "sum", "none")
    ),
    Case("CrossEntropyLoss", (randn(2, 11, 24, 24), classes(2, 24, 24, high=11))),
    Case("CrossEntropyLoss", (randn(3, 300, 4), classes(3, 4, high=300))),
    Case("CrossEntropyLoss", (randn(1, 4, 3, 5, 2), classes(1, 3, 5, 2, high=4))),
    # layouts
    Case("CrossEntropyLoss", (randn(*IMAGE), classes(*PIXELS, high=10)), view=channels_last),
    Case(
        "CrossEntropyLoss",
        (randn(*IMAGE), classes(*PIXELS, high=10, ignore=-100)),
        {"label_smoothing": 0.1, "reduction": "none"},
        view=channels_last,
    ),
    Case("CrossEntropyLoss", (randn(40, 9), classes(9, high=40)), view=lambda x: x.t()),
    Case("CrossEntropyLoss", (randn(9, 40), classes(9, high=20)), view=lambda x: x[:, ::2]),
    Case("CrossEntropyLoss", (randn(9, 40), classes(9, high=20)), view=lambda x: x[:, 3:23]),
    Case("CrossEntropyLoss", (randn(9, 24), classes(4, high=24)), view=lambda x: x[1::2]),
    Case("CrossEntropyLoss", (randn(9, 1), classes(9, high=4)), view=lambda x: x.expand(9, 4)),
    Case("CrossEntropyLoss", (randn(1, 4), classes(9, high=4)), view=lambda x: x.expand(9, 4)),
    Case(
        "CrossEntropyLoss", (randn(3, 10, 6, 4), classes(3, 3, 4, high=10)),
        view=lambda x: x[:, :, ::2],
    ),
    Case(
        "CrossEntropyLoss", (randn(10, 3, 4, 5), classes(3, 4, 5, high=10)),
        view=lambda x: x.transpose(0, 1),
    ),
    # weight, ignore_index, smoothing, together and apart
    Case("CrossEntropyLoss", (randn(4, 3), classes(4, high=3)), {"weight": torch.arange(3.0)}),
    *(
        Case(
            "cross_entropy",
            (randn(*shape), classes(shape[0], *shape[2:], high=10, ignore=ignore), weights(10)),
            {"ignore_index": ignore, "reduction": reduction, "label_smoothing": smoothing},
        )
        for shape in ((9, 10), (2, 10, 5))
        for ignore in (-100, 3)
        for reduction, smoothing in (("mean", 0.0), ("mean", 0.1), ("none", 0.2), ("sum", 1.0))
    ),
    Case("CrossEntropyLoss", (randn(9, 2049), classes(9, high=2049)), {"label_smoothing": 0.1}),
    Case("CrossEntropyLoss", (randn(4, 10), classes(4, high=1, ignore=0)), {"ignore_index": 0}),
    Case(
        "CrossEntropyLoss",
        (randn(4, 10), classes(4, high=1)),
        {"ignore_index": 0, "label_smoothing": 0.1},
    ),
    # special values
    Case("CrossEntropyLoss", (randn(6, 50, shift=1e4), classes(6, high=50))),
    Case("CrossEntropyLoss", (randn(6, 50, scale=1e4), classes(6, high=50))),
    Case("CrossEntropyLoss", (randn(6, 50, scale=1e-4), classes(6, high=50))),
    Case(
        "CrossEntropyLoss",
        (randn(3, 5000, shift=1e3), classes(3, high=5000)),
        {"label_smoothing": 0.1},
        dtypes=(torch.float32,),
    ),
    *(
        Case("CrossEntropyLoss", (values(*numbers), classes(high=high)), options)
        for numbers, high in (
            ((1.0, -INF, 3.0, -INF), 1),
            ((-INF, 1.0, 2.0), 1),
            ((-INF, -INF, -INF), 1),
            ((INF, 1.0, 2.0), 1),
            ((1.0, NAN, 2.0), 1),
        )
        for options in ({}, {"label_smoothing": 0.1})
    ),
    # class probabilities
    Case("CrossEntropyLoss", (randn(3, 4097), probabilities(3, 4097))),
    Case("CrossEntropyLoss", (randn(260, 10), probabilities(260, 10, grad=True))),
    Case("CrossEntropyLoss", (randn(16), probabilities(16)), {"reduction": "none"}),
    Case("CrossEntropyLoss", (randn(0, 10), probabilities(0, 10, grad=True))),
    Case("CrossEntropyLoss", (randn(*IMAGE), randn(*IMAGE)), {"reduction": "none"}),
    Case("CrossEntropyLoss", (randn(*IMAGE), probabilities(*IMAGE)), view=channels_last),
    Case("CrossEntropyLoss", (randn(4, 10, grad=False), probabilities(4, 10, grad=True))),
    *(
        Case(
            "cross_entropy",
            (randn(2, 10, 5), probabilities(2, 10, 5, grad=grad), weights(10)),
            {"label_smoothing": smoothing, "reduction": reduction},
        )
        for grad, smoothing, reduction in (
            (False, 0.0, "mean"),
            (True, 0.1, "none"),
            (True, 0.0, "sum"),
        )
    ),
    Case("CrossEntropyLoss", (values(1.0, -INF, 3.0), values(0.5, 0.25, 0.25))),
    # dtypes: a result in the widest of them, or in fp32 under autocast
    Case("CrossEntropyLoss", (randn(4, 24), probabilities(4, 24, grad=True, dtype=torch.float32))),
    Case("CrossEntropyLoss", (randn(4, 24), probabilities(4, 24, dtype=torch.bfloat16))),
    *(
        Case("CrossEntropyLoss", inputs, options, autocast=dtype)
        for dtype in (torch.bfloat16, torch.float16)
        for inputs, options in (
            ((randn(4, 10), classes(4, high=10)), {}),
            ((randn(4, 10), classes(4, high=10)), {"label_smoothing": 0.1, "reduction": "none"}),
            ((randn(*IMAGE), classes(*PIXELS, high=10)), {}),
            ((randn(4, 10), probabilities(4, 10, grad=True)), {}),
        )
    ),
    Case("CrossEntropyLoss", (randn(4, 10), classes(4, high=10)), dtypes=(torch.float64,),
         stock="dtype"),
]  # fmt: skip
