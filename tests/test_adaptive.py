"""AdaptiveLogSoftmaxWithLoss beyond its rows: chunks, members that are watched, probabilities."""

import copy

import pytest
import torch

import fastnn
from fastnn._mode import decisions
from fastnn.ops import linear_cross_entropy as op_file
from fastnn.testing import Side, compare_sides
from tests.errors import assert_same_error

SIZES = {"in_features": 16, "n_classes": 23, "cutoffs": [5, 11]}


def three(device, **options):
    """The layer of fastnn, of PyTorch and in float64, with equal parameters."""
    theirs = torch.nn.AdaptiveLogSoftmaxWithLoss(**SIZES, **options).to(device)
    ours = fastnn.AdaptiveLogSoftmaxWithLoss(**SIZES, **options).to(device)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, copy.deepcopy(theirs).double()


def batch(device, rows=9):
    return torch.randn(rows, 16, device=device), torch.arange(rows, device=device) * 5 % 23


def assert_same(sides, calls, args, device):
    """`calls` are those of the three layers."""
    result = compare_sides(
        *(Side(c, dict(m.named_parameters())) for c, m in zip(calls, sides, strict=True)),
        args, {}, device=device,
    )  # fmt: skip
    assert result.path == "kernel" and not result.failures, result.failures


def test_chunks_of_a_few_rows(device, monkeypatch):
    monkeypatch.setattr(op_file, "chunk_rows", lambda N, C, itemsize: 2)
    sides = three(device, head_bias=True)
    assert_same(sides, sides, batch(device), device)


@pytest.mark.parametrize("name", ["log_prob", "predict"])
def test_probabilities_of_all_classes(name, device):
    sides = three(device)
    x, _ = batch(device)
    if name == "log_prob":
        assert_same(sides, [m.log_prob for m in sides], (x,), device)
        return
    ours, theirs, _ = sides
    with fastnn.backend("triton"), decisions() as told:
        mine = ours.predict(x)
    assert told and all(d.why is None for d in told)
    assert torch.equal(mine, theirs.predict(x))


def test_members_of_strided_weights(device):
    """Weights that are columns of a wider tensor, and a transposed one."""
    sides = three(device)
    for layer in sides:
        wide = torch.cat([layer.head.weight.detach()] * 2, 1)
        layer.head.weight = torch.nn.Parameter(wide[:, :16])
        outer = layer.tail[1][1]
        outer.weight = torch.nn.Parameter(outer.weight.detach().t().contiguous().t())
    assert_same(sides, sides, batch(device), device)


def test_hooks_on_members_see_what_they_see_in_stock(device):
    """The members then run one by one; a hook on the layer itself does not matter."""
    seen: list = []
    for layer in three(device)[:2]:
        own: list = []
        for name, member in layer.named_modules():
            member.register_forward_hook(
                lambda m, args, y, n=name, own=own: own.append((n, args[0].shape))
            )
        with fastnn.backend("triton"):
            layer(*batch(device))
        seen.append(own)
    assert seen[0] == seen[1] and len(seen[0]) == 8
    layer = three(device)[0]
    layer.register_forward_hook(lambda m, args, y: None)
    with fastnn.backend("triton"), decisions() as told:
        layer(*batch(device))
    assert {d.op.name for d in told} == {"linear_cross_entropy", "linear"}


BAD = {
    "a target past the last class": lambda m, x, t: m(x, t + 10),
    "a negative target": lambda m, x, t: m(x, t - 3),
    "more rows than targets": lambda m, x, t: m(x, t[:2]),
    "one row, many targets": lambda m, x, t: m(x[0], t),
    "targets of two dimensions": lambda m, x, t: m(x, t[None]),
    "a wrong number of features": lambda m, x, t: m(x[:, :8], t),
    "another dtype": lambda m, x, t: m(x.double(), t),
    "floats as targets": lambda m, x, t: m(x, t.float()),
}


@pytest.mark.parametrize("which", BAD)
def test_bad_input_raises_what_stock_raises(which, device):
    ours, theirs, _ = three(device)
    call = BAD[which]
    args = batch(device)
    assert_same_error(lambda: call(ours, *args), lambda: call(theirs, *args), mode="auto")


def test_checkpoints_move_both_ways(device):
    ours, theirs, _ = three(device)
    x, target = batch(device)
    other = torch.nn.AdaptiveLogSoftmaxWithLoss(**SIZES).to(device)
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other(x, target).loss, theirs(x, target).loss)
    fastnn.convert(other)
    with fastnn.backend("triton"):
        assert type(other) is torch.nn.AdaptiveLogSoftmaxWithLoss
        assert torch.equal(other(x, target).output, ours(x, target).output)
