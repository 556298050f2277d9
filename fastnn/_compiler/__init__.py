"""`torch.compile(model, backend="fastnn")`: fused ops for models that spell their formulas out.

`_calls` reads nodes, `_site` asks whether nodes may become one call, `_rules` is the table of what
becomes which op, and `_backend` applies it. None of them is imported before a graph is compiled.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch

# What to do if PyTorch cannot take a model: what its error says, and our advice. The same advice
# stands in docs/compile.md.
HINTS = (
    (r"\b(RNN|LSTM|GRU)\b", "set torch._dynamo.config.allow_rnn = True before compiling"),
    (r"[Dd]ata-dependent", "write the condition with torch.where, or decide it before the model"),
    (
        r"[Ll]ogg|\bprint\b",
        "take the message out of `forward`, or change the setting that it asks for",
    ),
    (r"\bhooks?\b|graph_break", "take the call out, or compile the parts on both sides of it"),
)
WITHOUT = (
    "Without fullgraph=True the model runs in several graphs, and no rule holds across two. "
    'TORCH_LOGS="graph_breaks" shows where they end; docs/compile.md of fastnn says what to do.'
)


def _hint(error: Exception) -> str:
    """What to do about an error of Dynamo."""
    told = str(error).partition("from user code")[0]  # then come lines of the model
    advice = next((hint for pattern, hint in HINTS if re.search(pattern, told)), None)
    return f"fastnn: {advice}. {WITHOUT}" if advice else f"fastnn: {WITHOUT}"


def _with_hint(call: Callable) -> Callable:
    """`call`; an error of Dynamo about what it cannot capture gets a note of ours."""

    @functools.wraps(call)
    def hinted(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError) as error:
            if hasattr(error, "add_note"):  # from Python 3.11 on
                error.add_note(_hint(error))
            raise

    return hinted


def compile(model: Callable, **options: Any) -> Callable:
    """`torch.compile(model, backend="fastnn", **options)`: fused ops for calls that stand apart.

    PyTorch captures the calls of `model`, a Module or a function. Where several calls make up one
    op of fastnn, the op takes their place: dropout, addition and norm; batch norm, addition and
    ReLU; an RMS norm, GELU or SiLU that is written out; and others (docs/compile.md). Each op
    decides at each call whether a kernel or PyTorch runs it. `model` may have stock layers, layers
    of fastnn, or both. It does not change.

    `options` are those of `torch.compile`: `fullgraph`, `dynamic`, `disable`, and `options`, of
    which there is one: with `options={"replay": True}` graphs of fixed sizes are recorded and then
    replayed with less of the host's time (docs/compile.md). It is new, and no GPU has run it.
    Returns what `torch.compile` returns. Raises TypeError for `mode` and for Inductor's options,
    when the first graph is compiled. With `fullgraph=True`, PyTorch raises its own error for a
    model that it cannot capture. From Python 3.11 on, the error has a note that says what to do.
    """
    from fastnn._compiler._backend import backend

    compiled = torch.compile(model, backend=backend, **options)
    if not options.get("fullgraph") or options.get("disable"):
        return compiled
    if isinstance(compiled, torch.nn.Module):
        compiled.forward = _with_hint(compiled.forward)
        return compiled
    return _with_hint(compiled)
