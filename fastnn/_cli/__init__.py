"""Code that the subcommands share.

No file in this folder imports rich or matplotlib before a command needs them. The library and
`fastnn --help` work without them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import torch

import fastnn
from fastnn import _mode

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table


NO_TRITON = "triton is not installed (on Linux: pip install triton)"


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


WIDE = 176  # columns into which every table fits


def console() -> Console:
    """The console to which a command writes. Raises CliError without rich.

    A file or a pipe has no width of its own, so that tables there are as wide as they want to be,
    unless `COLUMNS` is set.
    """
    require("rich")
    from rich.console import Console

    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(highlight=False, width=WIDE if wide else None)


def progress(console: Console) -> Progress:
    """A bar with the number of steps that are done and the time that has passed."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    width: int,
    *,
    narrow: Sequence[str],
    left: Sequence[str],
    whole: Sequence[str] = (),
) -> Table:
    """A table that fits `width`: below 120 characters it has only the columns `narrow`.

    left: columns that are set flush left. whole: columns whose cells are never broken.
    """
    from rich.table import Table

    shown = [c for c in columns if width >= 120 or c in narrow]
    missing = ", ".join(c for c in columns if c not in shown)
    made = Table(
        title=title, caption=f"a wider terminal also shows: {missing}" if missing else None
    )
    for c in shown:
        justify: Literal["left", "right"] = "left" if c in left else "right"
        made.add_column(c, justify=justify, overflow="fold", no_wrap=c in whole)
    for row in rows:
        made.add_row(*(cell for c, cell in zip(columns, row, strict=True) if c in shown))
    return made


def count(n: int, noun: str) -> str:
    """`n` and the noun, which takes an s unless n is 1."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def nothing_matches(what: str, only: list[str] | None) -> CliError:
    """The error for `--only` words that no row has."""
    return CliError(
        f"no {what} has {' or '.join(map(repr, only or ()))} in its name; "
        "`fastnn info` lists the functions"
    )


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
        return 'the mode is "torch" (FASTNN_BACKEND=torch), so everything runs stock'
    if not _mode.HAS_TRITON:
        return NO_TRITON
    if _mode.INTERPRET:
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this PyTorch ({torch.__version__}) was built without CUDA or ROCm"
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    return None
