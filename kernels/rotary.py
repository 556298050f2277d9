"""Rotary embedding: each pair of columns k and K + k of a row is turned by an angle.

    y[k]  = x[k] cos[k] - x[K + k] sin[k]        y[K + k]  = x[K + k] cos[K + k] + x[k] sin[K + k]
    dx[k] = dy[k] cos[k] + dy[K + k] sin[K + k]  dx[K + k] = dy[K + k] cos[K + k] - dy[k] sin[k]

See arXiv:2104.09864, section 3.4. K is half of the columns. cos and sin are broadcast.
Memory-bound; passes over the elements (R read, W write):

    stock   two products, a sum, and a copy with the halves changed, of which one is negated: 5.5R
            4.5W forward, and about as many backward
    here    1R 1W; 1R 1W
"""

import math

import triton.language as tl

from fastnn.kernels._config import tunable
from fastnn.kernels._launch import kernel
from fastnn.kernels._sizes import cdiv, next_power_of_2

LONGEST = 2048  # columns in half a row
_SIZES = ["M", "K_units", "J", "L"]


@kernel(do_not_specialize=_SIZES)
def _rotary_kernel(
    X, COS, SIN, Y, M, K_units, J, L, x_i: tl.int64, x_j: tl.int64, x_l: tl.int64, y_i: tl.int64,
    y_j: tl.int64, y_l: tl.int64, c_i: tl.int64, c_j: tl.int64, c_l: tl.int64, s_i: tl.int64,
    s_j: tl.int64, s_l: tl.int64, UNIT: tl.constexpr, BACK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program turns a tile of BLOCK_M complete rows; with BACK, by the opposite angles.

    X, COS, SIN, Y (I, J, L, 2 K): float. Their strides are in units of UNIT, and K is, too. M is
    the number of rows (i, j, l).
    """
    K = K_units * UNIT  # so that the compiler sees the factor
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)[None, :]
    mask = (m < M)[:, None] & (k < K)
    n = m % L
    j = m // L % J
    i = m // L // J
    x = ((i * x_i + j * x_j + n * x_l) * UNIT)[:, None] + k
    c = ((i * c_i + j * c_j + n * c_l) * UNIT)[:, None] + k
    s = ((i * s_i + j * s_j + n * s_l) * UNIT)[:, None] + k
    y = ((i * y_i + j * y_j + n * y_l) * UNIT)[:, None] + k
    first = tl.load(X + x, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(X + x + K, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(COS + c, mask=mask, other=0.0).to(tl.float32)
    cos2 = tl.load(COS + c + K, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(SIN + s, mask=mask, other=0.0).to(tl.float32)
    sin2 = tl.load(SIN + s + K, mask=mask, other=0.0).to(tl.float32)
    if BACK:
        one = first * cos + second * sin2
        two = second * cos2 - first * sin
    else:
        one = first * cos - second * sin
        two = second * cos2 + first * sin2
    tl.store(Y + y, one.to(Y.dtype.element_ty), mask=mask)
    tl.store(Y + y + K, two.to(Y.dtype.element_ty), mask=mask)


@tunable("BLOCK_M")
def _config(K, unit):
    """A thread has 8 pairs, or 4 if they are accessed one by one."""
    block = next_power_of_2(K)
    rows = max(1, (1024 if unit > 1 else 512) // block)
    return {"BLOCK_M": rows, "BLOCK_K": block, "num_warps": 4 if rows * block <= 1024 else 8}


def turn(x, cos, sin, y, back=False):
    """x, y (..., 2 K), at most four dimensions; cos and sin broadcast to x. Fills y.

    All have unit stride in the last dimension, and one dtype. `back` turns by the opposite angles.
    """
    K = x.shape[-1] // 2
    # Rows go by the memory order of x.
    order = sorted(range(x.dim() - 1), key=lambda d: -x.stride(d))
    more = [0] * (3 - len(order))
    sizes = [1 for _ in more] + [x.shape[d] for d in order]
    strides: list[int] = []
    for t in (x, y, cos.expand(x.shape), sin.expand(x.shape)):
        strides += more + [t.stride(d) for d in order]
    unit = math.gcd(K, *strides, 8)
    config = _config(K, unit)
    M = math.prod(sizes)
    _rotary_kernel(
        (cdiv(M, config["BLOCK_M"]),), x, cos, sin, y, M, K // unit, *sizes[1:],
        *(s // unit for s in strides), UNIT=unit, BACK=back, **config,
    )  # fmt: skip
