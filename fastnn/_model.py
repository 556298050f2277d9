"""Whole models: `explain`, `warmup`, `convert`, `revert`, `patch`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn as stock
from torch.utils._pytree import tree_leaves

from fastnn._mode import decisions
from fastnn.layers._layer import CALLS, OURS, STOCK, replaced
from fastnn.ops import FUNCTIONS


def _expect_module(verb: str, model: Any) -> None:
    if not isinstance(model, stock.Module):
        kind = type(model).__name__
        hint = "each element" if isinstance(model, (list, tuple, dict)) else "a torch.nn.Module"
        raise TypeError(f"{verb}: expected a Module, got {kind}; {verb} {hint}")


def _reclass(model: stock.Module, classes: dict[type, type]) -> None:
    for layer in model.modules():
        new = classes.get(type(layer))
        if new is not None:
            layer.__class__ = new


def convert(model: stock.Module) -> stock.Module:
    """Give each stock layer of `model` its accelerated class, if there is one, in place.

    Parameters, buffers, hooks, names and training flags stay the same objects, so optimizers stay
    valid. Only exact stock classes are swapped. A subclass may have a forward of its own, so it is
    left alone, and `explain(model)` says so. A second call changes nothing.

    Returns `model`. Raises TypeError if `model` is not a Module.
    """
    _expect_module("convert", model)
    _reclass(model, OURS)
    return model


def revert(model: stock.Module) -> stock.Module:
    """Give each accelerated layer of `model` its stock class back, in place.

    Returns `model`. Raises TypeError if `model` is not a Module.
    """
    _expect_module("revert", model)
    _reclass(model, STOCK)
    return model


# ---- patch --------------------------------------------------------------------------------------

_patch_lock = threading.Lock()
_patch_depth = 0
_patched: list[tuple[Any, str, Any]] = []  # (module, name, the object that was replaced)


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    for ours, its_stock in STOCK.items():
        for home in (stock, stock.modules):
            if getattr(home, its_stock.__name__, None) is its_stock:
                yield home, its_stock.__name__, ours
    for name, function in FUNCTIONS.items():
        if getattr(stock.functional, name, None) is function.op.stock:
            yield stock.functional, name, function


class patch:
    """`with fastnn.patch():` makes `torch.nn.X` and `torch.nn.functional.x` resolve to fastnn.

    Use it for code that builds its layers from `torch.nn`. It holds for the whole process, and may
    be nested. When the outermost block ends, also by an exception, the original objects are put
    back.
    """

    def __enter__(self) -> patch:
        global _patch_depth
        with _patch_lock:
            _patch_depth += 1
            if _patch_depth == 1:
                for home, name, new in list(_replacements()):
                    _patched.append((home, name, getattr(home, name)))
                    setattr(home, name, new)
        return self

    def __exit__(self, *exc) -> None:
        global _patch_depth
        with _patch_lock:
            _patch_depth -= 1
            if _patch_depth == 0:
                while _patched:
                    setattr(*_patched.pop())


# ---- explain ------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One line of an explanation.

    layer: the layer's name in the model; "" is the model itself.
    kind: the class of the layer.
    op: the function that was dispatched, or None.
    path: "kernel", "stock", or None if nothing was run.
    reason: the reason, in words.
    """

    layer: str
    kind: str
    op: str | None
    path: str | None
    reason: str


class Explanation(tuple[Row, ...]):
    """The rows of `explain`: a tuple that prints as a table."""

    def __str__(self) -> str:
        head = ("layer", "class", "op", "path", "reason")
        lines = [head, *(tuple("" if v is None else str(v) for v in row) for row in self)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )

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
    for name, layer in model.named_modules():
        kind = type(layer)
        path = None
        if kind in STOCK:
            why = replaced(kind) or "has kernels"
        elif kind in OURS:
            why = "stock class with kernels available: fastnn.convert(model) swaps it"
        else:
            base = next((c for c in kind.__mro__[1:] if c in OURS or c in STOCK), None)
            if base is None:
                if next(layer.children(), None) is not None:
                    continue  # a container: its members have rows of their own
                why = "no kernels for this class"
                if kind in _PASSING_ON:
                    why = "passes its input on, as it is or as a view: there is nothing to run"
            elif base in STOCK:
                why = f"a subclass of fastnn.{base.__name__}: kernels where it calls that forward"
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
            Row(d.layer, kinds.get(d.layer, ""), d.op, "stock" if d.why else "kernel", d.why or "")
            for d in decisions_of(model, inputs, kwargs)
        )


def explain(model: stock.Module, *inputs, compiled: bool = False, **kwargs) -> Explanation:
    """Which layers of `model` run on kernels, which run on PyTorch, and why.

    With inputs, `explain` calls `model(*inputs, **kwargs)` once, and gives one row per dispatched
    function, in order. Buffers and random states are put back. Without inputs, it gives one row per
    layer, from the class of the layer alone. With `compiled=True`, which needs inputs, it tells of
    the call of `fastnn.compile(model)`. A row then names the layer in which the last of the calls
    stands that became the op.

    Returns an `Explanation`, a tuple of `Row`s that prints as a table. Raises TypeError if `model`
    is not a Module, and any error that the model raises.
    """
    _expect_module("explain", model)
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
            why = replaced(type(layer)) if type(layer) in STOCK else None
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
        for op, why in heard:
            rows.append(Row(name, kind, op.name, "stock" if why else "kernel", why or ""))
        heard.clear()

    with _untouched(model), decisions() as heard, _watch_calls(around):
        model(*inputs, **kwargs)
    return Explanation(rows)


def warmup(model: stock.Module, *inputs, **kwargs) -> None:
    """Compile every kernel that `model(*inputs, **kwargs)` and its backward launch.

    It runs the forward and the backward once. Later calls with these shapes and dtypes then find
    the kernels compiled. Use it before a benchmark, and before the capture of a CUDA graph: during
    capture nothing can be compiled. Parameters, their `.grad`, buffers and random states stay as
    they are.

    Raises TypeError if `model` is not a Module, and any error that the model raises.
    """
    _expect_module("warmup", model)
    with _untouched(model), torch.enable_grad():
        out = model(*inputs, **kwargs)
        ends = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]
        given = [*tree_leaves((inputs, kwargs)), *model.parameters()]
        leaves = [t for t in given if isinstance(t, torch.Tensor) and t.requires_grad]
        if ends and leaves:
            torch.autograd.grad(ends, leaves, [torch.ones_like(t) for t in ends], allow_unused=True)
