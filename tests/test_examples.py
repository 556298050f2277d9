"""Each example prints the same with fastnn and with `torch.nn` in its import line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
OURS, STOCK = "import fastnn as nn\n", "import torch.nn as nn\n"


def _run(path: Path) -> str:
    # As on a user's machine: stock on a CPU, and on a GPU the kernels that win.
    drop = ("TRITON_INTERPRET", "FASTNN_BACKEND")
    environment = {k: v for k, v in os.environ.items() if k not in drop}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)],
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
