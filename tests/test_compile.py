"""`fastnn.compile(model)`: what becomes which op, and what must not."""

import collections
import copy
import math
import sys

import pytest
import torch
import torch.nn as stock
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import fastnn
from fastnn._compiler import _backend, _gated, _gradients, _rules, _site
from fastnn._compiler._backend import listen
from fastnn._compiler._calls import is_conversion
from fastnn._compiler._site import Site
from fastnn.testing import simulated
from tests.marks import interpreted

WIDTH = 16


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def fused_in(found):
    """How often each rule held, without calls that stayed as they are."""
    return dict(collections.Counter(f.rule for f in found if " " in f.rule))


def found_in(call, *inputs, **options):
    """(how often each rule held, the result) of the compiled `call`."""
    with listen() as found:
        out = fastnn.compile(call, **options)(*inputs)
    return fused_in(found), out


# ---- Blocks, as people write them ---------------------------------------------------------------


class Conv1D(stock.Module):
    """The product of GPT-2: weight (in, out)."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = stock.Parameter(torch.randn(n_in, n_out) * 0.2)
        self.bias = stock.Parameter(torch.randn(n_out))

    def forward(self, x):
        shape = (*x.shape[:-1], self.bias.numel())
        return torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight).view(shape)


class NewGELU(stock.Module):
    def forward(self, x):
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
        return 0.5 * x * (1.0 + torch.tanh(inner))


class GPT(stock.Module):
    """A block of GPT-2 with its loss: pre-norm, dropouts, GELU written out."""

    expected = {  # noqa: RUF012
        "gelu written out": 1, "dropout, add, norm": 2, "linear, activation": 1,
        "product of rows": 3, "bias in a backward": 2,
    }  # fmt: skip

    def __init__(self, p=0.0):
        super().__init__()
        self.norms = stock.ModuleList(stock.LayerNorm(WIDTH) for _ in range(3))
        self.mix, self.up, self.down = (
            Conv1D(WIDTH, WIDTH), Conv1D(WIDTH, 32), Conv1D(32, WIDTH),
        )  # fmt: skip
        self.act = NewGELU()
        self.drops = stock.ModuleList(stock.Dropout(p) for _ in range(2))

    def forward(self, x):
        x = x + self.drops[0](self.mix(self.norms[0](x)))
        x = x + self.drops[1](self.down(self.act(self.up(self.norms[1](x)))))
        return self.norms[2](x)


class RMS(stock.Module):
    """The RMS norm of Llama and T5."""

    def __init__(self):
        super().__init__()
        self.weight = stock.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x):
        given = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + 1e-6)
        return self.weight * x.to(given)


class Llama(stock.Module):
    expected = {  # noqa: RUF012
        "rms_norm written out": 3, "dropout, add, norm": 2, "activation, product": 1,
        "products of one tensor": 1,
    }  # fmt: skip

    def __init__(self):
        super().__init__()
        self.norms = stock.ModuleList(RMS() for _ in range(3))
        self.mix, self.gate, self.up, self.down = (
            stock.Linear(i, o, bias=False)
            for i, o in ((WIDTH, WIDTH), (WIDTH, 24), (WIDTH, 24), (24, WIDTH))
        )

    def forward(self, x):
        x = x + self.mix(self.norms[0](x))
        y = self.norms[1](x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.norms[2](x)


class Residual(stock.Module):
    """A block of ResNet as torchvision writes it: in place, with `+=`."""

    expected = {  # noqa: RUF012
        "batch_norm, add, relu": 1, "batch_norm, activation": 1, "counters of batches": 3,
    }  # fmt: skip

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (stock.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.down = stock.Conv2d(4, 4, 1, bias=False)
        self.bn1, self.bn2, self.bn3 = (stock.BatchNorm2d(4) for _ in range(3))
        self.relu = stock.ReLU(inplace=True)

    def forward(self, x):
        identity = self.bn3(self.down(x))
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class UNet(stock.Module):
    expected = {"group_norm, activation": 1, "silu written out": 1}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.norm, self.conv = stock.GroupNorm(2, 4), stock.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        y = self.norm(x)
        return x + self.conv(y * torch.sigmoid(y))


class Mobile(stock.Module):
    expected = {"hardswish written out": 1, "batch_norm, activation": 1}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.conv, self.norm = stock.Conv2d(4, 4, 3, padding=1, groups=4), stock.BatchNorm2d(4)

    def forward(self, x):
        y = self.norm(self.conv(x))
        return y * F.relu6(y + 3) / 6


class Gated(stock.Module):
    """Squeeze and excitation of EfficientNet, and the layer scale of ConvNeXt."""

    expected = {  # noqa: RUF012
        "batch_norm, activation": 1, "mean beside another user": 1, "gate of channels": 1,
        "scale, add": 1, "means of planes": 1,
    }  # fmt: skip

    def __init__(self):
        super().__init__()
        self.conv, self.norm = stock.Conv2d(4, 4, 3, padding=1), stock.BatchNorm2d(4)
        self.down, self.up = stock.Conv2d(4, 2, 1), stock.Conv2d(2, 4, 1)
        self.gamma = stock.Parameter(torch.rand(4) + 0.5)

    def forward(self, x):
        y = F.silu(self.norm(self.conv(x)))
        gate = self.up(F.silu(self.down(y.mean((2, 3), keepdim=True))))
        return x + (y * gate.sigmoid()).mul(self.gamma.reshape(1, -1, 1, 1))


class Heads(stock.Module):
    """Query, key and value of one tensor, one without a bias; another call reads it, too."""

    expected = {"products of one tensor": 1}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.norm = stock.LayerNorm(WIDTH)
        self.q, self.k, self.v = (stock.Linear(WIDTH, WIDTH, bias=b) for b in (True, False, True))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = self.q(y) * 0.5, self.k(y).view(y.shape), self.v(y)
        return q.cos() * k - v + y.exp()


class Scaled(stock.Module):
    """Attention as in Whisper: the query is scaled where it is made."""

    expected = {"scale before attention": 1, "products of one tensor": 1}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (stock.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        q, k, v = (
            t.view(*x.shape[:2], 2, -1).transpose(1, 2)
            for t in (self.q(x) * 0.3, self.k(x), self.v(x))
        )
        y = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return y.transpose(1, 2).reshape(x.shape)


ROWS, IMAGE = (2, 3, WIDTH), (2, 4, 5, 5)
BLOCKS = [
    (GPT, ROWS), (Llama, ROWS), (Residual, IMAGE), (UNet, IMAGE), (Mobile, IMAGE), (Gated, IMAGE),
    (Heads, ROWS), (Scaled, ROWS),
]  # fmt: skip
blocks = pytest.mark.parametrize(
    ("block", "shape"), BLOCKS, ids=lambda v: getattr(v, "__name__", "")
)


def gradients(model, call, x):
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = call(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y))
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def errors(model, call, x, exact):
    return [
        ((one.double() - true).abs().max() / true.abs().max().clamp(min=1e-12)).item()
        for one, true in zip(gradients(model, call, x), exact, strict=True)
    ]


@blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_are_found_and_as_exact_as_stock(block, shape, dtype, device):
    """On kernels: result and gradients are no farther from float64 than stock's, by twice.

    The errors of three draws are added, because those of one draw differ by chance.
    """
    ours, theirs = [], []
    for draw in range(3):
        torch._dynamo.reset()
        model = block().to(device, dtype)
        x = torch.randn(shape, device=device, dtype=dtype)
        exact_model, reference = copy.deepcopy(model).double(), copy.deepcopy(model)
        exact = gradients(exact_model, exact_model, x.double())
        theirs.append(errors(reference, reference, x, exact))
        with listen() as found, fastnn.backend("triton"), fastnn.decisions() as heard:
            ours.append(errors(model, fastnn.compile(model), x, exact))
        assert fused_in(found) == block.expected, draw
        assert heard and all(d.why is None for d in heard), [d for d in heard if d.why]
    floor = 4 * torch.finfo(dtype).eps
    for one, other in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        assert sum(one) <= max(2 * sum(other), floor)


@blocks
def test_buffers_and_second_calls_are_as_in_stock(block, shape, device):
    model = block().to(device)
    reference = copy.deepcopy(model)
    with fastnn.backend("triton"):
        compiled = fastnn.compile(model)
        for _ in range(2):
            x = torch.randn(shape, device=device)
            torch.testing.assert_close(compiled(x), reference(x))
        assert torch.equal(compiled.eval()(x), compiled(x))
    for (name, one), (_, other) in zip(
        model.named_buffers(), reference.named_buffers(), strict=True
    ):
        torch.testing.assert_close(one, other, msg=name)


@interpreted
def test_masks_are_those_of_the_fused_layers():
    """A dropout draws in a compiled model what it draws in the eager op of the same seed."""
    x, z = torch.randn(4, WIDTH), torch.randn(4, WIDTH)
    norm = stock.LayerNorm(WIDTH)

    def call(z, x):
        return norm(x + F.dropout(z, 0.5, training=True))

    with fastnn.backend("triton"):
        torch.manual_seed(3)
        want = fastnn.functional.dropout_add_layer_norm(
            z, x, (WIDTH,), norm.weight, norm.bias, p=0.5, training=True
        )
        torch.manual_seed(3)
        fused, got = found_in(call, z, x)
    assert fused == {"dropout, add, norm": 1}
    assert torch.equal(got, want)


# ---- Spellings ----------------------------------------------------------------------------------

LINEAR = stock.Linear(WIDTH, WIDTH)
WEIGHT = stock.Parameter(torch.rand(WIDTH) + 0.5)
NORM, BATCH, GROUP = stock.LayerNorm(WIDTH), stock.BatchNorm1d(WIDTH), stock.GroupNorm(2, WIDTH)
OTHER_BATCH = stock.BatchNorm1d(WIDTH)
TARGET = torch.arange(4)


def erf_gelu(x):
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def batch_in_eval(x):
    return F.batch_norm(x, BATCH.running_mean, BATCH.running_var)


def reshaped_and_read(x):
    """As blocks of Swin do: the sum is reshaped, and both its norm and the next sum read it."""
    s = (x + F.dropout(x.sin(), 0.0)).reshape(2, -1, WIDTH)
    return s + NORM(s)


def permuted(x):
    return x.cos().t().contiguous().t()


def heads(x):
    return x.view(2, 2, 2, 8).transpose(1, 2)


def attention(x):
    """As Whisper does: only the query is a copy."""
    x = x.cos()
    y = F.scaled_dot_product_attention(heads(x).contiguous(), heads(x), heads(x))
    return y.transpose(1, 2).reshape(2, 2, WIDTH)


def scaled_query(x, scale=None, by=0.7):
    return F.scaled_dot_product_attention(heads(x.cos() * by), heads(x), heads(x), scale=scale)


def three(x):
    q, k, v = F.pad(x, (0, 8)).view(2, 2, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return q * k + v


def three_turned(x):
    q, k, v = F.pad(x, (0, 8)).view(2, 2, 3, 2, 4).permute(2, 1, 3, 0, 4).unbind(0)
    return q * k + v


def three_parts(x, of=torch.sin):
    q, k, v = of(x).view(4, 2, 8)[:3]
    return q * k + v


def halves(x, gate=0):
    two = (x * 2).chunk(2, dim=-1)
    return two[1 - gate].mul(F.gelu(two[gate]))


def mean_and_more(x):
    y = NORM(x)
    return y.mean(dim=-1).exp().sum() + y.cos()


ANGLES = torch.linspace(0, 3, WIDTH)


def turned(x, cut=8):
    return torch.cat((-x[..., cut:], x[..., :cut]), dim=-1)


def rotary(x):
    x = x.exp()
    return x * ANGLES.cos() + turned(x) * ANGLES.sin()


def two_products(x):
    y = NORM(x)
    return LINEAR(y) + F.linear(y, LINEAR.weight).cos()


SPELLINGS = {
    "x.mul": ("silu written out", lambda x: x.mul(x.sigmoid())),
    "sigmoid first": ("silu written out", lambda x: torch.sigmoid(x) * x),
    "erf": ("gelu written out", lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))),
    "half last": ("gelu written out", lambda x: x * (1 + torch.erf(x * 0.5**0.5)) * 0.5),
    "by two": ("gelu written out", lambda x: x * (torch.erf(x / 2**0.5) + 1) / 2),
    "tanh, product": (
        "gelu written out",
        lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
    ),
    "tanh, **": (
        "gelu written out",
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    ),
    "of a sum": ("gelu written out", lambda x: erf_gelu(x + 1)),
    "mish": ("mish written out", lambda x: x * torch.tanh(F.softplus(x))),
    "rms, x * x": (
        "rms_norm written out",
        lambda x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * WEIGHT,
    ),
    "rms, square": (
        "rms_norm written out",
        lambda x: WEIGHT * (torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-5) * x),
    ),
    "rms, float": (
        "rms_norm written out",
        lambda x: (
            WEIGHT * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, True) + 1e-5)).type_as(x)
        ),
    ),
    "nll": ("nll_loss of log_softmax", lambda x: F.nll_loss(F.log_softmax(x, -1), TARGET)),
    "nll, method": ("nll_loss of log_softmax", lambda x: F.nll_loss(x.log_softmax(dim=1), TARGET)),
    "relu, method": ("linear, activation", lambda x: LINEAR(x).relu()),
    "relu_, keyword": ("linear, activation", lambda x: F.relu(input=LINEAR(x), inplace=True)),
    "relu_": ("linear, activation", lambda x: LINEAR(x).relu_()),
    "gelu, tanh": ("linear, activation", lambda x: F.gelu(LINEAR(x), approximate="tanh")),
    "leaky": ("linear, activation", lambda x: F.leaky_relu(LINEAR(x), 0.1, inplace=True)),
    "drop": ("linear, activation, dropout", lambda x: F.dropout(F.relu(LINEAR(x)), 0.0)),
    "torch.add": ("dropout, add, norm", lambda x: NORM(torch.add(x, F.dropout(x.sin(), 0.0)))),
    "reshaped": ("dropout, add, norm", lambda x: NORM((x + x.sin()).view(2, 2, WIDTH))),
    "reshaped, both": ("dropout, add, norm", lambda x: reshaped_and_read(x)),
    "batch": ("batch_norm, activation", lambda x: F.silu(BATCH(x))),
    "batch, eval": ("batch_norm, activation", lambda x: torch.relu(batch_in_eval(x))),
    "batch, add": ("batch_norm, add, relu", lambda x: (x.sin() + BATCH(x)).relu()),
    "batch, add alone": ("batch_norm, add", lambda x: BATCH(x).add_(x.sin())),
    "swiglu": ("activation, product", lambda x: F.silu(x) * x.cos()),
    "geglu": ("activation, product", lambda x: x.cos().mul(F.gelu(x, approximate="tanh"))),
    "group": ("group_norm, activation", lambda x: torch.tanh(GROUP(x))),
    "divided by 1": ("nothing to do", lambda x: ((x + 1) / 1.0).sin()),
    "times 1": ("nothing to do", lambda x: (1 * x.cos()).sin()),
    "padded by 0": ("nothing to do", lambda x: F.pad(x.cos(), (0, 0, 0, 0)).sin()),
    "unpacked": ("parts of one tensor", lambda x: three_parts(x, NORM)),
    "halves": ("activation, product of halves", lambda x: halves(x)),
    "halves, first": ("activation, product of halves", lambda x: halves(x, 1)),
    "copies for attention": ("contiguous before attention", lambda x: attention(x)),
    "scaled query": ("scale before attention", lambda x: scaled_query(x, 1.5)),
    "scaled query, as usual": ("scale before attention", lambda x: scaled_query(x)),
    "divided query": (
        "scale before attention",
        lambda x: F.scaled_dot_product_attention(heads(x) / 3, heads(x), heads(x)),
    ),
    "query, key, value": ("unbind of a permutation", lambda x: three(x)),
    "query, key, value, turned": ("unbind of a permutation", lambda x: three_turned(x)),
    "layer scale": ("scale, add", lambda x: x.cos() + WEIGHT * x),
    "layer scale, in place": ("scale, add", lambda x: x.exp().mul_(WEIGHT).add_(x)),
    "stochastic depth": ("scale, add", lambda x: x + x.sin() * x[:, :1].round()),
    "gate": ("gate of channels", lambda x: GROUP(x) * WEIGHT.sigmoid()),
    "mean": ("mean beside another user", lambda x: mean_and_more(x)),
    "two products": ("products of one tensor", lambda x: two_products(x)),
    "rotary": ("rotary written out", lambda x: rotary(x)),
    "rotary, sine first": (
        "rotary written out",
        lambda x: ANGLES.sin() * torch.cat([x[:, 8:].neg(), x[:, :8]], -1) + ANGLES.cos() * x,
    ),
}  # fmt: skip


@pytest.mark.parametrize("first", [0, 1], ids=["permuted", "contiguous"])
def test_a_residual_stream_becomes_contiguous_once(first, device):
    """As the encoder of Whisper and the transformers of a U-Net begin: with a permuted tensor."""
    NORM.to(device)

    def stream(x):
        terms = permuted(x), x.sin()
        s = terms[first] + terms[1 - first]
        t = s + F.dropout(NORM(s), 0.0)
        return NORM(t)

    x = torch.randn(4, WIDTH, device=device)
    with fastnn.backend("triton"):
        fused, got = found_in(stream, x)
    assert fused == {"sum of two layouts": 1, "dropout, add, norm": 2}
    torch.testing.assert_close(got, stream(x))
    assert got.stride() == stream(x).stride()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_mean_the_same(spelling, device):
    rule, call = SPELLINGS[spelling]
    for module in (LINEAR, NORM, BATCH, OTHER_BATCH, GROUP):
        module.to(device)
    for constant in (WEIGHT, TARGET, ANGLES):
        constant.data = constant.data.to(device)
    x = torch.randn(4, WIDTH, device=device)
    with fastnn.backend("triton"):
        fused, got = found_in(call, x)
    assert fused.pop(rule, 0) == 1 and not fused, fused
    torch.testing.assert_close(got, call(x), rtol=1e-5, atol=1e-5)


# ---- Where a rule must not hold -----------------------------------------------------------------


def two_users(x):
    y = LINEAR(x)
    return F.relu(y) + y.sum()


def returned(x):
    y = LINEAR(x)
    return F.relu(y), y


def written_between(x):
    s = x + x.sin()
    view = x.view(-1)
    y = BATCH(x)
    view.mul_(2)
    return F.relu(y), s


def read_by_a_view(x):
    y = LINEAR(x)
    first = y[0]
    return y.relu_(), first


def in_place_of_an_input(x):
    return torch.relu_(x), LINEAR(x)


def draws_between(x):
    z = F.dropout(x, 0.5, training=True)
    noise = torch.rand_like(x)
    return NORM(x + z) + noise


def autocast_between(x):
    y = LINEAR(x)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        return F.relu(y)


def grad_mode_between(x):
    y = LINEAR(x)
    with torch.no_grad():
        return F.relu(y)


def statistics_between(x):
    y = BATCH(x)
    seen = BATCH.running_mean.clone()
    return F.relu(y), seen


def shared_norm(x):
    y = BATCH(x)
    z = BATCH(x * 2)
    return F.relu(y) - z


def shared_norm_of_a_sum(x):
    y = BATCH(x)
    z = BATCH(x * 2)
    return y + z.sin()


def norm_of_a_sum_that_is_read(x):
    y = BATCH(x)
    return (y + x) * y


def norm_of_a_scaled_sum(x):
    return torch.add(x, BATCH(x), alpha=2)


def norm_plus_a_vector(x):
    return BATCH(x) + x[0]


def own_sum(x):
    return NORM(x + x)


def broadcast(x):
    return NORM(x + x[:1])


def sum_read_before_a_reshape(x):
    s = x + x.sin()
    return NORM(s.view(2, 2, WIDTH)), s


def rows_reshaped(x):
    return NORM((x.view(8, 8) + x.sin().view(8, 8)).view(4, WIDTH))


def rows_in_another_order(x):
    s = x.view(2, 2, WIDTH) + x.sin().view(2, 2, WIDTH)
    return NORM(s.transpose(0, 1))


def rows_by_index(x):
    return NORM((x + F.dropout(x.sin(), 0.0))[[1, 0, 3, 2]])


def terms_that_are_no_rows(x):
    t = x.view(2, 2, WIDTH).transpose(0, 1)
    return NORM((t + t.sin()).reshape(4, WIDTH))


def scaled_sum(x):
    return NORM(torch.add(x, x.sin(), alpha=2))


def other_epsilon_place(x):
    return WEIGHT * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6)


def mean_of_all(x):
    return WEIGHT * (x * torch.rsqrt(x.pow(2).mean() + 1e-6))


def square_of_another(x):
    return WEIGHT * (x * torch.rsqrt(x.sin().pow(2).mean(-1, keepdim=True) + 1e-6))


def scaled_norm(x):
    return WEIGHT * (2 * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def wide_weight(x):
    return WEIGHT.double() * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def other_constant(x):
    return 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.044715 * x**3)))


def rounded_constant(x):
    return 0.5 * x * (1.0 + torch.tanh(0.79788 * (x + 0.044715 * x**3)))


def other_tensor(x):
    return 0.5 * x.sin() * (1.0 + torch.erf(x / 2**0.5))


def gate_of_a_column(x):
    return F.silu(x) * x[:, :1]


def gate_of_a_number(x):
    return F.silu(x) * 2


def gate_used_twice(x):
    y = F.silu(x)
    return y * x.cos() + y


def gate_of_another(x):
    return x * torch.sigmoid(x.sin())


def wrong_sixth(x):
    return x * F.relu6(x + 3) / 5


def last_is_not_classes(x):
    return F.nll_loss(F.log_softmax(x.view(4, 4, 4), -1), TARGET[:4, None].expand(4, 4) % 4)


def dropout_in_place(x):
    return F.dropout(F.relu(LINEAR(x)), 0.5, training=True, inplace=True)


def negative_slope_in_place(x):
    return F.leaky_relu(LINEAR(x), -0.5, inplace=True)


def divided_and_rounded(x):
    return torch.div(x * F.relu6(x + 3), 6, rounding_mode="trunc")


def sum_with_alpha(x):
    return 0.5 * x * torch.erf(x / 2**0.5).add(1, alpha=3)


def rounded_on_the_way(x):
    y = x.half().float()
    return WEIGHT * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6))


def rounded_at_the_end(x):
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return WEIGHT * y.to(torch.int32).float()


def logits_at_an_index(x):
    at = TARGET.clone().int()
    wide = x.bfloat16().float()[at]
    at.zero_()
    return F.cross_entropy(wide, TARGET)


def logits_of_other_bits(x):
    return F.cross_entropy(x.bfloat16().float().view(torch.bfloat16), TARGET)


def a_chunk_of_the_logits(x):
    return F.cross_entropy(x.bfloat16().float().chunk(1)[0], TARGET)


def statistics_by_a_view(x):
    mean, var = x[0].clone(), x[1].square()
    view = mean.view(-1)
    y = F.batch_norm(x, mean, var, training=True)
    seen = view * 1.0
    return F.relu(y), seen


def binomial_between(x):
    z = F.dropout(x, 0.5)
    b = torch.binomial(torch.full_like(x, 10), torch.full_like(x, 0.5))
    return x.cos() + z, b


def written_by_out(x):
    weight = x.repeat(4, 1)
    y = F.linear(x, weight)
    index = torch.zeros(256, dtype=torch.long)
    torch.max(weight.view(256, 1) * 2 + 1, 1, out=(weight.view(256), index))
    return F.relu(y)


def factor_of_another_layout(x):
    return (x.cos().t().contiguous().t() * F.silu(x)).t().contiguous()


def residual_of_another_layout(x):
    return F.dropout(x.cos().t().contiguous().t(), 0.5) + x


def channels_in_rows(x):
    return x.view(2, 2, WIDTH).transpose(1, 2)


def residual_of_permuted_channels(x):
    return F.relu(channels_in_rows(x).cos() + BATCH(channels_in_rows(x).contiguous()))


def norm_of_permuted_channels(x):
    return F.relu(channels_in_rows(x).cos() + BATCH(channels_in_rows(x)))


def rows_of_another_layout(x):
    x = x.t().contiguous().t()
    return WEIGHT * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def copy_of_an_input(x):
    return (x / 1).sin()


def copy_that_leaves(x):
    y = x.sin()
    return y * 1, y


def copy_that_is_written(x):
    y = x.sin()
    z = y / 1
    return z.add_(1) * y.cos()


def copy_of_what_is_written(x):
    y = x.sin()
    z = F.pad(y, (0, 0))
    y.mul_(2)
    return z.cos() + y.cos()


def copy_that_a_view_leaves(x):
    return (x.sin() / 1).view(-1)


def quotient_of_integers(x):
    return (x.argsort() / 1).sin()


def negative_pad(x):
    return F.pad(x.sin(), (0, -1)).cos()


def product_with_true(x):
    return (x.sin() * True).cos()


def layout_that_leaves(x):
    y = permuted(x) + x.sin()
    return NORM(y), y


def layout_of_a_sine(x):
    y = permuted(x) + x.sin()
    return NORM(y) + NORM(y.sin())


def layout_that_a_dropout_draws(x):
    y = permuted(x) + x.sin()
    return NORM(y) * NORM(F.dropout(y, 0.5))


def layout_without_a_norm(x):
    return LINEAR(permuted(x) + x.sin())


def halves_of_two(x):
    a, b = x.sin().chunk(2, -1)
    c, d = x.cos().chunk(2, -1)
    return F.gelu(a) * d + b.sum() + c.sum()


def half_with_another_user(x):
    a, b = x.sin().chunk(2, -1)
    return F.gelu(a) * b + a.sum()


def thirds(x):
    a, b, _ = F.pad(x, (0, 2)).chunk(3, -1)
    return F.gelu(a) * b


def one_half_twice(x):
    a, _ = x.sin().chunk(2, -1)
    return F.gelu(a) * a


def halves_of_a_permutation(x):
    a, b = permuted(x).chunk(2, -1)
    return F.gelu(a) * b


def copy_that_others_read(x):
    q = heads(x.cos()).contiguous()
    y = F.scaled_dot_product_attention(q, q, q)
    return y.transpose(1, 2).reshape(2, 2, WIDTH) + q.sum()


def layout_of_attention(x):
    q = heads(x.cos())
    return F.scaled_dot_product_attention(q.contiguous(), q, q)


def written_after_attention(x):
    y = x.cos()
    z = F.scaled_dot_product_attention(heads(y).contiguous(), heads(y), heads(y))
    y.add_(1)
    return z.transpose(1, 2).reshape(2, 2, WIDTH) + y.sum()


def scaled_query_that_is_read(x):
    q = x.cos() * 0.7
    return F.scaled_dot_product_attention(heads(q), heads(x), heads(x)).sum() + q


def query_scaled_below_zero(x):
    return scaled_query(x, by=-0.7)


def query_scaled_by_tensors(x):
    q = heads(x * WEIGHT)
    return F.scaled_dot_product_attention(q, heads(x), heads(x), scale=1.0)


def query_scaled_in_place(x):
    q = heads(x.cos().mul_(0.7))
    return F.scaled_dot_product_attention(q, heads(x), heads(x), scale=1.0)


def scaled_key(x):
    return F.scaled_dot_product_attention(heads(x), heads(x * 0.7), heads(x), scale=1.0)


def written_before_attention(x):
    y = x.cos()
    q = y * 0.7
    y.add_(1)
    return F.scaled_dot_product_attention(heads(q), heads(x), heads(x)) + y.sum()


def part_of_a_permutation(x):
    q, _, v = F.pad(x, (0, 8)).view(2, 2, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return q * v


def part_that_is_written(x):
    parts = NORM(x).view(2, 2, WIDTH)
    one = parts[0]
    return (parts[1] * 2 + one.mul_(3)).cos()


def part_that_leaves(x):
    parts = NORM(x).view(2, 2, WIDTH)
    return parts[0], parts[1] * 2


def part_that_is_read_twice(x):
    parts = NORM(x).view(2, 2, WIDTH)
    return parts[0] * parts[1] + parts[0]


def one_of_the_parts(x):
    parts = NORM(x).view(2, 2, WIDTH)
    return parts[1] * 2


def parts_of_an_input(x):
    return x[0] * x[1] + x[2] * x[3]


def parts_without_a_gradient(x):
    one, other = (x * 2).view(2, 2, WIDTH)
    return one * other


def permutation_with_another_user(x):
    y = F.pad(x, (0, 8)).view(2, 2, 3, 2, 4).permute(2, 0, 3, 1, 4)
    q, k, v = y.unbind(0)
    return q * k + v + y.sum()


def product_in_place(x):
    return F.silu(x).mul_(x.cos())


def scaled_and_read(x):
    z = x * x[:, :1].cos()
    return x + z, z


def scale_of_more_bits(x):
    return x + x * x[:, :1].double()


def outer_product(x):
    return x + x[:, :1] * x[:1]


def scaled_residual_of_another_layout(x):
    return x + (x * x[:, :1].cos()).t().contiguous().t().mul(x[:1].cos())


def gate_without_a_gradient(x):
    return x * x[:, :1].sigmoid()


def gate_of_more_bits(x):
    return GROUP(x) * WEIGHT.double()


def gate_in_place(x):
    y = GROUP(x)
    return y.mul_(WEIGHT)


def mean_of_more_bits(x):
    y = NORM(x)
    return y.mean(-1, dtype=torch.float64), y


def mean_alone(x):
    return NORM(x).mean(-1)


def products_of_two(x):
    y = NORM(x)
    return LINEAR(y), LINEAR(y * 2)


def products_far_apart(x):
    y = NORM(x)
    z = LINEAR(y)
    for _ in range(15):
        z = z.sin()
    return z + LINEAR(y)


def products_around_a_write(x):
    y = NORM(x).cos()
    z = LINEAR(y)
    with torch.no_grad():
        y.detach().mul_(2)
    return z, LINEAR(y)


def products_without_a_gradient(x):
    return LINEAR(x), LINEAR(x)


def products_of_frozen(x):
    y = NORM(x).detach()
    return LINEAR(y), LINEAR(y)


def halves_of_another(x):
    return x * ANGLES.cos() + turned(x.sin()) * ANGLES.sin()


def parts_that_are_no_halves(x):
    return x * ANGLES.cos() + turned(x, 4) * ANGLES.sin()


def halves_in_order(x):
    return x * ANGLES.cos() + torch.cat((x[:, :8], -x[:, 8:]), -1) * ANGLES.sin()


def rows_changed(x):
    return x * ANGLES.cos() + torch.cat((-x[2:], x[:2]), 0) * ANGLES.sin()


def half_that_is_read(x):
    half = -x[..., 8:]
    return x * ANGLES.cos() + torch.cat((half, x[..., :8]), -1) * ANGLES.sin(), half


def angles_of_more_bits(x):
    return x * ANGLES.cos().double() + turned(x) * ANGLES.sin()


def counter_that_is_read(x):
    y, z = OTHER_BATCH(x), BATCH(x)
    return y, z, BATCH.num_batches_tracked + OTHER_BATCH.num_batches_tracked


def counter_of_a_shared_norm(x):
    return OTHER_BATCH(x), BATCH(x), BATCH(x * 2)


REFUSED = {
    f.__name__: (f, allowed)
    for f, allowed in (
        (two_users, {}), (returned, {}), (written_between, {}), (read_by_a_view, {}),
        (in_place_of_an_input, {}), (draws_between, {}), (autocast_between, {}),
        (grad_mode_between, {}), (statistics_between, {}), (shared_norm, {}), (own_sum, {}),
        (shared_norm_of_a_sum, {}), (norm_of_a_sum_that_is_read, {}), (norm_of_a_scaled_sum, {}),
        (norm_plus_a_vector, {}),
        (broadcast, {}), (scaled_sum, {}), (other_epsilon_place, {}), (mean_of_all, {}),
        (square_of_another, {}), (scaled_norm, {}), (wide_weight, {}), (other_constant, {}),
        (other_tensor, {}), (rounded_constant, {}),
        (gate_of_another, {"activation, product": 1}), (gate_of_a_column, {}),
        (gate_of_a_number, {}), (gate_used_twice, {}),
        (wrong_sixth, {"activation, product": 1}), (last_is_not_classes, {}),
        (divided_and_rounded, {"activation, product": 1}), (sum_with_alpha, {}),
        (rounded_on_the_way, {}), (rounded_at_the_end, {}), (logits_at_an_index, {}),
        (logits_of_other_bits, {}), (a_chunk_of_the_logits, {}), (statistics_by_a_view, {}),
        (binomial_between, {}), (written_by_out, {}), (factor_of_another_layout, {}),
        (residual_of_another_layout, {}), (residual_of_permuted_channels, {}),
        (norm_of_permuted_channels, {}), (rows_of_another_layout, {}), (product_in_place, {}),
        (dropout_in_place, {"linear, activation": 1}), (negative_slope_in_place, {}),
        (sum_read_before_a_reshape, {}), (rows_reshaped, {}), (rows_in_another_order, {}),
        (rows_by_index, {}), (terms_that_are_no_rows, {}),
        (copy_of_an_input, {}), (copy_that_leaves, {}), (copy_that_is_written, {}),
        (copy_of_what_is_written, {}), (copy_that_a_view_leaves, {}), (quotient_of_integers, {}),
        (negative_pad, {}), (product_with_true, {}), (layout_that_leaves, {}),
        (layout_without_a_norm, {}), (halves_of_two, {}),
        (half_with_another_user, {}),
        (thirds, {}), (one_half_twice, {}),
        (halves_of_a_permutation, {}),
        (layout_of_a_sine, {}), (layout_that_a_dropout_draws, {}), (copy_that_others_read, {}),
        (layout_of_attention, {}), (written_after_attention, {}), (part_of_a_permutation, {}),
        (part_that_is_written, {}), (part_that_leaves, {}), (part_that_is_read_twice, {}),
        (one_of_the_parts, {}), (parts_of_an_input, {}), (parts_without_a_gradient, {}),
        (scaled_query_that_is_read, {}), (query_scaled_below_zero, {}),
        (query_scaled_by_tensors, {}), (query_scaled_in_place, {}), (scaled_key, {}),
        (written_before_attention, {}),
        (permutation_with_another_user, {}), (scaled_and_read, {}), (scale_of_more_bits, {}),
        (outer_product, {}), (scaled_residual_of_another_layout, {}),
        (gate_without_a_gradient, {}), (gate_of_more_bits, {}), (gate_in_place, {}),
        (mean_of_more_bits, {}), (mean_alone, {}), (products_of_two, {}), (products_far_apart, {}),
        (products_around_a_write, {}), (products_without_a_gradient, {}), (products_of_frozen, {}),
        *((f, {"scale, add": 1}) for f in (
            halves_of_another, parts_that_are_no_halves, halves_in_order, rows_changed,
            half_that_is_read,
        )),
        (angles_of_more_bits, {}),
        (counter_that_is_read, {}), (counter_of_a_shared_norm, {}),
    )
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_must_stay(name):
    """The rule does not hold, and the result is stock's to the bit."""
    call, allowed = REFUSED[name]
    for module in (LINEAR, NORM, BATCH, OTHER_BATCH, GROUP):
        module.cpu()
    for constant in (WEIGHT, TARGET, ANGLES):
        constant.data = constant.data.cpu()
    norms = BATCH, OTHER_BATCH
    states = [copy.deepcopy(norm.state_dict()) for norm in norms]
    x = torch.randn(4, WIDTH)
    given = x.clone()
    torch.manual_seed(1)
    want = call(x)
    for norm, state in zip(norms, states, strict=True):
        norm.load_state_dict(state)
    torch.manual_seed(1)
    with fastnn.backend("torch"):
        fused, got = found_in(call, given)
    assert fused == allowed
    for one, other in zip(
        *((t if isinstance(t, tuple) else (t,)) for t in (got, want)), strict=True
    ):
        assert torch.equal(one, other) and one.stride() == other.stride()
    assert torch.equal(given, x)


# ---- What an op declines -------------------------------------------------------------------------


def by_angles(x, cos, sin):
    return x * cos + turned(x, x.shape[-1] // 2) * sin


def fed(*shape, **options):
    """A tensor that is drawn when the test runs."""
    return lambda: torch.rand(shape, **options)


def last_apart(*shape):
    return lambda: torch.rand(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)


def channels_last(*shape):
    return lambda: torch.rand(*shape).to(memory_format=torch.channels_last_3d)


LEARNED = {"requires_grad": True}
BY_PRODUCT = stock.Linear(WIDTH, WIDTH)
ROW = fed(3, WIDTH)
WIDE = fed(2, 3, WIDTH)
# A call in which a rule holds, and the arguments with which the op of the rule declines it.
DECLINED = {
    "rotary, learned cosines": (by_angles, WIDE, fed(3, WIDTH, **LEARNED), ROW),
    "rotary, learned sines": (by_angles, WIDE, ROW, fed(3, WIDTH, **LEARNED)),
    "rotary, five dimensions": (by_angles, fed(2, 1, 2, 3, WIDTH), ROW, ROW),
    "rotary, angles of one column": (by_angles, WIDE, fed(3, 1), fed(3, 1)),
    "rotary, one angle": (by_angles, WIDE, fed(), fed()),
    "rotary, float64": (by_angles, *[fed(3, WIDTH, dtype=torch.float64)] * 3),
    "rotary, columns apart": (by_angles, last_apart(2, 3, WIDTH), ROW, ROW),
    "rotary, long rows": (by_angles, fed(1, 8196), fed(8196), fed(8196)),
    "rms_norm, float64": (
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        fed(3, WIDTH, dtype=torch.float64), fed(WIDTH, dtype=torch.float64),
    ),
    "scale, float64": (
        lambda x, z, s: x + z * s, *[fed(3, WIDTH, dtype=torch.float64)] * 2,
        fed(WIDTH, dtype=torch.float64),
    ),
    "scale, dimensions apart": (lambda x, z, s: x + z * s, WIDE, WIDE, fed(2, 1, WIDTH)),
    "scale, as many elements": (lambda x, z, s: x + z * s, *[fed(1, 3, WIDTH)] * 2, ROW),
    "gate, dimensions apart": (
        lambda x, s: x * s, fed(2, 3, WIDTH, **LEARNED), fed(2, 1, WIDTH, **LEARNED),
    ),
    "product, columns apart": (lambda x, z: F.silu(x) * z, *[last_apart(2, 3, WIDTH)] * 2),
    "product, channels last": (lambda x, z: F.relu(x) * z, *[channels_last(2, 4, 3, 3, 3)] * 2),
    "norm, columns apart": (
        lambda z, x: F.layer_norm(x + z, (WIDTH,)), *[last_apart(2, 3, WIDTH)] * 2,
    ),
    "norm, a weight of more bits": (
        lambda z, x, w: F.rms_norm(x + z, (WIDTH,), w, 1e-5),
        *[fed(3, WIDTH, dtype=torch.bfloat16, **LEARNED)] * 2, fed(WIDTH),
    ),
    "norm, a row with a bias": (
        lambda z, x: F.layer_norm(x + BY_PRODUCT(z), (WIDTH,)), fed(WIDTH, **LEARNED), fed(WIDTH),
    ),
}  # fmt: skip


@interpreted
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # PyTorch's notice
@pytest.mark.parametrize("name", DECLINED)
def test_a_rule_leaves_what_its_op_declines(name):
    """The separate calls run, also where kernels are forced, and have the values of stock."""
    call, *make = DECLINED[name]
    BY_PRODUCT.cpu()
    inputs = [m() for m in make]
    with fastnn.backend("triton"), fastnn.decisions() as heard:
        _, got = found_in(call, *inputs)
    assert all(d.why is None for d in heard)
    want = call(*inputs)
    torch.testing.assert_close(got, want)
    assert got.stride() == want.stride()


# ---- States of a model --------------------------------------------------------------------------


WAYS = (
    "hook", "buffer hook", "checkpoint", "no_grad", "inference", "dynamic", "second order",
    "autocast", "converted", "frozen", "function",
)  # fmt: skip


@interpreted
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_use_a_model(way):
    model = stock.Sequential(
        stock.Linear(WIDTH, WIDTH), stock.GELU(), stock.LayerNorm(WIDTH), stock.BatchNorm1d(WIDTH),
        stock.ReLU(),
    )  # fmt: skip
    reference = copy.deepcopy(model)
    expected = {"linear, activation": 1, "batch_norm, activation": 1}
    call, want_call = model, reference
    sizes: tuple[int, ...] = (16,)  # with fewer rows, a batch norm amplifies each rounding
    context = torch.enable_grad()
    if way == "hook":
        for one in (model, reference):
            one[0].register_forward_hook(lambda m, a, out: out * 2)
        expected = {"batch_norm, activation": 1}
    elif way == "buffer hook":
        for one in (model, reference):
            one[3].register_forward_pre_hook(lambda m, a: (a[0] + 1,))
    elif way == "checkpoint":
        # Dynamo cannot checkpoint a batch norm: its backend "eager" raises as well.
        call = lambda x: model[3:](checkpoint(model[:3], x, use_reentrant=False))  # noqa: E731
        want_call = reference
    elif way == "no_grad":
        context = torch.no_grad()
    elif way == "inference":
        context = torch.inference_mode()
    elif way == "dynamic":
        sizes = (4, 6, 9)
    elif way == "autocast":
        context = torch.autocast("cpu", dtype=torch.bfloat16)
    elif way == "converted":
        fastnn.convert(model)
    elif way == "frozen":
        for one in (model, reference):
            one[0].requires_grad_(False)
    elif way == "function":
        call = lambda x: model(x)  # noqa: E731
    # In `auto`: the CPU's autocast passes layer_norm two dtypes, which no kernel takes.
    with listen() as found, simulated(least=0), context:
        compiled = fastnn.compile(call, dynamic=True if way == "dynamic" else None)
        for size in sizes:
            x = torch.randn(size, WIDTH, requires_grad=torch.is_grad_enabled())
            got, want = compiled(x), want_call(x)
            low = way == "autocast"
            torch.testing.assert_close(got, want, **({"rtol": 0.05, "atol": 0.05} if low else {}))
            if way == "second order":
                for y in (got, want):
                    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
                    y.second = torch.autograd.grad(first.square().sum(), x)[0]
                torch.testing.assert_close(got.second, want.second, rtol=1e-3, atol=2e-3)
            elif got.requires_grad:
                (grad,) = torch.autograd.grad(got.float().square().sum(), x)
                exact, wide = copy.deepcopy(reference).double(), x.detach().double()
                y = exact(wide.requires_grad_())
                true = torch.autograd.grad(y.square().sum(), wide)[0].to(grad.dtype)
                tolerance = {"rtol": 0.1, "atol": 0.1} if low else {}
                torch.testing.assert_close(grad, true, **tolerance)
    assert fused_in(found) == expected


@interpreted
@pytest.mark.parametrize("shape", [(4, WIDTH), (2, 3, WIDTH)], ids=["matrix", "batch"])
@pytest.mark.parametrize("where", ["in the graph", "by the caller"])
def test_products_of_one_tensor_may_be_written_in_place(shape, where):
    q, k, v = (stock.Linear(WIDTH, WIDTH) for _ in range(3))

    def call(x):
        parts = [layer(x) for layer in (q, k, v)]
        if where == "in the graph":
            parts[0].add_(1)
        return parts

    x = torch.randn(shape, requires_grad=True)
    found = []
    with listen() as heard, fastnn.backend("triton"):
        for function in (fastnn.compile(call), call):
            one, *others = function(x)
            one.mul_(2)
            y = (one * others[0] * others[1]).sum()
            found.append([y, *torch.autograd.grad(y, [x, *q.parameters()])])
    assert fused_in(heard) == {"products of one tensor": 1}
    for ours, its in zip(*found, strict=True):
        torch.testing.assert_close(ours, its)


@interpreted
def test_batches_of_gradients_of_a_compiled_model():
    """A node of several products takes batches, also if a gradient of one of them is none."""
    q, k = (stock.Linear(WIDTH, WIDTH) for _ in range(2))

    def call(x):
        return q(x), k(x)

    x, batch = torch.randn(4, WIDTH, requires_grad=True), torch.randn(3, 4, WIDTH)
    found = []
    with listen() as heard, fastnn.backend("triton"):
        for function in (fastnn.compile(call), call):
            one, other = function(x)
            other.register_hook(lambda g: torch.ones(4, WIDTH))
            y = one.sin() * other
            found.append(torch.autograd.grad(y, (x, q.weight), batch, is_grads_batched=True))
    assert fused_in(heard) == {"products of one tensor": 1}
    for ours, its in zip(*found, strict=True):
        torch.testing.assert_close(ours, its)


@interpreted
def test_the_training_flag_makes_a_new_graph():
    model = stock.Sequential(stock.BatchNorm1d(WIDTH), stock.ReLU(), stock.Dropout(0.5))
    reference = copy.deepcopy(model).eval()
    with fastnn.backend("triton"):
        compiled = fastnn.compile(model)
        x = torch.randn(4, WIDTH)
        compiled(x)
        reference.load_state_dict(model.state_dict())
        model.eval()
        torch.testing.assert_close(compiled(x), reference(x))


def test_unpacked_parts_have_the_gradient_of_eager_mode():
    """Dynamo makes `x[0], x[1], x[2]` of `q, k, v = x`. The gradient of each is as large as x."""
    x = torch.randn(4, WIDTH, requires_grad=True)
    w = torch.randn(WIDTH, WIDTH, requires_grad=True)

    def call(x):
        q, k, v = F.linear(x, w).repeat(3, 1).view(3, 4, WIDTH)
        return (q * k + v).sin()

    found = []
    for one in (call, fastnn.compile(call)):
        y = one(x)
        names, todo = set(), [y.grad_fn]
        while todo:
            node = todo.pop()
            names.add(node.name())
            todo += [n for n, _ in node.next_functions if n is not None]
        assert "SelectBackward0" not in names and "UnbindBackward0" in names
        found.append(torch.autograd.grad(y.sum(), (x, w)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@interpreted
def test_logits_are_read_in_16_bits():
    """cross_entropy(x.float()) and the views between: the kernel reads bfloat16."""
    x = torch.randn(2, 5, 8, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(8, (2, 5))

    def loss(x, target):
        wide = x.float()[:, :-1].contiguous()
        return F.cross_entropy(wide.view(-1, 8), target[:, 1:].reshape(-1), label_smoothing=0.1)

    with fastnn.backend("triton"), fastnn.decisions() as heard:
        fused, got = found_in(loss, x, target)
    assert fused == {"cross_entropy of converted logits": 1}
    assert [d.why for d in heard] == [None]
    assert got.dtype == torch.float32
    want = loss(x, target)
    torch.testing.assert_close(got, want)
    a, b = (torch.autograd.grad(y, x)[0] for y in (got, want))
    torch.testing.assert_close(a, b)


def test_small_calls_run_stock_with_the_same_bits():
    """In `auto`, small fused calls are PyTorch's own calls. Only formulas written out change."""
    model = Residual()
    reference = copy.deepcopy(model)
    x = torch.randn(IMAGE)
    assert torch.equal(fastnn.compile(model)(x), reference(x))


@interpreted
def test_equal_input_gives_equal_bits():
    model, x = GPT(0.1), torch.randn(ROWS)
    with fastnn.backend("triton"):
        compiled = fastnn.compile(model)
        results = []
        for _ in range(3):
            torch.manual_seed(5)
            results.append(gradients(model, compiled, x))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_name_of_the_backend_is_registered_and_takes_no_options():
    x = torch.randn(2, WIDTH)
    model = stock.Linear(WIDTH, WIDTH)
    with listen() as found:
        named = torch.compile(model, backend="fastnn", fullgraph=True)
        assert torch.equal(named(x), model(x))
    assert [f.rule for f in found] == ["linear"]
    with pytest.raises(
        torch._dynamo.exc.BackendCompilerFailed, match="one option, replay; given: a"
    ):
        torch.compile(model, backend="fastnn", options={"a": 1})(x)


@interpreted
def test_explain_tells_of_the_compiled_model():
    model = Residual()
    x = torch.randn(IMAGE)
    state = copy.deepcopy(model.state_dict())
    with fastnn.backend("triton"):
        rows = fastnn.explain(model, x, compiled=True)
    at = {row.op: row for row in rows}
    assert at["batch_norm_add_relu"].layer == "relu"
    assert at["batch_norm_add_relu"].kind == "torch.ReLU"
    assert at["batch_norm_add_relu"].path == "kernel"
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    rows = fastnn.explain(model, x, compiled=True)
    assert {row.path for row in rows} == {"stock"} and all(row.reason for row in rows)


@interpreted
def test_explain_leaves_no_trace():
    """Dynamo counts what it compiled for a function: many reports must not use that up."""
    import gc
    import weakref

    model, x = stock.Sequential(stock.Linear(WIDTH, WIDTH), stock.ReLU()), torch.randn(2, WIDTH)
    reports = {str(fastnn.explain(model, x, compiled=True)) for _ in range(10)}
    assert len(reports) == 1 and "linear_act" in reports.pop()
    assert found_in(model, x, fullgraph=True)[0] == {"linear, activation": 1}
    model = stock.Sequential(stock.Linear(WIDTH, WIDTH), stock.ReLU())
    fastnn.explain(model, x, compiled=True)
    weight = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert weight() is None


def test_a_number_that_changes_does_not_compile_again():
    compiled = fastnn.compile(lambda x, scale: F.relu(x) * scale + 1, fullgraph=True)
    x = torch.randn(2, WIDTH)
    for k in range(12):
        assert torch.equal(compiled(x, 0.1 * k + 0.05), F.relu(x) * (0.1 * k + 0.05) + 1)


def rewritten(call, *inputs):
    """The rewritten graph of the compiled `call`, which is one graph, before the gate sees it."""
    graphs = []

    def keep(gm, inputs):
        _backend.rewrite(gm)
        graphs.append(gm)
        return gm.forward

    keep.__wrapped__ = _backend.backend
    torch.compile(call, backend=keep)(*inputs)
    (graph,) = graphs
    return graph


def kept(gm):
    """The ops that a graph still asks in `auto`."""
    floors = [_gated.floor_of(record) for _, record in _gated.calls_of_ours(gm)]
    return [record.name for _, record in _gated.calls_of_ours(_gated.lean(gm, floors))]


@interpreted
def test_small_calls_of_a_graph_are_decided_once(monkeypatch):
    """A graph calls PyTorch itself where its sizes are below the floor, until the floors change."""
    model = stock.Sequential(stock.Linear(WIDTH, WIDTH), stock.GELU(), stock.LayerNorm(WIDTH))
    x = torch.randn(4, WIDTH, requires_grad=True)
    graphs, launched = [], []
    launch = fastnn.kernels._launch.Kernel.__call__

    def counting(self, *args, **kwargs):
        launched.append(self)
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(fastnn.kernels._launch.Kernel, "__call__", counting)
    made = _backend.gated
    monkeypatch.setattr(_backend, "gated", lambda gm, replay: graphs.append(gm) or made(gm, replay))
    want = model(x)
    compiled = fastnn.compile(model)
    for least, kernels in ((10**6, False), (0, True), (10**6, False)):
        with simulated(least=least):
            launched.clear()
            got = compiled(x)
            assert (kept(graphs[0]) == ["linear_act", "layer_norm"]) == kernels
            assert bool(launched) == kernels
        (torch.testing.assert_close if kernels else torch.equal)(got, want)
    assert len(graphs) == 1
    with simulated(least=4 * WIDTH):  # not below the floor, but at it
        assert kept(graphs[0]) == ["linear_act", "layer_norm"]
    with simulated(least=4 * WIDTH + 1):
        assert kept(graphs[0]) == []
    with simulated(least=10**6), fastnn.backend("triton"), fastnn.decisions() as heard:
        compiled(x)
    assert [(d.op.name, d.why) for d in heard] == [("linear_act", None), ("layer_norm", None)]
    assert {d.path for d in fastnn.explain(model, x, compiled=True)} == {"stock"}


@interpreted
@pytest.mark.parametrize("deterministic", [False, True])
def test_small_calls_for_which_pytorch_may_raise_are_asked(deterministic):
    call = lambda x: F.pad(F.relu(x), (1, 1), mode="reflect")  # noqa: E731
    graph = rewritten(call, torch.randn(2, 3, 8))
    torch.use_deterministic_algorithms(deterministic)
    try:
        with simulated(least=10**6):
            assert kept(graph) == (["pad"] if deterministic else [])
    finally:
        torch.use_deterministic_algorithms(False)


@interpreted
def test_sizes_that_are_not_known_are_asked():
    model = stock.Sequential(stock.LayerNorm(WIDTH), stock.Linear(WIDTH, WIDTH))
    compiled = fastnn.compile(model, dynamic=True)
    with simulated(least=5 * WIDTH), fastnn.decisions() as heard:
        for size in (4, 6):
            compiled(torch.randn(size, WIDTH))
    small, large = (d for d in heard if d.op.name == "layer_norm")
    assert small.why and large.why is None


def added_place(x):
    return NORM(x + WEIGHT.expand(4, WIDTH))


def scaled_by_the_place(x):
    return x + WEIGHT.expand(4, WIDTH) * x.sin()


@pytest.mark.parametrize("call", [added_place, scaled_by_the_place], ids=lambda call: call.__name__)
def test_a_rule_makes_no_condition_of_a_size(call):
    """One graph serves all sizes, also where a size equals that of another dimension."""
    for one in (LINEAR, NORM):
        one.cpu()
    WEIGHT.data = WEIGHT.data.cpu()
    compiled = fastnn.compile(call, dynamic=True, fullgraph=True)
    with fastnn.backend("torch"):
        compiled(torch.randn(3, 4, WIDTH))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for size in (2, 4, WIDTH):
                x = torch.randn(size, 4, WIDTH)
                torch.testing.assert_close(compiled(x), call(x))


@interpreted
@pytest.mark.parametrize("how", ["imported", "converted", "stock"])
@pytest.mark.parametrize("backend", ["fastnn", "eager"])
def test_eager_calls_do_not_compile_a_model_again(how, backend):
    """What eager calls remember, such as the least size of a kernel, is no guard of a graph."""
    home = fastnn if how == "imported" else stock
    model = home.Sequential(
        home.Linear(WIDTH, WIDTH), home.GELU(), home.Dropout(0.1), home.LayerNorm(WIDTH),
        home.Sequential(home.BatchNorm1d(WIDTH), home.ReLU()), home.Softmax(-1),
    )  # fmt: skip
    if how == "converted":
        fastnn.convert(model)
    loss = home.CrossEntropyLoss()
    x, target = torch.randn(4, WIDTH), torch.arange(4)

    def call(x):
        return loss(model(x), target)

    with simulated(least=64):
        compiled = torch.compile(call, backend=backend)
        compiled(x).backward()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for size in (4, 40, 4):
                one = torch.randn(size, WIDTH)
                for layer in (*model[:4], *model[4], model[5], model):
                    layer(one)
                loss(one, torch.zeros(size, dtype=torch.long))
                compiled(x).backward()


def test_meta_tensors():
    x = torch.empty(4, WIDTH, dtype=torch.bfloat16, device="meta")
    target = torch.empty(4, dtype=torch.long, device="meta")
    fused, loss = found_in(lambda x, t: F.cross_entropy(x.float(), t), x, target)
    assert fused and loss.is_meta and loss.dtype == torch.float32


def breaks(x):
    torch._dynamo.graph_break()
    return F.relu(LINEAR(x))


def branches(x):
    return F.relu(LINEAR(x)) if x.sum() > 0 else LINEAR(x)


def prints(x):
    print("in the middle of forward")
    return F.relu(LINEAR(x))


class Recurrent(stock.Module):
    def __init__(self):
        super().__init__()
        self.lstm = stock.LSTM(WIDTH, WIDTH)

    def forward(self, x):
        return self.lstm(x)[0]


# What Dynamo cannot take, and a part of the advice.
CANNOT = {
    "a break": (lambda: breaks, "compile the parts on both sides"),
    "a condition on values": (lambda: branches, "write the condition with torch.where"),
    "a print": (lambda: prints, "take the message out of `forward`"),
    "an LSTM": (Recurrent, "allow_rnn = True"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_errors_of_dynamo_are_its_own_with_our_hint(name):
    """The error is that of PyTorch's backend "eager". Without `fullgraph` there is none."""
    build, advice = CANNOT[name]
    call, x = build(), torch.randn(2, WIDTH)
    with pytest.raises(torch._dynamo.exc.Unsupported) as theirs:
        torch.compile(call, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported) as ours:
        fastnn.compile(call, fullgraph=True)(x)
    assert type(ours.value) is type(theirs.value) and str(ours.value) == str(theirs.value)
    if sys.version_info >= (3, 11):
        (note,) = ours.value.__notes__
        assert advice in note and "Without fullgraph=True" in note
    torch._dynamo.reset()
    assert torch.equal(fastnn.compile(call)(x), call(x))


def test_advice_helps():
    """After it, the LSTM is captured as one graph, and each size needs no graph of its own."""
    model, x = Recurrent(), torch.randn(2, WIDTH)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = fastnn.compile(model, fullgraph=True, dynamic=True)
        torch.testing.assert_close(compiled(x), model(x))
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(compiled(x[:, :]), model(x))
    compiled = fastnn.compile(lambda x: F.relu(LINEAR(x)), dynamic=True, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (2, 3, 5):
            x = torch.randn(size, WIDTH)
            torch.testing.assert_close(compiled(x), F.relu(LINEAR(x)))


def test_a_model_with_a_hint_is_as_torch_compile_makes_it():
    """It can be copied, and compiled as a part of another model."""
    model, x = stock.Sequential(stock.Linear(WIDTH, WIDTH), stock.ReLU()), torch.randn(2, WIDTH)
    want = model(x)
    compiled = fastnn.compile(model, fullgraph=True)
    for one in (compiled, copy.deepcopy(compiled)):
        assert type(one) is type(torch.compile(model, backend="eager"))
        assert torch.equal(one(x), want)
        assert list(one.state_dict()) == list(compiled.state_dict())
    outer = torch.compile(lambda x: compiled(x) + 1, backend="eager", fullgraph=True)
    assert torch.equal(outer(x), want + 1)
    inner = fastnn.compile(lambda x: model(x), fullgraph=True)
    outer = torch.compile(lambda x: inner(x) + 1, backend="eager", fullgraph=True)
    assert torch.equal(outer(x), want + 1)


# ---- Wrong rules --------------------------------------------------------------------------------


def changed(name, change):
    """Plants `change(op)` in place of the op `name` in the rules."""
    op = getattr(_rules, name)

    def wrong(*args, **kwargs):
        return change(op, *args, **kwargs)

    wrong.__name__ = name
    return _rules, name, wrong


def without(cls, method):
    """Plants a question that is always answered by yes."""
    return cls, method, lambda *args, **kwargs: None


def acts_first(op, x, mean, var, weight, bias, training, momentum, eps, *act):
    return F.batch_norm(F.silu(x), mean, var, weight, bias, training, momentum, eps)


def scale_and_shift(op, z, x, shape, weight, bias, eps, *rest):
    return op(z, x, shape, bias, weight, eps, *rest)


made_linears = _gradients.linears
stays, means_the_same = test_what_must_stay, test_spellings_mean_the_same
PLANTED = {
    "a second user is not noticed": (without(Site, "confirm"), stays, "two_users"),
    "a write between is not noticed": (
        (_site, "_disturbs", lambda *args: None), stays, "written_between",
    ),
    "the scale of a sum is dropped": (
        (Site, "sum", lambda self, node: [*self.call(node, "add").arguments.values()][:2]),
        stays, "sum_with_alpha",
    ),
    "a rounding between is lost": (
        (_rules, "is_widening", is_conversion), stays, "rounded_on_the_way",
    ),
    "the layout of a term is lost": (
        (_rules, "_alike", lambda one, other: one.shape == other.shape),
        stays, "residual_of_permuted_channels",
    ),
    "a copy that somebody writes": (
        without(Site, "expect_one_memory"), stays, "copy_of_what_is_written",
    ),
    "a layout that somebody sees": (
        (_rules, "has_free_layout", lambda node: True), stays, "layout_that_leaves",
    ),
    "the halves of another dimension": (
        changed("act_glu", lambda op, x, dim, *rest: op(x, 0, *rest)), means_the_same, "halves",
    ),
    "the other half": (
        changed("act_glu", lambda op, *args: op(*args[:-1], not args[-1])),
        means_the_same, "halves, first",
    ),
    "another eps": (
        changed(
            "dropout_add_layer_norm",
            lambda op, z, x, shape, w, b, eps, *rest: op(z, x, shape, w, b, 1e-2, *rest),
        ),
        means_the_same, "torch.add",
    ),
    "scale and shift in the other order": (
        changed("dropout_add_layer_norm", scale_and_shift), means_the_same, "torch.add",
    ),
    "a transposed weight": (
        changed("linear_act", lambda op, x, w, *rest: op(x, w.t(), *rest)),
        means_the_same, "relu, method",
    ),
    "a dropped bias": (
        changed("linear_act", lambda op, x, w, b, *rest: op(x, w, None, *rest)),
        means_the_same, "relu, method",
    ),
    "the activation before the norm": (
        changed("batch_norm_act", acts_first), means_the_same, "batch",
    ),
    "the factors in the other order": (
        changed("act_mul", lambda op, x, z, *rest: op(z, x, *rest)), means_the_same, "swiglu",
    ),
    "the residual is scaled": (
        changed("scale_add", lambda op, x, scale, residual: op(residual, scale, x)),
        means_the_same, "layer scale",
    ),
    "the scale of another product": (
        changed("scale_add", lambda op, x, scale, *rest: op(x, scale * scale, *rest)),
        means_the_same, "stochastic depth",
    ),
    "a gradient of a product is lost": (
        (_gradients, "linears", lambda x, *rest: made_linears(x.detach(), *rest)),
        test_blocks_are_found_and_as_exact_as_stock, Heads, ROWS, torch.float32, "cpu",
    ),
    "products move over a write": (
        without(Site, "confirm"), stays, "products_around_a_write",
    ),
    "a stale training flag": (
        changed("batch_norm_act", lambda op, *args: op(*args[:5], True, *args[6:])),
        test_the_training_flag_makes_a_new_graph,
    ),
    "p is what is kept": (
        changed(
            "dropout_add_layer_norm",
            lambda op, *args: op(*args[:6], (1 - args[6]) ** 2, *args[7:]),
        ),
        test_masks_are_those_of_the_fused_layers,
    ),
}  # fmt: skip


@interpreted
@pytest.mark.parametrize("name", PLANTED)
def test_a_wrong_rule_is_caught(name, monkeypatch):
    """The test that is named beside it fails if the rule is wrong in this way."""
    (home, attribute, wrong), test, *which = PLANTED[name]
    monkeypatch.setattr(home, attribute, wrong)
    on = ["cpu"] if test is means_the_same else []
    with pytest.raises((AssertionError, RuntimeError)):
        test(*which, *on)
