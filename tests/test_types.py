"""Type checkers find in fastnn what they find in torch.nn, in a checkout and in a wheel."""

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import types
import venv
from pathlib import Path

import pytest
import torch

from tests.test_namespace import PUBLIC, SUBMODULES
from tests.test_wheel import build_wheel
from tests.versions import pinned
from tools import stubs

ROOT = Path(__file__).parents[1]


@pinned
def test_stubs_are_those_of_this_torch():
    assert stubs.written() == stubs.stubs()


@pinned
def test_stubs_name_what_exists():
    for path, text in stubs.written().items():
        name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        module = importlib.import_module(f"torch.nn.{name}")
        assert f"from torch.nn.{name} import *\n" in text
        for line in filter(lambda line: " as " in line, text.splitlines()):
            assert hasattr(module, line.rstrip(",").rpartition(" ")[2]), (name, line)


def test_stubs_hide_no_file():
    """If a checker finds a stub of a module, it does not read the module's own file."""
    for path in stubs.ROOT.rglob("*.pyi"):
        ours = ROOT / "fastnn" / path.relative_to(stubs.ROOT)
        assert not ours.with_suffix(".py").exists() and not ours.parent.with_suffix(".py").exists()
    assert not (stubs.ROOT / "__init__.pyi").exists()  # fastnn/__init__.py is the package


def test_checkers_read_the_kernels_in_place():
    """typings/ holds links to the folders that are installed inside the package."""
    for folder in ("kernels", "bench"):
        assert (stubs.ROOT / folder).resolve() == ROOT / folder


PROGRAM = """
import torch
import fastnn
import fastnn as nn
import fastnn.functional as F
import fastnn.init as init
import fastnn.kernels.softmax
from fastnn import Buffer, Linear, Module, Parameter, UninitializedParameter
from fastnn.attention import SDPBackend, sdpa_kernel
from fastnn.modules.batchnorm import _BatchNorm
from fastnn.modules.utils import _pair
from fastnn.parallel import DistributedDataParallel
from fastnn.utils.parametrizations import weight_norm
from fastnn.utils.rnn import PackedSequence, pack_padded_sequence

class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(inplace=True))
        self.scale: nn.Parameter = Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) * self.scale

x = torch.ones(2, 4)
stock: torch.nn.Linear = Linear(4, 8)
norm: type[_BatchNorm] = nn.BatchNorm1d
packed: PackedSequence = pack_padded_sequence(x, torch.tensor([2]))
y: torch.Tensor = F.relu(x, inplace=False)
z: torch.Tensor = nn.functional.relu(x)
init.zeros_(stock.weight)
fastnn.utils.clip_grad_norm_(Model().parameters(), 1.0)
with sdpa_kernel(SDPBackend.MATH), fastnn.backend("torch"):
    model: Module = fastnn.convert(Model())
nn.ReLU(inplace=1.5j)  # error
nn.Linear("four", 8)  # error
nn.Liner(4, 8)  # error
norm = nn.Linear  # error
packed = F.relu(x)  # error
fastnn.backend("cuda")  # error
pack_padded_sequence(lengths=2)  # error
from fastnn.utils.rnn import no_such_name  # error
fastnn.kernels.softmax.no_such_launcher  # error
import fastnn.no_such_file  # error
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The Python of an environment in which the wheel is installed."""
    folder = tmp_path_factory.mktemp("installed")
    wheel, _ = build_wheel(folder)
    venv.create(folder / "venv", symlinks=True)
    paths = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
    site = sysconfig.get_path("purelib", "venv", paths)
    shutil.unpack_archive(wheel, site, "zip")
    Path(site, "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for extra in Path(sysconfig.get_path("purelib")).glob("*.pth"):
        if "editable" not in extra.name:  # it would find the checkout
            shutil.copy(extra, site)
    return folder / "venv" / "bin" / "python"


@pytest.mark.parametrize("where", ["checkout", "installed"])
def test_type_checker(where, installed, tmp_path, pytestconfig):
    """mypy reports the lines that are marked as errors, and no other line."""
    public = [name for name in SUBMODULES if "._" not in f".{name}"]
    lines = PROGRAM.splitlines()
    lines += [f"import fastnn.{name}" for name in public]
    lines += [
        f"fastnn.{name}"
        for name in PUBLIC
        if not isinstance(getattr(torch.nn, name), types.ModuleType)
    ]
    (tmp_path / "user.py").write_text("\n".join(lines))
    command = [sys.executable, "-m", "mypy", "user.py", "--follow-imports=silent"]
    command += ["--config-file=", f"--cache-dir={pytestconfig.cache.mkdir('mypy')}"]
    environment = dict(os.environ)
    if where == "installed":
        command.append(f"--python-executable={installed}")
    else:
        environment["MYPYPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'typings'}"
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    # With another torch than that of the stubs, some names are missing, inside the stubs.
    found = [line for line in run.stdout.splitlines() if line.startswith("user.py:")]
    reported = {int(line.split(":")[1]) for line in found if ": error:" in line}
    marked = {number for number, line in enumerate(lines, 1) if line.endswith("# error")}
    assert reported == marked, run.stdout + run.stderr
