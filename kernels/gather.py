"""Index maps: pads, shuffles, fold and unfold, as gathers, in both directions.

    y[o] = x[map(o)], or a constant where map(o) lies outside x
    dx[i] = sum of the dy[o] with map(o) = i, in fp32 and in the order of o's candidates

Memory-bound. Elements moved, if x has E and y has F of them:
    forward    E + F. For a constant pad PyTorch fills y and then copies x into it: 2E + F
    backward   E + F; 2E for a constant pad. For reflect and replicate pads PyTorch fills dx with
               zeros and adds to it with atomics: 3E + F. Its circular pad is a chain of slices and
               copies
In PyTorch, too, shuffles, fold and unfold are one kernel each way.

A map acts on each dimension alone, and is a constexpr function. The result is walked in the order
of its storage, channels first or last, as rows: the source is read through its strides, so that
neither a view nor a layout costs a copy. `_Axis` says what a dimension of the result reads;
neighbours that are read as one become one, so that a shuffle, whose dimensions are split and in
another order, is the same kernel with the map left out.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastnn.kernels._config import lanes, tunable
from fastnn.kernels._launch import kernel
from fastnn.kernels._sizes import cdiv, next_power_of_2, reciprocal
from fastnn.kernels._tl import empty_in_layout

AXES = 5  # the most that the dimensions of a result may come to
MOST = 2**31 - 2**16  # elements; 32 bits index them, and the lanes of a tile beyond them
_SPLIT = 16  # columns that are fewer make one axis with the next


# ---- maps -------------------------------------------------------------------------------------
#
# A map takes i, the place in the source were it to go on past its ends, to one within [0, size), or
# leaves it outside. The candidates of a place are the outputs that may read it: `*_from` gives
# candidate t, which counts if it lies within the result. Names are the modes of `functional.pad`.


@triton.jit
def constant(i, size):
    return i


@triton.jit
def constant_from(i, t, size, before):
    return i + before, i >= 0


@triton.jit
def reflect(i, size):
    return size - 1 - tl.abs(size - 1 - tl.abs(i))


@triton.jit
def reflect_from(i, t, size, before):
    # Mirrored by the left end or, where that is too far, by the right one; the other comes third.
    near = (i > 0) & (i <= before)
    by = tl.where(near | (t == 0), t, t + 1)  # 0: not mirrored, 1: by the left end, 2: by the right
    right = tl.where(i < size - 1, 2 * (size - 1) - i, -1 - before)
    return before + tl.where(by == 0, i, tl.where(by == 1, -i, right)), by < 3


@triton.jit
def replicate(i, size):
    return tl.minimum(tl.maximum(i, 0), size - 1)


@triton.jit
def replicate_from(i, t, size, before):
    o = tl.where(i == 0, 0, tl.maximum(i + before, 0)) + t
    return o, replicate(o - before, size) == i


@triton.jit
def circular(i, size):
    return tl.where(i < 0, i + size, tl.where(i < size, i, i - size))


@triton.jit
def circular_from(i, t, size, before):
    near = i + before >= size  # the place a turn before, or after; the other of them comes third
    turn = tl.where((t == 1) == near, -size, size)
    return before + i + tl.where(t == 0, 0, turn), i >= 0


def _candidates(mode, axis):
    """How many outputs may read one place, along a dimension so padded."""
    out, size, _, before, after = axis
    if mode == "constant" or axis.plain:
        return 1
    if mode == "replicate":
        return out if size == 1 else 1 + max(before, after, 0)
    reach = size if mode == "circular" else size - 2
    return 2 if max(before, 0) + max(after, 0) <= reach else 3


# ---- kernels ----------------------------------------------------------------------------------
#
# A program has rows of one axis, a, at one place of each of the outer axes z, c and b. So what
# these read is found once for a program, and what a reads once for a row: divisions and maps of an
# element would take longer than its bytes. An axis has `_out` places in the padded tensor and
# `_size` in the other; what is read are elements `_step` apart, and what is written `_to` apart.
# Steps and columns come in units, so that the compiler sees what they divide by. 32 bits index all
# of it: a tensor that spans more is not for these kernels.


@triton.jit
def _read(o, before, size, step, MAP: tl.constexpr):
    """The offset of what o reads, and whether it lies in the source."""
    i = MAP(o - before, size)
    return i * step, (i >= 0) & (i < size)


@triton.jit
def divided(n, by, magic, shift):
    """(n // by, n % by) for n from 0 to 2**31 - 1. The host has magic and shift from `reciprocal`.

    A division takes some 25 instructions, this 4.
    """
    twice = (n * 2).to(tl.uint32, bitcast=True)
    over = tl.umulhi(twice, magic.to(tl.uint32, bitcast=True)) >> shift.to(tl.uint32, bitcast=True)
    over = over.to(tl.int32, bitcast=True)
    return over, n - over * by


@triton.jit
def _place(
    col_tiles, col_magic, col_shift, a_tiles, a_magic, a_shift,
    b_n, b_magic, b_shift, c_n, c_magic, c_shift, RANK: tl.constexpr,
):  # fmt: skip
    """The tile of columns, the tile of rows, and the places along b, c and z of this program."""
    o, col_tile = divided(tl.program_id(0), col_tiles, col_magic, col_shift)
    z, a_tile = divided(o, a_tiles, a_magic, a_shift)
    b, c = 0, 0
    if RANK > 2:
        z, b = divided(z, b_n, b_magic, b_shift)
    if RANK > 3:
        z, c = divided(z, c_n, c_magic, c_shift)
    return col_tile, a_tile, b, c, z


@kernel(
    do_not_specialize=[
        "col_tiles", "col_magic", "col_shift", "a_tiles", "a_magic", "a_shift",
        "b_n", "b_magic", "b_shift", "c_n", "c_magic", "c_shift",
        "z_before", "z_size", "z_step", "z_to",
        "c_before", "c_size", "c_step", "c_to", "b_before", "b_size", "b_step", "b_to",
        "a_out", "a_before", "a_size", "a_step", "a_to",
        "cols", "w_before", "w_size", "inner_step",
    ]
)  # fmt: skip
def _gather_fwd_kernel(
    X, Y, fill, col_tiles, col_magic, col_shift, a_tiles, a_magic, a_shift,
    b_n, b_magic, b_shift, c_n, c_magic, c_shift,
    z_before, z_size, z_step, z_to, c_before, c_size, c_step, c_to,
    b_before, b_size, b_step, b_to, a_out, a_before, a_size, a_step, a_to,
    cols, w_before, w_size, w_step, inner_step,
    MAP: tl.constexpr, FILL: tl.constexpr, FLAT: tl.constexpr, RANK: tl.constexpr,
    SPLIT: tl.constexpr, UNIT: tl.constexpr, STORE_UNIT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program copies a tile of ROWS rows by COLS columns of y.

    FILL: it writes `fill` where a map leads out of x; else none does. FLAT: columns have no map.

    X: the source, read through strides. Y: the result, dense, its rows are contiguous.
    """
    col_tile, a_tile, b, c, z = _place(
        col_tiles, col_magic, col_shift, a_tiles, a_magic, a_shift,
        b_n, b_magic, b_shift, c_n, c_magic, c_shift, RANK,
    )  # fmt: skip
    at, there, to = 0, True, 0
    if RANK > 1:
        at, there = _read(z, z_before, z_size, z_step, MAP)
        to = z * z_to
    if RANK > 2:
        step, inside = _read(b, b_before, b_size, b_step, MAP)
        at, there, to = at + step, there & inside, to + b * b_to
    if RANK > 3:
        step, inside = _read(c, c_before, c_size, c_step, MAP)
        at, there, to = at + step, there & inside, to + c * c_to
    a = a_tile * ROWS + tl.arange(0, ROWS)
    from_a, of_a = _read(a, a_before, a_size, a_step * UNIT, MAP)
    col = col_tile * COLS + tl.arange(0, COLS)
    cols = cols * STORE_UNIT
    i = col // SPLIT
    if not FLAT:
        i = MAP(i - w_before * UNIT, w_size * UNIT)
    along = i * w_step
    if SPLIT > 1:
        along += col % SPLIT * inner_step
    within = (a < a_out)[:, None] & (col < cols)[None, :]
    from_ = X + at * UNIT + (from_a[:, None] + along[None, :])
    if FILL:
        of_w = (i >= 0) & (i < w_size * UNIT)
        mask = within & (of_a & there)[:, None] & of_w[None, :]
        x = tl.load(from_, mask=mask, other=fill)
    else:
        x = tl.load(from_, mask=within)
    Y += to * STORE_UNIT
    y = x.to(Y.dtype.element_ty)
    tl.store(Y + ((a * (a_to * STORE_UNIT))[:, None] + col[None, :]), y, mask=within)


@triton.jit
def _from(i, t, out, size, before, step, FROM: tl.constexpr):
    """The offset of candidate t of place i in the gradient, and whether there is one."""
    o, there = FROM(i, t, size, before)
    return o * step, there & (o >= 0) & (o < out)


@triton.jit
def _most(first, last, size, reach, of):
    """How many candidates the places from first to last have: `of`, or one far from both ends.

    reach: the farther of the pads. No output that is padded reads beyond it.
    """
    return tl.where((first <= reach) | (last >= size - 1 - reach), of, 1)


@triton.jit
def _carried(digit, higher, base):
    """A digit that was counted up, and the one above it, to which it carries at `base`."""
    full = digit == base
    return tl.where(full, 0, digit), higher + full.to(tl.int32)


@triton.jit
def _candidate(
    DY, a, of_a, col, of_col, col_size, b, c, z, u, t, tb, tc, tz,
    z_out, z_before, z_size, z_step, c_out, c_before, c_size, c_step,
    b_out, b_before, b_size, b_step, a_out, a_before, a_size, a_step,
    w_out, w_before, w_step, inner_step,
    FROM: tl.constexpr, FLAT: tl.constexpr, RANK: tl.constexpr, SPLIT: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """One candidate of each place of rows a and columns col, in fp32; 0.0 where there is none."""
    w, of_w = col // SPLIT, of_col
    if not FLAT:
        w, of_w = FROM(w, u, col_size, w_before * UNIT)
        of_w = of_w & of_col & (w >= 0) & (w < w_out * UNIT)
    along = w * w_step
    if SPLIT > 1:
        along += col % SPLIT * inner_step
    at_a, of_row = _from(a, t, a_out, a_size, a_before, a_step * UNIT, FROM)
    of_row = of_row & of_a
    at = 0
    if RANK > 1:
        at, some = _from(z, tz, z_out, z_size, z_before, z_step, FROM)
        of_row = of_row & some
    if RANK > 2:
        step, some = _from(b, tb, b_out, b_size, b_before, b_step, FROM)
        at, of_row = at + step, of_row & some
    if RANK > 3:
        step, some = _from(c, tc, c_out, c_size, c_before, c_step, FROM)
        at, of_row = at + step, of_row & some
    from_ = DY + at * UNIT + (at_a[:, None] + along[None, :])
    return tl.load(from_, mask=of_row[:, None] & of_w[None, :], other=0.0).to(tl.float32)


@triton.jit
def _summed(
    DY, a, of_a, col, of_col, col_size, b, c, z,
    z_n, z_out, z_before, z_size, z_step, c_n, c_out, c_before, c_size, c_step,
    b_n, b_out, b_before, b_size, b_step, a_n, a_out, a_before, a_size, a_step,
    w_n, w_out, w_before, w_step, inner_step,
    FROM: tl.constexpr, MANY: tl.constexpr, FLAT: tl.constexpr, RANK: tl.constexpr,
    SPLIT: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The sum of the candidates of the places of rows a and columns col; `_n` are their counts."""
    # The first ones by themselves: there the maps come to little, and few places have others.
    acc = 0.0 + _candidate(
        DY, a, of_a, col, of_col, col_size, b, c, z, 0, 0, 0, 0, 0,
        z_out, z_before, z_size, z_step, c_out, c_before, c_size, c_step,
        b_out, b_before, b_size, b_step, a_out, a_before, a_size, a_step,
        w_out, w_before, w_step, inner_step, FROM, FLAT, RANK, SPLIT, UNIT,
    )  # fmt: skip
    if MANY:
        # One loop over all others, as nested ones would move the sums between registers. Those of
        # a come first, those of the columns last.
        u, t, tb, tc, tz = 0, 0, 0, 0, 0
        for _ in range(1, w_n * z_n * c_n * b_n * a_n):
            t, tb = _carried(t + 1, tb, a_n)
            tb, tc = _carried(tb, tc, b_n)
            tc, tz = _carried(tc, tz, c_n)
            tz, u = _carried(tz, u, z_n)
            acc += _candidate(
                DY, a, of_a, col, of_col, col_size, b, c, z, u, t, tb, tc, tz,
                z_out, z_before, z_size, z_step, c_out, c_before, c_size, c_step,
                b_out, b_before, b_size, b_step, a_out, a_before, a_size, a_step,
                w_out, w_before, w_step, inner_step, FROM, FLAT, RANK, SPLIT, UNIT,
            )  # fmt: skip
    return acc


@kernel(
    do_not_specialize=[
        "col_tiles", "col_magic", "col_shift", "a_tiles", "a_magic", "a_shift",
        "b_n", "b_magic", "b_shift", "c_n", "c_magic", "c_shift",
        "z_out", "z_before", "z_size", "z_step", "z_to", "z_from", "z_reach",
        "c_out", "c_before", "c_size", "c_step", "c_to", "c_from", "c_reach",
        "b_out", "b_before", "b_size", "b_step", "b_to", "b_from", "b_reach",
        "a_out", "a_before", "a_size", "a_step", "a_to", "a_from", "a_reach",
        "cols", "w_out", "w_before", "w_from", "w_reach", "inner_step",
    ]
)  # fmt: skip
def _gather_bwd_kernel(
    DY, DX, col_tiles, col_magic, col_shift, a_tiles, a_magic, a_shift,
    b_n, b_magic, b_shift, c_n, c_magic, c_shift,
    z_out, z_before, z_size, z_step, z_to, z_from, z_reach,
    c_out, c_before, c_size, c_step, c_to, c_from, c_reach,
    b_out, b_before, b_size, b_step, b_to, b_from, b_reach,
    a_out, a_before, a_size, a_step, a_to, a_from, a_reach,
    cols, w_out, w_before, w_step, w_from, w_reach, inner_step,
    FROM: tl.constexpr, MANY: tl.constexpr, FLAT: tl.constexpr, EDGE: tl.constexpr,
    RANK: tl.constexpr, SPLIT: tl.constexpr, UNIT: tl.constexpr, STORE_UNIT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program computes a tile of ROWS by COLS of dx, and loops over the candidates of its places.
    MANY: places near a border have more than one. FLAT: columns have no map. EDGE: so many columns,
    half of them at either end, are summed by themselves; all the others have one candidate.

    DY: the gradient, read through strides. DX: the result, dense, its rows are contiguous.
    """
    col_tile, a_tile, b, c, z = _place(
        col_tiles, col_magic, col_shift, a_tiles, a_magic, a_shift,
        b_n, b_magic, b_shift, c_n, c_magic, c_shift, RANK,
    )  # fmt: skip
    first, col_first = a_tile * ROWS, col_tile * COLS
    a = first + tl.arange(0, ROWS)
    of_a = a < a_size
    col = col_first + tl.arange(0, COLS)
    cols = cols * STORE_UNIT
    if RANK > 1:
        DX += z * z_to * STORE_UNIT
    if RANK > 2:
        DX += b * b_to * STORE_UNIT
    if RANK > 3:
        DX += c * c_to * STORE_UNIT
    z_most, c_most, b_most, a_most, w_most = 1, 1, 1, 1, 1
    if MANY:
        a_most = _most(first, first + ROWS - 1, a_size, a_reach, a_from)
        if RANK > 1:
            z_most = _most(z, z, z_size, z_reach, z_from)
        if RANK > 2:
            b_most = _most(b, b, b_size, b_reach, b_from)
        if RANK > 3:
            c_most = _most(c, c, c_size, c_reach, c_from)
        if not FLAT and not EDGE:
            w_last = (col_first + COLS - 1) // SPLIT
            w_most = _most(col_first // SPLIT, w_last, cols // SPLIT, w_reach, w_from)
    within = col < cols
    acc = _summed(
        DY, a, of_a, col, within, cols // SPLIT, b, c, z,
        z_most, z_out, z_before, z_size, z_step, c_most, c_out, c_before, c_size, c_step,
        b_most, b_out, b_before, b_size, b_step, a_most, a_out, a_before, a_size, a_step,
        w_most, w_out, w_before, w_step, inner_step, FROM, MANY, FLAT, RANK, SPLIT, UNIT,
    )  # fmt: skip
    if EDGE:
        within = (col >= EDGE // 2) & (col < cols - EDGE // 2)
    to = a * (a_to * STORE_UNIT)
    dx = acc.to(DX.dtype.element_ty)
    tl.store(DX + (to[:, None] + col[None, :]), dx, mask=of_a[:, None] & within[None, :])
    if EDGE:
        if col_tile == 0:
            each = tl.arange(0, EDGE)
            end = tl.where(each < EDGE // 2, each, cols - EDGE + each)
            at_end = _summed(
                DY, a, of_a, end, each >= 0, cols // SPLIT, b, c, z,
                z_most, z_out, z_before, z_size, z_step, c_most, c_out, c_before, c_size, c_step,
                b_most, b_out, b_before, b_size, b_step, a_most, a_out, a_before, a_size, a_step,
                w_from, w_out, w_before, w_step, inner_step, FROM, MANY, FLAT, RANK, SPLIT, UNIT,
            )  # fmt: skip
            at_end = at_end.to(DX.dtype.element_ty)
            tl.store(DX + (to[:, None] + end[None, :]), at_end, mask=of_a[:, None])


# ---- launchers --------------------------------------------------------------------------------


class _Axis(NamedTuple):
    """A dimension of a result, as it lies in memory: what it reads of the source."""

    out: int  # in the padded tensor
    size: int  # in the tensor that was padded
    step: int  # from one element that is read to the next
    before: int = 0
    after: int = 0

    @property
    def plain(self):
        return self.before == self.after == 0

    @property
    def reach(self):
        return max(self.before, self.after, 0)


def _walk(axes):
    """The axes, outermost first, without those of size 1, and with those joined that can be read as
    one; and whether the last makes the columns together with the one before it."""
    joined: list[_Axis] = []
    for axis in axes:
        if axis.plain and axis.out == 1:
            continue
        last = joined[-1] if joined else None
        if last and last.plain and axis.plain and last.step == axis.step * axis.out:
            size = last.out * axis.out
            joined[-1] = _Axis(size, size, axis.step)
        else:
            joined.append(axis)
    if not joined:
        joined = [_Axis(1, 1, 1)]
    split = len(joined) > 1 and joined[-1].plain and joined[-1].out < _SPLIT
    return joined, split


@tunable("ROWS")
def _config(cols, elements=1024, num_warps=4):
    """Whole rows, several if they are short; or pieces of rows, of which few lanes stay idle."""
    widths = [64, 128, 256, 512] if cols > 64 else [max(16, next_power_of_2(cols))]
    least = min(cdiv(cols, w) * w for w in widths)
    width = max(w for w in widths if cdiv(cols, w) * w <= 1.125 * least)
    return {"ROWS": max(1, elements // width), "COLS": width, "num_warps": num_warps}


@tunable("ROWS", "COLS")
def _tile(rows, cols, unit, backward, lanes):
    """The tile of ROWS places of an axis by COLS columns, of which the launch issues least.

    A program issues some 120 instructions whatever its tile is, and about 10 for each element of a
    thread, or 15 for 8 that are read at once. A warp has whole rows if elements are read one by
    one: then a thread has few rows, and what is found once for a row serves many elements.
    """
    warps, always = (4, 64 * 128) if unit > 1 else (1, 12 * 32)
    most = 2048 if unit > 1 else 16384 // lanes if backward else 1024
    sizes = [1 << k for k in range(most.bit_length())]
    least = min(64, next_power_of_2(cols))  # what lies side by side is read at the same time
    tiles = [(c, r) for c in sizes for r in sizes if r * c <= most and least <= c <= 512]

    def issued(tile):
        c, r = tile
        return cdiv(cols, c) * cdiv(rows, r) * (always + r * c), -c

    width, height = min(tiles, key=issued)
    warps = max(1, min(warps, height * width // 512))
    return {"ROWS": height, "COLS": width, "num_warps": warps}


def _launch(source, result, axes, backward, mode, fill=0.0):
    """Reads `source` into `result`, along axes in the order of the result's memory. True, or False
    if these are too many for the kernels."""
    joined, split = _walk(axes)
    if len(joined) - split > AXES:
        return False
    inner = joined[-1] if split else _Axis(1, 1, 0)
    *rows, w = joined[:-1] if split else joined

    def along(axis):
        return axis.size if backward else axis.out

    cols = along(w) * inner.out
    # Columns are read 16 bytes at once where they, and whatever they are counted from, divide.
    unit = 1
    if w.step == 1 and not split and (w.plain or mode == "constant"):
        unit = math.gcd(w.out, w.size, w.before, *(a.step for a in rows), 8)
    store_unit = math.gcd(cols, 8)
    fills = mode == "constant" and not all(axis.plain for axis in (*rows, w))
    # What the rows of each axis are apart in the result, in units.
    apart = [cols // store_unit]
    for axis in reversed(rows):
        apart.append(apart[-1] * along(axis))
    rows = list(zip(rows, reversed(apart[:-1]), strict=True)) or [(_Axis(1, 1, 0), 0)]
    # The innermost axis that fills a tile gives its rows; or the longest, if none does.
    enough = [n for n, (axis, _) in enumerate(rows) if along(axis) >= 16]
    longest = max(range(len(rows)), key=lambda n: along(rows[n][0]))
    a = rows.pop(enough[-1] if enough else longest)
    config = _tile(along(a[0]), cols, unit, backward, lanes() if backward else 32)
    count = math.prod(along(axis) for axis, _ in rows)
    col_tiles, a_tiles = cdiv(cols, config["COLS"]), cdiv(along(a[0]), config["ROWS"])
    grid = (count * a_tiles * col_tiles,)
    # z, the outermost, then c and b, of which the outer ones are missing if there are fewer.
    nothing = (_Axis(1, 1, 0), 0)
    rank = 1 + len(rows)
    z, *inner_rows = rows or [nothing]
    others = [nothing] * (2 - len(inner_rows)) + inner_rows
    tile = {"RANK": rank, "SPLIT": inner.out, "UNIT": unit, "STORE_UNIT": store_unit}
    tile["FLAT"] = w.plain
    tiles = [
        number
        for n in (col_tiles, a_tiles, along(others[1][0]), along(others[0][0]))
        for number in (n, *reciprocal(n))
    ]
    if backward:
        sizes = [
            size
            for axis, to in (z, *others, a)
            for size in (
                axis.out, axis.before, axis.size, axis.step // unit, to,
                _candidates(mode, axis), axis.reach,
            )
        ]  # fmt: skip
        # Few columns at the ends, of a row that is much longer, are summed by themselves.
        edge = 2 * next_power_of_2(w.reach + 1)
        tile["EDGE"] = edge if not w.plain and not split and cols >= 4 * edge else 0
        if mode == "constant":
            tile["EDGE"] = 0
        _gather_bwd_kernel(
            grid, source, result, *tiles, *sizes, cols // store_unit, w.out // unit,
            w.before // unit, w.step, _candidates(mode, w), w.reach, inner.step,
            FROM=globals()[f"{mode}_from"], MANY=mode != "constant", **tile, **config,
        )  # fmt: skip
    else:
        sizes = [
            size
            for axis, to in (z, *others)
            for size in (axis.before, axis.size, axis.step // unit, to)
        ]
        sizes += a[0].out, a[0].before, a[0].size, a[0].step // unit, a[1]
        _gather_fwd_kernel(
            grid, source, result, fill, *tiles, *sizes,
            cols // store_unit, w.before // unit, w.size // unit, w.step, inner.step,
            MAP=globals()[mode], FILL=fills, **tile, **config,
        )  # fmt: skip
    return True


def near(t):
    """`t`, or a dense copy of one that spans more than 32 bits can index."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t if last < MOST else t.contiguous()


def pad_fwd(x, pads, mode, fill=0.0, dtype=None, channels_last=False):
    """x of any strides, (before, after) of each dimension -> y, padded, dense."""
    x = near(x)
    shape = [size + sum(both) for size, both in zip(x.shape, pads, strict=True)]
    y, order = empty_in_layout(shape, x, dtype or x.dtype, channels_last)
    if y.numel():
        axes = [_Axis(shape[d], x.shape[d], x.stride(d), *pads[d]) for d in order]
        _launch(x, y, axes, False, mode, fill)
    return y


def pad_bwd(dy, shape, pads, mode, dtype, channels_last=False):
    """dy of any strides -> dx of that shape, dense."""
    dy = near(dy)
    dx, order = empty_in_layout(shape, dy, dtype, channels_last)
    if dx.numel():
        axes = [_Axis(dy.shape[d], shape[d], dy.stride(d), *pads[d]) for d in order]
        _launch(dy, dx, axes, True, mode)
    return dx


# ---- shuffles -----------------------------------------------------------------------------------


def shuffle(x, split, order, channels_last=False):
    """x of any strides -> y, dense: x with its dimensions split, reordered and joined.

    `split` gives each dimension of x as sizes, outermost first; `order`, for each dimension of y,
    the positions among all these sizes that make it, outermost first.
    """
    x = near(x)
    parts: list[_Axis] = []
    for step, sizes in zip(x.stride(), split, strict=True):
        axes = []
        for size in reversed(sizes):
            axes.append(_Axis(size, size, step))
            step *= size
        parts += reversed(axes)
    shape = [math.prod(parts[i].out for i in dim) for dim in order]
    y, storage = empty_in_layout(shape, x, x.dtype, channels_last)
    if y.numel():
        walked = [parts[i] for d in storage for i in order[d]]
        if not _launch(x, y, walked, False, "constant"):
            last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
            x = x.contiguous(memory_format=last if channels_last else torch.contiguous_format)
            return shuffle(x, split, order, channels_last)
    return y


# ---- fold and unfold ----------------------------------------------------------------------------


@kernel(
    do_not_specialize=[
        "rows", "C", "H", "W", "KH", "KW", "OH", "OW", "x_n", "x_c", "x_h",
        "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w", "col_tiles",
    ]
)  # fmt: skip
def _unfold_kernel(
    X, Y, rows, C, H, W, KH, KW, OH, OW, x_n, x_c, x_h, x_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, col_tiles,
    STORE_UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program copies ROWS rows of blocks by COLS blocks, of one place within the block per row.

    X (N, C, H, W): the image, read through strides. Y (N, C * KH * KW, OH * OW): contiguous.
    KH, KW: the size of a block. OH, OW: the blocks along each dimension.
    """
    row = tl.program_id(0) // col_tiles * ROWS + tl.arange(0, ROWS)
    ow = tl.program_id(0) % col_tiles * COLS + tl.arange(0, COLS)
    OW = OW * STORE_UNIT
    oh = row % OH
    kw = row // OH % KW
    kh = row // OH // KW % KH
    nc = row // OH // KW // KH
    h = oh * stride_h - pad_h + kh * dilation_h
    w = (ow * stride_w - pad_w)[None, :] + (kw * dilation_w)[:, None]
    there = (row < rows)[:, None] & (ow < OW)[None, :]
    inside = ((h >= 0) & (h < H))[:, None] & (w >= 0) & (w < W)
    at = nc // C * x_n + nc % C * x_c + h * x_h
    x = tl.load(X + at[:, None] + w * x_w, mask=there & inside, other=0.0)
    tl.store(Y + row[:, None] * OW + ow[None, :], x, mask=there)


@kernel(
    do_not_specialize=[
        "rows", "C", "H", "W", "KH", "KW", "OH", "OW", "x_n", "x_k",
        "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w", "col_tiles",
    ]
)  # fmt: skip
def _fold_kernel(
    X, Y, rows, C, H, W, KH, KW, OH, OW, x_n, x_k, x_l,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, col_tiles,
    STORE_UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program computes a tile of ROWS by COLS pixels, and loops over the places within a block.

    X (N, C * KH * KW, OH * OW): the blocks, read through strides. Y (N, C, H, W): contiguous.
    KH, KW: the size of a block. OH, OW: the blocks along each dimension.
    """
    row = tl.program_id(0) // col_tiles * ROWS + tl.arange(0, ROWS)
    w = tl.program_id(0) % col_tiles * COLS + tl.arange(0, COLS)
    W = W * STORE_UNIT
    h = row % H
    nc = row // H
    at = nc // C * x_n + nc % C * (KH * KW) * x_k
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for k in range(KH * KW):
        high = h + pad_h - k // KW * dilation_h
        wide = w + pad_w - k % KW * dilation_w
        oh = high // stride_h
        ow = wide // stride_w
        hits_h = (high >= 0) & (high == oh * stride_h) & (oh < OH) & (row < rows)
        hits_w = (wide >= 0) & (wide == ow * stride_w) & (ow < OW) & (w < W)
        to = (at + k * x_k + oh * OW * x_l)[:, None] + (ow * x_l)[None, :]
        x = tl.load(X + to, mask=hits_h[:, None] & hits_w[None, :], other=0.0)
        acc += x.to(tl.float32)
    mask = (row < rows)[:, None] & (w < W)[None, :]
    tl.store(Y + row[:, None] * W + w[None, :], acc.to(Y.dtype.element_ty), mask=mask)


def unfold(x, kernel_size, dilation, padding, stride):
    """x ([N], C, H, W) of any strides -> y ([N], C * KH * KW, OH * OW), contiguous."""
    x = near(x)
    *N, C, H, W = x.shape
    OH, OW = blocks((H, W), kernel_size, dilation, padding, stride)
    y = x.new_empty((*N, C * math.prod(kernel_size), OH * OW))
    rows = y.numel() // OW
    strides = x.stride() if N else (0, *x.stride())
    if y.numel():
        config = _config(OW)
        unit, col_tiles = math.gcd(OW, 8), cdiv(OW, config["COLS"])
        _unfold_kernel(
            (cdiv(rows, config["ROWS"]) * col_tiles,), x, y, rows, C, H, W, *kernel_size, OH,
            OW // unit, *strides, *stride, *padding, *dilation, col_tiles,
            STORE_UNIT=unit, **config,
        )  # fmt: skip
    return y


def fold(x, output_size, kernel_size, dilation, padding, stride):
    """x ([N], C * KH * KW, OH * OW) of any strides -> y ([N], C, H, W), contiguous."""
    x = near(x)
    H, W = output_size
    C = x.shape[-2] // math.prod(kernel_size)
    y = x.new_empty((*x.shape[:-2], C, H, W))
    rows = y.numel() // W
    strides = x.stride() if x.dim() == 3 else (0, *x.stride())
    if y.numel():
        config = _config(W)
        unit, col_tiles = math.gcd(W, 8), cdiv(W, config["COLS"])
        _fold_kernel(
            (cdiv(rows, config["ROWS"]) * col_tiles,), x, y, rows, C, H, W // unit, *kernel_size,
            *blocks(output_size, kernel_size, dilation, padding, stride), *strides,
            *stride, *padding, *dilation, col_tiles, STORE_UNIT=unit, **config,
        )  # fmt: skip
    return y


def blocks(size, kernel_size, dilation, padding, stride):
    """How many blocks fit along each dimension of an image of that size; below 1 if none does."""
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, d, p, s in zip(size, kernel_size, dilation, padding, stride, strict=True)
    ]
