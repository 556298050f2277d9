"""`fastnn tune`: from which size kernels win on this GPU; writes the table that auto follows."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastnn import _cli, _op

EXAMPLES = """\
  fastnn tune --dry-run                     # what would be measured; needs no GPU
  fastnn tune                               # every op; writes this GPU's entry of the table
  fastnn tune --only layer_norm --out my-table.json
"""

TABLE = Path(_op.__file__).with_name("crossover.json")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", metavar="OP", help="ops so named, exactly")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the table to write (default: the installed one)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, measure nothing")
    parser.add_argument(
        "--log", type=Path, metavar="FILE", help="every measured point as it comes; resumed"
    )


def run(args: argparse.Namespace) -> int:
    console = _cli.console()
    import tempfile

    from fastnn.bench import tune

    try:
        sweeps = tune.plan(args.only)
    except KeyError as e:
        raise _cli.CliError(f"--only {e.args[0]}: no such op; `fastnn info` lists them") from None
    points = sum(len(sweep.points()) for sweep in sweeps)
    console.print(
        f"{len(sweeps)} sweeps of {len({s.op for s in sweeps})} ops, {points} points, "
        "stock and ours forward and backward"
    )
    if args.dry_run:
        for line in tune.describe(sweeps):
            console.print(line, highlight=False, soft_wrap=True)
        return 0
    if not torch.cuda.is_available() or _op.INTERPRET:
        why = _cli.why_no_kernels() or "kernels are interpreted here (TRITON_INTERPRET=1)"
        raise _cli.CliError(f"tune measures on a GPU: {why}; --dry-run shows the plan")

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from fastnn.bench import measure
    from fastnn.bench import run as bench

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        try:
            results = bench.Results(args.log or Path(scratch, "tune.jsonl"))
        except bench.Mismatch as e:
            raise _cli.CliError(str(e)) from None
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("tune", total=len(sweeps))
            tune.run(
                sweeps, results, measure.Cuda(),
                on_sweep=lambda s: progress.update(task, description=s.op, advance=1),
            )  # fmt: skip
        entry = tune.entry(results)
    path = args.out or TABLE
    tune.write(path, _op.architecture(0), entry)
    for name, least in sorted(entry["least"].items()):
        console.print(f"{name:24} {'stock at every size' if least is None else f'{least:,}'}")
    console.print(f"wrote {path}: {entry['source']}")
    return 0
