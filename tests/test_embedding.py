"""Embedding beyond its rows: bad indices, determinism, compiled graphs, second derivatives."""

import pytest
import torch
import torch.nn.functional as stock

import fastnn
import fastnn.functional as F
from fastnn import kernels


@pytest.fixture(autouse=True)
def on_kernels():
    with fastnn.backend("triton"):
        yield


def test_index_out_of_range_reads_nothing_and_gets_no_gradient(device):
    """Each row has guards on both sides. No guard may appear in a result."""
    guarded = torch.full((9, 4), 1e9, device=device)
    weight = guarded[3:6].copy_(torch.randn(3, 4)).requires_grad_()
    index = torch.tensor([0, -1, 2, 3, 2**40, -(2**40)], device=device)
    y = kernels.embedding.fwd(weight.detach(), index)
    assert torch.equal(y[[0, 2]], weight.detach()[[0, 2]])
    assert y[[1, 3, 4, 5]].isnan().all()

    dy = torch.ones(4, 4, device=device)
    dw = kernels.embedding.bwd(dy, index[:4], 3, -1, False)
    assert dw.tolist() == [[1.0] * 4, [0.0] * 4, [1.0] * 4]


def test_gradient_has_the_same_bits_in_every_order_of_launch(device):
    """The sum follows the order of the indices, so that rounding always gives the same bits."""
    index = torch.randint(0, 4, (1000,), device=device)
    dy = (
        torch.randn(1000, 40, device=device)
        * 10 ** torch.linspace(-4, 4, 1000, device=device)[:, None]
    )
    first = kernels.embedding.bwd(dy, index, 4, -1, False)
    assert torch.equal(first, kernels.embedding.bwd(dy, index, 4, -1, False))
    exact = torch.zeros(4, 40, dtype=torch.float64, device=device)
    exact.index_add_(0, index, dy.double())
    torch.testing.assert_close(first.double(), exact, rtol=1e-5, atol=1e-2)


def test_sums_are_in_fp32(device):
    """A sum of 2048 ones in bf16 would stop at 256."""
    index = torch.zeros(2048, dtype=torch.int64, device=device)
    dy = torch.ones(2048, 8, dtype=torch.bfloat16, device=device)
    assert (kernels.embedding.bwd(dy, index, 2, -1, False)[0] == 2048).all()


def test_saves_only_the_indices(device):
    """The backward of stock does not use the weight, so users may update it before the backward."""
    weight = torch.randn(5, 6, device=device, requires_grad=True)
    index = torch.tensor([0, 4, 4], device=device)
    y = F.embedding(index, weight)
    assert [t.data_ptr() for t in y.grad_fn.saved_tensors] == [index.data_ptr()]
    with torch.no_grad():
        weight.zero_()
    y.sum().backward()
    assert weight.grad[:, 0].tolist() == [1.0, 0.0, 0.0, 0.0, 2.0]


def test_indices_changed_before_backward_raise_as_in_stock(device):
    for embedding in (F.embedding, stock.embedding):
        index = torch.tensor([0, 4, 4], device=device)
        y = embedding(index, torch.randn(5, 6, device=device, requires_grad=True))
        index.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("padding_idx", [None, 1, -1])
def test_second_derivatives_are_stocks(device, padding_idx):
    index = torch.tensor([[0, 1, 1], [4, 0, 1]], device=device)
    weight = torch.randn(5, 6, device=device, requires_grad=True)
    upstream = torch.randn(2, 3, 6, device=device, requires_grad=True)
    seconds = []
    for embedding in (F.embedding, stock.embedding):
        y = embedding(index, weight, padding_idx)
        (dw,) = torch.autograd.grad(y.square(), weight, upstream, create_graph=True)
        seconds.append(torch.autograd.grad(dw.pow(3).sum(), (weight, upstream)))
    for ours, theirs in zip(*seconds, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("bad", [5, -6])
def test_padding_idx_out_of_range_is_stocks_error(device, bad):
    with pytest.raises(AssertionError, match="Padding_idx must be within num_embeddings"):
        F.embedding(torch.tensor([0], device=device), torch.randn(5, 6, device=device), bad)


def test_strides(device):
    """A weight with gaps between its rows is read in place. A transposed weight runs stock."""
    index = torch.tensor([3, 0], device=device)
    wide = torch.randn(5, 12, device=device)
    assert torch.equal(F.embedding(index, wide[:, 2:8]), wide[[3, 0], 2:8])
    with pytest.raises(fastnn.BackendError, match="strides"):
        F.embedding(index, torch.randn(6, 5, device=device).t())


# Dynamo itself instantiates torch.autograd.Function while it traces.
compiles = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@compiles
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(device, dynamic):
    """A compiled layer gives the bits of the eager layer, forward and backward."""
    torch._dynamo.reset()
    layer = fastnn.Embedding(7, 20, padding_idx=1).to(device)
    graph = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (5, 6):
        index = torch.randint(0, 7, (2, n), device=device)
        results = []
        for call in (graph, layer):
            y = call(index)
            (dw,) = torch.autograd.grad(y.square().sum(), layer.weight)
            results.append((y, dw))
        for ours, eager in zip(*results, strict=True):
            assert torch.equal(ours, eager)


@compiles
def test_compiled_graph_holds_our_ops(device):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    seen = set()

    def compiler(graph, inputs):
        seen.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    layer = fastnn.Embedding(7, 20).to(device)
    compiled = torch.compile(
        layer, fullgraph=True, backend=aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    )
    compiled(torch.tensor([1, 2], device=device)).sum().backward()
    assert {"fastnn.embedding_fwd.default", "fastnn.embedding_bwd.default"} <= seen


def test_registered_ops_are_sound(device):
    """torch's own check of schemas, fake implementations and aliasing."""
    index = torch.tensor([[0, 3], [3, 1]], device=device)
    weight = torch.randn(4, 6, device=device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastnn.embedding_fwd, (weight, index), test_utils=checks)
    dy = torch.randn(2, 2, 6, device=device)
    torch.library.opcheck(
        torch.ops.fastnn.embedding_bwd, (dy, index, 4, 0, True), test_utils=checks
    )
