"""Python numbers as PyTorch's CUDA kernels see them."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch


def rounded(number: Any, dtype: torch.dtype) -> Any:
    """A Python number as ATen sees it where it converts it to `dtype` before it computes.

    None if it does not fit, which is an error there. What is no number is returned as it is. Which
    numbers ATen converts on CUDA is told in docs/scalars.md.
    """
    return _rounded(float(number), dtype) if isinstance(number, (int, float)) else number


@functools.lru_cache
def _rounded(number: float, dtype: torch.dtype) -> float | None:
    found = torch.tensor(number, dtype=dtype, device="cpu").item()
    return found if math.isinf(found) == math.isinf(number) else None
