"""Convolution as matrix products whose operands are read where they lie (implicit GEMM).

The three products and their names are those of conv_direct.py. For each group and tap

    gather, transposed    y[m, q] += x[place of m, r] w[r, q]           m: positions of all samples
    weight                dw[k, c] += small[m, k]^T big[place of m, c]

A position that a tap places outside the tensor reads zeros. Each product takes 2 * positions * outs
* reads * taps FLOPs. It is compute-bound for some hundred outs and reads. Products accumulate in
fp32 for every dtype.
"""

import math

import torch
import triton
import triton.language as tl

from fastnn.kernels import pointwise
from fastnn.kernels._config import tunable
from fastnn.kernels._gemm import largest_tile, shares, tile_of
from fastnn.kernels._gpus import facts, multiprocessors
from fastnn.kernels._launch import kernel
from fastnn.kernels._partials import in_order
from fastnn.kernels._sizes import cdiv
from fastnn.kernels.conv_direct import SIZES, constants, finish, follows, shape_of, source
from fastnn.kernels.epilogue import width


@triton.jit
def _placed(
    m, tap, M, id_, ih, iw, od, oh, ow, pd, ph, pw, dd, dh, dw,
    KH: tl.constexpr, KW: tl.constexpr, SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """For positions m of all samples: sample, position, the position a tap reads, is there one."""
    o = m % (od * oh * ow)
    n = (m // (od * oh * ow)).to(tl.int64)
    at_d, there_d = source(o // (oh * ow), pd, tap // (KH * KW) * dd, id_, SD, TRANSPOSED)
    at_h, there_h = source(o // ow % oh, ph, tap // KW % KH * dh, ih, SH, TRANSPOSED)
    at_w, there_w = source(o % ow, pw, tap % KW * dw, iw, SW, TRANSPOSED)
    return n, o, (at_d * ih + at_h) * iw + at_w, (m < M) & there_d & there_h & there_w


@triton.jit
def _finish_slices(
    acc, Y, rows, column, there, q0, outs, first, BIAS, Z, MEAN, VAR, SCALE, SHIFT, eps, a, b,
    FORMULA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """`finish` of acc (BLOCK_M, BLOCK_N) in SLICES slices of its columns, one after the other.

    A thread that holds sums of many columns would else hold what is loaded for all of them, too.
    """
    if SLICES > 1:
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        _finish_slices(
            left, Y, rows, column, there, q0, outs, first, BIAS, Z, MEAN, VAR, SCALE, SHIFT, eps,
            a, b, FORMULA, BLOCK_M, BLOCK_N // 2, SLICES // 2,
        )  # fmt: skip
        _finish_slices(
            right, Y, rows, column, there, q0 + BLOCK_N // 2, outs, first, BIAS, Z, MEAN, VAR,
            SCALE, SHIFT, eps, a, b, FORMULA, BLOCK_M, BLOCK_N // 2, SLICES // 2,
        )  # fmt: skip
    else:
        q = q0 + tl.arange(0, BLOCK_N)
        offs = rows[:, None] + q[None, :] * column
        mask = there[:, None] & (q < outs)[None, :]
        finish(
            acc, Y, offs, mask, first + q, q < outs, BIAS, Z, MEAN, VAR, SCALE, SHIFT, eps, a, b,
            FORMULA,
        )  # fmt: skip


@kernel(do_not_specialize=["pixels", "groups", "outs", "reads", *SIZES])
def _conv_gemm_kernel(
    X, W, BIAS, Y, Z, MEAN, VAR, SCALE, SHIFT, eps, a, b, pixels, groups, outs, reads, id_, ih, iw,
    od, oh, ow, pd, ph, pw, dd, dh, dw,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SD: tl.constexpr, SH: tl.constexpr,
    SW: tl.constexpr, DIMS: tl.constexpr, OUT_VEC: tl.constexpr, READ_VEC: tl.constexpr,
    EVEN_K: tl.constexpr, TRANSPOSED: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr,
    FORMULA: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """A program computes one tile of positions and channels of a group, and loops over the taps.

    X (N, groups * reads, id_, ih, iw), Y (N, groups * outs, od, oh, ow): float, contiguous, or
    channels last if LAST, of the same dtype. W (groups * outs, reads, taps), or (groups * reads,
    outs, taps) if TRANSPOSED, of that dtype: contiguous, or (..., taps, ...) in memory if LAST.
    BIAS, Z, MEAN, VAR, SCALE, SHIFT: as in `follow`. pixels: N * od * oh * ow. `outs` and `reads`
    are divided by OUT_VEC and READ_VEC. KD, KH, KW: the taps; SD, SH, SW: the strides. Only the
    last DIMS dimensions have more than one position. SLICES: as in `_finish_slices`.
    """
    id_, ih, od, oh, pd, ph = shape_of(id_, ih, od, oh, pd, ph, DIMS)
    # Sizes are passed divided by a factor of them, so that the compiler sees the factor.
    outs = outs * OUT_VEC
    reads = reads * READ_VEC
    TAPS: tl.constexpr = KD * KH * KW
    OP = od * oh * ow
    IP = id_ * ih * iw
    pid = tl.program_id(0)
    row, tile = tile_of(pid, tl.cdiv(pixels, BLOCK_M), tl.cdiv(outs, BLOCK_N), GROUP_M)
    m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    q0 = tile * BLOCK_N
    q = q0 + tl.arange(0, BLOCK_N)
    g = tl.program_id(1)
    ks = tl.arange(0, BLOCK_K)
    W += g.to(tl.int64) * outs * reads * TAPS
    steps = tl.cdiv(reads, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(TAPS * steps):
        tap = step // steps
        k0 = (step - tap * steps) * BLOCK_K
        n, _, at, there = _placed(
            m, tap, pixels, id_, ih, iw, od, oh, ow, pd, ph, pw, dd, dh, dw, KH, KW, SD, SH, SW,
            TRANSPOSED,
        )  # fmt: skip
        r = k0 + ks
        x_mask = there[:, None]
        w_mask = (q < outs)[None, :]
        if not EVEN_K:
            x_mask = x_mask & (r < reads)[None, :]
            w_mask = w_mask & (r < reads)[:, None]
        if LAST:
            x_pointers = X + ((n * IP + at) * (groups * reads) + g * reads)[:, None] + r[None, :]
            if TRANSPOSED:
                w_pointers = W + r[:, None] * (TAPS * outs) + tap * outs + q[None, :]
            else:
                w_pointers = W + q[None, :] * (TAPS * reads) + tap * reads + r[:, None]
        else:
            x_pointers = X + (n * (groups * reads) * IP + g * reads * IP + at)[:, None]
            x_pointers += r[None, :] * IP
            if TRANSPOSED:
                w_pointers = W + (r[:, None] * outs + q[None, :]) * TAPS + tap
            else:
                w_pointers = W + (q[None, :] * reads + r[:, None]) * TAPS + tap
        x = tl.load(x_pointers, mask=x_mask, other=0.0)
        w = tl.load(w_pointers, mask=w_mask, other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if LAST:
        rows = m.to(tl.int64) * (groups * outs) + g * outs
        column = 1
    else:
        rows = (m // OP).to(tl.int64) * (groups * outs) * OP + g * outs * OP + m % OP
        column = OP
    _finish_slices(
        acc, Y, rows, column, m < pixels, q0, outs, g * outs, BIAS, Z, MEAN, VAR, SCALE, SHIFT, eps,
        a, b, FORMULA, BLOCK_M, BLOCK_N, SLICES,
    )  # fmt: skip


@kernel(do_not_specialize=["pixels", "groups", "outs", "reads", "steps_each", *SIZES])
def _conv_gemm_weight_kernel(
    SMALL, BIG, DW, pixels, groups, outs, reads, id_, ih, iw, od, oh, ow, pd, ph, pw, dd, dh, dw,
    steps_each, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SD: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, DIMS: tl.constexpr, OUT_VEC: tl.constexpr,
    READ_VEC: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program computes one tile of one tap, and loops over its share of the positions.

    SMALL (N, groups * outs, od, oh, ow), BIG (N, groups * reads, id_, ih, iw): one float dtype,
    contiguous, or channels last if LAST. DW (splits, groups * outs, reads, taps): float; fp32
    partial sums if there are several splits. The rest is as in _conv_gemm_kernel.
    """
    id_, ih, od, oh, pd, ph = shape_of(id_, ih, od, oh, pd, ph, DIMS)
    outs = outs * OUT_VEC
    reads = reads * READ_VEC
    TAPS: tl.constexpr = KD * KH * KW
    OP = od * oh * ow
    IP = id_ * ih * iw
    tiles_n = tl.cdiv(reads, BLOCK_N)
    k = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tap = tl.program_id(1) % TAPS
    g = tl.program_id(1) // TAPS
    split = tl.program_id(2)
    first = split * steps_each * BLOCK_K
    last = tl.minimum(first + steps_each * BLOCK_K, pixels)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for m0 in range(first, last, BLOCK_K):
        m = m0 + tl.arange(0, BLOCK_K)
        n, o, at, there = _placed(
            m, tap, pixels, id_, ih, iw, od, oh, ow, pd, ph, pw, dd, dh, dw, KH, KW, SD, SH, SW,
            False,
        )  # fmt: skip
        if LAST:
            a_pointers = SMALL + (m.to(tl.int64) * (groups * outs) + g * outs)[None, :] + k[:, None]
            b_pointers = BIG + ((n * IP + at) * (groups * reads) + g * reads)[:, None] + c[None, :]
        else:
            a_pointers = SMALL + (n * (groups * outs) * OP + g * outs * OP + o)[None, :]
            a_pointers += k[:, None] * OP
            b_pointers = BIG + (n * (groups * reads) * IP + g * reads * IP + at)[:, None]
            b_pointers += c[None, :] * IP
        a = tl.load(a_pointers, mask=(m < pixels)[None, :] & (k < outs)[:, None], other=0.0)
        b = tl.load(b_pointers, mask=there[:, None] & (c < reads)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    rows = (split.to(tl.int64) * groups + g) * outs + k
    pointers = DW + (rows[:, None] * reads + c[None, :]) * TAPS + tap
    mask = (k < outs)[:, None] & (c < reads)[None, :]
    tl.store(pointers, acc.to(DW.dtype.element_ty), mask=mask)


# ---- Configurations ------------------------------------------------------------------------------


@tunable("BLOCK_M", "BLOCK_N", "BLOCK_K")
def _config(M, N, itemsize, precision, arch, sms, aligned, along, followed=False):
    """along: whether operands run along the dimension that is summed. followed: whether more than a
    bias follows the sum."""
    # Pointers of single elements take registers, as a formula in the epilogue does; so do operands
    # of tf32 that do not run along the sum.
    crowded = followed or not aligned or (itemsize == 4 and not along)
    block_m, block_n, block_k, warps, stages = largest_tile(
        M, N, itemsize, precision, arch, sms, aligned, "act" if crowded else None
    )
    config = {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k * 2 // itemsize,
        "num_warps": warps,
        "num_stages": stages,
    }
    if not aligned:
        # Without a limit, ptxas spills a few registers, so that another block fits.
        config["maxnreg"] = 255
    elif (block_m, block_n, warps) == (128, 128, 8) and stages > 3:
        # Two blocks fit on a multiprocessor, by shared memory and by registers; but for tf32 on
        # sm_100, which would spill unless what follows is computed in slices.
        if itemsize == 2 or facts(arch).matrix == "wgmma" or followed:
            config.update(num_stages=3, maxnreg=128)
    return config


# ---- Launchers -----------------------------------------------------------------------------------


def _widths(t, outs, reads, last):
    """The factors of `outs` and `reads` that the compiler sees, and whether accesses are wide."""
    v = 16 // t.element_size()
    wide = last and width(v, outs, reads) == v and t.data_ptr() % 16 == 0
    return (v, v, True) if wide else (1, 1, False)


def gather(x, w, bias, y, outs, reads, geometry, transposed, last, precision, arch, **after):
    """x (N, groups * reads, *in) and w -> y (N, groups * outs, *out), which is written.

    x and y are contiguous, or channels last if `last`. w (groups * outs, reads, taps), or (groups *
    reads, outs, taps) if `transposed`; the last two in the opposite order if `last`. geometry: as
    in conv_direct.gather. after: as in conv_direct.follows.
    """
    rest, formula = follows(**after)
    (N, Q), out = y.shape[:2], y.shape[2:]
    _, _, padding, dilation, _ = geometry
    groups = Q // outs
    pixels = N * math.prod(out)
    out_vec, read_vec, wide = _widths(x, outs, reads, last)
    sms = cdiv(multiprocessors(x.get_device()), groups)
    z, mean = rest[:2]
    followed = formula is not None or z is not None or mean is not None
    config = _config(pixels, outs, x.element_size(), precision, arch, sms, wide, True, followed)
    tiles = cdiv(pixels, config["BLOCK_M"]) * cdiv(outs, config["BLOCK_N"])
    # Found by compiling: no spills in half of the registers. Mish takes the most of them.
    slices = 8 if formula is pointwise.mish else 4
    slices = slices if followed and config["BLOCK_N"] == 128 else 1
    _conv_gemm_kernel(
        (tiles, groups), x, w, bias, y, *rest, pixels, groups, outs // out_vec, reads // read_vec,
        *x.shape[2:], *out, *padding, *dilation, **constants(geometry), OUT_VEC=out_vec,
        READ_VEC=read_vec, EVEN_K=reads % config["BLOCK_K"] == 0, TRANSPOSED=transposed, LAST=last,
        PRECISION=precision, FORMULA=formula, SLICES=slices, GROUP_M=8, **config,
    )  # fmt: skip
    return y


def weight_gradient(small, big, dw, outs, reads, geometry, last, precision, arch):
    """small (N, groups * outs, *out), big (N, groups * reads, *in) -> dw, which is written.

    Both are contiguous, or channels last if `last`. dw (groups * outs, reads, taps), contiguous.
    """
    (N, K), out = small.shape[:2], small.shape[2:]
    kernel_size, _, padding, dilation, _ = geometry
    groups, taps = K // outs, math.prod(kernel_size)
    pixels = N * math.prod(out)
    out_vec, read_vec, wide = _widths(small, outs, reads, last)
    sms = multiprocessors(small.get_device())
    config = _config(
        outs, reads, small.element_size(), precision, arch, cdiv(sms, groups * taps), wide, False
    )
    tiles = cdiv(outs, config["BLOCK_M"]) * cdiv(reads, config["BLOCK_N"])
    steps = cdiv(pixels, config["BLOCK_K"])
    each, splits = shares(tiles * groups * taps, steps, sms)
    partials = small.new_empty((splits, *dw.shape), dtype=torch.float32) if splits > 1 else dw
    _conv_gemm_weight_kernel(
        (tiles, taps * groups, splits), small, big, partials, pixels, groups, outs // out_vec,
        reads // read_vec, *big.shape[2:], *out, *padding, *dilation, each, **constants(geometry),
        OUT_VEC=out_vec, READ_VEC=read_vec, LAST=last, PRECISION=precision, **config,
    )  # fmt: skip
    return in_order(partials, dw) if splits > 1 else dw
