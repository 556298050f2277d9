"""Sequential. Mirrors torch/nn/modules/container.py.

Neighbours such as `Linear, activation[, Dropout]` run as one op where nothing could tell. The rules
are in `_fusion.py`.
"""

from __future__ import annotations

from typing import Any

import torch.nn as stock
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from fastnn import _mode
from fastnn._mode import current_mode, is_quiet
from fastnn.layers._fusion import LEADERS, Node, leads, plainly, run_neighbours
from fastnn.layers._layer import Layer

__all__ = ["Sequential"]


def _one_by_one(members, input):
    for module in members:
        input = module(input)
    return input


def _in_groups(members: list, input, node: Node):
    """What the members make of `input`; neighbours of them run as one op.

    node: that of the first member. The call is not small for the op which this member leads.
    """
    if is_compiling() or plainly() or (not _mode._plain and current_mode() == "torch"):
        return _one_by_one(members, input)
    i, last = 0, len(members)
    at: Node | None = node
    large = node.leads
    op: Any = node.leads.op.op
    if not op.floor.known:  # the op that the members become may be another one
        op.find_floor()
        large = None
    while i < last:
        if at is not None and type(input) is Tensor:
            end, input = run_neighbours(at, members, i, input, large)
        else:
            end = i
        if end == i:
            input = members[i](input)
            end += 1
        i, large = end, None
        at = leads(members[i]) if i < last else None
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
                    return _in_groups([module, *members], input, node)
            input = module(input)
        return input
