"""In `auto`, kernels run the calls that PyTorch refuses while determinism is required."""

import contextlib
import re

import pytest
import torch

import fastnn
import fastnn.functional as F
from fastnn import _gate
from fastnn.ops import REGISTRY
from fastnn.testing import simulated
from fastnn.testing.meter import traffic
from tests.marks import interpreted


def image(*shape):
    return torch.randn(shape, requires_grad=True)


LOGITS = (2, 3, 2, 2)
BAGS = torch.tensor([[0, 2], [1, 1]])
LABELS = torch.ones(1, 1, dtype=torch.int64)
TARGETS = torch.zeros(2, 2, 2, dtype=torch.int64)
SAMPLES = {dims: torch.full((1, 2, dims), 0.3) for dims in (2, 3)}
# Of each op, a call of x that PyTorch refuses on CUDA, and the shape of x.
REFUSED = {
    "adaptive_avg_pool1d": (lambda F, x: F.adaptive_avg_pool1d(x, 2), (1, 2, 5)),
    "adaptive_avg_pool2d": (lambda F, x: F.adaptive_avg_pool2d(x, 2), (1, 2, 5, 3)),
    "adaptive_avg_pool3d": (lambda F, x: F.adaptive_avg_pool3d(x, 2), (1, 2, 3, 3, 3)),
    "adaptive_max_pool1d": (lambda F, x: F.adaptive_max_pool1d(x, 2), (1, 2, 5)),
    "adaptive_max_pool2d": (lambda F, x: F.adaptive_max_pool2d(x, 2), (1, 2, 5, 3)),
    "avg_pool3d": (lambda F, x: F.avg_pool3d(x, 2), (1, 2, 4, 4, 4)),
    "max_pool3d": (lambda F, x: F.max_pool3d(x, 2), (1, 2, 4, 4, 4)),
    "fractional_max_pool2d": (
        lambda F, x: F.fractional_max_pool2d(x, 2, 2, _random_samples=SAMPLES[2]), (1, 2, 5, 5),
    ),
    "fractional_max_pool3d": (
        lambda F, x: F.fractional_max_pool3d(x, 2, 2, _random_samples=SAMPLES[3]), (1, 2, 5, 5, 5),
    ),
    "max_unpool1d": (lambda F, x: F.max_unpool1d(x, torch.tensor([[[1, 2]]]), 2), (1, 1, 2)),
    "max_unpool2d": (
        lambda F, x: F.max_unpool2d(x, torch.tensor([[[[1, 2]]]]), 2), (1, 1, 1, 2),
    ),
    "max_unpool3d": (
        lambda F, x: F.max_unpool3d(x, torch.tensor([[[[[1, 2]]]]]), 2), (1, 1, 1, 1, 2),
    ),
    "interpolate": (lambda F, x: F.interpolate(x, 5, mode="linear"), (1, 2, 3)),
    "pad": (lambda F, x: F.pad(x, (1, 1), "reflect"), (1, 2, 3)),
    "nll_loss": (lambda F, x: F.nll_loss(x, TARGETS), LOGITS),
    "cross_entropy": (lambda F, x: F.cross_entropy(x, TARGETS), LOGITS),
    "ctc_loss": (lambda F, x: F.ctc_loss(x.log_softmax(-1), LABELS, (3,), (1,)), (3, 1, 2)),
    "local_response_norm": (lambda F, x: F.local_response_norm(x, 2), (1, 3, 2, 2)),
    "embedding_bag": (lambda F, x: F.embedding_bag(BAGS, x, mode="max"), (3, 4)),
}  # fmt: skip
# Neighbours of these calls that PyTorch runs.
RUN = {
    "pad": (lambda F, x: F.pad(x, (1, 1)), (1, 2, 3)),
    "interpolate": (lambda F, x: F.interpolate(x, 5), (1, 2, 3)),
    "nll_loss": (lambda F, x: F.nll_loss(x, torch.tensor([1, 0])), (2, 3)),
    "adaptive_avg_pool2d": (lambda F, x: F.adaptive_avg_pool2d(x, (1, 1)), (1, 2, 5, 3)),
    "local_response_norm": (lambda F, x: F.local_response_norm(x, 2), (1, 3, 2)),
}


@contextlib.contextmanager
def required(warn_only=False):
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def ran(name, call, x):
    """What ran the op, "kernel" or why PyTorch did."""
    with fastnn.decisions() as heard:
        call(F, x)
    (why,) = [d.why for d in heard if d.op.name == name]
    return why or "kernel"


# PyTorch runs these, but says itself that cuDNN may give other bits: see tests/test_recurrent.py.
MAY_DIFFER = {"rnn_tanh", "rnn_relu", "lstm", "gru"}


def test_every_op_with_a_rule_has_a_call():
    ruled = {name for name, op in REGISTRY.items() if op.alerts is not None}
    assert ruled == REFUSED.keys() | MAY_DIFFER


def test_what_pytorch_says_that_it_refuses_has_a_rule():
    page = torch.use_deterministic_algorithms.__doc__
    assert page is not None
    listed = page.partition("will throw a\n    :class:`RuntimeError` when ``mode=True``")[2]
    layers = set(re.findall(r":class:`torch\.nn\.(\w+)`", listed))
    ops = {re.sub(r"(?<!^)(?=[A-Z])", "_", n).lower().replace("n_l_l_", "nll_") for n in layers}
    ops = {"pad" if n.startswith("reflection") else n.replace("c_t_c_", "ctc_") for n in ops}
    ours = ops & REGISTRY.keys()
    assert len(ours) >= 11
    assert {n for n in ours if REGISTRY[n].alerts is None} == set()


@interpreted
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_call_that_pytorch_refuses_runs_on_the_kernel_at_every_size(name):
    call, shape = REFUSED[name]
    x = image(*shape)
    with simulated("sm_90", least={}):
        assert ran(name, call, x) != "kernel"
        with required():
            assert ran(name, call, x) == "kernel"
            out = [call(F, x) for _ in range(4)]  # the later ones by a plan
            for y in out:
                assert torch.equal(y, out[0])
            y.sum().backward()
        if "unpool" not in name:  # there a CPU warns, too
            with required(warn_only=True):
                assert ran(name, call, x) != "kernel"
        assert ran(name, call, x) != "kernel"
        if not name.startswith("max_unpool") and name not in ("nll_loss", "cross_entropy"):
            with required(), torch.no_grad():
                assert ran(name, call, x) != "kernel"


@interpreted
@pytest.mark.parametrize("name", sorted(RUN))
def test_a_call_that_pytorch_runs_follows_the_size_gate(name):
    call, shape = RUN[name]
    with simulated("sm_90", least={}), required():
        assert ran(name, call, image(*shape)) != "kernel"


@interpreted
def test_the_same_call_follows_the_setting():
    """Plans and small calls do not outlive it."""
    layer, x = fastnn.ReflectionPad1d(1), image(1, 2, 3)

    def ran_a_kernel():
        with traffic() as counted:
            layer(x)
        return sum(counted.distinct.values()) > 0

    with simulated("sm_90", least={}):
        for _ in range(3):
            assert [ran_a_kernel() for _ in range(3)] == [False] * 3
            with required():
                assert [ran_a_kernel() for _ in range(3)] == [True] * 3


def test_a_rule_that_fails_is_no_rule():
    alerts = lambda *args: 1 / 0  # noqa: E731
    with simulated("sm_90"), required():
        found = _gate.decide("relu", None, -1, (torch.ones(2),), {}, alerts=alerts)
    assert not isinstance(found, str)
