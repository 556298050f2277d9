"""Recurrent cells, and recurrent layers over all steps."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as stock
from torch import Tensor

from fastnn import kernels
from fastnn._op import (
    FLOATS,
    Function,
    Invalid,
    Stock,
    Work,
    impossible,
    op,
    run,
    second_order,
)
from fastnn.ops.linear import tf32_setting

_GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
_STOCK: dict[str, Any] = {
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
        if kind in ("lstm", "gru"):
            kept: tuple = x, h, c, w_ih, w_hh, b_ih, b_hh, new_c, gates
        else:  # the gradient of a factor reads the other factor, and all of them read new_h
            of_x, of_h, _, of_ih, of_hh = ctx.needs_input_grad[:5]
            weights = w_ih if of_x else None, w_hh if of_h else None
            states = x if of_ih else None, h if of_hh else None
            kept = *states, None, *weights, None, None, new_h, None
        ctx.save_for_backward(*kept)
        ctx.kind = kind
        ctx.set_materialize_grads(False)
        return new_h, new_c

    @staticmethod
    def backward(ctx, dh, dc):
        x, h, c, w_ih, w_hh, b_ih, b_hh, kept, gates = ctx.saved_tensors
        kind, needs = ctx.kind, ctx.needs_input_grad
        # create_graph=True: a kernel's gradient would carry no graph
        again = torch.is_grad_enabled()
        if again and kind in ("lstm", "gru"):
            given = [g for g in (dh, dc) if g is not None]

            def formula(x, h, c, *rest):
                if c is None:
                    return [_STOCK[kind](x, h, *rest)]
                both = zip(_STOCK[kind](x, (h, c), *rest), (dh, dc), strict=True)
                return [t for t, g in both if g is not None]

            inputs = (x, h, c, w_ih, w_hh, b_ih, b_hh)
            return *second_order(formula, inputs, given, needs), None
        more = None
        if again:
            aten = torch.ops.aten
            dgi = dgh = (
                aten.tanh_backward(dh, kept)
                if kind == "rnn_tanh"
                else aten.threshold_backward(dh, kept, 0)
            )
        elif kind == "lstm":
            dgi, dc = kernels.recurrent.lstm_bwd(dh, dc, c, kept, gates)
            dgh = dgi
        elif kind == "gru":
            dgi, dgh, more = kernels.recurrent.gru_bwd(dh, h, gates)
        else:
            dgi = dgh = kernels.recurrent.rnn_bwd(dh, kept, kind == "rnn_relu")
        dx = dh = dw_ih = dw_hh = None
        with torch.autocast(dgi.device.type, enabled=False):
            if needs[0]:
                dx = dgi @ w_ih
            if needs[1]:
                dh = dgh @ w_hh if more is None else torch.addmm(more, dgh, w_hh)
            if needs[3]:
                dw_ih = dgi.t() @ x
            if needs[4]:
                dw_hh = dgh.t() @ h
        if again:
            db_ih, db_hh = (dgi.sum(0) if need else None for need in needs[5:7])
            return dx, dh, None, dw_ih, dw_hh, db_ih, db_hh, None
        db_ih, db_hh = _bias_gradients(dgi, dgh, *needs[5:7])
        return dx, dh, dc if needs[2] else None, dw_ih, dw_hh, db_ih, db_hh, None


def _bias_gradients(dgi, dgh, want_ih, want_hh):
    """The sums of the gradients of both products over the rows; None for what is not wanted."""
    db_ih = kernels.epilogue.bwd(dgi, want_dz=False)[1] if want_ih else None
    if not want_hh:
        return db_ih, None
    if dgh is dgi and db_ih is not None:
        return db_ih, db_ih.clone()
    return db_ih, kernels.epilogue.bwd(dgh, want_dz=False)[1]


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
    "at_most": "input.shape[0] * w_hh.shape[1]",
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

_STOCK_LAYER: dict[str, Any] = {
    "rnn_tanh": torch.rnn_tanh,
    "rnn_relu": torch.rnn_relu,
    "lstm": torch.lstm,
    "gru": torch.gru,
}
_STATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 2, "gru": 1}


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
    w_hr: Tensor | None


_EACH = len(Direction._fields)


def _directions(weights) -> list[Direction]:
    return [Direction(*weights[i : i + _EACH]) for i in range(0, len(weights), _EACH)]


class Packing(NamedTuple):
    """The steps of a packed sequence."""

    sizes: Tensor  # the number of rows of each step, on the CPU, as PyTorch takes it
    table: Tensor  # (2, T, 5) on the device: what the kernels read, for both directions


def _packing(sizes: Tensor, device: torch.device) -> Packing:
    """sizes (T,): int64, on the CPU, positive, not increasing."""
    N = int(sizes[0])
    first = sizes.cumsum(0) - sizes
    zero = sizes.new_zeros(1)
    ways = []
    for reverse in (False, True):
        n, row = (sizes.flip(0), first.flip(0)) if reverse else (sizes, first)
        before, after = torch.cat((zero, n[:-1])), torch.cat((n[1:], zero))
        states = torch.cat((zero, N + row[:-1]))
        ways.append(torch.stack((row, n, states, before, after), 1))
    # a copy: PyTorch does not keep the sizes, so users may edit theirs
    return Packing(sizes.clone(), torch.stack(ways).to(device))


def _states_before(table: Tensor, rows: int) -> Tensor:
    """For each row of a packed sequence, the row of the state before it. table: of a direction."""
    ordered = table[table[:, 0].argsort()]
    each = ordered.repeat_interleave(ordered[:, 1], dim=0, output_size=rows)
    b = torch.arange(rows, device=table.device) - each[:, 0]
    return torch.where(b < each[:, 3], each[:, 2] + b, b)


class Steps(Function):
    """x (T, N, I), or (R, I) of a packed sequence, h0 (D, N, P), c0 (D, N, H) or None, and for each
    of the D directions its weights, biases and None for what is missing -> y (T, N, D * P) or (R, D
    * P), the last h and c (D, N, P or H), c or None.

    packing: of a packed sequence, else (None, None).
    """

    @staticmethod
    def forward(ctx, x, h0, c0, kind, sizes, table, *weights):
        keep = any(ctx.needs_input_grad)
        D, _, P = h0.shape
        flat = x.flatten(0, -2)
        T = x.shape[0] if table is None else table.shape[1]
        y = x.new_empty((*x.shape[:-1], D * P))
        hn = x.new_empty(h0.shape)
        cn = None if c0 is None else x.new_empty(c0.shape)
        kept: list = []
        for d, p in enumerate(_directions(weights)):
            with torch.autocast(x.device.type, enabled=False):
                gi = stock.linear(flat, p.w_ih, p.b_ih)
            part = y.view(-1, D * P)[:, d * P : (d + 1) * P]
            kept += kernels.recurrent_steps.fwd(
                gi, p.w_hh, p.b_hh, h0[d], None if c0 is None else c0[d], part, hn[d],
                None if cn is None else cn[d], p.w_hr, None if table is None else table[d], T, kind,
                d == 1, keep,
            )  # fmt: skip
        # PyTorch keeps the result of an LSTM of one direction, if it is not packed, and no others.
        # An edit of it thus raises an error in the backward, as in PyTorch.
        result = y if kind == "lstm" and D == 1 and table is None else None
        ctx.save_for_backward(x, h0, c0, result, sizes, table, *weights, *kept)
        ctx.kind = kind
        ctx.set_materialize_grads(False)
        return y, hn, cn

    @staticmethod
    def backward(ctx, dy, dhn, dcn):
        kind, needs = ctx.kind, ctx.needs_input_grad
        x, h0, c0, _, sizes, table, *rest = ctx.saved_tensors
        D, N, P = h0.shape
        weights, kept = rest[: _EACH * D], rest[_EACH * D :]
        if torch.is_grad_enabled():
            return Steps._differentiable(ctx, x, h0, c0, sizes, weights, (dy, dhn, dcn))
        flat = x.flatten(0, -2)
        R = flat.shape[0]
        T = x.shape[0] if table is None else table.shape[1]
        dx = None
        dh0 = torch.empty_like(h0) if needs[1] else None
        dc0 = torch.empty_like(c0) if needs[2] else None
        grads: list = []
        for d, p in enumerate(_directions(weights)):
            gates, states, cells, projected = kept[4 * d : 4 * d + 4]
            way = None if table is None else table[d]
            dgi, dgh, dh, dc, dp = kernels.recurrent_steps.bwd(
                None if dy is None else dy.view(R, D * P)[:, d * P : (d + 1) * P],
                None if dhn is None else dhn[d], None if dcn is None else dcn[d], gates, states,
                cells, p.w_hh, p.w_hr, way, T, N, R, kind, d == 1, needs[1],
            )  # fmt: skip
            if dh0 is not None:
                dh0[d] = dh
            if dc0 is not None:
                dc0[d] = dc
            need = needs[6 + _EACH * d : 6 + _EACH * (d + 1)]
            dw_hr = None
            with torch.autocast(x.device.type, enabled=False):
                if needs[0]:
                    dx = dgi @ p.w_ih if dx is None else torch.addmm(dx, dgi, p.w_ih)
                grads.append(dgi.t() @ flat if need[0] else None)
                if need[1]:
                    before = states[:R] if way is None else states[_states_before(way, R)]
                    grads.append(dgh.t() @ before)
                else:
                    grads.append(None)
                if need[4]:
                    dw_hr = dp.t() @ projected
            grads += _bias_gradients(dgi, dgh, *need[2:4])
            grads.append(dw_hr)
        return dx if dx is None else dx.view(x.shape), dh0, dc0, None, None, None, *grads

    @staticmethod
    def _differentiable(ctx, x, h0, c0, sizes, weights, given):
        """Gradients with a graph of their own."""
        both = h0.shape[0] == 2
        biased = weights[2] is not None

        def formula(x, h0, c0, *weights):
            present = [w for w in weights if w is not None]
            state = h0 if c0 is None else (h0, c0)
            with _without_cudnn():
                layer = _STOCK_LAYER[ctx.kind]
                if sizes is None:
                    out = layer(x, state, present, biased, 1, 0.0, False, both, False)
                else:
                    out = layer(x, sizes, state, present, biased, 1, 0.0, False, both)
            return [t for t, g in zip(out, given, strict=False) if g is not None]

        needs = (*ctx.needs_input_grad[:3], *ctx.needs_input_grad[6:])
        given_only = [g for g in given if g is not None]
        dx, dh0, dc0, *grads = second_order(formula, (x, h0, c0, *weights), given_only, needs)
        return dx, dh0, dc0, None, None, None, *grads


def _layers(kind, input, state, params, biased, layers, dropout, train, both, batch_first):
    """The result of PyTorch's function; or a `Stock` that says why no kernel computes it."""
    sizes = None
    if isinstance(params, Tensor) or (kind == "lstm" and isinstance(state, Tensor)):
        # (data, batch_sizes, state, params, has_biases, num_layers, dropout, train, bidirectional)
        sizes, state, params, biased, layers, dropout, train, both, batch_first = (
            state, params, biased, layers, dropout, train, both, batch_first, False
        )  # fmt: skip
    states = list(state) if kind == "lstm" else [state]
    if len(states) != _STATES[kind] or not all(isinstance(t, Tensor) for t in (*states, *params)):
        return Invalid("option", f"{len(states)} states")
    D = 2 if both else 1
    projected = kind == "lstm" and states[0].shape[-1:] != states[1].shape[-1:]
    given = (4 if biased else 2) + projected
    fits = input.dim() == (3 if sizes is None else 2) and len(params) == given * D * layers
    if not fits or any(t.dim() != 3 for t in states):
        return Invalid("shape", f"input {tuple(input.shape)}, {len(params)} parameters")
    if any(t.dtype != input.dtype or t.device != input.device for t in (*states, *params)):
        return Invalid("dtype", "several dtypes or devices")
    if input.dtype not in FLOATS:
        return Invalid("dtype", f"input in {input.dtype}")
    gates = kernels.recurrent_steps.GATES[kind]
    rows, P, width = params[0].shape[0], states[0].shape[2], input.shape[-1]
    H = rows // gates
    if sizes is None:
        x = input.transpose(0, 1) if batch_first else input
        N = x.shape[1]
    else:
        if sizes.dim() != 1 or sizes.dtype != torch.int64 or sizes.device.type != "cpu":
            return Invalid("dtype", "batch sizes that are not (T,) int64 on the CPU")
        impossible("it reads the batch sizes")
        ordered = sizes.tolist()
        # PyTorch checks only some of this
        if not ordered or ordered != sorted(ordered, reverse=True) or ordered[-1] < 1:
            return Invalid("shape", f"batch sizes {ordered}")
        if sum(ordered) != input.shape[0]:
            return Invalid("shape", f"{input.shape[0]} rows for batch sizes of {sum(ordered)}")
        x = input
        N = ordered[0]
    shapes = [(D * layers, N, n) for n in ((P, H) if kind == "lstm" else (P,))]
    fits = all(tuple(t.shape) == shape for t, shape in zip(states, shapes, strict=True))
    own: list = []
    for at in range(0, len(params), given):
        w_ih, w_hh, *rest = params[at : at + given]
        w_hr = rest.pop() if P != H and rest else None
        biases = rest or (None, None)
        inputs = width if at < given * D else D * P
        fits = fits and w_ih.shape == (rows, inputs) and w_hh.shape == (rows, P)
        fits = fits and all(b is None or b.shape == (rows,) for b in biases)
        fits = fits and (P == H if w_hr is None else w_hr.shape == (P, H))
        own += [w_ih, w_hh, *biases, w_hr]
    if not fits:
        return Invalid(
            "shape", f"input {tuple(input.shape)}, states {[tuple(t.shape) for t in states]}"
        )
    if not x.numel() * N * P:
        return Stock("empty", "no elements")
    if max(p.numel() for p in params) >= 2**31:  # kernels index a weight in 32 bits
        most = max(p.numel() for p in params)
        return Stock("size", f"a weight of {most:,} elements; kernels take less than 2^31")
    draws = train and dropout > 0 and layers > 1
    if draws and input.device.type != "cpu":
        return Stock(
            "random", "dropout between layers, for which cuDNN draws random numbers of its own"
        )
    if kind in ("lstm", "gru") and input.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return Stock(
            "autocast", "on a CPU, autocast widens some dtypes for this layer, but not all"
        )
    packing = (None, None) if sizes is None else _packing(sizes, input.device)
    last: list = []
    x = x.contiguous()
    for layer in range(layers):
        own_states = slice(layer * D, (layer + 1) * D)
        now = [t.contiguous() if layers == 1 else t[own_states].contiguous() for t in states]
        h, c = now if kind == "lstm" else (*now, None)
        weights = own[layer * D * _EACH : (layer + 1) * D * _EACH]
        x, *new = run(Steps, x, h, c, kind, *packing, *weights)
        last.append(new[: len(states)])
        if draws and layer < layers - 1:
            x = stock.dropout(x, dropout)
    ends = last[0] if layers == 1 else [torch.cat(parts) for parts in zip(*last, strict=True)]
    return x.transpose(0, 1) if batch_first else x, *ends


def _settings():
    return tf32_setting(), torch._C._get_cudnn_enabled()


class Extent(NamedTuple):
    """What the gate asks of a call."""

    rows: int  # of the batch
    weights: Tensor  # of the recurrence
    projection: Tensor | None


def _shape(input, hx, params, has_biases, num_layers, *rest) -> Extent:
    """Of the call of a layer; of a packed one, the arguments stand one place further."""
    if isinstance(has_biases, (tuple, list)):
        hx, params, has_biases = params, has_biases, num_layers
    states = hx if isinstance(hx, (tuple, list)) else [hx]
    projected = len(states) == 2 and states[0].shape[-1] != states[1].shape[-1]
    projection = params[4 if has_biases else 2] if projected else None
    return Extent(states[0].shape[1], params[1], projection)


_BFLOAT16 = 91300  # the first cuDNN whose layers PyTorch calls for bfloat16


def _library(input, projected: bool) -> str | None:
    """The library that runs all steps of a layer for PyTorch; None if PyTorch runs step by step."""
    cudnn = torch.backends.cudnn
    if torch.version.hip:
        return "MIOpen" if cudnn.enabled and cudnn.is_available() and not projected else None
    if not torch.cudnn_is_acceptable(input):
        return None
    if input.dtype is torch.bfloat16 and (cudnn.version() or 0) < _BFLOAT16:
        return None
    return "cuDNN"


def _may_differ(input, *args):
    """Whether PyTorch gives other bits each time although only deterministic algorithms may run.

    PyTorch's page on LSTM names the settings with which cuDNN gives the same bits. Of those with
    which PyTorch runs products at all, ":4096:8" is not among them.
    """
    chosen = os.environ.get("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    return chosen and _library(input, _shape(input, *args).projection is not None) == "cuDNN"


# Bytes of recurrent weights. A kernel's block reads them in every step, PyTorch's product once.
# PyTorch has 1 launch more a step at least, 4 us, in which an H100 reads 22 MB from L2, and one
# multiprocessor 0.17 MB; of all steps in one kernel 2 more.
_READ = 1 << 24
_READ_EACH = 1 << 18


def _unless_cudnn(
    input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first=False
):  # fmt: skip
    """The gate's policy: the number of elements of the input."""
    shape = _shape(input, hx, params, has_biases, num_layers)
    library = _library(input, shape.projection is not None)
    if library is not None:
        return Stock("gate", f"{library} runs all steps of a layer")
    each = shape.weights.numel() * shape.weights.element_size()
    if shape.projection is not None:
        each += shape.projection.numel() * shape.projection.element_size()
        if each > _READ_EACH:
            return Stock("gate", f"one block reads {each:,} bytes of weights in each step")
    read = each * -(-shape.rows // kernels.recurrent_steps.ROWS)
    if read > _READ:
        return Stock(
            "gate", f"blocks read {read:,} bytes of weights in each step, PyTorch {each:,}"
        )
    return Work(input.numel())


_LAYER: dict[str, Any] = {
    # the last of them holds the parameters of a packed sequence
    "strided": ("input", "hx", "params", "has_biases"),
    "integers": (torch.int64,),  # the batch sizes of a packed sequence
    "on_host": ("hx",),
    "autocast": "lower",
    "policy": _unless_cudnn,
    "alerts": _may_differ,
    "settings": _settings,
}


@op(stock=torch.rnn_tanh, autocast_cpu="lower", **_LAYER)
def rnn_tanh(
    input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first
):  # fmt: skip
    """One product for the inputs of all steps, then one kernel for all steps, of each direction;
    one kernel for each step if the recurrent weights do not fit the memory of a block.
    """
    return _layers(
        "rnn_tanh", input, hx, params, has_biases, num_layers, dropout, train, bidirectional,
        batch_first,
    )  # fmt: skip


@op(stock=torch.rnn_relu, autocast_cpu="lower", **_LAYER)
def rnn_relu(
    input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first
):  # fmt: skip
    """One product for the inputs of all steps, then one kernel for all steps, of each direction;
    one kernel for each step if the recurrent weights do not fit the memory of a block.
    """
    return _layers(
        "rnn_relu", input, hx, params, has_biases, num_layers, dropout, train, bidirectional,
        batch_first,
    )  # fmt: skip


@op(stock=torch.gru, **_LAYER)
def gru(
    input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first
):  # fmt: skip
    """One product for the inputs of all steps, then one kernel for all steps, of each direction;
    one kernel for each step if the recurrent weights do not fit the memory of a block.
    """
    return _layers(
        "gru", input, hx, params, has_biases, num_layers, dropout, train, bidirectional,
        batch_first,
    )  # fmt: skip


@op(stock=torch.lstm, **_LAYER)
def lstm(
    input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first
):  # fmt: skip
    """One product for the inputs of all steps, then one kernel for all steps, of each direction;
    one kernel for each step if the recurrent weights do not fit the memory of a block.
    """
    return _layers(
        "lstm", input, hx, params, has_biases, num_layers, dropout, train, bidirectional,
        batch_first,
    )  # fmt: skip
