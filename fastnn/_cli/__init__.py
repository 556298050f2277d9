"""Code that the subcommands share.

No file in this folder imports rich or matplotlib before a command needs them. The library and
`fastnn --help` work without them.
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
    from rich.progress import Progress


class CliError(Exception):
    """Ends a command with exit code 2. The user sees only the message."""


def require(*packages: str) -> None:
    """Raises CliError unless all `packages`, dependencies of the command line, can be imported."""
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
    """The console to which a command writes. Raises CliError without rich."""
    require("rich")
    from rich.console import Console

    return Console(highlight=False)


def progress(console: Console) -> Progress:
    """A bar with the number of steps that are done and the time that has passed."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    return Progress(*columns, console=console, transient=True)


def versions() -> dict[str, str]:
    """The versions on which a result depends."""
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
    """The processor, by its marketing name if the system knows it."""
    try:
        with open("/proc/cpuinfo") as info:
            names = [line.split(":", 1)[1] for line in info if line.startswith("model name")]
    except OSError:
        names = []
    name = names[0].strip() if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'' if threads == 1 else 's'}"


def device_name(device: torch.device) -> str:
    """The name of a device for reports."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def why_no_kernels() -> str | None:
    """Why no kernel can run in this process, and what would help; None if kernels can run."""
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
