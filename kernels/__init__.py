"""Triton kernels and their launchers: tensors in, tensors out. No autograd, no module, no fallback.

Each file is loaded on first use, so that `import fastnn` works without Triton and stays fast.
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
