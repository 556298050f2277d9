"""Negative log likelihood of log-probabilities x (B, C, S) at class indices t (B, S):

    loss[b, s] = -weight[t] * x[b, t, s]        dx[b, c, s] = -weight[t] * g  where c == t, else 0

This file also has what it shares with cross entropy: how partial sums become a loss. The forward
reads one element per position, and adds in fp64, because one loss per position is little work. The
backward writes each element once; PyTorch fills with zeros, then scatters. There are no atomics.
"""

import torch
import triton
import triton.language as tl

from fastnn.kernels._classes import class_programs, common, multiple, split, tiles, unit
from fastnn.kernels._launch import kernel
from fastnn.kernels._partials import finish
from fastnn.kernels._sizes import cdiv, next_power_of_2
from fastnn.kernels._tl import dense, dense_like

# ---- kernels ------------------------------------------------------------------------------------


@triton.jit
def checked(target, keep, C):
    """Which kept targets are valid classes. Others give nan; with TRITON_DEBUG=1, an error."""
    valid = keep & (target >= 0) & (target < C)
    tl.device_assert(valid | (keep == 0), "cross_entropy, nll_loss: target out of range")
    return valid


@kernel(
    do_not_specialize=[
        "C", "S", "M", "stride_xb", "stride_xc", "stride_xs", "blocks", "ignore_index",
    ]
)  # fmt: skip
def _nll_loss_fwd_kernel(
    X, TARGET, WEIGHT, LOSS, PARTIAL, C, S: tl.int64, M: tl.int64, stride_xb: tl.int64,
    stride_xc: tl.int64, stride_xs: tl.int64, blocks, ignore_index: tl.int64,
    REDUCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program has `blocks` blocks of BLOCK positions, and loops over the blocks.

    X (B, C, S): float, any strides. TARGET (B, S): ints, contiguous. WEIGHT (C,): float, or None.
    LOSS (B, S): float, unless REDUCE. PARTIAL (2, programs): fp64 sums of losses and of weights, if
    REDUCE.
    """
    pid = tl.program_id(0)
    losses = tl.zeros((BLOCK,), tl.float64)
    counts = tl.zeros((BLOCK,), tl.float64)
    for i in range(blocks):
        m = (pid.to(tl.int64) * blocks + i) * BLOCK + tl.arange(0, BLOCK)
        live = m < M
        target = tl.load(TARGET + m, mask=live, other=0).to(tl.int64)
        keep = live & (target != ignore_index)
        valid = checked(target, keep, C)
        offs = m // S * stride_xb + target * stride_xc + m % S * stride_xs
        x = tl.load(X + offs, mask=valid, other=0.0).to(tl.float32)
        w = tl.where(valid, 1.0, float("nan"))
        if WEIGHT is not None:
            w *= tl.load(WEIGHT + target, mask=valid, other=0.0).to(tl.float32)
        if REDUCE:
            losses += tl.where(keep, -w.to(tl.float64) * x, 0.0)
            counts += tl.where(keep, w, 0.0)
        else:
            loss = tl.where(keep, -w * x, 0.0)
            tl.store(LOSS + m, loss.to(LOSS.dtype.element_ty), mask=live)
    if REDUCE:
        tl.store(PARTIAL + pid, tl.sum(losses, 0))
        tl.store(PARTIAL + tl.num_programs(0) + pid, tl.sum(counts, 0))


BLOCK = 256
PARTIALS = 4096  # one program adds up about this many sums in a few microseconds


def _blocks(M):
    """(blocks of positions per program, programs)."""
    blocks = cdiv(cdiv(M, BLOCK), PARTIALS)
    return max(blocks, 1), cdiv(M, BLOCK * max(blocks, 1))


def sum_losses(partial, loss, count, reduction):
    """partial (2, G) fp64, sums of losses and of weights -> loss, and the divisor of a mean."""
    block = min(max(next_power_of_2(partial.shape[1]), 32), 4096)  # 8192 pairs do not fit
    warps = min(max(block // 256, 1), 16)
    finish(partial, loss, count if reduction == "mean" else None, 1, block, warps)


def loss_like(x, reduction, dtype):
    """The uninitialised loss of log-probabilities or logits x: (N, d1, ...), or 0-d if reduced."""
    shape = (*x.shape[:1], *x.shape[2:]) if reduction == "none" and x.dim() > 1 else ()
    return x.new_empty(shape, dtype=dtype)


def fwd(x, target, weight, ignore_index, reduction, dtype):
    """x (C,) or (N, C, ...), target (N, ...) ints, weight (C,) dense or None -> loss, divisor.

    The loss has dtype `dtype`; the divisor of a mean is 0-d fp32.
    """
    loss = loss_like(x, reduction, dtype)
    count = x.new_empty((), dtype=torch.float32)
    view = split(x)
    if view is None:
        x = dense(x)
        view = split(x)
    (_, C, S), strides = view
    M = target.numel()
    blocks, programs = _blocks(M)
    reduce = reduction != "none"
    partial = x.new_empty((2, programs), dtype=torch.float64) if reduce else None
    _nll_loss_fwd_kernel(
        (programs,), x, dense(target), weight, loss, partial, C, S, M, *strides, blocks,
        ignore_index, REDUCE=reduce, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    if reduce:
        sum_losses(partial, loss, count, reduction)
    return loss, count


@kernel(do_not_specialize=["C", "S", "stride_dxb", "row_blocks", "class_blocks", "ignore_index"])
def _nll_loss_bwd_kernel(
    DLOSS, TARGET, WEIGHT, COUNT, DX, C, S: tl.int64, stride_dxb: tl.int64, stride_dx, row_blocks,
    class_blocks, ignore_index: tl.int64, REDUCTION: tl.constexpr, CLASSES_LAST: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program has ROWS positions of one batch entry, and loops over its share of the classes.

    DLOSS: float, (B, S), or one element if the loss was reduced. TARGET (B, S): ints, contiguous.
    WEIGHT (C,): float, or None. COUNT: fp32, one element. DX (B, C, S): float, with its classes or
    its positions contiguous.
    """
    pid = tl.program_id(0)
    b = (pid // class_blocks // row_blocks).to(tl.int64)
    rows = (pid // class_blocks % row_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    DX += b * multiple(stride_dxb, UNIT)
    if CLASSES_LAST:
        C = multiple(C, UNIT)
        stride_dxc, stride_dxs = 1, multiple(stride_dx, UNIT)
    else:
        S = multiple(S, UNIT)
        stride_dxc, stride_dxs = multiple(stride_dx, UNIT), 1
    live = rows < S
    m = b * S + rows
    target = tl.load(TARGET + m, mask=live, other=0).to(tl.int64)
    keep = live & (target != ignore_index)
    valid = checked(target, keep, C)
    if REDUCTION == "none":
        g = tl.load(DLOSS + m, mask=live, other=0.0).to(tl.float32)
    else:
        g = tl.load(DLOSS).to(tl.float32)
    if REDUCTION == "mean":
        g = tl.div_rn(g, tl.load(COUNT))
    if WEIGHT is not None:
        g = g * tl.load(WEIGHT + target, mask=valid, other=0.0).to(tl.float32)
    at_target = tl.where(keep, -g, 0.0)[None, :]
    elsewhere = tl.where(keep & (valid == 0), float("nan"), 0.0)[None, :]
    target = tl.where(valid, target, -1).to(tl.int32)[None, :]

    span = tl.cdiv(tl.cdiv(C, COLS), class_blocks) * COLS
    first = pid % class_blocks * span
    for c in range(first, tl.minimum(first + span, C), COLS):
        cols = c + tl.arange(0, COLS)[:, None]
        offs = cols.to(tl.int64) * stride_dxc + (rows * stride_dxs)[None, :]
        dx = tl.where(cols == target, at_target, elsewhere)
        tl.store(DX + offs, dx.to(DX.dtype.element_ty), mask=live[None, :] & (cols < C))


def bwd(dloss, x, target, weight, count, ignore_index, reduction):
    """dloss (dense), the inputs and the count of `fwd` -> dx, with the dtype and layout of x."""
    wanted = torch.empty_like(x)
    dx = wanted
    view = common(dx)
    if view is None:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        view = common(dx)
    sizes, classes_last, strides = view
    B, C, S = sizes
    wide = unit(sizes, classes_last, strides, dx)
    config = tiles(sizes, classes_last, wide, dx.element_size())
    rows, cols = config["ROWS"], config["LANES"] * config["GROUP"]
    row_blocks, class_blocks = cdiv(S, rows), class_programs(C, cols, classes_last)
    _nll_loss_bwd_kernel(
        (B * row_blocks * class_blocks,), dloss, dense(target), weight, count,
        dx, C, S, *strides[0], row_blocks, class_blocks, ignore_index, REDUCTION=reduction,
        CLASSES_LAST=classes_last, UNIT=wide, ROWS=rows,
        COLS=cols, num_warps=config["num_warps"],
    )  # fmt: skip
    return dense_like(dx, wanted)
