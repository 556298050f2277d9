"""A compiled graph in `auto`: what is too small for a kernel is PyTorch's own call.

An op decides at each call, which costs the host about a microsecond. The sizes in a graph are
known, so a call below the floor of its op is decided once, for as long as the floors stay the same.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as stock
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node

from fastnn import _front, _gate, _mode, _native
from fastnn._compiler import _gradients
from fastnn._compiler._calls import call, value
from fastnn._compiler._planned import Known, Planned, known_of
from fastnn._compiler._sums import mean_alone, norm_alone, sum_alone
from fastnn.ops import REGISTRY
from fastnn.ops.linear import stock_activation


def calls_of_ours(gm: GraphModule) -> list[tuple[Node, Any]]:
    """The nodes that call ops of ours, each with the record of its op."""
    found = []
    for node in gm.graph.nodes:
        record = getattr(node.target, "op", None) if node.op == "call_function" else None
        if record is not None and hasattr(record, "floor"):
            found.append((node, record))
    return found


def floor_of(record: Any) -> float:
    """The floor of an op; -1 if it is unknown or held, and 0 where PyTorch may raise an error."""
    if _mode.idle():
        return math.inf
    if record.alerts is not None and _gate.only_deterministic():
        return 0
    record.find_floor()
    return record.floor.value


def _is_small(node: Node, record: Any, floor: float) -> bool:
    """Whether every call of `node` is below `floor`. With tensors of other classes, none is."""
    known = [value(n) for n in node.all_input_nodes]
    tensors = [v for v in known if isinstance(v, torch.Tensor)]
    if not tensors or not all(isinstance(t, FakeTensor) for t in tensors):
        return False
    if floor <= 0 or floor == math.inf:
        return floor > 0
    names = inspect.signature(node.target).bind(  # type: ignore[arg-type]
        *torch.fx.map_arg(node.args, value), **torch.fx.map_arg(node.kwargs, value)
    )
    names.apply_defaults()
    asked = _front.below(record, record.names[0])
    size = asked.size_of(names.arguments)
    return type(size) is int and size < floor


def lean(gm: GraphModule, floors: list[float], floor_of_linear: float = -1) -> GraphModule:
    """A copy of `gm` in which PyTorch runs the small calls.

    `floors` are those of its ops, in order. With the C++ runner, PyTorch's `linear` has one node of
    autograd there instead of four.
    """
    new = GraphModule(gm, copy.deepcopy(gm.graph))
    for (node, record), floor in zip(calls_of_ours(new), floors, strict=True):
        if _is_small(node, record, floor):
            sum_alone(new.graph, node)
            mean_alone(new.graph, node)
            if record.name == "linear_act":
                _take_apart(new.graph, node, record)
            else:
                node.target = record.stock
                norm_alone(new.graph, node)
    native = _native.module()
    if native is not None:
        for node in new.graph.find_nodes(op="call_function", target=stock.linear):
            known = call(node)
            if known is not None:
                node.args, node.kwargs = tuple(known.arguments.values()), {}
                node.target = native.linear
    if floor_of_linear == math.inf:
        for node in new.graph.find_nodes(op="call_function", target=_gradients.linear_apart):
            node.target = _gradients.linear_of_pytorch_apart
    new.graph.lint()
    new.recompile()
    return new


def _take_apart(graph: Graph, node: Node, record: Any) -> None:
    """Make PyTorch's calls of a `linear_act` again."""
    node.target, public = record.stock, node.target
    bound = inspect.signature(public).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    bound.apply_defaults()
    x, weight, bias, activation, a, b, p, training = bound.arguments.values()
    if p == 0 and not training:
        with graph.inserting_before(node):
            product = graph.call_function(stock.linear, (x, weight, bias))
        product.meta = dict(node.meta)
        node.target = stock_activation(activation)
        node.args, node.kwargs = (product, a, b), {}


def _plans(ours: list, known: Known | None) -> Callable[[Callable], Callable]:
    """What gives a form of a graph its plan."""
    if known is None:
        return lambda forward: forward
    records = [*ours, REGISTRY["scaled_dot_product_attention"]]
    return lambda forward: Planned(forward, records, known)


def gated(gm: GraphModule, replay: bool) -> Callable:
    """What runs `gm`: in `auto`, its lean form; where a mode is set or somebody listens, `gm`."""
    ours = [record for _, record in calls_of_ours(gm)]
    planned = _plans(ours, known_of(gm) if replay else None)
    full = planned(gm.forward)
    if not ours:
        return full
    alerts = any(record.alerts is not None for record in ours)
    plain: Callable = full
    version: Any = None
    floors: list[float] | None = None
    asked = [*ours, REGISTRY["linear"]]

    def run(*args: Any) -> Any:
        nonlocal plain, version, floors
        if not _mode.plain():
            return full(*args)
        now = _gate.version, _mode.idle(), alerts and _gate.only_deterministic()
        if now != version:
            fresh = [floor_of(record) for record in asked]
            if fresh != floors:
                plain, floors = planned(lean(gm, fresh[:-1], fresh[-1]).forward), fresh
            # Asking for a floor may have made it known, which counts as a change.
            version = (_gate.version, *now[1:])
        return plain(*args)

    return run
