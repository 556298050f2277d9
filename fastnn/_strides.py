"""Which tensors a kernel reads by their strides, and which are made dense for it.

A record names the arguments that its kernels read by strides (`strided`). All other tensors are
made dense before they reach the fused function. So a forgotten name costs a copy, never a wrong
result.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastnn._shards import plain_gradient
from fastnn.kernels._tl import dense, is_dense  # type: ignore[import-not-found]


def is_channels_last(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether ATen takes a tensor (N, C, *) with these strides for channels last.

    ATen looks at all strides, also in dimensions of size 1, whether the tensor is dense or not. It
    runs a tensor of three dimensions as (N, C, 1, L). A tensor of other dimensions than three, four
    or five is never channels last.
    """
    if len(shape) == 3:
        length = shape[2]
        shape = (*shape[:2], 1, length)
        strides = (*strides[:2], length * strides[2], strides[2])
    if len(shape) not in (4, 5) or strides[1] == 0:
        return False
    least = 0
    for d in (1, *range(len(shape) - 1, 1, -1), 0):  # from the innermost to the outermost
        # One channel of one position may be either layout: ATen treats it as contiguous.
        if shape[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * shape[d]
    return True


def not_strided(function: Callable, strided: tuple[str, ...], skip: int = 0):
    """(positions, names) of the parameters of `function` that must be dense.

    These are the parameters from the `skip`-th on that may be tensors and are not named in
    `strided`. Raises TypeError for a name in `strided` that is not a parameter.
    """
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    unknown = set(strided) - {p.name for p in parameters}
    if unknown:
        raise TypeError(f"{function.__qualname__}: strided={sorted(unknown)}, not its parameters")
    # A parameter whose default has one of these types is never a tensor.
    rest = [p.name not in strided and type(p.default) not in (bool, str) for p in parameters]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    at = [i for i, p in enumerate(parameters) if rest[i] and p.kind in positional]
    return tuple(at), frozenset(p.name for p, yes in zip(parameters, rest, strict=True) if yes)


def make_dense(at: tuple[int, ...], names: frozenset[str], args: tuple, kwargs: dict):
    """(args, kwargs) with dense tensors at the positions `at` and under `names`."""
    for i in at:
        value = args[i]
        if isinstance(value, Tensor) and not is_dense(value):
            args = (*args[:i], dense(value), *args[i + 1 :])
    for name, value in kwargs.items():
        if name in names and isinstance(value, Tensor) and not is_dense(value):
            kwargs = {**kwargs, name: dense(value)}
    return args, kwargs


def in_layout(t: Tensor | None, strides: tuple[int, ...] | None) -> Tensor | None:
    """`t` with these strides; a copy if it has others. `t` itself if the strides overlap."""
    if t is None or strides is None or t.stride() == strides or t.dim() != len(strides):
        return t
    if any(size > 1 and not stride for size, stride in zip(t.shape, strides, strict=True)):
        return t
    like = torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device)
    return like.copy_(t)


def with_dense_gradients(backward: Callable, at: tuple[int, ...]) -> Callable:
    """`backward(ctx, *grads)`, with plain gradients, those at the positions `at` made dense.

    If no result has a gradient, no input has one. Autograd asks so where the function behind
    returns None for all of them. A gradient may be optional: it has a default, and is not passed
    where the forward returns fewer results.
    """

    def call(ctx, *grads):
        if grads[0] is None and all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        for g in grads:
            if g is not None and type(g) is not Tensor:
                grads = tuple([g if g is None else plain_gradient(g) for g in grads])
                break
        for i in at:
            if i >= len(grads):  # optional ones come last
                break
            g = grads[i]
            if g is not None and not is_dense(g):
                grads = (*grads[:i], dense(g), *grads[i + 1 :])
        return backward(ctx, *grads)

    return call
