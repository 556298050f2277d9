"""Builds the C++ runner of plans on the user's machine, and loads it; other modules, too.

One call of a C++ compiler, with the headers of the installed PyTorch and without a CUDA toolkit.
The module lies in the user's cache folder under a name that is made of all that it depends on: the
source, PyTorch, Python, the ABI. It gets that name only when it is complete. So two processes may
build at once, and a build that is killed leaves nothing but a file that the next one removes.

A process takes the module that exists when it makes its first plan. It never changes the runner.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("native") / "runner.cpp"
_TESTED = ("2.13.",)  # other versions of torch may differ in what a node of autograd must do
_SECONDS = 900  # after which a compiler is stopped


class BuildError(Exception):
    """Why there is no module."""


def wanted() -> bool:
    """Whether plans run in C++: `FASTNN_NATIVE` is 1. The default is 0: no GPU has run it yet."""
    return os.environ.get("FASTNN_NATIVE", "0") not in ("0", "")


def unsupported() -> str | None:
    """Why this installation cannot have a C++ runner, whatever compiler it has."""
    if torch.version.hip is not None:
        return "ROCm has the Python runner"
    if sys.platform != "linux":
        return "it needs Linux"
    if not torch.__version__.startswith(_TESTED):
        return f"it was not tested with torch {torch.__version__}"
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "it needs CPython with the interpreter lock"
    return None


def expected() -> bool:
    """Whether plans run in C++ on this machine, once the module is built."""
    return wanted() and unsupported() is None and (compiler() is not None or path().exists())


def compiler() -> str | None:
    """The C++ compiler: `CXX`, or else one of those that are usual."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def folder() -> Path:
    """The folder of the modules."""
    base = os.environ.get("FASTNN_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "fastnn"
    )
    return Path(base)


def _options() -> list[str]:
    home = Path(torch.__file__).parent
    python = sysconfig.get_paths()["include"]
    abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
    return [
        "-O2", "-g0", "-w", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden",
        f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
        f"-isystem{home / 'include'}", f"-isystem{home / 'include/torch/csrc/api/include'}",
        f"-isystem{python}",
        f"-L{home / 'lib'}", "-ltorch_python", "-ltorch", "-ltorch_cpu", "-lc10",
    ]  # fmt: skip


@functools.cache
def _key(source: Path) -> str:
    facts = (
        source.read_text(), torch.__version__, torch.version.git_version, torch.__file__,
        sys.version, sysconfig.get_config_var("SOABI"), platform.machine(), *_options(),
    )  # fmt: skip
    return hashlib.sha256("\0".join(map(str, facts)).encode()).hexdigest()[:24]


def path(source: Path = SOURCE) -> Path:
    """Where the module of this installation is, or will be."""
    return folder() / f"{source.stem}-{_key(source)}.so"


def failed(source: Path = SOURCE) -> str | None:
    """Why the last build failed; None if none did."""
    try:
        return path(source).with_suffix(".failed").read_text().strip() or "the build failed"
    except OSError:
        return None


def load(source: Path = SOURCE) -> Any:
    """The module. Raises BuildError."""
    import importlib.machinery
    import importlib.util

    file = path(source)
    try:
        owners = {os.stat(p).st_uid for p in (file, file.parent)}
    except OSError:
        raise BuildError(failed(source) or "it is not built; `fastnn native` builds it") from None
    if owners - {os.getuid(), 0}:
        raise BuildError(f"{file} belongs to another user")
    try:
        loader = importlib.machinery.ExtensionFileLoader(source.stem, str(file))
        spec = importlib.util.spec_from_loader(source.stem, loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except Exception as e:
        raise BuildError(f"{file} cannot be loaded: {e}") from None
    return module


def build(
    say: Callable[[str], None] = lambda line: None, wait: bool = True, source: Path = SOURCE
) -> Path:
    """Build the module, if it is not there, and return its path. Raises BuildError.

    say: is told what happens, a line at a time. wait: for another process that is building it;
    else that is an error.
    """
    why = unsupported()
    if why is not None:
        raise BuildError(why)
    target = path(source)
    if target.exists():
        say(f"{target} is there already")
        return target
    tool = compiler()
    if tool is None:
        raise BuildError("there is no C++ compiler; install g++ or clang++, or set CXX")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock"), say, wait):
            if not target.exists():
                _compile(tool, source, target, say)
    except OSError as e:
        raise BuildError(f"{target.parent} cannot be used: {e.strerror or e}") from None
    say(f"built {target}")
    return target


@contextmanager
def _locked(file: Path, say: Callable[[str], None], wait: bool) -> Iterator[None]:
    """One process at a time. The lock is free again when its process ends, however it ends."""
    import fcntl

    with open(file, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise BuildError("another process builds it") from None
            say("another process builds it; waiting ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(tool: str, source: Path, target: Path, say: Callable[[str], None]) -> None:
    for old in target.parent.glob(f"{target.stem}-*.tmp"):  # of builds that were killed
        _remove(old)
    handle, name = tempfile.mkstemp(prefix=f"{target.stem}-", suffix=".tmp", dir=target.parent)
    os.close(handle)
    say(f"{tool} compiles {source.name}, which takes 15 to 60 seconds ...")
    try:
        try:
            done = subprocess.run(
                [tool, "-x", "c++", str(source), "-o", name, *_options()],
                capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as e:
            raise BuildError(f"{tool}: {e}") from None
        if done.returncode:
            lines = [n for n in done.stderr.splitlines() if "error" in n] or [done.stderr.strip()]
            raise BuildError(f"{tool} failed with code {done.returncode}: {lines[0][:300]}")
        if not os.path.getsize(name):
            raise BuildError(f"{tool} wrote nothing")
        os.replace(name, target)
    except BuildError as e:
        try:
            target.with_suffix(".failed").write_text(str(e))
        except OSError:
            pass  # the next process tries again
        raise
    finally:
        _remove(Path(name))
    _remove(target.with_suffix(".failed"))


def _remove(file: Path) -> None:
    try:
        file.unlink()
    except OSError:
        pass


def start() -> None:
    """Build in another process, which outlives this one; not if a build failed before.

    It never raises, and waits for nothing.
    """
    try:
        if unsupported() or failed() or path().exists() or compiler() is None:
            return
        threading.Thread(target=_run, daemon=True, name="fastnn-build").start()
    except Exception:
        pass  # the Python runner runs


def _run() -> None:
    """Start the process and wait for it, so that no dead process remains."""
    try:
        subprocess.run(
            [sys.executable, "-c", _BACKGROUND],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
    except Exception:
        pass


_BACKGROUND = """
import os
os.nice(19)
from fastnn import _build
try:
    _build.build(wait=False)
except _build.BuildError:
    pass
"""
