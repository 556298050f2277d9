"""Bilinear beyond its rows: chunks of rows, what is kept, bad input, hooks, checkpoints."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as stock

import fastnn
import fastnn.functional as F
from fastnn._mode import decisions
from fastnn.ops import bilinear as op_file
from fastnn.testing import Side, compare_sides
from tests.errors import assert_same_error

SIZES = 4, 5, 3  # in1, in2, out


def three(device="cpu", dtype=torch.float32, **options):
    """The layer of fastnn, of PyTorch and in float64, with equal parameters."""
    theirs = torch.nn.Bilinear(*SIZES, **options).to(device, dtype)
    ours = fastnn.Bilinear(*SIZES, **options).to(device, dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, copy.deepcopy(theirs).double()


def same_on_three(sides, *args, device):
    result = compare_sides(
        *(Side(m, dict(m.named_parameters())) for m in sides), args, {}, device=device
    )
    assert result.path == "kernel" and not result.failures, result.failures


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("elements", [1, 2 * 12])
def test_chunks_of_rows(elements, dtype, device, monkeypatch):
    """7 rows in chunks of 1 and of 2, of which the last one has a single row."""
    monkeypatch.setattr(op_file, "_ELEMENTS", elements)
    x1, x2 = torch.randn(7, 4, device=device), torch.randn(7, 5, device=device)
    same_on_three(three(device, dtype), x1.to(dtype), x2.to(dtype), device=device)


@pytest.mark.parametrize("needs", [n for n in itertools.product((0, 1), repeat=3) if any(n)])
def test_gradients_of_some_tensors(needs, device):
    """Only what a wanted gradient reads is kept: an edit of any other tensor is harmless."""
    sizes = (6, 4), (6, 5), (3, 4, 5)
    found = []
    for of in (F.bilinear, stock.bilinear):
        torch.manual_seed(0)
        leaves = [
            torch.randn(s, device=device, requires_grad=bool(n))
            for s, n in zip(sizes, needs, strict=True)
        ]
        with fastnn.backend("triton"):
            y = of(*leaves)
        for i, t in enumerate(leaves):
            if not any(needs[:i] + needs[i + 1 :]):
                with torch.no_grad():
                    t.fill_(float("nan"))
        wanted = [t for t in leaves if t.requires_grad]
        found.append(torch.autograd.grad(y.square().sum(), wanted))
    for mine, its in zip(*found, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)


def test_second_derivatives(device):
    leaves = [
        torch.randn(s, device=device, requires_grad=True) for s in ((3, 4), (3, 5), (2, 4, 5), (2,))
    ]
    found = []
    for of in (F.bilinear, stock.bilinear):
        with fastnn.backend("triton"):
            y = of(*leaves).square().sum()
        first = torch.autograd.grad(y, leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for mine, its in zip(*found, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)


X1, X2, W = torch.randn(2, 4), torch.randn(2, 5), torch.randn(3, 4, 5)


@pytest.mark.parametrize(
    "args",
    [
        (X1[:, :3], X2, W),
        (X1, X2[:, :3], W),
        (X1[:1], X2, W),
        (X1[None], X2, W),
        (X1, X2, W[0]),
        (X1, X2, W, torch.zeros(2)),
        (X1.half(), X2, W),
        (X1, X2, W.half()),
    ],
    ids=lambda args: None,
)
def test_bad_input_raises_what_stock_raises(args, device):
    given = [t.to(device) for t in args]
    assert_same_error(F.bilinear, stock.bilinear, *given)


def test_hooks_and_checkpoints(device):
    """A hook sees the layer's input and result. Parameters move both ways, and by `convert`."""
    ours, theirs, _ = three(device)
    x1, x2 = torch.randn(2, 4, device=device), torch.randn(2, 5, device=device)
    seen = []
    ours.register_forward_hook(lambda m, args, y: seen.append((args, y)))
    with fastnn.backend("triton"), decisions() as told:
        y = ours(x1, x2)
    assert [d.why for d in told] == [None] and seen == [((x1, x2), y)]
    torch.testing.assert_close(y, theirs(x1, x2))
    other = torch.nn.Bilinear(*SIZES).to(device)
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other(x1, x2), theirs(x1, x2))
    fastnn.convert(other)
    with fastnn.backend("triton"):
        assert type(other) is torch.nn.Bilinear and torch.equal(other(x1, x2), y)
