"""`pytest bench/`: each row on a GPU, by pytest-benchmark; anywhere, what a call costs the host."""

import functools
import gc
import statistics
import time

import pytest
import torch
import torch.nn.functional as stock

import fastnn
import fastnn.functional as F
from fastnn._mode import Mode
from fastnn.bench.cases import matching
from fastnn.bench.run import both_passes, compare_row, make_sides

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")
cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU pays")


# ---- Rows, on a GPU ----------------------------------------------------------------------------


@functools.cache
def clock():
    from fastnn.bench.measure import Cuda

    return Cuda()


@gpu
@pytest.mark.parametrize("side", ["stock", "ours", "auto"])
@pytest.mark.parametrize(("case", "dtype"), matching(), ids=str)
def test_row(benchmark, case, dtype, side):
    if side == "ours":
        found = compare_row(case, dtype, clock())
        assert not found["failures"] and found["path"] == "kernel", found
    theirs, ours = make_sides(case, dtype, "cuda")
    inputs = case.make(dtype, "cuda")
    modes: dict[str, Mode] = {"stock": "torch", "ours": "triton", "auto": "auto"}
    with fastnn.backend(modes[side]):
        both = both_passes(case, theirs if side == "stock" else ours, inputs)
        both()

        def run():
            both()
            torch.cuda.synchronize()

        benchmark.group = case.key(dtype)
        benchmark.pedantic(run, setup=clock().flush, rounds=30)


# ---- The host's share --------------------------------------------------------------------------


def interleaved(calls, rounds=400, each=50):
    """{name: median seconds of a call}, in short batches in turn: all meet the same machine."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.disable()
    try:
        for i in range(rounds):
            order = list(calls.items())
            for name, call in order if i % 2 else reversed(order):
                start = time.perf_counter()
                for _ in range(each):
                    call()
                times[name].append((time.perf_counter() - start) / each)
    finally:
        gc.enable()
    return {name: statistics.median(taken) for name, taken in times.items()}


def difference(calls):
    """How much longer the second call takes than the first, in seconds: the least of some tries,
    since another process can only add to it, and never by as much each time."""
    best = float("inf")
    for _ in range(5):
        first, second = interleaved(calls).values()
        best = min(best, second - first)
    return best


@cpu
@pytest.mark.parametrize("kind", ["function", "module"])
def test_a_call_where_no_kernel_can_run(benchmark, kind):
    x = torch.randn(4, 8)
    if kind == "function":
        calls = {"stock": lambda: stock.relu(x), "ours": lambda: F.relu(x)}
    else:
        theirs, ours = torch.nn.ReLU(), fastnn.ReLU()
        calls = {"stock": lambda: theirs(x), "ours": lambda: ours(x)}
    more = difference(calls)
    benchmark.extra_info["more_us"] = more * 1e6
    benchmark(calls["ours"])
    assert more <= 0.5e-6, f"{more * 1e6:.2f} us more than stock"


@cpu
def test_a_launch_costs_less_than_by_triton(benchmark):
    """The host side alone: a driver that launches nothing."""
    from fastnn.kernels import pointwise
    from fastnn.testing.aot import launch_nothing

    x, y = torch.randn(4096), torch.empty(4096)
    kernel = pointwise._pointwise_fwd_kernel
    meta = {"FORMULA": pointwise.relu, "KEEP": None, "BLOCK": 1024, "num_warps": 4}
    args = (x, y, y, x.numel(), 0.0, 0.0)
    with launch_nothing():
        calls = {
            "triton": lambda: kernel.fn[(4,)](*args, **meta),
            "ours": lambda: kernel((4,), *args, **meta),
        }
        for call in calls.values():
            call()
        times = interleaved(calls, rounds=100, each=20)
        benchmark.extra_info.update({f"{k}_us": v * 1e6 for k, v in times.items()})
        benchmark(calls["ours"])
    assert times["ours"] < times["triton"] / 1.5, times


@cpu
@pytest.mark.parametrize("name", ["relu", "layer_norm"])
def test_a_dispatched_call(benchmark, name):
    """From the function called to the last launch; inputs are taken for a GPU's."""
    from fastnn.testing.aot import launch_nothing

    x = torch.randn(64, 64)
    call = {"relu": lambda: F.relu(x), "layer_norm": lambda: F.layer_norm(x, (64,))}[name]
    with launch_nothing(), fastnn.backend("triton"):
        call()
        benchmark(call)
