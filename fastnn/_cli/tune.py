"""`fastnn tune`: launch configurations, and the sizes from which kernels win, on this GPU."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastnn import _cli, _gate, _mode
from fastnn.kernels import _gpus

EXAMPLES = """\
  fastnn tune --dry-run                     # what would be measured; needs no GPU
  fastnn tune                               # every op; writes this GPU's entries of the tables
  fastnn tune --only layer_norm --out my-table.json
  fastnn tune --what crossovers             # leave the launch configurations as they are
"""

CONFIGS, CROSSOVERS = "configs", "crossovers"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", metavar="OP", help="only the op named OP")
    parser.add_argument(
        "--what", choices=[CONFIGS, CROSSOVERS],
        help="only launch configurations, or only crossover sizes (default: both, in this order)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="FILE",
        help="the crossover table to write (default: the installed one); configurations go to "
        "configs-<architecture>.json beside it",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the plan and measure nothing")
    parser.add_argument(
        "--log", type=Path, metavar="FILE", help="write every measured point; can be resumed"
    )


def _questions(only: list[str] | None, make, console) -> list:
    """The questions that the rows of these ops ask configuration functions."""
    from fastnn.bench import cases, configs, tune

    rows = [
        row for row in cases.matching()
        if not only or any(op in only for op, _ in tune.gate_work(row[0].at(1)))
    ]  # fmt: skip
    with _cli.progress(console) as progress:
        return configs.plan(progress.track(rows, description="asking"), make)


def run(args: argparse.Namespace) -> int:
    console = _cli.console()
    import tempfile

    from fastnn.bench import tune

    try:
        sweeps = tune.plan(args.only) if args.what != CONFIGS else []
    except KeyError as e:
        raise _cli.CliError(f"--only {e.args[0]}: no such op; `fastnn info` lists them") from None
    if sweeps:
        points = sum(len(sweep.points()) for sweep in sweeps)
        ops = _cli.count(len({sweep.op for sweep in sweeps}), "op")
        console.print(
            f"{_cli.count(len(sweeps), 'sweep')} of {ops}, "
            f"{points:,} points, stock and ours forward and backward"
        )
    if args.dry_run:
        for line in tune.describe(sweeps):
            console.print(line, highlight=False, soft_wrap=True)
        if args.what != CROSSOVERS and _mode.HAS_TRITON and not _mode.INTERPRET:
            from fastnn.bench import configs

            with configs.without_a_gpu() as make:
                questions = _questions(args.only, make, console)
            console.print(f"{_cli.count(len(questions), 'launch configuration')}, as on sm_90")
            for line in configs.describe(questions):
                console.print(line, highlight=False, soft_wrap=True)
        return 0
    if not torch.cuda.is_available() or _mode.INTERPRET:
        why = _cli.why_no_kernels() or "kernels are interpreted here (TRITON_INTERPRET=1)"
        raise _cli.CliError(f"tune measures on a GPU: {why}; --dry-run shows the plan")

    from fastnn import kernels
    from fastnn.bench import configs, measure
    from fastnn.bench import run as bench

    architecture = _gpus.architecture(0)
    path = args.out or _gate.TABLE
    folder = kernels._config.FOLDER
    config_path = (
        args.out.with_name(f"configs-{architecture}.json")
        if args.out
        else folder / f"{architecture}.json"
    )
    with tempfile.TemporaryDirectory() as scratch:
        try:
            results = bench.Results(args.log or Path(scratch, "tune.jsonl"))
        except bench.Mismatch as e:
            raise _cli.CliError(str(e)) from None
        clock = measure.Cuda()
        if args.what != CROSSOVERS:
            questions = _questions(args.only, configs.on(clock), console)
            with _cli.progress(console) as progress:
                task = progress.add_task("configurations", total=len(questions))
                configs.run(
                    questions, results, clock,
                    on_question=lambda q: progress.update(task, description=q.key, advance=1),
                )  # fmt: skip
            configs.write(config_path, results)
            better = sum(bool(line["changes"]) for line in results.of("config"))
            console.print(f"{better} of {len(questions)} configurations changed: {config_path}")
        if args.what == CONFIGS:
            return 0
        with (
            kernels._config.trying(configs.read(config_path)),
            _cli.progress(console) as progress,
        ):
            task = progress.add_task("crossovers", total=len(sweeps))
            tune.run(
                sweeps, results, clock,
                on_sweep=lambda s: progress.update(task, description=s.op, advance=1),
            )  # fmt: skip
        entry = tune.entry(results)
    tune.write(path, architecture, entry)
    for line in entry["crossovers"]:
        name = f"{line['op']} {line['variant']}".rstrip()
        least = line["least"]
        told = "stock at every size" if least is None else f"{least:,} {line['unit']}"
        console.print(f"{name:24} {told}")
    console.print(f"wrote {path}: {entry['source']}")
    return 0
