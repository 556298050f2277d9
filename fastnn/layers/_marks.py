"""Marked layers: layers of a stock class that run on our methods.

Tools look the class of a layer up, so `convert` does not change it. It writes a mark into the
layer's `__dict__`, and PyTorch's own methods ask for the mark:

    def forward(self, input):
        if "_fastnn" in self.__dict__ and self._fastnn is _fastnn_mark:
            return _fastnn_Linear_forward(self, input)
        return F.linear(input, self.weight, self.bias)

The first mark on a layer of a class puts this question into the code of the methods of that class.
The method stays the same function object with the same source, signature and frames. So a tool that
replaces `nn.Linear.forward` and later puts it back, a subclass that calls `super().forward`,
TorchScript, which reads the source, and a warning that names a line above it find what they find
without us. (A descriptor in the place of the method would be lost when a tool puts the method back,
and costs three times as much on layers without a mark.)
"""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import threading
from collections.abc import Callable
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch.nn as stock

from fastnn.layers._layer import METHODS, OURS, STOCK, Method, front

KEY = "_fastnn"
# The value is a plain string, which any process can unpickle. Its identity counts: a copy keeps it,
# and a pickle does not. So a mark that was unpickled before fastnn was imported does nothing.
MARK = "".join(("fast", "nn"))


def is_marked(layer: stock.Module) -> bool:
    return layer.__dict__.get(KEY) is MARK


def ours(layer: stock.Module) -> type | None:
    """The accelerated class whose methods the layer runs on; None if it runs on others.

    A layer of a subclass runs on methods of its own, so the answer is None, too.
    """
    cls = type(layer)
    if cls in STOCK:
        return cls
    return OURS.get(cls) if layer.__dict__.get(KEY) is MARK else None


def base(cls: type) -> type | None:
    """The first stock class with kernels among the class and its bases."""
    return next((c for c in cls.__mro__ if c in OURS), None)


def mark(layer: stock.Module) -> None:
    """Let the layer run on our methods. It is of a stock class with kernels, or of a subclass."""
    cls = base(type(layer))
    if cls is not None and not _prepare(cls):
        layer.__dict__[KEY] = MARK


def unmark(layer: stock.Module) -> None:
    layer.__dict__.pop(KEY, None)


# ---- The question in PyTorch's methods ----------------------------------------------------------

_lock = threading.RLock()
_prepared: dict[type, str | None] = {}  # stock class -> why it cannot be marked; None: it can
_FLAGS = functools.reduce(
    int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)


def why_not(cls: type) -> str | None:
    """Why layers of this stock class could not be marked, in words; None if they were, or never."""
    return _prepared.get(cls)


def _prepare(cls: type) -> str | None:
    """Put the question into the methods of a stock class. Returns why that is impossible, or None.

    A lazy layer becomes a layer of another class, which is prepared, too.
    """
    if cls in _prepared:
        return _prepared[cls]
    with _lock:
        for method in METHODS[cls]:
            why = _ask(method)
            if why is not None:
                return _prepared.setdefault(cls, why)
        becomes = getattr(cls, "cls_to_become", None)
        return _prepared.setdefault(cls, None if becomes is None else _prepare(becomes))


def _ask(method: Method) -> str | None:
    """Put the question into PyTorch's method, unless it is there. Returns why not, or None."""
    made = method.made
    if made is None:
        return f"{method.name} was replaced before fastnn was imported"
    scope = made.__globals__
    called = f"{KEY}_{made.__qualname__.replace('.', '_')}"
    if scope.get(called) is not None and scope.get(f"{KEY}_mark") is MARK:
        return None
    # An earlier import of fastnn in this process may have been here.
    original = scope.get(f"{called}_code", made.__code__)
    shared = [
        (its, m) for its, methods in METHODS.items() for m in methods if m.made is made
    ]  # classes that inherit the method
    question = called if len(shared) == 1 else f"{called}(self)"
    try:
        plain, asking = _compiled(made, original, question)
    except (OSError, SyntaxError, TypeError, ValueError) as e:
        return f"the source of torch.nn's {made.__qualname__} cannot be read ({e})"
    if (plain.co_code, plain.co_names) != (original.co_code, original.co_names):
        return f"the source of torch.nn's {made.__qualname__} is not what runs"
    twin = FunctionType(original, scope, made.__name__, made.__defaults__, made.__closure__)
    twin.__kwdefaults__ = made.__kwdefaults__
    fronts = {its: front(OURS[its], its, m, twin) for its, m in shared}
    scope[f"{called}_code"] = original
    scope[f"{KEY}_mark"] = MARK
    scope[called] = _choice(fronts, twin) if len(shared) > 1 else fronts[shared[0][0]]
    made.__code__ = asking
    return None


def _choice(fronts: dict[type, Callable], twin: Callable) -> Callable:
    """A function that returns the front for a layer, whose class shares the method with others."""

    def choose(layer):
        chosen = fronts.get(type(layer))
        if chosen is None:  # a subclass
            chosen = next((fronts[c] for c in type(layer).__mro__ if c in fronts), twin)
        return chosen

    return choose


def _compiled(made: Any, original: Any, front: str) -> tuple[CodeType, CodeType]:
    """The code of a method as its source file has it, and the same with the question in it.

    `front` is the source of what a marked layer calls in place of the method.
    """
    lines, first = inspect.getsourcelines(made)
    # Python compiles a call of an attribute of an imported name in a way of its own.
    scope = made.__globals__
    here = scope["__name__"]
    names = {
        name
        for name in original.co_names
        if name in scope
        and (
            isinstance(scope[name], ModuleType) or getattr(scope[name], "__module__", here) != here
        )
    }
    above = f"import {', '.join(sorted({*names, 'torch'}))}\nif True:\n"
    found = []
    for asks in (False, True):
        tree = ast.parse(above + "".join(lines))
        function: Any = tree.body[1].body[0]  # type: ignore[attr-defined]
        if not isinstance(function, ast.FunctionDef) or function.name != original.co_name:
            raise ValueError("it is another function")
        function.decorator_list = []
        if asks:
            given = ", ".join(a.arg for a in function.args.args)
            question = ast.parse(
                f"if {KEY!r} in self.__dict__ and self.{KEY} is {KEY}_mark: return {front}({given})"
            ).body[0]
            at = int(ast.get_docstring(function) is not None)
            for node in ast.walk(question):
                ast.copy_location(node, function.body[at])
            function.body.insert(at, question)
        ast.increment_lineno(function, first - 3)
        module = compile(
            tree, original.co_filename, "exec", original.co_flags & _FLAGS, dont_inherit=True
        )
        code: Any = next(
            c for c in module.co_consts if isinstance(c, CodeType) and c.co_name == original.co_name
        )
        if hasattr(code, "co_qualname"):
            code = code.replace(co_qualname=original.co_qualname)
        found.append(code)
    return found[0], found[1]


# ---- Pickles ------------------------------------------------------------------------------------

_setstate = stock.Module.__setstate__


@functools.wraps(_setstate)
def _set_state(self, state):
    _setstate(self, state)
    if KEY in self.__dict__:
        mark(self)  # the mark of another process: renew it


stock.Module.__setstate__ = _set_state  # type: ignore[method-assign]
