"""Connectionist temporal classification of log-probabilities x (T, N, C) and N lists of labels:

    loss[n] = -log(sum of the probabilities of all paths through x[:, n] that spell the labels)

A path may repeat a label and may put blanks between labels. Lane k of a program has two states: the
blank before label k, and label k. A step reads both states of lane k and the label of lane k - 1:

    blank[k] = log(exp blank[k] + exp label[k-1]) + x[blank]
    label[k] = log(exp label[k] + exp blank[k] + exp label[k-1] if it is another) + x[label k]

The forward reads the C + 1 numbers of x that the labels name, and keeps the states of all steps, as
PyTorch does. The backward goes through the steps from the last, and stores the probability of each
state. Then a program for each row of x reads the row, and writes the gradient; equal labels are
added along a list of their places, so that there are no atomics.
"""

import torch
import triton
import triton.language as tl

from fastnn.kernels._launch import kernel
from fastnn.kernels._partials import finish
from fastnn.kernels._sizes import next_power_of_2

MOST = 1023  # labels of a sequence that a program can hold


@triton.jit
def _base(top):
    """What to subtract before exp; -inf - -inf would be nan."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _log_sum2(a, b):
    base = _base(tl.maximum(a, b))
    return tl.log(tl.exp(a - base) + tl.exp(b - base)) + base


@triton.jit
def _log_sum3(a, b, c):
    base = _base(tl.maximum(tl.maximum(a, b), c))
    return tl.log(tl.exp(a - base) + tl.exp(b - base) + tl.exp(c - base)) + base


@triton.jit
def _labels(TARGET, k, L, C, stride):
    """The labels, -1 past the last one; and which of them are classes."""
    y = tl.load(TARGET + k.to(tl.int64) * stride, mask=(k >= 0) & (k < L), other=-1)
    return y, (y >= 0) & (y < C)


@triton.jit
def _scores(X, y, k, L, inside, stride):
    """The log-probabilities of the labels: nan if a label is no class, -inf past the last label."""
    x = tl.load(X + y.to(tl.int64) * stride, mask=inside, other=float("nan")).to(tl.float32)
    return tl.where(k < L, x, -float("inf"))


@triton.jit
def _at(x, k, i):
    """x[i]; -inf if there is none."""
    return tl.sum(tl.where(k == i, x, 0.0), 0) + tl.where(i < 0, -float("inf"), 0.0)


@kernel(do_not_specialize=["N", "T", "C", "W", "blank"])
def _ctc_fwd_kernel(
    X, TARGET, LENGTHS, ALPHA, NLL, LOSS, PARTIAL, N, T, C, W, blank,
    stride_xt, stride_xn, stride_xc, stride_y,
    SAVE: tl.constexpr, ZERO: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program goes through the steps of one sequence.

    X (T, N, C): float, any strides. TARGET: int, any strides. LENGTHS (3, N): int64, contiguous;
    steps, labels, and the offset of the first label. ALPHA (N, T, 2 * W - 1): fp32, contiguous, if
    SAVE; the blanks, then the labels. NLL (N,): fp32. LOSS (N,): fp32, unless None; NLL is the loss
    then. PARTIAL (N,): fp64, unless None.
    """
    n = tl.program_id(0).to(tl.int64)
    steps = tl.load(LENGTHS + n)
    L = tl.load(LENGTHS + N + n).to(tl.int32)
    TARGET += tl.load(LENGTHS + 2 * N + n)
    X += n * stride_xn
    k = tl.arange(0, BLOCK)
    y, inside = _labels(TARGET, k, L, C, stride_y)
    before_y, _ = _labels(TARGET, k - 1, L, C, stride_y)
    skip = (k >= 1) & (y != before_y)
    # the state before the first step: a path begins with the blank before label 0, or with label 0
    start = tl.where(k == 0, 0.0, -float("inf"))
    bl = start
    la = tl.full((BLOCK,), -float("inf"), tl.float32)
    if SAVE:
        ALPHA += n * T * (2 * W - 1) + k
    for _ in range(steps):
        x = _scores(X, y, k, L, inside, stride_xc)
        x_blank = tl.load(X + blank.to(tl.int64) * stride_xc).to(tl.float32)
        before = tl.where(k == 0, -float("inf"), tl.gather(la, tl.maximum(k - 1, 0), 0))
        skipped = tl.where(skip, before, -float("inf"))
        new = _log_sum3(la, bl, skipped) + x
        bl = tl.where(k <= L, _log_sum2(bl, before) + x_blank, -float("inf"))
        la = tl.where(k < L, new, -float("inf"))
        if SAVE:
            tl.store(ALPHA, bl, mask=k <= L)
            tl.store(ALPHA + W, la, mask=k < L)
            ALPHA += 2 * W - 1
        X += stride_xt
    loss = -_log_sum2(_at(bl, k, L), _at(la, k, L - 1))
    tl.store(NLL + n, loss)
    if ZERO:
        loss = tl.where(loss == float("inf"), 0.0, loss)
    if LOSS is not None:
        tl.store(LOSS + n, loss)
    if PARTIAL is not None:
        if MEAN:
            tl.store(PARTIAL + n, loss.to(tl.float64) / tl.maximum(L, 1).to(tl.float64))
        else:
            tl.store(PARTIAL + n, loss.to(tl.float64))


@kernel(do_not_specialize=["N", "T", "C", "W", "blank"])
def _ctc_posterior_kernel(
    X, TARGET, LENGTHS, ALPHA, NLL, POSTERIOR, CHAIN, N, T, C, W, blank,
    stride_xt, stride_xn, stride_xc, stride_y, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program goes through the steps of one sequence, from the last to the first.

    X (T, N, C): float, any strides. TARGET: int, any strides. LENGTHS (3, N): int64, contiguous.
    ALPHA, POSTERIOR (N, T, 2 * W - 1): fp32, contiguous. NLL (N,): fp32. CHAIN (N, W): int32,
    contiguous: 2 * (the next place of the same label + 1), or 0 if there is none, plus 1 at the
    label's first place.
    """
    n = tl.program_id(0).to(tl.int64)
    steps = tl.load(LENGTHS + n)
    L = tl.load(LENGTHS + N + n).to(tl.int32)
    TARGET += tl.load(LENGTHS + 2 * N + n)
    k = tl.arange(0, BLOCK)
    y, inside = _labels(TARGET, k, L, C, stride_y)
    after_y, _ = _labels(TARGET, k + 1, L, C, stride_y)
    skip = (k + 1 < L) & (y != after_y)
    following = tl.zeros((BLOCK,), tl.int32)
    first = inside & (y != blank)
    for j in range(L):
        same = y == tl.load(TARGET)
        following = tl.where(same & (j > k) & (following == 0), j + 1, following)
        first = first & ((j >= k) | ~same)
        TARGET += stride_y
    tl.store(CHAIN + n * W + k, 2 * following + first.to(tl.int32), mask=k < W)
    nll = tl.load(NLL + n)
    last = (n * T + steps - 1) * (2 * W - 1) + k
    ALPHA += last
    POSTERIOR += last
    X += n * stride_xn + (steps - 1) * stride_xt
    # the state after the last step: a path ends with the last label, or with the blank after it
    bl = tl.where(k == L, 0.0, -float("inf"))
    la = tl.full((BLOCK,), -float("inf"), tl.float32)
    after = tl.minimum(k + 1, BLOCK - 1)
    for _ in range(steps):
        x = _scores(X, y, k, L, inside, stride_xc)
        x_blank = tl.load(X + blank.to(tl.int64) * stride_xc).to(tl.float32)
        skipped = tl.where(skip, tl.gather(la, after, 0), -float("inf"))
        new = _log_sum3(la, tl.gather(bl, after, 0), skipped) + x
        bl = tl.where(k <= L, _log_sum2(bl, la) + x_blank, -float("inf"))
        la = tl.where(k < L, new, -float("inf"))
        a = tl.load(ALPHA, mask=k <= L, other=0.0)
        tl.store(POSTERIOR, tl.exp(a + bl + nll - x_blank), mask=k <= L)
        a = tl.load(ALPHA + W, mask=k < L, other=0.0)
        tl.store(POSTERIOR + W, tl.exp(a + la + nll - x), mask=k < L)
        ALPHA -= 2 * W - 1
        POSTERIOR -= 2 * W - 1
        X -= stride_xt


@triton.jit
def _slope(x, posterior, nll):
    """exp(x) - posterior; nan, as in PyTorch, where x is -inf or the loss is not finite."""
    known = tl.where(tl.abs(nll) < float("inf"), 0.0, float("nan"))
    return tl.where(x == -float("inf"), float("nan"), tl.exp(x) - posterior) + known


@kernel(do_not_specialize=["N", "T", "C", "W", "blank"])
def _ctc_bwd_kernel(
    DLOSS, X, TARGET, LENGTHS, NLL, POSTERIOR, CHAIN, DX, N, T, C, W, blank,
    stride_xt, stride_xn, stride_xc, stride_y, stride_dt, stride_dn, stride_dc, stride_g,
    ZERO: tl.constexpr, REDUCTION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program computes the gradient of one row of X.

    DLOSS: fp32, (N,) with any stride, or one element if REDUCTION. X, DX (T, N, C): float, any
    strides. TARGET: int, any strides. LENGTHS (3, N): int64, contiguous. NLL (N,): fp32. POSTERIOR
    (N, T, 2 * W - 1): fp32, contiguous. CHAIN (N, W): int32, contiguous.
    """
    t = (tl.program_id(0) // N).to(tl.int64)
    n = (tl.program_id(0) % N).to(tl.int64)
    X += t * stride_xt + n * stride_xn
    DX += t * stride_dt + n * stride_dn
    L = tl.load(LENGTHS + N + n).to(tl.int32)
    nll = tl.load(NLL + n)
    g = tl.load(DLOSS + n * stride_g)
    if REDUCTION == "mean":
        g = tl.div_rn(tl.div_rn(g, N.to(tl.float32)), tl.maximum(L, 1).to(tl.float32))
    dead = t >= tl.load(LENGTHS + n)
    if ZERO:
        dead = dead | (nll == float("inf"))
    for start in range(0, C, BLOCK_C):
        c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)
        x = tl.load(X + c * stride_xc, mask=c < C, other=0.0).to(tl.float32)
        dx = tl.where(dead, 0.0, _slope(x, 0.0, nll) * g)
        tl.store(DX + c * stride_dc, dx.to(DX.dtype.element_ty), mask=c < C)
    if not dead:
        # the classes of the labels are written again, by other threads
        tl.debug_barrier()
        k = tl.arange(0, BLOCK)
        TARGET += tl.load(LENGTHS + 2 * N + n)
        POSTERIOR += (n * T + t) * (2 * W - 1)
        CHAIN += n * W
        y, _ = _labels(TARGET, k, L, C, stride_y)
        of_blank = tl.load(POSTERIOR + k, mask=k <= L, other=0.0)
        of_label = tl.load(POSTERIOR + W + k, mask=k < L, other=0.0)
        total = tl.sum(of_blank, 0) + tl.sum(tl.where(y == blank, of_label, 0.0), 0)
        x = tl.load(X + blank.to(tl.int64) * stride_xc).to(tl.float32)
        dx = (_slope(x, total, nll) * g).to(DX.dtype.element_ty)
        tl.store(DX + blank.to(tl.int64) * stride_dc, dx)
        code = tl.load(CHAIN + k, mask=k < L, other=0)
        first = (code & 1) == 1
        place = tl.where(first, k, -1)
        total = tl.zeros((BLOCK,), tl.float32)
        while tl.max(place, 0) >= 0:
            total += tl.load(POSTERIOR + W + place, mask=place >= 0, other=0.0)
            place = (tl.load(CHAIN + place, mask=place >= 0, other=0) >> 1) - 1
        y = y.to(tl.int64)
        x = tl.load(X + y * stride_xc, mask=first, other=0.0).to(tl.float32)
        dx = (_slope(x, total, nll) * g).to(DX.dtype.element_ty)
        tl.store(DX + y * stride_dc, dx, mask=first)


def _config(labels):
    block = next_power_of_2(labels + 1)
    return {"BLOCK": block, "num_warps": min(max(block // 128, 1), 8)}


def fwd(x, target, lengths, most, blank, reduction, zero, save):
    """x (T, N, C), target any ints, lengths (3, N) -> loss, nll (N,) and, if `save`, alpha; fp32.

    `most` is the largest number of labels. With `zero`, a loss that is infinite counts as 0. If
    nothing is done to nll, it is the loss.
    """
    T, N, C = x.shape
    nll = x.new_empty(N, dtype=torch.float32)
    alpha = x.new_empty((N, T, 2 * most + 1), dtype=torch.float32) if save else None
    reduce = reduction != "none"
    own = x.new_empty(N, dtype=torch.float32) if zero and not reduce else None
    partial = x.new_empty((1, N), dtype=torch.float64) if reduce else None
    _ctc_fwd_kernel(
        (N,), x, target, lengths, alpha, nll, own, partial, N, T, C, most + 1, blank,
        *x.stride(), target.stride(-1), SAVE=save, ZERO=zero, MEAN=reduction == "mean",
        **_config(most),
    )  # fmt: skip
    loss = nll if own is None else own
    if reduce:
        loss = x.new_empty((), dtype=torch.float32)
        finish(partial, loss, None, N if reduction == "mean" else 1)
    return loss, nll, alpha


def bwd(dloss, x, target, lengths, nll, alpha, blank, reduction, zero):
    """dloss, the inputs and results of `fwd` -> dx, in the layout of x if that is dense."""
    T, N, C = x.shape
    W = alpha.shape[-1] // 2 + 1
    posterior = torch.empty_like(alpha)
    chain = torch.empty((N, W), dtype=torch.int32, device=x.device)
    strides = *x.stride(), target.stride(-1)
    config = _config(W - 1)
    _ctc_posterior_kernel(
        (N,), x, target, lengths, alpha, nll, posterior, chain, N, T, C, W, blank, *strides,
        **config, maxnreg=255,  # else ptxas spills 4 registers on sm_86, so that a block more fits
    )  # fmt: skip
    dx = torch.empty_like(x)
    columns = min(next_power_of_2(C), 1024)
    _ctc_bwd_kernel(
        (T * N,), dloss, x, target, lengths, nll, posterior, chain, dx, N, T, C, W, blank, *strides,
        *dx.stride(), dloss.stride(0) if dloss.dim() else 0, ZERO=zero, REDUCTION=reduction,
        BLOCK_C=columns, BLOCK=config["BLOCK"],
        num_warps=max(config["num_warps"], min(max(columns // 256, 1), 4)),
    )  # fmt: skip
    return dx
