"""Linear cross entropy beyond its rows: chunks, memory, loss scaling, graphs, an older torch."""

import importlib.util
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as stock
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastnn
import fastnn.functional as F
from fastnn._mode import backend
from fastnn.ops import linear_cross_entropy as op_file
from fastnn.testing import assert_parity
from fastnn.testing.cases import CASES
from tests.errors import assert_same_error

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHUNKED = [
    c
    for c in CASES
    if c.name in ("linear_cross_entropy", "LinearCrossEntropyLoss") and c.stock is None
]


def reference(x, w, target, **options):
    bias = options.pop("linear_bias", None)
    return stock.cross_entropy(stock.linear(x, w, bias), target, **options)


def inputs(device, N=300, K=8, C=40, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(N, K).to(device, dtype).requires_grad_()
    w = torch.randn(C, K).to(device, dtype).requires_grad_()
    target = torch.randint(C, (N,), device=device)
    target[::5] = -100
    return x, w, target


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CHUNKED, ids=str)
def test_chunks_of_a_few_rows(case, dtype, device, monkeypatch):
    monkeypatch.setattr(op_file, "chunk_rows", lambda N, C, itemsize: 2)
    if dtype in case.dtypes:
        assert_parity(case, dtype, device)


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((8192, 128256, 2), 1024),
        ((8192, 50257, 2), 2048),
        ((10, 50257, 2), 10),
        ((9, 1 << 30, 4), 9),
    ],
)
def test_a_chunk_is_a_quarter_of_a_gibibyte(shape, rows):
    assert op_file.chunk_rows(*shape) == rows
    _, C, itemsize = shape
    assert rows <= 64 or rows * C * itemsize <= op_file.CHUNK_BYTES


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest result."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() // t.itemsize for t in tree_leaves(out)
                 if isinstance(t, torch.Tensor)]  # fmt: skip
        self.numel = max([self.numel, *sizes])
        return out


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_has_as_many_elements_as_the_logits(reduction, device, monkeypatch):
    x, w, target = inputs(device, N=3000)
    monkeypatch.setattr(op_file, "chunk_rows", lambda N, C, itemsize: 64)
    largest = {}
    for name, call in (("ours", F.linear_cross_entropy), ("stock", reference)):
        # Dispatch declines under a dispatch mode, but this mode only observes.
        with mock.patch.object(torch._C, "_len_torch_dispatch_stack", lambda: 0), backend("triton"):
            with Largest() as seen:
                call(x, w, target, reduction=reduction).sum().backward()
        largest[name] = seen.numel
    # The figure includes what the interpreter holds of a tile.
    assert largest["stock"] >= 3000 * 40 and largest["ours"] <= 3000 * 8


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_float16_gradients_survive_loss_scaling(scale, device):
    """As with an AMP scaler: the factor is in the incoming gradient, and the forward has already
    computed the gradients."""
    x, w, target = inputs(device, N=600)
    with torch.autocast(torch.device(device).type, torch.float16):
        with backend("triton"):
            ours = torch.autograd.grad(F.linear_cross_entropy(x, w, target) * scale, (x, w))
        theirs = torch.autograd.grad(reference(x, w, target) * scale, (x, w))
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    exact = torch.autograd.grad(reference(*wide, target) * scale, wide)
    for a, b, e in zip(ours, theirs, exact, strict=True):
        error, bound = ((t.double() - e).abs().max().item() for t in (a, b))
        ulp = torch.finfo(torch.float16).eps * e.abs().max().item()
        assert error <= 2 * bound + ulp and a.isfinite().all()


def test_a_second_backward_gives_the_same(device):
    x, w, target = inputs(device)
    with backend("triton"):
        loss = F.linear_cross_entropy(x, w, target)
        first = torch.autograd.grad(loss, (x, w), retain_graph=True)
        second = torch.autograd.grad(loss, (x, w))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_order(reduction, device):
    x, w, target = inputs(device, N=7)
    x, w = ((t.detach() / 8).requires_grad_() for t in (x, w))

    def twice(call):
        loss = call(x, w, target, reduction=reduction).square().sum()
        grads = torch.autograd.grad(loss, (x, w), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (x, w))

    with backend("triton"):
        ours = twice(F.linear_cross_entropy)
    torch.testing.assert_close(ours, twice(reference))


def test_a_target_out_of_range_makes_the_loss_nan_and_reads_nothing(device):
    x, w, target = inputs(device)
    target[3] = 40
    with backend("triton"):
        assert F.linear_cross_entropy(x, w, target, weight=torch.ones(40, device=device)).isnan()


@pytest.mark.parametrize(
    "arguments",
    [
        lambda x, w, t: (x, w[:, :-1], t),
        lambda x, w, t: (x, w, t[:-1]),
        lambda x, w, t: (x, w.half(), t),
    ],
)
def test_wrong_calls_raise_what_stock_raises(arguments, device):
    args = arguments(*inputs(device))
    assert_same_error(F.linear_cross_entropy, op_file._reference, *args)


def test_options_leave_it_to_stock(device):
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has no such options")
    x, w, target = inputs(device)
    options = torch.nn.LinearCrossEntropyOptions()
    with backend("triton"), pytest.raises(fastnn.BackendError, match="options"):
        F.linear_cross_entropy(x, w, target, options=options)


@pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="nothing to compare with"
)
@pytest.mark.parametrize("positions", [(), (2, 3)])
def test_what_an_older_torch_gets_is_the_newer_ones(positions, monkeypatch):
    """Tests the composition and the layer that fastnn uses if torch has none."""
    torch.manual_seed(0)
    newer = torch.nn.LinearCrossEntropyLoss(6, 9, out_features=positions, bias=True)
    x, target = torch.randn(4, 6), torch.randint(9, (4, *positions))
    want = newer(x, target)
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyLoss")
    path = Path(fastnn.__file__).parent / "layers" / "linear_cross_entropy.py"
    spec = importlib.util.spec_from_file_location("older", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.F, "linear_cross_entropy", op_file._composed)
    older = module.LinearCrossEntropyLoss(6, 9, out_features=positions, bias=True)
    assert older.load_state_dict(newer.state_dict()) and older.state_dict().keys()
    assert torch.equal(older(x, target), want)
    with pytest.raises(RuntimeError, match="weight"):
        module.LinearCrossEntropyLoss(6, 9, weight=torch.ones(3))
