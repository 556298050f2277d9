"""Pooling, where a row cannot reach: what is kept, determinism, bytes against stock, corners."""

import inspect
import mmap

import pytest
import torch
import torch.nn.functional as stock

import fastnn.functional as F
from fastnn import BackendError, backend
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


# ---- offsets that 32 bits do not hold -----------------------------------------------------------


def far(shape, stride):
    """A float16 tensor with such strides, in memory that takes no room until it is touched.

    An offset that lost its upper bits leads to zeros of the same memory.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # Linux: nothing is reserved
    memory = torch.frombuffer(
        mmap.mmap(-1, 2 * (2**32 + 2**33 + 2**12), flags=flags), dtype=torch.float16
    )
    x = memory.as_strided(shape, stride, 2**32)
    return x.copy_(1 + torch.arange(x.numel()).view(shape) * 37 % 101)


# Planes, then lines, then neighbours are far apart, in either layout.
FAR = {
    "planes": ((2, 3, 4, 6), (2**31 + 8, 24, 6, 1)),
    "channels": ((1, 3, 4, 6), (0, 2**30 + 8, 6, 1)),
    "lines": ((1, 2, 4, 6), (48, 24, 2**30, 1)),
    "neighbours": ((1, 2, 4, 6), (0, 24, 6, 2**29)),
    "pixels": ((2, 8, 4, 6), (2**31 + 8, 1, 2**30, 8)),
}
POOLED = {
    "max": lambda F, x: F.max_pool2d(x, 3, 2, 1, return_indices=True),
    "dilated": lambda F, x: F.max_pool2d(x, 2, 1, 1, 2, return_indices=True),
    "mean": lambda F, x: F.avg_pool2d(x, 2),
    "adaptive": lambda F, x: F.adaptive_max_pool2d(x, (3, 4), return_indices=True),
    "power": lambda F, x: F.lp_pool2d(x, 2, 2),
    "fractional": lambda F, x: F.fractional_max_pool2d(
        x, 2, (2, 3), return_indices=True, _random_samples=torch.full((*x.shape[:2], 2), 0.5).half()
    ),
    "unpool": lambda F, x: F.max_unpool2d(
        x, torch.arange(24).view(4, 6).expand(x.shape).contiguous(), 2
    ),
}


@interpreted
@pytest.mark.parametrize("layout", FAR)
@pytest.mark.parametrize("kind", POOLED)
def test_offsets_of_64_bits(kind, layout):
    x = far(*FAR[layout])
    assert sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) >= 2**31
    found = []
    for namespace, leaf in ((F, x), (stock, x.clone(memory_format=torch.contiguous_format))):
        leaf = leaf.detach().requires_grad_()
        with backend("triton"):
            y = POOLED[kind](namespace, leaf)
        y, *index = y if isinstance(y, tuple) else (y,)
        y.backward(torch.ones_like(y).cumsum(-1))
        found.append((y.detach(), *index, leaf.grad))
    for ours, its in zip(*found, strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-3, atol=0)


@interpreted
@pytest.mark.parametrize("kind", ["max", "adaptive", "mean", "power"])
@pytest.mark.parametrize("steps", [(0, 64, 2**30, 1), (0, 64, 1, 2**30)], ids=["rows", "columns"])
def test_gradients_with_offsets_of_64_bits(kind, steps):
    x = torch.randn(1, 2, 8, 8).half()
    found = []
    for namespace in (F, stock):
        leaf = x.clone().requires_grad_()
        with backend("triton"):
            y = POOLED[kind](namespace, leaf)
            y = y[0] if isinstance(y, tuple) else y
            dy = far(y.shape, steps)
            y.backward(dy if namespace is F else dy.contiguous())
        found.append(leaf.grad)
    torch.testing.assert_close(*found, rtol=1e-3, atol=0)


@interpreted
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("p", [2, 3.0], ids=["square", "power"])
def test_a_power_mean_keeps_a_factor_only_if_windows_overlap(p, last):
    """Elements that no window has, here infinite, are not in the factor of another."""
    x = torch.rand(2, 3, 6, 7) + 0.5
    x[..., 6] = torch.inf
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    for stride, kept in ((2, 0), (1, 1)):
        grads = []
        for namespace in (F, stock):
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            with backend("triton"):
                saved = []
                with torch.autograd.graph.saved_tensors_hooks(
                    lambda t, saved=saved: saved.append(t) or t, lambda t: t
                ):
                    y = namespace.lp_pool2d(leaf[..., : 7 if stride == 2 else 6], p, 2, stride)
                y.cumsum(-1).sum().backward()
            grads.append(leaf.grad)
            if namespace is F:
                assert sum(t.shape == y.shape for t in saved) == kept
        torch.testing.assert_close(*grads, equal_nan=True)


@interpreted
@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda x: F.max_pool1d(x.expand(1, 1, 2**28), 2), "32 bits are too few"),
        (lambda x: F.avg_pool2d(x[None].expand(2**14, 2**14, 1, 1), 1), "32 bits are too few"),
        (lambda x: F.adaptive_avg_pool1d(x.expand(1, 1, 2**27), 2**5), "32 bits are too few"),
        (lambda x: F.lp_pool1d(x.expand(1, 1, 2**28), 2, 2), "32 bits are too few"),
        (
            lambda x: F.max_unpool1d(x.expand(1, 1, 2**27), x.long().expand(1, 1, 2**27), 2),
            "32 bits are too few",
        ),
    ],
)
def test_sizes_that_32_bits_do_not_count_are_refused(call, why):
    with pytest.raises(BackendError, match=why), backend("triton"):
        call(torch.zeros(1, 1, 1))
