"""Finds the size from which the kernels of each op win on the present GPU: `fastnn tune`.

The gate of an op compares one number (`fastnn._gate.Work`), so its threshold must hold for all
shapes. Each op is therefore swept over several row widths and dtypes, and the largest threshold of
each of its variants counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves

import fastnn
from fastnn import _gate, _mode
from fastnn._gate import Work
from fastnn.bench.cases import BF16, CASES, FP32, BenchCase
from fastnn.bench.environment import environment, measured
from fastnn.bench.measure import Clock, interleaved
from fastnn.bench.run import AUTO, STOCK, Results, both_passes, in_mode, make_sides
from fastnn.kernels import _gpus
from fastnn.ops import REGISTRY
from fastnn.testing import simulated

MARGIN = 0.03  # ours must win by this share, at the threshold and at all larger sizes
MOST_ELEMENTS = 1 << 26  # of the largest tensor of a sweep
SWEEPS = 3  # row widths per op
REPEATS = 30


def gate_work(
    case: BenchCase, architecture: str | None = None, dtype: torch.dtype = FP32
) -> list[tuple[str, Work | None]]:
    """(op, the work that the gate compares) for each call of this row. Nothing is computed.

    The work is None if the op's policy leaves the call to PyTorch at every size. The answer is that
    for `architecture`, by default the architecture of the present GPU.
    """
    if architecture is None:
        architecture = _gpus.architecture(0 if torch.cuda.is_available() else -1)
    with (
        simulated(architecture, devices=["meta"]),
        mock.patch.object(_mode, "HAS_TRITON", True),
        _mode.decisions(),
        fastnn.backend("auto"),
        _gate.asked() as asked,
    ):
        try:
            case.side(fastnn, dtype, "meta")(*case.make(dtype, "meta"))
        except RuntimeError:  # PyTorch asks for a value, and "meta" tensors have none
            if not asked:
                raise
    return [(op, work if isinstance(work, Work) else None) for op, work in asked]


def _elements(case: BenchCase) -> int:
    sizes = [t.numel() for t in tree_leaves(case.make(FP32, "meta"))]
    if case.gathers:
        sizes.append(sizes[0] * case.options.get("embedding_dim", 1))
    return max(sizes)


@dataclass(frozen=True)
class Sweep:
    """One op at growing sizes of one kind of row."""

    op: str
    case: BenchCase
    dtype: torch.dtype
    most: int = MOST_ELEMENTS

    @property
    def key(self) -> str:
        return f"{self.op}: {self.case.at(1)} by rows, {self.dtype}"

    def points(self) -> list[BenchCase]:
        """The rows; the first dimension grows from 1 by factors of four."""
        each = _elements(self.case.at(1))
        most = max(1, self.most // each)
        return [self.case.at(4**i) for i in range(int(math.log(most, 4) + 1e-9) + 1)]

    def work(self) -> list[tuple[BenchCase, Work]]:
        """The rows on which the size gate decides, with the work that it compares."""
        found = []
        for case in self.points():
            work = [w for op, w in gate_work(case) if op == self.op and w is not None]
            if work:
                found.append((case, max(work)))
        return found


def plan(only: list[str] | None = None) -> list[Sweep]:
    """The sweeps of every op that has rows, or of those named. KeyError for an unknown op."""
    for name in only or ():
        if name not in REGISTRY:
            raise KeyError(name)
    found: dict[str, dict[tuple, BenchCase]] = {name: {} for name in REGISTRY}
    for case in CASES:
        # Only rows with one op, so that the time measured is that of the op.
        names = {op for op, _ in gate_work(case.at(1))}
        if len(names) == 1:
            found[names.pop()].setdefault((case.at(1).shape, case.train), case)
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
    """Microseconds of (stock, ours): of execution or of launch, whichever is longer."""
    inputs = case.make(dtype, clock.name)
    calls = {}
    with simulated(least=0):  # so that `auto` runs the variant that it would run there
        for name, call in zip((STOCK, AUTO), make_sides(case, dtype, clock.name), strict=True):
            with in_mode(name):
                calls[name] = both_passes(case, call, inputs)
                calls[name]()
        executed = interleaved(clock.executed, calls, repeats, in_mode)
        enqueued = interleaved(clock.enqueued, calls, repeats, in_mode)
    return tuple(max(executed[name]["median"], enqueued[name]["median"]) for name in (STOCK, AUTO))


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
    """Measure the sweeps that `results` lacks, one "sweep" line each. False if time ran out."""
    for sweep in sweeps:
        if not results.has("sweep", sweep.key):
            if out_of_time():
                return False
            line: dict = {"kind": "sweep", "key": sweep.key, "op": sweep.op, "variants": []}
            points: dict[tuple[str, str], list] = {}
            try:
                for case, work in sweep.work():
                    times = contest(case, sweep.dtype, clock, repeats)
                    points.setdefault((work.variant, work.unit), []).append((work.size, *times))
                    clock.clear()
            except (RuntimeError, ValueError) as e:  # no figure: out of memory, declined, ...
                line["error"] = f"{type(e).__name__}: {e}"[:300]
            for (variant, unit), measured_at in points.items():
                least = None if "error" in line else threshold(measured_at)
                line["variants"].append(
                    {"variant": variant, "unit": unit, "least": least, "points": measured_at}
                )
            results.add(line)
            clock.clear()  # raises if this process has lost the device
        on_sweep(sweep)
    return True


def entry(results: Results) -> dict:
    """The entry of `crossover.json` for this architecture: for each op and variant the largest
    threshold of its sweeps, or None if ours never wins in one of them."""
    found: dict[tuple[str, str], dict] = {}
    for line in results.of("sweep"):
        for one in line["variants"]:
            new = {"op": line["op"], "variant": one["variant"], "least": one["least"]}
            old = found.setdefault((line["op"], one["variant"]), new | {"unit": one["unit"]})
            both = old["least"], one["least"]
            old["least"] = None if None in both else max(both)
    return {
        "source": measured(results.environment or environment()),
        "crossovers": list(found.values()),
    }


def write(path: Path, architecture: str, new: dict) -> None:
    """Put the entry in the table at `path`, over the entry of its architecture. Older values stay
    for ops that were not measured now, and the older source is named for them."""
    table = _gate.read(path)
    old = table.get(architecture, {"crossovers": []})
    known = {(line["op"], line.get("variant", "")) for line in new["crossovers"]}
    kept = [x for x in old["crossovers"] if (x["op"], x.get("variant", "")) not in known]
    if kept:
        source = f"{new['source']}; other functions {old['source']}"
        new = {"source": source, "crossovers": [*kept, *new["crossovers"]]}
    table[architecture] = new
    path.write_text(json.dumps(table, indent=2) + "\n")


def describe(sweeps: list[Sweep]) -> Iterator[str]:
    """The plan, with one line per sweep."""
    for sweep in sweeps:
        points = sweep.work()
        dtype = str(sweep.dtype).removeprefix("torch.") + ("" if sweep.case.train else ", eval")
        if not points:
            yield f"{sweep.op}: {sweep.case.name}, {dtype}: PyTorch at every size, by the policy"
            continue
        (first, least), (last, most) = points[0], points[-1]
        sizes = "1 size" if len(points) == 1 else f"{len(points)} sizes"
        yield (
            f"{sweep.op}: {sweep.case.name} {first.shape} ... {last.shape}, {dtype}, "
            f"{sizes} from {least.size:,} to {most.size:,} {most.unit}"
        )
