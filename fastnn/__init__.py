"""Drop-in `torch.nn`: `import fastnn as nn`."""

import importlib
import sys
from typing import TYPE_CHECKING

import torch.nn
from torch.nn import *  # noqa: F403  (every stock name, where editors and type checkers see it)

import fastnn._checkout as _checkout  # noqa: F401  (first: it refuses kernels from elsewhere)
import fastnn.functional as functional  # type: ignore[no-redef]  # replaces PyTorch's module
from fastnn import _namespace
from fastnn._compiler import compile as compile
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

if not TYPE_CHECKING:  # with a module-level __getattr__, a type checker would accept any name
    # On a reload, the import above reads this attribute, which the star import has just set to
    # torch.nn.functional.
    functional = sys.modules["fastnn.functional"]

    def __getattr__(name):
        # `from fastnn import *` gives only the names of torch.nn. So code that has a `patch` or a
        # `convert` of its own keeps it.
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
