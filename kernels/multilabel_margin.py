"""Multi-label margin loss of scores x (N, C) and classes t (N, C), lists up to the first -1:

    loss[n] = sum over targets j and all other classes i of max(0, 1 - x[j] + x[i]) / C

A program has one row in registers. It goes through the list of targets twice: first to find which
classes are targets, then to add their margins. The forward reads x and the targets once. The
backward reads both again, and writes dx.
"""

import torch
import triton
import triton.language as tl

from fastnn.kernels._launch import kernel
from fastnn.kernels._partials import finish
from fastnn.kernels._sizes import next_power_of_2

MOST = 8192  # classes that a program can hold


@triton.jit
def _target(T, j, C):
    """The j-th target; -1 past the end of the list; C if out of range, for a loss of nan."""
    t = tl.load(T + j, mask=j < C, other=-1)
    tl.device_assert(t < C, "multilabel_margin_loss: target out of range")
    return tl.minimum(t, C)


@triton.jit
def _others(T, cols, C):
    """Which of the columns are classes, and not targets of the row."""
    others = cols < C
    j = 0
    t = _target(T, j, C)
    while t >= 0:
        others = others & (cols != t)
        j += 1
        t = _target(T, j, C)
    return others


@triton.jit
def _score(X, t, C):
    return tl.load(X + t, mask=t < C, other=float("nan")).to(tl.float32)


@kernel(do_not_specialize=["C"])
def _multilabel_margin_fwd_kernel(
    X, T, LOSS, PARTIAL, C, REDUCE: tl.constexpr, BLOCK: tl.constexpr
):
    """A program has one row of scores, and loops twice over its list of targets.

    X (N, C): float, contiguous. T (N, C): int64, contiguous. LOSS (N,): float, unless REDUCE.
    PARTIAL (N,): fp64, if REDUCE.
    """
    pid = tl.program_id(0)
    X += pid.to(tl.int64) * C
    T += pid.to(tl.int64) * C
    cols = tl.arange(0, BLOCK)
    x = tl.load(X + cols, mask=cols < C, other=0.0).to(tl.float32)
    others = _others(T, cols, C)
    acc = tl.zeros((BLOCK,), tl.float32)
    j = 0
    t = _target(T, j, C)
    while t >= 0:
        z = 1.0 - _score(X, t, C) + x
        acc += tl.where(others & (z <= 0), 0.0, tl.where(others, z, 0.0))
        j += 1
        t = _target(T, j, C)
    loss = tl.sum(acc.to(tl.float64), 0) / C
    if REDUCE:
        tl.store(PARTIAL + pid, loss)
    else:
        tl.store(LOSS + pid, loss.to(tl.float32).to(LOSS.dtype.element_ty))


@kernel(do_not_specialize=["C", "divisor"])
def _multilabel_margin_bwd_kernel(
    DLOSS, X, T, DX, C, divisor: tl.int64, REDUCE: tl.constexpr, BLOCK: tl.constexpr
):
    """A program computes one row of dx, and loops twice over its list of targets.

    DLOSS: float, (N,), or one element if REDUCE. X, DX (N, C): float, contiguous. T (N, C): int64,
    contiguous.
    """
    pid = tl.program_id(0)
    X += pid.to(tl.int64) * C
    T += pid.to(tl.int64) * C
    DX += pid.to(tl.int64) * C
    cols = tl.arange(0, BLOCK)
    x = tl.load(X + cols, mask=cols < C, other=0.0).to(tl.float32)
    if REDUCE:
        g = tl.div_rn(tl.load(DLOSS).to(tl.float32), divisor.to(tl.float32))
    else:
        g = tl.load(DLOSS + pid).to(tl.float32)
    g = tl.div_rn(g, C.to(tl.float32))
    others = _others(T, cols, C)
    slope = tl.zeros((BLOCK,), tl.float32)
    j = 0
    t = _target(T, j, C)
    while t >= 0:
        x_t = _score(X, t, C)
        margin = tl.where(others & (1.0 - x_t + x > 0), 1.0, 0.0)
        slope += margin - tl.where(cols == t, tl.sum(margin, 0), 0.0)
        slope = tl.where(t < C, slope, float("nan"))
        j += 1
        t = _target(T, j, C)
    tl.store(DX + cols, (g * slope).to(DX.dtype.element_ty), mask=cols < C)


def _config(C):
    block = next_power_of_2(C)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


def fwd(x, target, divisor, y):
    """x, target (N, C) or (C,), contiguous; fills y: (N,), or 0-d and divided by `divisor`."""
    C = x.shape[-1]
    N = x.numel() // C
    reduce = divisor is not None
    partial = x.new_empty((1, N), dtype=torch.float64) if reduce else None
    _multilabel_margin_fwd_kernel((N,), x, target, y, partial, C, REDUCE=reduce, **_config(C))
    if reduce:
        finish(partial, y, None, divisor)


def bwd(dloss, x, target, divisor):
    """dloss, the inputs of `fwd` -> dx."""
    dx = torch.empty_like(x)
    C = x.shape[-1]
    _multilabel_margin_bwd_kernel(
        (x.numel() // C,), dloss, x, target, dx, C, divisor or 1,
        REDUCE=divisor is not None, **_config(C),
    )  # fmt: skip
    return dx
