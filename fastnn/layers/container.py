"""Sequential. Mirrors torch/nn/modules/container.py.

Neighbours `Linear, activation[, Dropout]`, `BatchNorm, activation` and `GroupNorm, activation` run
as one op where nothing could tell: the members are exactly our classes, nobody hooked into them,
and nobody traces the calls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as stock
from torch import Tensor
from torch.nn.modules import module as _module

from fastnn import _mode
from fastnn._mode import current_mode, idle
from fastnn.layers import activation as acts
from fastnn.layers import batchnorm
from fastnn.layers._layer import Layer, watched
from fastnn.layers.dropout import Dropout
from fastnn.layers.linear import Linear
from fastnn.layers.normalization import GroupNorm
from fastnn.ops import REGISTRY
from fastnn.ops.channel_norm import batch_norm_act, group_norm_act
from fastnn.ops.linear import linear_act

__all__ = ["Sequential"]

# Who fuses with the activation that follows, and by which function.
_LEADS: dict[type, str] = {
    Linear: "linear_act",
    batchnorm.BatchNorm1d: "batch_norm_act",
    batchnorm.BatchNorm2d: "batch_norm_act",
    batchnorm.BatchNorm3d: "batch_norm_act",
    GroupNorm: "group_norm_act",
}

# What these are told for an activation: its name there, a and b; None if it does not fuse.
_Told = tuple[str, float, float]
_GELU: dict[str, _Told] = {"none": ("gelu", 0.0, 0.0), "tanh": ("gelu_tanh", 0.0, 0.0)}
_FUSES: dict[type, Callable[..., _Told | None]] = {
    acts.ReLU: lambda m: ("relu", 0.0, 0.0),
    acts.ReLU6: lambda m: _clamp(m),
    acts.Hardtanh: lambda m: _clamp(m),
    acts.LeakyReLU: lambda m: _sloped("leaky_relu", m.negative_slope, 0.0, m.inplace),
    acts.ELU: lambda m: _sloped("elu", m.alpha, 1.0, m.inplace),
    acts.SELU: lambda m: ("selu", 0.0, 0.0),
    acts.GELU: lambda m: _GELU.get(m.approximate),
    acts.SiLU: lambda m: ("silu", 0.0, 0.0),
    acts.Mish: lambda m: ("mish", 0.0, 0.0),
    acts.Sigmoid: lambda m: ("sigmoid", 0.0, 0.0),
    acts.Tanh: lambda m: ("tanh", 0.0, 0.0),
    acts.Hardsigmoid: lambda m: ("hardsigmoid", 0.0, 0.0),
    acts.Hardswish: lambda m: ("hardswish", 0.0, 0.0),
}


def _clamp(m) -> _Told | None:
    low, high = m.min_val, m.max_val
    numbers = type(low) in (int, float) and type(high) in (int, float)
    return ("hardtanh", float(low), float(high)) if numbers and low <= high else None


def _sloped(name: str, a, b: float, inplace: bool) -> _Told | None:
    # In place, stock's backward refuses a negative slope.
    return (name, float(a), b) if type(a) in (int, float) and not (inplace and a < 0) else None


def _plainly() -> bool:
    """Whether the members must be called one by one: no kernel can run, or somebody looks on."""
    return bool(
        idle()
        or torch.compiler.is_compiling()
        or _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
        or torch._C._get_tracing_state()
        or torch._C._are_functorch_transforms_active()
    )


def _forward(sequential, input):
    if _plainly():
        for module in sequential:
            input = module(input)
        return input
    members = list(sequential)
    last = len(members) - 1
    i = 0
    while i <= last:
        module = members[i]
        if type(module) in _LEADS and i < last:
            fuses = _FUSES.get(type(members[i + 1]))
            if fuses is not None and type(input) is Tensor:
                end, input = _run_neighbours(members, i, fuses, input)
                if end > i:
                    i = end
                    continue
        input = module(input)
        i += 1
    return input


class Sequential(stock.Sequential, metaclass=Layer):
    def forward(self, input):
        if torch.jit.is_scripting():  # TorchScript compiles this branch alone
            for module in self:
                input = module(input)
        else:
            input = _forward(self, input)
        return input


def _run_neighbours(members, i: int, fuses, input):
    """(index after the members that ran, their result); (i, input) if none did."""
    lead, activation = members[i], members[i + 1]
    told = fuses(activation)
    if told is None or current_mode() == "torch":
        return i, input
    name = _LEADS[type(lead)]
    why = watched(lead, activation)
    if why is not None:
        _mode.note(REGISTRY[name], f"not fused: {why}")
        return i, input
    end = i + 2
    if name == "batch_norm_act":
        return end, batch_norm_act(*lead._arguments(input), *told)
    if name == "group_norm_act":
        return end, group_norm_act(
            input, lead.num_groups, lead.weight, lead.bias, lead.eps, *told
        )  # fmt: skip
    p, training = 0.0, False
    if end < len(members) and type(members[end]) is Dropout:
        dropout = members[end]
        # In place, stock draws its mask in another way.
        if not (dropout.inplace and dropout.training) and watched(dropout) is None:
            p, training = dropout.p, dropout.training
            end += 1
    return end, linear_act(input, lead.weight, lead.bias, *told, p, training)
