"""What a launch can reach at best: its instructions and bytes, counted without a GPU.

    launches = []
    with capture(launches, "cuda:90"):   # in a process without TRITON_INTERPRET
        F.gelu(torch.randn(4096))
    print(roof(launches[0]).worst)

Bytes alone do not say whether a kernel can reach the bandwidth of a GPU. The compiled code says
more. Each instruction of the machine code (SASS) came from a line of PTX, which the disassembler
names. The emulator runs one block of the launch, and counts how often each line runs. Together they
give the instructions that the launch issues, also where a loop was unrolled. Where two blocks of a
launch run different lines, the counts are the mean of 16 blocks, spread evenly over the launch.

A `Roof` is not a predicted time. It has the least time that each part of the GPU needs for its
share of the work, as if nothing waited for anything else. The launch takes at least the longest of
them. Latencies, conflicts of shared memory, atomics and the caches are not counted. The figures of
attention, of kernels with atomics, and of kernels that are bound by instructions were never
compared with a measurement.
"""

from __future__ import annotations

import itertools
import math
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from fastnn import _record, kernels
from fastnn.kernels import _gpus
from fastnn.testing import aot, ptx

SECTOR = 32  # bytes that are moved at least
SAMPLES = 16  # blocks that are counted, of a launch whose blocks are not alike
GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples spread evenly over 0 to 1

# Cycles for which an instruction of a warp occupies a part of a scheduler, or the one load/store
# unit of a multiprocessor. CUDA C++ Programming Guide, throughput of arithmetic instructions, 8.0
# to 9.0: 128 fp32 (64 on 8.0), 64 integer, 16 special functions, 32 loads per cycle and SM.
_ALU, _FMA, _MUFU = 2.0, 1.0, 8.0
_TENSOR = {"HMMA": 2048 / 317, "HGMMA": 16 / 512}  # for an HGMMA: times its n and k


@dataclass(frozen=True)
class CompiledLaunch:
    """A launch that was compiled for an NVIDIA GPU and did not run."""

    target: str
    kernel: str
    grid: tuple[int, int, int]
    warps: int
    shared: int
    """Bytes of shared memory of a block."""
    cubin: bytes
    ptx: str
    arguments: list
    tensors: list[torch.Tensor]
    key: tuple


@dataclass(frozen=True)
class Roof:
    """What a launch needs of each part of the GPU."""

    kernel: str
    programs: int
    warps: int
    """Of a program."""
    registers: int
    """Of a thread."""
    blocks: int
    """Programs that a multiprocessor holds at the same time."""
    instructions: int
    """That a warp issues."""
    dram: float
    """Bytes that the launch moves from and to memory."""
    us: dict[str, float] = field(default_factory=dict)
    """The least time of each part: "dram", "l2", "issue", "alu", "fma", "mufu", "lsu", "tensor"."""
    spilled: int = 0
    """Bytes of registers that threads store to their memory and load again, in the launch."""
    spills_in_loop: int = 0
    """Instructions in a loop that store a register to the thread's memory."""
    in_flight: int = 0
    """Bytes that a multiprocessor has asked for at the same time, at most."""
    sms: int = 1
    """Multiprocessors of the GPU."""

    @property
    def waves(self) -> float:
        """Programs of the launch, divided by the programs that the GPU holds at the same time."""
        return self.programs / (self.sms * max(self.blocks, 1))

    def share(self, part: str) -> float:
        """The least time of a part, divided by the time to move the bytes."""
        return self.us[part] / self.us["dram"] if self.us["dram"] else math.inf

    @property
    def worst(self) -> str:
        """The part that needs longest, besides memory."""
        return max((p for p in self.us if p != "dram"), key=lambda part: self.us[part])


# ---- capture ------------------------------------------------------------------------------------


class _Capturing(aot.CompilingDriver):
    """A driver that keeps what a launch compiled, and its arguments."""

    def __init__(self, target: aot.Target) -> None:
        super().__init__(target)
        self.log: list[tuple[Any, tuple, list]] = []

    def launcher(self, compiled: Any) -> Callable:
        source, metadata = compiled
        taken = [ty != "constexpr" for ty in source.signature.values()]

        def launch(x, y, z, stream, function, packed, launched, enter, leave, *args):
            self.log.append((metadata, (x, y, z), list(itertools.compress(args, taken))))

        return launch

    def taken(self, target: str, key: tuple = ()) -> list[CompiledLaunch]:
        """The launches since the last question, which get `key`."""
        found = []
        for metadata, programs, given in self.log:
            asm = aot.assembly_of(metadata.name, metadata.hash)
            tensors = [a for a in given if isinstance(a, torch.Tensor)]
            plain = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in given]
            code = asm["cubin"], asm["ptx"]
            options = metadata.num_warps, metadata.shared
            found.append(
                CompiledLaunch(
                    target, metadata.name, programs, *options, *code, plain, tensors, key
                )
            )
        self.log.clear()
        return found


def _word(value: Any) -> Any:
    """A value as a part of a key that another process gives the same name."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype).removeprefix("torch."), value.numel(), value.data_ptr() % 16 == 0
    if hasattr(value, "cache_key"):  # a jit function
        return value.__name__, value.cache_key
    return value if isinstance(value, int | str | float | None) else str(value)


_DRAWN = ("seed", "offset")  # what kernels call the numbers of a draw: other ones in each run


@contextmanager
def capture(
    launches: list[CompiledLaunch],
    target: str = "cuda:90",
    wanted: Callable[[tuple], bool] = lambda key: True,
    asked: Callable[[tuple], None] = lambda key: None,
) -> Iterator[None]:
    """Launches in the block are compiled for `target` and put into the list; none runs.

    Each launch has a key: the source of the kernel and of its functions, the types and sizes of its
    arguments, its grid and its options. It is compiled only if its key is new and `wanted`. `asked`
    hears every key.
    """
    seen: set[tuple] = set()
    stock = kernels._launch.Kernel.__call__

    def call(self, grid, *args, **meta):
        grid = (*grid, 1, 1)[:3]
        plain = [a for a, n in zip(args, self.parameters, strict=False) if n not in _DRAWN]
        sizes = tuple(map(_word, plain)), tuple((k, _word(v)) for k, v in meta.items())
        key = (self.__name__, self.fn.cache_key, grid, *sizes)
        asked(key)
        if key in seen or not all(grid):
            return
        seen.add(key)
        if not wanted(key):
            return
        driver.log.clear()
        stock(self, grid, *args, **meta)
        launches.extend(driver.taken(target, key))

    with aot.active_driver(target, _Capturing) as active, _record.using(False):
        assert isinstance(active, _Capturing)
        driver = active
        with mock.patch.object(kernels._launch.Kernel, "__call__", call):
            yield


@contextmanager
def capture_any(launches: list[CompiledLaunch], target: str = "cuda:90") -> Iterator[None]:
    """As `capture`, for the launches of all Triton kernels, also those of other libraries.

    Each launch is compiled, as often as it is asked for. Its key is empty. In the block, PyTorch
    says that the device of CPU tensors has as many multiprocessors as the target.
    """
    facts = SimpleNamespace(multi_processor_count=aot.TARGETS[target].facts.sms)
    with (
        aot.active_driver(target, _Capturing) as driver,
        _record.using(False),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: facts),
    ):
        assert isinstance(driver, _Capturing)
        yield
        launches.extend(driver.taken(target))


# ---- machine code -------------------------------------------------------------------------------


class Instruction(NamedTuple):
    """One instruction of the machine code."""

    op: str
    line: int
    """The line of the PTX that it came from."""
    waits: int
    """The barriers that it waits for, as bits."""
    sets: int
    """The barrier that it clears when its result is there; 7 for none."""
    target: int
    """Where it may go on, as a number in the list; -1 for the next one."""


_FILE_LINE = re.compile(r'//## File ".nv_debug_ptx_txt", line (\d+)')
_FIRST = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);\s*/\* 0x[0-9a-f]{16} \*/"
)
_SECOND = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/")  # the upper half, which has the control bits


_CALL = 40  # a jump over a call leads no further than so many instructions


def disassembled(cubin: bytes) -> list[Instruction]:
    """The instructions of the kernel, without functions that it calls in rare cases.

    Functions are called for divisions of subnormal numbers and the like. The instructions around
    such a call, which are jumped over otherwise, are left out too.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        text = aot.run_tool("nvdisasm", "-ndf", "-c", "-gp", "-hex", f.name)
    rows: list[list] = []
    labels: dict[str, int] = {}
    line = 0
    for row in text.splitlines():
        if row.lstrip().startswith(".weak") and "$__" in row:
            break
        if found := _FILE_LINE.search(row):
            line = int(found[1])
        elif found := re.match(r"(\.L_\w+):", row):
            labels[found[1]] = len(rows)
        elif found := _FIRST.search(row):
            rows.append([found[1], line, 0, 7, found[2]])
        elif (found := _SECOND.match(row)) and rows:
            bits = int(found[1], 16)
            rows[-1][2:4] = (bits >> 52) & 63, (bits >> 46) & 7
    made = []
    for op, line, waits, sets, operands in rows:
        to = re.search(r"\.L_\w+", operands) if op.startswith("BRA") else None
        made.append(Instruction(op, line, waits, sets, labels.get(to[0], -1) if to else -1))
    rare = set()
    for at, one in enumerate(made):
        between = made[at + 1 : one.target] if at < one.target <= at + _CALL else []
        if any(i.op.startswith("CALL") for i in between):
            rare |= set(range(at + 1, one.target))
    renumbered = list(itertools.accumulate((n not in rare for n in range(len(made))), initial=0))
    return [
        one._replace(target=renumbered[one.target] if one.target >= 0 else -1)
        for n, one in enumerate(made)
        if n not in rare and one.op != "NOP"
    ]


def _bytes(op: str) -> int:
    """Bytes that an access moves for each thread."""
    parts = op.split(".")
    for part, size in (("128", 16), ("64", 8), ("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2)):
        if part in parts:
            return size
    return 4


_MEMORY = (
    "LDG", "STG", "LDGSTS", "LDL", "STL", "LDS", "STS", "LDSM", "STSM", "SHFL", "ATOMG", "REDG",
    "RED", "ATOM", "ATOMS", "LD", "ST",
)  # fmt: skip
_CONTROL = (
    "BRA", "EXIT", "NOP", "BSSY", "BSYNC", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "RET",
    "CALL", "YIELD", "BAR", "LDC", "ULDC", "BREAK", "ERRBAR", "MEMBAR", "CCTL", "FENCE",
)  # fmt: skip


def part(op: str) -> str:
    """The part of a multiprocessor that an instruction occupies; "issue" if it is none of these."""
    name = op.partition(".")[0]
    if name in _MEMORY:
        return "lsu"
    if name in ("HMMA", "HGMMA", "IMMA"):
        return "tensor"
    if name in ("MUFU", "F2F", "FRND", "F2I", "I2F"):
        return "mufu"
    if name in ("FFMA", "FADD", "FMUL", "HADD2", "HMUL2", "HFMA2", "IMAD"):
        return "fma"
    if name in _CONTROL or (name[0] == "U" and name != "UNKNOWN"):
        return "issue"
    return "alu"


# ---- counts -------------------------------------------------------------------------------------


class _Counting(ptx.PtxKernel):
    """A program that counts how often its first warp runs each block of instructions."""

    def __init__(self, text: str):
        super().__init__(text)
        self.runs = np.zeros(len(self._blocks), np.int64)

    def _run_block(self, machine, here, mask):
        if mask is None or mask[:32].any():
            self.runs[here] += 1
        return super()._run_block(machine, here, mask)

    def loop_of(self) -> list[int]:
        """For each block, the first block of the innermost loop that it is in, or -1."""
        spans = []
        for at, block in enumerate(self._blocks):
            spans += [(i.target, at) for i in block if i.run is None and i.target <= at]
        loops = []
        for at in range(len(self._blocks)):
            around = [(last - first, first) for first, last in spans if first <= at <= last]
            loops.append(min(around)[1] if around else -1)
        return loops


class _Watched(ptx.Memory):
    """Memory that keeps which sectors are read and written."""

    def __init__(self, spans):
        spans = sorted(set(spans))
        super().__init__(spans)
        self._storages = spans
        self.read: set[int] = set()
        self.written: set[int] = set()
        self.sectors = 0
        """Sectors of all accesses, each access by itself."""

    def held(self, sectors: set[int]) -> int:
        """Bytes of the storages that have any of these sectors."""
        at = np.fromiter(sectors, np.int64, len(sectors)) * SECTOR
        spans = ((start, start + size) for start, size in self._storages)
        return sum(
            end - start for start, end in spans if ((at + SECTOR > start) & (at < end)).any()
        )

    def _watch(self, at, size: int, into: set[int]) -> None:
        first = np.unique(at // np.uint64(SECTOR))
        if size > SECTOR:
            first = np.unique(first[:, None] + np.arange(size // SECTOR, dtype=np.uint64))
        self.sectors += first.size
        into.update(first.tolist())

    def load(self, at, dtype, count, what):
        self._watch(at, np.dtype(dtype).itemsize * count, self.read)
        return super().load(at, dtype, count, what)

    def store(self, at, values, what):
        self._watch(at, values.itemsize * values.shape[-1], self.written)
        return super().store(at, values, what)


def _ran(launch: CompiledLaunch, block: int) -> tuple[_Counting, _Watched]:
    program = _Counting(launch.ptx)
    memory = _Watched(
        (s.data_ptr(), s.nbytes()) for s in (t.untyped_storage() for t in launch.tensors)
    )
    arguments = launch.arguments + [0] * (len(program.parameters) - len(launch.arguments))
    threads = 32 * launch.warps
    program.run(launch.grid, threads, launch.shared, arguments, memory, [block])
    return program, memory


_ANCHORS = ("LDG", "STG", "LDGSTS", "BAR", "SHFL", "HMMA", "HGMMA", "LDS", "STS")


def _repeats(code: list[Instruction], program: _Counting) -> dict[int, float]:
    """PTX line -> how often an instruction that came from it runs, for each of its copies.

    An unrolled loop has several copies of each instruction. Accesses, barriers and shuffles are one
    instruction in both languages, so the number of their copies in a loop says how far it was
    unrolled.
    """
    copies = Counter(i.line for i in code if i.op.partition(".")[0] in _ANCHORS)
    loops = program.loop_of()
    anchors: dict[int, list[int]] = defaultdict(list)
    for loop, lines in zip(loops, program.lines, strict=True):
        anchors[loop] += [copies[line] for line in lines if copies[line]]
    found: dict[int, float] = {}
    for at, (loop, lines) in enumerate(zip(loops, program.lines, strict=True)):
        unrolled = min(anchors[loop]) if loop >= 0 and anchors[loop] else 1
        found |= dict.fromkeys(lines, program.runs[at] / unrolled)
    return found


def _in_flight(code: list[Instruction]) -> int:
    """The most bytes that a thread has asked global memory for, and not waited for."""
    pending, copied, most = [0] * 8, 0, 0
    for one in code:
        for barrier in range(6):
            if one.waits >> barrier & 1:
                pending[barrier] = 0
        name = one.op.partition(".")[0]
        if name == "LDG" and one.sets < 6:
            pending[one.sets] += _bytes(one.op)
        elif name == "LDGSTS":
            copied += _bytes(one.op)
        elif name == "DEPBAR":
            most, copied = max(most, sum(pending) + copied), 0
        most = max(most, sum(pending) + copied)
    return most


def roof(launch: CompiledLaunch) -> Roof:
    """The roof of a launch.

    Raises NotImplementedError for an instruction that the emulator does not know, and ValueError
    for a GPU whose clock the table of GPUs does not have.
    """
    gpu = aot.TARGETS[launch.target].facts
    if not gpu.clock:
        raise ValueError(f"roof: no clock of {gpu.name} is known")
    usage = aot.nvidia_resources(launch.cubin, launch.ptx)
    code = disassembled(launch.cubin)
    blocks, _ = aot.occupancy_of(gpu, usage.registers, launch.shared, launch.warps)
    programs = math.prod(launch.grid)
    program, memory = _ran(launch, programs // 2)
    # What another program reads too, weights above all, comes from a cache.
    other: set[int] = set()
    if programs > 1:
        far = programs // 2 + programs // 3
        second, seen = _ran(launch, far if far < programs else 0)
        other = seen.read
        if (second.runs != program.runs).any():
            # Some blocks have more to do, such as those at the border of an image.
            spread = [int(programs * (n * GOLDEN % 1)) for n in range(1, SAMPLES + 1)]
            program.runs = np.mean([_ran(launch, n)[0].runs for n in spread], axis=0)
    own, common = len(memory.read - other), len(memory.read & other)
    dram = min(memory.held(memory.read), SECTOR * (programs * own + common))
    dram += min(memory.held(memory.written), SECTOR * programs * len(memory.written))

    repeats = _repeats(code, program)
    busy: dict[str, float] = defaultdict(float)
    spilled = issued = 0.0
    for one in code:
        times = repeats.get(one.line, 1)
        which = part(one.op)
        issued += times
        name = one.op.partition(".")[0]
        cycles = {"alu": _ALU, "fma": _FMA, "mufu": _MUFU}.get(which, 1.0)
        if name.startswith("IMAD") and not re.search(r"MOV|SHL|IADD", one.op):
            cycles = 2 * _FMA
        elif which == "lsu" and name not in ("SHFL", "LDSM", "STSM"):
            cycles = max(1.0, _bytes(one.op) / 4)
        elif which == "tensor":
            cycles = _TENSOR["HMMA"]
            if shape := re.search(r"64x(\d+)x(\d+)", one.op):
                cycles = _TENSOR["HGMMA"] * int(shape[1]) * int(shape[2])
        if which != "issue":
            busy[which] += times * cycles
        if name in ("LDL", "STL"):
            spilled += times * _bytes(one.op) * 32 * launch.warps * programs
    per_us = gpu.sms * gpu.clock / 1e6
    # A part of the GPU is idle in the last wave. With few programs that counts.
    each = programs / gpu.sms
    uneven = math.ceil(each) / each if each < 4 else 1.0
    warps = programs * launch.warps * uneven
    us = {p: warps * n / per_us / _gpus.SCHEDULERS for p, n in busy.items() if p != "lsu"}
    us["lsu"] = warps * busy["lsu"] / per_us
    us["issue"] = warps * issued / per_us / _gpus.SCHEDULERS
    us["dram"] = dram / gpu.reached * 1e6
    us["l2"] = programs * memory.sectors * SECTOR / gpu.l2_reached * 1e6
    resident = max(1, min(blocks, math.ceil(each)))
    backward = [(i.target, n) for n, i in enumerate(code) if 0 <= i.target < n]
    return Roof(
        kernel=launch.kernel,
        programs=programs,
        warps=launch.warps,
        registers=usage.registers,
        blocks=blocks,
        instructions=round(issued),
        dram=dram,
        us=us,
        spilled=round(spilled),
        spills_in_loop=sum(
            i.op.startswith("STL") and any(a <= n <= b for a, b in backward)
            for n, i in enumerate(code)
        ),
        in_flight=_in_flight(code) * 32 * launch.warps * resident,
        sms=gpu.sms,
    )


# ---- judgement ----------------------------------------------------------------------------------

ISSUE = 0.8  # of the time to move the bytes
IN_FLIGHT = 32 * 1024
SHORT_US = 3.0


def faults(roof: Roof) -> dict[str, str]:
    """Why a streaming launch cannot reach the bandwidth: kind -> words. Empty if it may.

    The kinds are "issue", "spill", "in flight" and "fill". Only a spill counts in a launch of less
    than 3 us.
    """
    wrong = {}
    if roof.spills_in_loop:
        wrong["spill"] = f"{roof.spills_in_loop} spilled stores in a loop"
    if roof.us["dram"] < SHORT_US:
        return wrong
    if roof.share("issue") > ISSUE:
        wrong["issue"] = f"instructions take {roof.share('issue'):.2f} of the time of the bytes"
    if roof.in_flight < IN_FLIGHT:
        wrong["in flight"] = f"{roof.in_flight / 1024:.0f} KiB asked for at the same time"
    if roof.programs < roof.sms:
        wrong["fill"] = f"{roof.programs} programs for {roof.sms} multiprocessors"
    return wrong
