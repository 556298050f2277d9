"""`torch.nn.functional`, with the registered ops in place of their namesakes."""

from typing import TYPE_CHECKING

import torch.nn.functional
from torch.nn.functional import *  # noqa: F403  (where editors and type checkers can see them)

from fastnn.ops import FUNCTIONS

globals().update(FUNCTIONS)

if not TYPE_CHECKING:  # to a checker, a module with __getattr__ has every name there could be

    def __getattr__(name):
        try:
            return getattr(torch.nn.functional, name)
        except AttributeError:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None

    def __dir__():
        return sorted({*globals(), *dir(torch.nn.functional)})
