"""Timing. `Cuda` makes the figures; `Cpu` runs the same code without a GPU, for tests.

executed   time on the device, launched while the device is busy, with nothing left in L2
replayed   the same, replayed from a CUDA graph
enqueued   time until the call returns on the host, with the device idle
peak       most bytes allocated during a call, beyond the bytes held before it
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Call = Callable[[], Any]
REPEATS = 36  # in rounds that time every side, so that drifting clocks meet all sides
ROUNDS = 3


def summary(times: list[float]) -> dict[str, float]:
    """Median and quartiles, in microseconds, and the number of times."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": middle, "q25": low, "q75": high, "n": len(times)}


class Cpu:
    """Times interpreted kernels. The figures mean nothing, but every path of the code runs."""

    name = "cpu"
    graphs = False

    def executed(self, call: Call, repeats: int) -> list[float]:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(1e6 * (time.perf_counter() - start))
        return times

    enqueued = executed

    def captured(self, call: Call) -> Call:
        raise RuntimeError("no CUDA graph on a CPU")

    def peak(self, call: Call) -> int | None:
        call()
        return None

    def synchronize(self) -> None:
        pass

    def clear(self) -> None:
        pass

    def free(self) -> int:
        return 1 << 40


class Cuda:
    """The current CUDA or ROCm device."""

    name = "cuda"
    graphs = True

    def __init__(self) -> None:
        l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
        # Overwritten between two calls. It is twice as large as the cache, so nothing stays in it.
        self._cycles_per_us = 2000  # no GPU has a much faster clock
        self._flush = torch.empty(max(2 * l2, 64 << 20), dtype=torch.int8, device="cuda")

    def flush(self) -> None:
        self._flush.zero_()

    def _launching(self, call: Call) -> int:
        """A number of device cycles that takes longer than the call takes on the host."""
        slowest = max(self.enqueued(call, 3))
        return int(2 * (slowest + 50) * self._cycles_per_us)

    def executed(self, call: Call, repeats: int) -> list[float]:
        pairs = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(repeats)
        ]
        ahead = self._launching(call)
        for start, end in pairs:
            self.flush()
            torch.cuda._sleep(ahead)  # the host gets ahead: only the device is timed
            start.record()
            call()
            end.record()
            end.synchronize()
        return [1e3 * start.elapsed_time(end) for start, end in pairs]

    def enqueued(self, call: Call, repeats: int) -> list[float]:
        times = []
        for _ in range(repeats):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            times.append(1e6 * (time.perf_counter() - start))
        torch.cuda.synchronize()
        return times

    def captured(self, call: Call) -> Call:
        """A call that replays `call` from a CUDA graph. Errors of the capture are raised."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def peak(self, call: Call) -> int | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def clear(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def free(self) -> int:
        return torch.cuda.mem_get_info()[0]


Clock = Cpu | Cuda


def interleaved(
    time_one: Callable[[Call, int], list[float]],
    calls: dict[str, Call],
    repeats: int,
    around: Callable[[str], AbstractContextManager] = lambda name: nullcontext(),
) -> dict[str, dict[str, float]]:
    """Time each call `repeats` times, in rounds over all calls, inside `around` of its name."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    share = -(-repeats // ROUNDS)
    for _ in range(ROUNDS):
        for name, call in calls.items():
            with around(name):
                times[name] += time_one(call, share)
    return {name: summary(taken) for name, taken in times.items()}


def ceilings(clock: Clock, size: int = 1 << 30, n: int = 8192) -> dict[str, float]:
    """The best rates of the device: bytes per second of a copy, FLOP/s of square products."""
    found = {}
    x = torch.empty(2, size, dtype=torch.int8, device=clock.name)
    median = summary(clock.executed(lambda: x[0].copy_(x[1]), 20))["median"]
    found["copy_bytes_per_s"] = 2 * size / median * 1e6
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(n, n, dtype=dtype, device=clock.name) for _ in range(2))
        median = summary(clock.executed(functools.partial(torch.matmul, a, b), 20))["median"]
        found[f"{str(dtype).removeprefix('torch.')}_flop_per_s"] = 2 * n**3 / median * 1e6
    clock.clear()
    return found
