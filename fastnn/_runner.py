"""Runs plans in Python: a function is generated for each structure of a plan.

What belongs to one signature (sizes, compiled kernels, constants) reaches the function through its
closure, so that plans of the same structure share one piece of compiled code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.amp import is_autocast_available
from torch.autograd import forward_ad

from fastnn import _native, _rng, kernels
from fastnn._plan import (
    UNFIT,
    Allocate,
    CallStep,
    DoesNotFit,
    Drawn,
    DrawStep,
    LaunchStep,
    NotReplayable,
    Pointer,
    Program,
    Slot,
    flat,
    last_uses,
    nests,
    questions,
    reads,
    same,
)

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # a private name: without it, calls run as always
    TensorGuards = None  # type: ignore[assignment,misc]


aten = torch.ops.aten

# What a node is told: FunctionCtx.save_for_backward and its like write these attributes.
_OF_NODES = ("to_save", "non_differentiable", "materialize_grads")


@functools.cache
def unavailable() -> str | None:
    """Why this PyTorch cannot run plans; None if it can."""
    if TensorGuards is None:
        return "this torch has no TensorGuards"
    if not hasattr(torch._C, "_WeakTensorRef"):  # which recording needs
        return "this torch has no _WeakTensorRef"
    if not all(hasattr(torch._C._FunctionBase, name) for name in _OF_NODES) or not hasattr(
        torch.autograd.Function, "_backward_cls"
    ):
        return "autograd functions of this torch are made in another way"
    x, y = torch.empty(2), torch.empty(3)
    try:
        check = _guard([x])
        if check(x) and not check(y) and not check(None):
            return None
    except Exception as e:
        return f"TensorGuards of this torch works in another way: {e}"
    return "TensorGuards of this torch works in another way"


def _guard(tensors) -> Callable[..., bool]:
    """Whether tensors have the metadata of these, and the thread the state of now.

    Metadata: class, dtype, device, sizes, strides, requires_grad, dispatch keys. State: autocast,
    dispatch modes, inference mode, functorch, tracing.
    """
    guard = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    return guard.check


def _allocator(device: torch.device) -> Callable[..., Tensor]:
    """A function (size, stride, dtype) -> an uninitialised tensor on the current device."""
    from torch._C._dynamo import guards

    quick = getattr(guards, f"_empty_strided_{device.type}", None)
    if quick is not None:
        return quick
    empty = torch.empty_strided
    return lambda size, stride, dtype: empty(size, stride, dtype=dtype, device=device)


def _at(base: Tensor, offset: int) -> Tensor:
    """A tensor whose memory begins `offset` bytes behind that of `base`. For the interpreter."""
    start = base.storage_offset() + offset // base.element_size()
    return base.detach().as_strided((1,), (1,), start)


# ---- Sources ------------------------------------------------------------------------------------


class _Cells:
    """The constants that a generated function gets through its closure."""

    def __init__(self):
        self.values: dict[str, Any] = {}

    def __call__(self, value: Any) -> str:
        """The name under which the function finds `value`."""
        name = f"c{len(self.values)}"
        self.values[name] = value
        return name


def _name(slot: int) -> str:
    return f"s{slot}"


def _steps(program: Program, cells: _Cells, known: set[str] | None = None) -> list[str]:
    """The source lines that carry out the steps.

    known: the names of slots of which a variable has the address (`at_NAME`).
    """
    known = set() if known is None else known
    lines = [f"{_name(slot)} = {cells(t)}" for slot, t in program.lasting.items()]
    device = program.device
    if any(isinstance(s, Allocate) for s in program.steps):
        cells.values["alloc"] = _allocator(device)
    if any(isinstance(s, LaunchStep) and s.compiled is not None for s in program.steps):
        cells.values["get_stream"] = kernels._launch.current_stream()
        lines.append(f"stream = get_stream({device.index or 0})")
    ends = last_uses(program) if program.whole else [()] * len(program.steps)
    draws = 0
    for step, end in zip(program.steps, ends, strict=True):
        if isinstance(step, Allocate):
            size, stride, dtype = cells(step.size), cells(step.stride), cells(step.dtype)
            lines.append(f"{_name(step.slot)} = alloc({size}, {stride}, {dtype})")
        elif isinstance(step, DrawStep):
            numbers = cells(_rng.numbers)
            to = "+=" if draws else "="
            lines.append(f"drawn {to} {numbers}({cells(step.device)}, {cells(step.launch)})")
            draws += 1
        elif isinstance(step, LaunchStep):
            lines.append(_launch(step, cells, known))
        else:
            lines.append(_call(step, cells))
        if end:
            lines.append(f"del {', '.join(map(_name, end))}")
    return lines


def _launch(step: LaunchStep, cells: _Cells, known: set[str]) -> str:
    interpreted = step.compiled is None
    args = []
    for a in step.args:
        if isinstance(a, Drawn):
            args.append(f"drawn[{a.number}]")
        elif not isinstance(a, Pointer):
            args.append(cells(a))
        elif interpreted:
            name = _name(a.slot)
            args.append(f"{cells(_at)}({name}, {cells(a.offset)})" if a.offset else name)
        else:
            name = _name(a.slot)
            plus = f" + {cells(a.offset)}" if a.offset else ""
            args.append(
                (f"at_{name}" if name in known else f"(at_{name} := {name}.data_ptr())") + plus
            )
            known.add(name)
    if interpreted:
        given = ", ".join(args)
        kernel, grid, meta = cells(step.kernel), cells(step.grid), cells(step.meta)
        return f"{kernel}({grid}, {given}, **{meta})"
    compiled, consts = step.compiled
    function, packed = cells(compiled.function), cells(compiled.packed_metadata)
    grid = ", ".join(cells(g) for g in (*step.grid, 1, 1)[:3])
    given = ", ".join([*args, *map(cells, consts)])
    quick = kernels._launch.direct(compiled)
    if quick is None:
        run = cells(compiled.run)
        return f"{run}({grid}, stream, {function}, {packed}, None, None, None, {given})"
    launch, flags, rest = quick
    flags, rest = (", ".join(map(cells, v)) for v in (flags, rest))
    run = cells(launch)
    return f"{run}({grid}, stream, {function}, {flags}, {packed}, {rest}, ({given},))"


def _value(value: Any, cells: _Cells) -> str:
    """The source of an argument of an operator."""
    if isinstance(value, Slot):
        return _name(value.number)
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        inner = ", ".join(_value(v, cells) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if value else ''})"
    return cells(value)


# The same operators with a parser of arguments that takes half the time.
_QUICK = {
    aten.add.Tensor: torch.add,
    aten.addmm.default: torch.addmm,
    aten.as_strided.default: torch.as_strided,
    aten.bmm.default: torch.bmm,
    aten.convolution.default: torch.convolution,
    aten.detach.default: torch.detach,
    aten.div.Tensor: torch.div,
    aten.expand.default: Tensor.expand,
    aten.mm.default: torch.mm,
    aten.mul.Tensor: torch.mul,
    aten.permute.default: torch.permute,
    aten.select.int: torch.select,
    aten.stack.default: torch.stack,
    aten.sum.dim_IntList: torch.sum,
    aten.t.default: torch.t,
    aten.transpose.int: torch.transpose,
    aten.unbind.int: torch.unbind,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.view.default: Tensor.view,
}


def _call(step: CallStep, cells: _Cells) -> str:
    args = [_value(v, cells) for v in step.args]
    args += [f"{k}={_value(v, cells)}" for k, v in step.kwargs.items()]
    call = f"{cells(_QUICK.get(step.function, step.function))}({', '.join(args)})"
    names = [_name(r) if r is not None else "_" for r in step.results]
    returned = len(step.function._schema.returns)
    is_list = returned == 1 and isinstance(step.function._schema.returns[0].type, torch.ListType)
    if not names:
        return call
    if returned == 1 and not is_list:
        return f"{names[0]} = {call}"
    return f"{', '.join(names)}, = {call}"


def _step(program: Program, step: Any) -> tuple:
    """A step of `program` that the C++ runner calls back (`_native.Python`)."""
    if isinstance(step, DrawStep):
        return "draw", functools.partial(_rng.numbers, step.device, step.launch)
    cells = _Cells()
    read = tuple(sorted(reads(step)))
    made = step.results if isinstance(step, CallStep) else ()
    lines = _steps(program._replace(steps=(step,), lasting={}, whole=""), cells)
    head = f"def function({', '.join(['drawn', *map(_name, read)])}):"
    return "python", _make(cells, head, [*lines, f"return {_slots(made)}"]), read, made


def _slots(slots) -> str:
    """The source of a tuple of slots."""
    return f"({''.join('None, ' if s is None else f'{_name(s)}, ' for s in slots)})"


@functools.lru_cache(maxsize=4096)
def _compiled(source: str) -> Any:
    scope: dict = {}
    exec(compile(source, "<fastnn.plan>", "exec"), scope)
    return scope["make"]


def _make(cells: _Cells, head: str, lines: list[str]) -> Callable:
    """A function with this first line and these lines, which finds the cells in its closure."""
    body = "\n        ".join(lines)
    source = (
        f"def make({', '.join(cells.values)}):\n    {head}\n        {body}\n    return function\n"
    )
    return _compiled(source)(**cells.values)


def _aligned(names: list[str]) -> str:
    taken = [f"(at_{n} := {n}.data_ptr())" for n in names]  # 0: the memory was freed
    return f"{' and '.join(taken)} and not ({' | '.join(f'at_{n}' for n in names)}) & 15"


# ---- Both passes --------------------------------------------------------------------------------


def autocast(device_type: str) -> torch.dtype | None:
    """The dtype of autocast; None if it is off, or if the device has none, as "meta" has not."""
    if is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def _settings(record: Any, cells: _Cells) -> list[str]:
    """The source of a comparison of the settings that an op depends on; none if there are none."""
    return [f"{cells(ask)}() == {cells(ask())}" for ask in questions(record.settings)]


def _ready(record: Any, program: Program, cells: _Cells) -> list[str]:
    """Sources of what must hold for a plan, beside the metadata of its tensors."""
    device = program.device
    asked = [f"{cells(forward_ad)}._current_level < 0"]
    if record is not None and autocast(device.type) is not None:
        dtype = cells(autocast(device.type))
        asked.append(f"{cells(torch.get_autocast_dtype)}({device.type!r}) is {dtype}")
    if record is not None:
        asked += _settings(record, cells)
    if device.type != "cpu":
        current = cells(torch._C._cuda_getDevice)  # type: ignore[attr-defined]
        asked.append(f"{current}() == {cells(device.index)}")
        asked.append(f"not {cells(kernels._launch.listened)}()")
        if program.draws:
            asked.append(f"not {cells(torch.cuda.is_current_stream_capturing)}()")
    return asked


def _checks(record: Any, program: Program) -> list[tuple[Callable, Any]]:
    """What of `_ready` only Python can ask: functions, and what they must return."""
    asked = []
    if record is not None:
        asked += [(ask, ask()) for ask in questions(record.settings)]
    if program.device.type != "cpu":
        asked.append((kernels._launch.listened, False))
        if program.draws:
            asked.append((torch.cuda.is_current_stream_capturing, False))
    return asked


def call(
    record: Any, plan: Any, before: Program, after: Program, values: tuple, heard: Any, picked
) -> Callable:
    """A function that runs `plan` for calls of the op's public function, or returns UNFIT.

    before: makes the tensors that the autograd function is given. after: its forward.
    values: the arguments of the call that was recorded. picked: which of the outputs the call
    returns; None: all.
    """
    why = unavailable()
    if why is not None:
        raise NotReplayable(why)
    order = [s for s in before.results if s is not None]
    used = {r for step in after.steps for r in reads(step)}
    used |= {s for s in after.saved if s is not None}
    made: set[int | None] = {s.slot for s in after.steps if isinstance(s, Allocate)}
    made |= {r for s in after.steps if isinstance(s, CallStep) for r in s.results}
    if not used <= {*order, *made, *after.lasting}:
        raise NotReplayable("it uses a tensor that its autograd function is not given")
    given = [_name(s) if order.index(s) == i else f"again{i}" for i, s in enumerate(order)]
    native = _native.call(
        record, plan, before, after, values, heard, picked, _checks(record, after), plan.slow,
        functools.partial(_step, after),
    )  # fmt: skip
    if native is not None:
        return native
    cells = _Cells()
    names, mine, asked = _fitting(record, values, cells)
    asked += _ready(record, after, cells)
    # Addresses are looked at where the kernels are given them, if nothing has happened until then.
    inside = heard.graph and not before.steps and {*order} == {*range(len(mine))}
    if not inside:
        asked.append(_aligned(mine))
    lines = []
    if before.steps or not heard.graph:
        lines += [f"{_name(i)} = {n}" for i, n in enumerate(mine)]
        lines += _steps(before, cells)
    if heard.graph:
        plan.node.forward = staticmethod(_forward(plan, after, given, inside))
        passed = [mine[s] if s < len(mine) else _name(s) for s in order]
        run = f"{cells(plan.apply)}({', '.join([*(['drawn'] if plan.early else []), *passed])})"
        if isinstance(picked, tuple):
            lines.append(f"out = {run}")
            run = f"({''.join(f'out[{i}], ' for i in picked)})"
        elif picked is not None and heard.many:
            run += f"[{picked}]"
    else:
        lines += _steps(after, cells)
        if isinstance(picked, int):
            run = _slots([after.results[picked]])[1:-3]
        else:
            run = _slots([after.results[i] for i in picked] if picked else after.results)
    lines.append(f"return {run}")
    if inside:
        lines = [
            "try:",
            *(f"    {line}" for line in lines),
            f"except {cells(DoesNotFit)}:",
            "    pass",
        ]
    lines = [
        f"if {' and '.join(asked)}:",
        *(f"    {line}" for line in lines),
        f"return {cells(UNFIT)}",
    ]
    return _make(cells, f"def function({', '.join(names)}):", lines)


def _forward(plan: Any, program: Program, given: list[str], checks: bool) -> Callable:
    """The forward of a node that runs `program`.

    checks: whether it raises `DoesNotFit` for tensors at addresses that do not fit.
    """
    cells = _Cells()
    lines = []
    if checks:
        lines += [f"if not ({_aligned(given)}):", f"    raise {cells(DoesNotFit)}"]
    lines += _steps(program, cells, {*given} if checks else None)
    if program.saved:
        lines.append(f"ctx.to_save = {_slots(program.saved)}")
    if plan.constant:
        constant = tuple([program.results[i] for i in plan.constant])
        lines.append(f"ctx.non_differentiable = {_slots(constant)}")
    if not plan.materialize:
        lines.append("ctx.materialize_grads = False")
    if program.draws:
        lines.append("ctx.drawn = drawn")
    results = _slots(program.results)
    lines.append(f"return {results if plan.many else results[1:-3]}")
    head = f"def function({', '.join(['ctx', *(['drawn'] if plan.early else []), *given])}):"
    return _make(cells, head, lines)


def declined(record: Any, values: tuple) -> Callable:
    """A function that calls PyTorch for such calls of the op as this one, or returns UNFIT."""
    why = unavailable()
    if why is not None:
        raise NotReplayable(why)
    cells = _Cells()
    names, _, asked = _fitting(record, values, cells)
    asked += _settings(record, cells)
    given = []
    for name, said in zip(names, record.names, strict=True):
        # A warning names the user's line: this function and the public one lie between.
        value = f"{name} + 2" if said == "_stacklevel" else name
        given.append(f"{said}={value}" if said in record.keyword_only else value)
    lines = [
        f"if {' and '.join(asked)}:",
        f"    return {cells(record.stock)}({', '.join(given)})",
        f"return {cells(UNFIT)}",
    ]
    return _make(cells, f"def function({', '.join(names)}):", lines)


def _fitting(record: Any, values: tuple, cells: _Cells) -> tuple[list[str], list[str], list[str]]:
    """(names of the arguments, names of their tensors, sources of what must hold of them)."""
    names = [f"a{i}" for i in range(len(values))]
    mine: list[str] = []
    forms: list[str] = []
    equal: list[str] = []

    def take(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            mine.append(name)
        elif nests(value):
            inner = [f"{name}_{i}" for i in range(len(value))]
            elements = ", ".join(f"{n} := {name}[{i}]" for i, n in enumerate(inner))
            kind = type(value).__name__
            forms.append(f"type({name}) is {kind} and len({name}) == {len(value)} and [{elements}]")
            for n, v in zip(inner, value, strict=True):
                take(n, v)
        else:
            equal.append(_equals(name, value, cells))

    for name, value, said in zip(names, values, record.names, strict=True):
        if said != "_stacklevel":
            take(name, value)
    tensors = [v for v in flat(values) if isinstance(v, Tensor)]
    return names, mine, [*forms, f"{cells(_guard(tensors))}({', '.join(mine)})", *equal]


def _equals(name: str, value: Any, cells: _Cells) -> str:
    """The source of a comparison with a constant."""
    if value is None or isinstance(value, bool):
        return f"{name} is {value}"
    if isinstance(value, list):
        return f"{cells(same)}({name}, {cells(list(value))})"
    constant = cells(value)
    return f"({name} is {constant} or {cells(same)}({name}, {constant}))"


def backward(plan: Any, program: Program, grads: tuple, saved: tuple) -> Callable:
    """What autograd calls of a node: a function of (node, *grads) -> the gradients of its inputs.

    Tensors that do not fit, and a backward that is to be differentiated, take the long way. The C++
    runner gets the program too, if it has the plan.
    """
    values = (*grads, *saved)
    if plan.native is not None:
        python = functools.partial(_step, program)
        _native.backward(plan.native, program, values, _checks(None, program), python)
    tensors = [t for t in values if t is not None]
    cells = _Cells()
    names: list[str] = []
    mine: list[str] = []
    asked: list[str] = [f"not {cells(torch.is_grad_enabled)}()"]
    for i, t in enumerate(values):
        if t is None:
            names.append(f"none{i}")
            asked.append(f"none{i} is None")
        else:
            names.append(_name(len(mine)))
            mine.append(names[-1])
    asked.insert(1, f"{cells(_guard(tensors))}({', '.join(mine)})")
    asked += [_aligned(mine), *_ready(None, program, cells)]
    given, kept = names[: len(grads)], names[len(grads) :]
    steps = _steps(program, cells, {*mine})
    results = _slots((*((None,) if plan.early else ()), *program.results))
    # In a second backward `saved_tensors` raises, even if nothing was saved.
    lines = [f"saved = {'ctx.saved_tensors' if plan.saves else '()'}"]
    lines += [f"{''.join(f'{n}, ' for n in kept)} = saved"] if kept else []
    lines += ["drawn = ctx.drawn"] if program.draws else []
    lines += [
        f"if {' and '.join(asked)}:",
        *(f"    {line}" for line in steps),
        f"    return {results}",
        f"return {cells(plan.go_back)}(ctx, ({''.join(f'{n}, ' for n in given)}), saved)",
    ]
    return _make(cells, f"def function({', '.join(['ctx', *given])}):", lines)


# ---- Whole graphs -------------------------------------------------------------------------------

_CLEAR = "maybe_clear_saved_tensors"  # a method of nodes


def casts() -> tuple[torch.dtype | None, ...]:
    """The dtypes of autocast on GPUs and on CPUs; None where it is off."""
    return autocast("cuda"), autocast("cpu")


def _below(program: Program, cells: _Cells, known: set[str], uncast: bool) -> list[str]:
    """The source lines of a whole pass, whose operators autograd does not see, nor autocast."""
    guards: list[type] = [torch._C._AutoDispatchBelowADInplaceOrView]
    if uncast:
        guards.append(torch._C._DisableAutocast)
    lines = _steps(program, cells, known)
    opened = ", ".join(f"{cells(guard)}()" for guard in guards)
    return [f"with {opened}:", *(f"    {line}" for line in lines or ["pass"])]


def _launched(program: Program, names: list[str]) -> list[str]:
    """Those of `names`, of the given slots, whose addresses kernels get."""
    slots = {a.slot for s in program.steps if isinstance(s, LaunchStep)
             for a in s.args if isinstance(a, Pointer)}  # fmt: skip
    return [name for i, name in enumerate(names) if i in slots]


def graph_call(plan: Any, program: Program, args: tuple[Tensor, ...], outs: tuple) -> Callable:
    """A function of the inputs of a graph that runs `program`, or returns UNFIT."""
    why = unavailable()
    if why is not None:
        raise NotReplayable(why)
    if not hasattr(torch._C, "_DisableAutocast") or _CLEAR not in dir(torch._C._FunctionBase):
        raise NotReplayable("nodes of this torch cannot let go of what they saved")
    native = _native.graph_call(
        plan, program, args, outs, _checks(plan.record, program), functools.partial(_step, program)
    )
    if native is not None:
        return native
    cells = _Cells()
    names = [_name(i) for i in range(len(args))]
    asked = [f"{cells(_guard(args))}({', '.join(names)})", *_ready(plan.record, program, cells)]
    aligned = _launched(program, names)
    if plan.node is not None:
        # Its forward looks at the addresses, because it needs them.
        plan.node.forward = staticmethod(_graph_forward(plan, program, names, aligned))
        lines = [
            "try:",
            f"    out = {cells(plan.apply)}({', '.join(names)})",
            f"except {cells(DoesNotFit)}:",
            f"    return {cells(UNFIT)}",
            *_mutations(plan.written, cells),
            "return out",
        ]
    else:
        asked += [_aligned(aligned)] if aligned else []
        lines = _below(program, cells, {*aligned}, any(casts()))
        lines += _mutations(plan.written, cells)
        lines.append(f"return {_slots(program.results)}")
    lines = [f"if {' and '.join(asked)}:", *(f"    {line}" for line in lines)]
    lines.append(f"return {cells(UNFIT)}")
    return _make(cells, f"def function({', '.join(names)}):", lines)


def _mutations(written: tuple[int, ...], cells: _Cells) -> list[str]:
    count = cells(torch.autograd.graph.increment_version)
    return [f"{count}({_name(i)})" for i in written]


def _graph_forward(plan: Any, program: Program, names: list[str], aligned: list[str]) -> Callable:
    """The forward of a node that runs `program`."""
    cells = _Cells()
    lines = []
    if aligned:
        lines += [f"if not ({_aligned(aligned)}):", f"    raise {cells(DoesNotFit)}"]
    # Some operators ask whether gradients may be wanted. The node's caller sets this back.
    lines.append(f"{cells(torch._C._set_grad_enabled)}(True)")
    lines += _below(program, cells, {*aligned}, any(casts()))
    if program.saved:
        lines.append(f"ctx.to_save = {_slots(program.saved)}")
    if plan.keeps:
        lines.append(f"ctx.kept = ({', '.join(names)},)")
        lines.append(f"ctx.version = {' + '.join(f'{name}._version' for name in names)}")
    if plan.constant:
        constant = tuple([program.results[i] for i in plan.constant])
        lines.append(f"ctx.non_differentiable = {_slots(constant)}")
    lines.append("ctx.materialize_grads = False")
    if program.draws:
        lines.append("ctx.drawn = drawn")
    lines.append(f"return {_slots(program.results)}")
    return _make(cells, f"def function({', '.join(['ctx', *names])}):", lines)


def graph_backward(plan: Any, program: Program, grads: tuple, saved: tuple) -> Callable:
    """What autograd calls of the node of a graph: a function of (node, *grads) -> gradients.

    What does not fit takes the long way, `plan.go_back`.
    """
    values = (*grads, *saved)
    if plan.native is not None:
        python = functools.partial(_step, program)
        _native.backward(plan.native, program, values, _checks(None, program), python)
    cells = _Cells()
    given = [f"none{i}" if g is None else f"g{i}" for i, g in enumerate(grads)]
    mine = [name for name in given if name.startswith("g")]
    numbers = len(mine)
    slots = [_name(i) for i in range(numbers + len(saved))]
    asked = [f"not {cells(torch.is_grad_enabled)}()"]
    asked += [f"{name} is None" for name in given if name.startswith("none")]
    tensors = [t for t in values if t is not None]
    asked.append(f"{cells(_guard(tensors))}({', '.join([*mine, *slots[numbers:]])})")
    asked += _ready(plan.record, program, cells)
    lines = ["saved = ctx.saved_tensors"]
    if saved:
        lines.append(f"{''.join(f'{n}, ' for n in slots[numbers:])} = saved")
    lines += [f"{slot} = {name}" for slot, name in zip(slots, mine, strict=False)]
    aligned = _launched(program, slots)
    if aligned:
        asked.append(_aligned(aligned))
    inside = [
        f"del saved{''.join(f', {name}' for name in mine)}",
        f"ctx.{_CLEAR}()",
    ]
    inside += ["drawn = ctx.drawn"] if program.draws else []
    inside += _below(program, cells, {*aligned}, any(casts()))
    lines += [
        f"if {' and '.join(asked)}:",
        *(f"    {line}" for line in inside),
        f"    return {_slots(program.results)}",
        f"return {cells(plan.go_back)}(ctx, ({''.join(f'{n}, ' for n in given)}), saved)",
    ]
    return _make(cells, f"def function({', '.join(['ctx', *given])}):", lines)


def exactly(program: Program) -> Callable:
    """A function of (drawn, *tensors) -> results that runs `program`, whatever it is given."""
    cells = _Cells()
    lines = [*_below(program, cells, set(), True), f"return {_slots(program.results)}"]
    names = [_name(i) for i in range(program.given)]
    return _make(cells, f"def function({', '.join(['drawn', *names])}):", lines)
