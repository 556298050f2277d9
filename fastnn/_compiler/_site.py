"""One place of a captured graph that a rule looks at, and the questions that a rule asks there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fastnn._compiler import _calls
from fastnn._compiler._calls import Call, value


class NoMatch(Exception):
    """Why a rule does not hold at a place."""


class Rewrite(NamedTuple):
    """A call that stands in place of the nodes that a rule took."""

    target: Callable[..., Any] | None
    """The function; None if the first argument itself stands in place of the result."""
    args: tuple[Any, ...]
    outputs: tuple[Node, ...]
    """The nodes that the results replace. With several, the call returns a tuple."""
    kwargs: dict[str, Any] = {}  # noqa: RUF012
    views: tuple[Node, ...] = ()
    """Views that are taken of the first arguments before the call: nodes that did so before."""
    viewed: int = 1
    """Of how many arguments the views are taken."""
    transposed: tuple[int, ...] = ()
    """Of which arguments the call is given the transpose."""
    dense: bool = False
    """Whether the tensors among the arguments are made contiguous, and so is the result."""


class Site:
    """Takes nodes one by one. Each question marks the nodes that it took, or raises `NoMatch`."""

    def __init__(self, graph: Graph, autocast: bool = False):
        self.graph = graph
        self.autocast = autocast  # whether autocast may be on where the graph runs
        self.taken: dict[Node, None] = {}

    def call(self, node: Any, *names: str) -> Call:
        """What `node` computes, which must be one of `names`."""
        known = _calls.call(node)
        if known is None or known.name not in names:
            raise NoMatch(f"no {' or '.join(names)}")
        if known.inplace and not _calls.is_alone(known["input"]):
            raise NoMatch(f"{known.name} overwrites a tensor that others may read")
        self.taken[node] = None
        return known

    def is_call(self, node: Any, *names: str) -> bool:
        """Whether `node` computes one of `names`. Takes nothing."""
        known = _calls.call(node)
        return known is not None and known.name in names

    def below_conversion(self, node: Any, dtype: torch.dtype) -> Any:
        """What `node` converts to `dtype`; `node` itself if it does not."""
        if _calls.is_conversion(node) and value(node).dtype == dtype and len(node.users) == 1:
            self.taken[node] = None
            return node.args[0]
        return node

    def product(self, node: Any) -> tuple[float, list[Node]]:
        """`node` as a number times nodes: through `*`, `/` by a number, squares, cubes, signs."""
        number, factors = 1.0, []
        todo = [(node, True)]
        while todo:
            one, first = todo.pop()
            if isinstance(one, (int, float)) and not isinstance(one, bool):
                number *= one
                continue
            if not isinstance(one, Node):
                raise NoMatch(f"a factor is {one!r}")
            known = _calls.call(one) if first or len(one.users) == 1 else None
            if known is None or known.inplace:
                factors.append(one)
            elif known.name == "mul":
                self.taken[one] = None
                todo += [(known["input"], False), (known["other"], False)]
            elif known.name == "neg":
                self.taken[one] = None
                number = -number
                todo.append((known["input"], False))
            elif (
                known.name == "div"
                and type(known["other"]) in (int, float)
                and known["other"]
                and known["rounding_mode"] is None
            ):
                self.taken[one] = None
                number /= known["other"]
                todo.append((known["input"], False))
            elif known.name == "square" or (known.name == "pow" and known["exponent"] in (2, 3)):
                self.taken[one] = None
                times = 2 if known.name == "square" else int(known["exponent"])
                base = known["input"]
                if not isinstance(base, Node):
                    raise NoMatch("a power of a number")
                factors += [base] * times
            else:
                factors.append(one)
        return number, factors

    def sum(self, node: Any) -> list[Any]:
        """The two terms of a sum."""
        known = self.call(node, "add")
        if known["alpha"] != 1:
            raise NoMatch("a term of the sum is scaled")
        return [known["input"], known["other"]]

    def number_and_node(self, terms: list[Any]) -> tuple[float, Node]:
        """Of two values, the number and the node."""
        numbers = [t for t in terms if type(t) in (int, float)]
        nodes = [t for t in terms if isinstance(t, Node)]
        if len(numbers) != 1 or len(nodes) != 1:
            raise NoMatch("no number beside a tensor")
        return float(numbers[0]), nodes[0]

    # ---- What must hold of the nodes that were taken ---------------------------------------------

    def expect(self, holds: bool, why: str) -> None:
        if not holds:
            raise NoMatch(why)

    def expect_all_of(self, dtype: torch.dtype) -> None:
        """All tensors that the taken nodes make have this dtype."""
        for node in self.taken:
            v = value(node)
            if isinstance(v, Tensor) and v.dtype != dtype:
                raise NoMatch(f"a value between is {v.dtype}")

    def expect_one_memory(self, x: Any, end: Node) -> None:
        """Nobody can tell whether `end` is a copy of `x` or `x` itself.

        So neither is an input of the graph or may leave it, and nobody writes the memory of one.
        """
        memory = {end, *_calls.roots(x)}
        self.expect(all(n.op not in ("placeholder", "get_attr") for n in memory), "it is an input")
        for node in self.graph.nodes:
            if node.op == "output":
                touched = list(node.all_input_nodes)
            else:
                touched = _calls.writes(node)
                touched += node.all_input_nodes if _calls.is_opaque(node) else []
            if any(_may_share(one, m) for t in touched for one in _calls.roots(t) for m in memory):
                raise NoMatch(f"{node.name} could tell a copy")

    def confirm(self, rewrite: Rewrite) -> None:
        """Raise `NoMatch` if someone could tell that the taken nodes became one call."""
        outputs = set(rewrite.outputs)
        for node in self.taken:
            if node not in outputs and any(user not in self.taken for user in node.users):
                raise NoMatch(f"{node.name} has another user")
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        place = min(rewrite.outputs, key=order.__getitem__)
        read = [a for a in nodes_in((rewrite.args, rewrite.kwargs)) if a not in self.taken]
        for node in read:
            if order[node] >= order[place]:
                raise NoMatch(f"{node.name} is computed later than the place of the call")
        spans = [order[n] for n in self.taken]
        memory = set().union(*(_calls.roots(n) for n in (*read, *self.taken)))
        random = any(map(_calls.draws, self.taken))
        written = [w for n in self.taken for w in _calls.writes(n) if w not in self.taken]
        statistics = set().union(*map(_calls.roots, written))
        for node in self.graph.nodes:
            if min(spans) < order[node] < max(spans) and node not in self.taken:
                why = _disturbs(node, memory, random)
                seen = set().union(*map(_calls.roots, node.all_input_nodes))
                if why is None and any(_may_share(a, b) for a in seen for b in statistics):
                    why = "reads a tensor that they write"
                if why is not None:
                    raise NoMatch(f"between them, {node.name} {why}")


def nodes_in(tree: Any) -> list[Node]:
    """The nodes in nested tuples, lists and dictionaries."""
    if isinstance(tree, Node):
        return [tree]
    if isinstance(tree, (tuple, list)):
        return [n for t in tree for n in nodes_in(t)]
    if isinstance(tree, dict):
        return [n for t in tree.values() for n in nodes_in(t)]
    return []


def is_state(node: Node) -> bool:
    """Whether a placeholder is a parameter or a buffer of a module."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    name = name() if callable(name) else name
    return "._parameters[" in name or "._buffers[" in name


def _may_share(a: Node, b: Node) -> bool:
    """Whether two nodes of `roots` may share memory.

    Two inputs may be views of one tensor, at some call. Of parameters and buffers of modules the
    storages are known.
    """
    if a is b:
        return True
    if a.op != "placeholder" or b.op != "placeholder":
        return False
    one, other = value(a), value(b)
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    if is_state(a) or is_state(b):
        return one.untyped_storage()._cdata == other.untyped_storage()._cdata
    return True


def _disturbs(node: Node, memory: set[Node], random: bool) -> str | None:
    """Why nodes must not be moved over `node`, which stands between them; None if they may be."""
    if _calls.is_opaque(node):
        return "may have effects of its own"
    if random and _calls.draws(node):
        return "draws random numbers"
    for written in _calls.writes(node):
        if any(_may_share(one, m) for one in _calls.roots(written) for m in memory):
            return "writes a tensor that they read"
    return None
