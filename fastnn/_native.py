"""Translates plans for the C++ runner, `native/runner.cpp`.

What it cannot take stays with the Python runner, and `left_to_python` tells why. A step that only
Python can carry out (an interpreted kernel, a reservation of random numbers) is called back from
C++.
"""

from __future__ import annotations

import ctypes
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastnn import _build, _mode, kernels
from fastnn._plan import (
    UNFIT,
    Allocate,
    CallStep,
    Drawn,
    LaunchStep,
    NotReplayable,
    Pointer,
    Program,
    Slot,
    flat,
    last_uses,
    nests,
    same,
)

left_to_python: Counter[str] = Counter()  # why -> how many plans the Python runner has for it

_module: Any = None
_why: str | None = "no plan was made yet"
_asked = False


def module() -> Any:
    """The C++ runner, or None. The first call decides for the whole process."""
    global _module, _why, _asked
    if not _asked:
        _asked = True
        _module, _why = _found()
    return _module


def _found() -> tuple[Any, str | None]:
    if not _build.wanted():
        return None, "FASTNN_NATIVE is not 1"
    why = _build.unsupported()
    if why is not None:
        return None, why
    try:
        found = _build.load()
    except _build.BuildError as e:
        _build.start()
        return None, str(e)
    found.setup(UNFIT, same, _mode.DeviceContext, torch.nn.functional.linear)
    return found, None


def unavailable() -> str | None:
    """Why there is no C++ runner; None if there is one."""
    module()
    return _why


@contextmanager
def using(found: Any) -> Iterator[None]:
    """Inside the block plans that are made run in `found`, a loaded module; None: in Python."""
    global _module, _why, _asked
    before = _module, _why, _asked
    if found is not None:
        found.setup(UNFIT, same, _mode.DeviceContext, torch.nn.functional.linear)
    _module, _why, _asked = found, None if found is not None else "for a test", True
    try:
        yield
    finally:
        _module, _why, _asked = before


def owns(plan: Any) -> bool:
    """Whether a plan's function runs in the C++ runner."""
    return type(plan).__module__ == "fastnn.native"


def table(record: Any, plan: Any) -> Any:
    """A table for such plans of an op as this one, which finds the plan of a call.

    `record` is an `Op`.
    """
    return plan.table(record.keyed_by, len(record.names), _mode.context())


# ---- Launches -----------------------------------------------------------------------------------

_INTEGERS = {"i1": 32, "i8": 8, "i16": 16, "i32": 32, "i64": 64, "u1": 32, "u8": 8, "u16": 16,
             "u32": 32, "u64": 64}  # fmt: skip
_VALUE, _POINTER, _DRAWN = range(3)  # Argument::Kind


def _driver(device: torch.device) -> str | None:
    """Why the driver cannot be called; None if it can."""
    library = ""
    if device.type == "cuda":
        library = str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so")
    return _module.driver("libcuda.so.1", library)


def _argument(value: Any, kind: str) -> tuple[int, int, int]:
    if kind.startswith("*"):
        if isinstance(value, Pointer):
            return _POINTER, value.slot, value.offset % 2**64
        if value is None:
            return _VALUE, 0, 0
    elif isinstance(value, Drawn):
        if kind in ("i64", "u64"):
            return _DRAWN, value.number, 0
    elif kind in _INTEGERS and isinstance(value, int):
        return _VALUE, 0, int(value) % 2 ** _INTEGERS[kind]
    elif kind in ("fp32", "f32") and isinstance(value, (int, float)):
        return _VALUE, 0, int.from_bytes(bytes(ctypes.c_float(float(value))), "little")
    elif kind == "fp64" and isinstance(value, (int, float)):
        return _VALUE, 0, struct.unpack("<Q", struct.pack("<d", float(value)))[0]
    raise NotReplayable(f"an argument of a kernel has the type {kind}")


def _launch(step: LaunchStep) -> tuple:
    """A launch through the driver. Raises NotReplayable if only Triton's launcher can make it."""
    compiled, consts = step.compiled
    if kernels._launch.direct(compiled) is None:
        raise NotReplayable("Triton launches the kernel in another way")
    run = compiled.run
    warps, clusters, shared = compiled.packed_metadata
    if clusters != 1 or run.launch_cooperative_grid or run.launch_pdl or not compiled.function:
        raise NotReplayable("a launch has attributes")
    kinds = list(compiled.src.signature.values())
    given = [*step.args, *consts]
    if len(kinds) != len(given) or not all(isinstance(k, str) for k in kinds):
        raise NotReplayable("a kernel has an argument of several values")
    arguments = []
    for value, kind in zip(given, kinds, strict=True):
        if kind == "constexpr":
            if isinstance(value, Drawn):
                raise NotReplayable("a random number is part of the code")
            continue
        arguments.append(_argument(value, kind))
    grid = (*step.grid, 1, 1)[:3]
    return "launch", compiled.function, grid, 32 * warps, shared, tuple(arguments), compiled


# ---- Operators ----------------------------------------------------------------------------------


def _operand(value: Any) -> tuple[str, Any]:
    if isinstance(value, Slot):
        return "slot", value.number
    if type(value) in (list, tuple) and value and all(isinstance(v, Slot) for v in value):
        return "slots", tuple([v.number for v in value])
    if isinstance(value, (list, tuple)) and any(isinstance(v, Slot) for v in value):
        raise NotReplayable("an operator is given tensors and other values in one list")
    return "value", value


def _call(step: CallStep) -> tuple:
    function = step.function
    if not isinstance(function, torch._ops.OpOverload):
        raise NotReplayable("an operator has no schema")
    schema = function._schema
    operands = tuple(map(_operand, step.args))
    named = {k: _operand(v) for k, v in step.kwargs.items()}
    return "call", schema.name, schema.overload_name, operands, named, step.results


# ---- Plans --------------------------------------------------------------------------------------

Python = Callable[[Any], tuple]  # a step -> ("python", callable, reads, makes), ("draw", callable)


def _step(step: Any, python: Python, operators: bool) -> tuple:
    if isinstance(step, Allocate):
        return "allocate", step.slot, step.size, step.stride, step.dtype
    try:
        if isinstance(step, LaunchStep) and step.compiled is not None:
            return _launch(step)
        if isinstance(step, CallStep) and operators:
            return _call(step)
    except NotReplayable:
        pass  # by Python, as a step
    return python(step)


def _program(program: Program, python: Python, operators: bool) -> tuple:
    steps = tuple([_step(s, python, operators) for s in program.steps])
    whole: tuple = ()
    if program.whole:
        pointers = {
            a.slot for s in program.steps if isinstance(s, LaunchStep)
            for a in s.args if isinstance(a, Pointer)
        }  # fmt: skip
        addressed = tuple([int(i in pointers) for i in range(program.given)])
        whole = tuple(last_uses(program)), addressed
    if any(s[0] == "launch" for s in steps):
        why = _driver(program.device)
        if why is not None:
            raise NotReplayable(f"the driver is not there: {why}")
    return steps, tuple(program.lasting.items()), program.results, program.saved, *whole


def _made(*programs: Program) -> int:
    """How many slots the programs have."""
    slots = {-1, *range(programs[0].given)}
    for program in programs:
        slots.update(program.lasting)
        slots.update(s for s in (*program.results, *program.saved) if s is not None)
        for step in program.steps:
            if isinstance(step, Allocate):
                slots.add(step.slot)
            elif isinstance(step, CallStep):
                slots.update(s for s in step.results if s is not None)
    return max(slots) + 1


def _form(value: Any) -> tuple | None:
    """(tuple or list, the forms of its elements) for one that holds tensors; None for others."""
    return (type(value), tuple(map(_form, value))) if nests(value) else None


def _tried(make: Callable[[bool], Any]) -> Any:
    """`make(operators)`, with operators called in C++ if their arguments can be converted."""
    try:
        return make(True)
    except NotImplementedError:
        pass
    try:
        return make(False)
    except NotImplementedError as e:
        raise NotReplayable(str(e)) from None


def _copied(value: Any) -> Any:
    """`value`; a copy of a list, which its owner may change."""
    return [*value] if type(value) is list else value


def call(
    record: Any, plan: Any, before: Program, after: Program, values: tuple, heard: Any,
    picked: int | tuple[int, ...] | None, checks: list, slow: Callable, python: Python,
) -> Callable | None:  # fmt: skip
    """A function that runs `plan` as that of `_runner.call` does; None if the plan is not taken."""
    native = module()
    if native is None:
        return None
    try:
        results = [r for r in after.results if r is not None]
        if len(results) < len(set(results)):
            raise NotReplayable("a result is returned twice")
        if any(t is not None and t._is_view() for t in heard.raw):
            raise NotReplayable("a result is a view")
        made, plan.native = _tried(
            lambda operators: native.plan(
                {
                    "name": f"{plan.function.__name__}Backward",
                    "forms": tuple(map(_form, values)),
                    "values": tuple(map(_copied, flat(values))),
                    "ignored": tuple(
                        [
                            name == "_stacklevel"
                            for name, value in zip(record.names, values, strict=True)
                            for _ in flat((value,))
                        ]
                    ),
                    "checks": tuple(checks),
                    "before": _program(before, python, operators),
                    "after": _program(after, python, operators),
                    "count": _made(before, after),
                    "order": before.results,
                    "graph": heard.graph,
                    "saves": plan.saves,
                    "materialize": plan.materialize,
                    "picked": (picked,) if isinstance(picked, int) else picked,
                    "single": not heard.many or isinstance(picked, int),
                    "outputs": tuple(heard.raw),
                    "constant": tuple([i in plan.constant for i in range(len(heard.raw))]),
                    "slow": slow,
                    "keeps": False,
                    "written": (),
                }
            )
        )
        return made
    except NotReplayable as e:
        left_to_python[str(e)] += 1
        return None


def graph_call(
    plan: Any, program: Program, args: tuple, outs: tuple, checks: list, python: Python
) -> Callable | None:
    """What `call` makes, of a plan of a whole graph. outs: what the recorded call returned."""
    native = module()
    if native is None:
        return None
    try:
        made, plan.native = _tried(
            lambda operators: native.plan(
                {
                    "name": f"{plan.function.__name__}Backward",
                    "forms": (None,) * len(args),
                    "values": args,
                    "ignored": (False,) * len(args),
                    "checks": tuple(checks),
                    "before": ((), (), (), ()),
                    "after": _program(program, python, operators),
                    "count": _made(program),
                    "order": tuple(range(len(args))),
                    "graph": plan.node is not None,
                    "saves": plan.saves,
                    "materialize": False,
                    "picked": None,
                    "single": False,
                    "outputs": outs,
                    "constant": tuple([i in plan.constant for i in range(len(outs))]),
                    "slow": plan.slow,
                    "keeps": plan.keeps,
                    "written": plan.written,
                }
            )
        )
        return made
    except NotReplayable as e:
        left_to_python[str(e)] += 1
        return None


def backward(
    holder: Any, program: Program, values: tuple[Tensor | None, ...], checks: list, python: Python
) -> None:
    """Give the backward of a plan to the C++ runner; without it, its nodes call Python."""
    try:
        _tried(
            lambda operators: holder.set(
                _program(program, python, operators), values, tuple(checks), _made(program)
            )
        )
    except NotReplayable as e:
        left_to_python[str(e)] += 1
