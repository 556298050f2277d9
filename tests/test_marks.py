"""A converted model is stock to every question that other people's tools ask."""

import collections
import copy
import inspect
import pickle
import pickletools
import random
import subprocess
import sys
import threading
import warnings

import pytest
import torch
import torch.fx
import torch.nn as stock
from torch.nn.utils import parametrizations, parametrize

import fastnn
from fastnn.layers import _marks
from fastnn.layers._layer import METHODS, OURS, STOCK, called
from fastnn.ops import FUNCTIONS
from tests.marks import interpreted, stock_may_warn
from tests.test_contract import LAYERS, OTHERS, UNTRACEABLE, first, quiet, sample

LAYERS = [STOCK[c] for c in LAYERS if OTHERS.get(c.__name__, 1)]
each_layer = pytest.mark.parametrize("its", LAYERS, ids=lambda c: c.__name__)
TRACEABLE = [c for c in LAYERS if c.__name__ not in UNTRACEABLE]
# Exporting and scripting every layer would take minutes: others each time that the list changes.
SOME = random.Random(len(TRACEABLE)).sample(TRACEABLE, 12)


def pair(its):
    """A stock layer, a converted copy of it, and inputs."""
    args, kwargs, inputs = sample(OURS[its])
    layer = fastnn.revert(its(*args, **kwargs))  # the arguments of Sequential are layers
    if "Lazy" in its.__name__:
        layer(*inputs)
    layer.eval()
    return layer, fastnn.convert(copy.deepcopy(layer)), inputs


def named(pickled):
    """The classes and functions that a pickle names."""
    return [arg for op, arg, _ in pickletools.genops(pickled) if op.name in ("GLOBAL", "INST")]


class Steps(torch.fx.Tracer):
    """Traces what is inside the layers."""

    def is_leaf_module(self, m, name):
        return False


def told(ask, layer):
    """The answer, or the kind of the error."""
    try:
        return ask(layer)
    except Exception as e:
        return type(e).__name__


QUESTIONS = {
    "class": lambda m: [(type(x), x.__class__, type(x).__mro__) for x in m.modules()],
    "names": lambda m: [(n, type(x)) for n, x in m.named_modules()],
    "state": lambda m: [(k, v.shape, v.dtype) for k, v in m.state_dict().items()],
    "parameters": lambda m: [n for n, _ in (*m.named_parameters(), *m.named_buffers())],
    "repr": repr,
    "dict": lambda m: [sorted({*x.__dict__} - {"_fastnn"}) for x in m.modules()],
    "pickle": lambda m: named(pickle.dumps(m, protocol=2)),
    "signature": lambda m: inspect.signature(m.forward),
    "source": lambda m: inspect.getsource(m.forward),
    "method": lambda m: (m.forward.__func__ is type(m).forward, m.forward.__qualname__),
    "graph": lambda m: torch.fx.symbolic_trace(m).code,
    "graph of leaves": lambda m: torch.fx.Tracer().trace(stock.Sequential(m)).python_code("m").src,
    "graph of steps": lambda m: Steps().trace(m).python_code("m").src,
}


@each_layer
def test_a_converted_layer_answers_as_stock(its, record_property):
    layer, mine, inputs = pair(its)
    assert _marks.ours(mine) is OURS[type(layer)] and _marks.ours(layer) is None
    for question, ask in QUESTIONS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert told(ask, mine) == told(ask, layer), question
    record_property("marks", [("questions", len(QUESTIONS))])
    for twin in (copy.copy(mine), copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert _marks.ours(twin) is OURS[type(layer)], "the mark is kept"
    torch.manual_seed(1)
    want = first(layer(*inputs))
    torch.manual_seed(1)
    torch.testing.assert_close(first(mine(*inputs)), want, rtol=0, atol=0)


@interpreted
@each_layer
def test_a_converted_layer_runs_the_ops_of_ours(its):
    """By the function and by the path, as our own class. It also says how PyTorch calls warn."""
    _, mine, inputs = pair(its)
    args, kwargs, _ = sample(OURS[its])
    own = OURS[its](*args, **kwargs)
    if "Lazy" in its.__name__:
        own(*inputs)
    heard = []
    for layer in (mine, own.eval()):
        for member in layer.modules():  # members that were given to the layer
            member.__dict__.pop("_fastnn", None) if layer is own else None
        with fastnn.decisions() as decisions:
            layer(*inputs)
        heard.append([(d.op.name, d.why is None) for d in decisions])
    if its not in (stock.TransformerEncoder, stock.TransformerDecoder, stock.Transformer):
        assert heard[0] == heard[1]
    assert heard[0], "some op ran"


def exported(layer, inputs):
    graph = torch.export.export(layer, inputs).graph
    return [
        (
            n.op,
            str(n.target),
            str(n.args),
            str(n.meta.get("nn_module_stack")),
            n.meta.get("torch_fn"),
        )
        for n in graph.nodes
    ]


class Net(stock.Module):
    def __init__(self, nn):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1))
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.LayerNorm(8), nn.Softmax(-1))

    def forward(self, x):
        return self.head(self.pool(self.stem(x)).flatten(1))


def nets():
    """A stock model; the same converted, imported and converted, and built in a patch."""
    made = {}
    for name, nn in {"stock": stock, "convert": stock, "import": fastnn, "patch": stock}.items():
        torch.manual_seed(0)
        if name == "patch":
            with fastnn.patch():
                made[name] = Net(nn)
        else:
            made[name] = Net(nn)
    fastnn.convert(made["convert"]), fastnn.convert(made["import"])
    return made, torch.randn(2, 3, 6, 6)


@pytest.mark.parametrize("its", SOME, ids=lambda c: c.__name__)
def test_exports_and_compiles_as_stock(its):
    layer, mine, inputs = pair(its)
    assert exported(mine, inputs) == exported(layer, inputs)
    torch._dynamo.reset()
    for mode in ("torch", "auto"):
        with fastnn.backend(mode):
            compiled = torch.compile(mine, fullgraph=True, backend="eager")
            torch.manual_seed(1)
            got = first(compiled(*inputs))
            torch.manual_seed(1)
            torch.testing.assert_close(got, first(layer(*inputs)))


@quiet
def test_a_model_traces_exports_scripts_and_compiles_as_stock():
    made, x = nets()
    want = made.pop("stock").eval()
    scripted = torch.jit.script(want)
    for name, net in made.items():
        net.eval()
        assert exported(net, (x,)) == exported(want, (x,)), name
        for graph in ("graph", "graph of steps"):
            assert told(QUESTIONS[graph], net) == told(QUESTIONS[graph], want), name
        mine = torch.jit.script(net)
        assert mine.code == scripted.code and mine.head.code == scripted.head.code
        assert torch.equal(mine(x), scripted(x))
        torch._dynamo.reset()
        compiled = torch.compile(net, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), want(x))
    torch._dynamo.reset()
    layer = fastnn.convert(stock.Linear(3, 4))  # the compiled module is itself the marked one
    x = torch.randn(2, 3)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


# ---- The question in PyTorch's methods ----------------------------------------------------------


def test_methods_stay_the_same_functions():
    code = """
import inspect, torch, torch.nn as nn, fastnn
from fastnn.layers._layer import METHODS, OURS
forward, code = nn.Linear.forward, nn.Linear.forward.__code__
before = {c: dict(vars(c)) for c in OURS}
assert nn.Linear(2, 2)(torch.ones(1, 2)).shape == (1, 2)
assert nn.Linear.forward.__code__ is code, "until the first mark, nothing changes"
lines = inspect.getsource(forward)
fastnn.explain(nn.Linear(2, 2)), fastnn.revert(nn.Linear(2, 2))
assert nn.Linear.forward.__code__ is code
gelu = nn.GELU.forward.__code__
fastnn.convert(nn.Linear(2, 2))
assert nn.Linear.forward is forward and forward.__code__ is not code
assert nn.GELU.forward.__code__ is gelu, "a class of which no layer was marked"
assert inspect.getsource(forward) == lines
fastnn.convert(nn.ModuleList([nn.Identity()]))
assert all(dict(vars(c)) == before[c] for c in OURS)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@interpreted
def test_the_first_mark_may_be_made_while_functions_are_replaced():
    """In a patch, or while a tool has replaced a function. Afterwards layers run on kernels."""
    code = """
import sys, torch, torch.nn as nn, fastnn
linear = nn.functional.linear
if sys.argv[1] == "patch":
    with fastnn.patch():
        layer = nn.Linear(3, 3)
else:
    nn.functional.linear = lambda *given: linear(*given)
    layer = fastnn.convert(nn.Linear(3, 3))
    with fastnn.decisions() as heard:
        layer(torch.randn(2, 3))
    assert not [d for d in heard if d.why is None], "the tool's function is called"
    nn.functional.linear = linear
with fastnn.decisions() as heard, fastnn.backend("triton"):
    layer(torch.randn(2, 3))
assert [(d.op.name, d.why) for d in heard] == [("linear", None)], heard
"""
    for how in ("patch", "tool"):
        subprocess.run([sys.executable, "-c", code, how], check=True)


def test_every_class_can_be_marked():
    asked = {its: _marks._prepare(its) for its in OURS}
    assert not {its: why for its, why in asked.items() if why}
    assert all(m.made is not None for methods in METHODS.values() for m in methods)


def test_a_source_that_is_not_what_runs_is_not_touched():
    """The file was changed after the import, or a tool compiled the method anew."""

    class Other(stock.Module):
        def forward(self, input):
            return input

    line = Other.forward.__code__.co_firstlineno
    method = METHODS[stock.ReLU][0]._replace(made=Other.forward)
    Other.forward.__code__ = (lambda self, input: input + 1).__code__
    assert "cannot be read" in _marks._ask(method)
    Other.forward.__code__ = Other.forward.__code__.replace(co_firstlineno=line, co_name="forward")
    assert "is not what runs" in _marks._ask(method)
    assert Other()(1) == 2


def net_and_calls():
    seen = []
    net = fastnn.convert(stock.Sequential(stock.Linear(3, 3), stock.GELU(), stock.Linear(3, 2)))
    return net, torch.randn(2, 3), seen


@interpreted
def test_a_forward_replaced_on_the_class_and_put_back():
    net, x, seen = net_and_calls()
    want = net(x)
    original = stock.Linear.forward

    def wrapper(self, input):
        seen.append(self)
        return original(self, input)

    with fastnn.backend("triton"):
        stock.Linear.forward = wrapper
        try:
            torch.testing.assert_close(net(x), want)
            assert seen == [net[0], net[2]]
            assert "torch.nn.Linear.forward was replaced" in str(fastnn.explain(net))
        finally:
            stock.Linear.forward = original
        with fastnn.decisions() as heard:
            net(x)
    assert [(d.op.name, d.why) for d in heard] == [("linear_act", None), ("linear", None)]
    assert len(seen) == 2


# What PyTorch's forward reaches besides: a member, and the distance that is an attribute.
INSIDE = {
    stock.AdaptiveLogSoftmaxWithLoss: {"linear"},
    stock.TripletMarginWithDistanceLoss: {"pairwise_distance"},
}


@interpreted
@pytest.mark.parametrize("how", ["convert", "import"])
def test_a_function_replaced_in_torch_nn_functional_is_called(how):
    """In groups of neighbours, too."""
    original, seen = stock.functional.gelu, []
    nn = fastnn if how == "import" else stock
    net = nn.Sequential(nn.Linear(3, 3), nn.GELU())
    if how == "convert":
        fastnn.convert(net)
    x = torch.randn(2, 3)
    want = net(x)

    def wrapper(*args, **kwargs):
        seen.append(args)
        return original(*args, **kwargs)

    stock.functional.gelu = wrapper
    try:
        with fastnn.backend("triton"):
            torch.testing.assert_close(net(x), want)
        assert len(seen) == 1
        assert "torch.nn.functional.gelu was replaced" in str(fastnn.explain(net, x))
    finally:
        stock.functional.gelu = original
    with fastnn.decisions() as heard, fastnn.backend("triton"):
        net(x)
    assert [(d.op.name, d.why) for d in heard] == [("linear_act", None)] and len(seen) == 2


@stock_may_warn
def test_each_function_that_a_layer_calls_may_be_replaced(record_property):
    """With any function replaced that PyTorch's forward reaches, no op of ours runs."""
    count = collections.Counter()
    for its in LAYERS:
        _, mine, inputs = pair(its)
        names = {n for m in METHODS[its] for n in called(m.made)}
        for name in names & FUNCTIONS.keys():
            original = getattr(stock.functional, name)
            setattr(stock.functional, name, lambda *a, original=original, **k: original(*a, **k))
            try:
                with fastnn.decisions() as heard:
                    mine(*inputs)
            finally:
                setattr(stock.functional, name, original)
            assert {d.op.name for d in heard} <= INSIDE.get(its, set()), (its, name, heard)
            count["functions replaced"] += 1
    assert count["functions replaced"] >= len(LAYERS) - 20
    record_property("marks", [*count.items()])


def test_our_functions_call_what_was_put_in_place_of_pytorchs(record_property):
    """Each of them, in every mode; and a replacement may itself call ours."""
    count = 0
    for name, function in FUNCTIONS.items():
        if vars(stock.functional).get(name) is not function.op.stock:
            continue
        required = inspect.signature(function).parameters.values()
        required = [p for p in required if p.default is p.empty]
        original, seen = function.op.stock, []
        setattr(stock.functional, name, lambda *a, seen=seen, **k: seen.append(a) or seen)
        try:
            for mode in ("auto", "torch", "triton"):
                with fastnn.backend(mode):
                    assert function(*required) is seen, name
        finally:
            setattr(stock.functional, name, original)
        assert len(seen) == 3 and seen[0][: len(required)] == tuple(required), name
        count += 1
    assert count > 80
    record_property("marks", [("our functions, with PyTorch's replaced", count)])
    x, original = torch.randn(3), stock.functional.gelu
    try:
        stock.functional.gelu = lambda x: fastnn.functional.gelu(x) + 1
        assert torch.equal(fastnn.functional.gelu(x), original(x) + 1)
        stock.functional.gelu = fastnn.functional.gelu
        assert torch.equal(fastnn.functional.gelu(x), original(x))
    finally:
        stock.functional.gelu = original


def test_attention_is_found_inside_multi_head_attention():
    assert "scaled_dot_product_attention" in called(METHODS[stock.MultiheadAttention][0].made)


def test_a_subclass_is_left_alone_and_a_parametrized_layer_keeps_its_mark():
    class Own(stock.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    own = fastnn.convert(Own(3, 3))
    assert "_fastnn" not in own.__dict__
    x = torch.randn(2, 3)
    layer = fastnn.convert(stock.Linear(3, 3))
    parametrizations.orthogonal(layer)
    with fastnn.decisions() as heard:
        torch.testing.assert_close(layer(x), stock.functional.linear(x, layer.weight, layer.bias))
    assert _marks.is_marked(layer) and _marks.ours(layer) is None
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is stock.Linear and _marks.ours(layer) is fastnn.Linear
    assert heard or not fastnn._mode.INTERPRET


def test_a_lazy_layer_stays_marked():
    layer = fastnn.convert(stock.LazyBatchNorm1d())
    layer(torch.randn(4, 3))
    assert type(layer) is stock.BatchNorm1d and _marks.ours(layer) is fastnn.BatchNorm1d


def test_a_warning_names_the_line_of_the_user():
    lines = []
    for layer in (stock.Softmax(), fastnn.convert(stock.Softmax()), fastnn.Softmax()):
        with warnings.catch_warnings(record=True) as heard, fastnn.decisions():
            warnings.simplefilter("always")
            layer(torch.randn(2, 3))
        lines.append((heard[0].filename, heard[0].lineno, str(heard[0].message)))
    assert lines[0] == lines[1] == lines[2]


def test_threads_may_convert_at_once():
    failed = []

    def work():
        try:
            net = fastnn.convert(Net(stock))
            net(torch.randn(2, 3, 6, 6))
        except Exception as e:
            failed.append(e)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads]
    [t.join(60) for t in threads]
    assert not failed


def test_a_pickle_loads_where_fastnn_is_absent(tmp_path):
    net = fastnn.convert(fastnn.Sequential(fastnn.Linear(3, 3), fastnn.ReLU()))
    torch.save(net, tmp_path / "net.pt")
    code = f"""
import sys
sys.modules["fastnn"] = None  # its import fails
import torch, torch.nn as nn
names = [nn.Sequential, nn.Linear, nn.ReLU]
with torch.serialization.safe_globals(names):
    net = torch.load({str(tmp_path / "net.pt")!r}, weights_only=True)
assert [type(m) for m in net.modules()] == names
assert net(torch.ones(1, 3)).shape == (1, 3)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    # Loaded before fastnn is imported, the model is stock until it is converted.
    code = f"""
import torch, torch.nn as nn
net = torch.load({str(tmp_path / "net.pt")!r}, weights_only=False)
import fastnn
from fastnn.layers import _marks
assert not _marks.is_marked(net[0])
fastnn.convert(nn.Linear(2, 2))
with fastnn.decisions() as heard:
    net(torch.ones(1, 3))
assert not _marks.is_marked(net[0]) and not heard
fastnn.convert(net)
assert _marks.is_marked(net[0])
net = torch.load({str(tmp_path / "net.pt")!r}, weights_only=False)
with fastnn.decisions() as heard:
    net(torch.ones(1, 3))
assert _marks.is_marked(net[0]) and heard
"""
    subprocess.run([sys.executable, "-c", code], check=True)
