"""Batches of gradients: `vmap` over a backward, as `is_grads_batched=True` asks for it.

A batch looks like one tensor, and has no memory that a kernel could read. So the backward runs once
for each gradient of the batch, and its results are put together again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

_functorch = torch._C._functorch  # type: ignore[attr-defined]
_in_transforms = torch._C._are_functorch_transforms_active  # type: ignore[attr-defined]

# Whether a tensor is a batch that `torch.autograd.grad(..., is_grads_batched=True)` made. Such
# batches are older than functorch, which knows nothing of them.
is_batch: Callable[[Tensor], bool] = _functorch.is_legacy_batchedtensor


def _level(batch: Tensor) -> int:
    """The innermost level of a batch that `is_batch` finds.

    Only the thread that made the batch knows it, and a backward may run in another one.
    """
    remove = torch._remove_batch_dim  # type: ignore[attr-defined]
    level = 0
    while is_batch(batch):
        level += 1
        # To a tensor that is no batch of this level, a dimension of the given size is added.
        if [remove(batch, level, size, 0).shape[0] for size in (0, 1)] != [0, 1]:
            batch = remove(batch, level, 0, 0)
    return level


def one_by_one(backward: Callable) -> Callable:
    """`backward(ctx, *grads)`, which runs once for each gradient where a gradient is a batch."""

    def call(ctx, *grads):
        if is_compiling():  # what traces a backward knows no batches
            return backward(ctx, *grads)
        add: Callable[..., Tensor]
        remove: Callable[..., Tensor]
        outside: AbstractContextManager[Any] = nullcontext()
        if any(g is not None and is_batch(g) for g in grads):
            level = max(_level(g) for g in grads if g is not None)
            batched = lambda g: _level(g) == level  # noqa: E731
            add, remove = torch._add_batch_dim, torch._remove_batch_dim  # type: ignore
        elif not _in_transforms():
            return backward(ctx, *grads)
        else:
            from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

            level = _functorch.current_level()
            batched = lambda g: (  # noqa: E731
                _functorch.is_batchedtensor(g) and _functorch.maybe_get_level(g) == level
            )
            if not any(g is not None and batched(g) for g in grads):
                return backward(ctx, *grads)
            outside = temporarily_pop_interpreter_stack()
            add, remove = _functorch._add_batch_dim, _functorch._remove_batch_dim
        many = [g is not None and batched(g) for g in grads]
        rows = [remove(g, level, 0, 0) if m else g for g, m in zip(grads, many, strict=True)]
        with outside:
            found = _stacked(call, ctx, rows, many)
        return tuple([g if g is None else add(g, 0, level) for g in found])

    return call


def _stacked(call: Callable, ctx: Any, rows: list, many: list[bool]) -> list[Tensor | None]:
    """The results of `call` for each row of those that are `many`, along a new first dimension."""
    count = next(len(g) for g, m in zip(rows, many, strict=True) if m)
    results = []
    for i in range(count or 1):
        given = [
            g if not m else g[i] if count else g.new_zeros(g.shape[1:])
            for g, m in zip(rows, many, strict=True)
        ]
        found = call(ctx, *given)
        results.append(found if isinstance(found, tuple) else (found,))
    return [
        None if column[0] is None else torch.stack(column)[:count]
        for column in zip(*results, strict=True)
    ]
