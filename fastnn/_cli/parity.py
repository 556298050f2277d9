"""`fastnn parity`: compares every layer and function with kernels with stock and float64."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import html
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastnn import _cli, _mode
from fastnn._op import FLOATS

if TYPE_CHECKING:
    from rich.table import Table

    from fastnn.testing import Case

EXAMPLES = """\
  fastnn parity                             # every row, on the GPU, else interpreted on the CPU
  fastnn parity --only softmax --only GELU  # rows whose name contains one of these
  fastnn parity --dtype bfloat16 --html report.html
  fastnn parity --emulate sm_90             # the code compiled for an H100, run on the CPU
"""

DTYPES = {str(d).removeprefix("torch."): d for d in FLOATS}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="only rows whose name has NAME"
    )
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="default: all three")
    parser.add_argument(
        "--emulate", metavar="ARCH",
        help="compile kernels for an NVIDIA GPU (sm_80, sm_90, ...), which need not be present, "
        "and run that code on the CPU, one instruction at a time",
    )  # fmt: skip
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report as one file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of every row")


@dataclasses.dataclass
class Outcome:
    """The outcome of one row in one dtype. Each error is the largest one over the row's tensors.
    `ratios` has the ratio of our error to that of stock for each tensor, outputs and gradients.

    Bytes and launches are those of forward and backward, as in `fastnn.testing.Traffic`. They are
    None if kernels are compiled, or if the row was declined.
    """

    name: str
    case: str
    dtype: str
    path: str
    reason: str | None
    error: float
    stock_error: float
    ratio: float
    ratios: list[float]
    tensors: int
    gradients: int
    seconds: float
    failures: list[str]
    bytes: int | None = None
    least_bytes: int | None = None
    stock_bytes: int | None = None
    launches: int | None = None
    stock_launches: int | None = None

    def passes(self, of: str) -> float | None:
        """Bytes that "ours" or "stock" moves, divided by the least bytes."""
        moved = self.bytes if of == "ours" else self.stock_bytes
        return moved / self.least_bytes if moved is not None and self.least_bytes else None


def _start_over(interpret: bool) -> None:
    """Restart the process, to interpret kernels or to compile them. Import decides on that."""
    if not _mode.HAS_TRITON:
        raise _cli.CliError(f"there is nothing to compare: {_cli.NO_TRITON}")
    if _mode.INTERPRET == interpret:
        return
    environment = {
        **os.environ, "TRITON_INTERPRET": str(int(interpret)), "FASTNN_BACKEND": "auto"
    }  # fmt: skip
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "fastnn", *sys.argv[1:]], environment)


@contextlib.contextmanager
def _uninitialised_memory_is_nan():
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


def emulated(architecture: str) -> tuple[str, contextlib.AbstractContextManager]:
    """(the name of the device in the report, the block in which kernels are emulated)."""
    from fastnn.testing.aot import TARGETS, emulate

    known = {t.architecture: name for name, t in TARGETS.items() if name.startswith("cuda:")}
    if architecture not in known:
        raise _cli.CliError(f"--emulate {architecture}: accepted are {', '.join(known)}")
    said = f"compiled for {architecture}, emulated on the CPU"
    return said, emulate(known[architecture])


def _outcome(case: Case, dtype: torch.dtype, device: str) -> Outcome:
    from fastnn.testing import check, count

    start = time.perf_counter()
    try:
        result = check(case, dtype, device)
        failures, path, reason = result.failures, result.path, result.reason
        compared = result.comparisons
    except Exception as e:
        failures, path, reason, compared = [f"{type(e).__name__}: {e}"], "error", None, []
    worst = max(compared, key=lambda c: (c.ratio, c.ours), default=None)
    outcome = Outcome(
        case.name,
        str(case),
        str(dtype).removeprefix("torch."),
        path,
        reason,
        worst.ours if worst else 0.0,
        worst.stock if worst else 0.0,
        worst.ratio if worst else 1.0,
        [c.ratio for c in compared],
        len(compared),
        sum(c.what.startswith("grad") for c in compared),
        time.perf_counter() - start,
        failures,
    )
    if path == "kernel" and _mode.INTERPRET and device == "cpu":
        try:
            moved = count(case, dtype)
        except Exception as e:
            failures.append(f"bytes not counted: {type(e).__name__}: {e}")
            return outcome
        outcome.bytes, outcome.launches = moved.ours.bytes, moved.ours.launches
        outcome.stock_bytes, outcome.stock_launches = moved.stock.bytes, moved.stock.launches
        outcome.least_bytes = moved.least
        if moved.races:
            failures.append(f"a race: {moved.races} bytes stored and touched again in any order")
    return outcome


def _summary(outcomes: list[Outcome]) -> list[dict]:
    """One line per name and dtype, over its rows, independent of the order in which they ended."""
    from fastnn.bench import roofs

    groups: dict[tuple[str, str], list[Outcome]] = {}
    for o in outcomes:
        groups.setdefault((o.name, o.dtype), []).append(o)
    lines = []
    for (name, dtype), rows in sorted(groups.items()):
        worst = max(rows, key=lambda o: (o.ratio, o.error))
        largest = max(rows, key=lambda o: (o.least_bytes or 0, o.case))
        lines.append(
            {
                "name": name,
                "dtype": dtype,
                "rows": len(rows),
                "kernel": sum(o.path == "kernel" for o in rows),
                "stock": sum(o.path == "stock" for o in rows),
                "gradients": sum(o.gradients for o in rows),
                "error": worst.error,
                "stock_error": worst.stock_error,
                "ratio": worst.ratio,
                "median_ratio": _median(rows),
                "bytes": largest.passes("ours"),
                "stock_bytes": largest.passes("stock"),
                "roof": roofs.warning_of_name(name),
                "failed": sum(bool(o.failures) for o in rows),
            }
        )
    return lines


def _median(outcomes: list[Outcome]) -> float:
    """The median of the ratios of all tensors; 1 if there are none."""
    ratios = [ratio for o in outcomes for ratio in o.ratios]
    return statistics.median(ratios) if ratios else 1.0


def _figure(x: float) -> str:
    return "inf" if math.isinf(x) else f"{x:.2g}"


def _cell(key: str, value) -> str:
    if value is None:
        return ""
    if key in ("bytes", "stock_bytes"):
        return f"{value:.2f}"
    return _figure(value) if isinstance(value, float) else str(value)


COLUMNS = {
    "name": "layer or function",
    "dtype": "dtype",
    "rows": "rows",
    "kernel": "on kernels",
    "stock": "declined",
    "gradients": "gradients",
    "error": "error",
    "stock_error": "stock error",
    "ratio": "worst ratio",
    "median_ratio": "median ratio",
    "bytes": "bytes / least",
    "stock_bytes": "of stock",
    "roof": "roof",
    "failed": "failed",
}
NARROW = ("name", "dtype", "rows", "kernel", "ratio", "failed")  # these fit into 80 characters


def _cells(line: dict, columns: Iterable[str] = COLUMNS) -> list[str]:
    return [_cell(key, line[key]) for key in columns]


def _table(lines: list[dict], width: int) -> Table:
    from rich.table import Table

    wide = [key for key in COLUMNS if key != "roof" or width >= 176]
    columns = wide if width >= 160 else NARROW
    table = Table(
        title="largest error against float64 (outputs, gradients); bytes moved over the least "
        "possible, forward and backward of the largest row",
        caption=None if columns is wide else "a wider terminal also shows errors and bytes",
    )
    for key in columns:
        left = key in ("name", "dtype", "roof")
        table.add_column(COLUMNS[key], justify="left" if left else "right", no_wrap=key == "name")
    for line in lines:
        table.add_row(*_cells(line, columns), style="bold red" if line["failed"] else None)
    return table


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; color: #1b1f24 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #d8dee4; text-align: right }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
th { position: sticky; top: 0; background: #f6f8fa }
tr.failed { background: #ffebe9 } .verdict { font-size: 1.3rem; font-weight: 600 }
.passed { color: #1a7f37 } .broken { color: #cf222e } code { font-size: 13px }
details { margin: .3rem 0 } summary { cursor: pointer }
"""


def _html(facts: dict[str, str], lines: list[dict], outcomes: list[Outcome]) -> str:
    """A report as one file, without scripts and links."""
    bad = [o for o in outcomes if o.failures]
    verdict = f"{len(bad)} of {len(outcomes)} rows failed" if bad else "Every row passed"
    head = "".join(f"<th>{html.escape(t)}</th>" for t in COLUMNS.values())
    body = "".join(
        f"<tr class={'failed' if line['failed'] else 'ok'}>"
        + "".join(f"<td>{html.escape(c)}</td>" for c in _cells(line))
        + "</tr>"
        for line in lines
    )
    told = "".join(
        f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in facts.items()
    )
    failures = "".join(
        f"<details open><summary><code>{html.escape(o.case)}</code> {o.dtype}</summary><ul>"
        + "".join(f"<li>{html.escape(f)}</li>" for f in o.failures)
        + "</ul></details>"
        for o in bad
    )
    declined = "".join(
        f"<li><code>{html.escape(o.case)}</code> {o.dtype}: {html.escape(o.reason or '')}</li>"
        for o in outcomes
        if o.path == "stock"
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>fastnn parity</title>
<style>{STYLE}</style><h1>fastnn parity</h1>
<p class="verdict {"broken" if bad else "passed"}">{verdict}</p><table>{told}</table>
<p>Errors are the largest absolute ones against float64, over outputs and gradients of all rows.
A row passes if the error of fastnn is at most twice the error of stock in the same dtype, plus one
unit in the last place. A row beyond that bound is drawn again with other inputs. Dtypes, shapes,
strides, nan and inf must be those of stock. A second run must give the same bits, no input may be
written, and state_dict must load both ways.</p>
<p>Bytes are counted in the interpreter, for the largest row, forward and backward. They are what
kernels load and store, each byte once per launch, divided by the least possible: inputs, outputs
and gradients, once in each pass that needs them. The bytes of stock are an estimate from the
operators that it runs. In small rows, partial sums weigh more.</p>
<p>The roof is a warning about the rows of the same name in the benchmark, in code compiled for an
H100: "issue 1.3" means that some launch needs 1.3 times as long for its instructions as for its
bytes. It is empty up to 0.8, and where the benchmark has no such row. No time was measured.</p>
<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>
{"<h2>Failures</h2>" + failures if bad else ""}
{f"<h2>Declined, as the rows state</h2><ul>{declined}</ul>" if declined else ""}</html>
"""


def run(args: argparse.Namespace) -> int:
    _start_over(not args.emulate and (_mode.INTERPRET or not torch.cuda.is_available()))
    console = _cli.console()
    from fastnn.testing.cases import CASES

    device, kernels = "cuda", "compiled"
    way: contextlib.AbstractContextManager = contextlib.nullcontext()
    if args.emulate:
        device = "cpu"
        kernels, way = emulated(args.emulate)
    elif not torch.cuda.is_available():
        from fastnn.testing import interpreter

        device, kernels = "cpu", "interpreted on the CPU"
        interpreter.install()
    dtypes = [DTYPES[d] for d in args.dtype or DTYPES]
    rows = [
        (case, dtype)
        for case in CASES
        if not args.only or any(o.lower() in case.name.lower() for o in args.only)
        for dtype in case.dtypes
        if dtype in dtypes
    ]
    if not rows:
        raise _cli.nothing_matches("row", args.only)
    facts = {**_cli.versions(), "device": _cli.device_name(torch.device(device))}
    facts["kernels"] = kernels
    outcomes = []
    with (
        _cli.progress(console) as progress,
        _uninitialised_memory_is_nan(),
        way,
    ):
        task = progress.add_task("parity", total=len(rows))
        for case, dtype in rows:
            progress.update(task, description=f"{case.name} {str(dtype).removeprefix('torch.')}")
            outcomes.append(_outcome(case, dtype, device))
            progress.advance(task)
    facts["rows"] = str(len(outcomes))
    lines = _summary(outcomes)
    for name, value in facts.items():
        console.print(f"{name:8} {value}")
    console.print(_table(lines, console.width))
    bad = [o for o in outcomes if o.failures]
    for o in bad:
        console.print(f"[red]{o.case} {o.dtype}[/red]", *o.failures, sep="\n  ", markup=True)
    on_kernels = sum(o.path == "kernel" for o in outcomes)
    median = _median(outcomes)
    console.print(
        f"{len(outcomes)} rows: {on_kernels} on kernels, {len(outcomes) - on_kernels} declined; "
        f"median of error ratios to stock {_figure(median)}; {len(bad)} failed."
    )
    if args.json:
        data = {"environment": facts, "rows": [dataclasses.asdict(o) for o in outcomes]}
        args.json.write_text(json.dumps(data, indent=1) + "\n")
        console.print(f"wrote {args.json}")
    if args.html:
        args.html.write_text(_html(facts, lines, outcomes))
        console.print(f"wrote {args.html}")
    return 1 if bad else 0
