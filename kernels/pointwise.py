"""Pointwise activations: one kernel per direction, with the formula as a constexpr function.

    y[i] = f(x[i]; a, b)        dx[i] = f'(dy[i], s[i]; a, b)

s is the input x or the output y, whichever the derivative's formula takes. Each formula is in this
file once, beside its derivative. The op that uses them says what the parameters a and b are.
Memory-bound: forward 1R 1W, backward 2R 1W over the elements, as in PyTorch. Tanhshrink and
Softsign are chains of kernels in PyTorch, 8R 5W and 18R 11W in all; here they take 3R 3W and 3R 2W.
Tensors are processed in storage order, so any dense layout works without a copy.

Comparisons are written as in ATen (`x <= t`, or `x > t`), so that a nan takes the same branch.
Where ATen selects a zero gradient, so do we, because 0 * inf would be nan.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from fastnn.kernels._config import lanes, tunable
from fastnn.kernels._launch import kernel
from fastnn.kernels._libdevice import expm1
from fastnn.kernels._libdevice import tanh as _tanh
from fastnn.kernels._sizes import cdiv
from fastnn.kernels._tl import dense_like, empty_as

# ---- formulas ---------------------------------------------------------------------------------
#
# We use libdevice.exp, because the relative error of tl.exp grows with |x| and shows in the tails.
# We use div_rn, because "/" has an error of up to two units in the last place.


@triton.jit
def logistic(x):
    return tl.div_rn(1.0, 1.0 + libdevice.exp(-x))


@triton.jit
def _clamp(x, low, high):
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _nan_if_inf(value, x):
    """`value`, but nan if x is infinite: there PyTorch's chain of kernels computes inf - inf."""
    return tl.where(tl.abs(x) == float("inf"), float("nan"), value)


@triton.jit
def relu(x, a, b):
    return tl.where(x < 0, 0.0, x)  # -0.0 stays -0.0


@triton.jit
def relu_grad(dy, y, a, b):
    return tl.where(y <= 0, 0.0, dy)


@triton.jit
def threshold(x, a, b):
    return tl.where(x <= a, b, x)


@triton.jit
def threshold_grad(dy, x, a, b):
    return tl.where(x <= a, 0.0, dy)


@triton.jit
def leaky_relu(x, a, b):
    return tl.where(x > 0, x, x * a)


@triton.jit
def leaky_relu_grad(dy, s, a, b):
    return tl.where(s > 0, dy, dy * a)


@triton.jit
def elu(x, a, b):
    return tl.where(x > 0, x, a * expm1(x * b))


@triton.jit
def elu_grad(dy, x, a, b):
    return tl.where(x <= 0, dy * b * a * libdevice.exp(x * b), dy)


@triton.jit
def elu_grad_of_y(dy, y, a, b):
    return tl.where(y <= 0, dy * b * (y + a), dy)


@triton.jit
def selu(x, a, b):
    return tl.where(x > 0, 1.0507009873554805 * x, 1.7580993408473766 * expm1(x))


@triton.jit
def selu_grad(dy, x, a, b):
    return dy * tl.where(x <= 0, 1.7580993408473766 * libdevice.exp(x), 1.0507009873554805)


@triton.jit
def selu_grad_of_y(dy, y, a, b):
    return dy * tl.where(y <= 0, y + 1.7580993408473766, 1.0507009873554805)


@triton.jit
def hardtanh(x, a, b):
    # What is within the limits stays as it is: `tl.maximum` would make 0.0 of -0.0.
    return tl.where((x >= a) & (x <= b), x, _clamp(x, a, b))


@triton.jit
def hardtanh_grad(dy, x, a, b):
    return tl.where((x <= a) | (x >= b), 0.0, dy)


@triton.jit
def hardsigmoid(x, a, b):
    return _clamp(x + 3.0, 0.0, 6.0) * 0.16666666666666666


@triton.jit
def hardsigmoid_grad(dy, x, a, b):
    return tl.where((x > -3.0) & (x < 3.0), dy * 0.16666666666666666, 0.0)


@triton.jit
def hardswish(x, a, b):
    return x * _clamp(x + 3.0, 0.0, 6.0) * 0.16666666666666666


@triton.jit
def hardswish_grad(dy, x, a, b):
    middle = dy * (x * 0.3333333333333333 + 0.5)
    return tl.where(x <= -3.0, 0.0, tl.where(x < 3.0, middle, dy))


@triton.jit
def hardshrink(x, a, b):
    return tl.where((x >= -a) & (x <= a), 0.0, x)


@triton.jit
def hardshrink_grad(dy, x, a, b):
    return tl.where((x >= -a) & (x <= a), 0.0, dy)


@triton.jit
def softshrink(x, a, b):
    return tl.where(x > a, x - a, tl.where(x < -a, x + a, x * 0.0))  # a nan stays nan


@triton.jit
def softshrink_grad(dy, x, a, b):
    return tl.where((x >= -a) & (x <= a), 0.0, dy)


@triton.jit
def gelu(x, a, b):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_grad(dy, x, a, b):
    cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return dy * (cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x))


@triton.jit
def gelu_tanh(x, a, b):
    # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), which does not cancel where x is far below 0.
    return tl.div_rn(x, 1.0 + libdevice.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def gelu_tanh_grad(dy, x, a, b):
    # For |x| > 100, q is 0. The square is limited there: else it may be inf, and q * inf is nan.
    square = tl.minimum(x * x, 10000.0)
    e = libdevice.exp(-tl.abs(1.5957691216057308 * (x + 0.044715 * x * square)))
    p = tl.div_rn(1.0, 1.0 + e)
    q = e * p  # p and q are the sigmoid of 2 |u| and of -2 |u|
    slope = 1.5957691216057308 * (1.0 + 0.134145 * square)
    return dy * (tl.where(x < 0, q, p) + x * (slope * (p * q)))


@triton.jit
def silu(x, a, b):
    return tl.div_rn(x, 1.0 + libdevice.exp(-x))


@triton.jit
def silu_grad(dy, x, a, b):
    s = logistic(x)
    return dy * s * (1.0 + x * (1.0 - s))


@triton.jit
def mish(x, a, b):
    # tanh(log1p(e)) = e (e + 2) / (e (e + 2) + 2) is exact to rounding in both tails. The quotient
    # is already 1 long before e * e overflows.
    e = libdevice.exp(x)
    n = e * (e + 2.0)
    return x * tl.where(x > 20.0, 1.0, tl.div_rn(n, n + 2.0))


@triton.jit
def mish_grad(dy, x, a, b):
    e = libdevice.exp(x)
    n = e * (e + 2.0)
    t = tl.where(x > 20.0, 1.0, tl.div_rn(n, n + 2.0))
    return dy * (t + x * logistic(x) * (1.0 - t) * (1.0 + t))


@triton.jit
def sigmoid(x, a, b):
    return logistic(x)


@triton.jit
def sigmoid_grad(dy, y, a, b):
    return dy * (1.0 - y) * y


@triton.jit
def tanh(x, a, b):
    return _tanh(x)


@triton.jit
def tanh_grad(dy, y, a, b):
    return dy * (1.0 - y * y)


@triton.jit
def tanhshrink(x, a, b):
    return x - _tanh(x)


@triton.jit
def tanhshrink_grad(dy, t, a, b):  # t = tanh(x), which is what PyTorch keeps
    return _nan_if_inf(dy * t * t, dy) + 0.0  # a zero is 0.0, as that of PyTorch's sum


@triton.jit
def softsign(x, a, b):
    return tl.div_rn(x, 1.0 + tl.abs(x))


@triton.jit
def softsign_grad(dy, x, a, b):
    d = 1.0 + tl.abs(x)
    return _nan_if_inf(_nan_if_inf(tl.div_rn(dy, d * d), dy), x)


@triton.jit
def log1p_of_share(t):
    """log1p(t) for t from 0 to 1, as exp(-|x|) is: t + t * t * q(t), a third of libdevice.log1p.

    q is the polynomial of degree 9 with the smallest relative error of the result, 8e-10. A
    subnormal t is the result; libdevice.fma would make 0 of it.
    """
    q = tl.fma(t, 0.002072949295280671, -0.0136314881965518)
    q = tl.fma(q, t, 0.041981376707553864)
    q = tl.fma(q, t, -0.08307408541440964)
    q = tl.fma(q, t, 0.12467123568058014)
    q = tl.fma(q, t, -0.16129335761070251)
    q = tl.fma(q, t, 0.19897931814193726)
    q = tl.fma(q, t, -0.24988579750061035)
    q = tl.fma(q, t, 0.33332690596580505)
    q = tl.fma(q, t, -0.49999988079071045)
    return tl.fma(t * t, q, t)


@triton.jit
def _over(y, a):
    """y / a for a scalar `a`, rounded once: a third of the instructions of `div_rn` an element.

    What y * r lacks is added. Where `a` is so small or so large that r or a product is no normal
    number, it is a division.
    """
    r = tl.div_rn(1.0, a)
    quotient = y * r
    quotient = tl.fma(tl.fma(-quotient, a, y), r, quotient)
    if (tl.abs(a) < 1e-30) | (tl.abs(a) > 1e30):
        quotient = tl.div_rn(y, a)
    return quotient


@triton.jit
def softplus(x, a, b):
    z = x * a
    # Where exp(z) is at most 1, log1p of it is short. For larger z, log1p(e) = z + log1p(1 / e).
    y = tl.where(z > 0, z, 0.0) + log1p_of_share(libdevice.exp(-tl.abs(z)))
    y = _over(y, a)
    if not (b <= 88.7228317260742):  # else such a z is above b
        y = tl.where(z > 88.7228317260742, tl.div_rn(float("inf"), a), y)  # as exp(z) in PyTorch
    return tl.where(z > b, x, y)


@triton.jit
def softplus_grad(dy, x, a, b):
    e = libdevice.exp(x * a)
    return tl.where(x * a > b, dy, dy * tl.div_rn(e, e + 1.0))


@triton.jit
def logsigmoid(x, a, b):
    low = tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return low - log1p_of_share(libdevice.exp(-tl.abs(x)))


@triton.jit
def logsigmoid_grad(dy, x, a, b):
    e = libdevice.exp(-tl.abs(x))
    return dy * tl.div_rn(tl.where(x < 0, 1.0, e), 1.0 + e)


@triton.jit
def gumbel(x, e, a, b):
    """(x + g) / a, where e has the exponential distribution, so that g = -log(e) has Gumbel's."""
    z = x - tl.log(e)
    return tl.div_rn(z, tl.broadcast_to(a, z.shape))


# ---- kernels ----------------------------------------------------------------------------------


@kernel(do_not_specialize=["n"])
def _pointwise_fwd_kernel(
    X, Y, KEPT, n: tl.int64, a, b, FORMULA: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr
):
    """A program applies FORMULA to one block of BLOCK elements.

    X, Y, KEPT (n,): float. KEEP(x) is written to KEPT, unless KEEP is None.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    X += start
    Y += start
    KEPT += start
    offs = tl.arange(0, BLOCK)
    if start + BLOCK <= n:  # no mask, so that accesses are 128 bits wide for every n
        x = tl.load(X + offs).to(tl.float32)
        tl.store(Y + offs, FORMULA(x, a, b).to(Y.dtype.element_ty))
        if KEEP is not None:
            tl.store(KEPT + offs, KEEP(x, a, b).to(KEPT.dtype.element_ty))
    else:
        mask = offs < n - start
        x = tl.load(X + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(Y + offs, FORMULA(x, a, b).to(Y.dtype.element_ty), mask=mask)
        if KEEP is not None:
            tl.store(KEPT + offs, KEEP(x, a, b).to(KEPT.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["n"])
def _pointwise_bwd_kernel(DY, S, DX, n: tl.int64, a, b, FORMULA: tl.constexpr, BLOCK: tl.constexpr):
    """A program applies a gradient's FORMULA to one block of BLOCK elements.

    DY, S, DX (n,): float; S is the saved input or output.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    DY += start
    S += start
    DX += start
    offs = tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        dy = tl.load(DY + offs).to(tl.float32)
        s = tl.load(S + offs).to(tl.float32)
        tl.store(DX + offs, FORMULA(dy, s, a, b).to(DX.dtype.element_ty))
    else:
        mask = offs < n - start
        dy = tl.load(DY + offs, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(S + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(DX + offs, FORMULA(dy, s, a, b).to(DX.dtype.element_ty), mask=mask)


# ---- launchers --------------------------------------------------------------------------------


@tunable("BLOCK")
def _config(itemsize):
    # 8 elements per lane: with more, the divisions of a formula take too many registers. In 16-bit
    # dtypes, 8 elements are one 16-byte access.
    return {"BLOCK": 1024, "num_warps": 128 // lanes() if itemsize == 2 else 4}


def _launch_fwd(source, target, kept, formula, keep, a, b):
    n = source.numel()
    config = _config(source.element_size())
    _pointwise_fwd_kernel(
        (cdiv(n, config["BLOCK"]),), source, target, kept, n, a, b,
        FORMULA=globals()[formula], KEEP=keep and globals()[keep], **config,
    )  # fmt: skip


def fwd(x, formula, a=0.0, b=0.0, out_dtype=None):
    """x, any shape and strides -> y = formula(x; a, b), with the layout of PyTorch's result."""
    y = empty_as(x, out_dtype)
    _launch_fwd(dense_like(x, y), y, y, formula, None, a, b)
    return y


def fwd_into(x, source, formula, a=0.0, b=0.0):
    """x = formula(source; a, b), in place -> x. `source` is x itself, or a copy of it."""
    if not x.is_contiguous() and x.stride() != empty_as(x, device="meta").stride():
        return x.copy_(fwd(source, formula, a, b))
    _launch_fwd(dense_like(source, x), x, x, formula, None, a, b)
    return x


def fwd_keep(x, formula, keep):
    """x, any shape and strides -> formula(x), keep(x), laid out as in PyTorch."""
    y, kept = empty_as(x), empty_as(x)
    _launch_fwd(dense_like(x, y), y, kept, formula, keep, 0.0, 0.0)
    return y, kept


def bwd(dy, saved, gradient, a=0.0, b=0.0, out_dtype=None):
    """dy and the saved input or output, of one shape -> dx in `out_dtype`, default dy's."""
    dx = empty_as(saved, out_dtype or dy.dtype)
    n = dx.numel()
    config = _config(dx.element_size())
    _pointwise_bwd_kernel(
        (cdiv(n, config["BLOCK"]),), dense_like(dy, dx), dense_like(saved, dx), dx, n, a, b,
        FORMULA=globals()[gradient], **config,
    )  # fmt: skip
    return dx
