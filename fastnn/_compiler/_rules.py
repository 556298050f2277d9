"""Which calls of a captured graph become one call of an op, and which spelling stands for which op.

A rule is a function of a `Site` and of the last node. It takes nodes, raises `NoMatch` where it
does not hold, and returns a `Rewrite`. `RULES` is the table; the first rule that holds wins. A rule
that needs two nodes with several spellings in between is a few lines, since `Site` reads the
spellings.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as stock
from torch import Tensor
from torch.fx import Graph, Node

import fastnn.functional as F
from fastnn._compiler import _gradients
from fastnn._compiler._calls import (
    Call,
    call,
    has_free_layout,
    is_conversion,
    is_reshape,
    is_widening,
    keeps_rows,
    parts_of,
    same_sizes,
    value,
)
from fastnn._compiler._site import NoMatch, Rewrite, Site, is_state
from fastnn.ops import REGISTRY
from fastnn.ops.channel_norm import batch_norm_act, batch_norm_add_relu, group_norm_act
from fastnn.ops.glu import act_glu, act_mul
from fastnn.ops.linear import linear_act
from fastnn.ops.residual_norm import dropout_add, dropout_add_layer_norm, dropout_add_rms_norm
from fastnn.ops.rotary import rotary
from fastnn.ops.scale import scale_add


class GraphRule(NamedTuple):
    """A rule and the functions that its last node may compute."""

    name: str
    ends: tuple[str, ...]
    match: Callable[[Site, Node], Rewrite]


RULES: list[GraphRule] = []


def rule(name: str, *ends: str) -> Callable[[Callable], Callable]:
    """Enter a function into the table of rules."""

    def enter(match: Callable) -> Callable:
        RULES.append(GraphRule(name, ends, match))
        return match

    return enter


def _tensor(node: Any) -> Tensor:
    v = value(node)
    if not isinstance(v, Tensor):
        raise NoMatch(f"{node} is no tensor")
    return v


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one shape and one layout, so that their order does not matter."""
    return same_sizes(one.shape, other.shape) and same_sizes(one.stride(), other.stride())


def _numbers(*values: Any) -> None:
    """Numbers that a graph with dynamic shapes computes have no place in an op."""
    for v in values:
        if isinstance(v, Node):
            raise NoMatch("a number is computed in the graph")


def _close(a: float, b: float) -> bool:
    """Whether float32 does not tell two constants apart."""
    return math.isclose(a, b, rel_tol=2.0**-24)


# ---- Copies that nobody needs --------------------------------------------------------------------
# They come first, because what they leave is what the other rules look for.


@rule("nothing to do", "mul", "div", "pad")
def _nothing_to_do(site: Site, end: Node) -> Rewrite:
    """x * 1, x / 1, and a pad by 0: a copy of x, and x is as good."""
    known = site.call(end, "mul", "div", "pad")
    site.expect(not known.inplace, "it is in place")
    x = known["input"]
    if known.name == "pad":
        site.expect(known["mode"] == "constant", "not a constant pad")
        given = known["pad"]
        site.expect(all(type(n) is int and n == 0 for n in given), "the pad is not 0")
    else:
        one = known["other"]
        if isinstance(x, (int, float)) and known.name == "mul":
            x, one = one, x
        site.expect(type(one) in (int, float) and one == 1, "the factor is not 1")
        site.expect(known.arguments.get("rounding_mode") is None, "the quotient is rounded")
    was, new = _tensor(x), _tensor(end)
    site.expect(_alike(was, new) and was.dtype == new.dtype, "the result is of another kind")
    site.expect(was.is_floating_point(), "integers")
    site.expect_one_memory(x, end)
    return Rewrite(None, (x,), (end,))


@rule("sum of two layouts", "add")
def _sum_of_two_layouts(site: Site, end: Node) -> Rewrite:
    """x + z, where one is contiguous and one permuted: a residual stream begins with a permutation.

    The sums of such a stream keep the permuted layout, and each norm makes a copy. If nobody can
    tell the layout, one copy at the beginning is enough.
    """
    known = site.call(end, "add")
    site.expect(not known.inplace and known["alpha"] == 1, "in place, or scaled")
    two = [_tensor(t) for t in (known["input"], known["other"])]
    site.expect(same_sizes(two[0].shape, two[1].shape), "terms of two shapes")
    site.expect(two[0].is_floating_point(), "integers")
    site.expect(sum(t.is_contiguous() for t in two) == 1, "not one of the terms is contiguous")
    # The norm becomes one with the sum; without a norm, a copy would be a pass too many.
    site.expect(
        any(site.is_call(u, "layer_norm", "rms_norm") for u in end.users), "no norm follows"
    )
    same = _tensor(end).is_contiguous()
    site.expect(same or has_free_layout(end), "the layout of the sum can be told")
    return Rewrite(torch.add, (known["input"], known["other"]), (end,), dense=True)


@rule("contiguous before attention", "contiguous")
def _contiguous_before_attention(site: Site, end: Node) -> Rewrite:
    """A query, key or value that is made contiguous for attention, which reads through strides."""
    site.expect(end.op == "call_method" and not end.kwargs and len(end.args) == 1, "no copy")
    x = end.args[0]
    v = _tensor(x)
    site.expect(v.dim() == 4 and v.transpose(1, 2).is_contiguous(), "not heads of one tensor")
    for user in end.users:
        site.expect(_is_attention(user) and end in user.args[:3], "not only attention reads it")
        site.expect(_layout_of_attention_is_free(user), "the layout of the result can be told")
    site.taken[end] = None
    site.expect_one_memory(x, end)
    return Rewrite(None, (x,), (end,))


def _is_attention(node: Node) -> bool:
    return node.op == "call_function" and node.target in (
        stock.scaled_dot_product_attention,
        F.scaled_dot_product_attention,
    )


def _layout_of_attention_is_free(node: Node) -> bool:
    """Whether the result is made contiguous before anything else, as (batch, length, heads, ...).

    The result of attention has the layout of the query, which differs if the query is no copy.
    """
    for user in node.users:
        name = user.target if user.op == "call_method" else ""
        if name == "reshape" and same_sizes(_tensor(user).shape, _tensor(node).shape):
            free = _layout_of_attention_is_free(user)
        elif name == "transpose" and user.args[1:] in ((1, 2), (2, 1)):
            free = all(
                u.op == "call_method" and u.target in ("contiguous", "reshape") and not u.kwargs
                and _tensor(u).is_contiguous() and (u.target != "reshape" or _merges_heads(u))
                for u in user.users
            )  # fmt: skip
        else:
            free = False
        if not free:
            return False
    return bool(node.users)


def _merges_heads(node: Node) -> bool:
    """Whether a reshape gives (batch, length, heads * width)."""
    batch, length, heads, width = _tensor(node.args[0]).shape
    return same_sizes(_tensor(node).shape, (batch, length, heads * width))


# ---- Formulas that are written out --------------------------------------------------------------
# They become PyTorch's function of that name. Other rules then see it, and `alone` puts ours there.


def _rms_norm_without_autocast(input: Tensor, *args: Any) -> Tensor:
    """`rms_norm` in the dtypes that the formula states, which autocast does not change."""
    kind = input.device.type
    if not torch.amp.is_autocast_available(kind):
        return F.rms_norm(input, *args)
    with torch.autocast(kind, enabled=False):
        return F.rms_norm(input, *args)


_rms_norm_without_autocast.__name__ = "rms_norm"


@rule("rms_norm written out", "mul")
def _rms_norm_written_out(site: Site, end: Node) -> Rewrite:
    """w * (x * rsqrt(mean(x ** 2) + eps)), with conversions to float32 and back."""
    scaled = site.call(end, "mul")
    for weight, normed in (
        (scaled["input"], scaled["other"]),
        (scaled["other"], scaled["input"]),
    ):
        inner = normed
        while is_conversion(inner):
            inner = inner.args[0]
        if site.is_call(inner, "mul") and isinstance(weight, Node) and _tensor(weight).dim() == 1:
            break
    else:
        raise NoMatch("no weight times a product")
    normed = site.below_conversion(normed, _tensor(end).dtype)
    number, two = site.product(normed)
    site.expect(number == 1.0 and len(two) == 2, "not a product of two")
    factor = next((f for f in two if site.is_call(f, "rsqrt")), None)
    x = next((f for f in two if f is not factor), None)
    site.expect(factor is not None and x is not None, "no rsqrt")
    terms = site.sum(site.call(factor, "rsqrt")["input"])
    eps, mean = site.number_and_node(terms)
    of = site.call(mean, "mean")
    site.expect(of["dim"] in (-1, (-1,), [-1]) and of["keepdim"] is True, "the mean is not of rows")
    site.expect(of["dtype"] is None, "the mean has a dtype of its own")
    number, squares = site.product(of["input"])
    site.expect(number == 1.0 and len(squares) == 2 and squares[0] is squares[1], "no square")
    # The square and the product may read x through the same conversion, or each through its own.
    source = _source(site, x)
    site.expect(_source(site, squares[0]) is source, "the square is of another tensor")
    given, w, out = _tensor(source), _tensor(weight), _tensor(end)
    site.expect(given.dtype == w.dtype == out.dtype, "the weight or the result has another dtype")
    wide = torch.promote_types(given.dtype, torch.float32)
    site.expect(_tensor(mean).dtype == wide, "the mean is not taken in float32")
    site.expect(same_sizes(given.shape, out.shape), "the weight is broadcast")
    site.expect(same_sizes(w.shape, given.shape[-1:]), "the weight is broadcast")
    site.expect(given.is_contiguous() and out.is_contiguous(), "the rows are not contiguous")
    shape = (w.shape[0],)
    site.expect(type(w.shape[0]) is int, "the rows have no fixed length")
    norm = _rms_norm_without_autocast if site.autocast else stock.rms_norm
    return Rewrite(norm, (source, shape, weight, eps), (end,))


def _source(site: Site, node: Any) -> Any:
    """What `node` widens. A conversion that somebody else needs, too, stays in the graph."""
    while is_widening(node):
        if all(user in site.taken for user in node.users):
            site.taken[node] = None
        node = node.args[0]
    return node


def _split(site: Site, factors: list[Node], name: str, *but: Any) -> tuple[Node, list[Node]]:
    """Of factors, the one that computes `name` and is none of `but`, and the others."""
    found = [f for f in factors if site.is_call(f, name) and all(f is not b for b in but)]
    if len(found) != 1:
        raise NoMatch(f"no {name} among the factors")
    return found[0], [f for f in factors if f is not found[0]]


def _split_one_plus(site: Site, factors: list[Node], *names: str) -> tuple[Call, list[Node]]:
    """Of factors, the call of one of `names` in `1 + name(...)`, and the other factors."""
    for factor in factors:
        known = call(factor)
        if known is not None and known.name == "add" and 1 in (known["input"], known["other"]):
            _, inner = site.number_and_node([known["input"], known["other"]])
            if site.is_call(inner, *names):
                site.sum(factor)
                return site.call(inner, *names), [f for f in factors if f is not factor]
    raise NoMatch(f"no one plus {' or '.join(names)}")


def _expect_elementwise(site: Site, x: Node, end: Node) -> None:
    given = _tensor(x)
    site.expect(same_sizes(given.shape, _tensor(end).shape), "the result has another shape")
    site.expect(given.is_floating_point(), "integers")
    site.expect_all_of(given.dtype)


@rule("gelu written out", "mul", "div")
def _gelu_written_out(site: Site, end: Node) -> Rewrite:
    """x / 2 * (1 + erf(x / sqrt(2))), or with tanh for erf (arXiv:1606.08415, section 2)."""
    number, factors = site.product(end)
    gate, (x, *more) = _split_one_plus(site, factors, "erf", "tanh")
    site.expect(not more and _close(number, 0.5), "not half of x times a sum")
    scale, of = site.product(gate["input"])
    if gate.name == "erf":
        site.expect(of == [x] and _close(scale, math.sqrt(0.5)), "not erf(x / sqrt(2))")
        approximate = "none"
    else:
        site.expect(_close(scale, math.sqrt(2 / math.pi)), "not sqrt(2 / pi)")
        poly, rest = _split(site, of, "add", x)
        terms = site.sum(poly)
        if rest:  # x * (1 + c * x * x)
            cubic, first, power = _cubic(site, terms, 2)
            site.expect(first == 1.0 and rest == [x], "not x times a sum")
        else:  # x + c * x ** 3
            cubic, first, power = _cubic(site, terms, 3)
            site.expect(first is x, "not x plus a cube")
        site.expect(_close(cubic, 0.044715), "not 0.044715")
        site.expect(all(p is x for p in power), "a power of another tensor")
        approximate = "tanh"
    _expect_elementwise(site, x, end)
    return Rewrite(stock.gelu, (x,), (end,), {"approximate": approximate})


def _cubic(site: Site, terms: list[Any], power: int) -> tuple[float, Any, list[Node]]:
    """Of the terms `first + c * x ** power`: c, first, the factors of the power."""
    for first, other in (terms, terms[::-1]):
        if site.is_call(other, "mul") and isinstance(other, Node) and first is not other:
            if site.is_call(first, "mul"):
                continue
            number, factors = site.product(other)
            if len(factors) == power:
                return number, float(first) if isinstance(first, (int, float)) else first, factors
    raise NoMatch("no power")


@rule("silu written out", "mul")
def _silu_written_out(site: Site, end: Node) -> Rewrite:
    """x * sigmoid(x)."""
    number, factors = site.product(end)
    gate, (x, *more) = _split(site, factors, "sigmoid")
    site.expect(number == 1.0 and not more, "not a product of two")
    site.expect(site.call(gate, "sigmoid")["input"] is x, "the sigmoid is of another tensor")
    _expect_elementwise(site, x, end)
    return Rewrite(stock.silu, (x,), (end,))


@rule("mish written out", "mul")
def _mish_written_out(site: Site, end: Node) -> Rewrite:
    """x * tanh(softplus(x))."""
    number, factors = site.product(end)
    gate, (x, *more) = _split(site, factors, "tanh")
    site.expect(number == 1.0 and not more, "not a product of two")
    plus = site.call(site.call(gate, "tanh")["input"], "softplus")
    site.expect(plus["input"] is x and plus["beta"] == 1 and plus["threshold"] == 20, "no softplus")
    _expect_elementwise(site, x, end)
    return Rewrite(stock.mish, (x,), (end,))


@rule("hardswish written out", "mul", "div")
def _hardswish_written_out(site: Site, end: Node) -> Rewrite:
    """x * relu6(x + 3) / 6 (arXiv:1905.02244, section 5.2)."""
    number, factors = site.product(end)
    gate, (x, *more) = _split(site, factors, "relu6")
    site.expect(_close(number, 1 / 6) and not more, "not a sixth of a product of two")
    shift, of = site.number_and_node(site.sum(site.call(gate, "relu6")["input"]))
    site.expect(shift == 3.0 and of is x, "not relu6(x + 3)")
    _expect_elementwise(site, x, end)
    return Rewrite(stock.hardswish, (x,), (end,))


@rule("rotary written out", "add")
def _rotary_written_out(site: Site, end: Node) -> Rewrite:
    """x * cos + cat((-second, first), -1) * sin, for the halves of x (arXiv:2104.09864)."""
    terms = site.sum(end)
    for straight, turned in (terms, terms[::-1]):
        if not (site.is_call(straight, "mul") and site.is_call(turned, "mul")):
            continue
        known = site.call(turned, "mul")
        for both, sin in ((known["input"], known["other"]), (known["other"], known["input"])):
            if isinstance(both, Node) and both.target is torch.cat:
                x = _changed_halves(site, both)
                two = site.call(straight, "mul")
                cos = two["other"] if two["input"] is x else two["input"]
                site.expect(x in (two["input"], two["other"]) and cos is not x, "not a product")
                given = [_tensor(t) for t in (x, cos, sin)]
                site.expect(all(t.dtype == given[0].dtype for t in given), "several dtypes")
                site.expect(same_sizes(_tensor(end).shape, given[0].shape), "x is broadcast")
                _expect_elementwise(site, x, end)
                return Rewrite(rotary, (x, cos, sin), (end,))
    raise NoMatch("no product with changed halves")


def _changed_halves(site: Site, node: Node) -> Node:
    """x, where `node` is the concatenation of its second half, negated, and its first half."""
    given = dict(zip(("tensors", "dim"), node.args, strict=False), **node.kwargs)
    parts: Any = given.pop("tensors", None)
    last = given.pop("dim", 0)
    site.expect(last in (-1, _tensor(node).dim() - 1) and not given, "not along the rows")
    site.expect(isinstance(parts, (tuple, list)) and len(parts) == 2, "not of two")
    negated, first = parts
    second = site.call(negated, "neg")["input"]
    one, two = _half(first), _half(second)
    if one is None or two is None:
        raise NoMatch("no halves")
    (x, start, stop), (other, begin, finish) = one, two
    size = _tensor(x).shape[-1]
    site.expect(type(size) is int and size % 2 == 0, "the size is not even")
    places = start in (None, 0), stop == size // 2, begin == size // 2, finish in (None, size)
    site.expect(x is other and all(places), "not the halves of one tensor")
    site.taken |= dict.fromkeys((node, first, second))
    return x


def _half(node: Any) -> tuple[Node, Any, Any] | None:
    """(x, a, b) of x[..., a:b]; None for anything else."""
    if not isinstance(node, Node) or node.target is not operator.getitem:
        return None
    x, index = node.args
    if not isinstance(x, Node) or not isinstance(index, tuple) or not index:
        return None
    *others, last = index
    whole = all(o is Ellipsis or o == slice(None) for o in others)
    complete = Ellipsis in others or len(index) == _tensor(x).dim()
    if not whole or not complete or not isinstance(last, slice) or last.step not in (None, 1):
        return None
    return x, last.start, last.stop


@rule("scale before attention", "scaled_dot_product_attention")
def _scale_before_attention(site: Site, end: Node) -> Rewrite:
    """attention(c * q, k, v), also with views between: c becomes a factor of the scale."""
    known = site.call(end, "scaled_dot_product_attention")
    above, node = [], known["query"]
    while is_reshape(node) and len(node.users) == 1:
        above.append(node)
        node = node.args[0]
    site.expect(site.is_call(node, "mul", "div") and len(node.users) == 1, "no product")
    number, factors = site.product(node)
    site.expect(len(factors) == 1 and factors != [node], "not a number times a tensor")
    q, scale = factors[0], known["scale"]
    was, new = _tensor(q), _tensor(node)
    site.expect(_alike(was, new) and was.dtype == new.dtype, "the product is of another kind")
    width = _tensor(known["query"]).shape[-1]
    if scale is None and type(width) is int:
        scale = 1 / math.sqrt(width)
    site.expect(type(scale) in (int, float), "the scale is no constant")
    scale *= number
    site.expect(0 < scale < math.inf and number > 0, "the scale is not positive")
    site.taken |= dict.fromkeys(above)
    _numbers(known["dropout_p"], known["is_causal"], known["enable_gqa"])
    given = {n: v for n, v in known.arguments.items() if n != "query"} | {"scale": scale}
    attention = stock.scaled_dot_product_attention
    return Rewrite(attention, (q,), (end,), given, tuple(reversed(above)))


# ---- Losses -------------------------------------------------------------------------------------


def _cross_entropy_in_float32(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`cross_entropy(input.float(), ...)`: autocast converts the logits, or a kernel reads them."""
    kind = input.device.type
    if not torch.amp.is_autocast_available(kind):  # as on the meta device
        return F.cross_entropy(input.float(), *args, **kwargs)
    low = input.dtype if input.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
    with torch.autocast(kind, dtype=low):
        return F.cross_entropy(input, *args, **kwargs)


_cross_entropy_in_float32.__name__ = "cross_entropy"


@rule("nll_loss of log_softmax", "nll_loss")
def _nll_of_log_softmax(site: Site, end: Node) -> Rewrite:
    """nll_loss(log_softmax(x)): no table of log-probabilities is kept."""
    loss = site.call(end, "nll_loss")
    table = site.call(loss["input"], "log_softmax")
    x = table["input"]
    v = _tensor(x)
    site.expect(v.dim() >= 2 and table["dim"] in (1, 1 - v.dim()), "the classes are elsewhere")
    site.expect(table["dtype"] in (None, v.dtype), "log_softmax has a dtype of its own")
    site.expect(_tensor(end).dtype == v.dtype, "the loss has another dtype than the logits")
    site.expect(not _tensor(loss["target"]).is_floating_point(), "the target is no index")
    names = "weight", "size_average", "ignore_index", "reduce", "reduction"
    given = {n: loss[n] for n in names}
    _numbers(given["ignore_index"])
    return Rewrite(stock.cross_entropy, (x, loss["target"]), (end,), given)


@rule("cross_entropy of converted logits", "cross_entropy")
def _cross_entropy_of_converted(site: Site, end: Node) -> Rewrite:
    """cross_entropy(x.float()), also with views between: the loss reads the 16-bit logits."""
    loss = site.call(end, "cross_entropy")
    above, node = [], loss["input"]
    while is_reshape(node) and len(node.users) == 1:
        above.append(node)
        node = node.args[0]
    site.expect(is_conversion(node) and len(node.users) == 1, "the logits are not converted")
    narrow = node.args[0]
    site.expect(_tensor(node).dtype == torch.float32, "the conversion is not to float32")
    site.expect(_tensor(narrow).dtype in (torch.float16, torch.bfloat16), "logits of 32 bits")
    site.expect(not _tensor(loss["target"]).is_floating_point(), "the target is no index")
    site.expect(loss["weight"] is None, "the classes have weights")
    site.taken[node] = None
    for view in above:
        site.taken[view] = None
    given = {n: v for n, v in loss.arguments.items() if n not in ("input", "target")}
    views = tuple(reversed(above))
    return Rewrite(_cross_entropy_in_float32, (narrow, loss["target"]), (end,), given, views)


# ---- Branches and norms -------------------------------------------------------------------------


def _branch(site: Site, node: Node) -> tuple[Any, Any, float, bool]:
    """(z, x, p, training) of `x + dropout(z, p, training)`; p = 0 for a sum without a dropout."""
    terms = site.sum(node)
    one, other = (_tensor(t) for t in terms)
    site.expect(_alike(one, other) and one.is_floating_point(), "the terms are of two kinds")
    site.expect(terms[0] is not terms[1], "a tensor is added to itself")
    for x, z in (terms, terms[::-1]):
        known = call(z)
        if known is not None and known.name == "dropout" and len(z.users) == 1:
            _numbers(known["p"], known["training"])
            if known["p"] == 0 or not known["training"]:
                site.taken[z] = None
                return known["input"], x, 0.0, False
            if not known.inplace:  # in place, PyTorch draws its mask in another way
                site.taken[z] = None
                return known["input"], x, known["p"], True
    return terms[1], terms[0], 0.0, False


@rule("dropout, add, norm", "layer_norm", "rms_norm")
def _add_norm(site: Site, end: Node) -> Rewrite:
    """norm(x + dropout(z)), where the sum may be used elsewhere, too.

    The sum may be reshaped before both, as where tokens become an image of tokens.
    """
    norm = site.call(end, "layer_norm", "rms_norm")
    last = s = norm["input"]
    if keeps_rows(last) and len(last.args[0].users) == 1:
        site.taken[last] = None
        s = last.args[0]
    site.expect(len(norm["normalized_shape"]) == 1, "the norm is over several dimensions")
    _numbers(norm["eps"], *norm["normalized_shape"])
    z, x, p, training = _branch(site, s)
    site.expect(_tensor(z).dtype == _tensor(x).dtype, "the terms have two dtypes")
    views = () if last is s else (last,)
    if views:
        for term in (z, x):
            site.expect(_tensor(term).is_contiguous(), "the terms are not contiguous")
    prenorm = any(user is not end for user in last.users)
    centred = norm.name == "layer_norm"
    parameters = [norm["weight"], norm["bias"]] if centred else [norm["weight"]]
    op = dropout_add_layer_norm if centred else dropout_add_rms_norm
    args = (z, x, tuple(norm["normalized_shape"]), *parameters, norm["eps"], p, training, prenorm)
    return Rewrite(op, args, (last, end) if prenorm else (end,), {}, views, 2)


# ---- Activations --------------------------------------------------------------------------------

_ALWAYS = ("relu", "selu", "silu", "mish", "hardswish", "hardsigmoid", "tanh", "sigmoid")
_ACTIVATIONS = (*_ALWAYS, "gelu", "leaky_relu", "elu", "hardtanh", "relu6")


def _activation(site: Site, node: Node) -> tuple[Any, str, float, float]:
    """(input, name, a, b) of an activation, as `linear_act` is told of it."""
    known = site.call(node, *_ACTIVATIONS)
    name, x = known.name, known["input"]
    a = b = 0.0
    if name == "gelu":
        site.expect(known["approximate"] in ("none", "tanh"), "an unknown approximation")
        name = "gelu" if known["approximate"] == "none" else "gelu_tanh"
    elif name == "leaky_relu":
        a = known["negative_slope"]
    elif name == "elu":
        a, b = known["alpha"], 1.0
    elif name == "hardtanh":
        a, b = known["min_val"], known["max_val"]
    elif name == "relu6":
        name, a, b = "hardtanh", 0.0, 6.0
    site.expect(type(a) in (int, float) and type(b) in (int, float), "a number is no constant")
    # In place, PyTorch's backward refuses a negative slope; a range must not be empty.
    site.expect(not (known.inplace and a < 0 and name in ("leaky_relu", "elu")), "a negative slope")
    site.expect(name != "hardtanh" or a <= b, "an empty range")
    return x, name, float(a), float(b)


def _norm_arguments(norm: Any) -> tuple:
    names = (
        "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps",
    )  # fmt: skip
    given = tuple(norm[n] for n in names)
    _numbers(*given[4:])
    return given


@rule("batch_norm, add, relu", "relu")
def _batch_norm_add_relu(site: Site, end: Node) -> Rewrite:
    """relu(batch_norm(x) + residual): the end of a residual block."""
    args = _batch_norm_and_residual(site, site.call(end, "relu")["input"])
    return Rewrite(batch_norm_add_relu, args, (end,))


@rule("batch_norm, add", "add")
def _batch_norm_add(site: Site, end: Node) -> Rewrite:
    """batch_norm(x) + residual: the end of an inverted residual block."""
    args = _batch_norm_and_residual(site, end)
    return Rewrite(batch_norm_add_relu, args, (end,), {"relu": False})


def _batch_norm_and_residual(site: Site, sum_of_both: Any) -> tuple[Any, ...]:
    """(x, residual, arguments of the norm) of `batch_norm(x) + residual`."""
    terms = site.sum(sum_of_both)
    # The norm that is computed last has nothing to wait for.
    norms = [t for t in terms if site.is_call(t, "batch_norm") and len(t.users) == 1]
    site.expect(bool(norms), "no batch_norm is added")
    order = {n: i for i, n in enumerate(site.graph.nodes)}
    node = max(norms, key=order.__getitem__)
    residual = next(t for t in terms if t is not node)
    norm = site.call(node, "batch_norm")
    one, other = _tensor(node), _tensor(residual)
    site.expect(_alike(one, other) and one.dtype == other.dtype, "the residual differs in kind")
    # The norm gives all other layouts up, which what Dynamo knows of its result does not tell.
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(one.dim(), torch.contiguous_format)
    dense = one.is_contiguous() or one.is_contiguous(memory_format=last)
    site.expect(dense, "the norm does not keep this layout")
    return norm["input"], residual, *_norm_arguments(norm)


@rule("batch_norm, activation", *_ACTIVATIONS)
def _batch_norm_act(site: Site, end: Node) -> Rewrite:
    x, *act = _activation(site, end)
    norm = site.call(x, "batch_norm")
    return Rewrite(batch_norm_act, (norm["input"], *_norm_arguments(norm), *act), (end,))


@rule("group_norm, activation", *_ACTIVATIONS)
def _group_norm_act(site: Site, end: Node) -> Rewrite:
    x, *act = _activation(site, end)
    norm = site.call(x, "group_norm")
    names = "input", "num_groups", "weight", "bias", "eps"
    _numbers(norm["num_groups"], norm["eps"])
    return Rewrite(group_norm_act, (*(norm[n] for n in names), *act), (end,))


@rule("activation, product of halves", "mul")
def _act_glu(site: Site, end: Node) -> Rewrite:
    """act(x) * z, where x and z are the halves of one tensor: both gradients go to their places."""
    known = site.call(end, "mul")
    site.expect(not known.inplace, "the product is in place")
    two = known["input"], known["other"]
    for gate, z in (two, two[::-1]):
        if site.is_call(gate, *_ACTIVATIONS) and gate is not z:
            x, *act = _activation(site, gate)
            of, dim = _halves(site, x, z)
            site.expect(_tensor(of).is_contiguous(), "the halves are not of a contiguous tensor")
            site.expect(_tensor(of).is_floating_point(), "integers")
            return Rewrite(act_glu, (of, dim, *act, x.args[1] == 0), (end,))
    raise NoMatch("no factor is an activation")


def _halves(site: Site, x: Any, z: Any) -> tuple[Node, int]:
    """The tensor of which `x` and `z` are the halves, and the dimension."""
    parts: Any = x, z
    for part in parts:
        site.expect(isinstance(part, Node) and part.target is operator.getitem, "not one of two")
    both = parts[0].args[0]
    site.expect(parts[1].args[0] is both, "halves of two tensors")
    site.expect({p.args[1] for p in parts} == {0, 1}, "not both halves")
    known = site.call(both, "chunk")
    of, dim = known["input"], known["dim"]
    whole = _tensor(of)
    site.expect(known["chunks"] == 2 and type(dim) is int, "not two chunks")
    site.expect(type(whole.shape[dim]) is int and whole.shape[dim] % 2 == 0, "an odd size")
    site.taken |= dict.fromkeys(parts)
    return of, dim


@rule("activation, product", "mul")
def _act_mul(site: Site, end: Node) -> Rewrite:
    """act(x) * z: a gated unit (arXiv:2002.05202), or a gate of any other kind."""
    known = site.call(end, "mul")
    site.expect(not known.inplace, "the product is in place")
    two = known["input"], known["other"]
    one, other = map(_tensor, two)
    site.expect(_alike(one, other) and one.dtype == other.dtype, "the factors differ in kind")
    for gate, z in (two, two[::-1]):
        if gate is not z and site.is_call(gate, *_ACTIVATIONS) and len(gate.users) == 1:
            x, *act = _activation(site, gate)
            return Rewrite(act_mul, (x, z, *act), (end,))
    raise NoMatch("no factor is an activation")


@rule("product of rows", "addmm")
def _product_of_rows(site: Site, product: Node) -> Rewrite:
    """addmm(bias, x.view(-1, K), weight).view(...): the Conv1D of GPT-2 is a `linear`.

    It becomes one where another op then takes its bias.
    """
    given = site.call(product, "addmm")
    end = next(iter(product.users), None)
    site.expect(keeps_rows(end) and not given.inplace, "the rows are not kept")
    assert end is not None
    bias, rows, weight = given["input"], given["mat1"], given["mat2"]
    site.expect(given["beta"] == 1 and given["alpha"] == 1, "a term is scaled")
    site.expect(keeps_rows(rows), "the rows are not those of a tensor")
    x = rows.args[0]
    site.taken |= dict.fromkeys((end, rows))
    b, v, w = map(_tensor, (bias, x, weight))
    site.expect(b.dim() == 1 and same_sizes(b.shape, w.shape[1:]), "the bias is broadcast")
    site.expect(same_sizes(_tensor(end).shape[:-1], v.shape[:-1]), "the rows are not kept")
    site.expect(b.dtype == v.dtype == w.dtype, "several dtypes")
    users = list(end.users)
    site.expect(len(users) == 1, "several users")
    record = getattr(users[0].target, "op", None)
    sums = record is not None and "input_bias" in record.names
    sums |= parts_of(users[0]) is not None
    site.expect(sums or site.is_call(users[0], *_ACTIVATIONS), "nothing takes the bias")
    return Rewrite(stock.linear, (x, weight, bias), (end,), transposed=(1,))


@rule("linear, activation, dropout", "dropout")
def _linear_act_dropout(site: Site, end: Node) -> Rewrite:
    last = site.call(end, "dropout")
    site.expect(not last.inplace or not last["training"], "the dropout is in place")
    _numbers(last["p"], last["training"])
    site.expect(0 <= last["p"] <= 1, "p is no probability")
    return _linear_then(site, last["input"], end, last["p"], last["training"])


@rule("linear, activation", *_ACTIVATIONS)
def _linear_act(site: Site, end: Node) -> Rewrite:
    return _linear_then(site, end, end)


def _linear_then(site: Site, act: Any, end: Node, *noise: Any) -> Rewrite:
    x, *how = _activation(site, act)
    product = site.call(x, "linear")
    args = product["input"], product["weight"], product["bias"]
    return Rewrite(linear_act, (*args, *how, *noise), (end,))


@rule("scale, add", "add")
def _scale_add(site: Site, end: Node) -> Rewrite:
    """x + scale * z, where the scale is broadcast: layer scale, or stochastic depth."""
    terms = site.sum(end)
    for x, product in (terms, terms[::-1]):
        if site.is_call(product, "mul") and len(product.users) == 1 and isinstance(x, Node):
            z, scale = _broadcast_factors(site, product)
            one, other = _tensor(x), _tensor(z)
            site.expect(_alike(one, other) and one.dtype == other.dtype, "terms of two kinds")
            return Rewrite(scale_add, (z, scale, x), (end,))
    raise NoMatch("no term is a product")


@rule("gate of channels", "mul")
def _gate_of_channels(site: Site, end: Node) -> Rewrite:
    """x * gate, where the gate is broadcast and has a gradient: one pass sums that gradient."""
    site.expect(not site.call(end, "mul").inplace, "the product is in place")
    x, scale = _broadcast_factors(site, end)
    site.expect(_tensor(x).requires_grad and _tensor(scale).requires_grad, "no gradient")
    return Rewrite(scale_add, (x, scale), (end,))


def _broadcast_factors(site: Site, node: Any) -> tuple[Node, Node]:
    """(x, scale) of a product of a tensor and a smaller one, which is broadcast."""
    known = site.call(node, "mul")
    two = known["input"], known["other"]
    for x, scale in (two, two[::-1]):
        one, other = _tensor(x), _tensor(scale)
        fits = same_sizes(one.shape, _tensor(node).shape) and one.dim() >= other.dim()
        pairs = zip(other.shape[::-1], one.shape[::-1], strict=False)
        fits = fits and all(same_sizes((s,), (n,)) or same_sizes((s,), (1,)) for s, n in pairs)
        if fits and not same_sizes(one.shape, other.shape):
            site.expect(one.dtype == other.dtype and one.is_floating_point(), "two dtypes")
            return x, scale
    raise NoMatch("no factor is broadcast")


@rule("dropout, add", "add")
def _dropout_add(site: Site, end: Node) -> Rewrite:
    z, x, p, training = _branch(site, end)
    site.expect(training, "nothing is dropped")
    site.expect(_tensor(z).dtype == _tensor(x).dtype, "the terms have two dtypes")
    return Rewrite(dropout_add, (z, x, p, True), (end,))


# ---- Views --------------------------------------------------------------------------------------


@rule("parts of one tensor", "getitem")
def _parts_of_one_tensor(site: Site, end: Node) -> Rewrite:
    """x[0], x[1], x[2], which are all of x: `x.unbind(0)`, as `q, k, v = x` is in eager mode.

    The gradient of each part would be a tensor of the size of x, and these are added up.
    """
    known = site.call(end, "getitem")
    x = known["input"]
    site.expect(type(known["index"]) is int and known["index"] == 0, "not the first part")
    v = _tensor(x)
    site.expect(v.dim() > 0 and type(v.shape[0]) is int and v.shape[0] > 1, "not several parts")
    site.expect(v.requires_grad, "no gradient")
    parts: dict[int, Node] = {}
    for user in x.users:
        if user.target is operator.getitem:
            part = user.args[1]
            if type(part) is int and part >= 0:
                site.expect(part not in parts, "a part is read twice")
                site.taken[user] = None
                parts[part] = user
    site.expect(sorted(parts) == list(range(v.shape[0])), "not all parts are read")
    site.expect_one_memory(x, end)  # parts of `unbind` must not be written
    return Rewrite(torch.unbind, (x, 0), tuple(parts[i] for i in range(v.shape[0])))


def unbind_and_permute(input: Tensor, dim: int, order: tuple[int, ...]) -> tuple[Tensor, ...]:
    """`input.unbind(dim)`, each permuted."""
    return tuple([t.permute(order) for t in input.unbind(dim)])


def unbind_and_transpose(input: Tensor, dim: int, one: int, other: int) -> tuple[Tensor, ...]:
    """`input.unbind(dim)`, each transposed. To parse a permutation costs the host more."""
    return tuple([t.transpose(one, other) for t in input.unbind(dim)])


@rule("unbind of a permutation", "unbind")
def _unbind_of_a_permutation(site: Site, end: Node) -> Rewrite:
    """x.permute(2, 0, 3, 1, 4).unbind(0): query, key and value of one product.

    The views are the same if `unbind` comes first. Its backward then stacks the gradients in the
    layout of x, and no copy permutes them.
    """
    known = site.call(end, "unbind")
    node = known["input"]
    site.expect(
        isinstance(node, Node) and node.op == "call_method" and node.target == "permute",
        "no permute",
    )
    site.taken[node] = None
    x, *order = node.args
    if len(order) == 1 and isinstance(order[0], (tuple, list)):
        order = list(order[0])
    rank = _tensor(node).dim()
    site.expect(not node.kwargs and all(type(d) is int for d in order), "dimensions by name")
    site.expect(type(known["dim"]) is int, "the dimension is no number")
    order = [d % rank for d in order]
    dim = order.pop(known["dim"] % rank)
    parts: dict[int, Node] = {}
    for user in end.users:
        part: Any = user.args[1] if user.target is operator.getitem else None
        site.expect(type(part) is int and part >= 0, "a part is unknown")
        site.expect(part not in parts, "a part is read twice")
        site.taken[user] = None
        parts[part] = user
    count = _tensor(node).shape[known["dim"]]
    site.expect(sorted(parts) == list(range(count)), "not all parts are read")
    order = [d - (d > dim) for d in order]
    outputs = tuple(parts[i] for i in range(count))
    moved = [d for d, of in enumerate(order) if d != of]
    if len(moved) == 2:  # the heads and the places in the sequence
        return Rewrite(unbind_and_transpose, (x, dim, *moved), outputs)
    return Rewrite(unbind_and_permute, (x, dim, tuple(order)), outputs)


# ---- Gradients in fewer passes ------------------------------------------------------------------
# They come last, because what they leave tells nothing to other rules.

_NEAR = 12  # nodes between two products of one tensor, where heads are split and turned


@rule("products of one tensor", "linear")
def _products_of_one_tensor(site: Site, end: Node) -> Rewrite:
    """linear(x, a), linear(x, b), ...: query, key and value, or the two products of a gated unit.

    In the backward, each product adds to the gradient of x. Only neighbours are taken, as all of
    them are computed where the first one is.
    """
    x = site.call(end, "linear")["input"]
    site.expect(not site.autocast, "autocast may convert the tensors")
    site.expect(_tensor(x).requires_grad and _tensor(end).requires_grad, "no gradient")
    order = {n: i for i, n in enumerate(site.graph.nodes)}
    users = sorted((u for u in x.users if _is_product_of(site, u, x)), key=order.__getitem__)
    run = users[users.index(end) :]
    for i, (one, other) in enumerate(itertools.pairwise(run)):
        if order[other] - order[one] > _NEAR:
            run = run[: i + 1]
            break
    site.expect(len(run) > 1, "one product")
    calls = [site.call(u, "linear") for u in run]
    parameters = *(c["weight"] for c in calls), *(c["bias"] for c in calls)
    for p in parameters:
        if p is not None:
            site.expect(_tensor(p).dtype == _tensor(x).dtype, "a parameter has another dtype")
    return Rewrite(_gradients.linears, (x, *parameters), tuple(run))


def _is_product_of(site: Site, node: Node, x: Node) -> bool:
    known = call(node)
    return known is not None and known.name == "linear" and known["input"] is x


@rule("mean beside another user", "mean")
def _mean_beside_another_user(site: Site, end: Node) -> Rewrite:
    """x.mean(dims) of a tensor that is used elsewhere: the squeeze of a gate of channels."""
    known = site.call(end, "mean")
    x, dims = known["input"], known["dim"]
    v = _tensor(x)
    site.expect(v.requires_grad and _tensor(end).requires_grad, "no gradient")
    site.expect(len(x.users) > 1, "no other user")
    site.expect(known["dtype"] is None and type(known["keepdim"]) is bool, "a dtype, or a flag")
    dims = (dims,) if type(dims) is int else dims
    site.expect(isinstance(dims, (tuple, list)) and bool(dims), "no dimensions")
    site.expect(all(type(d) is int and -v.dim() <= d < v.dim() for d in dims), "no dimensions")
    dims = tuple(d % v.dim() for d in dims)
    return Rewrite(_gradients.mean, (x, dims, known["keepdim"]), (end,))


def counters(graph: Graph) -> list[list[Node]]:
    """The additions of 1 to counters of batches, which nobody reads, in groups that may be one."""
    found: dict[Any, list[Node]] = {}
    memory = set()
    for node in graph.nodes:
        known = call(node)
        if known is None or known.name != "add" or not known.inplace or node.users:
            continue
        counter, v = known["input"], value(known["input"])
        if not isinstance(v, Tensor) or v.dim() or v.is_floating_point() or known["alpha"] != 1:
            continue
        if type(known["other"]) is not int or known["other"] != 1 or not is_state(counter):
            continue
        one = v.untyped_storage()._cdata
        if list(counter.users) == [node] and one not in memory:
            memory.add(one)
            found.setdefault((v.device, v.dtype), []).append(node)
    return [group for group in found.values() if len(group) > 1]


# ---- Calls that stay as they are, and run on the op of the same name -----------------------------


def alone(node: Node) -> tuple[Callable, tuple, dict[str, Any]] | None:
    """Our function and its arguments in place of those of `node`; None if there is none."""
    known = call(node)
    if known is not None and known.inplace:
        return None
    if node.op == "call_function":
        ours = _by_target().get(node.target)
        if ours is not None:
            return ours, node.args, dict(node.kwargs)
    if known is not None and (op := REGISTRY.get(known.name)) is not None:
        if known.arguments.keys() <= set(op.names):
            return getattr(F, known.name), (), known.arguments
    return None


def record_of(target: Any) -> Any:
    """The record of the op that runs a call of `target` in a rewritten graph; None if none does."""
    ours = _IN_OTHER_DTYPES.get(target) or _by_target().get(target)
    return getattr(target if ours is None else ours, "op", None)


_IN_OTHER_DTYPES = {
    _rms_norm_without_autocast: F.rms_norm, _cross_entropy_in_float32: F.cross_entropy,
}  # fmt: skip


@functools.cache
def _by_target() -> dict[Any, Callable]:
    counts = Counter(op.stock for op in REGISTRY.values())
    return {op.stock: getattr(F, name) for name, op in REGISTRY.items() if counts[op.stock] == 1}
