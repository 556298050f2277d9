"""Times rows: stock, `torch.compile(stock)`, ours forced, ours in auto, Liger.

A row is checked before it is timed: against stock and float64, and for the path that it took. A row
that is wrong, or that ran stock when forced, is reported and has no speedup.
"""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastnn
from fastnn._mode import Mode, decisions
from fastnn.bench import liger
from fastnn.bench.cases import BenchCase
from fastnn.bench.environment import IDENTITY, environment
from fastnn.bench.measure import REPEATS, Call, Clock, interleaved
from fastnn.testing import Comparison, Side, compare_sides, tensors_of
from fastnn.testing.meter import nbytes

STOCK, COMPILED, FORCED, AUTO, LIGER = "stock", "compiled", "ours", "auto", "liger"
_MODES: dict[str, Mode] = {FORCED: "triton", AUTO: "auto"}


# ---- Results, written as they come --------------------------------------------------------------


class Mismatch(Exception):
    """A file of results comes from another device, commit or version than this run."""


class Results:
    """A file of JSON lines, each with a "kind" and a "key". The first line is the environment.

    When the file is opened again, it goes on where it stopped. Raises `Mismatch` if a value of
    `IDENTITY` has changed, unless the file is opened only for `reading`.
    """

    def __init__(self, path: Path, reading: bool = False):
        self.path = path
        self.lines: list[dict] = []
        if path.exists():
            # A run that was killed may have left half a line.
            whole = [s for s in path.read_text().splitlines(keepends=True) if s.endswith("\n")]
            path.write_text("".join(whole))
            self.lines = [json.loads(s) for s in whole]
        if reading:
            return
        before, now = self.environment, environment()
        if before is None:
            self.add(now)
        elif any(before[k] != now[k] for k in IDENTITY):
            other = {k: before[k] for k in IDENTITY if before[k] != now[k]}
            raise Mismatch(f"{path} holds results of {other}; choose another folder or remove it")

    @property
    def environment(self) -> dict | None:
        return next((line for line in self.lines if line["kind"] == "environment"), None)

    def has(self, kind: str, key: str) -> bool:
        return any(line["kind"] == kind and line.get("key") == key for line in self.lines)

    def of(self, kind: str) -> list[dict]:
        return [line for line in self.lines if line["kind"] == kind]

    def add(self, line: dict) -> None:
        self.lines.append(line)
        with self.path.open("a") as f:
            f.write(json.dumps(line) + "\n")


# ---- Before timing ----------------------------------------------------------------------------


def make_sides(case: BenchCase, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """(stock, ours) with equal parameters."""
    torch.manual_seed(0)
    stock, ours = (case.side(n, dtype, device) for n in (nn, fastnn))
    if isinstance(stock, nn.Module) and isinstance(ours, nn.Module):
        ours.load_state_dict(stock.state_dict())
    return stock, ours


def _side(call: Any) -> Side:
    return Side(call, dict(call.named_parameters()) if isinstance(call, nn.Module) else {})


def _checked_rows(case: BenchCase, dtype: torch.dtype, free: int) -> int:
    """How many rows fit into memory three times in float64, with gradients."""
    elements = sum(t.numel() for t in tensors_of(case.make(dtype, "meta"))) / case.rows
    if case.gathers:
        elements *= case.options.get("embedding_dim", 1)
    return max(1, min(case.rows, int(0.5 * free / (12 * 8 * elements))))


def compare_row(case: BenchCase, dtype: torch.dtype, clock: Clock) -> dict:
    """The path of a row that is forced onto kernels, and its differences from stock."""
    rows = _checked_rows(case, dtype, clock.free())
    part = case.at(rows)
    stock, ours = make_sides(part, dtype, clock.name)
    exact = copy.deepcopy(stock).double() if isinstance(stock, nn.Module) else stock
    with decisions() as heard, torch.set_grad_enabled(case.train):
        result = compare_sides(
            _side(ours), _side(stock), _side(exact), part.make(dtype, clock.name),
            device=clock.name,
        )  # fmt: skip
    failures = list(result.failures)
    if rows < case.rows and result.path == "kernel":
        failures += _whole_row(case, dtype, clock, result.comparisons)
    return {
        "ops": sorted({d.op.name for d in heard}),
        "path": result.path,
        "reason": result.reason,
        "failures": failures,
        "error_ratio": max((c.ratio for c in result.comparisons), default=1.0),
        "rows_checked": rows,
    }


def _whole_row(case, dtype, clock, comparisons: list[Comparison]) -> list[str]:
    """Compare a row too large for float64 with stock: it may be wrong only at its far end."""
    found = []
    modes: tuple[Mode, ...] = ("torch", "triton")
    for call, mode in zip(make_sides(case, dtype, clock.name), modes, strict=True):
        torch.manual_seed(0)
        inputs = case.make(dtype, clock.name)
        with fastnn.backend(mode):
            found.append([t.detach() for t in both_passes(case, call, inputs)()])
    # Both may have the error of the part that was compared, in opposite directions.
    bound = 4 * max((c.bound for c in comparisons), default=0.0)
    failures = []
    for a, b in zip(*found, strict=True):
        apart = max(
            (p.float() - q.float()).abs().max().item()
            for p, q in zip(a.split(1 << 12), b.split(1 << 12), strict=True)
        ) if a.dim() else (a.float() - b.float()).abs().item()  # fmt: skip
        if not apart <= bound:
            failures.append(f"whole row: {apart:.3g} from stock, bound {bound:.3g}")
    return failures


# ---- Timing -----------------------------------------------------------------------------------


def leaves_of(call: Any, inputs: list) -> list[Tensor]:
    parameters = call.parameters() if hasattr(call, "parameters") else ()
    return [t for t in (*tensors_of(inputs), *parameters) if t.requires_grad]


def both_passes(case: BenchCase, call: Any, inputs: list) -> Call:
    """A call of forward and backward that returns the gradients; in eval mode only of forward."""
    if not case.train:
        return torch.no_grad()(lambda: tensors_of(call(*inputs)))
    leaves = leaves_of(call, inputs)
    upstream = [torch.randn_like(t) for t in tensors_of(call(*inputs))]

    def both():
        return torch.autograd.grad(tensors_of(call(*inputs)), leaves, upstream)

    return both


def _passes(case: BenchCase, call: Any, inputs: list) -> dict[str, Call]:
    if not case.train:
        return {"forward": both_passes(case, call, inputs)}
    return {"forward": lambda: call(*inputs), "forward+backward": both_passes(case, call, inputs)}


def in_mode(name: str) -> AbstractContextManager:
    return fastnn.backend(_MODES[name]) if name in _MODES else nullcontext()


def time_sides(
    case: BenchCase, calls: dict[str, Any], inputs: list, clock: Clock, repeats: int
) -> dict[str, dict]:
    """{side: {pass: {"executed", "enqueued", "replayed", "peak_bytes"}}} of the row."""
    passes = {}
    for name, call in calls.items():
        with in_mode(name):
            passes[name] = _passes(case, call, inputs)
            for run in passes[name].values():  # compile, and fill the allocator
                run()
                run()
    clock.synchronize()
    results: dict[str, dict] = {name: {p: {} for p in runs} for name, runs in passes.items()}
    for which in next(iter(passes.values())):
        runs = {name: passes[name][which] for name in passes}
        for what in ("executed", "enqueued"):
            times = interleaved(getattr(clock, what), runs, repeats, in_mode)
            for name, summed in times.items():
                results[name][which][what] = summed
        for name, run in runs.items():
            with in_mode(name):
                results[name][which]["peak_bytes"] = clock.peak(run)
                if clock.graphs:
                    results[name][which] |= _replayed(run, clock, repeats)
    return results


def _replayed(run: Call, clock: Clock, repeats: int) -> dict:
    try:
        replay = clock.captured(run)
    except RuntimeError as e:
        return {"replayed": None, "capture_error": str(e).splitlines()[0]}
    return {"replayed": interleaved(clock.executed, {"": replay}, repeats)[""]}


def least_bytes(case: BenchCase, call: Any, inputs: list) -> dict[str, int]:
    """The least bytes of each pass: inputs and parameters read once, results written once. In the
    backward also the incoming gradient, and an input or output again if the backward needs it."""
    floats = [t for t in tensors_of(inputs) if t.is_floating_point()]
    others = [t for t in tensors_of(inputs) if not t.is_floating_point()]
    parameters = [] if case.gathers or not hasattr(call, "parameters") else list(call.parameters())
    with torch.no_grad():
        out = tensors_of(call(*inputs))
    forward = nbytes(*floats, *others, *parameters, *out) + (nbytes(*out) if case.gathers else 0)
    if not case.train:
        return {"forward": forward}
    backward = nbytes(*out, *leaves_of(call, inputs), *others)
    if case.rereads:
        backward += nbytes(*floats, *parameters)
    return {"forward": forward, "forward+backward": forward + backward}


def describe(case: BenchCase, dtype: torch.dtype) -> dict:
    return {
        "key": case.key(dtype),
        "name": case.name,
        "shape": case.shape,
        "model": case.model,
        "dtype": str(dtype).removeprefix("torch."),
        "train": case.train,
        "flops": case.flops(case.rows) if case.flops else None,
    }


def run_row(
    case: BenchCase, dtype: torch.dtype, clock: Clock, repeats: int = REPEATS, checked=True
) -> dict:
    """Check a row, then time stock, ours, auto and Liger. Returns a line of kind "row"."""
    line: dict = {"kind": "row", **describe(case, dtype)}
    line |= compare_row(case, dtype, clock) if checked else {"path": "kernel", "failures": []}
    clock.clear()
    stock, ours = make_sides(case, dtype, clock.name)
    inputs = case.make(dtype, clock.name)
    line["least_bytes"] = least_bytes(case, stock, inputs)
    calls = {STOCK: stock, FORCED: ours, AUTO: ours}
    theirs = liger.counterpart(case, stock)
    if theirs is not None:
        calls[LIGER] = theirs
    if line["failures"] or line["path"] != "kernel":
        del calls[FORCED]
    with decisions() as heard, fastnn.backend("auto"), torch.no_grad():
        ours(*inputs)
    line["auto"] = {d.op.name: d.why or "kernel" for d in heard}
    line["sides"] = time_sides(case, calls, inputs, clock, repeats)
    return line


def run_compiled(case: BenchCase, dtype: torch.dtype, clock: Clock, repeats: int = REPEATS) -> dict:
    """Time `torch.compile(stock)` of a row in its default mode. Returns a "compiled" line."""
    torch._dynamo.reset()
    stock, _ = make_sides(case, dtype, clock.name)
    compiled = torch.compile(stock, dynamic=False)
    inputs = case.make(dtype, clock.name)
    line = {"kind": "compiled", **describe(case, dtype)}
    try:
        line["sides"] = time_sides(case, {COMPILED: compiled}, inputs, clock, repeats)
    except Exception as e:  # failures of Inductor are results too
        line["error"] = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
    return line


def run_rows(
    rows: Iterable[tuple[BenchCase, torch.dtype]],
    results: Results,
    clock: Clock,
    *,
    compiled: bool = True,
    checked: bool = True,
    repeats: int = REPEATS,
    prefix: str = "",
    out_of_time: Callable[[], bool] = lambda: False,
    on_row: Callable[[dict], None] = lambda line: None,
) -> bool:
    """Time all rows that `results` lacks. Then time `torch.compile`, last because it is slow.

    The kinds of the lines begin with `prefix`. Returns False if `out_of_time` ended the run.
    """
    rows = list(rows)
    kinds: list[tuple[str, Callable]] = [("row", functools.partial(run_row, checked=checked))]
    if compiled:
        kinds.append(("compiled", run_compiled))
    for kind, run in kinds:
        for case, dtype in rows:
            if results.has(prefix + kind, case.key(dtype)):
                continue
            if out_of_time():
                return False
            try:
                line = run(case, dtype, clock, repeats)
            except Exception as e:  # one row must not stop the others
                line = {"kind": kind, **describe(case, dtype)}
                line["error"] = f"{type(e).__name__}: {e}"[:500]
            line["kind"] = prefix + kind
            results.add(line)
            clock.clear()  # raises if this process has lost the device
            on_row(line)
    return True


# ---- What the lines say -----------------------------------------------------------------------


def took(line: dict, side: str, which: str | None = None) -> float | None:
    """Microseconds of a side: of its execution or of its launch, whichever is longer."""
    passes = line.get("sides", {}).get(side)
    if not passes:
        return None
    times = passes[which or list(passes)[-1]]
    return max(times["executed"]["median"], times["enqueued"]["median"])


def speedup(line: dict, side: str) -> float | None:
    """Time of stock divided by the time of the side, forward and backward; None if it is wrong."""
    stock, theirs = took(line, STOCK), took(line, side)
    if stock is None or theirs is None or line.get("failures"):
        return None
    return stock / theirs


def with_compiled(lines: list[dict], prefix: str = "") -> list[dict]:
    """The lines of rows, each with its compiled side if there is one."""
    compiled = {line["key"]: line for line in lines if line["kind"] == prefix + "compiled"}
    rows = [line for line in lines if line["kind"] == prefix + "row"]
    more = [compiled.get(line["key"], {}).get("sides", {}) for line in rows]
    return [
        {**line, "sides": {**line.get("sides", {}), **sides}}
        for line, sides in zip(rows, more, strict=True)
    ]


def geometric_mean(numbers: Iterable[float]) -> float | None:
    """The geometric mean; None if there are no numbers."""
    logs = [math.log(x) for x in numbers]
    return math.exp(sum(logs) / len(logs)) if logs else None
