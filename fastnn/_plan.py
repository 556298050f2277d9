"""Plans: what a call did, recorded once for its signature, and replayed by the next such calls.

Two calls of the same signature allocate the same tensors, launch the same kernels and keep the same
tensors for the backward. So the second call of a signature is recorded (`_record.py`): it runs as
always, while a recorder listens to the operators of PyTorch and to the launches. The following
calls run the plan (`_runner.py`), behind one guard on everything that could make them differ.

This file says what a plan consists of. A plan knows nothing of single ops.
"""

from __future__ import annotations

import math
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

UNFIT = object()  # what a plan's function returns for a call that does not fit


class NotReplayable(Exception):
    """Why a call cannot be replayed, or not by the C++ runner."""


class DoesNotFit(Exception):
    """Ends the forward of a node whose tensors do not fit its plan. Nothing has happened yet."""


class Slot(NamedTuple):
    """A tensor of a plan: the given tensors come first, then those that the steps make."""

    number: int


class Pointer(NamedTuple):
    """The address that lies `offset` bytes behind the first element of a slot."""

    slot: int
    offset: int


class Allocate(NamedTuple):
    """Make an uninitialised tensor."""

    slot: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class CallStep(NamedTuple):
    """Call an operator of PyTorch. `args` and `kwargs` hold a `Slot` for each tensor."""

    function: Any
    args: tuple
    kwargs: dict
    results: tuple[int | None, ...]  # slots, in the order of the leaves of what it returns


class DrawStep(NamedTuple):
    """Reserve random numbers, as `_rng.numbers` does."""

    device: int
    launch: Any  # _rng.LaunchGeometry


class Drawn(NamedTuple):
    """One of the numbers that the `DrawStep`s reserved: seed, offset, and so on for the next."""

    number: int


class LaunchStep(NamedTuple):
    """Launch a kernel. `args` holds a `Pointer` for each tensor, and a `Drawn` for each number."""

    kernel: Any  # kernels._launch.Kernel
    grid: tuple[int, ...]
    args: tuple
    meta: dict
    compiled: Any  # what Triton compiled, and the constants of its launcher; None if interpreted


class Program(NamedTuple):
    """The steps of one pass. `results` and `saved` are slots, or None.

    given: how many tensors it is given.
    lasting: slots of tensors that exist as long as the process.
    draws: whether it needs random numbers.
    whole: "forward" or "backward" if it is a pass of a whole graph. Then autograd sees none of its
        operators, and each tensor that it makes, or gets for the backward, is let go after its last
        use.
    """

    given: int
    device: torch.device
    lasting: dict[int, Tensor]
    draws: bool
    steps: tuple
    results: tuple[int | None, ...]
    saved: tuple[int | None, ...]
    whole: str = ""


def reads(step) -> set[int]:
    """The slots that a step reads."""
    if isinstance(step, LaunchStep):
        return {a.slot for a in step.args if isinstance(a, Pointer)}
    if isinstance(step, CallStep):
        leaves = tree_leaves((step.args, step.kwargs), is_leaf=lambda v: isinstance(v, Slot))
        return {leaf.number for leaf in leaves if isinstance(leaf, Slot)}
    return set()


def same(a: Any, b: Any) -> bool:
    """Whether two arguments that are not tensors are the same: equal, and of the same classes."""
    if a is b:
        return type(a) is not list
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if a == b == 0 and type(a) is float:
        return math.copysign(1, a) == math.copysign(1, b)
    return a == b


def questions(settings: Any) -> tuple:
    """The functions whose answers decide what `settings()` returns; by default itself.

    Settings may name them as their attribute `questions`, where that is cheaper to ask.
    """
    if settings is None:
        return ()
    return getattr(settings, "questions", (settings,))


def nests(value: Any) -> bool:
    """Whether `value` is a tuple or a list that holds a tensor, at any depth."""
    if type(value) is not tuple and type(value) is not list:
        return False
    return any(isinstance(v, Tensor) or nests(v) for v in value)


def flat(values: Any) -> list:
    """`values`, with the elements of a tuple or a list that holds tensors in its place."""
    found: list = []
    for value in values:
        if nests(value):
            found += flat(value)
        else:
            found.append(value)
    return found


def makes(step) -> set[int]:
    """The slots that a step makes, or makes anew."""
    if isinstance(step, Allocate):
        return {step.slot}
    return {r for r in step.results if r is not None} if isinstance(step, CallStep) else set()


def last_uses(program: Program) -> list[tuple[int, ...]]:
    """For each step of a whole pass, the slots that nobody needs after it."""
    kept = {*program.results, *program.saved, *program.lasting}
    if program.whole == "forward":
        kept |= {*range(program.given)}
    found: list[tuple[int, ...]] = []
    for step in reversed(program.steps):
        used = reads(step) | makes(step)
        found.append(tuple(sorted(used - kept)))
        kept |= used
    return found[::-1]


# ---- What op files tell a recorder --------------------------------------------------------------


class _Active(threading.local):
    recorder: Any = None  # a `_record.Recorder`


active = _Active()  # `active.recorder` listens to the calls of this thread


def impossible(why: str) -> None:
    """Tell a listening recorder that the call cannot be a plan. For effects that it cannot see."""
    if active.recorder is not None:
        active.recorder.refuse(why)


def reads_setting() -> None:
    """Tell a listening recorder that the call depends on a setting of PyTorch.

    The record of the op must name it (`Op.settings`); else the call cannot be a plan.
    """
    if active.recorder is not None:
        active.recorder.log.reads_setting = True
