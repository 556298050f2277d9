"""Cross entropy and nll beyond their rows: bad targets, traffic, compiled graphs, second order."""

import warnings

import pytest
import torch
import torch.nn.functional as stock

import fastnn
import fastnn.functional as F
from fastnn import kernels
from fastnn.testing import Case, assert_parity, classes, randn
from tests.marks import interpreted


@pytest.fixture(autouse=True)
def on_kernels():
    with fastnn.backend("triton"):
        yield


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_more_blocks_than_programs(reduction, monkeypatch, device):
    """With few partial sums each program takes several blocks; the last program takes fewer."""
    monkeypatch.setattr(kernels.nll_loss, "PARTIALS", 3)
    inputs = randn(2, 5, 700, shift=-5.0), classes(2, 700, high=5, ignore=-100)
    assert_parity(Case("nll_loss", inputs, {"reduction": reduction}), torch.float32, device)


def test_more_partial_sums_than_a_block(device):
    partial = torch.arange(2.0 * 9001, dtype=torch.float64, device=device).view(2, 9001)
    loss, count = torch.empty(2, device=device)
    kernels.nll_loss.sum_losses(partial, loss, count, "mean")
    total, divisor = partial.sum(1)
    assert count == divisor.float()
    assert loss == (total / divisor).float()


@pytest.mark.parametrize("shape", [(4, 6), (1, 6, 4)], ids=["classes last", "positions last"])
@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
def test_target_out_of_range_is_nan_and_reads_nothing(name, shape, device):
    memory = torch.randn(3, 24, device=device)  # [1] lies between guards, against stray reads
    x = memory[1].view(shape).detach().requires_grad_()
    target = torch.tensor([2, 6, -1, 2**40], device=device).view(shape[0], *shape[2:])
    loss = getattr(F, name)(x, target, reduction="none")
    (dx,) = torch.autograd.grad(loss.sum(), x)
    bad = torch.tensor([False, True, True, True], device=device)
    assert torch.equal(loss.isnan().view(-1), bad)
    assert torch.equal(dx.isnan().movedim(1, -1).reshape(4, 6), bad[:, None].expand(4, 6))
    assert getattr(F, name)(x, target).isnan()


def test_ignored_positions_do_not_reach_the_gradient(device):
    x = torch.randn(4, 10, device=device)
    x[1] = float("nan")
    x.requires_grad_()
    target = torch.tensor([1, -100, 2, 3], device=device)
    for smoothing in (0.0, 0.1):
        loss = F.cross_entropy(x, target, label_smoothing=smoothing)
        (dx,) = torch.autograd.grad(loss, x)
        rest = [0, 2, 3]
        expected = stock.cross_entropy(x[rest], target[rest], label_smoothing=smoothing)
        torch.testing.assert_close(loss, expected)
        assert not dx[1].any() and not dx.isnan().any()


def test_logits_edited_in_place_are_not_differentiated(device):
    x = torch.randn(4, 10, device=device, requires_grad=True)
    y = x * 1
    loss = F.cross_entropy(y, torch.zeros(4, dtype=torch.int64, device=device))
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_saves_no_table_of_log_probabilities(device):
    x = torch.randn(6, 50, device=device, requires_grad=True)
    target = torch.zeros(6, dtype=torch.int64, device=device)
    loss = F.cross_entropy(x, target)  # kept: saved tensors are freed with the result
    saved = loss.grad_fn.saved_tensors
    extra = [
        t for t in saved if t is not None and t.data_ptr() not in (x.data_ptr(), target.data_ptr())
    ]
    assert sum(t.numel() for t in extra) == 2 * 6 + 1


@pytest.mark.parametrize(
    ("legacy", "reduction"),
    [
        ({"size_average": False}, "sum"),
        ({"reduce": False}, "none"),
        ({"size_average": True, "reduce": True}, "mean"),
    ],
)
@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
def test_deprecated_arguments(name, legacy, reduction, device):
    x = torch.randn(4, 10, device=device)
    target = torch.arange(4, device=device)
    with pytest.warns(UserWarning, match=f"reduction='{reduction}'"):
        loss = getattr(F, name)(x, target, **legacy)
    torch.testing.assert_close(loss, getattr(stock, name)(x, target, reduction=reduction))


def test_nll_loss_2d_warns_as_stock(device):
    with pytest.warns(FutureWarning) as theirs:
        torch.nn.NLLLoss2d()
    with pytest.warns(FutureWarning) as ours:
        layer = fastnn.NLLLoss2d(reduction="sum")
    assert [str(w.message) for w in ours] == [str(w.message) for w in theirs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        target = torch.randint(3, (2, 4, 5), device=device)
        x = torch.randn(2, 3, 4, 5, device=device)
        expected = torch.nn.NLLLoss2d(reduction="sum")(x, target)
    torch.testing.assert_close(layer(x, target), expected)


CALLS = {
    "indices": lambda F, x, t, w: F.cross_entropy(x, t.argmax(1), w),
    "smoothing": lambda F, x, t, w: F.cross_entropy(x, t.argmax(1), w, label_smoothing=0.1),
    "rows": lambda F, x, t, w: F.cross_entropy(x * 2, t.argmax(1), reduction="none"),
    "probabilities": lambda F, x, t, w: F.cross_entropy(x, t, w, label_smoothing=0.1),
    "itself": lambda F, x, t, w: F.cross_entropy(x, x, reduction="sum"),
    "nll": lambda F, x, t, w: F.nll_loss(x, t.argmax(1), w),
    "nll spatial": lambda F, x, t, w: F.nll_loss(x.t()[None], t.argmax(1)[None], reduction="sum"),
}


def leaves(rows, device):
    torch.manual_seed(rows)
    x = torch.randn(rows, 10, device=device, requires_grad=True)
    t = torch.randn(rows, 10, device=device).softmax(1).requires_grad_()
    return x, t, torch.rand(10, device=device)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_second_derivatives(call, device):
    def twice(F):
        x, t, w = leaves(5, device)
        y = call(F, x, t, w)
        grads = torch.autograd.grad(
            y, (x, t), torch.ones_like(y), create_graph=True, allow_unused=True
        )
        total = sum((g**3).sum() for g in grads if g is not None)
        return *grads, *torch.autograd.grad(total, (x, t), allow_unused=True)

    torch.testing.assert_close(twice(F), twice(stock))


compiles = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@compiles
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["indices", "smoothing", "rows", "probabilities"], ids=lambda n: n)
def test_compiled_into_one_graph(name, dynamic, device):
    call = CALLS[name]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, t, w: call(F, x, t, w), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for rows in (6, 9):
        results = []
        for run in (compiled, lambda x, t, w: call(stock, x, t, w)):
            x, t, w = leaves(rows, device)
            loss = run(x, t, w)
            loss.sum().backward()
            results.append((loss.detach(), x.grad, t.grad))
        torch.testing.assert_close(*results)


@compiles
def test_graph_holds_the_kernels(device):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    x, t, _ = leaves(6, device)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(lambda x, t: F.cross_entropy(x, t), fullgraph=True, backend=keep)(x, t)
    assert any("cross_entropy_fwd" in str(node.target) for node in graphs[0].graph.nodes)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(3, 8000), (2, 11, 512)], ids=["classes last", "positions last"])
def test_traffic(shape, dtype, device):
    """The forward reads the logits once. The backward reads them again and writes once. Everything
    else is small."""
    from fastnn.testing.meter import nbytes, traffic

    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    with traffic() as forward:
        loss = F.cross_entropy(x, target)
    with traffic() as backward:
        loss.backward()
    positions = 16 * target.numel()  # a target and two statistics
    assert len(forward) == 2 and len(backward) == 1
    assert forward.sectors.total() <= 1.05 * (nbytes(x) + positions)
    assert backward.sectors.total() <= 1.05 * (2 * nbytes(x) + positions)

    with traffic() as ignored:
        F.cross_entropy(x.detach(), torch.full_like(target, -100))
    if len(shape) == 2:
        assert ignored.sectors.total() < 0.05 * nbytes(x)

    with traffic() as backward:
        F.nll_loss(x, target).backward()
    assert backward[-1].sectors.total() <= 1.05 * (nbytes(x) + positions)
