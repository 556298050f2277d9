"""Python numbers as PyTorch's CUDA kernels see them."""

from __future__ import annotations

import functools
import math
import struct
from typing import Any

import torch


def rounded(number: Any, dtype: torch.dtype) -> Any:
    """A Python number as ATen sees it where it converts it to `dtype` before it computes.

    None if it does not fit, which is an error there. What is no number is returned as it is. Which
    numbers ATen converts on CUDA is told in docs/scalars.md.
    """
    if not isinstance(number, (int, float)):
        return number
    number = float(number)
    return _rounded(number, dtype) if number else number  # a cache takes -0.0 for 0.0


@functools.lru_cache(maxsize=4096)
def _rounded(number: float, dtype: torch.dtype) -> float | None:
    # Without a tensor: a dispatch mode, which tools set, would see its operators.
    if math.isinf(number) or math.isnan(number) or dtype is torch.float64:
        return number
    try:
        bits = struct.pack("<f", number)  # c10 converts by way of float32
        if dtype is torch.float16:
            return struct.unpack("<e", struct.pack("<e", struct.unpack("<f", bits)[0]))[0]
    except OverflowError:
        return None
    if dtype is torch.bfloat16:  # its bits are the upper half of float32's, to nearest even
        (whole,) = struct.unpack("<I", bits)
        upper = (whole + 0x7FFF + (whole >> 16 & 1)) >> 16
        bits = struct.pack("<I", upper << 16)
    found = struct.unpack("<f", bits)[0]
    return None if math.isinf(found) else found
