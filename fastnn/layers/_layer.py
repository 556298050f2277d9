"""What every accelerated layer shares: who its stock class is, and passing for it.

Code asks two things of a layer's class that a subclass alone answers wrongly: whether
`isinstance(layer, nn.Linear)` when the layer was built by code that knows only `torch.nn`, and
whether torch.fx may step into it.
"""

from __future__ import annotations

from abc import ABCMeta
from types import FunctionType
from typing import Any

import torch.fx
import torch.nn

STOCK: dict[type, type] = {}  # accelerated class -> the stock class it stands for
OURS: dict[type, type] = {}  # and the other way


class Layer(ABCMeta):
    """Metaclass of accelerated layers. `class ReLU(stock.ReLU, metaclass=Layer)` registers it.

    An ABCMeta, so that users may still mix `abc.ABC` into their subclasses.
    """

    def __new__(mcls, name, bases, namespace, **kwargs):
        ours = namespace.get("__module__", "").startswith("fastnn.layers.")
        if ours:
            namespace.setdefault("__doc__", bases[0].__doc__)
        cls = super().__new__(mcls, name, bases, namespace, **kwargs)
        if ours:
            STOCK[cls], OURS[bases[0]] = bases[0], cls
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
