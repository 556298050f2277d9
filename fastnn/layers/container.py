"""Sequential. Mirrors torch/nn/modules/container.py.

Neighbours such as `Linear, activation[, Dropout]` run as one op where nothing could tell. The rules
are in `_fusion.py`.
"""

from __future__ import annotations

import torch
import torch.nn as stock
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastnn import _mode
from fastnn._mode import current_mode
from fastnn.layers._fusion import grouped, leads, plainly, run_neighbours
from fastnn.layers._layer import Layer

__all__ = ["Sequential"]


def _one_by_one(members, input):
    for module in members:
        input = module(input)
    return input


def _in_groups(members, i, input, rule):
    """What the members from the i-th on make of `input`; groups of them run as one op.

    rule: that which the i-th member leads, and for which the call is not small.
    """
    groups = grouped(members)
    first = i
    if (
        groups is None
        or torch.compiler.is_compiling()
        or plainly()
        or (not _mode._plain and current_mode() == "torch")
    ):
        return _one_by_one(members[i:], input)
    last = len(members)
    while i < last:
        group = groups[i]
        if group is not None and type(input) is Tensor:
            large = i == first and group.rule is rule
            end, input = run_neighbours(group, members, i, input, large)
            if end > i:
                i = end
                continue
        input = members[i](input)
        i += 1
    return input


class Sequential(stock.Sequential, metaclass=Layer):
    def forward(self, input):
        if is_dynamo_compiling():
            return _one_by_one(self, input)
        members = [*self]
        for i, module in enumerate(members):
            rule = leads(module)
            if rule is not None and type(input) is Tensor and not rule.small(input, module):
                return _in_groups(members, i, input, rule)
            input = module(input)
        return input
