"""Batches of gradients: `is_grads_batched=True` and `vmap` over a backward equal a loop, in bits.

The op calls of the parity rows are made with kernels, and replayed by plans. PyTorch's own layers
answer such questions, so ours must.
"""

import pytest
import torch

import fastnn
import fastnn.functional as F
from fastnn import _record
from fastnn._mode import decisions
from fastnn.ops import FUNCTIONS, REGISTRY
from fastnn.testing import seed, tensors_of
from fastnn.testing.devices import surveyed
from tests.calls import fresh, recorded
from tests.marks import interpreted

pytestmark = interpreted

BATCH = 3
ROWS = 2  # of each op
# Ops whose kernels are those of other ops.
PARTS = ("multi_head_attention_forward",)


def _made(call):
    """(results that have gradients, leaves, batches of gradients) of a new call with kernels."""
    mine, _ = fresh(call, {})
    seed("cpu")
    out = FUNCTIONS[call.op.name](**mine.arguments)
    results = [t for t in tensors_of(out) if t.requires_grad]
    g = torch.Generator().manual_seed(1)
    batches = [torch.randn((BATCH, *t.shape), generator=g).to(t.dtype) for t in results]
    return results, [mine.arguments[k] for k in sorted(call.wanting)], batches


def _on_kernels(call):
    """Whether a kernel takes the call: where a kernel is forced, PyTorch's path is an error."""
    try:
        return bool(_made(call)[0])
    except fastnn.BackendError:
        return False


def _one_by_one(results, leaves, batches):
    options = {"allow_unused": True, "retain_graph": True}
    found = [torch.autograd.grad(results, leaves, [b[i] for b in batches], **options)
             for i in range(BATCH)]  # fmt: skip
    return [
        None if column[0] is None else torch.stack(column) for column in zip(*found, strict=True)
    ]


def _equal(a, b):
    return a is b if a is None or b is None else torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_a_batch_of_gradients_has_the_bits_of_the_gradients(name):
    """The third call and its first backward are replayed; the batch takes the long way."""
    with fastnn.backend("triton"):
        calls = [c for c in recorded().get(name, []) if c.wanting and _on_kernels(c)]
        assert calls or name in PARTS
        for call in calls[:: max(1, len(calls) // ROWS)][:ROWS]:
            _record.forget()
            for _ in range(3):
                results, leaves, batches = _made(call)
                want = _one_by_one(results, leaves, batches)
                got = torch.autograd.grad(
                    results, leaves, batches, is_grads_batched=True, allow_unused=True
                )
                assert all(map(_equal, got, want)), call.row
                assert not any(g is not None and g.requires_grad for g in got)


def test_a_batch_of_gradients_of_a_replayed_call():
    x, v = torch.randn(4, 8, requires_grad=True), torch.randn(BATCH, 4, 8)
    with fastnn.backend("triton"):
        for _ in range(4):
            with surveyed() as surveys:
                y = F.gelu(x)
            want = _one_by_one([y], [x], [v])[0]
            (got,) = torch.autograd.grad(y, x, v, is_grads_batched=True)
            assert torch.equal(got, want)
    assert not surveys


def _layer(x, w):
    return F.layer_norm(F.gelu(x), (8,), w)


@pytest.mark.parametrize("create_graph", [False, True])
def test_every_kind_of_batch(create_graph):
    """Nested batches, batches along another dimension, and gradients that are no batch."""
    torch.manual_seed(0)
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    v = torch.randn(2, 3, 4, 8)
    options = {"retain_graph": True, "create_graph": create_graph}
    with fastnn.backend("triton"), decisions() as heard:
        y = _layer(x, w)
    assert [(op.name, why) for op, why, _ in heard] == [("gelu", None), ("layer_norm", None)]

    def grad(v):
        return torch.autograd.grad(y, (x, w), v, **options)

    want = [[torch.stack(c) for c in zip(*map(grad, row), strict=True)] for row in v]
    whole = [torch.stack(c) for c in zip(*want, strict=True)]
    for got, expected in (
        (torch.vmap(grad)(v[0]), want[0]),
        (torch.vmap(grad, in_dims=1)(v[0].transpose(0, 1)), want[0]),
        (torch.vmap(torch.vmap(grad))(v), whole),
        (torch.vmap(lambda s: grad(v[0, 0]))(torch.ones(2)), [g[:1].expand(2, *g.shape[1:])
                                                              for g in want[0]]),
    ):  # fmt: skip
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b) and a.requires_grad == create_graph


def test_second_derivatives_by_batches():
    """`hessian(vectorize=True)` differentiates the gradient with batches."""
    torch.manual_seed(0)
    x = torch.randn(5)

    def total(functional):
        return lambda x: functional.gelu(functional.softmax(x, 0)).sum()

    hessian = torch.autograd.functional.hessian
    want = hessian(total(torch.nn.functional), x.double(), vectorize=True)
    with fastnn.backend("triton"):
        got = hessian(total(F), x, vectorize=True)
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-5)


def test_a_hook_may_call_an_op_of_a_batch():
    """No kernel can read a batch, so PyTorch runs the call."""
    x = torch.randn(4, 8, requires_grad=True)
    v = torch.randn(BATCH, 4, 8)
    heard = []

    def hook(g):
        with fastnn.backend("auto"), decisions() as now:
            g = F.relu(g)
        heard.extend(now)
        return g

    y = x * 2
    y.register_hook(hook)
    (got,) = torch.autograd.grad(y, x, v, is_grads_batched=True)
    assert torch.equal(got, v.relu() * 2)
    assert ["batch of gradients" in why for _, why, _ in heard] == [True]
