"""`fastnn demo`: shows, plots and writes the results of `training.py`."""

from __future__ import annotations

import argparse
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastnn import _cli, _mode
from fastnn._cli import training
from fastnn._cli.training import DemoError, DemoResult

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

EXAMPLES = """\
  fastnn demo                       # about two minutes on a CPU with two cores
  fastnn demo --quick               # a tiny model: some seconds
  fastnn demo --steps 2000 --seed 1 --out runs/seed1

It writes demo.png (loss curves), demo.json (every figure), stock.pt and fastnn.pt (checkpoints)
into the folder given by --out.

exit code: 0 if the curves coincide and the checkpoints move, 1 if not, 2 if it could not run.
"""


def _at_least(least: int):
    def parse(word: str) -> int:
        value = int(word)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        return value

    parse.__name__ = "whole number"  # argparse: "invalid whole number value: 'x'"
    return parse


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps")
    parser.add_argument(
        "--steps", type=_at_least(2), metavar="N", help="steps of the full run (default: by device)"
    )
    parser.add_argument(
        "--seed", type=_at_least(0), default=0, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-out"),
        metavar="DIR",
        help="folder for what it writes (default: ./%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    console = _cli.console()
    _cli.require("matplotlib")
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    try:
        with training.one_thread():
            device = _cli.device_name(_device())
            comparisons, skipped = _compare(args, console)
    except DemoError as error:
        raise _cli.CliError(str(error)) from error
    for comparison in comparisons:
        _show(console, comparison)
    passed = all(c.passed for c in comparisons)
    report = {
        "passed": passed,
        "versions": _cli.versions(),
        "device": device,
        "seed": args.seed,
        "seconds": time.perf_counter() - began,
        "comparisons": [c.as_dict() for c in comparisons],
        "skipped": skipped,
    }
    (args.out / "demo.json").write_text(json.dumps(report, indent=1))
    plot(report, comparisons, args.out / "demo.png")
    _conclude(console, comparisons, skipped, passed)
    seconds = time.perf_counter() - began
    console.print(f"{seconds:.0f} s; wrote demo.png, demo.json, stock.pt, fastnn.pt to {args.out}")
    return 0 if passed else 1


def _device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _compare(args: argparse.Namespace, console: Console) -> tuple[list[DemoResult], str | None]:
    """The full run, then the run on kernels; and the reason, if there is no second run."""
    from rich import progress

    device = _device()
    console.print(", ".join(f"{name} {v}" for name, v in _cli.versions().items()))
    console.print(f"on {_cli.device_name(device)}")
    # With interpreted kernels, "auto" would train at a thousandth of the speed.
    mode: _mode.Mode = "torch" if _mode.INTERPRET else "auto"
    on_gpu = device.type == "cuda" and not _mode.INTERPRET
    if on_gpu:
        size = training.GPU_QUICK if args.quick else training.GPU
        short = replace(size, steps=50)
    else:
        size = training.CPU_QUICK if args.quick else training.CPU
        short = training.INTERPRETED_QUICK if args.quick else training.INTERPRETED
    size = replace(size, steps=args.steps or size.steps)
    skipped = None if _mode.HAS_TRITON else "triton is not installed, so no kernel can run"

    columns = (
        progress.TextColumn("{task.description:30}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[loss]:>11}"),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns, console=console) as bars:
        full = training.compare(
            size,
            mode=mode,
            device=device,
            seed=args.seed,
            title="full run",
            out=args.out,
            sample=200 if args.quick else 400,
            on_step=_bar(bars, "torch.nn beside fastnn", size.steps),
        )
        if skipped:
            return [full], skipped
        if on_gpu:
            forced = training.compare(
                short,
                mode="triton",
                device=device,
                seed=args.seed,
                title="every layer on kernels",
                on_step=_bar(bars, "every layer on kernels", short.steps),
            )
        else:
            on_step = _bar(bars, "kernels, interpreted", short.steps)
            forced = training.compare_interpreted(short, args.seed, on_step)
    return [full, forced], skipped


def _bar(bars: Progress, description: str, steps: int):
    task = bars.add_task(description, total=steps, loss="")

    def on_step(step: int, losses: dict[str, float]) -> None:
        bars.update(task, completed=step + 1, loss=f"loss {losses['fastnn']:.3f}")

    return on_step


# ---- The tables ---------------------------------------------------------------------------------


def _rows(steps: int, count: int = 9) -> list[int]:
    """Evenly spaced step numbers, with the first and the last step."""
    return sorted({round(i * (steps - 1) / (count - 1)) for i in range(count)})


def _bytes(n: int | None) -> str:
    return "not measured" if n is None else f"{n / 2**20:.1f} MiB"


def grouped(layers: list[dict]) -> list[tuple[str, str, str, str]]:
    """(layers, op, path, reason); lines that repeat over numbered blocks are written once."""
    groups: dict[tuple, int] = {}
    for row in layers:
        # The size in a reason varies from layer to layer; the reason itself does not.
        key = (re.sub(r"\b\d+\b", "*", row["layer"]), row["op"], row["path"], row["reason"] or "")
        groups[key] = groups.get(key, 0) + 1
    return [
        (layer + (f"  (x{count})" if count > 1 else ""), op, path, reason)
        for (layer, op, path, reason), count in groups.items()
    ]


def _show(console: Console, c: DemoResult) -> None:
    from rich.table import Table
    from rich.text import Text

    stock, ours = c.losses["stock"], c.losses["fastnn"]
    console.rule(f'{c.title} on {c.device}, fastnn in mode "{c.mode}"')
    s = c.size
    console.print(
        f"{_cli.count(s.layers, 'layer')}, width {s.width}, {s.heads} heads, context {s.context}, "
        f"batch {s.batch}, dropout {s.dropout:g}, {s.steps} steps of AdamW"
    )
    table = Table(title="training loss, nats per character")
    for column in ("step", "torch.nn", "fastnn", "difference"):
        table.add_column(column, justify="right")
    for i in _rows(s.steps):
        difference = f"{ours[i] - stock[i]:+.1e}" if ours[i] != stock[i] else "0"
        table.add_row(str(i), f"{stock[i]:.6f}", f"{ours[i]:.6f}", difference)
    table.add_section()
    table.add_row("largest", "", "", f"{c.largest_difference:.1e}")
    console.print(table)

    table = Table()
    for column in ("", "torch.nn", "fastnn"):
        table.add_column(column, justify="right" if column else "left")
    sides = ("stock", "fastnn")
    table.add_row("loss on held-out text", *(f"{c.validation[n]:.4f}" for n in sides))
    interpreted = " (interpreted)" if c.mode == "triton" and c.device == "cpu" else ""
    table.add_row(f"time per step, median{interpreted}", *(f"{c.step_ms[n]:.1f} ms" for n in sides))
    table.add_row("peak memory of a step *", *(_bytes(c.step_bytes[n]) for n in sides))
    console.print(table)
    console.print("* beyond weights and optimizer state: activations, gradients, temporaries")

    rows = grouped(c.layers)
    reasons = {reason for *_, reason in rows}
    once = len(reasons) == 1  # then the reason stands below the table
    table = Table(
        title="what ran each layer of the fastnn side",
        caption=Text(f"reason: {''.join(reasons)}") if once and any(reasons) else None,
    )
    for column in ("layer", "op", "path") if once else ("layer", "op", "path", "why"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row[:3] if once else row))
    if not c.layers:
        table.add_row("all", "", "stock", "nothing here could run a kernel")
    console.print(table)

    if not c.size.dropout:
        console.print("Dropout is 0 here, because the float64 run would draw other masks.")
    if c.samples:
        same = c.samples["stock"] == c.samples["fastnn"]
        shown = (
            {"torch.nn and fastnn alike": "fastnn"}
            if same
            else dict(zip(sides, sides, strict=True))
        )
        for title, name in shown.items():
            console.print(f"text written by {title}:", style="bold")
            console.print(Text(c.samples[name]))


def _conclude(console: Console, comparisons: list[DemoResult], skipped: str | None, passed: bool):
    from rich.table import Table
    from rich.text import Text

    console.rule("verdict")
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))

    def add(good: bool, what: str, finding: str) -> None:
        sign = Text("pass", "green") if good else Text("FAIL", "bold red")
        table.add_row(sign, what, Text(finding))

    for c in comparisons:
        add(c.loss_verdict.coincide, f"losses, {c.title}", c.loss_verdict.finding)
        add(c.gradient_verdict.coincide, f"gradients, {c.title}", c.gradient_verdict.finding)
        table.add_row("", "", Text(f"rule: {c.loss_verdict.rule}", "dim"))
        for m in c.moves:
            add(m.moved, f"checkpoint, {m.name}", m.finding)
    if skipped:
        table.add_row(Text("none", "yellow"), "curves on kernels", f"not run: {skipped}")
    console.print(table)
    if not passed:
        console.print("The two sides are not the same.", style="bold red")


# ---- The picture --------------------------------------------------------------------------------

_STOCK, _OURS, _ALLOWED = "#e8a33d", "#1f4e79", "#8a8a8a"


def plot(report: dict, comparisons: list[DemoResult], path: Path) -> None:
    """Loss curves on top, the distances between them below; one column per comparison."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2,
        len(comparisons),
        figsize=(6.5 * len(comparisons), 6.5),
        sharex="col",
        squeeze=False,
        height_ratios=(3, 1),
        layout="constrained",
    )
    for i, c in enumerate(comparisons):
        _curves(axes[0, i], c)
        _difference(axes[1, i], c)
    software = ", ".join(f"{name} {v}" for name, v in report["versions"].items())
    figure.suptitle(
        f"A small GPT on the text of pydoc_data.topics, torch.nn and fastnn from equal weights\n"
        f"{report['device']}; {software}",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _curves(axis, c: DemoResult) -> None:
    stock, ours = c.losses["stock"], c.losses["fastnn"]
    label = "{} ({:.4f})".format
    thick = {"color": _STOCK, "linewidth": 5, "alpha": 0.8}
    axis.plot(stock, **thick, label=label("torch.nn", c.validation["stock"]))
    axis.plot(ours, color=_OURS, linewidth=1.2, label=label("fastnn", c.validation["fastnn"]))
    axis.set_title(f'{c.title} on {c.device}, fastnn in mode "{c.mode}"', fontsize=11)
    axis.set_ylabel("training loss (nats per character)")
    axis.grid(alpha=0.25)
    axis.legend(loc="upper right", frameon=False, title="held-out loss after it", alignment="left")


def _difference(axis, c: DemoResult) -> None:
    axis.grid(alpha=0.25)
    axis.set_xlabel("step")
    axis.xaxis.get_major_locator().set_params(integer=True)
    v = c.loss_verdict
    if v.allowed:
        # A logarithmic axis has no zero. A distance of zero is drawn at the bottom.
        floor = min(v.allowed) / 300
        axis.semilogy([max(e, floor) for e in v.stock_error], color=_STOCK, lw=2, label="torch.nn")
        axis.semilogy([max(e, floor) for e in v.fastnn_error], color=_OURS, lw=1, label="fastnn")
        axis.semilogy(v.allowed, color=_ALLOWED, lw=1, linestyle="--", label="allowed")
        axis.set_ylabel("distance from\nfloat64 (nats)")
        top = max(*v.allowed, *v.fastnn_error, *v.stock_error)
        axis.set_ylim(floor, top * 30)  # room for the legend
        axis.legend(loc="upper left", ncols=3, fontsize=8, frameon=False)
        return
    stock, ours = c.losses["stock"], c.losses["fastnn"]
    axis.plot([b - a for a, b in zip(stock, ours, strict=True)], color=_OURS, lw=1.2)
    axis.set_ylabel("fastnn minus\ntorch.nn (nats)")
    if c.loss_verdict.coincide:
        axis.set_ylim(-1, 1)
        axis.set_yticks([0])
        axis.annotate(
            "every difference is exactly 0", (0.5, 0.7), xycoords="axes fraction", ha="center"
        )
