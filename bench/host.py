"""Measures what calls cost the host, on any machine: `python -m bench.host --out DIR`.

For each layer or function it times the first training row of `fastnn.testing`, forward and backward
together, as CPU time of one thread. The inputs are so small that their size does not matter. Stock
runs on the CPU. Ours is timed in three ways: as a call that the size gate declines; forced onto
kernels without plans; and forced with plans, as every call from the third of a signature on.

Launches go through Triton's own launcher into an empty libcuda, if there is a C compiler, else to a
driver that does nothing. No time includes the launches by the GPU, about 2 us each, so the numbers
of launches stand beside the times. The estimates of the size gate follow from these figures
(`python -m bench.gates`). The program writes DIR/host.json, and with `--into PAGE.md` a table
between the markers of that page.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves

import fastnn
from fastnn import _native, _record


def _rows(only: Sequence[str]) -> Iterator:
    """The first row of each name that has gradients, and that runs on kernels in every mode."""
    from fastnn.testing.cases import CASES

    seen = set()
    for case in CASES:
        plain = case.stock is None and case.view is None and case.autocast is None
        if plain and case.name not in seen and (not only or case.name in only):
            inputs = [t for t in case.make(torch.float32, "cpu") if isinstance(t, torch.Tensor)]
            if case.is_layer or any(t.requires_grad for t in inputs):
                seen.add(case.name)
                yield case


def _step(case, namespace) -> Callable[[], object]:
    """A function that runs forward and backward of a row."""
    from fastnn.testing import side_of

    side = side_of(case, namespace, torch.float32, "cpu")
    inputs = case.make(torch.float32, "cpu")
    options = {} if case.is_layer else dict(case.options)
    options = {k: v(torch.float32, "cpu") if callable(v) else v for k, v in options.items()}
    given = [*inputs, *side.parameters.values(), *options.values()]
    leaves = [t for t in given if isinstance(t, torch.Tensor) and t.requires_grad]

    def forward():
        outs = tree_leaves(side.call(*inputs, **options))
        return [t for t in outs if isinstance(t, torch.Tensor) and t.requires_grad]

    upstream = [torch.ones_like(t) for t in forward()]
    return lambda: torch.autograd.grad(forward(), leaves, upstream, allow_unused=True)


def _least_us(call: Callable[[], object], rounds: int, each: int = 10) -> float:
    """The least time of a call over all rounds: the others were disturbed by other programs."""
    for _ in range(2 * each):
        call()
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(each):
            call()
        times.append((time.thread_time() - start) / each)
    return round(min(times) * 1e6, 1)


def _launches(call: Callable[[], object]) -> int:
    from fastnn.kernels._launch import Kernel

    count = 0
    launch = Kernel.__call__

    def counting(self, *args, **kwargs):
        nonlocal count
        count += 1
        launch(self, *args, **kwargs)

    with mock.patch.object(Kernel, "__call__", counting), _record.using(False):
        call()
    return count


def measure(only: Sequence[str] = (), rounds: int = 60) -> list[dict]:
    """One record for each row: the microseconds and launches of both sides."""
    from fastnn.testing.aot import has_compiler, launch_nothing
    from fastnn.testing.meter import AtenTraffic, as_on_cuda

    found = []
    with launch_nothing(real_launcher=has_compiler()):
        for case in _rows(only):
            theirs = _step(case, torch.nn)
            with as_on_cuda(), AtenTraffic() as counted:
                theirs()
            gc.collect()
            gc.disable()
            try:
                record = {"name": case.name, "row": str(case)}
                record["stock_us"] = _least_us(theirs, rounds)
                record["stock_launches"] = counted.cost.launches
                ours = _step(case, fastnn)
                record["declined_us"] = _least_us(ours, rounds)
                with fastnn.backend("triton"):
                    record["ours_launches"] = _launches(ours)
                    with fastnn.decisions() as heard:
                        ours()
                    record["ops"] = sorted({d.op.name for d in heard if d.why is None})
                    with _record.using(False):
                        record["without_plans_us"] = _least_us(ours, rounds)
                    with _record.using(True):
                        record["ours_us"] = _least_us(ours, rounds)
            finally:
                gc.enable()
            found.append(record)
    return found


def table(environment: dict, rows: Sequence[dict]) -> str:
    """The table in Markdown, with the origin of its figures."""
    lines = [
        f"One core of {environment['cpu']}, torch {environment['torch']}, triton "
        f"{environment['triton']}, commit {environment['commit']}, {environment['time'][:10]}; "
        "float32; microseconds of one thread, forward and backward; launches through "
        f"{environment['launcher']}.",
        "",
        "| row | stock | launches | declined | ours | without plans | launches |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        name = r["row"] if len(r["row"]) <= 60 else f"{r['name']}(...)"
        cells = [
            r["stock_us"], r["stock_launches"], r["declined_us"], r["ours_us"],
            r["without_plans_us"], r["ours_launches"],
        ]  # fmt: skip
        lines.append(f"| `{name}` | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


_MARKED = re.compile(r"(<!-- host -->\n).*(<!-- /host -->\n)", re.S)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--into", type=Path, metavar="PAGE.md", help="put a table between this page's markers"
    )
    parser.add_argument("--only", action="append", default=[], metavar="NAME")
    parser.add_argument("--rounds", type=int, default=60, help="of ten calls; default: %(default)s")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("bench.host: kernels are compiled: unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    from fastnn.bench.environment import environment
    from fastnn.testing.aot import has_compiler

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # stock warns in some rows
    rows = measure(args.only, args.rounds)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "host.json"
    lines = ",\n".join(json.dumps(row) for row in rows)
    launcher = "Triton's launcher and an empty libcuda" if has_compiler() else "an empty driver"
    runner = "Python" if _native.module() is None else "C++"
    origin = {**environment(), "launcher": launcher, "runner": runner}
    head = json.dumps(origin, indent=1)
    path.write_text(f'{{"environment": {head},\n"rows": [\n{lines}\n]}}\n')
    print(path)
    if args.into:
        told = table(origin, rows)
        args.into.write_text(
            _MARKED.sub(lambda m: m[1] + "\n" + told + m[2], args.into.read_text())
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
