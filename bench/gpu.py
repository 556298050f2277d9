"""Everything that needs a GPU, in one command: `python -m bench.gpu --out DIR --budget 20m`.

Stages, in order: parity of every row forced onto kernels; compilation of all that the other stages
time; ceilings; bench; launch configurations; crossover sizes; bench again with the new tables;
whole training steps; determinism; more than 2**31 elements; a memory checker if one is installed.
The first two use one process per core, the others run alone. Every finding is written at once as a
line of DIR/results.jsonl. The same command, started again, goes on where it stopped. DIR/summary.md
says what was found, and is rewritten after each stage. Exit code 0: all right; 1: something is
wrong or unfinished; 2: not started.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def _minutes(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r}: give it as 90s, 20m or 1h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--budget", type=_minutes, default="20m", help="default: %(default)s")
    parser.add_argument("--stage", action="append", choices=list(STAGES), help="default: all")
    parser.add_argument("--pytest", action="store_true", help="the test suite as well, on the GPU")
    parser.add_argument(
        "--workers", type=int, default=min(16, os.cpu_count() or 1), metavar="N",
        help="processes of the first two stages; default: one per core, 16 at most",
    )  # fmt: skip
    parser.add_argument("--no-compile", action="store_true", help="do not time torch.compile")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, run nothing")
    parser.add_argument(
        "--tiny", action="store_true",
        help="every stage on the CPU at toy sizes, interpreted: proves the command, times nothing",
    )  # fmt: skip
    return parser.parse_args(argv)


@dataclasses.dataclass
class GpuRun:
    """The rows, options and tools of a run."""

    results: Any
    clock: Any
    out: Path
    bench: list  # (BenchCase, dtype)
    sweeps: list
    parity: list  # (Case, dtype)
    steps: list
    huge: list
    repeats: int
    compiled: bool
    deadline: float
    asked: argparse.Namespace  # a process of the pool makes its own GpuRun from it
    workers: int

    def add(self, line: dict) -> None:
        """Record a line. Raises RuntimeError if its error broke the device's context."""
        self.results.add(line)
        self.clock.synchronize()

    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline


# ---- Stages: True when complete, False when the time ran out ------------------------------------


def parity(work: GpuRun) -> bool:
    """Check every parity row in every dtype: values, gradients, bits, the path."""
    from fastnn.bench.pool import Ended

    rows = _parity_rows(work)
    left = [key for key in rows if not work.results.has("parity", key)]
    for key, line in _spread(work, _parity_row, left):
        if isinstance(line, Ended):
            line = {"path": "error", "failures": [str(line)]}
        case, _ = rows[key]
        work.results.add({"kind": "parity", "key": key, "name": case.name, **line})
    return all(work.results.has("parity", key) for key in rows)


def _parity_rows(work: GpuRun) -> dict[str, tuple]:
    return {f"{case} {str(d).removeprefix('torch.')}": (case, d) for case, d in work.parity}


def _parity_row(work: GpuRun, key: str) -> dict:
    from fastnn.testing import check

    case, dtype = _parity_rows(work)[key]
    try:
        with _uninitialised_memory_is_nan():
            found = check(case, dtype, work.clock.name)
    except Exception as e:
        return {"path": "error", "failures": [f"{type(e).__name__}: {e}"[:500]]}
    ratio = max((c.ratio for c in found.comparisons), default=1.0)
    return {"path": found.path, "failures": found.failures, "ratio": ratio}


@contextlib.contextmanager
def _uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def prepare(work: GpuRun) -> bool:
    """Run everything once, side by side, that will be timed, to fill the kernel caches on disk."""
    rows = {case.key(dtype): (case, dtype) for case, dtype in work.bench}
    kinds: list[tuple] = [("kernels", "row", rows)]
    kinds += [("sweep", "sweep", [sweep.key for sweep in work.sweeps])]
    kinds += [("compiled", "compiled", rows)] if work.compiled else []
    items: list[tuple] = [
        (what, key, {}) for what, kind, keys in kinds for key in keys
        if not work.results.has(kind, key)
    ]  # fmt: skip
    return _prepare(work, items)


def _prepare(work: GpuRun, items: list[tuple]) -> bool:
    return sum(1 for _ in _spread(work, _prepared, items)) == len(items)


def _prepared(work: GpuRun, item: tuple[str, str, dict]) -> None:
    """Run forward and backward of a row, on kernels or compiled. Errors are ignored, because the
    stage that reports them meets them again."""
    from fastnn import kernels
    from fastnn.bench.run import FORCED, both_passes, in_mode, make_sides

    what, key, table = item
    with contextlib.suppress(Exception):
        if what == "sweep":
            sweep = next(s for s in work.sweeps if s.key == key)
            rows = [(case, sweep.dtype) for case in sweep.points()]
        else:
            rows = [(c, d) for c, d in work.bench if c.key(d) == key]
        for case, dtype in rows:
            stock, ours = make_sides(case, dtype, work.clock.name)
            inputs = case.make(dtype, work.clock.name)
            if what == "compiled":
                torch._dynamo.reset()
                both_passes(case, torch.compile(stock, dynamic=False), inputs)()
            else:
                with kernels._config.trying(table), in_mode(FORCED):
                    both_passes(case, ours, inputs)()
    with contextlib.suppress(RuntimeError):
        work.clock.clear()


def _spread(work: GpuRun, row: Callable[[GpuRun, Any], Any], items: list):
    """Yields (item, result of `row`) from `work.workers` processes."""
    from fastnn.bench.pool import spread

    argument = row.__name__, work.asked
    return spread(_server, argument, items, work.workers, work.out_of_time)


def _server(argument: tuple[str, argparse.Namespace]) -> Callable:
    """The function that a process of the pool calls with an item."""
    name, asked = argument
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # there already is a process per core
    torch.set_num_threads(1)
    _interpret(asked)
    return functools.partial(globals()[name], _work(asked, math.inf))


def ceilings(work: GpuRun) -> bool:
    from fastnn.bench.measure import Cpu, ceilings

    if not work.results.of("ceilings"):
        size = (1 << 16, 32) if isinstance(work.clock, Cpu) else ()
        work.results.add({"kind": "ceilings", **ceilings(work.clock, *size)})
    return True


def bench(work: GpuRun) -> bool:
    from fastnn.bench.run import run_rows

    return run_rows(
        work.bench, work.results, work.clock, repeats=work.repeats, out_of_time=work.out_of_time,
        compiled=work.compiled,
    )  # fmt: skip


def configs(work: GpuRun) -> bool:
    from fastnn.bench import configs

    questions = configs.plan(work.bench, configs.on(work.clock))
    # The first step of each search that is left. A process per core compiles its kernels.
    first = [
        ("kernels", case.key(dtype), configs.entry(question, config))
        for question in questions
        if not work.results.has("config", question.key)
        for case, dtype in question.rows[: configs.MOST_ROWS]
        for config in question.function.neighbours(question.formula)
    ]
    if not _prepare(work, first):
        return False
    try:
        return configs.run(
            questions, work.results, work.clock, repeats=min(work.repeats, configs.REPEATS),
            out_of_time=work.out_of_time,
        )  # fmt: skip
    finally:
        configs.write(_configs(work), work.results)


def _configs(work: GpuRun) -> Path:
    return work.out / f"configs-{_architecture(work)}.json"


def tune(work: GpuRun) -> bool:
    from fastnn.bench import tune

    with _tables(work):
        done = tune.run(
            work.sweeps, work.results, work.clock, repeats=work.repeats,
            out_of_time=work.out_of_time,
        )  # fmt: skip
    if done:
        tune.write(work.out / "crossover.json", _architecture(work), tune.entry(work.results))
    return done


def again(work: GpuRun) -> bool:
    """Time the rows again, with the tables just measured."""
    from fastnn.bench.run import run_rows

    with _tables(work):
        return run_rows(
            work.bench, work.results, work.clock, repeats=work.repeats, prefix="tuned-",
            out_of_time=work.out_of_time, compiled=False, checked=False,
        )  # fmt: skip


def _architecture(work: GpuRun) -> str:
    from fastnn.kernels import _gpus

    return _gpus.architecture(0 if work.clock.name == "cuda" else -1)


def _table(path: Path):
    """In the block the size gate follows the table at `path`, and the shipped table otherwise."""
    from fastnn import _gate

    return _gate.using({**_gate.table(), **_gate.read(path)})


@contextlib.contextmanager
def _tables(work: GpuRun):
    """In the block, crossover sizes and launch configurations are those measured in this run."""
    from fastnn import kernels
    from fastnn.bench import configs

    with contextlib.ExitStack() as stack:
        stack.enter_context(_table(work.out / "crossover.json"))
        if _configs(work).exists():
            stack.enter_context(kernels._config.trying(configs.read(_configs(work))))
        yield


def steps(work: GpuRun) -> bool:
    """Time training steps of models under bf16 autocast: stock, compiled, ours forced and auto."""
    import fastnn

    device = work.clock.name
    with _tables(work):
        for step in work.steps:
            if work.results.has("step", step.name):
                continue
            if work.out_of_time():
                return False
            line: dict = {"kind": "step", "key": step.name, "sides": {}}
            torch.manual_seed(0)
            start = step.build(torch.nn).state_dict()
            data = step.data(device)
            sides: dict[str, tuple[Any, Any]] = {
                "stock": (torch.nn, "torch"), "auto": (fastnn, "auto"), "ours": (fastnn, "triton")
            }  # fmt: skip
            if work.compiled:
                sides["compiled"] = (torch.nn, "torch")
            for name, (namespace, mode) in sides.items():
                try:
                    line["sides"][name] = _train(
                        step, namespace, mode, start, data, work, name == "compiled"
                    )
                except Exception as e:
                    line["sides"][name] = {"error": f"{type(e).__name__}: {e}"[:300]}
                with contextlib.suppress(RuntimeError):
                    work.clock.clear()
            work.add(line)
    return True


def _train(step, namespace, mode, start, data, work: GpuRun, compiled: bool) -> dict:
    import fastnn
    from fastnn.bench.measure import summary

    device = work.clock.name
    model = step.build(namespace)
    model.load_state_dict(start)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    call = torch.compile(model) if compiled else model
    torch.manual_seed(1)
    times = []

    def one():
        with torch.autocast(device, torch.bfloat16):
            loss = call(*data)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    with fastnn.backend(mode):
        losses = [one().item() for _ in range(2)]
        peak = work.clock.peak(lambda: losses.append(one()))
        losses[-1] = losses[-1].item()
        for _ in range(-(-work.repeats // 2)):
            work.clock.synchronize()
            begun = time.perf_counter()
            one()
            work.clock.synchronize()
            times.append(1e6 * (time.perf_counter() - begun))
    return {"step": summary(times), "peak_bytes": peak, "losses": losses}


def determinism(work: GpuRun) -> bool:
    """Gradients must have the same bits twice on one stream, and at once on two other streams."""
    import fastnn
    from fastnn.bench.run import both_passes, make_sides

    seen = set()
    for case, dtype in work.bench:
        if case.name in seen or work.results.has("determinism", case.key(dtype)):
            continue
        seen.add(case.name)
        if work.out_of_time():
            return False
        small = case.at(min(case.rows, 256))
        line: dict = {"kind": "determinism", "key": case.key(dtype), "failures": []}
        try:
            _, ours = make_sides(small, dtype, work.clock.name)
            inputs = small.make(dtype, work.clock.name)
            with fastnn.backend("triton"):
                both = both_passes(small, ours, inputs)
                runs = [_seeded(both) for _ in range(2)] + _on_two_streams(both, work.clock)
            for what, run in zip(("second run", "stream 1", "stream 2"), runs[1:], strict=False):
                if not all(map(torch.equal, run, runs[0])):
                    line["failures"].append(f"{what}: other bits")
        except Exception as e:
            line["failures"].append(f"{type(e).__name__}: {e}"[:300])
        work.add(line)
    return True


def _seeded(both: Callable) -> list:
    torch.manual_seed(0)
    return [t.nan_to_num() for t in both()]


def _on_two_streams(both: Callable, clock) -> list[list]:
    if clock.name != "cuda":
        return []
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)  # so that both run at the same time
            found.append(_seeded(both))
    torch.cuda.synchronize()
    return found


def huge(work: GpuRun) -> bool:
    """Beyond 2**31 elements, both ends and the middle of a call must agree with a small call."""
    for case, dtype in work.huge:
        if work.results.has("huge", case.key(dtype)):
            continue
        if work.out_of_time():
            return False
        line: dict = {"kind": "huge", "key": case.key(dtype), "failures": []}
        try:
            line["failures"] = _huge(case, dtype, work.clock.name)
        except torch.OutOfMemoryError as e:
            line["skipped"] = str(e).splitlines()[0]
        except Exception as e:
            line["failures"] = [f"{type(e).__name__}: {e}"[:300]]
        work.add(line)
        work.clock.clear()
    return True


def _huge(case, dtype, device: str) -> list[str]:
    import fastnn
    from fastnn.bench.run import leaves_of, make_sides

    _, ours = make_sides(case, dtype, device)
    inputs = case.make(dtype, device)
    each = 8
    middle = case.rows // 2  # after 2**30 elements, which are 2**31 bytes in 16 bits
    parts = [slice(0, each), slice(middle, middle + each), slice(case.rows - each, case.rows)]
    failures = []
    with fastnn.backend("triton"):
        out = ours(*inputs)
        upstream = torch.ones_like(out)
        wanted = [t for t in leaves_of(ours, inputs) if any(t is x for x in inputs)]
        grads = torch.autograd.grad(out, wanted, upstream) if wanted else ()
        for part in parts:
            some = [t[part].detach().requires_grad_(t.requires_grad) for t in inputs]
            expected = ours(*some)
            if not _agree(out[part], expected):
                failures.append(f"output rows {part.start} to {part.stop} differ")
            if wanted:
                leaves = [t for t in some if t.requires_grad]
                small = torch.autograd.grad(expected, leaves, upstream[part])
                if not all(_agree(g[part], s) for g, s in zip(grads, small, strict=True)):
                    failures.append(f"gradient rows {part.start} to {part.stop} differ")
    return failures


def _agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether both are equal up to the order of sums, which may depend on the number of rows."""
    apart = (a.double() - b.double()).abs().max().item()
    return apart <= 2 * torch.finfo(a.dtype).eps * b.double().abs().max().item()


_SANITIZED = """
import sys
from fastnn.testing import check
from fastnn.testing.cases import CASES
import torch
names = set()
for case in CASES:
    if case.stock is None and case.name not in names and torch.bfloat16 in case.dtypes:
        names.add(case.name)
        check(case, torch.bfloat16, "cuda")
print(len(names), "rows")
"""


def sanitizer(work: GpuRun) -> bool:
    """Run compute-sanitizer's memcheck over a row of each layer."""
    if work.results.of("sanitizer"):
        return True
    tool = shutil.which("compute-sanitizer")
    line: dict = {"kind": "sanitizer", "key": "memcheck", "failures": []}
    left = work.deadline - time.monotonic()
    if tool is None or work.clock.name != "cuda":
        line["skipped"] = "compute-sanitizer is not installed, or there is no GPU"
    elif left < 60:
        return False
    else:
        command = [tool, "--tool", "memcheck", "--error-exitcode", "99", sys.executable, "-c"]
        try:
            done = subprocess.run(
                [*command, _SANITIZED], capture_output=True, text=True, timeout=left
            )
        except subprocess.TimeoutExpired:
            return False
        line["tail"] = (done.stdout + done.stderr)[-2000:]
        if done.returncode:
            line["failures"] = [f"exit code {done.returncode}"]
    work.results.add(line)
    return True


# Each stage has the share of the budget after which the rest is left for the next run.
STAGES: dict[str, tuple[Callable[[GpuRun], bool], float]] = {
    "parity": (parity, 0.3),
    "prepare": (prepare, 0.25),
    "ceilings": (ceilings, 0.05),
    "bench": (bench, 0.25),
    "configs": (configs, 0.15),
    "tune": (tune, 0.15),
    "again": (again, 0.1),
    "steps": (steps, 0.15),
    "determinism": (determinism, 0.1),
    "huge": (huge, 0.1),
    "sanitizer": (sanitizer, 0.1),
}


# ---- The summary ------------------------------------------------------------------------------


def failures(results) -> list[str]:
    """All faults in all lines."""
    found = []
    for line in results.lines:
        said = list(line.get("failures") or ())
        if "error" in line:
            said.append(line["error"])
        said += [f"{n}: {s['error']}" for n, s in line.get("sides", {}).items() if "error" in s]
        found += [f"{line['kind']} `{line['key']}`: {s}" for s in said]
    return found


def summarise(work: GpuRun, state: dict[str, str], plots: bool = False) -> None:
    """Rewrite summary.md, and draw the plots."""
    from fastnn.bench import report

    results = work.results
    tuned = "tuned-" if results.of("tuned-row") else ""
    report.write(results, work.out, plots=plots)
    path = work.out / "summary.md"
    text = [path.read_text(), "## Stages\n"]
    text += [f"- {name}: {said}" for name, said in state.items()]
    if rows := results.of("parity"):
        ratios = [x["ratio"] for x in rows if "ratio" in x]
        text.append(
            f"\n{len(rows)} parity rows, {sum(x['path'] == 'kernel' for x in rows)} on kernels, "
            f"{sum(bool(x['failures']) for x in rows)} failed"
            + (f"; median error ratio to stock {statistics.median(ratios):.2f}" if ratios else "")
        )
    for prefix in dict.fromkeys(("", tuned)):
        if results.of(prefix + "row"):
            title = "by the table just measured" if prefix else "by the shipped table"
            summary = json.dumps(report.verdict(results.lines, prefix), indent=1)
            text.append(f"\n## Rows, auto {title}\n\n```json\n{summary}\n```")
    if found := results.of("step"):
        text.append("\n## Training steps, ms\n")
        for line in found:
            told = [
                f"{name} {s['step']['median'] / 1e3:.2f}" if "step" in s else f"{name} failed"
                for name, s in line["sides"].items()
            ]
            text.append(f"- {line['key']}: {', '.join(told)}")
    if wrong := failures(results):
        text.append("\n## Wrong\n\n" + "\n".join(f"- {w}" for w in wrong))
    path.write_text("\n".join(text) + "\n")


# ---- Running ----------------------------------------------------------------------------------


def _work(args: argparse.Namespace, deadline: float, results=None) -> GpuRun:
    from fastnn.bench import cases, models, tune
    from fastnn.bench.measure import Cpu, Cuda
    from fastnn.testing.cases import CASES

    if args.tiny:
        rows = [
            cases.row("GELU", "tiny", 3, 40),
            cases.cross_entropy("tiny", 4, 33),
        ]
        small = tune.Sweep("gelu", rows[0], torch.float32, most=200)
        huge = [cases.row("GELU", "tiny", 24, 16)]
        chosen = [c for c in CASES if c.name == "GELU"][:1]
    else:
        rows, huge, chosen, small = cases.CASES, cases.HUGE, CASES, None
    return GpuRun(
        results=results,
        clock=None if args.dry_run else Cpu() if args.tiny else Cuda(),
        out=args.out,
        bench=cases.matching(rows=rows),
        sweeps=[small] if small else tune.plan(),
        # One dtype after the other, so that every layer was checked if the time runs out.
        parity=sorted(((c, d) for c in chosen for d in c.dtypes), key=lambda row: str(row[1])),
        steps=models.TINY[:1] if args.tiny else models.STEPS,
        huge=cases.matching(rows=huge),
        repeats=3 if args.tiny else 36,
        compiled=not (args.no_compile or args.tiny),
        deadline=deadline,
        asked=args,
        workers=args.workers,
    )


def _plan(args: argparse.Namespace, work: GpuRun) -> list[str]:
    counts = {
        "parity": f"{len(work.parity)} rows in {work.workers} processes",
        "prepare": f"what the following stages time, in {work.workers} processes",
        "ceilings": "a copy, three matrix products",
        "bench": f"{len(work.bench)} rows" + (", then compiled" if work.compiled else ""),
        "configs": "whatever launch configuration the rows ask for",
        "tune": f"{len(work.sweeps)} sweeps, {sum(len(s.points()) for s in work.sweeps)} points",
        "again": f"{len(work.bench)} rows",
        "steps": ", ".join(s.name for s in work.steps),
        "determinism": f"{len({c.name for c, _ in work.bench})} rows",
        "huge": f"{len(work.huge)} rows",
        "sanitizer": shutil.which("compute-sanitizer") or "compute-sanitizer is not installed",
    }
    return [
        f"{name:12} at most {STAGES[name][1]:4.0%} of {args.budget:.0f} s: {counts[name]}"
        for name in args.stage or STAGES
    ]


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    if importlib.util.find_spec("fastnn") is None:
        return _refuse("fastnn is not installed: pip install --no-deps --no-build-isolation -e .")
    if args.dry_run:
        print(*_plan(args, _work(args, 0.0)), sep="\n")
        return 0
    interpreted = _interpret(args)
    from fastnn import _mode
    from fastnn.bench.run import Mismatch, Results

    if args.tiny:
        if not interpreted:
            return _refuse("--tiny interprets kernels: set TRITON_INTERPRET=1 before Python starts")
    elif not torch.cuda.is_available() or _mode.INTERPRET:
        return _refuse("no GPU here, or TRITON_INTERPRET=1; --dry-run shows the plan")
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        results = Results(args.out / "results.jsonl")
    except Mismatch as e:
        return _refuse(str(e))
    begun = time.monotonic()
    work = _work(args, begun + args.budget, results)
    state = {}
    for name in args.stage or STAGES:
        stage, share = STAGES[name]
        start = time.monotonic()
        work.deadline = min(begun + args.budget, start + share * args.budget)
        try:
            done = start < begun + args.budget and stage(work)
            said = "done" if done else "unfinished"
        except RuntimeError as e:  # of the device, which this process has lost
            said = f"stopped by {type(e).__name__}: {str(e).splitlines()[0]}"
        state[name] = f"{said}, {time.monotonic() - start:.0f} s"
        print(f"{name}: {state[name]}", flush=True)
        if said.startswith("stopped"):
            break
        summarise(work, state)
    if args.pytest:
        state["pytest"] = _pytest(begun + args.budget, work.workers)
        print(state["pytest"], flush=True)
        summarise(work, state)
    summarise(work, state, plots=True)
    wrong = failures(results)
    print(*wrong, f"wrote {args.out}/summary.md", sep="\n")
    unfinished = [n for n, said in state.items() if not said.startswith("done")]
    if unfinished:
        print(f"unfinished: {', '.join(unfinished)}; the same command goes on")
    return 1 if wrong or unfinished else 0


def _interpret(args: argparse.Namespace) -> bool:
    """Interpret kernels if the run is a tiny one. False if it is too late for that."""
    if not args.tiny:
        return False
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when fastnn is imported
    from fastnn import _mode
    from fastnn.testing import interpreter

    if _mode.INTERPRET:
        interpreter.install()
    return _mode.INTERPRET


def _pytest(deadline: float, workers: int) -> str:
    command = [sys.executable, "-m", "pytest", "tests", "-n", str(workers), "-q"]
    left = max(1.0, deadline - time.monotonic())
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        return "unfinished: pytest ran out of time"
    last = (done.stdout.strip().splitlines() or ["printed nothing"])[-1]
    return f"{'done' if not done.returncode else 'failed'}: {last}"


def _refuse(why: str) -> int:
    print(f"bench.gpu: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
