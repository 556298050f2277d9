"""`torch.compile(model, backend="fastnn")`: fused ops for models that spell their formulas out.

`_calls` reads nodes, `_site` asks whether nodes may become one call, `_rules` is the table of what
becomes which op, and `_backend` applies it. None of them is imported before a graph is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def compile(model: Callable, **options: Any) -> Callable:
    """`torch.compile(model, backend="fastnn", **options)`: fused ops for calls that stand apart.

    PyTorch captures the calls of `model`, a Module or a function. Where several calls make up one
    op of fastnn, the op takes their place: dropout, addition and norm; batch norm, addition and
    ReLU; an RMS norm, GELU or SiLU that is written out; and others (docs/compile.md). Each op
    decides at each call whether a kernel or PyTorch runs it. `model` may have stock layers, layers
    of fastnn, or both. It does not change.

    `options` are those of `torch.compile`: `fullgraph`, `dynamic`, `disable`. Returns what
    `torch.compile` returns. Raises TypeError for the options `mode` and `options`, when the first
    graph is compiled; they are Inductor's.
    """
    from fastnn._compiler._backend import backend

    return torch.compile(model, backend=backend, **options)
