"""What people build around layers: tiny models of every fused kind behave as stock in each set-up.

A set-up trains or calls a model and returns what it saw. Tensors may be as far from float64 as the
parity rule allows. Everything else (counts, shapes, names, errors) must be equal. Each set-up runs
forced onto kernels, and in `auto` with a gate that lets every size through.
"""

import collections
import contextlib
import functools
import itertools
import re
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
import torch.nn as stock
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as registry
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import fastnn
from fastnn import _native
from fastnn.layers._fusion import RULES
from fastnn.layers._layer import OURS, STOCK
from fastnn.testing import Comparison, compare_tensors, over_draws, side_of, simulated
from fastnn.testing.cases import CASES
from fastnn.testing.devices import surveyed
from fastnn.testing.noise import recording, replaying
from tests.marks import interpreted
from tests.parts import part

pytestmark = [
    interpreted,
    # PyTorch warns about set-ups that are wrong or rare on purpose.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]


# ---- Models ------------------------------------------------------------------------------------


class Embedded(stock.Module):
    """An embedding under losses, for the plain ops that no other model has."""

    def __init__(self, nn):
        super().__init__()
        self.table, self.slope = nn.Embedding(7, 6), nn.PReLU()
        self.losses = stock.ModuleList(
            [nn.CrossEntropyLoss(torch.linspace(1, 2, 6)), nn.MSELoss(), nn.BCEWithLogitsLoss()]
        )

    def forward(self, x):
        near = self.slope(self.table(torch.arange(5, device=x.device)) + x)
        target = torch.arange(5, device=x.device)
        classes, square, logits = self.losses
        whole = classes(near, target) + square(near, x) + logits(near, x.detach().sigmoid())
        return near * whole


class Losing(stock.Module):
    """A LinearCrossEntropyLoss, which older versions of torch do not have."""

    def __init__(self, nn):
        super().__init__()
        self.loss = nn.LinearCrossEntropyLoss(6, 4, bias=True)

    def forward(self, x):
        return self.loss(x, torch.arange(5, device=x.device) % 4)


class FrozenNorm(stock.Module):
    """Depthwise convolutions, one with a norm that stays in evaluation mode, as in fine-tuning."""

    def __init__(self, nn):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(1, 4, 1), nn.Conv1d(4, 4, 3, 1, 1, 1, 4), nn.BatchNorm1d(4), nn.ReLU(),
            nn.Conv1d(4, 4, 3, 1, 1, 1, 4), nn.Hardswish(),
        )  # fmt: skip
        self.train()

    def train(self, mode=True):
        super().train(mode)
        self.body[2].eval()
        return self

    def forward(self, x):
        return self.body(x)


class Attending(stock.Module):
    def __init__(self, nn):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.2)

    def forward(self, x):
        out, weights = self.attention(x, x, x)
        return out + weights.sum()


class Decoding(stock.Module):
    def __init__(self, nn, **options):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(6, 2, 5, dropout=0.2, **options)

    def forward(self, x):
        return self.layer(x, x.flip(0) * 2)


class Gated(stock.Module):
    """Gated units: the layer, and the function, which PyTorch has as two operators."""

    def __init__(self, nn):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 12)
        self.glu = nn.GLU()

    def forward(self, x):
        gate, up = self.gate(x), self.up(x)
        if isinstance(self.glu, fastnn.GLU):
            both = fastnn.functional.act_mul(gate, up)
        else:
            both = stock.functional.silu(gate) * up
        return self.glu(self.down(both))


class Recurrent(stock.Module):
    """Recurrent layers, which take packed sequences, too."""

    def __init__(self, nn):
        super().__init__()
        self.lstm, self.gru = nn.LSTM(6, 5, bidirectional=True), nn.GRU(10, 4, num_layers=2)
        self.rnn = nn.RNN(4, 6)

    def forward(self, x):
        for layer in (self.lstm, self.gru, self.rnn):
            x, _ = layer(x)
        return x


class Cells(stock.Module):
    def __init__(self, nn):
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(6, 5), nn.GRUCell(5, 4), nn.RNNCell(4, 6)

    def forward(self, x):
        states, h, out = None, None, None
        for step in x:
            states = self.lstm(step, states)
            h = self.gru(states[0], h)
            out = self.rnn(h, out)
        return out


class Aligning(stock.Module):
    """CTC of sequences whose lengths differ."""

    def __init__(self, nn):
        super().__init__()
        self.head, self.loss = nn.Linear(6, 4), nn.CTCLoss(zero_infinity=True)

    def forward(self, x):
        logits = self.head(torch.cat([x, x.flip(0) * 2], 1))
        labels = torch.tensor([[1, 3], [2, 1]], device=x.device)
        return self.loss(logits.log_softmax(-1), labels, (3, 2), (2, 1)) * logits


def encoding(**options):
    return lambda nn: nn.TransformerEncoderLayer(6, 2, 5, dropout=0.2, **options)


def with_rms_norms(nn):
    layer = encoding()(nn)
    layer.norm1, layer.norm2 = nn.RMSNorm(6), nn.RMSNorm(6)
    return layer


def chain(*members):
    """A Sequential of members, each given by class name and arguments."""
    return lambda nn: nn.Sequential(*(getattr(nn, name)(*args) for name, *args in members))


ROWS, SEQUENCE = (5, 6), (3, 1, 6)
MODELS = {
    "linear_act": (chain(("Linear", 6, 8), ("GELU",), ("Linear", 8, 8), ("ReLU",)), ROWS),
    "linear_act_dropout": (chain(("Linear", 6, 6), ("Tanh",), ("Dropout", 0.4)), ROWS),
    "batch_norm_act": (chain(("BatchNorm1d", 6), ("ReLU",)), ROWS),
    "group_norm_act": (chain(("GroupNorm", 2, 6), ("SiLU",)), ROWS),
    "plain": (
        chain(("LayerNorm", 6), ("RMSNorm", 6), ("Softplus",), ("Dropout", 0.4), ("Softmax", 1)),
        ROWS,
    ),
    "embedding": (Embedded, ROWS),
    "convolution": (
        chain(
            ("Conv1d", 1, 4, 3, 1, 1),
            ("BatchNorm1d", 4),
            ("ReLU",),
            ("MaxPool1d", 2, 1),
            ("ReflectionPad1d", 1),
            ("ConvTranspose1d", 4, 2, 2),
            ("AvgPool1d", 2),
        ),
        (3, 1, 40),  # a whole warp: `auto` pads and pools no shorter rows
    ),
    "depthwise convolution": (FrozenNorm, SEQUENCE),
    "gated": (Gated, SEQUENCE),
    "recurrent": (Recurrent, SEQUENCE),
    "cells": (Cells, SEQUENCE),
    "ctc": (Aligning, SEQUENCE),
    "attention": (Attending, SEQUENCE),
    "encoder": (encoding(), SEQUENCE),
    "encoder, norm first": (encoding(norm_first=True, activation="gelu"), SEQUENCE),
    "encoder, RMS norms": (with_rms_norms, SEQUENCE),
    "decoder": (Decoding, SEQUENCE),
    "decoder, norm first": (functools.partial(Decoding, norm_first=True), SEQUENCE),
}
if hasattr(stock, "LinearCrossEntropyLoss"):
    MODELS["linear_cross_entropy"] = Losing, ROWS
FUSED = {
    "linear_act": {"linear_act"},
    "linear_act_dropout": {"linear_act"},
    "batch_norm_act": {"batch_norm_act"},
    "group_norm_act": {"group_norm_act"},
    "convolution": {"batch_norm_act", "max_pool1d", "pad"},  # `auto` leaves convolutions to cuDNN
    "depthwise convolution": {"conv_batch_norm_act", "conv_act"},
    "gated": {"act_mul", "glu"},
    "recurrent": {"lstm", "gru", "rnn_tanh"},
    "cells": {"rnn_tanh_cell"},  # `auto` leaves the other cells to the kernels of PyTorch
    "ctc": {"ctc_loss"},
    "encoder": {"linear_act", "dropout_add_layer_norm"},
    "encoder, RMS norms": {"linear_act", "dropout_add_rms_norm"},
    "encoder, norm first": {"linear_act", "dropout_add_layer_norm", "dropout_add"},
    "decoder": {"linear_act", "dropout_add_layer_norm"},
    "decoder, norm first": {"linear_act", "dropout_add_layer_norm", "dropout_add"},
}


# Models of which no call can become a plan, and why.
WITHOUT_PLANS = {"attention": "self-attention gives one tensor as three arguments"}


@dataclass
class Lab:
    """A model on one of the sides, with everything that a set-up needs."""

    net: stock.Module
    x: Tensor
    home: Any  # where the side has its classes: fastnn or torch.nn
    mode: str

    def loss(self, out=None):
        out = self.net(self.x) if out is None else out
        weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype, device=out.device)
        return (out * weights.view_as(out)).sum()

    def grads(self) -> dict[str, Tensor]:
        found = {f"grad of {n}": p.grad for n, p in self.net.named_parameters()}
        return {"grad of the input": self.x.grad, **found}

    def all(self, out) -> dict[str, Any]:
        self.loss(out).backward()
        buffers = {f"{n} afterwards": b for n, b in self.net.named_buffers()}
        return {"output": out.detach(), **self.grads(), **buffers}


def never(net):
    """Switches dropout off."""
    for m in net.modules():
        if isinstance(m, stock.Dropout):
            m.p = 0.0
        if isinstance(m, stock.MultiheadAttention):
            m.dropout = 0.0
    return net


# ---- Set-ups -----------------------------------------------------------------------------------

SETUPS: dict[str, tuple] = {}


def setup(prepare=None, names=None):
    """Register a set-up. `prepare(net)` runs on the float32 model, before it goes to a dtype."""

    def register(run):
        for name in names or [run.__name__]:
            SETUPS[f"{run.__name__}[{name}]" if names else name] = (
                functools.partial(prepare, name) if names and prepare else prepare,
                functools.partial(run, name) if names else run,
            )
        return run

    return register


@setup()
def accumulation(lab):
    for scale in (1.0, 0.5):
        (lab.loss(lab.net(lab.x * scale)) / 2).backward()
    return lab.grads()


@setup()
def two_losses(lab):
    out = lab.net(lab.x)
    out.sum().backward(retain_graph=True)
    lab.loss(out).backward()
    return lab.grads()


@setup(names=["reentrant", "not reentrant", "nested", "nested, reentrant inside", "in two halves"])
def checkpointing(how, lab):
    again = functools.partial(checkpoint, use_reentrant=how == "reentrant")
    if how.startswith("nested"):
        inner = functools.partial(checkpoint, use_reentrant="inside" in how)
        return lab.all(again(lambda x: inner(lab.net, x) * 2, lab.x))
    if how == "in two halves" and isinstance(lab.net, stock.Sequential):
        return lab.all(again(lab.net[2:], again(lab.net[:2], lab.x)))
    return lab.all(again(lab.net, lab.x))


class Strided(stock.Module):
    def forward(self, p):
        return torch.stack([p, torch.full_like(p, torch.nan)], -1)[..., 0]


class Expanded(stock.Module):
    def forward(self, p):
        return p[:1].expand(p.shape)


class Shared(stock.Module):
    """A parametrisation that returns one result to all modules that share it."""

    def __init__(self):
        super().__init__()
        self.results = {}

    def forward(self, p):
        return self.results.setdefault((tuple(p.shape), p.dtype), p * 1.5)


def parametrised(how, net):
    one = Shared()
    for m in list(net.modules()):
        for name, p in list(m.named_parameters(recurse=False)):
            if how in ("strided", "expanded", "shared"):
                made = {"strided": Strided, "expanded": Expanded, "shared": lambda: one}[how]
                parametrize.register_parametrization(m, name, made())
            elif name == "weight" and p.dim() == 2:
                getattr(parametrizations, how)(m)


@setup(
    parametrised, ["strided", "expanded", "shared", "weight_norm", "spectral_norm", "orthogonal"]
)
def parametrisation(how, lab):
    for m in lab.net.modules():
        if isinstance(m, Shared):
            m.results.clear()  # the model was built in another dtype
    return lab.all(lab.net(lab.x))


@setup(names=["strided", "expanded", "transposed", "fresh", "offset"])
def functional(how, lab):
    leaves, given = {}, {}
    for name, p in lab.net.named_parameters():
        leaf = leaves[name] = p.detach().clone().requires_grad_()
        if how == "strided":
            given[name] = Strided()(leaf)
        elif how == "expanded":
            given[name] = Expanded()(leaf)
        elif how == "transposed":
            given[name] = leaf.t().contiguous().t() if leaf.dim() == 2 else leaf
        elif how == "offset":
            given[name] = torch.cat([leaf.new_full((1,), torch.nan), leaf.flatten()])[1:].view_as(p)
        else:
            given[name] = leaf * 1.0
    out = functional_call(lab.net, given, (lab.x,))
    lab.loss(out).backward()
    grads = {f"grad of {name}": leaf.grad for name, leaf in leaves.items()}
    return {"output": out.detach(), "grad of the input": lab.x.grad, **grads}


def shapes(tree):
    return torch.utils._pytree.tree_map(
        lambda v: (tuple(v.shape), v.requires_grad) if isinstance(v, Tensor) else type(v).__name__,
        tree,
    )


MODULE_HOOKS = {
    "forward": lambda m, note: m.register_forward_hook(lambda m, a, out: note(m, a, out)),
    "forward with kwargs": lambda m, note: m.register_forward_hook(
        lambda m, a, k, out: note(m, a, k, out), with_kwargs=True
    ),
    "forward, always called": lambda m, note: m.register_forward_hook(
        lambda m, a, out: note(m, a, out), always_call=True
    ),
    "forward, changing": lambda m, note: m.register_forward_hook(
        lambda m, a, out: note(m) or (out * 1.5 if isinstance(out, Tensor) else None)
    ),
    "pre": lambda m, note: m.register_forward_pre_hook(lambda m, a: note(m, a)),
    "pre with kwargs": lambda m, note: m.register_forward_pre_hook(
        lambda m, a, k: note(m, a, k), with_kwargs=True
    ),
    "full backward": lambda m, note: m.register_full_backward_hook(
        lambda m, into, out: note(m, into, out)
    ),
    "full backward, changing": lambda m, note: m.register_full_backward_hook(
        lambda m, into, out: note(m) or tuple(None if g is None else g * 2 for g in into)
    ),
    "full backward pre": lambda m, note: m.register_full_backward_pre_hook(
        lambda m, out: note(m, out)
    ),
}


@setup(names=list(MODULE_HOOKS))
def hooks(kind, lab):
    names, seen = {id(m): n for n, m in lab.net.named_modules()}, []

    def note(m, *given):
        seen.append((names[id(m)], shapes(given)))

    for m in lab.net.modules():
        MODULE_HOOKS[kind](m, note)
    return {"seen": seen, **lab.all(lab.net(lab.x)), "all seen": list(seen)}


@setup(names=["forward", "forward_pre", "full_backward", "full_backward_pre"])
def global_hooks(kind, lab):
    names, seen = {id(m): n for n, m in lab.net.named_modules()}, []

    def note(m, *given):
        seen.append((names.get(id(m)), shapes(given)))

    handle = getattr(registry, f"register_module_{kind}_hook")(note)
    try:
        return {**lab.all(lab.net(lab.x)), "seen": seen}
    finally:
        handle.remove()


@setup(names=["one member", "after removal"])
def member_hooks(how, lab):
    """Hooks on one member: the other members stay fused."""
    seen = []
    members = [m for m in lab.net.modules() if not list(m.children())]
    for i, m in enumerate(members):
        if i % 3 == 0:
            handle = m.register_forward_hook(lambda m, a, out: seen.append(shapes((a, out))))
            if how == "after removal":
                handle.remove()
    return {**lab.all(lab.net(lab.x)), "seen": seen}


@setup()
def tensor_hooks(lab):
    """Hooks on the input, the output and parameters, before and after accumulation."""
    seen = collections.Counter()
    out = lab.net(lab.x * 1)
    for name, t in [("output", out), ("input", lab.x), *lab.net.named_parameters()]:
        t.register_hook(lambda g, name=name: seen.update([(name, tuple(g.shape))]) or g * 2)
        if t.is_leaf:
            t.register_post_accumulate_grad_hook(
                lambda p, name=name: seen.update([f"{name} accumulated {p.grad is not None}"])
            )
    return {**lab.all(out), "seen": seen}


@setup()
def state_dict_hooks(lab):
    seen = []
    for m in lab.net.modules():
        kind = type(m).__name__
        m.register_state_dict_post_hook(lambda m, d, p, meta, k=kind: seen.append((k, p, list(d))))
        m.register_state_dict_pre_hook(lambda m, p, keep, k=kind: seen.append((k, p, keep)))
        m.register_load_state_dict_pre_hook(
            lambda m, d, p, *a, k=kind: seen.append((k, p, list(d)))
        )
        m.register_load_state_dict_post_hook(lambda m, keys, k=kind: seen.append((k, str(keys))))
    # Smaller weights, because larger ones make a softmax sharp, and the gradients ill-conditioned.
    state = {k: v * 0.5 for k, v in lab.net.state_dict().items()}
    lab.net.load_state_dict(state)
    return {**lab.all(lab.net(lab.x)), "seen": seen}


@contextlib.contextmanager
def counting(owners, name, seen):
    """Wraps `owner.name` on each of these classes, and counts calls by class."""
    kept = []
    for owner in owners:
        method = getattr(owner, name)

        def counted(self, *args, method=method, **kwargs):
            seen.update([type(self).__name__])
            return method(self, *args, **kwargs)

        kept.append((owner, vars(owner).get(name)))
        setattr(owner, name, counted)
    try:
        yield
    finally:
        for owner, method in kept:
            delattr(owner, name) if method is None else setattr(owner, name, method)


@setup(
    lambda what, net: never(net) if "stock" in what else None,  # the noise is then that of stock
    ["forward", "stock forward", "__call__", "Module.__call__", "Module._call_impl"],
)
def replaced_on_the_class(what, lab):
    """Replaces the method on one class at a time, then on all of them."""
    found, name = {}, what.split()[-1].split(".")[-1]
    if "Module" in what:
        each = [[stock.Module]]
    else:
        classes = {type(m) for m in lab.net.modules() if type(m) in OURS or type(m) in STOCK}
        if "stock" in what:
            classes = {STOCK.get(c, c) for c in classes}
        each = [*([c] for c in sorted(classes, key=lambda c: c.__name__)), sorted(classes, key=str)]
    for owners in each:
        seen = collections.Counter()
        with counting(owners, name, seen):
            out = lab.net(lab.x)
        found[str([c.__name__ for c in owners] if len(owners) < 2 else "all")] = seen
    return {**found, **lab.all(out)}


@setup(names=["weights", "biases", "all", "the input", "a member"])
def freezing(what, lab):
    if what == "the input":
        lab.x.requires_grad_(False)
    for i, (name, p) in enumerate(lab.net.named_parameters()):
        if what == "all" or name.endswith(what[:-1]) or (what == "a member" and i < 2):
            p.requires_grad_(False)
    return lab.all(lab.net(lab.x))


@setup(names=["inference_mode", "no_grad"])
def eval_then_train(how, lab):
    lab.net.eval()
    with getattr(torch, how)():
        first = lab.net(lab.x)
        kept = first.is_inference(), first.requires_grad
    lab.net.train()
    return {"evaluated": first.clone(), "kept": kept, **lab.all(lab.net(lab.x))}


@setup()
def train_then_eval(lab):
    lab.loss().backward()
    lab.net.eval()
    return lab.all(lab.net(lab.x))


@setup()
def tied(lab):
    """Parameters with the same shape are one parameter, within and across members."""
    first: dict = {}
    for m in lab.net.modules():
        for name, p in list(m.named_parameters(recurse=False)):
            setattr(m, name, first.setdefault((name.split("_")[-1], p.shape), p))
    return lab.all(lab.net(lab.x) + lab.net(lab.x * 0.5))


@setup()
def edited_in_place(lab):
    """Between forward and backward an optimizer updates a parameter that the graph needs."""
    out = lab.net(lab.x)
    with torch.no_grad():
        for p in lab.net.parameters():
            p.mul_(1.01)
    try:
        lab.loss(out).backward()
    except RuntimeError as e:
        return {"said": str(e)[:60]}
    return lab.grads()


@setup()
def stepping(lab):
    optimizer = torch.optim.SGD(lab.net.parameters(), lr=0.01, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        lab.loss().backward()
        torch.nn.utils.clip_grad_norm_(lab.net.parameters(), 10.0)
        optimizer.step()
    return {name: p.detach() for name, p in lab.net.named_parameters()}


@setup(lambda net: never(net))
def penalty(lab):
    """A penalty on gradients, which takes the gradient of a gradient."""
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's other backends have no second derivative
        (g,) = torch.autograd.grad(lab.loss(), lab.x, create_graph=True)
        try:
            (g.square().sum() + lab.loss()).backward()
        except RuntimeError as e:  # CTC has no second derivative
            return {"first": g.detach(), "said": worded(e)}
    return {"first": g.detach(), **lab.grads()}


def worded(error):
    """The error, without the arguments that PyTorch's parser lists as they were passed: a Parameter
    or the Tensor that stands for it, all of them or those that were given by name.
    """
    return type(error), re.sub(r" - got \(.*", " - got (...)", str(error), flags=re.DOTALL)


@setup()
def packed(lab):
    """A packed sequence raises the error of stock, except in recurrent layers."""
    width = lab.x.shape[-1]
    wrong = pack_padded_sequence(lab.x.detach().view(lab.x.shape[0], -1, width), [lab.x.shape[0]])
    try:
        out = lab.net(wrong)
    except fastnn.BackendError:
        raise
    except Exception as e:
        return {"said": worded(e)}
    return {"said": None, "output": out.data.detach(), "sizes": out.batch_sizes.tolist()}


# ---- The comparison ------------------------------------------------------------------------------


def prepared(name, home, converts, prepare, seed, dtype):
    build, shape = MODELS[name]
    torch.manual_seed(seed)
    net = fastnn.convert(build(stock)) if converts else build(home)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    if prepare is not None:
        prepare(net)
    return net.to(dtype), torch.randn(shape).to(dtype).requires_grad_()


def outcome(name, prepare, run, home, mode, seed, dtype, draws):
    converts = home is fastnn and mode == "auto"
    net, x = prepared(name, home, converts, prepare, seed, dtype)
    torch.manual_seed(seed)
    # Ours draws the same numbers in each run. It draws them itself where plans may run.
    noise = recording() if draws is None else replaying(draws) if home is stock and draws else None
    with fastnn.backend(mode), noise or contextlib.nullcontext() as noted:
        if home is fastnn and draws is not None:
            return run(Lab(net, x, home, mode)), None, None
        if home is fastnn:
            with fastnn.decisions() as heard:
                return run(Lab(net, x, home, mode)), noted, heard
        with mock.patch.object(stock.functional, "batch_norm", batch_norm_of_dense_weights):
            return run(Lab(net, x, home, mode)), None, None


def batch_norm_of_dense_weights(
    input, mean, var, weight=None, bias=None, *rest, stock=stock.functional.batch_norm
):
    """PyTorch's backward on a CPU reads a weight that is a view as if it were dense."""
    weight, bias = (t if t is None else t.contiguous() for t in (weight, bias))
    return stock(input, mean, var, weight, bias, *rest)


def compared(name, prepare, run, mode, seed):
    """(comparisons, other differences, dispatched calls).

    It runs again as often as REPEATS says: the second call of a signature is recorded, and later
    ones are replayed as plans. The last run is the one that is compared, and CALLS counts how many
    of its calls plans answered.
    """
    with surveyed() as every:  # no plan runs, because draws are recorded
        ours, draws, heard = outcome(name, prepare, run, fastnn, mode, seed, torch.float32, None)
    for i in range(REPEATS):
        with surveyed() as long_way:
            ours, _, _ = outcome(name, prepare, run, fastnn, mode, seed, torch.float32, draws)
        if i == REPEATS - 1:
            CALLS[name, mode].update(calls=len(every), answered=len(every) - len(long_way))
    its, _, _ = outcome(name, prepare, run, stock, mode, seed, torch.float32, draws)
    exact, _, _ = outcome(name, prepare, run, stock, mode, seed, torch.float64, draws)
    comparisons: list[Comparison] = []
    wrong = [] if ours.keys() == its.keys() else [f"found {sorted(ours)}; stock {sorted(its)}"]
    for what in ours.keys() & its.keys():
        a, b = ours[what], its[what]
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point():
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                wrong.append(
                    f"{what}: {a.dtype} {tuple(a.shape)}; stock {b.dtype} {tuple(b.shape)}"
                )
                continue
            comparison, failure = compare_tensors(what, a, b, exact[what])
            comparisons += [comparison] if comparison else []
            wrong += [failure] if failure else []
        elif isinstance(a, Tensor) and isinstance(b, Tensor):
            wrong += [] if torch.equal(a, b) else [f"{what}: differs from stock"]
        elif a != b:
            wrong.append(f"{what}: {a}; stock {b}")
    return comparisons, wrong, heard


REPEATS = 0
CALLS: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)


def differences(name, prepare, run, mode):
    """Differences in words. A comparison beyond its bound in one draw is judged by more draws."""
    found = []
    for draws in (1, 3, 9, 25):
        try:
            found += [compared(name, prepare, run, mode, seed) for seed in range(len(found), draws)]
        except fastnn.BackendError:  # an op declines the set-up and says why; run it in `auto`
            return differences(name, prepare, run, "auto")
        wrong = [w for _, these, _ in found for w in these]
        pooled = over_draws([mock.Mock(comparisons=c) for c, _, _ in found])
        failures = [c.failure for c in pooled if c.failure]
        if wrong or not failures:
            break
    return [*wrong, *failures], found[0][2]


@pytest.fixture(autouse=True)
def no_size_gate(simulate):
    simulate(least=0, source="the test")


def share(name):
    """(model, mode) for a set-up: one of the most expensive models, and all other models, in turn
    forced and in `auto`. `python -m tests.test_setups` runs all models in both modes."""
    at = list(SETUPS).index(name)
    small = [m for m in MODELS if m not in LARGE]
    chosen = [*small, LARGE[at % len(LARGE)]]
    return [(m, MODES[(at // len(LARGE) + i) % 2]) for i, m in enumerate(chosen)]


MODES = ("triton", "auto")
LARGE = [m for m, (_, shape) in MODELS.items() if len(shape) == 3]


@pytest.mark.parametrize("name", SETUPS)
def test_setup(name, record_property):
    wrong = []
    for model, mode in share(name):
        told, _ = differences(model, *SETUPS[name], mode)
        wrong += [f"{model}, {mode}: {w}" for w in told]
    modes = collections.Counter("forced" if m == "triton" else m for _, m in share(name))
    record_property("setups", [(f"runs of a model, {mode}", n) for mode, n in modes.items()])
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FUSED)
def test_the_models_are_fused(name, mode, monkeypatch, record_property):
    """Each model takes the path that it is meant to test, or the set-ups would show nothing. Its
    calls become plans, which answer the same."""
    monkeypatch.setitem(globals(), "REPEATS", 3)
    CALLS.clear()
    wrong, heard = differences(name, None, lambda lab: lab.all(lab.net(lab.x)), mode)
    assert not wrong
    assert FUSED[name] <= {op.name for op, why, _ in heard if why is None}
    answered = CALLS[name, mode]["answered"]
    record_property("setups", [("calls that plans answered", answered)])
    assert answered, CALLS


def test_there_is_a_model_of_every_fused_kind():
    assert {rule.op.__name__ for rule in RULES} <= set().union(*FUSED.values())


# ---- Hooks of the old kind ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["linear_act", "batch_norm_act", "plain"])
def test_old_backward_hooks(name, mode):
    """They get the gradients of the node that comes last in the layer; stock warns about that. The
    input gradients therefore differ in number and order. Nothing else differs."""

    def run(lab):
        seen = []
        for n, m in lab.net.named_children():
            m.register_backward_hook(lambda m, into, out, n=n: seen.append((n, shapes(out))))
        return {**lab.all(lab.net(lab.x)), "seen": seen}

    wrong, _ = differences(name, None, run, mode)
    assert not wrong


# ---- Methods replaced on a class ---------------------------------------------------------------


def calls(owners, net, x, name="forward"):
    seen = collections.Counter()
    with counting(owners, name, seen), fastnn.backend("triton"):
        net(x)
    return seen


@pytest.mark.parametrize("home", [fastnn, stock])
def test_a_tool_that_wraps_every_class_counts_a_call_once(home):
    net = never(MODELS["encoder"][0](fastnn))
    both = calls(
        [fastnn.Linear, stock.Linear, fastnn.Dropout, stock.Dropout], net, torch.ones(3, 6)
    )
    assert both == {"Linear": 2, "Dropout": 3}
    assert calls([home.LayerNorm], net, torch.ones(3, 6)) == {"LayerNorm": 2}


@pytest.mark.parametrize("block", ["_sa_block", "_ff_block"])
def test_a_block_replaced_on_the_stock_class_is_called(block):
    net = never(MODELS["encoder"][0](fastnn))
    seen = calls([stock.TransformerEncoderLayer], net, torch.ones(3, 6), block)
    assert seen == {"TransformerEncoderLayer": 1}


def test_explain_tells_of_it_and_does_not_count_itself():
    net, x = MODELS["linear_act"][0](fastnn), torch.ones(5, 6)
    assert {row.op for row in fastnn.explain(net, x)} == {"linear_act"}
    with counting([stock.Linear], "forward", collections.Counter()):
        assert "torch.nn.Linear.forward was replaced" in str(fastnn.explain(net, x))
        assert "torch.nn.Linear.forward was replaced" in str(fastnn.explain(net))
    with counting([stock.Module], "__call__", collections.Counter()):
        assert "Linear.__call__ was replaced" in str(fastnn.explain(net, x))
    assert {row.op for row in fastnn.explain(net, x)} == {"linear_act"}


def test_what_was_replaced_before_the_import_is_called():
    code = (
        "import torch; calls = []; old = torch.nn.Linear.forward\n"
        "def forward(self, x): calls.append(1); return old(self, x)\n"
        "torch.nn.Linear.forward = forward\n"
        "import fastnn; x = torch.ones(2, 3)\n"
        "fastnn.Linear(3, 4)(x)\n"
        "with fastnn.backend('triton'):\n"
        "    fastnn.Sequential(fastnn.Linear(3, 4), fastnn.GELU())(x)\n"
        "print(len(calls))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "2\n", done.stderr


# ---- Something else where a tensor belongs -------------------------------------------------------

WRONG = {
    "a packed sequence": lambda: pack_padded_sequence(torch.ones(3, 1, 2), [3]),
    "a list": lambda: [1.0, 2.0],
    "a number": lambda: 3.0,
    "a string": lambda: "x",
    "nothing": lambda: None,
    "an array": lambda: numpy.ones((2, 2), numpy.float32),
}


def size(case):
    return sum(x.numel() for x in case.make(torch.float32, "cpu") if isinstance(x, Tensor))


# The smallest row of each op. The tensors of functions that only fastnn has are found by name.
BY_NAME = {
    case.name: case
    for case in sorted(CASES, key=lambda case: -size(case))
    if case.stock is None and hasattr(stock if case.is_layer else stock.functional, case.name)
}


def said(call, mode, args, kwargs):
    try:
        with fastnn.backend(mode):
            call(*args, **kwargs)
    except fastnn.BackendError:
        return "declined"
    except Exception as e:
        return worded(e)
    return "nothing"


def test_arguments_that_are_no_tensors(record_property):
    """If any argument of an op's or layer's row is not a tensor, the error is that of stock."""
    different, runs = [], 0
    for case in BY_NAME.values():
        sides = [side_of(case, home, torch.float32, "cpu").call for home in (fastnn, stock)]
        given = case.make(torch.float32, "cpu")
        options = {} if case.is_layer else case.options
        options = {k: v(torch.float32, "cpu") if callable(v) else v for k, v in options.items()}
        for i, (n, wrong) in itertools.product(range(len(given)), enumerate(WRONG)):
            mode = MODES[(runs + n) % 2]
            if isinstance(given[i], Tensor):
                args = [*given[:i], WRONG[wrong](), *given[i + 1 :]]
                ours, its = (said(side, mode, args, options) for side in sides)
                runs += 1
                # A forced call may be declined before anything checks its arguments.
                if ours != its and (ours != "declined" or mode == "auto"):
                    different.append(f"{case}, {wrong} for {i}, {mode}: {ours}; stock {its}")
    record_property("setups", [("wrong arguments", runs)])
    assert not different, "\n".join(different)


# ---- Threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear_act", "encoder"])
def test_threads_with_modes_of_their_own(name):
    """Each thread gets the same bits as when it runs alone, by the path of its own mode."""

    def model():
        return prepared(name, fastnn, False, never, 0, torch.float32)

    def play(mode, net, x):
        with fastnn.backend(mode), fastnn.decisions() as heard:
            found = Lab(net, x, fastnn, mode).all(net(x))
        return found, {why for _, why, _ in heard if why and not why.startswith("not fused")}

    modes = ("triton", "torch", "auto", "triton", "torch", "auto")
    alone = {mode: play(mode, *model()) for mode in set(modes)}
    models = [model() for _ in modes]  # threads would mix the generator's numbers
    together = {}
    ready = threading.Barrier(len(modes))

    def work(i, mode):
        ready.wait()
        together[i] = play(mode, *models[i])

    threads = [threading.Thread(target=work, args=item) for item in enumerate(modes)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, mode in enumerate(modes):
        found, whys = together[i]
        assert whys == alone[mode][1]
        if mode != "auto":
            assert whys == ({'backend("torch")'} if mode == "torch" else set())
        for what, value in alone[mode][0].items():
            assert torch.equal(found[what], value), (mode, what)


# ---- Two processes -----------------------------------------------------------------------------

WAYS = ["ddp", "ddp, accumulating", "ddp, autocast", "fully_shard", "fully_shard, each layer"]
SPREAD = [
    (name, way)
    for name, way in itertools.product(("linear_act", "batch_norm_act", "encoder"), WAYS)
    # On a CPU, stock has no batch norm with bfloat16 parameters and float32 statistics.
    if (name != "batch_norm_act" or way.startswith("ddp"))
    and (name != "encoder" or way in ("ddp", "fully_shard, each layer"))  # the most expensive one
]


def spread(name, way, home, mode, seed, rank):
    """The gradients of a model, averaged over both processes, and its buffers."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    net, _ = prepared(name, home, home is fastnn and mode == "auto", never, seed, torch.float32)
    torch.manual_seed(50 * seed + rank)
    x = torch.randn(MODELS[name][1])
    if way.startswith("ddp"):
        wrapped = stock.parallel.DistributedDataParallel(net)
    else:
        low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if "each" in way:
            for m in net.children():
                if list(m.parameters()):
                    fully_shard(m, mp_policy=low)
        wrapped = fully_shard(net, mp_policy=low)
    with fastnn.backend(mode), torch.autocast("cpu", torch.bfloat16, enabled="autocast" in way):
        if way == "ddp, accumulating":
            with wrapped.no_sync():
                wrapped(x * 0.5).float().square().sum().backward()
        wrapped(x).float().square().sum().backward()
    found = {f"grad of {n}": p.grad for n, p in net.named_parameters()}
    found = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}
    return found | dict(net.named_buffers())


def exactly(name, way, seed):
    """The same as `spread`, but in one process and in float64."""
    total: dict[str, Tensor] = {}
    for rank in range(2):
        net, _ = prepared(name, stock, False, never, seed, torch.float64)
        torch.manual_seed(50 * seed + rank)
        x = torch.randn(MODELS[name][1]).double()
        if way == "ddp, accumulating":
            net(x * 0.5).square().sum().backward()
        net(x).square().sum().backward()
        for n, p in net.named_parameters():
            total[f"grad of {n}"] = total.get(f"grad of {n}", 0) + p.grad / 2
        for n, b in net.named_buffers():
            total.setdefault(n, b)
    return total


def process(rank, folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    wrong, runs = [], 0
    for i, (name, way) in enumerate(SPREAD):
        mode = MODES[i % 2]
        comparisons, used = [], mode
        for seed in range(2):
            with simulated(least=0):
                try:
                    ours = spread(name, way, fastnn, used, seed, rank)
                except fastnn.BackendError:  # as in `differences`, the same in both processes
                    used = "auto"
                    ours = spread(name, way, fastnn, used, seed, rank)
            its = spread(name, way, stock, "auto", seed, rank)
            exact = exactly(name, way, seed)
            found = [
                compare_tensors(n, ours[n], its[n], exact[n])
                for n in its
                if its[n].is_floating_point()
            ]
            comparisons.append(mock.Mock(comparisons=[c for c, _ in found if c]))
            wrong += [f"{name}, {way}, {mode}: {failure}" for _, failure in found if failure]
            if ours.keys() != its.keys():
                wrong.append(f"{name}, {way}, {mode}: {sorted(ours)}; stock {sorted(its)}")
        runs += 1
        wrong += [
            f"{name}, {way}, {mode}: {c.failure}" for c in over_draws(comparisons) if c.failure
        ]
    torch.save((wrong, runs), f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path, record_property):
    """DDP and FSDP2, also in mixed precision. Gradients are compared with those of one process in
    float64."""
    torch.multiprocessing.spawn(process, (tmp_path,), nprocs=2)
    found = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    record_property("setups", [("runs of a model in two processes", found[0][1])])
    assert not found[0][0] + found[1][0], "\n".join(found[0][0] + found[1][0])


def everything(arguments: list[str]) -> bool:
    """Run set-ups on models, forced and in `auto`. Returns whether all is as in stock.

    All of them run, or part K of N (`--part K/N`), or those whose set-up or model is an argument.
    Each runs until its calls are plans, in C++ with FASTNN_NATIVE=1. What is printed last tells how
    many plans there were, and how many calls of each model they answered: some of each, except of
    those in WITHOUT_PLANS.
    """
    global REPEATS
    REPEATS = 3
    plans: collections.Counter[str] = collections.Counter()

    def counted(*args, make=_native.call):
        made = make(*args)
        plans["in Python" if made is None else "in C++"] += 1
        return made

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    right, runs = True, 0
    chosen = part(itertools.product(SETUPS, itertools.product(MODELS, MODES)), arguments)
    for name, (model, mode) in chosen:
        if arguments and not {name, name.split("[")[0], model} & set(arguments):
            continue
        with simulated(least=0), mock.patch.object(_native, "call", counted):
            told, _ = differences(model, *SETUPS[name], mode)
        right &= not told
        runs += 1
        print(f"{name}, {model}, {mode}: {'; '.join(told) or 'as stock'}", flush=True)
    without = [key for key, found in CALLS.items() if not found["answered"]]
    without = [key for key in without if key[0] not in WITHOUT_PLANS]
    for key, found in CALLS.items():
        print(*key, f"plans answered {found['answered']} of {found['calls']} calls", sep=", ")
    total = sum(CALLS.values(), collections.Counter())
    print(f"{runs} runs; plans: {dict(plans)}; calls in the last of the repeats: {dict(total)}")
    print("models without a call that a plan answered:", without or "none")
    return right and not without


if __name__ == "__main__":
    sys.exit(not everything(sys.argv[1:]))
