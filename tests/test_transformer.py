"""Transformers: allocations and launches, and the conditions that turn off the fused paths."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn as stock
from torch.nn.utils import parametrizations

import fastnn
from fastnn import _rng
from fastnn.bench import memory
from fastnn.layers._layer import STOCK
from fastnn.testing.noise import recording, replaying
from tests.marks import interpreted, on_device

OURS_ALWAYS = {
    "multi_head_attention_forward", "linear_act", "dropout_add", "dropout_add_layer_norm",
    "dropout_add_rms_norm",
}  # fmt: skip


@pytest.fixture(autouse=True)
def gate(simulate):
    """`auto` as on large inputs: kernels run if the shipped table has a size for them."""
    simulate(least=dict.fromkeys(OURS_ALWAYS, 0), others="shipped")


def paths(model, *inputs, **kwargs):
    with fastnn.decisions() as heard:
        out = model(*inputs, **kwargs)
    return out, [(op.name, why) for op, why, _ in heard]


def encoder_layer(**options):
    return fastnn.TransformerEncoderLayer(8, 2, 12, **{"dropout": 0.0, **options})


FUSED = [
    ("dropout_add_layer_norm", None),
    ("linear_act", None),
    ("dropout_add_layer_norm", None),
]


def fused_part(heard):
    """The decisions without those of attention and its projections."""
    return [(name, why) for name, why in heard if name in ("linear_act",) or "dropout" in name]


# ---- Members ------------------------------------------------------------------------------------


def test_members_are_ours():
    layer = stock.TransformerEncoderLayer(8, 2, 12)
    models = (
        encoder_layer(),
        fastnn.TransformerDecoderLayer(8, 2, 12),
        fastnn.Transformer(8, 2, 1, 1, 12, batch_first=True),
        fastnn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
    )
    for model in models:
        for member in model.modules():
            known = type(member) in STOCK
            assert known or type(member).__name__ in (
                "NonDynamicallyQuantizableLinear",
                "ModuleList",
            )
        assert pickle.loads(pickle.dumps(model)).state_dict().keys() == model.state_dict().keys()
    assert type(layer.linear1) is stock.Linear, "the user's own layer was changed"
    custom = stock.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    model = fastnn.Transformer(8, 2, 1, 1, 12, custom_encoder=custom)
    assert model.encoder is custom and type(custom.layers[0]) is stock.TransformerEncoderLayer


def test_same_parameters_from_the_same_seed():
    torch.manual_seed(0)
    ours = fastnn.Transformer(8, 2, 1, 1, 12, batch_first=True)
    torch.manual_seed(0)
    its = stock.Transformer(8, 2, 1, 1, 12, batch_first=True)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), its.parameters(), strict=True))


# ---- Observers ----------------------------------------------------------------------------------


@on_device
def test_a_plain_layer_is_fused():
    layer, x = encoder_layer(), torch.randn(5, 2, 8)
    _, heard = paths(layer, x)
    assert fused_part(heard) == FUSED
    _, heard = paths(encoder_layer(norm_first=True, dropout=0.1), x)
    assert [name for name, why in heard if not why and "dropout" in name] == [
        "dropout_add_layer_norm",
        "dropout_add",
    ]
    converted = fastnn.convert(stock.TransformerEncoderLayer(8, 2, 12))
    assert fused_part(paths(converted, x)[1]) == FUSED


HOOKS = {
    "forward": lambda m, f: m.register_forward_hook(lambda *a: f.append(1)),
    "forward_pre": lambda m, f: m.register_forward_pre_hook(lambda *a: f.append(1)),
    "backward": lambda m, f: m.register_full_backward_hook(lambda *a: f.append(1)),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize(
    ("member", "op"),
    [
        ("linear1", "linear_act"),
        ("dropout", "linear_act"),
        ("norm1", "dropout_add_layer_norm"),
        ("dropout2", "dropout_add_layer_norm"),
        ("linear2", None),
        ("self_attn", None),
    ],
)
@on_device
def test_a_hook_on_a_member_fires(member, op, kind):
    layer, x, fired = encoder_layer(), torch.randn(5, 2, 8, requires_grad=True), []
    plain = layer(x)
    HOOKS[kind](getattr(layer, member), fired)
    out, heard = paths(layer, x)
    out.sum().backward()
    assert fired == [1]
    torch.testing.assert_close(out, plain)
    aside = [(name, why) for name, why in heard if why and why.startswith("not fused")]
    if op is None:
        assert not aside
    else:
        ((name, why),) = aside
        assert name == op and why.startswith("not fused: a hook on")
        assert ("dropout_add_layer_norm", None) in heard, "the rest stays fused"


def test_global_hooks_fire_for_each_member():
    layer, x, fired = encoder_layer(), torch.randn(5, 2, 8), []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda m, a, out: fired.append(type(m).__name__)
    )
    try:
        _, heard = paths(layer, x)
    finally:
        handle.remove()
    counts = {n: fired.count(n) for n in ("Linear", "LayerNorm", "Dropout", "MultiheadAttention")}
    assert counts == {"Linear": 2, "LayerNorm": 2, "Dropout": 3, "MultiheadAttention": 1}
    assert not any(name in OURS_ALWAYS and "dropout_add" in name for name, _ in heard)


class Scaled(stock.Linear):
    def forward(self, x):
        return super().forward(x) * 2


CHANGES = {
    "parametrized": (
        lambda m: parametrizations.orthogonal(m.linear1),
        "linear1 is a ParametrizedLinear",
    ),
    "a subclass": (lambda m: setattr(m, "linear1", Scaled(8, 12)), "linear1 is a Scaled"),
    "replaced": (
        lambda m: setattr(m, "norm1", stock.Identity()),
        "a norm is a Identity",
    ),
    "in place": (lambda m: setattr(m.dropout1, "inplace", True), "a dropout is Dropout"),
    "a forward of its own": (
        lambda m: setattr(m.norm2, "forward", lambda x: x),
        "LayerNorm has a forward of its own",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@on_device
def test_a_changed_member_is_called_as_it_is(change):
    apply, reason = CHANGES[change]
    layer, x = encoder_layer(), torch.randn(5, 2, 8)
    apply(layer)
    its = fastnn.revert(copy.deepcopy(layer))
    if change == "a forward of its own":
        its.norm2.forward = lambda x: x
    out, heard = paths(layer, x)
    torch.testing.assert_close(out, its(x))
    assert any(reason in (why or "") for _, why in heard)
    assert any(why is None for name, why in fused_part(heard)), "the rest stays fused"
    explained = str(fastnn.explain(layer, x))
    assert reason in explained


def test_an_overridden_block_is_called():
    class Mine(fastnn.TransformerEncoderLayer):
        def _ff_block(self, x):
            return x

    layer, x = Mine(8, 2, 12, dropout=0.0), torch.randn(5, 2, 8)
    want = layer.norm2(2 * layer.norm1(x + layer.self_attn(x, x, x, need_weights=False)[0]))
    torch.testing.assert_close(layer(x), want)


@on_device
def test_an_rms_norm_in_its_place_is_fused():
    layer, x = encoder_layer(), torch.randn(5, 2, 8)
    layer.norm1 = fastnn.RMSNorm(8, eps=1e-5)
    _, heard = paths(layer, x)
    assert fused_part(heard)[0] == ("dropout_add_rms_norm", None)


def test_torch_mode_runs_stock(monkeypatch):
    layer, x = encoder_layer(), torch.randn(5, 2, 8)
    with fastnn.backend("torch"):
        _, heard = paths(layer, x)
    assert all(why == 'backend("torch")' for _, why in heard) and heard


# ---- Inference ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*[Nn]ested:UserWarning")
@pytest.mark.parametrize("padded", [False, True])
def test_stocks_inference_kernel_stays(padded, monkeypatch):
    """A stack in eval without gradients takes it where stock does, also with nested tensors."""
    calls = []
    kernel = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch,
        "_transformer_encoder_layer_fwd",
        lambda src, *a: calls.append(src.is_nested) or kernel(src, *a),
    )
    layer = stock.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    for namespace in (stock, fastnn):
        model = namespace.TransformerEncoder(layer, 2).eval()
        with torch.no_grad():
            model(x, src_key_padding_mask=mask)
        assert calls == [padded, padded]
        calls.clear()
        model(x, src_key_padding_mask=mask)  # with gradients
        model.train()
        with torch.no_grad():
            model(x, src_key_padding_mask=mask)
        assert not calls


@pytest.mark.parametrize("norm_first", [False, True])
def test_eval_and_training_without_dropout_agree_to_the_bit(norm_first):
    layer, x = encoder_layer(norm_first=norm_first), torch.randn(5, 2, 8)
    train = layer(x)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), train)


# ---- Noise --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_noise_is_drawn_in_stocks_order(norm_first, batch_first, device):
    """A fused layer and its members called one by one draw the same noise from the same seed."""
    torch.manual_seed(0)
    options = {"norm_first": norm_first, "batch_first": batch_first, "dropout": 0.5}
    layer = encoder_layer(**options).to(device)
    x = torch.randn(4, 3, 8, device=device, requires_grad=True)
    watched = copy.deepcopy(layer)
    for member in watched.modules():
        if isinstance(member, (stock.Dropout, stock.LayerNorm)):
            member.register_forward_hook(lambda *a: None)
    results = []
    for model in (layer, watched):
        torch.manual_seed(3)
        with fastnn.backend("triton"):
            y = model(x)
            results.append(
                (y.detach(), *torch.autograd.grad(y.square().sum(), [x, *model.parameters()]))
            )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- Second derivatives -------------------------------------------------------------------------


def attend(F, x, w, mask, p, average):
    out, weights = F.multi_head_attention_forward(
        x, x, x, 4, 2, w[:12], None, None, None, False, p, w[12:], None, attn_mask=mask,
        average_attn_weights=average,
    )  # fmt: skip
    return out.sum() + (weights * torch.linspace(-1, 2, weights.numel()).view_as(weights)).sum()


def residual(name, prenorm):
    def call(F, x, w, mask, p, average):
        z, n = x * 2, w[0, :4]
        ours = getattr(fastnn.functional, name)
        function = ours if F is fastnn.functional else ours.op.stock
        rest = (n, n + 1) if "layer" in name else (n,)
        outs = function(z, x, (4,), *rest, 1e-5, p, True, prenorm)
        return sum((i + 1) * out.pow(3).sum() for i, out in enumerate(outs if prenorm else [outs]))

    return call


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("call", "average"),
    [
        (attend, True),
        (attend, False),
        (residual("dropout_add_layer_norm", False), None),
        (residual("dropout_add_layer_norm", True), None),
        (residual("dropout_add_rms_norm", True), None),
    ],
    ids=["averaged", "of each head", "layer_norm", "prenorm", "rms_norm"],
)
@on_device
def test_second_derivatives(call, p, average):
    """They are those of the stock formula, with the noise that the forward drew."""
    torch.manual_seed(0)
    inputs = [torch.randn(s, requires_grad=True) for s in ((3, 2, 4), (16, 4), (3, 3))]
    results, draws = [], []
    for F in (fastnn.functional, stock.functional):
        with fastnn.backend("triton"), replaying(draws) if draws else recording() as noted:
            y = call(F, *inputs, p, average)
        draws = draws or noted
        with fastnn.backend("triton"):
            grads = torch.autograd.grad(y, inputs, create_graph=True, allow_unused=True)
            grads = [g for g in grads if g is not None]
            second = torch.autograd.grad(
                sum(g.square().sum() for g in grads), inputs, allow_unused=True
            )
        results.append([*grads, *second])
    assert bool(draws) == (p > 0)
    for a, b in zip(*results, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# ---- Memory and launches ------------------------------------------------------------------------


def allocations(call):
    """The bytes of each allocation that `call` makes."""
    call()  # compiles, and fills caches
    return memory.allocations(call)


def attention_step(namespace, average, p):
    H, D, B, L = 16, 2, 1, 64
    torch.manual_seed(0)
    layer = namespace.MultiheadAttention(H * D, H, dropout=p)
    q = torch.randn(L, B, H * D, requires_grad=True)
    mask, padding = torch.zeros(L, L), torch.zeros(B, L)
    weights_gradient = torch.randn(B, L, L) if average else torch.randn(B, H, L, L)

    def step():
        out, weights = layer(q, q, q, padding, attn_mask=mask, average_attn_weights=average)
        torch.autograd.backward([out, weights], [torch.ones_like(out), weights_gradient])

    return step, B * H * L * L


@interpreted
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_weights_of_all_heads_are_never_allocated(p):
    """Neither forward nor backward allocates them, not even as a mask of bytes. Stock allocates
    about ten such tensors."""
    step, elements = attention_step(fastnn, True, p)
    made = allocations(step)
    assert made and max(made) < elements
    its = allocations(attention_step(stock, True, p)[0])
    assert sum(size >= 4 * elements for size in its) >= 5, "the count does not see them"
    peaks = [max(itertools.accumulate(sizes)) for sizes in (made, its)]
    assert peaks[0] < peaks[1] / 8


@interpreted
def test_weights_of_each_head_are_allocated_once():
    step, elements = attention_step(fastnn, False, 0.0)
    assert sum(size >= elements for size in allocations(step)) == 1


@interpreted
@pytest.mark.parametrize("norm_first", [False, True])
def test_launches_of_a_training_step(norm_first, monkeypatch):
    """At most 35; stock has about 50. Here the attention of stock counts as one fused kernel in
    each direction. On CUDA it is one kernel forward and 3 backward."""
    from fastnn.testing import meter

    # On a GPU the host reserves random numbers; here operators make them.
    monkeypatch.setattr(
        _rng, "draw_for", lambda device, launch: _rng.plain_draw(device, 1, 0, launch)
    )
    counts = {}
    for namespace in (fastnn, stock):
        layer = namespace.TransformerEncoderLayer(64, 2, 128, norm_first=norm_first)
        layer.self_attn.dropout = 0.0
        x = torch.randn(16, 2, 64, requires_grad=True)
        gradient = torch.randn(16, 2, 64)
        parameters = [x, *layer.parameters()]
        if namespace is fastnn:
            torch.autograd.grad(layer(x), parameters, gradient)  # fill caches
            with meter.all_traffic() as ours:
                torch.autograd.grad(layer(x), parameters, gradient)
            counts["ours"] = ours.cost.launches
        else:
            with meter.as_on_cuda(), meter.AtenTraffic() as its:
                torch.autograd.grad(layer(x), parameters, gradient)
            counts["stock"] = its.launches
    assert counts["ours"] + 2 <= 35 < counts["stock"] + 2, counts


@interpreted
@pytest.mark.parametrize("prenorm", [False, True])
def test_traffic_of_a_residual_norm(prenorm):
    """Each byte moves once: 8 passes over the rows, 9 if the sum is used too, and no mask."""
    from fastnn.testing.meter import nbytes, traffic

    z, x = (torch.randn(512, 256, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    w, b = (torch.randn(256, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    with fastnn.backend("triton"), traffic(races=True) as log:
        out = fastnn.functional.dropout_add_layer_norm(z, x, (256,), w, b, 1e-5, 0.1, True, prenorm)
        outs = out if prenorm else (out,)
        torch.autograd.grad(outs, (z, x, w, b), [torch.ones_like(t) for t in outs])
    assert log.cost.bytes <= 1.05 * (9 if prenorm else 8) * nbytes(x)
    assert not any(launch.shared_writes for launch in log) and len(log) <= 3
