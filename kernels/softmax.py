"""Softmax and log-softmax along one dimension of a contiguous tensor (outer, D, inner).

    y = exp(x - max) / sum(exp(x - max))        dx = y * (dy - sum(dy * y))
    log: y = x - max - log(sum(exp(x - max)))   dx = dy - exp(y) * sum(dy)

Softmin (NEGATE) reads -x and returns -dx. Memory-bound; passes over the elements (R read, W write):
    stock   forward 1R 1W if a row fits in shared memory, else 3R 1W; backward 2R 1W, else 4R 1W;
            with dtype= or under autocast one more cast, 1R 1W, in both; softmin one more pass
    here    forward 1R 1W, backward 2R 1W; for longer rows 2R 1W and 4R 1W, the second time mostly
            from L2; casts and signs are included

If inner == 1, a tile has one or several rows. Rows longer than ROW are read twice, in S chunks for
S programs if the rows alone would not fill the GPU. If inner > 1, a tile has D by columns that are
neighbours in memory, so nothing is transposed.
"""

import math

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from fastnn.kernels import _rows
from fastnn.kernels._config import lanes, tunable
from fastnn.kernels._launch import kernel
from fastnn.kernels._sizes import cdiv, next_power_of_2
from fastnn.kernels._tl import dense

ROW = 16384  # the longest row that stays in registers
COLUMN = 256  # the longest column that stays in registers


@triton.jit
def _read(X, mask, NEGATE: tl.constexpr, DTYPE: tl.constexpr):
    """What PyTorch's softmax sees of x: cast to DTYPE, sign changed; -inf outside the mask."""
    x = tl.load(X, mask=mask, other=0.0).to(DTYPE).to(tl.float32)
    if NEGATE:
        x = -x
    return tl.where(mask, x, -float("inf"))


@triton.jit
def _exp(x, DTYPE: tl.constexpr):
    # The error of the fast exponential is |x| ulps of fp32, which 16-bit results do not show.
    return libdevice.exp(x) if DTYPE == tl.float32 else tl.exp(x)


@triton.jit
def _normalise(x, peak, total, LOG: tl.constexpr, DTYPE: tl.constexpr):
    """y, from the largest x (`peak`) and the sum of exp(x - peak) (`total`).

    There are no guards: a row with nan or +inf, or with only -inf, becomes nan, as in PyTorch.
    """
    if LOG:
        y = x - peak - tl.log(total)
    elif DTYPE == tl.float32:
        y = tl.div_rn(libdevice.exp(x - peak), total)
    else:
        y = tl.exp(x - peak) * tl.div_rn(1.0, total)
    return y.to(DTYPE)


@triton.jit
def _term(dy, y, LOG: tl.constexpr):
    """The term whose sum along the row the gradient needs."""
    return dy if LOG else dy * y


@triton.jit
def _gradient(dy, y, total, NEGATE: tl.constexpr, LOG: tl.constexpr):
    # ATen's form: y * (dy - total) would lose more digits if dy is close to total.
    dx = dy - tl.exp(y) * total if LOG else dy * y - y * total
    return -dx if NEGATE else dx


@triton.jit
def _online(peak, total, x):
    """One step of the running maximum, and of the sum of exp(x - peak), in each lane."""
    new = tl.maximum(peak, x, propagate_nan=tl.PropagateNan.ALL)
    # A lane that has only seen -inf would otherwise take exp(-inf + inf), which is nan.
    base = tl.where(new == -float("inf"), 0.0, new)
    return new, total * tl.exp(peak - base) + tl.exp(x - base)


@triton.jit
def _merge(peak, total, AXIS: tl.constexpr):
    """Running maxima and sums of parts -> those of the whole."""
    top = tl.max(peak, AXIS)
    base = tl.where(top == -float("inf"), 0.0, top)
    if AXIS == 0 and len(peak.shape) == 2:
        base = base[None, :]
    return top, tl.sum(total * tl.exp(peak - base), AXIS)


# ---- Rows -------------------------------------------------------------------------------------


@kernel(do_not_specialize=["M", "N_units", "stride_units"])
def _softmax_fwd_kernel(
    X, Y, M: tl.int64, N_units, stride_units: tl.int64, UNIT: tl.constexpr, LOG: tl.constexpr,
    NEGATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program computes a tile of BLOCK_M complete rows of y.

    X, Y (M, N): float; rows of X are a stride apart, Y is contiguous.
    """
    # so that the compiler sees the factor, and makes accesses as wide as it allows
    N = N_units * UNIT
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    mask = (m < M)[:, None] & (cols < N)[None, :]
    out = Y.dtype.element_ty
    x = _read(X + m[:, None] * (stride_units * UNIT) + cols[None, :], mask, NEGATE, out)
    z = x - tl.max(x, 1)[:, None]
    e = _exp(z, out if not LOG else tl.float16)
    total = tl.sum(e, 1)[:, None]
    if LOG:
        y = z - tl.log(total)
    elif out == tl.float32:
        y = tl.div_rn(e, tl.broadcast_to(total, e.shape))
    else:
        y = e * tl.div_rn(1.0, total)
    tl.store(Y + m[:, None] * N + cols[None, :], y.to(out), mask=mask)


@kernel(do_not_specialize=["M", "N_units"])
def _softmax_bwd_kernel(
    DY, Y, DX, M: tl.int64, N_units, UNIT: tl.constexpr, LOG: tl.constexpr,
    NEGATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program computes a tile of BLOCK_M complete rows of dx.

    DY, Y, DX (M, N): float, contiguous.
    """
    N = N_units * UNIT
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    mask = (m < M)[:, None] & (cols < N)[None, :]
    offs = m[:, None] * N + cols[None, :]
    dy = tl.load(DY + offs, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(Y + offs, mask=mask, other=0.0).to(tl.float32)
    dx = _gradient(dy, y, tl.sum(_term(dy, y, LOG), 1)[:, None], NEGATE, LOG)
    tl.store(DX + offs, dx.to(DX.dtype.element_ty), mask=mask)


@triton.jit
def _online_row(
    X, size, NEGATE: tl.constexpr, DTYPE: tl.constexpr, UNIT: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of exp(x - maximum) of `size` values, at first of each of LANES threads.

    A thread has several vectors of UNIT values. It corrects its sum once for all of them.
    """
    peak = tl.full((LANES,), -float("inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    GROUP: tl.constexpr = BLOCK // (LANES * UNIT)
    at = (tl.arange(0, GROUP)[:, None, None] * LANES + tl.arange(0, LANES)[None, :, None]) * UNIT
    at += tl.arange(0, UNIT)[None, None, :]
    for n in range(0, size, BLOCK):
        x = _read(X + n + at, n + at < size, NEGATE, DTYPE)
        new = tl.maximum(peak, tl.max(tl.max(x, 2), 0), propagate_nan=tl.PropagateNan.ALL)
        base = tl.where(new == -float("inf"), 0.0, new)
        e = tl.exp(x - base[None, :, None])
        total = total * tl.exp(peak - base) + tl.sum(tl.sum(e, 2), 0)
        peak = new
    return _merge(peak, total, 0)


@kernel(do_not_specialize=["N_units", "stride_units", "S", "chunk_blocks"])
def _softmax_fwd_chunk_kernel(
    X, Y, PEAK, TOTAL, N_units, stride_units: tl.int64, S, chunk_blocks, UNIT: tl.constexpr,
    NEGATE: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program computes maximum and sum of one of the S chunks of a row, and loops over the chunk.

    X (M, N): float, rows a stride apart. Y: only its dtype is used. PEAK, TOTAL (M, S): fp32.
    """
    N = N_units * UNIT
    pid = tl.program_id(0)
    start = (pid % S) * chunk_blocks * BLOCK
    X += (pid // S).to(tl.int64) * (stride_units * UNIT) + start
    size = tl.minimum(chunk_blocks * BLOCK, N - start)
    peak, total = _online_row(X, size, NEGATE, Y.dtype.element_ty, UNIT, LANES, BLOCK)
    tl.store(PEAK + pid, peak)
    tl.store(TOTAL + pid, total)


@kernel(do_not_specialize=["N_units", "stride_units", "S", "chunk_blocks"])
def _softmax_fwd_long_kernel(
    X, Y, PEAK, TOTAL, N_units, stride_units: tl.int64, S, chunk_blocks, UNIT: tl.constexpr,
    LOG: tl.constexpr, NEGATE: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A program computes y of one of the S chunks of a row, and loops over it; twice if S is 1.

    X, Y (M, N): float; rows of X are a stride apart, Y is contiguous. PEAK, TOTAL (M, S): fp32, if
    S > 1.
    """
    N = N_units * UNIT
    pid = tl.program_id(0)
    m = (pid // S).to(tl.int64)
    start = (pid % S) * chunk_blocks * BLOCK
    X += m * (stride_units * UNIT)
    Y += m * N
    out = Y.dtype.element_ty
    if BLOCK_S == 1:
        peak, total = _online_row(X, N, NEGATE, out, UNIT, LANES, BLOCK)
    else:
        s = tl.arange(0, BLOCK_S)
        peaks = tl.load(PEAK + m * S + s, mask=s < S, other=-float("inf"))
        totals = tl.load(TOTAL + m * S + s, mask=s < S, other=0.0)
        peak, total = _merge(peaks, totals, 0)
    for n in range(start, tl.minimum(start + chunk_blocks * BLOCK, N), BLOCK):
        cols = n + tl.arange(0, BLOCK)
        x = _read(X + cols, cols < N, NEGATE, out)
        tl.store(Y + cols, _normalise(x, peak, total, LOG, out), mask=cols < N)


@triton.jit
def _sum_row(DY, Y, size, LOG: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for n in range(0, size, BLOCK):
        cols = n + tl.arange(0, BLOCK)
        dy = tl.load(DY + cols, mask=cols < size, other=0.0).to(tl.float32)
        if LOG:
            total += dy
        else:
            total += dy * tl.load(Y + cols, mask=cols < size, other=0.0).to(tl.float32)
    return tl.sum(total, 0)


@kernel(do_not_specialize=["N_units", "S", "chunk_blocks"])
def _softmax_bwd_chunk_kernel(
    DY, Y, TOTAL, N_units, S, chunk_blocks, UNIT: tl.constexpr, LOG: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program sums over one of the S chunks of a row, and loops over the chunk.

    DY, Y (M, N): float, contiguous. TOTAL (M, S): fp32.
    """
    N = N_units * UNIT
    pid = tl.program_id(0)
    start = (pid % S) * chunk_blocks * BLOCK
    offset = (pid // S).to(tl.int64) * N + start
    size = tl.minimum(chunk_blocks * BLOCK, N - start)
    tl.store(TOTAL + pid, _sum_row(DY + offset, Y + offset, size, LOG, BLOCK))


@kernel(do_not_specialize=["N_units", "S", "chunk_blocks"])
def _softmax_bwd_long_kernel(
    DY, Y, DX, TOTAL, N_units, S, chunk_blocks, UNIT: tl.constexpr, LOG: tl.constexpr,
    NEGATE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A program computes dx of one of the S chunks of a row, and loops over it; twice if S is 1.

    DY, Y, DX (M, N): float, contiguous. TOTAL (M, S): fp32, if S > 1.
    """
    N = N_units * UNIT
    pid = tl.program_id(0)
    m = (pid // S).to(tl.int64)
    start = (pid % S) * chunk_blocks * BLOCK
    DY += m * N
    Y += m * N
    DX += m * N
    if BLOCK_S == 1:
        total = _sum_row(DY, Y, N, LOG, BLOCK)
    else:
        s = tl.arange(0, BLOCK_S)
        total = tl.sum(tl.load(TOTAL + m * S + s, mask=s < S, other=0.0), 0)
    for n in range(start, tl.minimum(start + chunk_blocks * BLOCK, N), BLOCK):
        cols = n + tl.arange(0, BLOCK)
        mask = cols < N
        dy = tl.load(DY + cols, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(Y + cols, mask=mask, other=0.0).to(tl.float32)
        dx = _gradient(dy, y, total, NEGATE, LOG)
        tl.store(DX + cols, dx.to(DX.dtype.element_ty), mask=mask)


# ---- Columns ----------------------------------------------------------------------------------


@triton.jit
def _columns(outer, D, inner, INDEX: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets of a block of columns, (1, BLOCK_C), and which of them exist.

    The number of a column is o * inner + i. The compiler knows a factor of inner (UNIT), so
    neighbours stay neighbours through the division up to that factor, and accesses are as wide as
    it allows.
    """
    c = tl.program_id(0).to(INDEX) * BLOCK_C + tl.arange(0, BLOCK_C)
    base = (c // inner).to(tl.int64) * D * inner + c % inner
    return base[None, :], (c < outer.to(INDEX) * inner)[None, :]


@kernel(do_not_specialize=["outer", "D", "inner_units"])
def _softmax_columns_fwd_kernel(
    X, Y, outer, D, inner_units, UNIT: tl.constexpr, LOG: tl.constexpr, NEGATE: tl.constexpr,
    INDEX: tl.constexpr, ONE_PASS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program computes BLOCK_C columns of y: at once if ONE_PASS, else in two loops over D.

    X, Y (outer, D, inner): float, contiguous.
    """
    inner = inner_units.to(INDEX) * UNIT
    base, live = _columns(outer, D, inner, INDEX, BLOCK_C)
    rows = tl.arange(0, BLOCK_D)[:, None]
    out = Y.dtype.element_ty
    if ONE_PASS:
        offs = base + rows * inner
        mask = (rows < D) & live
        x = _read(X + offs, mask, NEGATE, out)
        peak = tl.max(x, 0)[None, :]
        total = tl.sum(tl.exp(x - peak), 0)[None, :]
        y = _normalise(x, peak, tl.broadcast_to(total, x.shape), LOG, out)
        tl.store(Y + offs, y, mask=mask)
    else:
        peak = tl.full((BLOCK_D, BLOCK_C), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_D, BLOCK_C), tl.float32)
        for d in range(0, D, BLOCK_D):
            mask = (d + rows < D) & live
            x = _read(X + base + (d + rows) * inner, mask, NEGATE, out)
            peak, total = _online(peak, total, x)
        peak, total = _merge(peak, total, 0)
        for d in range(0, D, BLOCK_D):
            mask = (d + rows < D) & live
            x = _read(X + base + (d + rows) * inner, mask, NEGATE, out)
            y = _normalise(x, peak[None, :], tl.broadcast_to(total[None, :], x.shape), LOG, out)
            tl.store(Y + base + (d + rows) * inner, y, mask=mask)


@kernel(do_not_specialize=["outer", "D", "inner_units"])
def _softmax_columns_bwd_kernel(
    DY, Y, DX, outer, D, inner_units, UNIT: tl.constexpr, LOG: tl.constexpr, NEGATE: tl.constexpr,
    INDEX: tl.constexpr, ONE_PASS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program computes BLOCK_C columns of dx: at once if ONE_PASS, else in two loops over D.

    DY, Y, DX (outer, D, inner): float, contiguous.
    """
    inner = inner_units.to(INDEX) * UNIT
    base, live = _columns(outer, D, inner, INDEX, BLOCK_C)
    rows = tl.arange(0, BLOCK_D)[:, None]
    if ONE_PASS:
        offs = base + rows * inner
        mask = (rows < D) & live
        dy = tl.load(DY + offs, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(Y + offs, mask=mask, other=0.0).to(tl.float32)
        dx = _gradient(dy, y, tl.sum(_term(dy, y, LOG), 0)[None, :], NEGATE, LOG)
        tl.store(DX + offs, dx.to(DX.dtype.element_ty), mask=mask)
    else:
        acc = tl.zeros((BLOCK_D, BLOCK_C), tl.float32)
        for d in range(0, D, BLOCK_D):
            offs = base + (d + rows) * inner
            mask = (d + rows < D) & live
            dy = tl.load(DY + offs, mask=mask, other=0.0).to(tl.float32)
            if LOG:
                acc += dy
            else:
                acc += dy * tl.load(Y + offs, mask=mask, other=0.0).to(tl.float32)
        total = tl.sum(acc, 0)[None, :]
        for d in range(0, D, BLOCK_D):
            offs = base + (d + rows) * inner
            mask = (d + rows < D) & live
            dy = tl.load(DY + offs, mask=mask, other=0.0).to(tl.float32)
            y = tl.load(Y + offs, mask=mask, other=0.0).to(tl.float32)
            dx = _gradient(dy, y, total, NEGATE, LOG)
            tl.store(DX + offs, dx.to(DX.dtype.element_ty), mask=mask)


# ---- Launchers --------------------------------------------------------------------------------


@tunable("BLOCK_C")
def _column_config(columns, D):
    """Complete columns, as many as registers allow; or a tile to step down long columns."""
    one_pass = D <= COLUMN
    width = min(next_power_of_2(columns), 64)
    block_d = next_power_of_2(D) if one_pass else 4096 // width
    block_c = max(1, min(next_power_of_2(columns), 4096 // block_d))
    block_c = max(block_c, min(width, 32))
    tile = block_d * block_c
    return {
        "ONE_PASS": one_pass,
        "BLOCK_D": block_d,
        "BLOCK_C": block_c,
        "num_warps": min(max(tile // 256, 1), 16),  # 512 spills on sm_80 if accesses are narrow
    }


def _extent(shape, dim):
    """(outer, D, inner) of a shape, seen along `dim`."""
    return math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])


def _column_arguments(outer, D, inner):
    config = _column_config(outer * inner, D)
    unit = math.gcd(inner, 8)
    wide = outer * D * inner >= 2**31 - 2**16  # leaves room for the last block to run past the end
    config |= {"UNIT": unit, "INDEX": tl.int64 if wide else tl.int32}
    grid = (cdiv(outer * inner, config["BLOCK_C"]),)
    return grid, (outer, D, inner // unit), config


def _long(outer, D, unit):
    """(chunks of a row, blocks per chunk, {UNIT, BLOCK, num_warps}, {LANES}) of long rows.

    If there is a row for each multiprocessor of most GPUs, no row is split: the second launch would
    read again what the program of a row has just read. A program then asks for four times as much
    at a time, because a multiprocessor has few programs; not if values are accessed one by one,
    which takes more registers.
    """
    block, warps = _rows.BLOCK, 8
    if 4 * outer >= _rows.PROGRAMS:
        if unit > 1:
            block, warps = 4 * block, 16
        S, chunk_blocks = 1, cdiv(D, block)
    else:
        S, chunk_blocks = _rows.split(outer, D)
    tile = {"UNIT": unit, "BLOCK": block, "num_warps": warps}
    return S, chunk_blocks, tile, {"LANES": min(warps * lanes(), block // unit)}


def fwd(x, dim, log, negate, dtype):
    """x -> (log-)softmax of x or -x along `dim` (>= 0), contiguous, computed in `dtype`."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if not y.numel():
        return y
    outer, D, inner = _extent(x.shape or (1,), dim)
    flags = {"LOG": log, "NEGATE": negate}
    if inner > 1:
        grid, sizes, config = _column_arguments(outer, D, inner)
        _softmax_columns_fwd_kernel(grid, dense(x), y, *sizes, **flags, **config)
        return y
    x, stride = _rows.as_rows(x, D)
    unit = math.gcd(D, stride, 8)
    if _rows.fits(D, unit, ROW):
        config = _rows.row_config(D, unit)
        _softmax_fwd_kernel(
            (cdiv(outer, config["BLOCK_M"]),), x, y, outer, D // unit, stride // unit,
            UNIT=unit, **flags, **config,
        )  # fmt: skip
        return y
    S, chunk_blocks, tile, by = _long(outer, D, unit)
    sizes = D // unit, stride // unit, S, chunk_blocks
    peak = total = None
    if S > 1:
        peak = torch.empty(outer, S, dtype=torch.float32, device=x.device)
        total = torch.empty_like(peak)
        _softmax_fwd_chunk_kernel(
            (outer * S,), x, y, peak, total, *sizes, NEGATE=negate, **by, **tile
        )
    _softmax_fwd_long_kernel(
        (outer * S,), x, y, peak, total, *sizes,
        **flags, BLOCK_S=next_power_of_2(S), **by, **tile,
    )  # fmt: skip
    return y


def bwd(dy, y, dim, log, negate, dtype):
    """dy and fwd's y -> dx, contiguous, in `dtype`."""
    dx = torch.empty(y.shape, dtype=dtype, device=y.device)
    if not dx.numel():
        return dx
    dy, y = dense(dy), dense(y)
    outer, D, inner = _extent(y.shape or (1,), dim)
    flags = {"LOG": log, "NEGATE": negate}
    if inner > 1:
        grid, sizes, config = _column_arguments(outer, D, inner)
        _softmax_columns_bwd_kernel(grid, dy, y, dx, *sizes, **flags, **config)
        return dx
    unit = math.gcd(D, 8)
    if _rows.fits(D, unit, ROW):
        config = _rows.row_config(D, unit)
        _softmax_bwd_kernel(
            (cdiv(outer, config["BLOCK_M"]),), dy, y, dx, outer, D // unit,
            UNIT=unit, **flags, **config,
        )  # fmt: skip
        return dx
    S, chunk_blocks, tile, _ = _long(outer, D, unit)
    total = None
    if S > 1:
        total = torch.empty(outer, S, dtype=torch.float32, device=y.device)
        _softmax_bwd_chunk_kernel(
            (outer * S,), dy, y, total, D // unit, S, chunk_blocks, LOG=log, **tile
        )
    _softmax_bwd_long_kernel(
        (outer * S,), dy, y, dx, total, D // unit, S, chunk_blocks,
        **flags, BLOCK_S=next_power_of_2(S), **tile,
    )  # fmt: skip
    return dx
