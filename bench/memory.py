"""Peak memory of attention with returned weights against L: `python -m bench.memory --out DIR`.

It runs a training step of `MultiheadAttention(need_weights=True)`, stock, and ours forced onto
kernels. On a GPU it reads the peak of the allocator. Without a GPU it counts allocations on the
CPU, with interpreted kernels. It writes attention-memory.json and attention-memory.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

HEADS, WIDTH, BATCH, DROPOUT = 16, 64, 1, 0.1
LENGTHS = (64, 128, 256, 512)
LENGTHS_ON_GPU = (256, 512, 1024, 2048, 4096, 8192)


def allocations(call) -> list[int]:
    """The bytes of each allocation that `call` makes on the CPU; negative when one is freed."""
    from torch.profiler import profile

    with profile(profile_memory=True, acc_events=True) as profiled:
        call()
    events = profiled.profiler.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]"]


def peak(call, device: str) -> int:
    """The most bytes that `call` holds at a time, beyond the bytes held before."""
    if device == "cuda":
        from fastnn.bench.measure import Cuda

        return Cuda().peak(call) or 0
    return max(itertools.accumulate(allocations(call)))


def step(namespace, length: int, device: str):
    """A function that runs one training step; the layer and its input are made before."""
    torch.manual_seed(0)
    layer = namespace.MultiheadAttention(WIDTH, HEADS, DROPOUT, batch_first=True).to(device)
    x = torch.randn(BATCH, length, WIDTH, device=device, requires_grad=True)
    wanted = [x, *layer.parameters()]

    def run():
        out, weights = layer(x, x, x)
        upstream = [torch.ones_like(out), torch.ones_like(weights)]
        return torch.autograd.grad((out, weights), wanted, upstream)

    return run


def measure(lengths: Sequence[int], device: str) -> list[dict]:
    """A record for each length: peak bytes of both sides, and the bytes of one B H L L tensor."""
    import fastnn
    from fastnn._mode import Mode

    found = []
    for length in lengths:
        record: dict = {"length": length, "weights": 4 * BATCH * HEADS * length**2}
        sides: tuple[tuple[str, Any, Mode], ...]
        sides = (("stock", torch.nn, "torch"), ("ours", fastnn, "triton"))
        for name, namespace, mode in sides:
            call = step(namespace, length, device)
            with fastnn.backend(mode):
                call()
                record[name] = peak(call, device)
        found.append(record)
    return found


def plot(records: list[dict], path: Path, title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    lengths = [r["length"] for r in records]
    for name, colour in (("stock", "#6e7781"), ("ours", "#1f6feb")):
        axis.plot(lengths, [r[name] / 1e6 for r in records], "o-", color=colour, label=name)
    axis.plot(
        lengths, [r["weights"] / 1e6 for r in records], "k:", lw=1, label="one B H L L tensor"
    )
    axis.set(xscale="log", yscale="log", xlabel="L = S", ylabel="peak MB of a training step")
    axis.set_xticks(lengths, [str(n) for n in lengths])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.legend(fontsize=9)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="L")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when fastnn is imported
        from fastnn.testing import interpreter

        interpreter.install()
    from fastnn.bench.environment import environment
    from fastnn.bench.report import where

    lengths = args.lengths or (LENGTHS_ON_GPU if device == "cuda" else LENGTHS)
    records = measure(lengths, device)
    args.out.mkdir(parents=True, exist_ok=True)
    e = environment()
    shape = {"heads": HEADS, "embed_dim": WIDTH, "batch": BATCH, "dropout": DROPOUT}
    data = {"environment": e, "shape": shape, "dtype": "float32", "peak_bytes": records}
    (args.out / "attention-memory.json").write_text(json.dumps(data, indent=1) + "\n")
    how = "measured" if device == "cuda" else "allocations counted on the CPU"
    title = f"MultiheadAttention, need_weights, {HEADS} heads, fp32; {how}\n{where(e)}"
    plot(records, args.out / "attention-memory.png", title)
    for r in records:
        print(f"L {r['length']:5}  stock {r['stock']:>14,}  ours {r['ours']:>14,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
