"""Functions of a rewritten graph that compute what PyTorch does, with gradients in fewer passes.

They have no kernel of their own, so they are no ops. Their backward calls PyTorch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as stock
from torch import Tensor
from torch.autograd import forward_ad

import fastnn.functional as F
from fastnn import _gate, _mode, _native, _op
from fastnn._batches import one_by_one


def _wins(x: Tensor, followed: Tensor | None = None) -> bool:
    """Whether a call is worth an autograd function of its own: as the size gate would say.

    followed: the tensor whose gradient takes fewer passes, if it is not x.
    """
    mode = _mode.current_mode()
    if mode == "torch" or not torch.is_grad_enabled():
        return False
    if not (x if followed is None else followed).requires_grad:
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if mode == "triton":
        return x.numel() > 0
    return x.device.type in _op.kernel_devices and x.numel() >= _gate.LEAST_OF_ESTIMATES


def _own(y: Tensor) -> Tensor:
    """The result of an operator, as a tensor that is no view of what the operator made.

    Autograd lets nobody write into a view that is one of several results of a function.
    """
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


class _Linears(torch.autograd.Function):
    """x, weights, biases -> a product with each weight. One gradient of x comes of all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, *parameters: Any) -> Any:
        weights, biases = parameters[:count], parameters[count:]
        ctx.save_for_backward(x, *weights)
        ctx.set_materialize_grads(False)
        return tuple(_own(stock.linear(x, w, b)) for w, b in zip(weights, biases, strict=True))

    @staticmethod
    @one_by_one
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, *weights = ctx.saved_tensors
        count = len(weights)
        needs = ctx.needs_input_grad
        rows = x.reshape(-1, x.shape[-1])
        dx: Any = None
        found: list[Any] = [None] * (2 * count)
        for i in reversed(range(count)):  # the order in which autograd adds them up
            if gradients[i] is None:
                continue
            dy = gradients[i].reshape(-1, gradients[i].shape[-1])
            if needs[0]:
                if dx is None:
                    dx = dy.mm(weights[i])
                elif torch.is_grad_enabled():
                    dx = dx.addmm(dy, weights[i])
                else:
                    dx.addmm_(dy, weights[i])
            if needs[2 + i]:
                found[i] = dy.t().mm(rows)
            if needs[2 + count + i]:
                found[count + i] = dy.sum(0)
        return None if dx is None else dx.view(x.shape), None, *found


def linears(x: Tensor, *parameters: Any) -> tuple[Tensor, ...]:
    """`linear(x, weight, bias)` for each of the weights, which come first, and of the biases.

    In the backward, each product adds to the gradient of x what PyTorch adds in a pass of its own.
    """
    count = len(parameters) // 2
    if _wins(x):
        return _Linears.apply(x, count, *parameters)
    return tuple(
        stock.linear(x, w, b) for w, b in zip(parameters[:count], parameters[count:], strict=True)
    )


def linear_apart(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor | None]:
    """(`linear(x, weight, bias)`, the bias if an op after it is to give it its gradient, or None).

    In the first case the product itself gives the bias no gradient.
    """
    if _wins(x, bias):
        return F.linear(x, weight, bias.detach()), bias
    return F.linear(x, weight, bias), None


def linear_of_pytorch_apart(
    x: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor | None]:
    """`linear_apart` where PyTorch computes `linear` at every size."""
    linear = (_native.module() or stock).linear
    if _wins(x, bias):
        return linear(x, weight, bias.detach()), bias
    return linear(x, weight, bias), None


class _Mean(torch.autograd.Function):
    """x -> its mean over some dimensions. The gradient of x is a view of one number per mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...], keepdim: bool) -> Any:
        ctx.rest = x.shape, dims, keepdim
        return x.mean(dims, keepdim)

    @staticmethod
    @one_by_one
    def backward(ctx: Any, dy: Tensor) -> Any:
        shape, dims, keepdim = ctx.rest
        dx = dy / math.prod(shape[d] for d in dims)
        if not keepdim:
            for d in sorted(dims):
                dx = dx.unsqueeze(d)
        return dx.expand(shape), None, None


def mean(x: Tensor, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    """`x.mean(dims, keepdim)`, of a tensor whose gradient has another term.

    PyTorch writes a gradient of the size of x, and reads it again to add it to the other term.
    Here the sum reads one number for each mean. The bits are the same.
    """
    if _wins(x):
        return _Mean.apply(x, dims, keepdim)
    return x.mean(dims, keepdim)


# From this size of a table on, its passes take longer than the launches that replace them.
LEAST_OF_TABLES = 2**23
_ROWS_FOR_EACH = 4  # rows of the table, at the least, for each row that is looked up


class _Table(torch.autograd.Function):
    """table (V, D), indices -> rows, and the table once more, for users that make its gradient.

    That gradient is new memory (`give_tables`). The backward adds the gradients of the rows there.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, indices: Tensor, padding: int) -> Any:
        ctx.save_for_backward(indices)
        ctx.rest = table.shape[0], padding
        ctx.set_materialize_grads(False)
        return stock.embedding(indices, table), table.detach()

    @staticmethod
    def backward(ctx: Any, dy: Any, more: Any) -> Any:
        (indices,) = ctx.saved_tensors
        count, padding = ctx.rest
        sums = torch.ops.aten.embedding_dense_backward
        if dy is None:
            return more, None, None
        if more is None or torch.is_grad_enabled():
            rows = sums(dy, indices, count, padding, False)
            return rows if more is None else more + rows, None, None
        at, n = indices.reshape(-1).long(), indices.numel()
        # For each row of the table that is looked up, one of the places where that happens.
        place = at.new_empty(count).scatter_(0, at, torch.arange(n, device=at.device))
        if padding >= 0:
            place[padding].fill_(n)
        rows = sums(dy, place[indices.long()], n + 1, n, False)
        # The other places of that row have zeros. So each row takes its sum, rounded, once.
        return more.index_add_(0, at, rows[:n]), None, None


def embedding_and_table(
    indices: Tensor, table: Tensor, padding: int | None
) -> tuple[Tensor, Tensor]:
    """(`embedding(indices, table, padding)`, the table for those who use it later).

    PyTorch makes a gradient of the size of the table of the few rows that are looked up, and adds
    it to the other gradient. Here only these rows are added to. The bits are the same.
    """
    V = table.shape[0]
    large = _mode.current_mode() == "triton" or table.numel() >= LEAST_OF_TABLES
    plain = type(table) in (Tensor, torch.nn.Parameter) and table.layout is torch.strided
    if plain and large and 0 < indices.numel() * _ROWS_FOR_EACH <= V and _wins(table):
        return _Table.apply(table, indices, -1 if padding is None else padding % V)
    return F.embedding(indices, table, padding), table


def count_up(*counters: Tensor) -> None:
    """`counter += 1` of each counter of batches, by one kernel."""
    torch._foreach_add_(counters, 1)
