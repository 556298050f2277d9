"""Tests that depend on the torch version: `pinned` marks tests for the one of constraints.txt."""

import re
from pathlib import Path

import pytest
import torch

_CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
PINNED = re.search(r"^torch==(\S+)", _CONSTRAINTS.read_text(), re.M)[1]
OLDER = torch.__version__ < "2.11"  # what it accepts or lacks stands where tests ask

pinned = pytest.mark.skipif(
    torch.__version__.split("+")[0] != PINNED, reason=f"the documents are of torch {PINNED}"
)
