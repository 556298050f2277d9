"""Which members of a container run as one op, and what that op is told of them.

`RULES` is the one table, `told` the one matcher: `Sequential` and the Transformer layers go by
them. A new fusion is one more rule. Members are fused only where nothing could tell: each is
exactly of a class of the table, or marked and of its stock class, and nobody watches it (`watched`
of `_layer.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn as stock
from torch.nn.modules import module as _module

import fastnn.functional as F
from fastnn import _gate, _mode
from fastnn._mode import Stock
from fastnn.layers import activation as acts
from fastnn.layers import batchnorm, conv
from fastnn.layers._layer import (
    OURS,
    STOCK,
    as_torch_made,
    attributes,
    unwatched,
    watched,
    weight_and_bias,
)
from fastnn.layers._marks import KEY, MARK
from fastnn.layers.dropout import Dropout
from fastnn.layers.linear import Linear
from fastnn.layers.normalization import GroupNorm, LayerNorm, RMSNorm
from fastnn.ops.channel_norm import batch_norm_act, group_norm_act
from fastnn.ops.conv import conv_act, conv_batch_norm_act
from fastnn.ops.linear import linear_act
from fastnn.ops.residual_norm import dropout_add, dropout_add_layer_norm, dropout_add_rms_norm

# ---- What an op is told of an activation: its name there, a and b -------------------------------

_Act = tuple[str, float, float]


def _hardtanh(m) -> _Act | None:
    low, high = m.min_val, m.max_val
    numbers = type(low) in (int, float) and type(high) in (int, float)
    return ("hardtanh", float(low), float(high)) if numbers and low <= high else None


def _sloped(name: str, a, b: float, inplace: bool) -> _Act | None:
    # In place, PyTorch's backward refuses a negative slope.
    return (name, float(a), b) if type(a) in (int, float) and not (inplace and a < 0) else None


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
    ),
    # The floors of the two ops are equal: the first member asks for one of them.
    *(
        Rule(
            conv_batch_norm_act,
            (layer, norm, ACTIVATION._replace(optional=True)),
            _of_convolution,
            small=lambda x, leader: conv_batch_norm_act.small(x),  # type: ignore[attr-defined]
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
            asks=True,
        )
        for layer, _ in CONVOLUTIONS
    ),
    DROPOUT_ADD,
    DROPOUT_ADD_LAYER_NORM,
    DROPOUT_ADD_RMS_NORM,
)

# The class of a member that leads neighbours -> the rule for them.
LEADERS = {cls: rule for rule in RULES if rule.neighbours for cls in rule.places[0].tells}
_MARKED_LEADERS = {its: LEADERS[cls] for its, cls in OURS.items() if cls in LEADERS}


def _by_class(member: Any, of_ours: Mapping[type, Any], of_marked: Mapping[type, Any]) -> Any:
    """The entry of a member's class: of our classes, or of the stock classes if it is marked."""
    cls = type(member)
    found = of_ours.get(cls)
    if found is None:
        found = of_marked.get(cls)
        if found is not None and member.__dict__.get(KEY) is not MARK:
            return None
    return found


def leads(member: Any) -> Rule | None:
    """The rule for neighbours which the member leads, if it is ours or marked."""
    return _by_class(member, LEADERS, _MARKED_LEADERS)


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


def plainly() -> bool:
    """Whether the members must be called one by one: somebody looks on at all layers."""
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
        or torch._C._get_tracing_state()
        or torch._C._are_functorch_transforms_active()
    )


# ---- Neighbours ---------------------------------------------------------------------------------


class Group(NamedTuple):
    """Neighbours that a rule takes, by their classes."""

    rule: Rule
    places: tuple[tuple[Place, type], ...]  # of those that must be there, with their classes
    more: tuple[Place, type] | None  # of the one that may be there, and is
    # the classes of the members -> what `_ready` made for them
    ready: dict[tuple[type, ...], Callable[..., tuple | None]]


# Class of a member that some rule for neighbours takes -> itself.
_TAKEN: dict[type, type] = {
    cls: cls
    for rule in RULES
    if rule.neighbours
    for place in rule.places
    for cls in place.tells
    if issubclass(cls, stock.Module)
}

_MOST = 1024  # sequences of classes remembered

_TAKEN_MARKED = {its: cls for its, cls in OURS.items() if cls in _TAKEN}


def _taken(member: Any) -> type | None:
    """The class of ours that a member counts as, if some rule for neighbours takes it."""
    return _by_class(member, _TAKEN, _TAKEN_MARKED)


# What `grouped` found. By the classes of the members alone, and of these only ours: there is
# nothing in it that could go stale, or that it would keep alive.
_found: dict[tuple[type | None, ...], tuple[Group | None, ...] | None] = {}


# The same, by the classes of members that are all ours: no mark has to be looked for.
_found_of_ours: dict[tuple[type, ...], Any] = {}


def _group(rule: Rule, classes: tuple[type | None, ...]) -> Group | None:
    """The members at the beginning of `classes` that `rule` takes."""
    if not rule.neighbours:
        return None
    taken: list[Any] = []
    for place, cls in zip(rule.places, (*classes, *(None,) * len(rule.places)), strict=False):
        if cls not in place.tells:
            return Group(rule, tuple(taken), None, {}) if place.optional else None
        assert cls is not None
        if place.optional:
            return Group(rule, tuple(taken), (place, cls), {})
        taken.append((place, cls))
    return Group(rule, tuple(taken), None, {})


def _group_all(classes: tuple[type | None, ...]) -> tuple[Group | None, ...] | None:
    groups = tuple(
        next(
            (
                g
                for rule in RULES
                if (g := _group(rule, classes[i : i + len(rule.places)])) is not None
            ),
            None,
        )
        for i in range(len(classes))
    )
    return groups if any(groups) else None


def grouped(members: list) -> tuple[Group | None, ...] | None:
    """For each member, the group that begins with it; None if there is no group at all."""
    kinds = tuple(map(type, members))
    known = _found_of_ours.get(kinds, False)
    if known is not False:
        return known
    classes = tuple(map(_taken, members))
    try:
        groups = _found[classes]
    except KeyError:
        if len(_found) >= _MOST:
            _found.clear()
        groups = _found.setdefault(classes, _group_all(classes))
    if all(kind in STOCK for kind in kinds):
        if len(_found_of_ours) >= _MOST:
            _found_of_ours.clear()
        _found_of_ours[kinds] = groups
    return groups


def _ready(group: Group, kinds: tuple[type, ...]) -> Callable[..., tuple | None]:
    """A function of the input and all members of a group: the arguments of its op.

    None if a member does not fuse or is watched: `run_neighbours` then asks one by one, and says
    why. It is generated, because a call of a group costs the host more than the calls of functions
    that this saves.

    kinds: the classes of the members.
    """
    given: dict[str, Any] = {"_unwatched": unwatched(*kinds), "_misfit": Misfit}
    given["_arguments"] = group.rule.arguments
    names = [f"m{i}" for i in range(len(kinds))]
    told = []
    lines = [f"if not _unwatched({', '.join(names)}):", "    return None"]
    places = [*group.places, *([group.more] if group.more else [])]
    for i, ((place, cls), name) in enumerate(zip(places, names, strict=True)):
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
    body = "\n        ".join(lines)
    source = (
        f"def make({', '.join(given)}):\n    def ready(x, {', '.join(names)}):\n        {body}\n"
        "    return ready\n"
    )
    scope: dict = {}
    exec(source, {}, scope)
    return scope["make"](**given)


def run_neighbours(
    group: Group, members: list, i: int, input: Any, large: bool = False
) -> tuple[int, Any]:
    """(index after the members that ran as one op, what it returned); (i, input) if none did.

    None do if the op would run PyTorch because of its size: the members do the same by themselves.
    large: it is known that the call is not below the floor of the op.
    """
    rule, places, more, ready = group
    op: Any = rule.op.op  # type: ignore[attr-defined]
    if not op.floor.known:  # if no call of the op has got as far as dispatch
        op.find_floor()
        large = False
    if not large and rule.small(input, members[i]):
        return i, input
    end = i + len(places)
    last = end if more is None else end + 1
    taken = members[i:last]
    kinds = tuple(map(type, taken))
    if kinds not in ready:
        if len(ready) >= _MOST:
            ready.clear()
        ready[kinds] = _ready(group, kinds)
    arguments = ready[kinds](input, *taken)
    if arguments is not None:
        end = last
    else:
        end, arguments = _asked_one_by_one(group, members, i, input)
        if arguments is None:
            return i, input
    if rule.asks and _gate.answers() and (mode := _mode.current_mode()) != "triton":
        free = mode == "graph" or (bool(op.plans.graphed) and _mode.capturing())
        chosen = _gate.decide(op.name, op.policy, input.get_device(), arguments, {}, free)
        if isinstance(chosen, Stock):
            _mode.note(op, chosen)
            return i, input
    return end, rule.op(*arguments)


def _asked_one_by_one(group: Group, members: list, i: int, input: Any) -> tuple[int, tuple | None]:
    """(index after the members that run as one op, its arguments); (i, None) if none do."""
    rule = group.rule
    end = i + len(group.places)
    what = []
    # How the members are set is cheap to ask, and often the answer: a norm in training mode.
    for (place, cls), member in zip(group.places, members[i:end], strict=True):
        one = _set_up(place, member, cls)
        if type(one) is Misfit:
            note(rule, one)
            return i, None
        what.append(one)
    why = watched(*members[i:end])
    if why is not None:
        note(rule, Misfit("hook", why))
        return i, None
    if group.more is not None:
        one = told(group.more[0], members[end], group.more[1])
        if type(one) is not Misfit:
            what.append(one)
            end += 1
    arguments = rule.arguments(input, *what)
    if type(arguments) is Misfit:
        note(rule, arguments)
        return i, None
    return end, arguments
