"""Triton kernels and their launchers: tensors in, tensors out. No autograd, no module, no fallback.

Each file is loaded when first used, so that `import fastnn` works, and stays quick, without Triton.
"""

import importlib


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    qualified = f"{__name__}.{name}"
    try:
        return importlib.import_module(qualified)
    except ModuleNotFoundError as e:
        if e.name != qualified:
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
