"""Elementwise losses: one kernel per direction, with the formula as a constexpr function.

    loss[i] = w[i] * f(a[i], b[i], c[i]; p, q)           kept, summed, or summed and divided
    da, db, dc [i] = g[i] * w[i] * f'(...)               those that are wanted, in one pass

Each formula is in this file once, beside its derivatives. The op that uses it says what a, b, c, p
and q are. Memory-bound, so count passes over the E elements. A reduced loss reads each input once,
and writes a few partial sums; PyTorch writes the losses and reads them again. The gradients read
the inputs once more, and write E elements for each input that needs a gradient.

Tensors that are dense in the order of the walk are addressed by its index, 128 bits at a time.
Tensors that are broadcast or not dense are read in place through strides: their index is split into
at most three dimensions. Sums are fp32 in each lane, and fp64 across lanes and programs, in a fixed
order.

Comparisons are written as in ATen, so that a nan takes the same branch as in ATen.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from fastnn.kernels._config import here, lanes, tunable
from fastnn.kernels._launch import kernel
from fastnn.kernels._libdevice import log1p
from fastnn.kernels._partials import finish
from fastnn.kernels._sizes import cdiv
from fastnn.kernels._tl import dense
from fastnn.kernels.pointwise import log1p_of_share

# ---- formulas -----------------------------------------------------------------------------------
#
# A gradient gets the incoming gradient g and returns those of a, b and c, as many as it has.
#
# Where stock keeps neither a nor b for the backward, but what it made of them, so does a loss here:
# the forward writes their `difference`, or the `<loss>_slope`, and `<loss>_of_difference` or
# `<loss>_of_slope` is the gradient, given that for a. An edit of an input between the passes is
# then as harmless as in stock, and no byte more is moved: one tensor is written and read, where two
# would be read.


@triton.jit
def _at_least(x, low):
    return tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def difference(a, b, c, p, q):
    return a - b


@triton.jit
def square(a, b, c, p, q):
    return (a - b) * (a - b)


@triton.jit
def square_grad(g, a, b, c, p, q):
    d = (a - b) * (2.0 * g)  # the small factor first: twice the difference may be inf
    return d, -d


@triton.jit
def square_of_difference(g, k, b, c, p, q):
    d = 2.0 * k * g
    return d, -d


@triton.jit
def absolute(a, b, c, p, q):
    return tl.abs(a - b)


@triton.jit
def absolute_of_difference(g, k, b, c, p, q):
    d = tl.where(k > 0, g, tl.where(k < 0, -g, 0.0 * g))
    return d, -d


@triton.jit
def smooth_l1(a, b, c, p, q):
    z = tl.abs(a - b)
    return tl.where(z < p, tl.div_rn(0.5 * z * z, p), z - 0.5 * p)


@triton.jit
def smooth_l1_grad(g, a, b, c, p, q):
    x = a - b
    d = tl.where(x <= -p, -g, tl.where(x >= p, g, tl.div_rn(x * g, p)))
    return d, -d


@triton.jit
def huber(a, b, c, p, q):
    z = tl.abs(a - b)
    return tl.where(z <= p, 0.5 * z * z, p * (z - 0.5 * p))


@triton.jit
def huber_grad(g, a, b, c, p, q):
    x = a - b
    d = tl.where(x < -p, -g * p, tl.where(x > p, g * p, x * g))
    return d, -d


@triton.jit
def bce(a, b, c, p, q):
    # Outside [0, 1] PyTorch fails an assertion; here the loss is nan.
    inside = (a >= 0) & (a <= 1) & (b >= 0) & (b <= 1)
    tl.device_assert(inside, "binary_cross_entropy: a value outside [0, 1]")
    low = _at_least(tl.log(a), -100.0)
    high = _at_least(log1p(-a), -100.0)
    return tl.where(inside, (b - 1.0) * high - b * low, float("nan"))


@triton.jit
def bce_grad(g, a, b, c, p, q):
    # The quotient comes first: with a small g the product would be a subnormal number.
    da = g * tl.div_rn(a - b, _at_least((1.0 - a) * a, 1e-12))
    db = g * (log1p(-a) - tl.log(a))
    return da, db


@triton.jit
def _sigmoids(x):
    """sigmoid(x) and sigmoid(-x), both without cancellation."""
    e = libdevice.exp(-tl.abs(x))
    large = tl.div_rn(1.0, 1.0 + e)
    small = tl.div_rn(e, 1.0 + e)
    return tl.where(x < 0, small, large), tl.where(x < 0, large, small)


@triton.jit
def bce_with_logits(a, b, c, p, q):  # c is the weight of positive targets
    # (1 - b) a + v softplus(-a), v = 1 + (c - 1) b, without the difference of two large terms.
    rest = ((c - 1.0) * b + 1.0) * log1p_of_share(libdevice.exp(-tl.abs(a)))
    loss = tl.where(a >= 0, (1.0 - b) * a, -c * b * a) + rest
    # as in PyTorch, which computes inf - inf there
    return tl.where(a == -float("inf"), float("nan"), loss)


@triton.jit
def bce_with_logits_grad(g, a, b, c, p, q):
    s, _ = _sigmoids(a)
    da = ((c * b + 1.0 - b) * s - c * b) * g
    log_s = tl.minimum(a, 0.0, propagate_nan=tl.PropagateNan.ALL) - log1p_of_share(
        libdevice.exp(-tl.abs(a))
    )
    db = ((1.0 - c) * log_s - a) * g
    return da, db


@triton.jit
def kl_div(a, b, c, p, q):
    return tl.where(b == 0, 0.0, b * tl.log(b)) - b * a


@triton.jit
def kl_div_grad(g, a, b, c, p, q):
    # b / b is 1, and nan at 0, as in PyTorch's chain of operators.
    return -b * g, (tl.log(b) + b / b - a) * g


@triton.jit
def kl_div_log(a, b, c, p, q):
    return libdevice.exp(b) * (b - a)


@triton.jit
def kl_div_log_grad(g, a, b, c, p, q):
    e = libdevice.exp(b)
    return -e * g, g * (b - a) * e + g * e  # as in PyTorch: e * (b - a) may be inf


@triton.jit
def kl_div_log_slope(a, b, c, p, q):
    return -libdevice.exp(b)


@triton.jit
def kl_div_log_of_slope(g, k, b, c, p, q):
    return (k * g,)


@triton.jit
def _stirling(b):
    value = b * tl.log(b) - b + 0.5 * tl.log(6.283185307179586 * b)
    return tl.where(b <= 1, 0.0, value)


@triton.jit
def _stirling_grad(b):
    log = tl.log(b)
    # Nan from 0 down and at inf, as in PyTorch's chain of operators.
    return tl.where(b <= 1, 0.0 * log, log + (b / b - 1.0) + tl.div_rn(0.5, b))


@triton.jit
def poisson_log(a, b, c, p, q):
    return libdevice.exp(a) - b * a


@triton.jit
def poisson_log_grad(g, a, b, c, p, q):
    return (libdevice.exp(a) - b) * g, -a * g


@triton.jit
def poisson_log_full(a, b, c, p, q):
    return poisson_log(a, b, c, p, q) + _stirling(b)


@triton.jit
def poisson_log_full_grad(g, a, b, c, p, q):
    return (libdevice.exp(a) - b) * g, (_stirling_grad(b) - a) * g


@triton.jit
def poisson(a, b, c, p, q):
    return a - b * tl.log(a + p)


@triton.jit
def poisson_grad(g, a, b, c, p, q):
    return g - tl.div_rn(b * g, a + p), -tl.log(a + p) * g


@triton.jit
def poisson_full(a, b, c, p, q):
    return poisson(a, b, c, p, q) + _stirling(b)


@triton.jit
def poisson_full_grad(g, a, b, c, p, q):
    return g - tl.div_rn(b * g, a + p), (_stirling_grad(b) - tl.log(a + p)) * g


@triton.jit
def gaussian(a, b, c, p, q):  # c is the variance, p its least value, q a constant
    # For a negative variance PyTorch raises, and waits for the device to do so. Here the loss is
    # nan.
    v = tl.where(c < 0, float("nan"), _at_least(c, p))
    return 0.5 * (tl.log(v) + tl.div_rn((a - b) * (a - b), v)) + q


@triton.jit
def gaussian_of_difference(g, k, b, c, p, q):
    v = tl.where(c < 0, float("nan"), _at_least(c, p))
    # Stock's order: a small v makes quotients inf.
    da = tl.div_rn(0.5 * g, v) * (2.0 * k)
    dc = tl.div_rn(0.5 - tl.div_rn(0.5 * k * k, v), v) * g
    # For a variance of 0, which only an eps of 0 leaves, the two terms are inf - inf.
    return da, -da, tl.where(v == 0, float("nan"), dc)


@triton.jit
def gaussian_scalar(a, b, c, p, q):  # p is the variance, q a constant
    return tl.div_rn(0.5 * (a - b) * (a - b), p) + q


@triton.jit
def gaussian_scalar_of_difference(g, k, b, c, p, q):
    d = tl.div_rn(0.5 * g, p) * (2.0 * k)
    return d, -d


@triton.jit
def hinge_embedding(a, b, c, p, q):
    return tl.where(b != 1, _at_least(p - a, 0.0), 0.0) + tl.where(b != -1, a, 0.0)


@triton.jit
def hinge_embedding_slope(a, b, c, p, q):
    away = tl.where(b != 1, tl.where(p - a >= 0, 1.0, 0.0), 0.0)
    return tl.where(b != -1, 1.0, 0.0) - away


@triton.jit
def hinge_embedding_of_slope(g, k, b, c, p, q):
    return (tl.where(k > 0, g, tl.where(k < 0, -g, 0.0)),)


@triton.jit
def soft_margin(a, b, c, p, q):
    z = -a * b
    # log1p(exp(z)) without a second function of libdevice; above 88.7, PyTorch's exp(z) is infinite
    loss = tl.where(z > 0, z, 0.0) + log1p_of_share(libdevice.exp(-tl.abs(z)))
    return tl.where(z > 88.7228317260742, float("inf"), loss)


@triton.jit
def soft_margin_grad(g, a, b, c, p, q):
    z = libdevice.exp(-b * a)
    return (-tl.div_rn(b * z, 1.0 + z) * g,)


@triton.jit
def margin_ranking(a, b, c, p, q):
    return _at_least(-c * (a - b) + p, 0.0)


@triton.jit
def margin_ranking_slope(a, b, c, p, q):
    return tl.where(-c * (a - b) + p >= 0, -c, -c * 0.0)  # nan for an infinite target, as in stock


@triton.jit
def margin_ranking_of_slope(g, k, b, c, p, q):
    d = tl.where(k == 0, 0.0, k * g)
    return d, -d


@triton.jit
def margin_ranking_of_difference(g, k, b, c, p, q):
    g = tl.where(-c * k + p >= 0, g, 0.0)
    return -c * g, c * g, -k * g


@triton.jit
def multilabel_soft_margin(a, b, c, p, q):
    rest = log1p_of_share(libdevice.exp(-tl.abs(a)))
    return b * (_at_least(-a, 0.0) + rest) + (1.0 - b) * (_at_least(a, 0.0) + rest)


@triton.jit
def multilabel_soft_margin_grad(g, a, b, c, p, q):
    # g comes first, as in PyTorch: next to the largest number, the sum of both terms may be inf
    s, r = _sigmoids(a)
    return (1.0 - b) * g * s - b * g * r, -a * g


# ---- walks --------------------------------------------------------------------------------------


class Walk:
    """An order in which to visit the elements of tensors that are broadcast together."""

    __slots__ = ("addressing", "in_order", "inverse", "n", "order", "permuted", "shape", "wide")
    addressing: tuple[int | None, ...] | None
    in_order: bool
    inverse: list[int]
    n: int
    order: list[int]
    permuted: list[int]
    shape: tuple[int, ...]
    wide: bool

    def like(self, dtype, device):
        """Uninitialised, with the broadcast shape, and dense in the order of the walk."""
        made = torch.empty(self.permuted, dtype=dtype, device=device)
        return made if self.in_order else made.permute(self.inverse)


@functools.lru_cache(maxsize=4096)
def _walk(layouts):
    """The `Walk` of tensors with the (shape, strides) `layouts`, each of which may be None.

    The walk follows the memory order of the first tensor that is not broadcast. `addressing` has
    the kernel arguments D1 and D2, and three strides per tensor. Arguments that are not needed are
    None; a dense tensor needs no strides. `addressing` itself is None if the tensors would need
    more than three dimensions.
    """
    shape = tuple(torch.broadcast_shapes(*[layout[0] for layout in layouts if layout is not None]))
    whole = len(shape)
    expanded: list[list[int] | None] = []
    for layout in layouts:
        if layout is None:
            expanded.append(None)
            continue
        own, strides = layout
        missing = whole - len(own)
        steps = [0] * missing + list(strides)
        sizes = [1] * missing + list(own)
        expanded.append([0 if size == 1 else step for size, step in zip(sizes, steps, strict=True)])
    axes = [d for d in range(whole) if shape[d] != 1]
    full = [s for s in expanded if s is not None and all(s[d] for d in axes)]
    if full:
        axes.sort(key=lambda d: -full[0][d])

    walk = Walk()
    walk.shape = shape
    walk.n = math.prod(shape)
    walk.order = [d for d in range(whole) if shape[d] == 1] + axes
    walk.permuted = [shape[d] for d in walk.order]
    walk.inverse = [walk.order.index(d) for d in range(whole)]
    walk.in_order = walk.order == list(range(whole))
    present = [s for s in expanded if s is not None]
    merged: list[tuple[int, list[int]]] = []  # sizes, and steps of those present; outer first
    for d in axes:
        steps = [s[d] for s in present]
        if merged and all(a == b * shape[d] for a, b in zip(merged[-1][1], steps, strict=True)):
            merged[-1] = merged[-1][0] * shape[d], steps
        else:
            merged.append((shape[d], steps))
    walk.addressing = None
    if len(merged) > 3:
        return walk
    sizes = [size for size, _ in merged]
    dense = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    addressing = [sizes[-2] if len(sizes) > 2 else None, sizes[-1] if len(sizes) > 1 else None]
    walk.wide = walk.n >= 2**31
    at = 0
    for s in expanded:
        if s is None:
            addressing += (None, None, None)
            continue
        steps = [steps[at] for _, steps in merged]
        at += 1
        if steps == dense:
            addressing += (None, None, None)
        else:
            addressing += (*((None,) * (3 - len(steps))), *steps)
        span = sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
        walk.wide = walk.wide or span >= 2**31
    walk.addressing = tuple(addressing)
    return walk


def walk(*tensors):
    """(walk, tensors) for tensors that are broadcast together, or None; copies some if needed."""
    found = _walk(tuple([None if t is None else (t.shape, t.stride()) for t in tensors]))
    if found.addressing is None:
        shape, order, inverse = found.shape, found.order, found.inverse
        tensors = tuple(
            None if t is None else dense(t.expand(shape).permute(order)).permute(inverse)
            for t in tensors
        )
        found = _walk(tuple([None if t is None else (t.shape, t.stride()) for t in tensors]))
    return found, tensors


# ---- kernels ------------------------------------------------------------------------------------


@triton.jit
def _read(T, start, i, mask, D1, D2, s0, s1, s2, MASKED: tl.constexpr, WIDE: tl.constexpr):
    """Elements start + i of a walk over T, in fp32; 1 if T is None."""
    if T is None:
        x = 1.0
    else:
        if s2 is None:
            at = T + start + i
        else:
            e = start + i
            if not WIDE:
                e = e.to(tl.int32)
            if D2 is None:
                at = T + e * s2
            elif D1 is None:
                at = T + (e // D2 * s1 + e % D2 * s2)
            else:
                outer = e // D2
                at = T + (outer // D1 * s0 + outer % D1 * s1 + e % D2 * s2)
        if MASKED:
            x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        else:
            x = tl.load(at).to(tl.float32)
    return x


_SIZES = [
    "n", "blocks", "D1", "D2", "a0", "a1", "a2", "b0", "b1", "b2", "c0", "c1", "c2", "w0", "w1",
    "w2",
]  # fmt: skip


@triton.jit
def _loss_tile(
    A, B, C, W, LOSS, KEPT, n, start, D1, D2, a0, a1, a2, b0, b1, b2, c0, c1, c2, w0, w1, w2, p, q,
    FORMULA: tl.constexpr, KEEP: tl.constexpr, REDUCE: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    mask = i < n - start
    a = _read(A, start, i, mask, D1, D2, a0, a1, a2, MASKED, WIDE)
    b = _read(B, start, i, mask, D1, D2, b0, b1, b2, MASKED, WIDE)
    c = _read(C, start, i, mask, D1, D2, c0, c1, c2, MASKED, WIDE)
    w = _read(W, start, i, mask, D1, D2, w0, w1, w2, MASKED, WIDE)
    loss = FORMULA(a, b, c, p, q)
    if KEPT is not None:
        kept = KEEP(a, b, c, p, q).to(KEPT.dtype.element_ty)
        if MASKED:
            tl.store(KEPT + start + i, kept, mask=mask)
        else:
            tl.store(KEPT + start + i, kept)
    if W is not None:
        loss *= w
    if REDUCE:
        if MASKED:
            loss = tl.where(mask, loss, 0.0)
        if W is not None and MASKED:
            w = tl.where(mask, w, 0.0)
    elif MASKED:
        tl.store(LOSS + start + i, loss.to(LOSS.dtype.element_ty), mask=mask)
    else:
        tl.store(LOSS + start + i, loss.to(LOSS.dtype.element_ty))
    return loss, w


@kernel(do_not_specialize=_SIZES)
def _loss_fwd_kernel(
    A, B, C, W, LOSS, KEPT, PARTIAL, n: tl.int64, blocks, D1, D2, a0, a1, a2, b0, b1, b2, c0, c1,
    c2, w0, w1, w2, p, q, FORMULA: tl.constexpr, KEEP: tl.constexpr, REDUCE: tl.constexpr,
    WIDE: tl.constexpr, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program computes the losses of `blocks` blocks of BLOCK, or their sum, and loops over them.

    A, B, C, W: float, of one broadcast shape of n elements, or None; read through strides over
    three dims, the last two of D1 and D2. LOSS (n,): float, unless REDUCE. PARTIAL (1 or 2,
    programs): fp64 sums of losses, and if WEIGHTS of weights.
    KEPT (n,): float, what is kept of each element for the backward, or None.
    """
    pid = tl.program_id(0)
    losses = tl.zeros((BLOCK,), tl.float32)
    weights = tl.zeros((BLOCK,), tl.float32)
    for k in range(blocks):
        start = (pid.to(tl.int64) * blocks + k) * BLOCK
        if start + BLOCK <= n:  # no mask, so that accesses are 128 bits wide for every n
            loss, w = _loss_tile(
                A, B, C, W, LOSS, KEPT, n, start, D1, D2, a0, a1, a2, b0, b1, b2, c0, c1, c2, w0,
                w1, w2, p, q, FORMULA, KEEP, REDUCE, WIDE, False, BLOCK,
            )  # fmt: skip
            losses += loss
            if WEIGHTS:
                weights += w
        else:
            loss, w = _loss_tile(
                A, B, C, W, LOSS, KEPT, n, start, D1, D2, a0, a1, a2, b0, b1, b2, c0, c1, c2, w0,
                w1, w2, p, q, FORMULA, KEEP, REDUCE, WIDE, True, BLOCK,
            )  # fmt: skip
            losses += loss
            if WEIGHTS:
                weights += w
    if REDUCE:
        tl.store(PARTIAL + pid, tl.sum(losses.to(tl.float64), 0))
        if WEIGHTS:
            tl.store(PARTIAL + tl.num_programs(0) + pid, tl.sum(weights.to(tl.float64), 0))


@triton.jit
def _grad_tile(
    G, A, B, C, W, DA, DB, DC, scale, n, start, D1, D2, g0, g1, g2, a0, a1, a2, b0, b1, b2, c0, c1,
    c2, w0, w1, w2, p, q, FORMULA: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    mask = i < n - start
    g = scale
    if G is not None:
        g = _read(G, start, i, mask, D1, D2, g0, g1, g2, MASKED, WIDE)
    a = _read(A, start, i, mask, D1, D2, a0, a1, a2, MASKED, WIDE)
    b = _read(B, start, i, mask, D1, D2, b0, b1, b2, MASKED, WIDE)
    c = _read(C, start, i, mask, D1, D2, c0, c1, c2, MASKED, WIDE)
    if W is not None:
        g *= _read(W, start, i, mask, D1, D2, w0, w1, w2, MASKED, WIDE)
    grads = FORMULA(g, a, b, c, p, q)
    if DA is not None:
        da = grads[0].to(DA.dtype.element_ty)
        if MASKED:
            tl.store(DA + start + i, da, mask=mask)
        else:
            tl.store(DA + start + i, da)
    if DB is not None:
        db = grads[1].to(DB.dtype.element_ty)
        if MASKED:
            tl.store(DB + start + i, db, mask=mask)
        else:
            tl.store(DB + start + i, db)
    if DC is not None:
        dc = grads[2].to(DC.dtype.element_ty)
        if MASKED:
            tl.store(DC + start + i, dc, mask=mask)
        else:
            tl.store(DC + start + i, dc)


@kernel(do_not_specialize=[*_SIZES[:1], *_SIZES[2:], "divisor", "g0", "g1", "g2"])
def _loss_bwd_kernel(
    DLOSS, A, B, C, W, COUNT, DA, DB, DC, n: tl.int64, divisor: tl.int64, D1, D2, g0, g1, g2, a0,
    a1, a2, b0, b1, b2, c0, c1, c2, w0, w1, w2, p, q, FORMULA: tl.constexpr, REDUCE: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program computes the gradients of one block of BLOCK elements.

    DLOSS: float, n elements through strides, or one element if REDUCE. A, B, C, W, D1, D2: as in
    the forward. COUNT: fp32, one element, or None. DA, DB, DC (n,): float, or None.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    scale = 1.0
    G = DLOSS
    if REDUCE:
        G = None
        scale = tl.load(DLOSS).to(tl.float32)
        if COUNT is not None:
            scale = tl.div_rn(scale, tl.load(COUNT))
        else:
            scale = tl.div_rn(scale, divisor.to(tl.float32))
    if start + BLOCK <= n:
        _grad_tile(
            G, A, B, C, W, DA, DB, DC, scale, n, start, D1, D2, g0, g1, g2, a0, a1, a2, b0, b1, b2,
            c0, c1, c2, w0, w1, w2, p, q, FORMULA, WIDE, False, BLOCK,
        )  # fmt: skip
    else:
        _grad_tile(
            G, A, B, C, W, DA, DB, DC, scale, n, start, D1, D2, g0, g1, g2, a0, a1, a2, b0, b1, b2,
            c0, c1, c2, w0, w1, w2, p, q, FORMULA, WIDE, True, BLOCK,
        )  # fmt: skip


# ---- launchers ----------------------------------------------------------------------------------


# as many programs as a large GPU holds at once; one program adds up so many sums quickly
PARTIALS = 2048


@tunable("BLOCK")
def _config(itemsize):
    # 8 elements per lane: in 16-bit dtypes, one 16-byte access.
    config = {"BLOCK": 1024, "num_warps": 128 // lanes() if itemsize == 2 else 4}
    if itemsize == 2 and here() == "sm_120":
        # else ptxas spills two registers of some formulas, so that another block fits
        config["maxnreg"] = 168
    return config


def _narrow(tensors):
    """Bytes per element of the narrowest tensor. Each tensor may be None."""
    return min([t.element_size() for t in tensors if t is not None])


def fwd(inputs, formula, p, q, loss, divisor, weights, keep=None, kept_dtype=None):
    """inputs (a, b, c, w), broadcast together, those absent None -> loss, filled in, count, kept.

    `loss` is 0-d, and then divided by `divisor`, or with `weights` by the sum of the weights, which
    is `count` (0-d fp32, else None); or it has the broadcast shape, in any dense layout. `kept` is
    what the function named `keep` makes, of the broadcast shape, in `kept_dtype`; else None.
    """
    reduce = divisor is not None
    # the result comes first, because its layout is given
    found, (out, *inputs) = walk(None if reduce else loss, *inputs)
    a = next(t for t in inputs if t is not None)
    config = _config(_narrow(inputs))
    tiles = cdiv(found.n, config["BLOCK"])
    blocks = max(cdiv(tiles, PARTIALS), 1) if reduce else 1
    programs = cdiv(tiles, blocks)
    partial = count = kept = None
    if keep is not None:
        kept = found.like(kept_dtype, a.device)
    if reduce:
        partial = a.new_empty((2 if weights else 1, programs), dtype=torch.float64)
        count = a.new_empty((), dtype=torch.float32) if weights else None
    D1, D2, _, _, _, *steps = found.addressing
    _loss_fwd_kernel(
        (programs,), *inputs, out, kept, partial, found.n, blocks, D1, D2, *steps, p, q,
        FORMULA=globals()[formula], KEEP=keep and globals()[keep], REDUCE=reduce, WIDE=found.wide,
        WEIGHTS=weights, **config,
    )  # fmt: skip
    if reduce:
        finish(partial, loss, count, divisor)
    return loss, count, kept


def bwd(dloss, inputs, wanted, formula, p, q, divisor, count):
    """dloss, the inputs and the count of `fwd` -> gradients of a, b and c, None if not wanted.

    `wanted` has (shape, dtype) or None for each. An input that the gradients do not read may be
    None. The gradient of a broadcast input has the broadcast shape, in fp32; autograd sums it.
    """
    reduce = divisor is not None
    found, (g, *read) = walk(None if reduce else dloss, *inputs)
    grads = [
        w if w is None else found.like(w[1] if w[0] == found.shape else torch.float32, dloss.device)
        for w in wanted
    ]
    D1, D2, *steps = found.addressing
    config = _config(_narrow((*read, *grads)))
    _loss_bwd_kernel(
        (cdiv(found.n, config["BLOCK"]),), dloss if reduce else g, *read, count, *grads, found.n,
        divisor or 1, D1, D2, *steps, p, q, FORMULA=globals()[formula], REDUCE=reduce,
        WIDE=found.wide, **config,
    )  # fmt: skip
    return grads
