"""Convolution without matrix products, for channels that read few others: depthwise, most of all.

    gather      y[n, q, o] = b[q] + sum over the channels r of the group and the taps t of
                             x[n, r, o * stride - padding + t * dilation] w[q, r, t]
    transposed  y[n, q, i] = b[q] + sum over r and t of x[n, r, o] w[r, q, t], for the o,
                             if there is one, with o * stride - padding + t * dilation = i
    weight      dw[k, c, t] = sum over n and o of
                             small[n, k, o] big[n, c, o * stride - padding + t * dilation]

A convolution is `gather`, and the gradient of its input is `transposed`; a transposed convolution
is the opposite. Thus every result is one sum in a fixed order. `small` has the positions where the
taps are placed (the output of a convolution), and `big` the positions that they read.
Memory-bound. Passes over the elements (R read, W write), with T taps:
    stock   forward 1R 1W; backward 1R 1W, 2R for each tap, 1R for the bias     5 + 2T
    here    forward 1R 1W; backward 1R 1W, 2R                                   6
            depthwise, few taps: forward 1R 1W; backward 2R 1W                  5
Neighbouring positions share what they read in the caches.
"""

import math

import torch
import triton
import triton.language as tl

from fastnn.kernels import pointwise
from fastnn.kernels._config import tunable
from fastnn.kernels._gpus import architecture, facts, multiprocessors
from fastnn.kernels._launch import kernel
from fastnn.kernels._partials import in_order
from fastnn.kernels._sizes import cdiv, next_power_of_2
from fastnn.kernels.epilogue import follow

CHUNK = 256  # positions that a program reads once per tap; they stay in the L1 cache
MOST_TAPS = 64  # taps whose sums a program keeps in registers
MOST_BOTH = 25  # taps of which a thread keeps the sums of a few elements, for both gradients
UNROLLED = 7  # the widest kernel whose columns are unrolled


@triton.jit
def source(out, padding, reach, size, STRIDE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """(the position that a tap reads for the position `out`, whether there is one).

    reach: the distance of the tap from the first one.
    """
    if TRANSPOSED:
        ahead = out + padding - reach
        at = ahead // STRIDE
        there = (ahead >= 0) & (at * STRIDE == ahead)
    else:
        at = out * STRIDE - padding + reach
        there = at >= 0
    return at, there & (at < size)


@triton.jit
def _add_tap(
    acc, X, W, row, within, ow, read, there_q, size, padding, reach, IP, RC,
    STRIDE: tl.constexpr, TRANSPOSED: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """acc (BLOCK_P, BLOCK_C) and the products of one tap. row: where the rows that it reads begin.

    X and W point to the channels; W to this tap of each.
    """
    at, there = source(ow, padding, reach, size, STRIDE, TRANSPOSED)
    at = (row + at)[:, None]
    offs = at * RC + read[None, :] if LAST else read[None, :] * IP + at
    mask = (within & there)[:, None] & there_q[None, :]
    x = tl.load(X + offs, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(W, mask=there_q, other=0.0).to(tl.float32)
    # A tap outside the tensor adds nothing, also if its weight is inf or nan.
    return tl.where(mask, acc + x * w[None, :], acc)


@triton.jit
def shape_of(id_, ih, od, oh, pd, ph, DIMS: tl.constexpr):
    """The sizes and paddings of the first two dimensions: constants for those that are not there,
    so that nothing is computed for them."""
    if DIMS < 3:
        id_ = 1
        od = 1
        pd = 0
    if DIMS < 2:
        ih = 1
        oh = 1
        ph = 0
    return id_, ih, od, oh, pd, ph


@triton.jit
def finish(
    acc, Y, offs, mask, q, there_q, BIAS, Z, MEAN, VAR, SCALE, SHIFT, eps, a, b,
    FORMULA: tl.constexpr,
):  # fmt: skip
    """Stores what follows the sums acc (positions, channels q), at `offs` of Y; see `follow`."""
    acc = follow(acc, Z, offs, mask, q, there_q, BIAS, MEAN, VAR, SCALE, SHIFT, eps, a, b, FORMULA)
    tl.store(Y + offs, acc.to(Y.dtype.element_ty), mask=mask)


SIZES = ["id_", "ih", "iw", "od", "oh", "ow", "pd", "ph", "pw", "dd", "dh", "dw"]


@kernel(
    do_not_specialize=[
        "channels", "positions", "outs", "reads", *SIZES, "w_group", "w_out", "w_read", "w_tap",
        "blocks_p", "blocks_c",
    ]
)  # fmt: skip
def _conv_direct_kernel(
    X, W, BIAS, Y, Z, MEAN, VAR, SCALE, SHIFT, eps, a, b, channels, positions, outs, reads, id_, ih,
    iw, od, oh, ow, pd, ph, pw, dd, dh, dw, w_group, w_out, w_read, w_tap, blocks_p, blocks_c,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SD: tl.constexpr, SH: tl.constexpr,
    SW: tl.constexpr, UNIT: tl.constexpr, PLAIN: tl.constexpr, TRANSPOSED: tl.constexpr,
    LAST: tl.constexpr, UNROLL: tl.constexpr, DIMS: tl.constexpr, FORMULA: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program computes BLOCK_P positions of BLOCK_C channels of one sample.

    X (N, groups * reads, id_, ih, iw), Y (N, groups * outs, od, oh, ow): float, contiguous, or
    channels last if LAST. W: float, by its strides. BIAS, Z, MEAN, VAR, SCALE,
    SHIFT: as in `follow`.
    The number of `channels` of Y if LAST, else of `positions`, is divided by UNIT. KD, KH, KW: the
    taps; SD, SH, SW: the strides. Only the last DIMS dimensions have more than one position.
    PLAIN: whether outs and reads are 1; if also LAST, W is (taps, groups).
    """
    id_, ih, od, oh, pd, ph = shape_of(id_, ih, od, oh, pd, ph, DIMS)
    # Sizes are passed divided by a factor of them, so that the compiler sees the factor.
    Q = channels * UNIT if LAST else channels
    OP = positions if LAST else positions * UNIT
    IP = id_ * ih * iw
    RC = Q if PLAIN else Q // outs * reads
    pid = tl.program_id(0)
    o = pid % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    q = pid // blocks_p % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    n = (pid // (blocks_p * blocks_c)).to(tl.int64)
    X += n * RC * IP
    Y += n * Q * OP
    there_q = q < Q
    if PLAIN:
        read = q
        if LAST:
            W += q
            w_tap = Q  # whose factor the compiler sees, so that it loads weights side by side
        else:
            W += q * w_group
    else:
        read = q // outs * reads
        W += q // outs * w_group + q % outs * w_out
    x_ow = o % ow
    x_oh = o // ow % oh
    x_od = o // (ow * oh)
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for r in range(reads):
        for td in range(KD):
            at_d, there_d = source(x_od, pd, td * dd, id_, SD, TRANSPOSED)
            for th in range(KH):
                at_h, there_h = source(x_oh, ph, th * dh, ih, SH, TRANSPOSED)
                row = (at_d * ih + at_h) * iw
                within = there_d & there_h & (o < OP)
                taps = W + (td * KH + th) * KW * w_tap
                channel = read
                if not PLAIN:
                    taps += r * w_read
                    channel += r
                if UNROLL:
                    for tw in tl.static_range(KW):
                        acc = _add_tap(
                            acc, X, taps + tw * w_tap, row, within, x_ow, channel, there_q, iw, pw,
                            tw * dw, IP, RC, SW, TRANSPOSED, LAST,
                        )  # fmt: skip
                else:
                    for tw in range(KW):
                        acc = _add_tap(
                            acc, X, taps + tw * w_tap, row, within, x_ow, channel, there_q, iw, pw,
                            tw * dw, IP, RC, SW, TRANSPOSED, LAST,
                        )  # fmt: skip
    offs = o[:, None] * Q + q[None, :] if LAST else q[None, :] * OP + o[:, None]
    mask = (o < OP)[:, None] & there_q[None, :]
    if Z is not None:
        Z += n * Q * OP
    finish(
        acc, Y, offs, mask, q, there_q, BIAS, Z, MEAN, VAR, SCALE, SHIFT, eps, a, b, FORMULA
    )  # fmt: skip


@kernel(
    do_not_specialize=["channels", *SIZES, "runs", "runs_w", "blocks_p", "blocks_c"],
)
def _conv_direct_runs_kernel(
    X, W, BIAS, Y, Z, MEAN, VAR, SCALE, SHIFT, eps, a, b, channels, id_, ih, iw, od, oh, ow, pd, ph,
    pw, dd, dh, dw, runs, runs_w, blocks_p, blocks_c, KD: tl.constexpr, KH: tl.constexpr,
    KW: tl.constexpr, SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, UNIT: tl.constexpr,
    DIMS: tl.constexpr, RUN: tl.constexpr, FORMULA: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program computes BLOCK_P runs of RUN positions of BLOCK_C channels of one sample.

    The positions of a run are neighbours along W, and what they have in common is read once. For
    depthwise convolutions with channels last, and without a dilation along W.

    X (N, channels, id_, ih, iw), Y (N, channels, od, oh, ow): float, channels last. W: float,
    (taps, channels). BIAS, Z, MEAN, VAR, SCALE, SHIFT: as in `follow`. runs: of a sample; runs_w:
    of a row. The other constants are as in _conv_direct_kernel.
    """
    id_, ih, od, oh, pd, ph = shape_of(id_, ih, od, oh, pd, ph, DIMS)
    Q = channels * UNIT
    pid = tl.program_id(0)
    r = pid % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    q = pid // blocks_p % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    n = (pid // (blocks_p * blocks_c)).to(tl.int64)
    X += n * Q * (id_ * ih * iw)
    there_q = q < Q
    line = r // runs_w
    first = (r - line * runs_w) * RUN
    accs = ()  # of each position of a run; Triton takes no starred tuples, mypy no growing ones
    for _j in tl.static_range(RUN):
        accs = accs + (tl.zeros((BLOCK_P, BLOCK_C), tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    for td in range(KD):
        at_d, there_d = source(line // oh, pd, td * dd, id_, SD, False)
        for th in range(KH):
            at_h, there_h = source(line % oh, ph, th * dh, ih, SH, False)
            row = (at_d * ih + at_h) * iw
            within = there_d & there_h & (r < runs)
            taps = ()
            for tw in tl.static_range(KW):
                w = tl.load(W + ((td * KH + th) * KW + tw) * Q + q, mask=there_q, other=0.0)
                taps = taps + (w.to(tl.float32)[None, :],)  # type: ignore[assignment]  # noqa: RUF005
            for c in tl.static_range((RUN - 1) * SW + KW):
                at = first * SW - pw + c
                mask = (within & (at >= 0) & (at < iw))[:, None] & there_q[None, :]
                x = tl.load(X + (row + at)[:, None] * Q + q[None, :], mask=mask, other=0.0)
                x = x.to(tl.float32)
                more = ()
                for j in tl.static_range(RUN):
                    if (c - j * SW >= 0) & (c - j * SW < KW):
                        # A tap outside adds nothing, also if its weight is inf or nan.
                        acc = tl.where(mask, accs[j] + x * taps[c - j * SW], accs[j])
                        more = more + (acc,)  # type: ignore[assignment]  # noqa: RUF005
                    else:
                        more = more + (accs[j],)  # type: ignore[assignment]  # noqa: RUF005
                accs = more
    Y += n * Q * (od * oh * ow)
    if Z is not None:
        Z += n * Q * (od * oh * ow)
    for j in tl.static_range(RUN):
        offs = (line * ow + first + j)[:, None] * Q + q[None, :]
        mask = ((r < runs) & (first + j < ow))[:, None] & there_q[None, :]
        finish(
            accs[j], Y, offs, mask, q, there_q, BIAS, Z, MEAN, VAR, SCALE, SHIFT, eps, a, b, FORMULA
        )  # fmt: skip


@kernel(
    do_not_specialize=[
        "pairs", "positions", "outs", "reads", *SIZES, "rows", "columns", "row_blocks",
        "column_blocks", "chunks", "chunks_each",
    ]
)  # fmt: skip
def _conv_direct_weight_kernel(
    SMALL, BIG, PARTIALS, BIAS_PARTIALS, pairs, positions, outs, reads, id_, ih, iw, od, oh, ow, pd,
    ph, pw, dd, dh, dw, rows, columns, row_blocks, column_blocks, chunks, chunks_each,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SD: tl.constexpr, SH: tl.constexpr,
    SW: tl.constexpr, UNIT: tl.constexpr, PLAIN: tl.constexpr, LAST: tl.constexpr,
    DIMS: tl.constexpr, TAPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program sums TAPS taps of BLOCK_C pairs of channels, and loops over its chunks.

    A chunk is `rows` rows of `columns` columns of SMALL, which a program reads once for each tap.
    SMALL (N, groups * outs, od, oh, ow), BIG (N, groups * reads, id_, ih, iw): float, contiguous,
    or channels last if LAST. PARTIALS (splits, groups * outs, reads, taps): fp32. BIAS_PARTIALS
    (splits, groups * outs): fp32 sums of SMALL, or None. The number of `pairs` (groups *
    outs * reads) if LAST, else of `positions` of SMALL, is divided by UNIT. PLAIN: whether outs and
    reads are 1. The other constants are as in _conv_direct_kernel.
    """
    id_, ih, od, oh, pd, ph = shape_of(id_, ih, od, oh, pd, ph, DIMS)
    E = pairs * UNIT if LAST else pairs
    OP = positions if LAST else positions * UNIT
    IP = (id_ * ih * iw).to(tl.int64)
    e = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    there_e = e < E
    if PLAIN:
        K = E
        C = E
        k = e
        c = e
    else:
        K = E // reads
        C = K // outs * reads
        k = e // reads
        c = k // outs * reads + e % reads
    taps: tl.constexpr = KD * KH * KW
    first = tl.program_id(1) * TAPS
    last = taps
    if BIAS_PARTIALS is not None:
        last = taps + 1  # a tap that reads ones
    stop = tl.minimum(TAPS, last - first)
    split = tl.program_id(2)
    begin = split * chunks_each
    total = tl.zeros((TAPS, BLOCK_C), tl.float32)
    for chunk in range(begin, tl.minimum(begin + chunks_each, chunks)):
        w0 = chunk % column_blocks * columns
        h0 = chunk // column_blocks % row_blocks * rows
        plane = chunk // (column_blocks * row_blocks)
        od_ = plane % od
        n = (plane // od).to(tl.int64)
        h1 = tl.minimum(h0 + rows, oh)
        w1 = tl.minimum(w0 + columns, ow)
        small = SMALL + n * K * OP
        big = BIG + n * C * IP
        for i in range(stop):
            tap = first + i
            at_d, there_d = source(od_, pd, tap // (KH * KW) * dd, id_, SD, False)
            acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
            for h in range(h0, h1):
                at_h, there_h = source(h, ph, tap // KW % KH * dh, ih, SH, False)
                for w in range(w0, w1, BLOCK_P):
                    p = w + tl.arange(0, BLOCK_P)
                    at_w, there_w = source(p, pw, tap % KW * dw, iw, SW, False)
                    o = ((od_ * oh + h) * ow + p)[:, None]
                    at = ((at_d * ih + at_h) * iw + at_w)[:, None]
                    mask = (p < w1)[:, None] & there_e[None, :]
                    offs = o * K + k[None, :] if LAST else k[None, :] * OP + o
                    s = tl.load(small + offs, mask=mask, other=0.0).to(tl.float32)
                    mask = mask & (there_d & there_h & there_w)[:, None] & (tap < taps)
                    offs = at * C + c[None, :] if LAST else c[None, :] * IP + at
                    b = tl.load(big + offs, mask=mask, other=0.0).to(tl.float32)
                    # a tap outside the tensor adds nothing, also if the other factor is inf or nan
                    acc += tl.where(tap == taps, s, tl.where(mask, s * b, 0.0))
            row = tl.arange(0, TAPS)[:, None]
            total = tl.where(row == i, total + tl.sum(acc, 0)[None, :], total)
    tap = first + tl.arange(0, TAPS)[:, None]
    PARTIALS += split.to(tl.int64) * E * taps
    tl.store(PARTIALS + e[None, :] * taps + tap, total, mask=(tap < taps) & there_e[None, :])
    if BIAS_PARTIALS is not None:
        BIAS_PARTIALS += split.to(tl.int64) * K
        if not PLAIN:
            there_e = there_e & (e % reads == 0)
        mask = (tap == taps) & there_e[None, :]
        tl.store(BIAS_PARTIALS + k[None, :] + tap * 0, total, mask=mask)


@kernel(
    do_not_specialize=["channels", "positions", *SIZES, "blocks_p", "tiles", "tiles_each"],
)
def _conv_direct_bwd_kernel(
    DY, X, W, DX, PARTIALS, BIAS_PARTIALS, channels, positions, id_, ih, iw, od, oh, ow, pd, ph, pw,
    dd, dh, dw, blocks_p, tiles, tiles_each, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, UNIT: tl.constexpr,
    TRANSPOSED: tl.constexpr, LAST: tl.constexpr, DIMS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program computes BLOCK_C channels of its tiles of DX, and of the gradients of W and bias.

    It loops over the tiles of BLOCK_P positions, and reads DY once for all.

    DY (N, channels, id_, ih, iw), X, DX (N, channels, od, oh, ow): float, contiguous, or channels
    last if LAST. W: float, (channels, taps), or (taps, channels) if LAST. PARTIALS (splits,
    channels, taps): fp32. BIAS_PARTIALS (splits, channels): fp32 sums of DY, or None; if given, the
    tiles cover the positions of DY, too. TRANSPOSED: whether DX is a transposed convolution of DY.
    The other constants are as in _conv_direct_kernel.
    """
    id_, ih, od, oh, pd, ph = shape_of(id_, ih, od, oh, pd, ph, DIMS)
    Q = channels * UNIT if LAST else channels
    OP = positions if LAST else positions * UNIT
    IP = id_ * ih * iw
    TAPS: tl.constexpr = KD * KH * KW
    q = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    there_q = q < Q
    split = tl.program_id(1)
    begin = split * tiles_each
    sums = ()  # of each tap, and of each lane by itself
    for _t in tl.static_range(TAPS):
        sums = sums + (tl.zeros((BLOCK_P, BLOCK_C), tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    sum_dy = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tile in range(begin, tl.minimum(begin + tiles_each, tiles)):
        n = (tile // blocks_p).to(tl.int64)
        o = tile % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
        offs = o[:, None] * Q + q[None, :] if LAST else q[None, :] * OP + o[:, None]
        offs += n * Q * OP
        mask = (o < OP)[:, None] & there_q[None, :]
        x = tl.load(X + offs, mask=mask, other=0.0).to(tl.float32)
        dy = DY + n * Q * IP
        acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        more = ()
        for td in tl.static_range(KD):
            at_d, there_d = source(o // (ow * oh), pd, td * dd, id_, SD, TRANSPOSED)
            for th in tl.static_range(KH):
                at_h, there_h = source(o // ow % oh, ph, th * dh, ih, SH, TRANSPOSED)
                for tw in tl.static_range(KW):
                    at, there = source(o % ow, pw, tw * dw, iw, SW, TRANSPOSED)
                    at = ((at_d * ih + at_h) * iw + at)[:, None]
                    from_ = at * Q + q[None, :] if LAST else q[None, :] * IP + at
                    there = mask & (there & there_h & there_d)[:, None]
                    g = tl.load(dy + from_, mask=there, other=0.0).to(tl.float32)
                    tap = (td * KH + th) * KW + tw
                    at_w = tap * Q + q if LAST else q * TAPS + tap
                    w = tl.load(W + at_w, mask=there_q, other=0.0).to(tl.float32)
                    # A tap outside adds nothing, also if the other factor is inf or nan.
                    acc = tl.where(there, acc + g * w[None, :], acc)
                    total = sums[(td * KH + th) * KW + tw]  # type: ignore[var-annotated]
                    more = more + (tl.where(there, total + x * g, total),)  # type: ignore[assignment]  # noqa: RUF005
        sums = more
        if BIAS_PARTIALS is not None:
            same = o[:, None] * Q + q[None, :] if LAST else q[None, :] * IP + o[:, None]
            there = (o < IP)[:, None] & there_q[None, :]
            sum_dy += tl.load(dy + same, mask=there, other=0.0).to(tl.float32)
        tl.store(DX + offs, acc.to(DX.dtype.element_ty), mask=mask)
    PARTIALS += split.to(tl.int64) * Q * TAPS
    for t in tl.static_range(TAPS):
        tl.store(PARTIALS + q * TAPS + t, tl.sum(sums[t], 0), mask=there_q)
    if BIAS_PARTIALS is not None:
        BIAS_PARTIALS += split.to(tl.int64) * Q
        tl.store(BIAS_PARTIALS + q, tl.sum(sum_dy, 0), mask=there_q)


# ---- Configurations ------------------------------------------------------------------------------


@tunable("BLOCK_P", "BLOCK_C")
def _config(channels, positions, itemsize, last):
    """If channels are last, a thread takes 128 bits of them; else it takes single positions."""
    if last:
        block_c = min(next_power_of_2(channels), 128 // itemsize)
        block_p = min(next_power_of_2(positions), 1024 // block_c)
    else:
        block_p = min(next_power_of_2(positions), 1024)
        block_c = min(next_power_of_2(channels), max(1, 1024 // block_p))
    # Without a limit, ptxas spills a few registers, so that another block fits.
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": 4, "maxnreg": 168}


@tunable("BLOCK_P", "BLOCK_C")
def _weight_config(pairs, columns, itemsize, last):
    if last:
        # narrower than in `_config`, so that the chunks of several programs stay in the L1 cache
        block_c = min(next_power_of_2(pairs), 64 // itemsize)
        block_p = min(next_power_of_2(columns), 1024 // block_c)
    else:
        block_p = min(next_power_of_2(columns), 256)
        block_c = min(next_power_of_2(pairs), max(1, 1024 // block_p))
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": 4, "maxnreg": 128}


@tunable("BLOCK_P", "BLOCK_C")
def _bwd_config(channels, positions, taps, itemsize, last):
    """Of each tap a thread keeps 16 bytes of elements; 4 elements if taps are many, or if elements
    are read one by one."""
    elements = 128 * (16 // itemsize if last and taps <= 9 else 4)
    if last:
        block_c = min(next_power_of_2(channels), 128 // itemsize)
        block_p = min(next_power_of_2(positions), elements // block_c)
    else:
        block_p = min(next_power_of_2(positions), elements)
        block_c = min(next_power_of_2(channels), elements // block_p)
    warps = 4 if block_p * block_c >= elements else 2
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": warps}


def _run(width, geometry):
    """How many neighbours along W a thread computes, so that it reads fewest elements for each."""
    (_, _, kw), (_, _, sw), _, (_, _, dilation), _ = geometry
    if dilation > 1 or not 1 < kw <= UNROLLED:
        return 1
    return min((4, 2, 1), key=lambda run: ((run - 1) * sw + kw) * cdiv(width, run))


# ---- Launchers -----------------------------------------------------------------------------------


def constants(geometry):
    (kd, kh, kw), (sd, sh, sw), _, _, dims = geometry
    return {"KD": kd, "KH": kh, "KW": kw, "SD": sd, "SH": sh, "SW": sw, "DIMS": dims}


def follows(z=None, norm=None, act=None):
    """(the arguments of `finish` from Z on, its FORMULA).

    z, like y: also stored. norm: (mean, var, scale, shift, eps). act: (formula, a, b).
    """
    mean, var, scale, shift, eps = norm or (None, None, None, None, 0.0)
    formula, a, b = act or (None, 0.0, 0.0)
    return (z, mean, var, scale, shift, eps, a, b), formula and getattr(pointwise, formula)


def gather(x, w, strides, bias, y, outs, reads, geometry, transposed, last, **after):
    """x (N, groups * reads, *in) and w -> y (N, groups * outs, *out), which is written.

    x and y are contiguous, or channels last if `last`. strides: of w, along its groups, the
    channels of y, the channels of x, and the taps. geometry: the sizes of the kernel, the strides,
    the paddings before the first position and the dilations, each for three dimensions; and how
    many of these there are. after: as in `follows`.
    """
    rest, formula = follows(**after)
    (N, Q), out = y.shape[:2], y.shape[2:]
    kernel_size, _, padding, dilation, _ = geometry
    positions = out[0] * out[1] * out[2]
    v = 16 // y.element_size()
    plain = outs == reads == 1
    unit = math.gcd(v, Q if last else positions) if plain or not last else 1
    channels, places = (Q // unit, positions) if last else (Q, positions // unit)
    if plain and last:
        w = w.view(Q, -1).t().contiguous()
    run = _run(out[2], geometry) if plain and last and not transposed else 1
    if run > 1:
        runs_w = cdiv(out[2], run)
        runs = out[0] * out[1] * runs_w
        config = _config(Q, runs, y.element_size(), last)
        blocks_p, blocks_c = cdiv(runs, config["BLOCK_P"]), cdiv(Q, config["BLOCK_C"])
        _conv_direct_runs_kernel(
            (N * blocks_p * blocks_c,), x, w, bias, y, *rest, channels, *x.shape[2:], *out,
            *padding, *dilation, runs, runs_w, blocks_p, blocks_c, **constants(geometry), UNIT=unit,
            RUN=run, FORMULA=formula, **config,
        )  # fmt: skip
        return y
    config = _config(Q, positions, y.element_size(), last)
    blocks_p, blocks_c = cdiv(positions, config["BLOCK_P"]), cdiv(Q, config["BLOCK_C"])
    _conv_direct_kernel(
        (N * blocks_p * blocks_c,), x, w, bias, y, *rest, channels, places, outs, reads,
        *x.shape[2:], *out, *padding, *dilation, *strides, blocks_p, blocks_c,
        **constants(geometry), UNIT=unit, PLAIN=plain, TRANSPOSED=transposed, LAST=last,
        UNROLL=kernel_size[2] <= UNROLLED, FORMULA=formula, **config,
    )  # fmt: skip
    return y


def weight_gradient(small, big, dw, outs, reads, geometry, last, want_db=False):
    """small (N, groups * outs, *out), big (N, groups * reads, *in) -> (dw, db).

    Both are contiguous, or channels last if `last`. dw (groups * outs, reads, taps), contiguous, is
    written. db (groups * outs,): the sums of `small`, or None unless wanted.
    """
    (N, K), (od, oh, ow) = small.shape[:2], small.shape[2:]
    kernel_size, _, padding, dilation, _ = geometry
    taps = kernel_size[0] * kernel_size[1] * kernel_size[2]
    pairs = K * reads
    v = 16 // small.element_size()
    plain = outs == reads == 1
    positions = od * oh * ow
    unit = math.gcd(v, pairs if last else positions) if plain or not last else 1
    channels, places = (pairs // unit, positions) if last else (pairs, positions // unit)
    config = _weight_config(pairs, ow, small.element_size(), last)
    block_p, block_c = config["BLOCK_P"], config["BLOCK_C"]
    columns = min(cdiv(ow, block_p) * block_p, cdiv(CHUNK, block_p) * block_p)
    rows = max(1, min(oh, CHUNK // columns))
    row_blocks, column_blocks = cdiv(oh, rows), cdiv(ow, columns)
    chunks = N * od * row_blocks * column_blocks
    blocks, TAPS = cdiv(pairs, block_c), min(MOST_TAPS, next_power_of_2(taps + want_db))
    tap_blocks = cdiv(taps + want_db, TAPS)
    wanted = cdiv(8 * multiprocessors(small.get_device()), blocks * tap_blocks)
    each = cdiv(chunks, min(chunks, wanted))
    splits = cdiv(chunks, each)
    partials = small.new_empty((splits, *dw.shape), dtype=torch.float32)
    bias_partials = small.new_empty((splits, K), dtype=torch.float32) if want_db else None
    _conv_direct_weight_kernel(
        (blocks, tap_blocks, splits), small, big, partials, bias_partials, channels, places, outs,
        reads, *big.shape[2:], od, oh, ow, *padding, *dilation, rows, columns, row_blocks,
        column_blocks, chunks, each, **constants(geometry), UNIT=unit, PLAIN=plain, LAST=last,
        TAPS=TAPS, **config,
    )  # fmt: skip
    in_order(partials, dw)
    return dw, in_order(bias_partials, small.new_empty(K)) if want_db else None


def sums_both(taps, last, index):
    """Whether `both_gradients` is for so many taps on a device."""
    if facts(architecture(index)).lanes == 64:
        return last and taps <= 9  # masks of more taps, or of single positions, spill scalars
    return taps <= MOST_BOTH


def both_gradients(dy, x, w, dx, dw, geometry, transposed, last, want_db=False):
    """dy (N, C, *out), x (N, C, *in), w (C, 1, *) -> db; dx and dw are written.

    dy, x and dx are contiguous, or channels last if `last`. dw (C, 1, taps), contiguous. For the
    taps of `sums_both`. transposed: whether dx is a transposed convolution of dy. db (C,): the sums
    of dy, or None unless wanted.
    """
    (N, Q), out = x.shape[:2], x.shape[2:]
    _, _, padding, dilation, _ = geometry
    positions, taps = out[0] * out[1] * out[2], dw.shape[-1]
    unit = math.gcd(16 // x.element_size(), Q if last else positions)
    channels, places = (Q // unit, positions) if last else (Q, positions // unit)
    w = w.reshape(Q, taps)
    w = w.t().contiguous() if last else w.contiguous()
    config = _bwd_config(Q, positions, taps, x.element_size(), last)
    most = max(positions, math.prod(dy.shape[2:])) if want_db else positions
    blocks_p, blocks_c = cdiv(most, config["BLOCK_P"]), cdiv(Q, config["BLOCK_C"])
    tiles = N * blocks_p
    wanted = cdiv(4 * multiprocessors(x.get_device()), blocks_c)
    # So many positions that the partial sums of all taps, in fp32, are few bytes beside them.
    each = max(cdiv(tiles, min(tiles, wanted)), cdiv(16 * taps, config["BLOCK_P"]))
    splits = cdiv(tiles, each)
    partials = x.new_empty((splits, *dw.shape), dtype=torch.float32)
    bias_partials = x.new_empty((splits, Q), dtype=torch.float32) if want_db else None
    _conv_direct_bwd_kernel(
        (blocks_c, splits), dy, x, w, dx, partials, bias_partials, channels, places, *dy.shape[2:],
        *out, *padding, *dilation, blocks_p, tiles, each, **constants(geometry), UNIT=unit,
        TRANSPOSED=transposed, LAST=last, **config,
    )  # fmt: skip
    in_order(partials, dw)
    return in_order(bias_partials, x.new_empty(Q)) if want_db else None
