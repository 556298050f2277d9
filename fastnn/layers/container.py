"""Sequential. Mirrors torch/nn/modules/container.py.

Neighbours such as `Linear, activation[, Dropout]` run as one op where nothing could tell. The rules
are in `_fusion.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import length_hint
from typing import Any

import torch.nn as stock
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from fastnn import _mode
from fastnn._mode import current_mode, is_quiet
from fastnn.layers._fusion import LEADERS, RULES, Node, leads, plainly, run_neighbours
from fastnn.layers._layer import Layer

__all__ = ["Sequential"]


def _one_by_one(members, input):
    for module in members:
        input = module(input)
    return input


_REACH = max(len(rule.places) for rule in RULES if rule.neighbours)
_BY_NAME = stock.Sequential.__iter__


def _in_groups(container: stock.Sequential, module, rest: Iterator, input, node: Node):
    """What `module` and the `rest` make of `input`; neighbours among them run as one op.

    node: that of `module`. The call is not small for the op which it leads.
    """
    if is_compiling() or plainly() or (not _mode._plain and current_mode() == "torch"):
        return _one_by_one(rest, module(input))
    table: dict[str, Any] = container._modules  # type: ignore[assignment]
    names: list[str] = []
    i = 0
    if type(container).__iter__ is _BY_NAME:
        names, members = [*table], [*table.values()]
        i = len(members) - 1 - length_hint(rest)
    else:
        members = [module, *rest]
    at: Node | None = node
    large = node.leads
    op: Any = node.leads.op.op
    if not op.floor.known:  # the op that the members become may be another one
        op.find_floor()
        large = None
    while i < len(members):
        if at is not None and type(input) is Tensor:
            end, input = run_neighbours(at, members, i, input, large)
        else:
            end = i
        if end == i:
            input = members[i](input)
            end += 1
            if names:  # a member may put others in the place of those that follow
                if len(table) != len(names):
                    next(rest)  # raises, as PyTorch's loop does
                k, stop = end, min(end + _REACH, len(names))
                while k < stop and table.get(names[k]) is members[k]:
                    k += 1
                if k < stop:
                    ran = names[i]
                    names, members = [*table], [*table.values()]
                    end = names.index(ran) + 1 if ran in table else len(members)
        i, large = end, None
        at = leads(members[i]) if i < len(members) else None
    return input


class Sequential(stock.Sequential, metaclass=Layer):
    def forward(self, input):
        if is_dynamo_compiling():
            return _one_by_one(self, input)
        members = iter(self)
        quiet = None
        for module in members:
            node = LEADERS.get(type(module))
            if node is not None and type(input) is Tensor:
                small = False
                if 0 < node.floor.value:
                    if quiet is None:
                        quiet = is_quiet()
                    small = (node.leads.is_below if quiet else node.leads.small)(input, module)
                if not small and leads(module) is node:
                    return _in_groups(self, module, members, input, node)
            input = module(input)
        return input
