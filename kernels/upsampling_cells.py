"""Interpolation to images that are twice as large: which places are read, the compiler knows.

These kernels run `kernels.upsampling` in the modes nearest and linear without `align_corners`, if
each size doubles and a place is found by the factor 1/2. Place i then makes the results 2i and
2i + 1 of an axis, out of itself and its neighbours:

    y[2i]     = 1/4 x[i - 1] + 3/4 x[i]        y[0] = x[0] + 0 * x[1]
    y[2i + 1] = 3/4 x[i] + 1/4 x[i + 1]        beyond the end, x[i] counts for x[i + 1]

and gets its gradient from four results at most. So no place is searched, and each load serves
several results. Positions of rows are found once for a row. The lanes of a program lie along W, or
along C if the result is channels last. Bytes are those of `kernels.upsampling`.
"""

import math

import triton
import triton.language as tl

from fastnn.kernels._config import tunable
from fastnn.kernels._launch import kernel
from fastnn.kernels._sizes import cdiv, next_power_of_2, reciprocal
from fastnn.kernels._tl import empty_in_layout
from fastnn.kernels.gather import divided
from fastnn.kernels.pooling_cells import inner_offset

MOST = 2**20  # places of an axis; fp32 has their quarters


@triton.jit
def _positions(
    rows, C, c_magic, c_shift, D, d_magic, d_shift, h_tiles, h_magic, h_shift, W, w_magic, w_shift,
    n_step, c_step, DIMS: tl.constexpr, LAST: tl.constexpr, VEC: tl.constexpr, LINES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """The number of the plane or sample of each row; its offset in the source; d, the first h, and
    w; the lanes; the rows and the elements that exist."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    lanes = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    there = r < rows
    d, h, w = r, r, lanes
    if LAST:
        r, w = divided(r, W, w_magic, w_shift)
    if DIMS > 1:
        r, h = divided(r, h_tiles, h_magic, h_shift)
        h = h * LINES
    if DIMS > 2:
        r, d = divided(r, D, d_magic, d_shift)
    if LAST:
        at, inner = r * (n_step * VEC), C
    else:
        n, c = divided(r, C, c_magic, c_shift)
        at, inner = n * (n_step * VEC) + c * (c_step * VEC), W
    return r, at, d, h, w, lanes, there, there & (lanes < inner)


@triton.jit
def _along(w, lanes, c_step, w_step, LAST: tl.constexpr, VEC: tl.constexpr):
    """The offset of places w of a line, each lane."""
    if LAST:
        return w * (w_step * VEC) + inner_offset(lanes, c_step)
    else:
        return inner_offset(w, w_step)


@triton.jit
def _near(i, size):
    """Which places the results of place i read besides i, and the weights of the first result."""
    first = i == 0
    before = tl.where(first, tl.minimum(size - 1, 1), i - 1)
    after = tl.minimum(i + 1, size - 1)
    return before, after, tl.where(first, 0.0, 0.25), tl.where(first, 1.0, 0.75)


@triton.jit
def _two(before, x, after, w_before, w_x):
    """The two results of a place."""
    return w_before * before + w_x * x, 0.75 * x + 0.25 * after


@triton.jit
def _line(X, at, mid, left, right, w_left, w_mid, mask, LINEAR: tl.constexpr):
    """The two results of each place along W, of lines at `at`, in fp32."""
    x = tl.load(X + (at + mid), mask=mask, other=0.0).to(tl.float32)
    if LINEAR:
        before = tl.load(X + (at + left), mask=mask, other=0.0).to(tl.float32)
        after = tl.load(X + (at + right), mask=mask, other=0.0).to(tl.float32)
        return _two(before, x, after, w_left, w_mid)
    else:
        return x, x


@triton.jit
def _deep(
    X, at, d, front, back, w_front, w_d, mid, left, right, w_left, w_mid, mask,
    LINEAR: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """The two results along W of each place, in the first and in the second plane along D; without
    D, the same two twice. d, front, back: offsets of planes."""
    if DIMS < 3:
        a, b = _line(X, at, mid, left, right, w_left, w_mid, mask, LINEAR)
        return a, b, a, b
    a, b = _line(X, at + d, mid, left, right, w_left, w_mid, mask, LINEAR)
    if not LINEAR:
        return a, b, a, b
    a0, b0 = _line(X, at + front, mid, left, right, w_left, w_mid, mask, LINEAR)
    a2, b2 = _line(X, at + back, mid, left, right, w_left, w_mid, mask, LINEAR)
    a, a2 = _two(a0, a, a2, w_front, w_d)
    b, b2 = _two(b0, b, b2, w_front, w_d)
    return a, b, a2, b2


@triton.jit
def _store(
    Y, line, first, second, w, lanes, there, mask, C, W,
    LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Store the two results of each place of W, in lines of y that are counted by `line`."""
    if LAST:
        to = Y + ((line * W + w) * (2 * C) + lanes)
        tl.store(to, first.to(Y.dtype.element_ty), mask=mask)
        tl.store(to + C, second.to(Y.dtype.element_ty), mask=mask)
    else:
        both = tl.join(first, second).reshape(BLOCK_R, 2 * BLOCK_I).to(Y.dtype.element_ty)
        col = tl.program_id(1) * (2 * BLOCK_I) + tl.arange(0, 2 * BLOCK_I)[None, :]
        tl.store(Y + (line * (2 * W) + col), both, mask=there & (col < 2 * W))


_SIZES = [
    "rows", "c_units", "c_magic", "c_shift", "D", "d_magic", "d_shift",
    "H", "h_tiles", "h_magic", "h_shift", "w_units", "w_magic", "w_shift",
    "n_step", "c_step", "d_step", "h_step", "w_step",
]  # fmt: skip


@kernel(do_not_specialize=_SIZES)
def _doubled_fwd_kernel(
    X, Y, rows, c_units, c_magic, c_shift, D, d_magic, d_shift, H, h_tiles, h_magic, h_shift,
    w_units, w_magic, w_shift, n_step, c_step, d_step, h_step, w_step,
    LINEAR: tl.constexpr, DIMS: tl.constexpr, LAST: tl.constexpr, X_VEC: tl.constexpr,
    C_UNIT: tl.constexpr, W_UNIT: tl.constexpr, LINES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """A program makes all results of BLOCK_R * LINES rows of BLOCK_I places of x.

    LINES rows lie below each other.

    X (N, C, D, H, W): the source, read through strides. Y: the result, dense, twice as large along
    each axis that there is.
    """
    C, W = c_units * C_UNIT, w_units * W_UNIT
    plane, at, d, first, w, lanes, there, mask = _positions(
        rows, C, c_magic, c_shift, D, d_magic, d_shift, h_tiles, h_magic, h_shift,
        W, w_magic, w_shift, n_step, c_step, DIMS, LAST, X_VEC, LINES, BLOCK_R, BLOCK_I,
    )  # fmt: skip
    before, after, w_left, w_mid = _near(w, W)
    mid = _along(w, lanes, c_step, w_step, LAST, X_VEC)
    left = _along(before, lanes, c_step, w_step, LAST, X_VEC)
    right = _along(after, lanes, c_step, w_step, LAST, X_VEC)
    front, back, w_front, w_d = d, d, 0.0, 1.0
    if DIMS > 2:
        front, back, w_front, w_d = _near(d, D)
        front, back = front * (d_step * X_VEC), back * (d_step * X_VEC)
        plane = plane * (2 * D) + 2 * d
        d = d * (d_step * X_VEC)
    high = h_step * X_VEC
    from_ = at
    if DIMS > 1:
        from_ = at + first * high
    a, b, c, e = _deep(
        X, from_, d, front, back, w_front, w_d, mid, left, right, w_left, w_mid, mask, LINEAR, DIMS
    )
    if DIMS == 1:
        _store(Y, plane, a, b, w, lanes, there, mask, C, W, LAST, BLOCK_R, BLOCK_I)
    else:
        above, _below, w_above, w_at = _near(first, H)
        a0, b0, c0, e0 = a, b, c, e
        if LINEAR:
            a0, b0, c0, e0 = _deep(
                X, at + above * high, d, front, back, w_front, w_d, mid, left, right,
                w_left, w_mid, mask, LINEAR, DIMS,
            )  # fmt: skip
        for i in tl.static_range(LINES):
            h = first + i
            up, up_2, down, down_2 = a, b, a, b
            deep, deep_2, deeper, deeper_2 = c, e, c, e
            if LINEAR or i < LINES - 1:  # the line below
                a2, b2, c2, e2 = _deep(
                    X, at + tl.minimum(h + 1, H - 1) * high, d, front, back, w_front, w_d,
                    mid, left, right, w_left, w_mid, mask, LINEAR, DIMS,
                )  # fmt: skip
                if LINEAR:
                    up, down = _two(a0, a, a2, w_above, w_at)
                    up_2, down_2 = _two(b0, b, b2, w_above, w_at)
                    if DIMS == 3:
                        deep, deeper = _two(c0, c, c2, w_above, w_at)
                        deep_2, deeper_2 = _two(e0, e, e2, w_above, w_at)
                    w_above, w_at = 0.25, 0.75  # of all lines but the first one
                a0, b0, c0, e0 = a, b, c, e
                a, b, c, e = a2, b2, c2, e2
            line = plane * (2 * H) + 2 * h
            row, of_row = there & (h < H), mask & (h < H)
            _store(Y, line, up, up_2, w, lanes, row, of_row, C, W, LAST, BLOCK_R, BLOCK_I)
            _store(Y, line + 1, down, down_2, w, lanes, row, of_row, C, W, LAST, BLOCK_R, BLOCK_I)
            if DIMS == 3:
                line += 2 * H
                _store(Y, line, deep, deep_2, w, lanes, row, of_row, C, W, LAST, BLOCK_R, BLOCK_I)
                _store(
                    Y, line + 1, deeper, deeper_2, w, lanes, row, of_row, C, W, LAST,
                    BLOCK_R, BLOCK_I,
                )  # fmt: skip


@triton.jit
def _part(i, size, T: tl.constexpr):
    """The weight that place i has in result 2i - 1 + T, and whether that result exists."""
    if T == 0:
        return tl.full(i.shape, 0.25, tl.float32), i > 0
    elif T == 1:
        return tl.where(i == 0, 1.0, 0.75), i >= 0
    elif T == 2:
        return tl.where(i == size - 1, 1.0, 0.75), i >= 0
    else:
        return tl.full(i.shape, 0.25, tl.float32), i < size - 1


@triton.jit
def _gathered(
    DY, at, w, W, lanes, c_step, w_step, there, mask,
    LINEAR: tl.constexpr, LAST: tl.constexpr, VEC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """What one line of the gradient gives to each place along W, in fp32."""
    if LAST:
        first = DY + (at + _along(2 * w, lanes, c_step, w_step, LAST, VEC))
        one = tl.load(first, mask=mask, other=0.0).to(tl.float32)
        two = tl.load(first + w_step * VEC, mask=mask, other=0.0).to(tl.float32)
    else:
        col = tl.program_id(1) * (2 * BLOCK_I) + tl.arange(0, 2 * BLOCK_I)[None, :]
        both = DY + (at + inner_offset(col, w_step))
        both = tl.load(both, mask=there & (col < 2 * W), other=0.0)
        one, two = tl.split(both.to(tl.float32).reshape(BLOCK_R, BLOCK_I, 2))
    if LINEAR:
        w_left, left = _part(w, W, 0)
        w_one, _one = _part(w, W, 1)
        w_two, _two = _part(w, W, 2)
        w_right, right = _part(w, W, 3)
        before = DY + (at + _along(2 * w - 1, lanes, c_step, w_step, LAST, VEC))
        before = tl.load(before, mask=mask & left, other=0.0).to(tl.float32)
        after = DY + (at + _along(2 * w + 2, lanes, c_step, w_step, LAST, VEC))
        after = tl.load(after, mask=mask & right, other=0.0).to(tl.float32)
        return w_left * before + w_one * one + w_two * two + w_right * after
    else:
        return one + two


@triton.jit
def _gathered_deep(
    DY, at, d, D, step, w, W, lanes, c_step, w_step, there, mask,
    LINEAR: tl.constexpr, DIMS: tl.constexpr, LAST: tl.constexpr, VEC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """What lines of the gradient, one in each plane, give to each place along W and D."""
    if DIMS < 3:
        return _gathered(
            DY, at, w, W, lanes, c_step, w_step, there, mask, LINEAR, LAST, VEC, BLOCK_R, BLOCK_I
        )
    else:
        acc = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
        # In mode nearest a place has results 1 and 2 of four, with the weight 1.
        for t in tl.static_range(0 if LINEAR else 1, 4 if LINEAR else 3):
            weight, some = _part(d, D, t)
            g = _gathered(
                DY, at + (2 * d - 1 + t) * step, w, W, lanes, c_step, w_step, there & some,
                mask & some, LINEAR, LAST, VEC, BLOCK_R, BLOCK_I,
            )  # fmt: skip
            if LINEAR:
                g = weight * g
            acc += g
        return acc


@kernel(do_not_specialize=_SIZES)
def _doubled_bwd_kernel(
    DY, DX, rows, c_units, c_magic, c_shift, D, d_magic, d_shift, H, h_tiles, h_magic, h_shift,
    w_units, w_magic, w_shift, n_step, c_step, d_step, h_step, w_step,
    LINEAR: tl.constexpr, DIMS: tl.constexpr, LAST: tl.constexpr, X_VEC: tl.constexpr,
    C_UNIT: tl.constexpr, W_UNIT: tl.constexpr, LINES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """A program adds up the gradients of BLOCK_R * LINES rows of BLOCK_I places of dx.

    LINES rows lie below each other.

    DY: the gradient of the result, read through strides. DX (N, C, D, H, W): dense.
    """
    C, W = c_units * C_UNIT, w_units * W_UNIT
    plane, at, d, first, w, lanes, there, mask = _positions(
        rows, C, c_magic, c_shift, D, d_magic, d_shift, h_tiles, h_magic, h_shift,
        W, w_magic, w_shift, n_step, c_step, DIMS, LAST, X_VEC, LINES, BLOCK_R, BLOCK_I,
    )  # fmt: skip
    if DIMS > 2:
        plane = plane * D + d
    deep, high = d_step * X_VEC, h_step * X_VEC
    if DIMS == 1:
        acc = _gathered(
            DY, at, w, W, lanes, c_step, w_step, there, mask, LINEAR, LAST, X_VEC,
            BLOCK_R, BLOCK_I,
        )  # fmt: skip
        to = plane * W + w
        if LAST:
            to = to * C + lanes
        tl.store(DX + to, acc.to(DX.dtype.element_ty), mask=mask)
    else:
        # Results 2h - 1 and 2h of the first line; each line reads the two after them.
        before = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
        one = before
        if LINEAR:
            some = first > 0
            before = _gathered_deep(
                DY, at + (2 * first - 1) * high, d, D, deep, w, W, lanes, c_step, w_step,
                there & some, mask & some, LINEAR, DIMS, LAST, X_VEC, BLOCK_R, BLOCK_I,
            )  # fmt: skip
            one = _gathered_deep(
                DY, at + 2 * first * high, d, D, deep, w, W, lanes, c_step, w_step,
                there, mask, LINEAR, DIMS, LAST, X_VEC, BLOCK_R, BLOCK_I,
            )  # fmt: skip
        FIRST: tl.constexpr = 1 if LINEAR else 0
        for i in tl.static_range(LINES):
            h = first + i
            some = h < H
            two = _gathered_deep(
                DY, at + (2 * h + FIRST) * high, d, D, deep, w, W, lanes, c_step, w_step,
                there & some, mask & some, LINEAR, DIMS, LAST, X_VEC, BLOCK_R, BLOCK_I,
            )  # fmt: skip
            if LINEAR:
                some = h < H - 1
            after = _gathered_deep(
                DY, at + (2 * h + FIRST + 1) * high, d, D, deep, w, W, lanes, c_step, w_step,
                there & some, mask & some, LINEAR, DIMS, LAST, X_VEC, BLOCK_R, BLOCK_I,
            )  # fmt: skip
            dx = two + after
            if LINEAR:
                w_one, w_two = 0.75, tl.where(h == H - 1, 1.0, 0.75)
                if i == 0:
                    w_one = tl.where(h == 0, 1.0, 0.75)
                dx = 0.25 * before + w_one * one + w_two * two + 0.25 * after
                before, one = two, after
            to = (plane * H + h) * W + w
            if LAST:
                to = to * C + lanes
            tl.store(DX + to, dx.to(DX.dtype.element_ty), mask=mask & (h < H))


# ---- launchers ----------------------------------------------------------------------------------


def doubles(size, out, mode, align, scales):
    """Whether an image of that size becomes one for these kernels."""
    if mode not in ("nearest", "linear") or (align and mode == "linear"):
        return False
    twice = all(o == 2 * n and n < MOST for n, o in zip(size, out, strict=True))
    return twice and all(s == 0.5 for s in scales)


@tunable("LINES", "BLOCK_R", "BLOCK_I")
def _cells(inner, height, last, linear):
    """Accesses of 16 bytes in 16 bits: 8 channels for each lane, or 4 places of two results."""
    block = min(next_power_of_2(inner), 64 if last else 128)
    lines = min(next_power_of_2(height), 4) if linear else 1
    rows = max(1, (512 if linear else 1024) // block // lines)
    warps = 2 if last else 4
    return {"LINES": lines, "BLOCK_R": rows, "BLOCK_I": block, "num_warps": max(1, warps // lines)}


def _launch(launched, source, result, size, mode, last):
    """`size`: of the smaller image."""
    N, C, *_ = source.shape
    dims = len(size)
    n_step, c_step, *steps = source.stride()
    D, H, W = [1] * (3 - dims) + list(size)
    steps = [0] * (3 - dims) + steps
    unit = 1
    if (c_step if last else steps[2]) == 1:
        outer = (n_step, *steps) if last else (n_step, c_step, *steps[:2])
        unit = math.gcd(*outer, 8)
    c_unit, w_unit = (math.gcd(C, 8), 1) if last else (1, math.gcd(W, 8))
    inner = C if last else W
    config = _cells(inner, H, last, mode == "linear")
    h_tiles = cdiv(H, config["LINES"])
    rows = N * D * h_tiles * (W if last else C)
    d_step, h_step, w_step = (s // unit for s in steps)
    if last:
        c_step = None if c_step == 1 else c_step
    else:
        c_step, w_step = c_step // unit, None if steps[2] == 1 else steps[2]
    launched(
        (cdiv(rows, config["BLOCK_R"]), cdiv(inner, config["BLOCK_I"])), source, result, rows,
        C // c_unit, *reciprocal(C), D, *reciprocal(D), H, h_tiles, *reciprocal(h_tiles),
        W // w_unit, *reciprocal(W), n_step // unit, c_step, d_step, h_step, w_step,
        LINEAR=mode == "linear", DIMS=dims, LAST=last, X_VEC=unit, C_UNIT=c_unit, W_UNIT=w_unit,
        **config,
    )  # fmt: skip


def fwd(x, size, mode, dtype, channels_last):
    """x (N, C, *) of any strides -> y (N, C, *size), dense."""
    y, order = empty_in_layout((*x.shape[:2], *size), x, dtype, channels_last)
    if y.numel():
        _launch(_doubled_fwd_kernel, x, y, x.shape[2:], mode, order[-1] == 1)
    return y


def bwd(dy, size, mode, dtype, channels_last):
    """dy (N, C, *) of any strides -> dx (N, C, *size), dense."""
    dx, order = empty_in_layout((*dy.shape[:2], *size), dy, dtype, channels_last)
    if dx.numel():
        _launch(_doubled_bwd_kernel, dy, dx, size, mode, order[-1] == 1)
    return dx
