"""Finds from which size the kernels of each op win on the present GPU: `fastnn tune`.

The gate of an op compares one number (see `_op.Op.size`), so its threshold must hold for all
shapes: each op is swept over several row widths and dtypes, and the largest threshold counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from fastnn.bench.cases import BF16, CASES, FP32, BenchCase
from fastnn.bench.environment import environment, measured
from fastnn.bench.measure import Clock, interleaved
from fastnn.bench.run import FORCED, STOCK, Results, _around, _both, _sides

import fastnn
from fastnn import _op
from fastnn.ops import REGISTRY

MARGIN = 0.03  # by which ours must win, everywhere from the threshold on
MOST_ELEMENTS = 1 << 26  # of the largest tensor of a sweep
SWEEPS = 3  # row widths per op
REPEATS = 30


def gate_sizes(case: BenchCase) -> dict[str, int]:
    """What the gate would compare, by op, when this row is called. Nothing is computed."""
    sizes: dict[str, int] = {}

    def gate(op, device_index, most, args, kwargs):
        size = op.size(*args, **kwargs) if op.size else most
        sizes[op.name] = max(size, sizes.get(op.name, 0))
        return "asked for its size"

    with (
        mock.patch.object(_op, "_gate", gate),
        mock.patch.object(_op, "_KERNEL_DEVICES", {"meta"}),
        mock.patch.object(_op, "HAS_TRITON", True),
        _op.decisions(),
        fastnn.backend("auto"),
        torch.no_grad(),
    ):
        try:
            case.side(fastnn, FP32, "meta")(*case.make(FP32, "meta"))
        except RuntimeError:  # of stock, where it asks for a value and "meta" has none
            if not sizes:
                raise
    return sizes


def _elements(case: BenchCase) -> int:
    sizes = [t.numel() for t in case.make(FP32, "meta")]
    if case.gathers:
        sizes.append(sizes[0] * case.options.get("embedding_dim", 1))
    return max(sizes)


@dataclass(frozen=True)
class Sweep:
    """One op over growing sizes of one kind of row."""

    op: str
    case: BenchCase
    dtype: torch.dtype
    most: int = MOST_ELEMENTS

    @property
    def key(self) -> str:
        return f"{self.op}: {self.case.at(1)} by rows, {self.dtype}"

    def points(self) -> list[BenchCase]:
        """The rows, the first dimension by fours from 1."""
        each = _elements(self.case.at(1))
        most = max(1, self.most // each)
        return [self.case.at(4**i) for i in range(int(math.log(most, 4) + 1e-9) + 1)]


def plan(only: list[str] | None = None) -> list[Sweep]:
    """The sweeps of every op that has rows, or of those named. KeyError for an unknown op."""
    for name in only or ():
        if name not in REGISTRY:
            raise KeyError(name)
    found: dict[str, dict[tuple, BenchCase]] = {name: {} for name in REGISTRY}
    for case in CASES:
        # Rows that hold one op, so that what is measured is its own.
        names = list(gate_sizes(case.at(1)))
        if len(names) == 1:
            found[names[0]].setdefault((case.at(1).shape, case.train), case)
    return [
        Sweep(name, case, dtype)
        for name, cases in sorted(found.items())
        if not only or name in only
        for case in list(cases.values())[:SWEEPS]
        for dtype in (BF16, FP32)
    ]


def without_rows() -> list[str]:
    """Ops that no sweep covers."""
    return sorted(set(REGISTRY) - {sweep.op for sweep in plan()})


def contest(case: BenchCase, dtype: torch.dtype, clock: Clock, repeats: int) -> tuple:
    """(stock's, our) microseconds: of execution or of launching, whichever is longer."""
    inputs = case.make(dtype, clock.name)
    calls = {}
    for name, call in zip((STOCK, FORCED), _sides(case, dtype, clock.name), strict=True):
        with _around(name):
            calls[name] = _both(case, call, inputs)
            calls[name]()
    executed = interleaved(clock.executed, calls, repeats, _around)
    enqueued = interleaved(clock.enqueued, calls, repeats, _around)
    return tuple(
        max(executed[name]["median"], enqueued[name]["median"]) for name in (STOCK, FORCED)
    )


def threshold(points: list[tuple[int, float, float]]) -> int | None:
    """The least size of (size, stock, ours) from which ours wins by `MARGIN`, there and above."""
    least = None
    for size, stock, ours in sorted(points, reverse=True):
        if stock < ours * (1 + MARGIN):
            break
        least = size
    return least


def run(
    sweeps: list[Sweep],
    results: Results,
    clock: Clock,
    *,
    repeats: int = REPEATS,
    out_of_time: Callable[[], bool] = lambda: False,
    on_sweep: Callable[[Sweep], None] = lambda sweep: None,
) -> bool:
    """Measure what `results` lacks, a line of kind "sweep" each. False if time ran out."""
    for sweep in sweeps:
        if not results.has("sweep", sweep.key):
            if out_of_time():
                return False
            line: dict = {"kind": "sweep", "key": sweep.key, "op": sweep.op, "points": []}
            try:
                for case in sweep.points():
                    size = gate_sizes(case)[sweep.op]
                    line["points"].append((size, *contest(case, sweep.dtype, clock, repeats)))
                    clock.clear()
                line["least"] = threshold(line["points"])
            except (RuntimeError, ValueError) as e:  # out of memory, declined, ...: no figure
                line["least"], line["error"] = None, f"{type(e).__name__}: {e}"[:300]
            results.add(line)
            clock.clear()  # raises if the device is lost to this process
        on_sweep(sweep)
    return True


def entry(results: Results) -> dict:
    """What `crossover.json` holds for this architecture: the largest threshold of each op's sweeps,
    None where one of them never wins."""
    least: dict[str, int | None] = {}
    for line in results.of("sweep"):
        old = least.get(line["op"], 0)
        new = line["least"]
        least[line["op"]] = None if old is None or new is None else max(old, new)
    return {"source": measured(results.environment or environment()), "least": least}


def write(path: Path, architecture: str, new: dict) -> None:
    """Put the entry in the table at `path`, over that of its architecture; what that one knows of
    ops not measured now stays, and its source is named for it."""
    table = json.loads(path.read_text()) if path.exists() else {}
    old = table.get(architecture)
    if old is not None and set(old["least"]) - set(new["least"]):
        source = f"{new['source']}; other functions {old['source']}"
        new = {"source": source, "least": {**old["least"], **new["least"]}}
    table[architecture] = new
    path.write_text(json.dumps(table, indent=2) + "\n")


def describe(sweeps: list[Sweep]) -> Iterator[str]:
    """The plan, a line per sweep."""
    for sweep in sweeps:
        sizes = [gate_sizes(case)[sweep.op] for case in sweep.points()]
        yield (
            f"{sweep.op}: {sweep.case.name} {sweep.points()[0].shape} ... "
            f"{sweep.points()[-1].shape}, {str(sweep.dtype).removeprefix('torch.')}, "
            f"{len(sizes)} sizes from {sizes[0]:,} to {sizes[-1]:,}"
        )
