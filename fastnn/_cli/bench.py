"""`fastnn bench`: layers of real models timed against stock; without a GPU, predicted."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from fastnn import _cli, _mode
from fastnn._op import FLOATS

EXAMPLES = """\
  fastnn bench                              # every row; without a GPU, predictions
  fastnn bench --only LayerNorm --only BERT --dtype bfloat16
  fastnn bench --out bench-out --no-compile # the same command again goes on where it stopped
  fastnn bench --models --only timm         # bytes of compiled models of a library, counted
"""

DTYPES = {str(d).removeprefix("torch."): d for d in FLOATS}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="only rows whose name or model has NAME"
    )
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="default: all three")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write results, a summary and plots; can be resumed"
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True,
        help="also time torch.compile(stock), which takes minutes more",
    )  # fmt: skip
    parser.add_argument(
        "--bandwidth", type=float, default=3.05, metavar="TB/S",
        help="without a GPU: bandwidth of the prediction (default: %(default)s, an H100)",
    )  # fmt: skip
    parser.add_argument(
        "--models", action="store_true",
        help="count bytes and launches of training steps of real models, eager and compiled for "
        "the backend fastnn; needs transformers, timm and diffusers, and no GPU",
    )  # fmt: skip


def _interpret(always: bool) -> None:
    """Without a GPU, restart the process with interpreted kernels. Import decides on that."""
    if _mode.INTERPRET or (torch.cuda.is_available() and not always):
        return
    if not _mode.HAS_TRITON:
        raise _cli.CliError(f"without a GPU the command predicts, and {_cli.NO_TRITON}")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FASTNN_BACKEND": "auto"}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "fastnn", *sys.argv[1:]], environment)


def run(args: argparse.Namespace) -> int:
    _interpret(always=args.models)
    console = _cli.console()
    if args.models:
        return _models(args, console)
    import tempfile

    from fastnn.bench import cases, report
    from fastnn.bench import run as bench

    rows = cases.matching(args.only, [DTYPES[d] for d in args.dtype or ()])
    if not rows:
        raise _cli.nothing_matches("row", args.only)
    with tempfile.TemporaryDirectory() as scratch:
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            _cli.require("matplotlib")
        try:
            results = bench.Results((args.out or Path(scratch)) / "bench.jsonl")
        except bench.Mismatch as e:
            raise _cli.CliError(str(e)) from None
        console.print(report.where(results.environment or {}))
        with _cli.progress(console) as progress:
            task = progress.add_task("bench", total=None)

            def on_row(line: dict) -> None:
                progress.update(task, description=line["name"], advance=1)

            measure = _measure if torch.cuda.is_available() else _predict
            failed = measure(args, rows, results, progress, task, on_row)
        shown = _measured if torch.cuda.is_available() else _predicted
        console.print(shown(results, rows, console.width))
        if torch.cuda.is_available():
            summary = report.verdict(results.lines)
            means = {s: summary[s]["geometric_mean"] for s in ("ours", "auto")}
            told = ", ".join(f"{s} {m:.2f}" for s, m in means.items() if m is not None)
            console.print(
                f"geometric mean over stock: {told or 'no rows'}; rows of auto below 0.97: "
                f"{len(summary['auto_below_0.97'])}; wrong: {len(summary['wrong'])}"
            )
        else:
            _explain_prediction(console, args.bandwidth, results, rows)
        if args.out:
            for path in report.write(results, args.out):
                console.print(f"wrote {path}")
            console.print(f"wrote {results.path}")
    return 1 if failed else 0


def _models(args: argparse.Namespace, console) -> int:
    import json

    from rich.table import Table

    from fastnn.bench import traffic
    from fastnn.testing import interpreter

    models = traffic.matching(args.only)
    if not models:
        raise _cli.nothing_matches("model", args.only)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    interpreter.install()
    records = []
    with _cli.progress(console) as progress:
        task = progress.add_task("models", total=len(models))
        for model in models:
            progress.update(task, description=model.name)
            records.append(traffic.counted(model))
            progress.advance(task)
    without = list(dict.fromkeys(r["why"] for r in records if "why" in r))
    if len(without) and all("why" in r for r in records):
        raise _cli.CliError(
            f"no model was counted: {'; '.join(without)}. The models need "
            "pip install 'fastnn-triton[graph]'"
        )
    table = Table(title="a training step in bfloat16: COUNTED, no device, nothing was timed")
    for column in traffic.COLUMNS:
        left = column in ("model", "from")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    for row in traffic.rows([r for r in records if "why" not in r]):
        table.add_row(*row)
    console.print(table)
    console.print(traffic.LEGEND, soft_wrap=True)
    for why in without:
        console.print(f"not counted: {why}", soft_wrap=True)
    if args.out:
        path = args.out / "models.json"
        path.write_text(json.dumps({"device": "none: counted", "models": records}, indent=1) + "\n")
        console.print(f"wrote {path}")
    return 0


def _measure(args, rows, results, progress, task, on_row) -> bool:
    from fastnn.bench import measure
    from fastnn.bench import run as bench

    clock = measure.Cuda()
    progress.update(task, total=len(rows) * (1 + args.compile), description="ceilings")
    if not results.of("ceilings"):
        results.add({"kind": "ceilings", **measure.ceilings(clock)})
    bench.run_rows(rows, results, clock, compiled=args.compile, on_row=on_row)
    return any("error" in x or x["failures"] for x in results.of("row"))


def _predict(args, rows, results, progress, task, on_row) -> bool:
    from fastnn.bench import predict
    from fastnn.testing import interpreter

    interpreter.install()
    progress.update(task, total=len(rows))
    for case, dtype in rows:
        key = case.key(dtype)
        found = [x for x in results.of("prediction") if x["key"] == key]
        if found and found[0]["bandwidth"] != args.bandwidth * 1e12:
            raise _cli.CliError(f"{results.path} holds predictions for another --bandwidth")
        if not found:
            results.add(predict.predicted(case, dtype, args.bandwidth * 1e12))
        on_row(results.lines[-1] if not found else found[0])
    return False


def _chosen(results, kind: str, rows) -> list[dict]:
    keys = {case.key(dtype) for case, dtype in rows}
    return [x for x in results.of(kind) if x["key"] in keys]


def _predicted(results, rows, width: int):
    from fastnn.bench import roofs

    cells = []
    for x in _chosen(results, "prediction", rows):
        if x["speedup"] is None:
            cells.append((x["key"], x["model"], "", "", "", "no: " + x["why"], "", ""))
            continue
        mb = [f"{sum(p['bytes'] for p in x[s]) / 1e6:.1f}" for s in ("stock", "ours")]
        launches = "/".join(str(sum(p["launches"] for p in x[s])) for s in ("stock", "ours"))
        roof = roofs.warning_of(x["key"])
        cells.append((x["key"], x["model"], *mb, launches, f"{x['speedup']:.2f}x", roof, x["auto"]))
    columns = ("row", "from", "stock MB", "ours MB", "launches", "predicted", "roof", "auto")
    return _cli.table(
        "PREDICTED from bytes and launches, nothing was measured", columns, cells, width,
        narrow=("row", "predicted", "auto"), left=("row", "from", "roof", "auto"),
    )  # fmt: skip


def _explain_prediction(console, bandwidth: float, results, rows) -> None:
    from fastnn.bench import predict

    lines = _chosen(results, "prediction", rows)
    given = [x for x in lines if x["speedup"] is not None]
    console.print(
        f"No GPU here: {_cli.why_no_kernels() or 'kernels are interpreted'}. {len(given)} of "
        f"{len(lines)} rows have a prediction, for {bandwidth:g} TB/s, "
        f"kernels forced, forward and backward:\n  {predict.FORMULA}\n"
        "The column roof is a warning and not a predicted time. It is the time that the\n"
        "instructions of a launch need on an H100, divided by the time that its bytes need.\n"
        "Both are counted in compiled code. The column is empty up to 0.8.\n"
        "On a GPU the same command measures.",
        soft_wrap=True,
    )


def _measured(results, rows, width: int):
    from fastnn.bench import report
    from fastnn.bench import run as bench

    ceilings: dict = next(iter(results.of("ceilings")), {})
    keys = {case.key(dtype) for case, dtype in rows}
    cells = []
    for x in bench.with_compiled(results.lines):
        if x["key"] not in keys:
            continue
        if "error" in x or x["failures"]:
            wrong = x.get("error") or x["failures"][0]
            cells.append((x["key"], "", "wrong", wrong, "", "", "", ""))
            continue
        rate, share = report.reached(x, bench.FORCED, ceilings)
        stock = bench.took(x, bench.STOCK)
        cells.append((
            x["key"],
            "" if stock is None else f"{stock:.1f}",
            *("" if (s := bench.speedup(x, side)) is None else f"{s:.2f}x"
              for side in (bench.FORCED, bench.AUTO, bench.COMPILED, bench.LIGER)),
            rate,
            "" if share is None else f"{share:.0%}",
        ))  # fmt: skip
    columns = ("row", "stock us", "ours", "auto", "compile", "Liger", "reached", "ceiling")
    return _cli.table(
        "forward and backward; speedups over stock eager", columns, cells, width,
        narrow=("row", "stock us", "ours", "auto"), left=("row",),
    )  # fmt: skip
