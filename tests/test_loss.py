"""Elementwise and row-wise losses beyond the parity rows: warnings, walks, bytes, graphs."""

import itertools
import math
import random
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as stock

import fastnn
import fastnn.functional as F
from fastnn import kernels
from fastnn._mode import decisions
from fastnn.testing import Case, Side, assert_parity, compare_sides, count, randn
from fastnn.testing.cases.loss import counts, signs, uniform
from fastnn.testing.cases.multilabel_margin import lists
from tests.errors import assert_same_error
from tests.marks import interpreted
from tests.versions import OLDER, pinned

DOCS = Path(__file__).parent.parent / "docs" / "losses.md"


@pytest.fixture(autouse=True)
def on_kernels():
    with fastnn.backend("triton"):
        yield


def indices(rows, classes):
    return lambda dtype, device: (torch.arange(rows) % classes).to(device)


N, C = 16, 512
SHAPE = (N, C)
X, P = randn(*SHAPE), uniform(*SHAPE)
# For each function: its tensors and keyword arguments. All tensors except targets have gradients.
CALLS = {
    "mse_loss": ((X, randn(*SHAPE)), {}),
    "l1_loss": ((X, randn(*SHAPE)), {}),
    "smooth_l1_loss": ((X, randn(*SHAPE)), {}),
    "huber_loss": ((X, randn(*SHAPE)), {}),
    "binary_cross_entropy": ((P, P), {}),
    "binary_cross_entropy_with_logits": ((X, P), {}),
    "kl_div": ((X, P), {"reduction": "batchmean"}),
    "poisson_nll_loss": ((X, counts(*SHAPE)), {}),
    "gaussian_nll_loss": ((X, randn(*SHAPE), P), {}),
    "hinge_embedding_loss": ((X, signs(*SHAPE)), {}),
    "soft_margin_loss": ((X, signs(*SHAPE)), {}),
    "margin_ranking_loss": ((X, randn(*SHAPE), signs(*SHAPE)), {}),
    "cosine_similarity": ((X, randn(*SHAPE)), {}),
    "pairwise_distance": ((X, randn(*SHAPE)), {}),
    "triplet_margin_loss": ((X, randn(*SHAPE), randn(*SHAPE)), {"swap": True}),
    "cosine_embedding_loss": ((X, randn(*SHAPE), signs(N)), {}),
    "multi_margin_loss": ((X, indices(N, C)), {}),
    "multilabel_soft_margin_loss": ((X, P), {}),
    "multilabel_margin_loss": ((randn(5, 7), lists(5, 7)), {}),
}
each = pytest.mark.parametrize("name", CALLS)


def made(name, device, dtype=torch.float32):
    torch.manual_seed(0)
    tensors, options = CALLS[name]
    return [make(dtype, device) for make in tensors], options


def gradients(y, tensors, **options):
    wanting = [t for t in tensors if t.requires_grad]
    dy = torch.linspace(0.5, 1.5, y.numel(), device=y.device, dtype=y.dtype).view_as(y)
    return torch.autograd.grad(y, wanting, dy, **options)


# ---- bytes and launches -------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", [n for n in CALLS if n != "multilabel_margin_loss"])
def test_each_input_is_read_once(name, dtype, device):
    """The forward reads each input once, and writes what is kept in the place of inputs. The
    backward reads that, or the inputs, once, and writes the gradients. No PyTorch operator runs
    beside the kernels, so none waits for the device. The exceptions copy a variance, and the
    target of cosine_embedding_loss, one number for a row, of which PyTorch keeps masks."""
    from fastnn.testing.meter import AtenTraffic, nbytes, traffic

    tensors, options = made(name, device, dtype)
    with traffic() as forward, not_seen(AtenTraffic()) as between:
        y = getattr(F, name)(*tensors, **options)
    rows = 4 * 4 * N
    given = {t.data_ptr() for t in tensors}
    saved = [t for t in y.grad_fn.saved_tensors if t is not None and t.numel() >= N * C]
    kept = [t for t in saved if t.data_ptr() not in given]
    copies = [t for t in kept if name == "gaussian_nll_loss"][1:]
    rows_copied = name == "cosine_embedding_loss"
    assert len(forward) <= 2 and len(between.ops) == len(copies) + rows_copied
    assert forward.sectors.total() <= 1.05 * (nbytes(*tensors, *kept) - nbytes(*copies) + rows)
    wanting = [t for t in tensors if t.requires_grad]
    seed = torch.ones_like(y)
    with traffic() as backward, not_seen(AtenTraffic()) as between:
        torch.autograd.grad(y, wanting, seed)
    assert len(backward) == 1 and not between.ops
    read = saved if kept else tensors
    assert backward.sectors.total() <= 1.05 * (nbytes(*read, *wanting) + rows)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, to wait for")
@each
def test_nothing_waits_for_the_device(name):
    tensors, options = made(name, "cuda")
    gradients(getattr(F, name)(*tensors, **options), tensors)  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = getattr(F, name)(*tensors, **options)
        torch.autograd.grad(y, [t for t in tensors if t.requires_grad], torch.ones_like(y))
    finally:
        torch.cuda.set_sync_debug_mode(before)


@interpreted
@pinned
def test_the_table_of_the_docs(device):
    lines = []
    for name, (tensors, options) in CALLS.items():
        moved = count(Case(name, tensors, options), torch.float32)
        one = tensors[0](torch.float32, device).numel() * 4
        lines.append(
            f"| `{name}` | {moved.stock.launches} | {moved.ours.launches} "
            f"| {moved.stock.bytes / one:.0f} | {moved.ours.bytes / one:.1f} "
            f"| {moved.least / one:.1f} |"
        )
    assert "\n" + "\n".join(lines) + "\n" in DOCS.read_text()


class not_seen:
    """A dispatch mode under which fastnn's dispatch does not decline."""

    def __init__(self, mode):
        self.mode = mode
        self.patch = pytest.MonkeyPatch()

    def __enter__(self):
        from torch.utils._python_dispatch import _disable_current_modes
        from triton.runtime import interpreter

        run = interpreter.GridExecutor.__call__

        def call(*args, **kwargs):
            with _disable_current_modes():  # the operators of the interpreter itself
                return run(*args, **kwargs)

        self.patch.setattr(interpreter.GridExecutor, "__call__", call)
        self.patch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
        return self.mode.__enter__()

    def __exit__(self, *exc):
        self.mode.__exit__(*exc)
        self.patch.undo()


@interpreted
def test_kl_div_neither_keeps_nor_reads_its_input_in_the_backward(device):
    from fastnn.testing.meter import nbytes, traffic

    (x, t), _ = made("kl_div", device)
    t = t.detach()
    for log in (False, True):
        y = F.kl_div(x, t, reduction="sum", log_target=log)
        (kept,) = (s for s in y.grad_fn.saved_tensors if s is not None)
        if log:  # the derivative, because stock keeps exp(target) and users may edit the target
            torch.testing.assert_close(kept, -t.exp())
        else:
            assert kept.data_ptr() == t.data_ptr()
        with traffic() as backward:
            (dx,) = torch.autograd.grad(y, x)
        assert backward.sectors.total() <= 1.05 * nbytes(t, dx)


# ---- walks --------------------------------------------------------------------------------------


def random_view(shape, rng, device):
    """A tensor that broadcasts to `shape`: permuted in memory, with gaps, expanded, or smaller."""
    order = list(range(len(shape)))
    rng.shuffle(order)
    sizes = [shape[d] for d in order]
    gaps = [rng.choice((1, 1, 2)) for _ in sizes]
    x = torch.randn([n * gap for n, gap in zip(sizes, gaps, strict=True)], device=device)
    x = x[tuple(slice(None, None, gap) for gap in gaps)]
    x = x.permute([order.index(d) for d in range(len(shape))])
    for d in range(len(shape)):
        kind = rng.choice(("whole", "whole", "one", "expanded"))
        if kind != "whole":
            x = x.narrow(d, 0, 1)
        if kind == "expanded":
            x = x.expand(*(shape[d] if i == d else -1 for i in range(len(shape))))
    while x.dim() and x.shape[0] == 1 and rng.random() < 0.5:
        x = x[0]
    return x


@pytest.mark.parametrize("seed", range(12))
def test_any_layouts_broadcast_together(seed, device):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    shape = [rng.choice((1, 2, 3, 5)) for _ in range(rng.randint(1, 5))]
    a, b, c = (random_view(shape, rng, device) for _ in range(3))
    if not a.dim() == b.dim() == c.dim():
        a, b, c = (t.expand(torch.broadcast_shapes(t.shape, shape)) for t in (a, b, c))
    for reduction in ("none", "sum"):
        results = []
        for namespace in (F, stock):
            leaves = [t.detach().requires_grad_() for t in (a, b, c)]
            y = namespace.margin_ranking_loss(*leaves, margin=0.1, reduction=reduction)
            results.append([y, *gradients(y, leaves)])
        torch.testing.assert_close(*results)
        assert results[0][0].stride() == results[1][0].stride()


def test_a_walk_is_as_flat_as_the_tensors_allow():
    def walked(*tensors):
        return kernels.loss.walk(*tensors)[0].addressing

    x = torch.empty(4, 3, 8, 8)
    dense = (None, None, None)
    assert walked(x, x, None) == (None, None, *dense, *dense, *dense)
    nhwc = x.to(memory_format=torch.channels_last)
    assert walked(nhwc, nhwc) == (None, None, *dense, *dense)
    assert walked(x, torch.empty(())) == (None, None, *dense, None, None, 0)
    assert walked(x, torch.empty(3, 1, 1)) == (3, 64, *dense, 0, 1, 0)
    assert walked(nhwc, torch.empty(3, 1, 1)) == (None, 3, *dense, None, 0, 1)
    assert walked(x, x.transpose(0, 1).contiguous().transpose(0, 1))[:2] == (3, 64)
    huge = torch.empty(2**16, 2**15, device="meta")
    assert kernels.loss.walk(huge, huge)[0].wide
    assert not kernels.loss.walk(huge[1:], huge[1:])[0].wide
    assert kernels.loss.walk(torch.empty(2**16, 2**16, device="meta")[::2, ::3])[0].wide


def test_more_dimensions_than_a_walk_has(device):
    x = torch.randn(3, 2, 3, 2, device=device)
    y = torch.randn(3, 1, 3, 1, device=device)
    found, copied = kernels.loss.walk(x, y)
    assert found.addressing == (None,) * 8 and torch.equal(copied[1], y.expand_as(x))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_wide_indices(reduction, device, monkeypatch):
    """Beyond 2**31 elements offsets have 64 bits. In this test they have 64 bits for a few."""
    walk = kernels.loss.walk

    def wide(*tensors):
        found, tensors = walk(*tensors)
        found.wide = True
        return found, tensors

    kernels.loss._walk.cache_clear()
    monkeypatch.setattr(kernels.loss, "walk", wide)
    inputs = randn(3, 5, 7), randn(3, 1, 7), randn(3, 5, 1)
    case = Case("margin_ranking_loss", inputs, {"reduction": reduction})
    assert_parity(case, torch.float32, device)
    kernels.loss._walk.cache_clear()


@pytest.mark.parametrize("weighted", [False, True])
def test_more_tiles_than_programs(weighted, device, monkeypatch):
    monkeypatch.setattr(kernels.loss, "PARTIALS", 3)
    options = {"weight": uniform(9000, grad=False)} if weighted else {}
    assert_parity(Case("mse_loss", (randn(9000), randn(9000)), options), torch.float32, device)


def test_more_partial_sums_than_a_block(device):
    partial = torch.arange(2.0 * 9001, dtype=torch.float64, device=device).view(2, 9001)
    loss, count = torch.empty(2, device=device)
    kernels._partials.finish(partial, loss, count, 1)
    total, divisor = partial.sum(1)
    assert count == divisor.float() and loss == (total / divisor).float()
    kernels._partials.finish(partial[:1], loss, None, 7)
    assert loss == (total / 7).float()


def test_sums_keep_what_a_running_sum_would_lose(device):
    x = torch.full((1 << 20,), 0.1, device=device)
    loss = F.l1_loss(x, torch.zeros_like(x), reduction="sum")
    assert abs(loss.item() - 0.1 * 2**20) < 0.02


# ---- what is said -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["triton", "auto", "torch"])
@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"])
def test_broadcasting_warns_as_stock(name, mode, device):
    x = torch.randn(3, 5, device=device, requires_grad=True)
    t = torch.randn(5, device=device, requires_grad=True)
    results = []
    said = []
    for namespace in (F, stock):
        with warnings.catch_warnings(record=True) as caught, fastnn.backend(mode):
            warnings.simplefilter("always")
            y = getattr(namespace, name)(x, t)
        said.append([(w.category, str(w.message)) for w in caught])
        if mode == "triton":
            assert [w.filename for w in caught] == [__file__]
        results.append([y, *gradients(y, (x, t))])
    assert said[0] == said[1] and len(said[0]) == 1
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("mode", ["triton", "auto", "torch"])
def test_kl_div_warns_of_its_mean(mode, device):
    (x, t), _ = made("kl_div", device)
    said = []
    results = []
    for namespace in (F, stock):
        with warnings.catch_warnings(record=True) as caught, fastnn.backend(mode):
            warnings.simplefilter("always")
            results.append(namespace.kl_div(x, t))
        said.append([(w.category, str(w.message)) for w in caught])
        if mode == "triton" and not OLDER:  # older ones name a line of PyTorch's own file
            assert [w.filename for w in caught] == [__file__]
    assert said[0] == said[1] and len(said[0]) == 1
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("legacy", "reduction"),
    [
        ({"size_average": False}, "sum"),
        ({"reduce": False}, "none"),
        ({"size_average": True, "reduce": True}, "mean"),
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        n for n in CALLS
        if n not in ("huber_loss", "gaussian_nll_loss", "cosine_similarity", "pairwise_distance")
    ],
)  # fmt: skip
def test_deprecated_arguments(name, legacy, reduction, device):
    tensors, options = made(name, device)
    options = {k: v for k, v in options.items() if k != "reduction"} | legacy
    with pytest.warns(UserWarning, match=f"reduction='{reduction}'"):
        ours = getattr(F, name)(*tensors, **options)
    with pytest.warns(UserWarning):
        theirs = getattr(stock, name)(*tensors, **options)
    torch.testing.assert_close(ours, theirs)


WRONG = [
    lambda F, x: F.l1_loss(x, x, reduction="all"),
    lambda F, x: F.huber_loss(x, x, delta=0.0),
    lambda F, x: F.smooth_l1_loss(x, x, beta=-1.0),
    lambda F, x: F.mse_loss(x, x, weight=torch.ones(4)),
    lambda F, x: F.mse_loss(x, None),
    lambda F, x: F.binary_cross_entropy(x, torch.ones(4)),
    lambda F, x: F.binary_cross_entropy(x, x.long()),
    lambda F, x: F.binary_cross_entropy(x, x, torch.ones(2, 3, 4)),
    lambda F, x: F.binary_cross_entropy(x, x, torch.ones(4).requires_grad_()),
    lambda F, x: F.binary_cross_entropy_with_logits(x, torch.ones(4)),
    lambda F, x: F.binary_cross_entropy_with_logits(x, x, torch.ones(2, 3, 4)),
    lambda F, x: F.binary_cross_entropy_with_logits(x, x, pos_weight=torch.ones(3)),
    lambda F, x: F.kl_div(x, torch.ones(3), reduction="sum"),
    lambda F, x: F.kl_div(x, x, reduction="batchsum"),
    lambda F, x: F.poisson_nll_loss(x, torch.ones(3)),
    lambda F, x: F.gaussian_nll_loss(x, x, torch.ones(2)),
    lambda F, x: F.gaussian_nll_loss(x, x, -1.0),
    lambda F, x: F.hinge_embedding_loss(x, torch.ones(3)),
    lambda F, x: F.soft_margin_loss(x, torch.ones(3)),
    lambda F, x: F.soft_margin_loss(x, x.clone().requires_grad_()),
    lambda F, x: F.margin_ranking_loss(x, x, torch.ones(4)),
    lambda F, x: F.cosine_similarity(x, torch.ones(3, 3)),
    lambda F, x: F.cosine_similarity(x, x, dim=2),
    lambda F, x: F.pairwise_distance(x, torch.ones(3, 3)),
    lambda F, x: F.triplet_margin_loss(x, x, torch.ones(4)),
    lambda F, x: F.triplet_margin_loss(x, x, x, margin=0.0),
    lambda F, x: F.cosine_embedding_loss(x, x, x),
    lambda F, x: F.cosine_embedding_loss(x[0], x[0], torch.ones(3)),
    lambda F, x: F.multi_margin_loss(x, torch.zeros(4, dtype=torch.int64)),
    lambda F, x: F.multi_margin_loss(x, torch.zeros(3, dtype=torch.int64), p=3),
    lambda F, x: F.multi_margin_loss(x, torch.zeros(3, dtype=torch.int64), weight=torch.ones(3)),
    lambda F, x: F.multilabel_margin_loss(x, torch.zeros(3, dtype=torch.int64)),
    lambda F, x: F.multilabel_soft_margin_loss(x, torch.ones(3)),
]


@pytest.mark.parametrize("call", WRONG)
def test_wrong_calls_raise_what_stock_raises(call, device):
    with torch.device(device):
        x = torch.ones(3, 4)
        assert_same_error(lambda: call(F, x), lambda: call(stock, x))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_values_that_stock_stops_at_are_nan(reduction, device):
    """For such values stock fails an assertion on CUDA, or waits for the device and raises."""
    half = torch.full((4,), 0.5, device=device)
    bad = torch.tensor([0.5, -0.1, 1.1, math.nan], device=device)
    for loss in (
        F.binary_cross_entropy(bad, half, reduction=reduction),
        F.binary_cross_entropy(half, bad, reduction=reduction),
        F.gaussian_nll_loss(half, half, torch.tensor([1, -1, -1, math.nan], device=device),
                            reduction=reduction),
    ):  # fmt: skip
        want = torch.tensor([False, True, True, True], device=device)
        assert torch.equal(loss.isnan(), want if reduction == "none" else want.any())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_targets_next_to_the_largest_number_have_the_gradients_of_stock(reduction, device):
    """PyTorch multiplies the incoming gradient by the target before the two terms meet."""
    torch.manual_seed(0)
    largest = torch.finfo(torch.float32).max
    x = torch.randn(64, 40, device=device, requires_grad=True)
    target = (largest * torch.randn(64, 40, device=device).sign()).requires_grad_()
    options = {"reduction": reduction}
    want = gradients(stock.multilabel_soft_margin_loss(x, target, **options), (x, target))
    with decisions() as heard:
        got = gradients(F.multilabel_soft_margin_loss(x, target, **options), (x, target))
    assert [why for _, why, _ in heard] == [None]
    for a, b in zip(got, want, strict=True):
        assert b.isfinite().any() and a[b.isfinite()].isfinite().all()


def test_targets_out_of_range_are_nan_and_read_nothing(device):
    memory = torch.randn(3, 4, 6, device=device)  # [1] lies between guards, against stray reads
    x = memory[1].detach().requires_grad_()
    target = torch.tensor([2, 6, -1, 2**40], device=device)
    loss = F.multi_margin_loss(x, target, reduction="none")
    (dx,) = torch.autograd.grad(loss.sum(), x)
    bad = torch.tensor([False, True, True, True], device=device)
    assert torch.equal(loss.isnan(), bad)
    assert torch.equal(dx.isnan(), bad[:, None].expand(4, 6))
    lists = torch.tensor([[2, 1, -1], [3, -1, 0], [2**40, -1, 0]], device=device)
    x = memory[1, :3, :3].contiguous().requires_grad_()
    loss = F.multilabel_margin_loss(x, lists, reduction="none")
    (dx,) = torch.autograd.grad(loss.sum(), x)
    assert torch.equal(loss.isnan(), bad[:3])
    assert torch.equal(dx.isnan(), bad[:3, None].expand(3, 3))


@each
def test_deterministic_algorithms_raise_for_none(name, device):
    tensors, options = made(name, device)
    torch.use_deterministic_algorithms(True)
    y = getattr(F, name)(*tensors, **options)
    gradients(y, tensors)


# ---- dtypes and graphs --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", [n for n in CALLS if getattr(F, n).op.autocast == "fp32"])
def test_under_the_rule_of_cuda_autocast(name, dtype, device):
    """With 16-bit inputs the result is computed and returned in float32, and each gradient has the
    dtype of its input. Stock converts the inputs first."""
    tensors, options = made(name, device, dtype)
    op = getattr(F, name).op
    y = op.fused(*tensors, **options, out_dtype=torch.float32)
    assert y.dtype == torch.float32

    def float32(t):
        return t.float() if t.is_floating_point() else t

    theirs = op.stock(*map(float32, tensors), **options)
    torch.testing.assert_close(y, theirs, rtol=1e-5, atol=1e-6)
    pairs = zip(gradients(y, tensors), gradients(theirs, tensors), strict=True)
    for a, b in pairs:
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


SECOND = {
    **{n: lambda F, x, y, n=n: getattr(F, n)(x, y) for n in list(CALLS)[:4]},
    "mse weighted": lambda F, x, y: F.mse_loss(x, y, weight=x.detach().abs() + 1),
    "l1 rows": lambda F, x, y: F.l1_loss(x, y, reduction="none"),
    "bce": lambda F, x, y: F.binary_cross_entropy(x.sigmoid(), y.sigmoid()),
    "logits": lambda F, x, y: F.binary_cross_entropy_with_logits(
        x, y.sigmoid(), x.detach()[0].abs(), pos_weight=y.detach()[0].abs()
    ),
    "kl": lambda F, x, y: F.kl_div(x, y.sigmoid(), reduction="batchmean"),
    "kl of x": lambda F, x, y: F.kl_div(x * x, y.detach().sigmoid(), reduction="sum"),
    "kl of log": lambda F, x, y: F.kl_div(x * x, y.detach(), reduction="sum", log_target=True),
    "poisson": lambda F, x, y: F.poisson_nll_loss(x, y.exp(), full=True, log_input=True),
    "poisson of x": lambda F, x, y: F.poisson_nll_loss(x.exp(), y.exp(), log_input=False),
    "gaussian": lambda F, x, y: F.gaussian_nll_loss(x, y, y.exp(), eps=0.5),
    "gaussian scalar": lambda F, x, y: F.gaussian_nll_loss(x, y, 0.3, full=True),
    "hinge": lambda F, x, y: F.hinge_embedding_loss(x * x, y.detach().sign()),
    "soft": lambda F, x, y: F.soft_margin_loss(x, y.detach().sign(), reduction="none"),
    "ranking": lambda F, x, y: F.margin_ranking_loss(x * y, y, x),
    "cosine": lambda F, x, y: F.cosine_similarity(x, y, 0),
    "pairwise": lambda F, x, y: F.pairwise_distance(x, y, 3.0),
    "triplet": lambda F, x, y: F.triplet_margin_loss(x, y, x * y, 5.0, swap=True),
    "embedding": lambda F, x, y: F.cosine_embedding_loss(x, y, y.detach()[:, 0].sign()),
    "multilabel": lambda F, x, y: F.multilabel_soft_margin_loss(x, y.sigmoid(), reduction="none"),
}


@pytest.mark.parametrize("same", [False, True], ids=["two tensors", "one twice"])
@pytest.mark.parametrize("call", SECOND.values(), ids=SECOND)
def test_second_derivatives(call, same, device):
    def twice(F):
        torch.manual_seed(0)
        x = torch.randn(3, 5, device=device, requires_grad=True)
        y = x if same else torch.randn(3, 5, device=device, requires_grad=True)
        z = call(F, x, y)
        leaves = (x,) if same else (x, y)
        grads = torch.autograd.grad(
            z, leaves, torch.linspace(0.5, 1.5, z.numel(), device=device).view_as(z),
            create_graph=True, allow_unused=True,
        )  # fmt: skip
        total = sum((g**3).sum() for g in grads if g is not None)
        if not isinstance(total, torch.Tensor) or not total.requires_grad:
            return grads
        return *grads, *torch.autograd.grad(total, leaves, allow_unused=True)

    torch.testing.assert_close(twice(F), twice(stock), equal_nan=True)


@pytest.mark.parametrize("name", ["multi_margin_loss", "multilabel_margin_loss"])
def test_no_second_derivative_where_stock_has_none(name, device):
    said = []
    for namespace in (F, stock):
        (x, target), _ = made(name, device)
        (dx,) = torch.autograd.grad(getattr(namespace, name)(x, target), x, create_graph=True)
        with pytest.raises(RuntimeError) as error:
            torch.autograd.grad(dx.sum(), x)
        said.append(str(error.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("name", ["mse_loss", "kl_div", "cosine_similarity", "pairwise_distance"])
def test_no_graph_where_none_is_wanted(name, device):
    tensors, options = made(name, device)
    with torch.no_grad():
        y = getattr(F, name)(*tensors, **options)
    with torch.inference_mode():
        z = getattr(F, name)(*tensors, **options)
    assert y.grad_fn is None and z.is_inference() and torch.equal(y, z)


@pytest.mark.parametrize("order", list(itertools.permutations("abc")), ids="".join)
def test_gradients_of_some_inputs(order, device):
    """Each input alone, and each pair, gets its gradients, and no other input does."""
    results = []
    for namespace in (F, stock):
        (a, b, c), _ = made("margin_ranking_loss", device)
        tensors = {"a": a.detach(), "b": b.detach(), "c": c.detach()}
        collected = []
        for k in range(1, 4):
            leaves = {n: t.clone().requires_grad_(n in order[:k]) for n, t in tensors.items()}
            namespace.margin_ranking_loss(*leaves.values(), margin=0.3).backward()
            collected.append([t.grad for t in leaves.values()])
        results.append(collected)
    torch.testing.assert_close(*results)


def test_few_rows_run_stock_in_auto(device, simulate):
    """One program computes one row, so with few rows most of a GPU would be idle."""
    simulate(least=16, source="the test")
    for rows, path in ((64, None), (63, "63 rows")):
        x, y, z = torch.randn(3, rows, 2, device=device)
        for call in (
            lambda: F.cosine_similarity(x, y),  # noqa: B023
            lambda: F.cosine_similarity(x.t(), y.t(), dim=0),  # noqa: B023
            lambda: F.pairwise_distance(x, y),  # noqa: B023
            lambda: F.triplet_margin_loss(x, y, z, swap=True),  # noqa: B023
        ):
            with fastnn.backend("auto"), fastnn.decisions() as heard:
                call()
            assert [d.why and path in d.why for d in heard] == [path and True]


@interpreted
@pytest.mark.parametrize("transposed", ["input", "target"])
def test_unreduced_losses_have_the_strides_of_stock(transposed):
    """PyTorch allocates those of binary_cross_entropy like the input, not like the target."""
    names = ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy"]
    for name in [*names, "binary_cross_entropy_with_logits", "soft_margin_loss", "kl_div"]:
        pair = {k: torch.rand(3, 4) for k in ("input", "target")}
        pair[transposed] = torch.rand(4, 3).t()
        with fastnn.backend("triton"):
            ours = getattr(F, name)(**pair, reduction="none")
        stock = getattr(torch.nn.functional, name)(**pair, reduction="none")
        assert ours.stride() == stock.stride(), name


# ---- TripletMarginWithDistanceLoss --------------------------------------------------------------


def _triplet_layers(distance=None, **options):
    """The layer of fastnn, of PyTorch and in float64; `distance` makes their distance function."""
    made = distance or (lambda nn: None)
    return [
        nn.TripletMarginWithDistanceLoss(distance_function=made(nn), **options)
        for nn in (fastnn, torch.nn, torch.nn)
    ]


@pytest.mark.parametrize("distance", [None, lambda nn: nn.PairwiseDistance()])
def test_triplets_with_the_default_distance_run_on_kernels(distance, device):
    sides = [Side(m, {}) for m in _triplet_layers(distance, margin=0.7, swap=True)]
    args = [torch.randn(9, 12, device=device, requires_grad=True) for _ in range(3)]
    result = compare_sides(*sides, args, {}, device=device)
    assert result.path == "kernel" and not result.failures, result.failures


@pytest.mark.parametrize("watched", [False, True])
def test_triplets_call_a_distance_of_the_users(watched, device):
    """So they call the default distance, if it has a hook; as often as PyTorch."""
    counts = []
    args = [torch.randn(5, 6, device=device) for _ in range(3)]
    results = []
    for nn in (fastnn, torch.nn):
        seen = []
        distance = nn.PairwiseDistance()
        if watched:
            distance.register_forward_hook(lambda m, a, y, seen=seen: seen.append(y.shape))
            given = distance
        else:
            given = lambda a, b, seen=seen: seen.append(a.shape[:1]) or (a - b).abs().sum(-1)  # noqa: E731
        layer = nn.TripletMarginWithDistanceLoss(distance_function=given, swap=True)
        with fastnn.backend("auto"):
            results.append(layer(*args))
        counts.append(seen)
    assert counts[0] == counts[1] and len(counts[0]) == 3
    torch.testing.assert_close(*results)


def test_bad_triplets_raise_what_stock_raises(device):
    x = torch.randn(4, 6, device=device)
    for args, options in (
        ((x, x, x[0]), {}), ((x, x, x[:, :4]), {}), ((x, x, x), {"margin": -1.0}),
        ((x, x, x), {"reduction": "other"}),
    ):  # fmt: skip
        ours, theirs = (
            lambda *a, f=f, o=options: f(*a, **o)
            for f in (F.triplet_margin_with_distance_loss, stock.triplet_margin_with_distance_loss)
        )
        assert_same_error(ours, theirs, *args)


def test_a_converted_triplet_loss(device):
    layer = torch.nn.TripletMarginWithDistanceLoss()
    args = [torch.randn(5, 6, device=device) for _ in range(3)]
    want = layer(*args)
    fastnn.convert(layer)
    with fastnn.backend("triton"), decisions() as told:
        torch.testing.assert_close(layer(*args), want)
    assert type(layer) is torch.nn.TripletMarginWithDistanceLoss and told[-1].why is None
    assert layer.state_dict() == {}
