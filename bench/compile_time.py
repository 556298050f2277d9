"""CPU time of the first step of compiled models: `python -m bench.compile_time [--write]`.

Each figure comes from a process of its own. The process builds a model with tiny tensors and the
depth of the real one, and runs forward and backward once. The clock starts before the model is
compiled and stops after the backward. It counts the CPU seconds of the process and of all that it
starts, such as compilers. The import of torch is not in it. The *second* process finds the caches
that the first one left on the disk.

There is no GPU: Inductor makes C++ for the CPU, and our backend launches nothing. So the time in
which Triton compiles kernels is in neither figure. Kernels of ours are compiled once for a
signature, whatever the model; Triton keeps them on the disk.

`--write` puts the figures into bench/results/counted/compile_time.json, from which
`python -m tools.generate` makes a table of docs/compile.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

import fastnn  # noqa: F401  # torch.compile then knows the backend, installed or not

PATH = Path(__file__).parent / "results" / "counted" / "compile_time.json"
SIDES = ("eager", "aot_eager", "inductor", "fastnn")
ROUNDS = 3


def _spent() -> float:
    found = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in found)


def first_step(name: str, side: str) -> float:
    """The CPU seconds of the first step of the model `name`, compiled for the backend `side`."""
    from fastnn.bench.host import MODELS

    of = next(one for one in MODELS if one.name == name)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, data = of.build(torch.nn), of.data("cpu")
    before = _spent()
    call = model if side == "eager" else torch.compile(model, backend=side)
    call(*data).backward()
    return _spent() - before


def _in_process(name: str, side: str, cache: str) -> float:
    environment = {
        **os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "bench.compile_time", "--one", name, side]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment, cwd=root
    )
    return float(done.stdout.split()[-1])


def measure(name: str, side: str, rounds: int = ROUNDS) -> dict[str, float]:
    """The least CPU seconds of `rounds` first and of `rounds` second processes."""
    first, second = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="fastnn-compile-") as cache:
            first.append(_in_process(name, side, cache))
            second.append(_in_process(name, side, cache))
    return {"first_s": round(min(first), 2), "second_s": round(min(second), 2)}


def table(record: dict) -> str:
    """The table in Markdown, with the origin of its figures."""
    origin = record["environment"]
    names = list(record["models"])
    lines = [
        f"One core of {origin['cpu']}, torch {origin['torch']}, commit {origin['commit']}, "
        f"{origin['time'][:10]}; float32. CPU seconds of the first step, in a first and in a "
        f"second process; the least of {record['rounds']}.",
        "",
        "| backend | " + " | ".join(f"{n}, first | second" for n in names) + " |",
        "| --- |" + " ---: |" * (2 * len(names)),
    ]
    for side in SIDES:
        took = [record["models"][n][side] for n in names]
        cells = [f"{t[key]:.1f}" for t in took for key in ("first_s", "second_s")]
        lines.append(f"| {'none' if side == 'eager' else side} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile_time", description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(first_step(*args.one))
        return 0
    from fastnn.bench.environment import environment

    record = {
        "environment": environment(),
        "rounds": args.rounds,
        "models": {
            name: {side: measure(name, side, args.rounds) for side in SIDES}
            for name in ("GPT-2", "ResNet-50")
        },
    }
    if args.write:
        PATH.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
