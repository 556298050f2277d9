"""Ops along rows beyond the parity rows: long rows, autocast, compile, second order."""

import warnings

import pytest
import torch
import torch.nn.functional as stock

import fastnn.functional as F
from fastnn import kernels
from fastnn._mode import backend
from fastnn.testing import Case, Side, assert_parity, compare_sides, randn
from tests.errors import assert_same_error
from tests.marks import on_device


@pytest.mark.parametrize("programs", [2, 64], ids=["whole", "split"])
@pytest.mark.parametrize(
    "case",
    [
        Case("layer_norm", (randn(3, 150, shift=30.0), (150,), randn(150), randn(150))),
        Case("rms_norm", (randn(3, 150), (150,), randn(150))),
        Case("softmax", (randn(3, 150, scale=2.0), 1)),
        Case("log_softmax", (randn(3, 150, scale=2.0), 1)),
        Case("softmin", (randn(3, 150), 1)),
    ],
    ids=str,
)
def test_a_row_too_long_for_registers(case, programs, monkeypatch, device):
    for file in (kernels.norm, kernels.softmax):
        monkeypatch.setattr(file, "ROW", 32)
    monkeypatch.setattr(kernels.norm, "ROW_BWD", 32)
    monkeypatch.setattr(kernels._rows, "BLOCK", 32)
    monkeypatch.setattr(kernels._rows, "PROGRAMS", programs)
    assert (kernels._rows.split(3, 150)[0] > 1) == (programs > 3)
    assert_parity(case, torch.float32, device)


def test_a_row_of_minus_infinity_in_one_chunk(monkeypatch, device):
    monkeypatch.setattr(kernels.softmax, "ROW", 32)
    monkeypatch.setattr(kernels._rows, "BLOCK", 32)
    x = torch.randn(2, 200, device=device)
    x[0, :150] = x[1] = -float("inf")
    with backend("triton"):
        torch.testing.assert_close(F.softmax(x, 1), stock.softmax(x, 1), equal_nan=True)
        torch.testing.assert_close(F.log_softmax(x, 1), stock.log_softmax(x, 1), equal_nan=True)


def test_a_narrower_dtype_rounds_the_input_first(device):
    """1e5 is inf in float16. A more accurate result would differ from stock."""
    x = torch.tensor([1e5, 1.0], device=device)
    with backend("triton"):
        ours = F.softmax(x, 0, dtype=torch.float16)
    assert torch.equal(ours.isnan(), stock.softmax(x, 0, dtype=torch.float16).isnan())


CALLS = {
    "layer_norm": lambda F, x, w, b: F.layer_norm(x, (x.shape[-1],), w, b),
    "rms_norm": lambda F, x, w, b: F.rms_norm(x, (x.shape[-1],), w),
    "softmax": lambda F, x, w, b: F.softmax(x * w + b, -1),
    "log_softmax": lambda F, x, w, b: F.log_softmax(x * w + b, 0),
    "softmin": lambda F, x, w, b: F.softmin(x * w + b, 1, dtype=torch.float32),
}


def _inputs(device, *shape):
    torch.manual_seed(0)
    made = torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape[-1])
    return [t.to(device).requires_grad_() for t in made]


def _gradients(y, inputs, **options):
    dy = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view_as(y)
    return torch.autograd.grad(y, inputs, dy, allow_unused=True, **options)


# Dynamo itself makes an instance of an autograd.Function, which warns.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", CALLS)
def test_kernels_inside_a_compiled_graph(name, dynamic, device):
    call = CALLS[name]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *t: call(F, *t), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    with backend("triton"):
        for shape in ((3, 8), (5, 12)):
            inputs = _inputs(device, *shape)
            ours, eager = compiled(*inputs), call(F, *inputs)
            assert torch.equal(ours, eager)
            pairs = zip(_gradients(ours, inputs), _gradients(eager, inputs), strict=True)
            for a, b in pairs:
                assert (a is None and b is None) or torch.equal(a, b)
            with torch.no_grad():
                assert torch.equal(compiled(*inputs), eager)


@pytest.mark.parametrize("name", CALLS)
def test_second_order(name, device):
    """The gradient of the gradient is that of stock, also with a tensor passed twice."""
    call = CALLS[name]
    inputs = _inputs(device, 3, 6)

    def twice(F):
        first = _gradients(call(F, *inputs), inputs, create_graph=True)
        total = sum(g.square().sum() for g in first if g is not None)
        return torch.autograd.grad(total, inputs, allow_unused=True)

    with backend("triton"):
        ours = twice(F)
    for a, b in zip(ours, twice(stock), strict=True):
        torch.testing.assert_close(a, b)
    x = inputs[1]

    def same_twice(F):
        y = call(F, x[None], x, x)
        (g,) = _gradients(y, [x], create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    with backend("triton"):
        got = same_twice(F)
    torch.testing.assert_close(got, same_twice(stock))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_under_the_rule_of_cuda_autocast(name, dtype, device):
    """With 16-bit inputs and float32 parameters the result is computed and returned in float32, and
    each gradient has the dtype of its input. Stock converts the inputs first."""
    op = getattr(F, name).op
    arguments = {
        "layer_norm": lambda x, w, b: (x, (9,), w, b),
        "rms_norm": lambda x, w, b: (x, (9,), w),
    }.get(name, lambda x, w, b: (x, 1))

    def fused(x, w, b):
        return op.fused(*arguments(x, w, b), out_dtype=torch.float32)

    def cast(x, w, b):
        return op.stock(*arguments(x.to(w.dtype), w, b))

    x, w, b = _inputs(device, 4, 9)
    x = x.detach().to(dtype).requires_grad_()
    y = fused(x, w, b)
    assert y.dtype == torch.float32
    used = [t for t in (x, w, b) if any(t is a for a in arguments(x, w, b))]
    ours, theirs = _gradients(y, used), _gradients(cast(x, w, b), used)
    torch.testing.assert_close(y, cast(x, w, b), rtol=1e-5, atol=1e-6)
    for t, a, s in zip(used, ours, theirs, strict=True):
        assert a.dtype == t.dtype
        torch.testing.assert_close(a, s, rtol=2 * torch.finfo(t.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("changed", ["x", "w", "b", "y"])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "softmax", "log_softmax", "softmin"])
def test_in_place_changes_before_backward(name, changed, device):
    """Edits raise where they raise in stock, because a kernel saves what stock saves."""

    def outcome(F):
        x, w, b = _inputs(device, 3, 6)
        x = x * 1
        y = {
            "layer_norm": lambda: F.layer_norm(x, (6,), w, b),
            "rms_norm": lambda: F.rms_norm(x, (6,), w),
        }.get(name, lambda: getattr(F, name)(x, 1))()
        with torch.no_grad():
            {"x": x, "w": w, "b": b, "y": y}[changed].add_(1)
        try:
            y.sum().backward()
        except RuntimeError as e:
            assert "modified by an inplace operation" in str(e)
            return "raises"
        return "passes"

    with backend("triton"):
        ours = outcome(F)
    assert ours == outcome(stock)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "softmin"])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 3, 4)], ids=str)
def test_implicit_dim(name, shape, device):
    """The dim is the one that stock picks, and the warning names the line of the caller."""
    x = torch.randn(shape, device=device)
    for mode in ("triton", "torch", "auto"):
        with warnings.catch_warnings(record=True) as caught, backend(mode):
            warnings.simplefilter("always")
            y = getattr(F, name)(x)
        assert [w.filename for w in caught] == [__file__]
        with pytest.warns(UserWarning, match="Implicit dimension choice"):
            torch.testing.assert_close(y, getattr(stock, name)(x))


@pytest.mark.parametrize(
    "call",
    [
        lambda F: F.layer_norm(torch.ones(3, 4), 4),
        lambda F: F.layer_norm(torch.ones(3, 4), ()),
        lambda F: F.layer_norm(torch.ones(3, 4), (3,)),
        lambda F: F.layer_norm(torch.ones(3, 4), (4,), torch.ones(3)),
        lambda F: F.layer_norm(torch.ones(3, 4), (4,), torch.ones(4).half()),
        lambda F: F.layer_norm(torch.ones(3, 4), (4,), eps=None),
        lambda F: F.rms_norm(torch.ones(3, 4), (2, 3, 4)),
        lambda F: F.softmax(torch.ones(3, 4), 2),
        lambda F: F.softmax(torch.ones(3, 4), 1.0),
        lambda F: F.log_softmax(torch.ones(3, 4), True),
        lambda F: F.softmin(torch.tensor(1.0), 1),
    ],
)
@on_device
def test_wrong_calls_raise_what_stock_raises(call):
    assert_same_error(lambda: call(F), lambda: call(stock))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rms_norm_takes_a_weight_of_another_dtype(dtype, device):
    x, w, _ = _inputs(device, 4, 9)
    x = x.detach().to(dtype).requires_grad_()
    sides = [Side(f) for f in (F.rms_norm, stock.rms_norm, stock.rms_norm)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mismatch dtype")  # from stock, once in a process
        result = compare_sides(*sides, (x, (9,), w), device=device)
    assert not result.failures and result.path == "kernel"
