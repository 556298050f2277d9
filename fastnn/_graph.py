"""Launchers as graph operators, which `torch.compile` and `torch.export` can put in a graph."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch


def launcher(file: str, function: str, schema: str, fake: Callable) -> Callable:
    """`fastnn.kernels.<file>.<function>`, callable in eager mode and inside a compiled graph.

    `schema` is the function's signature in the language of `torch.library`. `fake` returns tensors
    of the right shapes, dtypes and strides without launching. Eager calls go to the launcher
    itself; a graph holds the opaque operator `fastnn::<file>_<function>`.
    """
    from fastnn import kernels

    name = f"fastnn::{file}_{function}"

    def launch(*args):
        return getattr(getattr(kernels, file), function)(*args)

    torch.library.define(name, schema)
    torch.library.impl(name, ("CUDA", "CPU"))(launch)
    torch.library.register_fake(name)(fake)
    opaque = getattr(torch.ops.fastnn, f"{file}_{function}").default

    def call(*args):
        if torch.compiler.is_compiling():
            return opaque(*args)
        return launch(*args)

    return call


def traced_for_fastnn() -> bool:
    """Whether Dynamo traces for our backend. It must then see PyTorch's functions."""
    home = sys.modules.get("fastnn._compiler._backend")
    if home is None:
        return False
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        given = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:  # nothing is traced, or Dynamo is organised in another way
        return False
    while given is not None and given is not home.backend:
        wrapped = getattr(given, "__wrapped__", None)  # Dynamo's wrapper for debugging
        given = getattr(given, "compiler_fn", None) if wrapped is None else wrapped
    return given is not None


# Dynamo runs it while tracing. Each backend has graphs of its own, so the answer holds for a graph.
traced_for_fastnn._dynamo_marked_constant = True  # type: ignore[attr-defined]
