"""Records plans: which calls, what is heard of them, and where the plans are kept.

What cannot be a plan runs as always, and `unplanned` tells why.
"""

from __future__ import annotations

import operator
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastnn import _mode, _native, _runner, kernels
from fastnn._batches import is_batch
from fastnn._plan import (
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
    flat,
    reads,
)
from fastnn._strides import in_layout
from fastnn.kernels import _gpus

aten = torch.ops.aten

MOST = 1024  # plans kept per op
_MOST_OF_ONE = 16  # plans kept for one shape: each call asks them one by one
_TRIES_OF_ONE = 8  # calls of one shape that are recorded in vain before the shape is left alone
_ATTEMPTS = 3  # to record a signature
_TRIES = 512  # calls of an op that are recorded in vain before the op is left alone


# ---- Listening ----------------------------------------------------------------------------------

_ALLOCATIONS = frozenset(
    (
        aten.empty.memory_format,
        aten.empty_like.default,
        aten.empty_strided.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    )
)
DRAWN = ("seed", "offset")  # what kernels call the numbers of a draw
# Questions about tensors, whose answers do not depend on their values.
_QUESTIONS = frozenset((aten.promote_types.default, aten.is_same_size.default))
# Such questions, whose answers depend on settings of PyTorch.
_OF_SETTINGS = frozenset((aten._fused_sdp_choice.default,))
# These give a value of a tensor to Python, or depend on such values.
_READS = frozenset((aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default))


class _Operators(TorchDispatchMode):
    """Tells a log about every operator of PyTorch."""

    def __init__(self, log: CallLog):
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.log.before(function, args, kwargs)
        out = function(*args, **kwargs)
        self.log.called(function, args, kwargs, out)
        return out


def _has_fixed_size(function, args: tuple) -> bool:
    """Whether an operator whose size may depend on values has a size that does not."""
    if function is not aten.index.Tensor:
        return False
    return not any(t.dtype in (torch.bool, torch.uint8) for t in args[1] if t is not None)


class CallLog:
    """Listens to one pass, and makes a `Program` of it."""

    def __init__(self, given: tuple[Tensor, ...], drawn: tuple[int, int] | None = None):
        self.given = given
        self.slots: dict[int, int] = {}
        self.steps: list = []
        # Weak references keep the addresses in `slots` unique. Strong ones would change the
        # program: a factory function returns a view if somebody holds the tensor that it made.
        self.known: list = []
        self.count = 0
        # slot -> (the slot whose memory it views, the address of that slot, its dtype)
        self.views: dict[int, tuple[int, int, torch.dtype]] = {}
        self.why: str | None = None
        self.paused = False
        self.constants: dict[int, Tensor] = {}
        self.reads_setting = False
        self.drawn: tuple[int, int] | None = drawn
        self.device = given[0].device
        for t in given:
            if t._cdata in self.slots:
                self.refuse("a tensor is given twice")
            self.new(t)

    def refuse(self, why: str) -> None:
        self.why = self.why or why

    def new(self, t: Tensor) -> int:
        """A slot for a tensor that is new to the log."""
        slot = self.slots[t._cdata] = self.count
        self.count += 1
        self.known.append(torch._C._WeakTensorRef(t))  # type: ignore[attr-defined]
        return slot

    def slot(self, t: Tensor) -> int:
        """The slot of a tensor."""
        slot = self.slots.get(t._cdata)
        if slot is None:
            raise NotReplayable("a tensor comes from elsewhere")
        return slot

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Hear nothing inside the block."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def lasting(self, *tensors: Tensor) -> None:
        """Log tensors that exist as long as the process."""
        for t in tensors:
            if t._cdata not in self.slots:
                self.constants[self.new(t)] = t

    def drew(self, device: int, launch: Any, draw: Any) -> None:
        """Log a reservation of random numbers."""
        if self.drawn is not None:
            self.refuse("random numbers are drawn twice")
        elif isinstance(draw, str) or draw.scratch is None:
            self.refuse("random numbers under graph capture")
        else:
            self.drawn = draw.seed, draw.offset
            self.steps.append(DrawStep(device, launch))

    def before(self, function, args, kwargs) -> None:
        """An operator is going to be called."""

    def called(self, function, args, kwargs, out) -> None:
        """Log a call of an operator, which returned `out`."""
        if self.paused or self.why is not None:
            return
        try:
            self._called(function, args, kwargs, out)
        except NotReplayable as e:
            self.refuse(str(e))

    def _called(self, function, args, kwargs, out) -> None:
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if tensors and all(t.is_meta for t in tensors):
            return  # a question about shapes
        if function in _ALLOCATIONS:
            if out.device != self.device or out.layout is not torch.strided:
                raise NotReplayable("a tensor on another device is made")
            self.steps.append(Allocate(self.new(out), tuple(out.shape), out.stride(), out.dtype))
            return
        if function in _QUESTIONS:
            return
        if function in _OF_SETTINGS:
            self.reads_setting = True
            return
        if function in _READS:
            raise NotReplayable(f"{function} reads a value of a tensor")
        if torch.Tag.dynamic_output_shape in function.tags and not _has_fixed_size(function, args):
            raise NotReplayable(f"{function} makes a tensor whose size depends on values")
        if torch.Tag.nondeterministic_seeded in function.tags:
            self.draws_itself(function)
        given, named = tree_map(self._as_slot, (tuple(args), dict(kwargs)))
        made = tree_leaves(out) if function._schema.returns else []
        results = tuple([self.result(leaf, function) for leaf in made])
        self.steps.append(CallStep(function, given, named, results))
        if len(results) == 1 and results[0] is not None:
            self._view(results[0], out if isinstance(out, Tensor) else tree_leaves(out)[0], args)

    def draws_itself(self, function) -> None:
        """Log that an operator of PyTorch draws random numbers."""
        raise NotReplayable(f"{function} draws random numbers")

    def _as_slot(self, value):
        return Slot(self.slot(value)) if isinstance(value, Tensor) else value

    def result(self, leaf, function) -> int | None:
        """The slot of a result of an operator; None for a tensor that is not there."""
        if not isinstance(leaf, Tensor):
            if leaf is None:
                return None
            raise NotReplayable(f"{function} returns a value that is no tensor")
        known = self.slots.get(leaf._cdata)  # an operator that wrote into its argument returns it
        return self.new(leaf) if known is None else known

    def _view(self, slot: int, out: Tensor, args) -> None:
        if slot in self.views or slot < len(self.given):
            return
        storage = out.untyped_storage().data_ptr()
        tensors = [t for t in args if isinstance(t, Tensor)]
        if len(tensors) == 1 and tensors[0].untyped_storage().data_ptr() == storage:
            base = tensors[0]
            at = self.slots[base._cdata]
            root, address, dtype = self.views.get(at, (at, base.data_ptr(), base.dtype))
            if dtype == out.dtype:
                self.views[slot] = root, address, dtype

    def launched(self, kernel, grid, args, meta) -> None:
        """Log a launch."""
        if self.why is not None:
            return
        try:
            named = kernel.parameters
            given = tuple([self.argument(a, n) for a, n in zip(args, named, strict=False)])
            compiled = kernel.compiled(args, meta)
        except NotReplayable as e:
            self.refuse(str(e))
            return
        if compiled is None and not kernel.interpreted:
            self.refuse("a kernel that Triton did not return")
            return
        self.steps.append(LaunchStep(kernel, tuple(grid), given, meta, compiled))

    def argument(self, value, name: str):
        """What a launch holds for an argument of a kernel."""
        if self.drawn is not None and name in DRAWN:
            index = DRAWN.index(name)
            if value == 0:  # a kernel that draws nothing is given 0
                return Drawn(index) if self.drawn[index] == 0 else 0
            if value != self.drawn[index]:
                raise NotReplayable("a kernel draws other random numbers than were reserved")
            return Drawn(index)
        if isinstance(value, Tensor):
            slot = self.slot(value)
            if slot in self.views:
                root, address, _ = self.views[slot]
                return Pointer(root, value.data_ptr() - address)
            return Pointer(slot, 0)
        if value is None or type(value) in (int, float, bool):
            return value
        raise NotReplayable(f"an argument of a kernel is a {type(value).__name__}")

    def program(self, results, saved, first: int = 0, last: int | None = None) -> Program:
        """The program of the steps from `first` to `last`. Or it raises `NotReplayable`."""
        if self.why is not None:
            raise NotReplayable(self.why)
        out = tuple([None if t is None else self.slot(t) for t in results])
        kept = tuple([None if t is None else self.slot(t) for t in saved])
        steps = _needed(self.steps[first:last], {*out, *kept})
        used = {*out, *kept}.union(*map(reads, steps))
        lasting = {slot: t for slot, t in self.constants.items() if slot in used}
        draws = self.drawn is not None
        return Program(len(self.given), self.device, lasting, draws, steps, out, kept)


def _needed(steps: list, wanted: set) -> tuple:
    """The steps without those whose tensors nobody uses."""
    kept: list = []
    for step in reversed(steps):
        if isinstance(step, Allocate):
            needed = step.slot in wanted
        elif isinstance(step, CallStep):
            makes = {r for r in step.results if r is not None}
            changes = step.function._schema.is_mutable or not makes
            needed = changes or bool(makes & wanted)
        else:
            needed = True
        if needed:
            kept.append(step)
            wanted |= reads(step)
    return tuple(reversed(kept))


@contextmanager
def listening(log: CallLog) -> Iterator[None]:
    """Inside the block, `log` is told about the operators and the launches of this thread."""
    listeners = kernels._launch.listeners
    before, listeners.log = listeners.log, log
    try:
        with _Operators(log):
            yield
    finally:
        listeners.log = before


# ---- Recording ----------------------------------------------------------------------------------


class Context:
    """Stands for the autograd context of a function: what its forward and backward use of it."""

    def __init__(self, needs_input_grad: tuple[bool, ...]):
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple = ()
        self._plan = _Facts()

    def save_for_backward(self, *tensors) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors) -> None:
        self._plan.constant = tensors

    def mark_dirty(self, *tensors) -> None:
        self._plan.dirty = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self._plan.materialize = value


class _Facts:
    constant: tuple = ()
    dirty: tuple = ()
    materialize = True


class Recorder:
    """Listens to one call of a fused function, or to one backward.

    tensors: those among the arguments. drawn: the random numbers that the forward drew. inside:
    whether an autograd function runs.
    """

    asks = False

    def __init__(self, tensors: tuple[Tensor, ...], drawn: tuple[int, int] | None = None):
        self.tensors = tensors
        self.log = CallLog(tensors, drawn)
        self.pass_: Pass | None = None
        self.inside = False
        self.followed = False  # whether autograd follows what comes before the function

    def refuse(self, why: str) -> None:
        self.log.refuse(why)

    def run(self, function, args: tuple):
        """What `_function.run` does, heard."""
        if self.inside or self.log.why is not None:
            return None
        if self.pass_ is not None:
            self.refuse("it runs two autograd functions")
            return None
        at = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        for i in at:
            slot = self.log.slots.get(args[i]._cdata)
            if slot is None:
                self.refuse("an argument was converted first")
                return None
            self.followed |= slot >= len(self.tensors) and args[i].requires_grad
            self.log.views.pop(slot, None)  # the function is given this tensor, not its base
        graph = torch.is_grad_enabled() and any(args[i].requires_grad for i in at)
        needs = tuple([graph and isinstance(a, Tensor) and a.requires_grad for a in args])
        ctx = Context(needs)
        self.inside = True
        prologue, early = len(self.log.steps), self.log.drawn is not None
        try:
            with torch.no_grad():
                out = function.forward(ctx, *args)
        finally:
            self.inside = False
        many = isinstance(out, tuple)
        outputs = out if many else (out,)
        self.pass_ = Pass(function, ctx, args, at, outputs, many, graph, early)
        self.pass_.drawn = self.log.drawn
        self.pass_.prologue = prologue
        with self.log.pause():  # hooks of saved tensors may run operators of their own
            return self.pass_.attach()


class Pass:
    """One run of an autograd function that was heard."""

    def __init__(self, function, ctx, args, at, outputs, many, graph, early):
        self.ctx = ctx
        self.args = args
        self.at = at
        self.raw = self.outputs = outputs
        self.saved = ctx.saved_tensors
        self.many = many
        self.graph = graph
        self.drawn: tuple[int, int] | None = None
        self.prologue = 0  # how many steps came before
        self.plan = Plan(function, ctx, args, at, outputs, many, graph, early)
        ctx.saved_tensors = ()

    def attach(self):
        """The outputs, with a node of autograd if a gradient is wanted."""
        if self.graph:
            tensors = [self.args[i] for i in self.at]
            result = self.plan.attach(tensors, self.outputs, self.saved, self.drawn)
            self.outputs = result if self.many else (result,)
            return result
        for i in self.plan.dirty:
            t = self.args[self.at[i]]
            if not t.is_inference():  # inference tensors count no versions
                torch.autograd.graph.increment_version(t)
        return self.outputs if self.many else self.outputs[0]


class Plan:
    """How to run an autograd function for one signature, both ways."""

    __slots__ = (
        "apply",
        "attributes",
        "constant",
        "dirty",
        "early",
        "function",
        "layouts",
        "many",
        "materialize",
        "native",
        "needs",
        "node",
        "places",
        "replayed_back",
        "saves",
        "tries",
    )

    def __init__(self, function, ctx: Context, args: tuple, at, outputs, many, graph, early):
        facts = ctx._plan
        self.function = function
        self.attributes = {
            k: v for k, v in vars(ctx).items() if k not in ("saved_tensors", "_plan")
        }
        self.needs = ctx.needs_input_grad
        self.constant = tuple(
            [i for i, o in enumerate(outputs) if any(o is c for c in facts.constant)]
        )
        self.materialize = facts.materialize
        tensors = [args[i] for i in at]
        self.dirty = tuple([i for i, t in enumerate(tensors) if any(t is d for d in facts.dirty)])
        self.saves = bool(ctx.saved_tensors)
        self.layouts = tuple([None if t is None else t.stride() for t in ctx.saved_tensors])
        self.many = many
        self.places = tuple(at)
        self.early = early  # whether random numbers are drawn before; the node is then given them
        self.node: Any = None  # its class
        self.apply: Any = None
        if graph:
            self.node, self.apply = node_of(self)
        self.replayed_back = False  # whether the backward was recorded
        self.native: Any = None  # its side in the C++ runner
        self.tries = 2  # of recording the backward

    def context(self, saved: tuple, drawn: tuple[int, int] | None) -> Context:
        """The context that the function's own backward expects."""
        ctx = Context(self.needs)
        vars(ctx).update(self.attributes)
        if drawn is not None:
            vars(ctx).update({k: _redrawn(v, drawn) for k, v in self.attributes.items()})
        ctx.saved_tensors = self.as_saved(saved)
        return ctx

    def as_saved(self, saved: tuple) -> tuple:
        """What was saved, in the layouts in which it was: hooks may have changed them."""
        return tuple(map(in_layout, saved, self.layouts))

    def attach(self, tensors: list, outputs: tuple, saved: tuple, drawn) -> Any:
        """What the call that is recorded returns: these outputs, with a node."""

        def forward(ctx, *given):
            ctx.save_for_backward(*saved)
            if drawn is not None:
                ctx.drawn = drawn
            if self.constant:
                ctx.mark_non_differentiable(*[outputs[i] for i in self.constant])
            if self.dirty:
                ctx.mark_dirty(*[tensors[i] for i in self.dirty])
            if not self.materialize:
                ctx.set_materialize_grads(False)
            return outputs if self.many else outputs[0]

        self.node.forward = staticmethod(forward)
        try:
            return self.apply(*((drawn,) if self.early else ()), *tensors)
        finally:
            del self.node.forward

    def slow(self, drawn: Any, grads: tuple, saved: tuple, kept: tuple = ()) -> tuple:
        """The gradients of the tensors that a node was given, by the function's own backward."""
        if (
            self.tries and not self.replayed_back
            and not torch.is_grad_enabled() and enabled()
            and any(g is not None for g in grads)
        ):  # fmt: skip
            return _record_backward(self, drawn, grads, saved)
        return self.gradients(self.function.backward(self.context(saved, drawn), *grads))

    def go_back(self, ctx, grads: tuple, saved: tuple) -> tuple:
        """What autograd calls of a node that takes the long way."""
        found = self.slow(ctx.drawn, grads, saved)
        return (None, *found) if self.early else found

    def gradients(self, grads) -> tuple:
        """The gradients of a node's tensors, of what the function's backward returned."""
        if not isinstance(grads, tuple):
            grads = (grads,)
        return tuple([grads[i] for i in self.places])


def _redrawn(value: Any, drawn: tuple[int, int]) -> Any:
    """`value`, in which every `Draw` of kernels/_philox.py has these numbers."""
    if isinstance(value, kernels._philox.Draw):
        return value._replace(seed=drawn[0], offset=drawn[1])
    if isinstance(value, tuple):
        found = [_redrawn(v, drawn) for v in value]
        return type(value)(*found) if hasattr(value, "_fields") else type(value)(found)
    return value


# ---- The node of autograd -----------------------------------------------------------------------


class _Replay(torch.autograd.Function):
    """The node of a plan. Each plan has a class of its own, whose forward is generated.

    Its inputs: the random numbers if they are drawn before, and the tensors.
    """

    @staticmethod
    def backward(ctx, *grads):
        plan = ctx.plan
        # In a second backward `saved_tensors` raises, even if nothing was saved.
        return plan.go_back(ctx, grads, ctx.saved_tensors if plan.saves else ())


def node_of(plan: Plan) -> tuple[type, Callable]:
    """The class of the nodes of a plan, named as its function, and `apply` of that class."""
    function = plan.function
    node: Any = type(function.__name__, (_Replay,), {"__doc__": function.__doc__})
    of_context = node._backward_cls
    of_context.plan, of_context.drawn = plan, None
    # The engine calls `apply` of the node, whose wrapper looks for the user's function anew.
    of_context.apply = _Replay.backward
    # The wrapper of `apply` asks for functorch and for a setup_context; the guards rule these out,
    # and there is none.
    return node, super(torch.autograd.Function, node).apply  # type: ignore[misc]


def _record_backward(plan: Plan, drawn, grads: tuple, saved: tuple) -> tuple:
    saved = plan.as_saved(saved)
    given = [t for t in (*grads, *saved) if t is not None]
    if any(map(is_batch, given)):
        return plan.gradients(plan.function.backward(plan.context(saved, drawn), *grads))
    plan.tries -= 1
    if not all(map(plannable, given)):
        return plan.gradients(plan.function.backward(plan.context(saved, drawn), *grads))
    recorder = Recorder(tuple(given), drawn)
    recorder.inside = True
    log = recorder.log
    before, active.recorder = active.recorder, recorder
    try:
        with listening(log):
            found = plan.function.backward(plan.context(saved, drawn), *grads)
    finally:
        active.recorder = before
    result = plan.gradients(found)
    try:
        if log.reads_setting:
            raise NotReplayable("it depends on a setting")
        program = log.program(result, ())
    except NotReplayable as e:
        unplanned[plan.function.__name__ + ".backward", str(e)] += 1
        return result
    back = _runner.backward(plan, program, grads, saved)
    if plan.node is not None:
        plan.node._backward_cls.apply = back
    plan.replayed_back = True
    return result


# ---- Which calls are recorded, and where plans are kept ----------------------------------------

_CONSTANTS = frozenset((int, float, bool, str, type(None), torch.dtype, FunctionType))
_TENSORS = (Tensor, Parameter)

unplanned: Counter[tuple[str, str]] = Counter()  # (op, why) -> how often a recording was in vain

_on = os.environ.get("FASTNN_PLANS", "1") != "0"


def enabled() -> bool:
    """Whether plans are recorded and replayed: `FASTNN_PLANS` is not 0."""
    return _on


@contextmanager
def using(on: bool) -> Iterator[None]:
    """Whether plans are recorded and replayed inside the block, in all threads. For tests."""
    global _on
    before, _on = _on, on
    forget()
    try:
        yield
    finally:
        _on = before
        forget()


@contextmanager
def paused() -> Iterator[None]:
    """Calls in the block run without plans, in all threads. Plans that were made stay."""
    global _on
    before, _on = _on, False
    try:
        yield
    finally:
        _on = before


@contextmanager
def hidden() -> Iterator[None]:
    """As `paused`, and plans that were made are not replayed inside the block, either."""
    before = [(plans, plans.kept(), plans.vain_at.copy(), plans.vain) for plans in _all]
    graphs = [(plans, plans.kept()) for plans in planned]
    with paused():
        forget()
        try:
            yield
        finally:
            for plans, kept in graphs:
                plans.forget()
                plans.keep(kept)
            for plans, kept, vain_at, vain in before:
                plans.forget()
                plans.keep(kept)
                plans.vain_at.update(vain_at)
                plans.vain = vain


def plannable(t: Tensor) -> bool:
    """Whether a plan may be given `t`: memory of its own, at an address that kernels like."""
    return (
        type(t) in _TENSORS
        and t.layout is torch.strided
        and t.numel() > 0
        and not t.is_inference()
        and t.data_ptr() % 16 == 0
        and t.data_ptr() != 0
    )


def _plain(value: Any) -> bool:
    return type(value) in _TENSORS and value.layout is torch.strided


def is_unusual() -> bool:
    """Whether something watches or transforms the calls of this thread."""
    return bool(
        torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or _mode.function_mode() is not None
    )


def _constant(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_constant, value))
    return type(value) in _CONSTANTS


class Plans:
    """The plans of one op.

    ready: key -> functions that run a plan. Each is called as the op's public function; it returns
        UNFIT if the call does not fit its plan.
    tables: the C++ runner's table of those plans among them that it runs; empty if it runs none.
    """

    def __init__(self, record: Any):
        self.record = record
        self.ready: dict[tuple, list[Callable]] = {}
        self.tables: list[Any] = []
        self.graphed: list[str] = []  # not empty if some are for graph capture
        self.count = 0
        self.seen: dict[tuple, int] = {}  # key -> how often it may still be recorded
        self.vain_at: dict[tuple, int] = {}  # key of `ready` -> how many recordings were in vain
        names = record.names
        self.inplace = names.index("inplace") if "inplace" in names else None
        self.vain = 0
        _all.append(self)

    def forget(self) -> None:
        """Forget all plans, and which calls were seen."""
        self.ready.clear()
        self.tables.clear()
        self.graphed.clear()
        self.seen.clear()
        self.vain_at.clear()
        self.count = self.vain = 0

    def kept(self) -> tuple[dict, dict]:
        """The plans, and which calls were seen, for `keep`."""
        return {key: [*plans] for key, plans in self.ready.items()}, dict(self.seen)

    def keep(self, kept: tuple[dict, dict]) -> None:
        """Add what `kept` returned."""
        ready, seen = kept
        self.seen.update(seen)
        for key, plans in ready.items():
            for plan in plans:
                self._put(plan, key)

    def heard(self, args: tuple, kwargs: dict, mode: str, call: Callable[[], Any]) -> Any:
        """`call()`, which runs the fused function; recorded if this is the signature's second."""
        if not _on or self.vain >= _TRIES or active.recorder is not None or not _mode.uniform():
            return call()
        values = (*args, *kwargs.values())
        if self.inplace is not None and values[self.inplace] is True:
            return call()  # a plan would not check whether the argument may be written to
        rough = self._rough(values, mode)
        if self.vain_at.get(rough, 0) >= _TRIES_OF_ONE or torch.is_inference_mode_enabled() or _HIP:
            return call()
        leaves = flat(values)
        tensors = tuple([v for v in leaves if isinstance(v, Tensor)])
        if not all(map(plannable, tensors)):
            return call()
        key = self._key(values, tensors, mode)
        left = self._left(key)
        if not left or not all(isinstance(v, Tensor) or _constant(v) for v in leaves):
            return call()
        self.seen[key] = left - 1  # a recording that an exception ends may be tried again
        result, why = self._record(values, tensors, mode, call)
        if why is not None:
            self.seen[key] = 0
            self.vain += 1
            if len(self.vain_at) >= MOST:
                self.vain_at.clear()
            self.vain_at[rough] = self.vain_at.get(rough, 0) + 1
            unplanned[self.record.name, why] += 1
        return result

    def declined(self, args: tuple, kwargs: dict) -> None:
        """Remember that a call went to stock in `auto`, if it is the signature's second.

        The next one takes the way of a plan, and so finds stock behind the guard alone. What is
        remembered wrongly, because something has changed that the guard does not see, costs time.
        """
        if not _on or active.recorder is not None or _mode.uniform() != "auto" or is_unusual():
            return
        values = (*args, *kwargs.values())
        leaves = flat(values)
        tensors = tuple([v for v in leaves if isinstance(v, Tensor)])
        if not tensors or not all(_plain(v) or _constant(v) for v in leaves):
            return
        key = ("stock", *self._key(values, tensors, "auto"))
        if self._left(key):
            self.seen[key] = 0
            try:
                self._keep(_runner.declined(self.record, values), values, "auto")
            except NotReplayable as e:
                unplanned[self.record.name, str(e)] += 1

    def _key(self, values: tuple, tensors: tuple, mode: str) -> tuple:
        """The signature of a call."""
        autocast = _runner.autocast(tensors[0].device.type)
        state = torch.is_grad_enabled(), mode, self._settings(), autocast
        return *state, *map(_fact, values)

    def _left(self, key: tuple) -> int:
        """How often a call with this key may still be recorded; 0 at the first call."""
        try:
            left = self.seen.get(key)
        except TypeError:  # an argument that does not hash
            return 0
        if left is None:
            if len(self.seen) >= MOST:
                self.seen.clear()
            self.seen[key] = _ATTEMPTS
        return left or 0

    def _rough(self, values: tuple, mode: str) -> tuple:
        """The key under which the public function looks for plans."""
        return getattr(values[self.record.keyed_by], "shape", None), torch.is_grad_enabled(), mode

    def _settings(self):
        return None if self.record.settings is None else self.record.settings()

    def _record(self, values: tuple, tensors: tuple, mode: str, call: Callable[[], Any]):
        """(what `call` returned, why it cannot be a plan; None if it is one)."""
        recorder = Recorder(tensors)
        active.recorder = recorder
        try:
            with listening(recorder.log):
                result = call()
        finally:
            active.recorder = None
        if isinstance(result, _mode.Stock):
            return result, "it is declined"
        try:
            self._add(recorder, result, values, mode)
        except NotReplayable as e:
            if recorder.pass_ is not None:
                recorder.pass_.plan.tries = 0
            return result, str(e)
        return result, None

    def _add(self, recorder: Recorder, result: Any, values: tuple, mode: str) -> None:
        heard = recorder.pass_
        if recorder.log.why is not None:
            raise NotReplayable(recorder.log.why)
        if heard is None:
            raise NotReplayable("it runs no autograd function")
        if heard.ctx._plan.dirty:
            raise NotReplayable("it writes into an argument")
        picked = _picked(result, heard.outputs, heard.many)
        if any(isinstance(v, Tensor) for v in tree_leaves(heard.plan.attributes)):
            raise NotReplayable("a tensor is kept beside those of save_for_backward")
        if recorder.log.reads_setting and self.record.settings is None:
            raise NotReplayable("it depends on a setting that the record of the op does not name")
        log, inputs = recorder.log, [heard.args[i] for i in heard.at]
        before = log.program(inputs, (), 0, heard.prologue)
        if recorder.followed and not all(map(_differentiable, before.steps)):
            raise NotReplayable(
                "an argument was converted first, in a way that autograd cannot follow"
            )
        after = log.program(heard.raw, heard.saved, heard.prologue)
        if any(r is not None and r < after.given for r in after.results):
            raise NotReplayable("a result is one of the arguments")
        plan = heard.plan
        run = _runner.call(self.record, plan, before, after, values, heard, picked)
        self._keep(run, values, mode)
        self.vain = 0

    def _keep(self, run: Callable, values: tuple, mode: str) -> None:
        self._put(run, self._rough(values, mode))
        if mode == "graph" and not self.graphed:
            self.graphed.append(mode)
            self.record.floor.hold()

    def _put(self, run: Callable, key: tuple) -> None:
        if self.count >= MOST:
            self.ready.clear()
            self.tables.clear()
            self.count = 0
        plans = self.ready.setdefault(key, [])
        if len(plans) >= _MOST_OF_ONE:
            old = plans.pop(0)
            self.count -= 1
            for table in self.tables:
                table.remove(old)
        plans.append(run)
        self.count += 1
        shape, _, mode = key
        if _native.owns(run) and shape is not None:
            if not self.tables:
                self.tables.append(_native.table(self.record, run))
            self.tables[0].add(mode, tuple(shape), run)


def _picked(result: Any, outputs: tuple, many: bool) -> int | tuple[int, ...] | None:
    """Which of the outputs the call returns, or a tuple of which; None: all of them."""
    places = {id(out): i for i, out in enumerate(outputs) if out is not None}
    if isinstance(result, Tensor) and id(result) in places:
        return places[id(result)]
    if many and type(result) is tuple:
        if len(result) == len(outputs) and all(map(operator.is_, result, outputs)):
            return None
        if result and all(id(r) in places for r in result):
            return tuple([places[id(r)] for r in result])
    raise NotReplayable("it does something after its autograd function")


def _differentiable(step: Any) -> bool:
    """Whether autograd follows a step when it is replayed, as it did when it was recorded."""
    return isinstance(step, CallStep) and not step.function._schema.is_mutable


def _fact(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (
            type(value), value.dtype, value.device, value.shape, value.stride(),
            value.requires_grad,
        )  # fmt: skip
    if isinstance(value, (tuple, list)):
        return type(value), *map(_fact, value)
    return type(value), value


_all: list[Plans] = []
planned: Any = weakref.WeakSet()  # what else keeps plans: graphs
_HIP = torch.version.hip is not None


def everyone() -> list[Any]:
    """All that keep plans."""
    return [*_all, *planned]


def forget() -> None:
    """Forget all plans, because something has changed that no guard looks at."""
    for plans in everyone():
        plans.forget()


_gpus.on_change.append(forget)
