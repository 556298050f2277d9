"""Linear: odd sizes, any leading shape, strides, empty, autocast; Linear and its neighbours."""

import torch

from fastnn.testing import Case, randn


def layer(m, k, n, **options):
    return Case("Linear", (randn(m, k),), {"in_features": k, "out_features": n, **options})


def function(x, w, b=None, **fields):
    return Case("linear", (x, w) if b is None else (x, w, b), **fields)


def transposed(*shape):
    return lambda dtype, device: randn(*shape)(dtype, device).detach().t().requires_grad_()


LINEAR = [
    *(layer(m, k, n) for m, k, n in ((1, 1, 1), (17, 33, 65), (33, 130, 17), (130, 65, 1))),
    layer(65, 64, 128),  # nothing to mask along K or N, both multiples of a 128-bit access
    layer(3, 72, 200),  # multiples of 8 and not of 16
    layer(1, 130, 33, bias=False),
    layer(600, 24, 40),  # long enough for dW to be summed in several parts
    layer(0, 5, 7),
    function(randn(4, 0), randn(7, 0), randn(7)),
    function(randn(4, 5), randn(0, 5), randn(0)),
    function(randn(0, 5), randn(0, 5)),
    Case("Linear", (randn(33),), {"in_features": 33, "out_features": 17}),
    Case("Linear", (randn(2, 3, 17),), {"in_features": 17, "out_features": 5}),
    Case("Linear", (randn(2, 0, 17),), {"in_features": 17, "out_features": 5}),
    Case("Linear", (randn(2, 2, 3, 16),), {"in_features": 16, "out_features": 16, "bias": False}),
    # Layouts: transposed, every second one, broadcast, leading dims that do not collapse.
    function(randn(33, 17), randn(5, 33), randn(5), view=lambda x: x.t()),
    function(randn(33, 17), randn(5, 17), randn(5), view=lambda x: x[::2]),
    function(randn(17, 66), randn(5, 33), randn(5), view=lambda x: x[:, ::2]),
    function(randn(1, 33), randn(5, 33), randn(5), view=lambda x: x.expand(7, 33)),
    function(randn(7, 1), randn(5, 33), view=lambda x: x.expand(7, 33)),
    function(randn(2, 33, 7), randn(5, 33), randn(5), view=lambda x: x.transpose(1, 2)),
    function(randn(7, 2, 33), randn(5, 33), randn(5), view=lambda x: x.transpose(0, 1)),
    function(randn(40), randn(5, 33), view=lambda x: x[1:34]),
    function(randn(9, 16), transposed(16, 24), randn(24)),
    function(randn(9, 33), transposed(33, 5)),
    # Calls that run stock.
    function(randn(4, 5), randn(5), stock="shape"),
    function(randn(4, 5), randn(3, 5), randn(1), stock="shape"),
    function(randn(4, 5), randn(3, 5), dtypes=(torch.float64,), stock="dtype"),
    # Parameters stay float32, products are 16-bit.
    *(
        Case("Linear", (randn(9, 24),), {"in_features": 24, "out_features": 10}, autocast=low)
        for low in (torch.bfloat16, torch.float16)
    ),
]


def sequence(shape, *members, **fields):
    return Case("Sequential", (randn(*shape),), members=members, **fields)


def linear(k, n, bias=True):
    return lambda nn: nn.Linear(k, n, bias)


ACTIVATIONS = (
    lambda nn: nn.ReLU(),
    lambda nn: nn.ReLU(inplace=True),
    lambda nn: nn.ReLU6(),
    lambda nn: nn.Hardtanh(-0.5, 0.25),
    lambda nn: nn.LeakyReLU(0.2),
    lambda nn: nn.ELU(0.7),
    lambda nn: nn.SELU(),
    lambda nn: nn.GELU(),
    lambda nn: nn.GELU("tanh"),
    lambda nn: nn.SiLU(),
    lambda nn: nn.Mish(),
    lambda nn: nn.Sigmoid(),
    lambda nn: nn.Tanh(),
    lambda nn: nn.Hardsigmoid(),
    lambda nn: nn.Hardswish(),
)
RELU, GELU, TANH = (lambda nn: nn.ReLU()), (lambda nn: nn.GELU()), (lambda nn: nn.Tanh())

# Without a GPU, stock dropout draws other values; tests/test_sequential.py compares them.
SEQUENTIAL = [
    *(sequence((5, 17), linear(17, 33), act) for act in ACTIVATIONS),
    sequence((130, 16), linear(16, 40), GELU, linear(40, 3)),
    sequence((65, 64), linear(64, 72), RELU),
    sequence((70, 7), linear(7, 20), TANH),  # the bias gradient in several parts
    sequence((2, 3, 17), linear(17, 5, bias=False), GELU),
    sequence((17,), linear(17, 5), GELU),
    sequence((0, 17), linear(17, 5), GELU),
    sequence((7, 17), linear(17, 5), RELU, view=lambda x: x[::2]),
    *(
        sequence((9, 17), linear(17, 12), act, lambda nn, p=p: nn.Dropout(p), train=train)
        for act in (RELU, GELU, TANH)
        for p, train in ((0.0, True), (1.0, True), (0.5, False))
    ),
    *(
        sequence((9, 24), linear(24, 10), act, autocast=low, dtypes=(torch.float32,))
        for act in (RELU, GELU)
        for low in (torch.bfloat16, torch.float16)
    ),
    sequence((4, 5), linear(5, 3), GELU, dtypes=(torch.float64,), stock="dtype"),
]

CASES: list[Case] = [*LINEAR, *SEQUENTIAL]
