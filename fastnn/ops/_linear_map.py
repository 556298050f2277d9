"""What ops that are linear in their input share: gradients of any order by two launchers."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastnn._op import Function, run
from fastnn._strides import is_channels_last


class Maps(NamedTuple):
    """A map, its transpose and its linear part, as launchers: x -> y, dy -> dx, dx -> dy.

    With `once`, a second backward without `retain_graph` raises, as it does in PyTorch if something
    was saved.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], Tensor]
    linear: Callable[[Tensor], Tensor]
    once: bool = False


class LinearMap(Function):
    """x -> maps.forward(x). Differentiable as often as wanted.

    With `keep`, x is saved, as some operators of PyTorch do. These raise if x was edited, and their
    gradient depends on x: its derivative is zeros. `x` is then `beside` the gradient.
    """

    strided = ("dy",)

    @staticmethod
    def forward(ctx, x, maps, keep=False, beside=None):
        ctx.maps, ctx.saves = maps, keep or maps.once
        if keep or maps.once:
            ctx.save_for_backward(x if keep else None)
        if beside is not None:
            ctx.beside = beside.shape, beside.dtype, beside.device
        return maps.forward(x)

    @staticmethod
    def backward(ctx, dy):
        # It raises if x was edited, and in a second backward even if it is empty.
        saved = ctx.saved_tensors if ctx.saves else ()
        _, backward, linear, _ = ctx.maps
        dx = run(LinearMap, dy, Maps(backward, linear, backward), False, *saved)
        zeros = None
        if any(ctx.needs_input_grad[3:]):
            shape, dtype, device = ctx.beside
            zeros = torch.zeros(shape, dtype=dtype, device=device)
        return dx, None, None, zeros


def channels_last(x):
    """Whether ATen makes results in the layout of channels last, going by the strides of `x`."""
    return x.dim() > 3 and is_channels_last(x.shape, x.stride())
