"""Antialiased interpolation of (N, C, H, W): a filter as wide as an output is in the source.

    y[o] = sum over the places of o's windows of w_h w_w x[i_h, i_w]
    dx[i] = sum over the outputs o whose windows have i, of the same weights times dy[o]

Along a dimension the window of o has the places within `support` of its centre scale * (o + 0.5).
The weights are those of the filter (linear, or cubic with A = -0.5), divided by their sum. All of
it is computed in fp32, as in ATen. ATen also rounds weights, and the sums along W, to the type of
x.

Memory-bound. Elements moved, if x has E and y has F of them:
    forward    E + F. Of channels last, PyTorch copies x, and then y: 3E + 3F
    backward   E + F. PyTorch fills dx with zeros and adds to it with atomics: 3E + F
Under autocast PyTorch copies x of 16 bits to fp32 first, and dx back: 6E + 6E bytes more.

The backward is a gather. The inverse of the centre tells which windows contain a place. A window
that rounding moved by less than `slack` outputs is tried, too. As in kernels/upsampling.py, the
result is walked in the order of its storage, and the source is read by strides.
"""

import math

import triton
import triton.language as tl

from fastnn.kernels._launch import kernel
from fastnn.kernels._sizes import cdiv
from fastnn.kernels._tl import empty_in_layout
from fastnn.kernels.gather import near
from fastnn.kernels.upsampling import _float32, _tile


@triton.jit
def linear(x):
    return tl.maximum(1.0 - tl.abs(x), 0.0)


@triton.jit
def cubic(x):
    x = tl.abs(x)
    inner = (1.5 * x - 2.5) * x * x + 1.0
    outer = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return tl.where(x < 1.0, inner, tl.where(x < 2.0, outer, 0.0))


@triton.jit
def _window(o, scale, support, inverse, size, taps, FILTER: tl.constexpr):
    """Of the window of output o: its first place, how many it has, how far the first one is from
    the centre, and the sum of the filter."""
    centre = scale * (o.to(tl.float32) + 0.5)
    first = tl.maximum((centre - support + 0.5).to(tl.int32), 0)
    count = tl.minimum((centre + support + 0.5).to(tl.int32), size) - first
    off = first.to(tl.float32) - centre
    total = tl.zeros(o.shape, tl.float32)
    for t in range(taps):
        total += tl.where(t < count, FILTER((t + off + 0.5) * inverse), 0.0)
    return first, count, off, tl.where(total == 0.0, 1.0, total)


@triton.jit
def _weight(t, off, inverse, total, FILTER: tl.constexpr):
    """The weight of the place that is t after the first one."""
    return FILTER((t + off + 0.5) * inverse) / total


@triton.jit
def _place(
    col_tiles, C, n_step, c_step, h_size, w_size,
    LAST: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Of the elements of a program's tile: rows, columns, places along H and W, and the address of
    their (n, c), or of their n and column, in the tensor that is read."""
    row = (tl.program_id(0) // col_tiles * ROWS + tl.arange(0, ROWS))[:, None]
    col = (tl.program_id(0) % col_tiles * COLS + tl.arange(0, COLS))[None, :]
    if LAST:
        w, z = row % w_size, row // w_size
        h, z = z % h_size, z // h_size
        at = z * (n_step * UNIT) + col * (c_step if UNIT == 1 else 1)
    else:
        w, h, z = col, row % h_size, row // h_size
        at = z // C * (n_step * UNIT) + z % C * c_step
    return row, col, h, w, at


# Rows are counted by N, C and H, and columns are W. With LAST, rows are counted by N, H and W, and
# columns are C. `scale` is the width of an output in the source. `inverse` is what the filter is
# stretched by. `taps` is the most places that a window has. 32 bits index all of it.


@kernel(
    do_not_specialize=[
        "rows", "col_tiles", "C", "n_step", "c_step", "h_out", "h_size", "h_step", "h_taps",
        "w_out", "w_size", "w_taps", "cols",
    ]
)  # fmt: skip
def _antialias_fwd_kernel(
    X, Y, rows, col_tiles, C, n_step, c_step,
    h_out, h_size, h_step, h_scale, h_support, h_inverse, h_taps,
    w_out, w_size, w_step, w_scale, w_support, w_inverse, w_taps, cols,
    FILTER: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr, STORE_UNIT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program computes a tile of ROWS by COLS of y, and loops over the windows of its outputs.

    X (N, C, H, W): the source, read through strides. Y: the result, dense, its rows are contiguous.
    """
    cols = cols * STORE_UNIT
    row, col, h, w, at = _place(col_tiles, C, n_step, c_step, h_out, w_out, LAST, UNIT, ROWS, COLS)
    there = (row < rows) & (col < cols)
    if LAST:
        w_step = w_step * UNIT
    h_first, h_count, h_off, h_total = _window(
        h, h_scale, h_support, h_inverse, h_size, h_taps, FILTER
    )
    w_first, w_count, w_off, w_total = _window(
        w, w_scale, w_support, w_inverse, w_size, w_taps, FILTER
    )
    at = at + h_first * (h_step * UNIT) + w_first * w_step
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for th in range(h_taps):
        along = tl.zeros((ROWS, COLS), tl.float32)
        h_weight = _weight(th, h_off, h_inverse, h_total, FILTER)
        # A place of weight 0 is not read: an infinity there would make nan.
        within = there & (th < h_count) & (h_weight != 0.0)
        for tw in range(w_taps):
            to = at + (th * (h_step * UNIT) + tw * w_step)
            weight = _weight(tw, w_off, w_inverse, w_total, FILTER)
            x = tl.load(X + to, mask=within & (tw < w_count) & (weight != 0.0), other=0.0)
            along += weight * x.to(tl.float32)
        acc += h_weight * along
    tl.store(Y + row * cols + col, acc.to(Y.dtype.element_ty), mask=there)


@triton.jit
def _part(i, o, out, scale, support, inverse, size, taps, FILTER: tl.constexpr):
    """The weight of place i in output o, and whether that gives it a part in the gradient."""
    first, count, off, total = _window(o, scale, support, inverse, size, taps, FILTER)
    weight = _weight(i - first, off, inverse, total, FILTER)
    inside = (i >= first) & (i < first + count) & (o < out)
    return weight, inside & (weight != 0.0)


@triton.jit
def _earliest(i, support, back, slack):
    """The first output whose window may have place i."""
    o = tl.ceil((i.to(tl.float32) + 0.5 - support) * back - 0.5 - slack).to(tl.int32)
    return tl.maximum(o, 0)


@kernel(
    do_not_specialize=[
        "rows", "col_tiles", "C", "n_step", "c_step",
        "h_out", "h_size", "h_step", "h_taps", "h_from",
        "w_out", "w_size", "w_taps", "w_from", "cols",
    ]
)  # fmt: skip
def _antialias_bwd_kernel(
    DY, DX, rows, col_tiles, C, n_step, c_step,
    h_out, h_size, h_step, h_scale, h_support, h_inverse, h_taps, h_back, h_slack, h_from,
    w_out, w_size, w_step, w_scale, w_support, w_inverse, w_taps, w_back, w_slack, w_from, cols,
    FILTER: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr, STORE_UNIT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program computes a tile of ROWS by COLS of dx, and loops over the outputs of its places.

    DY (N, C, H, W): the gradient, read through strides. DX: dense, its rows are contiguous.
    """
    cols = cols * STORE_UNIT
    row, col, h, w, at = _place(
        col_tiles, C, n_step, c_step, h_size, w_size, LAST, UNIT, ROWS, COLS
    )
    there = (row < rows) & (col < cols)
    if LAST:
        w_step = w_step * UNIT
    h_first = _earliest(h, h_support, h_back, h_slack)
    w_first = _earliest(w, w_support, w_back, w_slack)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for tw in range(w_from):
        o_w = w_first + tw
        w_w, hit_w = _part(w, o_w, w_out, w_scale, w_support, w_inverse, w_size, w_taps, FILTER)
        along = tl.zeros((ROWS, COLS), tl.float32)
        for th in range(h_from):
            o_h = h_first + th
            w_h, hit_h = _part(h, o_h, h_out, h_scale, h_support, h_inverse, h_size, h_taps, FILTER)
            to = at + o_h * (h_step * UNIT) + o_w * w_step
            dy = tl.load(DY + to, mask=there & hit_w & hit_h, other=0.0)
            along += w_h * dy.to(tl.float32)
        acc += w_w * along
    tl.store(DX + row * cols + col, acc.to(DX.dtype.element_ty), mask=there)


# ---- launchers ----------------------------------------------------------------------------------

_REACH = {"linear": 1.0, "cubic": 2.0}  # of the filter, both ways


def _axis(out, size, step, scale, mode, backward):
    """What a kernel takes of a dimension of `out` outputs and `size` places, `step` apart."""
    support = _float32(_REACH[mode] * scale) if scale >= 1 else _REACH[mode]
    inverse = _float32(1.0 / scale) if scale >= 1 else 1.0
    taps = min(size, 2 * math.ceil(support) + 1)
    axis = (out, size, step, scale, support, inverse, taps)
    if not backward:
        return axis
    if not scale:  # one output
        return *axis, 0.0, 0.0, out
    slack = out * 2.0**-19  # more than rounding makes of it
    touched = math.floor(2 * support / scale + 2 * slack) + 1
    return *axis, _float32(1.0 / scale), slack, min(out, touched)


def _launch(launched, source, result, order, mode, axes):
    last = order[-1] == 1
    h, w = axes
    n_step, c_step, h_step, w_step = source.stride()
    cols = result.shape[order[-1]]
    wide = last and c_step == 1
    unit = math.gcd(cols, n_step, h_step, w_step, 8) if wide else 1
    store_unit = math.gcd(cols, 8)
    config = _tile(cols, 8 if wide else 4)
    count, col_tiles = result.numel() // cols, cdiv(cols, config["COLS"])
    launched(
        (cdiv(count, config["ROWS"]) * col_tiles,), source, result, count, col_tiles,
        result.shape[1], n_step // unit, c_step,
        *h[:2], h_step // unit, *h[3:], *w[:2], w_step // unit, *w[3:], cols // store_unit,
        FILTER=globals()[mode], LAST=last, UNIT=unit, STORE_UNIT=store_unit, **config,
    )  # fmt: skip


def fwd(x, size, mode, scales, dtype, channels_last):
    """x (N, C, H, W) of any strides -> y (N, C, *size), dense."""
    x = near(x)
    y, order = empty_in_layout((*x.shape[:2], *size), x, dtype, channels_last)
    if y.numel():
        axes = [
            _axis(out, n, step, s, mode, False)
            for out, n, step, s in zip(size, x.shape[2:], x.stride()[2:], scales, strict=True)
        ]
        _launch(_antialias_fwd_kernel, x, y, order, mode, axes)
    return y


def bwd(dy, size, mode, scales, dtype, channels_last):
    """dy (N, C, H, W) of any strides -> dx (N, C, *size), dense."""
    dy = near(dy)
    dx, order = empty_in_layout((*dy.shape[:2], *size), dy, dtype, channels_last)
    if dx.numel():
        axes = [
            _axis(out, n, step, s, mode, True)
            for out, n, step, s in zip(dy.shape[2:], size, dy.stride()[2:], scales, strict=True)
        ]
        _launch(_antialias_bwd_kernel, dy, dx, order, mode, axes)
    return dx
