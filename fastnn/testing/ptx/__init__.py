"""Runs PTX on the CPU: the code that Triton compiled for an NVIDIA GPU, on real data.

Triton's interpreter runs the source of a kernel. A GPU runs compiled code, with layouts, shuffles
between threads, shared memory, fragments of tensor cores, libdevice and contraction into fma.
`PtxKernel` runs the compiled code as PTX ISA 8.7 defines it. The threads of many blocks run side by
side in NumPy arrays: each register is an array with one element per thread, or with a single
element for all threads.

- If threads part at a branch, they take turns, the earliest instruction first. At a barrier they
  wait for the threads of their block; at an instruction of a warp, for the threads of their warp.
- Each access to global memory is checked against the tensors of the launch, and for its alignment.
  Each access to shared memory is checked against its size. Shared memory is nan at the start.
- Approximate instructions have an error, up or down by the bits of the value, as large as
  documented.
- Copies and matrix products that are asynchronous on a GPU are complete when they are issued, and
  threads that have not parted move in step. A missing wait is therefore not noticed. A missing
  barrier is noticed if warps run `apart`: then each warp runs alone up to its next barrier.
- Tensor cores add as in float64, and round once per instruction.
- An unknown instruction raises NotImplementedError, which names the instruction.

Kernels run this way inside `fastnn.testing.aot.emulate`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastnn.testing.ptx import matrices as _matrices  # noqa: F401  # adds its makers
from fastnn.testing.ptx.instructions import MAKERS, Names, Run
from fastnn.testing.ptx.machine import WARP, Machine, Mask, Memory
from fastnn.testing.ptx.values import TYPES, UNSIGNED, Array, width

__all__ = ["Memory", "PtxKernel"]

Apart = Literal["", "first", "last"]

_SIDE_BY_SIDE = 8192  # threads that run together, if there are so many
_END = 1 << 30

_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)[^{]*\{(.*?)\n\}", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.(\w+)[^,]*?\b(\w+)\s*(?:,|$)")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%[A-Za-z_]+)<")
_LOCATION = re.compile(r"\.loc\s[^\n]*")
_LABEL = re.compile(r"(\$?\w+):(?!:)\s*")
_INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")


# Instructions before which threads wait for other threads: 1 means of their warp, 2 of their block.
_MEETINGS = {
    **dict.fromkeys(("shfl", "redux", "mma", "ldmatrix", "stmatrix", "wgmma"), 1),
    **dict.fromkeys(("bar", "barrier"), 2),
}


def _meeting(text: str) -> int:
    opcode = text.split()[1 if text[0] == "@" else 0]
    return 1 if opcode.startswith("bar.warp") else _MEETINGS.get(opcode.partition(".")[0], 0)


@dataclass(frozen=True)
class _Instruction:
    guard: int | None  # register of its predicate
    unless: bool
    run: Run | None
    target: int  # the block that a jump goes to; `_END` ends the thread


class PtxKernel:
    """The entry point of a PTX module. Raises NotImplementedError for unknown instructions."""

    def __init__(self, ptx: str):
        text = _LOCATION.sub("", re.sub(r"//[^\n]*", "", ptx))
        entry = _ENTRY.search(text)
        if entry is None:
            raise NotImplementedError("PTX without an entry point")
        self.name = entry[1]
        self.parameters: list[tuple[str, str]] = _PARAMETER.findall(entry[2])
        self._names = Names({prefix: kind for kind, prefix in _REGISTERS.findall(entry[3])})
        self._labels: dict[str, int] = {}
        blocks: list[list[str]] = [[]]
        self.lines: list[list[int]] = [[]]
        """The line of the text on which each instruction of each block ends."""
        self._meetings = [0]  # where the threads meet at the start of each block

        def begin(meeting: int) -> None:
            if blocks[-1]:
                blocks.append([])
                self.lines.append([])
                self._meetings.append(meeting)
            else:
                self._meetings[-1] = max(self._meetings[-1], meeting)

        line = text.count("\n", 0, entry.start(3)) + 1
        for statement in entry[3].split(";"):
            line += statement.count("\n")
            text = " ".join(statement.split())
            while label := _LABEL.match(text):
                begin(0)
                self._labels[label[1]] = len(blocks) - 1
                text = text[label.end() :]
            if text and text[0] != ".":
                meeting = _meeting(text)
                if meeting == 2 or meeting > self._meetings[-1]:  # else they have met already
                    begin(meeting)
                blocks[-1].append(text)
                self.lines[-1].append(line)
                if re.search(r"\b(bra|ret|exit)\b", text):  # only the last one of a block jumps
                    begin(0)
        self._blocks = [[self._instruction(text) for text in block] for block in blocks]

    def _instruction(self, text: str) -> _Instruction:
        found = _INSTRUCTION.fullmatch(text)
        if found is None:
            raise NotImplementedError(text)
        guard = self._names.register(found[2]) if found[2] else None
        parts = found[3].split(".")
        operands = [o.strip() for o in _OPERAND.findall(found[4])]
        run: Run | None = None
        target = _END
        if parts[0] == "bra":
            target = self._labels[operands[0]]
        elif parts[:2] == ["ld", "param"]:
            run = self._parameter(parts, operands)
        elif parts[0] not in ("ret", "exit"):
            if parts[0] not in MAKERS:
                raise NotImplementedError(text)
            try:
                run = MAKERS[parts[0]](self._names, parts, operands)
            except NotImplementedError as e:
                raise NotImplementedError(f"{text} ({e})") from None
        return _Instruction(guard, found[1] == "!", run, target)

    def _parameter(self, parts: list[str], operands: list[str]) -> Run:
        number = [name for _, name in self.parameters].index(operands[1].strip("[] "))
        put = self._names.put(operands[0])
        dtype = UNSIGNED[width(parts[-1])]
        return lambda machine, mask: put(machine, machine.arguments[number].view(dtype), mask)

    def run(
        self, grid: Sequence[int], threads: int, shared: int, arguments: Sequence, memory: Memory,
        only: Sequence[int] | None = None, apart: Apart = "",
    ) -> None:  # fmt: skip
        """Run `grid` blocks of `threads` threads and `shared` bytes of shared memory each.

        `arguments` has a number or an address for each parameter. If `only` is given, only the
        blocks of these numbers run; the first dimension of the grid counts fastest. With `apart`
        a warp runs up to its next barrier before another one goes on, the first or the last warp
        that can. Raises IndexError if a thread accesses memory outside that of the launch, or
        accesses it unaligned.
        """
        x, y, z = (*grid, 1, 1)[:3]
        values = [
            np.array([value], TYPES[kind])
            if kind[0] == "f"
            else np.array([int(value) % (1 << width(kind))], UNSIGNED[width(kind)])
            for (kind, _), value in zip(self.parameters, arguments, strict=True)
        ]
        number = np.arange(x * y * z) if only is None else np.array(only)
        blocks = np.stack(np.unravel_index(number, (z, y, x)), 1).astype(np.uint32)
        step = max(1, _SIDE_BY_SIDE // threads)
        with np.errstate(all="ignore"):
            for first in range(0, len(blocks), step):
                these = blocks[first : first + step, ::-1]
                machine = Machine(memory, shared, len(these), threads, self._names.dtypes)
                machine.arguments = values
                self._introduce(machine, these, (x, y, z), threads)
                if apart:
                    self._run_apart(machine, apart)
                else:
                    self._run(machine)

    def _introduce(self, machine: Machine, blocks: Array, grid: tuple, threads: int) -> None:
        """Set the registers that hold the index of each thread and block."""
        thread = np.tile(np.arange(threads, dtype=np.uint32), len(blocks))
        known = {
            "%tid.x": thread,
            "%ntid.x": np.array([threads], np.uint32),
            "%laneid": thread % np.uint32(WARP),
            "%warpid": thread // np.uint32(WARP),
        }
        for axis, name in enumerate("xyz"):
            index = blocks[:, axis]
            alike = (index == index[0]).all()
            known[f"%ctaid.{name}"] = index[:1].copy() if alike else np.repeat(index, threads)
            known[f"%nctaid.{name}"] = np.array([grid[axis]], np.uint32)
        for name, number in self._names.numbers.items():
            if name in known:
                machine.registers[number] = known[name]

    def _run(self, machine: Machine) -> None:
        place: int | Array = 0  # the block of instructions that each thread is at
        while True:
            if isinstance(place, int):
                here, mask = place, None
            else:
                here, mask = self._next(machine, place)
                if mask.all():
                    place, mask = here, None
            if here >= len(self._blocks):
                return
            after = self._run_block(machine, here, mask)
            place = after if mask is None else np.where(mask, after, place)

    def _next(self, machine: Machine, place: Array) -> tuple[int, Array]:
        """The first block of instructions that some threads may run, and these threads."""
        for here in np.unique(place).tolist():
            there = place == here
            if here >= len(self._blocks) or not self._meetings[here]:
                return here, there
            group = machine.thread // WARP if self._meetings[here] == 1 else machine.block
            elsewhere = ~there & (place < len(self._blocks))
            missing = np.bincount(group[elsewhere], minlength=group[-1] + 1)
            ready = there & (missing[group] == 0)
            if ready.any():
                return here, ready
        raise RuntimeError(f"{self.name}: threads wait for each other")

    def _run_apart(self, machine: Machine, apart: Apart) -> None:
        threads = machine.thread.size
        place = np.zeros(threads, np.int64)
        passed = np.zeros(threads, bool)  # whether all threads of its block are at its barrier
        warps = np.arange(threads // WARP)
        warp = machine.thread // WARP
        while (running := place < len(self._blocks)).any():
            for one in warps if apart == "first" else warps[::-1]:
                ready = self._ready(machine, place, running & (warp == one), passed)
                if ready is not None:
                    break
            else:
                raise RuntimeError(f"{self.name}: threads wait for each other")
            here = int(place[ready][0])
            passed[ready] = False
            place = np.where(ready, self._run_block(machine, here, ready), place)

    def _ready(self, machine: Machine, place: Array, own: Array, passed: Array) -> Array | None:
        """Threads of a warp, all at one block of instructions, that may run; None if none may."""
        for here in np.unique(place[own]).tolist():
            there = own & (place == here)
            meeting = self._meetings[here]
            if meeting == 1 and (own & ~there).any():
                continue
            if meeting == 2 and not passed[there].all():
                group = machine.block == machine.block[there][0]
                missing = (place != here) | passed  # these have not reached it again
                if (group & missing & (place < len(self._blocks))).any():
                    continue
                passed |= group & (place == here)
            return there
        return None

    def _run_block(self, machine: Machine, here: int, mask: Mask) -> int | Array:
        """Run a block of instructions. Returns the block at which the threads of `mask` go on."""
        for instruction in self._blocks[here]:
            chosen = mask
            parting: Array | None = None
            if instruction.guard is not None:
                p = machine.registers[instruction.guard] != instruction.unless
                if p.size == 1:
                    if not p[0]:
                        continue
                else:
                    parting = p if mask is None else p & mask
                    if not parting.any():
                        continue
                    if mask is None and parting.all():
                        parting = None
                    chosen = parting
            if instruction.run is not None:
                instruction.run(machine, chosen)
            elif parting is None:
                return instruction.target
            else:
                return np.where(parting, instruction.target, here + 1)
        return here + 1
