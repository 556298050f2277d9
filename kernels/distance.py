"""Distances, similarities and losses of rows: one kernel per direction, formulas as constexprs.

    s[k] = sum_c step(x1[c], x2[c], x3[c])[k]      up to three sums over each row
    s = distances, or a cosine and two norms       if the op is computed from those
    y = value(s)                                   kept, summed, or summed and divided
    d1, d2, d3 [c] = grad(g, s, x1[c], ...)        those that are wanted, in one pass

A row is the class dimension C of tensors (B, C, S), as in kernels/_classes.py. x2 and x3 may be
absent. Memory-bound: the forward reads each tensor once; the backward reads them once more, and
writes one gradient for each tensor that needs it. In between, one float per sum and row is kept.
PyTorch has a kernel for each operator of the chain. For cosine similarity it has 35 kernels, and 56
passes over a tensor; here there are 6 passes.

Sums are fp32 in each lane, and fp64 across lanes and rows, in a fixed order. The squares of numbers
above 1.8e19 overflow fp32, although a norm and a cosine fit. So rows with an infinite sum are read
again, scaled by 2**-80.
"""

import torch
import triton
import triton.language as tl

from fastnn.kernels._classes import class_programs, common, multiple, tiles, unit
from fastnn.kernels._launch import kernel
from fastnn.kernels._libdevice import power
from fastnn.kernels._partials import finish
from fastnn.kernels._sizes import cdiv
from fastnn.kernels._tl import dense, dense_like
from fastnn.kernels.loss import multilabel_soft_margin, multilabel_soft_margin_grad

# ---- formulas -----------------------------------------------------------------------------------
#
# step   (x1, x2, x3, r, at, p, eps, margin, NORM, SWAP) -> terms of the sums
# value  (s0, s1, s2, C, t, p, eps, margin, NORM, SWAP) -> y
# grad   (g, s0, s1, s2, C, x1, x2, x3, r, at, t, p, eps, margin, NORM, SWAP) -> gradients of x1...
#
# For most ops, value and grad get the sums as s. For pairwise and triplet, s are the distances. For
# cosine, s are the cosine and the two norms.
#
# Where stock keeps differences for the backward, and none of the tensors, so do we: an edit of a
# tensor between the passes is then as harmless as in stock. The forward makes them of x1, x2 and
# x3, rounds them to the result's dtype and writes those that the op names. Their step, and the
# gradient `<op>_of_kept`, are given k1, k2 and k3, the differences, for x1, x2 and x3.
#
# t is a number of the row, r the element of x1 at the row's index, and `at` says which element that
# is; 0 where an op has none. NORM is 1, 2, or 0 for the exponent p.


@triton.jit
def _power(d, p, NORM: tl.constexpr):
    if NORM == 2:
        return d * d
    elif NORM == 1:
        return tl.abs(d)
    else:
        return power(tl.abs(d), p)


@triton.jit
def _root(s, p, NORM: tl.constexpr):
    if NORM == 2:
        return tl.sqrt_rn(s)
    elif NORM == 1:
        return s
    else:
        return power(s, tl.div_rn(1.0, p))


@triton.jit
def _norm_grad(d, y, p, NORM: tl.constexpr):
    """The derivative of y = |d| by an element of d; 0 where ATen selects 0."""
    if NORM == 2:
        slope = tl.where(y == 0, 0.0, tl.div_rn(d, y))
    else:
        slope = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
        if NORM == 0:
            ratio = tl.div_rn(power(tl.abs(d), p - 1.0), power(y, p - 1.0))
            chosen = tl.where(y == y, 0.0, y + tl.zeros_like(d))  # nan in a row with a nan
            slope = tl.where((y == 0) | (d == 0), chosen, slope * ratio)
    return slope


@triton.jit
def differences(x1, x2, x3, eps):
    return x1 - x2 + eps, x1 - x3 + eps, x2 - x3 + eps


@triton.jit
def pairwise_step(k1, k2, k3, r, at, p, eps, margin, NORM: tl.constexpr, SWAP: tl.constexpr):
    return (_power(k1, p, NORM),)


@triton.jit
def pairwise(s0, s1, s2, C, t, p, eps, margin, NORM: tl.constexpr, SWAP: tl.constexpr):
    return s0


@triton.jit
def pairwise_of_kept(
    g, s0, s1, s2, C, k1, k2, k3, r, at, t, p, eps, margin, NORM: tl.constexpr, SWAP: tl.constexpr
):
    d = g * _norm_grad(k1, s0, p, NORM)
    return d, -d


@triton.jit
def triplet_step(k1, k2, k3, r, at, p, eps, margin, NORM: tl.constexpr, SWAP: tl.constexpr):
    near = _power(k1, p, NORM)
    far = _power(k2, p, NORM)
    if SWAP:
        return near, far, _power(k3, p, NORM)
    else:
        return near, far


@triton.jit
def triplet(s0, s1, s2, C, t, p, eps, margin, NORM: tl.constexpr, SWAP: tl.constexpr):
    far = s1
    if SWAP:
        far = tl.minimum(far, s2, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(margin + s0 - far, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def triplet_of_kept(
    g, s0, s1, s2, C, k1, k2, k3, r, at, t, p, eps, margin, NORM: tl.constexpr, SWAP: tl.constexpr
):
    near = s0
    far = s1
    other = far
    of_far = 1.0
    if SWAP:
        other = s2
        of_far = tl.where(far < other, 1.0, tl.where(far == other, 0.5, 0.0))
    least = tl.minimum(far, other, propagate_nan=tl.PropagateNan.ALL)
    g = tl.where(margin + near - least >= 0, g, 0.0)
    to_near = g * _norm_grad(k1, near, p, NORM)
    to_far = g * of_far * _norm_grad(k2, far, p, NORM)
    d1 = to_near - to_far
    d2 = -to_near
    d3 = to_far
    if SWAP:
        swapped = g * (1.0 - of_far) * _norm_grad(k3, other, p, NORM)
        d2 -= swapped
        d3 += swapped
    return d1, d2, d3


@triton.jit
def products_step(x1, x2, x3, r, at, p, eps, margin, NORM: tl.constexpr, SWAP: tl.constexpr):
    return x1 * x2, x1 * x1, x2 * x2


@triton.jit
def cosine(s0, s1, s2, C, t, p, eps, margin, NORM: tl.constexpr, SWAP: tl.constexpr):
    return s0


@triton.jit
def cosine_grad(
    g, s0, s1, s2, C, x1, x2, x3, r, at, t, p, eps, margin, NORM: tl.constexpr, SWAP: tl.constexpr
):
    # Where a norm is at its lower limit eps, PyTorch's derivative is that of the norm itself. Each
    # element is first divided by its own norm, because products of norms, and their reciprocals,
    # overflow fp32. A row of zeros is left out, unless its cosine is nan, for an eps of 0.
    n1 = tl.maximum(s1, eps, propagate_nan=tl.PropagateNan.ALL)
    n2 = tl.maximum(s2, eps, propagate_nan=tl.PropagateNan.ALL)
    along1 = tl.where(s1 == 0, s0 * 0.0, s0 * tl.div_rn(x1, tl.broadcast_to(s1, x1.shape)))
    along2 = tl.where(s2 == 0, s0 * 0.0, s0 * tl.div_rn(x2, tl.broadcast_to(s2, x2.shape)))
    d1 = tl.div_rn(g, n1) * (tl.div_rn(x2, tl.broadcast_to(n2, x2.shape)) - along1)
    d2 = tl.div_rn(g, n2) * (tl.div_rn(x1, tl.broadcast_to(n1, x1.shape)) - along2)
    return d1, d2


@triton.jit
def _embedding_cosine(s0, s1, s2):
    return tl.div_rn(s0, tl.sqrt_rn((s1 + 1e-12) * (s2 + 1e-12)))


@triton.jit
def cosine_embedding(s0, s1, s2, C, t, p, eps, margin, NORM: tl.constexpr, SWAP: tl.constexpr):
    c = _embedding_cosine(s0, s1, s2)
    apart = tl.maximum(c - margin, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(t == 1, 1.0 - c, tl.where(t == -1, apart, 0.0))


@triton.jit
def cosine_embedding_grad(
    g, s0, s1, s2, C, x1, x2, x3, r, at, t, p, eps, margin, NORM: tl.constexpr, SWAP: tl.constexpr
):
    c = _embedding_cosine(s0, s1, s2)
    g = tl.where(t == 1, -g, tl.where((t == -1) & (c - margin >= 0), g, 0.0))
    across = tl.div_rn(g, tl.sqrt_rn((s1 + 1e-12) * (s2 + 1e-12)))
    along1 = tl.div_rn(g * c, s1 + 1e-12)
    along2 = tl.div_rn(g * c, s2 + 1e-12)
    return across * x2 - along1 * x1, across * x1 - along2 * x2


@triton.jit
def multi_margin_step(x1, x2, x3, r, at, p, eps, margin, NORM: tl.constexpr, SWAP: tl.constexpr):
    z = margin - r + x1
    counts = (z > 0) & (at == 0)
    if NORM == 1:
        return tl.where(counts, z, 0.0), tl.where(counts, 1.0, 0.0)
    else:
        # The second sum is for the gradient. It is scaled by a power of two, because it might
        # overflow.
        return tl.where(counts, z * z, 0.0), tl.where(counts, z * 2.0**-20, 0.0)


@triton.jit
def multi_margin(s0, s1, s2, C, t, p, eps, margin, NORM: tl.constexpr, SWAP: tl.constexpr):
    return tl.div_rn(t * s0, C.to(tl.float32))


@triton.jit
def multi_margin_grad(
    g, s0, s1, s2, C, x1, x2, x3, r, at, t, p, eps, margin, NORM: tl.constexpr, SWAP: tl.constexpr
):
    z = margin - r + x1
    if NORM == 1:
        slope = tl.where(z > 0, 1.0, 0.0)
    else:
        slope = tl.where(z > 0, z, 0.0)
    g = tl.div_rn(g * t, C.to(tl.float32))
    if NORM == 1:
        return (g * tl.where(at, -s1, slope),)
    else:
        return (tl.where(at, 2.0**21 * g, 2.0 * g) * tl.where(at, -s1, slope),)


@triton.jit
def multilabel_soft_step(x1, x2, x3, r, at, p, eps, margin, NORM: tl.constexpr, SWAP: tl.constexpr):
    return (multilabel_soft_margin(x1, x2, 1.0, 0.0, 0.0) * x3,)


@triton.jit
def multilabel_soft(s0, s1, s2, C, t, p, eps, margin, NORM: tl.constexpr, SWAP: tl.constexpr):
    return tl.div_rn(s0, C.to(tl.float32))


@triton.jit
def multilabel_soft_grad(
    g, s0, s1, s2, C, x1, x2, x3, r, at, t, p, eps, margin, NORM: tl.constexpr, SWAP: tl.constexpr
):
    g = tl.div_rn(g, C.to(tl.float32))
    d1, d2 = multilabel_soft_margin_grad(g * x3, x1, x2, 1.0, 0.0, 0.0)
    return d1, d2, g * multilabel_soft_margin(x1, x2, 1.0, 0.0, 0.0)


# ---- kernels ------------------------------------------------------------------------------------


@triton.jit
def _row_strides(other, CLASSES_LAST: tl.constexpr, UNIT: tl.constexpr):
    """(stride of classes, stride of rows). One of them is 1."""
    if CLASSES_LAST:
        return 1, multiple(other, UNIT)
    else:
        return multiple(other, UNIT), 1


@triton.jit
def _row_load(X, cols, rows, inside, other, CLASSES_LAST: tl.constexpr, UNIT: tl.constexpr):
    """Elements (cols, rows) in fp32, 0 outside; 1 if X is None."""
    if X is None:
        return 1.0
    else:
        stride_c, stride_s = _row_strides(other, CLASSES_LAST, UNIT)
        at = cols.to(tl.int64) * stride_c + rows * stride_s
        return tl.load(X + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _row_store(D, d, b, batch, other, cols, rows, inside, CLASSES_LAST: tl.constexpr,
               UNIT: tl.constexpr):  # fmt: skip
    stride_c, stride_s = _row_strides(other, CLASSES_LAST, UNIT)
    D += b * multiple(batch, UNIT)
    tl.store(
        D + (cols.to(tl.int64) * stride_c + rows * stride_s), d.to(D.dtype.element_ty), mask=inside
    )


@triton.jit
def _row_target(X1, T, WEIGHT, b, rows, m, live, C, stride_c, stride_s, INDEX: tl.constexpr):
    """(the row's number t, its index or -1, x1 at the index)."""
    t = 0.0
    index = -1
    r = 0.0
    if T is not None:
        if INDEX:
            target = tl.load(T + m, mask=live, other=0).to(tl.int64)
            valid = live & (target >= 0) & (target < C)
            tl.device_assert(valid | (live == 0), "multi_margin_loss: target out of range")
            r = tl.load(X1 + target * stride_c + rows * stride_s, mask=valid, other=0.0)
            r = r.to(tl.float32)
            t = tl.where(valid, 1.0, float("nan"))
            if WEIGHT is not None:
                t *= tl.load(WEIGHT + target, mask=valid, other=0.0).to(tl.float32)
            index = tl.where(valid, target, -1).to(tl.int32)
        else:
            t = tl.load(T + m, mask=live, other=0).to(tl.float32)
    return t, index, r


@triton.jit
def _row_sums(
    X1, X2, X3, rows, live, C, r, index, stride_1, stride_2, stride_3, k1, k2, p, eps, margin, K1,
    K2, K3, b, stride_kb, stride_k, Y, STEP: tl.constexpr, KEEP: tl.constexpr, SUMS: tl.constexpr,
    NORM: tl.constexpr, SWAP: tl.constexpr, CLASSES_LAST: tl.constexpr, UNIT: tl.constexpr,
    LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The sums over each row; with x1 k1 times, and x2 and x3 k2 times as large.

    With KEEP, of what it makes of x1, x2, x3 and eps, in the dtype of Y: written to K1, K2 and K3
    where these are not None.
    """
    # Axes: group, lane, row. Classes of a group are LANES apart, so that one thread has them all.
    offs = tl.arange(0, GROUP)[:, None, None] * LANES + tl.arange(0, LANES)[None, :, None]
    place = rows[None, None, :]
    if k1 is not None:
        k1 = k1[None, None, :]
        k2 = k2[None, None, :]
    acc0 = tl.zeros((LANES, rows.shape[0]), tl.float32)
    acc1 = tl.zeros((LANES, rows.shape[0]), tl.float32)
    acc2 = tl.zeros((LANES, rows.shape[0]), tl.float32)
    for c in range(0, C, GROUP * LANES):
        cols = c + offs
        inside = live[None, None, :] & (cols < C)
        x1 = _row_load(X1, cols, place, inside, stride_1, CLASSES_LAST, UNIT)
        x2 = _row_load(X2, cols, place, inside, stride_2, CLASSES_LAST, UNIT)
        x3 = _row_load(X3, cols, place, inside, stride_3, CLASSES_LAST, UNIT)
        if KEEP is not None:
            x1, x2, x3 = KEEP(x1, x2, x3, eps)
            # Rounded as they are kept, so that the backward sees what the sums are of.
            x1 = x1.to(Y.dtype.element_ty).to(tl.float32)
            x2 = x2.to(Y.dtype.element_ty).to(tl.float32)
            x3 = x3.to(Y.dtype.element_ty).to(tl.float32)
            if K1 is not None:
                _row_store(K1, x1, b, stride_kb, stride_k, cols, place, inside, CLASSES_LAST, UNIT)
            if K2 is not None:
                _row_store(K2, x2, b, stride_kb, stride_k, cols, place, inside, CLASSES_LAST, UNIT)
            if K3 is not None:
                _row_store(K3, x3, b, stride_kb, stride_k, cols, place, inside, CLASSES_LAST, UNIT)
        if k1 is not None:
            x1 *= k1
            x2 *= k2
            x3 *= k2
        terms = STEP(x1, x2, x3, r, cols == index, p, eps, margin, NORM, SWAP)
        acc0 += tl.sum(tl.where(inside, terms[0], 0.0), 0)
        if SUMS > 1:
            acc1 += tl.sum(tl.where(inside, terms[1], 0.0), 0)
        if SUMS > 2:
            acc2 += tl.sum(tl.where(inside, terms[2], 0.0), 0)
    s0 = tl.sum(acc0.to(tl.float64), 0).to(tl.float32)
    s1 = tl.sum(acc1.to(tl.float64), 0).to(tl.float32)
    s2 = tl.sum(acc2.to(tl.float64), 0).to(tl.float32)
    return s0, s1, s2


SMALLER = tl.constexpr(2.0**-80)  # the square of 3e38 * 2**-80 is 1e29, and 4e9 of them fit

_COUNTS = [
    "C", "S", "M", "stride_1b", "stride_2b", "stride_3b", "row_blocks", "class_blocks", "divisor",
    "stride_d1b", "stride_d2b", "stride_d3b",
]  # fmt: skip


@kernel(do_not_specialize=[*_COUNTS[:7], "stride_kb"])
def _rows_fwd_kernel(
    X1, X2, X3, T, WEIGHT, Y, STATS, PARTIAL, K1, K2, K3, C, S: tl.int64, M: tl.int64,
    stride_1b: tl.int64, stride_1, stride_2b: tl.int64, stride_2, stride_3b: tl.int64, stride_3,
    stride_kb: tl.int64, stride_k, row_blocks, p, eps, margin, STEP: tl.constexpr,
    VALUE: tl.constexpr, KEEP: tl.constexpr, LENGTHS: tl.constexpr, SUMS: tl.constexpr,
    INDEX: tl.constexpr, NORM: tl.constexpr, SWAP: tl.constexpr, REDUCE: tl.constexpr,
    CLASSES_LAST: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A program has ROWS rows, and loops over their classes once, or twice if squares overflow.

    X1, X2, X3 (B, C, S): float, their classes or their positions contiguous; X2 and X3 may be None.
    T (B, S): a number of each row, the index of a class if INDEX, or None. WEIGHT (C,): float, or
    None. Y (B, S): float, unless REDUCE. STATS (SUMS, B * S): fp32. PARTIAL (programs,): fp64 sums,
    if REDUCE. K1, K2, K3 (B, C, S): float, the differences that are kept for the backward, or None.
    """
    pid = tl.program_id(0)
    b = (pid // row_blocks).to(tl.int64)
    X1 += b * multiple(stride_1b, UNIT)
    if X2 is not None:
        X2 += b * multiple(stride_2b, UNIT)
    if X3 is not None:
        X3 += b * multiple(stride_3b, UNIT)
    if CLASSES_LAST:
        C = multiple(C, UNIT)
    else:
        S = multiple(S, UNIT)
    rows = (pid % row_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < S
    m = b * S + rows
    stride_c, stride_s = _row_strides(stride_1, CLASSES_LAST, UNIT)
    t, index, r = _row_target(X1, T, WEIGHT, b, rows, m, live, C, stride_c, stride_s, INDEX)
    if INDEX:
        index = index[None, None, :]
        r = r[None, None, :]
    s0, s1, s2 = _row_sums(
        X1, X2, X3, rows, live, C, r, index, stride_1, stride_2, stride_3, None, None, p, eps,
        margin, K1, K2, K3, b, stride_kb, stride_k, Y, STEP, KEEP, SUMS, NORM, SWAP, CLASSES_LAST,
        UNIT, LANES, GROUP,
    )  # fmt: skip
    if LENGTHS is not None:
        # this is also true of rows with a nan or an infinity
        lost0 = (tl.abs(s0) < float("inf")) == 0
        lost1 = (s1 < float("inf")) == 0
        lost2 = (s2 < float("inf")) == 0
        k1 = tl.full((ROWS,), 1.0, tl.float32)
        k2 = tl.full((ROWS,), 1.0, tl.float32)
        if NORM == 2:
            if tl.max((lost0 | lost1 | lost2).to(tl.int32), 0) > 0:
                # not both tensors, because squares of the smaller might become 0
                if LENGTHS == "cosine":
                    k1 = tl.where(lost1, SMALLER, 1.0)
                    k2 = tl.where(lost2, SMALLER, 1.0)
                else:
                    k1 = tl.where(lost0 | lost1 | lost2, SMALLER, 1.0)
                    k2 = k1
                t0, t1, t2 = _row_sums(
                    X1, X2, X3, rows, live, C, r, index, stride_1, stride_2, stride_3, k1, k2, p,
                    eps, margin, None, None, None, b, 0, 0, Y, STEP, KEEP, SUMS, NORM, SWAP,
                    CLASSES_LAST, UNIT, LANES, GROUP,
                )  # fmt: skip
                s0 = tl.where(lost0 | (LENGTHS == "cosine"), t0, s0)
                s1 = tl.where(lost1, t1, s1)
                s2 = tl.where(lost2, t2, s2)
        if LENGTHS == "cosine":
            s1 = tl.sqrt_rn(s1)
            s2 = tl.sqrt_rn(s2)
            n1 = tl.maximum(s1, eps * k1, propagate_nan=tl.PropagateNan.ALL)
            n2 = tl.maximum(s2, eps * k2, propagate_nan=tl.PropagateNan.ALL)
            s0 = tl.div_rn(tl.div_rn(s0, n1), n2)
            s1 = tl.div_rn(s1, k1)
            s2 = tl.div_rn(s2, k2)
        else:
            s0 = tl.div_rn(_root(s0, p, NORM), tl.where(lost0, k1, 1.0))
            s1 = tl.div_rn(_root(s1, p, NORM), tl.where(lost1, k1, 1.0))
            s2 = tl.div_rn(_root(s2, p, NORM), tl.where(lost2, k1, 1.0))
    tl.store(STATS + m, s0, mask=live)
    if SUMS > 1:
        tl.store(STATS + M + m, s1, mask=live)
    if SUMS > 2:
        tl.store(STATS + 2 * M + m, s2, mask=live)
    y = VALUE(s0, s1, s2, C, t, p, eps, margin, NORM, SWAP)
    if REDUCE:
        tl.store(PARTIAL + pid, tl.sum(tl.where(live, y, 0.0).to(tl.float64), 0))
    else:
        tl.store(Y + m, y.to(Y.dtype.element_ty), mask=live)


@kernel(do_not_specialize=_COUNTS)
def _rows_bwd_kernel(
    DY, X1, X2, X3, T, WEIGHT, STATS, D1, D2, D3, C, S: tl.int64, M: tl.int64, stride_1b: tl.int64,
    stride_1, stride_2b: tl.int64, stride_2, stride_3b: tl.int64, stride_3, stride_d1b: tl.int64,
    stride_d1, stride_d2b: tl.int64, stride_d2, stride_d3b: tl.int64, stride_d3, row_blocks,
    class_blocks, divisor: tl.int64, p, eps, margin, GRAD: tl.constexpr, SUMS: tl.constexpr,
    INDEX: tl.constexpr, NORM: tl.constexpr, SWAP: tl.constexpr, REDUCE: tl.constexpr,
    CLASSES_LAST: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program has ROWS rows, and loops over its share of their classes.

    DY: float, (B, S), or one element if REDUCE. X1, X2, X3, T, WEIGHT: as in the forward. STATS
    (SUMS, B * S): fp32, from the forward. D1, D2, D3 (B, C, S): float gradients of X1, X2 and X3,
    or None.
    """
    pid = tl.program_id(0)
    b = (pid // class_blocks // row_blocks).to(tl.int64)
    rows = (pid // class_blocks % row_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    X1 += b * multiple(stride_1b, UNIT)
    if X2 is not None:
        X2 += b * multiple(stride_2b, UNIT)
    if X3 is not None:
        X3 += b * multiple(stride_3b, UNIT)
    if CLASSES_LAST:
        C = multiple(C, UNIT)
    else:
        S = multiple(S, UNIT)
    live = rows < S
    m = b * S + rows
    stride_c, stride_s = _row_strides(stride_1, CLASSES_LAST, UNIT)
    t, index, r = _row_target(X1, T, WEIGHT, b, rows, m, live, C, stride_c, stride_s, INDEX)
    if T is not None:
        t = t[None, :]
    if INDEX:
        index = index[None, :]
        r = r[None, :]
    if REDUCE:
        g = tl.div_rn(tl.load(DY).to(tl.float32), divisor.to(tl.float32))
    else:
        g = tl.load(DY + m, mask=live, other=0.0).to(tl.float32)[None, :]
    s0 = tl.load(STATS + m, mask=live, other=0.0)[None, :]
    s1 = 0.0
    s2 = 0.0
    if SUMS > 1:
        s1 = tl.load(STATS + M + m, mask=live, other=0.0)[None, :]
    if SUMS > 2:
        s2 = tl.load(STATS + 2 * M + m, mask=live, other=0.0)[None, :]
    live = live[None, :]
    rows = rows[None, :]
    span = tl.cdiv(tl.cdiv(C, COLS), class_blocks) * COLS
    first = pid % class_blocks * span
    for c in range(first, tl.minimum(first + span, C), COLS):
        cols = c + tl.arange(0, COLS)[:, None]
        inside = live & (cols < C)
        x1 = _row_load(X1, cols, rows, inside, stride_1, CLASSES_LAST, UNIT)
        x2 = _row_load(X2, cols, rows, inside, stride_2, CLASSES_LAST, UNIT)
        x3 = _row_load(X3, cols, rows, inside, stride_3, CLASSES_LAST, UNIT)
        grads = GRAD(g, s0, s1, s2, C, x1, x2, x3, r, cols == index, t, p, eps, margin, NORM, SWAP)
        if D1 is not None:
            _row_store(
                D1, grads[0], b, stride_d1b, stride_d1, cols, rows, inside, CLASSES_LAST, UNIT
            )
        if D2 is not None:
            _row_store(
                D2, grads[1], b, stride_d2b, stride_d2, cols, rows, inside, CLASSES_LAST, UNIT
            )
        if D3 is not None:
            _row_store(
                D3, grads[2], b, stride_d3b, stride_d3, cols, rows, inside, CLASSES_LAST, UNIT
            )


# ---- launchers ----------------------------------------------------------------------------------

# Ops that are computed from lengths, whose squares may overflow. What their stats are is said
# above.
_LENGTHS = {"pairwise": "distances", "triplet": "distances", "cosine": "cosine"}


def _laid_out(tensors, keeps, dtype):
    """The tensors, copied only if layouts do not go together; as many new ones as are kept, of one
    layout; and `common` of all."""
    made = [torch.empty_like(tensors[0], dtype=dtype) for _ in range(keeps)]
    view = common(*tensors, *made)
    if view is None:
        tensors = [dense(t) for t in tensors]
        made = [torch.empty_like(tensors[0], dtype=dtype) for _ in range(keeps)]
        view = common(*tensors, *made)
    return tensors, made, view


def _tiling(view, tensors, made):
    sizes, classes_last, strides = view
    narrow = (*tensors, *made)
    wide = unit(sizes, classes_last, strides, *narrow)
    itemsize = min(t.element_size() for t in narrow)
    return wide, tiles(sizes, classes_last, wide, itemsize, light=False)


def _registers(norm, sums):
    """Without a limit, ptxas spills a few registers of powers and of several sums, so that a block
    more fits."""
    return {"maxnreg": 255} if norm == 0 or sums > 1 else {}


def _placed(given, present, values, absent):
    """`values` in the places of the present tensors, `absent` in the other places of `given`."""
    values = iter(values)
    return [next(values) if there else absent for there in present]


def fwd(xs, target, weight, step, value, sums, numbers, flags, divisor, y, differ=False, keeps=0):
    """xs, 3 tensors (C,) or (N, C, ...) of one shape, or None -> fills y; stats, and what is
    kept, for `bwd`.

    y is contiguous, of as many elements as there are rows, or 0-d and divided by `divisor`.
    `target` has a number for each row, or if `flags` says so, the index of a class, and `weight`
    (C,) then weighs rows by it. `numbers` are (p, eps, margin), `flags` (INDEX, NORM, SWAP). stats
    (sums, rows) fp32. With `differ`, the sums are of the tensors' `differences`, of which the first
    `keeps` are kept: in the shape of xs and the dtype of y.
    """
    present = [x is not None for x in xs]
    x = xs[0]
    C = x.shape[min(x.dim() - 1, 1)]
    M = x.numel() // C
    reduce = divisor is not None
    stats = x.new_empty((sums, M), dtype=torch.float32)
    tensors, made, view = _laid_out([t for t in xs if t is not None], keeps, y.dtype)
    (B, C, S), classes_last, strides = view
    wide, config = _tiling(view, tensors, made)
    row_blocks = cdiv(S, config["ROWS"])
    programs = B * row_blocks
    partial = x.new_empty((1, programs), dtype=torch.float64) if reduce else None
    index, norm, swap = flags
    steps = [s for pair in _placed(xs, present, strides, (0, 0)) for s in pair]
    steps += strides[-1] if keeps else (0, 0)
    _rows_fwd_kernel(
        (programs,), *_placed(xs, present, tensors, None), target, weight, y, stats, partial, *made,
        *(None,) * (3 - keeps), C, S, M, *steps, row_blocks, *numbers, STEP=globals()[step],
        VALUE=globals()[value], KEEP=differences if differ else None,
        LENGTHS=_LENGTHS.get(value), SUMS=sums, INDEX=index, NORM=norm, SWAP=swap,
        REDUCE=reduce, CLASSES_LAST=classes_last, UNIT=wide, **config,
        **_registers(norm, sums),
    )  # fmt: skip
    if reduce:
        finish(partial, y, None, divisor)
    return stats, made


def bwd(dy, xs, wanted, target, weight, stats, gradient, numbers, flags, divisor):
    """dy, the tensors and stats of `fwd` -> the gradients, written to the tensors `wanted`.

    `wanted` has 3 tensors with the shape of xs, or None. Returns them, or copies if the layouts do
    not agree.
    """
    present = [x is not None for x in xs]
    asked = [w is not None for w in wanted]
    tensors = [t for t in xs if t is not None]
    wants = [w for w in wanted if w is not None]
    made = wants
    view = common(*tensors, *wants)
    if view is None:
        tensors = [dense(t) for t in tensors]
        made = [torch.empty(w.shape, dtype=w.dtype, device=w.device) for w in wants]
        view = common(*tensors, *made)
    (B, C, S), classes_last, strides = view
    wide, config = _tiling(view, tensors, made)
    rows, cols = config["ROWS"], config["LANES"] * config["GROUP"]
    row_blocks, class_blocks = cdiv(S, rows), class_programs(C, cols, classes_last)
    index, norm, swap = flags
    reads = _placed(xs, present, strides, (0, 0))
    writes = _placed(wanted, asked, strides[len(tensors) :], (0, 0))
    _rows_bwd_kernel(
        (B * row_blocks * class_blocks,), dy, *_placed(xs, present, tensors, None),
        target, weight, stats, *_placed(wanted, asked, made, None), C, S, B * S,
        *(s for pair in (*reads, *writes) for s in pair), row_blocks, class_blocks, divisor or 1,
        *numbers, GRAD=globals()[gradient], SUMS=stats.shape[0], INDEX=index, NORM=norm, SWAP=swap,
        REDUCE=divisor is not None, CLASSES_LAST=classes_last, UNIT=wide, ROWS=rows, COLS=cols,
        num_warps=config["num_warps"], **_registers(norm, 1),
    )  # fmt: skip
    done = [dense_like(d, like) for d, like in zip(made, wants, strict=True)]
    return _placed(wanted, asked, done, None)
