"""Simulates training steps in `auto`: `python -m bench.steps --host DIR/host.json`.

A step takes as long as its host side or its GPU side, whichever is longer: the queue is full.

- GPU side of stock: each operator takes the time to move its bytes, to compute its products, or
  2 us for each launch, whichever is longer. The operators are those of `bench.models` in bfloat16,
  forward and backward, counted on "meta" tensors.
- GPU side of ours: less what each call saves that the gate lets through (`bench.gates`).
- Host side of stock: the time of a step of the same model with tiny tensors (`bench.host`), and
  2.5 us for each launch.
- Host side of ours: for each call that goes to PyTorch what such a call costs more or less, and
  for each call on kernels what its op costs more, by the runner of plans in question. The first
  figure is an average over the calls of the same tiny model, of which all went to PyTorch.

Nothing here is measured on a GPU. Three hosts are assumed: the one that ran `bench.host`, one twice
as fast, and one four times as fast.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import flop_registry

import fastnn
from fastnn import _gate, _mode
from fastnn._gate import Work
from fastnn.bench.gates import BANDWIDTH
from fastnn.bench.models import ResNet, Step, TransformerSizes
from fastnn.testing import simulated
from fastnn.testing.meter import AtenTraffic, as_on_cuda

ARCHITECTURE = "sm_90"
FLOPS = 600e12  # per second, of products
LEAST_US = 2.0  # of a launch on the GPU
LAUNCH_US = 2.5  # of a launch on the host
SPEEDS = (1, 2, 4)  # of the host, compared with the one that was measured

STEPS = [
    ("GPT-2", Step("GPT-2 8x1024", TransformerSizes(768, 12, 12, 1024, 50257, causal=True), 8)),
    ("GPT-2", Step("GPT-2 1x1024", TransformerSizes(768, 12, 12, 1024, 50257, causal=True), 1)),
    ("BERT", Step("BERT 32x128", TransformerSizes(768, 12, 12, 128, 30522), 32)),
    ("BERT", Step("BERT 16x512", TransformerSizes(768, 12, 12, 512, 30522), 16)),
    ("ResNet-50", Step("ResNet-50 64", ResNet(), 64)),
]


class _Operators(AtenTraffic):
    """Counts the operations of products, too. `flops` belongs to `ops`."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = len(self.ops)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if len(self.ops) > before:
            count = flop_registry.get(func._overloadpacket)
            self.flops.append(count(*args, **(kwargs or {}), out_val=out) if count else 0)
        return out


class Counted(NamedTuple):
    """What is counted of a step. calls: (op, the work that the gate compares, or None)."""

    gpu_us: float
    launches: int
    calls: list[tuple[str, Work | None]]


def count(of: Step) -> Counted:
    """Count a step. Nothing is computed."""

    def run(namespace):
        model = of.build(namespace).to("meta", torch.bfloat16)
        x, targets = of.data("meta")
        x = x.bfloat16() if x.is_floating_point() else x
        return model, lambda: model(x, targets)

    model, forward = run(torch.nn)
    with as_on_cuda(), _Operators() as counted:
        torch.autograd.grad(forward(), list(model.parameters()), allow_unused=True)
    us = [
        max((op.read + op.written) / BANDWIDTH * 1e6, flops / FLOPS * 1e6, LEAST_US * op.launches)
        for op, flops in zip(counted.ops, counted.flops, strict=True)
    ]
    _, forward = run(fastnn)
    with (
        simulated(ARCHITECTURE, devices=["meta"]),
        _mode.decisions(),
        fastnn.backend("auto"),
        _gate.asked() as asked,
    ):
        forward()
    calls = [(op, work if isinstance(work, Work) else None) for op, work in asked]
    return Counted(sum(us), counted.launches, calls)


class Costs(NamedTuple):
    """What the measurements say. All in microseconds.

    steps: model -> host time of a step of stock.
    declined: model -> what all its calls cost the host more, if PyTorch runs each of them.
    more: op -> what a call on kernels costs the host more.
    saved: (op, variant) -> what a call on kernels saves on the GPU for a million units of size.
    least: (op, variant) -> the size from which kernels run.
    """

    steps: dict[str, float]
    declined: dict[str, float]
    more: dict[str, float]
    saved: dict[tuple[str, str], float]
    least: dict[tuple[str, str], float]


def costs(host: dict, gates: Sequence[dict], runner: str) -> Costs:
    """The costs that follow from host.json and from the estimates of the gate."""
    rows = [r for r in host["rows"] if len(r["ops"]) == 1]
    size = "native" if runner == "native" else "least"
    more: dict[str, float] = {}
    for r in rows:
        extra = r[f"{runner}_us"] - r["stock_us"]
        extra += LAUNCH_US * (r["ours_launches"] - r["stock_launches"])
        more[r["ops"][0]] = max(extra, more.get(r["ops"][0], extra))
    return Costs(
        {m["name"]: m["stock_us"] for m in host["models"]},
        {m["name"]: m["declined_us"] - m["stock_us"] for m in host["models"]},
        more,
        {(g["op"], g["variant"]): g["saved"] for g in gates},
        {(g["op"], g["variant"]): float("inf") if g[size] is None else g[size] for g in gates},
    )


class Simulated(NamedTuple):
    """A step on one host. kernels: how many calls run on kernels."""

    stock_us: float
    ours_us: float
    kernels: int
    host_over_gpu: float

    @property
    def speedup(self) -> float:
        return self.stock_us / self.ours_us


def simulate(model: str, counted: Counted, of: Costs, speed: float) -> Simulated:
    """One step of `model` on a host that is `speed` times as fast as the measured one."""
    host = of.steps[model] + LAUNCH_US * counted.launches
    gpu, ours_host, ours_gpu, kernels = counted.gpu_us, host, counted.gpu_us, 0
    for op, work in counted.calls:
        known = work is not None and (op, work.variant) in of.saved and op in of.more
        if work is not None and known and work.size >= of.least[op, work.variant]:
            kernels += 1
            ours_host += of.more[op]
            ours_gpu -= of.saved[op, work.variant] * work.size / 1e6
        else:
            ours_host += of.declined[model] / len(counted.calls)
    ours = max(ours_host / speed, ours_gpu)
    return Simulated(max(host / speed, gpu), ours, kernels, host / speed / gpu)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.steps", description=__doc__)
    parser.add_argument("--host", type=Path, required=True, metavar="FILE", help="a host.json")
    parser.add_argument(
        "--gates", type=Path, required=True, metavar="FILE", help="what `bench.gates --out` wrote"
    )
    args = parser.parse_args(argv)
    host, gates = (json.loads(p.read_text()) for p in (args.host, args.gates))
    print(f"{'step':14} {'host':>5} {'host/GPU':>8} {'kernels':>8} {'Python':>7} {'C++':>7}")
    least = float("inf")
    for model, of in STEPS:
        counted = count(of)
        for speed in SPEEDS:
            told = [
                simulate(model, counted, costs(host, gates, runner), speed)
                for runner in ("python", "native")
            ]
            least = min(least, *(t.speedup for t in told))
            print(
                f"{of.name:14} {'x' + str(speed):>5} {told[0].host_over_gpu:8.2f} "
                f"{told[0].kernels:8} {told[0].speedup:7.3f} {told[1].speedup:7.3f}"
            )
    print(f"least {least:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
