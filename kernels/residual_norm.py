"""The end of a transformer branch: s = x + noise * z, and y = norm(s) if a norm follows.

    dz = noise * ds,  dx = ds,  ds = (gradient of the norm at s) + (gradient of s where it is used)

z is the result of the branch, and x the residual, as (M, N) rows. noise is the scale of dropout
where an element is kept, else 0. The norm is a layer norm or an RMS norm (not CENTER); norm.py has
its formulas. Memory-bound; passes over the M*N elements (R read, W write; a mask is a byte each):

    stock   dropout 1R 1W + mask, add 2R 1W, norm 1R 1W; norm 4R 1W, (add 2R 1W,) dropout 1R 1W
            + mask                                                                14 (17) + 2 masks
    here    2R 2W; 2R (3R) 2W                                                     8 (9)

Without gradients, s is not written if only y is wanted. The backward draws the random words again
(`_philox`). The words follow the memory order of z, so rows are processed in that order. x, s and y
may have their rows in the other order of the two leading dimensions.
"""

import math

import torch
import triton
import triton.language as tl

from fastnn.kernels import _philox, _rows, _tl, norm
from fastnn.kernels._launch import kernel
from fastnn.kernels._partials import add_up, gradient_of
from fastnn.kernels._sizes import cdiv

_RANDOM = ["seed", "offset", "blocks", "bound"]
_ROWS = ["M", "N_units", "J", "x_i", "x_j"]


@triton.jit
def _row_starts(
    m, M, N, J, x_i, x_j, UNIT: tl.constexpr, SWAPPED: tl.constexpr, STRIDED: tl.constexpr
):
    """Where rows m = i * J + j of z's memory begin in x and s, and where they begin in y."""
    i = m // J
    j = m - i * J
    y = m
    if SWAPPED:
        y = j * (M // J) + i
    y = (y.to(tl.int64) * N)[:, None]
    x = y
    if STRIDED:
        x = ((i.to(tl.int64) * x_i + j.to(tl.int64) * x_j) * UNIT)[:, None]
    return x, y


@kernel(do_not_specialize=[*_ROWS, *_RANDOM])
def _residual_norm_fwd_kernel(
    Z, X, W, B, S, Y, MEAN, RSTD, M, N_units, J, x_i, x_j, eps, scale, seed: tl.int64,
    offset: tl.int64, SEED, OFFSET, STATE, blocks, bound: tl.uint32, UNIT: tl.constexpr,
    SWAPPED: tl.constexpr, STRIDED: tl.constexpr, CENTER: tl.constexpr, VEC: tl.constexpr,
    BY_FOUR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program computes s and y of a tile of BLOCK_M complete rows.

    Z, X, S, Y (M, N): float. Z is contiguous; `_row_starts` says where the rows of the others are.
    S or Y may be None. Rows are i * J + j. W, B (N,): float, or None. MEAN (if CENTER), RSTD (M,):
    fp32, or None. SEED, OFFSET, STATE: int64, or None; see _philox.load_state and save_state.
    """
    # so that the compiler sees the factor, and makes accesses as wide as it allows
    N = N_units * UNIT
    m0 = tl.program_id(0) * BLOCK_M
    m = m0 + tl.arange(0, BLOCK_M)
    row = m.to(tl.int64)[:, None] * N
    cols = tl.arange(0, BLOCK_N)
    mask = (m < M)[:, None] & (cols < N)[None, :]
    s = tl.load(Z + row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if VEC:
        seed, offset = _philox.load_state(seed, offset, SEED, OFFSET)
        _philox.save_state(STATE, seed, offset)
        # A product, not a select: a dropped inf becomes nan, as in PyTorch.
        keep = _philox.keep_tile(
            m0, 0, N, seed, offset, blocks, bound, VEC, BY_FOUR, BLOCK_M, BLOCK_N
        )
        s *= tl.where(keep, scale, 0.0)
    x_row, y_row = _row_starts(m, M, N, J, x_i, x_j, UNIT, SWAPPED, STRIDED)
    offs = x_row + cols[None, :]
    s += tl.load(X + offs, mask=mask, other=0.0).to(tl.float32)
    if X.dtype.element_ty == Z.dtype.element_ty:  # else their sum is float32
        # The statistics are those of the rounded s, so y is the same whether or not s is stored.
        s = s.to(X.dtype.element_ty).to(tl.float32)
    if S is not None:
        tl.store(S + offs, s.to(S.dtype.element_ty), mask=mask)
    if Y is not None:
        if CENTER:
            s, mean = norm.centred(s, mask, N)
            if MEAN is not None:
                tl.store(MEAN + m, mean, mask=m < M)
        rstd = norm.rstd_of(tl.sum(s * s, 1), N, eps)
        if RSTD is not None:
            tl.store(RSTD + m, rstd, mask=m < M)
        s *= rstd[:, None]
        if W is not None:
            s *= tl.load(W + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        if B is not None:
            s += tl.load(B + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        tl.store(Y + y_row + cols[None, :], s.to(Y.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=[*_ROWS, *_RANDOM])
def _residual_norm_bwd_kernel(
    DY, MORE, S, W, MEAN, RSTD, DS, DX, DZ, DW, DB, DC, M, N_units, J, x_i, x_j, scale,
    seed: tl.int64, offset: tl.int64, SEED, OFFSET, blocks, bound: tl.uint32, UNIT: tl.constexpr,
    SWAPPED: tl.constexpr, STRIDED: tl.constexpr, CENTER: tl.constexpr, VEC: tl.constexpr,
    BY_FOUR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program computes dx, dz of tiles of BLOCK_M complete rows, and loops over every G-th tile.

    DY, MORE, S, DS, DX, DZ (M, N): float. The gradient of y is DY + MORE. DZ is contiguous;
    `_row_starts` says where the rows of the others are. MORE, DS, DX and DZ may be None. Rows are
    i * J + j. W (N,): float, or None. MEAN (if CENTER), RSTD (M,): fp32. DW, DB, DC (G, N): fp32
    partial sums, or the gradients if G is 1; or None. DC sums dz. SEED, OFFSET: int64, or None; see
    _philox.load_state.
    """
    N = N_units * UNIT
    cols = tl.arange(0, BLOCK_N)
    if VEC:
        seed, offset = _philox.load_state(seed, offset, SEED, OFFSET)
    if DW is not None:
        dw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DB is not None:
        db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DC is not None:
        dc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # A program has every G-th tile of rows. Without sums, each program has one tile.
    for start in range(tl.program_id(0) * BLOCK_M, M, tl.num_programs(0) * BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        mask = (m < M)[:, None] & (cols < N)[None, :]
        x_row, y_row = _row_starts(m, M, N, J, x_i, x_j, UNIT, SWAPPED, STRIDED)
        x_offs = x_row + cols[None, :]
        y_offs = y_row + cols[None, :]
        dy = gradient_of(DY, MORE, y_offs, mask)
        s = tl.load(S + x_offs, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + m, mask=m < M, other=0.0)[:, None]
        if CENTER:
            s -= tl.load(MEAN + m, mask=m < M, other=0.0)[:, None]
        s *= rstd
        if DW is not None:
            dw += dy * s
        if DB is not None:
            db += dy
        if W is not None:
            dy *= tl.load(W + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        pull = s * tl.div_rn(tl.sum(dy * s, 1), N.to(tl.float32))[:, None]
        if CENTER:
            pull += tl.div_rn(tl.sum(dy, 1), N.to(tl.float32))[:, None]
        ds = (dy - pull) * rstd
        if DS is not None:
            ds += tl.load(DS + x_offs, mask=mask, other=0.0).to(tl.float32)
        if DX is not None:
            tl.store(DX + x_offs, ds.to(DX.dtype.element_ty), mask=mask)
        if DZ is not None or DC is not None:
            if VEC:
                keep = _philox.keep_tile(
                    start, 0, N, seed, offset, blocks, bound, VEC, BY_FOUR, BLOCK_M, BLOCK_N
                )  # fmt: skip
                ds *= tl.where(keep, scale, 0.0)
        if DC is not None:
            dc += tl.where(mask, ds, 0.0)
        if DZ is not None:
            offs = m.to(tl.int64)[:, None] * N + cols[None, :]
            tl.store(DZ + offs, ds.to(DZ.dtype.element_ty), mask=mask)
    offs = tl.program_id(0).to(tl.int64) * N + cols
    if DW is not None:
        tl.store(DW + offs, tl.sum(dw, 0).to(DW.dtype.element_ty), mask=cols < N)
    if DB is not None:
        tl.store(DB + offs, tl.sum(db, 0).to(DB.dtype.element_ty), mask=cols < N)
    if DC is not None:
        tl.store(DC + offs, tl.sum(dc, 0).to(DC.dtype.element_ty), mask=cols < N)


def fits(N, itemsize):
    """Whether rows of N elements stay in registers, in the forward and in the backward."""
    most = norm.ROW_BWD // 2 if itemsize == 4 else norm.ROW_BWD
    return _rows.fits(N, math.gcd(N, 8), most)


def _walk(swapped, x):
    """(M, N_units, J, x_i, x_j), and the constexprs that `_row_starts` needs to find rows."""
    N = x.shape[-1]
    J, strides, strided = 1, (N, 0), not x.is_contiguous()
    if swapped or strided:
        lead = x.transpose(0, 1) if swapped else x
        J = lead.shape[1]
        strides = lead.stride()[:2] if strided else strides
    unit = math.gcd(N, *strides, 8)
    sizes = x.numel() // N, N // unit, J, *(stride // unit for stride in strides)
    return sizes, {"UNIT": unit, "SWAPPED": swapped, "STRIDED": strided}


def fwd(
    z, x, weight, bias, eps, center, out_dtype, draw, bound, scale, state, swapped,
    want_s=True, want_y=True, want_statistics=True,
):  # fmt: skip
    """z, x of one shape, weight and bias (N,) or None -> (s, y, mean, rstd), None if not wanted.

    z is contiguous; if `swapped`, it is contiguous after its two leading dimensions are swapped. x
    is dense with unit stride in the last dimension, and contiguous unless it has three dimensions.
    s has the layout of x. y is contiguous, with dtype `out_dtype` or else that of s. mean (None
    unless `center`) and rstd are (M,) in fp32, in the order of z's memory. If draw is None, there
    is no dropout.
    """
    dtype = x.dtype if x.dtype == z.dtype else torch.float32
    s = _tl.empty_as(x, dtype) if want_s else None
    y = mean = rstd = None
    if want_y:
        y = torch.empty(x.shape, dtype=out_dtype or dtype, device=x.device)
    sizes, flags = _walk(swapped, x)
    if want_y and want_statistics:
        rstd = torch.empty(sizes[0], dtype=torch.float32, device=x.device)
        mean = torch.empty_like(rstd) if center else None
    seed, offset, SEED, OFFSET, blocks, bound = _philox.random_arguments(draw, bound)
    config = _rows.row_config(x.shape[-1], flags["UNIT"])
    _residual_norm_fwd_kernel(
        (cdiv(sizes[0], config["BLOCK_M"]),),
        z, x, weight, bias, s, y, mean, rstd, *sizes, float(eps), scale, seed, offset, SEED, OFFSET,
        state, blocks, bound, **flags, CENTER=center, VEC=draw.vec if draw else 0,
        BY_FOUR=_philox.by_four(x.shape[-1], draw), **config,
    )  # fmt: skip
    return s, y, mean, rstd


def bwd(
    dy, more, ds, s, weight, mean, rstd, draw, bound, scale, swapped, dz_dtype, dx_dtype, dw_dtype,
    db_dtype, dc_dtype=None,
):  # fmt: skip
    """dy, more and ds or None (s's shape), fwd's arguments and results -> [dz, dx, dw, db, dc].

    The gradient of y is dy + more. dc (N,) is the sum of dz over all rows. Each result is None if
    its dtype is None. dz has the layout of z, and dx that of s. If they would also have equal
    values and one dtype and layout, they are one tensor.
    """
    N = s.shape[-1]
    if ds is not None and ds.stride() != s.stride():
        ds = torch.empty_like(s).copy_(ds)
    sizes, flags = _walk(swapped, s)
    dz = dx = None
    if dx_dtype is not None:
        dx = _tl.empty_as(s, dx_dtype)
    in_order = s.is_contiguous() and not swapped
    shared = draw is None and dx_dtype is not None and dx_dtype == dz_dtype and in_order
    if dz_dtype is not None and not shared:
        lead = s.transpose(0, 1) if swapped else s
        dz = torch.empty(lead.shape, dtype=dz_dtype, device=s.device)
        dz = dz.transpose(0, 1) if swapped else dz
    dw = None if dw_dtype is None else torch.empty(N, dtype=dw_dtype, device=s.device)
    db = None if db_dtype is None else torch.empty(N, dtype=db_dtype, device=s.device)
    dc = None if dc_dtype is None else torch.empty(N, dtype=dc_dtype, device=s.device)
    params = [t for t in (dw, db) if t is not None]
    summed = [*params, *([] if dc is None else [dc])]
    noisy = bool(summed) and (draw is not None or dc is not None)
    config = _rows.row_config(N, flags["UNIT"], least_warps=8 if summed else 4, noise=noisy)
    if len(summed) > 2 and config["BLOCK_N"] >= 4096:
        config["num_warps"] = 16  # three sums of a wide row do not fit into the registers of eight
    G = cdiv(sizes[0], config["BLOCK_M"])
    dw_part, db_part, dc_part, parts = dw, db, dc, None
    if summed:
        G = _rows.summing_programs(sizes[0], config, norm.processors_of(s.get_device()))
        if G > 1:
            parts = rstd.new_empty(len(summed), G, N)
            dw_part = None if dw is None else parts[0]
            db_part = None if db is None else parts[len(params) - 1]
            dc_part = None if dc is None else parts[-1]
    seed, offset, SEED, OFFSET, blocks, bound = _philox.random_arguments(draw, bound)
    _residual_norm_bwd_kernel(
        (G,), dy, more, s, weight, mean, rstd, ds, dx, dz, dw_part, db_part, dc_part, *sizes, scale,
        seed, offset, SEED, OFFSET, blocks, bound, **flags, CENTER=mean is not None,
        VEC=draw.vec if draw else 0, BY_FOUR=_philox.by_four(N, draw), **config,
    )  # fmt: skip
    if parts is not None:
        if params:
            add_up(parts[: len(params)], dw, db, G, N)
        if dc is not None:
            add_up(parts[-1:], dc, None, G, N)
    return [dx if shared else dz, dx, dw, db, dc]
