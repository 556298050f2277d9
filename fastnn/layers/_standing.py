"""What stands in `torch.nn.functional` for our functions while a `patch` is open."""

from __future__ import annotations

import functools
import inspect
from typing import Any

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


STANDING = {name: Standing(function) for name, function in FUNCTIONS.items()}
