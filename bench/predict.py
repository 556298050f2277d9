"""Counts the bytes and launches of a row on both sides, without a GPU, and predicts the speedup.

Stock runs on "meta" tensors with the row's real shapes. Nothing is computed; `AtenTraffic` counts
every operator. Ours runs in Triton's interpreter with the launches of the real shapes, including
grids and configurations. A few programs, spread over the grid, are executed, and in a second run
more of them. The difference is what the additional programs move, and with it the count is extended
to the whole grid. PyTorch operators that our side runs between launches count too.

Memory is allocated and never filled, so results are garbage and only addresses count. Therefore
there is no figure where addresses depend on data (gathers). There is also none where matrix
products bound the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

import fastnn
from fastnn import _gate, _record, _rng, kernels
from fastnn.bench.cases import BenchCase
from fastnn.bench.run import describe, least_bytes
from fastnn.bench.tune import gate_work
from fastnn.kernels import _gpus
from fastnn.testing.meter import AtenTraffic, Cost, as_on_cuda, predict, traffic

ARCHITECTURE = "sm_90"
BANDWIDTH = _gpus.GPUS[ARCHITECTURE].reached
FORMULA = (
    "(bytes of stock / BW + launches of stock * 6 us) / "
    "(bytes of ours / BW + launches of ours * 6 us)"
)
FEW = 2  # programs of the first run; the second has enough for _ACCESSES loads and stores
_ACCESSES = 150
_MOST_BYTES = 3 << 30  # of one tensor; the memory is virtual, but some operators fill it


@contextmanager
def _sampled(programs: Callable[[int], int], grids: list[tuple[int, int]]) -> Iterator[None]:
    """The n-th launch in the block executes `programs(n)` of its programs, spread over the grid.

    Fills `grids` with (executed, whole) for each launch.
    """
    kernels._interpreter.install()  # before the interpreter is wrapped
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    stock_call, set_dim, set_idx = executor.__call__, builder.set_grid_dim, builder.set_grid_idx
    state: dict[str, Any] = {}

    def call(self, *args, **kwargs):
        grid = tuple(self.grid) + (1,) * (3 - len(self.grid))
        whole = grid[0] * grid[1] * grid[2]
        executed = min(programs(len(grids)), whole)
        state["grid"] = grid
        # One program from each of `executed` equal parts, at a different place in each part,
        # because grids repeat themselves.
        state["chosen"] = [
            int((i + (0.3 + 0.618034 * i) % 1) * whole / executed) for i in range(executed)
        ]
        grids.append((executed, whole))
        self.grid = (executed,)
        with _disable_current_modes():  # the interpreter's own operators are not ours
            stock_call(self, *args, **kwargs)

    def set_grid_dim(self, nx, ny, nz):
        set_dim(self, *state["grid"])

    def set_grid_idx(self, x, y, z):
        _, ny, nz = state["grid"]
        at = state["chosen"][x]
        set_idx(self, at // (ny * nz), at // nz % ny, at % nz)

    with (
        mock.patch.object(executor, "__call__", call),
        mock.patch.object(builder, "set_grid_dim", set_grid_dim),
        mock.patch.object(builder, "set_grid_idx", set_grid_idx),
    ):
        yield


@contextmanager
def as_on_the_gpu() -> Iterator[None]:
    """In the block, kernel files choose their grids as on the GPU of the prediction, and memory
    without values stays virtual, even under deterministic algorithms."""
    deterministic: Any = torch.utils.deterministic  # a module with a property
    with ExitStack() as stack:
        stack.callback(
            setattr, deterministic, "fill_uninitialized_memory",
            deterministic.fill_uninitialized_memory,
        )  # fmt: skip
        deterministic.fill_uninitialized_memory = False
        stack.enter_context(_gpus.simulated(ARCHITECTURE))
        # On CUDA these make no tensor.
        for name in ("draw_native", "draw_native_of_new", "draw_bernoulli"):
            draw = mock.patch.object(_rng, name, _uncounted(getattr(_rng, name)))
            stack.enter_context(draw)
        yield


def _uncounted(function: Callable) -> Callable:
    def call(*args):
        with _disable_current_modes():
            return function(*args)

    return call


def unfilled(t: Any) -> Any:
    if isinstance(t, tuple):  # of states
        return tuple(map(unfilled, t))
    if not isinstance(t, Tensor):
        return t
    if t.is_floating_point():
        made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
        return made.requires_grad_(t.requires_grad)
    return torch.zeros(t.shape, dtype=t.dtype)


def passes_of(case: BenchCase, call: Callable, inputs: list) -> list[Callable]:
    """[forward, backward], to be called in this order, or [forward] of a row in eval mode."""
    kept: list = []

    def forward():
        out = call(*inputs)
        kept.extend(t for t in tree_leaves(out) if isinstance(t, Tensor))

    def backward():
        parameters = call.parameters() if isinstance(call, torch.nn.Module) else ()
        leaves = [t for t in (*inputs, *parameters) if isinstance(t, Tensor) and t.requires_grad]
        torch.autograd.grad(kept, leaves, [torch.empty_like(t) for t in kept])

    return [forward, backward] if case.train else [forward]


def stock_costs(case: BenchCase, dtype: torch.dtype) -> list[Cost]:
    """Costs of [forward, backward] on CUDA by stock operators; of [forward] in eval mode."""
    with as_on_cuda():
        inputs = case.make(dtype, "meta")
        passes = passes_of(case, case.side(torch.nn, dtype, "meta"), inputs)
        costs = []
        with torch.set_grad_enabled(case.train):
            for run in passes:
                with AtenTraffic() as counted:
                    run()
                costs.append(counted.cost)
    return costs


@dataclass
class _Count:
    """One pass of ours: per launch the bytes and (executed, whole) programs; and ATen's share."""

    kernels: list[str]
    bytes: list[int]
    accesses: list[int]
    extents: list[int]
    grids: list[tuple[int, int]]
    aten: Cost


def count_passes(
    passes: list[Callable], programs: list[Callable], aten_of: Callable[[], AtenTraffic]
) -> list[_Count]:
    """Runs each pass with a sample of the programs of each launch, and counts."""
    counts = []
    for run, sample in zip(passes, programs, strict=False):
        grids: list[tuple[int, int]] = []
        with (
            traffic() as log,
            _sampled(sample, grids),
            # Dispatch declines under a dispatch mode, but this mode only observes.
            mock.patch.object(torch._C, "_len_torch_dispatch_stack", lambda: 0),
            aten_of() as aten,
            _record.using(False),  # every launch is counted
        ):
            run()
        counts.append(
            _Count(
                [launch.kernel for launch in log],
                [launch.distinct.total() for launch in log],
                [launch.accesses.total() for launch in log],
                [launch.extent for launch in log],
                grids,
                aten.cost,
            )
        )
    return counts


def costs_of(
    make: Callable[[], list[Callable]],
    aten_of: Callable[[], AtenTraffic] = AtenTraffic,
    products: Callable[[str], bool] = lambda kernel: False,
) -> tuple[list[Cost], list[list[str]]]:
    """The cost of each pass that `make` makes, and the names of its kernels.

    The bytes of kernels that are `products`, by their names, do not count.
    """
    few = count_passes(make(), [lambda n: FEW] * 2, aten_of)

    def enough(count: _Count) -> Callable[[int], int]:
        return lambda n: max(2 * FEW, min(32, _ACCESSES * count.grids[n][0] // count.accesses[n]))

    more = count_passes(make(), [enough(count) for count in few], aten_of)
    costs = []
    for a, b in zip(few, more, strict=True):
        total = b.aten
        for at, (executed, whole) in enumerate(b.grids):
            # Counted by access, not by program: programs with a loop differ in their iterations.
            moved, accesses = b.bytes[at] - a.bytes[at], b.accesses[at] - a.accesses[at]
            left = b.accesses[at] * (whole / executed - 1)
            bytes_ = b.bytes[at] + (left * moved / accesses if accesses else 0)
            # Programs of other rows may read the same weight, which these few did not show.
            counted = 0 if products(b.kernels[at]) else round(min(bytes_, b.extents[at]))
            total += Cost(counted, 1)
        costs.append(total)
    return costs, [b.kernels for b in more]


def our_costs(case: BenchCase, dtype: torch.dtype) -> tuple[list[Cost], list[list[str]]]:
    """As `stock_costs`, but with our kernels; and the names of the kernels of each pass."""

    def make() -> list[Callable]:
        inputs = [unfilled(t) for t in case.make(dtype, "meta")]
        return passes_of(case, case.side(fastnn, dtype, "cpu"), inputs)

    with fastnn.backend("triton"), torch.set_grad_enabled(case.train):
        return costs_of(make)


def least(case: BenchCase, dtype: torch.dtype) -> list[int]:
    """The least bytes that [forward, backward], or [forward], must move."""
    with as_on_cuda():
        found = least_bytes(case, case.side(torch.nn, dtype, "meta"), case.make(dtype, "meta"))
    forward, *both = found.values()
    return [forward, *(x - forward for x in both)]


def why_not(case: BenchCase, dtype: torch.dtype) -> str | None:
    """Why this row can have no figure; None if it can."""
    if case.flops is not None:
        return "matrix products bound it, not bytes"
    if case.gathers:
        return "its traffic depends on the indices"
    return too_large(case, dtype)


def too_large(case: BenchCase, dtype: torch.dtype) -> str | None:
    """Why the row does not fit into this machine, even without values; None if it fits."""
    tensors = tree_leaves(case.make(dtype, "meta"))
    size = max(t.numel() * t.element_size() for t in tensors)
    return f"a tensor of {size / 2**30:.1f} GiB" if size > _MOST_BYTES else None


def _gate_opens(case: BenchCase) -> bool:
    """Whether `auto` would run kernels, by the size gate of the predicted architecture."""
    return all(
        work is not None and work.size >= _gate.crossover(op, ARCHITECTURE, work.variant).least
        for op, work in gate_work(case, ARCHITECTURE)
    )


def predicted(case: BenchCase, dtype: torch.dtype, bandwidth: float = BANDWIDTH) -> dict:
    """The record of one row. Without a prediction, "speedup" is None and "why" has the reason."""
    record: dict[str, Any] = {"kind": "prediction", **describe(case, dtype)}
    record |= {"bandwidth": bandwidth, "why": why_not(case, dtype), "speedup": None}
    if record["why"] is not None:
        return record
    stock = stock_costs(case, dtype)
    with as_on_the_gpu():
        ours, names = our_costs(case, dtype)
    for name, costs in (("stock", stock), ("ours", ours)):
        record[name] = [{"bytes": c.bytes, "launches": c.launches} for c in costs]
    record["kernels"] = names
    record["least_bytes"] = least(case, dtype)
    whole_stock, whole_ours = (sum(costs, Cost(0, 0)) for costs in (stock, ours))
    p = predict(whole_stock, whole_ours, bandwidth)
    record["auto"] = "kernel" if _gate_opens(case) else "stock"
    record |= {"stock_us": p.stock_us, "ours_us": p.ours_us, "speedup": p.speedup}
    return record
