"""Layers read their parameters in a quick way, which finds what `getattr` finds."""

from unittest import mock

import pytest
import torch
import torch.nn as stock
from torch.nn.utils import parametrize

import fastnn as nn
from fastnn import _front
from fastnn._op import intercept
from fastnn.layers._layer import METHODS, OURS, attributes, called, weight_and_bias
from fastnn.testing import fresh_leaves, side_of
from fastnn.testing.cases import CASES
from tests.marks import interpreted

pytestmark = interpreted


def _layers():
    return nn.Linear(3, 4), nn.LayerNorm(4, bias=False), nn.BatchNorm1d(4), stock.Linear(3, 4)


def test_a_quick_answer_is_that_of_getattr():
    """Also where a value lies in the `__dict__`, as after weight_norm, and where there is none."""
    for layer in _layers():
        layer.__dict__["weight"] = torch.ones(2)
        assert attributes(layer, "weight")[0] is layer.weight is layer.__dict__["weight"]
        assert all(
            a is b for a, b in zip(weight_and_bias(layer), (layer.weight, layer.bias), strict=True)
        )
        del layer.__dict__["weight"], layer._parameters["bias"]
        for ask in (weight_and_bias, lambda m: attributes(m, "bias"), lambda m: m.bias):
            with pytest.raises(AttributeError, match="has no attribute 'bias'"):
                ask(layer)
    norm = nn.BatchNorm1d(4)
    names = ("running_mean", "eps", "weight", "num_batches_tracked")
    assert all(a is getattr(norm, n) for a, n in zip(attributes(norm, *names), names, strict=True))


def test_whoever_takes_part_in_getattr_is_asked():
    """Tracers replace `Module.__getattr__`, and parametrized layers are of a subclass."""
    layer, asked = nn.Linear(3, 4), []
    its = stock.Module.__getattr__

    def tell(self, name):
        asked.append(name)
        return its(self, name)

    with mock.patch.object(stock.Module, "__getattr__", tell):
        weight_and_bias(layer), attributes(layer, "bias")
    assert asked == ["weight", "bias", "bias"]

    class Doubled(stock.Module):
        def forward(self, w):
            return 2 * w

    parametrize.register_parametrization(layer, "weight", Doubled())
    plain = layer.parametrizations.weight.original
    assert torch.equal(attributes(layer, "weight")[0], 2 * plain)
    x = torch.randn(2, 3)
    torch.testing.assert_close(layer(x), stock.functional.linear(x, 2 * plain, layer.bias))


def test_a_mirror_calls_the_functions_of_pytorchs_method():
    """A small call runs our `forward` over `torch.nn.functional`."""
    mirrors = {its: m for its, methods in METHODS.items() for m in methods if m.mirrors}
    assert len(mirrors) >= 12
    for its, method in mirrors.items():
        want = {n for n in called(its.forward) if n in its.forward.__code__.co_names}
        code = method.ours.__code__
        assert want == {n for n in code.co_names if n in vars(stock.functional)} - {"F"}, its


@pytest.mark.parametrize("kind", ["ours", "marked"])
def test_a_small_call_of_a_mirror_is_pytorchs(kind, simulate):
    """Results, gradients, buffers and errors; a function that a tool replaced is called."""
    simulate(least=1 << 20)
    x = torch.randn(5, 4, requires_grad=True)
    for ours, theirs in (
        (nn.LayerNorm(4), stock.LayerNorm(4)),
        (nn.Linear(4, 4), stock.Linear(4, 4)),
        (nn.BatchNorm1d(4, momentum=None), stock.BatchNorm1d(4, momentum=None)),
        (nn.PReLU(4), stock.PReLU(4)),
    ):
        theirs.load_state_dict(ours.state_dict())
        if kind == "marked":
            ours = nn.convert(stock.Sequential(theirs.__class__(4, **_options(theirs))))[0]
            ours.load_state_dict(theirs.state_dict())
        for _ in range(3):
            found, want = ours(x), theirs(x)
            assert torch.equal(found, want) and found.grad_fn.name() == want.grad_fn.name()
            assert all(map(torch.equal, *(m.state_dict().values() for m in (ours, theirs))))
    with mock.patch.object(torch.nn.functional, "linear", lambda x, w, b: "replaced"):
        assert nn.Linear(4, 4)(x) == "replaced"


def _options(layer):
    if isinstance(layer, stock.Linear):
        return {"out_features": 4}
    return {"momentum": None} if isinstance(layer, stock.BatchNorm1d) else {}


# ---- Short ways through a layer ------------------------------------------------------------------

GIVEN = {OURS[its].__name__: m for its, ms in METHODS.items() for m in ms if m.given is not None}
DIRECT = {OURS[its].__name__: m for its, ms in METHODS.items() for m in ms if m.direct is not None}


def _rows_of(names):
    rows = [c for c in CASES if c.name in names and c.is_layer and c.view is None]
    return [pytest.param(c, id=str(c)) for c in rows if c.autocast is None]


def test_there_are_short_ways():
    assert len(GIVEN) >= 14 and len(DIRECT) >= 18


@pytest.mark.parametrize("kind", ["ours", "marked"])
@pytest.mark.parametrize("case", _rows_of(GIVEN))
def test_what_is_given_is_what_forward_gives(case, kind):
    """A plan is looked up with the arguments with which `forward` calls the op."""
    layer = side_of(case, nn if kind == "ours" else stock, torch.float32, "cpu").call
    nn.convert(layer)
    inputs = case.make(torch.float32, "cpu")
    heard = []

    def hear(op, args, kwargs):
        heard.append(dict(zip(op.names, args, strict=False)) | kwargs)
        raise InterruptedError

    with intercept(hear), pytest.raises(InterruptedError):
        layer(*inputs)
    method = GIVEN[case.name]
    names = method.ours.__code__.co_varnames[1 : method.ours.__code__.co_argcount]
    scope = {"self": layer, "_attributes": attributes, **dict(zip(names, inputs, strict=False))}
    if hasattr(layer, "weight") and hasattr(layer, "bias"):
        scope |= {"weight": layer.weight, "bias": layer.bias}
    given = dict(zip(method.op.names, eval(f"({method.given[1]},)", scope), strict=True))
    if "_stacklevel" in given:
        given["_stacklevel"] += _front.FRAMES
    assert heard[0].keys() == given.keys()
    for name, value in given.items():
        assert value is heard[0][name] or value == heard[0][name], name


def _operators(call):
    """What `call` returns, and the operators of PyTorch that it ran."""
    with torch.profiler.profile() as profile:
        result = call()
    return result, [e.name for e in profile.events() if e.name.startswith("aten::")]


@pytest.mark.parametrize("kind", ["ours", "marked"])
@pytest.mark.parametrize("case", _rows_of(DIRECT))
def test_a_small_call_runs_the_operators_of_pytorchs_layer(case, kind, simulate):
    """Bits, gradients and operators are those of stock, and so is the error for a None."""
    simulate(least=1 << 40)
    inputs = case.make(torch.float32, "cpu")
    found = {}
    for side in ("stock", kind):
        torch.manual_seed(0)
        layer = side_of(case, nn if side == "ours" else stock, torch.float32, "cpu").call
        if side == "marked":
            nn.convert(layer)
        layer(*fresh_leaves(inputs))  # the floor is known from now on
        torch.manual_seed(1)
        given = [t * 1 if torch.is_tensor(t) and t.requires_grad else t for t in inputs]
        result, operators = _operators(lambda: layer(*given))  # noqa: B023
        parts = result if isinstance(result, tuple) else (result,)
        leaves = [*layer.parameters(), *(t for t in inputs if t.requires_grad)]
        grads = torch.autograd.grad(parts[0].sum(), leaves) if parts[0].requires_grad else ()
        with pytest.raises(Exception) as error:
            layer(None)
        values = [t.to_dense() for t in (*parts, *grads)]
        found[side] = operators, values, (type(error.value), str(error.value))
    (one, values, raised), (other, same, again) = found["stock"], found[kind]
    assert one == other and raised == again
    for a, b in zip(values, same, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("how", ["small", "replayed"])
@pytest.mark.parametrize("kind", ["ours", "marked"])
def test_a_computed_attribute_is_computed_once_in_a_call(kind, how, simulate):
    """`parametrize` makes a subclass of which the weight is a property."""

    class Counts(stock.Module):
        count = 0

        def forward(self, w):
            self.count += 1
            return w * 1

    simulate(least=1 << 40 if how == "small" else 1)
    for make, x in (
        (lambda n: n.LayerNorm(8), torch.randn(4, 8)),
        (lambda n: n.RMSNorm(8), torch.randn(4, 8)),
        (lambda n: n.GroupNorm(2, 8), torch.randn(4, 8)),
        (lambda n: n.Linear(8, 8), torch.randn(4, 8)),
        (lambda n: n.Conv1d(8, 8, 1), torch.randn(4, 8, 3)),
        (lambda n: n.Embedding(8, 8), torch.tensor([1, 2])),
        (lambda n: n.CrossEntropyLoss(torch.ones(8)), torch.randn(4, 8)),
    ):
        loss = isinstance(make(nn), stock.CrossEntropyLoss)
        inputs = (x, torch.tensor([0, 1, 2, 3])) if loss else (x,)
        plain = make(nn)
        for _ in range(5):
            plain(*inputs)  # so that there are plans for this shape
        layer = make(nn) if kind == "ours" else nn.convert(make(stock))
        counts = Counts()
        if loss:
            cls = type(layer)
            layer.weight = None
            del layer.weight
            one = property(lambda self: counts(torch.ones(8)))  # noqa: B023
            layer.__class__ = type(cls)(cls.__name__, (cls,), {"weight": one})
        else:
            parametrize.register_parametrization(layer, "weight", counts)
        before = counts.count
        for _ in range(6):
            layer(*inputs)
        assert counts.count - before == 6, layer


def test_a_replaced_function_is_called_by_a_small_call(simulate):
    simulate(least=1 << 40)
    x = torch.randn(2, 4, 4, 4)
    for name, layer in (
        ("relu", nn.ReLU()),
        ("gelu", nn.GELU()),
        ("dropout", nn.Dropout()),
        ("layer_norm", nn.LayerNorm(4)),
        ("conv2d", nn.Conv2d(4, 4, 1)),
        ("softmax", nn.Softmax(1)),
        ("max_pool2d", nn.MaxPool2d(2)),
    ):
        layer(x)
        with mock.patch.object(stock.functional, name, lambda *args, **kwargs: "replaced"):
            assert layer(x) == "replaced", name
            assert nn.convert(layer)(x) == "replaced", name


def test_a_small_dropout_refuses_what_pytorch_refuses(simulate):
    simulate(least=1 << 40)
    layer, theirs = nn.Dropout(), stock.Dropout()
    x = torch.ones(3)
    layer(x)
    layer.p = theirs.p = 2.0
    with pytest.raises(ValueError) as error:
        theirs(x)
    with pytest.raises(ValueError, match=str(error.value)):
        layer(x)


def test_a_weight_of_a_subclass_reaches_its_function(simulate):
    """A small call of a layer norm asks the class of its weight, as `F.layer_norm` does."""

    class Told(torch.Tensor):
        heard: list = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.heard.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    simulate(least=1 << 40)
    layer, x = nn.LayerNorm(4), torch.randn(2, 4)
    layer(x)
    layer.weight = stock.Parameter(torch.ones(4).as_subclass(Told))
    Told.heard.clear()
    layer(x)
    assert stock.functional.layer_norm in Told.heard
