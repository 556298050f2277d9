"""What fastnn adds to calls of PyTorch's own layers: `python -m bench.stock_layers [--write]`.

`convert` puts a question into the methods of PyTorch's classes, so layers that were never converted
pay for it. The program counts the instructions of a forward call of such layers by callgrind, and
of a step: a forward call and `torch.autograd.grad`. It does so in three processes: *before* fastnn
is imported, after *import*, and after another model with the same layers was *converted*. PyTorch's
operators only allocate (`null.cpp`), so that the host side is all that is counted. Where objects
lie in memory moves a count by up to 0.4 %.

`--write` puts the figures into bench/results/counted/stock_layers.json, from which
`python -m tools.generate` makes a table of docs/tools.md.
"""

from __future__ import annotations

import argparse
import gc
import importlib.machinery
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn as stock

PATH = Path(__file__).parent / "results" / "counted" / "stock_layers.json"
WHEN = ("before", "import", "convert")
CALLS = 100
# As a file, so that the package is not imported.
CHILD = f"import runpy; runpy.run_path({__file__!r}, run_name='__main__')"
DIGITS = 3
STEP = ", step"

# Layers of each kind of forward, from the shortest to the longest.
LAYERS = {
    "ReLU": (lambda: stock.ReLU(), (2, 4)),
    "Dropout, eval": (lambda: stock.Dropout().eval(), (2, 4)),
    "Softmax": (lambda: stock.Softmax(-1), (2, 4)),
    "Linear": (lambda: stock.Linear(4, 4), (2, 4)),
    "LayerNorm": (lambda: stock.LayerNorm(4), (2, 4)),
    "BatchNorm2d": (lambda: stock.BatchNorm2d(4), (2, 4, 3, 3)),
    "Conv2d": (lambda: stock.Conv2d(4, 4, 3), (2, 4, 3, 3)),
    "MaxPool2d": (lambda: stock.MaxPool2d(2), (2, 4, 3, 3)),
    "Sequential of two": (lambda: stock.Sequential(stock.Linear(4, 4), stock.ReLU()), (2, 4)),
}


def _child(module: str, when: str) -> None:
    """Count in this process, which callgrind watches. `module`: the file made of null.cpp."""
    loader = importlib.machinery.ExtensionFileLoader("null", module)
    spec = importlib.util.spec_from_loader("null", loader)
    assert spec is not None
    null = importlib.util.module_from_spec(spec)
    loader.exec_module(null)
    if when != "before":
        import fastnn

        if when == "convert":
            for make, _ in LAYERS.values():
                fastnn.convert(make())
    assert ("fastnn" in sys.modules) is (when != "before")
    torch.set_num_threads(1)
    null.on()
    null.start()
    gc.disable()  # a collection would count for the layer in which it happens
    for name, (make, shape) in LAYERS.items():
        layer, x = make(), torch.ones(shape)

        def run(layer=layer, x=x):
            for _ in range(CALLS):
                layer(x)

        leaf = x.clone().requires_grad_()
        leaves, one = [leaf, *layer.parameters()], torch.ones_like(layer(x))

        def step(layer=layer, leaf=leaf, leaves=leaves, one=one):
            for _ in range(CALLS):
                torch.autograd.grad(layer(leaf), leaves, one)

        for what, call in ((name, run), (name + STEP, step)):
            call()
            null.count(what, call)


def count() -> dict[str, dict[str, int]]:
    """Layer -> when -> instructions of one call; a name with `STEP` behind it: of one step.

    Raises RuntimeError where nothing can count.
    """
    from fastnn import _build
    from fastnn.bench import host

    why = host.can_count()
    if why is not None:
        raise RuntimeError(why)
    found: dict[str, dict[str, int]] = {n + end: {} for n in LAYERS for end in ("", STEP)}
    for when in WHEN:
        with tempfile.TemporaryDirectory(prefix="fastnn-callgrind-") as folder:
            command = [
                "valgrind", "--tool=callgrind", "--instr-atstart=no",
                f"--callgrind-out-file={folder}/out",
                sys.executable, "-c", CHILD, "--child", str(_build.path(host.NULL)), when,
            ]  # fmt: skip
            environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise RuntimeError(f"valgrind ended with {done.returncode}: {done.stderr[-2000:]}")
            for file in Path(folder).glob("out.*"):
                text = file.read_text()
                said = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.M)
                total = re.search(r"^(?:totals|summary): (\d+)", text, re.M)
                if said and total and said[1] in found:
                    found[said[1]][when] = round(int(total[1]) / CALLS)
    return found


def ratios(counts: dict[str, int]) -> dict[str, float]:
    """When -> the instructions of a call over those before the import."""
    return {when: round(counts[when] / counts["before"], DIGITS) for when in WHEN[1:]}


def table(found: dict[str, dict[str, int]]) -> str:
    """A table for docs/tools.md."""
    lines = [
        "| layer of `torch.nn` | instructions of a call | after `import fastnn` "
        "| after a `convert` | instructions of a step | after `import fastnn` "
        "| after a `convert` |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in LAYERS:
        cells = [name]
        for counts in (found[name], found[name + STEP]):
            r = ratios(counts)
            cells += [f"{counts['before']:,}", f"{r['import']:.3f}", f"{r['convert']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="count what fastnn adds to PyTorch's own layers")
    parser.add_argument("--write", action="store_true", help=f"write {PATH.name}")
    arguments = parser.parse_args(argv)
    from fastnn.bench.environment import environment

    found = count()
    print(table(found), end="")
    if arguments.write:
        record = {"environment": environment(), "layers": found}
        PATH.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(*sys.argv[2:])
        sys.exit(0)
    sys.exit(main())
