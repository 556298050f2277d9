"""`auto` follows estimates only for architectures that a new Triton has compiled kernels for."""

import contextlib
import inspect
import json
import math
import os
import subprocess
import sys
import warnings
from unittest import mock

import pytest
import torch
import triton
from torch.overrides import TorchFunctionMode

import fastnn
import fastnn.functional as F
from fastnn import _build, _front, _gate, _op
from fastnn.bench import gates
from fastnn.bench.cases import CASES as BENCH_CASES
from fastnn.bench.tune import gate_work
from fastnn.kernels import _gpus
from fastnn.ops import REGISTRY
from fastnn.testing import simulated
from fastnn.testing.aot import TARGETS
from fastnn.testing.devices import surveyed
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
        assert _gate.crossover("relu", "sm_999") == (7, "measured", "elements", False)
        assert _gate.crossover("gelu", "sm_999")[:2] == (math.inf, "measured")
        assert "sm_999" in _gate.crossover("silu", "sm_999").source


def test_the_shipped_table_names_each_op_and_variant_once():
    for entry in _gate.table().values():
        named = [(line["op"], line.get("variant", "")) for line in entry["crossovers"]]
        assert len(named) == len(set(named))
        assert all(variant in REGISTRY[op].variants for op, variant in named)


def test_an_op_without_a_line_runs_stock_and_says_so(device, simulate):
    """A new op needs no line. `bench.gates` or `fastnn tune` gives it one."""
    every = {(name, variant) for name, op in REGISTRY.items() for variant in op.variants}
    lines = _gate.table()["default"]["crossovers"]
    there = {(line["op"], line.get("variant", "")) for line in lines}
    for op, variant in every - there:
        assert _gate.crossover(op, "sm_90", variant)[:2] == (math.inf, _gate.NO_FIGURE)
    simulate("sm_90")
    rest = [line for line in lines if line["op"] != "gelu"]
    with _gate.using({"default": {"source": "estimate", "crossovers": rest}}):
        with fastnn.backend("auto"), fastnn.decisions() as heard:
            F.gelu(torch.zeros(1, device=device).expand(2**28))
    assert heard[0].why == f"size gate: {_gate.NO_FIGURE}"


@pytest.mark.parametrize("case", [row.at(1) for row in BENCH_CASES], ids=str)
def test_a_policy_counts_in_the_unit_of_the_table(case):
    units = {line["op"]: line["unit"] for line in _gate.table()["default"]["crossovers"]}
    for op, work in gate_work(case):
        if work is not None:
            assert work.unit == units.get(op, work.unit)
            assert work.variant in REGISTRY[op].variants


# ---- Floors: calls below them go to PyTorch without a question ----------------------------------


def _dispatched(call, *args, **kwargs):
    """How often `call` asks dispatch."""
    with surveyed() as asked:
        call(*args, **kwargs)
    return len(asked)


@interpreted
def test_a_call_below_the_floor_goes_to_pytorch_without_a_question():
    x, w, t = torch.randn(8, 4), torch.randn(3, 4), torch.tensor([0] * 8)
    ids, model = torch.tensor([0, 1]), fastnn.Sequential(fastnn.Linear(4, 4), fastnn.ReLU())
    _gate.forget()
    for call in (
        lambda: F.gelu(x),
        lambda: F.layer_norm(x, (4,)),
        lambda: F.linear(x, w),
        lambda: F.mse_loss(x, x, reduction="none"),
        lambda: F.dropout(x, 0.5),
        lambda: fastnn.ReLU()(x),
        lambda: fastnn.CosineSimilarity()(x, x),
        lambda: F.embedding(ids, w),
        lambda: F.nll_loss(x, t),
        lambda: F.scaled_dot_product_attention(x, x, x),
        lambda: F.batch_norm(x, None, None, training=True),
        lambda: model(x),
    ):
        found = [_dispatched(call) for _ in range(3)]
        assert found[1:] == [0, 0]
        # a Sequential finds the floor of the op that would run its members
        assert found[0] >= 1 or "model" in call.__code__.co_freevars
        with fastnn.decisions() as heard:  # a watcher gets the reason each time
            call()
            call()
        whys = [why for _, why, _ in heard]
        assert None not in whys and whys[: len(whys) // 2] == whys[len(whys) // 2 :] != []


@interpreted
def test_a_floor_is_the_least_size_of_any_variant():
    few = {("embedding", ""): 1000, ("embedding", "few indices"): 500, "relu": None}
    with simulated(least=few):
        assert _gate.floor("embedding", REGISTRY["embedding"].variants) == 500
        assert _gate.floor("relu", ("",)) == math.inf


@interpreted
def test_at_the_floor_the_kernel_runs():
    """A call of the size at which the kernel wins runs on it, also after smaller calls did not."""
    with simulated(least={"layer_norm": 64, "linear_act": 64, "pairwise_distance": 256}):
        for size, ran in ((60, 0), (64, 1), (60, 0), (68, 1)):
            x = torch.randn(size // 4, 4)
            assert _dispatched(F.layer_norm, x, (4,)) == ran or size == 60
        norm = fastnn.LayerNorm(4)
        assert [_dispatched(norm, torch.randn(n, 4)) for n in (15, 16)] == [0, 1]
        wide = torch.randn(64, 4)
        F.pairwise_distance(wide[:1], wide[:1])
        assert _dispatched(F.pairwise_distance, wide[:1], wide) == 1  # the larger one counts


@pytest.mark.parametrize("case", [row.at(1) for row in BENCH_CASES], ids=str)
def test_no_call_is_larger_than_its_bound(case):
    """The floor is asked with a bound on the size that the policy gives."""
    calls = []
    decide = _gate.decide

    def listening(name, policy, index, args, kwargs, *rest):
        calls.append((REGISTRY[name], args, kwargs))
        return decide(name, policy, index, args, kwargs, *rest)

    with mock.patch.object(_gate, "decide", listening):
        asked = gate_work(case)
    assert len(asked) == len(calls)
    for (_, work), (op, args, kwargs) in zip(asked, calls, strict=True):
        if work is not None:
            names = inspect.signature(op.fused).parameters
            given = dict(zip(names, args, strict=False)) | kwargs
            assert eval(_front.below(op, next(iter(names))).size, {}, given) >= work.size


@interpreted
def test_what_is_below_the_floor_runs_on_kernels_when_it_is_forced_or_the_gate_opens():
    x = torch.randn(8, 4)
    F.gelu(x)
    F.gelu(x)
    with fastnn.backend("triton"), fastnn.decisions() as heard:
        F.gelu(x)
    F.gelu(x)
    with simulated(least=0), fastnn.decisions() as again:
        F.gelu(x)
    with simulated(least=0):
        assert _dispatched(F.gelu, x) == 1
        assert _dispatched(fastnn.GELU(), x) == 1
    assert [why for _, why, _ in heard + again] == [None, None]


def test_wrong_arguments_meet_the_same_error_each_time(device):
    x = torch.randn(8, 4, device=device)
    for _ in range(3):
        with pytest.raises(TypeError, match="linear"):
            F.linear(x, None)
        with pytest.raises(RuntimeError, match="normalized_shape"):
            F.layer_norm(x, [5])
        with pytest.raises((TypeError, AttributeError)):
            F.pairwise_distance(x, None)
        with pytest.raises((TypeError, AttributeError)):
            fastnn.LayerNorm(4)(None)


@interpreted
def test_tracing_does_not_ask_for_sizes():
    """Under `torch.jit.trace` a size is a tensor, and a comparison with it would warn."""
    x, norm = torch.randn(4, 3), fastnn.LayerNorm(3, elementwise_affine=False)
    for _ in range(2):
        F.gelu(x), norm(x)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        traced = torch.jit.trace(lambda t: norm(F.gelu(t)), x)
    assert not [w for w in told if issubclass(w.category, torch.jit.TracerWarning)]
    assert torch.equal(traced(x), norm(F.gelu(x)))


@interpreted
def test_a_mode_and_a_subclass_see_what_they_see_in_pytorch():
    """No attribute is read for the sake of a floor where somebody would notice."""

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


# ---- Estimates ----------------------------------------------------------------------------------


def test_a_free_host_opens_the_gates_of_estimates_that_save_something():
    code = (
        "import math; from fastnn import _gate; "
        "print(_gate.crossover('layer_norm', 'sm_90').least, "
        "_gate.crossover('layer_norm', 'sm_90', 'long rows').least)"
    )
    found = {}
    for host in ("", "free", "fre"):
        env = {**os.environ, "FASTNN_HOST": host}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        found[host] = done.stdout.split() or done.stderr.splitlines()[-1]
    assert found["free"] == ["65536", "inf"] and int(found[""][0]) > 65536
    assert "FASTNN_HOST='fre'" in found["fre"]


def test_where_plans_run_in_cpp_a_call_takes_its_kernel_from_a_smaller_size_on():
    """The declaration decides, and not whether the module is built yet."""
    code = "from fastnn import _gate; print(_gate.crossover('layer_norm', 'sm_90').least)"
    found = {}
    for native in ("0", "1"):
        env = {**os.environ, "FASTNN_NATIVE": native, "FASTNN_CACHE": os.devnull}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        found[native] = int(done.stdout)
    if _build.unsupported() or _build.compiler() is None:
        assert found["0"] == found["1"]
    else:
        assert _gate.LEAST_OF_ESTIMATES <= found["1"] < found["0"]


def test_an_estimate_weighs_what_is_saved_against_what_the_host_pays(tmp_path):
    row = {"ops": ["relu"], "stock_us": 1000.0, "stock_launches": 2, "ours_launches": 2}
    costs = [gates.host_costs([{**row, "python_us": us}])["relu"] for us in (10.4, 20.4)]
    assert costs == pytest.approx([gates.MARGIN, gates.MARGIN + 10])
    fused = {**row, "stock_launches": 5, "stock_us": 20.0, "native_us": 21.0}
    assert gates.host_costs([fused], "native")["relu"] == pytest.approx(3 - 3 * gates.LAUNCH)
    assert [gates.rounded(n) for n in (1, 70000, 2**20 + 1)] == [65536, 131072, 2**21]
    path = tmp_path / "crossover.json"
    path.write_text(_gate.TABLE.read_text())
    gates.write([gates.Estimate("relu", "", 1.0, 1.0, 123)], path)
    before, after = (_gate.read(p)["default"]["crossovers"] for p in (_gate.TABLE, path))
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert [(b["op"], b["least"]) for _, b in changed] == [("relu", 123)]
    fewer = {"default": {"source": "", "crossovers": [b for b in before if b["op"] != "relu"]}}
    path.write_text(json.dumps(fewer))
    gates.write([gates.Estimate("relu", "", 1.0, 1.0, 123)], path)
    assert _gate.read(path)["default"]["crossovers"] == after


def test_shapes_whose_kernels_save_nothing_are_a_variant_that_never_wins(simulate):
    simulate("sm_90")
    for call, variant in (
        (lambda: F.layer_norm(torch.empty(8, 768), (768,)), ""),
        (lambda: F.layer_norm(torch.empty(2, 2**17), (2**17,)), "long rows"),
        (lambda: F.rms_norm(torch.empty(2, 2**17), (2**17,)), "long rows"),
        (lambda: F.batch_norm(torch.empty(4, 8, 7, 7), None, None, training=True), ""),
        (
            lambda: F.batch_norm(torch.empty(9, 2, 99, 99), None, None, training=True),
            "several passes",
        ),
        (lambda: F.group_norm(torch.empty(4, 8, 99, 99), 2), "several passes"),
        (lambda: F.instance_norm(torch.empty(4, 8, 32, 32)), ""),
        (lambda: F.instance_norm(torch.empty(2, 2, 199, 199)), "several passes"),
    ):
        with _gate.asked() as asked, mock.patch.object(_op, "kernel_devices", {"cuda", "cpu"}):
            call()
        ((op, work),) = asked
        assert work.variant == variant, op
        if variant:
            assert _gate.crossover(op, "sm_90", variant).least == math.inf
