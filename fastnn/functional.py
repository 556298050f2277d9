"""`torch.nn.functional`, with the registered ops in place of their namesakes."""

from typing import TYPE_CHECKING

import torch.nn.functional
from torch.nn.functional import *  # noqa: F403  (here editors and type checkers see the names)

from fastnn.ops import FUNCTIONS

globals().update(FUNCTIONS)

if not TYPE_CHECKING:  # with a module-level __getattr__, a type checker would accept any name

    def __getattr__(name):
        try:
            return getattr(torch.nn.functional, name)
        except AttributeError:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None

    def __dir__():
        return sorted({*globals(), *dir(torch.nn.functional)})
