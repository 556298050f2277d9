"""Compile the launches of a program, for GPUs that need not be present; judge the machine code.

    with compile_only("cuda:90") as compiled:   # in a process without TRITON_INTERPRET
        F.gelu(torch.randn(4096))
    for record in compiled:
        assert not code_faults(record, streaming=True)
    print(table(compiled))

Inside the block a Triton driver for the target compiles each launch, and launches nothing. A
program that runs there, on CPU tensors, is compiled for its real shapes, dtypes and alignments. Its
results are uninitialised memory. Compiled kernels come from Triton's cache if they are there.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import itertools
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction

from fastnn import _record
from fastnn.kernels import _gpus
from fastnn.ops.conv import tf32_setting
from fastnn.testing import ptx
from fastnn.testing.devices import simulated


class Target(NamedTuple):
    """A GPU to compile for: Triton's name for it, and its row in the table of GPUs."""

    gpu: GPUTarget
    facts: _gpus.GPU

    @property
    def architecture(self) -> str:
        return self.facts.name


class _Targets(Mapping[str, Target]):
    """The GPUs of `fastnn.kernels._gpus.GPUS` that Triton compiles for, as "cuda:90" and so on."""

    def _named(self) -> dict[str, _gpus.GPU]:
        rows = _gpus.GPUS.values()
        return {f"{r.backend}:{r.name.removeprefix('sm_')}": r for r in rows if r.backend}

    def __getitem__(self, target: str) -> Target:
        facts = self._named()[target]
        backend, _, arch = target.partition(":")
        return Target(
            GPUTarget(backend, int(arch) if backend == "cuda" else arch, facts.lanes), facts
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._named())

    def __len__(self) -> int:
        return len(self._named())


TARGETS = _Targets()


@dataclass(frozen=True)
class Record:
    """One specialisation of a kernel, as machine code for one target."""

    kernel: str
    target: str
    signature: dict[str, str]
    """Type of each run-time parameter, followed by ":16" if its value is known to divide by 16."""
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    registers: int
    """Per thread."""
    spills: int
    """Instructions that move a register to the thread's memory, or back."""
    stack: int
    """Bytes per thread, spilled registers included."""
    shared: int
    """Bytes of shared memory per block."""
    blocks: int
    """Blocks that fit on a multiprocessor."""
    occupancy: float
    """Warps that fit on a multiprocessor, as a share of the most that it can hold."""
    loads: int
    loads_wide: int
    """Loads from global memory, and how many of them have 128 bits or more."""
    stores: int
    stores_wide: int
    async_copies: int
    """cp.async and TMA: loads that bypass the registers."""
    tensor_core: dict[str, int]
    """Matrix instructions by kind: mma, wgmma, tcgen05, mfma."""
    dots: int
    """Number of `tl.dot` with operands for tensor cores: at most 16 bits, or fp32 as tf32."""
    float_atomics: int
    aligned: bool
    """Whether wide accesses are allowed: all pointers and specialised integers divide by 16."""
    load_tile: float
    store_tile: float
    """Bytes per thread of the largest tile loaded and stored, with rows of 16 bytes or more."""


class _Compiled(NamedTuple):
    source: Any  # triton.compiler.ASTSource
    metadata: Any


# ---- the driver -------------------------------------------------------------------------------

# Triton and `fastnn.kernels` keep the binaries of a kernel per device. Each driver has a device
# number of its own, so that no driver finds binaries that were compiled under another driver.
_devices = itertools.count(1 << 16)


class CompilingDriver:
    """The part of a Triton driver that a launch uses."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._device = next(_devices)
        self.compiled: dict[str, _Compiled] = {}
        self.utils = SimpleNamespace(
            # There is no limit here: `code_faults` reports an excess, other kernels still compile.
            get_device_properties=lambda device: {"max_shared_mem": 1 << 40},
            load_binary=lambda name, binary, shared, device: (None, 0, 0, 0, 1 << 20),
            unload_module=lambda module: None,
        )

    def launcher_cls(self, src: Any, metadata: Any):
        compiled = self.compiled[metadata.hash] = _Compiled(src, metadata)
        return self.launcher(compiled)

    def launcher(self, compiled: _Compiled) -> Callable:
        return _launch_nothing

    def get_current_target(self) -> GPUTarget:
        return self._target.gpu

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu


def _launch_nothing(*launch) -> None:
    pass


class _Emulator(CompilingDriver):
    """A driver whose launches run as PTX on the CPU."""

    apart: ptx.Apart = ""

    def launcher(self, compiled: _Compiled) -> Callable:
        source, metadata = compiled
        program = ptx.PtxKernel(assembly_of(source.name, metadata.hash)["ptx"])
        taken = [ty != "constexpr" for ty in source.signature.values()]

        def launch(x, y, z, stream, function, packed, launched, enter, leave, *args):
            given = list(itertools.compress(args, taken))
            tensors = [a.untyped_storage() for a in given if isinstance(a, torch.Tensor)]
            memory = ptx.Memory((s.data_ptr(), s.nbytes()) for s in tensors)
            addresses = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in given]
            addresses += [0] * (len(program.parameters) - len(addresses))  # scratch, of no bytes
            threads = 32 * metadata.num_warps
            program.run((x, y, z), threads, metadata.shared, addresses, memory, apart=self.apart)

        return launch


class _RealLauncher(CompilingDriver):
    """A driver whose launches go through Triton's own launcher, into an empty libcuda."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        from triton.backends.nvidia import driver

        with mock.patch.object(driver, "library_dirs", lambda: [driver.libdevice_dir, _libcuda()]):
            utils = driver.CudaUtils()
        self.utils.launch = utils.launch
        self.utils.build_signature_metadata = utils.build_signature_metadata
        self.utils.load_binary = lambda name, binary, shared, device: (None, 1, 0, 0, 1 << 20)
        self._launcher = driver.CudaLauncher

    def launcher(self, compiled: _Compiled) -> Callable:
        return self._launcher(*compiled)


# What Triton's launcher calls. Each function succeeds and does nothing.
LIBCUDA = r"""
typedef int R;
#define NOTHING(name) R name() { return 0; }
R cuPointerGetAttribute(void *to, int what, unsigned long long p)
{ *(unsigned long long *)to = p; return 0; }
R cuCtxGetCurrent(void **to) { *to = (void *)1; return 0; }
R cuGetErrorString(int code, const char **to) { *to = "none"; return 0; }
R cuDriverGetVersion(int *to) { *to = 13000; return 0; }
NOTHING(cuLaunchKernel) NOTHING(cuLaunchKernelEx) NOTHING(cuInit) NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxGetDevice) NOTHING(cuDevicePrimaryCtxRetain) NOTHING(cuDeviceGet)
NOTHING(cuDeviceGetAttribute) NOTHING(cuModuleLoadData) NOTHING(cuModuleGetFunction)
NOTHING(cuFuncGetAttribute) NOTHING(cuFuncSetAttribute) NOTHING(cuFuncSetCacheConfig)
NOTHING(cuCtxSetLimit) NOTHING(cuCtxGetLimit) NOTHING(cuOccupancyMaxActiveClusters)
NOTHING(cuTensorMapEncodeTiled) NOTHING(cuTensorMapEncodeIm2col) NOTHING(cuModuleUnload)
NOTHING(cuCtxPushCurrent_v2) NOTHING(cuCtxPopCurrent_v2) NOTHING(cuMemAllocManaged)
NOTHING(cuStreamQuery)
"""


def _compiler() -> str | None:
    return shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")


def has_compiler() -> bool:
    """Whether there is a C compiler, which `launch_nothing(real_launcher=True)` needs."""
    return _compiler() is not None


@functools.cache
def _libcuda() -> str:
    """The folder of a libcuda that does nothing. Raises RuntimeError without a C compiler."""
    compiler = _compiler()
    if compiler is None:
        raise RuntimeError("launch_nothing: an empty libcuda needs a C compiler")
    folder = Path(tempfile.mkdtemp(prefix="fastnn-libcuda-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source, library = folder / "libcuda.c", folder / "libcuda.so.1"
    source.write_text(LIBCUDA)
    options = ["-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run([compiler, str(source), *options], check=True, capture_output=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return str(folder)


@contextmanager
def emulate(target: str = "cuda:90", apart: ptx.Apart = "") -> Iterator[None]:
    """Launches in the block run the code compiled for `target`, an NVIDIA GPU of `TARGETS`.

    `fastnn.testing.ptx` runs the code on CPU tensors. It raises NotImplementedError for an
    instruction that it does not know, such as the tensor-core instructions of sm_100 and sm_120,
    and IndexError if a kernel accesses memory outside its tensors. `apart`: "first" or "last" runs
    the warps of a block one by one from barrier to barrier, in this order.
    """
    if not target.startswith("cuda:"):
        raise ValueError(f"emulate: target {target!r}: only NVIDIA's code is emulated")
    # The emulator needs tensors, not addresses. Its results are compared with those of a CPU, which
    # has no TF32; for convolutions CUDA's default is TF32.
    with active_driver(target, _Emulator) as driver, _record.using(False):
        assert isinstance(driver, _Emulator)
        driver.apart = apart
        with tf32_setting.set_to("ieee"):
            yield


@contextmanager
def active_driver(
    target: str, kind: type[CompilingDriver] = CompilingDriver
) -> Iterator[CompilingDriver]:
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1: kernels of this process cannot be compiled")
    if target not in TARGETS:
        raise ValueError(f"target {target!r}: accepted are {', '.join(TARGETS)}")
    config = triton.runtime.driver
    # Asking the property would look for a GPU.
    before = vars(config).get("_active", vars(config).get("active"))
    driver = kind(TARGETS[target])
    config.set_active(driver)
    try:
        with (
            simulated(TARGETS[target].architecture, devices=["cpu"]),
        ):
            yield driver
    finally:
        config.set_active(before)


@contextmanager
def launch_nothing(target: str = "cuda:90", *, real_launcher: bool = False) -> Iterator[None]:
    """Launches in the block cost only their host side: they are compiled once and never run.

    This serves to measure the host cost on any machine. Inside the block, fastnn's dispatch treats
    a CPU tensor as one on `target`, one of `TARGETS`.

    real_launcher: launches go through Triton's own launcher and an empty libcuda, so that all that
        Triton does for a launch is done. It needs a C compiler and a machine without CUDA.

    Raises RuntimeError if there is no C compiler, or if CUDA is available.
    """
    if real_launcher and torch.cuda.is_available():
        raise RuntimeError("launch_nothing: the empty libcuda would replace the real one")
    with active_driver(target, _RealLauncher if real_launcher else CompilingDriver):
        yield


class Specialisation(NamedTuple):
    """A specialisation that a launch is about to compile."""

    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


@contextmanager
def compile_only(
    target: str, wanted: Callable[[Specialisation], bool] | None = None
) -> Iterator[list[Record]]:
    """Compiles the launches of the block for `target`, one of `TARGETS`; launches nothing.

    The list is filled when the block ends: one record per specialisation, in order of first launch.
    If `wanted` is given, specialisations that it refuses are skipped. `wanted` may be asked about
    the same one again. It needs Triton 3.5. Errors of the compiler are raised.
    """
    records: list[Record] = []
    with active_driver(target) as driver, _only(wanted) if wanted else nullcontext():
        with _record.using(False):
            yield records
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each thread waits for a tool
        records += pool.map(functools.partial(_judged, target), driver.compiled.values())


@contextmanager
def _only(wanted: Callable[[Specialisation], bool]) -> Iterator[None]:
    stock = getattr(JITFunction, "_do_compile", None)
    if stock is None:
        yield
        return

    def compile_if_wanted(self, key, signature, device, constants, options, *rest):
        what = Specialisation(
            self.fn.__name__,
            {name: str(ty) for name, ty in signature.items() if ty != "constexpr"},
            _named(self, constants),
            options.num_warps,
            options.num_stages,
        )
        if wanted(what):
            return stock(self, key, signature, device, constants, options, *rest)
        return None  # as if a compilation hook had declined: the launch returns None

    with mock.patch.object(JITFunction, "_do_compile", compile_if_wanted):
        yield


def _named(fn: Any, constants: dict[tuple[int, ...], Any]) -> dict[str, Any]:
    return {fn.arg_names[at[0]]: value for at, value in constants.items() if len(at) == 1}


# ---- machine code -------------------------------------------------------------------------------


class _Code(NamedTuple):
    registers: int
    spills: int
    stack: int
    loads: int
    loads_wide: int
    stores: int
    stores_wide: int
    async_copies: int
    tensor_core: dict[str, int]


_WIDE_BYTES = 16
_NVIDIA_MATH = {
    "mma": r"\bmma\.sync\b",
    "wgmma": r"\bwgmma\.mma_async\b",
    "tcgen05": r"\btcgen05\.mma\b",
}


def _judged(target: str, compiled: _Compiled) -> Record:
    source, metadata = compiled
    asm = assembly_of(source.name, metadata.hash)
    code = nvidia_resources(asm["cubin"], asm["ptx"]) if "cubin" in asm else _amd(asm["amdgcn"])
    threads = metadata.num_warps * metadata.target.warp_size
    blocks, occupancy = occupancy_of(
        TARGETS[target].facts, code.registers, metadata.shared, metadata.num_warps
    )
    signature, aligned = _signature(source)
    return Record(
        kernel=metadata.name,
        target=target,
        signature=signature,
        constexprs=_named(source.fn, source.constants),
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        registers=code.registers,
        spills=code.spills,
        stack=code.stack,
        shared=metadata.shared,
        blocks=blocks,
        occupancy=occupancy,
        loads=code.loads,
        loads_wide=code.loads_wide,
        stores=code.stores,
        stores_wide=code.stores_wide,
        async_copies=code.async_copies,
        tensor_core=code.tensor_core,
        dots=_tensor_core_dots(asm["ttir"]),
        float_atomics=len(re.findall(r"tt\.atomic_rmw f\w+", asm["ttir"])),
        aligned=aligned,
        load_tile=_largest_tile("load", asm["ttir"]) / threads,
        store_tile=_largest_tile("store", asm["ttir"]) / threads,
    )


def assembly_of(kernel: str, key: str) -> dict[str, Any]:
    """The stages of compilation in Triton's cache, by name."""
    group = get_cache_manager(key).get_group(f"{kernel[:150]}.json") or {}
    asm: dict[str, Any] = {}
    for name, path in group.items():
        stage = name.rpartition(".")[2]
        if stage in ("ttir", "ptx", "amdgcn"):
            with open(path) as f:
                asm[stage] = f.read()
        elif stage == "cubin":
            with open(path, "rb") as f:
                asm[stage] = f.read()
    return asm


_ADDRESSES = re.compile(r"\*|[iu](8|16|32|64)$")  # types from which addresses are computed


def _signature(source: Any) -> tuple[dict[str, str], bool]:
    signature = {}
    aligned = True
    for i, param in enumerate(source.fn.params):
        ty = source.signature[param.name]
        if ty == "constexpr":
            continue
        divisible = ["tt.divisibility", 16] in source.attrs.get((i,), [])
        signature[param.name] = f"{ty}:16" if divisible else str(ty)
        if not divisible and not param.do_not_specialize and _ADDRESSES.match(str(ty)):
            aligned = False
    return signature, aligned


def _largest_tile(access: str, ttir: str) -> int:
    tiles = re.findall(rf"tt\.{access} .*: tensor<([\dx]+)x!tt\.ptr<[a-z]+(\d+)", ttir)
    largest = 0
    for shape, bits in tiles:
        sizes = [int(size) for size in shape.split("x")]
        if sizes[-1] * int(bits) >= 8 * _WIDE_BYTES:
            largest = max(largest, math.prod(sizes) * int(bits) // 8)
    return largest


def _tensor_core_dots(ttir: str) -> int:
    dots = re.findall(r"tt\.dot (.*): tensor<[\dx]+x(\w+)>", ttir)
    return sum(
        element in ("f16", "bf16", "i8") or element.startswith("f8") or "= tf32" in attributes
        for attributes, element in dots
    )


def run_tool(tool: str, *arguments: str) -> str:
    command = [getattr(triton.knobs.nvidia, tool).path, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def nvidia_resources(cubin: bytes, ptx: str) -> _Code:
    # Widths of accesses and kinds of matrix instructions are read from the PTX, because the
    # assembler keeps them. A disassembly costs more than the compile, but only it counts spills.
    # Spills always have a stack.
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        usage = run_tool("cuobjdump", "-res-usage", f.name)
        resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert resources, usage
        sass = run_tool("nvdisasm", "-ndf", "-c", f.name) if int(resources[2]) else ""
    loads, loads_wide = _ptx_accesses("ld", ptx)
    stores, stores_wide = _ptx_accesses("st", ptx)
    return _Code(
        registers=int(resources[1]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        stack=int(resources[2]),
        loads=loads,
        loads_wide=loads_wide,
        stores=stores,
        stores_wide=stores_wide,
        async_copies=len(re.findall(r"\bcp\.async\.(?:c[ag]|bulk)\.(?!commit|wait)", ptx)),
        tensor_core={k: n for k, p in _NVIDIA_MATH.items() if (n := len(re.findall(p, ptx)))},
    )


def _ptx_accesses(op: str, ptx: str) -> tuple[int, int]:
    """Accesses to global memory, and how many of them are wide."""
    count = wide = 0
    for modifiers in re.findall(rf"\b{op}\.(?:[\w:]+\.)*?global([\w.:]*)", ptx):
        vector = re.search(r"\.v(\d+)", modifiers)
        bits = re.search(r"\.[bfsu](\d+)\b", modifiers)
        if bits:
            count += 1
            wide += int(bits[1]) * (int(vector[1]) if vector else 1) >= 8 * _WIDE_BYTES
    return count, wide


@functools.cache
def _amd(asm: str) -> _Code:
    def resource(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", asm)
        return int(found[1]) if found else 0

    loads = re.findall(r"\b(?:global|buffer|flat)_load_\w+.*", asm)
    stores = re.findall(r"\b(?:global|buffer|flat)_store_\w+", asm)
    mfma = len(re.findall(r"\bv_mfma_\w+", asm))
    return _Code(
        registers=resource("vgpr_count"),  # accumulation registers included, as they are shared
        spills=resource("vgpr_spill_count") + resource("sgpr_spill_count"),
        stack=resource("private_segment_fixed_size"),
        loads=len(loads),
        loads_wide=sum("dwordx4" in load for load in loads),
        stores=len(stores),
        stores_wide=sum("dwordx4" in store for store in stores),
        async_copies=sum("lds" in load.split() for load in loads),
        tensor_core={"mfma": mfma} if mfma else {},
    )


def occupancy_of(gpu: _gpus.GPU, registers: int, shared: int, num_warps: int) -> tuple[int, float]:
    """Blocks that fit on a multiprocessor, and the share of its warps that they fill."""
    granule = 8  # a warp gets registers in units of eight per lane
    per_lane = granule * math.ceil(max(registers, 1) / granule)
    each = gpu.registers_per_sm // _gpus.SCHEDULERS // gpu.lanes  # per scheduler and lane
    warps = min(gpu.warps_per_sm, _gpus.SCHEDULERS * (each // per_lane))
    blocks = min(gpu.blocks_per_sm, warps // num_warps)
    if shared:
        blocks = min(blocks, gpu.shared_per_sm // (shared + gpu.shared_reserved))
    return blocks, blocks * num_warps / gpu.warps_per_sm


# ---- judgement ----------------------------------------------------------------------------------

_MAX_THREADS = 1024


def code_faults(record: Record, *, streaming: bool = False) -> list[str]:
    """The faults in the code of `record`, in words; an empty list if there are none.

    `streaming` is for kernels that should run at the speed of memory. Their accesses must have 128
    bits, wherever alignment allows that and a tile has so many bits for each thread.
    """
    gpu = TARGETS[record.target].facts
    wrong = []
    if record.spills or record.stack:
        wrong.append(f"{record.spills} spills, {record.stack} bytes of stack per thread")
    if record.shared > gpu.shared_per_block:
        wrong.append(f"{record.shared} bytes of shared memory, of {gpu.shared_per_block}")
    if record.num_warps * gpu.lanes > _MAX_THREADS:
        wrong.append(f"{record.num_warps * gpu.lanes} threads, of {_MAX_THREADS}")
    if not record.blocks and record.shared <= gpu.shared_per_block:
        wrong.append(f"no room for {record.num_warps} warps of {record.registers} registers")
    if record.dots and not record.tensor_core:
        wrong.append(f"{record.dots} dots without a tensor core instruction")
    if record.float_atomics:
        wrong.append(f"{record.float_atomics} atomics on floats: equal inputs give unequal bits")
    if streaming and record.aligned:
        for tile, narrow, wide, name in (
            (record.load_tile, record.loads, record.loads_wide + record.async_copies, "loads"),
            (record.store_tile, record.stores, record.stores_wide, "stores"),
        ):
            if tile >= _WIDE_BYTES and not wide:
                wrong.append(f"no {name} of 128 bits, of {narrow}; {tile:.0f} bytes per thread")
    return wrong


def table(records: Iterable[Record]) -> str:
    """The records as aligned columns of text."""
    rows: list[tuple[str, ...]] = [
        (
            *("kernel", "target", "arguments", "constexprs", "warps", "stages", "registers"),
            *("spills", "stack", "shared", "blocks", "occupancy", "loads", "stores", "async"),
            "tensor core",
        )
    ]
    for r in records:
        rows.append(
            (
                r.kernel,
                r.target,
                " ".join(r.signature.values()),
                " ".join(f"{name}={_word(value)}" for name, value in r.constexprs.items()),
                *map(str, (r.num_warps, r.num_stages, r.registers, r.spills, r.stack, r.shared)),
                str(r.blocks),
                f"{r.occupancy:.0%}",
                f"{r.loads_wide}/{r.loads}",  # wide loads of all loads
                f"{r.stores_wide}/{r.stores}",
                str(r.async_copies),
                " ".join(f"{n} {kind}" for kind, n in r.tensor_core.items()) or "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def summary(records: Iterable[Record]) -> str:
    """A Markdown table: one line per kernel and target, with the worst of its specialisations."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for r in records:
        groups.setdefault((r.kernel, r.target), []).append(r)
    head = (
        "kernel",
        "target",
        "compiled",
        "registers",
        "spills",
        "shared KiB",
        "occupancy",
        "matrix",
    )
    lines = [
        "| " + " | ".join(head) + " |",
        "| --- | --- |" + " ---: |" * (len(head) - 3) + " --- |",
    ]
    for (kernel, target), found in sorted(groups.items()):
        cells = (
            f"`{kernel}`",
            TARGETS[target].architecture,
            str(len(found)),
            str(max(r.registers for r in found)),
            str(sum(r.spills for r in found)),
            f"{max(r.shared for r in found) / 1024:.0f}",
            f"{min(r.occupancy for r in found):.0%}",
            " ".join(sorted({kind for r in found for kind in r.tensor_core})),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _word(value: Any) -> str:
    return getattr(value, "__name__", None) or str(value)
