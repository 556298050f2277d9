"""Pooling: one kernel per direction. The window and the reduction are constexpr functions.

    y[o]  = finish(reduce(x[i] for i in the window of o))
    dx[i] = sum over the o whose window has i, of what o sends back to i

A window is a product of one to three intervals. `regular` (stride, padding, dilation), `adaptive`
and `fractional` give the interval of an output position along one axis; `<window>_first` gives the
first output position whose window may have the element i. 1-D, 2-D and 3-D pooling all walk over
(N, C, D, H, W); axes that do not exist have size 1. The lanes of a program lie along W, or along C
if the tensor is channels last. Every tensor is read by its strides. The sum of the backward has a
fixed order, so equal inputs give equal bits.

Memory-bound. Bytes for each window of K elements, in 16 bits, if windows do not overlap:
    max, stock   x 2K, y 2, index 8; backward dy 2, index 8, zeros 2K, dx 2K      6K + 20
    max, here    x 2K, y 2, place 1; backward dy 2, place 1, dx 2K                4K + 6
    mean         x 2K, y 2; backward dy 2, dx 2K, as stock                        4K + 4
    power        x 2K, y 2; backward dy 2, x 2K, dx 2K                            6K + 4
The slope of a power mean is a factor in fp32. If windows overlap, the forward writes it and the
backward reads it, 8 bytes more; else the backward computes it again, from the x that it reads.
The place of a maximum is its number among the elements of its window, in the narrowest integer that
holds it. It is not written if no gradient is wanted. CUDA's backward of max pooling fills dx with
zeros before its kernel.

Comparisons are those of ATen: the first of equal values is the maximum, and so is the last nan.
"""

import functools
import math
import typing

import torch
import triton
import triton.language as tl

from fastnn.kernels._config import tunable
from fastnn.kernels._launch import kernel
from fastnn.kernels._libdevice import power
from fastnn.kernels._sizes import cdiv, next_power_of_2
from fastnn.kernels.pooling_cells import (
    _cells_bwd_kernel,
    _cells_fwd_kernel,
    counted,
    inner_offset,
)

# ---- windows along one axis ---------------------------------------------------------------------
#
# (o, I, O, k, s, p, d, u, ROUND) -> start, end of the window of output position o (of O positions)
# in an axis of I elements. k, s, p, d are size, stride, padding and dilation of the window; u is
# the sample that shifts fractional windows. The start may lie before the axis; end is at most I.


@triton.jit
def regular(o, I, O, k, s, p, d, u, ROUND: tl.constexpr):  # noqa: E741
    start = o * s - p
    return start, tl.minimum(start + (k - 1) * d + 1, I)


@triton.jit
def adaptive(o, I, O, k, s, p, d, u, ROUND: tl.constexpr):  # noqa: E741
    return o * I // O, ((o + 1) * I + O - 1) // O


@triton.jit
def _rounded(x, ROUND: tl.constexpr):
    """x as arithmetic in the dtype ROUND rounds it."""
    if ROUND is not None:
        x = x.to(ROUND).to(tl.float32)
    return x


@triton.jit
def _step(I, O, k, ROUND: tl.constexpr):  # noqa: E741
    apart = _rounded((I - k).to(tl.float32), ROUND)
    return _rounded(tl.div_rn(apart, _rounded(tl.maximum(O - 1, 1).to(tl.float32), ROUND)), ROUND)


@triton.jit
def fractional(o, I, O, k, s, p, d, u, ROUND: tl.constexpr):  # noqa: E741
    step = _step(I, O, k, ROUND)
    moved = _rounded(_rounded(o.to(tl.float32), ROUND) + u, ROUND)
    start = _rounded(moved * step, ROUND).to(tl.int32) - _rounded(u * step, ROUND).to(tl.int32)
    start = tl.where(o == O - 1, I - k, start)
    # Samples outside [0, 1] lead to windows outside the axis; nothing there may be read.
    start = tl.minimum(tl.maximum(start, 0), I - k)
    return start, start + k


# The same arguments, but i, the position of an element -> the least o whose window may have i.


@triton.jit
def regular_first(i, I, O, k, s, p, d, u, ROUND: tl.constexpr):  # noqa: E741
    return tl.maximum(i + p - (k - 1) * d + s - 1, 0) // s


@triton.jit
def adaptive_first(i, I, O, k, s, p, d, u, ROUND: tl.constexpr):  # noqa: E741
    return i * O // I


@triton.jit
def fractional_first(i, I, O, k, s, p, d, u, ROUND: tl.constexpr):  # noqa: E741
    # Ends grow with o, in any arithmetic, so a binary search counts the windows that end before i.
    first = tl.where(u == u, i, i) * 0  # in the shape that a sample for each row gives it
    bit = 1
    while bit * 2 <= O:
        bit = bit * 2
    while bit > 0:
        there = first + bit
        _, end = fractional(tl.minimum(there, O) - 1, I, O, k, s, p, d, u, ROUND)
        first = tl.where((there <= O) & (end <= i), there, first)
        bit = bit // 2
    return first


# ---- reductions ---------------------------------------------------------------------------------
#
# reduce: (acc, at, v, t, ok, p) -> acc, at after the value v of element number t of the window.
# finish: (acc, count, taps, p) -> y, and the factor of dy in the gradients of a power mean. `count`
# is the divisor of a mean; `taps` is the number of elements of a window that no border clips.
# send: (sum of what windows send back, x, p) -> dx.


@triton.jit
def maximum(acc, at, v, t, ok, p):
    take = (v > acc) | (v != v)
    return tl.where(take, v, acc), tl.where(take, t, at)


@triton.jit
def largest(acc, at, v, t, ok, p):
    return maximum(acc, at, tl.where(ok, tl.abs(v), v), t, ok, p)


@triton.jit
def smallest(acc, at, v, t, ok, p):
    return maximum(acc, at, tl.where(ok, -tl.abs(v), v), t, ok, p)


@triton.jit
def total(acc, at, v, t, ok, p):
    return acc + v, at


@triton.jit
def squares(acc, at, v, t, ok, p):
    return acc + v * v, at


@triton.jit
def powers(acc, at, v, t, ok, p):
    return acc + tl.where(ok, power(v, p), 0.0), at


@triton.jit
def itself(acc, count, taps, p):
    return acc, acc


@triton.jit
def negated(acc, count, taps, p):
    return -acc, acc


@triton.jit
def mean(acc, count, taps, p):
    return tl.div_rn(acc, count), acc


@triton.jit
def square_root(acc, count, taps, p):
    share = tl.div_rn(taps, count)  # above 1 if the border clips the window
    y = tl.sqrt_rn(acc * share)
    return y, tl.where(y == 0, 0.0, tl.div_rn(share, y))


@triton.jit
def root(acc, count, taps, p):
    share = tl.div_rn(taps, count)
    b = acc * share
    inverse = 1.0 / p
    y = power(b, inverse)
    return y, tl.where(b == 0, 0.0, power(b, inverse - 1.0) * share)


@triton.jit
def straight(g, x, p):
    return g


@triton.jit
def by_sign(g, x, p):
    return tl.where(x > 0, g, tl.where(x < 0, -g, 0.0 * g))  # for ATen, the sign of nan is 0, too


@triton.jit
def by_value(g, x, p):
    return g * x


@triton.jit
def by_power(g, x, p):
    return g * power(x, p - 1.0)


# The value that a reduction starts from; its functions; whether the gradient reads x.
REDUCTIONS = {
    "max": (-math.inf, maximum, itself, straight, False),
    "max_abs": (-math.inf, largest, itself, by_sign, True),
    "min_abs": (-math.inf, smallest, negated, by_sign, True),
    "mean": (0.0, total, mean, straight, False),
    "square": (0.0, squares, square_root, by_value, True),
    "power": (0.0, powers, root, by_power, True),
}
WINDOWS = {
    "regular": (regular, regular_first),
    "adaptive": (adaptive, adaptive_first),
    "fractional": (fractional, fractional_first),
}

# ---- kernels ------------------------------------------------------------------------------------

_WINDOW = ["kd", "kh", "kw", "sd", "sh", "sw", "pd", "ph", "pw", "dd", "dh", "dw"]
_SIZES = ["C", "D", "H", "W", "OD", "OH", "OW", "rows", "inner_units", *_WINDOW, "divisor"]
_STRIDES = [f"{t}{d}" for t in "xyg" for d in "ncdhw"]


@triton.jit
def _tile(
    rows, inner, C, D, H, W, LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """The mask of the program, the mask of its rows, and n, c, d, h, w of its positions."""
    tiles = tl.cdiv(inner, BLOCK_I)
    r = tl.program_id(0) // tiles * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    i = tl.program_id(0) % tiles * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    there = r < rows
    mask = there & (i < inner)
    if LAST:
        c = i
        w = r % W
        r = r // W
    else:
        w = i
    h = r % H
    r = r // H
    d = r % D
    r = r // D
    if LAST:
        n = r
    else:
        c = r % C
        n = r // C
    if WIDE:
        n = n.to(tl.int64)
        c = c.to(tl.int64)
    return mask, there, n, c, d, h, w


@triton.jit
def _samples(U, n, c, C, there, d: tl.constexpr, DIMS: tl.constexpr):
    """The samples of axis d (2 is W). In 2-D the sample for W comes first, in 3-D last."""
    if U is None:
        u = 0.0
    elif d < 3 - DIMS:
        u = 0.0
    else:
        at = 2 - d if DIMS == 2 else d
        u = tl.load(U + (n * C + c) * DIMS + at, mask=there, other=0.0).to(tl.float32)
    return u


@triton.jit
def _planes(n, c, sn, sc, VEC: tl.constexpr, LAST: tl.constexpr):
    if n.dtype == tl.int64:  # 32 bits may not hold a stride
        sn = sn.to(tl.int64)
        sc = sc.to(tl.int64) if sc is not None else sc
    if LAST:
        at = n * (sn * VEC) + inner_offset(c, sc)
    else:
        at = n * (sn * VEC) + c * (sc * VEC)
    return at


@triton.jit
def _place(d, h, w, sd, sh, sw, VEC: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        d = d.to(tl.int64)
        h = h.to(tl.int64)
        w = w.to(tl.int64)
        sd = sd.to(tl.int64)
        sh = sh.to(tl.int64)
        sw = sw.to(tl.int64) if sw is not None else sw
    if LAST:
        at = d * (sd * VEC) + h * (sh * VEC) + w * (sw * VEC)
    else:
        at = d * (sd * VEC) + h * (sh * VEC) + inner_offset(w, sw)
    return at


@kernel(do_not_specialize=[*_SIZES, *_STRIDES[:10]])
def _pool_fwd_kernel(
    X, U, Y, AT, INDEX, SLOPE, C, D, H, W, OD, OH, OW, rows, inner_units,
    xn, xc, xd, xh, xw, yn, yc, yd, yh, yw,
    kd, kh, kw, sd, sh, sw, pd, ph, pw, dd, dh, dw, divisor, norm,
    WINDOW: tl.constexpr, REDUCE: tl.constexpr, FINISH: tl.constexpr, START: tl.constexpr,
    COUNT: tl.constexpr, DIMS: tl.constexpr, ROUND: tl.constexpr,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    LAST: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, X_VEC: tl.constexpr,
    Y_VEC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """A program has BLOCK_R by BLOCK_I output positions, and loops over the elements of a window.

    X (N, C, D, H, W): float, any strides. Y, AT (integers: places), SLOPE (fp32), INDEX (int64)
    (N, C, OD, OH, OW): the same strides. U (N, C, DIMS): float, contiguous, the samples of
    fractional windows. U, AT, SLOPE and INDEX may be None. KD, KH, KW are the window, if it is
    unrolled.
    """
    mask, there, n, c, od, oh, ow = _tile(
        rows, inner_units * UNIT, C, OD, OH, OW, LAST, WIDE, BLOCK_R, BLOCK_I
    )
    ud = _samples(U, n, c, C, there, 0, DIMS)
    uh = _samples(U, n, c, C, there, 1, DIMS)
    uw = _samples(U, n, c, C, there, 2, DIMS)
    start_d, end_d = WINDOW(od, D, OD, kd, sd, pd, dd, ud, ROUND)
    start_h, end_h = WINDOW(oh, H, OH, kh, sh, ph, dh, uh, ROUND)
    start_w, end_w = WINDOW(ow, W, OW, kw, sw, pw, dw, uw, ROUND)
    planes = X + _planes(n, c, xn, xc, X_VEC, LAST)
    # In a window that has only -inf, the first element inside the image is the maximum.
    at = (tl.maximum(-start_d, 0) + dd - 1) // dd
    at = at * kh + (tl.maximum(-start_h, 0) + dh - 1) // dh
    at = at * kw + (tl.maximum(-start_w, 0) + dw - 1) // dw
    at = tl.broadcast_to(at, (BLOCK_R, BLOCK_I))
    if KD is not None:
        acc = tl.full((BLOCK_R, BLOCK_I), START, tl.float32)
        for a in tl.static_range(KD):
            for b in tl.static_range(KH):
                for e in tl.static_range(KW):
                    i, j, k = start_d + a * dd, start_h + b * dh, start_w + e * dw
                    ok = (i >= 0) & (i < end_d) & (j >= 0) & (j < end_h)
                    ok = ok & (k >= 0) & (k < end_w) & mask
                    place = _place(i, j, k, xd, xh, xw, X_VEC, LAST, WIDE)
                    v = tl.load(planes + place, mask=ok, other=START).to(tl.float32)
                    acc, at = REDUCE(acc, at, v, (a * KH + b) * KW + e, ok, norm)
    else:
        # A float32 sum of so many elements, one after the other, would be less exact than stock.
        acc = tl.full((BLOCK_R, BLOCK_I), START, tl.float64 if START == 0 else tl.float32)
        for a in range(kd):
            for b in range(kh):
                for e in range(kw):
                    i, j, k = start_d + a * dd, start_h + b * dh, start_w + e * dw
                    ok = (i >= 0) & (i < end_d) & (j >= 0) & (j < end_h)
                    ok = ok & (k >= 0) & (k < end_w) & mask
                    place = _place(i, j, k, xd, xh, xw, X_VEC, LAST, WIDE)
                    v = tl.load(planes + place, mask=ok, other=START).to(tl.float32)
                    acc, at = REDUCE(acc, at, v, (a * kh + b) * kw + e, ok, norm)
        acc = acc.to(tl.float32)
    if divisor is None:
        count = counted(start_d, end_d, D, kd, pd, COUNT)
        count = count * counted(start_h, end_h, H, kh, ph, COUNT)
        count = count * counted(start_w, end_w, W, kw, pw, COUNT)
    else:
        count = divisor
    y, slope = FINISH(acc, count.to(tl.float32), (kd * kh * kw).to(tl.float32), norm)
    to = _planes(n, c, yn, yc, Y_VEC, LAST) + _place(od, oh, ow, yd, yh, yw, Y_VEC, LAST, WIDE)
    tl.store(Y + to, y.to(Y.dtype.element_ty), mask=mask)
    if AT is not None:
        tl.store(AT + to, at.to(AT.dtype.element_ty), mask=mask)
    if SLOPE is not None:
        tl.store(SLOPE + to, slope, mask=mask)
    if INDEX is not None:
        i = start_d + at // (kh * kw) * dd
        j = start_h + at // kw % kh * dh
        k = start_w + at % kw * dw
        if WIDE:
            i = i.to(tl.int64)
        tl.store(INDEX + to, ((i * H + j) * W + k).to(tl.int64), mask=mask)


@triton.jit
def _sent(
    DY, AT, SLOPE, g_planes, y_planes, i, j, k, od, oh, ow, ud, uh, uw, mask,
    D, H, W, OD, OH, OW, gd, gh, gw, yd, yh, yw,
    kd, kh, kw, sd, sh, sw, pd, ph, pw, dd, dh, dw, divisor,
    WINDOW: tl.constexpr, COUNT: tl.constexpr, ROUND: tl.constexpr, DILATED: tl.constexpr,
    LAST: tl.constexpr, WIDE: tl.constexpr, G_VEC: tl.constexpr, Y_VEC: tl.constexpr,
):  # fmt: skip
    """What the output positions (od, oh, ow) send to the elements (i, j, k)."""
    start_d, end_d = WINDOW(od, D, OD, kd, sd, pd, dd, ud, ROUND)
    start_h, end_h = WINDOW(oh, H, OH, kh, sh, ph, dh, uh, ROUND)
    start_w, end_w = WINDOW(ow, W, OW, kw, sw, pw, dw, uw, ROUND)
    a, b, e = i - start_d, j - start_h, k - start_w
    ok = (od < OD) & (a >= 0) & (i < end_d) & (oh < OH) & (b >= 0) & (j < end_h)
    ok = ok & (ow < OW) & (e >= 0) & (k < end_w) & mask
    if DILATED:
        ok = ok & (a % dd == 0) & (b % dh == 0) & (e % dw == 0)
        a = a // dd
        b = b // dh
        e = e // dw
    dy = DY + g_planes + _place(od, oh, ow, gd, gh, gw, G_VEC, LAST, WIDE)
    g = tl.load(dy, mask=ok, other=0.0).to(tl.float32)
    if AT is not None or SLOPE is not None:
        place = y_planes + _place(od, oh, ow, yd, yh, yw, Y_VEC, LAST, WIDE)
        if AT is not None:
            at = tl.load(AT + place, mask=ok, other=0).to(tl.int32)
            g = tl.where(at == (a * kh + b) * kw + e, g, 0.0)
        else:
            g = g * tl.load(SLOPE + place, mask=ok, other=0.0)
    elif divisor is not None:
        g = tl.div_rn(g, divisor.to(tl.float32))
    else:
        count = counted(start_d, end_d, D, kd, pd, COUNT)
        count = count * counted(start_h, end_h, H, kh, ph, COUNT)
        count = count * counted(start_w, end_w, W, kw, pw, COUNT)
        g = tl.where(ok, tl.div_rn(g, count.to(tl.float32)), 0.0)
    return g


@kernel(do_not_specialize=[*_SIZES, *_STRIDES, "zn", "zc", "zd", "zh", "zw", "md", "mh", "mw"])
def _pool_bwd_kernel(
    DY, AT, SLOPE, X, U, DX, C, D, H, W, OD, OH, OW, rows, inner_units,
    gn, gc, gd, gh, gw, yn, yc, yd, yh, yw, xn, xc, xd, xh, xw, zn, zc, zd, zh, zw,
    kd, kh, kw, sd, sh, sw, pd, ph, pw, dd, dh, dw, md, mh, mw, divisor, norm,
    WINDOW: tl.constexpr, FIRST: tl.constexpr, SEND: tl.constexpr,
    COUNT: tl.constexpr, DIMS: tl.constexpr, ROUND: tl.constexpr, DILATED: tl.constexpr,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    MD: tl.constexpr, MH: tl.constexpr, MW: tl.constexpr,
    LAST: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, G_VEC: tl.constexpr,
    Y_VEC: tl.constexpr, X_VEC: tl.constexpr, Z_VEC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """A program has BLOCK_R by BLOCK_I elements, and loops over the windows that may have them.

    DY (N, C, OD, OH, OW): float, any strides. AT, SLOPE, U: as the forward made or read them, or
    None. X, DX (N, C, D, H, W): float, any strides and dense; X is None if the gradient does not
    read it. MD, MH, MW: so many windows along an axis may share an element, if loops are unrolled.
    """
    if MD is not None:  # the compiler knows divisors, and how many windows share an element
        kd, kh, kw, sd, sh, sw = KD, KH, KW, SD, SH, SW
    mask, there, n, c, i, j, k = _tile(
        rows, inner_units * UNIT, C, D, H, W, LAST, WIDE, BLOCK_R, BLOCK_I
    )
    ud = _samples(U, n, c, C, there, 0, DIMS)
    uh = _samples(U, n, c, C, there, 1, DIMS)
    uw = _samples(U, n, c, C, there, 2, DIMS)
    od = FIRST(i, D, OD, kd, sd, pd, dd, ud, ROUND)
    oh = FIRST(j, H, OH, kh, sh, ph, dh, uh, ROUND)
    ow = FIRST(k, W, OW, kw, sw, pw, dw, uw, ROUND)
    g_planes = _planes(n, c, gn, gc, G_VEC, LAST)
    y_planes = _planes(n, c, yn, yc, Y_VEC, LAST)
    acc = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
    if MD is not None:
        for a in tl.static_range(MD):
            for b in tl.static_range(MH):
                for e in tl.static_range(MW):
                    acc += _sent(
                        DY, AT, SLOPE, g_planes, y_planes, i, j, k, od + a, oh + b, ow + e,
                        ud, uh, uw, mask, D, H, W, OD, OH, OW, gd, gh, gw, yd, yh, yw,
                        kd, kh, kw, sd, sh, sw, pd, ph, pw, dd, dh, dw, divisor,
                        WINDOW, COUNT, ROUND, DILATED, LAST, WIDE, G_VEC, Y_VEC,
                    )  # fmt: skip
    else:
        for a in range(md):
            for b in range(mh):
                for e in range(mw):
                    acc += _sent(
                        DY, AT, SLOPE, g_planes, y_planes, i, j, k, od + a, oh + b, ow + e,
                        ud, uh, uw, mask, D, H, W, OD, OH, OW, gd, gh, gw, yd, yh, yw,
                        kd, kh, kw, sd, sh, sw, pd, ph, pw, dd, dh, dw, divisor,
                        WINDOW, COUNT, ROUND, DILATED, LAST, WIDE, G_VEC, Y_VEC,
                    )  # fmt: skip
    if X is None:
        x = acc
    else:
        place = _planes(n, c, xn, xc, X_VEC, LAST) + _place(i, j, k, xd, xh, xw, X_VEC, LAST, WIDE)
        x = tl.load(X + place, mask=mask, other=0.0).to(tl.float32)
    dx = SEND(acc, x, norm)
    place = _planes(n, c, zn, zc, Z_VEC, LAST) + _place(i, j, k, zd, zh, zw, Z_VEC, LAST, WIDE)
    tl.store(DX + place, dx.to(DX.dtype.element_ty), mask=mask)


@triton.jit
def _cells(rows, length, BLOCK: tl.constexpr):
    """The plane of the program (64 bits), positions within the plane, and their mask."""
    tiles = tl.cdiv(length, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    at = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    return row, at, at < length


@triton.jit
def _strided(row, at, C, H, W, sn, sc, sd, sh, sw):
    """The offset of position `at` of a plane (D, H, W)."""
    d = (at // (H * W)).to(tl.int64)
    plane = row // C * sn + row % C * sc
    return plane + d * sd + (at // W % H).to(tl.int64) * sh + (at % W).to(tl.int64) * sw


_PLANES = ["rows", "length", "other", "C", *(f"{t}{d}" for t in "ab" for d in "hw")]
_PLANES += [f"{t}{d}" for t in "xy" for d in "ncdhw"]


@kernel(do_not_specialize=_PLANES)
def _unpool_place_kernel(
    INDEX, WINNER, rows, length, other, C, ah, aw, xn, xc, xd, xh, xw, BLOCK: tl.constexpr
):
    """A program has BLOCK positions of a plane, and writes itself where their indices point.

    INDEX (N, C, *): int64, any strides. WINNER (rows, other): int32, -1 before; afterwards the last
    position of a plane whose index points there.
    """
    row, at, mask = _cells(rows, length, BLOCK)
    to = tl.load(INDEX + _strided(row, at, C, ah, aw, xn, xc, xd, xh, xw), mask=mask, other=0)
    valid = (to >= 0) & (to < other)
    tl.device_assert(valid | ~mask, "max_unpool: index out of range")
    tl.atomic_max(WINNER + row * other + to, at, mask=mask & valid)  # integers: any order


@kernel(do_not_specialize=_PLANES)
def _unpool_fwd_kernel(
    X, WINNER, Y, rows, length, C, ah, aw, bh, bw, xn, xc, xd, xh, xw, yn, yc, yd, yh, yw,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program has BLOCK positions of a plane of the result.

    X (N, C, *), Y (N, C, *): float, any strides. WINNER: as `_unpool_place_kernel` made it.
    """
    row, at, mask = _cells(rows, length, BLOCK)
    winner = tl.load(WINNER + row * length + at, mask=mask, other=-1)
    x = X + _strided(row, tl.maximum(winner, 0), C, ah, aw, xn, xc, xd, xh, xw)
    y = tl.load(x, mask=winner >= 0, other=0.0)
    y = y.to(tl.float32).to(Y.dtype.element_ty)
    tl.store(Y + _strided(row, at, C, bh, bw, yn, yc, yd, yh, yw), y, mask=mask)


@kernel(do_not_specialize=[*_PLANES, "gn", "gc", "gd", "gh", "gw"])
def _unpool_bwd_kernel(
    DY, INDEX, DX, rows, length, other, C, ah, aw, bh, bw, xn, xc, xd, xh, xw, gn, gc, gd, gh, gw,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program has BLOCK positions of a plane of the input.

    DY, INDEX (N, C, *): float and int64, any strides. DX (N, C, *): contiguous.
    """
    row, at, mask = _cells(rows, length, BLOCK)
    to = tl.load(INDEX + _strided(row, at, C, ah, aw, xn, xc, xd, xh, xw), mask=mask, other=-1)
    valid = (to >= 0) & (to < other)
    dy = DY + _strided(row, tl.where(valid, to, 0).to(tl.int32), C, bh, bw, gn, gc, gd, gh, gw)
    g = tl.load(dy, mask=valid, other=0.0)
    tl.store(DX + row * length + at, g.to(tl.float32).to(DX.dtype.element_ty), mask=mask)


# ---- launchers ----------------------------------------------------------------------------------

_UNROLLED = 32  # loops over up to so many elements of a window, or windows of an element, unroll


class Pooling(typing.NamedTuple):
    """A kind of pooling. Tuples are along D, H, W; they have 1 for axes that do not exist."""

    reduction: str
    window: str
    dims: int
    out: tuple[int, int, int]
    k: tuple[int, int, int]
    s: tuple[int, int, int] = (1, 1, 1)
    p: tuple[int, int, int] = (0, 0, 0)
    d: tuple[int, int, int] = (1, 1, 1)
    last: bool = False  # whether the result is channels last
    by_size: bool = False  # whether k follows from the input's size; then k is not compiled in
    count_padding: bool = False
    divisor: int | None = None
    norm: float = 1.0

    @property
    def is_mean_of_planes(self):
        return self.reduction == "mean" and self.by_size and self.out == (1, 1, 1)


def _unit(*numbers):
    """The greatest common divisor of the numbers and 16."""
    return math.gcd(16, *numbers)


def _five(shape, stride, dims):
    """(N, C, D, H, W) and strides of a tensor that may lack N, D, H. Sizes of 1 have stride 0."""
    if len(shape) == dims + 1:
        shape, stride = (1, *shape), (0, *stride)
    missing = 3 - dims
    shape = (*shape[:2], *(1,) * missing, *shape[2:])
    stride = (*stride[:2], *(0,) * missing, *stride[2:])
    return shape, tuple(0 if n == 1 else s for n, s in zip(shape, stride, strict=True))


def _dense(shape, last):
    """The strides that ATen gives a new tensor (N, C, D, H, W)."""
    _, C, D, H, W = (max(n, 1) for n in shape)
    if last:
        return D * H * W * C, 1, H * W * C, W * C, C
    return C * D * H * W, D * H * W, H * W, W, 1


def _addressed(shape, stride, last):
    """Strides as a kernel takes them, in units, and the unit. An innermost stride of 1 is None."""
    stride = [0 if n == 1 else s for n, s in zip(shape, stride, strict=True)]
    at = 1 if last else 4
    inner = stride[at]
    unit = _unit(*stride[:at], *stride[at + 1 :]) if inner == 1 else 1
    taken = [s // unit for s in stride]
    taken[at] = None if inner == 1 or shape[at] == 1 else inner
    return tuple(taken), unit


def _wide(*tensors):
    """Whether 32 bits do not hold the offsets within one of the tensors, each (shape, strides)."""
    return any(
        sum((n - 1) * abs(s) for n, s in zip(shape, stride, strict=True)) >= 2**31
        for shape, stride in tensors
    )


@tunable("BLOCK_R", "BLOCK_I")
def _config(inner, last):
    # 8 elements per lane. If channels are last, a program has neighbouring positions, so that what
    # their windows share is read from the cache.
    block = min(next_power_of_2(inner), 64 if last else 128)
    return {"BLOCK_R": 1024 // block, "BLOCK_I": block, "num_warps": 4}


def _walk(shape, last, unrolled=True):
    """(rows, units in a row, unit, grid, tile) for the positions of (N, C, D, H, W)."""
    inner = shape[1] if last else shape[4]
    rows = math.prod(shape) // inner if inner else 0
    unit = _unit(inner)
    config = _config(inner, last)
    if not unrolled:  # 4 elements per lane; the loops need the registers
        config = {**config, "BLOCK_R": max(1, config["BLOCK_R"] // 2)}
    grid = (cdiv(rows, config["BLOCK_R"]) * cdiv(inner, config["BLOCK_I"]),)
    return rows, inner // unit, unit, grid, config


_SMALL = 4  # sizes of windows that follow from the input's size, up to which they are compiled in
_LONG = 2**20  # the second dimension of a grid has 65535 programs
_PHASES = 16  # elements of a cell, of which the backward holds sums


def in_cells(k, s, d, by_size=False):
    """Whether `kernels.pooling_cells` has windows k, strides s and dilations d.

    by_size: whether k follows from the input's size.
    """
    return (
        max(d) == 1
        and math.prod(k) <= _UNROLLED
        and (not by_size or max(k) <= _SMALL)
        and math.prod(s) <= _PHASES
    )


def _in_cells(spec, *innermost):
    """The same for a spec. innermost: sizes and strides of all tensors along the lanes."""
    return (
        spec.window == "regular"
        and in_cells(spec.k, spec.s, spec.d, spec.by_size)
        and all(n * max(abs(s), _SMALL) < 2**31 and n < _LONG for n, s in innermost)
    )


def _computed_again(spec):
    """Whether the backward in cells computes the factors of a power mean again, from the elements.

    It reads these anyway. Where windows overlap, other programs have some of them.
    """
    return spec.reduction in ("square", "power") and spec.k == spec.s and spec.p == (0, 0, 0)


@tunable("BLOCK_R", "BLOCK_I")
def _cells_config(inner, last):
    # Accesses of 16 bytes in 16 bits: 8 channels for each lane, or 4 cells of two elements.
    block = min(next_power_of_2(inner), 64 if last else 128)
    return {"BLOCK_R": (1024 if last else 512) // block, "BLOCK_I": block, "num_warps": 4}


def _cells_walk(shape, last):
    """(rows, grid, tile) for the cells (N, C, D, H, W)."""
    inner = shape[1] if last else shape[4]
    rows = math.prod(shape) // inner if inner else 0
    config = _cells_config(inner, last)
    return rows, (cdiv(rows, config["BLOCK_R"]), cdiv(inner, config["BLOCK_I"])), config


def _merges(C, *strides):
    """Whether planes of all tensors have one stride. `strides`: those of N and of C."""
    return all(n == C * c for n, c in strides)


class _Plan(typing.NamedTuple):
    """How a kernel runs on tensors of some layouts."""

    kernel: typing.Any
    shape: tuple[int, ...]  # of the tensor that the kernel makes
    strides: tuple[int, ...]
    grid: tuple[int, ...]
    args: tuple  # the kernel's arguments after the tensors
    meta: dict  # its constexprs


def _compiled_in(spec, sizes):
    """Windows, strides, padding, and whether windows pass the end of an axis, as constexprs."""
    axes = zip(sizes, spec.out, spec.k, spec.s, spec.p, strict=True)
    clips = tuple((o - 1) * s - p + k > size for size, o, k, s, p in axes)
    values = zip(("K", "S", "P", "CLIP_"), (spec.k, spec.s, spec.p, clips), strict=True)
    return {
        f"{name}{axis}": v for name, triple in values for axis, v in zip("DHW", triple, strict=True)
    }


@functools.lru_cache(maxsize=4096)
def _plan(shape, stride, spec, rounding):
    """How `fwd` runs on an x of this layout."""
    x_shape, x_stride = _five(shape, stride, spec.dims)
    y_shape = (*x_shape[:2], *spec.out)
    y_stride = _dense(y_shape, spec.last)
    last = x_stride[1] == 1 and x_stride[4] != 1 and spec.window != "fractional"
    lead = 2 if len(shape) > spec.dims + 1 else 1
    kept = [*range(2 - lead, 2), *range(5 - spec.dims, 5)]
    xs, x_unit = _addressed(x_shape, x_stride, last)
    ys, y_unit = _addressed(y_shape, y_stride, last)
    start, reduce, finish, _, _ = REDUCTIONS[spec.reduction]
    shape, strides = (tuple(of[a] for a in kept) for of in (y_shape, y_stride))
    # The second layout is that of the indices that ATen gives.
    wide = _wide((x_shape, x_stride), (x_shape, _dense(x_shape, False)), (y_shape, y_stride))
    at = 1 if last else 4
    # Sums over windows that follow from the input's size are of float64.
    small = not (spec.by_size and start == 0)
    if small and _in_cells(spec, (x_shape[at], x_stride[at]), (y_shape[at], y_stride[at])):
        rows, grid, config = _cells_walk(y_shape, last)
        C, D, H, W = x_shape[1:]
        c_unit, w_unit, o_unit = (_unit(C), 1, 1) if last else (1, _unit(W), _unit(y_shape[4]))
        args = (
            C // c_unit, D, H, W // w_unit, *spec.out[:2], spec.out[2] // o_unit, rows, *xs, *ys,
            spec.divisor, spec.norm,
        )  # fmt: skip
        meta = {
            "REDUCE": reduce, "FINISH": finish, "START": start, "COUNT": spec.count_padding,
            "DIMS": spec.dims, "MERGED": not last and _merges(C, x_stride[:2], y_stride[:2]),
            **_compiled_in(spec, x_shape[2:]), "LAST": last, "WIDE": wide, "C_UNIT": c_unit,
            "W_UNIT": w_unit, "O_UNIT": o_unit, "X_VEC": x_unit, "Y_VEC": y_unit, **config,
        }  # fmt: skip
        return _Plan(_cells_fwd_kernel, shape, strides, grid, args, meta)
    rows, units, unit, grid, config = _walk(y_shape, last)
    args = (
        *x_shape[1:], *spec.out, rows, units, *xs, *ys, *spec.k, *spec.s, *spec.p, *spec.d,
        spec.divisor, spec.norm,
    )  # fmt: skip
    unrolled = math.prod(spec.k) <= _UNROLLED and not spec.by_size
    meta = {
        "WINDOW": WINDOWS[spec.window][0], "REDUCE": reduce, "FINISH": finish, "START": start,
        "COUNT": spec.count_padding, "DIMS": spec.dims, "ROUND": rounding,
        **dict(zip(("KD", "KH", "KW"), spec.k if unrolled else (None,) * 3, strict=True)),
        "LAST": last, "WIDE": wide, "UNIT": unit,
        "X_VEC": x_unit, "Y_VEC": y_unit, **config,
    }  # fmt: skip
    return _Plan(_pool_fwd_kernel, shape, strides, grid, args, meta)


def _sharing(spec, sizes, rounding):
    """For each axis, the largest number of windows that may share an element."""
    found = []
    for I, O, k, s, d in zip(sizes, spec.out, spec.k, spec.s, spec.d, strict=True):  # noqa: E741
        if spec.window == "regular":
            m = cdiv((k - 1) * d + 1, s)
        elif spec.window == "adaptive":
            m = cdiv(O, I) + 1
        elif I == k:
            m = O
        else:
            # Starts are points in steps of (I - k) / (O - 1), rounded down, and at last I - k.
            # In 16 bits five roundings move a point by up to I / 64.
            extent = k if rounding is None else k + 2 + I // 32
            m = extent * (O - 1) // (I - k) + 2
        found.append(min(m, O))
    return found


@functools.lru_cache(maxsize=4096)
def _plan_back(shape, stride, g_stride, spec, rounding):
    """How `bwd` runs for an x and a dy of these layouts."""
    x_shape, x_stride = _five(shape, stride, spec.dims)
    y_shape = (*x_shape[:2], *spec.out)
    y_stride = _dense(y_shape, spec.last)
    lead = y_shape[1:2] if len(shape) == spec.dims + 1 else y_shape[:2]
    _, g_stride = _five((*lead, *spec.out[3 - spec.dims :]), g_stride, spec.dims)
    last = x_stride[1] == 1 and x_stride[4] != 1 and spec.window != "fractional"
    z_stride = _dense(x_shape, last)
    kept = [*range(len(shape) == spec.dims + 1, 2), *range(5 - spec.dims, 5)]
    layouts = (y_shape, g_stride), (y_shape, y_stride), (x_shape, x_stride), (x_shape, z_stride)
    taken, vec = zip(*(_addressed(s, t, last) for s, t in layouts), strict=True)
    z_strides = tuple(z_stride[a] for a in kept)
    at = 1 if last else 4
    if _in_cells(spec, *((shape[at], stride[at]) for shape, stride in layouts)):
        cells = tuple(cdiv(n, s) for n, s in zip(x_shape[2:], spec.s, strict=True))
        rows, grid, config = _cells_walk((*x_shape[:2], *cells), last)
        C, D, H, W = x_shape[1:]
        c_unit, w_unit = (_unit(C), 1) if last else (1, _unit(W))
        args = (
            C // c_unit, D, H, W // w_unit, *spec.out, *cells, rows, *taken[0], *taken[1],
            *taken[2], *taken[3], spec.divisor, spec.norm,
        )  # fmt: skip
        merged = not last and _merges(C, *(stride[:2] for _, stride in layouts))
        again = _computed_again(spec)
        if again:  # else ptxas spills a few registers of powers, so that a block more fits
            config = {**config, "maxnreg": 255}
        meta = {
            "REDUCE": REDUCTIONS[spec.reduction][1] if again else None,
            "FINISH": REDUCTIONS[spec.reduction][2] if again else None,
            "SEND": REDUCTIONS[spec.reduction][3], "COUNT": spec.count_padding, "DIMS": spec.dims,
            "MERGED": merged, **_compiled_in(spec, x_shape[2:]), "LAST": last,
            "WIDE": _wide(*layouts), "C_UNIT": c_unit, "W_UNIT": w_unit, "G_VEC": vec[0],
            "Y_VEC": vec[1], "X_VEC": vec[2], "Z_VEC": vec[3], **config,
        }  # fmt: skip
        return _Plan(_cells_bwd_kernel, shape, z_strides, grid, args, meta)
    sharing = _sharing(spec, x_shape[2:], rounding)
    unrolled = spec.window == "regular" and not spec.by_size and math.prod(sharing) <= _UNROLLED
    rows, units, unit, grid, config = _walk(x_shape, last, unrolled)
    if not unrolled:  # else ptxas spills 3 registers, so that a block more fits
        config["maxnreg"] = 128
    hidden = (None,) * 3
    args = (
        *x_shape[1:], *spec.out, rows, units, *taken[0], *taken[1], *taken[2], *taken[3],
        *(hidden * 2 if unrolled else (*spec.k, *spec.s)), *spec.p, *spec.d,
        *(hidden if unrolled else sharing), spec.divisor, spec.norm,
    )  # fmt: skip
    meta = {
        "WINDOW": WINDOWS[spec.window][0], "FIRST": WINDOWS[spec.window][1],
        "SEND": REDUCTIONS[spec.reduction][3], "COUNT": spec.count_padding, "DIMS": spec.dims,
        "ROUND": rounding, "DILATED": spec.d != (1, 1, 1),
        **dict(zip(("KD", "KH", "KW"), spec.k if unrolled else hidden, strict=True)),
        **dict(zip(("SD", "SH", "SW"), spec.s if unrolled else hidden, strict=True)),
        **dict(zip(("MD", "MH", "MW"), sharing if unrolled else hidden, strict=True)),
        "LAST": last, "WIDE": _wide(*layouts), "UNIT": unit,
        "G_VEC": vec[0], "Y_VEC": vec[1], "X_VEC": vec[2], "Z_VEC": vec[3], **config,
    }  # fmt: skip
    return _Plan(_pool_bwd_kernel, shape, z_strides, grid, args, meta)


def _place_dtype(spec):
    """The narrowest integer that holds the number of an element of a window."""
    elements = math.prod(spec.k)
    if elements <= 256:
        return torch.uint8
    return torch.int16 if elements <= 32768 else torch.int32


def _rounding(u, dtype):
    """The 16-bit dtype in which ATen computes fractional windows on a CPU, or None for fp32."""
    if u is None or u.is_cuda or dtype is torch.float32:
        return None
    return tl.float16 if dtype is torch.float16 else tl.bfloat16


def fwd(x, u, spec, dtype, indices, keep):
    """x ([N], C, *) of any strides, samples u (N, C, dims) or None -> y, indices, at, slope.

    `indices`: whether int64 indices are wanted. `keep`: whether `bwd` will run; if so, a maximum
    gives `at` (places) and a power mean gives `slope`, unless `bwd` computes it again. All have the
    layout of y.
    """
    rounding = _rounding(u, dtype)
    plan = _plan(x.shape, x.stride(), spec, rounding)

    def made(dtype):
        return torch.empty_strided(plan.shape, plan.strides, dtype=dtype, device=x.device)

    y = made(dtype)
    index = made(torch.int64) if indices else None
    at = slope = None
    if keep and spec.reduction in ("max", "max_abs", "min_abs"):
        at = made(_place_dtype(spec))
    elif keep and spec.reduction != "mean":
        if plan.kernel is not _cells_fwd_kernel or not _computed_again(spec):
            slope = made(torch.float32)
    drawn = () if plan.kernel is _cells_fwd_kernel else (u,)
    plan.kernel(plan.grid, x, *drawn, y, at, index, slope, *plan.args, **plan.meta)
    return y, index, at, slope


def bwd(dy, at, slope, x, u, spec, dtype, layout):
    """dy of any strides, at or slope as `fwd` made them -> dx, dense.

    `dtype` is that of y; `layout` is (shape, strides, dtype) of x. x itself is read only for the
    gradient of a power or an absolute value.
    """
    shape, stride, x_dtype = layout
    rounding = _rounding(u, dtype)
    plan = _plan_back(shape, stride, dy.stride(), spec, rounding)
    dx = torch.empty_strided(shape, plan.strides, dtype=x_dtype, device=dy.device)
    read = x if REDUCTIONS[spec.reduction][4] else None
    if plan.kernel is not _cells_bwd_kernel and slope is None and _computed_again(spec):
        # The strides of dy are too large for the kernel that computes the factors; those of y fit.
        strides = _plan(shape, stride, spec, rounding).strides
        dy = torch.empty_strided(dy.shape, strides, dtype=dy.dtype, device=dy.device).copy_(dy)
        plan = _plan_back(shape, stride, dy.stride(), spec, rounding)
        assert plan.kernel is _cells_bwd_kernel
    drawn = () if plan.kernel is _cells_bwd_kernel else (u,)
    plan.kernel(plan.grid, dy, at, slope, read, *drawn, dx, *plan.args, **plan.meta)
    return dx


_CELLS = {"BLOCK": 1024, "num_warps": 4}


def _planes_of(t, dims):
    """(rows, length, C), (H, W), strides of ([N], C, *)."""
    shape, stride = _five(t.shape, t.stride(), dims)
    return (shape[0] * shape[1], math.prod(shape[2:]), shape[1]), shape[3:], stride


def unpool(x, indices, dims, out, last, dtype):
    """x and indices (int64) ([N], C, *) of any strides -> y ([N], C, *out), `last`: channels last.

    y has the element of x whose index points there, the last one if there are several, else 0.
    """
    shape = (*x.shape[:-dims], *out)
    format = torch.channels_last if last else torch.contiguous_format
    y = torch.empty(shape, dtype=dtype, device=x.device, memory_format=format)
    (rows, length, C), inner, stride = _planes_of(x, dims)
    (_, other, _), outer, y_stride = _planes_of(y, dims)
    winner = torch.full((rows, other), -1, dtype=torch.int32, device=x.device)
    _unpool_place_kernel(
        (rows * cdiv(length, _CELLS["BLOCK"]),), indices, winner, rows, length, other, C, *inner,
        *_planes_of(indices, dims)[2], **_CELLS,
    )  # fmt: skip
    _unpool_fwd_kernel(
        (rows * cdiv(other, _CELLS["BLOCK"]),), x, winner, y, rows, other, C, *inner, *outer,
        *stride, *y_stride, **_CELLS,
    )  # fmt: skip
    return y


def unpool_bwd(dy, indices, dims, dtype):
    """dy of any strides, indices as in `unpool` -> dx, contiguous."""
    dx = torch.empty(indices.shape, dtype=dtype, device=dy.device)
    (rows, length, C), inner, stride = _planes_of(indices, dims)
    (_, other, _), outer, g_stride = _planes_of(dy, dims)
    _unpool_bwd_kernel(
        (rows * cdiv(length, _CELLS["BLOCK"]),), dy, indices, dx, rows, length, other, C, *inner,
        *outer, *stride, *g_stride, **_CELLS,
    )  # fmt: skip
    return dx
