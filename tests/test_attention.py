"""Attention beyond the rows: calls of all kinds against stock, memory, bits, dropout, paths."""

import math
from contextlib import nullcontext

import hypothesis
import pytest
import torch
import torch.nn.functional as stock
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import fastnn
import fastnn.functional as F
from fastnn import kernels
from fastnn._mode import BackendError, decisions
from fastnn.ops.attention import BESIDE_FUSED
from fastnn.testing.meter import traffic
from fastnn.testing.noise import recording
from tests.marks import interpreted, on_device

attention = F.scaled_dot_product_attention


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that a dozen queries and keys need several tiles each."""
    tiles = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(kernels.attention_config, "config", lambda kind, shape: dict(tiles))


# ---- fuzz ---------------------------------------------------------------------------------------


@st.composite
def calls(draw):
    """(shapes of q, k, v; of the mask; its kind; options, layout, seed): most of them valid."""
    one_in = lambda n: draw(st.integers(1, n)) == 1  # noqa: E731
    size = st.sampled_from((1, 2, 3, 7, 15, 16, 17, 19))
    L, S = draw(size), draw(size)
    D = draw(st.sampled_from((1, 3, 8, 16, 20)))
    E = D if one_in(2) else draw(st.sampled_from((1, 5, 8, 24)))
    batch = draw(st.sampled_from(((), (1,), (2,), (2,), (2, 2))))
    H_k = draw(st.sampled_from((1, 2)))
    gqa = bool(batch) and one_in(3)
    H = H_k * draw(st.sampled_from((1, 2))) if gqa else H_k
    lead, lead_k = ((*batch, H), (*batch, H_k)) if batch else ((), ())
    if not batch and one_in(2):
        lead = lead_k = (H_k,)
        H = H_k
    lead_v = lead_k
    if lead and one_in(8):  # a batch that broadcasts, or that is rejected
        lead_k = tuple(1 if one_in(2) else n for n in lead_k)
        lead_v = lead_k if one_in(2) else lead_v
    options = {}
    if gqa:
        options["enable_gqa"] = True
    if one_in(4):
        options["scale"] = draw(st.sampled_from((0.3, 1.0, -0.7, 0.0, 2)))
    kind = draw(st.sampled_from((None, None, "keep", "add", "add fp32", "empty rows", "odd")))
    mask = None
    if kind is not None:
        full = (*lead, L, S)
        mask = tuple(1 if one_in(3) else n for n in full)
        mask = mask[draw(st.integers(0, max(0, len(mask) - 2))) :]
        if one_in(30):  # a call that is rejected
            mask = draw(st.sampled_from(((L + 1, S), (S,), (2, *full), (L, S + 2))))
    if (kind is None and one_in(3)) or one_in(30):
        options["is_causal"] = True
    layout = draw(st.sampled_from(("dense", "dense", "heads last", "transposed", "sliced")))
    D_k = D + one_in(40)
    longer = len(lead) != 2 and one_in(40)  # stock's CPU kernel does not check
    shapes = (*lead, L, D), (*lead_k, S, D_k), (*lead_v, S + longer, E)
    return shapes, mask, kind, options, layout, draw(st.integers(0, 2**31))


def laid_out(shape, layout, dtype):
    """Normal values; a leaf."""
    if layout == "heads last" and len(shape) > 2:
        *lead, H, N, D = shape
        x = torch.randn(*lead, N, H, D).transpose(-2, -3)
    elif layout == "transposed":
        x = torch.randn(*shape[:-2], shape[-1], shape[-2]).mT
    elif layout == "sliced":
        x = torch.randn(*shape[:-1], shape[-1] + 3)[..., 1:-2]
    else:
        x = torch.randn(shape)
    return x.to(dtype).detach().requires_grad_()


def make_mask(shape, kind, dtype):
    if kind in ("keep", "empty rows"):
        mask = torch.rand(shape) < 0.7
        if kind == "empty rows" and mask.dim() > 1:
            mask[..., ::2, :] = False
        return mask
    mask = torch.randn(shape)
    if kind == "odd":
        mask[torch.rand(shape) < 0.3] = -math.inf
    return mask.to(torch.float32 if kind == "add fp32" else dtype)


def outcome(call, q, k, v, mask, options, upstream=None):
    """(result, gradients), or the error."""
    try:
        out = call(q, k, v, attn_mask=mask, **options)
    except BackendError as e:
        return str(e)
    except (RuntimeError, IndexError, ValueError, TypeError) as e:
        return e
    if upstream is None:
        upstream = torch.randn(out.shape)
    leaves = [t for t in (q, k, v, mask) if t is not None and t.requires_grad]
    return out, torch.autograd.grad(out, leaves, upstream.to(out.dtype)), upstream


# Reasons for stock that docs/attention.md lists.
DECLINED = ("constant in some of the dims", "one column", "heads of keys")


# The arguments decide on the path. The 16-bit dtypes differ in their rounding only.
@pytest.mark.parametrize(
    ("dtype", "examples"),
    [(torch.float32, 180), (torch.bfloat16, 60), (torch.float16, 60)],
    ids=str,
)
@pytest.mark.usefixtures("small_tiles")
@interpreted
def test_any_call_is_as_stock(dtype, examples):
    """Values, gradients, dtypes, shapes, strides, nans, error types; no lane out of bounds.

    The error of stock is taken as its largest error over all calls, as for PyTorch's own samples.
    """
    ours, its, ran, seen = [(0.0, None)], [0.0], [0], [0]

    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(calls())
    def fuzz(drawn):
        shapes, mask_shape, kind, options, layout, seed = drawn
        torch.manual_seed(seed)
        q, k, v = (laid_out(s, layout, dtype) for s in shapes)
        mask = None if kind is None else make_mask(mask_shape, kind, dtype)
        if mask is not None and mask.is_floating_point() and seed % 2:
            mask.requires_grad_()
        want = outcome(stock.scaled_dot_product_attention, q, k, v, mask, options)
        given = want[2] if isinstance(want, tuple) else None
        with fastnn.backend("triton"), traffic(distinct=False):
            got = outcome(attention, q, k, v, mask, options, given)
        seen[0] += 1
        if isinstance(got, str):
            assert any(words in got for words in DECLINED), got
            return
        if isinstance(want, Exception):
            assert type(got) is type(want) and str(got) == str(want), (got, want)
            return
        assert isinstance(got, tuple), got
        ran[0] += 1
        wide = [
            t if t is None or t.dtype == torch.bool else t.detach().double().requires_grad_(g)
            for t in (q, k, v, mask)
            for g in [t is not None and t.requires_grad]
        ]
        with sdpa_kernel(SDPBackend.MATH):
            exact = outcome(stock.scaled_dot_product_attention, *wide, options, given)
        named = [(name, x[0], *x[1]) for name, x in (("ours", got), ("its", want), ("", exact))]
        scale = max(t.abs().nan_to_num().max().item() for t in exact[1]) or 1.0
        for i, (a, b, c) in enumerate(zip(*(x[1:] for x in named), strict=True)):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert i or a.stride() == b.stride(), (a.stride(), b.stride())
            assert torch.equal(a.isnan(), c.isnan()), ("nan", i)
            unit = torch.finfo(a.dtype).eps * (scale if i else max(c.abs().max().item(), 1e-9))
            ours.append(((a.double() - c).abs().nan_to_num().max().item() / unit, drawn))
            if b.isfinite().all():
                its.append((b.double() - c).abs().max().item() / unit)

    fuzz()
    assert seen[0] >= 0.9 * examples and ran[0] >= 0.5 * examples
    worst = max(ours, key=lambda x: x[0])
    assert worst[0] <= 2 * max(its) + 1, (worst, max(its))


# ---- what the rows cannot say -------------------------------------------------------------------


def qkv(*shape, S=None, grad=True, dtype=torch.float32):
    B, H, L, D = shape
    return [torch.randn(B, H, n, D).to(dtype).requires_grad_(grad) for n in (L, S or L, S or L)]


@pytest.mark.parametrize("S", [12, 40])
def test_rows_whose_mask_is_the_least_float_share_evenly(S, device):
    """Compared with the stock formula: PyTorch's fused CPU kernel forgets the sum of such rows in
    the backward."""
    q, k, v = (t.to(device).detach().requires_grad_() for t in qkv(1, 2, 9, 8, S=S))
    mask = torch.randn(9, S, device=device)
    mask[3] = torch.finfo(torch.float32).min
    results = []
    for call, context in (
        (attention, fastnn.backend("triton")),
        (stock.scaled_dot_product_attention, sdpa_kernel(SDPBackend.MATH)),
    ):
        with context:
            out = call(q, k, v, mask)
            results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    torch.testing.assert_close(*results)
    torch.testing.assert_close(results[0][0][..., 3, :], v.mean(-2))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("rule", ["own", "native"])
@interpreted
def test_launchers_race_with_nobody_and_repeat(rule):
    """No program touches an address that another program writes. A second run has equal bits."""
    torch.manual_seed(0)
    B, H, L, S = 1, 2, 33, 35
    q, k, v, dout = (
        torch.randn(B, n, L if i in (0, 3) else S, 16) for i, n in enumerate((H, 1, 1, H))
    )
    mask, dweights = torch.randn(1, 1, L, S), torch.randn(B, L, S)
    A = kernels.attention
    from fastnn import _rng

    draw = (
        _rng.draw_own(A.increment(S), -1)
        if rule == "own"
        else _rng.draw_native(torch.empty(B * H, L, S))
    )
    noise = A.WeightDropout(draw, kernels._philox.bound(0.8), 1.25, draw.new_state(q))
    runs = []
    for _ in range(2):
        with traffic(races=True) as log:
            out, stats = A.fwd(q, k, v, mask, scale=0.3, noise=noise)
            dmask = torch.empty_like(mask)
            grads = A.bwd(
                dout, q, k, v, mask, out, stats, scale=0.3, noise=noise, dweights=dweights,
                weights_scale=1 / H, dmask=dmask,
            )  # fmt: skip
        assert all(launch.shared_writes == 0 for launch in log)
        runs.append([out, stats, dmask, *grads])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_nothing_of_size_L_x_S_is_allocated(device):
    """Forward and backward, with a mask that broadcasts and with dropout, allocate only tensors as
    large as the inputs, and two numbers per row."""
    B, H, L, D = 1, 2, 130, 8
    q, k, v = (t.to(device).detach().requires_grad_() for t in qkv(B, H, L, D))
    mask = torch.rand(B, 1, 1, L, device=device) < 0.9
    upstream = torch.randn(B, H, L, D, device=device)
    activities = [ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]
    largest = {}
    for name, call in (("ours", attention), ("stock", stock.scaled_dot_product_attention)):
        how = fastnn.backend("triton") if name == "ours" else sdpa_kernel(SDPBackend.MATH)
        with how, profile(activities=activities, profile_memory=True, acc_events=True) as run:
            call(q, k, v, mask, 0.1).backward(upstream)
        events = run.profiler.kineto_results.events()
        largest[name] = max(e.nbytes() for e in events if e.name() == "[memory]")
    assert largest["ours"] <= B * H * L * D * 4 + 1024
    assert largest["stock"] >= B * H * L * L * 4


# ---- dropout ------------------------------------------------------------------------------------


@on_device
def test_dropout_keeps_as_many_as_it_says_everywhere():
    """Within five standard deviations for each head, row and column; no two rows are equal."""
    with fastnn.backend("triton"), recording() as draws:
        torch.manual_seed(3)
        q, k, v = qkv(2, 3, 64, 8, S=67, grad=False)
        attention(q, k, v, dropout_p=0.3)
    noise = kernels.attention.WeightDropout(draws[0], kernels._philox.bound(0.7), 1.0)
    keep = kernels.attention.keep(torch.empty(2, 3, 64, 67), noise).double()
    for dims in ((0, 1, 2, 3), (2, 3), (3,), (0, 1, 2)):
        mean = keep.mean(dims)
        n = keep.numel() / mean.numel()
        assert ((mean - 0.7).abs() <= 5 * math.sqrt(0.21 / n)).all(), dims
    rows = keep.view(-1, 67)
    alike = (rows - 0.7) @ (rows - 0.7).T / 67 / 0.21
    assert (alike - torch.eye(len(rows), dtype=alike.dtype)).abs().max() < 0.9


def test_dropout_is_of_the_seed_and_moves_on(device):
    q, k, v = (t.to(device) for t in qkv(1, 2, 20, 8, grad=False))
    with fastnn.backend("triton"):
        torch.manual_seed(5)
        first, second = (attention(q, k, v, dropout_p=0.5) for _ in range(2))
        torch.manual_seed(5)
        again = attention(q, k, v, dropout_p=0.5)
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_dropout_averages_out(device):
    """The mean over many draws is the result without dropout, as in stock."""
    q, k, v = (t.to(device) for t in qkv(1, 1, 3, 8, S=5, grad=False))
    want = stock.scaled_dot_product_attention(q, k, v)
    many = [t.expand(200, 1, *t.shape[-2:]) for t in (q, k, v)]
    with fastnn.backend("triton"):
        got = attention(*many, dropout_p=0.4)
    spread = got.std(0) / math.sqrt(len(got))
    assert ((got.mean(0) - want[0]).abs() <= 5 * spread).all()


@on_device
def test_native_rule_is_that_of_native_dropout():
    """MultiheadAttention with need_weights drops the elements of (B * H, L, S) by this rule."""
    from fastnn import _rng

    for shape in ((2, 2, 5, 7), (2, 2, 4, 8), (1, 3, 33, 40)):
        torch.manual_seed(1)
        weights = torch.empty(shape)
        draw = _rng.draw_native(weights)
        bound = kernels._philox.bound(0.6)
        keep = kernels.attention.keep(weights, kernels.attention.WeightDropout(draw, bound, 1.0))
        want = kernels.dropout.elements(torch.ones(shape), draw, bound, 1.0)
        assert torch.equal(keep, want.bool())


# ---- autograd -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"enable_gqa": True}, {"scale": 0.2}])
@pytest.mark.parametrize("masked", [False, True])
def test_double_backward_is_stocks(options, masked, device):
    if masked and "is_causal" in options:
        pytest.skip("stock takes one of the two")
    torch.manual_seed(0)
    q = torch.randn(1, 4, 5, 8, device=device, requires_grad=True)
    H = 2 if "enable_gqa" in options else 4
    k, v = (torch.randn(1, H, 7, 8, device=device, requires_grad=True) for _ in range(2))
    mask = torch.randn(5, 7, device=device, requires_grad=True) if masked else None
    leaves = [t for t in (q, k, v, mask) if t is not None]
    results = []
    for call, how in (
        (attention, fastnn.backend("triton")),
        (stock.scaled_dot_product_attention, sdpa_kernel(SDPBackend.MATH)),
    ):
        with how:
            out = call(q, k, v, mask, **options)
            first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append([*first, *second])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@on_device
def test_double_backward_keeps_the_noise():
    """The second derivative uses the weights that the forward dropped."""
    q, k, v = (t[0, 0].detach().requires_grad_() for t in qkv(1, 1, 5, 8))
    with fastnn.backend("triton"):
        out = attention(q, k, v, dropout_p=0.5)
        plain = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
        graphed = torch.autograd.grad(out.sum(), (q, k, v), create_graph=True)
    torch.testing.assert_close(plain, graphed)
    assert all(g.requires_grad for g in graphed)


@on_device
def test_the_same_tensor_three_times():
    x = torch.randn(1, 2, 7, 8, requires_grad=True)
    y = x.detach().requires_grad_()
    for call, t, how in (
        (attention, x, fastnn.backend("triton")),
        (stock.scaled_dot_product_attention, y, nullcontext()),
    ):
        with how:
            call(t, t, t).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@interpreted
def test_only_the_gradients_that_are_wanted():
    for wanted in ((0,), (1,), (2,), (0, 2)):
        tensors = qkv(1, 2, 5, 8, S=7, grad=False)
        for i in wanted:
            tensors[i].requires_grad_()
        with fastnn.backend("triton"), traffic(distinct=False) as log:
            attention(*tensors).sum().backward()
        assert [t.grad is not None for t in tensors] == [i in wanted for i in range(3)]
        names = " ".join(launch.kernel for launch in log)
        assert ("bwd_dq" in names) == (0 in wanted) and ("dkdv" in names) == (wanted != (0,))


@on_device
def test_result_may_be_edited_in_place():
    q, k, v = qkv(1, 2, 5, 8)
    with fastnn.backend("triton"):
        out = attention(q, k, v)
        out.mul_(2)
        out.sum().backward()
    want = torch.autograd.grad(2 * stock.scaled_dot_product_attention(q, k, v).sum(), q)[0]
    torch.testing.assert_close(q.grad, want)


# ---- who runs it --------------------------------------------------------------------------------


def chosen(*args, **options):
    with decisions() as heard:
        attention(*args, **options)
    return heard[0].why


@interpreted
def test_auto_leaves_to_stock_what_it_fuses():
    """`auto` takes the kernels where stock would write the weights to memory, from some size on."""
    large, small = (qkv(1, 2, n, 8, grad=False) for n in (2048, 16))
    assert "as fast at every size" in chosen(*large)
    assert "size gate" in chosen(*(t[0] for t in small))
    five = [t[:, :1, :1200].expand(2, 1, 1200, 8)[None, :, :, :8] for t in large]
    assert chosen(*five, dropout_p=0.0) and "size gate" in chosen(*five)


@interpreted
def test_auto_runs_where_stock_would_use_its_formula(simulate):
    sdpa = "scaled_dot_product_attention"
    simulate(least={(sdpa, ""): 0, (sdpa, BESIDE_FUSED): None}, source="test")
    q, k, v = qkv(1, 2, 5, 8, grad=False)
    assert chosen(q[0], k[0], v[0]) is None
    assert chosen(q, k, v, dropout_p=0.5) is None
    assert "as fast at every size" in chosen(q, k, v)
    with sdpa_kernel(SDPBackend.MATH):
        assert "sdpa_kernel" in chosen(q, k, v)
        with fastnn.backend("triton"):
            assert chosen(q, k, v) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dropout_p": 1.5}, "dropout probability"),
        ({"attn_mask": torch.ones(4, 4)}, "must match"),
        ({"attn_mask": torch.ones(5, 5).half()}, "attn_mask dtype"),
        ({"attn_mask": torch.ones(5, 5), "is_causal": True, "dropout_p": 0.1}, "is_causal"),
        ({"enable_gqa": True}, "Number of heads"),
        ({"out": torch.ones(1)}, "unexpected keyword"),
    ],
)
@on_device
def test_wrong_arguments_meet_stocks_error(options, words):
    q, k, v = qkv(1, 3, 5, 8, grad=False)
    options = {k: v.to(q.device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    if "enable_gqa" in options:
        k, v = k[:, :2], v[:, :2]
    with (
        fastnn.backend("triton"),
        pytest.raises((RuntimeError, TypeError), match=words) as raised,
    ):
        attention(q, k, v, **options)
    assert not isinstance(raised.value, BackendError)
