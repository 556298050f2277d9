"""Sums of gradients that a kernel of a backward makes in its own pass.

Where a result has two users, autograd adds their two gradients in a pass, and the bias of a product
has a pass that sums the gradient of the product. If an op of ours reads or writes that gradient
anyway, its kernel sums on the way:

- `twice`: the op returns its result twice, once for each user, and gets two gradients.
- `input_bias`: the op is told the bias that its input contains, and gives that bias its gradient.
- `means`: the op returns the means of its planes, too, and gets the gradients of both.
- `skip`: the op returns its input, too, for later users, and writes the sum of both gradients.

An embedding whose table is a factor of a product, too, returns the table once more for the product,
gets the gradient that the product makes, and adds its own to some rows of that.

The ops that have these arguments take part. All this happens after the rules, when it is known who
uses what. Where a product with a bias is query, key and value, `split_features` first takes the
place of the views, as its backward has such a kernel.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch.nn.functional as stock
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

import fastnn.functional as F
from fastnn._compiler import _gradients
from fastnn._compiler._asked import declines
from fastnn._compiler._calls import (
    call,
    is_opaque,
    is_reshape,
    is_view,
    keeps_rows,
    makes_new,
    parts_of,
    roots,
    same_sizes,
    value,
    writes,
)
from fastnn._compiler._rules import unbind_and_permute, unbind_and_transpose
from fastnn._compiler._site import Rewrite
from fastnn.kernels.split import MOST
from fastnn.ops.channel_norm import group_norm_act
from fastnn.ops.split import split_features


def _arguments(node: Node, name: str) -> dict[str, Any] | None:
    """The arguments of a call of an op of ours that has the argument `name`, not given here."""
    record = getattr(node.target, "op", None) if node.op == "call_function" else None
    if record is None or name not in getattr(record, "names", ()):
        return None
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    if name in bound.arguments:
        return None
    bound.apply_defaults()
    return dict(bound.arguments)


def _has_gradient(node: Any) -> bool:
    return any(isinstance(v, Tensor) and v.requires_grad for v in tree_leaves(value(node)))


def _item(graph: Graph, node: Node, i: int, like: Node) -> Node:
    item = graph.call_function(operator.getitem, (node, i))
    item.meta = dict(like.meta)
    return item


# ---- Two gradients of one result -----------------------------------------------------------------


def _is_ours(node: Node) -> bool:
    """Whether a call is one of ours whose results are new memory, and that writes no argument."""
    if node.op != "call_function":
        return False
    if hasattr(node.target, "op"):
        return True
    return getattr(node.target, "__module__", "") == _gradients.__name__


def _reads(node: Node) -> bool:
    """Whether a call is known to do nothing with its arguments but read them."""
    if all(not isinstance(v, Tensor) for v in tree_leaves(value(node))):
        return node.op == "call_method" and node.target in ("size", "dim", "numel")
    if is_view(node):
        return node.target is not getattr
    return _is_ours(node) or call(node) is not None or makes_new(node)


def _is_only_read(node: Node) -> bool:
    """Whether nobody writes the memory of `node`, and it does not leave the graph."""
    todo, seen = [node], {node}
    while todo:
        one = todo.pop()
        for user in one.users:
            if user.op == "output" or one in writes(user):
                return False
            if not is_view(user):
                if _is_ours(user):
                    continue
                if is_opaque(user):
                    return False
                known = call(user)
                if (known is not None and known.name != "dropout") or makes_new(user):
                    continue
            if user not in seen:  # it is a view, or may be one
                seen.add(user)
                todo.append(user)
    return True


def give_twice(graph: Graph) -> list[Node]:
    """Let ops that can give their results to two users do so. Returns their nodes."""
    found = []
    order = {n: i for i, n in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        arguments = _arguments(node, "twice")
        if arguments is None:
            continue
        several = isinstance(value(node), (tuple, list))
        y = node
        if several:
            last = len(value(node)) - 1
            items = [u for u in node.users if u.target is operator.getitem and u.args[1] == last]
            if len(items) != 1:
                continue
            y = items[0]
        users = sorted(y.users, key=order.__getitem__)
        branches = [u for u in users if _has_gradient(u)]
        if len(branches) < 2 or not _has_gradient(y):
            continue
        if not all(map(_reads, users)) or not _is_only_read(y):
            continue
        node.kwargs = {**node.kwargs, "twice": True}
        with graph.inserting_after(y):
            # The first user has a gradient of its own: autograd adds it last.
            again = _item(graph, node, last + 1 if several else 1, y)
        for user in users:
            if user is not branches[0]:
                user.replace_input_with(y, again)
        if not several:
            with graph.inserting_after(node):
                one = _item(graph, node, 0, node)
            branches[0].replace_input_with(node, one)
        results = value(node) if several else (value(node),)
        node.meta["example_value"] = (*results, value(y))
        found.append(node)
    return found


# ---- Tables that are looked up and multiplied ----------------------------------------------------


def _reads_a_table(node: Node, table: Node) -> bool:
    """Whether the gradient that a call gives `table` is new memory that nobody else has."""
    known = call(node)
    if known is not None and known.name == "linear":
        given = known.arguments
    else:
        given = _embedding(node) or {"max_norm": 1.0}
        if given["max_norm"] is not None or given["sparse"]:
            return False
    return given["weight"] is table and sum(v is table for v in given.values()) == 1


def _embedding(node: Node) -> dict[str, Any] | None:
    """The arguments of a call of `embedding`."""
    if node.op != "call_function" or node.target not in (stock.embedding, F.embedding):
        return None
    bound = inspect.signature(stock.embedding).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def give_tables(graph: Graph) -> list[Node]:
    """Let embeddings add their gradients to that of a product with the table. Returns their nodes.

    The head of a language model often multiplies with the table of its embeddings.
    """
    found = []
    for node in list(graph.nodes):
        given = _embedding(node)
        if given is None or not isinstance(given["weight"], Node):
            continue
        table, indices, padding = given["weight"], given["input"], given["padding_idx"]
        order = {n: i for i, n in enumerate(graph.nodes)}
        later = [u for u in table.users if order[u] > order[node]]
        if not _has_gradient(table) or not any(map(_has_gradient, later)):
            continue
        if not all(_reads_a_table(u, table) for u in (node, *later)):
            continue
        if given["scale_grad_by_freq"] or type(padding) not in (int, type(None)):
            continue
        with graph.inserting_before(node):
            pair = graph.call_function(_gradients.embedding_and_table, (indices, table, padding))
            pair.meta = dict(node.meta, example_value=(value(node), value(table)))
            rows, again = _item(graph, pair, 0, node), _item(graph, pair, 1, table)
        node.replace_all_uses_with(rows)
        for user in later:
            user.replace_input_with(table, again)
        graph.erase_node(node)
        found.append(rows)
    return found


# ---- Means of planes -----------------------------------------------------------------------------


def give_means(graph: Graph) -> list[Node]:
    """Let ops return the means of their planes, which a gate of channels reads."""
    found = []
    for node in list(graph.nodes):
        if _arguments(node, "means") is None or not _has_gradient(node):
            continue
        rank = value(node).dim()
        means = [u for u in node.users if u.target is _gradients.mean and u.args[0] is node]
        if len(means) != 1 or rank < 3 or sorted(means[0].args[1]) != [*range(2, rank)]:
            continue
        if not all(map(_reads, node.users)) or not _is_only_read(node):
            continue
        (mean,) = means
        v = value(mean)
        with graph.inserting_after(node):
            y = _item(graph, node, 0, node)
        node.replace_all_uses_with(y, lambda user, y=y: user is not y)  # type: ignore[misc]
        with graph.inserting_before(mean):
            one = _item(graph, node, 1, mean)
            if not mean.args[2]:
                one.meta["example_value"] = v.view(*v.shape, *(1,) * (rank - 2))
                one = graph.call_method("flatten", (one, 1))
                one.meta = dict(mean.meta)
        mean.replace_all_uses_with(one)
        graph.erase_node(mean)
        node.kwargs = {**node.kwargs, "means": True}
        node.meta["example_value"] = (value(y), v)
        found.append(node)
    return found


def mean_alone(graph: Graph, node: Node) -> None:
    """Undo `give_means` for the call of an op that PyTorch runs."""
    if not node.kwargs.get("means"):
        return
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "means"}
    y, one = sorted(node.users, key=lambda u: int(u.args[1]))  # type: ignore[arg-type, call-overload]
    node.meta = dict(y.meta)
    dims = tuple(range(2, value(y).dim()))
    with graph.inserting_before(one):
        mean = graph.call_function(_gradients.mean, (y, dims, True))
    mean.meta = dict(one.meta)
    one.replace_all_uses_with(mean)
    graph.erase_node(one)
    y.replace_all_uses_with(node)
    graph.erase_node(y)


# ---- Norms that pass their input on --------------------------------------------------------------


_OF_NORM = "input", "num_groups", "weight", "bias", "eps"


def _as_group_norm(node: Node) -> tuple[Any, ...] | None:
    """The arguments that `group_norm_act` takes for a group norm with or without an activation."""
    known = call(node)
    if known is not None and known.name == "group_norm":
        args = *(known[n] for n in _OF_NORM), None, 0.0, 0.0
    else:
        given = _arguments(node, "skip")
        if given is None:
            return None
        args = tuple(given[n] for n in (*_OF_NORM, "activation", "a", "b"))
    return None if any(isinstance(args[i], Node) for i in (1, 4)) else args


def give_skip(graph: Graph, autocast: bool = False) -> list[Node]:
    """Let group norms pass their input on to those who use it later. Returns their nodes.

    autocast: whether it may be on.
    """
    found = []
    order = {n: i for i, n in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        args = _as_group_norm(node)
        if args is None or not isinstance(x := args[0], Node) or roots(x) != {x}:
            continue
        # Autograd adds the gradients of the later users, and then that of the norm.
        later = [u for u in x.users if order[u] > order[node]]
        if x.op not in ("call_function", "call_method") or not any(map(_has_gradient, later)):
            continue
        if not _has_gradient(x) or not all(map(_reads, x.users)) or not _is_only_read(x):
            continue
        asked = Rewrite(group_norm_act, args, (node,), {"skip": True})
        if declines(group_norm_act.op, asked, autocast):  # type: ignore[attr-defined]
            continue
        node.op, node.target = "call_function", group_norm_act
        node.args, node.kwargs = args, {"skip": True}
        with graph.inserting_after(node):
            again, y = _item(graph, node, 1, x), _item(graph, node, 0, node)
        for user in later:
            user.replace_input_with(x, again)
        for user in list(node.users):
            if user not in (again, y):
                user.replace_input_with(node, y)
        order[again] = order[y] = order[node]
        node.meta["example_value"] = (value(y), value(x))
        found.append(node)
    return found


def norm_alone(graph: Graph, node: Node) -> None:
    """Undo `give_skip` for the call of an op that PyTorch runs."""
    if not node.kwargs.get("skip"):
        return
    y, again = sorted(node.users, key=lambda u: int(u.args[1]))  # type: ignore[arg-type, call-overload]
    node.kwargs, node.meta = {}, dict(y.meta)
    again.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    y.replace_all_uses_with(node)
    for item in (y, again):
        graph.erase_node(item)
    if node.args[5] is None:  # no activation
        node.target, node.args = stock.group_norm, node.args[:5]


# ---- Gradients of biases -------------------------------------------------------------------------


def _product_with_bias(node: Any) -> Node | None:
    """The `linear` with a bias of which `node` has the rows, if nobody else sees it."""
    while isinstance(node, Node) and len(node.users) == 1:
        known = call(node)
        if known is not None and known.name == "linear":
            bias = known["bias"]
            fits = _has_gradient(node) and _has_gradient(bias) and value(bias).dim() == 1
            return node if fits else None
        if not keeps_rows(node):
            return None
        node = node.args[0]
    return None


def _heads_of(node: Node) -> tuple[Any, int, Any] | None:
    """(z, parts, heads) of `unbind_and_permute(z.view(..., parts, heads, width), ...)`."""
    x, dim, *_ = node.args
    if not isinstance(x, Node) or not is_reshape(x):
        return None
    z, new = x.args[0], value(x).shape
    if dim != len(new) - 3 or len(x.users) != 1 or not same_sizes(new[:-3], value(z).shape[:-1]):
        return None
    return z, new[-3], new[-2]


_TURNS: dict[Any, str] = {unbind_and_permute: "permute", unbind_and_transpose: "transpose"}


def split_products(graph: Graph) -> None:
    """Put `split_features` where a product with a bias is taken apart."""
    for node in list(graph.nodes):
        turned = _TURNS.get(node.target)  # the method that turns each part, if one does
        parts = (*found, None) if (found := parts_of(node)) else None
        z, count, heads = (_heads_of(node) if turned else parts) or (None, 0, None)
        sizes = type(count) is int and type(heads) in (int, type(None))
        if z is None or not sizes or not 2 <= count <= MOST or _product_with_bias(z) is None:
            continue
        users = list(node.users)
        if any(u.target is not operator.getitem for u in users):
            continue
        if any(type(u.args[1]) is not int or u.args[1] < 0 for u in users):
            continue
        with graph.inserting_before(node):
            split = graph.call_function(split_features, (z,), {"parts": count, "heads": heads})
        v = value(z)
        views = (
            v.chunk(count, -1) if heads is None else v.unflatten(-1, (count, heads, -1)).unbind(-3)
        )
        split.meta = dict(node.meta, example_value=views)
        for user in users:
            i = user.args[1]
            with graph.inserting_before(user):
                part = _item(graph, split, i, user)
                part.meta["example_value"] = views[i]
                if turned:
                    part = graph.call_method(turned, (part, *node.args[2:]))
                    part.meta = dict(user.meta)
            user.replace_all_uses_with(part)
            graph.erase_node(user)
        shaped = node.args[0]
        graph.erase_node(node)
        if turned:
            graph.erase_node(shaped)


def sum_biases(graph: Graph, autocast: bool = False) -> list[Node]:
    """Let ops give the biases of their inputs the gradients. Returns the nodes of the ops.

    autocast: whether it may be on.
    """
    split_products(graph)
    found = []
    for node in list(graph.nodes):
        arguments = _arguments(node, "input_bias")
        if arguments is None:
            continue
        z, x = arguments["input"], arguments.get("residual")
        if arguments.get("dim", -1) not in (-1, value(z).dim() - 1):
            continue
        product = _product_with_bias(z)
        if product is None and x is not None and not (arguments["training"] and arguments["p"]):
            # Nothing is dropped, so the two terms may change places.
            if all(value(t).is_contiguous() for t in (z, x)):
                product = _product_with_bias(x)
                if product is not None:
                    arguments["input"], arguments["residual"] = x, z
        if product is None:
            continue
        known: Any = call(product)
        given = known["input"], known["weight"], known["bias"]
        target: Any = node.target
        asked = Rewrite(target, (), (node,), {**arguments, "input_bias": given[2]})
        if declines(target.op, asked, autocast):
            continue
        with graph.inserting_before(product):
            pair = graph.call_function(_gradients.linear_apart, given)
            pair.meta = dict(product.meta, example_value=(value(product), value(given[2])))
            one = _item(graph, pair, 0, product)
            bias = _item(graph, pair, 1, given[2])
        product.replace_all_uses_with(one)
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
        arguments = {n: v if v is not product else one for n, v in arguments.items()}
        # By position as far as they were given so: the size gate reads them by name.
        node.args = tuple(arguments[n] for n in names[: len(node.args)])
        node.kwargs = {**node.kwargs, "input_bias": bias}
        graph.erase_node(product)
        found.append(node)
    return found


def sum_alone(graph: Graph, node: Node) -> None:
    """Undo `sum_biases` for the call of an op that PyTorch runs."""
    bias = node.kwargs.get("input_bias")
    if not isinstance(bias, Node):
        return
    pair: Any = bias.args[0]
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "input_bias"}
    one = next(u for u in pair.users if u is not bias)
    with graph.inserting_before(pair):
        product = graph.call_function(stock.linear, pair.args)
    product.meta = dict(one.meta)
    one.replace_all_uses_with(product)
    for gone in (one, bias, pair):
        graph.erase_node(gone)
