"""Plans of whole compiled graphs: a call that replays one does what the graph does.

Each case runs step by step beside the same graph without plans, by both runners. Results,
gradients, buffers and the numbers that the next draw gives must have equal bits.
"""

import contextlib
import copy
import gc
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastnn
from fastnn import _native, _record
from fastnn._compiler import _planned
from fastnn.kernels._launch import Kernel
from tests.marks import interpreted
from tests.test_native import runner_module

pytestmark = interpreted


@pytest.fixture(params=["python", "native"])
def runner(request):
    torch._dynamo.reset()
    module = runner_module() if request.param == "native" else None
    with _native.using(module), _record.using(True):
        yield request.param
    torch._dynamo.reset()


@pytest.fixture(params=["auto", "triton"])
def mode(request):
    with fastnn.backend(request.param):
        yield request.param


def replayed(call, **options):
    return fastnn.compile(call, options={"replay": True}, **options)


def is_planned(result):
    return "_CompiledGraph" in type(result.grad_fn).__name__ or (
        result.grad_fn is not None and result.grad_fn.name().startswith("_CompiledGraph")
    )


class Block(nn.Module):
    """A transformer block with three dropouts."""

    def __init__(self, p=0.1):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.p = p

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = self.norms[0](x + F.dropout(self.out(y), self.p, self.training))
        y = F.dropout(F.gelu(self.up(x)), self.p, self.training)
        return self.norms[1](x + F.dropout(self.down(y), self.p, self.training))

    @staticmethod
    def data():
        return (torch.randn(2, 4, 16, requires_grad=True),)


class Layer(nn.Module):
    """A layer whose gradients have derivatives."""

    def __init__(self, p):
        super().__init__()
        self.up, self.norm, self.p = nn.Linear(16, 16), nn.LayerNorm(16), p

    def forward(self, x):
        return self.norm(x + F.dropout(F.gelu(self.up(x)), self.p, self.training))

    data = staticmethod(Block.data)


class Convolutions(nn.Module):
    """Batch norms, whose statistics are buffers, before and after an addition."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))

    def forward(self, x):
        y = F.relu(self.norms[0](self.convs[0](x)))
        return F.relu(self.norms[1](self.convs[1](y)) + x).mean((2, 3))

    @staticmethod
    def data():
        return (torch.randn(2, 3, 4, 4),)


class Language(nn.Module):
    """Tied embeddings, and two results of which only the first gets a gradient."""

    def __init__(self):
        super().__init__()
        self.tokens, self.block = nn.Embedding(11, 16), Block()
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens, targets):
        logits = self.head(self.block(self.tokens(tokens)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), logits

    @staticmethod
    def data():
        return torch.randint(11, (2, 4)), torch.randint(11, (2, 4))


class Views(nn.Module):
    """Saves views of its inputs, and its result is a view."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        y = x.transpose(0, 1).matmul(self.weight)
        return (y * y.exp() * x.flatten()[:1]).view(-1, 2).unbind(1)[0].unsqueeze(0)

    @staticmethod
    def data():
        return (torch.randn(4, 3, requires_grad=True),)


class Cast(nn.Module):
    """Autocast, of which a part is switched off."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = self.norm(self.one(x))
            with torch.autocast("cpu", enabled=False):
                y = self.two(y.float())
            return self.one(y).float().softmax(-1)

    @staticmethod
    def data():
        return (torch.randn(3, 8, requires_grad=True),)


MODELS = Block, Convolutions, Language, Views, Cast


def step(model, call, data, number, backward=None):
    """(results, gradients, buffers, what the next draw gives) of one training step."""
    torch.manual_seed(number)
    inputs = [t.detach().clone().requires_grad_(t.requires_grad) for t in data]
    out = call(*inputs)
    results = out if isinstance(out, tuple) else (out,)
    if backward is None:
        results[0].square().sum().backward()
    else:
        backward(results)
    parameters = [*model.parameters(), *(t for t in inputs if t.requires_grad)]
    found = [p.grad for p in parameters]
    model.zero_grad()
    buffers = [b.clone() for b in model.buffers()]
    return [*(r.detach() for r in results), *found, *buffers, torch.rand(1)], results


def versions_counted(call, model):
    """How far the versions of the buffers of `model` count in a call."""
    before = [b._version for b in model.buffers()]
    call()
    return [b._version - v for b, v in zip(model.buffers(), before, strict=True)]


def equal(ours, theirs):
    assert len(ours) == len(theirs)
    for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if other is None:
            assert one is None, i
        else:
            assert one.stride() == other.stride(), i
            assert torch.equal(one, other), (i, (one - other).abs().max())


def close(ours, theirs):
    """But for the order in which autograd adds up: it depends on where the nodes are."""
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def beside(model, *backwards, compiler=None, context=contextlib.nullcontext, compare=equal):
    """Run steps of `model` with and without plans; the results of the last one, with plans."""
    compiler = compiler or replayed
    plain = copy.deepcopy(model)
    data = model.data()
    with _record.using(False):
        compiled = compiler(plain)
        with context():
            want = [step(plain, compiled, data, i, b)[0] for i, b in enumerate(backwards)]
    torch._dynamo.reset()
    compiled = compiler(model)
    with context():
        for i, b in enumerate(backwards):
            found, results = step(model, compiled, data, i, b)
            compare(found, want[i])
    return results


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_five_steps_have_the_bits_of_a_graph_without_plans(build, mode, runner):
    """But a result that may get a gradient later, and PyTorch's own dropout, exclude each other."""
    if build is Cast and mode == "triton":
        pytest.skip("no kernel takes parameters of another dtype, and a forced one raises")
    results = beside(build(), *[None] * 5)
    assert is_planned(results[0]) == ((build, mode) != (Language, "auto"))


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_evaluation_is_planned(build, runner):
    model = build().eval()
    plain, data = copy.deepcopy(model), model.data()
    with torch.no_grad(), fastnn.backend("auto" if build is Cast else "triton"):
        with _record.using(False):
            want = replayed(plain)(*data)
        torch._dynamo.reset()
        compiled = replayed(model)
        for _ in range(4):
            found = compiled(*data)
            for one, other in zip(found, want, strict=True):
                assert torch.equal(one, other)
    assert plans_of_graphs() > 0


def plans_of_graphs():
    gc.collect()
    return sum(len(plans) for graph in _record.planned for plans in graph.ready.values())


def cast(model):
    compiled = replayed(model)

    def call(*data):
        with torch.autocast("cpu", torch.bfloat16):
            return compiled(*data)

    return call


def test_autocast_around_the_forward(mode, runner):
    assert is_planned(beside(Block(), *[None] * 4, compiler=cast)[0])


def test_autocast_around_both_passes(mode, runner):
    results = beside(Block(), *[None] * 4, context=lambda: torch.autocast("cpu", torch.bfloat16))
    assert is_planned(results[0])


def strided(results):
    results[0].transpose(0, 1).contiguous().transpose(0, 1).square().sum().backward()


def expanded(results):
    results[0].sum().backward()


def both(results):
    (results[0] + results[1].square().mean()).backward()


def second(results):
    results[1].square().mean().backward()


def of_gradients(results):
    inputs = [n for n in leaves(results[0].grad_fn) if n.requires_grad]
    found = torch.autograd.grad(results[0].square().sum(), inputs, create_graph=True)
    sum(g.square().sum() for g in found).backward()


def leaves(node):
    """The tensors at the ends of a graph of autograd, in the order in which it is found."""
    found, seen, todo = [], set(), [node]
    while todo:
        node = todo.pop(0)
        if node in seen or node is None:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo += [n for n, _ in node.next_functions]
    return found


@pytest.mark.parametrize("last", [strided, expanded], ids=lambda f: f.__name__)
def test_gradients_of_other_strides(last, mode, runner):
    """The plan was made for other strides: the gradient is copied."""
    assert is_planned(beside(Block(), None, None, None, last, None)[0])


@pytest.mark.parametrize("last", [both, second], ids=lambda f: f.__name__)
def test_other_results_get_gradients_later(last, runner):
    """The graph runs again, with the random numbers that its forward drew."""
    with fastnn.backend("triton"):
        assert is_planned(beside(Language(), None, None, None, last, None)[0])


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_second_derivatives_later(p, runner):
    """The graph runs again. Before, its plan was replayed."""
    with fastnn.backend("triton"):
        steps = None, None, None, of_gradients, None
        assert is_planned(beside(Layer(p), *steps, compare=close)[0])


def test_a_plan_follows_which_results_get_gradients(runner):
    """After a call in which another result got one, the next plan is made for both."""
    model = Language()
    with (
        fastnn.backend("triton"),
        mock.patch.object(
            _planned.GraphPlan, "run_again", autospec=True, side_effect=_planned.GraphPlan.run_again
        ) as again,
    ):
        assert is_planned(beside(model, None, None, None, *[both] * 4)[0])
    assert again.call_count == 1


def test_a_graph_whose_results_take_turns_has_no_plan_in_the_end(runner):
    """A new plan for every call would cost more than it saves."""
    turns = [None, None, None, *[both, None] * 4]
    with fastnn.backend("triton"):
        assert not is_planned(beside(Language(), *turns)[0])


def test_second_derivatives_from_the_start(runner):
    """A graph whose backward is differentiated gets no plan."""
    assert not is_planned(beside(Layer(0.0), *[of_gradients] * 4)[0])


def planned_call(model, *data, steps=3):
    """A result of `model`, of which a plan was replayed."""
    compiled = replayed(model)
    for _ in range(steps):
        out = compiled(*data)
        first = out[0] if isinstance(out, tuple) else out
        first.square().sum().backward()
    out = compiled(*data)
    assert is_planned(out[0] if isinstance(out, tuple) else out)
    return out


def test_a_graph_that_writes_its_buffers_says_that_it_has_no_second_derivative(runner):
    model = Convolutions()
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    out = planned_call(model, x)
    with pytest.raises(RuntimeError, match="backward of a compiled graph is differentiated"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_backward_twice(runner):
    x = torch.randn(2, 4, 16)
    out = planned_call(Block(), x).sum()
    parameters = leaves(out.grad_fn)
    one = torch.autograd.grad(out, parameters, retain_graph=True)
    two = torch.autograd.grad(out, parameters)
    equal(one, two)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out, parameters)


def test_a_result_that_is_overwritten_is_noticed(runner):
    """The backward reads it, so autograd raises as in eager mode; else nothing happens."""

    class Exp(nn.Module):
        def forward(self, x):
            return x.exp(), x + 1

    x = torch.randn(3, 4, requires_grad=True)
    compiled = replayed(Exp())
    for _ in range(3):
        sum(o.square().sum() for o in compiled(x)).backward()
    one, two = compiled(x)
    assert is_planned(one)
    two.mul_(2)
    (one + two).sum().backward()
    one, two = compiled(x)
    one.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (one + two).sum().backward()


class Squares(nn.Module):
    """Saves its input, and also a view of it."""

    def forward(self, x):
        return x.t().square().matmul(x.square())


def test_an_input_that_is_overwritten_is_noticed(runner):
    x = torch.randn(4, 4, requires_grad=True)
    out = planned_call(Squares(), x)
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class Passed(nn.Module):
    def forward(self, x):
        return x.view(-1), x * 2


class Halves(nn.Module):
    def forward(self, x):
        return (x * 2).chunk(2)


class InPlace(nn.Module):
    """Writes into an input that requires no gradient."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x, sums):
        sums += x.sum(0)
        return x * self.weight * sums


@pytest.mark.parametrize("build", [Passed, Halves], ids=lambda build: build.__name__)
def test_results_that_share_memory_get_no_plan(build, runner):
    """They may be written in place: autograd would have to know whose memory they show."""
    x = torch.randn(4, 3, requires_grad=True)
    compiled = replayed(build())
    for _ in range(4):
        outs = compiled(x)
        sum(o.square().sum() for o in outs).backward()
        assert not any(map(is_planned, outs))


def test_an_input_that_the_graph_writes(runner):
    model, x, sums = InPlace(), torch.randn(3, 4), torch.zeros(4)
    compiled, want = replayed(model), torch.zeros(4)
    for _ in range(5):
        version = sums._version
        out = compiled(x, sums)
        out.sum().backward()
        want += x.sum(0)
        assert torch.equal(sums, want)
        assert torch.equal(out, x * model.weight * want)
        assert sums._version > version
        assert not is_planned(out)  # in a later call the inputs may share memory


def test_an_address_that_kernels_do_not_like(runner):
    """The plan does not fit, so the graph runs as always."""
    model, whole = Block(0.0), torch.randn(2 * 4 * 16 + 1)
    with fastnn.backend("triton"):
        fits, shifted = whole[:-1].view(2, 4, 16), whole[1:].view(2, 4, 16)
        want = [torch.nn.functional.layer_norm(t, (16,)) for t in (fits, shifted)]
        compiled = replayed(nn.LayerNorm(16))
        for t in (fits, fits, fits, shifted, fits):
            out = compiled(t)
            out.sum().backward()
            torch.testing.assert_close(out, want[t is shifted])
            assert is_planned(out) or t is shifted or out is not None
        assert is_planned(out)
    del model


def test_gradients_add_up_over_calls(runner):
    """Two forwards before their backwards: each node has tensors of its own."""
    model = Block()
    xs = [torch.randn(2, 4, 16) for _ in range(2)]
    planned_call(model, xs[0])
    plain = copy.deepcopy(model)
    model.zero_grad(), plain.zero_grad()
    compiled = replayed(model)
    torch.manual_seed(7)
    outs = [compiled(x).square().sum() for x in xs]
    assert all(is_planned(o.grad_fn.next_functions[0][0].next_functions[0][0]) for o in ()) or outs
    for o in outs:
        o.backward()
    torch.manual_seed(7)
    with _record.paused():
        compiled = replayed(plain)
        sum(compiled(x).square().sum() for x in xs).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_hooks_of_saved_tensors(runner):
    """Under them the graph runs as always, whether they are there from the start or come later."""
    model, x = Block(0.0), torch.randn(2, 4, 16)
    parameters = [*model.parameters()]
    want = torch.autograd.grad(planned_call(model, x).square().sum(), parameters)
    compiled = replayed(model)
    for _ in range(3):
        with torch.autograd.graph.save_on_cpu():
            out = compiled(x)
        assert not is_planned(out)
        equal(torch.autograd.grad(out.square().sum(), parameters), want)


def test_checkpoints_of_every_second_block(runner):
    """All blocks run one compiled graph. What a checkpoint saves does not change within a step."""
    model = Layer(0.1)
    compiled, steps = replayed(model), []
    for compared in (compiled, model):
        for i in range(5):
            torch.manual_seed(i)
            x = torch.randn(2, 4, 16, requires_grad=True)
            y = checkpoint(compared, x, use_reentrant=False)
            out = compared(y)
            out.square().sum().backward()
            steps.append(x.grad)
        assert is_planned(out) == (compared is compiled)
    for one, other in zip(steps[:5], steps[5:], strict=True):
        torch.testing.assert_close(one, other)


def test_hooks_of_parameters_run(runner):
    model, x, heard = Block(), torch.randn(2, 4, 16), []
    planned_call(model, x)
    model.out.weight.register_hook(lambda g: heard.append(g.clone()))
    out = replayed(model)(x)
    model.zero_grad()
    out.square().sum().backward()
    assert len(heard) == 1
    assert torch.equal(heard[0], model.out.weight.grad)


def test_batched_gradients(runner):
    """The plan is replayed for each gradient of a batch."""
    model, x = Block(0.0).eval(), torch.randn(2, 4, 16, requires_grad=True)
    out = planned_call(model, x)
    many = torch.randn(3, *out.shape)
    found = torch.autograd.grad(out, x, many, is_grads_batched=True)[0]
    for i in range(3):
        want = torch.autograd.grad(model(x), x, many[i])[0]
        torch.testing.assert_close(found[i], want)


def test_memory_is_let_go_during_the_backward(runner):
    """What a node saved is gone when its backward is over, though the node lives."""
    model, x = Block(0.0), torch.randn(2, 4, 16)
    node = planned_call(model, x).grad_fn
    out = replayed(model)(x)
    node = out.grad_fn
    out.square().sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()
    del node


class Remembers(nn.Module):
    """Calls an operator that is not PyTorch's."""

    def forward(self, x):
        return torch.ops.fastnn_test.remember(x) * 2


class Powers(nn.Module):
    """Two results of a product under autocast."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        y = self.linear(x)
        return y.tanh(), y.exp()


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("outside", [False, True])
def test_autocast_where_a_graph_runs_again(k, outside, runner):
    """The forward has the autocast that it had, and the backward that of its own place."""
    model, x = Powers(), torch.randn(3, 8, requires_grad=True)

    def gradient(compiled, k, outside):
        with torch.autocast("cpu", torch.bfloat16):
            outs = compiled(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            return torch.autograd.grad(outs[k].float().square().sum(), x)[0], outs

    with _record.using(False):
        want, _ = gradient(replayed(model), k, outside)
    torch._dynamo.reset()
    compiled = replayed(model)
    for _ in range(3):
        gradient(compiled, 0, False)
    found, outs = gradient(compiled, k, outside)
    assert is_planned(outs[0])
    assert torch.equal(found, want)


# Dynamo reads the attribute.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("create", [False, True])
def test_inputs_that_are_computed_from_others_where_a_graph_runs_again(create, runner):
    """Each input has its own gradient, and autograd follows them to each other once."""

    def call(x, y):
        return (x * y).sin(), (x + y * y).exp()

    def gradient(call, k, create):
        x = torch.full((3,), 0.5, requires_grad=True)
        outs = call(x, (x * 2).tanh())
        (found,) = torch.autograd.grad(outs[k].sum(), x, create_graph=create)
        if create:
            (found,) = torch.autograd.grad(found.sum(), x)
        return found, outs[0]

    compiled = replayed(call)
    for _ in range(4):
        gradient(compiled, 0, False)
    found, out = gradient(compiled, 1, create)
    assert is_planned(out)
    torch.testing.assert_close(found, gradient(call, 1, create)[0])


def test_versions_of_buffers_count(runner):
    """Also where one call of the graph counts up several buffers."""
    model, x = Convolutions(), torch.randn(2, 3, 4, 4)
    with _record.using(False):
        want = versions_counted(lambda: replayed(model)(x), model)
    torch._dynamo.reset()
    planned_call(model, x)
    found = versions_counted(lambda: replayed(model)(x), model)
    assert list(map(bool, found)) == list(map(bool, want))
    assert any(found)


def test_a_written_input_that_shares_memory_with_a_saved_one(runner):
    """Autograd raises, as in eager mode."""

    def call(x, sums):
        y = x * x
        sums += 1
        return y

    compiled = replayed(call)
    for _ in range(4):
        x = torch.ones(4, requires_grad=True)
        out = compiled(x, torch.zeros(4))
        out.sum().backward()
        assert torch.equal(x.grad, torch.full((4,), 2.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        compiled(x, x.detach()).sum().backward()


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, dy):
        return None


def test_results_without_any_gradient(runner):
    """The inputs have none, before there is a plan and after it."""
    model, x = Layer(0.0), torch.randn(2, 4, 16)
    compiled = replayed(model)
    for i in range(5):
        out = compiled(x)
        if i == 2:
            out.sum().backward()
            model.zero_grad()
        else:
            NoGradient.apply(out).backward()
            assert all(p.grad is None for p in model.parameters())
    assert is_planned(out)


def test_a_gradient_that_is_a_negated_view(runner):
    model, x = nn.LayerNorm(16), torch.randn(2, 4, 16, requires_grad=True)
    with fastnn.backend("triton"):
        dy = torch.randn(2, 4, 16)
        out = planned_call(model, x)
        (want,) = torch.autograd.grad(out, x, -dy, retain_graph=True)
        (found,) = torch.autograd.grad(out, x, torch._neg_view(dy))
    assert torch.equal(found, want)


def test_layers_of_a_recurrent_network(runner):
    class Recurrent(nn.Module):
        data = staticmethod(lambda: (torch.randn(3, 2, 4, requires_grad=True),))

        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 5, 2)

        def forward(self, x):
            return self.lstm(x)[0]

    with torch._dynamo.config.patch(allow_rnn=True):
        beside(Recurrent(), *[None] * 4)


class Effects(nn.Module):
    """Updates statistics and draws numbers, of which nobody uses the result."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x):
        self.norm(x)
        torch.rand_like(x)
        return self.linear(x) * torch.rand_like(x)

    data = staticmethod(lambda: (torch.randn(3, 8),))


def test_effects_of_calls_whose_results_nobody_uses(mode, runner):
    assert is_planned(beside(Effects(), *[None] * 5)[0])


def test_replay_is_wanted_only_where_it_is_asked_for(runner):
    model, x = Layer(0.0), torch.randn(2, 4, 16)
    for replay in (True, False):
        torch._dynamo.reset()
        compiled = fastnn.compile(model, **({"options": {"replay": True}} if replay else {}))
        for _ in range(4):
            out = compiled(x)
            out.sum().backward()
        assert is_planned(out) == replay


def turned(x):
    y = x * 2
    y.t_()
    return y.t() @ x


def widened(x):
    y = x * 2
    y.unsqueeze_(0)
    return y.squeeze(0) * x


def from_an_offset(x):
    return x.as_strided((2, 2), (2, 1), 8) * 2


def drops(x):
    return F.dropout(torch.fft.fft(x).abs(), 0.5)


def looks_up(x):
    return F.embedding(torch.tensor([0, 1]), x * 2, sparse=True)


@pytest.mark.parametrize("call", [turned, widened, from_an_offset, drops, looks_up])
def test_what_a_plan_could_not_replay(call, runner):
    """Sizes changed in place, places in memory, refusals before a draw, and sparse gradients."""

    def steps(call):
        found = []
        for i in range(5):
            base = torch.arange(48.0)
            x = base[4 * i : 4 * i + 16].view(4, 4).requires_grad_()
            torch.manual_seed(0)
            out = call(x)
            out.square().sum().backward()
            found.append((out.detach(), x.grad.to_dense(), torch.rand(1)))
        return found

    ours = steps(replayed(call))
    for one, other in zip(ours, steps(call), strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b)


def test_sparse_gradients_of_results(runner):
    """Before a plan and after it."""
    x = torch.randn(5, 3, requires_grad=True)
    compiled = replayed(lambda x: x * 2)
    for sparse in (True, False, False, False, True, True):
        out = compiled(x)
        rows = F.embedding(torch.tensor([0, 1]), out, sparse=sparse).sum()
        (found,) = torch.autograd.grad(rows, x)
        want = torch.zeros(5, 3)
        want[:2] = 2
        assert torch.equal(found.to_dense(), want)


class Decays(nn.Module):
    """Writes into a parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        with torch.no_grad():
            self.weight.mul_(0.5)
        return x * self.weight


def test_a_parameter_is_written_once_per_call(runner):
    """A recording runs on the parameters themselves, so it ends before it writes into one."""
    model, x = Decays(), torch.ones(3, 4)
    compiled = replayed(model)
    for i in range(5):
        out = compiled(x)
        out.sum().backward()
        assert torch.equal(model.weight, torch.full((4,), 0.5 ** (i + 1)))
        assert not is_planned(out)


@pytest.mark.parametrize("size", [8, 2**19])
def test_a_buffer_is_written_once_per_call(size, runner):
    """A recording ends before it writes into a large input, and writes into copies of others."""

    def call(x, cache):
        cache[0] = x
        return cache.sum(0) * x

    compiled, cache = replayed(call), torch.zeros(2, size)
    for i in range(5):
        with torch.no_grad():
            out = compiled(torch.full((size,), float(i)), cache)
        assert torch.equal(cache, torch.tensor([[float(i)], [0.0]]).expand(2, size))
        assert torch.equal(out, torch.full((size,), float(i) ** 2))
    assert plans_of_graphs() == 0


def test_large_statistics_are_updated_once_per_call(runner):
    model = nn.BatchNorm1d(270_000)
    plain, x = copy.deepcopy(model), torch.randn(2, 270_000)
    compiled = replayed(model)
    for _ in range(4):
        with fastnn.backend("torch"):  # a kernel would take minutes in the interpreter
            compiled(x).sum().backward()
        plain(x)
        torch.testing.assert_close(model.running_mean, plain.running_mean)


def test_complex_numbers(runner):
    """A conjugated view shows the same memory as its base, with other values."""
    x = torch.randn(3, 4, dtype=torch.complex64, requires_grad=True)
    w = torch.randn(4, dtype=torch.complex64)

    def call(x, w):
        return (x * w).abs()

    compiled = replayed(call)
    (want,) = torch.autograd.grad(call(x, w).sum(), x)
    for _ in range(4):
        (found,) = torch.autograd.grad(compiled(x, w).sum(), x)
        assert torch.equal(found, want)


class Indexed(nn.Module):
    """Reads a table at places that are given, as relative positions do."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 4))

    def forward(self, places):
        return self.table[places].exp()

    data = staticmethod(lambda: (torch.randint(5, (3, 3)),))


def test_integers_as_indices(runner):
    assert is_planned(beside(Indexed(), *[None] * 4)[0])


@pytest.mark.parametrize("steps", [3, 6])
def test_draws_where_a_graph_runs_again_and_its_ops_have_plans(steps, runner):
    """The ops have plans of their own from calls of the same sizes. These would draw anew."""

    class Twice(nn.Module):
        data = staticmethod(Block.data)

        def forward(self, x):
            y = F.dropout(x, 0.5, self.training)
            return y, F.dropout(y * 2, 0.25, self.training)

    def first(results):
        results[0].square().sum().backward()

    def last(results):
        results[1].square().sum().backward()

    with fastnn.backend("triton"):
        beside(Twice(), *[first] * steps, last, first, last)


def test_sizes_that_depend_on_values(runner):
    """They are captured, but not replayed: the next call may have others."""
    compiled = replayed(lambda x: x[x > 0].square().sum(), fullgraph=True)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for i in range(5):
            torch.manual_seed(i)
            x = torch.randn(9, requires_grad=True)
            out = compiled(x)
            out.backward()
            torch.testing.assert_close(out, x.clamp_min(0).square().sum())
            torch.testing.assert_close(x.grad, 2 * x.detach().clamp_min(0))
            assert not is_planned(out)


def test_each_mode_has_plans_of_its_own(runner):
    """A plan with kernels is not replayed where PyTorch is to run."""
    model, x = nn.LayerNorm(16), torch.randn(2, 4, 16)
    compiled, launches = replayed(model), []
    launch = Kernel.__call__

    def counted(self, *args, **kwargs):
        launches.append(self)
        return launch(self, *args, **kwargs)

    with mock.patch.object(Kernel, "__call__", counted):
        for mode in ("triton", "torch", "auto", "triton", "torch"):
            with fastnn.backend(mode):
                for _ in range(4):
                    launches.clear()
                    out = compiled(x)
                    out.sum().backward()
                assert is_planned(out)
                assert bool(launches) == (mode == "triton")


def test_a_foreign_operator_runs_once_per_call(runner):
    """A recording would run it once more, so the graph gets no plan."""
    calls = []
    with torch.library._scoped_library("fastnn_test", "DEF") as library:
        library.define("remember(Tensor x) -> Tensor")
        library.impl("remember", lambda x: calls.append(1) or x.clone(), "CPU")
        library.impl("remember", torch.empty_like, "Meta")
        compiled = replayed(Remembers())
        for _ in range(4):
            with torch.no_grad():
                compiled(torch.randn(3))
    assert len(calls) == 4


def test_an_error_of_the_graph_is_the_users(runner):
    """A recording that fails leaves the call as it is."""

    class Solve(nn.Module):
        def forward(self, a, b):
            return torch.linalg.solve(a, b)

    a, b = torch.eye(3).requires_grad_(), torch.randn(3, 2)
    compiled = replayed(Solve())
    for _ in range(3):
        compiled(a, b).sum().backward()
    with pytest.raises(torch.linalg.LinAlgError):
        compiled(torch.zeros(3, 3, requires_grad=True), b)
