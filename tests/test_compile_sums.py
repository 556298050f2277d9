"""Sums of gradients in the kernels of a compiled model: of two users of a result, and of biases."""

import collections
import copy

import pytest
import torch
import torch.nn as stock
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastnn
from fastnn import _gate
from fastnn._compiler import _backend, _gated, _gradients
from fastnn._compiler._backend import listen
from fastnn.testing import simulated
from tests.marks import interpreted
from tests.test_compile import errors, fresh_dynamo, fused_in, gradients, rewritten

assert fresh_dynamo  # a fixture that every test here uses

WIDTH = 16
BIAS, TWO, MEANS = "bias in a backward", "two gradients", "means of planes"
TABLE, SKIP = "table that is multiplied", "norm that passes its input on"


class PostNorm(stock.Module):
    """A layer of BERT: each norm is read by a branch and by the sum after it."""

    expected = {  # noqa: RUF012
        "dropout, add, norm": 3, "linear, activation": 1, BIAS: 3, TWO: 2,
    }  # fmt: skip
    shape = 2, 40, WIDTH

    def __init__(self):
        super().__init__()
        self.mix, self.up, self.down, self.last = (
            stock.Linear(i, o)
            for i, o in ((WIDTH, WIDTH), (WIDTH, 32), (32, WIDTH), (WIDTH, WIDTH))
        )
        self.norms = stock.ModuleList(stock.LayerNorm(WIDTH) for _ in range(3))
        self.drop = stock.Dropout(0.0)

    def forward(self, x):
        y = self.norms[0](x + self.drop(self.mix(x)))
        z = self.norms[1](self.drop(self.down(F.gelu(self.up(y)))) + y)
        return self.norms[2](self.last(z) + z)


class RmsNorm(stock.Module):
    """A prenorm layer. The last norm is read by two products that stand apart."""

    expected = {"dropout, add, norm": 2, BIAS: 2, TWO: 1}  # noqa: RUF012
    shape = 2, 40, WIDTH

    def __init__(self):
        super().__init__()
        self.mix, self.down, self.one, self.two = (stock.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norms = stock.ModuleList(stock.RMSNorm(WIDTH, 1e-6) for _ in range(2))

    def forward(self, x):
        s = x + self.mix(x.sin())
        s = s + self.down(self.norms[0](s).cos())
        y = self.norms[1](s)
        for _ in range(13):
            x = x.sin()
        return self.one(y).exp() + x * self.two(y.cos()) + s


class Residuals(stock.Module):
    """Blocks of ResNet. The end of one is read by the convolution and the sum of the next."""

    expected = {  # noqa: RUF012
        "batch_norm, add, relu": 2, "batch_norm, activation": 1, "counters of batches": 3, TWO: 1,
    }  # fmt: skip
    shape = 8, 4, 3, 4

    def __init__(self):
        super().__init__()
        self.convs = stock.ModuleList(stock.Conv2d(4, 4, 1, bias=False) for _ in range(3))
        self.norms = stock.ModuleList(stock.BatchNorm2d(4) for _ in range(3))

    def forward(self, x):
        x = F.relu(self.norms[0](self.convs[0](x)) + x)
        y = F.relu(self.norms[1](self.convs[1](x)), inplace=True)
        y = self.norms[2](self.convs[2](y))
        y += x
        return F.relu(y, inplace=True)


class Inverted(stock.Module):
    """Blocks of MobileNet: what ends one is read by the convolution and the sum of the next."""

    expected = {"batch_norm, add": 2, "counters of batches": 2, TWO: 1}  # noqa: RUF012
    shape = 8, 4, 3, 4

    def __init__(self):
        super().__init__()
        self.convs = stock.ModuleList(stock.Conv2d(4, 4, 1, bias=False) for _ in range(3))
        self.norms = stock.ModuleList(stock.BatchNorm2d(4) for _ in range(2))

    def forward(self, x):
        x = self.norms[0](self.convs[0](x)) + x
        y = self.norms[1](self.convs[1](x))
        y += x
        return self.convs[2](y)


class Heads(stock.Module):
    """Query, key and value of one product, as timm and as transformers take them apart."""

    expected = {"unbind of a permutation": 1, BIAS: 3}  # noqa: RUF012
    shape = 2, 40, WIDTH

    def __init__(self):
        super().__init__()
        self.one, self.two = (stock.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.pair = stock.Linear(WIDTH, 2 * WIDTH)

    @staticmethod
    def mixed(q, k, v):
        """Attention written out. Its gradients lie in memory in three ways."""
        return (torch.softmax(q @ k.mT, -1) @ v).transpose(1, 2)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.one(x).reshape(b, n, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.mixed(q, k, v).reshape(b, n, WIDTH)
        q, k, v = (t.view(b, n, 2, 8).transpose(1, 2) for t in self.two(x).split(WIDTH, 2))
        x = x + self.mixed(q, k, v).reshape(b, n, WIDTH)
        one, two = self.pair(x).chunk(2, -1)
        return one.sin() * two.exp()


class Geglu(stock.Module):
    """Gated units of a U-Net: the activation is of the second half, or of the first one."""

    expected = {"activation, product of halves": 2, BIAS: 2}  # noqa: RUF012
    shape = 2, 40, WIDTH

    def __init__(self):
        super().__init__()
        self.one, self.two = (stock.Linear(WIDTH, 2 * WIDTH) for _ in range(2))

    def forward(self, x):
        y, gate = self.one(x).chunk(2, dim=-1)
        gate, z = self.two(y * F.gelu(gate)).chunk(2, dim=-1)
        return F.silu(gate) * z


class Squeezed(stock.Module):
    """Squeeze and excitation, twice: the means keep their dimensions, or they do not."""

    expected = {  # noqa: RUF012
        "batch_norm, activation": 2, "gate of channels": 2, "mean beside another user": 2,
        "counters of batches": 2, MEANS: 2,
    }  # fmt: skip
    shape = 8, 4, 3, 4

    def __init__(self):
        super().__init__()
        self.convs = stock.ModuleList(stock.Conv2d(4, 4, 1, bias=False) for _ in range(2))
        self.norms = stock.ModuleList(stock.BatchNorm2d(4) for _ in range(2))
        self.gates = stock.ModuleList([stock.Conv2d(4, 4, 1), stock.Linear(4, 4, bias=False)])

    def forward(self, x):
        y = F.silu(self.norms[0](self.convs[0](x)))
        y = y * self.gates[0](y.mean((2, 3), keepdim=True)).sigmoid()
        y = F.hardswish(self.norms[1](self.convs[1](y)))
        return y * self.gates[1](y.mean((-1, 2))).cos()[:, :, None, None]


class Tied(stock.Module):
    """A language model: the head multiplies with the table of two embeddings. Words come twice."""

    expected = {TABLE: 2}  # noqa: RUF012
    shape = 2, 7, WIDTH

    def __init__(self):
        super().__init__()
        self.words = stock.Embedding(120, WIDTH, padding_idx=-119)
        self.head = stock.Linear(WIDTH, 120)
        self.head.weight = self.words.weight
        ids = torch.tensor([[4, 1, 4, 119, 0, 1, 4], [1, 1, 7, 0, 119, 0, 8]])
        self.register_buffer("ids", ids, persistent=False)

    def forward(self, x):
        read = self.words(self.ids) + F.embedding(self.ids[:1].int(), self.words.weight)
        return self.head(x + read).sin()


class Denoiser(stock.Module):
    """Blocks of a U-Net: what a norm reads is also added, or goes to another block, or both."""

    expected = {"group_norm, activation": 2, SKIP: 3}  # noqa: RUF012
    shape = 2, 8, 6, 5

    def __init__(self):
        super().__init__()
        self.convs = stock.ModuleList(stock.Conv2d(8, 8, 1, bias=False) for _ in range(4))
        self.norms = stock.ModuleList(stock.GroupNorm(groups, 8) for groups in (2, 4, 8))

    def forward(self, x):
        x = self.convs[0](x)
        y = x + self.convs[1](F.silu(self.norms[0](x)))
        z = y + self.convs[2](self.norms[1](y)).sin()
        z = torch.cat((z, x), 1)[:, ::2] * 1.5
        z = z.contiguous(memory_format=torch.channels_last) + 1
        return self.convs[3](F.gelu(self.norms[2](z)) - z)


MODELS = PostNorm, RmsNorm, Residuals, Inverted, Heads, Geglu, Squeezed, Tied, Denoiser
of_all = pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)


class Operators(TorchDispatchMode):
    """Counts PyTorch's additions of tensors and sums."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name in ("add", "add_", "sum"):
            self.counts[name.rstrip("_")] += 1
        return function(*args, **(kwargs or {}))


def passes(model, call, x):
    """The additions and sums of a backward."""
    y = call(x.detach().requires_grad_()).square().sum()
    with Operators() as heard:
        y.backward()
    model.zero_grad()
    return heard.counts


@of_all
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_as_exact_as_in_stock(build, dtype, device):
    """On kernels, over three draws; and two runs have equal bits."""
    ours, theirs = [], []
    for _ in range(3):
        torch._dynamo.reset()
        model = build().to(device, dtype)
        x = torch.randn(build.shape, device=device, dtype=dtype)
        exact_model, reference = copy.deepcopy(model).double(), copy.deepcopy(model)
        exact = gradients(exact_model, exact_model, x.double())
        theirs.append(errors(reference, reference, x, exact))
        with listen() as found, fastnn.backend("triton"):
            compiled = fastnn.compile(model)
            ours.append(errors(model, compiled, x, exact))
            again = [[g.clone() for g in gradients(model, compiled, x)] for _ in range(2)]
        assert all(torch.equal(one, other) for one, other in zip(*again, strict=True))
        assert fused_in(found) == build.expected
    floor = 4 * torch.finfo(dtype).eps
    for one, other in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        assert sum(one) <= max(2 * sum(other), floor)


@interpreted
@of_all
def test_the_passes_are_gone(build):
    """Autograd adds fewer gradients, by one for each site, and sums no bias of a site."""
    model, x = build(), torch.randn(build.shape)
    want = passes(model, model, x)
    with fastnn.backend("triton"):
        got = passes(model, fastnn.compile(model), x)
    ours = sum(build.expected.get(name, 0) for name in (TWO, MEANS, TABLE, SKIP))
    assert want["add"] - got["add"] >= ours
    assert want["sum"] - got["sum"] >= build.expected.get(BIAS, 0)


@interpreted
@of_all
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sum_of_two_gradients_has_the_bits_of_autograds(build, dtype, monkeypatch):
    model, x = build().to(dtype), torch.randn(build.shape).to(dtype)
    with fastnn.backend("triton"):
        got = [g.clone() for g in gradients(model, fastnn.compile(model), x)]
        for give in ("give_twice", "give_skip"):
            monkeypatch.setattr(_backend, give, lambda *graph: [])
        torch._dynamo.reset()
        want = gradients(model, fastnn.compile(model), x)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@interpreted
def test_second_derivatives_are_those_of_stock():
    for build in MODELS:
        model, x = build(), torch.randn(build.shape)
        found = []
        for call in (model, fastnn.compile(model)):
            x = x.detach().requires_grad_()
            with fastnn.backend("triton"):
                y = call(x)
                (first,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
                leaves = x, *(p for p in model.parameters())
                second = torch.autograd.grad(first.square().sum(), leaves, allow_unused=True)
            found.append([first, *second])
        for one, other in zip(*found, strict=True):
            # The bias of what a batch norm reads has no second derivative but rounding.
            torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)


@interpreted
@pytest.mark.parametrize("wanted", ["head", "words", "all"])
def test_a_table_has_the_gradients_that_are_wanted(wanted, monkeypatch):
    """In two backwards of one graph, with the bits of PyTorch, which makes another table."""
    model, x = Tied(), torch.randn(Tied.shape)

    def call(x):
        read = model.words(model.ids)
        if wanted == "head":
            read = read.detach()
        made = model.head(read + x)
        return read.sin() if wanted == "words" else made

    monkeypatch.setattr(_gradients, "LEAST_OF_TABLES", 1)
    monkeypatch.setattr(_gate, "LEAST_OF_ESTIMATES", 1)
    found = []
    with listen() as heard, simulated(least=10**6):
        for one in (call, fastnn.compile(call)):
            loss = one(x).square().sum()
            with Sizes() as sizes:
                loss.backward(retain_graph=True)
                loss.backward()
            table = model.words.weight
            (first,) = torch.autograd.grad(one(x).square().sum(), table, create_graph=True)
            (second,) = torch.autograd.grad(first.sin().sum(), table)
            found.append((second, table.grad.clone(), first.detach()))
            model.zero_grad()
    assert fused_in(heard) == {TABLE: 1}
    (second, *ours), (second_of_stock, *of_stock) = found
    assert all(map(torch.equal, ours, of_stock))
    # A graph that has a plan is followed anew for it, and its terms are added in another order.
    torch.testing.assert_close(second, second_of_stock, rtol=1e-6, atol=1e-6)
    assert (model.words.weight.shape in sizes.made) == (wanted == "words")


class Sizes(TorchDispatchMode):
    """Collects the shapes of the gradients of tables."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if "embedding_dense_backward" in function._schema.name:
            self.made.add(out.shape)
        return out


@interpreted
@pytest.mark.parametrize("ids, rows, fused", [(30, 120, True), (31, 120, False), (29, 119, False)])
def test_many_rows_and_small_tables_run_as_before(ids, rows, fused, monkeypatch):
    """A table has four rows for each that is looked up, and so many elements."""
    assert _gradients.LEAST_OF_TABLES == 2**23
    monkeypatch.setattr(_gradients, "LEAST_OF_TABLES", 120 * WIDTH)
    monkeypatch.setattr(_gate, "LEAST_OF_ESTIMATES", 1)
    table = torch.randn(rows, WIDTH, requires_grad=True)

    def call():
        return F.linear(F.embedding(torch.arange(ids) % 4, table), table).sum()

    with simulated(least=10**6), listen() as found:
        loss = fastnn.compile(call)()
        with Sizes() as sizes:
            loss.backward()
    assert fused_in(found) == {TABLE: 1}
    assert (table.shape not in sizes.made) == fused


@interpreted
def test_small_sites_run_as_before():
    """Below the floor of the op, the product itself gives its bias the gradient."""
    model, x = PostNorm(), torch.randn(PostNorm.shape)
    graph = rewritten(model, x)
    with simulated(least=10**6):
        floors = [_gated.floor_of(record) for _, record in _gated.calls_of_ours(graph)]
        small = _gated.lean(graph, floors)
        assert "linear_apart" in graph.code and "linear_apart" not in small.code
        assert "input_bias" not in small.code
        want = gradients(model, model, x)
        got = gradients(model, fastnn.compile(model), x)
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@interpreted
def test_means_of_small_planes_run_as_before():
    model, x = Squeezed(), torch.randn(Squeezed.shape)
    graph = rewritten(model, x)
    with simulated(least=10**6):
        floors = [_gated.floor_of(record) for _, record in _gated.calls_of_ours(graph)]
        small = _gated.lean(graph, floors)
    assert "means = True" in graph.code and "means" not in small.code
    with simulated(least=10**6):
        want = gradients(model, model, x)
        got = gradients(model, fastnn.compile(model), x)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@interpreted
def test_norms_of_small_inputs_run_as_before():
    model, x = Denoiser(), torch.randn(Denoiser.shape)
    graph = rewritten(model, x)
    with simulated(least=10**6):
        floors = [_gated.floor_of(record) for _, record in _gated.calls_of_ours(graph)]
        small = _gated.lean(graph, floors)
        assert graph.code.count("skip = True") == 3 and "skip" not in small.code
        assert small.code.count("functional.group_norm(") == 1
        want = gradients(model, model, x)
        got = gradients(model, fastnn.compile(model), x)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@interpreted
def test_a_part_that_nobody_reads_has_no_gradient():
    """The others have theirs, and so has the bias, in as many calls as plans need to replay."""
    layer = stock.Linear(WIDTH, 3 * WIDTH)

    def call(x):
        one, _, three = layer(x).chunk(3, -1)
        return one.sin() * three

    x = torch.randn(9, WIDTH)
    want = [results(call, x)[-1], *(p.grad.clone() for p in layer.parameters())]
    with listen() as found, fastnn.backend("triton"):
        compiled = fastnn.compile(call)
        for _ in range(4):
            layer.zero_grad()
            got = [results(compiled, x)[-1], *(p.grad for p in layer.parameters())]
            for one, other in zip(got, want, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert fused_in(found) == {BIAS: 1}


@interpreted
@pytest.mark.parametrize("frozen", ["bias", "weight", "all"])
def test_frozen_parameters_get_no_gradient(frozen):
    model, x = PostNorm(), torch.randn(PostNorm.shape)
    for name, p in model.mix.named_parameters():
        p.requires_grad_(frozen not in (name, "all"))
    reference = copy.deepcopy(model)
    with listen() as found, fastnn.backend("triton"):
        fastnn.compile(model)(x).square().sum().backward()
    reference(x).square().sum().backward()
    assert fused_in(found)[BIAS] == (3 if frozen == "weight" else 2)
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


# ---- Where it must not happen --------------------------------------------------------------------

LINEAR, OTHER, NORM = stock.Linear(WIDTH, WIDTH), stock.Linear(WIDTH, WIDTH), stock.LayerNorm(WIDTH)
FROZEN = stock.Linear(WIDTH, WIDTH)
FROZEN.bias.requires_grad_(False)
CHANNELS = stock.BatchNorm2d(4, track_running_stats=False)


def normed(x):
    return NORM(x + x.sin())


def leaves(x):
    y = normed(x)
    return y, y.cos() + y.sin()


def leaves_as_a_view(x):
    y = normed(x)
    return y.cos() * y.sin(), y.view(-1)


def is_written(x):
    y = normed(x)
    z = y * 2
    y += 1
    return z + y * 3


def is_written_by_a_view(x):
    y = normed(x)
    z = y * 2 + y * 3
    y.view(-1).mul_(2)
    return z


def is_written_by_itself(x):
    y = normed(x)
    y.contiguous().mul_(2)  # y is contiguous, so this is y
    return LINEAR(y) + y.cos()


def has_one_gradient(x):
    y = normed(x)
    return y.cos() + y.detach().sin()


def has_one_user(x):
    y = normed(x).cos()
    return y.sin() + y.exp()


def is_checkpointed(x):
    y = normed(x)
    return torch.utils.checkpoint.checkpoint(torch.sin, y, use_reentrant=False) + y.cos()


def product_is_read(x):
    z = LINEAR(x)
    return NORM(z + x.sin()) * z.cos()


def product_leaves(x):
    z = LINEAR(x)
    return NORM(z + x.sin()), z


def product_without_bias(x):
    return NORM(F.linear(x, LINEAR.weight) + x.sin())


def product_of_frozen_bias(x):
    return NORM(FROZEN(x) + x.sin())


def product_before_an_activation(x):
    return NORM(LINEAR(x).cos() + x.sin())


def product_in_columns(x):
    return NORM(LINEAR(x).view(WIDTH, -1).t() + x.sin())


def parts_of_other_rows(x):
    one, two = LINEAR(x).chunk(2, 0)
    return one.sin() * two


def many_parts(x):
    a, b, c, d = LINEAR(x).chunk(4, -1)
    return a.sin() * b.cos() + c * d


def squeezed(x, change=None, dims=(2, 3)):
    y = F.silu(CHANNELS(x.view(4, 4, 4, 4)))
    if change is not None:
        change(y)
    return y, y.mean(dims)


def means_of_other_dimensions(x):
    y, means = squeezed(x, dims=(1, 2))
    return y.cos() + means.exp().sum()


def means_after_a_write(x):
    y, means = squeezed(x, lambda y: y.view(-1).mul_(2))
    return y.cos() * means[:, :, None, None]


def means_of_what_leaves(x):
    y, means = squeezed(x)
    return y, means.cos()


def means_alone(x):
    return squeezed(x)[1].cos()


def halves_of_rows(x):
    y, gate = LINEAR(x).chunk(2, 0)
    return y * F.gelu(gate)


def halves_of_a_product_that_is_read(x):
    z = LINEAR(x)
    y, gate = z.chunk(2, -1)
    return y * F.gelu(gate) + z.sum()


def unequal_parts(x):
    a, b = LINEAR(x).split((5, WIDTH - 5), -1)
    return a.sum() * b.sin()


def parts_without_bias(x):
    one, two = F.linear(x, LINEAR.weight).chunk(2, -1)
    return one.sin() * two


def parts_of_frozen_bias(x):
    one, two = FROZEN(x).chunk(2, -1)
    return one.sin() * two


def parts_beside_another_user(x):
    z = LINEAR(x)
    one, two = z.chunk(2, -1)
    return one.sin() * two + z.sum()


TABLE_OF_WORDS = stock.Parameter(torch.randn(WIDTH * WIDTH, WIDTH))


def words(x, **options):
    return F.embedding(torch.arange(8), TABLE_OF_WORDS, **options).sum(0) + x


def table_that_is_added(x):
    return words(x) + (TABLE_OF_WORDS + 1)[:WIDTH] * F.linear(x, TABLE_OF_WORDS).square().mean()


def table_that_is_sliced(x):
    return F.linear(words(x) + TABLE_OF_WORDS[:WIDTH], TABLE_OF_WORDS)


def table_by_frequency(x):
    return F.linear(words(x, scale_grad_by_freq=True), TABLE_OF_WORDS)


def table_that_is_multiplied_before(x):
    return words(F.linear(x, TABLE_OF_WORDS)[:, :WIDTH])


def table_times_itself(x):
    return F.linear(TABLE_OF_WORDS, TABLE_OF_WORDS)[:WIDTH, :WIDTH] + words(x)


def table_times_itself_later(x):
    return words(x) + F.linear(TABLE_OF_WORDS, TABLE_OF_WORDS)[:WIDTH, :WIDTH]


GROUPS = stock.GroupNorm(2, 8)


def skipped(x, change=None):
    z = torch.cat((x, x.cos()), 1).view(8, 8, 8) * 2
    if change is not None:
        change(z)
    return F.silu(GROUPS(z)), z


def norm_of_what_leaves(x):
    y, z = skipped(x)
    return y + z.sin(), z


def norm_of_what_is_written(x):
    y, z = skipped(x, lambda z: z.view(-1).mul_(2))
    return y + z.sin()


def norm_of_an_input(x):
    x = x.view(4, 8, 8)
    return GROUPS(x).exp() * x.sin()


def norm_of_one_user(x):
    return skipped(x)[0].exp()


def norm_after_the_other_user(x):
    z = x.view(4, 8, 8).sin()
    return z.exp() * GROUPS(z)


def norm_of_what_is_detached(x):
    y, z = skipped(x)
    return y.exp() * z.detach()


def norm_of_rows_that_are_columns(x):
    z = x.sin().view(4, 8, 8).transpose(1, 2) + 0
    return GROUPS(z).exp() * z


def norm_of_a_part(x):
    one, two = (x * 2).view(2, 2, 8, 8).unbind()
    y = GROUPS(one).exp() * one
    return y + two


REFUSED = (
    norm_of_what_leaves, norm_of_what_is_written, norm_of_an_input, norm_of_one_user,
    norm_after_the_other_user, norm_of_what_is_detached, norm_of_rows_that_are_columns,
    norm_of_a_part,
    table_that_is_added, table_that_is_sliced, table_by_frequency,
    table_that_is_multiplied_before, table_times_itself, table_times_itself_later,
    means_of_other_dimensions, means_after_a_write, means_of_what_leaves, means_alone,
    parts_of_other_rows, halves_of_rows, halves_of_a_product_that_is_read, many_parts,
    unequal_parts, parts_without_bias, parts_of_frozen_bias, parts_beside_another_user,
    leaves, leaves_as_a_view, is_written, is_written_by_a_view, is_written_by_itself,
    has_one_gradient, has_one_user, is_checkpointed, product_is_read, product_leaves,
    product_without_bias, product_of_frozen_bias, product_before_an_activation,
    product_in_columns,
)  # fmt: skip


def results(call, x):
    x = x.detach().requires_grad_()
    out = call(x)
    out = out if isinstance(out, tuple) else (out,)
    sum(t.square().sum() for t in out).backward()
    return *out, x.grad


@interpreted
@pytest.mark.parametrize("call", REFUSED, ids=lambda call: call.__name__)
def test_where_it_must_not_happen(call):
    x = torch.randn(WIDTH, WIDTH)
    want = results(call, x)
    with listen() as found, fastnn.backend("triton"):
        got = results(fastnn.compile(call), x)
    assert not {BIAS, TWO, MEANS, TABLE, SKIP} & {f.rule for f in found}
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "kind", ["hook", "retained", "module hook", "hook, norm", "retained, norm"]
)
def test_who_watches_a_gradient_sees_all_of_it(kind):
    """A hook on a result with two users gets the sum, as in PyTorch."""
    kind, _, reads = kind.partition(", ")
    model, seen = PostNorm(), []
    if kind == "module hook":
        model.norms[0].register_full_backward_hook(lambda m, i, o: seen.append(o[0].clone()))

    def call(x):
        y = x.view(4, 8, 8).sin() if reads else normed(x)
        if kind == "hook":
            y.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
        if kind == "retained":
            y.retain_grad()
            seen.append(y)
        return GROUPS(y).exp() + y.exp() if reads else OTHER(y).cos() + y.exp()

    call = model if kind == "module hook" else call
    x = torch.randn(WIDTH, WIDTH)
    *_, want = results(call, x)
    with fastnn.backend("triton"):
        *_, got = results(fastnn.compile(call), x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    theirs, ours = (t.grad if kind == "retained" else t for t in seen)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
