"""What the subcommands share. No file in this folder imports rich or matplotlib before it is
asked to: the library works without them, and `fastnn --help` too.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from typing import TYPE_CHECKING

import torch

import fastnn
from fastnn import _mode

if TYPE_CHECKING:
    from rich.console import Console


class CliError(Exception):
    """Ends a command with exit code 2; the message is all that the user sees."""


def require(*packages: str) -> None:
    """Raises CliError unless each of the command line's own dependencies can be imported."""
    missing = []
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise CliError(
            f"this command needs {' and '.join(missing)}: pip install 'fastnn-triton[cli]'"
        )


def console() -> Console:
    """Where a command writes. Raises CliError without rich."""
    require("rich")
    from rich.console import Console

    return Console(highlight=False)


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    return {
        "fastnn": fastnn.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": triton,
    }


def cpu_name() -> str:
    """The processor, by its marketing name where the system tells it."""
    try:
        with open("/proc/cpuinfo") as info:
            names = [line.split(":", 1)[1] for line in info if line.startswith("model name")]
    except OSError:
        names = []
    name = names[0].strip() if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'' if threads == 1 else 's'}"


def device_name(device: torch.device) -> str:
    """A device as a report names it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def why_no_kernels() -> str | None:
    """Why no kernel can run in this process, in words that say what would help; None if one can."""
    if _mode.current_mode() == "torch":
        return 'the mode is "torch" (FASTNN_BACKEND=torch), so that everything runs stock'
    if not _mode.HAS_TRITON:
        return "triton is not installed (it is for Linux: pip install triton)"
    if _mode.INTERPRET:
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this PyTorch ({torch.__version__}) was built without CUDA or ROCm"
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    return None
