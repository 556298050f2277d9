"""Each number that an op takes, at values that are infinite, nan, zero, negative, huge or tiny.

docs/scalars.md lists the numbers. Calls that the parity rows make are made again with such a value:
results, gradients and errors are those of stock.
"""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn as stock

import fastnn
import fastnn.functional as F
from tests.calls import Call, differences, recorded
from tests.errors import assert_same_error
from tests.marks import interpreted
from tests.test_scalars import TABLE

UNUSUAL = (
    math.nan,
    math.inf,
    -math.inf,
    0.0,
    -1.0,
    1e300,
    2.5e-39,
)  # the last is a subnormal number
ROWS = 2  # recorded calls of an op that get each of these numbers, in turn of all its calls
# (ops, numbers, words of the difference) that stay: see docs/scalars.md.
STAYS = [
    ("hardshrink hardtanh", (math.nan,), "grad of input"),
    ("elu celu", (math.nan, math.inf, -math.inf), "nan in other places"),
    ("elu", (math.nan, math.inf, -math.inf), "memory of input: written"),  # nan, in place
    ("celu", (math.nan, math.inf, -math.inf), "memory of input: written"),
    ("batch_norm_act", (math.nan,), "grad of bias: finite where stock is not"),
]


def _stays(op: str, value: float, told: str) -> bool:
    return any(
        op in ops.split() and any(str(value) == str(n) for n in numbers) and words in told
        for ops, numbers, words in STAYS
    )


def _calls_with(op: str, number: str, turn: int) -> list[Call]:
    """Some recorded calls of the op, which are given the number by its name."""
    calls = [c for c in recorded().get(op, []) if sum(t.numel() for t in c.tensors().values()) >= 8]
    # a number as the gaussian loss takes one instead of a tensor
    calls = [c for c in calls if not isinstance(c.arguments.get(number), torch.Tensor)]
    return [calls[(turn + i) % len(calls)] for i in range(min(ROWS, len(calls)))]


@interpreted
@pytest.mark.parametrize("op", sorted({op for op, _ in TABLE}))
def test_unusual_numbers_end_as_in_stock(op, record_property):
    """Values, gradients and errors are those of stock for each number of the page."""
    counts: Counter[str] = Counter()
    wrong = []
    numbers = [number for of, number in TABLE if of == op]
    for turn, (number, value) in enumerate(itertools.product(numbers, UNUSUAL)):
        for call in _calls_with(op, number, turn):
            path, found = differences(call.with_(**{number: value}), {})
            counts[path if path in ("kernel", "error") else "stock"] += 1
            known = [w for w in found if _stays(op, value, w)]
            counts["differ as docs say"] += bool(known)
            wrong += [f"{number}={value}: {w} [{call.row}]" for w in found if w not in known]
    record_property("scalars", [item for item in counts.items() if item[1]])
    assert counts
    assert not wrong, "\n".join(wrong)


# ---- Arguments that PyTorch refuses --------------------------------------------------------------

X, IMAGE = torch.linspace(-2, 2, 12).view(3, 4), torch.linspace(-2, 2, 72).view(1, 2, 6, 6)
CLASSES = torch.tensor([0, 1, 2])
LARGE = (2**70, -(2**70), 2**1100)  # a scalar of PyTorch holds 64 bits
REFUSED = [
    *((name, (X,), {number: value}) for value in LARGE for name, number in (
        ("leaky_relu", "negative_slope"), ("elu", "alpha"), ("celu", "alpha"),
        ("hardshrink", "lambd"), ("softplus", "beta"), ("softplus", "threshold"),
        ("gumbel_softmax", "tau"), ("normalize", "eps"),
    )),
    *(("threshold", (X, *given), {}) for given in ((2**70, 0.0), (0.0, 2**70))),
    ("hardtanh", (X,), {"min_val": -(2**70)}), ("hardtanh", (X,), {"max_val": 2**70}),
    ("rrelu", (X,), {"upper": 2**70}), ("softshrink", (X,), {"lambd": 2**70}),
    ("local_response_norm", (IMAGE, 2), {"alpha": 2**70}),
    ("gaussian_nll_loss", (X, X, X.abs() + 1), {"eps": 2**70}),
    ("multi_margin_loss", (X, CLASSES), {"margin": 2**70}),
    ("multi_margin_loss", (X, CLASSES), {"p": torch.tensor([1])}),
    *((name, (X, CLASSES), {"ignore_index": i}) for name in ("cross_entropy", "nll_loss")
      for i in (True, 2**70)),
    *(("embedding", (CLASSES, X), {"padding_idx": i}) for i in (True, 1.0, torch.tensor(0.3))),
    *(("embedding_bag", (CLASSES[None], X), {"padding_idx": i}) for i in (True, 1.0)),
    # flags that are no bool
    ("kl_div", (X, X), {"log_target": 1}), ("poisson_nll_loss", (X, X), {"full": 1}),
    ("poisson_nll_loss", (X, X), {"log_input": 0}), ("pairwise_distance", (X, X, 2.0, 1e-6, 1), {}),
    ("instance_norm", (IMAGE,), {"use_input_stats": 1}),
    ("batch_norm", (IMAGE, None, None, None, None, 1), {}),
    ("lp_pool2d", (IMAGE, 2, [2]), {}),
    ("conv_transpose1d", (IMAGE[0, :, 0], torch.ones(2, 2, 3), None, 1, 0, None), {}),
]  # fmt: skip


@interpreted
@pytest.mark.parametrize("mode", ["auto", "triton"])
@pytest.mark.parametrize(("name", "given", "options"), REFUSED)
def test_what_pytorch_refuses_is_refused(name, given, options, mode):
    """Also where a kernel is forced, which would compute something."""
    ours, its = getattr(F, name), getattr(torch.nn.functional, name)
    assert_same_error(lambda: ours(*given, **options), lambda: its(*given, **options), mode=mode)


ACTIVATIONS = [
    lambda nn: nn.LeakyReLU(2**70), lambda nn: nn.ELU(2**70), lambda nn: nn.Hardtanh(0, 2**70)
]  # fmt: skip


@interpreted
@pytest.mark.parametrize("mode", ["auto", "triton"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("fused", [False, True], ids=["alone", "behind a linear"])
def test_layers_with_a_number_beyond_64_bits(activation, fused, mode, simulate):
    simulate(least=0, source="the test")

    def call(nn):
        layer = activation(nn)
        return nn.Sequential(nn.Linear(4, 4), layer)(X) if fused else layer(X)

    assert_same_error(lambda: call(fastnn), lambda: call(stock), mode=mode)


@interpreted
@pytest.mark.parametrize(("name", "x"), [("avg_pool1d", IMAGE[0]), ("avg_pool2d", IMAGE)])
def test_a_stride_of_numpy(name, x):
    """PyTorch takes such an integer, and no kernel does."""
    function = getattr(F, name)
    with fastnn.backend("triton"), pytest.raises(fastnn.BackendError, match="stride"):
        function(x, 2, np.int64(1))
    want = getattr(torch.nn.functional, name)(x, 2, np.int64(1))
    assert torch.equal(function(x, 2, np.int64(1)), want)


@interpreted
@pytest.mark.parametrize("norm_type", [1e39, -1e39, 1e300])
def test_a_norm_that_float32_cannot_hold(norm_type):
    """Kernels have powers in float32; PyTorch on a CPU has others."""
    with fastnn.backend("triton"), pytest.raises(fastnn.BackendError, match="float32"):
        F.lp_pool2d(IMAGE, norm_type, 2)
    want = torch.nn.functional.lp_pool2d(IMAGE, norm_type, 2)
    torch.testing.assert_close(F.lp_pool2d(IMAGE, norm_type, 2), want, equal_nan=True)
