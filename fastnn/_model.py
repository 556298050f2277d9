"""Whole models: `explain`, `warmup`, `convert`, `revert`, `reverted`, `patch`."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn as stock
from torch.utils._pytree import tree_leaves

from fastnn import _mode
from fastnn._mode import decisions
from fastnn.layers import _marks
from fastnn.layers._layer import BOXES, CALLS, OURS, STOCK, Layer, replaced
from fastnn.layers._standing import STANDING, tell_torchscript
from fastnn.ops import FUNCTIONS


def _expect_module(verb: str, model: Any) -> None:
    if not isinstance(model, stock.Module):
        kind = type(model).__name__
        hint = "each element" if isinstance(model, (list, tuple, dict)) else "a torch.nn.Module"
        raise TypeError(f"{verb}: expected a Module, got {kind}; {verb} {hint}")


def convert(model: stock.Module) -> stock.Module:
    """Let each stock layer of `model` run on our methods, if we have some, in place.

    No layer changes its class: `type(layer) is torch.nn.Linear` stays true. Each layer gets a mark,
    an entry `_fastnn` of its `__dict__`. A copy keeps the mark. A pickle names nothing of fastnn.
    If fastnn is imported before the pickle is loaded, the layers are marked again. Layers of
    fastnn's own classes become marked layers of the stock classes.

    Parameters, buffers, hooks, names and training flags stay the same objects, so optimizers stay
    valid. Only layers that are exactly of a stock class are marked. A subclass may have a forward
    of its own, so it is left alone, and `explain(model)` says so. A second call changes nothing.

    Returns `model`. Raises TypeError if `model` is not a Module.
    """
    _expect_module("convert", model)
    for layer in model.modules():
        cls = type(layer)
        if cls in STOCK:
            layer.__class__ = STOCK[cls]
        elif cls not in OURS:
            continue
        _marks.mark(layer)
    return model


def revert(model: stock.Module) -> stock.Module:
    """Undo `convert`: every layer of `model` runs on PyTorch's methods again, in place.

    Layers of fastnn's own classes become layers of the stock classes.

    Returns `model`. Raises TypeError if `model` is not a Module.
    """
    _expect_module("revert", model)
    for layer in model.modules():
        _marks.unmark(layer)
        cls = type(layer)
        if cls in STOCK:
            layer.__class__ = STOCK[cls]
    return model


@contextmanager
def reverted(model: stock.Module) -> Iterator[stock.Module]:
    """`with fastnn.reverted(model):` runs `revert(model)` for the length of the block.

    After the block, also if it raised, the layers that `model` had before the block run on our
    methods again, if they still have their stock class. Layers that the block put in stay as they
    are.

    Yields `model`. Raises TypeError if `model` is not a Module.
    """
    _expect_module("reverted", model)
    before = [(m, type(m), _marks.is_marked(m)) for m in model.modules()]
    before = [(m, cls, marked) for m, cls, marked in before if marked or cls in STOCK]
    revert(model)
    try:
        yield model
    finally:
        for layer, cls, marked in before:
            if type(layer) is STOCK.get(cls, cls):
                layer.__class__ = cls
                if marked:
                    _marks.mark(layer)


# ---- patch --------------------------------------------------------------------------------------


_patch_lock = threading.Lock()
_patch_depth = 0
_patched: list[tuple[Any, str, Any, Any]] = []  # (home, name, what was there, what is there now)


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    yield stock.Module, "__init__", _marking(stock.Module.__init__)
    for name, function in FUNCTIONS.items():
        if getattr(stock.functional, name, None) is function.op.stock:
            yield stock.functional, name, STANDING[name]


def _marking(initialise: Callable) -> Callable:
    """`Module.__init__`, which also marks each layer of a stock class with kernels, or of a
    subclass of one."""

    @functools.wraps(initialise)
    def __init__(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        if _patch_depth and not isinstance(type(self), Layer):
            _marks.mark(self)

    return __init__


class patch:
    """`with fastnn.patch():` lets the layers that are built inside the block run on our methods.

    Use it for code that builds its layers from `torch.nn`. The layers have the classes of
    `torch.nn` and are marked, as by `convert`. Layers of a subclass are marked, too: they run on
    our methods where they call those of their stock class. While the block is open, the functions
    of `torch.nn.functional` resolve to those of fastnn.

    The block holds for the whole process, and may be nested. When the outermost block ends, also if
    it raised, the original functions are put back. A function that somebody else replaced inside
    the block stays replaced. The layers stay marked. Modules that were imported inside the block
    work after it.
    """

    def __enter__(self) -> patch:
        global _patch_depth
        with _patch_lock:
            _patch_depth += 1
            if _patch_depth == 1:
                tell_torchscript()
                for home, name, new in list(_replacements()):
                    _patched.append((home, name, getattr(home, name), new))
                    setattr(home, name, new)
        return self

    def __exit__(self, *exc) -> None:
        global _patch_depth
        with _patch_lock:
            _patch_depth -= 1
            if _patch_depth == 0:
                while _patched:
                    home, name, before, new = _patched.pop()
                    if getattr(home, name, None) is new:
                        setattr(home, name, before)


# ---- explain ------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One line of an explanation.

    - `layer`: the name of the layer in the model; "" is the model itself.
    - `kind`: the class of the layer.
    - `op`: the function that was called, or None.
    - `path`: "kernel", "stock", or None if nothing was run.
    - `reason`: why the call took this path, in words.
    - `code`: the kind of the reason, if PyTorch ran. docs/api.md has the list.
    """

    layer: str
    kind: str
    op: str | None
    path: str | None
    reason: str
    code: str | None = None


def _row(layer: str, kind: str, op: str, why: str | None, code: str | None) -> Row:
    """The row of one decision."""
    return Row(layer, kind, op, "stock" if why else "kernel", why or "", code)


class Explanation(tuple[Row, ...]):
    """The rows of `explain`: a tuple that prints as a table.

    host: what the host and the GPU take for a step, if `explain` was asked.
    """

    host: HostTime | None = None

    def __str__(self) -> str:
        head = ("layer", "class", "op", "path", "reason")
        lines = [head, *(tuple("" if v is None else str(v) for v in row[:5]) for row in self)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        told = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join(told if self.host is None else [*told, str(self.host)])

    __repr__ = __str__

    def counts(self) -> dict[str, int]:
        """How many calls each path took."""
        return {p: sum(row.path == p for row in self) for p in ("kernel", "stock")}


def _class_name(layer: stock.Module) -> str:
    kind = type(layer)
    return f"{kind.__module__.split('.')[0]}.{kind.__qualname__}"


_PASSING_ON = (stock.Flatten, stock.Identity, stock.Unflatten)


def _explain_statically(model: stock.Module) -> Explanation:
    rows = []
    boxes = {
        id(getattr(layer, name, None)): type(layer).__name__
        for layer in model.modules()
        for name in BOXES.get(type(layer), ())
    }
    for name, layer in model.named_modules():
        kind = type(layer)
        path = None
        if id(layer) in boxes:
            why = f"holds parameters that {boxes[id(layer)]} reads; it is never called"
        elif _marks.ours(layer) is not None:
            why = replaced(kind) or "has kernels"
        elif kind in OURS:
            why = _marks.why_not(kind) or "has kernels: fastnn.convert(model) lets it use them"
        else:
            base = next((c for c in kind.__mro__[1:] if c in OURS or c in STOCK), None)
            if base is None:
                if next(layer.children(), None) is not None:
                    continue  # a container: its members have rows of their own
                why = "no kernels for this class"
                if kind in _PASSING_ON:
                    why = "passes its input on, as it is or as a view: there is nothing to run"
            elif base in STOCK or _marks.is_marked(layer):
                home = "fastnn" if base in STOCK else "torch.nn"
                why = f"a subclass of {home}.{base.__name__}: kernels where it calls that forward"
            else:
                why = f"a subclass of torch.nn.{base.__name__}: left as it is"
        rows.append(Row(name, _class_name(layer), None, path, why))
    return Explanation(rows)


_watch_lock = threading.Lock()


@contextmanager
def _watch_calls(around: Callable) -> Iterator[None]:
    """Inside the block, every layer call of this thread is made by `around(layer, call)`.

    No hook is set, because fused paths look at hooks.
    """
    me = threading.get_ident()
    with _watch_lock:
        original = stock.Module.__call__

        def watched(layer, *args, **kwargs):
            if threading.get_ident() != me:
                return original(layer, *args, **kwargs)
            return around(layer, lambda: original(layer, *args, **kwargs))

        if original in CALLS:
            CALLS.add(watched)  # fused paths also look at `__call__`
        stock.Module.__call__ = watched  # type: ignore[method-assign]
        try:
            yield
        finally:
            stock.Module.__call__ = original  # type: ignore[method-assign]
            CALLS.discard(watched)


@contextmanager
def _untouched(model: stock.Module) -> Iterator[None]:
    """Put buffers and random states back at the end of the block."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    with torch.random.fork_rng(enabled=True):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def _explain_compiled(model: stock.Module, inputs: tuple, kwargs: dict) -> Explanation:
    from fastnn._compiler._backend import decisions_of

    kinds = {name: _class_name(layer) for name, layer in model.named_modules()}
    with _untouched(model):
        return Explanation(
            _row(d.layer, kinds.get(d.layer, ""), d.op, d.why, d.code)
            for d in decisions_of(model, inputs, kwargs)
        )


def explain(
    model: stock.Module, *inputs, compiled: bool = False, host: bool = False, **kwargs
) -> Explanation:
    """Which layers of `model` run on kernels, which run on PyTorch, and why.

    With inputs, `explain` calls `model(*inputs, **kwargs)` once, and gives one row per dispatched
    function, in order. Functions of PyTorch that have no kernels, such as `grid_sample` and
    `affine_grid`, are not dispatched and have no row. Buffers and random states are put back.
    Without inputs, it gives one row per layer, from the class of the layer alone. With
    `compiled=True`, which needs inputs, it calls `fastnn.compile(model)`. Several calls may then
    have become one op. The row of the op names the layer of the last of these calls.

    With `host=True`, which needs inputs on a GPU, forward and backward run a few times more. The
    text of the `Explanation` then ends with a line that says whether the host or the GPU is the
    limit of a step, and which setting fits (`Explanation.host`, a `HostTime`). This time changes
    nothing: no decision of fastnn depends on a clock.

    Returns an `Explanation`, a tuple of `Row`s that prints as a table. Raises TypeError if `model`
    is not a Module, ValueError if `host=True` finds no inputs on a GPU, and any error that the
    model raises.
    """
    _expect_module("explain", model)
    if host:
        found = explain(model, *inputs, compiled=compiled, **kwargs)
        found.host = _host_time(model, inputs, kwargs)
        return found
    if compiled:
        return _explain_compiled(model, inputs, kwargs)
    if not inputs and not kwargs:
        return _explain_statically(model)
    names = {id(layer): name for name, layer in model.named_modules()}
    rows: list[Row] = []
    stack: list[stock.Module] = []

    def around(layer, call):
        flush()
        stack.append(layer)
        try:
            out = call()
            flush()
            why = replaced(type(layer)) if _marks.ours(layer) is not None else None
            if why is not None:
                rows.append(Row(names.get(id(layer), "?"), _class_name(layer), None, None, why))
            return out
        finally:
            stack.pop()

    def flush():
        if stack:
            layer = stack[-1]
            name, kind = names.get(id(layer), "?"), _class_name(layer)
        else:
            name, kind = "", _class_name(model)
        for op, why, code in heard:
            rows.append(_row(name, kind, op.name, why, code))
        heard.clear()

    with _untouched(model), decisions() as heard, _watch_calls(around):
        model(*inputs, **kwargs)
    return Explanation(rows)


class HostTime(NamedTuple):
    """What a step, forward and backward, takes: the least of several, in milliseconds.

    - `enqueue`: until the host has handed over all work, if the GPU has nothing else to do.
    - `step`: until the GPU has finished, if steps follow one another.
    """

    enqueue: float
    step: float

    def __str__(self) -> str:
        told = f"host: {self.enqueue:.2f} ms to enqueue a step that takes {self.step:.2f} ms"
        if self.enqueue > 0.95 * self.step:
            return (
                f"{told}: the host is the limit. Leave FASTNN_HOST unset, use larger batches, or "
                "capture a CUDA graph after fastnn.warmup(model, ...)"
            )
        if self.enqueue > 0.7 * self.step:
            return f"{told}: host and GPU are about even. Leave FASTNN_HOST unset"
        return f"{told}: the GPU is the limit. FASTNN_HOST=free lets more calls run on kernels"


_HOST_STEPS = 5
_TIMED = "cuda"


def _host_time(model: stock.Module, inputs: tuple, kwargs: dict) -> HostTime:
    given = [*tree_leaves((inputs, kwargs)), *model.parameters()]
    devices = {t.device for t in given if isinstance(t, torch.Tensor)}
    device = next((d for d in devices if d.type == _TIMED), None)
    if device is None:
        raise ValueError(
            "explain: host=True times a step on a GPU; the inputs and the model are on "
            f"{', '.join(sorted({d.type for d in devices})) or 'no device'}"
        )
    with _untouched(model), torch.enable_grad():
        for _ in range(3):  # kernels are compiled, and plans are made
            _step(model, inputs, kwargs)
        enqueue, step = [], []
        for _ in range(_HOST_STEPS):
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            _step(model, inputs, kwargs)
            enqueue.append(time.perf_counter() - start)
        torch.cuda.synchronize(device)
        for _ in range(_HOST_STEPS):
            start = time.perf_counter()
            for _ in range(2):
                _step(model, inputs, kwargs)
            torch.cuda.synchronize(device)
            step.append((time.perf_counter() - start) / 2)
    return HostTime(1e3 * min(enqueue), 1e3 * min(step))


def warmup(model: stock.Module, *inputs, **kwargs) -> None:
    """Compile every kernel that `model(*inputs, **kwargs)` and its backward launch.

    `warmup` runs the forward and the backward. Later calls with these shapes and dtypes then find
    the kernels compiled. Use it before a benchmark, and before the capture of a CUDA graph, because
    nothing can be compiled during a capture. In `auto` two further runs prepare such a capture. The
    replay of a CUDA graph costs the host nothing, so kernels also run there for calls that are too
    small for them elsewhere. Parameters, their `.grad`, buffers and random states stay as they are.

    Raises TypeError if `model` is not a Module, and any error that the model raises.
    """
    _expect_module("warmup", model)
    with _untouched(model), torch.enable_grad():
        _step(model, inputs, kwargs)
        if not _mode.idle() and _mode.current_mode() == "auto":
            with _mode.rehearsal():
                for _ in range(2):  # a plan is made of the second call
                    _step(model, inputs, kwargs)


def _step(model: stock.Module, inputs: tuple, kwargs: dict) -> None:
    """Forward and backward."""
    out = model(*inputs, **kwargs)
    ends = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]
    given = [*tree_leaves((inputs, kwargs)), *model.parameters()]
    leaves = [t for t in given if isinstance(t, torch.Tensor) and t.requires_grad]
    if ends and leaves:
        torch.autograd.grad(ends, leaves, [torch.ones_like(t) for t in ends], allow_unused=True)
