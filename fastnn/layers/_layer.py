"""What every accelerated layer shares: who its stock class is, and passing for it.

Code asks two things of a layer's class that a subclass alone answers wrongly: whether
`isinstance(layer, nn.Linear)` when the layer was built by code that knows only `torch.nn`, and
whether torch.fx may step into it. And tools replace methods on a class, `torch.nn.Linear.forward`
above all, which a subclass with a method of its own would hide.
"""

from __future__ import annotations

import functools
import linecache
from abc import ABCMeta
from collections.abc import Callable
from inspect import Parameter, signature
from types import FunctionType
from typing import Any

import torch.fx
import torch.nn

from fastnn import _mode

STOCK: dict[type, type] = {}  # accelerated class -> the stock class it stands for
OURS: dict[type, type] = {}  # and the other way

# ---- Methods that somebody replaced on a class --------------------------------------------------

# Of each class of both kinds: its forward, the stock class, and that one's forward, all as made.
_AS_MADE: dict[type, tuple[Any, type, Any]] = {}

# What `__call__` of a layer is where nobody else replaced it: `explain` adds its own.
CALLS: set[Callable] = {torch.nn.Module._wrapped_call_impl}
_CALL_IMPL = torch.nn.Module._call_impl


def as_torch_made(method: Any) -> Any:
    """`method`; None if it is not PyTorch's: somebody replaced it before fastnn was imported."""
    home = getattr(method, "__globals__", {}).get("__name__", "torch")
    return method if home.split(".")[0] == "torch" else None


def replaced(cls: type) -> str | None:
    """Whose method is no longer the one that the class was made with, in words; None if none is.

    `cls` is one of ours, or a stock class that one stands for.
    """
    forward, its, its_forward = _AS_MADE[cls]
    if cls.forward is not forward:  # type: ignore[attr-defined]
        return f"{cls.__name__}.forward was replaced"
    if its.forward is not its_forward:  # type: ignore[attr-defined]
        return f"torch.nn.{its.__name__}.forward was replaced"
    if cls.__call__ not in CALLS or cls._call_impl is not _CALL_IMPL:  # type: ignore[attr-defined]
        return f"{cls.__name__}.__call__ was replaced"
    return None


def watched(*layers: Any) -> str | None:
    """Who would notice that these are not called one by one, of those that look at one layer or
    one class; see `replaced` for the classes accepted."""
    for layer in layers:
        d = layer.__dict__
        if (
            d["_forward_hooks"]
            or d["_forward_pre_hooks"]
            or d["_backward_hooks"]
            or d["_backward_pre_hooks"]
        ):
            return f"a hook on {type(layer).__name__}"
        if "forward" in d or "_call_impl" in d or d.get("_compiled_call_impl") is not None:
            return f"{type(layer).__name__} has a forward of its own"
        why = replaced(type(layer))
        if why is not None:
            return why
    return None


def _front(cls: type, its: type, name: str, method: Any) -> Any:
    """`method` as the class shows it: what the stock class has under its name where that was
    replaced, unless ours was, too, and the stock method where no kernel can run.

    Written out from the signature, so that arguments bind and fail as declared.
    """
    declared, passed, defaults = [], [], {}
    for p in signature(method).parameters.values():
        assert p.kind is Parameter.POSITIONAL_OR_KEYWORD, (cls, name, p)
        declared.append(p.name if p.default is p.empty else f"{p.name}=_{p.name}")
        passed.append(p.name)
        if p.default is not p.empty:
            defaults[f"_{p.name}"] = p.default
    given = ", ".join(passed)
    lines = [
        f"def make(_mode, cls, its, made, ours, {', '.join(defaults)}):",
        f"    def {name}({', '.join(declared)}):",
        f"        if its.{name} is not made:",
        f"            if cls.{name} is {name}:",
        f"                return its.{name}({given})",
        "        elif _mode._idle:",
        f"            return made({given})",
        f"        return ours({given})",
        f"    return {name}",
    ]
    file = f"<{cls.__module__}.{cls.__name__}.{name}>"
    source = "\n".join(lines) + "\n"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    scope: dict = {}
    # TorchScript compiles the source of `method`, by the names that it finds here.
    exec(compile(source, file, "exec"), method.__globals__, scope)
    made = as_torch_made(getattr(its, name))
    front = scope["make"](_mode, cls, its, made, method, **defaults)
    return functools.update_wrapper(front, method)


# ---- The metaclass -----------------------------------------------------------------------------


class Layer(ABCMeta):
    """Metaclass of accelerated layers. `class ReLU(stock.ReLU, metaclass=Layer)` registers it.

    An ABCMeta, so that users may still mix `abc.ABC` into their subclasses.
    """

    def __new__(mcls, name, bases, namespace, **kwargs):
        ours = namespace.get("__module__", "").startswith("fastnn.layers.")
        if ours:
            namespace.setdefault("__doc__", bases[0].__doc__)
        cls: Any = super().__new__(mcls, name, bases, namespace, **kwargs)
        if ours:
            its: Any = bases[0]
            STOCK[cls], OURS[its] = its, cls
            for key, method in namespace.items():
                if isinstance(method, FunctionType) and hasattr(its, key) and key[:2] != "__":
                    setattr(cls, key, _front(cls, its, key, method))
            its_forward = as_torch_made(its.forward)
            _AS_MADE[cls] = cls.forward, its, its_forward
            _AS_MADE[its] = its_forward, its, its_forward
        return cls

    # A stock layer counts as one of ours: `isinstance(m, nn.Linear)` asks "is it a linear layer".
    def __instancecheck__(cls, instance: Any) -> bool:
        if cls in STOCK:
            return isinstance(instance, STOCK[cls])
        return super().__instancecheck__(instance)

    def __subclasscheck__(cls, subclass: type) -> bool:
        if cls in STOCK:
            return issubclass(subclass, STOCK[cls])
        return super().__subclasscheck__(subclass)


def rebound(function: Any, called: str | None = None, /, **names: Any) -> Any:
    """The code of `function`, with `names` in place of what its globals have under these names.

    So that a method of stock's calls our functions, or builds our layers, and remains stock's in
    all else, whatever the version of torch. `called`: the new function's own name, by which
    TorchScript files it.
    """
    scope = {**function.__globals__, **names}
    del scope["__name__"]  # by which Dynamo would look the names up in stock's module
    name, closure = called or function.__name__, function.__closure__
    twin = FunctionType(function.__code__, scope, name, function.__defaults__, closure)
    twin.__module__ = function.__module__
    twin.__kwdefaults__ = function.__kwdefaults__
    twin.__annotations__ = function.__annotations__
    twin.__doc__ = function.__doc__
    return twin


_fx_is_leaf = torch.fx.Tracer.is_leaf_module


def _is_leaf_module(self, m, module_qualified_name):
    # fx takes a layer for a leaf when its class lives under torch.nn. Stepped into, a Dropout would
    # have its training flag frozen into the graph.
    stock = STOCK.get(type(m))
    if stock is not None:
        return stock is not torch.nn.Sequential
    return _fx_is_leaf(self, m, module_qualified_name)


torch.fx.Tracer.is_leaf_module = _is_leaf_module  # type: ignore[method-assign]
