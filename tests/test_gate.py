"""`auto` follows estimates only for architectures that a new Triton has compiled kernels for."""

import contextlib
import math
import weakref
from unittest import mock

import pytest
import torch
import triton
from torch.overrides import TorchFunctionMode

import fastnn
import fastnn.functional as F
from fastnn import _gate
from fastnn.bench.cases import CASES as BENCH_CASES
from fastnn.bench.tune import gate_work
from fastnn.kernels import _gpus
from fastnn.ops import REGISTRY
from fastnn.testing import simulated
from fastnn.testing.aot import TARGETS
from tests.marks import interpreted

COMPILED = {gpu.name: gpu.compiled_from for gpu in _gpus.GPUS.values() if gpu.compiled_from}


@pytest.fixture(autouse=True)
def asked_anew():
    _gate.crossover.cache_clear()
    yield
    _gate.crossover.cache_clear()


def test_every_architecture_of_the_list_can_be_compiled_for():
    assert set(COMPILED) <= {target.architecture for target in TARGETS.values()}


@pytest.mark.parametrize("architecture", ["sm_75", "sm_999", "gfx1100"])
def test_stock_where_kernels_were_not_compiled(architecture, simulate, device):
    simulate(architecture)
    x = torch.randn(8, 4, device=device)
    with fastnn.backend("auto"), fastnn.decisions() as heard:
        F.soft_margin_loss(x.expand(2**16, 8, 4), torch.ones_like(x))
    assert f"kernels were not compiled for {architecture}" in heard[0].why


@pytest.mark.parametrize("architecture", COMPILED)
def test_stock_where_triton_is_too_old(architecture, monkeypatch):
    at_least = COMPILED[architecture]
    monkeypatch.setattr(triton, "__version__", f"{at_least}.0")
    assert _gate.crossover("layer_norm", architecture)[0] < math.inf
    _gate.crossover.cache_clear()
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    why = f"on {architecture} kernels need triton {at_least}"
    assert _gate.crossover("layer_norm", architecture)[:2] == (math.inf, why)


def test_what_was_measured_counts_everywhere():
    lines = [{"op": "relu", "least": 7, "of a later version": 1}, {"op": "gelu", "least": None}]
    with _gate.using({"sm_999": {"source": "measured", "crossovers": lines}}):
        assert _gate.crossover("relu", "sm_999") == (7, "measured", "elements")
        assert _gate.crossover("gelu", "sm_999")[:2] == (math.inf, "measured")
        assert "sm_999" in _gate.crossover("silu", "sm_999").source


def test_the_shipped_table_names_each_op_and_variant_once():
    for entry in _gate.table().values():
        named = [(line["op"], line.get("variant", "")) for line in entry["crossovers"]]
        assert len(named) == len(set(named))
        assert all(variant in REGISTRY[op].variants for op, variant in named)
    every = {(name, variant) for name, op in REGISTRY.items() for variant in op.variants}
    lines = _gate.table()["default"]["crossovers"]
    assert every == {(line["op"], line.get("variant", "")) for line in lines}


@pytest.mark.parametrize("case", [row.at(1) for row in BENCH_CASES], ids=str)
def test_a_policy_counts_in_the_unit_of_the_table(case):
    units = {line["op"]: line["unit"] for line in _gate.table()["default"]["crossovers"]}
    for op, work in gate_work(case):
        assert work is None or (work.unit, work.variant in REGISTRY[op].variants) == (
            units[op],
            True,
        )


# ---- Calls that the gate declined are remembered -------------------------------------------------


def _asked_of(call, *args, **kwargs):
    """How often `call` asks the gate."""
    asked = []
    decide = _gate.decide

    def counting(*question):
        asked.append(question)
        return decide(*question)

    with mock.patch.object(_gate, "decide", counting):
        call(*args, **kwargs)
    return len(asked)


@interpreted
def test_a_declined_call_is_asked_about_once():
    x, w = torch.randn(8, 4), torch.randn(3, 4)
    _gate.forget()
    for call in (
        lambda: F.gelu(x),
        lambda: F.layer_norm(x, (4,)),
        lambda: F.linear(x, w),
        lambda: F.mse_loss(x, x, reduction="none"),
        lambda: F.dropout(x, 0.5),
        lambda: fastnn.ReLU()(x),
        lambda: F.scaled_dot_product_attention(x, x, x),
    ):
        assert [_asked_of(call) for _ in range(3)] == [1, 0, 0]
        with fastnn.decisions() as heard:  # a watcher gets the reason each time
            call()
            call()
        assert len(heard) == 2 and heard[0].why == heard[1].why is not None


@interpreted
@pytest.mark.parametrize(
    "other",
    [
        lambda x, w: F.linear(x[:4], w),
        lambda x, w: F.linear(x, w[:2]),
        lambda x, w: F.linear(x.half(), w.half()),
        lambda x, w: F.linear(x, w, w[:, 0]),
        lambda x, w: F.linear(x.requires_grad_(), w),
        lambda x, w: torch.no_grad()(F.linear)(x, w),
    ],
)
def test_another_call_is_asked_about_anew(other):
    x, w = torch.randn(8, 4), torch.randn(3, 4)
    _gate.forget()
    F.linear(x, w)
    assert _asked_of(F.linear, x, w) == 0
    assert _asked_of(other, x, w) == 1


@interpreted
def test_what_was_declined_runs_on_kernels_when_it_is_forced_or_the_gate_opens(simulate):
    x = torch.randn(8, 4)
    F.gelu(x)
    with fastnn.backend("triton"), fastnn.decisions() as heard:
        F.gelu(x)
    F.gelu(x)
    with simulated(least=0), fastnn.decisions() as again:
        F.gelu(x)
    with simulated(least=0):
        F.gelu(x)
        assert not F.gelu.op.declined
    assert [why for _, why in heard + again] == [None, None]


def test_wrong_arguments_meet_the_same_error_each_time(device):
    x = torch.randn(8, 4, device=device)
    for _ in range(3):
        with pytest.raises(TypeError, match="linear"):
            F.linear(x, None)
        with pytest.raises(RuntimeError, match="normalized_shape"):
            F.layer_norm(x, [5])


@interpreted
def test_no_tensor_is_kept_by_what_is_remembered():
    x, slope = torch.randn(4), torch.tensor(0.5)
    _gate.forget()
    with contextlib.suppress(TypeError, RuntimeError):
        F.leaky_relu(x, slope)
    known = weakref.ref(slope)
    del slope
    assert known() is None


def test_memory_is_bounded():
    declined = _gate.memory()
    for i in range(5000):
        _gate.remember(declined, (i,))
    assert len(declined) <= 1024


@interpreted
def test_a_mode_and_a_subclass_see_what_they_see_in_pytorch():
    """No attribute is read for the memory of declined calls where somebody would notice."""

    class Log(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    class Mine(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    x, w, t = torch.randn(4, 3), torch.randn(2, 3), torch.tensor([0, 1, 2, 0])
    found = []
    for functions in (F, torch.nn.functional):
        for mine in (False, True):
            seen: list = []
            given = [v.as_subclass(Mine) if mine else v for v in (x, w)]
            for _ in range(2):
                with contextlib.nullcontext() if mine else Log():
                    functions.relu(given[0])
                    functions.linear(*given)
                    functions.linear(x, given[1])
                    functions.cross_entropy(given[0], t)
                    functions.layer_norm(given[0], (3,))
            found.append([str(getattr(f, "__name__", f)) for f in seen])
    ours, ours_of_mine, its, its_of_mine = found
    assert ours == its and ours_of_mine == its_of_mine
