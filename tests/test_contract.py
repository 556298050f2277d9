"""Properties that `import fastnn as nn` may not change, for all layers and functions overridden."""

import copy
import inspect
import io
import pickle
import threading

import pytest
import torch
import torch.fx
import torch.nn as stock
from torch.testing._internal.common_modules import module_db
from torch.utils._python_dispatch import TorchDispatchMode

import fastnn
import fastnn.functional as F
from fastnn import _mode
from fastnn.layers._layer import STOCK
from fastnn.ops import FUNCTIONS, REGISTRY
from fastnn.testing import simulated, tensors_of
from tests.calls import attempt, fresh, recorded
from tests.marks import interpreted, on_device

LAYERS = sorted(STOCK, key=lambda c: c.__name__)
DATABASE = {m.module_cls: m for m in module_db}
# Constructor arguments and input, for layers that PyTorch's own list of samples lacks, or has only
# with a nan.
OTHERS = {
    "Sequential": lambda x: ((fastnn.Linear(4, 3), fastnn.ReLU(), fastnn.Dropout(0.0)), x(2, 4)),
    "LazyLinear": lambda x: ((3,), x(2, 4)),
    "RReLU": lambda x: ((), x(2, 4)),
    "Hardsigmoid": lambda x: ((), x(2, 4)),
    "KLDivLoss": lambda x: ((None, None, "batchmean"), x(4, 3), x(4, 3).detach().softmax(1)),
    **{n: lambda x: ((), x(3, 4), x(3, 4)) for n in ("CosineSimilarity", "PairwiseDistance")},
    "TripletMarginLoss": lambda x: ((), x(3, 4), x(3, 4), x(3, 4)),
    "TripletMarginWithDistanceLoss": lambda x: ((), x(3, 4), x(3, 4), x(3, 4)),
    "AdaptiveLogSoftmaxWithLoss": lambda x: ((16, 9, [2, 5]), x(3, 16), torch.tensor([1, 8, 3])),
    "CTCLoss": lambda x: ((), x(5, 2, 4), torch.tensor([[1, 2], [3, 1]]), (5, 4), (2, 1)),
    "EmbeddingBag": lambda x: ((5, 4), torch.tensor([[1, 2], [3, 1]])),
    "NLLLoss2d": None,  # deprecated: constructing it warns
    **{n: lambda x: ((0.4,), x(2, 4)) for n in ("Dropout", "AlphaDropout", "FeatureAlphaDropout")},
    "Dropout1d": lambda x: ((0.4,), x(2, 4, 3)),
    "Dropout2d": lambda x: ((0.4,), x(2, 4, 3, 3)),
    "Dropout3d": lambda x: ((0.4,), x(2, 4, 3, 3, 3)),
    **{
        f"Lazy{kind}Norm{d}d": lambda x, d=d: ((), x(2, 4, *(3,) * d))
        for kind in ("Batch", "Instance")
        for d in (1, 2, 3)
    },
    "PixelShuffle": lambda x: ((2,), x(2, 4, 3, 3)),
    "PixelUnshuffle": lambda x: ((2,), x(2, 3, 4, 4)),
    "ChannelShuffle": lambda x: ((2,), x(2, 4, 3, 3)),
    "Fold": lambda x: (((3, 3), 2), x(2, 8, 4)),
    "Unfold": lambda x: ((2,), x(2, 3, 3, 3)),
    "Upsample": lambda x: ((None, 2.0, "bilinear"), x(2, 3, 3, 3)),
    "UpsamplingNearest2d": lambda x: ((5,), x(2, 3, 3, 3)),
    "UpsamplingBilinear2d": lambda x: ((5,), x(2, 3, 3, 3)),
    "SyncBatchNorm": lambda x: ((4,), x(2, 4, 3)),
    # odd powers of negative sums are nan
    "LPPool1d": lambda x: ((2, 3), x(2, 3, 7)),
    **{
        f"FractionalMaxPool{d}d": lambda x, d=d: (
            (2, (2,) * d, None, False, torch.full((2, 3, d), 0.4)),
            x(2, 3, *(5,) * d),
        )
        for d in (2, 3)
    },
    **{
        f"MaxUnpool{d}d": lambda x, d=d: (
            (2,),
            x(1, 2, *(2,) * d),
            torch.randperm(4**d)[: 2 * 2**d].view(1, 2, *(2,) * d),
        )
        for d in (1, 2, 3)
    },
    "MultiheadAttention": lambda x: ((8, 2), x(3, 2, 8), x(4, 2, 8), x(4, 2, 8)),
    "TransformerEncoderLayer": lambda x: ((8, 2, 12, 0.0), x(3, 2, 8)),
    "TransformerDecoderLayer": lambda x: ((8, 2, 12, 0.0), x(3, 2, 8), x(4, 2, 8)),
    "TransformerEncoder": lambda x: (
        (stock.TransformerEncoderLayer(8, 2, 12, 0.0), 2, None, False),
        x(3, 2, 8),
    ),
    "TransformerDecoder": lambda x: (
        (stock.TransformerDecoderLayer(8, 2, 12, 0.0), 2),
        *(x(3, 2, 8), x(4, 2, 8)),
    ),
    "Transformer": lambda x: (
        (8, 2, 1, 1, 12, 0.0, stock.functional.relu, None, None, 1e-5, True),  # batch_first
        *(x(2, 3, 8), x(2, 4, 8)),
    ),
}


def sample(cls, dtype=torch.float32):
    """(constructor args, kwargs, forward args) of an ordinary use of the layer."""
    info = DATABASE.get(STOCK[cls])
    if info is None or cls.__name__ in OTHERS:
        args, *inputs = OTHERS[cls.__name__](
            lambda *s: torch.randn(s, dtype=dtype, requires_grad=True)
        )
        return args, {}, tuple(inputs)
    for s in info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=True
    ):
        given = s.forward_input.args if s.forward_input is not None else ()
        if given and not s.forward_input.kwargs and given[0].numel():
            made = s.constructor_input
            return made.args, made.kwargs, s.forward_input.args
    raise AssertionError(cls)


def first(out):
    """The result, or the first result of several."""
    return out[0] if isinstance(out, tuple) else out


def build(cls):
    args, kwargs, inputs = sample(cls)
    return cls(*args, **kwargs), STOCK[cls](*args, **kwargs), inputs


each_layer = pytest.mark.parametrize(
    "cls", [c for c in LAYERS if OTHERS.get(c.__name__, 1)], ids=lambda c: c.__name__
)
# The stock forward branches on the values of a tensor; the stock backward has no fake kernel.
UNTRACEABLE = {"GaussianNLLLoss", "FractionalMaxPool3d"}
UNTRACEABLE |= {"AdaptiveLogSoftmaxWithLoss"}  # it branches on the values of the targets
UNTRACEABLE |= {"CTCLoss"}  # the stock shape of the kept states depends on the lengths
UNTRACEABLE |= {"RNN", "LSTM", "GRU"}  # of which Dynamo traces nothing
each_traceable_layer = pytest.mark.parametrize(
    "cls",
    [c for c in LAYERS if OTHERS.get(c.__name__, 1) and c.__name__ not in UNTRACEABLE],
    ids=lambda c: c.__name__,
)
each_function = pytest.mark.parametrize("name", sorted(FUNCTIONS))


# ---- classes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", LAYERS, ids=lambda c: c.__name__)
def test_class_adds_a_forward_and_nothing_else(cls):
    its = STOCK[cls]
    assert cls.__name__ == cls.__qualname__ == its.__name__
    assert cls.__mro__[1] is its
    own = {k for k in vars(cls) if not k.startswith(("__", "_abc"))}
    allowed = {"forward"} | ({"cls_to_become"} if "Lazy" in cls.__name__ else set())
    assert {k for k in own if not k.startswith("_")} <= allowed
    assert inspect.signature(cls) == inspect.signature(its)
    # A layer that builds other layers builds ours, with the stock code.
    assert cls.__init__.__code__ is its.__init__.__code__ and cls.extra_repr is its.extra_repr
    assert inspect.getdoc(cls) == inspect.getdoc(its)
    names = [list(inspect.signature(c.forward).parameters) for c in (cls, its)]
    assert names[0] == names[1]
    assert getattr(fastnn, cls.__name__) is cls


@each_layer
def test_layer_passes_for_stock(cls):
    ours, its, _ = build(cls)
    assert isinstance(ours, STOCK[cls]) and isinstance(its, cls) and issubclass(STOCK[cls], cls)
    assert repr(ours) == repr(its)
    assert not isinstance(stock.Identity(), cls)
    child = type("Child", (cls,), {})
    assert not isinstance(its, child) and not isinstance(ours, child)
    assert isinstance(ours, cls)


@each_layer
def test_state_pickle_deepcopy(cls):
    ours, its, inputs = build(cls)
    if "Lazy" in cls.__name__:
        ours(*inputs), its(*inputs)
    assert list(ours.state_dict()) == list(its.state_dict())
    ours.load_state_dict(its.state_dict(), strict=True)
    its.load_state_dict(ours.state_dict(), strict=True)
    ours.eval()
    want = ours(*inputs)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for twin in (
        pickle.loads(pickle.dumps(ours)),
        copy.deepcopy(ours),
        torch.load(file, weights_only=False),
    ):
        assert type(twin) is type(ours) and repr(twin) == repr(ours)
        torch.testing.assert_close(twin(*inputs), want, rtol=0, atol=0)
    assert pickle.loads(pickle.dumps(cls)) is cls


def test_users_may_mix_in_abc_and_generic():
    from abc import ABC, abstractmethod
    from typing import Generic, TypeVar

    class Base(fastnn.Linear, ABC):
        @abstractmethod
        def extra(self): ...

    class Concrete(Base, Generic[TypeVar("T")]):
        def extra(self):
            return 1

    with pytest.raises(TypeError):
        Base(2, 2)
    assert Concrete(2, 2)(torch.ones(1, 2)).shape == (1, 2)


# ---- functions ----------------------------------------------------------------------------------


@each_function
def test_function_looks_like_stock(name):
    ours, its = FUNCTIONS[name], FUNCTIONS[name].op.stock
    assert getattr(F, name) is ours and inspect.isfunction(ours)
    assert pickle.loads(pickle.dumps(ours)) is ours
    if hasattr(stock.functional, name):
        assert its is getattr(stock.functional, name)
        assert ours.__name__ == name and ours.__doc__ == its.__doc__
    if inspect.isfunction(its):
        theirs = inspect.signature(its).parameters.values()
        mine = inspect.signature(ours).parameters.values()
        assert [(p.name, p.default, p.kind) for p in mine] == [
            (p.name, p.default, p.kind) for p in theirs
        ]


# The forward-mode formulas of torch load TorchScript, which torch deprecates.
quiet = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


# ---- tracers, compilers, transforms --------------------------------------------------------------


@each_layer
def test_fx_takes_the_layer_for_a_leaf(cls):
    if cls is fastnn.Sequential:
        pytest.skip("fx steps into stock's Sequential too")
    ours, its, inputs = build(cls)
    if "Lazy" in cls.__name__:
        ours(*inputs), its(*inputs)
    codes = []
    for layer in (ours, its):
        graph = torch.fx.symbolic_trace(stock.Sequential(layer)) if len(inputs) == 1 else None
        codes.append(graph and graph.code)
    assert codes[0] == codes[1]


@each_traceable_layer
def test_compile_has_no_graph_break(cls):
    """Static and dynamic sizes take turns, because every layer is traced through the same front.
    tests/test_rows.py compiles the ops that a graph can hold in both ways. With static sizes
    AOTAutograd compiles the graph, too. With dynamic sizes that takes three fifths of the time, and
    the graph is that of stock (test_export_gives_stocks_graph)."""
    dynamic = LAYERS.index(cls) % 2 == 0
    backend = "eager" if dynamic else "aot_eager"
    ours, its, inputs = build(cls)
    if "Lazy" in cls.__name__:
        ours(*inputs), its(*inputs)
    its.load_state_dict(ours.state_dict())
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=dynamic, backend=backend)
    outs = []
    for layer in (compiled, its):
        for x in inputs:
            if isinstance(x, torch.Tensor):
                x.grad = None
        torch.manual_seed(3)
        out = first(layer(*inputs))
        if out.requires_grad:
            out.sum().backward()
        outs.append([out, *(x.grad for x in inputs if isinstance(x, torch.Tensor))])
    torch.testing.assert_close(outs[0], outs[1])


@each_traceable_layer
def test_export_gives_stocks_graph(cls):
    ours, its, inputs = build(cls)
    if "Lazy" in cls.__name__:
        ours(*inputs), its(*inputs)
    graphs = [
        [
            str(n.target)
            for n in torch.export.export(m, inputs).graph.nodes
            if n.op == "call_function"
        ]
        for m in (ours, its)
    ]
    assert graphs[0] == graphs[1]


@quiet
@each_layer
def test_torchscript_compiles(cls):
    if "Lazy" in cls.__name__:
        pytest.skip("stock cannot script a lazy layer")
    ours, its, inputs = build(cls)
    try:
        scripted_stock = torch.jit.script(its)
    except Exception:
        pytest.skip("stock cannot script it")
    its.load_state_dict(ours.state_dict())
    scripted = torch.jit.script(ours)
    for layer in (scripted, scripted_stock, ours):
        layer.eval()
    if hasattr(scripted_stock, "forward"):  # else it has only overloads, which a script can call
        try:
            expected = scripted_stock(*inputs)
        except RuntimeError:
            pytest.skip("stock's script takes other types")  # CTCLoss: tensors of lengths
        torch.testing.assert_close(scripted(*inputs), expected)
    assert type(ours) is cls


def plain(cls):
    """The layer and its first input, if the layer maps one tensor to one tensor."""
    ours, its, inputs = build(cls)
    if "Lazy" in cls.__name__:
        ours(*inputs), its(*inputs)
    its.load_state_dict(ours.state_dict())
    ours.eval(), its.eval()
    floating = isinstance(inputs[0], torch.Tensor) and inputs[0].is_floating_point()
    return ours, its, inputs, floating


@quiet
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # stock's own
@each_layer
def test_functorch_transforms(cls):
    ours, its, inputs, floating = plain(cls)
    if not floating:
        pytest.skip("no floating input to transform over")
    x, rest = inputs[0].detach(), inputs[1:]

    def outcome(transform, layer):
        try:
            return transform(layer)
        except RuntimeError as e:  # stock has no rule for it
            return str(e).partition(":")[0]

    transforms = [
        lambda m: torch.func.jacrev(lambda v: first(m(v, *rest)).sum())(x),
        lambda m: torch.func.jacfwd(lambda v: first(m(v, *rest)).sum())(x),
    ]
    if not rest and x.dim():
        transforms.append(
            lambda m: torch.func.vmap(m, randomness="different")(torch.stack([x, x + 1]))
        )
    for transform in transforms:
        got, want = outcome(transform, ours), outcome(transform, its)
        if isinstance(want, str):
            assert got == want
        else:
            torch.testing.assert_close(got, want)
    got, want = (
        torch.func.functional_call(m, dict(m.named_parameters()), (x, *rest)) for m in (ours, its)
    )
    torch.testing.assert_close(got, want)


@quiet
@each_layer
def test_forward_mode(cls):
    ours, its, inputs, floating = plain(cls)
    if not floating:
        pytest.skip("no floating input to differentiate")
    x = inputs[0].detach()
    results = []
    for layer in (ours, its):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            try:
                out = first(layer(dual, *inputs[1:]))
                results.append(torch.autograd.forward_ad.unpack_dual(out))
            except NotImplementedError as e:  # stock has no rule for it
                results.append(str(e))
    if isinstance(results[1], str):
        assert results[0] == results[1]
    else:
        torch.testing.assert_close(results[0].primal, results[1].primal)
        torch.testing.assert_close(results[0].tangent, results[1].tangent)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@each_layer
def test_a_dispatch_mode_sees_what_it_sees_of_stock(cls):
    ours, its, inputs, _ = plain(cls)
    seen = []
    for layer in (ours, its):
        with Seen() as mode:
            layer(*inputs)
        seen.append(mode.ops)
    assert seen[0] == seen[1]


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # stock's
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_layer
def test_autocast_result_dtype(cls, dtype, simulate):
    """On kernels, under autocast, result and gradients have the same dtypes as in stock."""
    simulate(least=0, source="the test")
    ours, its, inputs, _ = plain(cls)
    for given in (torch.float32, dtype):
        args = [
            x.detach().to(given).requires_grad_()
            if isinstance(x, torch.Tensor) and x.is_floating_point()
            else x
            for x in inputs
        ]
        results = []
        for layer in (ours, its):
            try:
                with torch.autocast("cpu", dtype=dtype):
                    results.append(first(layer(*args)).dtype)
            except RuntimeError as e:
                results.append(str(e))
        assert results[0] == results[1]


def edited_outcome(layer, inputs):
    """The outcome of an edit of the result in place: values and gradients, or the type of error."""
    x = [v.detach().clone() if isinstance(v, torch.Tensor) else v for v in inputs]
    x[0].requires_grad_(x[0].is_floating_point())
    torch.manual_seed(0)
    out = first(layer(*x))
    try:
        out.add_(1)
        out.sum().backward()
    except RuntimeError as e:
        return type(e)
    return [out.detach(), x[0].grad, *(p.grad for p in layer.parameters())]


@each_layer
@on_device
def test_results_may_be_edited_in_place_where_stocks_may(cls):
    ours, its, inputs = build(cls)
    if "Lazy" in cls.__name__:
        ours(*inputs), its(*inputs)
    its.load_state_dict(ours.state_dict())
    if isinstance(ours, stock.RReLU):
        ours.eval(), its.eval()  # in training it runs stock
    shapes = [inputs]
    if isinstance(ours, stock.Linear):
        shapes.append((torch.randn(2, 3, ours.in_features),))
    for args in shapes:
        with fastnn.backend("triton"):
            got = edited_outcome(ours, args)
        want = edited_outcome(its, args)
        if isinstance(want, type) or isinstance(got, type):
            assert got == want
        elif "Dropout" not in cls.__name__:  # dropout draws other numbers on a CPU
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# ---- hooks, threads, modes -----------------------------------------------------------------------


@each_layer
def test_hooks_fire(cls):
    ours, _, inputs = build(cls)
    fired = []
    ours.register_forward_pre_hook(lambda m, a: fired.append("pre"))
    ours.register_forward_hook(lambda m, a, o: fired.append("post"))
    ours(*inputs)
    assert fired == ["pre", "post"]


def test_backend_is_per_thread_and_reaches_threads_without_their_own():
    seen = {}
    barrier = threading.Barrier(2)

    def work(mode):
        with fastnn.backend(mode):
            barrier.wait(10)
            seen[mode] = _mode.current_mode()
            barrier.wait(10)

    threads = [threading.Thread(target=work, args=(m,)) for m in ("triton", "torch")]
    [t.start() for t in threads]
    [t.join(20) for t in threads]
    assert seen == {"triton": "triton", "torch": "torch"}
    assert _mode.current_mode() == "auto"

    with fastnn.backend("torch"):
        other = threading.Thread(target=lambda: seen.update(bare=_mode.current_mode()))
        other.start()
        other.join(20)
    assert seen["bare"] == "torch" and _mode.current_mode() == "auto"


def test_backend_restores_after_an_exception_and_nests():
    with pytest.raises(KeyError), fastnn.backend("torch"):
        with fastnn.backend("triton"):
            assert _mode.current_mode() == "triton"
        assert _mode.current_mode() == "torch"
        raise KeyError
    assert _mode.current_mode() == "auto"
    again = fastnn.backend("torch")
    with again, again:
        assert _mode.current_mode() == "torch"
    assert _mode.current_mode() == "auto"
    with pytest.raises(ValueError, match="auto, triton, torch"):
        fastnn.backend("cuda")


REFUSALS = {
    "float64": lambda: torch.randn(3, dtype=torch.float64),
    "complex64": lambda: torch.randn(3, dtype=torch.complex64),
    "int64": lambda: torch.arange(3),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "meta": lambda: torch.empty(3, device="meta"),
    "subclass": lambda: torch.randn(3).as_subclass(type("Mine", (torch.Tensor,), {})),
    "negation": lambda: torch.randn(3, dtype=torch.complex64).conj().imag,
    "nested": lambda: torch.nested.nested_tensor([torch.randn(2), torch.randn(3)]),
}


@pytest.mark.filterwarnings("ignore:.*[Nn]ested:UserWarning")
@pytest.mark.parametrize("kind", REFUSALS)
@on_device
def test_shared_refusals(kind):
    """Calls that no kernel takes run stock and say why. If forced, they raise an error of ours."""
    x = REFUSALS[kind]()
    with fastnn.decisions() as heard:
        try:
            got = F.relu(x)
        except Exception as e:  # the answer of stock
            got = type(e)
    ((op, why, _),) = heard
    assert op.name == "relu" and why and kind.split("64")[0] in why.replace("a tensor on ", "")
    try:
        want = stock.functional.relu(x)
    except Exception as e:
        want = type(e)
    if isinstance(want, torch.Tensor) and kind not in ("meta", "nested", "sparse"):
        torch.testing.assert_close(got, want)
    with fastnn.backend("triton"), pytest.raises(fastnn.BackendError, match=r"relu.*on PyTorch: "):
        F.relu(x)


@interpreted
@pytest.mark.parametrize("gate", [0, 10**9])
@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_tensors_without_kernels_run_stock_at_every_call(name, gate):
    """Meta tensors, in `auto`: the first call decides, the second remembers, the third knows."""
    call = next(iter(recorded()[name]))
    call = call.with_(**{k: t.to("meta") for k, t in call.tensors().items()})
    want = attempt(call, call.op.stock, {})
    with simulated(least=gate):
        for _ in range(3):
            got = attempt(call, getattr(F, name), {})
            assert repr(got.error) == repr(want.error)
            if want.values is not None:
                facts = [(k, t.shape, t.dtype, t.device) for k, t in want.values.items()]
                assert [(k, t.shape, t.dtype, t.device) for k, t in got.values.items()] == facts


def test_default_device_is_no_reason_for_stock(device):
    with torch.device(device), fastnn.backend("triton"), fastnn.decisions() as heard:
        F.relu(torch.ones(3))
    assert heard[0].why is None


@on_device
def test_torch_mode_never_launches(monkeypatch):
    from fastnn.kernels import _launch

    def explode(*args, **kwargs):
        raise AssertionError("launched")

    monkeypatch.setattr(_launch.Kernel, "__call__", explode)
    with fastnn.backend("torch"):
        F.relu(torch.ones(3))
    with pytest.raises(AssertionError, match="launched"), fastnn.backend("triton"):
        F.relu(torch.ones(3))


def test_builtins_keep_out():
    x, out = torch.randn(3), torch.empty(3)
    with fastnn.backend("triton"):
        assert F.gelu(x, out=out) is out
    torch.testing.assert_close(out, stock.functional.gelu(x))


def test_argument_errors_are_stocks():
    for call in (lambda f: f(), lambda f: f(torch.ones(2), bogus=1)):
        with pytest.raises(TypeError):
            call(F.relu)
        with pytest.raises(TypeError), fastnn.backend("triton"):
            call(F.relu)


@interpreted
def test_asking_pytorch_for_its_error_leaves_nothing_behind(monkeypatch):
    """If a fused function fails where PyTorch does not, the error is raised, and what PyTorch wrote
    or drew when it was asked is undone."""

    def broken(input, *rest, **options):
        raise TypeError("of our own")

    def stock(input, *rest, **options):
        return input.add_(torch.rand(()))

    op = F.relu.op
    monkeypatch.setitem(vars(op), "fused", broken)
    monkeypatch.setitem(vars(op), "stock", stock)
    x = torch.zeros(3)
    before = torch.get_rng_state()
    with pytest.raises(TypeError, match="of our own"), fastnn.backend("triton"):
        F.relu(x)
    assert torch.equal(x, torch.zeros(3))
    assert torch.equal(torch.get_rng_state(), before)


class _NoGradient(torch.autograd.Function):
    """A function whose input has no gradient."""

    @staticmethod
    def forward(ctx, *tensors):
        return tuple(t.clone() for t in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        return (None,) * len(gradients)


@interpreted
@pytest.mark.parametrize("name", sorted(recorded()))
def test_results_without_a_gradient_give_none_to_the_inputs(name):
    """Autograd runs a node although no function behind it returned a gradient."""
    calls = [
        c
        for c in recorded()[name]
        if c.wanting and all(t.numel() and t.isfinite().all() for t in c.tensors().values())
    ]
    if not calls:
        pytest.skip("no row of it has gradients")
    for call in calls:
        mine, _ = fresh(call, {})
        try:
            with fastnn.backend("triton"):
                out = getattr(fastnn.functional, name)(**mine.arguments)
        except fastnn.BackendError:  # a row that may run on PyTorch
            continue
        outs = [t for t in tensors_of(out) if t.requires_grad]
        with fastnn.backend("triton"):
            sum(t.sum() for t in _NoGradient.apply(*outs)).backward()
        for key in mine.wanting:
            assert mine.arguments[key].grad is None, key
        return
    raise AssertionError("no row runs on kernels")


@interpreted
@pytest.mark.parametrize("activation", ["relu", "silu", "sigmoid", "gelu_tanh"])
def test_second_derivatives_of_a_product_of_which_one_factor_is_frozen(activation):
    x, z = torch.randn(3, 5), torch.randn(3, 5, requires_grad=True)
    dy = torch.randn(3, 5, requires_grad=True)
    with fastnn.backend("triton"):
        y = F.act_mul(x, z, activation)
        (dz,) = torch.autograd.grad(y, z, dy, create_graph=True)
        (back,) = torch.autograd.grad(dz.sum(), dy)
    acted = F.act_mul(x, torch.ones(3, 5), activation)
    assert torch.allclose(dz, dy * acted) and torch.allclose(back, acted)


@interpreted
@pytest.mark.parametrize("name", ["act_glu", "split_features"])
def test_a_vector_with_an_input_bias_has_second_derivatives(name):
    z, c = (torch.randn(12, requires_grad=True) for _ in "zc")
    found = []
    for mode in ("torch", "triton"):
        with fastnn.backend(mode):
            y = FUNCTIONS[name](z, input_bias=c)
            y = y if torch.is_tensor(y) else sum((t * t).sum() for t in y)
            grads = torch.autograd.grad((y * y).sum(), (z, c), create_graph=True)
            found.append([*grads, *torch.autograd.grad(grads[0].square().sum(), z)])
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs)
