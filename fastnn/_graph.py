"""Launchers as graph operators, which `torch.compile` and `torch.export` can put in a graph."""

from __future__ import annotations

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
