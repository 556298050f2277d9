"""The backend that `torch.compile(model, backend="fastnn")` finds, and what it did."""

from __future__ import annotations

import builtins
import operator
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from fastnn import _mode
from fastnn._compiler._asked import declines
from fastnn._compiler._calls import call as read
from fastnn._compiler._calls import value
from fastnn._compiler._gated import gated
from fastnn._compiler._gradients import count_up
from fastnn._compiler._rules import RULES, alone, counters, record_of
from fastnn._compiler._site import NoMatch, Rewrite, Site
from fastnn._compiler._sums import (
    give_means,
    give_skip,
    give_tables,
    give_twice,
    sum_biases,
)


class Found(NamedTuple):
    """One place of a graph that became a call of an op.

    rule: the name of the rule.
    layer: the name of the module in whose forward the last node is; "" for the model itself.
    shape: the shape of the result.
    dtype: the dtype of the result.
    """

    rule: str
    layer: str
    shape: tuple[Any, ...]
    dtype: torch.dtype


_listening = threading.local()


@contextmanager
def listen() -> Iterator[list[Found]]:
    """Collects in the block what graphs that this thread compiles become."""
    before = getattr(_listening, "found", None)
    found: list[Found] = []
    _listening.found = found
    try:
        yield found
    finally:
        _listening.found = before


def layer_of(node: Node) -> str:
    """The name of the module in whose forward `node` was recorded; "" for the model itself."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    path = re.sub(r"^L\['\w+'\]", "", path)
    path = re.sub(r"\._modules\[(['\"])(.*?)\1\]", r".\2", path)
    return path.removeprefix(".")


def _replace(gm: GraphModule, site: Site, rewrite: Rewrite) -> None:
    graph = gm.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    first = min(rewrite.outputs, key=order.__getitem__)
    last = max(rewrite.outputs, key=order.__getitem__)
    with graph.inserting_before(first):
        args = rewrite.args
        for view in rewrite.views:
            for i in range(rewrite.viewed):
                swap = {view.args[0]: args[i]}
                again = graph.node_copy(view, lambda n, swap=swap: swap.get(n, n))  # type: ignore[misc]
                again.meta["example_value"] = value(view).to(value(args[i]).dtype)
                args = (*args[:i], again, *args[i + 1 :])
        for i in rewrite.transposed:
            turned = graph.call_method("t", (args[i],))
            turned.meta["example_value"] = value(args[i]).t()
            args = (*args[:i], turned, *args[i + 1 :])
        if rewrite.dense:
            args = tuple(_dense(graph, a) for a in args)
        if rewrite.target is None:
            call = args[0]
        else:
            call = graph.call_function(rewrite.target, args, dict(rewrite.kwargs))
            call.meta = dict(last.meta)
        if len(rewrite.outputs) == 1:
            new = [call]
        else:
            call.meta["example_value"] = tuple(map(value, rewrite.outputs))
            new = []
            for i, output in enumerate(rewrite.outputs):
                new.append(graph.call_function(operator.getitem, (call, i)))
                new[-1].meta = dict(output.meta)
    for output, one in zip(rewrite.outputs, new, strict=True):
        output.replace_all_uses_with(one)
    if rewrite.dense:
        _tell_dense(call)
    # Not `eliminate_dead_code`, which would also erase calls in place whose result nobody uses.
    for node in sorted(site.taken, key=order.__getitem__, reverse=True):
        graph.erase_node(node)


def _dense(graph: Graph, argument: Any) -> Any:
    """`argument`, or a node that makes it contiguous."""
    v = value(argument)
    if not isinstance(v, Tensor) or v.is_contiguous():
        return argument
    dense = graph.call_method("contiguous", (argument,))
    dense.meta = dict(argument.meta, example_value=v.contiguous())
    return dense


def _tell_dense(node: Node) -> None:
    """Note that `node` is contiguous now, and so are the sums that it is a term of."""
    node.meta["example_value"] = value(node).contiguous()
    for user in node.users:
        if (known := read(user)) is not None and known.name == "add":
            _tell_dense(user)


def rewrite(gm: GraphModule) -> list[Found]:
    """Put calls of our ops into a graph that Dynamo captured, and tell what was found.

    The body of a higher-order operator, such as an activation checkpoint, is a graph of its own. It
    is rewritten, too.
    """
    found: list[Found] = []

    def tell(name: str, node: Node) -> None:
        v = value(node)
        if isinstance(v, tuple):
            v = v[-1]
        if isinstance(v, Tensor):
            found.append(Found(name, layer_of(node), tuple(v.shape), v.dtype))

    graphs = [m for m in gm.modules() if isinstance(m, GraphModule)]
    autocast = any(map(torch.is_autocast_enabled, ("cuda", "cpu"))) or any(
        getattr(node.target, "__name__", "") == "_enter_autocast"
        for module in graphs
        for node in module.graph.nodes
    )
    for module in graphs:
        for rule in RULES:
            for node in list(module.graph.nodes):
                if node._erased:
                    continue
                site = Site(module.graph, autocast)
                if not site.is_call(node, *rule.ends):
                    continue
                try:
                    result = rule.match(site, node)
                    site.confirm(result)
                except NoMatch:
                    continue
                record = record_of(result.target)
                if record is not None and declines(record, result, autocast):
                    continue
                tell(rule.name, result.outputs[-1])
                _replace(module, site, result)
        for node in sum_biases(module.graph, autocast):
            tell("bias in a backward", node)
        for node in give_means(module.graph):
            tell("means of planes", node)
        for node in give_twice(module.graph):
            tell("two gradients", node)
        for node in give_skip(module.graph, autocast):
            tell("norm that passes its input on", node)
        for node in give_tables(module.graph):
            tell("table that is multiplied", node)
        for group in counters(module.graph):
            with module.graph.inserting_before(group[-1]):
                module.graph.call_function(count_up, tuple(n.args[0] for n in group))
            for node in group:
                tell("counters of batches", node)
                module.graph.erase_node(node)
        for node in module.graph.nodes:
            ours = alone(node)
            if ours is not None:
                node.op = "call_function"
                node.target, node.args, node.kwargs = ours
                tell(ours[0].__name__, node)
        module.graph.lint()
        module.recompile()
    return found


def backend(gm: GraphModule, example_inputs: list[Any], **options: Any) -> Callable:
    """A backend of `torch.compile`: the captured graph, with ops of fastnn where rules hold.

    The graph runs with PyTorch's autograd. Each op decides at each call whether a kernel or PyTorch
    runs it, unless the sizes in the graph already say so. So second derivatives, hooks and dynamic
    shapes work as in eager mode. The only option is `replay`, False by default: whether a graph of
    fixed sizes is replayed from its second or third call on. Raises TypeError for others.
    """
    options = dict(options.pop("options", None) or {}) | options
    replay = options.pop("replay", False)
    if options:
        given = ", ".join(map(str, options))
        raise TypeError(f"the backend fastnn has one option, replay; given: {given}")
    found = rewrite(gm)
    listener = getattr(_listening, "found", None)
    if listener is not None:
        listener += found
    return gated(gm, replay)


# ---- explain ------------------------------------------------------------------------------------


class GraphDecision(NamedTuple):
    """What one call of an op in a graph did: its layer, the op's name, and why not a kernel."""

    layer: str
    op: str
    why: str | None
    code: str | None


class _Told(Interpreter):
    """Runs a graph node by node, and notes the decisions of each."""

    def __init__(self, gm: GraphModule, decisions: list[GraphDecision]):
        super().__init__(gm)
        self.decisions = decisions

    def run_node(self, n: Node) -> Any:
        with _mode.decisions() as heard:
            result = super().run_node(n)
        self.decisions += [GraphDecision(layer_of(n), d.op.name, d.why, d.code) for d in heard]
        return result


def decisions_of(model: Callable, inputs: tuple, kwargs: dict) -> list[GraphDecision]:
    """The decisions in one call of `model`, compiled for this backend."""
    decisions: list[GraphDecision] = []

    def told(gm: GraphModule, example_inputs: list[Any]) -> Callable:
        rewrite(gm)
        return lambda *args: _Told(gm, decisions).run(*args)

    told.__wrapped__ = backend  # type: ignore[attr-defined]  # so that it is traced alike

    def call(model: Callable, *inputs: Any, **kwargs: Any) -> Any:
        return model(*inputs, **kwargs)

    # Dynamo keeps what it compiles with the code object of a function, and counts it there. A code
    # object of its own leaves no trace in those of the model, and does not outlive this call.
    once = FunctionType(
        call.__code__.replace(co_name="explained"), {"__name__": __name__, "__builtins__": builtins}
    )
    torch.compile(once, backend=told)(model, *inputs, **kwargs)
    return decisions
