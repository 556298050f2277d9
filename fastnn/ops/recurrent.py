"""Recurrent cells."""

from __future__ import annotations

import torch

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
        return Invalid(f"shapes {shapes}")
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
        return Invalid(f"shapes {shapes}, biases {[tuple(b.shape) for b in biases]}")
    if any(t.dtype != input.dtype for t in (*given, *biases)):
        return Invalid("several dtypes")
    if len(biases) == 1:
        return Stock("one bias without the other")
    if not B * H:
        return Stock("no elements")
    if kind in ("lstm", "gru") and input.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return Stock("on a CPU, autocast widens some dtypes for this cell, but not all")
    return run(Cell, input, h, c, w_ih, w_hh, b_ih, b_hh, kind)


def _new_state(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    """The gate's policy: the number of elements of the new state."""
    return Work(input.shape[0] * w_hh.shape[1])


def _saves_nothing(*args, **kwargs):
    return Stock("PyTorch, too, runs one kernel for the gates after two products")


_X = ("input", "w_ih", "w_hh")  # products take any strides
_BOUND = "input.size(0) * w_hh.size(1)"


@op(
    stock=torch.rnn_tanh_cell,
    strided=_X,
    autocast="lower",
    autocast_cpu="lower",
    policy=_new_state,
    at_most=_BOUND,
    settings=tf32_setting,
)
def rnn_tanh_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    """Two products, then one kernel for the biases, the sum and tanh."""
    out = _cell("rnn_tanh", input, hx, None, w_ih, w_hh, b_ih, b_hh)
    return out if isinstance(out, Stock) else out[0]


@op(
    stock=torch.rnn_relu_cell,
    strided=_X,
    autocast="lower",
    autocast_cpu="lower",
    policy=_new_state,
    at_most=_BOUND,
    settings=tf32_setting,
)
def rnn_relu_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    """Two products, then one kernel for the biases, the sum and relu."""
    out = _cell("rnn_relu", input, hx, None, w_ih, w_hh, b_ih, b_hh)
    return out if isinstance(out, Stock) else out[0]


@op(
    stock=torch.lstm_cell,
    strided=("hx", *_X),
    autocast="lower",
    policy=_saves_nothing,
    at_most=_BOUND,
    settings=tf32_setting,
    source="Hochreiter and Schmidhuber (1997)",
)
def lstm_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    """Two products, then one kernel for the biases, the gates and both states."""
    if len(hx) != 2:
        return Invalid(f"{len(hx)} states")
    return _cell("lstm", input, hx[0], hx[1], w_ih, w_hh, b_ih, b_hh)


@op(
    stock=torch.gru_cell,
    strided=_X,
    autocast="lower",
    policy=_saves_nothing,
    at_most=_BOUND,
    settings=tf32_setting,
    source="arXiv:1406.1078",
)
def gru_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    """Two products, then one kernel for the biases, the gates and the state."""
    out = _cell("gru", input, hx, None, w_ih, w_hh, b_ih, b_hh)
    return out if isinstance(out, Stock) else out[0]
