"""Sequential: fused neighbours compute what the separate layers do, and run apart when watched."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
import torch.nn as stock

import fastnn
import fastnn.functional as F
from fastnn import _mode, _rng
from fastnn.ops import linear as ops

FUSED = [("linear_act", None)]


@pytest.fixture(autouse=True)
def no_size_gate(simulate):
    simulate(least=0, source="the test")


def model(*members):
    return fastnn.Sequential(*members)


def one_by_one(sequential, x):
    for member in sequential:
        x = member(x)
    return x


def run(call, parameters, x, mode="triton", seed=3):
    """(names and reasons of the dispatched calls; output, then gradients)."""
    x = x.detach().clone().requires_grad_()
    for p in parameters:
        p.grad = None
    torch.manual_seed(seed)
    with fastnn.backend(mode), fastnn.decisions() as heard:
        y = call(x)
        y.backward(torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(y.dtype))
    grads = [p.grad for p in (x, *parameters) if p.grad is not None]
    return [(op.name, why) for op, why, _ in heard], [y.detach(), *grads]


def assert_close(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- Values ------------------------------------------------------------------------------------


# 33 * 5 elements take single words, 6 * 3 take pairs. Rows of 6 split a run of four, rows of 8 do
# not.
@pytest.mark.parametrize(("m", "n"), [(33, 5), (6, 3), (4, 6), (5, 8), (20, 40)])
@pytest.mark.parametrize("activation", [fastnn.ReLU, fastnn.GELU, fastnn.Tanh])
@pytest.mark.parametrize("plan", ["gemm", "epilogue"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dropout_draws_what_the_separate_layers_draw(
    m, n, activation, plan, dtype, device, monkeypatch
):
    if device == "cpu":  # one block of threads, so each draws several times
        monkeypatch.setattr(_rng, "most_blocks", lambda device: 1)
    monkeypatch.setattr(ops, "choose_variant", lambda *args: plan)
    net = model(fastnn.Linear(7, n), activation(), fastnn.Dropout(0.3)).to(device, dtype)
    x = torch.randn(m, 7, device=device, dtype=dtype)
    mode = "triton" if plan == "gemm" else "auto"
    heard, fused = run(net, list(net.parameters()), x, mode)
    assert heard == FUSED
    _, apart = run(lambda x: one_by_one(net, x), list(net.parameters()), x)
    if activation is not fastnn.ReLU:
        assert torch.equal(fused[0] == 0, apart[0] == 0)
    tolerance = 1e-5 if dtype is torch.float32 else 4e-3
    for a, b in zip(fused, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_more_elements_than_threads(device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(_rng, "most_blocks", lambda device: 1)
    for n in (12, 13, 14):
        net = model(fastnn.Linear(2, n), fastnn.GELU(), fastnn.Dropout(0.5)).to(device)
        x = torch.randn(301, 2, device=device)
        _, fused = run(net, list(net.parameters()), x)
        _, apart = run(lambda x, net=net: one_by_one(net, x), list(net.parameters()), x)
        assert torch.equal(fused[0] == 0, apart[0] == 0)
        assert_close(fused, apart)


@pytest.mark.parametrize(
    ("plan", "activation"),
    [
        ("addmm", fastnn.ReLU()),
        *itertools.product(("gemm", "epilogue"), (fastnn.ReLU(), fastnn.GELU("tanh"))),
    ],
)
def test_every_plan_gives_the_same(plan, activation, device, monkeypatch):
    monkeypatch.setattr(ops, "choose_variant", lambda *args: plan)
    net = model(fastnn.Linear(9, 6), activation).to(device)
    x = torch.randn(2, 5, 9, device=device)
    heard, got = run(net, list(net.parameters()), x, "auto")
    assert heard == FUSED
    _, want = run(net, list(net.parameters()), x, "torch")
    assert_close(got, want)


@pytest.mark.parametrize("shape", [(9,), (5, 9), (2, 5, 9)])
def test_inference_through_cublaslt(shape, device):
    net = model(fastnn.Linear(9, 6), fastnn.ReLU()).to(device)
    x = torch.randn(shape, device=device)
    with torch.no_grad():
        with fastnn.decisions() as heard:
            got = net(x)
        assert [why for _, why, _ in heard] == [None]
        with fastnn.backend("torch"):
            torch.testing.assert_close(got, net(x), rtol=1e-5, atol=1e-5)


def test_the_plan_goes_by_shape_and_kind():
    def plan(
        M, N, K, activation="gelu", bias=True, training=True, drops=False, itemsize=2, sums=False
    ):
        return ops.choose_variant(
            M, N, K, itemsize, "sm_90", activation, bias, training, drops, sums
        )

    assert plan(4096, 4096, 1024, drops=True) == "dropout"
    assert plan(4096, 4096, 128, drops=True) == "gemm"
    assert plan(4096, 4096, 128, drops=True, itemsize=4) == "dropout"  # cuBLAS runs fp32
    assert plan(4096, 4096, 132, drops=True) == "dropout"  # K % 8
    assert plan(64, 64, 128, drops=True) == "dropout"  # too few tiles for the processors
    assert plan(4096, 4096, 1024, "relu") == "addmm"
    assert plan(4096, 4096, 1024, "relu", training=False) == "addmm"
    # The table, and not the shape, decides from which size on the pass for the bias counts.
    assert plan(4096, 4096, 1024, sums=True) == plan(64, 64, 1024, sums=True) == "epilogue"
    assert isinstance(plan(4096, 4096, 1024), _mode.Stock)
    assert isinstance(plan(4096, 4096, 1024, "relu", bias=False), _mode.Stock)
    assert isinstance(plan(4096, 4096, 1024, training=False), _mode.Stock)


@pytest.mark.parametrize(
    "frozen", [(), ("bias",), ("input", "weight"), ("input", "weight", "bias")]
)
@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "no_grad"])
def test_a_kernel_runs_where_a_bias_gets_a_gradient(frozen, tracked, device, simulate):
    """Without a dropout, the pass that sums the gradient of the bias is all that is saved."""
    simulate(least=0, source="the test")
    made = {"input": torch.randn(9, 4), "weight": torch.randn(5, 4), "bias": torch.randn(5)}
    made = {k: v.to(device).requires_grad_(k not in frozen) for k, v in made.items()}
    with fastnn.decisions() as heard, torch.set_grad_enabled(tracked):
        y = F.linear_act(**made, activation="gelu")
    want = stock.functional.gelu(stock.functional.linear(**made))
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    if not tracked or "bias" in frozen:
        assert [d.code for d in heard] == ["gate"]
        return
    assert [d.why for d in heard] == [None]
    wanting = [t for t in made.values() if t.requires_grad]
    dy = torch.randn_like(y)
    assert_close(*(torch.autograd.grad(out, wanting, dy) for out in (y, want)))


def test_in_auto_the_gate_is_on_the_output(device, simulate):
    simulate(least=100, source="the test")
    net = model(fastnn.Linear(1000, 4), fastnn.ReLU()).to(device)
    with fastnn.decisions() as heard:
        net(torch.randn(24, 1000, device=device))
        net(torch.randn(25, 1000, device=device))
    assert [why for _, why, _ in heard] == [
        "size gate: 96 outputs; the kernel wins from 100 (the test)",
        None,
    ]


@pytest.mark.parametrize("plan", ["gemm", "epilogue"])
@pytest.mark.parametrize("activation", [torch.relu, torch.tanh, stock.functional.gelu])
@pytest.mark.parametrize("frozen", [None, "input", "weight", "bias"])
def test_second_derivatives(plan, activation, frozen, device, monkeypatch):
    monkeypatch.setattr(ops, "choose_variant", lambda *args: plan)
    torch.manual_seed(0)
    made = {"input": torch.randn(3, 4), "weight": torch.randn(5, 4), "bias": torch.randn(5)}
    made = {k: v.to(device).requires_grad_(k != frozen) for k, v in made.items()}
    wanting = [t for t in made.values() if t.requires_grad]
    found = []
    for call in (
        lambda: F.linear_act(**made, activation=activation.__name__),
        lambda: activation(stock.functional.linear(**made)),
    ):
        mode = "triton" if plan == "gemm" else "auto"
        with fastnn.backend(mode):
            y = call()
            g = torch.linspace(-1, 1, y.numel(), device=device).view_as(y).requires_grad_()
            first = torch.autograd.grad(y, wanting, g, create_graph=True)
            loss = sum(t.square().sum() for t in first)
            second = torch.autograd.grad(loss, [g, *wanting], allow_unused=True)
        found.append([*first, *second])
    for a, b in zip(*found, strict=True):
        if a is None or b is None:  # no dependence, or zero
            assert (a if b is None else b) is None or not (a if b is None else b).any()
        else:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_second_derivative_through_dropout(device):
    net = model(fastnn.Linear(4, 6), fastnn.GELU(), fastnn.Dropout(0.4)).to(device)
    x = torch.randn(3, 4, device=device, requires_grad=True)
    found = []
    for call in (net, lambda x: one_by_one(net, x)):
        torch.manual_seed(1)
        with fastnn.backend("triton"):
            (dx,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
            found.append([dx, *torch.autograd.grad(dx.square().sum(), [x, *net.parameters()])])
    assert_close(*found)


def test_frozen_parameters_get_no_gradient(device):
    net = model(fastnn.Linear(4, 6), fastnn.GELU()).to(device)
    for frozen in itertools.product((True, False), repeat=2):
        for p, f in zip(net.parameters(), frozen, strict=True):
            p.requires_grad_(not f)
        _, got = run(net, list(net.parameters()), torch.ones(3, 4, device=device))
        _, want = run(net, list(net.parameters()), torch.ones(3, 4, device=device), "torch")
        assert_close(got, want)


def test_edits_after_the_call_are_caught_as_in_stock(device):
    """Stock keeps the output of relu, but not that of gelu or dropout."""
    x = torch.randn(3, 4, device=device)
    with fastnn.backend("triton"):
        y = model(fastnn.Linear(4, 6), fastnn.ReLU()).to(device)(x)
        y.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        for tail in ([fastnn.GELU()], [fastnn.ReLU(), fastnn.Dropout(0.5)]):
            y = model(fastnn.Linear(4, 6), *tail).to(device)(x)
            y.mul_(2)
            y.sum().backward()


def test_shared_weights_and_members(device):
    net = model(fastnn.Linear(4, 4), fastnn.ReLU()).to(device)
    net = fastnn.Sequential(net[0], net[1], net[0], net[1], fastnn.Linear(4, 4).to(device))
    net[4].weight = net[0].weight
    x = torch.randn(3, 4, device=device)
    heard, got = run(net, list(net.parameters()), x)
    assert [name for name, _ in heard] == ["linear_act", "linear_act", "linear"]
    _, want = run(net, list(net.parameters()), x, "torch")
    assert_close(got, want)


def test_eval_mode_consumes_the_dropout(device):
    net = model(fastnn.Linear(4, 4), fastnn.ReLU(), fastnn.Dropout(0.9)).to(device).eval()
    x = torch.randn(3, 4, device=device)
    heard, got = run(net, list(net.parameters()), x)
    assert heard == FUSED
    _, want = run(net, list(net.parameters()), x, "torch")
    assert_close(got, want)


def test_dropout_in_place_draws_apart(device):
    net = model(fastnn.Linear(4, 4), fastnn.GELU(), fastnn.Dropout(0.5, inplace=True)).to(device)
    heard, _ = run(net, list(net.parameters()), torch.randn(3, 4, device=device))
    assert [name for name, _ in heard] == ["linear_act", "dropout"]


# ---- Cases that run apart ----------------------------------------------------------------------


HOOKS = {
    "forward": lambda m, f: m.register_forward_hook(lambda *a: f()),
    "forward pre": lambda m, f: m.register_forward_pre_hook(lambda *a: f()),
    "backward": lambda m, f: m.register_full_backward_hook(lambda *a: f()),
    "backward pre": lambda m, f: m.register_full_backward_pre_hook(lambda *a: f()),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_hooks_on_a_member_fire(kind, at, device):
    net = model(fastnn.Linear(4, 4), fastnn.GELU(), fastnn.Dropout(0.5)).to(device)
    x = torch.randn(3, 4, device=device)
    fired = []
    handle = HOOKS[kind](net[at], lambda: fired.append(1))
    heard, got = run(net, list(net.parameters()), x)
    assert fired == [1]
    name = type(net[at]).__name__
    if at < 2:
        assert heard == [
            ("linear_act", f"not fused: a hook on {name}"),
            ("linear", None), ("gelu", None), ("dropout", None),
        ]  # fmt: skip
    else:
        assert heard == [("linear_act", None), ("dropout", None)]
    handle.remove()
    heard, again = run(net, list(net.parameters()), x)
    assert heard == FUSED and fired == [1]
    assert_close(again, got)


@pytest.mark.parametrize(
    "register",
    [
        "register_module_forward_hook",
        "register_module_forward_pre_hook",
        "register_module_full_backward_hook",
        "register_module_full_backward_pre_hook",
    ],
)
def test_hooks_on_all_modules_fire(register, device):
    net = model(fastnn.Linear(4, 4), fastnn.ReLU()).to(device)
    seen = []
    handle = getattr(stock.modules.module, register)(lambda m, *a: seen.append(type(m).__name__))
    try:
        heard, _ = run(net, list(net.parameters()), torch.randn(3, 4, device=device))
    finally:
        handle.remove()
    assert {"Linear", "ReLU"} <= set(seen)
    assert [name for name, _ in heard] == ["linear", "relu"]


def test_other_ways_to_watch_a_member(device):
    x = torch.randn(3, 4, device=device)

    def names(net):
        heard, _ = run(net, list(net.parameters()), x)
        return [name for name, why in heard if why is None]

    net = model(fastnn.Linear(4, 4), fastnn.ReLU()).to(device)
    net[1].forward = lambda x: F.relu(x) + 1
    assert names(net) == ["linear", "relu"]

    net = model(fastnn.Linear(4, 4), fastnn.ReLU()).to(device)
    stock.utils.parametrizations.weight_norm(net[0])
    assert names(net) == ["linear", "relu"]

    class MyLinear(fastnn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    assert names(model(MyLinear(4, 4), fastnn.ReLU()).to(device)) == ["linear", "relu"]
    net = fastnn.Sequential(stock.Linear(4, 4), fastnn.ReLU()).to(device)  # one stock layer
    assert names(net) == ["relu"]


def test_tracing_sees_the_members(device):
    net = model(fastnn.Linear(4, 4), fastnn.ReLU()).eval()
    x = torch.randn(3, 4)
    graph = torch.fx.symbolic_trace(net)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["0", "1"]
    torch.testing.assert_close(graph(x), net(x))
    torch.testing.assert_close(torch.vmap(net)(x), net(x))
    torch.testing.assert_close(torch.func.jacrev(net)(x).sum((0, 1)).shape, x.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(net, x)
    assert [name for name, _ in traced.named_children()] == ["0", "1"]
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))


class Swaps(stock.Module):
    """Puts another member in the place of one that follows it, when it runs."""

    def __init__(self, change):
        super().__init__()
        self.change, self.net = change, []

    def forward(self, x):
        self.change(self.net[0])
        return x


def _swaps(nn, change):
    torch.manual_seed(0)
    swaps = Swaps(change)
    others = nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), swaps, *others)
    swaps.net.append(net)
    return net


def _put(i, make):
    return lambda net: net.__setitem__(i, make())


CHANGES = {
    "the next": _put(3, lambda: stock.Flatten(0)),
    "the second of the next group": _put(4, stock.Tanh),
    "a later one": _put(5, lambda: stock.Flatten(0)),
    "one before": _put(0, stock.Tanh),
    "one is added": lambda net: net.append(stock.ReLU()),
    "one is deleted": lambda net: net._modules.pop("5"),
    "itself": _put(2, stock.Identity),
    "itself, out of the table": lambda net: (net._modules.pop("2"), net.append(stock.Tanh())),
}


@pytest.mark.parametrize("mode", ["triton", "auto"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_member_that_replaces_another_one(change, mode, device):
    """PyTorch's loop sees the member that stands there when its turn comes."""
    x = torch.randn(3, 4, device=device)
    found = []
    for nn in (stock, fastnn):
        net = _swaps(nn, change).to(device)
        with fastnn.backend(mode), fastnn.decisions() as heard:
            try:
                found.append(net(x))
            except (RuntimeError, IndexError) as error:
                found.append(error)
    assert ("linear_act", None) in [(op.name, why) for op, why, _ in heard]
    want, got = found
    if isinstance(want, Exception):
        assert type(got) is type(want) and str(got) == str(want)
    else:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_other_values_pass_through():
    """A Sequential accepts what its members accept: tuples, integers, calls without keywords."""

    class Pair(stock.Module):
        def forward(self, pair):
            return pair[0] + pair[1]

    net = fastnn.Sequential(Pair(), fastnn.Linear(3, 3), fastnn.ReLU())
    assert net((torch.ones(2, 3), torch.ones(2, 3))).shape == (2, 3)
    assert fastnn.Sequential()(5) == 5
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        net((torch.ones(2, 4), torch.ones(2, 4)))


# ---- Same object -------------------------------------------------------------------------------


def test_container_is_stocks(device):
    members = [fastnn.Linear(4, 5), fastnn.GELU(), fastnn.Dropout(0.1), fastnn.Linear(5, 2)]
    ours, theirs = fastnn.Sequential(*members), stock.Sequential(*members)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert list(ours.children()) == members and len(ours) == 4 and ours[-1] is members[3]
    assert type(ours[:2]) is fastnn.Sequential and list(ours[:2]) == members[:2]
    assert isinstance(ours, stock.Sequential) and isinstance(theirs, fastnn.Sequential)
    ours.append(fastnn.ReLU()).insert(0, fastnn.Identity()).extend([fastnn.Tanh()])
    assert [type(m).__name__ for m in ours] == [
        *("Identity", "Linear", "GELU", "Dropout", "Linear", "ReLU", "Tanh"),
    ]
    x = torch.randn(3, 4, device=device)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is fastnn.Sequential
        with fastnn.decisions() as heard:
            twin.to(device).eval()(x)
        assert [op.name for op, _, _ in heard] == ["linear_act", "linear_act", "tanh"]


def test_explain_shows_the_decision(device):
    net = model(fastnn.Linear(4, 5), fastnn.ReLU(), fastnn.Linear(5, 2)).to(device)
    with fastnn.backend("triton"):
        rows = fastnn.explain(net, torch.randn(3, 4, device=device))
    assert [(r.layer, r.op, r.path) for r in rows] == [
        ("", "linear_act", "kernel"),
        ("2", "linear", "kernel"),
    ]
    rows = fastnn.explain(net.double(), torch.randn(3, 4, device=device).double())
    why = "no kernel supports float64 (supported: float32, float16, bfloat16)"
    assert [(r.op, r.path, r.reason) for r in rows] == [
        ("linear_act", "stock", why),
        ("linear", "stock", why),
    ]


def test_wrong_activation_names_the_accepted_ones():
    with pytest.raises(ValueError, match="activation 'swish'; accepted are relu, "):
        F.linear_act(torch.ones(2, 3), torch.ones(4, 3), activation="swish")
