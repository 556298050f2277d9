"""The table of GPUs, one row per architecture.

Launch configurations, the size gate, compile checks and predictions read it. A new architecture is
one more row of `GPUS`. No other file names it, unless the compiler needs an exception there. A
"multiprocessor" is a compute unit on AMD GPUs. The numbers come from the CUDA C++ Programming Guide
("Technical Specifications per Compute Capability") and from AMD's CDNA white papers.

This file needs neither Triton nor a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

SCHEDULERS = 4  # of a multiprocessor, each with its own registers and warps; 4 on every GPU

KIB = 1024


@dataclass(frozen=True)
class GPU:
    """One architecture."""

    name: str
    """The name that `architecture` returns: "sm_90", "gfx942"; "cpu" for Triton's interpreter."""
    matrix: str
    """The kind of its matrix instructions. "mma", "mfma": operands and sums are in registers.
    "wgmma": operands are in shared memory. "tcgen05": operands are in shared memory and sums in a
    memory of their own (tensor memory)."""
    shared_per_block: int
    """Bytes of shared memory that one block may use."""
    shared_per_sm: int
    """Bytes of shared memory that a multiprocessor has."""
    warps_per_sm: int
    """Warps that a multiprocessor can hold."""
    blocks_per_sm: int
    """Blocks that a multiprocessor can hold."""
    sms: int
    """Multiprocessors of the usual GPU of this architecture, for predictions and compile checks
    without a device. If there is a device, `multiprocessors` asks it."""
    bandwidth: float
    """Bytes per second from the memory of that GPU, from its data sheet."""
    compiled_from: str | None
    """The first Triton that compiled all kernels for it without a fault; None if none was tried."""
    shared_reserved: int = KIB
    """Bytes of `shared_per_sm` that the driver reserves for each block."""
    registers_per_sm: int = 64 * KIB
    """32-bit registers that a multiprocessor has."""
    registers_per_thread: int = 255
    """32-bit registers that one thread may use."""
    lanes: int = 32
    """Threads per warp."""
    clock: float = 0.0
    """Cycles per second under load; 0 if it is not known. Only `fastnn.testing.roof` needs it."""
    reached: float = 0.0
    """Bytes per second from memory that kernels reach; 0 if it is not known."""
    l2_reached: float = 0.0
    """Bytes per second from the L2 cache; 0 if it is not known."""
    tf32: bool = True
    """Whether its matrix units multiply fp32 rounded to tf32. If False, Triton refuses tf32."""

    @property
    def backend(self) -> str:
        """Triton's name for the compiler: "cuda" or "hip"; "" if nothing is compiled."""
        return {"sm": "cuda", "gf": "hip"}.get(self.name[:2], "")

    @property
    def sums_beside_operands(self) -> bool:
        """Whether the operands of a matrix product are in registers.

        If so, fewer registers are left for the sums.
        """
        return self.matrix in ("mma", "mfma")


def _cdna(name: str, shared: int, **facts) -> GPU:
    """An AMD data-centre GPU: a thread has 512 registers, half of which can hold only sums."""
    return GPU(
        name, "mfma", shared, shared, warps_per_sm=32, blocks_per_sm=32, shared_reserved=0,
        registers_per_sm=128 * KIB, registers_per_thread=512, lanes=64, tf32=name == "gfx942",
        **facts,
    )  # fmt: skip


# The H100 SXM. 3.05e12 was read off times of LayerNorm and squared ReLU that others published
# (docs/benchmarks.md). The clock and the bandwidth of L2 are assumptions.
_H100: dict[str, Any] = {"clock": 1.755e9, "reached": 3.05e12, "l2_reached": 5.5e12}

GPUS: dict[str, GPU] = {
    gpu.name: gpu
    for gpu in (
        # matrix, shared memory per block and per multiprocessor, warps, blocks, multiprocessors,
        # bandwidth
        GPU("sm_80", "mma", 163 * KIB, 164 * KIB, 64, 32, 108, 2.04e12, "3.6"),  # A100
        GPU("sm_86", "mma", 99 * KIB, 100 * KIB, 48, 16, 84, 0.70e12, "3.7"),  # A40
        GPU("sm_89", "mma", 99 * KIB, 100 * KIB, 48, 24, 142, 0.86e12, "3.7"),  # L40S
        GPU("sm_90", "wgmma", 227 * KIB, 228 * KIB, 64, 32, 132, 3.35e12, "3.6", **_H100),
        GPU("sm_100", "tcgen05", 227 * KIB, 228 * KIB, 64, 32, 148, 8.0e12, "3.7"),  # B200
        GPU("sm_120", "mma", 99 * KIB, 100 * KIB, 48, 24, 170, 1.79e12, "3.7"),  # RTX 5090
        _cdna("gfx90a", 64 * KIB, sms=104, bandwidth=1.64e12, compiled_from="3.7"),  # MI210
        _cdna("gfx942", 64 * KIB, sms=304, bandwidth=5.3e12, compiled_from="3.6"),  # MI300X
        _cdna("gfx950", 160 * KIB, sms=256, bandwidth=8.0e12, compiled_from=None),  # MI350X
        # For Triton's interpreter: the tiles of an A100, and as many programs as on a small GPU.
        GPU("cpu", "mma", 163 * KIB, 164 * KIB, 64, 32, 100, 0.0, None),
    )
}

# Assumptions about an architecture without a row: the least that the listed ones have.
_ELSEWHERE = {
    "cuda": GPU("", "mma", 48 * KIB, 64 * KIB, 32, 16, 40, 0.3e12, None),
    "hip": GPU("", "mfma", 64 * KIB, 64 * KIB, 32, 16, 40, 0.3e12, None, 0, tf32=False),
}


def facts(architecture: str) -> GPU:
    """The row of an architecture, or the assumptions if it has no row."""
    row = GPUS.get(architecture)
    if row is None:
        row = _ELSEWHERE["hip" if architecture.startswith("gfx") else "cuda"]
    return row


# ---- Devices -------------------------------------------------------------------------------------

_simulated: list[str] = []
on_change: list[Callable[[], None]] = []  # called when a simulation of devices begins or ends


@contextmanager
def simulated(architecture: str) -> Iterator[None]:
    """Inside the block, every device counts as one of `architecture`, also the CPU.

    For compile checks, predictions and tests. It changes the results of `architecture` and
    `multiprocessors`.
    """
    _simulated.append(architecture)
    changed()
    try:
        yield
    finally:
        _simulated.pop()
        changed()


def changed() -> None:
    for call in on_change:
        call()


@functools.cache
def _asked(device_index: int) -> tuple[str, int]:
    """(architecture, multiprocessors) of a device."""
    if device_index < 0:
        return "cpu", GPUS["cpu"].sms
    properties = torch.cuda.get_device_properties(device_index)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
    else:
        name = f"sm_{properties.major}{properties.minor}"
    return name, properties.multi_processor_count


def architecture(device_index: int) -> str:
    """The name of the device's architecture: "sm_90", "gfx942", or "cpu" for the interpreter."""
    return _simulated[-1] if _simulated else _asked(device_index)[0]


def multiprocessors(device_index: int) -> int:
    """The number of multiprocessors (compute units) of a device."""
    return facts(_simulated[-1]).sms if _simulated else _asked(device_index)[1]
