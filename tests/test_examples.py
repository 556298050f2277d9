"""Each example prints the same with fastnn and with `torch.nn` in its import line."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
OURS, STOCK = "import fastnn as nn\n", "import torch.nn as nn\n"


def _run(path: Path, *options: str, launcher: list[str] | None = None, warns=False) -> str:
    # As on a user's machine: stock on a CPU, and on a GPU the kernels that win.
    drop = ("TRITON_INTERPRET", "FASTNN_BACKEND")
    strict = [] if warns or launcher else ["-W", "error"]  # packages of others warn
    environment = {k: v for k, v in os.environ.items() if k not in drop}
    done = subprocess.run(
        [sys.executable, *strict, *(launcher or ()), str(path), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_output_does_not_depend_on_the_import(path, tmp_path):
    source = path.read_text()
    assert source.count(OURS) == 1 and source.count("fastnn") == 1
    swapped = tmp_path / path.name
    swapped.write_text(source.replace(OURS, STOCK))
    printed = _run(path)
    assert len(printed.splitlines()) > 5
    assert printed == _run(swapped)


def _losses(printed: str) -> list[float]:
    return [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("step")]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="torchrun with gloo is run on POSIX only")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_losses_of_two_processes_are_those_of_one():
    """Under torchrun. In float64 they differ by roundings, so a wrong sum cannot hide."""
    path, options = EXAMPLES / "distributed.py", ["--how", "ddp", "fsdp", "tp"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    one = _losses(_run(path, "--double"))
    two = _losses(_run(path, *options, "--double", launcher=launcher))
    assert len(one) == 4 and len(two) == 12
    for i, loss in enumerate(two):
        assert abs(loss - one[i % 4]) <= 4 * 2.0**-52 * abs(one[i % 4]), (options[1 + i // 4], i)


LOOPS = {
    "accelerate": ("accelerate",),
    "lightning": ("lightning",),
    "transformers": ("transformers", "accelerate"),
    "timm": ("timm", "torchvision"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_trains_as_without_fastnn(name, tmp_path):
    """The lines that end in `# fastnn` are all that differs."""
    absent = [p for p in LOOPS[name] if importlib.util.find_spec(p) is None]
    if absent:
        pytest.skip(f"{' and '.join(absent)} is not installed; the extra `loops` has it")
    path = EXAMPLES / "loops" / f"with_{name}.py"
    lines = path.read_text().splitlines(True)
    without = tmp_path / path.name
    without.write_text("".join(line for line in lines if not line.endswith("# fastnn\n")))
    assert len(lines) - len(without.read_text().splitlines()) == 3
    mine, its = _run(path, warns=True), _run(without, warns=True)
    counted, rest = mine.split("\n", 1)
    counts = ast.literal_eval(counted)
    assert counts.keys() == {"kernel", "stock"} and sum(counts.values()) >= 3
    assert _losses(rest) == _losses(its) and len(_losses(its)) > 1
    assert rest.splitlines()[-1] == its.splitlines()[-1]
