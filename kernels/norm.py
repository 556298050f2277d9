"""Layer norm and RMS norm of (M, N) rows, statistics in fp32.

    y = (x - mean) * rstd * w + b,  rstd = 1 / sqrt(var + eps)      x_hat = (x - mean) * rstd
    g = dy * w;  dx = (g - x_hat * avg(g * x_hat) - avg(g)) * rstd
    dw = sum over rows of dy * x_hat;  db = sum over rows of dy

RMS norm (not CENTER) is the same with mean = 0 and without avg(g) and db.

Memory-bound; passes over the M*N elements (R read, W write):
    stock   forward 1R 1W; backward 4R 1W (dy and x once for dx, once for dw and db)
    here    forward 1R 1W; backward 2R 1W
Rows wider than ROW (backward: ROW_BWD) are read twice, the second time mostly from L2. Such a row
is split into S chunks for S programs, if the rows alone would not fill the GPU. Sums across
programs go through fp32 partial sums, which a second kernel adds in a fixed order.
"""

import math

import torch
import triton
import triton.language as tl

from fastnn.kernels import _gpus, _rows
from fastnn.kernels._launch import kernel
from fastnn.kernels._partials import add_up, store_sum
from fastnn.kernels._sizes import cdiv, next_power_of_2
from fastnn.kernels._tl import dense

ROW = 16384  # forward: the widest row that stays in registers from load to store
# the same for the backward, which also holds dy; half of it for float32 with dw and db
ROW_BWD = 8192


@triton.jit
def _pool(mean, m2, count, total, CENTER: tl.constexpr):
    """Means and sums of squared deviations of parts -> those of the whole (Chan's formula)."""
    pooled = mean
    if CENTER:
        # Relative to one of the means: if |mean| >> std, a plain sum would lose low-order digits.
        first = tl.sum(tl.where(tl.arange(0, mean.shape[0]) == 0, mean, 0.0), 0)
        d = tl.where(count > 0, mean - first, 0.0)
        pooled = first + tl.sum(d * tl.div_rn(count, total), 0)  # d * count might overflow
        d = tl.where(count > 0, mean - pooled, 0.0)
        m2 += count * d * d
    else:
        pooled = tl.zeros([], tl.float32)
    return pooled, tl.sum(m2, 0)


@triton.jit
def _moments(X, size, CENTER: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and sum of squared deviations of `size` values, by Welford's recurrence in each lane."""
    cols = tl.arange(0, BLOCK)
    mean = tl.zeros((BLOCK,), tl.float32)
    m2 = tl.zeros((BLOCK,), tl.float32)
    step = 0.0
    for n in range(0, size, BLOCK):
        mask = n + cols < size
        x = tl.load(X + n + cols, mask=mask, other=0.0).to(tl.float32)
        if CENTER:
            step += 1.0
            d = tl.where(mask, x - mean, 0.0)
            mean += d * tl.div_rn(1.0, step)
            m2 += d * (x - mean)
        else:
            m2 += x * x
    count = tl.maximum((size - cols + BLOCK - 1) // BLOCK, 0).to(tl.float32)
    return _pool(mean, m2, count, size.to(tl.float32), CENTER)


@triton.jit
def centred(x, mask, N):
    """Rows of x (fp32, 0 outside the mask) minus their means, 0 outside the mask; and the means.

    The N values of a row may add up to more than fp32 holds, although their mean fits. So the
    factor 1 / N comes before the sum. The rounding error of the mean would be multiplied by rstd,
    by up to 316 if all values are equal. So the mean of the differences is subtracted too.
    """
    part = tl.div_rn(1.0, N.to(tl.float32))
    mean = tl.sum(x * part, 1)
    d = tl.where(mask, x - mean[:, None], 0.0)
    rest = tl.sum(d * part, 1)
    return tl.where(mask, d - rest[:, None], 0.0), mean + rest


@triton.jit
def rstd_of(m2, N, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(m2, N.to(tl.float32)) + eps))


@triton.jit
def narrow_as_rows(P, UNIT: tl.constexpr):
    """P, or None, so that its accesses are no wider than those of rows with this UNIT.

    Lanes whose accesses of P have eight elements own eight neighbours. If rows are not aligned,
    their accesses have one element, and those of a warp would lie eight elements apart.
    """
    if P is not None:
        if UNIT == 1:
            P += tl.program_id(2)  # 0, which the compiler does not know
    return P


@kernel(do_not_specialize=["M", "N_units", "stride_units"])
def _norm_fwd_kernel(
    X, W, B, Y, MEAN, RSTD, M: tl.int64, N_units, stride_units: tl.int64, eps,
    UNIT: tl.constexpr, CENTER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program normalises a tile of BLOCK_M complete rows.

    X, Y (M, N): float; rows of X are a stride apart, Y is contiguous. W, B (N,): float, or None.
    MEAN (if CENTER), RSTD (M,): fp32.
    """
    # so that the compiler sees the factor, and makes accesses as wide as it allows
    N = N_units * UNIT
    W = narrow_as_rows(W, UNIT)
    B = narrow_as_rows(B, UNIT)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    mask = (m < M)[:, None] & (cols < N)[None, :]
    offs = m[:, None] * (stride_units * UNIT) + cols[None, :]
    x = tl.load(X + offs, mask=mask, other=0.0).to(tl.float32)
    if CENTER:
        x, mean = centred(x, mask, N)
        tl.store(MEAN + m, mean, mask=m < M)
    rstd = rstd_of(tl.sum(x * x, 1), N, eps)
    tl.store(RSTD + m, rstd, mask=m < M)
    y = x * rstd[:, None]
    if W is not None:
        y *= tl.load(W + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if B is not None:
        y += tl.load(B + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    tl.store(Y + m[:, None] * N + cols[None, :], y.to(Y.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["N_units", "stride_units", "S", "chunk_blocks"])
def _norm_fwd_chunk_kernel(
    X, MEAN, M2, N_units, stride_units: tl.int64, S, chunk_blocks,
    UNIT: tl.constexpr, CENTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program computes the moments of one of the S chunks of a row, and loops over the chunk.

    X (M, N): float, rows a stride apart. MEAN (if CENTER), M2 (M, S): fp32.
    """
    N = N_units * UNIT
    pid = tl.program_id(0)
    m = (pid // S).to(tl.int64)
    start = (pid % S) * chunk_blocks * BLOCK
    size = tl.minimum(chunk_blocks * BLOCK, N - start)
    mean, m2 = _moments(X + m * (stride_units * UNIT) + start, size, CENTER, BLOCK)
    tl.store(M2 + pid, m2)
    if CENTER:
        tl.store(MEAN + pid, mean)


@kernel(do_not_specialize=["N_units", "stride_units", "S", "chunk_blocks"])
def _norm_fwd_wide_kernel(
    X, W, B, Y, MEAN, RSTD, CHUNK_MEAN, CHUNK_M2, N_units, stride_units: tl.int64, S,
    chunk_blocks, eps, UNIT: tl.constexpr, CENTER: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A program normalises one of the S chunks of a row, and loops over it; twice if S is 1.

    X, Y (M, N): float; rows of X are a stride apart, Y is contiguous. W, B (N,): float, or None.
    MEAN (if CENTER), RSTD (M,): fp32. CHUNK_MEAN (if CENTER), CHUNK_M2 (M, S): fp32, if S > 1.
    """
    N = N_units * UNIT
    W = narrow_as_rows(W, UNIT)
    B = narrow_as_rows(B, UNIT)
    pid = tl.program_id(0)
    m = (pid // S).to(tl.int64)
    start = (pid % S) * chunk_blocks * BLOCK
    X += m * (stride_units * UNIT)
    Y += m * N
    if BLOCK_S == 1:
        mean, m2 = _moments(X, N, CENTER, BLOCK)
    else:
        s = tl.arange(0, BLOCK_S)
        m2 = tl.load(CHUNK_M2 + m * S + s, mask=s < S, other=0.0)
        part = m2
        if CENTER:
            part = tl.load(CHUNK_MEAN + m * S + s, mask=s < S, other=0.0)
        count = tl.minimum(tl.maximum(N - s * (chunk_blocks * BLOCK), 0), chunk_blocks * BLOCK)
        mean, m2 = _pool(part, m2, count.to(tl.float32), N.to(tl.float32), CENTER)
    rstd = rstd_of(m2, N, eps)
    if pid % S == 0:
        tl.store(RSTD + m, rstd)
        if CENTER:
            tl.store(MEAN + m, mean)
    for n in range(start, tl.minimum(start + chunk_blocks * BLOCK, N), BLOCK):
        cols = n + tl.arange(0, BLOCK)
        mask = cols < N
        y = (tl.load(X + cols, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        if W is not None:
            y *= tl.load(W + cols, mask=mask, other=0.0).to(tl.float32)
        if B is not None:
            y += tl.load(B + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(Y + cols, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _x_hat(x, MEAN, RSTD, m, M, CENTER: tl.constexpr):
    """Rows m of x normalised, and their rstd."""
    x_hat = x.to(tl.float32)
    rstd = tl.load(RSTD + m, mask=m < M, other=0.0)[:, None]
    if CENTER:
        x_hat -= tl.load(MEAN + m, mask=m < M, other=0.0)[:, None]
    return x_hat * rstd, rstd


@kernel(do_not_specialize=["M", "N_units", "stride_units"])
def _norm_bwd_kernel(
    DY, X, W, MEAN, RSTD, DX, DW, DB, M: tl.int64, N_units, stride_units: tl.int64,
    UNIT: tl.constexpr, CENTER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program computes dx of tiles of BLOCK_M complete rows, and loops over every G-th tile.

    DY, X, DX (M, N): float; rows of X are a stride apart, the others contiguous. W (N,): float, or
    None. MEAN (if CENTER), RSTD (M,): fp32. DW, DB (G, N): fp32 sums over a program's rows, or the
    gradients if G is 1; or None.
    """
    N = N_units * UNIT
    W = narrow_as_rows(W, UNIT)
    cols = tl.arange(0, BLOCK_N)
    dw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # A program has every G-th tile of rows. Without dw and db, each program has one tile.
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK_M, M, tl.num_programs(0) * BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        mask = (m < M)[:, None] & (cols < N)[None, :]
        row = (m * N)[:, None]
        dy = tl.load(DY + row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        x_row = (m * (stride_units * UNIT))[:, None]
        x = tl.load(X + x_row + cols[None, :], mask=mask, other=0.0)
        x_hat, rstd = _x_hat(x, MEAN, RSTD, m, M, CENTER)
        if DW is not None:
            dw += dy * x_hat
        if DB is not None:
            db += dy
        if W is not None:
            dy *= tl.load(W + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        pull = x_hat * tl.div_rn(tl.sum(dy * x_hat, 1), N.to(tl.float32))[:, None]
        if CENTER:
            pull += tl.div_rn(tl.sum(dy, 1), N.to(tl.float32))[:, None]
        tl.store(DX + row + cols[None, :], ((dy - pull) * rstd).to(DX.dtype.element_ty), mask=mask)
    offs = tl.program_id(0).to(tl.int64) * N + cols
    store_sum(DW, dw, offs, cols < N)
    store_sum(DB, db, offs, cols < N)


@triton.jit
def _averages(DY, X, W, mean, rstd, size, CENTER: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of g * x_hat and of g over `size` values of a row; g = dy * w."""
    along = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for n in range(0, size, BLOCK):
        cols = n + tl.arange(0, BLOCK)
        mask = cols < size
        g = tl.load(DY + cols, mask=mask, other=0.0).to(tl.float32)
        if W is not None:
            g *= tl.load(W + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(X + cols, mask=mask, other=0.0).to(tl.float32)
        along += g * ((x - mean) * rstd)
        if CENTER:
            total += g
    return tl.sum(along, 0), tl.sum(total, 0)


@kernel(do_not_specialize=["N_units", "stride_units", "S", "chunk_blocks"])
def _norm_bwd_chunk_kernel(
    DY, X, W, MEAN, RSTD, ALONG, TOTAL, N_units, stride_units: tl.int64, S, chunk_blocks,
    UNIT: tl.constexpr, CENTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program sums over one of the S chunks of a row, and loops over the chunk.

    DY, X (M, N): float; rows of X are a stride apart. W (N,): float, or None. MEAN (if CENTER),
    RSTD (M,): fp32. ALONG, TOTAL (if CENTER) (M, S): fp32 sums of g x_hat and of g.
    """
    N = N_units * UNIT
    W = narrow_as_rows(W, UNIT)
    pid = tl.program_id(0)
    m = (pid // S).to(tl.int64)
    start = (pid % S) * chunk_blocks * BLOCK
    size = tl.minimum(chunk_blocks * BLOCK, N - start)
    mean = 0.0
    if CENTER:
        mean = tl.load(MEAN + m)
    if W is not None:
        W += start
    X += m * (stride_units * UNIT) + start
    along, total = _averages(
        DY + m * N + start, X, W, mean, tl.load(RSTD + m), size, CENTER, BLOCK
    )  # fmt: skip
    tl.store(ALONG + pid, along)
    if CENTER:
        tl.store(TOTAL + pid, total)


@kernel(do_not_specialize=["N_units", "stride_units", "S", "chunk_blocks"])
def _norm_bwd_wide_kernel(
    DY, X, W, MEAN, RSTD, DX, ALONG, TOTAL, N_units, stride_units: tl.int64, S, chunk_blocks,
    UNIT: tl.constexpr, CENTER: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A program computes dx of one of the S chunks of a row, and loops over it; twice if S is 1.

    DY, X, DX (M, N): float; rows of X are a stride apart, the others contiguous. W (N,): float, or
    None. MEAN (if CENTER), RSTD (M,): fp32. ALONG, TOTAL (if CENTER) (M, S): fp32, if S > 1.
    """
    N = N_units * UNIT
    W = narrow_as_rows(W, UNIT)
    pid = tl.program_id(0)
    m = (pid // S).to(tl.int64)
    start = (pid % S) * chunk_blocks * BLOCK
    X += m * (stride_units * UNIT)
    DY += m * N
    DX += m * N
    rstd = tl.load(RSTD + m)
    mean = 0.0
    if CENTER:
        mean = tl.load(MEAN + m)
    if BLOCK_S == 1:
        along, total = _averages(DY, X, W, mean, rstd, N, CENTER, BLOCK)
    else:
        s = tl.arange(0, BLOCK_S)
        along = tl.sum(tl.load(ALONG + m * S + s, mask=s < S, other=0.0), 0)
        total = 0.0
        if CENTER:
            total = tl.sum(tl.load(TOTAL + m * S + s, mask=s < S, other=0.0), 0)
    along = tl.div_rn(along, N.to(tl.float32))
    for n in range(start, tl.minimum(start + chunk_blocks * BLOCK, N), BLOCK):
        cols = n + tl.arange(0, BLOCK)
        mask = cols < N
        g = tl.load(DY + cols, mask=mask, other=0.0).to(tl.float32)
        if W is not None:
            g *= tl.load(W + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(X + cols, mask=mask, other=0.0).to(tl.float32)
        dx = g - (x - mean) * rstd * along
        if CENTER:
            dx -= tl.div_rn(total, N.to(tl.float32))
        tl.store(DX + cols, (dx * rstd).to(DX.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["M", "N_units", "stride_units", "span"])
def _norm_bwd_params_kernel(
    DY, X, MEAN, RSTD, DW, DB, M: tl.int64, N_units, stride_units: tl.int64, span: tl.int64,
    UNIT: tl.constexpr, CENTER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program sums dw and db of BLOCK_N columns over its span of rows, and loops over the rows.

    DY, X (M, N): float; rows of X are a stride apart, DY is contiguous. MEAN (if CENTER), RSTD
    (M,): fp32. DW, DB (G, N): fp32 partial sums, or the gradients if G is 1; or None.
    """
    N = N_units * UNIT
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    g = tl.program_id(1).to(tl.int64)
    dw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    stop = tl.minimum((g + 1) * span, M)
    for start in range(g * span, stop, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        mask = (m < stop)[:, None] & (cols < N)[None, :]
        dy = tl.load(DY + m[:, None] * N + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if DB is not None:
            db += dy
        if DW is not None:
            offs = m[:, None] * (stride_units * UNIT) + cols[None, :]
            x = tl.load(X + offs, mask=mask, other=0.0)
            dw += dy * _x_hat(x, MEAN, RSTD, m, stop, CENTER)[0]
    store_sum(DW, dw, g * N + cols, cols < N)
    store_sum(DB, db, g * N + cols, cols < N)


def reads_once(N, itemsize):
    """Whether both passes hold a dense row of N values in registers, and so read it once each."""
    unit = math.gcd(N, 8)
    most = ROW_BWD // 2 if itemsize == 4 else ROW_BWD
    return _rows.fits(N, unit, ROW) and _rows.fits(N, unit, most)


def processors_of(device_index):
    if _gpus.architecture(device_index) == "cpu":
        return 2  # in the interpreter, so that programs loop and their partial sums are added up
    return _gpus.multiprocessors(device_index)


def fwd(x, weight, bias, dims, eps, center, out_dtype):
    """x, weight and bias (x's last `dims` dimensions) or None -> [y, mean if center, rstd].

    y is contiguous; mean and rstd are (M,) in fp32.
    """
    y = torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device)
    M, N = math.prod(x.shape[:-dims]), math.prod(x.shape[-dims:])
    rstd = torch.empty(M, dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if center else None
    results = [y, mean, rstd] if center else [y, rstd]
    if not y.numel():
        return results
    x, stride = _rows.as_rows(x, N)
    unit = math.gcd(N, stride, 8)
    weight = None if weight is None else dense(weight)
    bias = None if bias is None else dense(bias)
    if _rows.fits(N, unit, ROW):
        config = _rows.row_config(N, unit, least_warps=2)
        _norm_fwd_kernel(
            (cdiv(M, config["BLOCK_M"]),),
            x, weight, bias, y, mean, rstd, M, N // unit, stride // unit, float(eps),
            UNIT=unit, CENTER=center, **config,
        )  # fmt: skip
        return results
    S, chunk_blocks = _rows.split(M, N)
    means = m2 = None
    if S > 1:
        m2 = rstd.new_empty(M, S)
        means = torch.empty_like(m2) if center else None
        _norm_fwd_chunk_kernel(
            (M * S,), x, means, m2, N // unit, stride // unit, S, chunk_blocks,
            UNIT=unit, CENTER=center, BLOCK=_rows.BLOCK, num_warps=8,
        )  # fmt: skip
    _norm_fwd_wide_kernel(
        (M * S,), x, weight, bias, y, mean, rstd, means, m2, N // unit, stride // unit, S,
        chunk_blocks, float(eps),
        UNIT=unit, CENTER=center, BLOCK=_rows.BLOCK, BLOCK_S=next_power_of_2(S), num_warps=8,
    )  # fmt: skip
    return results


def bwd(dy, x, weight, mean, rstd, dims, need_dx, dw_dtype, db_dtype):
    """dy (x's shape) and fwd's arguments and results -> those wanted of [dx, dw, db], contiguous.

    mean is None for RMS norm. dw and db have the last `dims` dimensions of x; each is left out if
    its dtype is None. dx has x's dtype, and is left out unless `need_dx`.
    """
    shape = x.shape[-dims:]
    M, N = rstd.numel(), math.prod(shape)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_dx else None
    dw = None if dw_dtype is None else torch.empty(shape, dtype=dw_dtype, device=x.device)
    db = None if db_dtype is None else torch.empty(shape, dtype=db_dtype, device=x.device)
    results = [t for t in (dx, dw, db) if t is not None]
    if not N:
        return results
    x, stride = _rows.as_rows(x, N)
    dy = dense(dy)
    unit = math.gcd(N, stride, 8)
    sizes = M, N // unit, stride // unit
    flags = {"UNIT": unit, "CENTER": mean is not None}
    weight = None if weight is None else dense(weight)
    params = [t for t in (dw, db) if t is not None]
    processors = processors_of(x.get_device())

    def partials(G):
        """Where G programs write their dw and db: partial sums, or the results if G is 1."""
        if G == 1 or not params:
            return None, dw, db
        parts = rstd.new_empty(len(params), G, N)
        return parts, None if dw is None else parts[0], None if db is None else parts[-1]

    most = ROW_BWD // 2 if params and x.dtype == torch.float32 else ROW_BWD
    if need_dx and M and not _rows.fits(N, unit, most):
        _bwd_dx_wide(dy, x, weight, mean, rstd, dx, sizes, flags)
    elif need_dx:
        config = _rows.row_config(N, unit, least_warps=8 if params else 4)
        G = cdiv(M, config["BLOCK_M"])
        if params:
            G = _rows.summing_programs(M, config, processors)
        parts, dw_part, db_part = partials(G)
        _norm_bwd_kernel(
            (G,), dy, x, weight, mean, rstd, dx, dw_part, db_part, *sizes, **flags, **config
        )
        if parts is not None:
            add_up(parts, dw, db, G, N)
        return results
    if params:
        block_m = min(next_power_of_2(max(M, 1)), 32)
        block_n = 2048 // block_m
        blocks = cdiv(N, block_n)
        G = max(1, min(4 * processors // blocks, cdiv(M, 128)))
        parts, dw_part, db_part = partials(G)
        _norm_bwd_params_kernel(
            (blocks, G), dy, x, mean, rstd, dw_part, db_part, *sizes, cdiv(M, G),
            **flags, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip
        if parts is not None:
            add_up(parts, dw, db, G, N)
    return results


def _bwd_dx_wide(dy, x, weight, mean, rstd, dx, sizes, flags):
    M, N = x.shape
    S, chunk_blocks = _rows.split(M, N)
    sizes = *sizes[1:], S, chunk_blocks
    along = total = None
    if S > 1:
        along = rstd.new_empty(M, S)
        total = None if mean is None else torch.empty_like(along)
        _norm_bwd_chunk_kernel(
            (M * S,), dy, x, weight, mean, rstd, along, total, *sizes,
            **flags, BLOCK=_rows.BLOCK, num_warps=8,
        )  # fmt: skip
    _norm_bwd_wide_kernel(
        (M * S,), dy, x, weight, mean, rstd, dx, along, total, *sizes,
        **flags, BLOCK=_rows.BLOCK, BLOCK_S=next_power_of_2(S), num_warps=8,
    )  # fmt: skip
