"""What the guard of a plan asks on a GPU, tested without one, in both runners.

The metadata of tensors and the state of a thread are in tests/test_plans.py.
"""

import pytest
import torch

import fastnn
import fastnn.functional as F
from fastnn import _native, _plan, _record, _runner, kernels
from fastnn.ops import REGISTRY
from tests import test_native, test_plans
from tests.marks import interpreted

pytestmark = interpreted

CUDA = _plan.Program(1, torch.device("cuda", 1), {}, True, (), (), ())


@pytest.fixture
def gpu(monkeypatch):
    """What would be asked of a GPU. Each entry may be changed."""
    state = {"device": 1, "listened": False, "capturing": False}
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: state["device"], raising=False)
    monkeypatch.setattr(kernels._launch, "listened", lambda: state["listened"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    return state


CHANGES = {"device": 0, "listened": True, "capturing": True}


@pytest.mark.parametrize("what", CHANGES)
def test_python_asks_for_the_current_device_hooks_and_graph_capture(gpu, what):
    cells = _runner._Cells()
    asked = _runner._ready(REGISTRY["dropout"], CUDA, cells)
    holds = _runner._make(cells, "def function():", [f"return {' and '.join(asked)}"])
    assert holds()
    before, gpu[what] = gpu[what], CHANGES[what]
    assert not holds()
    gpu[what] = before
    assert holds()


@pytest.mark.parametrize("what", ["listened", "capturing"])
def test_cpp_is_told_to_ask_for_hooks_and_graph_capture(gpu, what):
    checks = _runner._checks(REGISTRY["dropout"], CUDA)
    assert all(ask() == value for ask, value in checks)
    gpu[what] = CHANGES[what]
    assert not all(ask() == value for ask, value in checks)


@pytest.mark.parametrize("which", ["Python", "C++"])
def test_what_only_python_can_ask_is_asked_at_each_call(monkeypatch, which):
    """Of the forward and of the backward, in both runners."""
    state = {"forward": 0, "backward": 0}
    monkeypatch.setattr(
        _runner, "_checks",
        lambda record, program: [(lambda: state["forward" if record else "backward"], 0)],
    )  # fmt: skip
    real = _runner._ready

    def ready(record, program, cells):
        ask = cells(lambda: state["forward" if record else "backward"])
        return [*real(record, program, cells), f"{ask}() == 0"]

    monkeypatch.setattr(_runner, "_ready", ready)
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    long_ways = []
    back = F.layer_norm.op.fused.__globals__["Norm"].backward

    def backward(ctx, *grads):
        long_ways.append("backward")
        return back(ctx, *grads)

    def step():
        long_ways.clear()
        with test_plans.counted() as surveys, fastnn.backend("triton"):
            grads = torch.autograd.grad(F.layer_norm(x, (8,), w).square().sum(), (x, w))
        return ["forward"] * bool(surveys) + long_ways, grads

    native = test_native.runner_module() if which == "C++" else None
    with _native.using(native), _record.using(True):
        monkeypatch.setattr(F.layer_norm.op.fused.__globals__["Norm"], "backward", backward)
        for _ in range(4):
            _, want = step()
        assert step()[0] == []
        state["backward"] = 1
        took, grads = step()
        assert took == ["backward"] and all(map(torch.equal, grads, want))
        state["backward"] = 0
        assert step()[0] == []
        state["forward"] = 1
        took, grads = step()
        assert took[0] == "forward" and all(map(torch.equal, grads, want))
