"""What stands in `torch.nn.functional` for our functions while a `patch` is open."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import torch

from fastnn.ops import FUNCTIONS


class Standing(functools.partial):
    """One function of fastnn, equal to the function of PyTorch in whose place it stands.

    Code that runs inside the block may keep it, most of all as the key of a table: of the functions
    that a tensor subclass overrides, or that a quantizer knows. `__torch_function__` and graphs
    name PyTorch's function, so the key has to be found by that. It pickles as PyTorch's function.
    """

    made: Any
    function: Any

    def __new__(cls, function: Any) -> Standing:
        self = super().__new__(cls, function)
        self.made, self.function = function.op.stock, function
        functools.update_wrapper(self, self.made)
        self.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        self.op = function.op  # type: ignore[attr-defined]
        return self

    def __eq__(self, other: object) -> bool:
        return other is self or other is self.made or other is self.function

    def __hash__(self) -> int:
        return hash(self.made)

    def __copy__(self) -> Standing:
        return self

    def __deepcopy__(self, memo: Any) -> Standing:
        return self

    def __reduce__(self) -> Any:
        return functools.partial, (self.made,)


_dispatched = torch._jit_internal._try_get_dispatched_fn


def _dispatched_or_standing(function: Any) -> Any:
    """What TorchScript asks of a function: which of two functions a flag decides on, if any.

    For what stands in for PyTorch's function, both are PyTorch's function, and there is no flag.
    """
    if isinstance(function, Standing):
        both = {"if_true": function.made, "if_false": function.made}
        return {**both, "index": sys.maxsize, "arg_name": "", "default": False}
    return _dispatched(function)


def tell_torchscript() -> None:
    """Let TorchScript compile PyTorch's function where a scripted function calls a `Standing`."""
    torch._jit_internal._try_get_dispatched_fn = _dispatched_or_standing


STANDING = {name: Standing(function) for name, function in FUNCTIONS.items()}
