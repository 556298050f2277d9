"""A package and its kernels come from one checkout, or the import is refused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastnn

ROOT = Path(__file__).parents[1]
EDITABLE = not (Path(fastnn.__file__).parent / "kernels").exists()


def first_found_in(tree, program="import fastnn; print(fastnn.kernels.__file__)"):
    """Runs a program that finds `fastnn` first in `tree`, and only then where it is installed."""
    # As if it ran in that tree. PYTHONPATH would also reach the processes that the program starts.
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=tree,
        env={k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def second(tmp_path):
    """Another checkout, in which nothing is installed."""
    tree = tmp_path / "second"
    for folder in ("fastnn", "kernels", "bench"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tree


@pytest.mark.skipif(not EDITABLE, reason="fastnn is installed from a wheel: nothing to mix")
def test_kernels_of_another_checkout_are_refused(second):
    run = first_found_in(second)
    assert run.returncode != 0 and "ImportError: fastnn is imported from" in run.stderr, run.stderr
    said = run.stderr.strip().splitlines()[-1]
    for told in (second / "fastnn", ROOT / "kernels", f"`pip install -e .` in {second}"):
        assert str(told) in said, said


@pytest.mark.skipif(not EDITABLE, reason="fastnn is installed from a wheel: nothing to mix")
def test_bench_of_another_checkout_is_refused(second):
    shutil.move(second / "kernels", second / "fastnn" / "kernels")
    run = first_found_in(second)
    assert run.returncode != 0, run.stdout
    assert f"fastnn.bench is found in {ROOT / 'bench'}" in run.stderr, run.stderr


def test_a_checkout_that_was_not_installed_says_so(second):
    program = (
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'Editable' not in str(f)]\n"
        "import fastnn"
    )
    run = first_found_in(second, program)
    assert "no module fastnn.kernels is installed" in run.stderr, run.stderr
    assert f"`pip install -e .` in {second}" in run.stderr, run.stderr


def test_a_link_to_the_checkout_is_the_checkout(tmp_path):
    (tmp_path / "link").symlink_to(ROOT)
    program = "import os; os.chdir('/'); import fastnn; print(fastnn.__file__)"
    program = f"import sys; sys.path.insert(0, {str(tmp_path / 'link')!r}); {program}"
    run = first_found_in(tmp_path, program)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(tmp_path / "link" / "fastnn" / "__init__.py")


def test_bench_is_an_attribute():
    """`fastnn.bench` is found at the first access, as all submodules of fastnn are."""
    program = (
        "import sys, fastnn\n"
        "assert 'fastnn.bench' not in sys.modules\n"
        "print(fastnn.bench.__name__, fastnn.kernels.__name__)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.split() == ["fastnn.bench", "fastnn.kernels"], run.stderr
