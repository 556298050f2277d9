"""Norms with a scale per channel: batch, group and instance norm, with the activation that follows.

    y = f((x - mean) * rstd * w + b + r),  rstd = 1 / sqrt(var + eps)      x_hat = (x - mean) * rstd
    dz = f'(dy);  g = dz * w;  dx = (g - x_hat * avg(g * x_hat) - avg(g)) * rstd
    dw = sum of dz * x_hat, db = sum of dz, over all but the channel;  dr = dz

Memory-bound; passes over the elements (R read, W write):
    stock   statistics 1R, y 1R 1W, f 1R 1W; f' 2R 1W, sums 2R, dx 2R 1W                13
    here    statistics 1R, y 1R 1W; sums 2R, dx 2R 1W                                    8
    here, if the elements of a statistic fit in registers: 1R 1W; 2R 1W                  5
f' is computed from x and the statistics, so no mask and no result of f is read. With a residual r,
f' is computed from y. The passes are then 11 here, and 16 in PyTorch.

The kernels see an input (N, C, *) as O x C x J: O outer indices, C channels, and J elements that a
kernel loops over. In batch norm O = 1, and J runs over samples and positions. In group norm O = N,
J runs over positions, and D = C / groups channels share their statistics. The layout says where an
element lies; S is the number of positions of a plane:

    planes     o * C * S + c * S + j               contiguous, one sample for each o
    samples    j // S * C * S + c * S + j % S      contiguous, J runs through the samples
    last       o * J * C + j * C + c               channels last

Batch norm of many small planes, such as 7 x 7, has kernels of its own. There a tile has the planes
of some neighbouring channels as one run of memory. So its accesses are wide, although not every
plane starts at a multiple of 16 bytes.

If the elements of a statistic do not fit in registers, each program reduces a chunk of J by
Welford's recurrence, and a second kernel combines the chunks in a fixed order. Other sums across
programs also go through partial sums.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastnn.kernels import norm, pointwise
from fastnn.kernels._config import tunable
from fastnn.kernels._launch import kernel
from fastnn.kernels._partials import add_up, gradient_of
from fastnn.kernels._sizes import cdiv, next_power_of_2

WHOLE = 16384  # forward: the most elements of a statistic that stay in registers from load to store
WHOLE_BWD = 8192  # the same for the backward, which also holds dy
TILE = 2048
PROGRAMS = 1024  # enough tiles to fill a GPU
GRID_Y = 65535  # the largest second dimension of a grid


# ---- device functions ---------------------------------------------------------------------------


@triton.jit
def _sizes(C, S, N, LAYOUT: tl.constexpr, UNIT: tl.constexpr):
    """(C, S, number of vectors in J).

    The size along which memory neighbours run is passed divided by UNIT. So the compiler sees the
    factor, and makes accesses as wide as it allows.
    """
    V = S * N
    if LAYOUT == "last":
        C *= UNIT
    else:
        S *= UNIT
    return C, S, V


@triton.jit
def _offsets(o, c, v0, C, S, V, LAYOUT: tl.constexpr, U: tl.constexpr, BLOCK_V: tl.constexpr):
    """Addresses of the elements (c, v0 + v, u): a 64-bit base, and offsets from it."""
    v = tl.arange(0, BLOCK_V)
    u = tl.arange(0, U)[None, None, :]
    rows = c[:, None, None]
    if LAYOUT == "last":
        base = (o * V + v0) * C
        offs = v[None, :, None] * C + rows + u
    elif LAYOUT == "samples":
        base = o * U  # 0, in a form that shows the compiler that it is aligned
        n = (v0 + v) // (S // U)
        start = n.to(tl.int64) * C * S + (v0 + v - n * (S // U)) * U
        offs = start[None, :, None] + (rows * S + u)
    else:
        base = o * C * S + v0 * U
        offs = rows * S + (v[None, :, None] * U + u)
    return base, offs


@triton.jit
def _gradient_with_each(DY, MORE, at, plane, mask):
    """The sum of a gradient at `at` and of that of its plane, as `gradient_of` makes it."""
    dy = tl.load(DY + at, mask=mask, other=0.0).to(tl.float32)
    dy += tl.load(MORE + plane, mask=mask, other=0.0).to(tl.float32)
    return dy.to(DY.dtype.element_ty).to(tl.float32)


@triton.jit
def _gradient(
    DY, MORE, at, o, c, v0, C, S, mask, LAYOUT: tl.constexpr, U: tl.constexpr, EACH: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The gradient of y at the elements (c, v0 + v, u), whose addresses are `at`, in float32.

    With MORE, the sum of two, rounded as PyTorch rounds it. EACH: MORE has one for each plane.
    """
    if EACH:
        if LAYOUT == "planes":
            plane = (o * C + c)[:, None, None]
        else:
            n = (v0 + tl.arange(0, BLOCK_V)) // (S // U)
            plane = n.to(tl.int64)[None, :, None] * C + c[:, None, None]
        return _gradient_with_each(DY, MORE, at, plane, mask)
    return gradient_of(DY, MORE, at, mask)


@triton.jit
def _sum(x):
    """Sum over all axes but the first."""
    return tl.sum(tl.sum(x, 2), 1)


@triton.jit
def _per_channel(P, c, C):
    """Parameters or statistics of channels c, in float32, along the first axis of a tile."""
    return tl.load(P + c, mask=c < C, other=0.0).to(tl.float32)


@triton.jit
def _at_program(C, BLOCK_C: tl.constexpr):
    """(outer index, first channel) of a program."""
    blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    return (pid // blocks).to(tl.int64), pid % blocks * BLOCK_C


@triton.jit
def _normalised(x, mean, rstd, w, b):
    x_hat = (x - mean[:, None, None]) * rstd[:, None, None]
    return x_hat, x_hat * w[:, None, None] + b[:, None, None]


@triton.jit
def _through(dy, z, Y, at, mask, a, b, FORMULA: tl.constexpr, GRADIENT: tl.constexpr):
    """dz: the part of dy that passes the activation."""
    if GRADIENT is not None:
        if Y is not None:
            z = tl.load(Y + at, mask=mask, other=0.0).to(tl.float32)
        elif FORMULA is not None:  # the gradient's formula takes y
            z = FORMULA(z, a, b)
        dy = GRADIENT(dy, z, a, b)
    return tl.where(mask, dy, 0.0)


@triton.jit
def _store_dx(DX, REST, at, dx, mask):
    """Store dx. With REST, the sum of the two, each rounded first, as PyTorch adds them."""
    dx = dx.to(DX.dtype.element_ty)
    if REST is not None:
        rest = tl.load(REST + at, mask=mask, other=0.0).to(tl.float32)
        dx = (dx.to(tl.float32) + rest).to(DX.dtype.element_ty)
    tl.store(DX + at, dx, mask=mask)


@triton.jit
def _rstd_of(var, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(var + eps))


@triton.jit
def _loaded(MEAN, RSTD, W, B, st, c, C, eps, VARIANCE: tl.constexpr):
    """Mean, rstd, weight and bias of channels c. `st` is the index of their statistics."""
    mean = tl.load(MEAN + st, mask=c < C, other=0.0).to(tl.float32)
    rstd = tl.load(RSTD + st, mask=c < C, other=1.0).to(tl.float32)
    if VARIANCE:
        rstd = _rstd_of(rstd, eps)
    w = tl.full(c.shape, 1.0, tl.float32)
    b = tl.zeros(c.shape, tl.float32)
    if W is not None:
        w = _per_channel(W, c, C)
    if B is not None:
        b = _per_channel(B, c, C)
    return mean, rstd, w, b


@triton.jit
def _track(RUNNING_MEAN, RUNNING_VAR, at, mask, mean, var, count, momentum):
    """Move running statistics by `momentum` towards mean and the unbiased variance."""
    unbiased = tl.div_rn(var * count, count - 1.0)
    if RUNNING_MEAN is not None:
        old = tl.load(RUNNING_MEAN + at, mask=mask, other=0.0).to(tl.float32)
        new = momentum * mean + (1.0 - momentum) * old
        tl.store(RUNNING_MEAN + at, new.to(RUNNING_MEAN.dtype.element_ty), mask=mask)
    if RUNNING_VAR is not None:
        old = tl.load(RUNNING_VAR + at, mask=mask, other=0.0).to(tl.float32)
        new = momentum * unbiased + (1.0 - momentum) * old
        tl.store(RUNNING_VAR + at, new.to(RUNNING_VAR.dtype.element_ty), mask=mask)


# ---- statistics that fit in registers -----------------------------------------------------------


@triton.jit
def _members(C, D, D_UNIT: tl.constexpr, GROUPED: tl.constexpr, BLOCK_C: tl.constexpr):
    """(outer index, channels, their limit, indices of their statistics) of a program.

    The program has all channels of one group, or some channels that are groups of their own.
    """
    if GROUPED:
        D = D * D_UNIT
        groups = C // D
        pid = tl.program_id(0)
        o = (pid // groups).to(tl.int64)
        first = pid % groups * D
        c = first + tl.arange(0, BLOCK_C)
        limit = first + D
        st = o * groups + pid % groups + tl.zeros((BLOCK_C,), tl.int32)
    else:
        o, first = _at_program(C, BLOCK_C)
        c = first + tl.arange(0, BLOCK_C)
        limit = C
        st = o * C + c
    return o, c, limit, st


@triton.jit
def _shared(x, GROUPED: tl.constexpr):
    """For each channel, the sum over all channels that share its statistics."""
    if GROUPED:
        x = tl.zeros_like(x) + tl.sum(x, 0)
    return x


@kernel(do_not_specialize=["C", "S", "N", "D"])
def _channel_fwd_kernel(
    X, W, B, R, Y, MEAN, RSTD, RUNNING_MEAN, RUNNING_VAR, C, S, N, D, eps, momentum, a, b,
    LAYOUT: tl.constexpr, UNIT: tl.constexpr, D_UNIT: tl.constexpr, GROUPED: tl.constexpr,
    FORMULA: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A program normalises BLOCK_C channels of one outer index, or one group of channels, at once.

    X, R, Y: (O, C, J) in LAYOUT, float; R may be None. W, B (C,): float, or None. MEAN, RSTD: (O *
    C,), or (O * groups,) if GROUPED, fp32. RUNNING_MEAN, RUNNING_VAR (C,): float, or None; updated.
    """
    C, S, V = _sizes(C, S, N, LAYOUT, UNIT)
    U: tl.constexpr = 1 if LAYOUT == "last" else UNIT
    o, c, limit, st = _members(C, D, D_UNIT, GROUPED, BLOCK_C)
    base, offs = _offsets(o, c, 0, C, S, V, LAYOUT, U, BLOCK_V)
    mask = (c < limit)[:, None, None] & (tl.arange(0, BLOCK_V) < V)[None, :, None]
    x = tl.load(X + base + offs, mask=mask, other=0.0).to(tl.float32)
    count = (V * U).to(tl.float32)
    if GROUPED:
        count *= (D * D_UNIT).to(tl.float32)
    part = tl.div_rn(1.0, count)  # before the sum, which might overflow fp32
    mean = _shared(_sum(x * part), GROUPED)
    d = tl.where(mask, x - mean[:, None, None], 0.0)
    # If |mean| >> std, the first sum loses low-order digits; summing the deviations recovers them.
    rest = _shared(_sum(d * part), GROUPED)
    mean += rest
    d = tl.where(mask, d - rest[:, None, None], 0.0)
    var = tl.div_rn(_shared(_sum(d * d), GROUPED), count)
    rstd = _rstd_of(var, eps)
    one = c < limit
    if GROUPED:
        one = c == limit - D * D_UNIT
    tl.store(MEAN + st, mean, mask=one)
    tl.store(RSTD + st, rstd, mask=one)
    if RUNNING_MEAN is not None or RUNNING_VAR is not None:
        _track(RUNNING_MEAN, RUNNING_VAR, c, c < limit, mean, var, count, momentum)
    y = d * rstd[:, None, None]
    if W is not None:
        y *= _per_channel(W, c, limit)[:, None, None]
    if B is not None:
        y += _per_channel(B, c, limit)[:, None, None]
    if R is not None:
        y += tl.load(R + base + offs, mask=mask, other=0.0).to(tl.float32)
    if FORMULA is not None:
        y = FORMULA(y, a, b)
    tl.store(Y + base + offs, y.to(Y.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["C", "S", "N", "D"])
def _channel_bwd_kernel(
    DY, MORE, X, W, B, Y, MEAN, RSTD, REST, DX, DZ, DW, DB, C, S, N, D, a, b,
    LAYOUT: tl.constexpr, UNIT: tl.constexpr, D_UNIT: tl.constexpr, GROUPED: tl.constexpr,
    EACH: tl.constexpr, FORMULA: tl.constexpr, GRADIENT: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A program computes dx of BLOCK_C channels of one outer index, or of one group, at once.

    DY, MORE, X, Y, REST, DX, DZ: (O, C, J) in LAYOUT, float. The gradient of y is DY + MORE, or DY
    if MORE is None. If EACH, MORE has one number for each plane, (samples, C). Y is read if f' is
    computed from y. REST is added to dx unless None. DZ is written unless None. W, B (C,): float,
    or None. MEAN, RSTD: as in the forward, fp32. DW, DB: (O, C), fp32 partial sums, or the
    gradients themselves if O is 1; or None.
    """
    C, S, V = _sizes(C, S, N, LAYOUT, UNIT)
    U: tl.constexpr = 1 if LAYOUT == "last" else UNIT
    o, c, limit, st = _members(C, D, D_UNIT, GROUPED, BLOCK_C)
    base, offs = _offsets(o, c, 0, C, S, V, LAYOUT, U, BLOCK_V)
    mask = (c < limit)[:, None, None] & (tl.arange(0, BLOCK_V) < V)[None, :, None]
    dz = _gradient(DY, MORE, base + offs, o, c, 0, C, S, mask, LAYOUT, U, EACH, BLOCK_V)
    x = tl.load(X + base + offs, mask=mask, other=0.0).to(tl.float32)
    mean, rstd, w, bias = _loaded(MEAN, RSTD, W, B, st, c, limit, 0.0, False)
    x_hat, z = _normalised(x, mean, rstd, w, bias)
    dz = _through(dz, z, Y, base + offs, mask, a, b, FORMULA, GRADIENT)
    if DZ is not None:
        tl.store(DZ + base + offs, dz.to(DZ.dtype.element_ty), mask=mask)
    x_hat = tl.where(mask, x_hat, 0.0)
    along = _sum(dz * x_hat)
    total = _sum(dz)
    at = o * C + c
    if DW is not None:
        tl.store(DW + at, along.to(DW.dtype.element_ty), mask=c < limit)
    if DB is not None:
        tl.store(DB + at, total.to(DB.dtype.element_ty), mask=c < limit)
    count = (V * U).to(tl.float32)
    if GROUPED:
        count *= (D * D_UNIT).to(tl.float32)
    if GROUPED:
        along = tl.div_rn(_shared(along * w, GROUPED), count)[:, None, None]
        total = tl.div_rn(_shared(total * w, GROUPED), count)[:, None, None]
        dx = (dz * w[:, None, None] - x_hat * along - total) * rstd[:, None, None]
    # The weight is a factor of all terms. It is multiplied last, because sums of its products might
    # overflow.
    else:
        along = tl.div_rn(along, count)[:, None, None]
        total = tl.div_rn(total, count)[:, None, None]
        dx = (dz - x_hat * along - total) * rstd[:, None, None] * w[:, None, None]
    _store_dx(DX, REST, base + offs, dx, mask)


# ---- small planes -------------------------------------------------------------------------------
#
# Axes of a tile: samples n, and positions p of the planes of CHANNELS neighbouring channels, which
# are neighbours in memory. The channel of a position is computed once for each position, not for
# each element. A division by S is a product with MAGIC = ceil(2^20 / S), exact for p, S < 1024.


@triton.jit
def _planes(
    N, S_units, MAGIC, UNIT: tl.constexpr, CHANNELS: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """(offsets of a tile; which of them exist; slots of positions; which positions exist; channels
    of the slots; which slots exist)"""
    n = tl.arange(0, BLOCK_N)
    p = tl.arange(0, BLOCK_P)
    slot = tl.arange(0, SLOTS)
    run = S_units * UNIT  # so that the compiler sees the factor
    offs = (n.to(tl.int64) * tl.num_programs(0) * run)[:, None]
    offs += (tl.program_id(0) * run + p)[None, :]
    inside = p < run
    mask = (n < N)[:, None] & inside[None, :]
    at = tl.minimum(p * MAGIC >> 20, SLOTS - 1)
    return offs, mask, at, inside, tl.program_id(0) * CHANNELS + slot, slot < CHANNELS


@triton.jit
def _existing(x, mask, WHOLE: tl.constexpr):
    """x, and 0 for samples that do not exist. Positions that do not exist belong to no slot."""
    return x if WHOLE else tl.where(mask, x, 0.0)


@triton.jit
def _by_channel(x, at, inside, SLOTS: tl.constexpr):
    """Sums of a tile over the samples and positions of each slot."""
    member = (tl.arange(0, SLOTS)[:, None] == at[None, :]) & inside[None, :]
    return tl.sum(tl.where(member, tl.sum(x, 0)[None, :], 0.0), 1)


@triton.jit
def _by_position(values, at):
    """The value of its slot for each position, as a row."""
    return tl.gather(values, at, 0)[None, :]


@kernel(do_not_specialize=["S_units", "N", "MAGIC"])
def _planes_fwd_kernel(
    X, W, B, R, Y, MEAN, RSTD, RUNNING_MEAN, RUNNING_VAR, S_units, N, MAGIC, count, eps,
    momentum, a, b,
    UNIT: tl.constexpr, FORMULA: tl.constexpr, CHANNELS: tl.constexpr, SLOTS: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program normalises CHANNELS neighbouring channels of all samples at once.

    X, R, Y (N, C, S): float, contiguous; R may be None. W, B (C,): float, or None. MEAN, RSTD (C,):
    fp32. RUNNING_MEAN, RUNNING_VAR (C,): float, or None; updated. S_units is CHANNELS * S / UNIT,
    and MAGIC is ceil(2^20 / S).
    """
    offs, mask, at, inside, c, there = _planes(
        N, S_units, MAGIC, UNIT, CHANNELS, SLOTS, BLOCK_N, BLOCK_P
    )
    ch = tl.program_id(0) * CHANNELS + at
    x = tl.load(X + offs, mask=mask, other=0.0).to(tl.float32)
    part = tl.div_rn(1.0, count)  # before the sum, which might overflow fp32
    mean = _by_channel(x * part, at, inside, SLOTS)
    d = _existing(x - _by_position(mean, at), mask, WHOLE)
    # If |mean| >> std, the first sum loses low-order digits; summing the deviations recovers them.
    rest = _by_channel(d * part, at, inside, SLOTS)
    mean += rest
    d = _existing(d - _by_position(rest, at), mask, WHOLE)
    var = tl.div_rn(_by_channel(d * d, at, inside, SLOTS), count)
    rstd = _rstd_of(var, eps)
    tl.store(MEAN + c, mean, mask=there)
    tl.store(RSTD + c, rstd, mask=there)
    if RUNNING_MEAN is not None or RUNNING_VAR is not None:
        _track(RUNNING_MEAN, RUNNING_VAR, c, there, mean, var, count, momentum)
    y = d * _by_position(rstd, at)
    if W is not None:
        y *= tl.load(W + ch, mask=inside, other=0.0).to(tl.float32)[None, :]
    if B is not None:
        y += tl.load(B + ch, mask=inside, other=0.0).to(tl.float32)[None, :]
    if R is not None:
        y += tl.load(R + offs, mask=mask, other=0.0).to(tl.float32)
    if FORMULA is not None:
        y = FORMULA(y, a, b)
    tl.store(Y + offs, y.to(Y.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["S_units", "N", "MAGIC"])
def _planes_bwd_kernel(
    DY, MORE, X, W, B, Y, MEAN, RSTD, DX, DZ, DW, DB, S_units, N, MAGIC, count, a, b,
    UNIT: tl.constexpr, EACH: tl.constexpr, FORMULA: tl.constexpr, GRADIENT: tl.constexpr,
    CHANNELS: tl.constexpr, SLOTS: tl.constexpr, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program computes dx of CHANNELS neighbouring channels of all samples at once.

    DY, MORE, X, Y, DX, DZ (N, C, S): float, contiguous. The gradient of y is DY + MORE, or DY if
    MORE is None. If EACH, MORE has one number for each plane, (N, C). Y is read if f' is computed
    from y. DZ is written unless None. W, B (C,): float, or None. MEAN, RSTD (C,): fp32. DW, DB
    (C,): float, or None. S_units is CHANNELS * S / UNIT, and MAGIC is ceil(2^20 / S).
    """
    offs, mask, at, inside, c, there = _planes(
        N, S_units, MAGIC, UNIT, CHANNELS, SLOTS, BLOCK_N, BLOCK_P
    )
    ch = tl.program_id(0) * CHANNELS + at
    if EACH:
        n = tl.arange(0, BLOCK_N).to(tl.int64)[:, None]
        plane = n * tl.num_programs(0) * CHANNELS + ch[None, :]
        dz = _gradient_with_each(DY, MORE, offs, plane, mask)
    else:
        dz = gradient_of(DY, MORE, offs, mask)
    x = tl.load(X + offs, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(RSTD + ch, mask=inside, other=1.0)[None, :]
    x_hat = (x - tl.load(MEAN + ch, mask=inside, other=0.0)[None, :]) * rstd
    w = tl.full((1, BLOCK_P), 1.0, tl.float32)
    if W is not None:
        w = tl.load(W + ch, mask=inside, other=0.0).to(tl.float32)[None, :]
    z = x_hat
    if FORMULA is not None or GRADIENT is not None:
        z = x_hat * w
        if B is not None:
            z += tl.load(B + ch, mask=inside, other=0.0).to(tl.float32)[None, :]
    dz = _through(dz, z, Y, offs, mask, a, b, FORMULA, GRADIENT)
    if DZ is not None:
        tl.store(DZ + offs, dz.to(DZ.dtype.element_ty), mask=mask)
    along = _by_channel(_existing(dz * x_hat, mask, WHOLE), at, inside, SLOTS)
    total = _by_channel(dz, at, inside, SLOTS)
    if DW is not None:
        tl.store(DW + c, along.to(DW.dtype.element_ty), mask=there)
    if DB is not None:
        tl.store(DB + c, total.to(DB.dtype.element_ty), mask=there)
    along = _by_position(tl.div_rn(along, count), at)
    total = _by_position(tl.div_rn(total, count), at)
    # The weight is multiplied last, because sums of its products might overflow.
    dx = (dz - x_hat * along - total) * rstd * w
    tl.store(DX + offs, dx.to(DX.dtype.element_ty), mask=mask)


# ---- statistics that do not fit in registers ----------------------------------------------------


@triton.jit
def _origin(X, o, g, mask, outer_stride, group_stride):
    """The first element of each of the groups g, from which the others are subtracted.

    Where numbers are far from zero, their differences are exact, and a mean of differences is not
    rounded to the last place of the numbers.
    """
    return tl.load(X + o * outer_stride + g * group_stride, mask=mask, other=0.0).to(tl.float32)


@kernel(do_not_specialize=["C", "S", "N", "D", "outer_stride", "group_stride", "span", "K"])
def _channel_moments_kernel(
    X, MEAN, M2, C, S, N, D, outer_stride, group_stride, span, K,
    LAYOUT: tl.constexpr, UNIT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A program computes the moments of chunk k of J of BLOCK_C channels, and loops over the chunk.

    X: (O, C, J) in LAYOUT, float. MEAN, M2: (O, K, C) fp32, of each chunk. MEAN is relative to the
    first element of the D channels that share statistics, see `_origin`.
    """
    C, S, V = _sizes(C, S, N, LAYOUT, UNIT)
    U: tl.constexpr = 1 if LAYOUT == "last" else UNIT
    o, first = _at_program(C, BLOCK_C)
    k = tl.program_id(1)
    c = first + tl.arange(0, BLOCK_C)
    start = k * span
    stop = tl.minimum(start + span, V)
    v = tl.arange(0, BLOCK_V)
    origin = _origin(X, o, c // D, c < C, outer_stride, group_stride)[:, None, None]
    mean = tl.zeros((BLOCK_C, BLOCK_V), tl.float32)
    m2 = tl.zeros((BLOCK_C, BLOCK_V), tl.float32)
    step = 0.0
    for v0 in range(start, stop, BLOCK_V):
        base, offs = _offsets(o, c, v0, C, S, V, LAYOUT, U, BLOCK_V)
        mask = (c < C)[:, None] & (v0 + v < stop)[None, :]
        x = tl.load(X + base + offs, mask=mask[:, :, None], other=0.0).to(tl.float32) - origin
        # The moments of a vector of U elements, in two passes over it, then Chan's formula.
        middle = tl.sum(x * (1.0 / U), 2)  # the sum might overflow
        share = tl.div_rn(1.0, step + 1.0)
        d = tl.where(mask, middle - mean, 0.0)
        mean += d * share
        apart = d * (d * (step * share * U))
        if U > 1:
            x -= middle[:, :, None]
            apart += tl.where(mask, tl.sum(x * x, 2), 0.0)
        m2 += apart
        step += 1.0
    # Each lane has the moments of its own vectors.
    count = tl.maximum((stop - start - v + BLOCK_V - 1) // BLOCK_V, 0).to(tl.float32)[None, :] * U
    d = tl.where(count > 0, mean, 0.0)
    share = tl.div_rn(count, ((stop - start) * U).to(tl.float32))  # d * count might overflow
    pooled = tl.sum(d * share, 1)
    d = tl.where(count > 0, mean - pooled[:, None], 0.0)
    m2 = tl.sum(m2 + count * d * d, 1)
    at = (o * K + k) * C + c
    tl.store(MEAN + at, pooled, mask=c < C)
    tl.store(M2 + at, m2, mask=c < C)


@triton.jit
def _parts(e, g, o, K, D, groups):
    """For part e of a group: whether it exists, its chunk, and its index among the partial sums."""
    k = e // D
    there = (e < K * D)[:, None] & (g < groups)[None, :]
    at = ((o * K + k) * (groups * D) + (e - k * D))[:, None] + (g * D)[None, :]
    return there, k, at


@kernel(
    do_not_specialize=["V", "span", "K", "D", "groups", "outer", "outer_stride", "group_stride"]
)
def _channel_pool_kernel(
    X, PART_MEAN, PART_M2, MEAN, RSTD, RUNNING_MEAN, RUNNING_VAR, V, span, K, D, groups, outer,
    outer_stride, group_stride, eps, momentum,
    U: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """A program combines the chunks of BLOCK_G groups: two loops over the chunks per outer index.

    X, PART_MEAN, PART_M2 (O, K, groups * D): as in `_channel_moments_kernel`. MEAN, RSTD: (O,
    groups) fp32. RUNNING_MEAN, RUNNING_VAR (groups,): float, or None; updated, if D is 1. A chunk
    has `span` of the V vectors of J.
    """
    g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    total = (V * U).to(tl.float32) * D.to(tl.float32)
    sum_mean = tl.zeros((BLOCK_G,), tl.float32)
    sum_var = tl.zeros((BLOCK_G,), tl.float32)
    # If running statistics are updated, one program has all outer indices of its groups.
    for o in range(tl.program_id(1).to(tl.int64), outer, tl.num_programs(1)):
        origin = _origin(X, o, g, g < groups, outer_stride, group_stride)
        acc = tl.zeros((BLOCK_E, BLOCK_G), tl.float32)
        for start in range(0, K * D, BLOCK_E):
            there, k, at = _parts(start + tl.arange(0, BLOCK_E), g, o, K, D, groups)
            count = (tl.minimum(span, V - k * span) * U).to(tl.float32)[:, None]
            part = tl.load(PART_MEAN + at, mask=there, other=0.0)
            acc += tl.where(there, part * tl.div_rn(count, total), 0.0)
        low = tl.sum(acc, 0)
        mean = origin + low
        acc = tl.zeros((BLOCK_E, BLOCK_G), tl.float32)
        for start in range(0, K * D, BLOCK_E):
            there, k, at = _parts(start + tl.arange(0, BLOCK_E), g, o, K, D, groups)
            count = (tl.minimum(span, V - k * span) * U).to(tl.float32)[:, None]
            d = tl.load(PART_MEAN + at, mask=there, other=0.0) - low[None, :]
            m2 = tl.load(PART_M2 + at, mask=there, other=0.0)
            acc += tl.where(there, m2 + count * d * d, 0.0)
        var = tl.div_rn(tl.sum(acc, 0), total)
        tl.store(MEAN + o * groups + g, mean, mask=g < groups)
        tl.store(RSTD + o * groups + g, _rstd_of(var, eps), mask=g < groups)
        sum_mean += mean
        sum_var += var
    if RUNNING_MEAN is not None or RUNNING_VAR is not None:
        mean = tl.div_rn(sum_mean, outer.to(tl.float32))
        var = tl.div_rn(sum_var, outer.to(tl.float32))
        _track(RUNNING_MEAN, RUNNING_VAR, g, g < groups, mean, var, total, momentum)


@kernel(do_not_specialize=["C", "S", "N", "D", "span"])
def _channel_apply_kernel(
    X, W, B, R, Y, MEAN, RSTD, C, S, N, D, span, eps, a, b,
    LAYOUT: tl.constexpr, UNIT: tl.constexpr, VARIANCE: tl.constexpr, FORMULA: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A program normalises a chunk of J of BLOCK_C channels, and loops over the chunk.

    X, R, Y: (O, C, J) in LAYOUT, float; R may be None. W, B (C,): float, or None. MEAN (O, C // D):
    float. RSTD: of the same shape; the variance if VARIANCE.
    """
    C, S, V = _sizes(C, S, N, LAYOUT, UNIT)
    U: tl.constexpr = 1 if LAYOUT == "last" else UNIT
    o, first = _at_program(C, BLOCK_C)
    c = first + tl.arange(0, BLOCK_C)
    mean, rstd, w, bias = _loaded(
        MEAN, RSTD, W, B, o * (C // D) + c // D, c, C, eps, VARIANCE
    )  # fmt: skip
    start = tl.program_id(1) * span
    stop = tl.minimum(start + span, V)
    for v0 in range(start, stop, BLOCK_V):
        base, offs = _offsets(o, c, v0, C, S, V, LAYOUT, U, BLOCK_V)
        mask = (c < C)[:, None, None] & (v0 + tl.arange(0, BLOCK_V) < stop)[None, :, None]
        x = tl.load(X + base + offs, mask=mask, other=0.0).to(tl.float32)
        _, y = _normalised(x, mean, rstd, w, bias)
        if R is not None:
            y += tl.load(R + base + offs, mask=mask, other=0.0).to(tl.float32)
        if FORMULA is not None:
            y = FORMULA(y, a, b)
        tl.store(Y + base + offs, y.to(Y.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["C", "S", "N", "D", "span", "K"])
def _channel_sums_kernel(
    DY, MORE, X, W, B, Y, MEAN, RSTD, DZ, ALONG, TOTAL, C, S, N, D, span, K, eps, a, b,
    LAYOUT: tl.constexpr, UNIT: tl.constexpr, VARIANCE: tl.constexpr, EACH: tl.constexpr,
    FORMULA: tl.constexpr, GRADIENT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A program sums dz x_hat and dz over chunk k of J of BLOCK_C channels, and loops over it.

    DY, MORE, X, Y, DZ: (O, C, J) in LAYOUT, float. The gradient of y is DY + MORE, or DY if MORE is
    None. If EACH, MORE has one number for each plane, (samples, C). Y is read if f' is computed
    from y. DZ is written unless None. W, B (C,): float, or None. MEAN, RSTD: as in
    `_channel_apply_kernel`. ALONG, TOTAL: (O, K, C) fp32, or None.
    """
    C, S, V = _sizes(C, S, N, LAYOUT, UNIT)
    U: tl.constexpr = 1 if LAYOUT == "last" else UNIT
    o, first = _at_program(C, BLOCK_C)
    k = tl.program_id(1)
    c = first + tl.arange(0, BLOCK_C)
    mean, rstd, w, bias = _loaded(
        MEAN, RSTD, W, B, o * (C // D) + c // D, c, C, eps, VARIANCE
    )  # fmt: skip
    along = tl.zeros((BLOCK_C, BLOCK_V, U), tl.float32)
    total = tl.zeros((BLOCK_C, BLOCK_V, U), tl.float32)
    start = k * span
    stop = tl.minimum(start + span, V)
    for v0 in range(start, stop, BLOCK_V):
        base, offs = _offsets(o, c, v0, C, S, V, LAYOUT, U, BLOCK_V)
        mask = (c < C)[:, None, None] & (v0 + tl.arange(0, BLOCK_V) < stop)[None, :, None]
        dz = _gradient(DY, MORE, base + offs, o, c, v0, C, S, mask, LAYOUT, U, EACH, BLOCK_V)
        z = dz
        if ALONG is not None or GRADIENT is not None:
            x = tl.load(X + base + offs, mask=mask, other=0.0).to(tl.float32)
            x_hat, z = _normalised(x, mean, rstd, w, bias)
        dz = _through(dz, z, Y, base + offs, mask, a, b, FORMULA, GRADIENT)
        if DZ is not None:
            tl.store(DZ + base + offs, dz.to(DZ.dtype.element_ty), mask=mask)
        if ALONG is not None:
            along += tl.where(mask, dz * x_hat, 0.0)
        total += dz
    at = (o * K + k) * C + c
    if ALONG is not None:
        tl.store(ALONG + at, _sum(along), mask=c < C)
    if TOTAL is not None:
        tl.store(TOTAL + at, _sum(total), mask=c < C)


@kernel(do_not_specialize=["K", "D", "groups", "outer"])
def _channel_totals_kernel(
    ALONG, TOTAL, W, SUM_ALONG, SUM_TOTAL, DW, DB, K, D, groups, outer,
    BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """A program adds up the chunks of BLOCK_G groups, and loops over outer indices and chunks.

    ALONG, TOTAL: (O, K, groups * D) fp32. W (groups * D,): float, or None. SUM_ALONG, SUM_TOTAL:
    (O, groups) fp32, of the sums times w. DW, DB (groups,): float, or None; written only if D and O
    are 1.
    """
    g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    for o in range(tl.program_id(1).to(tl.int64), outer, tl.num_programs(1)):
        along = tl.zeros((BLOCK_E, BLOCK_G), tl.float32)
        total = tl.zeros((BLOCK_E, BLOCK_G), tl.float32)
        for start in range(0, K * D, BLOCK_E):
            e = start + tl.arange(0, BLOCK_E)
            there, k, at = _parts(e, g, o, K, D, groups)
            w = 1.0
            if W is not None:
                c = (e - k * D)[:, None] + (g * D)[None, :]
                w = tl.load(W + c, mask=there, other=0.0).to(tl.float32)
            along += w * tl.load(ALONG + at, mask=there, other=0.0)
            total += w * tl.load(TOTAL + at, mask=there, other=0.0)
        sum_along = tl.sum(along, 0)
        sum_total = tl.sum(total, 0)
        if DW is not None:  # each channel is its own group, and o = 0
            tl.store(DW + g, sum_along.to(DW.dtype.element_ty), mask=g < groups)
        if DB is not None:
            tl.store(DB + g, sum_total.to(DB.dtype.element_ty), mask=g < groups)
        tl.store(SUM_ALONG + o * groups + g, sum_along, mask=g < groups)
        tl.store(SUM_TOTAL + o * groups + g, sum_total, mask=g < groups)


@kernel(do_not_specialize=["C", "S", "N", "D", "span"])
def _channel_dx_kernel(
    DY, MORE, X, W, B, MEAN, RSTD, SUM_ALONG, SUM_TOTAL, REST, DX, C, S, N, D, span, eps, a, b,
    LAYOUT: tl.constexpr, UNIT: tl.constexpr, VARIANCE: tl.constexpr, GROUPED: tl.constexpr,
    FORMULA: tl.constexpr, GRADIENT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A program computes dx of a chunk of J of BLOCK_C channels, and loops over the chunk.

    DY, X, REST, DX: (O, C, J) in LAYOUT, float. MORE (samples, C): float, one number for each
    plane, or None; the gradient of y is DY + MORE. REST is added to dx unless None. W, B (C,):
    float, or None. MEAN, RSTD: as in `_channel_apply_kernel`. SUM_ALONG, SUM_TOTAL: (O, C // D)
    fp32, or None if the statistics are constants.
    """
    C, S, V = _sizes(C, S, N, LAYOUT, UNIT)
    U: tl.constexpr = 1 if LAYOUT == "last" else UNIT
    o, first = _at_program(C, BLOCK_C)
    c = first + tl.arange(0, BLOCK_C)
    st = o * (C // D) + c // D
    mean, rstd, w, bias = _loaded(MEAN, RSTD, W, B, st, c, C, eps, VARIANCE)
    if SUM_ALONG is not None:
        count = (V * U).to(tl.float32) * D.to(tl.float32)
        along = tl.div_rn(tl.load(SUM_ALONG + st, mask=c < C, other=0.0), count)[:, None, None]
        total = tl.div_rn(tl.load(SUM_TOTAL + st, mask=c < C, other=0.0), count)[:, None, None]
    start = tl.program_id(1) * span
    stop = tl.minimum(start + span, V)
    for v0 in range(start, stop, BLOCK_V):
        base, offs = _offsets(o, c, v0, C, S, V, LAYOUT, U, BLOCK_V)
        mask = (c < C)[:, None, None] & (v0 + tl.arange(0, BLOCK_V) < stop)[None, :, None]
        each: tl.constexpr = MORE is not None
        dz = _gradient(DY, MORE, base + offs, o, c, v0, C, S, mask, LAYOUT, U, each, BLOCK_V)
        z = dz
        if SUM_ALONG is not None or GRADIENT is not None:
            x = tl.load(X + base + offs, mask=mask, other=0.0).to(tl.float32)
            x_hat, z = _normalised(x, mean, rstd, w, bias)
        dz = _through(dz, z, None, base + offs, mask, a, b, FORMULA, GRADIENT)
        # In a group, the sums contain the weights. Else the weight is multiplied last.
        if GROUPED:
            dz *= w[:, None, None]
        if SUM_ALONG is not None:
            dz -= x_hat * along + total
        dx = dz * rstd[:, None, None]
        if not GROUPED:
            dx *= w[:, None, None]
        _store_dx(DX, REST, base + offs, dx, mask)


# ---- launchers ----------------------------------------------------------------------------------


class _View(NamedTuple):
    """An input as O x C x J, with J = N * S. D channels share their statistics."""

    layout: str
    outer: int
    C: int
    S: int
    N: int
    D: int

    @property
    def unit(self):
        return math.gcd(self.C if self.layout == "last" else self.S, 8)

    @property
    def vector(self):
        return 1 if self.layout == "last" else self.unit

    @property
    def V(self):
        return self.N * self.S // self.vector

    @property
    def strides(self):
        """From an outer index to the next, and from a group of D channels to the next."""
        return self.C * self.S, self.D * (1 if self.layout == "last" else self.S)

    def arguments(self, unit):
        """C, S and N in the form that the kernels take."""
        if self.layout == "last":
            return self.C // unit, self.S, self.N
        return self.C, self.S // unit, self.N


def _view(x, groups, last):
    N, C = x.shape[:2]
    S = math.prod(x.shape[2:])
    last = last or S == 1
    if groups:
        return _View("last" if last else "planes", N, C, S, 1, C // groups)
    if last:
        return _View("last", 1, C, S, N, 1)
    return _View("planes" if N == 1 else "samples", 1, C, S, N, 1)


def _whole_config(view, itemsize, most):
    """How a program holds a whole statistic in registers; None if it does not fit."""
    layout, D = view.layout, view.D
    wide = layout == "last"
    unit = math.gcd(D, 8) if wide and D > 1 else view.unit
    block_v = next_power_of_2(view.V)
    block_j = block_v * view.vector
    if D > 1:
        block_c = next_power_of_2(D)
        if wide and view.S > 1 and D * itemsize < 32:
            return None  # it would use only part of each memory sector
    elif wide:
        block_c = min(next_power_of_2(view.C), 64 // itemsize)
        while block_c * block_j > most // 2 and block_c * itemsize > 32:
            block_c //= 2
    else:
        block_c = max(1, min(next_power_of_2(view.C), 1024 // block_j))
    elements = block_c * block_j
    if elements > (most // 2 if unit == 1 else most):
        return None
    each = 256 if unit == 1 else 1024 if wide and D == 1 else 512  # elements per warp
    return {
        "LAYOUT": layout,
        "UNIT": unit,
        "D_UNIT": unit if wide and D > 1 else 1,
        "GROUPED": D > 1,
        "BLOCK_C": block_c,
        "BLOCK_V": block_v,
        "num_warps": min(max(elements // each, 4), 16),
    }


PLANES = 16384  # the most elements of a tile of small planes, with those that do not exist


def _planes_launch(x, view, light=True):
    """(programs, arguments S_units, N, MAGIC and count, config) for small planes of x; or None.

    None where accesses would be narrower than with a plane in each row of a tile, or where fewer
    programs than multiprocessors would have all the work. `light`: not the gradient of an
    activation, which takes more registers.
    """
    C, S, N = view.C, view.S, view.N
    if view.layout != "samples" or S > 512:
        return None
    widest = 16 // x.element_size()
    processors = norm.processors_of(x.get_device())
    for unit in (u for u in (8, 4, 2) if math.gcd(S, widest) <= u <= widest):
        channels = unit // math.gcd(S, unit)
        block_n, block_p = next_power_of_2(N), next_power_of_2(channels * S)
        most = PLANES if light and unit > 2 else PLANES // 2
        if block_p > 512 or block_n * block_p > most:
            continue
        while 2 * channels * S <= 256 and 2 * block_p * block_n <= PLANES // 4:
            channels, block_p = 2 * channels, 2 * block_p
        if C % channels or C // channels < processors or block_n * block_p < 1024:
            continue
        return C // channels, (channels * S // unit, N, cdiv(1 << 20, S), float(N * S)), {
            "UNIT": unit,
            "CHANNELS": channels,
            "SLOTS": next_power_of_2(channels),
            "WHOLE": N == block_n,
            "BLOCK_N": block_n,
            "BLOCK_P": block_p,
            "num_warps": min(max(block_n * block_p // (1024 if light else 512), 4), 16),
        }  # fmt: skip
    return None


def reads_once(x, groups, last=False):
    """Whether both passes hold a whole statistic of x in registers, and so read it once each.

    x, groups, last: as for `fwd`, or x has no elements.
    """
    if not x.numel():
        return False
    view, itemsize = _view(x, groups, last), x.element_size()
    if _planes_launch(x, view, light=False) is not None:
        return True
    most = WHOLE_BWD // 2 if x.dtype == torch.float32 else WHOLE_BWD
    return all(_whole_config(view, itemsize, m) is not None for m in (WHOLE, most))


def _whole_launch(view, config):
    """(programs, arguments C, S, N and D) for a `_whole_config`."""
    blocks = cdiv(view.C, view.D if view.D > 1 else config["BLOCK_C"])
    return view.outer * blocks, (*view.arguments(config["UNIT"]), view.D // config["D_UNIT"])


@tunable("BLOCK_C", "BLOCK_V")
def _tile(view, unit, itemsize):
    if view.layout == "last":
        block_c = min(next_power_of_2(view.C), 128 // itemsize)
        block_v = min(next_power_of_2(view.V), TILE // block_c)
    else:
        block_j = min(next_power_of_2(view.V) * unit, TILE)
        if view.layout == "samples" and view.S < 256:
            # so that a tile has several channels, which are neighbours in memory
            block_j = min(block_j, 256)
        block_c = (
            min(next_power_of_2(view.C), 8) if view.layout == "samples" else next_power_of_2(view.C)
        )
        block_c = min(block_c, max(1, TILE // 2 // block_j))
        block_v = block_j // unit
    return {
        "LAYOUT": view.layout,
        "UNIT": unit,
        "BLOCK_C": block_c,
        "BLOCK_V": block_v,
        "num_warps": 4,
    }


def _moments_tile(view, itemsize):
    """`_tile`, with more channels where planes are small: sums across lanes cost as much as 16 of
    the elements of a thread, of which it then has 32."""
    config = dict(_tile(view, view.unit, itemsize))
    each = config["BLOCK_V"] * view.vector
    programs = view.outer * view.C * cdiv(view.V, config["BLOCK_V"])
    while (
        view.layout == "planes"
        and 2 * config["BLOCK_C"] * each <= 2 * TILE
        and programs // (2 * config["BLOCK_C"]) >= PROGRAMS
    ):
        config["BLOCK_C"] *= 2
    return config


def _split(view, config, tiles_each):
    """((programs, chunks of J), vectors per chunk).

    A chunk has about `tiles_each` tiles, or fewer if that would leave a GPU idle.
    """
    blocks = view.outer * cdiv(view.C, config["BLOCK_C"])
    tiles = cdiv(view.V, config["BLOCK_V"])
    each = max(1, min(tiles_each, tiles * blocks // PROGRAMS), cdiv(tiles, GRID_Y))
    span = each * config["BLOCK_V"]
    return (blocks, cdiv(view.V, span)), span


def _chunks(view, config):
    """Like `_split`, for sums: only as many chunks as it takes to fill a GPU."""
    blocks = view.outer * cdiv(view.C, config["BLOCK_C"])
    tiles = cdiv(view.V, config["BLOCK_V"])
    each = max(cdiv(tiles * blocks, PROGRAMS), min(tiles, 2), cdiv(tiles, GRID_Y))
    span = each * config["BLOCK_V"]
    return (blocks, cdiv(view.V, span)), span


@tunable("BLOCK_E", "BLOCK_G")
def _pool_tile(parts, D):
    if D > 1:
        return {"BLOCK_E": min(next_power_of_2(parts * D), 1024), "BLOCK_G": 1, "num_warps": 4}
    if parts > 32:  # few steps, because nothing hides their latency
        return {"BLOCK_E": 256, "BLOCK_G": 8, "num_warps": 16}
    return {"BLOCK_E": 32, "BLOCK_G": 32, "num_warps": 4}


def _formulas(formula, gradient):
    return {
        "FORMULA": formula and getattr(pointwise, formula),
        "GRADIENT": gradient and getattr(pointwise, gradient),
    }


def apply(
    x, weight, bias, mean, rstd, y, groups, eps=None, formula=None, a=0.0, b=0.0, residual=None,
    last=False,
):  # fmt: skip
    """x (N, C, *), normalised by given statistics -> y. With eps, `rstd` is the variance."""
    view = _view(x, groups, last)
    config = _tile(view, view.unit, x.element_size())
    grid, span = _split(view, config, 4)
    _channel_apply_kernel(
        grid, x, weight, bias, residual, y, mean, rstd, *view.arguments(config["UNIT"]), view.D,
        span, 0.0 if eps is None else eps, a, b,
        VARIANCE=eps is not None, FORMULA=formula and getattr(pointwise, formula), **config,
    )  # fmt: skip


def fwd(
    x, weight, bias, running_mean, running_var, y, groups, eps, momentum=0.0, formula=None, a=0.0,
    b=0.0, residual=None, last=False,
):  # fmt: skip
    """Normalises x (N, C, *), fills y, and returns mean and rstd.

    x is not empty, and contiguous or, if `last`, channels last. weight and bias are (C,) or None. y
    and the residual have the layout of x. mean and rstd are fp32: (N, groups), or (C,) if groups is
    0 (batch norm). Running statistics (C,), if given, are moved by `momentum` in place.
    """
    shape = (x.shape[0], groups) if groups else x.shape[1:2]
    mean = torch.empty(shape, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    view = _view(x, groups, last)
    tracked = running_mean is not None or running_var is not None
    planes = _planes_launch(x, view)
    if planes is not None:
        programs, sizes, config = planes
        _planes_fwd_kernel(
            (programs,), x, weight, bias, residual, y, mean, rstd, running_mean, running_var,
            *sizes, eps, momentum, a, b, FORMULA=formula and getattr(pointwise, formula), **config,
        )  # fmt: skip
        return mean, rstd
    whole = None
    if not (tracked and groups):
        whole = _whole_config(view, x.element_size(), WHOLE)
    if whole is not None:
        programs, sizes = _whole_launch(view, whole)
        _channel_fwd_kernel(
            (programs,), x, weight, bias, residual, y, mean, rstd, running_mean, running_var,
            *sizes, eps, momentum, a, b, FORMULA=formula and getattr(pointwise, formula), **whole,
        )  # fmt: skip
        return mean, rstd
    config = _moments_tile(view, x.element_size())
    grid, span = _chunks(view, config)
    K = grid[1]
    parts = mean.new_empty((2, view.outer * K * view.C))
    _channel_moments_kernel(
        grid,
        x,
        parts[0],
        parts[1],
        *view.arguments(config["UNIT"]),
        view.D,
        *view.strides,
        span,
        K,
        **config,
    )
    pool = _pool_tile(K, view.D)
    G = view.C // view.D
    _channel_pool_kernel(
        (cdiv(G, pool["BLOCK_G"]), 1 if tracked else min(view.outer, GRID_Y)),
        x, parts[0], parts[1], mean, rstd, running_mean, running_var, view.V, span, K, view.D, G,
        view.outer, *view.strides, eps, momentum, U=view.vector, **pool,
    )  # fmt: skip
    apply(x, weight, bias, mean, rstd, y, groups, None, formula, a, b, residual, last)
    return mean, rstd


def bwd(
    dy, x, weight, bias, mean, rstd, groups, need_dx, dw_dtype, db_dtype, eps=None, formula=None,
    gradient=None, a=0.0, b=0.0, y=None, last=False, more=None, each=False, rest=None,
):  # fmt: skip
    """dy, with the layout of x, and fwd's arguments and results -> dx, dw, db, dz, or None each.

    dx has x's dtype and layout, and is None unless `need_dx`. dw and db (C,) are None if their
    dtype is. If eps is given, the statistics were given: `rstd` is the variance, and no gradient
    goes through the statistics. `gradient` is f'. Its formula takes y if y is given; else the
    result of `formula` for z; else z. If y is given, there was a residual, and dz is the gradient
    of the residual. more: the gradient of y is dy + more, and dz is made; or `each`, and then more
    (N, C) has one number for each plane. rest, with the layout of x: is added to dx. groups is
    not 0 then.
    """
    view = _view(x, groups, last)
    C = view.C
    dx = torch.empty_like(dy, dtype=x.dtype) if need_dx else None
    dw = None if dw_dtype is None else torch.empty(C, dtype=dw_dtype, device=x.device)
    db = None if db_dtype is None else torch.empty(C, dtype=db_dtype, device=x.device)
    dz = None
    if y is not None or (more is not None and not each):
        dz = torch.empty_like(dy, dtype=x.dtype)
    params = [t for t in (dw, db) if t is not None]
    formulas = _formulas(formula, gradient)

    def partials(count):
        """Where `count` programs write their dw and db: partial sums, or the results for 1."""
        if count == 1 or not params:
            return None, dw, db
        made = torch.empty((len(params), count, C), dtype=torch.float32, device=x.device)
        return made, None if dw is None else made[0], None if db is None else made[-1]

    whole = None
    if need_dx and eps is None:
        planes = _planes_launch(x, view, light=gradient is None)
        if planes is not None:
            programs, sizes, config = planes
            _planes_bwd_kernel(
                (programs,), dy, more, x, weight, bias, y, mean, rstd, dx, dz, dw, db, *sizes, a, b,
                EACH=each, **formulas, **config,
            )  # fmt: skip
            return dx, dw, db, dz
        most = WHOLE_BWD // 2 if x.dtype == torch.float32 else WHOLE_BWD
        whole = _whole_config(view, x.element_size(), most)
    if whole is not None:
        programs, sizes = _whole_launch(view, whole)
        parts, dw_part, db_part = partials(view.outer)
        _channel_bwd_kernel(
            (programs,), dy, more, x, weight, bias, y, mean, rstd, rest, dx, dz, dw_part, db_part,
            *sizes, a, b, EACH=each, **formulas, **whole,
        )  # fmt: skip
        if parts is not None:
            add_up(parts, dw, db, *parts.shape[1:])
        return dx, dw, db, dz
    config = _tile(view, view.unit, x.element_size())
    sizes = view.arguments(config["UNIT"])
    along = total = sum_along = sum_total = None
    if params or eps is None or dz is not None:
        grid, span = _chunks(view, config)
        K = grid[1]
        through = need_dx and eps is None
        parts = torch.empty((2, view.outer * K, C), dtype=torch.float32, device=x.device)
        along = parts[0] if through or dw is not None else None
        total = parts[1] if through or db is not None else None
        _channel_sums_kernel(
            grid, dy, more, x, weight, bias, y, mean, rstd, dz, along, total, *sizes, view.D, span,
            K, 0.0 if eps is None else eps, a, b, VARIANCE=eps is not None, EACH=each, **formulas,
            **config,
        )  # fmt: skip
        apart = groups > 0  # then dw and db are also summed over the samples
        if through:
            sum_along, sum_total = torch.empty_like(mean), torch.empty_like(mean)
            tile = _pool_tile(K, view.D)
            G = C // view.D
            _channel_totals_kernel(
                (cdiv(G, tile["BLOCK_G"]), min(view.outer, GRID_Y)), along, total,
                weight if view.D > 1 else None, sum_along, sum_total, None if apart else dw,
                None if apart else db, K, view.D, G, view.outer, **tile,
            )  # fmt: skip
        if params and (apart or not through):
            add_up(parts if dw is not None else parts[1:], dw, db, *parts.shape[1:])
    if need_dx:
        if dz is not None:
            dy, more, formulas = dz, None, _formulas(None, None)
        grid, span = _split(view, config, 4)
        _channel_dx_kernel(
            grid, dy, more, x, weight, bias, mean, rstd, sum_along, sum_total, rest, dx, *sizes,
            view.D, span, 0.0 if eps is None else eps, a, b, VARIANCE=eps is not None,
            GROUPED=view.D > 1, **formulas, **config,
        )  # fmt: skip
    return dx, dw, db, dz
