"""The wheel holds only `fastnn/` and its stubs. It is complete, and can be imported."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def build_wheel(folder):
    """A wheel and the output of its build. The build is offline, and runs in a copy of the
    checkout, because setuptools leaves files behind."""
    tree, out = folder / "tree", folder / "wheel"
    tree.mkdir()
    unbuilt = shutil.ignore_patterns("__pycache__")
    for name in ("fastnn", "kernels", "bench", "typings"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=unbuilt)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    program = "import setuptools.build_meta, sys; setuptools.build_meta.build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", program, str(out)]
    run = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    [wheel] = out.glob("*.whl")
    return wheel, run.stdout + run.stderr


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    wheel, said = build_wheel(tmp_path_factory.mktemp("build"))
    with zipfile.ZipFile(wheel) as archive:
        yield archive, said


@pytest.fixture
def wheel(build):
    return build[0]


def test_builds_without_a_warning(build):
    """For example, setuptools may take a folder of stubs for a missing package, and warn."""
    assert "Warning" not in build[1], build[1]


def test_holds_the_package_and_nothing_else(wheel):
    """Another package is called `kernels`. A file of ours under that name would overwrite it."""
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not re.fullmatch(r"fastnn_triton-[\w.]+\.dist-info", top)} == {
        "fastnn",
        "fastnn-stubs",
    }


def test_holds_the_package_whole(wheel):
    """Each file of the package and of the stubs is there, under its installed name."""
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    homes = {
        "fastnn": "fastnn",
        "kernels": "fastnn/kernels",
        "bench": "fastnn/bench",
        "typings/fastnn": "fastnn-stubs",
    }
    wanted = {
        f"{home}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, home in homes.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".pyi", ".json", ".typed", ".cpp")
    }
    left_out = ("fastnn/bench/results/", "fastnn/bench/tests/")
    wanted = {name for name in wanted if not name.startswith(left_out)}
    assert {"fastnn/kernels/__init__.py", "fastnn/py.typed", "fastnn-stubs/utils/rnn.pyi"} <= wanted
    assert shipped == wanted
    tests = [n for n in shipped if re.search(r"(^|/)(tests?/|test_|conftest\.py|pytest\.ini)", n)]
    assert tests == [], "these are of no use to who installs the package"


def test_requires_torch_and_triton_without_a_cap(wheel):
    [path] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = message_from_string(wheel.read(path).decode())
    required = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert {re.split(r"[^\w-]", r)[0] for r in required} == {"torch", "triton"}
    for requirement in required:  # "torch>=2.8", "triton>=3.4; platform_system == ..."
        assert re.findall(r"[<>=!~]=?", requirement.partition(";")[0]) == [">="]


def test_runs_where_it_is_unpacked(wheel, tmp_path):
    """The path finder takes folders that hold only stubs for namespace packages."""
    wheel.extractall(tmp_path / "site")
    program = """
import sys
from pathlib import Path
import fastnn.utils.rnn, fastnn.quantized.dynamic.modules
from fastnn.attention.flex_attention import flex_attention
from fastnn.modules.batchnorm import _BatchNorm
import fastnn.init as init
import fastnn.functional as F
from fastnn import kernels
import torch

site = Path(sys.argv[1])
assert site in Path(fastnn.__file__).parents, fastnn.__file__
assert site in Path(kernels.__file__).parents, kernels.__file__
assert fastnn.utils.rnn is torch.nn.utils.rnn and init is torch.nn.init
assert _BatchNorm is torch.nn.modules.batchnorm._BatchNorm
assert fastnn.quantized.dynamic.modules is torch.nn.quantized.dynamic.modules
assert torch.equal(fastnn.ReLU()(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))
"""
    path = str(tmp_path / "site")
    subprocess.run(
        [sys.executable, "-W", "error", "-c", program, path],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
    )
