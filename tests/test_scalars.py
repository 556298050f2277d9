"""docs/scalars.md: in which dtype a Python number meets a 16-bit tensor, in both passes."""

import inspect
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fastnn.functional as F
from fastnn._mode import backend
from fastnn._op import rounded
from fastnn.ops import REGISTRY

PAGE = Path(__file__).parents[1] / "docs" / "scalars.md"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def _table() -> dict[tuple[str, str], str]:
    """(op, number) -> the dtype in which it is computed, according to the page."""
    found = {}
    for line in PAGE.read_text().splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")]
        if len(cells) >= 4 and cells[0].startswith("`"):
            for op in re.findall(r"`(\w+)`", cells[0]):
                for number in re.findall(r"`(\w+)`", cells[1]):
                    found[op, number] = cells[2]
    return found


TABLE = _table()
WHOLE = {
    "dim", "ignore_index", "_stacklevel", "size", "num_groups", "norm_type", "stride", "padding",
    "output_padding", "dilation", "groups", "blank", "parts",
}  # fmt: skip


def test_the_page_has_every_number_that_an_op_takes():
    numbers = set()
    for name, op in REGISTRY.items():
        for p in inspect.signature(op.fused).parameters.values():
            default = p.default
            if type(default) in (int, float) and p.name not in WHOLE:
                numbers.add((name, p.name))
    assert not numbers - TABLE.keys(), "docs/scalars.md lacks them"
    for name, number in TABLE:
        assert number in inspect.signature(REGISTRY[name].fused).parameters, (name, number)
    assert set(TABLE.values()) <= {"its dtype", "float32", "see below"}


def _x(dtype, scale=3.0):
    return (torch.linspace(-scale, scale, 480).to(dtype)).requires_grad_()


def _rows(dtype, n=1, scale=1.0):
    torch.manual_seed(n)
    return [(torch.randn(24, 20) * scale).to(dtype).requires_grad_() for _ in range(n)]


def _signs(n):
    return torch.tensor([1.0, -1.0]).repeat(n // 2)


def _plane(dtype, scale):
    torch.manual_seed(0)
    return (torch.randn(4, 6, 20) * scale).to(dtype).requires_grad_()


# Each call runs in a dtype, with a number that changes results: their branch, value or slope. The
# second entry is the size of the number. The test takes a number beside it that 16 bits cannot
# hold.
CALLS = {
    ("threshold", "threshold"): (lambda t, s: F.threshold(_edges(t, s), s, 0.0), 0.3),
    ("threshold", "value"): (lambda t, s: F.threshold(_x(t), 0.1, s), 0.3),
    ("hardshrink", "lambd"): (lambda t, s: F.hardshrink(_edges(t, s), s), 0.3),
    ("softshrink", "lambd"): (lambda t, s: F.softshrink(_edges(t, s), s), 0.3),
    ("hardtanh", "min_val"): (lambda t, s: F.hardtanh(_edges(t, s), -s, 2.0), 0.3),
    ("hardtanh", "max_val"): (lambda t, s: F.hardtanh(_edges(t, s), -2.0, s), 0.3),
    ("leaky_relu", "negative_slope"): (lambda t, s: F.leaky_relu(_x(t), s), 0.3),
    ("rrelu", "lower"): (lambda t, s: F.rrelu(_x(t), s, 2 * s), 0.3),
    ("rrelu", "upper"): (lambda t, s: F.rrelu(_x(t), 0.0, s), 0.3),
    ("elu", "alpha"): (lambda t, s: F.elu(_x(t), s), 0.7),
    ("celu", "alpha"): (lambda t, s: F.celu(_x(t), s), 0.7),
    ("softplus", "beta"): (lambda t, s: F.softplus(_x(t), s), 0.7),
    ("softplus", "threshold"): (lambda t, s: F.softplus(_edges(t, s), 1.0, s), 0.3),
    ("smooth_l1_loss", "beta"): (
        lambda t, s: F.smooth_l1_loss(*_rows(t, 2), reduction="none", beta=s), 0.7),
    ("huber_loss", "delta"): (
        lambda t, s: F.huber_loss(*_rows(t, 2), reduction="none", delta=s), 0.7),
    ("hinge_embedding_loss", "margin"): (
        lambda t, s: F.hinge_embedding_loss(_x(t), -torch.ones(480, dtype=t), s, reduction="none"),
        0.7),
    ("margin_ranking_loss", "margin"): (
        lambda t, s: F.margin_ranking_loss(*_rows(t, 2), torch.ones(24, 20, dtype=t), s,
                                           reduction="none"), 0.7),
    ("multi_margin_loss", "margin"): (
        lambda t, s: F.multi_margin_loss(*_rows(t), torch.arange(24) % 20, margin=s,
                                         reduction="none"), 0.7),
    ("cosine_embedding_loss", "margin"): (
        lambda t, s: F.cosine_embedding_loss(*_rows(t, 2), -torch.ones(24), s - 0.7,
                                             reduction="none"), 0.7),
    ("triplet_margin_with_distance_loss", "margin"): (
        lambda t, s: F.triplet_margin_with_distance_loss(
            *_rows(t, 3), margin=s, reduction="none"), 0.7),
    ("triplet_margin_loss", "margin"): (
        lambda t, s: F.triplet_margin_loss(*_rows(t, 3), s, reduction="none"), 0.7),
    ("triplet_margin_loss", "eps"): (
        lambda t, s: F.triplet_margin_loss(*_rows(t, 3), 9.0, eps=s, reduction="none"), 0.7),
    ("triplet_margin_loss", "p"): (
        lambda t, s: F.triplet_margin_loss(*_rows(t, 3), 9.0, s, reduction="none"), 1.7),
    ("pairwise_distance", "eps"): (lambda t, s: F.pairwise_distance(*_rows(t, 2), eps=s), 0.7),
    ("pairwise_distance", "p"): (lambda t, s: F.pairwise_distance(*_rows(t, 2), s), 1.7),
    ("cosine_similarity", "eps"): (
        lambda t, s: F.cosine_similarity(*_rows(t, 2, 0.01), eps=s), 0.7),
    ("normalize", "eps"): (lambda t, s: F.normalize(_rows(t, 1)[0] * 0.01, eps=s), 0.7),
    ("gumbel_softmax", "tau"): (lambda t, s: F.gumbel_softmax(_rows(t)[0], s), 0.7),
    ("poisson_nll_loss", "eps"): (
        lambda t, s: F.poisson_nll_loss(_x(t).abs(), _x(t).abs().detach(), False, eps=s,
                                        reduction="none"), 0.7),
    ("gaussian_nll_loss", "eps"): (
        lambda t, s: F.gaussian_nll_loss(*_rows(t, 2), torch.zeros(24, 20, dtype=t), eps=s,
                                         reduction="none"), 0.7),
    ("gaussian_nll_loss", "var"): (
        lambda t, s: F.gaussian_nll_loss(*_rows(t, 2), s, reduction="none"), 0.7),
    ("local_response_norm", "alpha"): (
        lambda t, s: F.local_response_norm(_plane(t, 3.0), 3, s), 0.7),
    ("local_response_norm", "beta"): (
        lambda t, s: F.local_response_norm(_plane(t, 30.0), 3, 0.9, s), 0.7),
    ("local_response_norm", "k"): (
        lambda t, s: F.local_response_norm(_plane(t, 1.0), 3, 0.5, 0.75, s), 0.7),
    ("layer_norm", "eps"): (lambda t, s: F.layer_norm(_plane(t, 0.3), (20,), eps=s), 0.7),
    ("rms_norm", "eps"): (lambda t, s: F.rms_norm(_plane(t, 0.3), (20,), eps=s), 0.7),
    ("group_norm", "eps"): (lambda t, s: F.group_norm(_plane(t, 0.3), 2, eps=s), 0.7),
    ("instance_norm", "eps"): (lambda t, s: F.instance_norm(_plane(t, 0.3), eps=s), 0.7),
    ("batch_norm", "eps"): (
        lambda t, s: F.batch_norm(_plane(t, 0.3), None, None, training=True, eps=s), 0.7),
    ("cross_entropy", "label_smoothing"): (
        lambda t, s: F.cross_entropy(*_rows(t), torch.arange(24) % 20, reduction="none",
                                     label_smoothing=s), 0.7),
}  # fmt: skip


def _edges(dtype, s):
    """The numbers of the dtype next to s, and some more."""
    near = torch.tensor([s], dtype=dtype)
    step = torch.finfo(dtype).eps * near
    beside = torch.cat([near + k * step for k in range(-3, 4)])
    return torch.cat([beside, -beside, torch.linspace(0, 2, 41).to(dtype)]).requires_grad_()


def _results(call, dtype, s):
    """The output of the call, and the gradients of its tensors."""
    with backend("triton"):
        y = call(dtype, s)
        leaves, graph = [], [y.grad_fn]
        y.backward(torch.linspace(0.5, 1.5, y.numel()).view_as(y).to(y.dtype))
    while graph:
        node = graph.pop()
        if hasattr(node, "variable"):
            leaves.append(node.variable.grad)
        graph += [n for n, _ in node.next_functions if n is not None]
    assert leaves
    return [y.detach(), *leaves]


def _same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize(("name", "number"), CALLS, ids=lambda v: v)
def test_a_number_is_computed_with_in_the_dtype_that_the_page_says(name, number, dtype, on_device):
    call, size = CALLS[name, number]
    # 0.4 of a unit in the last place beside a number of the dtype, on both sides.
    base = rounded(size, dtype)
    unit = 2.0 ** math.floor(math.log2(size)) * torch.finfo(dtype).eps
    beside = [base + 0.4 * unit, base - 0.4 * unit]
    assert all(rounded(s, dtype) == base for s in beside)
    there = _results(call, dtype, base)
    same = [_same(_results(call, dtype, s), there) for s in beside]
    if TABLE[name, number] == "its dtype":
        assert all(same)
        assert not _same(_results(call, dtype, base + unit), there)  # or the test is blind
        assert not _same(_results(call, dtype, base - unit), there)
    else:
        assert TABLE[name, number] == "float32"
        assert not all(same)


def test_numbers_of_the_page_are_called_or_said_why_not():
    apart = {op for op, _ in TABLE if TABLE[op, _] == "see below"}
    fused = {"act_glu", "act_mul", "batch_norm_act", "batch_norm_add_relu", "group_norm_act",
             "dropout_add_layer_norm", "dropout_add_rms_norm", "linear_act",
             "linear_cross_entropy", "conv_act", "conv_batch_norm_act"}  # fmt: skip
    for op, number in TABLE:
        assert (op, number) in CALLS or op in apart | fused or number == "momentum", (op, number)


@pytest.mark.parametrize("name", ["smooth_l1_loss", "multi_margin_loss", "group_norm"])
def test_under_autocast_numbers_meet_float32(name, on_device):
    """Under autocast stock converts the input to float32 first."""
    call = {
        "smooth_l1_loss": lambda s: F.smooth_l1_loss.op.fused(
            *_rows(torch.bfloat16, 2), reduction="none", beta=s, out_dtype=torch.float32),
        "multi_margin_loss": lambda s: F.multi_margin_loss.op.fused(
            *_rows(torch.bfloat16), torch.arange(24) % 20, margin=s, out_dtype=torch.float32),
        "group_norm": lambda s: F.group_norm.op.fused(
            _plane(torch.bfloat16, 0.3), 2, eps=s, out_dtype=torch.float32),
    }[name]  # fmt: skip
    with backend("triton"):
        assert not torch.equal(call(0.7), call(rounded(0.7, torch.bfloat16)))


def test_a_number_that_the_dtype_does_not_hold():
    assert rounded(1e5, torch.float16) is None
    assert rounded(math.inf, torch.float16) == math.inf
    assert rounded(1e5, torch.bfloat16) == 99840.0
    assert rounded("a", torch.float16) == "a"


@given(st.floats(allow_nan=False), st.sampled_from([*DTYPES.values(), torch.float32]))
@example(-0.0, torch.float16)
@example(65519.99, torch.float16)
@example(65520.0, torch.float16)
@example(3.5e38, torch.bfloat16)
@example(2**-25, torch.float16)
@settings(deadline=None, max_examples=300)
def test_numbers_are_rounded_as_pytorch_rounds_them(number, dtype):
    try:
        want = torch.tensor(number, dtype=dtype).item()
    except RuntimeError:  # the number does not fit
        want = math.inf
    got = rounded(number, dtype)
    if math.isinf(want) and not math.isinf(number):
        assert got is None
    else:
        assert (got, math.copysign(1, got)) == (want, math.copysign(1, want))
