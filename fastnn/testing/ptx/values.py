"""Numbers of PTX: rounding modes, 16-bit floats, results of approximate instructions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

UNSIGNED: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
TYPES: dict[str, Any] = {
    **{f"b{n}": t for n, t in UNSIGNED.items()},
    **{f"u{n}": t for n, t in UNSIGNED.items()},
    "s8": np.int8,
    "s16": np.int16,
    "s32": np.int32,
    "s64": np.int64,
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "pred": np.bool_,
}


def width(kind: str) -> int:
    """The number of bits of an integer or float type."""
    return int(kind.lstrip("bfsu"))


def flush(f: Array) -> Array:
    """Replace subnormal numbers by zeros of the same sign."""
    return np.where(np.abs(f) < np.finfo(f.dtype).tiny, np.copysign(f.dtype.type(0), f), f)


def saturate(f: Array) -> Array:
    """Clamp to [0, 1]; nan becomes 0."""
    return np.where(np.isnan(f), f.dtype.type(0), np.clip(f, 0, 1)).astype(f.dtype)


def to_f32(exact: Array, mode: str = "rn") -> Array:
    """A float64 as float32, in one of PTX's rounding modes: rn, rz, rm or rp."""
    nearest = exact.astype(np.float32)
    if mode == "rn":
        return nearest
    back = nearest.astype(np.float64)
    towards, beyond = {
        "rz": (np.float32(0), np.abs(back) > np.abs(exact)),
        "rm": (np.float32(-np.inf), back > exact),
        "rp": (np.float32(np.inf), back < exact),
    }[mode]
    return np.where(np.isfinite(back) & beyond, np.nextafter(nearest, towards), nearest)


_BELOW_F32 = np.uint64((1 << 29) - 1)  # bits of a float64 that a float32 does not have
_TIE = np.uint64(1 << 28)


def fma_f32(a: Array, b: Array, c: Array, mode: str = "rn") -> Array:
    product = a.astype(np.float64) * b.astype(np.float64)  # exact
    total = np.atleast_1d(product + c)
    tied = (total.view(np.uint64) & _BELOW_F32) == _TIE
    if mode == "rn" and tied.any():
        # These were rounded to a tie. A second rounding could go the wrong way, so move them off
        # the tie, back to the side from which the first rounding took them.
        left = total - product
        error = (product - (total - left)) + (c - left)
        side = np.where(error > 0, np.inf, -np.inf)
        total = np.where(tied & (error != 0), np.nextafter(total, side), total)
    return to_f32(total, mode)


def approximate(exact: Array, relative: float) -> Array:
    """float64 as float32, with an error of up to `relative`, up or down by the bits of the value.

    Powers of two are exact, as on the hardware.
    """
    f = exact.astype(np.float32)
    noise = f.view(np.uint32) * np.uint32(2654435761)
    off = (noise.astype(np.float64) / 2**31 - 1.0) * relative
    power = (f.view(np.uint32) & np.uint32(0x7FFFFF)) == 0
    return np.where(power, f, (exact * (1.0 + off)).astype(np.float32))


def from_bf16(u: Array) -> Array:
    return (u.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(f: Array) -> Array:
    """The bits of the nearest bfloat16 of a float32, or of a float64 that is not yet rounded."""
    single = np.atleast_1d(f.astype(np.float32))
    if f.dtype == np.float64:
        # The first step rounds to odd, so that the value is not rounded to nearest twice.
        back = single.astype(np.float64)
        inexact = np.isfinite(back) & (back != f) & (single.view(np.uint32) & np.uint32(1) == 0)
        towards = np.where(back < f, np.float32(np.inf), np.float32(-np.inf))
        single = np.where(inexact, np.nextafter(single, towards), single)
    u = single.view(np.uint32)
    nearest = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(f), np.uint16(0x7FFF), nearest.astype(np.uint16))


def _from_f16(u: Array) -> Array:
    return u.view(np.float16)


def _to_f16(f: Array) -> Array:
    return f.astype(np.float16).view(np.uint16)


def from_tf32(u: Array) -> Array:
    return (u & np.uint32(0xFFFFE000)).view(np.float32)  # tensor cores ignore the rest


# For each 16-bit float: bits to values, and a float32 or an unrounded float64 to bits.
HALVES: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "f16": (_from_f16, _to_f16),
    "bf16": (from_bf16, to_bf16),
}
