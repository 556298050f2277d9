"""What every accelerated layer shares: its stock class, and behaving like that class.

A plain subclass gives a wrong answer to two questions: whether `isinstance(layer, nn.Linear)` holds
when code that knows only `torch.nn` built the layer, and whether torch.fx may step into the layer.
Also, tools replace methods on a class, most of all `torch.nn.Linear.forward`. A subclass with a
method of its own would hide the replacement.
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

from fastnn import _front as _front_of_op
from fastnn import _mode

STOCK: dict[type, type] = {}  # accelerated class -> the stock class it stands for
OURS: dict[type, type] = {}  # stock class -> accelerated class

# ---- Methods that somebody replaced on a class --------------------------------------------------

# For each accelerated and each stock class: its original forward, the stock class, and the stock
# class's original forward.
_AS_MADE: dict[type, tuple[Any, type, Any]] = {}

# The values of a layer class's `__call__` that count as original. `explain` adds its own.
CALLS: set[Callable] = {torch.nn.Module._wrapped_call_impl}
_CALL_IMPL = torch.nn.Module._call_impl


def as_torch_made(method: Any) -> Any:
    """`method`, or None if it is not PyTorch's, because it was replaced before fastnn's import."""
    home = getattr(method, "__globals__", {}).get("__name__", "torch")
    return method if home.split(".")[0] == "torch" else None


def replaced(cls: type) -> str | None:
    """Which method of the class is no longer the original one, in words; None if all are.

    `cls` is an accelerated class, or a stock class that has an accelerated twin.
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
    """What would notice that these layers are not called one by one, in words; None if nothing.

    It looks at everything that is attached to one layer or to its class. `replaced` says which
    classes are accepted.
    """
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


def _front(cls: type, its: type, name: str, method: Any, op: Any, eager: Any) -> Any:
    """The function that the class gets under `name`, in place of `method`.

    It calls the stock class's method if that one was replaced and ours was not. It calls PyTorch's
    method if no kernel can run, or if the call is below the floor of `op`, the record of the op
    that `method` runs (None: of several, or of none). Else it calls `eager`, which does what
    `method` does outside TorchScript, or `method` if there is none. It is generated as source code
    from the signature, so that arguments bind and fail as declared.
    """
    declared: list[str] = []
    passed: list[str] = []
    defaults: dict[str, Any] = dict(_front_of_op.BELOW)
    for p in signature(method).parameters.values():
        assert p.kind is Parameter.POSITIONAL_OR_KEYWORD, (cls, name, p)
        declared.append(p.name if p.default is p.empty else f"{p.name}=_{p.name}")
        passed.append(p.name)
        if p.default is not p.empty:
            defaults[f"_{p.name}"] = p.default
    given = ", ".join(passed)
    small = []
    if op is not None:
        asked = _front_of_op.below(op, passed[1], "_mode.")
        assert {*asked.tensors, *asked.others} <= {*passed}, (cls, asked)
        small = [
            f"        elif _mode._plain and {asked.ready}:",
            "            try:",
            f"                _is_small = {asked.size} < _the_floor",
            "            except Exception:",
            "                _is_small = False",
            "            if _is_small:",
            f"                return made({given})",
        ]
    lines = [
        f"def make(_mode, cls, its, made, ours, {', '.join(defaults)}):",
        "    _the_floor = -1",
        f"    def {name}({', '.join(declared)}):",
        f"        if its.{name} is not made:",
        f"            if cls.{name} is {name}:",
        f"                return its.{name}({given})",
        "        elif _mode._idle:",
        f"            return made({given})",
        *small,
        f"        return ours({given})",
        "    def set_floor(least):",
        "        nonlocal _the_floor",
        "        _the_floor = least",
        f"    return {name}, set_floor",
    ]
    file = f"<{cls.__module__}.{cls.__name__}.{name}>"
    source = "\n".join(lines) + "\n"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    scope: dict = {}
    # TorchScript compiles the source of `method`, and looks up its names in these globals.
    exec(compile(source, file, "exec"), method.__globals__, scope)
    made = as_torch_made(getattr(its, name))
    front, set_floor = scope["make"](_mode, cls, its, made, eager or method, **defaults)
    if op is not None:
        op.floor.follow(set_floor)
    return functools.update_wrapper(front, method)


# ---- The metaclass -----------------------------------------------------------------------------


class Layer(ABCMeta):
    """Metaclass of accelerated layers. `class ReLU(stock.ReLU, metaclass=Layer)` registers one.

    `op=F.relu` names the function that `forward` calls with its first argument first, if it calls
    no other. Calls that are too small for its kernels then go to PyTorch's `forward` at once.
    `eager=function` names a function that does what `forward` does outside TorchScript.

    It derives from ABCMeta, so that users can still mix `abc.ABC` into their subclasses.
    """

    def __new__(mcls, name, bases, namespace, op=None, eager=None, **kwargs):
        ours = namespace.get("__module__", "").startswith("fastnn.layers.")
        if ours:
            namespace.setdefault("__doc__", bases[0].__doc__)
        cls: Any = super().__new__(mcls, name, bases, namespace, **kwargs)
        if ours:
            its: Any = bases[0]
            STOCK[cls], OURS[its] = its, cls
            for key, method in namespace.items():
                if isinstance(method, FunctionType) and hasattr(its, key) and key[:2] != "__":
                    given = (None, None)
                    if key == "forward":
                        given = None if op is None else op.op, eager
                    setattr(cls, key, _front(cls, its, key, method, *given))
            its_forward = as_torch_made(its.forward)
            _AS_MADE[cls] = cls.forward, its, its_forward
            _AS_MADE[its] = its_forward, its, its_forward
        return cls

    # A stock layer counts as an instance of the accelerated class: `isinstance(m, nn.Linear)` asks
    # whether m is a linear layer.
    def __instancecheck__(cls, instance: Any) -> bool:
        if cls in STOCK:
            return isinstance(instance, STOCK[cls])
        return super().__instancecheck__(instance)

    def __subclasscheck__(cls, subclass: type) -> bool:
        if cls in STOCK:
            return issubclass(subclass, STOCK[cls])
        return super().__subclasscheck__(subclass)


def rebound(function: Any, called: str | None = None, /, **names: Any) -> Any:
    """A function with the code of `function`, whose globals have `names` in place of their own.

    With it, a PyTorch method calls our functions or builds our layers, and stays PyTorch's in all
    else, in every version of PyTorch. `called` is the name of the new function; TorchScript
    identifies it by this name.
    """
    scope = {**function.__globals__, **names}
    del scope["__name__"]  # With this entry, Dynamo would look the names up in PyTorch's module.
    name, closure = called or function.__name__, function.__closure__
    twin = FunctionType(function.__code__, scope, name, function.__defaults__, closure)
    twin.__module__ = function.__module__
    twin.__kwdefaults__ = function.__kwdefaults__
    twin.__annotations__ = function.__annotations__
    twin.__doc__ = function.__doc__
    return twin


_fx_is_leaf = torch.fx.Tracer.is_leaf_module


def _is_leaf_module(self, m, module_qualified_name):
    # fx treats a layer as a leaf if its class is defined under torch.nn. If fx stepped into a
    # Dropout, it would freeze the training flag into the graph.
    stock = STOCK.get(type(m))
    if stock is not None:
        return stock is not torch.nn.Sequential
    return _fx_is_leaf(self, m, module_qualified_name)


torch.fx.Tracer.is_leaf_module = _is_leaf_module  # type: ignore[method-assign]
