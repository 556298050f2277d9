"""Plans of whole graphs: what a compiled graph did, replayed by the next such calls.

The call of a graph whose sizes are fixed always runs the same operators and the same kernels, and
so does its backward. Both are recorded once, on copies of the inputs: they run as always, while a
log listens to what they do below autograd. The following calls replay it, with one node of autograd
for the graph.

Before that, hooks on the results of a call tell which of them get gradients.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastnn import _mode, _record, _runner
from fastnn._batches import one_by_one
from fastnn._compiler._calls import value
from fastnn._plan import (
    UNFIT,
    Allocate,
    CallStep,
    Drawn,
    DrawStep,
    LaunchStep,
    NotReplayable,
    Pointer,
    Program,
    Slot,
    active,
    makes,
    reads,
)
from fastnn._shards import last_hooks
from fastnn._strides import in_layout

aten = torch.ops.aten

_MOST = 4  # plans kept per graph and mode of autograd
_TRIES = 64  # calls that are watched in vain before a graph is left alone
_CHANGES = 2  # times that a plan is made anew because other results get gradients
_CHEAP = 2**20  # bytes of inputs that a node may keep only for the long way, or that are copied
_NO_CASTS = (None, None)
_OF_OFFSETS = aten.as_strided, aten.as_strided_, aten.as_strided_copy, aten.as_strided_scatter


# ---- The log ------------------------------------------------------------------------------------


class _GraphLog(_record.CallLog):
    """Listens to a forward and a backward.

    Autograd unpacks what it saved as new tensors. They are known by the memory that they show.
    """

    def __init__(self, given: tuple[Tensor, ...], copied: set[int]):
        self.shown: dict[tuple, int] = {}  # what memory a tensor shows -> slot
        self.homes: list[int] = []  # slot -> storage
        self.metas: list[tuple] = []  # slot -> size, stride, offset, dtype
        self.storages: dict[int, StorageWeakRef] = {}  # they keep the numbers of storages unique
        self.pairs: list[tuple[int, int]] = []  # what was drawn
        self.takes_from_generators = False  # whether an operator of PyTorch draws
        self.shared = {t.untyped_storage()._cdata for i, t in enumerate(given) if i not in copied}
        self.written: set[int] = set()  # storages into which operators may write
        self.counted: set[int] = set()  # those of which versions count
        super().__init__(given)

    def _look(self, t: Tensor) -> tuple:
        size, stride = tuple(t.shape), t.stride()
        return t.untyped_storage()._cdata, size, stride, t.storage_offset(), t.dtype

    def new(self, t: Tensor) -> int:
        if t.is_complex() or t.is_neg():
            self.refuse("a complex tensor")  # or a part of one: views may negate what they show
        slot = super().new(t)
        storage = t.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages[storage._cdata] = StorageWeakRef(storage)
        self.homes.append(storage._cdata)
        self.metas.append((tuple(t.shape), t.stride(), t.storage_offset(), t.dtype))
        self.shown[self._look(t)] = slot
        return slot

    def slot(self, t: Tensor) -> int:
        slot = self.slots.get(t._cdata)
        if slot is None and t.layout is torch.strided:
            slot = self.shown.get(self._look(t))
        if slot is None:
            raise NotReplayable("a tensor comes from elsewhere")
        return slot

    def result(self, leaf, function) -> int | None:
        if isinstance(leaf, (int, float, bool)):
            return None  # it follows from the sizes; who uses it is logged with its value
        found = super().result(leaf, function)
        if found is not None and self._look(leaf) != (self.homes[found], *self.metas[found]):
            raise NotReplayable(f"{function} gives a tensor other memory, sizes or strides")
        return found

    def before(self, function, args, kwargs) -> None:
        """Raise before an operator writes into an input of which there is no copy."""
        schema = function._schema
        if torch.Tag.nondeterministic_seeded in function.tags and not self.paused:
            # The choice of an attention has the tag, and draws nothing.
            asked = function is aten._fused_sdp_choice.default
            asked |= any(isinstance(t, Tensor) and t.is_meta for t in args)  # about shapes
            self.takes_from_generators |= not asked
        if torch.Tag.inplace_view in function.tags:
            raise NotReplayable(f"{function} gives a tensor other sizes or strides")
        if function.overloadpacket in _OF_OFFSETS:
            if args[0].untyped_storage()._cdata in self.homes[: len(self.given)]:
                raise NotReplayable(f"{function} depends on where the memory of an input begins")
        named = dict(zip([a.name for a in schema.arguments], args, strict=False)) | kwargs
        for name in ("running_mean", "running_var"):  # batch norms of PyTorch do not say so
            if isinstance(t := named.get(name), Tensor):
                self.written.add(t.untyped_storage()._cdata)
        if not schema.is_mutable and self.shared.isdisjoint(self.written):
            return
        for argument in schema.arguments:
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for t in tree_leaves(named.get(argument.name)):
                if isinstance(t, Tensor):
                    self.written.add(t.untyped_storage()._cdata)
                    self.counted.add(t.untyped_storage()._cdata)
        if not self.shared.isdisjoint(self.written):
            raise NotReplayable("an input is written that is not copied")

    def draws_itself(self, function) -> None:
        """It is replayed as it is; `before` has seen it."""

    def drew(self, device: int, launch: Any, draw: Any) -> None:
        if isinstance(draw, str) or draw.scratch is None:
            self.refuse("random numbers under graph capture")
        else:
            self.pairs.append((draw.seed, draw.offset))
            self.steps.append(DrawStep(device, launch))

    def launched(self, kernel, grid, args, meta) -> None:
        named = dict(zip(kernel.parameters, args, strict=False))
        pair = tuple([named.get(name) for name in _record.DRAWN])
        self.drawn = pair if pair in self.pairs else None  # type: ignore[assignment]
        if self.drawn is None and any(pair):
            self.refuse("a kernel draws other random numbers than were reserved")
        super().launched(kernel, grid, args, meta)

    def argument(self, value, name: str):
        found = super().argument(value, name)
        if isinstance(found, Drawn):
            assert self.drawn is not None
            return Drawn(2 * self.pairs.index(self.drawn) + found.number)
        return found


class _Listening:
    """Stands for a recorder while a log listens to a whole graph: each op runs as always."""

    asks = False

    def __init__(self, log: _GraphLog):
        self.log = log

    def run(self, function, args):
        return None

    def refuse(self, why: str) -> None:
        self.log.refuse(why)


@contextmanager
def _heard(log: _GraphLog) -> Iterator[None]:
    active.recorder = _Listening(log)
    try:
        with _record.listening(log):
            yield
    finally:
        active.recorder = None


# ---- Programs of a log --------------------------------------------------------------------------


def _renumbered(value: Any, to: dict[int, int]) -> Any:
    """A step, or an argument of one, whose slots have other numbers."""
    if isinstance(value, Slot):
        return Slot(to[value.number])
    if isinstance(value, Pointer):
        return Pointer(to[value.slot], value.offset)
    if isinstance(value, Allocate):
        return value._replace(slot=to[value.slot])
    if isinstance(value, LaunchStep):
        return value._replace(args=_renumbered(value.args, to))
    if isinstance(value, CallStep):
        return value._replace(
            args=_renumbered(value.args, to),
            kwargs={k: _renumbered(v, to) for k, v in value.kwargs.items()},
            results=tuple([None if r is None else to[r] for r in value.results]),
        )
    if type(value) in (tuple, list):
        return type(value)([_renumbered(v, to) for v in value])
    return value


def _canonical(log: _GraphLog) -> dict[int, int]:
    """Slot -> the first slot that shows the same memory in the same way."""
    first: dict[tuple, int] = {}
    return {
        slot: first.setdefault((home, meta), slot)
        for slot, (home, meta) in enumerate(zip(log.homes, log.metas, strict=True))
    }


def _without_copies(steps: list, to: dict[int, int]) -> list:
    """The steps by the slots of `_canonical`, without views that exist already."""
    found = []
    for step in steps:
        if isinstance(step, CallStep) and not step.function._schema.is_mutable:
            made = makes(step)
            if made and all(to[slot] != slot for slot in made):
                continue
        found.append(_renumbered(step, to))
    return found


def _needed(log: _GraphLog, steps: list, wanted: set[int]) -> tuple:
    """The steps without allocations and views that nobody uses.

    Other operators stay, because some write or draw without saying so, as batch norms do.
    """
    kept: list = []
    for step in reversed(steps):
        made = makes(step)
        if isinstance(step, Allocate):
            needed = step.slot in wanted
        elif isinstance(step, CallStep) and made and not step.function._schema.is_mutable:
            homes = {log.homes[slot] for slot in reads(step)}
            is_view = all(log.homes[slot] in homes for slot in made)
            needed = not is_view or bool(made & wanted)
        else:
            needed = True
        if needed:
            kept.append(step)
            wanted = wanted | reads(step)
    return tuple(reversed(kept))


class _Views:
    """How a backward gets a tensor that shares memory with an input or a result of its graph.

    The node saves the input or the result itself, so that autograd notices who writes into it. The
    backward makes the view again.
    """

    def __init__(self, log: _GraphLog, forward: list, results: tuple[int, ...]):
        self.log = log
        self.made_by = {slot: step for step in forward for slot in makes(step)}
        self.whole = {*range(len(log.given)), *log.constants}
        self.homes = {log.homes[s] for s in self.whole}
        self.results = {log.homes[s]: s for s in results}
        self.steps: list = []
        self.known: set[int] = {*self.whole, *results}

    def save(self, slot: int) -> int:
        """The slot to save for `slot`."""
        log = self.log
        if slot in self.known:
            return slot
        if (root := self.results.get(log.homes[slot])) is not None:
            size, stride, offset, dtype = log.metas[slot]
            if dtype != log.metas[root][3]:
                raise NotReplayable("a result is seen in another dtype")
            args = (Slot(root), list(size), list(stride), offset)
            self.steps.append(CallStep(aten.as_strided.default, args, {}, (slot,)))
            self.known.add(slot)
            return root
        if log.homes[slot] not in self.homes:
            return slot
        step = self.made_by[slot]
        used = tuple(reads(step))
        if not isinstance(step, CallStep) or len(used) != 1 or step.function._schema.is_mutable:
            raise NotReplayable("a tensor shares memory with an input")
        root = self.save(used[0])
        self.steps.append(step)
        self.known.add(slot)
        return root


def _backward_program(
    log: _GraphLog, forward: list, steps: list, outs: tuple[int, ...], grads: tuple[int, ...],
    wanted: tuple[int | None, ...],
) -> tuple[Program, tuple[int, ...]]:  # fmt: skip
    """(the program of a backward, the slots of the forward that it gets after the gradients)."""
    found = _needed(log, steps, {w for w in wanted if w is not None})
    made = {*grads}.union(*map(makes, found))
    used = {w for w in wanted if w is not None}.union(*map(reads, found))
    views = _Views(log, forward, outs)
    saved: list[int] = []
    for slot in sorted(used - made):
        root = views.save(slot)
        if root not in saved and root not in log.constants:
            saved.append(root)
    found = (*views.steps, *found)
    to: dict[int, int] = {}
    for slot in (*grads, *saved, *sorted(used | made | views.known)):
        to.setdefault(slot, len(to))
    lasting = {to[s]: t for s, t in log.constants.items() if s in used | views.known}
    results = tuple([None if w is None else to[w] for w in wanted])
    program = Program(
        len(grads) + len(saved), log.device, lasting, bool(log.pairs), _renumbered(found, to),
        results, (), "backward",
    )  # fmt: skip
    return program, tuple(saved)


# ---- The plan -----------------------------------------------------------------------------------


class _Record(NamedTuple):
    """What `_runner` asks of the record of an op."""

    settings: Callable[[], Any] | None


class GraphPlan(_record.Plan):
    """How to run a graph, both ways."""

    __slots__ = (
        "around", "casts", "exact", "forward", "grads", "keeps", "learn", "record", "written",
    )  # fmt: skip

    around: Callable  # makes the context in which the graph ran: autocast, and the mode
    casts: tuple[torch.dtype | None, ...]  # of autocast in the backward
    exact: Callable  # its backward, without a guard
    forward: Callable  # the graph
    grads: tuple[tuple | None, ...]  # the strides of the gradients of the results
    keeps: bool  # whether nodes keep the inputs, for the long way
    learn: Callable  # is told the gradients, if other results have some
    written: tuple[int, ...]  # inputs whose versions count up after the node has saved tensors
    record: _Record

    def slow(self, drawn: tuple | None, grads: tuple, saved: tuple, kept: tuple = ()) -> tuple:
        def backward(_, *of_one: Tensor | None) -> tuple:
            return self._slow(drawn, of_one, saved, kept)

        return one_by_one(backward)(None, *grads)

    def _slow(self, drawn: tuple | None, grads: tuple, saved: tuple, kept: tuple) -> tuple:
        pattern = tuple([g is not None for g in grads])
        if not any(pattern):
            return (None,) * len(self.places)
        same = pattern == tuple([g is not None for g in self.grads])
        replayable = same and not torch.is_grad_enabled()
        sparse = any(g is not None and g.layout is not torch.strided for g in grads)
        if sparse and not kept:
            return self._slow(
                drawn, tuple([g if g is None else g.to_dense() for g in grads]), saved, kept
            )
        # Without autocast the gradients are the more exact ones, if only these can be had.
        if replayable and not sparse and (_runner.casts() == self.casts or not kept):
            return self._replayed(drawn, grads, saved)
        if kept:
            if not same and not sparse:
                self.learn(grads)
            return self.run_again(drawn, grads, kept)
        if not same:
            asked = "other results of a compiled graph get gradients than before"
        else:
            asked = "the backward of a compiled graph is differentiated"
        raise RuntimeError(
            f"fastnn: {asked}. So its forward would have to run again, which it cannot: the graph "
            "writes into an input, draws random numbers with an operator of PyTorch, or an input "
            "was too large to keep or has been changed. Without the option replay this works."
        )

    def go_back(self, ctx, grads: tuple, saved: tuple) -> tuple:
        kept = getattr(ctx, "kept", ())
        if kept and ctx.version != sum(t._version for t in kept):
            kept = ()
        return self.slow(ctx.drawn, grads, saved, kept)

    def _replayed(self, drawn: tuple | None, grads: tuple, saved: tuple) -> tuple:
        """The gradients, for gradients and saved tensors that do not fit the guard as they are."""
        given = []
        wanted = [m for m in (*self.grads, *self.layouts) if m is not None]
        tensors = [t for t in (*grads, *saved) if t is not None]
        for t, strides in zip(tensors, wanted, strict=True):
            t = in_layout(t.detach().resolve_neg(), strides)
            given.append(t if t is None or t.data_ptr() % 16 == 0 else t.clone())
        with torch.no_grad():
            return self.exact(drawn, *given)

    def run_again(self, drawn: tuple | None, grads: tuple, kept: tuple) -> tuple:
        """The gradients, by the graph with a graph of autograd, with the same random numbers."""
        again = _Again(drawn or ())
        create = torch.is_grad_enabled()
        active.recorder, before = again, active.recorder
        # Not the inputs themselves: one of them may be computed from another.
        inputs = list(kept)
        at = [i for i, t in enumerate(kept) if t.requires_grad]
        try:
            with torch.enable_grad(), self.around(), _Unplanned():
                for i in at:
                    t = kept[i]
                    inputs[i] = t.view_as(t) if create else t.detach().requires_grad_()
                outs = self.forward(*inputs)
        finally:
            active.recorder = before
        if again.left():
            raise RuntimeError(
                "fastnn: a compiled graph would draw other random numbers in its backward than in "
                "its forward. Without the option replay this works."
            )
        pairs = [(o, g) for o, g in zip(outs, grads, strict=True) if g is not None]
        found = torch.autograd.grad(
            [o for o, _ in pairs], [inputs[i] for i in at], [g for _, g in pairs],
            create_graph=create, allow_unused=True,
        )  # fmt: skip
        results: list = [None] * len(kept)
        for i, g in zip(at, found, strict=True):
            results[i] = g
        return tuple(results)


class _Unplanned(TorchDispatchMode):
    """Inside the block no op replays a plan, which would draw random numbers of its own."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class _Again:
    """Stands for a recorder where a graph runs a second time: draws give what they gave before."""

    asks = True
    reads_setting = False

    def __init__(self, drawn: tuple):
        self.log = self
        self.drawn = drawn

    def numbers(self) -> tuple[int, int]:
        if not self.drawn:
            raise RuntimeError("fastnn: a compiled graph draws more random numbers than before")
        seed, offset, *rest = self.drawn
        self.drawn = tuple(rest)
        return seed, offset

    def left(self) -> bool:
        return bool(self.drawn)

    def run(self, function, args):
        return None

    def refuse(self, why: str) -> None:
        pass

    def lasting(self, *tensors: Tensor) -> None:
        pass


# ---- Recording ----------------------------------------------------------------------------------


def _copies(
    args: tuple[Tensor, ...], statistics: frozenset[int]
) -> tuple[tuple[Tensor, ...], set[int]]:
    """(tensors of the same values, the places of those that are copies; the others are aliases).

    Norms write their statistics without saying so. These are copied, and so are all small inputs
    that require no gradient.
    """
    found, copied = [], set()
    for i, t in enumerate(args):
        large = i not in statistics and t.numel() * t.element_size() > _CHEAP
        if t.requires_grad or large:
            with torch._C._AutoDispatchBelowADInplaceOrView():
                alias = t.detach()
            found.append(alias.requires_grad_(t.requires_grad))
        else:
            like = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
            found.append(like.copy_(t))
            copied.add(i)
    return tuple(found), copied


def _settings(records: list) -> Callable[[], Any] | None:
    asks = [r.settings for r in records if r.settings is not None]
    unique = [*dict.fromkeys(asks)]
    return (lambda: tuple([ask() for ask in unique])) if unique else None


class _Generator:
    """The generator of a device is after the block as it was before, if `log` heard draws."""

    log: _GraphLog | None = None

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> _Generator:
        on_cpu = self.device.type == "cpu"
        self.state = torch.get_rng_state() if on_cpu else torch.cuda.get_rng_state(self.device)
        return self

    def __exit__(self, *exc) -> None:
        if self.log is None or not (self.log.pairs or self.log.takes_from_generators):
            return  # another thread may have drawn
        if self.device.type == "cpu":
            torch.set_rng_state(self.state)
        else:
            torch.cuda.set_rng_state(self.state, self.device)


@contextmanager
def _uncast() -> Iterator[None]:
    """No autocast inside the block, as where a backward usually runs."""
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        yield


def _around() -> Callable:
    """Makes a context with the autocast and the mode of now."""
    mode: Any = _mode.current_mode()
    casts = [
        (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        for kind in ("cuda", "cpu")
    ]

    @contextmanager
    def again() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if _mode.current_mode() != mode:
                stack.enter_context(_mode.rehearsal() if mode == "graph" else _mode.backend(mode))
            for kind, dtype, on in casts:
                stack.enter_context(torch.autocast(kind, dtype if on else None, enabled=on))
            yield

    return again


def _state() -> tuple:
    return torch.is_grad_enabled(), *_runner.casts()


def _record_graph(
    forward: Callable, args: tuple[Tensor, ...], strides: list[tuple | None] | None, records: list,
    known: Known, around: Callable, learn: Callable,
) -> Callable:  # fmt: skip
    """A function that replays `forward` for such inputs. Raises NotReplayable if there is none.

    strides: of the gradients of the results; None for results that get none. None: autograd follows
    nothing. around: makes the context of the backward. learn: is told gradients of other results.
    """
    with _Generator(args[0].device) as drawn_by:
        inner, copied = _copies(args, known.statistics)
        log = drawn_by.log = _GraphLog(inner, copied)
        log.lasting(*known.constants)
        before = _state()
        with _heard(log):
            outs = forward(*inner)
        if _state() != before:
            raise NotReplayable("the graph leaves another mode")
        mutated = tuple([i for i in range(len(inner)) if log.homes[i] in log.counted])
        # Kernels and some operators write without saying so. They count no version, either.
        writes = bool(mutated) or bool(known.statistics)
        writes |= not all(torch.equal(inner[i], args[i]) for i in copied)
        many = type(outs)
        if many not in (tuple, list) or not all(isinstance(o, Tensor) for o in outs) or not outs:
            raise NotReplayable("a result is no tensor")
        outs = tuple(outs)
        if log.why is not None:
            raise NotReplayable(log.why)
        middle = len(log.steps)
        results = tuple([log.slot(o) for o in outs])
        homes = [log.homes[s] for s in (*range(len(args)), *results)]
        lasting = {log.homes[s] for s in log.constants}
        if len({*homes}) < len(homes) or not lasting.isdisjoint(homes):
            raise NotReplayable("a result, or an input, shares memory with another")
        grads: list[Tensor | None] = []
        if strides is not None:
            strides = strides + [None] * (len(outs) - len(strides))
            grads = [
                None if s is None else torch.empty_strided(
                    o.shape, s, dtype=o.dtype, device=o.device
                ).fill_(1)
                for o, s in zip(outs, strides, strict=True)
            ]  # fmt: skip
            given = [g for g in grads if g is not None]
            slots = tuple([log.new(g) for g in given])
            at = [i for i, t in enumerate(inner) if t.requires_grad]
            # In this thread, because a log listens to one thread.
            with torch.autograd.set_multithreading_enabled(False), around(), _heard(log):
                found = torch.autograd.grad(
                    [o for o, g in zip(outs, grads, strict=True) if g is not None],
                    [inner[i] for i in at], given, allow_unused=True,
                )  # fmt: skip
            if log.why is not None:
                raise NotReplayable(log.why)
            wanted: list[int | None] = [None] * len(args)
            for i, g in zip(at, found, strict=True):
                wanted[i] = None if g is None else log.slot(g)
            del found
    to = _canonical(log)
    steps = _without_copies(log.steps[:middle], to)
    results = tuple([to[s] for s in results])
    settings = _settings(records)
    if log.reads_setting and settings is None:
        raise NotReplayable("it depends on a setting that no record of an op names")
    plan: Any = GraphPlan.__new__(GraphPlan)
    plan.record = _Record(settings)
    plan.forward, plan.learn, plan.places = forward, learn, tuple(range(len(args)))
    plan.around = _around()
    plan.constant = tuple([i for i, o in enumerate(outs) if not o.requires_grad])
    plan.many, plan.early, plan.materialize, plan.native = True, False, False, None
    plan.node, plan.saves, plan.keeps, plan.function = None, False, False, _CompiledGraph
    saved: tuple[int, ...] = ()
    if strides is not None:
        backward, saved = _backward_program(
            log,
            steps,
            _without_copies(log.steps[middle:], to),
            results,
            slots,
            tuple([None if w is None else to[w] for w in wanted]),
        )
        others = [t for i, t in enumerate(args) if i not in saved and not t.is_leaf]
        others += [t for i, t in enumerate(args) if i not in saved and not t.requires_grad]
        cheap = sum(t.numel() * t.element_size() for t in others) <= _CHEAP
        plan.keeps = cheap and not writes and not log.takes_from_generators
        if not plan.keeps and any(
            g is None for g, o in zip(grads, outs, strict=True) if o.requires_grad
        ):
            raise NotReplayable("another result may get a gradient later")
        plan.saves = bool(saved)
        plan.grads = tuple([None if g is None else g.stride() for g in grads])
        plan.layouts = tuple([log.metas[s][1] for s in saved])
        plan.exact = _runner.exactly(backward)
        plan.node, plan.apply = _record.node_of(plan)
    # Others may share memory with another input in a later call.
    if not {*mutated}.isdisjoint(saved) or not {*mutated} <= known.buffers:
        raise NotReplayable("an input is written that is no buffer, or is saved")
    plan.written = mutated
    draws = bool(log.pairs)
    program = Program(
        len(args), log.device, dict(log.constants), draws,
        _needed(log, steps, {*results, *saved}), results, saved, "forward",
    )  # fmt: skip
    run = _runner.graph_call(plan, program, args, outs)
    if strides is not None:
        wants = {s for s, o in zip(results, outs, strict=True) if o.requires_grad}
        like = [
            args[s] if s < len(args) else t.requires_grad_(s in wants)
            for s, t in zip(saved, _likes([log.metas[s] for s in saved], log.device), strict=True)
        ]
        with around():
            plan.casts = _runner.casts()
            back = _runner.graph_backward(plan, backward, tuple(grads), tuple(like))
        plan.node._backward_cls.apply = back
    return run


def _likes(metas: list[tuple], device: torch.device) -> list[Tensor]:
    """Tensors of these sizes, strides and dtypes, which share their memory."""
    found = []
    extents = [
        (1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))) * dtype.itemsize
        for size, stride, _, dtype in metas
    ]
    base = torch.empty(max(extents, default=0) + 16, dtype=torch.uint8, device=device)
    for extent, (size, stride, _, dtype) in zip(extents, metas, strict=True):
        with torch._C._AutoDispatchBelowADInplaceOrView():
            flat = base[: extent - extent % -dtype.itemsize].view(dtype)
            found.append(flat.as_strided(size, stride))
    return found


class _CompiledGraph(torch.autograd.Function):
    """The node of a compiled graph."""


# ---- Which calls are recorded ------------------------------------------------------------------


class _Watched:
    """What is known of the calls of a graph until its plan is made."""

    def __init__(self) -> None:
        self.calls = 0
        self.changes = 0
        self.strides: dict[int, tuple] = {}  # of the gradients that results got
        # Whether a backward was differentiated, or got gradients that are not dense.
        self.differentiated = False
        self.casts: set[tuple] = set()  # of autocast in backwards

    def hear(self, i: int, g: Tensor | None) -> None:
        if g is not None:
            self.differentiated |= torch.is_grad_enabled() or g.layout is not torch.strided
            self.casts.add(_runner.casts())
            self.strides[i] = () if self.differentiated else g.stride()


class Planned:
    """A graph, called as `forward`, whose plan is made and replayed.

    records: those of its ops.
    """

    def __init__(self, forward: Callable, records: list, known: Known):
        self.forward, self.records, self.known = forward, records, known
        self.forget()
        self.why: str | None = None
        _record.planned.add(self)

    def forget(self) -> None:
        """Forget the plans, and what is known of calls, by (grad mode, mode)."""
        self.ready: dict[tuple, list[Callable]] = {}
        self.watched: dict[tuple, _Watched] = {}

    def kept(self) -> tuple[dict, dict]:
        """The plans, and what is known of calls, for `keep`."""
        return self.ready, self.watched

    def keep(self, kept: tuple[dict, dict]) -> None:
        """Take what `kept` returned."""
        self.ready, self.watched = kept

    def __call__(self, *args: Any) -> Any:
        key = torch.is_grad_enabled(), _mode.uniform()
        plans = self.ready.get(key)
        # Checkpoints compare what is saved with what a call saved before there was a plan.
        for plan in plans if plans and last_hooks(False) is None else ():
            out = plan(*args)
            if out is not UNFIT:
                return out
        return self._call(args, key)

    def _call(self, args: tuple, key: tuple) -> Any:
        watched = self.watched.setdefault(key, _Watched())
        watched.calls += 1
        if watched.calls > _TRIES or not self._may(args):
            return self.forward(*args)
        graph = torch.is_grad_enabled() and any(t.requires_grad for t in args)
        if watched.differentiated or not watched.casts <= {_NO_CASTS, _runner.casts()}:
            watched.calls = _TRIES
        elif watched.calls > 1 and (watched.strides or not graph):
            plan = self._plan(args, watched, graph, key)
            if plan is not None:
                out = plan(*args)
                if out is not UNFIT:
                    return out
        outs = self.forward(*args)
        if graph:
            for i, o in enumerate(outs):
                if isinstance(o, Tensor) and o.grad_fn is not None and i not in self.known.inner:
                    o.register_hook(functools.partial(watched.hear, i))
        return outs

    def _plan(self, args: tuple, watched: _Watched, graph: bool, key: tuple) -> Callable | None:
        strides = None
        if graph:
            n = 1 + max(watched.strides)
            strides = [watched.strides.get(i) for i in range(n)]
        try:
            backward = _uncast if _NO_CASTS in watched.casts else contextlib.nullcontext
            plan = _record_graph(
                self.forward,
                args,
                strides,
                self.records,
                self.known,
                backward,
                functools.partial(self._learn, key),
            )
        except Exception as e:  # an error of the graph is raised again when it runs as always
            self.why = str(e) if isinstance(e, NotReplayable) else type(e).__name__
            _record.unplanned["graph", self.why] += 1
            watched.calls = _TRIES
            return None
        plans = self.ready.setdefault(key, [])
        plans.append(plan)
        watched.calls = 0 if len(plans) < _MOST else _TRIES
        watched.strides = {}
        return plan

    def _learn(self, key: tuple, grads: tuple) -> None:
        """Make the next plan for gradients of these results; none, if that changes often."""
        watched = self.watched.setdefault(key, _Watched())
        self.ready[key] = []
        watched.changes += 1
        watched.calls = 1 if watched.changes <= _CHANGES else _TRIES
        watched.strides = {i: g.stride() for i, g in enumerate(grads) if g is not None}

    def _may(self, args: tuple) -> bool:
        return (
            _record.enabled()
            and torch.version.hip is None
            and active.recorder is None
            and not _record.is_unusual()
            and not torch.is_inference_mode_enabled()
            and not torch.is_anomaly_enabled()
            and not _mode.capturing()
            and _mode.uniform() is not None
            and last_hooks(False) is None
            and len(args) > 0
            and all(map(_record.plannable, args))
            and len({t.device for t in args}) == 1
            and not any(_overlaps(t) for t in args)
        )


_HOMES = ("torch", "fastnn", "operator", "_operator", "math", "builtins")
_NOT = ("torch.distributed", "torch._dynamo", "torch._higher_order_ops")


def _is_repeatable(node: Node) -> bool:
    """Whether a node calls PyTorch or us, and no other process takes part.

    A recording runs a graph once more than the user does.
    """
    target = node.target
    if node.op == "call_module" or isinstance(target, torch._ops.HigherOrderOperator):
        return False
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(target).startswith(("aten.", "prims."))
    if node.op != "call_function":
        return True
    home = getattr(target, "__module__", None) or "torch"
    return home.split(".")[0] in _HOMES and not home.startswith(_NOT)


def _overlaps(t: Tensor) -> bool:
    """Whether several elements of an expanded tensor share memory."""
    return any(n > 1 and not stride for n, stride in zip(t.shape, t.stride(), strict=True))


class Known(NamedTuple):
    """What is known of a graph that may have a plan.

    constants: its tensors that are no inputs. buffers: the places of inputs that are buffers of
    modules; statistics: of those among them that a norm may update. inner: the places of results
    from which it computes other results. Hooks cannot tell who gives them a gradient.
    """

    constants: list[Tensor]
    buffers: frozenset[int]
    statistics: frozenset[int]
    inner: frozenset[int]


def known_of(gm: GraphModule) -> Known | None:
    """What is known of a graph; None if it can have no plan."""
    found: list[Tensor] = []
    inner: frozenset[int] = frozenset()
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            v = value(node)
            if not isinstance(v, Tensor) or not all(type(n) is int for n in v.shape):
                return None
        elif not _is_repeatable(node):
            return None
        elif node.op == "get_attr":
            t = functools.reduce(getattr, node.target.split("."), gm)
            if not isinstance(t, Tensor) or t.requires_grad:
                return None
            found.append(t)
        elif node.op == "output":
            outputs = tree_leaves(node.args)
            if not all(isinstance(value(n), Tensor) for n in outputs):
                return None
            inner = _inner(outputs)
    inputs = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
    buffers = frozenset(i for i, name in enumerate(inputs) if "_buffers_" in name)
    statistics = frozenset(i for i in buffers if "_running_" in inputs[i])
    return Known(found, buffers, statistics, inner)


def _inner(outputs: list[Node]) -> frozenset[int]:
    """The places of those nodes from which others are computed."""
    seen: set[Node] = set()
    todo = [n for output in outputs for n in output.all_input_nodes]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += node.all_input_nodes
    return frozenset(i for i, n in enumerate(outputs) if n in seen)
