"""Cross entropy of logits x (B, C, S), for class indices or probabilities t, per position (b, s):

    p = softmax(x)      loss = w[t] * -log p[t]                   classes t, weights w
                        loss = sum_c u[c] * -log p[c]             any distribution u over classes
    dx = p * sum(u) - u, scaled by the incoming gradient

where u[c] = w[c] * (t[c] * (1 - smoothing) + smoothing / C). Memory-bound, and C is a vocabulary,
so count passes over the elements (R read, W write):
    stock   log_softmax 1R 1W; backward nll 1W, log_softmax 2R 1W     6 at best
    here    forward 1R; backward 1R 1W                                3
The forward keeps two floats per position, max(x) and log(sum(exp(x - max))), so log p loses nothing
if the logits are large. PyTorch's table of log p is never allocated. Rows whose target is ignored
are not read.
"""

import torch
import triton
import triton.language as tl

from fastnn.kernels._classes import class_programs, common, multiple, tiles, unit
from fastnn.kernels._launch import kernel
from fastnn.kernels._libdevice import log1p
from fastnn.kernels._sizes import cdiv
from fastnn.kernels._tl import dense, dense_like
from fastnn.kernels.nll_loss import checked, loss_like, sum_losses


@triton.jit
def finite(top):
    """The base of a lane's exponentials; not -inf, because exp(-inf + inf) is nan."""
    return tl.where(top == -float("inf"), 0.0, top)


@kernel(
    do_not_specialize=[
        "C", "S", "M", "stride_xb", "stride_tb", "stride_t", "row_blocks", "ignore_index",
    ]
)  # fmt: skip
def _cross_entropy_fwd_kernel(
    X, TARGET, WEIGHT, LOSS, STATS, PARTIAL, C, S: tl.int64, M: tl.int64, stride_xb: tl.int64,
    stride_x, stride_tb: tl.int64, stride_t: tl.int64, row_blocks, ignore_index: tl.int64,
    kept, uniform, PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr, REDUCE: tl.constexpr,
    CLASSES_LAST: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """A program has ROWS positions of one batch entry, and loops once over their classes.

    X (B, C, S): float, with its classes or its positions contiguous. TARGET (B, S): ints, or like X
    if PROBABILITIES. WEIGHT (C,): float, or None. LOSS (B, S): float, written unless REDUCE. STATS:
    fp32 rows of M: largest x, log of the sum, and, if soft, the sum of u. PARTIAL (2, programs):
    fp64 sums of losses and of their weights, if REDUCE.
    """
    SOFT: tl.constexpr = PROBABILITIES or SMOOTH
    pid = tl.program_id(0)
    b = (pid // row_blocks).to(tl.int64)
    X += b * multiple(stride_xb, UNIT)
    if CLASSES_LAST:
        C = multiple(C, UNIT)
        stride_xc, stride_xs = 1, multiple(stride_x, UNIT)
        stride_tc, stride_ts = 1, multiple(stride_t, UNIT)
    else:
        S = multiple(S, UNIT)
        stride_xc, stride_xs = multiple(stride_x, UNIT), 1
        stride_tc, stride_ts = multiple(stride_t, UNIT), 1
    # Axes: group, lane, row. Classes of a group are LANES apart, so that one thread has them all.
    offs = tl.arange(0, GROUP)[:, None, None] * LANES + tl.arange(0, LANES)[None, :, None]
    rows = (pid % row_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < S
    m = b * S + rows
    reads = live
    stop = C
    if not PROBABILITIES:
        target = tl.load(TARGET + m, mask=live, other=0).to(tl.int64)
        keep = live & (target != ignore_index)
        valid = checked(target, keep, C)
        stop = tl.max(keep.to(tl.int32), 0) * C
        x_t = tl.zeros((ROWS,), tl.float32)
        if CLASSES_LAST:
            # If positions are contiguous, a mask per position would prevent wide loads.
            reads = keep
            x_t = tl.load(X + rows * stride_xs + target, mask=valid, other=0.0).to(tl.float32)
        w_t = tl.where(valid, 1.0, float("nan"))
        if WEIGHT is not None:
            w_t *= tl.load(WEIGHT + target, mask=valid, other=0.0).to(tl.float32)
        target = tl.where(valid, target, -1).to(tl.int32)

    top = tl.full((LANES, ROWS), -float("inf"), tl.float32)
    acc = tl.zeros((LANES, ROWS), tl.float32)
    mass = tl.zeros((LANES, ROWS), tl.float32)  # sum of u
    cross = tl.zeros((LANES, ROWS), tl.float32)  # sum of u * (x - top)
    for c in range(0, stop, GROUP * LANES):
        cols = c + offs
        inside = reads[None, None, :] & (cols < C)
        at = cols.to(tl.int64) * stride_xc + (rows * stride_xs)[None, None, :]
        x = tl.load(X + at, mask=inside, other=-float("inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(x, 0), propagate_nan=tl.PropagateNan.ALL)
        base = finite(new)
        acc = acc * tl.exp(top - base) + tl.sum(tl.exp(x - base[None, :, :]), 0)
        if SOFT:
            u = tl.where(inside, 1.0, 0.0)
            if PROBABILITIES:
                at = cols.to(tl.int64) * stride_tc + (rows * stride_ts)[None, None, :]
                T = TARGET + b * multiple(stride_tb, UNIT)
                u = tl.load(T + at, mask=inside, other=0.0).to(tl.float32)
                if SMOOTH:
                    u = tl.where(inside, u * kept + uniform, 0.0)
            if WEIGHT is not None:
                W = WEIGHT + cols
                # read anew for each row: else the weights go through shared memory
                if CLASSES_LAST:
                    W = tl.broadcast_to(W, (GROUP, LANES, ROWS))
                u *= tl.load(W, mask=cols < C, other=0.0).to(tl.float32)
            gap = tl.where(inside, x - base[None, :, :], 0.0)
            cross += mass * (finite(top) - base) + tl.sum(u * gap, 0)
            mass += tl.sum(u, 0)
        if not PROBABILITIES and not CLASSES_LAST:
            x_t += tl.sum(tl.sum(tl.where(cols == target[None, None, :], x, 0.0), 0), 0)
        top = new

    peak = tl.max(top, 0)
    # The largest term is 1. In fp32 a small rest would be lost beside it. The fp64 here and below
    # costs a few operations per lane, not per element.
    rest = tl.sum((acc * tl.exp(top - peak[None, :])).to(tl.float64), 0) - 1.0
    log_sum = log1p(rest.to(tl.float32))
    tl.store(STATS + m, peak, mask=live)
    tl.store(STATS + M + m, log_sum, mask=live)
    if SOFT:
        far = finite(top).to(tl.float64) - peak[None, :] - log_sum[None, :]
        soft = -tl.sum(cross + mass * far, 0)
        tl.store(STATS + 2 * M + m, tl.sum(mass, 0), mask=live)
    if PROBABILITIES:
        loss = tl.where(live, soft, 0.0)
        count = tl.where(live, 1.0, 0.0)
    else:
        loss = (peak.to(tl.float64) - x_t + log_sum) * w_t
        if SMOOTH:
            loss = loss * kept + uniform * soft
        loss = tl.where(keep, loss, 0.0)
        count = tl.where(keep, w_t, 0.0)
    if REDUCE:
        tl.store(PARTIAL + pid, tl.sum(loss, 0))
        tl.store(PARTIAL + tl.num_programs(0) + pid, tl.sum(count.to(tl.float64), 0))
    else:
        tl.store(LOSS + m, loss.to(tl.float32).to(LOSS.dtype.element_ty), mask=live)


@kernel(
    do_not_specialize=[
        "C", "S", "M", "stride_xb", "stride_tb", "stride_t", "stride_dxb", "stride_dx",
        "stride_dtb", "stride_dt", "row_blocks", "class_blocks", "ignore_index",
    ]
)  # fmt: skip
def _cross_entropy_bwd_kernel(
    DLOSS, X, TARGET, WEIGHT, STATS, DX, DT, C, S: tl.int64, M: tl.int64, stride_xb: tl.int64,
    stride_x, stride_tb: tl.int64, stride_t: tl.int64, stride_dxb: tl.int64, stride_dx: tl.int64,
    stride_dtb: tl.int64, stride_dt: tl.int64, row_blocks, class_blocks, ignore_index: tl.int64,
    kept, uniform, PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr, REDUCTION: tl.constexpr,
    CLASSES_LAST: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program has ROWS positions of one batch entry, and loops over its share of the classes.

    DLOSS: float, (B, S), or one element if the loss was reduced. X, TARGET, WEIGHT: as in the
    forward. STATS: what the forward wrote, then the divisor of a mean. DX, DT (B, C, S): float,
    with the layout of X, or None.
    """
    SOFT: tl.constexpr = PROBABILITIES or SMOOTH
    pid = tl.program_id(0)
    b = (pid // class_blocks // row_blocks).to(tl.int64)
    rows = (pid // class_blocks % row_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    X += b * multiple(stride_xb, UNIT)
    if CLASSES_LAST:
        C = multiple(C, UNIT)
        stride_xc, stride_xs = 1, multiple(stride_x, UNIT)
        stride_tc, stride_ts = 1, multiple(stride_t, UNIT)
        stride_dxc, stride_dxs = 1, multiple(stride_dx, UNIT)
        stride_dtc, stride_dts = 1, multiple(stride_dt, UNIT)
    else:
        S = multiple(S, UNIT)
        stride_xc, stride_xs = multiple(stride_x, UNIT), 1
        stride_tc, stride_ts = multiple(stride_t, UNIT), 1
        stride_dxc, stride_dxs = multiple(stride_dx, UNIT), 1
        stride_dtc, stride_dts = multiple(stride_dt, UNIT), 1
    live = rows < S
    m = b * S + rows
    peak = tl.load(STATS + m, mask=live, other=0.0)[None, :]
    log_sum = tl.load(STATS + M + m, mask=live, other=0.0)[None, :]
    if REDUCTION == "none":
        g = tl.load(DLOSS + m, mask=live, other=0.0).to(tl.float32)
    else:
        g = tl.load(DLOSS).to(tl.float32)
        if REDUCTION == "mean":
            g = tl.div_rn(g, tl.load(STATS + (3 if SOFT else 2) * M))
        g = tl.where(live, g, 0.0)
    keep = live
    if SOFT:
        mass = tl.load(STATS + 2 * M + m, mask=live, other=0.0)[None, :]
    if not PROBABILITIES:
        target = tl.load(TARGET + m, mask=live, other=0).to(tl.int64)
        keep = live & (target != ignore_index)
        valid = checked(target, keep, C)
        hard = tl.where(valid, g * kept, float("nan"))
        if WEIGHT is not None:
            hard *= tl.load(WEIGHT + target, mask=valid, other=0.0).to(tl.float32)
        hard = hard[None, :]
        target = tl.where(valid, target, -1).to(tl.int32)[None, :]
    g = g[None, :]
    reads = (keep if CLASSES_LAST else live)[None, :]
    live = live[None, :]
    rows = rows[None, :]
    span = tl.cdiv(tl.cdiv(C, COLS), class_blocks) * COLS
    first = pid % class_blocks * span
    for c in range(first, tl.minimum(first + span, C), COLS):
        cols = c + tl.arange(0, COLS)[:, None]
        classes = cols.to(tl.int64)
        x = tl.load(
            X + (classes * stride_xc + rows * stride_xs), mask=reads & (cols < C), other=0.0
        )
        log_p = (x.to(tl.float32) - peak) - log_sum
        p = tl.exp(log_p)
        if SOFT:
            u = tl.full((COLS, 1), 1.0, tl.float32)
            if WEIGHT is not None:
                u = tl.load(WEIGHT + cols, mask=cols < C, other=0.0).to(tl.float32)
        if PROBABILITIES:
            if DT is not None:
                dt = -g * kept * u * log_p
                D = DT + b * multiple(stride_dtb, UNIT)
                at = classes * stride_dtc + rows * stride_dts
                tl.store(D + at, dt.to(DT.dtype.element_ty), mask=live & (cols < C))
            if DX is not None:
                T = TARGET + b * multiple(stride_tb, UNIT)
                at = classes * stride_tc + rows * stride_ts
                t = tl.load(T + at, mask=live & (cols < C), other=0.0).to(tl.float32)
                if SMOOTH:
                    t = t * kept + uniform
                dx = g * (p * mass - t * u)
        else:
            # hard * (p - 1) would round twice if p is small.
            dx = hard * p - tl.where(cols == target, hard, 0.0)
            if SMOOTH:
                dx += g * uniform * (p * mass - u)
            dx = tl.where(keep[None, :], dx, 0.0)
        if DX is not None:
            D = DX + b * multiple(stride_dxb, UNIT)
            at = classes * stride_dxc + rows * stride_dxs
            tl.store(D + at, dx.to(DX.dtype.element_ty), mask=live & (cols < C))


def _laid_out(*tensors):
    """(tensors, `common` of them). The tensors are copied only if their layouts do not agree."""
    view = common(*tensors)
    if view is None:
        tensors = tuple(dense(t) for t in tensors)
        view = common(*tensors)
    return tensors, view


def fwd(x, target, weight, ignore_index, smoothing, reduction, dtype):
    """Returns the loss in `dtype`, and the stats for `bwd`.

    x (C,) or (N, C, ...), target (N, ...) ints or like x, weight (C,) dense or None. stats (2 * M +
    1,) is fp32, for M positions: max and log_sum; with smoothing or probabilities a third row, the
    sum of u, so (3 * M + 1,); then the divisor of a mean.
    """
    probabilities = target.is_floating_point()
    loss = loss_like(x, reduction, dtype)
    C = x.shape[min(x.dim() - 1, 1)]
    M = x.numel() // C
    soft = probabilities or smoothing > 0.0
    stats = x.new_empty((3 if soft else 2) * M + 1, dtype=torch.float32)
    if probabilities:
        (x, target), view = _laid_out(x, target)
    else:
        (x,), view = _laid_out(x)
        target = dense(target)
    sizes, classes_last, strides = view
    B, C, S = sizes
    narrow = (x, target) if probabilities else (x,)
    itemsize = min(t.element_size() for t in narrow)
    wide = unit(sizes, classes_last, strides, *narrow)
    config = tiles(sizes, classes_last, wide, itemsize, light=not soft)
    row_blocks = cdiv(S, config["ROWS"])
    reduce = reduction != "none"
    partial = x.new_empty((2, B * row_blocks), dtype=torch.float64) if reduce else None
    _cross_entropy_fwd_kernel(
        (B * row_blocks,), x, target, weight, loss, stats, partial, C, S, M, *strides[0],
        *strides[-1], row_blocks, ignore_index, 1.0 - smoothing, smoothing / C,
        PROBABILITIES=probabilities, SMOOTH=smoothing > 0.0, REDUCE=reduce,
        CLASSES_LAST=classes_last, UNIT=wide, **config,
    )  # fmt: skip
    if reduce:
        sum_losses(partial, loss, stats[-1:], reduction)
    return loss, stats


def bwd(dloss, x, target, weight, stats, ignore_index, smoothing, reduction, need_x, need_target):
    """dloss, the inputs and stats of `fwd` -> those needed of [dx, dtarget]."""
    probabilities = target.is_floating_point()
    read: tuple[torch.Tensor, ...] = (x, target) if probabilities else (x,)
    needs = (need_x, need_target)
    wanted = [torch.empty_like(t) for t, need in zip(read, needs, strict=False) if need]
    view = common(*read, *wanted)
    made = wanted
    if view is None:
        read = tuple(dense(t) for t in read)
        made = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in wanted]
        view = common(*read, *made)
    sizes, classes_last, strides = view
    B, C, S = sizes
    dx = made[0] if need_x else None
    dt = made[-1] if need_target else None
    narrow = (*read, *made)
    itemsize = min(t.element_size() for t in narrow)
    soft = probabilities or smoothing > 0.0
    wide = unit(sizes, classes_last, strides, *narrow)
    config = tiles(sizes, classes_last, wide, itemsize, light=not soft)
    rows, cols = config["ROWS"], config["LANES"] * config["GROUP"]
    row_blocks, class_blocks = cdiv(S, rows), class_programs(C, cols, classes_last)
    _cross_entropy_bwd_kernel(
        (B * row_blocks * class_blocks,), dense(dloss), read[0],
        read[1] if probabilities else dense(target), weight, stats, dx, dt, C, S, B * S,
        *strides[0], *strides[len(read) - 1], *strides[len(read)], *strides[-1], row_blocks,
        class_blocks, ignore_index, 1.0 - smoothing, smoothing / C, PROBABILITIES=probabilities,
        SMOOTH=smoothing > 0.0, REDUCTION=reduction, CLASSES_LAST=classes_last,
        UNIT=wide, ROWS=rows, COLS=cols,
        num_warps=config["num_warps"],
    )  # fmt: skip
    return [dense_like(d, like) for d, like in zip(made, wanted, strict=True)]
