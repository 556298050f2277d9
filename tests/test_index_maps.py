"""Pads, shuffles, folds and interpolation: what a parity row cannot show."""

import math

import pytest
import torch
import torch.nn.functional as stock

import fastnn
import fastnn.functional as F
from fastnn import _gate, _mode, backend, kernels
from fastnn.testing import meter
from tests.errors import assert_same_error
from tests.marks import interpreted, on_device

# (call of F, shape of x)
CALLS = {
    "constant": (lambda F, x: F.pad(x, (1, 2, -1, 0), value=3.0), (2, 3, 4)),
    "reflect": (lambda F, x: F.pad(x, (1, 2), "reflect"), (2, 3, 4)),
    "replicate": (lambda F, x: F.pad(x, (1, 2), "replicate"), (2, 3, 4)),
    "circular": (lambda F, x: F.pad(x, (1, 2), "circular"), (2, 3, 4)),
    "pixel_shuffle": (lambda F, x: F.pixel_shuffle(x, 2), (1, 4, 2, 3)),
    "pixel_unshuffle": (lambda F, x: F.pixel_unshuffle(x, 2), (1, 2, 4, 2)),
    "channel_shuffle": (lambda F, x: F.channel_shuffle(x, 2), (1, 4, 3)),
    "unfold": (lambda F, x: F.unfold(x, 2, padding=1), (1, 2, 3, 3)),
    "fold": (lambda F, x: F.fold(x, 3, 2), (1, 8, 4)),
    "nearest": (lambda F, x: F.interpolate(x, 5), (1, 2, 3)),
    "bilinear": (lambda F, x: F.interpolate(x, (5, 2), mode="bilinear"), (1, 2, 3, 3)),
    "bicubic": (lambda F, x: F.interpolate(x, (5, 2), mode="bicubic"), (1, 2, 3, 3)),
    "antialias": (
        lambda F, x: F.interpolate(x, (5, 2), mode="bicubic", antialias=True), (1, 2, 3, 3),
    ),
}  # fmt: skip
each_call = pytest.mark.parametrize("name", CALLS)


def inputs(name, device):
    torch.manual_seed(0)
    return torch.randn(CALLS[name][1]).to(device).requires_grad_()


@each_call
def test_deterministic_algorithms_forbid_nothing(name, device):
    call, x = CALLS[name][0], inputs(name, device)
    torch.use_deterministic_algorithms(True)
    try:
        with backend("triton"):
            y = call(F, x)
            y.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(y, call(stock, x))


@each_call
def test_second_order(name, device):
    """The gradient of the gradient runs on kernels and equals that of stock, also by x itself."""
    call, x = CALLS[name][0], inputs(name, device)

    def twice(F):
        y = call(F, x)
        weights = torch.linspace(-1, 1, y.numel(), device=device).view(y.shape).requires_grad_()
        (dx,) = torch.autograd.grad((y * weights).sum(), x, create_graph=True)
        return dx, *torch.autograd.grad((dx * dx).sum(), (weights, x), allow_unused=True)

    with backend("triton"):
        ours = twice(F)
    for a, b in zip(ours, twice(stock), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@each_call
def test_in_place_changes_before_backward(name, device):
    """They raise where they do in stock: an op saves what stock saves."""

    def outcome(F):
        x = inputs(name, device) * 1
        y = CALLS[name][0](F, x)
        with torch.no_grad():
            x.add_(1)
        try:
            y.sum().backward()
        except RuntimeError as e:
            assert "modified by an inplace operation" in str(e)
            return "raises"
        return "passes"

    with backend("triton"):
        ours = outcome(F)
    assert ours == outcome(stock)


@pytest.mark.parametrize("value", [-0.0, math.nan, 0.1, -math.inf, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_constant_has_the_bits_that_stock_writes(value, dtype, device):
    x = torch.zeros(2, dtype=dtype, device=device)
    with backend("triton"):
        ours = F.pad(x, (1, 1), value=value)
    theirs = stock.pad(x, (1, 1), value=value)
    assert torch.equal(ours.nan_to_num(nan=9.0), theirs.nan_to_num(nan=9.0))
    assert torch.equal(ours.signbit(), theirs.signbit())


Z = torch.zeros


@pytest.mark.parametrize(
    "call",
    [
        lambda F: F.pad(Z(1, 1, 4), (4, 4), mode="reflect"),
        lambda F: F.pad(Z(1, 1, 4, 4), (1, 1, 4, 0), mode="reflect"),
        lambda F: F.pad(Z(1, 1, 4), (-3, -1), mode="replicate"),
        lambda F: F.pad(Z(1, 1, 4), (5, 0), mode="circular"),
        lambda F: F.pad(Z(1, 1, 4), (1, 1), mode="reflect", value=1.0),
        lambda F: F.pad(Z(1, 1, 4), (1, 1), mode="bogus"),
        lambda F: F.pad(Z(1, 1, 4), (1, 1, 1)),
        lambda F: F.pad(Z(4), (1, 1, 1, 1)),
        lambda F: F.pad(Z(4), (-5, 6)),
        lambda F: F.pad(Z(4), (-2, -3)),
        lambda F: F.pad(Z(2, 3, 4, 4), (1, 1), mode="replicate"),
        lambda F: F.pad(Z(1).half(), (1, 0), value=1e6),
        lambda F: F.pixel_shuffle(Z(1, 3, 2, 2), 2),
        lambda F: F.pixel_shuffle(Z(4, 2), 2),
        lambda F: F.pixel_unshuffle(Z(1, 3, 3, 2), 2),
        lambda F: F.channel_shuffle(Z(4, 3, 3), 2),
        lambda F: F.channel_shuffle(Z(4, 2), 2),
        lambda F: F.unfold(Z(4, 4), 2),
        lambda F: F.unfold(Z(1, 1, 2, 2), 3),
        lambda F: F.unfold(Z(1, 1, 2, 2), 1, stride=0),
        lambda F: F.fold(Z(1, 4, 4), 3, 2, stride=0),
        lambda F: F.fold(Z(1, 4, 5), 3, 2),
        lambda F: F.fold(Z(1, 3, 4), 3, 2),
        lambda F: F.interpolate(Z(1, 1, 4), size=2, mode="bogus"),
        lambda F: F.interpolate(Z(1, 1, 4), size=2, mode="bilinear"),
        lambda F: F.interpolate(Z(1, 1, 4), size=2, align_corners=True),
        lambda F: F.interpolate(Z(1, 1, 4)),
        lambda F: F.interpolate(Z(1, 1, 4), size=2, scale_factor=2.0),
        lambda F: F.interpolate(Z(1, 1, 4), size=2, recompute_scale_factor=True),
        lambda F: F.interpolate(Z(1, 1, 4), size=0),
        lambda F: F.interpolate(Z(1, 0, 4, 4), size=2),
        lambda F: F.interpolate(Z(1, 1, 4, 4), size=(2, 2, 2)),
    ],
)
@on_device
def test_wrong_calls_raise_what_stock_raises(call):
    assert_same_error(lambda: call(F), lambda: call(stock))


@pytest.mark.parametrize(
    ("mode", "antialias"),
    [
        ("nearest", False), ("bilinear", False), ("bicubic", False), ("bilinear", True),
        ("bicubic", True),
    ],
)  # fmt: skip
def test_under_the_rule_of_cuda_autocast(mode, antialias, device):
    """Input of 16 bits: read as it is, the result in float32, the gradient in the input's dtype."""
    x = torch.randn(1, 2, 3, 4).to(device, torch.bfloat16).requires_grad_()
    options = {"scale_factor": 2, "mode": mode, "antialias": antialias}
    y = F.interpolate.op.fused(x, **options, out_dtype=torch.float32)
    cast = stock.interpolate(x.float(), **options)
    torch.testing.assert_close(y, cast)
    (ours,), (theirs,) = (torch.autograd.grad(t.sum(), x) for t in (y, cast))
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_antialias_of_16_bits_rounds_once(mode, dtype, device):
    """PyTorch has it on CUDA alone. Results are those of float64, rounded."""
    x = torch.randn(1, 2, 7, 9).to(device, dtype).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    with backend("triton"):
        y = F.interpolate(x, (3, 12), mode=mode, antialias=True)
    exact = stock.interpolate(x64, (3, 12), mode=mode, antialias=True)
    dy = torch.randn(y.shape).to(y)
    (dx,), (exact_dx,) = (
        torch.autograd.grad(a, b, dy.to(a)) for a, b in ((y, x), (exact, x64))
    )  # fmt: skip
    for ours, wanted in ((y, exact), (dx, exact_dx)):
        assert ours.dtype == dtype
        torch.testing.assert_close(
            ours.double(), wanted, rtol=torch.finfo(dtype).eps / 2, atol=1e-5
        )  # fmt: skip


def test_antialias_gathers_every_output_of_a_long_axis(device):
    """Of large sizes, where fp32 places are coarse, each output still has its part in dx."""
    for size, out in ((5000, 1777), (1777, 5000)):
        x = torch.zeros(1, 1, 1, size, device=device, requires_grad=True)
        with backend("triton"):
            y = F.interpolate(x, (1, out), mode="bilinear", antialias=True)
            (dx,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(dx.sum().item(), float(out), rtol=1e-6, atol=0.0)


def both_directions(x, dy, mode, last):
    out, size = dy.shape[2:], x.shape[2:]
    given = mode, False, [0.5] * len(size), x.dtype, last
    return kernels.upsampling.fwd(x, out, *given), kernels.upsampling.bwd(dy, size, *given)


@interpreted
@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_images_that_double_are_those_of_the_other_kernels(dims, mode, monkeypatch):
    """For every edge of a tile: of lines, of rows, of lanes, of channels, of strides."""
    ran = []
    for name in ("fwd", "bwd"):
        call = getattr(kernels.upsampling_cells, name)
        monkeypatch.setattr(
            kernels.upsampling_cells, name, lambda *a, call=call: ran.append(1) or call(*a)
        )
    sizes = [(False, 1, 9, 4), (True, 2, 5, 3), (False, 2, 1, 1)][: 2 if dims == 3 else 3]
    asked = [(last, tuple(size[-dims:])) for last, *size in sizes if dims > 1 or not last]
    for strided, (last, size) in enumerate(asked):
        pair = [torch.randn(2, 3, *(k * n for n in size)) for k in (1, 2)]
        if last:
            layout = torch.channels_last if dims == 2 else torch.channels_last_3d
            pair = [t.to(memory_format=layout) for t in pair]
        elif strided:
            pair = [t.repeat_interleave(2, -1)[..., ::2] for t in pair]
        y, dx = both_directions(*pair, mode, last)
        with monkeypatch.context() as other:
            other.setattr(kernels.upsampling_cells, "doubles", lambda *args: False)
            y_other, dx_other = both_directions(*pair, mode, last)
        assert y.stride() == y_other.stride() and dx.stride() == dx_other.stride()
        if mode == "nearest" or (dims < 3 and not last):  # the same order of sums
            assert torch.equal(y, y_other)
        torch.testing.assert_close(y, y_other, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(dx, dx_other, rtol=2e-6, atol=2e-6)
    assert len(ran) == 2 * len(asked) and len(asked) >= 2


@interpreted
def test_an_infinity_beside_an_edge_is_what_it_is_in_pytorch():
    """The first result has the weight 0 for the second place, so that an infinity makes it nan."""
    for place in (0, 1, 2):
        x = torch.zeros(1, 1, 3, 3)
        x[0, 0, place, place] = math.inf
        wanted = stock.interpolate(x, scale_factor=2, mode="bilinear")
        with backend("triton"):
            y = F.interpolate(x, scale_factor=2, mode="bilinear")
        assert torch.equal(y.isnan(), wanted.isnan()) and torch.equal(
            y == math.inf, wanted == math.inf
        )


# ---- Bytes ---------------------------------------------------------------------------------------


def both_passes(call, x, dy):
    torch.autograd.grad(call(x), x, dy)


@pytest.mark.parametrize(
    ("ours", "theirs", "shape", "most"),
    [
        (
            lambda x: F.pad(x, (2, 2, 2, 2), "reflect"),
            lambda x: stock.pad(x, (2, 2, 2, 2), "reflect"),
            (2, 4, 32, 64),
            0.75,
        ),
        (
            lambda x: F.interpolate.op.fused(
                x, scale_factor=2, mode="bilinear", out_dtype=torch.float32
            ),
            lambda x: stock.interpolate(x.float(), scale_factor=2, mode="bilinear"),
            (1, 4, 16, 32),
            0.7,
        ),
    ],
    ids=["reflect", "bilinear x2 under autocast"],
)
@interpreted
def test_bytes_against_stock(ours, theirs, shape, most):
    x = torch.randn(shape).bfloat16().requires_grad_()
    dy = torch.ones_like(theirs(x))
    with backend("triton"), meter.all_traffic(races=True) as counted:
        both_passes(ours, x, dy)
    with meter.AtenTraffic() as stocks:
        both_passes(theirs, x, dy)
    assert sum(launch.shared_writes for launch in counted.kernels) == 0
    assert counted.cost.bytes <= most * stocks.cost.bytes


@interpreted
def test_auto_takes_what_saves_bytes():
    lines = [{"op": op, "least": 1} for op in ("interpolate", "pad")]
    table = {"default": {"source": "the test", "crossovers": lines}}

    def path(call, grad=True):
        x = torch.zeros(1, 1, 4, 32, requires_grad=grad)
        with fastnn.backend("auto"), _mode.decisions() as heard:
            call(x)
        return heard[0].why

    with _gate.using(table):
        assert path(lambda x: F.interpolate(x, (8, 64), mode="bilinear")) is None
        assert "reads and writes once" in path(
            lambda x: F.interpolate(x, (8, 64), mode="bilinear"), False
        )
        assert "reads and writes once" in path(lambda x: F.interpolate(x, (8, 64)))
        assert "twice as large" in path(lambda x: F.interpolate(x, (32, 256), mode="bilinear"))
        assert "twice as large" in path(lambda x: F.interpolate(x, (8, 32), mode="bilinear"))
        assert "twice as large" in path(lambda x: F.interpolate(x, (8, 64), mode="bicubic"))
        assert "twice as large" in path(
            lambda x: F.interpolate(x, (8, 64), mode="bilinear", align_corners=True)
        )
        assert path(lambda x: F.pad(x, (1, 1, 1, 1), "reflect")) is None
        assert "reads and writes once" in path(lambda x: F.pad(x, (1, 1, 1, 1), "reflect"), False)
        assert path(lambda x: F.pad(x, (1, 1)), False) is None


# ---- Walks --------------------------------------------------------------------------------------


def test_a_tensor_that_spans_more_than_32_bits_is_copied(monkeypatch, device):
    monkeypatch.setattr(kernels.gather, "MOST", 40)
    x = torch.randn(2, 3, 30, device=device)[:, :, ::7]
    assert kernels.gather.near(x).is_contiguous() and not x.is_contiguous()
    assert kernels.gather.near(x[0, 0]) is not None


def test_what_passes_its_input_on_says_so():
    layers = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Identity(), torch.nn.Unflatten(0, (1, 1))
    )
    rows = fastnn.explain(layers)
    assert sum("passes its input on" in row.reason for row in rows) == 3


@interpreted
def test_antialias_does_not_read_places_of_weight_0():
    x = torch.zeros(1, 1, 70, 2)
    x[0, 0, 69, 1] = -math.inf
    with backend("triton"):
        y = F.interpolate(x, (3, 2), mode="bicubic", antialias=True)
    assert (y[..., 0] == 0).all() and not y[..., 1].isfinite().all()
