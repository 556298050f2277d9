"""`convert`, `revert`, `patch`, `explain` and `decisions` on whole models."""

import copy
import inspect
import io
import pickle
import threading

import pytest
import torch
import torch.nn as stock
import torch.nn.utils.parametrize as parametrize

import fastnn
from fastnn.layers import _marks
from fastnn.ops import FUNCTIONS
from tests.marks import on_device


class Own(stock.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Net(stock.Module):
    def __init__(self, nn):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.act = nn.GELU()
        self.own = Own(3, 3)
        self.plain = nn.CrossMapLRN2d(3)  # which has no kernels

    def forward(self, x):
        return self.plain(self.own(self.act(self.body(x)))[..., None, None])[..., 0, 0]


def marked(model):
    return {n for n, m in model.named_modules() if _marks.ours(m) is not None}


def test_convert_marks_in_place_and_revert_undoes_it():
    model = Net(stock)
    model.body[0].register_forward_hook(lambda m, a, o: o + 1)
    parameters = {n: id(p) for n, p in model.named_parameters()}
    before = {n: type(m) for n, m in model.named_modules()}
    text = repr(model)
    x = torch.randn(2, 4)
    want = model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    assert fastnn.convert(model) is model
    assert {n: type(m) for n, m in model.named_modules()} == before
    assert marked(model) == {"body", "body.0", "body.1", "body.2", "act"}
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    assert repr(model) == text
    torch.testing.assert_close(model(x), want)
    once = [dict(m.__dict__) for m in model.modules()]
    fastnn.convert(model)
    assert [dict(m.__dict__) for m in model.modules()] == once

    model(x).sum().backward()
    old = model.body[0].weight.clone()
    optimizer.step()
    assert not torch.equal(old, model.body[0].weight)

    assert fastnn.revert(model) is model
    assert {n: type(m) for n, m in model.named_modules()} == before
    assert not marked(model) and not any("_fastnn" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("verb", [fastnn.convert, fastnn.revert])
def test_a_model_built_with_fastnn_gets_stock_classes(verb):
    model = verb(Net(fastnn))
    assert [type(m) for m in model.modules()] == [type(m) for m in Net(stock).modules()]
    assert len(marked(model)) == (5 if verb is fastnn.convert else 0)
    model.load_state_dict(Net(fastnn).state_dict(), strict=True)


def test_reverted_holds_for_a_block():
    model = stock.ModuleList([fastnn.convert(Net(stock)), Net(fastnn), Net(stock)])
    before = [(type(m), dict(m.__dict__)) for m in model.modules()]
    with pytest.raises(KeyError), fastnn.reverted(model) as same:
        assert same is model and not marked(model)
        raise KeyError
    assert [(type(m), dict(m.__dict__)) for m in model.modules()] == before
    with fastnn.reverted(model):
        model[0].act = stock.GELU()  # as a tool would
    assert "0.act" not in marked(model) and "0.body.0" in marked(model)


def test_parametrized_layers_are_left_alone():
    model = stock.Sequential(stock.Linear(3, 3))
    parametrize.register_parametrization(model[0], "weight", stock.Identity())
    kind = type(model[0])
    fastnn.convert(model)
    assert type(model[0]) is kind
    row = next(row for row in fastnn.explain(model) if row.layer == "0")
    assert row.reason == "a subclass of torch.nn.Linear: left as it is"
    ours = fastnn.Linear(3, 3)
    parametrize.register_parametrization(ours, "weight", stock.Identity())
    torch.testing.assert_close(ours(torch.ones(1, 3)).shape, torch.Size([1, 3]))


def reverted(model):
    with fastnn.reverted(model):
        pass


@pytest.mark.parametrize("verb", [fastnn.convert, fastnn.revert, fastnn.explain, reverted])
def test_what_is_not_a_module_is_refused(verb):
    with pytest.raises(TypeError, match=r"expected a Module, got list; \w+ each element"):
        verb([stock.ReLU()])


def snapshot():
    return {
        (home.__name__, name): value
        for home in (stock, stock.modules, stock.functional)
        for name, value in vars(home).items()
        if not name.startswith("__")
    }


def test_patch_marks_what_is_built_and_restores_exactly():
    before = snapshot()
    initialise = stock.Module.__init__
    with pytest.raises(KeyError), fastnn.patch():
        assert stock.functional.gelu == fastnn.functional.gelu
        captured = stock.Linear
        model = Net(stock)
        with fastnn.patch():
            assert stock.functional.gelu == fastnn.functional.gelu
        assert stock.functional.gelu == fastnn.functional.gelu
        raise KeyError
    after = snapshot()
    assert after.keys() == before.keys()
    assert all(after[k] is before[k] for k in before)
    assert stock.Module.__init__ is initialise and captured is stock.Linear
    assert marked(model) == {"body", "body.0", "body.1", "body.2", "act"}
    assert [type(m) for m in model.modules()] == [type(m) for m in Net(stock).modules()]
    assert not marked(Net(stock))
    torch.testing.assert_close(model(torch.ones(1, 4)).shape, torch.Size([1, 3]))


def test_patch_reaches_subclasses_where_they_call_the_stock_forward():
    with fastnn.patch(), fastnn.decisions() as heard:
        own = Own(3, 3)
        want = stock.functional.linear(torch.ones(1, 3), own.weight, own.bias) * 2
        torch.testing.assert_close(own(torch.ones(1, 3)), want)
    assert [d.op.name for d in heard] == ["linear", "linear"]
    row = fastnn.explain(own)[0]
    assert row.reason == "a subclass of torch.nn.Linear: kernels where it calls that forward"


def test_what_was_taken_inside_a_patch_works_after_it():
    its = {name: f.op.stock for name, f in FUNCTIONS.items() if hasattr(stock.functional, name)}
    with fastnn.patch():
        taken = {name: getattr(stock.functional, name) for name in its}
        wrapper = stock.functional.silu = lambda x, taken=stock.functional.silu: taken(x)
    try:
        assert stock.functional.silu is wrapper, "somebody else's"
    finally:
        stock.functional.silu = its["silu"]
    # a table that a library fills at its import, inside the block
    table = dict.fromkeys(taken.values(), 1)
    for name, function in its.items():
        assert taken[name] == function == taken[name] and function in table
        assert inspect.signature(taken[name]) == inspect.signature(fastnn.functional.__dict__[name])
    assert taken["relu"] != its["gelu"]
    x = torch.randn(3)
    assert torch.equal(taken["gelu"](x), its["gelu"](x))
    copied = pickle.loads(pickle.dumps(taken["relu"]))
    assert "fastnn" not in repr(copied) and torch.equal(copied(x), its["relu"](x))
    assert copy.deepcopy(taken["relu"]) is taken["relu"]


def both(x):
    return stock.functional.relu(stock.functional.gelu(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripts_made_inside_a_patch_can_be_saved():
    class Scripted(stock.Module):
        def __init__(self):
            super().__init__()
            self.linear = stock.Linear(3, 3)
            self.pool = stock.MaxPool1d(2)  # one of two functions runs

        def forward(self, x):
            return both(self.pool(self.linear(x)))

    with fastnn.patch():
        model = Scripted()
        scripts = [torch.jit.script(model)]
    scripts.append(torch.jit.script(model))
    x = torch.randn(1, 2, 3)
    for script in scripts:
        file = io.BytesIO()
        torch.jit.save(script, file)
        file.seek(0)
        assert torch.equal(torch.jit.load(file)(x), model(x))


def test_patch_under_threads_restores_exactly():
    before = snapshot()
    barrier = threading.Barrier(4)

    def work():
        for _ in range(50):
            with fastnn.patch():
                assert stock.functional.relu == fastnn.functional.relu
        barrier.wait(10)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads]
    [t.join(20) for t in threads]
    assert all(snapshot()[k] is before[k] for k in before)


def test_every_override_is_patched():
    with fastnn.patch():
        for name, function in FUNCTIONS.items():
            if hasattr(stock.functional, name):
                assert getattr(stock.functional, name) == function


def test_members_that_only_hold_parameters():
    attention = stock.MultiheadAttention(4, 2)
    row = fastnn.explain(attention)[-1]
    assert row.layer == "out_proj"
    assert row.reason == "holds parameters that MultiheadAttention reads; it is never called"
    if hasattr(stock, "LinearCrossEntropyLoss"):
        row = fastnn.explain(fastnn.convert(stock.LinearCrossEntropyLoss(4, 3)))[-1]
        assert (
            row.reason == "holds parameters that LinearCrossEntropyLoss reads; it is never called"
        )


def test_explain_without_inputs_tells_of_each_layer():
    rows = {row.layer: row for row in fastnn.explain(Net(fastnn))}
    assert rows["act"].reason == "has kernels"
    assert rows["own"].reason == "a subclass of torch.nn.Linear: left as it is"
    assert rows["plain"].reason == "no kernels for this class"
    assert "" not in rows  # a container of the user
    stock_rows = {row.layer: row for row in fastnn.explain(Net(stock))}
    assert "fastnn.convert" in stock_rows["act"].reason


@on_device
def test_explain_with_inputs_tells_of_each_call(simulate):
    model = Net(fastnn)
    x = torch.randn(2, 4)
    explained = fastnn.explain(model, x)
    act = next(row for row in explained if row.layer == "act")
    assert (act.kind, act.op, act.path) == ("fastnn.GELU", "gelu", "stock")
    assert "size" in act.reason
    assert "act" in str(explained) and str(explained).count("\n") == len(explained)
    assert explained.counts() == {"kernel": 0, "stock": len(explained)}
    simulate(least=0, source="the test")
    assert fastnn.explain(model, x).counts()["stock"] == 0


def test_explain_leaves_no_trace():
    model = stock.Sequential(
        stock.BatchNorm1d(4), stock.Dropout(0.5), fastnn.ReLU(), fastnn.Linear(4, 4)
    )
    twin = copy.deepcopy(model.state_dict())
    call = stock.Module.__call__
    torch.manual_seed(0)
    state = torch.get_rng_state()
    fastnn.explain(model, torch.randn(8, 4, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin[name]), name
    assert stock.Module.__call__ is call
    with pytest.raises(RuntimeError):
        fastnn.explain(model, torch.randn(8, 5))
    assert stock.Module.__call__ is call


def test_decisions_are_this_threads():
    with fastnn.decisions() as mine:
        other = threading.Thread(target=lambda: fastnn.functional.relu(torch.ones(2)))
        other.start()
        other.join(20)
        assert mine == []
        fastnn.functional.relu(torch.ones(2))
    assert [d.op.name for d in mine] == ["relu"]


@on_device
def test_warmup_leaves_no_trace(simulate):
    simulate(least=0, source="the test")
    model = stock.Sequential(stock.BatchNorm1d(4), fastnn.Linear(4, 4), fastnn.ReLU())
    twin = copy.deepcopy(model.state_dict())
    x = torch.randn(8, 4, requires_grad=True)
    state = torch.get_rng_state()
    with fastnn.decisions() as heard:
        fastnn.warmup(model, x)
    assert {d.op.name for d in heard} >= {"linear", "relu"} and not any(d.why for d in heard)
    assert x.grad is None and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, twin[k]) for k, v in model.state_dict().items())


def test_a_wrong_argument_meets_stocks_error_before_the_size_gate(simulate):
    """The gate sees arguments that nothing has checked yet."""
    simulate(least=1, source="the test")
    index = torch.tensor([0, 1])
    for mode in ("auto", "torch"):
        with fastnn.backend(mode), pytest.raises(TypeError, match="NoneType"):
            fastnn.functional.embedding(index, None)


@pytest.mark.parametrize(
    ("host_ms", "gpu_ms", "told"),
    [(3.0, 1.0, "the host is the limit"), (1.0, 4.0, "FASTNN_HOST=free"), (3.0, 3.6, "even")],
)
def test_explain_tells_what_is_the_limit(monkeypatch, host_ms, gpu_ms, told):
    """The GPU is simulated: a step keeps the host busy, and then the GPU, which works behind it."""
    clock = {"host": 0.0, "gpu": 0.0}

    class Model(stock.Module):
        def forward(self, x):
            clock["host"] += host_ms / 1e3
            clock["gpu"] = max(clock["gpu"], clock["host"] - host_ms / 1e3) + gpu_ms / 1e3
            return x * 2

    def synchronize(device):
        clock["host"] = max(clock["host"], clock["gpu"])

    x = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="host=True times a step on a GPU"):
        fastnn.explain(Model(), x, host=True)
    monkeypatch.setattr(fastnn._model, "_TIMED", "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(fastnn._model.time, "perf_counter", lambda: clock["host"])
    found = fastnn.explain(Model(), x, host=True)
    assert found.host.enqueue == pytest.approx(host_ms)
    # The first of two steps overlaps with the second.
    assert max(host_ms, gpu_ms) <= found.host.step + 1e-9 <= host_ms + gpu_ms
    assert told in str(found).splitlines()[-1]
    assert x.grad is None
