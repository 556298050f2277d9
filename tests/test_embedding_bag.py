"""Bags beyond their rows: what PyTorch rejects, bytes, races, bad indices, second derivatives."""

import functools

import pytest
import torch
import torch.nn.functional as stock

import fastnn
import fastnn.functional as F
from fastnn import kernels
from fastnn.testing.devices import surveyed
from fastnn.testing.meter import nbytes, traffic
from tests.errors import assert_same_error
from tests.marks import interpreted

pytestmark = interpreted

W = torch.randn(4, 3)


def ints(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((ints(0, 1), W), {}),
        ((ints(0, 1), W, ints([0])), {}),
        ((ints(0, 1), W, torch.zeros(1)), {}),
        ((ints([0, 1]), W, ints(0)), {}),
        ((ints([[0, 1]]), W), {}),
        ((torch.zeros(2, 0, dtype=torch.int64), W), {}),
        ((ints(0, 1), W[0], ints(0)), {}),
        ((ints(0, 1), W, ints(0)), {"mode": "other"}),
        ((ints(0, 1), W, ints(0)), {"mode": "max", "sparse": True}),
        ((ints(0, 1), W, ints(0)), {"mode": "max", "scale_grad_by_freq": True}),
        ((ints(0, 1), W, ints(0)), {"padding_idx": 4}),
        ((ints(0, 1), W, ints(0)), {"padding_idx": -5}),
        ((ints(0, 1), W, ints(0)), {"per_sample_weights": torch.ones(2)}),
        ((ints(0, 1), W, ints(0)), {"per_sample_weights": torch.ones(3), "mode": "sum"}),
        ((ints(0, 1), W, ints(0)), {"per_sample_weights": torch.ones(2).half(), "mode": "sum"}),
        ((ints(), W, ints()), {"include_last_offset": True}),
        ((ints(0, 1), W, ints(1, 2)), {}),
        ((ints(0, 1), W, ints(0, 3)), {"mode": "max"}),
        ((ints(0, 1), W, ints(0, 1, 3)), {"include_last_offset": True}),
    ],
    ids=lambda value: None,
)
def test_bad_input_raises_what_stock_raises(args, options):
    ours, theirs = (functools.partial(f.embedding_bag, **options) for f in (F, stock))
    assert_same_error(ours, theirs, *args)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_what_the_passes_move(mode):
    """Forward: each row read once, each bag written once. Backward: as much, and the whole dW."""
    torch.manual_seed(0)
    B, L, V, D = 8, 12, 40, 128
    index = torch.randint(V, (B, L))
    weight = torch.randn(V, D, requires_grad=True)
    with fastnn.backend("triton"), traffic(races=True) as launches:
        y = F.embedding_bag(index, weight, mode=mode)
        y.sum().backward()
    assert [launch.kernel for launch in launches] == [
        "_embedding_bag_fwd_kernel", "_embedding_bwd_blocks_kernel", "_embedding_bwd_dw_kernel",
    ]  # fmt: skip
    assert not any(launch.shared_writes for launch in launches)
    forward, _, backward = (sum(launch.requested.values()) for launch in launches)
    rows = B * L * D * 4
    assert forward <= 1.05 * (rows + nbytes(y, index))
    assert backward <= 1.05 * (rows + nbytes(weight))


def test_the_bytes_of_the_gradient_of_weights():
    torch.manual_seed(0)
    index, weight = torch.randint(40, (8, 12)), torch.randn(40, 128)
    sample = torch.randn(8, 12, requires_grad=True)
    with fastnn.backend("triton"), traffic(races=True) as launches:
        F.embedding_bag(index, weight, mode="sum", per_sample_weights=sample).sum().backward()
    assert [launch.kernel for launch in launches] == [
        "_embedding_bag_fwd_kernel", "_embedding_bag_bwd_sample_kernel",
    ]  # fmt: skip
    assert sum(launches[1].requested.values()) <= 1.05 * 2 * 8 * 12 * 128 * 4


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_what_no_kernel_may_read(mode, device):
    """Indices outside the table make their bags nan; offsets outside the indices read nothing."""
    index = ints(0, 4, 1, 2, -1).to(device)
    weight = W.to(device)
    mode = {"sum": 0, "mean": 1, "max": 2}[mode]
    y, bag, *found = kernels.embedding_bag.fwd(
        weight, index, ints(0, 2, 4).to(device), 3, 0, None, mode, -1, True
    )
    assert y[[0, 2]].isnan().all() and not y[1].isnan().any() and bag.tolist() == [0, 0, 1, 1, 2]
    dw = kernels.embedding_bag.bwd(torch.ones_like(y), index, 4, -1, bag, found[0], None, found[1])
    assert dw.isfinite().all() and not dw[3].any()
    index = ints(0, 3, 1).to(device)
    y, bag, *found = kernels.embedding_bag.fwd(
        weight, index, ints(1, 9, -7).to(device), 3, 0, None, mode, -1, True
    )
    assert y.isfinite().all() and bag[0].item() in (-1, 2)
    dw = kernels.embedding_bag.bwd(torch.ones_like(y), index, 4, -1, bag, found[0], None, found[1])
    assert dw.isfinite().all()


def test_indices_past_the_last_offset(device):
    """They belong to the last bag, as in float64 on a CPU and in each dtype on a GPU."""
    index, offsets = ints(0, 1, 2, 3).to(device), ints(0, 1, 2).to(device)
    for mode in ("sum", "mean", "max"):
        options = {"mode": mode, "include_last_offset": True}
        with fastnn.backend("triton"):
            y = F.embedding_bag(index, W.to(device), offsets, **options)
        assert y.shape == (2, 3)
        last = torch.nn.functional.embedding_bag(index[None, 1:], W.to(device).double(), mode=mode)
        torch.testing.assert_close(y[1:].double(), last, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_second_derivatives(mode, device):
    """PyTorch has none in the weights of samples with a gradient; these are the formula's."""
    index = ints([0, 2, 2], [1, 3, 0]).to(device)
    weight = W.to(device).requires_grad_()
    sample = torch.randn(2, 3, device=device, requires_grad=True) if mode == "sum" else None
    leaves = [weight] if sample is None else [weight, sample]

    def twice(of):
        y = of(index, weight, mode=mode, per_sample_weights=sample, padding_idx=1)
        grads = torch.autograd.grad((y**3).sum(), leaves, create_graph=True)
        return [*grads, *torch.autograd.grad(sum((g**2).sum() for g in grads), leaves)]

    def formula(index, w, mode, per_sample_weights, padding_idx):
        rows = torch.where((index != padding_idx)[..., None], w[index], 0)
        if mode == "sum":
            return (rows * per_sample_weights[..., None]).sum(1)
        if mode == "mean":
            return rows.sum(1) / (index != padding_idx).sum(1, keepdim=True)
        hidden = torch.where((index == padding_idx)[..., None], -float("inf"), w[index])
        return hidden.gather(1, hidden.argmax(1, keepdim=True)).squeeze(1)

    with fastnn.backend("triton"):
        ours = twice(F.embedding_bag)
    for a, b in zip(ours, twice(formula), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_calls_of_two_dimensions_have_plans(mode, device):
    """With offsets that are on the CPU there is none: PyTorch looks at their values there."""
    index, weight = torch.randint(4, (3, 5), device=device), W.to(device).requires_grad_()

    def call():
        y = F.embedding_bag(index, weight, mode=mode)
        return y, *torch.autograd.grad(y.square().sum(), weight)

    with fastnn.backend("triton"):
        first, *_ = (call() for _ in range(3))
        with surveyed() as long:
            replayed = call()
    assert long == [] and all(map(torch.equal, first, replayed))


def test_one_long_bag_of_one_index(device):
    """The gradient of a frequent index is summed in blocks, in float32."""
    index = torch.zeros(1, 300, dtype=torch.int64, device=device)
    weight = torch.ones(2, 5, device=device, dtype=torch.bfloat16, requires_grad=True)
    with fastnn.backend("triton"):
        y = F.embedding_bag(index, weight, mode="sum")
        y.backward(torch.ones_like(y))
    assert (y == 300).all() and (weight.grad[0] == 300).all() and not weight.grad[1].any()
