"""Which members of a container run as one op, and what that op is told of them.

`RULES` is the one table, `told` the one matcher: `Sequential` and the Transformer layers go by
them. A new fusion is one more rule. Members are fused only where nothing could tell: each is
exactly of a class of the table, or marked and of its stock class, and nobody watches it (`watched`
of `_layer.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn as stock
from torch.nn.modules import module as _module

import fastnn.functional as F
from fastnn import _gate, _mode
from fastnn._front import bound
from fastnn._mode import Stock
from fastnn._scalars import fits_64_bits
from fastnn.layers import activation as acts
from fastnn.layers import batchnorm, conv
from fastnn.layers._layer import (
    OURS,
    STOCK,
    as_torch_made,
    attributes,
    generated,
    unwatched,
    watched,
    weight_and_bias,
)
from fastnn.layers._marks import KEY, MARK, is_marked, ours
from fastnn.layers.dropout import Dropout
from fastnn.layers.linear import Linear
from fastnn.layers.normalization import GroupNorm, LayerNorm, RMSNorm
from fastnn.ops.channel_norm import batch_norm_act, group_norm_act
from fastnn.ops.conv import conv_act, conv_batch_norm_act
from fastnn.ops.linear import linear_act
from fastnn.ops.residual_norm import dropout_add, dropout_add_layer_norm, dropout_add_rms_norm

# ---- What an op is told of an activation: its name there, a and b -------------------------------

_Act = tuple[str, float, float]


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and fits_64_bits(value))


def _hardtanh(m) -> _Act | None:
    low, high = m.min_val, m.max_val
    numbers = _is_number(low) and _is_number(high)
    return ("hardtanh", float(low), float(high)) if numbers and low <= high else None


def _sloped(name: str, a, b: float, inplace: bool) -> _Act | None:
    # In place, PyTorch's backward refuses a negative slope.
    return (name, float(a), b) if _is_number(a) and not (inplace and a < 0) else None


def _always(name: str) -> Callable[[Any], _Act]:
    act = name, 0.0, 0.0
    tell = lambda m: act  # noqa: E731
    tell.always = act  # type: ignore[attr-defined]
    return tell


_GELU: dict[str, _Act] = {"none": ("gelu", 0.0, 0.0), "tanh": ("gelu_tanh", 0.0, 0.0)}

_FUNCTIONS: dict[Any, _Act] = {
    function: (name, 0.0, 0.0)
    for name in ("relu", "gelu", "silu", "mish", "selu", "hardswish", "sigmoid", "tanh")
    for home in (F, stock.functional, torch)
    for function in (getattr(home, name, None),)
    if function is not None
}

# ---- Rules --------------------------------------------------------------------------------------

Tell = Callable[[Any], Any]


def _itself(m) -> Any:
    return m


def _noise(m) -> tuple[float, bool] | None:
    # In place, PyTorch draws its mask in another way.
    return None if m.inplace and m.training else (m.p, m.training)


class Misfit(Stock):
    """Why a member does not fuse."""


# Of each convolution, what its `forward` calls: as we made it, and as PyTorch made it.
_CONV_FORWARD: dict[type, tuple[Any, Any]] = {
    cls: (cls._conv_forward, as_torch_made(STOCK[cls]._conv_forward))  # type: ignore[attr-defined]
    for cls in (conv.Conv1d, conv.Conv2d, conv.Conv3d)
}


def _convolution(m) -> Any:
    cls: Any = counts_as(m)
    ours, its = _CONV_FORWARD[cls]
    known = cls._conv_forward is ours and STOCK[cls]._conv_forward is its  # type: ignore
    if not known or "_conv_forward" in m.__dict__:
        return Misfit("hook", f"{cls.__name__}._conv_forward was replaced")
    if m.padding_mode != "zeros":
        return Misfit("fusion", f"{cls.__name__} has padding_mode={m.padding_mode!r}")
    return m


def _given(m) -> Any:
    name = type(m).__name__
    if m.training:
        return Misfit(
            "fusion", f"{name} is in training mode, and its statistics are those of the batch"
        )
    if m.running_mean is None or m.running_var is None:
        return Misfit("fusion", f"{name} has no running statistics")
    return m


def _bound(op: Any, **sources: str) -> Callable[[Any, Any], bool]:
    """`bound` for an op whose arguments have these sources, by default the input of the members."""
    return bound(op.op, "x, leader", sources or {op.op.names[0]: "x"})


class Place(NamedTuple):
    """One place in a rule, in which one member stands."""

    tells: Mapping[type, Tell]
    """Class of a member -> what the op is told of it. None or a `Misfit` if it does not fuse as it
    is set."""
    optional: bool = False
    """Whether the rule also holds where no such member follows. Only the last place may be."""


class Rule(NamedTuple):
    """Members that run as one op."""

    op: Callable[..., Any]
    places: tuple[Place, ...]
    arguments: Callable[..., tuple]
    """Of the input, of what is told of each member, and of what the container adds: the op's. A
    `Misfit` if they do not fuse for this input."""
    neighbours: bool = True
    """Whether each member takes what the one before returned, and nothing else."""
    small: Callable[[Any, Any], bool] = lambda x, leader: False
    """Of the input and the first member: whether the call is below the floor of the op. In `auto`
    PyTorch then runs it, as the members do by themselves."""
    is_below: Callable[[Any, Any], bool] = lambda x, leader: False
    """The same where nobody could notice the question, in a third of the time (`bound`)."""
    asks: bool = False
    """Whether in `auto` the members run by themselves where the gate declines the op, because some
    of them may then run on kernels."""


LINEAR = Place({Linear: _itself})
BATCH_NORM = Place(
    dict.fromkeys((batchnorm.BatchNorm1d, batchnorm.BatchNorm2d, batchnorm.BatchNorm3d), _itself)
)
GROUP_NORM = Place({GroupNorm: _itself})
LAYER_NORM = Place({LayerNorm: _itself})
RMS_NORM = Place({RMSNorm: _itself})
DROPOUT = Place({Dropout: _noise})
ACTIVATION = Place(
    {
        acts.ReLU: _always("relu"),
        acts.ReLU6: _hardtanh,
        acts.Hardtanh: _hardtanh,
        acts.LeakyReLU: lambda m: _sloped("leaky_relu", m.negative_slope, 0.0, m.inplace),
        acts.ELU: lambda m: _sloped("elu", m.alpha, 1.0, m.inplace),
        acts.SELU: _always("selu"),
        acts.GELU: lambda m: _GELU.get(m.approximate),
        acts.SiLU: _always("silu"),
        acts.Mish: _always("mish"),
        acts.Sigmoid: _always("sigmoid"),
        acts.Tanh: _always("tanh"),
        acts.Hardsigmoid: _always("hardsigmoid"),
        acts.Hardswish: _always("hardswish"),
        FunctionType: _FUNCTIONS.get,
        BuiltinFunctionType: _FUNCTIONS.get,
    }
)

CONVOLUTIONS = tuple(
    (Place({layer: _convolution}), Place({norm: _given}))
    for layer, norm in (
        (conv.Conv1d, batchnorm.BatchNorm1d),
        (conv.Conv2d, batchnorm.BatchNorm2d),
        (conv.Conv3d, batchnorm.BatchNorm3d),
    )
)


def _of_convolution(x, conv, norm, act=(None, 0.0, 0.0)) -> Any:
    if x.dim() != len(conv.kernel_size) + 2:
        return Misfit(
            "shape", f"an input of {x.dim()} dimensions is one sample, which has no batch to norm"
        )
    return (
        x, *weight_and_bias(conv),
        *attributes(norm, "running_mean", "running_var", "weight", "bias"), norm.eps, conv.stride,
        conv.padding, conv.dilation, conv.groups, *act,
    )  # fmt: skip


LINEAR_ACT = Rule(
    linear_act,
    (LINEAR, ACTIVATION, DROPOUT._replace(optional=True)),
    lambda x, linear, act, noise=(0.0, False): (
        x,
        *weight_and_bias(linear),
        *act,
        *noise,
    ),
    small=lambda x, linear: linear_act.small(  # type: ignore[attr-defined]
        x, getattr(linear, "_parameters", {}).get("weight")
    ),
    is_below=_bound(linear_act, input="x", weight="leader._parameters['weight']"),
)
DROPOUT_ADD = Rule(
    dropout_add,
    (DROPOUT,),
    lambda z, noise, residual: (z, residual, *noise),
    neighbours=False,
    small=lambda z, leader: dropout_add.small(z),  # type: ignore[attr-defined]
)
DROPOUT_ADD_LAYER_NORM = Rule(
    dropout_add_layer_norm,
    (DROPOUT, LAYER_NORM),
    lambda z, noise, norm, residual, prenorm: (
        z, residual, norm.normalized_shape, *weight_and_bias(norm), norm.eps, *noise,
        prenorm,
    ),
    neighbours=False,
    small=lambda z, leader: dropout_add_layer_norm.small(z),  # type: ignore[attr-defined]
)  # fmt: skip
DROPOUT_ADD_RMS_NORM = Rule(
    dropout_add_rms_norm,
    (DROPOUT, RMS_NORM),
    lambda z, noise, norm, residual, prenorm: (
        z, residual, norm.normalized_shape, *attributes(norm, "weight"), norm.eps, *noise, prenorm,
    ),
    neighbours=False,
    small=lambda z, leader: dropout_add_rms_norm.small(z),  # type: ignore[attr-defined]
)  # fmt: skip

RULES: tuple[Rule, ...] = (
    LINEAR_ACT,
    # The norm counts the batch where it says what it is given: only if the op runs.
    Rule(
        batch_norm_act,
        (BATCH_NORM, ACTIVATION),
        lambda x, norm, act: (*batchnorm.arguments(norm, x), *act),
        small=lambda x, leader: batch_norm_act.small(x),  # type: ignore[attr-defined]
        is_below=_bound(batch_norm_act),
    ),
    Rule(
        group_norm_act,
        (GROUP_NORM, ACTIVATION),
        lambda x, norm, act: (
            x,
            norm.num_groups,
            *weight_and_bias(norm),
            norm.eps,
            *act,
        ),
        small=lambda x, leader: group_norm_act.small(x),  # type: ignore[attr-defined]
        is_below=_bound(group_norm_act),
    ),
    # The floors of the two ops are equal: the first member asks for one of them.
    *(
        Rule(
            conv_batch_norm_act,
            (layer, norm, ACTIVATION._replace(optional=True)),
            _of_convolution,
            small=lambda x, leader: conv_batch_norm_act.small(x),  # type: ignore[attr-defined]
            is_below=_bound(conv_batch_norm_act),
            asks=True,
        )
        for layer, norm in CONVOLUTIONS
    ),
    *(
        Rule(
            conv_act,
            (layer, ACTIVATION),
            lambda x, conv, act: (
                x,
                *weight_and_bias(conv),
                conv.stride,
                conv.padding,
                conv.dilation,
                conv.groups,
                *act,
            ),
            small=lambda x, leader: conv_act.small(x),  # type: ignore[attr-defined]
            is_below=_bound(conv_act),
            asks=True,
        )
        for layer, _ in CONVOLUTIONS
    ),
    DROPOUT_ADD,
    DROPOUT_ADD_LAYER_NORM,
    DROPOUT_ADD_RMS_NORM,
)

# ---- The matcher --------------------------------------------------------------------------------


def told(place: Place, member: Any, cls: type, called: str = "") -> Any:
    """What an op is told of `member`, which stands in `place`; a `Misfit` where it does not fuse.

    `cls`: the class that it counts as. `called`: its name in the reason, by default its class.
    """
    if cls not in place.tells:
        return Misfit("fusion", f"{called} is a {type(member).__name__}")
    why = watched(member) if isinstance(member, stock.Module) else None
    return _set_up(place, member, cls, called) if why is None else Misfit("hook", why)


def _set_up(place: Place, member: Any, cls: type, called: str = "") -> Any:
    """What `told` returns of a member whose class the place takes, and that nobody watches."""
    what = place.tells[cls](member)
    if what is None:
        shown = getattr(member, "__name__", member)
        return Misfit("fusion", f"{called or type(member).__name__} is {shown}")
    return what


def counts_as(member: Any) -> type:
    """The class of a member of a Transformer layer: ours, also where it is the stock class, marked
    or not."""
    return OURS.get(type(member), type(member))


def fit(rule: Rule, members: tuple, called: tuple[str, ...]) -> list | None:
    """What the op of `rule` is told of each of `members`, one in each place; None if it cannot run.

    `called`: the names of the members, for the reason.
    """
    what = []
    for place, member, name in zip(rule.places, members, called, strict=True):
        one = told(place, member, counts_as(member), name)
        if type(one) is Misfit:
            note(rule, one)
            return None
        what.append(one)
    return what


def note(rule: Rule, misfit: Misfit) -> None:
    """Tell whoever asks that the op of `rule` was not called."""
    declined = Stock(misfit.code, f"not fused: {misfit.why}")
    _mode.note(rule.op.op, declined)  # type: ignore[attr-defined]


# PyTorch fills and empties these tables, and never puts others in their place.
_forward_hooks = _module._global_forward_hooks
_forward_pre_hooks = _module._global_forward_pre_hooks
_backward_hooks = _module._global_backward_hooks
_backward_pre_hooks = _module._global_backward_pre_hooks
_is_tracing = torch._C._is_tracing
_is_transforming = torch._C._are_functorch_transforms_active


def plainly() -> bool:
    """Whether the members must be called one by one: somebody looks on at all layers."""
    return bool(
        _forward_hooks
        or _forward_pre_hooks
        or _backward_hooks
        or _backward_pre_hooks
        or _is_tracing()
        or _is_transforming()
    )


# ---- Neighbours ---------------------------------------------------------------------------------


class Neighbours:
    """Members of exactly these classes that a rule takes.

    told: for each member its place in the rule, and the class that it counts as.
    least: how many members the rule needs. The last place may be optional.
    """

    __slots__ = ("_ready", "kinds", "least", "rule", "told")

    def __init__(self, rule: Rule, kinds: tuple[type, ...]):
        self.rule, self.kinds = rule, kinds
        classes = [OURS.get(kind, kind) for kind in kinds]
        self.told = tuple(zip(rule.places, classes, strict=False))
        self.least = len(rule.places) - rule.places[-1].optional
        self._ready: Callable[..., tuple | None] | None = None

    @property
    def ready(self) -> Callable[..., tuple | None]:
        """A function of the input, the members and the index of the first one: what its op is told.

        None if a member does not fuse, is watched, or is of a stock class without a mark. The
        function is generated, because a call of neighbours costs the host more than the calls of
        functions that this saves.
        """
        if self._ready is None:
            self._ready = self._generate()
        return self._ready

    def _generate(self) -> Callable[..., tuple | None]:
        given: dict[str, Any] = {"_misfit": Misfit, "_mark": MARK}
        given["_arguments"] = self.rule.arguments
        names = [f"m{i}" for i in range(len(self.kinds))]
        lines = [f"{name} = members[i + {i}]" for i, name in enumerate(names)]
        asked = unwatched(names, self.kinds, given)
        asked += [
            f"_dict_{name}.get({KEY!r}) is _mark"
            for name, kind in zip(names, self.kinds, strict=True)
            if kind not in STOCK
        ]
        lines += ["try:", f"    if not ({' and '.join(asked)}):", "        return None"]
        lines += ["except AttributeError:", "    return None"]
        told = []
        for i, ((place, cls), name) in enumerate(zip(self.told, names, strict=True)):
            tell: Any = place.tells[cls]
            given[f"_tell{i}"] = getattr(tell, "always", tell)
            if tell is _itself:
                told.append(name)
            elif hasattr(tell, "always"):
                told.append(f"_tell{i}")
            else:
                told.append(f"t{i}")
                lines += [f"t{i} = _tell{i}({name})", f"if t{i} is None or type(t{i}) is _misfit:"]
                lines += ["    return None"]
        lines += [f"found = _arguments(x, {', '.join(told)})"]
        lines += ["return None if type(found) is _misfit else found"]
        return generated("ready", ["x", "members", "i"], lines, given)


class Node:
    """Where a walk over the classes of members stands.

    leads, floor: of the node of a first member, the rule that it leads, and the floor of its op.
    ends: the neighbours, if they may end here. next: class of the next member -> the node there.
    """

    __slots__ = ("ends", "floor", "leads", "next")

    def __init__(self) -> None:
        self.leads: Any = None
        self.floor: Any = None
        self.ends: Neighbours | None = None
        self.next: dict[type, Node] = {}


def _tree() -> dict[type, Node]:
    """Class of a first member -> its node. Stock classes stand for marked layers.

    The tree has all that the rules take. So nothing is remembered of the members of a container,
    and their own classes are not kept alive.
    """
    twins = {ours: (ours, its) for its, ours in OURS.items()}
    root: dict[type, Node] = {}
    for rule in (r for r in RULES if r.neighbours):
        kinds: list[list[type]] = [
            [kind for cls in place.tells for kind in twins.get(cls, ())] for place in rule.places
        ]
        for n in range(len(kinds) - rule.places[-1].optional, len(kinds) + 1):
            for path in itertools.product(*kinds[:n]):
                node = root.setdefault(path[0], Node())
                node.leads, node.floor = rule, rule.op.op.floor  # type: ignore[attr-defined]
                for kind in path[1:]:
                    node = node.next.setdefault(kind, Node())
                node.ends = node.ends or Neighbours(rule, path)
    return root


LEADERS = _tree()


def leads(member: Any) -> Node | None:
    """The node of a member that leads neighbours, if it is ours or marked."""
    node = LEADERS.get(type(member))
    if node is not None and type(member) not in STOCK and not is_marked(member):
        return None
    return node


def run_neighbours(
    node: Node, members: list, i: int, input: Any, large: Rule | None = None
) -> tuple[int, Any]:
    """(index after the members that ran as one op, what it returned); (i, input) if none did.

    None do if the op would run PyTorch because of its size: the members do the same by themselves.
    node: that of the i-th member. large: a rule, if it is known that the call is not below the
    floor of its op.
    """
    found: Neighbours | None = None
    end, last = i + 1, len(members)
    while end < last and (after := node.next.get(type(members[end]))) is not None:
        node, end = after, end + 1
        found = node.ends or found
    if found is None:
        return i, input
    rule = found.rule
    op: Any = rule.op.op  # type: ignore[attr-defined]
    if not op.floor.known:  # if no call of the op has got as far as dispatch
        op.find_floor()
        large = None
    if rule is not large and rule.small(input, members[i]):
        return i, input
    arguments = found.ready(input, members, i)
    end = i + len(found.kinds)
    if arguments is None:
        end, arguments = _asked_one_by_one(found, members, i, input)
        if arguments is None:
            return i, input
    if rule.asks and _gate.answers() and (mode := _mode.current_mode()) != "triton":
        free = mode == "graph" or (bool(op.plans.graphed) and _mode.capturing())
        chosen = _gate.decide(op.name, op.policy, input.get_device(), arguments, {}, free)
        if isinstance(chosen, Stock):
            _mode.note(op, chosen)
            return i, input
    return end, rule.op(*arguments)


def _asked_one_by_one(
    found: Neighbours, members: list, i: int, input: Any
) -> tuple[int, tuple | None]:
    """(index after the members that run as one op, its arguments); (i, None) if none do."""
    rule = found.rule
    end = i + found.least
    if any(ours(m) is None for m in members[i:end]):
        return i, None
    what = []
    # How the members are set is cheap to ask, and often the answer: a norm in training mode.
    for (place, cls), member in zip(found.told, members[i:end], strict=False):
        one = _set_up(place, member, cls)
        if type(one) is Misfit:
            note(rule, one)
            return i, None
        what.append(one)
    why = watched(*members[i:end])
    if why is not None:
        note(rule, Misfit("hook", why))
        return i, None
    if len(found.kinds) > found.least and ours(members[end]) is not None:
        place, cls = found.told[-1]
        one = told(place, members[end], cls)
        if type(one) is not Misfit:
            what.append(one)
            end += 1
    arguments = rule.arguments(input, *what)
    if type(arguments) is Misfit:
        note(rule, arguments)
        return i, None
    return end, arguments
