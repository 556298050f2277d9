"""Python numbers, converted as PyTorch's CUDA kernels convert them."""

from __future__ import annotations

import functools
import math
import struct
from typing import Any

import torch


def fits_64_bits(number: Any) -> bool:
    """Whether PyTorch takes the number where it takes numbers: larger integers are an error."""
    return type(number) is not int or -(2**63) <= number < 2**63


def rounded(number: Any, dtype: torch.dtype) -> Any:
    """The number as ATen sees it if ATen converts it to `dtype` before it computes.

    Returns None if the number does not fit, which is an error in ATen. A value that is not a number
    is returned as it is. docs/scalars.md says which numbers ATen converts on CUDA.
    """
    if not isinstance(number, (int, float)):
        return number
    number = float(number)
    # the cache treats -0.0 and 0.0 as the same key
    return _rounded(number, dtype) if number else number


@functools.lru_cache(maxsize=4096)
def _rounded(number: float, dtype: torch.dtype) -> float | None:
    # This uses no tensor, because an active dispatch mode (of a tool) would see its operators.
    if math.isinf(number) or math.isnan(number) or dtype is torch.float64:
        return number
    try:
        bits = struct.pack("<f", number)  # c10 converts by way of float32
        if dtype is torch.float16:
            return struct.unpack("<e", struct.pack("<e", struct.unpack("<f", bits)[0]))[0]
    except OverflowError:
        return None
    if dtype is torch.bfloat16:  # the upper half of the float32 bits, rounded to nearest even
        (whole,) = struct.unpack("<I", bits)
        upper = (whole + 0x7FFF + (whole >> 16 & 1)) >> 16
        bits = struct.pack("<I", upper << 16)
    found = struct.unpack("<f", bits)[0]
    return None if math.isinf(found) else found
