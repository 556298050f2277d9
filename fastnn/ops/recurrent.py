"""Recurrent cells, and recurrent layers over all steps."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as stock
from torch import Tensor

from fastnn import kernels
from fastnn._op import Function, Invalid, Stock, Work, op, run, second_order
from fastnn.ops.linear import tf32_setting

_GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
_STOCK = {
    "rnn_tanh": torch.rnn_tanh_cell,
    "rnn_relu": torch.rnn_relu_cell,
    "lstm": torch.lstm_cell,
    "gru": torch.gru_cell,
}


class Cell(Function):
    """x (B, I), h (B, H), c (B, H) or None, weights (G*H, I) and (G*H, H), biases (G*H,) or None ->
    the new h, and the new c or None.

    PyTorch multiplies; one kernel does the rest.
    """

    @staticmethod
    def forward(ctx, x, h, c, w_ih, w_hh, b_ih, b_hh, kind):
        keep = any(ctx.needs_input_grad)
        with torch.autocast(x.device.type, enabled=False):
            gi, gh = x @ w_ih.t(), h @ w_hh.t()
        new_c = gates = None
        if kind == "lstm":
            new_h, new_c, gates = kernels.recurrent.lstm_fwd(gi, gh, b_ih, b_hh, c, keep)
        elif kind == "gru":
            new_h, gates = kernels.recurrent.gru_fwd(gi, gh, b_ih, b_hh, h, keep)
        else:
            new_h = kernels.recurrent.rnn_fwd(gi, gh, b_ih, b_hh, kind == "rnn_relu")
        kept = {"lstm": new_c, "gru": None}.get(kind, new_h)
        ctx.save_for_backward(x, h, c, w_ih, w_hh, b_ih, b_hh, kept, gates)
        ctx.kind = kind
        ctx.set_materialize_grads(False)
        return new_h, new_c

    @staticmethod
    def backward(ctx, dh, dc):
        x, h, c, w_ih, w_hh, b_ih, b_hh, kept, gates = ctx.saved_tensors
        kind, needs = ctx.kind, ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True: a kernel's gradient would carry no graph
            given = [g for g in (dh, dc) if g is not None]

            def formula(x, h, c, *rest):
                if c is None:
                    return [_STOCK[kind](x, h, *rest)]
                both = zip(_STOCK[kind](x, (h, c), *rest), (dh, dc), strict=True)
                return [t for t, g in both if g is not None]

            inputs = (x, h, c, w_ih, w_hh, b_ih, b_hh)
            return *second_order(formula, inputs, given, needs), None
        more = None
        if kind == "lstm":
            dgi, dc = kernels.recurrent.lstm_bwd(dh, dc, c, kept, gates)
            dgh = dgi
        elif kind == "gru":
            dgi, dgh, more = kernels.recurrent.gru_bwd(dh, h, gates)
        else:
            dgi = dgh = kernels.recurrent.rnn_bwd(dh, kept, kind == "rnn_relu")
        dx = dh = dw_ih = dw_hh = db_ih = db_hh = None
        with torch.autocast(x.device.type, enabled=False):
            if needs[0]:
                dx = dgi @ w_ih
            if needs[1]:
                dh = dgh @ w_hh if more is None else torch.addmm(more, dgh, w_hh)
            if needs[3]:
                dw_ih = dgi.t() @ x
            if needs[4]:
                dw_hh = dgh.t() @ h
        if needs[5]:
            _, db_ih = kernels.epilogue.bwd(dgi, want_dz=False)
        if needs[6]:
            if db_ih is not None and dgh is dgi:
                db_hh = db_ih.clone()
            else:
                _, db_hh = kernels.epilogue.bwd(dgh, want_dz=False)
        return dx, dh, dc if needs[2] else None, dw_ih, dw_hh, db_ih, db_hh, None


def _cell(kind, input, h, c, w_ih, w_hh, b_ih, b_hh):
    """The new state; or a `Stock` that says why no kernel computes it."""
    given = [t for t in (input, h, c, w_ih, w_hh) if t is not None]
    shapes = [tuple(t.shape) for t in given]
    if any(t.dim() != 2 for t in given):
        return Invalid("shape", f"shapes {shapes}")
    B, H = h.shape
    rows = _GATES[kind] * H
    fits = (
        input.shape[0] == B
        and w_ih.shape == (rows, input.shape[1])
        and w_hh.shape == (rows, H)
        and (c is None or c.shape == h.shape)
    )
    biases = [b for b in (b_ih, b_hh) if b is not None]
    if not fits or any(b.shape != (rows,) for b in biases):
        return Invalid("shape", f"shapes {shapes}, biases {[tuple(b.shape) for b in biases]}")
    if any(t.dtype != input.dtype for t in (*given, *biases)):
        return Invalid("dtype", "several dtypes")
    if len(biases) == 1:
        return Stock("option", "one bias without the other")
    if not B * H:
        return Stock("empty", "no elements")
    if kind in ("lstm", "gru") and input.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return Stock("autocast", "on a CPU, autocast widens some dtypes for this cell, but not all")
    return run(Cell, input, h, c, w_ih, w_hh, b_ih, b_hh, kind)


def _new_state(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    """The gate's policy: the number of elements of the new state."""
    return Work(input.shape[0] * w_hh.shape[1])


def _saves_nothing(*args, **kwargs):
    return Stock("gate", "PyTorch, too, runs one kernel for the gates after two products")


_X = ("input", "w_ih", "w_hh")  # products take any strides
_CELL: dict[str, Any] = {
    "autocast": "lower",
    "at_most": "input.size(0) * w_hh.size(1)",
    "settings": tf32_setting,
}


@op(
    stock=torch.rnn_tanh_cell,
    strided=_X,
    autocast_cpu="lower",
    policy=_new_state,
    **_CELL,
)
def rnn_tanh_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    """Two products, then one kernel for the biases, the sum and tanh."""
    out = _cell("rnn_tanh", input, hx, None, w_ih, w_hh, b_ih, b_hh)
    return out if isinstance(out, Stock) else out[0]


@op(
    stock=torch.rnn_relu_cell,
    strided=_X,
    autocast_cpu="lower",
    policy=_new_state,
    **_CELL,
)
def rnn_relu_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    """Two products, then one kernel for the biases, the sum and relu."""
    out = _cell("rnn_relu", input, hx, None, w_ih, w_hh, b_ih, b_hh)
    return out if isinstance(out, Stock) else out[0]


@op(
    stock=torch.lstm_cell,
    strided=("hx", *_X),
    policy=_saves_nothing,
    source="Hochreiter and Schmidhuber (1997)",
    **_CELL,
)
def lstm_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    """Two products, then one kernel for the biases, the gates and both states."""
    if len(hx) != 2:
        return Invalid("option", f"{len(hx)} states")
    return _cell("lstm", input, hx[0], hx[1], w_ih, w_hh, b_ih, b_hh)


@op(
    stock=torch.gru_cell,
    strided=_X,
    policy=_saves_nothing,
    source="arXiv:1406.1078",
    **_CELL,
)
def gru_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    """Two products, then one kernel for the biases, the gates and the state."""
    out = _cell("gru", input, hx, None, w_ih, w_hh, b_ih, b_hh)
    return out if isinstance(out, Stock) else out[0]


# ---- All steps -----------------------------------------------------------------------------------

_STOCK_LAYER = {
    "rnn_tanh": torch.rnn_tanh,
    "rnn_relu": torch.rnn_relu,
    "lstm": torch.lstm,
    "gru": torch.gru,
}


@contextmanager
def _without_cudnn():
    """PyTorch's own formulas run in the block, because cuDNN's backward has no derivative."""
    # Not `torch.backends.cudnn.enabled`, whose setter may have been turned off.
    before = torch._C._get_cudnn_enabled()
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_cudnn_enabled(before)


class Direction(NamedTuple):
    """The parameters of one direction of one layer."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None


def _directions(weights) -> list[Direction]:
    return [Direction(*weights[i : i + 4]) for i in range(0, len(weights), 4)]


class Steps(Function):
    """x (T, N, I), h0, c0 (D, N, H), c0 or None, and for each of the D directions two weights and
    two biases or None -> y (T, N, D * H), the last h and c (D, N, H), c or None.
    """

    @staticmethod
    def forward(ctx, x, h0, c0, kind, *weights):
        keep = any(ctx.needs_input_grad)
        (T, N, _), (D, _, H) = x.shape, h0.shape
        y = x.new_empty((T, N, D * H))
        hn = x.new_empty(h0.shape)
        cn = None if c0 is None else x.new_empty(c0.shape)
        kept: list = []
        for d, p in enumerate(_directions(weights)):
            with torch.autocast(x.device.type, enabled=False):
                gi = stock.linear(x, p.w_ih, p.b_ih)
            part = y[:, :, d * H : (d + 1) * H]
            gates, states, cells = kernels.recurrent_steps.fwd(
                gi, p.w_hh, p.b_hh, h0[d], None if c0 is None else c0[d], part, hn[d], kind,
                d == 1, keep,
            )  # fmt: skip
            if cells is not None:
                cn[d].copy_(cells[T % cells.shape[0]])
            kept += [gates, states, cells]
        # PyTorch keeps the result of an LSTM of one direction, and no others. An edit of it thus
        # raises an error in the backward, as in PyTorch.
        result = y if kind == "lstm" and D == 1 else None
        ctx.save_for_backward(x, h0, c0, result, *weights, *kept)
        ctx.kind = kind
        ctx.set_materialize_grads(False)
        return y, hn, cn

    @staticmethod
    def backward(ctx, dy, dhn, dcn):
        kind, needs = ctx.kind, ctx.needs_input_grad
        x, h0, c0, _, *rest = ctx.saved_tensors
        D, _, H = h0.shape
        weights, kept = rest[: 4 * D], rest[4 * D :]
        if torch.is_grad_enabled():
            return Steps._differentiable(ctx, x, h0, c0, weights, (dy, dhn, dcn))
        dx = None
        dh0 = x.new_empty(h0.shape) if needs[1] else None
        dc0 = x.new_empty(h0.shape) if needs[2] else None
        grads: list = []
        for d, p in enumerate(_directions(weights)):
            gates, states, cells = kept[3 * d : 3 * d + 3]
            part = slice(d * H, (d + 1) * H)
            dgi, dgh, dh, dc = kernels.recurrent_steps.bwd(
                None if dy is None else dy[:, :, part], None if dhn is None else dhn[d],
                None if dcn is None else dcn[d], gates, states, cells, p.w_hh, kind, d == 1,
            )  # fmt: skip
            if dh0 is not None:
                dh0[d] = dh
            if dc0 is not None:
                dc0[d] = dc
            before = states[:-1]
            dgi, dgh = dgi.flatten(0, 1), dgh.flatten(0, 1)
            need = needs[4 + 4 * d : 8 + 4 * d]
            with torch.autocast(x.device.type, enabled=False):
                if needs[0]:
                    dx = dgi @ p.w_ih if dx is None else torch.addmm(dx, dgi, p.w_ih)
                grads.append(dgi.t() @ x.flatten(0, 1) if need[0] else None)
                grads.append(dgh.t() @ before.flatten(0, 1) if need[1] else None)
            for g, wanted in zip((dgi, dgh), need[2:], strict=True):
                grads.append(kernels.epilogue.bwd(g, want_dz=False)[1] if wanted else None)
        return dx if dx is None else dx.view(x.shape), dh0, dc0, None, *grads

    @staticmethod
    def _differentiable(ctx, x, h0, c0, weights, given):
        """Gradients with a graph of their own."""
        D = h0.shape[0]
        biased = weights[2] is not None

        def formula(x, h0, c0, *weights):
            weights = [w for w in weights if w is not None]
            state = h0 if c0 is None else (h0, c0)
            with _without_cudnn():
                out = _STOCK_LAYER[ctx.kind](
                    x, state, weights, biased, 1, 0.0, False, D == 2, False
                )
            return [t for t, g in zip(out, given, strict=False) if g is not None]

        needs = (*ctx.needs_input_grad[:3], *ctx.needs_input_grad[4:])
        given_only = [g for g in given if g is not None]
        dx, dh0, dc0, *grads = second_order(formula, (x, h0, c0, *weights), given_only, needs)
        return dx, dh0, dc0, None, *grads


def _layers(kind, input, h0, c0, params, biased, layers, dropout, train, both, batch_first):
    """(y, the last h, the last c or None); or a `Stock` that says why no kernel computes them."""
    if isinstance(params, Tensor) or type(layers) is not int:
        return Stock("option", "a PackedSequence")
    D = 2 if both else 1
    each = 4 if biased else 2
    states = [t for t in (h0, c0) if t is not None]
    if len(params) == (each + 1) * D * layers:
        return Stock("option", "proj_size")
    if input.dim() != 3 or any(t.dim() != 3 for t in states) or len(params) != each * D * layers:
        return Invalid("shape", f"input {tuple(input.shape)}, {len(params)} parameters")
    if any(t.dtype != input.dtype for t in (*states, *params)):
        return Invalid("dtype", "several dtypes")
    x = input.transpose(0, 1) if batch_first else input
    (T, N, width), H = x.shape, h0.shape[2]
    rows = kernels.recurrent_steps.GATES[kind] * H
    fits = all(t.shape == (D * layers, N, H) for t in states)
    for at in range(0, len(params), each):
        w_ih, w_hh, *biases = params[at : at + each]
        inputs = width if at < each * D else D * H
        fits = fits and w_ih.shape == (rows, inputs) and w_hh.shape == (rows, H)
        fits = fits and all(b.shape == (rows,) for b in biases)
    if not fits:
        return Invalid(
            "shape", f"input {tuple(input.shape)}, states {[tuple(t.shape) for t in states]}"
        )
    if not T * N * H * width:
        return Stock("empty", "no elements")
    draws = train and dropout > 0 and layers > 1
    if draws and input.device.type != "cpu":
        return Stock(
            "random", "dropout between layers, for which cuDNN draws random numbers of its own"
        )
    if kind in ("lstm", "gru") and input.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return Stock(
            "autocast", "on a CPU, autocast widens some dtypes for this layer, but not all"
        )
    last_h, last_c = [], []
    x = x.contiguous()
    for layer in range(layers):
        own = params[layer * D * each : (layer + 1) * D * each]
        if not biased:
            own = [p for i in range(0, len(own), 2) for p in (*own[i : i + 2], None, None)]
        h, c = h0, c0
        if layers > 1:
            at = slice(layer * D, (layer + 1) * D)
            h, c = h0[at], None if c0 is None else c0[at]
        c = None if c is None else c.contiguous()
        x, h, c = run(Steps, x, h.contiguous(), c, kind, *own)
        last_h.append(h)
        last_c.append(c)
        if draws and layer < layers - 1:
            x = stock.dropout(x, dropout)
    hn = last_h[0] if layers == 1 else torch.cat(last_h)
    cn = None if c0 is None else last_c[0] if layers == 1 else torch.cat(last_c)
    return x.transpose(0, 1) if batch_first else x, hn, cn


def _settings():
    return tf32_setting(), torch._C._get_cudnn_enabled()


def _unless_cudnn(
    input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first
):  # fmt: skip
    """The gate's policy: the number of elements of the input."""
    if torch.backends.cudnn.enabled and torch.backends.cudnn.is_available():
        return Stock("gate", "cuDNN runs all steps of a layer")
    return Work(input.numel())


_LAYER = {
    "strided": ("input", "hx", "params"),
    "autocast": "lower",
    "policy": _unless_cudnn,
    "settings": _settings,
}


@op(stock=torch.rnn_tanh, autocast_cpu="lower", **_LAYER)
def rnn_tanh(
    input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first
):  # fmt: skip
    """One product for the inputs of all steps, then one kernel for all steps, of each direction."""
    out = _layers(
        "rnn_tanh", input, hx, None, params, has_biases, num_layers, dropout, train, bidirectional,
        batch_first,
    )  # fmt: skip
    return out if isinstance(out, Stock) else out[:2]


@op(stock=torch.rnn_relu, autocast_cpu="lower", **_LAYER)
def rnn_relu(
    input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first
):  # fmt: skip
    """One product for the inputs of all steps, then one kernel for all steps, of each direction."""
    out = _layers(
        "rnn_relu", input, hx, None, params, has_biases, num_layers, dropout, train, bidirectional,
        batch_first,
    )  # fmt: skip
    return out if isinstance(out, Stock) else out[:2]


@op(stock=torch.gru, **_LAYER)
def gru(
    input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first
):  # fmt: skip
    """One product for the inputs of all steps, then one kernel for all steps, of each direction."""
    out = _layers(
        "gru", input, hx, None, params, has_biases, num_layers, dropout, train, bidirectional,
        batch_first,
    )  # fmt: skip
    return out if isinstance(out, Stock) else out[:2]


@op(stock=torch.lstm, **_LAYER)
def lstm(
    input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first
):  # fmt: skip
    """One product for the inputs of all steps, then one kernel for all steps, of each direction."""
    if isinstance(hx, Tensor):  # torch.lstm(data, batch_sizes, hx, ...)
        return Stock("option", "a PackedSequence")
    if len(hx) != 2:
        return Invalid("option", f"{len(hx)} states")
    return _layers(
        "lstm", input, hx[0], hx[1], params, has_biases, num_layers, dropout, train, bidirectional,
        batch_first,
    )  # fmt: skip
