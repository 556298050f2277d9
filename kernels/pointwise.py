"""Pointwise activations: one kernel per direction, with the formula as a constexpr function.

    y[i] = f(x[i]; a, b)        dx[i] = dy[i] * f'(s[i]; a, b)

where s is what the formula's derivative is written in: the input x, or the output y.
Memory-bound: forward 1R 1W, backward 2R 1W over the elements, as stock. Tensors are walked in
storage order, so any dense layout goes through without a copy.
"""

import torch
import triton
import triton.language as tl
from fastnn.kernels._launch import kernel
from fastnn.kernels._tl import dense_like
from triton.language.extra import libdevice


@triton.jit
def relu(x, a, b):
    return tl.where(x <= 0, 0.0, x)  # this way round, nan passes through


@triton.jit
def relu_grad(y, a, b):
    return tl.where(y <= 0, 0.0, 1.0)


@triton.jit
def gelu(x, a, b):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_grad(x, a, b):
    cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def gelu_tanh(x, a, b):
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return 0.5 * x * (1.0 + libdevice.tanh(inner))


@triton.jit
def gelu_tanh_grad(x, a, b):
    square = x * x
    t = libdevice.tanh(0.7978845608028654 * (x + 0.044715 * x * square))
    slope = 0.7978845608028654 * (1.0 + 0.134145 * square)
    return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope


@kernel(do_not_specialize=["n"])
def _pointwise_fwd_kernel(X, Y, n: tl.int64, a, b, FORMULA: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    X += start
    Y += start
    offs = tl.arange(0, BLOCK)
    if start + BLOCK <= n:  # without a mask, so that accesses are 128 bits wide for every n
        x = tl.load(X + offs).to(tl.float32)
        tl.store(Y + offs, FORMULA(x, a, b).to(Y.dtype.element_ty))
    else:
        mask = offs < n - start
        x = tl.load(X + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(Y + offs, FORMULA(x, a, b).to(Y.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["n"])
def _pointwise_bwd_kernel(DY, S, DX, n: tl.int64, a, b, FORMULA: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    DY += start
    S += start
    DX += start
    offs = tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        dy = tl.load(DY + offs).to(tl.float32)
        s = tl.load(S + offs).to(tl.float32)
        tl.store(DX + offs, (dy * FORMULA(s, a, b)).to(DX.dtype.element_ty))
    else:
        mask = offs < n - start
        dy = tl.load(DY + offs, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(S + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(DX + offs, (dy * FORMULA(s, a, b)).to(DX.dtype.element_ty), mask=mask)


BLOCK = 1024


def fwd(x, formula, a=0.0, b=0.0, out_dtype=None, inplace=False):
    """x, any shape and strides -> y = formula(x; a, b), laid out as stock's; in x if `inplace`."""
    y = torch.empty_like(x, dtype=out_dtype)
    source = dense_like(x, y)
    target = x if inplace and source is x else y
    n = x.numel()
    _pointwise_fwd_kernel(
        (triton.cdiv(n, BLOCK),), source, target, n, float(a), float(b),
        FORMULA=globals()[formula], BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    if inplace and target is not x:
        return x.copy_(y)
    return target


def bwd(dy, saved, formula, a=0.0, b=0.0, out_dtype=None):
    """dy and the saved input or output, same shape -> dx in `out_dtype`, default dy's."""
    dx = torch.empty_like(saved, dtype=out_dtype or dy.dtype)
    n = dx.numel()
    _pointwise_bwd_kernel(
        (triton.cdiv(n, BLOCK),), dense_like(dy, dx), dense_like(saved, dx), dx, n,
        float(a), float(b), FORMULA=globals()[formula + "_grad"], BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return dx
