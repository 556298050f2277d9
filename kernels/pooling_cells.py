"""Pooling with small windows that the compiler knows: nothing is looked up, nothing is divided.

These kernels run `kernels.pooling` for regular windows without dilation, if the window and the
stride are small. An axis is cut into cells of as many elements as the stride. Element number r of
cell c has tap q + m * stride of the window of output position c - m, where q = r + padding: so all
taps, and all windows that share an element, are constants. The lanes of a program lie along cells
of W, or along C if the tensor is channels last.

Along W the elements of two or four phases are one wide access, which is split into the phases
(or joined from them) in registers. The forward adds the taps of a window in their order; the
backward adds windows in theirs. So the bits are those of the kernels in `kernels.pooling`.
"""

import triton
import triton.language as tl

from fastnn.kernels._launch import kernel


@triton.jit
def counted(start, end, I, k, p, COUNT: tl.constexpr):  # noqa: E741
    """The factor of an axis in the divisor. COUNT: padding counts, but nothing beyond it."""
    if COUNT:
        return tl.minimum(start + k, I + p) - start
    else:
        return end - tl.maximum(start, 0)


@triton.jit
def inner_offset(i, stride):
    """The offset of positions along the innermost axis. A stride of None is 1."""
    if stride is None:
        return i
    else:
        return i * stride


@triton.jit
def _widened(v):
    """v in float32.

    The bits of a bfloat16 are moved. Of comparisons of converted values LLVM would make comparisons
    of bfloat16, and those take more instructions.
    """
    if v.dtype == tl.bfloat16:
        return (v.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return v.to(tl.float32)


@triton.jit
def _divided(r, by):
    """(remainder, quotient) of positions. Signs would cost instructions."""
    q = r.to(tl.uint32) // by.to(tl.uint32)
    q = q.to(tl.int32)
    return r - q * by, q


@triton.jit
def _tile(
    rows, C, D, H, W, DIMS: tl.constexpr, MERGED: tl.constexpr, LAST: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """The first lane's position; the mask of the rows; n, c, d, h, w of the rows, without lanes.

    MERGED: c is the number of the plane, and n is 0.
    """
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    there = r < rows
    w = r
    h = r * 0
    d = h
    if LAST:
        w, r = _divided(r, W)
    if DIMS >= 2:
        h, r = _divided(r, H)
    if DIMS == 3:
        d, r = _divided(r, D)
    n = r
    c = r
    if MERGED:
        n = r * 0
    elif not LAST:
        c, n = _divided(r, C)
    if WIDE:
        n = n.to(tl.int64)
        c = c.to(tl.int64)
        d = d.to(tl.int64)
        h = h.to(tl.int64)
        w = w.to(tl.int64)
    return tl.program_id(1) * BLOCK_I, there, n, c, d, h, w


@triton.jit
def _plane(n, c, sn, sc, VEC: tl.constexpr, LAST: tl.constexpr):
    at = n * sn * VEC
    if not LAST:
        at += c * sc * VEC
    return at


@triton.jit
def _inside(i, I, TAP: tl.constexpr, P: tl.constexpr, CLIP: tl.constexpr):  # noqa: E741
    """Whether tap TAP of windows is in the axis, at i. CLIP: windows pass the end of the axis."""
    ok = i >= 0 if TAP < P else i == i
    if CLIP:
        ok &= i < I
    return ok


@triton.jit
def _count(
    start, I, K: tl.constexpr, P: tl.constexpr, CLIP: tl.constexpr, COUNT: tl.constexpr,  # noqa: E741
):  # fmt: skip
    """The factor of an axis in the divisor."""
    if P == 0 and not CLIP:
        return start * 0 + K
    else:
        return counted(start, tl.minimum(start + K, I), I, K, P, COUNT)


@triton.jit
def _columns(
    rows, start, W, stride, there, other, LOW: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """LANES neighbours of each row, as float32."""
    k = start + tl.arange(0, LANES)[None, :]
    mask = there & (k < W)
    if LOW:
        mask &= k >= 0
    return _widened(tl.load(rows + inner_offset(k, stride), mask=mask, other=other))


@triton.jit
def _cell(
    acc, at, lines, first, ow, W, stride, inside, lanes, norm,
    REDUCE: tl.constexpr, START: tl.constexpr, CELL: tl.constexpr, T: tl.constexpr,
    KW: tl.constexpr, SW: tl.constexpr, PW: tl.constexpr, CLIP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """acc, at after the taps of windows ow that are in the cells ow + CELL. T: of the line."""
    TAP: tl.constexpr = CELL * SW + PW  # of the first element of a cell
    WHOLE: tl.constexpr = (TAP >= 0) & (TAP + SW <= KW)
    t: tl.constexpr = T + TAP
    k = (ow + CELL) * SW
    if WHOLE and SW == 2:
        v = _columns(lines, (first + CELL) * 2, W, stride, inside, START, CELL < 0, 2 * BLOCK_I)
        v0, v1 = tl.split(v.reshape(BLOCK_R, BLOCK_I, 2))
        acc, at = REDUCE(acc, at, v0, t, inside & _inside(k, W, TAP, PW, True), norm)
        acc, at = REDUCE(acc, at, v1, t + 1, inside & _inside(k + 1, W, TAP + 1, PW, True), norm)
    elif WHOLE and SW == 4:
        v = _columns(lines, (first + CELL) * 4, W, stride, inside, START, CELL < 0, 4 * BLOCK_I)
        even, odd = tl.split(v.reshape(BLOCK_R, BLOCK_I, 2, 2))
        v0, v2 = tl.split(even)
        v1, v3 = tl.split(odd)
        acc, at = REDUCE(acc, at, v0, t, inside & _inside(k, W, TAP, PW, True), norm)
        acc, at = REDUCE(acc, at, v1, t + 1, inside & _inside(k + 1, W, TAP + 1, PW, True), norm)
        acc, at = REDUCE(acc, at, v2, t + 2, inside & _inside(k + 2, W, TAP + 2, PW, True), norm)
        acc, at = REDUCE(acc, at, v3, t + 3, inside & _inside(k + 3, W, TAP + 3, PW, True), norm)
    else:
        for e in tl.static_range(SW):
            if (TAP + e >= 0) & (TAP + e < KW):
                ok = inside & lanes & _inside(k + e, W, TAP + e, PW, CLIP)
                v = tl.load(lines + inner_offset(k + e, stride), mask=ok, other=START)
                acc, at = REDUCE(acc, at, _widened(v), t + e, ok, norm)
    return acc, at


@triton.jit
def _reduced(
    at, planes, first, lanes, ow, start_d, start_h, start_w, there, on, D, H, W,
    xc, xd, xh, xw, norm, REDUCE: tl.constexpr, START: tl.constexpr,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SW: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    CLIP_D: tl.constexpr, CLIP_H: tl.constexpr, CLIP_W: tl.constexpr,
    LAST: tl.constexpr, X_VEC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """acc, at of all taps of the windows that begin at start_d, start_h, start_w. `there` is the
    mask of the rows, `on` that of the lanes."""
    acc = tl.full((BLOCK_R, BLOCK_I), START, tl.float32)
    for a in tl.static_range(KD):
        for b in tl.static_range(KH):
            i, j = start_d + a, start_h + b
            inside = there & _inside(i, D, a, PD, CLIP_D) & _inside(j, H, b, PH, CLIP_H)
            lines = planes + (i * xd * X_VEC + j * xh * X_VEC)
            if LAST:
                for e in tl.static_range(KW):
                    k = start_w + e
                    ok = inside & _inside(k, W, e, PW, CLIP_W) & on
                    v = tl.load(
                        lines + k * xw * X_VEC + inner_offset(lanes, xc), mask=ok, other=START
                    )
                    t = (a * KH + b) * KW + e
                    acc, at = REDUCE(acc, at, _widened(v), t, ok, norm)
            else:
                for q in tl.static_range((KW - 1 - PW) // SW + (PW + SW - 1) // SW + 1):
                    acc, at = _cell(
                        acc, at, lines, first, ow, W, xw, inside, on, norm, REDUCE,
                        START, q - (PW + SW - 1) // SW, (a * KH + b) * KW, KW, SW, PW, CLIP_W,
                        BLOCK_R, BLOCK_I,
                    )  # fmt: skip
    return acc, at


@triton.jit
def _finished(
    acc, start_d, start_h, start_w, D, H, W, divisor, norm,
    FINISH: tl.constexpr, COUNT: tl.constexpr,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    CLIP_D: tl.constexpr, CLIP_H: tl.constexpr, CLIP_W: tl.constexpr,
):  # fmt: skip
    """y, and its factor in the gradients."""
    if divisor is None:
        count = _count(start_d, D, KD, PD, CLIP_D, COUNT) * _count(
            start_h, H, KH, PH, CLIP_H, COUNT
        )
        count = (count * _count(start_w, W, KW, PW, CLIP_W, COUNT)).to(tl.float32)
    else:
        count = divisor.to(tl.float32)
    return FINISH(acc, count, tl.full((1, 1), KD * KH * KW, tl.float32), norm)


_SIZES = ["c_units", "D", "H", "w_units", "OD", "OH", "o_units", "rows"]


@kernel(do_not_specialize=[*_SIZES, *(f"{t}{d}" for t in "xy" for d in "ncdhw"), "divisor"])
def _cells_fwd_kernel(
    X, Y, AT, INDEX, SLOPE, c_units, D, H, w_units, OD, OH, o_units, rows,
    xn, xc, xd, xh, xw, yn, yc, yd, yh, yw, divisor, norm,
    REDUCE: tl.constexpr, FINISH: tl.constexpr, START: tl.constexpr, COUNT: tl.constexpr,
    DIMS: tl.constexpr, MERGED: tl.constexpr,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    CLIP_D: tl.constexpr, CLIP_H: tl.constexpr, CLIP_W: tl.constexpr,
    LAST: tl.constexpr, WIDE: tl.constexpr, C_UNIT: tl.constexpr, W_UNIT: tl.constexpr,
    O_UNIT: tl.constexpr, X_VEC: tl.constexpr, Y_VEC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """A program has BLOCK_R by BLOCK_I output positions, and all taps of their windows.

    X (N, C, D, H, W): float, any strides. Y, AT (integers: places), SLOPE (fp32), INDEX (int64)
    (N, C, OD, OH, OW): the same strides. AT, SLOPE and INDEX may be None.
    """
    C, W, OW = c_units * C_UNIT, w_units * W_UNIT, o_units * O_UNIT
    inner = C if LAST else OW
    first, there, n, c, od, oh, ow = _tile(
        rows, C, OD, OH, OW, DIMS, MERGED, LAST, WIDE, BLOCK_R, BLOCK_I
    )
    lanes = first + tl.arange(0, BLOCK_I)[None, :]
    mask = there & (lanes < inner)
    if not LAST:
        ow = lanes
    start_d, start_h, start_w = od * SD - PD, oh * SH - PH, ow * SW - PW
    planes = X + _plane(n, c, xn, xc, X_VEC, LAST)
    # In a window that has only -inf, the first element inside the image is the maximum.
    at = tl.zeros((BLOCK_R, BLOCK_I), tl.int32)
    if PD + PH + PW > 0:
        at += (tl.maximum(-start_d, 0) * KH + tl.maximum(-start_h, 0)).to(tl.int32) * KW
        at += tl.maximum(-start_w, 0).to(tl.int32)
    acc, at = _reduced(
        at, planes, first, lanes, ow, start_d, start_h, start_w, there, lanes < inner, D, H, W,
        xc, xd, xh, xw, norm, REDUCE, START, KD, KH, KW, SW, PD, PH, PW,
        CLIP_D, CLIP_H, CLIP_W, LAST, X_VEC, BLOCK_R, BLOCK_I,
    )  # fmt: skip
    y, slope = _finished(
        acc, start_d, start_h, start_w, D, H, W, divisor, norm, FINISH, COUNT, KD, KH, KW,
        PD, PH, PW, CLIP_D, CLIP_H, CLIP_W,
    )  # fmt: skip
    to = _plane(n, c, yn, yc, Y_VEC, LAST) + od * yd * Y_VEC + oh * yh * Y_VEC
    if LAST:
        to = to + ow * yw * Y_VEC + inner_offset(lanes, yc)
    else:
        to = to + inner_offset(ow, yw)
    tl.store(Y + to, y.to(Y.dtype.element_ty), mask=mask)
    if AT is not None:
        tl.store(AT + to, at.to(AT.dtype.element_ty), mask=mask)
    if SLOPE is not None:
        tl.store(SLOPE + to, slope, mask=mask)
    if INDEX is not None:
        i = start_d + at // (KH * KW)
        j = start_h + at // KW % KH
        k = start_w + at % KW
        tl.store(INDEX + to, ((i.to(tl.int64) * H + j) * W + k).to(tl.int64), mask=mask)


@triton.jit
def _sent(
    DY, AT, SLOPE, g_planes, y_planes, c_lanes, cd, ch, cw, there, D, H, W, OD, OH, OW,
    gc, gd, gh, gw, yc, yd, yh, yw, divisor,
    QD: tl.constexpr, QH: tl.constexpr, QW: tl.constexpr,
    MD: tl.constexpr, MH: tl.constexpr, MW: tl.constexpr, COUNT: tl.constexpr, DIMS: tl.constexpr,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    CLIP_D: tl.constexpr, CLIP_H: tl.constexpr, CLIP_W: tl.constexpr,
    LAST: tl.constexpr, G_VEC: tl.constexpr, Y_VEC: tl.constexpr,
):  # fmt: skip
    """What windows (cd - MD, ch - MH, cw - MW) send to their taps (QD + MD * SD, ...)."""
    od, oh, ow = cd - MD, ch - MH, cw - MW
    ok = there & (oh < OH) & (ow < OW)
    if DIMS == 3:
        ok &= od < OD
        if MD > 0:
            ok &= od >= 0
    if MH > 0:
        ok &= oh >= 0
    if MW > 0:
        ok &= ow >= 0
    g_at = g_planes + (od * gd * G_VEC + oh * gh * G_VEC)
    y_at = y_planes + (od * yd * Y_VEC + oh * yh * Y_VEC)
    if LAST:
        g_at = g_at + ow * gw * G_VEC + inner_offset(c_lanes, gc)
        y_at = y_at + ow * yw * Y_VEC + inner_offset(c_lanes, yc)
    else:
        g_at = g_at + inner_offset(ow, gw)
        y_at = y_at + inner_offset(ow, yw)
    g = _widened(tl.load(DY + g_at, mask=ok, other=0.0))
    if AT is not None:
        tap = ((QD + MD * SD) * KH + QH + MH * SH) * KW + QW + MW * SW
        at = tl.load(AT + y_at, mask=ok, other=0).to(tl.int32)
        g = tl.where(at == tap, g, 0.0)
    elif SLOPE is not None:
        if SLOPE.dtype == tl.float32:  # the factors of this program's windows, and no pointer
            g = tl.where(ok, g * SLOPE, 0.0)
        else:
            g = g * tl.load(SLOPE + y_at, mask=ok, other=0.0)
    elif divisor is not None:
        g = tl.div_rn(g, divisor.to(tl.float32))
    else:
        i, j, k = od * SD - PD, oh * SH - PH, ow * SW - PW
        count = _count(i, D, KD, PD, CLIP_D, COUNT) * _count(j, H, KH, PH, CLIP_H, COUNT)
        count = count * _count(k, W, KW, PW, CLIP_W, COUNT)
        g = tl.where(ok, tl.div_rn(g, count.to(tl.float32)), 0.0)
    return g


@triton.jit
def _phase(
    DY, AT, SLOPE, g_planes, y_planes, c_lanes, cd, ch, cw, there, D, H, W, OD, OH, OW,
    gc, gd, gh, gw, yc, yd, yh, yw, divisor,
    RD: tl.constexpr, RH: tl.constexpr, RW: tl.constexpr, COUNT: tl.constexpr, DIMS: tl.constexpr,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    CLIP_D: tl.constexpr, CLIP_H: tl.constexpr, CLIP_W: tl.constexpr,
    LAST: tl.constexpr, G_VEC: tl.constexpr, Y_VEC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """What all windows send to element (RD, RH, RW) of each cell, in float32.

    The compiler merges loads that several elements of a cell have in common.
    """
    acc = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
    # The last m comes first: windows are added in the order of their positions c - m.
    for u in tl.static_range((KD - 1 - RD - PD) // SD + (RD + PD) // SD + 1):
        for v in tl.static_range((KH - 1 - RH - PH) // SH + (RH + PH) // SH + 1):
            for w in tl.static_range((KW - 1 - RW - PW) // SW + (RW + PW) // SW + 1):
                acc += _sent(
                    DY, AT, SLOPE, g_planes, y_planes, c_lanes, cd, ch, cw, there,
                    D, H, W, OD, OH, OW, gc, gd, gh, gw, yc, yd, yh, yw, divisor,
                    RD + PD, RH + PH, RW + PW, (KD - 1 - RD - PD) // SD - u,
                    (KH - 1 - RH - PH) // SH - v, (KW - 1 - RW - PW) // SW - w,
                    COUNT, DIMS, KD, KH, KW, SD, SH, SW, PD, PH, PW, CLIP_D, CLIP_H, CLIP_W, LAST,
                    G_VEC, Y_VEC,
                )  # fmt: skip
    return acc


@triton.jit
def _line(
    DY, AT, SLOPE, g_planes, y_planes, lanes, cd, ch, cw, there, D, H, W, OD, OH, OW,
    gc, gd, gh, gw, yc, yd, yh, yw, divisor,
    RD: tl.constexpr, RH: tl.constexpr, RW: tl.constexpr, GROUP: tl.constexpr,
    COUNT: tl.constexpr, DIMS: tl.constexpr,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    CLIP_D: tl.constexpr, CLIP_H: tl.constexpr, CLIP_W: tl.constexpr,
    LAST: tl.constexpr, G_VEC: tl.constexpr, Y_VEC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """What all windows send to GROUP elements of each cell, from (RD, RH, RW) on, as neighbours."""
    if GROUP == 1:
        return _phase(
            DY, AT, SLOPE, g_planes, y_planes, lanes, cd, ch, cw, there,
            D, H, W, OD, OH, OW, gc, gd, gh, gw, yc, yd, yh, yw, divisor,
            RD, RH, RW, COUNT, DIMS, KD, KH, KW, SD, SH, SW, PD, PH, PW,
            CLIP_D, CLIP_H, CLIP_W, LAST, G_VEC, Y_VEC, BLOCK_R, BLOCK_I,
        )  # fmt: skip
    else:
        left = _line(
            DY, AT, SLOPE, g_planes, y_planes, lanes, cd, ch, cw, there,
            D, H, W, OD, OH, OW, gc, gd, gh, gw, yc, yd, yh, yw, divisor,
            RD, RH, RW, GROUP // 2, COUNT, DIMS, KD, KH, KW, SD, SH, SW, PD, PH, PW,
            CLIP_D, CLIP_H, CLIP_W, LAST, G_VEC, Y_VEC, BLOCK_R, BLOCK_I,
        )  # fmt: skip
        right = _line(
            DY, AT, SLOPE, g_planes, y_planes, lanes, cd, ch, cw, there,
            D, H, W, OD, OH, OW, gc, gd, gh, gw, yc, yd, yh, yw, divisor,
            RD, RH, RW + SW // GROUP, GROUP // 2, COUNT, DIMS,
            KD, KH, KW, SD, SH, SW, PD, PH, PW,
            CLIP_D, CLIP_H, CLIP_W, LAST, G_VEC, Y_VEC, BLOCK_R, BLOCK_I,
        )  # fmt: skip
        return tl.join(left, right).reshape(BLOCK_R, BLOCK_I * GROUP)


@triton.jit
def _store(
    DX, X, dx, x_at, z_at, j, k, lanes, mask, H, norm, xc, xh, xw, zc, zh, zw,
    SEND: tl.constexpr, LAST: tl.constexpr, X_VEC: tl.constexpr, Z_VEC: tl.constexpr,
):  # fmt: skip
    """Store the gradient of elements (j, k) of planes at x_at and z_at."""
    x_at = x_at + j * xh * X_VEC
    z_at = z_at + j * zh * Z_VEC
    if LAST:
        x_at = x_at + k * xw * X_VEC + inner_offset(lanes, xc)
        z_at = z_at + k * zw * Z_VEC + inner_offset(lanes, zc)
    else:
        x_at = x_at + inner_offset(k, xw)
        z_at = z_at + inner_offset(k, zw)
    mask &= j < H
    x = dx
    if X is not None:
        x = tl.load(X + x_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(DX + z_at, SEND(dx, x, norm).to(DX.dtype.element_ty), mask=mask)


_BACK = [*_SIZES, "OW", "CD", "CH", "CW", *(f"{t}{d}" for t in "gyxz" for d in "ncdhw"), "divisor"]


@kernel(do_not_specialize=_BACK)
def _cells_bwd_kernel(
    DY, AT, SLOPE, X, DX, c_units, D, H, w_units, OD, OH, OW, CD, CH, CW, rows,
    gn, gc, gd, gh, gw, yn, yc, yd, yh, yw, xn, xc, xd, xh, xw, zn, zc, zd, zh, zw, divisor, norm,
    REDUCE: tl.constexpr, FINISH: tl.constexpr, SEND: tl.constexpr, COUNT: tl.constexpr,
    DIMS: tl.constexpr, MERGED: tl.constexpr,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    CLIP_D: tl.constexpr, CLIP_H: tl.constexpr, CLIP_W: tl.constexpr,
    LAST: tl.constexpr, WIDE: tl.constexpr, C_UNIT: tl.constexpr, W_UNIT: tl.constexpr,
    G_VEC: tl.constexpr, Y_VEC: tl.constexpr, X_VEC: tl.constexpr, Z_VEC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """A program has BLOCK_R by BLOCK_I cells, and all windows that share their elements.

    DY (N, C, OD, OH, OW): float, any strides. AT, SLOPE: as the forward made them, or None. X, DX
    (N, C, D, H, W): float, any strides and dense; X is None if the gradient does not read it. CD,
    CH, CW: so many cells an axis has. REDUCE, FINISH: as in the forward, if each window is a cell
    and the factors that the forward would keep in SLOPE are computed again; else None.
    """
    C, W = c_units * C_UNIT, w_units * W_UNIT
    inner = C if LAST else CW
    first, there, n, c, cd, ch, cw = _tile(
        rows, C, CD, CH, CW, DIMS, MERGED, LAST, WIDE, BLOCK_R, BLOCK_I
    )
    lanes = first + tl.arange(0, BLOCK_I)[None, :]
    if LAST:
        there &= lanes < inner
    else:
        cw = lanes
    g_planes = _plane(n, c, gn, gc, G_VEC, LAST)
    y_planes = _plane(n, c, yn, yc, Y_VEC, LAST)
    x_planes = _plane(n, c, xn, xc, X_VEC, LAST)
    z_planes = _plane(n, c, zn, zc, Z_VEC, LAST)
    if REDUCE is not None:
        within = there & (cd < OD) & (ch < OH)
        on = lanes < (C if LAST else OW)
        if LAST:
            within &= cw < OW
        start_d, start_h, start_w = cd * SD, ch * SH, cw * SW
        acc, _ = _reduced(
            tl.zeros((BLOCK_R, BLOCK_I), tl.int32), X + x_planes, first, lanes, cw,
            start_d, start_h, start_w, within, on, D, H, W, xc, xd, xh, xw, norm,
            REDUCE, 0.0, KD, KH, KW, SW, PD, PH, PW, CLIP_D, CLIP_H, CLIP_W, LAST, X_VEC,
            BLOCK_R, BLOCK_I,
        )  # fmt: skip
        _, SLOPE = _finished(
            acc, start_d, start_h, start_w, D, H, W, divisor, norm, FINISH, COUNT, KD, KH, KW,
            PD, PH, PW, CLIP_D, CLIP_H, CLIP_W,
        )  # fmt: skip
    # Elements along W that one access has.
    GROUP: tl.constexpr = SW if not LAST and (SW == 2 or SW == 4) else 1
    for rd in tl.static_range(SD):
        for rh in tl.static_range(0, SH, 2 if SH == 2 else 1):
            for rw in tl.static_range(0, SW, GROUP):
                dx = _line(
                    DY, AT, SLOPE, g_planes, y_planes, lanes, cd, ch, cw, there,
                    D, H, W, OD, OH, OW, gc, gd, gh, gw, yc, yd, yh, yw, divisor,
                    rd, rh, rw, GROUP, COUNT, DIMS, KD, KH, KW, SD, SH, SW, PD, PH, PW,
                    CLIP_D, CLIP_H, CLIP_W, LAST, G_VEC, Y_VEC, BLOCK_R, BLOCK_I,
                )  # fmt: skip
                i = cd * SD + rd
                k = cw * SW + rw
                if GROUP > 1:
                    k = first * GROUP + tl.arange(0, BLOCK_I * GROUP)[None, :]
                mask = there & (i < D) & (k < W)
                x_at = x_planes + i * xd * X_VEC
                z_at = z_planes + i * zd * Z_VEC
                if SH == 2:  # both lines before either is stored, so that they share their loads
                    below = _line(
                        DY, AT, SLOPE, g_planes, y_planes, lanes, cd, ch, cw, there,
                        D, H, W, OD, OH, OW, gc, gd, gh, gw, yc, yd, yh, yw, divisor,
                        rd, 1, rw, GROUP, COUNT, DIMS, KD, KH, KW, SD, SH, SW, PD, PH, PW,
                        CLIP_D, CLIP_H, CLIP_W, LAST, G_VEC, Y_VEC, BLOCK_R, BLOCK_I,
                    )  # fmt: skip
                    _store(
                        DX, X, below, x_at, z_at, ch * SH + 1, k, lanes, mask, H, norm,
                        xc, xh, xw, zc, zh, zw, SEND, LAST, X_VEC, Z_VEC,
                    )  # fmt: skip
                _store(
                    DX, X, dx, x_at, z_at, ch * SH + rh, k, lanes, mask, H, norm,
                    xc, xh, xw, zc, zh, zw, SEND, LAST, X_VEC, Z_VEC,
                )  # fmt: skip
