"""The record of the environment from which figures come."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path

import torch

import fastnn
from fastnn.bench import liger
from fastnn.kernels import _gpus


def _said(*command: str) -> str | None:
    """The output of a command; None if the command is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    folder = Path(__file__).resolve().parent
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder)
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str | None:
    """The commit of this checkout, with "+" if files differ from it; None outside a checkout."""
    found = _said("git", "rev-parse", "--short=12", "HEAD")
    if found is None or not (Path(__file__).resolve().parents[1] / ".git").exists():
        return None
    return found + ("+" if _said("git", "status", "--porcelain", "--untracked-files=no") else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# Two runs may be in one table only if these are equal.
IDENTITY = ("device", "fastnn", "commit", "torch", "triton")


def measured(e: dict) -> str:
    """The line in which a table names its origin, from the environment of its run."""
    return f"measured on {e['device']}, {e['time'][:10]}, torch {e['torch']}, triton {e['triton']}"


def environment() -> dict:
    """Device, driver, clocks, versions, commit and time."""
    found: dict = {
        "kind": "environment",
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": cpu(),
        "fastnn": fastnn.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "liger": liger.version(),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
    }
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        found["architecture"] = _gpus.architecture(0)
        found["multiprocessors"] = p.multi_processor_count
        found["memory_bytes"] = p.total_memory
        fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
        said = _said("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0")
        if said:
            found["nvidia_smi"] = dict(zip(fields.split(","), said.split(", "), strict=False))
    return found
