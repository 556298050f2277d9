"""Drop-in `torch.nn`: `import fastnn as nn`."""

import importlib
import sys
from typing import TYPE_CHECKING

import torch.nn
from torch.nn import *  # noqa: F403  (every stock name, where editors and type checkers see it)

import fastnn._checkout as _checkout  # noqa: F401  (first: it refuses kernels from elsewhere)
import fastnn.functional as functional  # type: ignore[no-redef]  # the star had stock's
from fastnn import _namespace
from fastnn._mode import BackendError as BackendError
from fastnn._mode import backend as backend
from fastnn._mode import decisions as decisions
from fastnn._model import convert as convert
from fastnn._model import explain as explain
from fastnn._model import patch as patch
from fastnn._model import revert as revert
from fastnn._model import warmup as warmup
from fastnn.layers import *  # noqa: F403  (the accelerated layers replace the stock ones)

__version__ = "0.1.0"

_namespace.install()

if not TYPE_CHECKING:  # to a checker, a module with __getattr__ has every name there could be
    # On a reload the import above reads this attribute, which the star has just made stock's.
    functional = sys.modules["fastnn.functional"]

    def __getattr__(name):
        # Star-import takes stock's names alone: code that had a `patch` or a `convert` keeps it.
        if name == "__all__":
            return _namespace.public()
        if not name.startswith("__"):
            if name in _namespace.OWN:
                return importlib.import_module(f"{__name__}.{name}")
            try:
                return getattr(torch.nn, name)
            except AttributeError:
                pass
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__]
        )

    def __dir__():
        return sorted({*globals(), *dir(torch.nn)})
