"""Tables of results, and plots if matplotlib is there: `python -m bench.report FILE.jsonl`."""

from __future__ import annotations

import argparse
import importlib.util
import re
from pathlib import Path
from typing import Any

from fastnn.bench import roofs
from fastnn.bench.run import (
    AUTO,
    COMPILED,
    FORCED,
    LIGER,
    STOCK,
    Results,
    geometric_mean,
    speedup,
    took,
    with_compiled,
)

_COLOURS = {FORCED: "#1f6feb", AUTO: "#1a7f37", COMPILED: "#bf8700", LIGER: "#8250df"}
_NAMES = {FORCED: "fastnn, forced", AUTO: "fastnn, auto", COMPILED: "torch.compile", LIGER: "Liger"}
_PREDICTED = "#6e7781"


def reached(line: dict, side: str, ceilings: dict[str, float]) -> tuple[str, float | None]:
    """("1234 GB/s" or "123 TFLOP/s", share of the measured ceiling) for all work of the row."""
    passes = line.get("sides", {}).get(side)
    if not passes:
        return "", None
    which = list(passes)[-1]
    seconds = passes[which]["executed"]["median"] / 1e6
    if line["flops"]:
        flops = line["flops"] * (3 if which == "forward+backward" else 1)
        top = ceilings.get(f"{line['dtype']}_flop_per_s")
        return f"{flops / seconds / 1e12:.0f} TFLOP/s", top and flops / seconds / top
    rate = line["least_bytes"][which] / seconds
    top = ceilings.get("copy_bytes_per_s")
    return f"{rate / 1e9:.0f} GB/s", top and rate / top


def _share(x: float | None) -> str:
    return "" if x is None else f"{x:.0%}"


def _times(x: float | None) -> str:
    return "" if x is None else f"{x:.2f}"


def _us(x: float | None) -> str:
    return "" if x is None else f"{x:.1f}"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def measured_table(lines: list[dict], ceilings: dict[str, float], prefix: str = "") -> str:
    """Markdown with one line per row; times are forward and backward, or forward in eval mode."""
    head = ["row", "from", "stock us (IQR)", "ours us (IQR)", "ours", "auto", "compile", "Liger"]
    head += ["reached", "of ceiling", "enqueue us, stock", "ours", "peak MB, stock", "ours"]
    rows = []
    for line in with_compiled(lines, prefix):
        cells = [f"`{line['key']}`", line["model"]]
        if "error" in line or line["failures"]:
            wrong = line.get("error") or "; ".join(line["failures"])
            rows.append([*cells, f"**wrong**: {wrong}", *[""] * (len(head) - 3)])
            continue
        for side in (STOCK, FORCED):
            passes = line["sides"].get(side)
            if passes is None:
                cells.append(f"stock: {line['reason']}")
                continue
            t = list(passes.values())[-1]["executed"]
            cells.append(f"{t['median']:.1f} ({t['q75'] - t['q25']:.1f})")
        cells += [_times(speedup(line, s)) for s in (FORCED, AUTO, COMPILED, LIGER)]
        rate, share = reached(line, FORCED, ceilings)
        cells += [rate, _share(share)]
        for what, unit in (("enqueued", 1), ("peak_bytes", 1e6)):
            for side in (STOCK, FORCED):
                passes = line["sides"].get(side)
                value = list(passes.values())[-1][what] if passes else None
                value = value["median"] if isinstance(value, dict) else value
                cells.append("" if value is None else f"{value / unit:.1f}")
        rows.append(cells)
    return _markdown(head, rows)


def predicted_table(lines: list[dict]) -> str:
    """Markdown with one line per row that has a prediction, and a list of the other rows."""
    head = ["row", "from", "stock MB", "ours MB", "ours / least", "stock launches", "ours"]
    head += ["predicted", "roof", "auto runs"]
    rows, without = [], []
    for line in lines:
        if line["speedup"] is None:
            without.append(f"- `{line['key']}`: {line['why']}")
            continue
        total = {
            (side, what): sum(p[what] for p in line[side])
            for side in ("stock", "ours")
            for what in ("bytes", "launches")
        }
        rows.append(
            [
                f"`{line['key']}`",
                line["model"],
                f"{total['stock', 'bytes'] / 1e6:.1f}",
                f"{total['ours', 'bytes'] / 1e6:.1f}",
                f"{total['ours', 'bytes'] / sum(line['least_bytes']):.2f}",
                str(total["stock", "launches"]),
                str(total["ours", "launches"]),
                f"{line['speedup']:.2f}",
                roofs.warning_of(line["key"]),
                line["auto"],
            ]
        )
    return _markdown(head, rows) + ("\nNot predicted:\n\n" + "\n".join(without) if without else "")


def verdict(lines: list[dict], prefix: str = "") -> dict[str, Any]:
    """The figures that sum up a run: geometric means, rows that lose in `auto`, wrong rows."""
    rows = with_compiled(lines, prefix)
    found: dict[str, Any] = {"rows": len(rows)}
    found["wrong"] = [r["key"] for r in rows if "error" in r or r["failures"]]
    found["stock"] = {r["key"]: r["reason"] for r in rows if r.get("path") == "stock"}
    for side in (FORCED, AUTO, COMPILED, LIGER):
        ratios = [s for r in rows if (s := speedup(r, side)) is not None]
        found[side] = {"rows": len(ratios), "geometric_mean": geometric_mean(ratios)}
    found["auto_below_0.97"] = {
        r["key"]: s for r in rows if (s := speedup(r, AUTO)) is not None and s < 0.97
    }
    return found


# ---- Plots ------------------------------------------------------------------------------------


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _label(line: dict) -> str:
    key = re.sub(r", normalized_shape=(\d+|\(.*?\))", "", line["key"])
    return key.replace("bfloat", "bf").replace("float", "fp")


def plot_speedups(lines: list[dict], path: Path, title: str, prefix: str = "") -> None:
    """Bars of speedup over stock, for each row: measured for each side, or predicted."""
    predicted = [x for x in lines if x["kind"] == "prediction" and x["speedup"] is not None]
    rows = predicted or [x for x in with_compiled(lines, prefix) if took(x, STOCK)]
    sides = [s for s in _NAMES if any(speedup(x, s) for x in rows)] if not predicted else [""]
    figure = _figure(10, 1.6 + len(rows) * (0.09 + 0.09 * len(sides)))
    axis = figure.add_subplot()
    height = 0.8 / len(sides)
    longest = 1.0
    for i, side in enumerate(sides):
        values = [x["speedup"] if predicted else (speedup(x, side) or 0.0) for x in rows]
        longest = max(longest, *values)
        colours: str | list[str] = _COLOURS.get(side, "")
        if predicted:
            colours = [_COLOURS[AUTO] if x["auto"] == "kernel" else _PREDICTED for x in rows]
        at = [n + (i - (len(sides) - 1) / 2) * height for n in range(len(rows))]
        bars = axis.barh(at, values, height, color=colours, hatch="///" if predicted else None,
                         edgecolor="white", linewidth=0.3,
                         label=None if predicted else _NAMES[side])  # fmt: skip
        if len(sides) == 1:
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            axis.bar_label(bars, fmt="%.2f", padding=4, fontsize=6, bbox=box)
    axis.axvline(1, color="black", lw=0.8)
    axis.set_yticks(range(len(rows)), [_label(x) for x in rows], fontsize=6)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(0, longest * 1.08)
    axis.set_xlabel("stock eager's time over this, forward and backward (1: as fast)")
    axis.tick_params(axis="x", top=True, labeltop=True)
    axis.grid(axis="x", alpha=0.25)
    figure.suptitle(title, fontsize=9)
    handles = None
    if predicted:
        from matplotlib.patches import Patch

        handles = [
            Patch(facecolor=colour, hatch="///", edgecolor="white", label=label)
            for colour, label in ((_COLOURS[AUTO], "auto: kernel"), (_PREDICTED, "auto: stock"))
        ]
    axis.legend(handles=handles, loc="upper right", fontsize=8)
    figure.savefig(path, dpi=110)


def plot_roofline(
    lines: list[dict], ceilings: dict[str, float], path: Path, title: str, prefix: str = ""
) -> None:
    """The rates reached, of memory and of matrix products, under the measured ceilings."""
    rows = [x for x in with_compiled(lines, prefix) if took(x, FORCED)]
    figure = _figure(11, 5)
    left, right = figure.subplots(1, 2)
    for side in (STOCK, FORCED):
        colour = _COLOURS.get(side, _PREDICTED)
        memory, products = [], []
        for x in rows:
            passes = x["sides"][side]
            which = list(passes)[-1]
            seconds = passes[which]["executed"]["median"] / 1e6
            moved = x["least_bytes"][which]
            if x["flops"]:
                flops = x["flops"] * (3 if which == "forward+backward" else 1)
                products.append((flops / moved, flops / seconds))
            else:
                memory.append((moved, moved / seconds))
        style = {"s": 22, "alpha": 0.75, "color": colour, "label": _NAMES.get(side, "stock")}
        if memory:
            left.scatter(*zip(*memory, strict=True), **style)
        if products:
            right.scatter(*zip(*products, strict=True), **style)
    copy = ceilings["copy_bytes_per_s"]
    left.axhline(copy, color="black", lw=1)
    left.annotate(f"copy: {copy / 1e9:.0f} GB/s", (0.02, copy), xycoords=("axes fraction", "data"),
                  va="bottom", fontsize=8)  # fmt: skip
    left.set(xscale="log", yscale="log", xlabel="least bytes of the row", ylabel="bytes per second")
    left.set_title("bound by memory", fontsize=9)
    intensity = [1.0, 1e4]
    for dtype in ("bfloat16", "float32"):
        top = ceilings[f"{dtype}_flop_per_s"]
        xs = [intensity[0], top / copy, intensity[1]] if top / copy < intensity[1] else intensity
        right.plot(xs, [min(top, copy * x) for x in xs], color="black", lw=1,
                   ls="-" if dtype == "bfloat16" else "--", label=f"ceiling, {dtype}")  # fmt: skip
    right.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="FLOP per second")
    right.set_title("bound by matrix products", fontsize=9)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, loc="lower right")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)


def where(environment: dict) -> str:
    """A line that says where the figures come from."""
    parts = [environment["device"]]
    if environment["device"] == "cpu":
        parts = [f"no GPU ({environment['cpu']})"]
    parts += [f"torch {environment['torch']}", f"triton {environment['triton']}"]
    parts += [f"commit {environment['commit']}"] if environment["commit"] else []
    return ", ".join([*parts, environment["time"][:10]])


def write(results: Results, folder: Path, prefix: str = "", plots=True) -> list[Path]:
    """Write `summary.md` and the plots of the results that a file has so far."""
    plots = plots and can_plot()
    environment = results.environment or {}
    at = where(environment)
    ceilings = next(iter(results.of("ceilings")), {})
    written = []
    text = [f"# fastnn bench\n\n{at}\n"]
    if results.of("prediction"):
        note = f"PREDICTED from bytes and launches, not measured. {at}"
        text.append("Predicted from bytes and launches. Nothing here was measured.\n")
        text.append(predicted_table(results.of("prediction")))
        if plots:
            plot_speedups(results.of("prediction"), folder / "predicted.png", note)
            written.append(folder / "predicted.png")
    if results.of(prefix + "row"):
        text.append(measured_table(results.lines, ceilings, prefix))
        if plots and any(took(x, STOCK) for x in results.of(prefix + "row")):
            plot_speedups(results.lines, folder / "speedup.png", at, prefix)
            written.append(folder / "speedup.png")
            if ceilings:
                plot_roofline(results.lines, ceilings, folder / "roofline.png", at, prefix)
                written.append(folder / "roofline.png")
    summary = folder / "summary.md"
    summary.write_text("\n".join(text) + "\n")
    return [summary, *written]


_MARKED = re.compile(r"(<!-- results -->\n).*(<!-- /results -->\n)", re.S)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE.jsonl")
    parser.add_argument(
        "--into", type=Path, metavar="PAGE.md", help="put the tables between this page's markers"
    )
    args = parser.parse_args()
    if not args.file.exists():
        parser.error(f"{args.file}: no such file")
    results = Results(args.file, reading=True)
    for path in write(results, args.file.parent):
        print(path)
    if args.into:
        # The page has its own title.
        tables = (args.file.parent / "summary.md").read_text().split("\n", 2)[2]
        page = _MARKED.sub(lambda m: m[1] + "\n" + tables + m[2], args.into.read_text())
        args.into.write_text(page)
        print(args.into)


if __name__ == "__main__":
    main()
