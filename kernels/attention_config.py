"""Tiles, warps and stages of the attention kernels."""

from typing import NamedTuple

from fastnn.kernels._config import tunable
from fastnn.kernels._sizes import next_power_of_2


class Shape(NamedTuple):
    """What tiles are chosen by."""

    L: int
    D: int
    E: int
    itemsize: int
    arch: str
    masked: bool = False
    causal: bool = False
    noisy: bool = False
    grouped: bool = False


@tunable("BLOCK_M", "BLOCK_N")
def config(kind, shape):
    """Tiles of "fwd", "dkdv", "dq" and "dmask": compiled, not yet timed.

    None of what the tests compile spills on sm_80, sm_86, sm_89, sm_90, sm_100 and sm_120.
    """
    d = max(next_power_of_2(max(shape.D, shape.E)), 16)
    plain = not (shape.masked or shape.noisy)
    ragged = max(shape.D, shape.E) != d  # so that its accesses are masked too
    # Without wgmma or tcgen05, operands and scores share the registers with the sums.
    narrow = shape.arch not in ("sm_90", "sm_100")
    if shape.itemsize == 4:
        wide = {"fwd": d > 64, "dkdv": d > 128}.get(kind, 64 < d <= 128)
        m, n, stages = 32 if wide else 16, 16, 1 if kind == "dkdv" and d > 64 else 2
        most = {"fwd": True, "dq": d > 16 or shape.noisy, "dkdv": d > 16}
        few = d <= 64 and most.get(kind, False)
        warps = 4 if few else 8
    elif kind == "fwd":
        if d <= 64:
            m, n, warps, stages = 128, 64, 4 if plain and not narrow else 8, 3
            if narrow and (d < 64 if plain else shape.masked and shape.noisy):
                m, warps = 64, 4 if plain else 8
        elif d <= 128:
            m, n, warps, stages = 128, 64, 8, 3
            if narrow and (shape.causal or not plain):
                m, n, warps, stages = (64, 64, 4, 3) if plain else (64, 32, 8, 2)
            elif shape.masked and shape.noisy:
                m = 64
        else:
            m, n, warps, stages = 64, 32, 8, 2
    elif kind == "dkdv":
        if d <= 64:
            tight = narrow and (shape.noisy or (shape.masked and ragged))
            m, n = 64 if plain and not narrow else 32, 64 if tight else 128
        else:
            tight = narrow and (ragged or (shape.masked and shape.noisy))
            m, n = 32, 128 if d <= 128 and not tight else 64
        warps, stages = 8, 2
    elif d <= 64:
        m, n, warps, stages = 128, 64, 8, 2
        if narrow and shape.noisy:
            m, n, warps = 64, 32, 8 if shape.masked and ragged else 4
        elif shape.masked and (narrow or (kind == "dmask" and shape.noisy)):
            m = 64
    else:
        m, n, warps, stages = 64, 64 if d <= 128 else 32, 8, 2
        if narrow and kind == "dmask":
            n = 32
        elif shape.noisy and (d > 128 or shape.masked) and kind == "dq" and not narrow:
            m = 32
    if d <= 16 and shape.itemsize == 2 and kind in ("fwd", "dq"):  # narrow accesses
        m, n = 64, 32 if kind == "dq" and shape.noisy else n
    if shape.arch == "sm_100" and shape.itemsize == 2:  # where masks take more
        if kind == "fwd" and ((shape.masked and d != 64) or (shape.noisy and d < 64)):
            m, n, warps = 64 if d <= 128 else 32, 64 if d <= 128 else 32, 8
        elif shape.masked and kind == "dkdv" and d <= 64:
            n = 64
        elif shape.masked and kind == "dq" and (d > 128 or (d < 64 and shape.noisy)):
            m = 64 if d < 64 else 32
        elif kind == "dmask" and d > 128:
            stages = 1
    if shape.grouped and shape.itemsize == 2:  # one more loop, around those of dk and dv
        if kind == "dkdv":
            n = 64 if plain and d <= 64 else 32
        elif kind == "dmask" or (narrow and shape.masked and kind == "dq"):
            m = min(m, 64)
    if shape.arch == "sm_100" and shape.itemsize == 2 and d <= 16:
        m, n, warps, stages = (32, 64, 8, 2) if kind == "dkdv" else (64, 32, 8, 2)
    if shape.arch == "gfx942" and shape.itemsize == 2:  # 64 KiB of shared memory
        stages = 1
        if d > 64:
            m, n = min(m, 64), min(n, 64 if kind == "dkdv" else 32)
    small = shape.arch in ("sm_86", "sm_89", "sm_120")
    if small and shape.itemsize == 2:  # 99 KiB of shared memory
        if kind == "fwd" and plain and 64 < d <= 128:
            m, n, warps, stages = 64, 64, 4, 3
        elif kind == "dkdv" and shape.masked and 64 < d <= 128:
            n = min(n, 64)
        elif kind == "dq" and shape.masked and shape.noisy and d <= 64:
            warps = 8
        elif kind != "fwd" and d > 128:
            stages = 1
    if shape.arch == "sm_120" and shape.itemsize == 2:  # where a thread spills sooner
        if kind == "fwd" and d <= 128 and (plain or shape.noisy):
            m, n, warps, stages = 64, 32, 8, 2
        elif kind == "dkdv" and d <= 128:
            n = 32 if d > 64 or not plain else 64
        elif kind in ("dq", "dmask") and d <= 64 and shape.masked:
            m, n, warps = 32, 16 if kind == "dmask" and shape.noisy else 32, 8
    chosen = {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    alone = shape.arch == "sm_100" and (d <= 16 or (d > 64 and kind == "dq"))
    alone = alone or (small and not plain and (d <= 16 or (d > 64 and kind == "fwd")))
    alone = alone or (shape.arch == "sm_120" and (d <= 16 or (d > 64 and kind == "dkdv")))
    if shape.itemsize == 4 or alone:
        chosen["maxnreg"] = 255  # else ptxas spills a few to hold another block
    return chosen


def apart(shape):
    """Whether dk and dv are made by two launches, as their sums do not fit beside all the rest."""
    d = max(shape.D, shape.E)
    if shape.arch in ("sm_90", "sm_100"):
        return d > 128 or (d > 64 and (shape.noisy or (shape.masked and shape.causal)))
    return d > 128 or (shape.noisy and shape.masked) or (d > 64 and (shape.noisy or shape.masked))
