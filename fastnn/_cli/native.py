"""`fastnn native`: builds the C++ runner of repeated calls."""

from __future__ import annotations

import argparse

from fastnn import _build
from fastnn._cli import CliError

EXAMPLES = """\
  fastnn native                   # needs a C++ compiler, and no CUDA toolkit
  CXX=clang++ fastnn native
  FASTNN_NATIVE=1 fastnn info     # which runner programs have that set this variable
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """This command has no arguments."""


def run(args: argparse.Namespace) -> int:
    try:
        _build.build(lambda line: print(line, flush=True))
        _build.load()
    except _build.BuildError as e:
        raise CliError(f"there is no C++ runner, and plans run in Python: {e}") from None
    if not _build.wanted():
        print("programs use it if FASTNN_NATIVE=1 is set")
    return 0
