"""Layers read their parameters in a quick way, which finds what `getattr` finds."""

from unittest import mock

import pytest
import torch
import torch.nn as stock
from torch.nn.utils import parametrize

import fastnn as nn
from fastnn.layers._layer import METHODS, attributes, called, weight_and_bias
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
