"""Whether an op takes the call that a rule wants to put into a graph. The op itself is asked.

So no rule repeats the questions of its op. Where the op declines, the separate calls stay, and each
of them takes its own path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch.fx import Node
from torch.utils._pytree import tree_map

from fastnn import _op
from fastnn._compiler._calls import value
from fastnn._compiler._site import Rewrite, nodes_in


class _Unknown(Exception):
    """A size depends on values, or a tensor is none that a kernel could take."""


def _hint(n: Any) -> Any:
    """The number for which a symbol stands in this call. No guard comes of the question."""
    if isinstance(n, (SymInt, SymFloat, SymBool)):
        hint = n.node.hint
        if hint is None:
            raise _Unknown
        return hint
    return n


def _stand_in(argument: Any) -> Any:
    """For a node, a tensor of the meta device that is like its result, or its number."""
    if not isinstance(argument, Node):
        return argument
    v = value(argument)
    if not isinstance(v, Tensor):
        return _hint(v)
    if v.layout is not torch.strided:
        raise _Unknown
    size, stride = (tuple(map(_hint, ns)) for ns in (v.shape, v.stride()))
    t = torch.empty_strided(size, stride, dtype=v.dtype, device="meta")
    return t.requires_grad_(v.requires_grad)


def declines(record: Any, rewrite: Rewrite, autocast: bool) -> bool:
    """Whether the op of `record` declines the call that `rewrite` describes.

    autocast: whether it may be on. Then the op declines if it does so with it and without it.
    """
    tensors = [
        v for v in map(value, nodes_in((rewrite.args, rewrite.kwargs))) if isinstance(v, Tensor)
    ]
    devices = {t.device for t in tensors}
    if len(devices) != 1:
        return len(devices) > 1
    device = devices.pop()
    casts = (False, True) if autocast else (False,)
    if device.type == "meta":  # where a model is only counted
        if autocast:
            return False
        device = torch.device("cuda")
    try:
        args = [tree_map(_stand_in, a) for a in rewrite.args]
        kwargs = {name: tree_map(_stand_in, a) for name, a in rewrite.kwargs.items()}
        for view in rewrite.views:
            for i in range(rewrite.viewed):
                viewed = _stand_in(view).to(args[i].dtype).detach()
                args[i] = viewed.requires_grad_(args[i].requires_grad)
    except _Unknown:
        return False
    for i in rewrite.transposed:
        args[i] = args[i].t()
    return all(_op.refusal(record, device, tuple(args), kwargs, cast) is not None for cast in casts)
