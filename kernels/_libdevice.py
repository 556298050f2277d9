"""Functions of libdevice that lose subnormal numbers on an NVIDIA GPU, each with what keeps them.

Triton has libdevice take a subnormal number as 0, and most of its functions do. A kernel calls
`libdevice.exp`, which keeps all numbers, and for everything else a function of this file
(tests/test_layout.py). tests/test_ptx.py runs the compiled functions. The interpreter and AMD GPUs
lose nothing.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

# expm1, log1p and tanh of a subnormal x are x, and they are 0 only at 0.


@triton.jit
def expm1(x):
    y = libdevice.expm1(x)
    return tl.where(y == 0, x, y)


@triton.jit
def log1p(x):
    y = libdevice.log1p(x)
    return tl.where(y == 0, x, y)


@triton.jit
def tanh(x):
    y = libdevice.tanh(x)
    return tl.where(y == 0, x, y)


@triton.jit
def power(x, p):
    """x**p for a scalar p.

    libdevice.pow is wrong for a subnormal x, and makes 0 of a subnormal result. Such an x, and one
    whose result is below 2**-120, is multiplied by a power of two, and the result by the power of
    its inverse, in two halves. Above |p| = 240, a result that is subnormal stays 0.
    """
    size = tl.abs(p)
    shift = tl.where(size < 6, 32.0, tl.where(size < 60, 4.0, 1.0))
    scale = tl.where(size < 6, 4294967296.0, tl.where(size < 60, 16.0, 2.0))  # 2**shift
    limit = tl.where(size < 240, tl.exp2(120.0 / tl.maximum(size, 1.0)), 8.507059173023462e37)
    least = 1.1754943508222875e-38
    r = tl.abs(x)
    up = r < tl.where(p > 0, tl.div_rn(1.0, limit), least)
    down = r > tl.where(p < 0, limit, float("inf"))
    z = x * tl.where(up, scale, tl.where(down, tl.div_rn(1.0, scale), 1.0))
    exponent = 0.5 * shift * p  # exact
    half = tl.where(up, tl.exp2(-exponent), tl.where(down, tl.exp2(exponent), 1.0))
    return libdevice.pow(z, p) * half * half
