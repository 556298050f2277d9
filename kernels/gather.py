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

from fastnn.kernels._config import tunable
from fastnn.kernels._launch import kernel
from fastnn.kernels._sizes import cdiv, next_power_of_2

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
# Rows are counted by at most four axes: z, the outermost, then c, b and a. An axis has `_out`
# places in the padded tensor and `_size` in the other; what is read are elements `_step` apart.
# Steps and columns come in units, so that the compiler sees what they divide by. 32 bits index all
# of it: a tensor that spans more is not for these kernels.


@triton.jit
def _read(o, before, size, step, MAP: tl.constexpr):
    """The offset of what o reads, and whether it lies in the source."""
    i = MAP(o - before, size)
    return i * step, (i >= 0) & (i < size)


@kernel(
    do_not_specialize=[
        "rows", "col_tiles", "z_before", "z_size", "z_step", "c_out", "c_before", "c_size",
        "c_step", "b_out", "b_before", "b_size", "b_step", "a_out", "a_before", "a_size", "a_step",
        "cols", "w_before", "w_size", "inner_step",
    ]
)  # fmt: skip
def _gather_fwd_kernel(
    X, Y, fill, rows, col_tiles, z_before, z_size, z_step,
    c_out, c_before, c_size, c_step, b_out, b_before, b_size, b_step,
    a_out, a_before, a_size, a_step, cols, w_before, w_size, w_step, inner_step,
    MAP: tl.constexpr, RANK: tl.constexpr, SPLIT: tl.constexpr, UNIT: tl.constexpr,
    STORE_UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program copies a tile of ROWS rows by COLS columns of y, or writes `fill` there.

    X: the source, read through strides. Y: the result, dense, its rows are contiguous.
    """
    pid = tl.program_id(0)
    row = pid // col_tiles * ROWS + tl.arange(0, ROWS)
    col = pid % col_tiles * COLS + tl.arange(0, COLS)
    cols = cols * STORE_UNIT
    o = row
    at = tl.zeros((ROWS,), tl.int32)
    there = row < rows
    if RANK > 1:
        step, inside = _read(o % a_out, a_before, a_size, a_step * UNIT, MAP)
        o = o // a_out
        at += step
        there = there & inside
    if RANK > 2:
        step, inside = _read(o % b_out, b_before, b_size, b_step * UNIT, MAP)
        o = o // b_out
        at += step
        there = there & inside
    if RANK > 3:
        step, inside = _read(o % c_out, c_before, c_size, c_step * UNIT, MAP)
        o = o // c_out
        at += step
        there = there & inside
    if RANK > 0:
        step, inside = _read(o, z_before, z_size, z_step * UNIT, MAP)
        at += step
        there = there & inside
    i = MAP(col // SPLIT - w_before * UNIT, w_size * UNIT)
    there = there[:, None] & ((i >= 0) & (i < w_size * UNIT))[None, :]
    along = i * w_step
    if SPLIT > 1:
        along += col % SPLIT * inner_step
    there = there & (col < cols)[None, :]
    x = tl.load(X + at[:, None] + along[None, :], mask=there, other=fill)
    to = row[:, None] * cols + col[None, :]
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    tl.store(Y + to, x.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _from(i, t, out, size, before, step, FROM: tl.constexpr):
    """The offset of candidate t of place i in the gradient, and whether there is one."""
    o, there = FROM(i, t, size, before)
    return o * step, there & (o >= 0) & (o < out)


@kernel(
    do_not_specialize=[
        "rows", "col_tiles", "z_out", "z_before", "z_size", "z_step", "z_from", "c_out",
        "c_before", "c_size", "c_step", "c_from", "b_out", "b_before", "b_size", "b_step",
        "b_from", "a_out", "a_before", "a_size", "a_step", "a_from", "cols", "w_out", "w_before",
        "w_from", "inner_step",
    ]
)  # fmt: skip
def _gather_bwd_kernel(
    DY, DX, rows, col_tiles, z_out, z_before, z_size, z_step, z_from,
    c_out, c_before, c_size, c_step, c_from,
    b_out, b_before, b_size, b_step, b_from,
    a_out, a_before, a_size, a_step, a_from,
    cols, w_out, w_before, w_step, w_from, inner_step,
    FROM: tl.constexpr, RANK: tl.constexpr, SPLIT: tl.constexpr, UNIT: tl.constexpr,
    STORE_UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program computes a tile of ROWS by COLS of dx, and loops over the candidates of its places.

    DY: the gradient, read through strides. DX: the result, dense, its rows are contiguous.
    """
    pid = tl.program_id(0)
    row = pid // col_tiles * ROWS + tl.arange(0, ROWS)
    col = pid % col_tiles * COLS + tl.arange(0, COLS)
    cols = cols * STORE_UNIT
    z = row
    a, b, c = row, row, row
    if RANK > 1:
        a = z % a_size
        z = z // a_size
    if RANK > 2:
        b = z % b_size
        z = z // b_size
    if RANK > 3:
        c = z % c_size
        z = z // c_size
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for u in range(w_from):
        w, of_w = FROM(col // SPLIT, u, cols // SPLIT, w_before * UNIT)
        of_w = of_w & (w >= 0) & (w < w_out * UNIT) & (col < cols)
        along = w * w_step
        if SPLIT > 1:
            along += col % SPLIT * inner_step
        # Only the tiles at a border have places with more than one candidate.
        if tl.max(of_w.to(tl.int32), 0) > 0:
            for q in range(z_from * c_from * b_from * a_from):
                at = tl.zeros((ROWS,), tl.int32)
                there = row < rows
                t = q
                if RANK > 1:
                    step, some = _from(a, t % a_from, a_out, a_size, a_before, a_step * UNIT, FROM)
                    t = t // a_from
                    at += step
                    there = there & some
                if RANK > 2:
                    step, some = _from(b, t % b_from, b_out, b_size, b_before, b_step * UNIT, FROM)
                    t = t // b_from
                    at += step
                    there = there & some
                if RANK > 3:
                    step, some = _from(c, t % c_from, c_out, c_size, c_before, c_step * UNIT, FROM)
                    t = t // c_from
                    at += step
                    there = there & some
                if RANK > 0:
                    step, some = _from(z, t, z_out, z_size, z_before, z_step * UNIT, FROM)
                    at += step
                    there = there & some
                mask = there[:, None] & of_w[None, :]
                dy = tl.load(DY + at[:, None] + along[None, :], mask=mask, other=0.0)
                acc += dy.to(tl.float32)
    to = row[:, None] * cols + col[None, :]
    within = (row < rows)[:, None] & (col < cols)[None, :]
    tl.store(DX + to, acc.to(DX.dtype.element_ty), mask=within)


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
    # A sum over candidates takes more registers, so a thread has two places.
    config = _config(cols, 512, 8) if backward and unit == 1 else _config(cols)
    count = math.prod(map(along, rows))
    col_tiles = cdiv(cols, config["COLS"])
    grid = (cdiv(count, config["ROWS"]) * col_tiles,)
    # z, the outermost, then c, b and a, of which the outer ones are missing if there are fewer.
    nothing = _Axis(1, 1, 0)
    z, *inner_rows = rows or [nothing]
    others = [nothing] * (3 - len(inner_rows)) + inner_rows
    tile = {"RANK": len(rows), "SPLIT": inner.out, "UNIT": unit, "STORE_UNIT": store_unit}
    if backward:
        sizes = [
            size
            for a in (z, *others)
            for size in (a.out, a.before, a.size, a.step // unit, _candidates(mode, a))
        ]
        _gather_bwd_kernel(
            grid, source, result, count, col_tiles, *sizes, cols // store_unit, w.out // unit,
            w.before // unit, w.step, _candidates(mode, w), inner.step,
            FROM=globals()[f"{mode}_from"], **tile, **config,
        )  # fmt: skip
    else:
        sizes = [size for a in others for size in (a.out, a.before, a.size, a.step // unit)]
        _gather_fwd_kernel(
            grid, source, result, fill, count, col_tiles, z.before, z.size, z.step // unit, *sizes,
            cols // store_unit, w.before // unit, w.size // unit, w.step, inner.step,
            MAP=globals()[mode], **tile, **config,
        )  # fmt: skip
    return True


def empty_in_layout(shape, like, dtype, channels_last):
    """Uninitialised, dense, and the order of its dimensions in memory."""
    dims = len(shape)
    if not channels_last:
        return like.new_empty(shape, dtype=dtype), range(dims)
    layout = torch.channels_last if dims == 4 else torch.channels_last_3d
    empty = torch.empty(shape, dtype=dtype, device=like.device, memory_format=layout)
    return empty, (0, *range(2, dims), 1)


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
