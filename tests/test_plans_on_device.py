"""Replays on the device under test: the bits of the call without plans, in a few models.

tests/test_plans.py has the guards, in the interpreter. Here the compiled kernels are replayed, if
there is a GPU, by both runners. On a machine with a GPU and a C++ compiler this proves the C++
runner: `pytest -n 0 tests/test_plans_on_device.py`. Until that has passed, it is off by default.
"""

import pytest
import torch

import fastnn as nn
from fastnn import _build, _native, _record
from fastnn.ops import REGISTRY
from fastnn.testing.devices import surveyed

F = nn.functional


def _models(device):
    x = torch.randn(64, 48, device=device, requires_grad=True)
    target = torch.randint(48, (64,), device=device)
    norm = nn.LayerNorm(48, device=device)
    feed = nn.Sequential(nn.Linear(48, 48), nn.GELU(), nn.Dropout(0.2)).to(device)
    image = torch.randn(2, 6, 8, 8, device=device, requires_grad=True)
    conv = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6)).to(device)
    heads = torch.randn(3, 2, 4, 16, 16, device=device, requires_grad=True)
    return {
        "norm, gelu": (lambda: F.gelu(norm(x)), [x, *norm.parameters()]),
        "loss": (lambda: F.cross_entropy(x, target), [x]),
        "feed forward, dropout": (lambda: feed(x), [x, *feed.parameters()]),
        "softmax, dropout": (lambda: F.dropout(F.softmax(x, -1), 0.3), [x]),
        "attention": (lambda: F.scaled_dot_product_attention(*heads.unbind(0)), [heads]),
        "convolution": (lambda: conv(image), [image, *conv.parameters()]),
        "pooling, upsampling": (lambda: F.interpolate(F.max_pool2d(image, 2), (8, 8)), [image]),
    }


NAMES = list(_models("cpu"))


@pytest.fixture(params=["Python", "C++"])
def runner(request):
    """Plans run in one of the two runners."""
    if request.param == "Python":
        with _native.using(None), _record.using(True):
            yield request.param
        return
    if why := _build.unsupported():
        pytest.skip(why)
    if _build.compiler() is None:
        pytest.skip("there is no C++ compiler")
    _build.build()
    with _native.using(_build.load()), _record.using(True):
        yield request.param


def _runners() -> set[str]:
    plans = [p for op in REGISTRY.values() for made in op.plans.ready.values() for p in made]
    return {"C++" if type(p).__module__ == "fastnn.native" else "Python" for p in plans}


@pytest.mark.parametrize("name", NAMES)
def test_a_replay_has_the_bits_of_the_call(name, device, runner):
    torch.manual_seed(0)
    call, leaves = _models(device)[name]

    def step():
        torch.manual_seed(1)
        out = call()
        grads = torch.autograd.grad(out.float().square().sum(), leaves)
        return [out.detach(), *grads, torch.rand(1, device=device)]

    with nn.backend("triton"):
        with _record.using(False):
            reference = step()
        with _record.using(True), surveyed() as surveys:
            found = [step() for _ in range(4)]
            surveys.clear()
            found.append(step())
            assert _runners() == {runner}
    assert surveys == []  # the fifth step is replayed as a whole
    for results in found:
        for a, b in zip(results, reference, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["norm, gelu", "feed forward, dropout"])
def test_a_replay_on_another_stream_or_in_a_graph(name, device, runner):
    if device == "cpu":
        pytest.skip("a CPU has no streams")
    call, leaves = _models(device)[name]

    def step():
        return torch.autograd.grad(call().float().square().sum(), leaves)

    with nn.backend("triton"):
        for _ in range(4):
            step()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.manual_seed(1)
            here = step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.manual_seed(1)
        there = step()
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            inside = step()
        graph.replay()
        torch.cuda.synchronize()
        assert all(t.isfinite().all() for t in inside)


def test_a_capture_finds_the_plans_of_warmup(device, runner):
    if device == "cpu":
        pytest.skip("a CPU captures nothing; tests/test_plans.py pretends that it does")
    norm = nn.LayerNorm(1024, device=device)
    x = torch.randn(64, 1024, device=device, requires_grad=True)
    nn.warmup(norm, x)
    assert norm(x).grad_fn.name() == "NativeLayerNormBackward0"  # far below the gate
    with nn.backend("triton"):
        want = norm(x).detach()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = norm(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
    graph.replay()
    torch.cuda.synchronize()
    assert y.grad_fn.name() == "NormBackward"
    assert torch.equal(y, want) and dx.isfinite().all()
