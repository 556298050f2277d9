"""Pooling, where a row cannot reach: what is kept, determinism, bytes against stock, corners."""

import inspect

import pytest
import torch
import torch.nn.functional as stock

import fastnn.functional as F
from fastnn import backend
from fastnn.bench import cases, predict
from fastnn.layers._layer import OURS
from fastnn.testing.cases import CASES
from fastnn.testing.meter import Cost, traffic
from tests.errors import assert_same_error
from tests.marks import interpreted, on_device


def has_gradient(row):
    return row.make(torch.float32, "cpu")[0].requires_grad


# One row of each layer and function.
ROWS = {
    c.name: c
    for c in CASES
    if "ool" in c.name and c.stock is None and c.autocast is None and has_gradient(c)
}


def call(row):
    """The row's call in float32, and the input that wants its gradient."""
    torch.manual_seed(0)
    x, *rest = row.make(torch.float32, "cpu")
    given = {k: v(torch.float32, "cpu") if callable(v) else v for k, v in row.options.items()}
    if row.is_layer:
        function, given = OURS[getattr(torch.nn, row.name)](**given), {}
    else:
        function = getattr(F, row.name)
    seen = x if row.view is None else row.view(x)
    return lambda: function(seen, *rest, **given), x


@interpreted
@pytest.mark.parametrize("name", sorted(ROWS))
def test_deterministic_algorithms_have_nothing_to_raise(name):
    run, x = call(ROWS[name])
    torch.use_deterministic_algorithms(True)
    try:
        with backend("triton"):
            out = run()
            out = out[0] if isinstance(out, tuple) else out
            out.backward(torch.ones_like(out))
    finally:
        torch.use_deterministic_algorithms(False)
    assert x.grad is not None


@interpreted
def test_a_byte_is_kept_of_a_window_and_nothing_without_a_gradient():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with backend("triton"):
        with hooks, traffic() as trained:
            F.max_pool2d(x, 2)
        with torch.no_grad(), traffic() as evaluated:
            F.max_pool2d(x, 2)
    assert [(t.dtype, t.shape) for t in kept if t is not x] == [(torch.uint8, (2, 3, 4, 4))]
    windows = 2 * 3 * 4 * 4
    assert trained.distinct["store"] == windows * (4 + 1)
    assert evaluated.distinct["store"] == windows * 4


@interpreted
@pytest.mark.parametrize(
    ("row", "most"),
    [
        (cases.pool("MaxPool2d", "", 8, 64, 64, 64, kernel_size=2), 0.62),
        (cases.pool("MaxPool2d", "", 8, 64, 64, 64, last=True, **cases.STEM), 0.62),
        (cases.pool("AvgPool2d", "", 8, 64, 64, 64, kernel_size=2), 1.0),
    ],
    ids=str,
)
def test_bytes_against_stock(row, most):
    with predict.as_on_the_gpu():
        ours, _ = predict.our_costs(row, torch.bfloat16)
    theirs = predict.stock_costs(row, torch.bfloat16)
    assert sum(c.bytes for c in ours) <= most * sum(theirs, Cost(0, 0)).bytes


@pytest.mark.parametrize("name", [n for n in dir(F) if n.startswith(("max_pool", "fractional"))])
def test_dispatchers_look_like_stock(name):
    ours, its = getattr(F, name), getattr(stock, name)
    if name.endswith("_with_indices"):
        assert ours is its
        return
    assert inspect.signature(ours) == inspect.signature(its)
    table = torch._jit_internal.boolean_dispatched
    assert table[ours] is table[its]


@on_device
@pytest.mark.parametrize(
    "call",
    [
        lambda F, x: F.max_pool2d(x, 3, 1, 2),
        lambda F, x: F.max_pool2d(x, 0),
        lambda F, x: F.max_pool2d(x, 2.0),
        lambda F, x: F.max_pool2d(x, (2, 2, 2)),
        lambda F, x: F.max_pool2d(x, 9),
        lambda F, x: F.max_pool2d(x[0, 0], 2),
        lambda F, x: F.max_pool2d(x[:, :0], 2),
        lambda F, x: F.max_pool3d(x[None, :, :0], 2),
        lambda F, x: F.max_pool1d(x[0], 3, 1, 2),
        lambda F, x: F.max_pool1d(x[0], 9),
        lambda F, x: F.avg_pool2d(x, 2, divisor_override=0),
        lambda F, x: F.avg_pool1d(x[0], 9),
        lambda F, x: F.avg_pool3d(x[None], 4, 1, 2),
        lambda F, x: F.adaptive_avg_pool1d(x[0], None),
        lambda F, x: F.adaptive_max_pool2d(x, (2, -1)),
        lambda F, x: F.adaptive_max_pool3d(x, 2.0),
        lambda F, x: F.lp_pool1d(x[0], 0, 2),
        lambda F, x: F.fractional_max_pool2d(x, 2, output_ratio=0.5),
        lambda F, x: F.fractional_max_pool2d(x, 2),
        lambda F, x: F.fractional_max_pool2d(x, 2, output_size=7),
        lambda F, x: F.fractional_max_pool2d(
            x, 2, output_size=2, _random_samples=torch.rand(1, 3, 2)
        ),
        lambda F, x: F.max_unpool2d(x, torch.zeros_like(x), 2),
        lambda F, x: F.max_unpool2d(x, torch.full(x.shape, 99999), 2),
        lambda F, x: F.max_unpool2d(x, torch.zeros(x.shape, dtype=torch.long), 2, None, 0, [3, 3]),
    ],
)
def test_wrong_calls_raise_what_stock_raises(call):
    x = torch.randn(2, 3, 6, 7)
    assert_same_error(lambda: call(F, x), lambda: call(stock, x))


def test_editing_an_input_in_place_raises_where_stocks_does(device):
    for f in (
        lambda F, x: F.max_pool2d(x, 2),
        lambda F, x: F.avg_pool2d(x, 2),
        lambda F, x: F.adaptive_max_pool2d(x, 2),
        lambda F, x: F.lp_pool2d(x, 2, 2),
    ):
        outcomes = []
        for namespace in (F, stock):
            x = torch.randn(1, 2, 4, 4, device=device).requires_grad_() * 1
            with backend("triton"):
                y = f(namespace, x)
            with torch.no_grad():
                x.add_(1)
            try:
                y.sum().backward()
                outcomes.append(None)
            except RuntimeError as e:
                outcomes.append(type(e))
        assert outcomes[0] == outcomes[1]
