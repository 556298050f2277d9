"""Interpolation of (N, C, *), separable: each dimension has a few taps, whose weights multiply.

    y[o] = sum over the taps of w_d w_h w_w x[i_d, i_h, i_w]
    dx[i] = sum over the outputs o that have i among their taps, of the same weights times dy[o]

Memory-bound. Elements moved, if x has E and y has F of them:
    forward    E + F
    backward   E + F. Except in mode nearest, PyTorch fills dx with zeros and adds to it with
               atomics: 3E + F
Under autocast PyTorch copies x of 16 bits to fp32 first, and dx back: 6E + 6E bytes more.

Where an output looks is a constexpr function of its place, in fp32 as in ATen. The backward is a
gather: the first output that a place has a weight in follows from the inverse of that function,
corrected until it is exact, and a fixed number of outputs from there on are tried, in order. As in
kernels/gather.py, the result is walked in the order of its storage, and the source read by strides.
"""

import ctypes
import math

import triton
import triton.language as tl

from fastnn.kernels import upsampling_cells
from fastnn.kernels._config import tunable
from fastnn.kernels._launch import kernel
from fastnn.kernels._sizes import cdiv
from fastnn.kernels._tl import empty_in_layout
from fastnn.kernels.gather import _config, near

# ---- where an output looks ----------------------------------------------------------------------
#
# `*_at(o, scale, size, ALIGN)` gives the place in the source at which output o looks, and how far
# beyond it; `*_tap(i, beyond, t, size)` then gives the place of tap t, and its weight. Places never
# fall as o or t grow.


@triton.jit
def _source(o, scale, ALIGN: tl.constexpr):
    o = o.to(tl.float32)
    return scale * o if ALIGN else scale * (o + 0.5) - 0.5


@triton.jit
def nearest_at(o, scale, size, ALIGN: tl.constexpr):
    i = tl.floor(o.to(tl.float32) * scale).to(tl.int32)
    return tl.minimum(i, size - 1), tl.full(o.shape, 1.0, tl.float32)


@triton.jit
def nearest_exact_at(o, scale, size, ALIGN: tl.constexpr):
    i = tl.floor((o.to(tl.float32) + 0.5) * scale).to(tl.int32)
    return tl.minimum(i, size - 1), tl.full(o.shape, 1.0, tl.float32)


@triton.jit
def nearest_tap(i, one, t, size):
    return i, one


@triton.jit
def linear_at(o, scale, size, ALIGN: tl.constexpr):
    x = tl.maximum(_source(o, scale, ALIGN), 0.0)
    i = tl.minimum(x.to(tl.int32), size - 1)
    return i, x - i.to(tl.float32)


@triton.jit
def linear_tap(i, beyond, t, size):
    return tl.minimum(i + t, size - 1), tl.where(t == 0, 1.0 - beyond, beyond)


@triton.jit
def cubic_at(o, scale, size, ALIGN: tl.constexpr):
    x = _source(o, scale, ALIGN)
    i = tl.floor(x)
    return i.to(tl.int32), x - i


@triton.jit
def cubic_tap(i, beyond, t, size):
    x = tl.abs(beyond + 1.0 - t)  # from this tap; A = -0.75
    inner = (1.25 * x - 2.25) * x * x + 1.0
    outer = ((-0.75 * x + 3.75) * x - 6.0) * x + 3.0
    place = tl.minimum(tl.maximum(i - 1 + t, 0), size - 1)
    return place, tl.where((t == 0) | (t == 3), outer, inner)


# ---- kernels ------------------------------------------------------------------------------------
#
# Rows are counted by N, C and up to three dimensions c, b and a; columns are the last dimension of
# all, or with LAST the channels. An axis has `_out` places in y and `_size` in x; what is read are
# elements `_step` apart. 32 bits index all of it.


@kernel(
    do_not_specialize=[
        "rows", "col_tiles", "C", "n_step", "z_step", "c_out", "c_size", "c_step",
        "b_out", "b_size", "b_step", "a_out", "a_size", "a_step", "cols", "w_size",
    ]
)  # fmt: skip
def _interpolate_fwd_kernel(
    X, Y, rows, col_tiles, C, n_step, z_step, c_out, c_size, c_step, c_scale,
    b_out, b_size, b_step, b_scale, a_out, a_size, a_step, a_scale, cols, w_size, w_step, w_scale,
    AT: tl.constexpr, TAP: tl.constexpr, TAPS: tl.constexpr, ALIGN: tl.constexpr,
    RANK: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr, STORE_UNIT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program computes a tile of ROWS by COLS of y: a sum over the taps of each dimension.

    X: the source, read through strides. Y: the result, dense, its rows are contiguous.
    """
    pid = tl.program_id(0)
    row = pid // col_tiles * ROWS + tl.arange(0, ROWS)
    col = pid % col_tiles * COLS + tl.arange(0, COLS)
    cols = cols * STORE_UNIT
    one = tl.full((ROWS,), 1.0, tl.float32)
    z = row
    a, b, c, w = row, row, row, col  # where the outputs look
    beyond_a, beyond_b, beyond_c, beyond_w = one, one, one, tl.full((COLS,), 1.0, tl.float32)
    if RANK > 0:
        a, beyond_a = AT(z % a_out, a_scale, a_size, ALIGN)
        z = z // a_out
    if RANK > 1:
        b, beyond_b = AT(z % b_out, b_scale, b_size, ALIGN)
        z = z // b_out
    if RANK > 2:
        c, beyond_c = AT(z % c_out, c_scale, c_size, ALIGN)
        z = z // c_out
    if not LAST:
        w, beyond_w = AT(col, w_scale, w_size, ALIGN)
    base = (z // C * n_step + z % C * z_step) * UNIT
    there = (row < rows)[:, None] & (col < cols)[None, :]
    # The first terms are not added to 0.0, because the sum of -0.0 and 0.0 is 0.0.
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for tc in tl.static_range(TAPS if RANK > 2 else 1):
        at_c, w_c = base, one
        if RANK > 2:
            i, w_c = TAP(c, beyond_c, tc, c_size)
            at_c = base + i * (c_step * UNIT)
        for tb in tl.static_range(TAPS if RANK > 1 else 1):
            at_b, w_b = at_c, w_c
            if RANK > 1:
                i, w_b = TAP(b, beyond_b, tb, b_size)
                at_b = at_c + i * (b_step * UNIT)
                w_b = w_b * w_c
            for ta in tl.static_range(TAPS if RANK > 0 else 1):
                at_a, w_a = at_b, w_b
                if RANK > 0:
                    i, w_a = TAP(a, beyond_a, ta, a_size)
                    at_a = at_b + i * (a_step * UNIT)
                    w_a = w_a * w_b
                if LAST:
                    to = at_a[:, None] + (col * w_step)[None, :]
                    along = tl.load(X + to, mask=there, other=0.0).to(tl.float32)
                else:
                    along = tl.zeros((ROWS, COLS), tl.float32)
                    for tw in tl.static_range(TAPS):
                        i, weight = TAP(w, beyond_w, tw, w_size)
                        to = at_a[:, None] + (i * w_step)[None, :]
                        x = tl.load(X + to, mask=there, other=0.0).to(tl.float32)
                        if tw == 0:
                            along = weight[None, :] * x
                        else:
                            along += weight[None, :] * x
                if tc + tb + ta == 0:
                    acc = w_a[:, None] * along
                else:
                    acc += w_a[:, None] * along
    to = row[:, None] * cols + col[None, :]
    tl.store(Y + to, acc.to(Y.dtype.element_ty), mask=there)


@triton.jit
def _touch(
    i, o, out, scale, size,
    AT: tl.constexpr, TAP: tl.constexpr, TAPS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The weight that place i has in output o, whether that gives it a part in the gradient, and
    the last place that has one."""
    look, beyond = AT(o, scale, size, ALIGN)
    weight = tl.zeros(i.shape, tl.float32)
    for t in tl.static_range(TAPS):
        place, w = TAP(look, beyond, t, size)
        weight += tl.where(place == i, w, 0.0)
    return weight, (weight != 0.0) & (o < out), place


@triton.jit
def _first(
    i, inverse, shift, half, scale, size,
    AT: tl.constexpr, TAP: tl.constexpr, TAPS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The first output in which place i has a weight."""
    o = tl.ceil((i.to(tl.float32) + shift) * inverse - half).to(tl.int32) - 1
    o = tl.maximum(o, 0)
    for _ in tl.static_range(2):  # rounding moves it by no more than one
        weight, _h, last = _touch(i, o, o, scale, size, AT, TAP, TAPS, ALIGN)
        o += tl.where((last < i) | ((last == i) & (weight == 0.0)), 1, 0)
    return o


@kernel(
    do_not_specialize=[
        "rows", "col_tiles", "C", "n_step", "z_step", "c_out", "c_size", "c_step", "c_from",
        "b_out", "b_size", "b_step", "b_from", "a_out", "a_size", "a_step", "a_from",
        "cols", "w_out", "w_from",
    ]
)  # fmt: skip
def _interpolate_bwd_kernel(
    DY, DX, rows, col_tiles, C, n_step, z_step, c_out, c_size, c_step, c_scale, c_inverse, c_from,
    b_out, b_size, b_step, b_scale, b_inverse, b_from,
    a_out, a_size, a_step, a_scale, a_inverse, a_from,
    cols, w_out, w_step, w_scale, w_inverse, w_from, shift, half,
    AT: tl.constexpr, TAP: tl.constexpr, TAPS: tl.constexpr, ALIGN: tl.constexpr,
    RANK: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr, STORE_UNIT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program computes a tile of ROWS by COLS of dx, and loops over the outputs of its places.

    DY: the gradient, read through strides. DX: the result, dense, its rows are contiguous.
    """
    pid = tl.program_id(0)
    row = pid // col_tiles * ROWS + tl.arange(0, ROWS)
    col = pid % col_tiles * COLS + tl.arange(0, COLS)
    cols = cols * STORE_UNIT
    z, a, b, c = row, row, row, row
    first_a, first_b, first_c, first_w = row, row, row, col
    if RANK > 0:
        a = z % a_size
        z = z // a_size
        first_a = _first(a, a_inverse, shift, half, a_scale, a_size, AT, TAP, TAPS, ALIGN)
    if RANK > 1:
        b = z % b_size
        z = z // b_size
        first_b = _first(b, b_inverse, shift, half, b_scale, b_size, AT, TAP, TAPS, ALIGN)
    if RANK > 2:
        c = z % c_size
        z = z // c_size
        first_c = _first(c, c_inverse, shift, half, c_scale, c_size, AT, TAP, TAPS, ALIGN)
    base = (z // C * n_step + z % C * z_step) * UNIT
    if not LAST:
        first_w = _first(col, w_inverse, shift, half, w_scale, cols, AT, TAP, TAPS, ALIGN)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for tw in range(w_from):
        along, w_w, of_w = col * w_step, tl.full((COLS,), 1.0, tl.float32), col < cols
        if not LAST:
            o_w = first_w + tw
            w_w, hit_w, _w = _touch(col, o_w, w_out, w_scale, cols, AT, TAP, TAPS, ALIGN)
            along, of_w = o_w * w_step, of_w & hit_w
        for q in range(c_from * b_from * a_from):
            at, weight, of_row = base, tl.full((ROWS,), 1.0, tl.float32), row < rows
            if RANK > 0:
                o_a = first_a + q % a_from
                w_a, hit_a, _a = _touch(a, o_a, a_out, a_scale, a_size, AT, TAP, TAPS, ALIGN)
                at, weight, of_row = at + o_a * (a_step * UNIT), weight * w_a, of_row & hit_a
            if RANK > 1:
                o_b = first_b + q // a_from % b_from
                w_b, hit_b, _b = _touch(b, o_b, b_out, b_scale, b_size, AT, TAP, TAPS, ALIGN)
                at, weight, of_row = at + o_b * (b_step * UNIT), weight * w_b, of_row & hit_b
            if RANK > 2:
                o_c = first_c + q // a_from // b_from
                w_c, hit_c, _c = _touch(c, o_c, c_out, c_scale, c_size, AT, TAP, TAPS, ALIGN)
                at, weight, of_row = at + o_c * (c_step * UNIT), weight * w_c, of_row & hit_c
            mask = of_row[:, None] & of_w[None, :]
            dy = tl.load(DY + at[:, None] + along[None, :], mask=mask, other=0.0).to(tl.float32)
            acc += weight[:, None] * w_w[None, :] * dy
    to = row[:, None] * cols + col[None, :]
    within = (row < rows)[:, None] & (col < cols)[None, :]
    tl.store(DX + to, acc.to(DX.dtype.element_ty), mask=within)


# ---- launchers ----------------------------------------------------------------------------------

TAPS = {"nearest": 1, "nearest_exact": 1, "linear": 2, "cubic": 4}


def _float32(value):
    return ctypes.c_float(value).value


def scale(size, out, factor, mode, align):
    """From places of an output to places of the source, as ATen computes it in fp32."""
    if align and mode in ("linear", "cubic"):
        return _float32((size - 1) / (out - 1)) if out > 1 else 0.0
    return _float32(1.0 / factor) if factor is not None and factor > 0 else _float32(size / out)


def _touched(mode, scale, out):
    """In how many outputs a place has a weight, at most."""
    if not scale:
        return out
    length = max(1, TAPS[mode]) / scale
    if math.frexp(scale)[0] == 0.5:  # no rounding
        return min(out, max(1, math.ceil(length)))
    return min(out, math.floor(length + 0.05) + 1)


def _launch(launched, source, result, order, mode, align, axes, tail=()):
    """`axes` is, for each dimension but the first two, what the kernel takes of it: its size in y
    and in x, the step that it is read by, and the numbers after that."""
    last = order[-1] == 1
    *rows, w = (*axes, None) if last else axes
    cols = result.shape[order[-1]]
    steps = source.stride()
    read = steps[order[-1]]
    wide = last and read == 1
    unit = math.gcd(cols, *(s for d, s in enumerate(steps) if d != 1), 8) if wide else 1
    store_unit = math.gcd(cols, 8)
    backward = bool(tail)
    config = _tile(cols, 4 if not wide and (backward or TAPS[mode] == 4) else 8)
    count, col_tiles = result.numel() // cols, cdiv(cols, config["COLS"])
    none = (1.0, 1.0, 1) if backward else (1.0,)  # of a dimension that is not there
    tap = globals()["nearest_tap" if TAPS[mode] == 1 else f"{mode}_tap"]
    sizes = [
        value
        for out, n, step, *rest in (*[(1, 1, 0, *none)] * (3 - len(rows)), *rows)
        for value in (out, n, step // unit, *rest)
    ]
    along = (1, read, *none) if last else (w[0] if backward else w[1], read, *w[3:])
    launched(
        (cdiv(count, config["ROWS"]) * col_tiles,), source, result, count, col_tiles,
        1 if last else result.shape[1], steps[0] // unit, 0 if last else steps[1], *sizes,
        cols // store_unit, *along, *tail, AT=globals()[f"{mode}_at"], TAP=tap, TAPS=TAPS[mode],
        ALIGN=align, RANK=len(rows), LAST=last, UNIT=unit, STORE_UNIT=store_unit, **config,
    )  # fmt: skip


@tunable("ROWS")
def _tile(cols, per_thread):
    """As that of gathers; fewer elements per thread where offsets and weights take registers."""
    return {**_config(cols), "num_warps": 32 // per_thread}


def fwd(x, size, mode, align, scales, dtype, channels_last):
    """x (N, C, *) of any strides -> y (N, C, *size), dense."""
    x = near(x)
    if upsampling_cells.doubles(x.shape[2:], size, mode, align, scales):
        return upsampling_cells.fwd(x, size, mode, dtype, channels_last)
    y, order = empty_in_layout((*x.shape[:2], *size), x, dtype, channels_last)
    if y.numel():
        axes = list(zip(size, x.shape[2:], x.stride()[2:], scales, strict=True))
        _launch(_interpolate_fwd_kernel, x, y, order, mode, align, axes)
    return y


def bwd(dy, size, mode, align, scales, dtype, channels_last):
    """dy (N, C, *) of any strides -> dx (N, C, *size), dense."""
    dy = near(dy)
    if upsampling_cells.doubles(size, dy.shape[2:], mode, align, scales):
        return upsampling_cells.bwd(dy, size, mode, dtype, channels_last)
    dx, order = empty_in_layout((*dy.shape[:2], *size), dy, dtype, channels_last)
    if dx.numel():
        axes = [
            (out, n, step, s, 1.0 / s if s else 0.0, _touched(mode, s, out))
            for out, n, step, s in zip(dy.shape[2:], size, dy.stride()[2:], scales, strict=True)
        ]
        half = 0.5 if mode == "nearest_exact" or (TAPS[mode] > 1 and not align) else 0.0
        shift = -TAPS[mode] / 2 + half if TAPS[mode] > 1 else 0.0
        _launch(_interpolate_bwd_kernel, dy, dx, order, mode, align, axes, (shift, half))
    return dx
