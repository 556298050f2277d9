"""Batch, group and instance norm beyond the parity rows: buffers, versions, fusion."""

import contextlib
import copy

import pytest
import torch
import torch.nn as stock

import fastnn
import fastnn.functional as F
from fastnn import kernels
from fastnn.testing import Side, compare_sides
from fastnn.testing.meter import nbytes, traffic
from tests.errors import assert_same_error
from tests.marks import interpreted, on_device


@pytest.fixture(autouse=True)
def no_size_gate(simulate):
    simulate(least=0, source="the test")


def twins(name, *args, device="cpu", **options):
    """(our layer, the stock layer), in the same state."""
    ours = getattr(fastnn, name)(*args, **options).to(device)
    its = getattr(stock, name)(*args, **options).to(device)
    its.load_state_dict(ours.state_dict())
    return ours, its


# ---- running statistics --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 3, 7), (2, 3, 70, 64)], ids=["whole", "chunks"])
@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
@pytest.mark.parametrize("kind", ["Batch", "Instance"])
def test_buffers_over_several_batches(kind, momentum, shape, device):
    name = f"{kind}Norm{len(shape) - 2}d"
    ours, its = twins(name, 3, momentum=momentum, track_running_stats=True, device=device)
    first = [[b._version for b in layer.buffers()] for layer in (ours, its)]
    for i in range(3):
        x = torch.randn(shape, device=device) * (i + 1) + i
        with fastnn.backend("triton"):
            y = ours(x)
        torch.testing.assert_close(y, its(x), rtol=1e-5, atol=1e-5)
        for a, b in zip(ours.buffers(), its.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    bumps = [
        [b._version - v for b, v in zip(layer.buffers(), versions, strict=True)]
        for layer, versions in zip((ours, its), first, strict=True)
    ]
    assert bumps[0] == bumps[1]
    ours.eval(), its.eval()
    before = copy.deepcopy(ours.state_dict())
    with fastnn.backend("triton"):
        torch.testing.assert_close(ours(x), its(x), rtol=1e-5, atol=1e-5)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_batch_of_which_not_all_is_tracked(device):
    """Training without statistics to track, and statistics without a training that updates them."""
    for options in ({"track_running_stats": False}, {"track_running_stats": True}):
        ours, its = twins("BatchNorm1d", 4, device=device, **options)
        ours.track_running_stats = its.track_running_stats = False  # stock reads it in each call
        x = torch.randn(5, 4, device=device)
        with fastnn.backend("triton"):
            torch.testing.assert_close(ours(x), its(x))
        for a, b in zip(ours.buffers(), its.buffers(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_takes_float32_parameters_with_16_bit_input(dtype, training, device):
    x = torch.randn(6, 4, 5, device=device).to(dtype).requires_grad_()
    w, b = torch.rand(2, 4, device=device).unbind()
    parameters = w.clone().requires_grad_(), b.clone().requires_grad_()
    statistics = torch.randn(4, device=device), torch.rand(4, device=device) + 0.5
    sides = [Side(f) for f in (F.batch_norm, stock.functional.batch_norm)] * 2
    result = compare_sides(*sides[:2], sides[1], (x, *statistics, *parameters, training))
    assert not result.failures and result.path == "kernel"
    for wrong in (torch.float16, torch.bfloat16):
        given = torch.ones(3, 4), None, None, w.to(wrong), None, True
        assert_same_error(F.batch_norm, stock.functional.batch_norm, *given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["group_norm", "group_norm_act", "local_response_norm"])
def test_under_the_rule_of_cuda_autocast(name, dtype, device):
    """With 16-bit input and float32 parameters, the result is computed and returned in float32, and
    the gradient of the input has 16 bits."""
    op = getattr(F, name).op
    x = torch.randn(2, 4, 5, 3, device=device).to(dtype).requires_grad_()
    w, b = torch.rand(2, 4, device=device).unbind()
    rest = (3,) if name == "local_response_norm" else (2, w, b)
    y = op.fused(x, *rest, out_dtype=torch.float32)
    want = op.stock(x.float(), *rest)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(y)
    (dx,), (its,) = (torch.autograd.grad(t, x, dy) for t in (y, want))
    assert dx.dtype == dtype
    torch.testing.assert_close(dx, its, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


# ---- what stock raises ---------------------------------------------------------------------------


def edit_outcome(function, changed, device):
    torch.manual_seed(0)
    x, w, b = torch.randn(4, 3, 5), torch.rand(3), torch.rand(3)
    x, w, b = (t.to(device).requires_grad_() for t in (x, w, b))
    rm, rv = torch.zeros(3, device=device), torch.ones(3, device=device)
    x = x * 1
    y = function(x, w, b, rm, rv)
    with torch.no_grad():
        {"x": x, "w": w, "b": b, "rm": rm, "y": y}[changed].add_(1)
    try:
        y.sum().backward()
    except RuntimeError as e:
        assert "modified by an inplace operation" in str(e)
        return "raises"
    return "passes"


@pytest.mark.parametrize("changed", ["x", "w", "b", "rm", "y"])
@pytest.mark.parametrize(
    "call",
    [
        lambda F, x, w, b, rm, rv: F.group_norm(x, 3, w, b),
        lambda F, x, w, b, rm, rv: F.batch_norm(x, rm, rv, w, b, True),
        lambda F, x, w, b, rm, rv: F.batch_norm(x, rm, rv, w, b, False),
        lambda F, x, w, b, rm, rv: F.instance_norm(x, rm, rv, w, b, True),
        lambda F, x, w, b, rm, rv: F.instance_norm(x, rm, rv, w, b, False),
        lambda F, x, w, b, rm, rv: F.local_response_norm(x, 2),
    ],
    ids=["group", "batch", "batch eval", "instance", "instance eval", "local response"],
)
def test_in_place_changes_before_backward(call, changed, device):
    """Edits raise where they raise in stock, because a kernel saves what stock saves."""
    theirs = edit_outcome(lambda *t: call(stock.functional, *t), changed, device)
    with fastnn.backend("triton"):
        assert edit_outcome(lambda *t: call(F, *t), changed, device) == theirs


@pytest.mark.parametrize("inside", [True, False], ids=["inference", "outside"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_statistics_made_under_inference_mode(name, training, inside, device):
    """Each norm reads and updates them where stock does. An instance norm updates them only under
    inference_mode.
    """
    ended = []
    for functions in (stock.functional, F):
        torch.manual_seed(0)
        x = torch.randn(2, 3, 5, device=device)
        with torch.inference_mode():
            mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
        mode = torch.inference_mode() if inside else contextlib.nullcontext()
        try:
            with mode, fastnn.backend("triton" if functions is F else "torch"):
                y = getattr(functions, name)(x, mean, var, None, None, training)
        except RuntimeError as e:
            ended.append(str(e).splitlines()[0])
            continue
        with torch.inference_mode():
            ended.append([t.clone() for t in (y, mean, var)])
    if isinstance(ended[0], str) or isinstance(ended[1], str):
        assert ended[0] == ended[1]
    else:
        with torch.inference_mode():
            torch.testing.assert_close(ended[1], ended[0])
    raises = name == "instance_norm" and training and not inside
    assert isinstance(ended[0], str) == raises


@pytest.mark.parametrize(
    "call",
    [
        lambda F: F.batch_norm(torch.ones(1, 3), None, None, training=True),
        lambda F: F.batch_norm(torch.ones(1, 3, 1, 1), None, None, training=True),
        lambda F: F.batch_norm(torch.ones(2, 3), None, None),
        lambda F: F.batch_norm(torch.ones(2, 3), torch.ones(3), None),
        lambda F: F.batch_norm(torch.ones(2, 3), None, None, torch.ones(2), training=True),
        lambda F: F.batch_norm(torch.ones(2, 3), torch.ones(4), torch.ones(4)),
        lambda F: F.batch_norm(torch.ones(2, 3), None, None, training=True, eps=0.0),
        lambda F: F.batch_norm(torch.ones(2, 3), torch.ones(3), torch.ones(3), eps=-1.0),
        lambda F: F.group_norm(torch.ones(3), 3),
        lambda F: F.group_norm(torch.ones(2, 3), 2),
        lambda F: F.group_norm(torch.ones(1, 3), 3),
        lambda F: F.group_norm(torch.ones(2, 4), 2, torch.ones(2)),
        lambda F: F.group_norm(torch.ones(2, 4), 2, eps="x"),
        lambda F: F.instance_norm(torch.ones(2, 3, 1)),
        lambda F: F.instance_norm(torch.ones(2, 3, 4), None, None, torch.ones(2)),
        lambda F: F.local_response_norm(torch.ones(2, 3), 2),
        lambda F: F.local_response_norm(torch.ones(2, 3, 4), 0),
    ],
)
@on_device
def test_wrong_calls_raise_what_stock_raises(call):
    assert_same_error(lambda: call(F), lambda: call(stock.functional))


@pytest.mark.parametrize("name", ["batch_norm_act", "group_norm_act"])
def test_a_wrong_activation_names_the_accepted_ones(name):
    rest = (None, None) if name[0] == "b" else (1,)
    with pytest.raises(ValueError, match=f"{name}: activation 'swish'; accepted are relu, "):
        getattr(F, name)(torch.ones(2, 3), *rest, activation="swish")


# ---- classes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("kind", ["Batch", "Instance"])
def test_lazy_layers_become_accelerated_ones(kind, d, device):
    options = {"affine": True, "track_running_stats": True}
    lazy = getattr(fastnn, f"Lazy{kind}Norm{d}d")(**options).to(device)
    x = torch.randn(2, 4, *(3,) * d, device=device)
    with fastnn.decisions() as heard, fastnn.backend("triton"):
        y = lazy(x)
    assert [why for _, why, _ in heard] == [None]
    assert type(lazy) is getattr(fastnn, f"{kind}Norm{d}d") and lazy.num_features == 4
    torch.testing.assert_close(y, getattr(stock, f"{kind}Norm{d}d")(4, **options)(x))


def test_instance_norm_warns_as_stock(device):
    x = torch.randn(2, 4, 5, device=device)
    for layers in (fastnn, stock):
        with pytest.warns(UserWarning, match="does not match num_features"):
            layers.InstanceNorm1d(3)(x)


def test_sync_batch_norm_is_batch_norm_where_nothing_is_distributed(device):
    ours, its = twins("SyncBatchNorm", 4, device=device)
    x = torch.randn(3, 4, 5, device=device)
    for _ in range(2):
        with fastnn.decisions() as heard, fastnn.backend("triton"):
            torch.testing.assert_close(ours(x), its(x))
        assert [(op.name, why) for op, why, _ in heard] == [("batch_norm", None)]
    for a, b in zip(ours.buffers(), its.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    for wrong in (torch.ones(4), torch.ones(2, 0)):
        assert_same_error(ours, its, wrong)


# ---- Sequential ----------------------------------------------------------------------------------


def outcome(call, parameters, x, mode):
    x = x.detach().clone().requires_grad_()
    with fastnn.backend(mode), fastnn.decisions() as heard:
        y = call(x)
        dy = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
        grads = torch.autograd.grad(y, [x, *parameters], dy)
    return [(op.name, why) for op, why, _ in heard], [y.detach(), *grads]


def unbiased(norm):
    """The norm as `bias=False` makes it. Not every torch has that option."""
    norm.register_parameter("bias", None)
    return norm


NETS = {
    "batch, relu": (lambda: [fastnn.BatchNorm2d(6), fastnn.ReLU()], "batch_norm_act"),
    "batch, relu in place": (
        lambda: [fastnn.BatchNorm2d(6), fastnn.ReLU(inplace=True)],
        "batch_norm_act",
    ),
    "batch, hardswish": (lambda: [fastnn.BatchNorm2d(6), fastnn.Hardswish()], "batch_norm_act"),
    "batch, leaky": (lambda: [fastnn.BatchNorm2d(6), fastnn.LeakyReLU(0.3)], "batch_norm_act"),
    "group, silu": (lambda: [fastnn.GroupNorm(2, 6), fastnn.SiLU()], "group_norm_act"),
    "group, gelu": (lambda: [unbiased(fastnn.GroupNorm(3, 6)), fastnn.GELU()], "group_norm_act"),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_norm_and_activation_run_as_one(net, training, last, device):
    make, name = NETS[net]
    sequential = fastnn.Sequential(*make()).to(device).train(training)
    for p in sequential.parameters():
        p.data.uniform_(0.5, 1.5)
    twin = copy.deepcopy(sequential)
    x = torch.randn(3, 6, 4, 5, device=device)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    heard, got = outcome(sequential, list(sequential.parameters()), x, "triton")
    assert heard == [(name, None)]
    _, want = outcome(twin, list(twin.parameters()), x, "torch")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert got[0].stride() == want[0].stride()
    for a, b in zip(sequential.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("at", [0, 1])
def test_a_hook_keeps_them_apart(at, device):
    net = fastnn.Sequential(fastnn.BatchNorm1d(3), fastnn.ReLU()).to(device)
    fired = []
    net[at].register_forward_hook(lambda *a: fired.append(1))
    heard, _ = outcome(net, list(net.parameters()), torch.randn(4, 3, device=device), "triton")
    why = f"not fused: a hook on {type(net[at]).__name__}"
    assert heard == [("batch_norm_act", why), ("batch_norm", None), ("relu", None)]
    assert fired == [1] and net[0].num_batches_tracked == 1


def test_others_are_left_apart(device):
    class MyNorm(fastnn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x) * 2

    x = torch.randn(4, 3, device=device)
    for first in (MyNorm(3), stock.BatchNorm1d(3), fastnn.SyncBatchNorm(3)):
        net = fastnn.Sequential(first, fastnn.ReLU()).to(device)
        heard, _ = outcome(net, list(net.parameters()), x, "triton")
        assert heard[-1] == ("relu", None)
    with pytest.raises(ValueError, match="expected 4D input"):
        fastnn.Sequential(fastnn.BatchNorm2d(3), fastnn.ReLU())(x)


def test_explain_tells_of_the_fusion(device):
    net = fastnn.Sequential(fastnn.GroupNorm(1, 4), fastnn.SiLU(), fastnn.BatchNorm1d(4)).to(device)
    keys, text = list(net.state_dict()), repr(net)
    with fastnn.backend("triton"):
        rows = fastnn.explain(net, torch.randn(3, 4, 5, device=device))
    assert [(r.layer, r.op, r.path) for r in rows] == [
        ("", "group_norm_act", "kernel"),
        ("2", "batch_norm", "kernel"),
    ]
    assert (list(net.state_dict()), repr(net)) == (keys, text)
    assert int(net[2].num_batches_tracked) == 0


# ---- second order --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, rest, grads",
    [
        ("batch_norm", (None, None, "w", "b", True), 3),
        ("batch_norm_act", (None, None, "w", "b", True), 3),
        ("batch_norm_act", ("m", "v", "w", "b", False, 0.1, 1e-5, "silu"), 3),
        ("batch_norm_add_relu", ("r", None, None, "w", "b", True), 4),
        ("group_norm", (2, "w", "b"), 3),
        ("group_norm_act", (2, "w", "b", 1e-5, "gelu"), 3),
        ("instance_norm", (None, None, "w", "b"), 3),
        ("local_response_norm", (2, 0.5), 1),
    ],
)
def test_second_derivatives(name, rest, grads, device):
    torch.manual_seed(0)
    x, r = torch.randn(2, 3, 4, 5, device=device).unbind()
    made = {k: torch.rand(4) for k in ("w", "b", "m", "v")} | {"r": r}
    wanting = [x.clone().requires_grad_()]
    given = []
    for v in rest:
        if isinstance(v, str) and v in made:
            t = made[v].to(device).clone()
            if v not in "mv":
                wanting.append(t.requires_grad_())
            given.append(t)
        else:
            given.append(v)
    assert len(wanting) == grads
    found = []
    for call, mode in ((getattr(F, name), "triton"), (getattr(F, name).op.stock, "torch")):
        with fastnn.backend(mode):
            y = call(wanting[0], *given)
            dy = torch.linspace(-1, 1, y.numel(), device=device).view(y.shape).requires_grad_()
            first = torch.autograd.grad(y, wanting, dy, create_graph=True)
            loss = sum(t.square().sum() for t in first)
            second = torch.autograd.grad(loss, [dy, *wanting], allow_unused=True)
        found.append([*first, *second])
    for a, b in zip(*found, strict=True):
        if a is None or b is None:  # no dependence, or zero
            assert (a if b is None else b) is None or not (a if b is None else b).any()
        else:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- tiles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(("programs", "grid"), [(1, 65535), (64, 65535), (64, 2)])
def test_any_chunks_give_the_same(last, programs, grid, monkeypatch, device):
    """Small tiles, and few or many programs, run all paths of large inputs on a small input."""
    monkeypatch.setattr(kernels.channel_norm, "WHOLE", 8)
    monkeypatch.setattr(kernels.channel_norm, "WHOLE_BWD", 8)
    monkeypatch.setattr(kernels.channel_norm, "TILE", 64)
    monkeypatch.setattr(kernels.channel_norm, "PROGRAMS", programs)
    monkeypatch.setattr(kernels.channel_norm, "GRID_Y", grid)
    x = torch.randn(3, 6, 9, 7, device=device) + 50
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    w, b = (torch.rand(6, device=device).requires_grad_() for _ in range(2))
    for name, rest in (
        ("batch_norm", (None, None, w, b, True)),
        ("batch_norm_act", (None, None, w, b, True)),
        ("group_norm", (2, w, b)),
        ("group_norm_act", (1, w, b)),
        ("instance_norm", (None, None, w, b)),
    ):
        record = getattr(F, name).op
        sides = Side(getattr(F, name)), Side(record.stock), Side(record.stock)
        result = compare_sides(*sides, (x, *rest), device=device)
        assert not result.failures and result.path == "kernel", (name, result)


# ---- traffic -------------------------------------------------------------------------------------


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


@interpreted
@pytest.mark.parametrize("laid_out", [torch.Tensor.contiguous, channels_last])
@pytest.mark.parametrize(
    "name, shape, rest, forward, backward",
    [
        ("batch_norm", (4, 32, 32, 32), (None, None, "w", "b", True), 3, 5),
        ("batch_norm_act", (4, 32, 32, 32), (None, None, "w", "b", True), 3, 5),
        ("batch_norm_act", (4, 32, 32, 32), ("m", "v", "w", "b", False), 2, 5),
        ("batch_norm_add_relu", (4, 32, 32, 32), ("r", None, None, "w", "b", True), 4, 7),
        ("batch_norm", (2, 32, 16, 16), (None, None, "w", "b", True), 2, 3),
        ("group_norm", (8, 32, 16, 16), (2, "w", "b"), 2, 3),
        ("group_norm_act", (8, 32, 16, 16), (2, "w", "b"), 2, 3),
        ("group_norm", (1, 16, 64, 64), (1, "w", "b"), 3, 5),
        ("local_response_norm", (4, 32, 16, 16), (5,), 2, 3),
    ],
)
def test_bytes_at_the_least_passes(
    name, shape, rest, forward, backward, laid_out, monkeypatch, device
):
    if name == "local_response_norm" and laid_out is channels_last:
        pytest.skip("stock's")
    monkeypatch.setattr(kernels.channel_norm, "PROGRAMS", 32)
    x = laid_out(torch.randn(shape, device=device).bfloat16()).requires_grad_()
    made = {k: torch.rand(shape[1], device=device).bfloat16() for k in "mvwb"}
    made["w"].requires_grad_(), made["b"].requires_grad_()
    made["r"] = laid_out(torch.randn(shape, device=device).bfloat16()).requires_grad_()
    rest = [made.get(v, v) if isinstance(v, str) else v for v in rest]
    dy = laid_out(torch.randn(shape, device=device).bfloat16())
    with fastnn.backend("triton"):
        with traffic(distinct=False) as ours:
            y = getattr(F, name)(x, *rest)
        assert ours.sectors.total() <= 1.05 * forward * nbytes(x)
        with traffic(distinct=False) as ours:
            y.backward(dy)
        assert ours.sectors.total() <= 1.05 * backward * nbytes(x)


@interpreted
@pytest.mark.parametrize("shape", [(2, 4, 0), (0, 4, 3), (2, 4, 0, 5)], ids=str)
@pytest.mark.parametrize("name", ["batch_norm", "group_norm", "instance_norm"])
def test_the_gate_answers_for_planes_without_elements(name, shape):
    """`explain` asks it, and a graph whose sizes are not known. PyTorch runs the call."""
    rest = {"batch_norm": (None, None, None, None, True), "group_norm": (2,), "instance_norm": ()}
    x = torch.randn(shape)

    def outcome(home):
        try:
            return home(x, *rest[name])
        except (RuntimeError, ValueError) as e:
            return type(e), str(e)

    with fastnn.decisions() as heard:
        ours = outcome(getattr(F, name))
    its = outcome(getattr(stock.functional, name))
    assert [d.op.name for d in heard] == [name] and heard[0].why is not None
    assert ours == its if isinstance(its, tuple) else torch.equal(ours, its)
