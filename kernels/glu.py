"""Gated units: GLU of the halves of one tensor, and an activation of one tensor times another.

GLU: y = a * sigmoid(b), where a and b are the halves of x along a dimension.

    da = dy * sigmoid(b)        db = dy * a * sigmoid(b) * (1 - sigmoid(b))

Memory-bound, as in PyTorch: the forward reads x and writes half as much; the backward reads x and
dy, half as much as x, and writes dx. Both halves are read in place, as R rows of L elements, and
both gradients are written to their places in one tensor.

Product with an activation (SwiGLU, GEGLU, ReGLU): y = f(x; a, b) * z, f a formula of pointwise.py.

    dx = f'(dy * z; a, b)       dz = dy * f(x; a, b)

Memory-bound: forward 2R 1W, backward 3R 2W. PyTorch keeps f(x) as well, and takes 3R 2W and 6R 3W.
If x and z are the halves of one tensor, they are read in place as those of GLU, and both gradients
are written to their places; PyTorch takes 2R 2W more, since it joins them. If that tensor contains
a bias, its gradient, the sum over the rows, is taken in the same pass; PyTorch takes 2R more.
"""

import math

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from fastnn.kernels import pointwise
from fastnn.kernels._config import lanes, tunable
from fastnn.kernels._gpus import multiprocessors
from fastnn.kernels._launch import kernel
from fastnn.kernels._partials import in_order
from fastnn.kernels._sizes import cdiv, next_power_of_2
from fastnn.kernels._tl import dense_like, empty_as


@triton.jit
def _tile(R, L, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr):
    """This program's first row and column, and the rows and columns of its tile."""
    blocks = tl.cdiv(L, BLOCK_L)
    r = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R
    first = tl.program_id(0) % blocks * BLOCK_L
    rows = tl.arange(0, BLOCK_R)[:, None].to(tl.int64)
    cols = tl.arange(0, BLOCK_L)[None, :]
    return r, first, rows, cols


@kernel(do_not_specialize=["R"])
def _glu_fwd_kernel(X, Y, R, L, half, stride_xr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr):
    """A program computes one tile of y, of BLOCK_R rows by BLOCK_L elements.

    X (R, 2, L): float; its rows are stride_xr apart, the halves of a row `half` apart. Y (R, L):
    float, contiguous.
    """
    r, first, rows, cols = _tile(R, L, BLOCK_R, BLOCK_L)
    X += r * stride_xr + first + rows * stride_xr + cols
    Y += r * L + first + rows * L + cols
    if (r + BLOCK_R <= R) & (first + BLOCK_L <= L):  # no mask, for 128-bit accesses
        a = tl.load(X).to(tl.float32)
        b = tl.load(X + half).to(tl.float32)
        tl.store(Y, tl.div_rn(a, 1.0 + libdevice.exp(-b)).to(Y.dtype.element_ty))
    else:
        mask = (rows < R - r) & (cols < L - first)
        a = tl.load(X, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(X + half, mask=mask, other=0.0).to(tl.float32)
        y = tl.div_rn(a, 1.0 + libdevice.exp(-b))
        tl.store(Y, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _grads(dy, a, b):
    s = tl.div_rn(1.0, 1.0 + libdevice.exp(-b))
    return dy * s, dy * a * s * (1.0 - s)


@kernel(do_not_specialize=["R"])
def _glu_bwd_kernel(DY, X, DX, R, L, half, stride_xr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr):
    """A program computes both halves of dx for one tile of BLOCK_R rows by BLOCK_L elements.

    DY (R, L): float, contiguous. X (R, 2, L): float, as in the forward. DX (R, 2, L): float,
    contiguous.
    """
    r, first, rows, cols = _tile(R, L, BLOCK_R, BLOCK_L)
    X += r * stride_xr + first + rows * stride_xr + cols
    DY += r * L + first + rows * L + cols
    DX += r * L * 2 + first + rows * L * 2 + cols
    if (r + BLOCK_R <= R) & (first + BLOCK_L <= L):
        a = tl.load(X).to(tl.float32)
        b = tl.load(X + half).to(tl.float32)
        da, db = _grads(tl.load(DY).to(tl.float32), a, b)
        tl.store(DX, da.to(DX.dtype.element_ty))
        tl.store(DX + L, db.to(DX.dtype.element_ty))
    else:
        mask = (rows < R - r) & (cols < L - first)
        a = tl.load(X, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(X + half, mask=mask, other=0.0).to(tl.float32)
        da, db = _grads(tl.load(DY, mask=mask, other=0.0).to(tl.float32), a, b)
        tl.store(DX, da.to(DX.dtype.element_ty), mask=mask)
        tl.store(DX + L, db.to(DX.dtype.element_ty), mask=mask)


@tunable("BLOCK_R")
def _config(L, itemsize):
    tile = 4096 // itemsize  # of each half: 32 bytes per lane of 4 warps
    block_l = min(next_power_of_2(L), tile)
    # If each lane has a row of its own, it needs an address of its own, and 4 warps spill on sm_80.
    warps = 4 if block_l == tile else 8
    return {"BLOCK_R": tile // block_l, "BLOCK_L": block_l, "num_warps": warps}


def _grid(R, L, config):
    return (cdiv(R, config["BLOCK_R"]) * cdiv(L, config["BLOCK_L"]),)


def _row_stride(x, order, at):
    """The stride between rows, if dimensions `order[:at]` are taken as one dimension of rows.

    None if these dimensions, or the dimensions after them, cannot be taken as one.
    """
    expected = 1
    for d in reversed(order[at + 1 :]):
        if x.shape[d] != 1 and x.stride(d) != expected:
            return None
        expected *= x.shape[d]
    if x.shape[order[at]] > 2 and x.stride(order[at]) != expected:
        return None
    stride = None
    for d in reversed(order[:at]):
        if x.shape[d] == 1:
            continue
        if stride is None:
            stride = x.stride(d)
        elif x.stride(d) != expected:
            return None
        expected = x.stride(d) * x.shape[d]
    return stride or 0


def _plan(x, dim, y):
    """(x or a copy, order, R, L, stride between rows).

    order: the dimensions in the memory order of y, the dense result.
    """
    order = sorted(range(x.dim()), key=lambda d: -x.stride(d))
    if not y.permute(order).is_contiguous():
        order = sorted(range(x.dim()), key=lambda d: -y.stride(d))
    at = order.index(dim)
    R = math.prod(x.shape[d] for d in order[:at])
    L = y.numel() // R
    stride = _row_stride(x, order, at)
    if stride is None:
        x = _ordered(x, order).permute(_inverse(order))
        stride = 2 * L
    return x, order, R, L, stride


def _ordered(t, order):
    return t.permute(order).contiguous()


def _inverse(order):
    return sorted(range(len(order)), key=order.__getitem__)


def _empty_half(x, dim, device=None):
    return empty_as(x.narrow(dim, 0, x.shape[dim] // 2), device=device)


def _forward(kernel, choose, x, dim, *numbers, **constants):
    y = _empty_half(x, dim)
    if y.numel():
        x, _, R, L, stride = _plan(x, dim, y)
        half = x.stride(dim) * y.shape[dim]
        config = choose(L, x.element_size())
        kernel(_grid(R, L, config), x, y, R, L, half, stride, *numbers, **constants, **config)
    return y


def _backward(kernel, choose, dy, x, dim, *numbers, **constants):
    y = _empty_half(x, dim, "meta")
    if not y.numel():
        return torch.empty_like(x)
    x, order, R, L, stride = _plan(x, dim, y)
    dx = torch.empty([x.shape[d] for d in order], dtype=x.dtype, device=x.device)
    half = x.stride(dim) * y.shape[dim]
    config = choose(L, x.element_size())
    kernel(
        _grid(R, L, config), _ordered(dy, order), x, dx, R, L, half, stride, *numbers,
        **constants, **config,
    )  # fmt: skip
    return dx.permute(_inverse(order))


def fwd(x, dim):
    """x, any strides, even size along `dim` -> y, half as large there, laid out as in PyTorch."""
    return _forward(_glu_fwd_kernel, _config, x, dim)


def bwd(dy, x, dim):
    """dy shaped as y, x -> dx, dense."""
    return _backward(_glu_bwd_kernel, _config, dy, x, dim)


# ---- an activation of one half times the other --------------------------------------------------


@kernel(do_not_specialize=["R"])
def _act_glu_fwd_kernel(
    X, Y, R, L, half, stride_xr, a, b,
    FORMULA: tl.constexpr, FIRST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """A program computes one tile of y, of BLOCK_R rows by BLOCK_L elements.

    X (R, 2, L): float; its rows are stride_xr apart, the halves of a row `half` apart. FIRST:
    whether FORMULA is of the first half. Y (R, L): float, contiguous.
    """
    r, first, rows, cols = _tile(R, L, BLOCK_R, BLOCK_L)
    X += r * stride_xr + first + rows * stride_xr + cols
    Y += r * L + first + rows * L + cols
    if (r + BLOCK_R <= R) & (first + BLOCK_L <= L):  # no mask, for 128-bit accesses
        x = tl.load(X if FIRST else X + half).to(tl.float32)
        z = tl.load(X + half if FIRST else X).to(tl.float32)
        tl.store(Y, (FORMULA(x, a, b) * z).to(Y.dtype.element_ty))
    else:
        mask = (rows < R - r) & (cols < L - first)
        x = tl.load(X if FIRST else X + half, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(X + half if FIRST else X, mask=mask, other=0.0).to(tl.float32)
        tl.store(Y, (FORMULA(x, a, b) * z).to(Y.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["R"])
def _act_glu_bwd_kernel(
    DY, X, DX, R, L, half, stride_xr, a, b,
    FORMULA: tl.constexpr, GRADIENT: tl.constexpr, OF_Y: tl.constexpr, FIRST: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """A program computes both halves of dx for one tile of BLOCK_R rows by BLOCK_L elements.

    DY (R, L): float, contiguous. X (R, 2, L): float, as in the forward. DX (R, 2, L): float,
    contiguous. OF_Y: whether GRADIENT takes the activation's result instead of its input.
    """
    r, first, rows, cols = _tile(R, L, BLOCK_R, BLOCK_L)
    X += r * stride_xr + first + rows * stride_xr + cols
    DY += r * L + first + rows * L + cols
    DX += r * L * 2 + first + rows * L * 2 + cols
    if (r + BLOCK_R <= R) & (first + BLOCK_L <= L):
        dy = tl.load(DY).to(tl.float32)
        x = tl.load(X if FIRST else X + half).to(tl.float32)
        y = FORMULA(x, a, b)
        tl.store(DX + L if FIRST else DX, (dy * y).to(DX.dtype.element_ty))
        dy *= tl.load(X + half if FIRST else X).to(tl.float32)
        dx = GRADIENT(dy, y if OF_Y else x, a, b)
        tl.store(DX if FIRST else DX + L, dx.to(DX.dtype.element_ty))
    else:
        mask = (rows < R - r) & (cols < L - first)
        dy = tl.load(DY, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(X if FIRST else X + half, mask=mask, other=0.0).to(tl.float32)
        y = FORMULA(x, a, b)
        tl.store(DX + L if FIRST else DX, (dy * y).to(DX.dtype.element_ty), mask=mask)
        dy *= tl.load(X + half if FIRST else X, mask=mask, other=0.0).to(tl.float32)
        dx = GRADIENT(dy, y if OF_Y else x, a, b)
        tl.store(DX if FIRST else DX + L, dx.to(DX.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["R", "L_units", "rows_each"])
def _act_glu_bwd_sums_kernel(
    DY, X, DX, PARTIALS, R, L_units, rows_each, a, b,
    UNIT: tl.constexpr, FORMULA: tl.constexpr, GRADIENT: tl.constexpr, OF_Y: tl.constexpr,
    FIRST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """A program computes both halves of dx for rows_each rows of BLOCK_L columns, and their sums.

    It loops over the rows. DY (R, L): float, contiguous. X, DX (R, 2, L): float, contiguous.
    PARTIALS (G, 2, L): fp32 sums over the rows of a program. OF_Y: whether GRADIENT takes the
    activation's result instead of its input.
    """
    L = L_units * UNIT  # so that the compiler sees the factor
    first = tl.program_id(0) * BLOCK_L
    r = tl.program_id(1).to(tl.int64) * rows_each
    rows = tl.arange(0, BLOCK_R)[:, None]
    cols = tl.arange(0, BLOCK_L)[None, :]
    DY += r * L + first
    X += r * L * 2 + first
    DX += r * L * 2 + first
    left = tl.minimum(rows_each, R - tl.program_id(1) * rows_each)
    act = tl.zeros((BLOCK_R, BLOCK_L), tl.float32)
    linear = tl.zeros((BLOCK_R, BLOCK_L), tl.float32)
    for i in range(0, left, BLOCK_R):
        mask = (rows < left - i) & (cols < L - first)
        at = rows * 2 * L + cols
        dy = tl.load(DY + rows * L + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(X + at if FIRST else X + L + at, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(X + L + at if FIRST else X + at, mask=mask, other=0.0).to(tl.float32)
        y = FORMULA(x, a, b)
        dz = dy * y
        dx = GRADIENT(dy * z, y if OF_Y else x, a, b)
        tl.store(DX + L + at if FIRST else DX + at, dz.to(DX.dtype.element_ty), mask=mask)
        tl.store(DX + at if FIRST else DX + L + at, dx.to(DX.dtype.element_ty), mask=mask)
        linear += tl.where(mask, dz, 0.0)  # past the edge f(0) may be anything
        act += tl.where(mask, dx, 0.0)
        DY += BLOCK_R * L
        X += BLOCK_R * L * 2
        DX += BLOCK_R * L * 2
    PARTIALS += tl.program_id(1).to(tl.int64) * L * 2 + first
    there = tl.arange(0, BLOCK_L) < L - first
    one, two = (act, linear) if FIRST else (linear, act)
    tl.store(PARTIALS + tl.arange(0, BLOCK_L), tl.sum(one, 0), mask=there)
    tl.store(PARTIALS + L + tl.arange(0, BLOCK_L), tl.sum(two, 0), mask=there)


@tunable("BLOCK_R")
def _act_glu_config(L, itemsize):
    tile = 2048 // itemsize  # of each half: 16 bytes per lane of 4 warps
    block_l = min(next_power_of_2(L), tile // 4)  # then a warp has one row
    return {"BLOCK_R": tile // block_l, "BLOCK_L": block_l, "num_warps": 4}


def act_glu_fwd(x, dim, formula, first, a=0.0, b=0.0):
    """x as for `fwd` -> y = formula(one half; a, b) * the other half. `first`: which half."""
    return _forward(
        _act_glu_fwd_kernel, _act_glu_config, x, dim, a, b,
        FORMULA=getattr(pointwise, formula), FIRST=first,
    )  # fmt: skip


def act_glu_bwd(dy, x, dim, formula, gradient, of_y, first, a=0.0, b=0.0):
    """dy shaped as y, x -> dx, dense. `of_y`: `gradient` takes the activation's result."""
    return _backward(
        _act_glu_bwd_kernel, _act_glu_config, dy, x, dim, a, b,
        FORMULA=getattr(pointwise, formula), GRADIENT=getattr(pointwise, gradient), OF_Y=of_y,
        FIRST=first,
    )  # fmt: skip


@tunable("BLOCK_R", "BLOCK_L")
def _sums_config(L, vector):
    """vector: how many elements an access has. Narrow ones need smaller tiles, or they spill."""
    block = min(128, next_power_of_2(L))
    return {"BLOCK_R": max(1, min(16, 256 * vector // block)), "BLOCK_L": block, "num_warps": 4}


def act_glu_bwd_sums(dy, x, formula, gradient, of_y, first, a=0.0, b=0.0):
    """dy, x contiguous, whose last dimension has the halves -> dx, and the sum of its rows."""
    L = x.shape[-1] // 2
    R = x.numel() // (2 * L)
    unit = math.gcd(L, 16 // x.element_size())
    config = _sums_config(L, unit)
    columns = cdiv(L, config["BLOCK_L"])
    # The partial sums are at most 1/64 of what is read.
    G = max(1, min(8 * multiprocessors(x.get_device()) // columns, cdiv(R, 64)))
    rows_each = cdiv(cdiv(R, G), config["BLOCK_R"]) * config["BLOCK_R"]
    G = cdiv(R, rows_each)
    dx = torch.empty_like(x)
    partials = x.new_empty((G, 2 * L), dtype=torch.float32)
    _act_glu_bwd_sums_kernel(
        (columns, G), dy, x, dx, partials, R, L // unit, rows_each, a, b, UNIT=unit,
        FORMULA=getattr(pointwise, formula), GRADIENT=getattr(pointwise, gradient), OF_Y=of_y,
        FIRST=first, **config,
    )  # fmt: skip
    return dx, in_order(partials, x.new_empty(2 * L))


# ---- an activation times a tensor ---------------------------------------------------------------


@kernel(do_not_specialize=["n"])
def _act_mul_fwd_kernel(X, Z, Y, n: tl.int64, a, b, FORMULA: tl.constexpr, BLOCK: tl.constexpr):
    """A program computes one block of BLOCK elements of y = FORMULA(x) * z. X, Z, Y (n,): float."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    X += start
    Z += start
    Y += start
    offs = tl.arange(0, BLOCK)
    if start + BLOCK <= n:  # no mask, for 128-bit accesses
        x = tl.load(X + offs).to(tl.float32)
        z = tl.load(Z + offs).to(tl.float32)
        tl.store(Y + offs, (FORMULA(x, a, b) * z).to(Y.dtype.element_ty))
    else:
        mask = offs < n - start
        x = tl.load(X + offs, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(Z + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(Y + offs, (FORMULA(x, a, b) * z).to(Y.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["n"])
def _act_mul_bwd_kernel(
    DY, X, Z, DX, DZ, n: tl.int64, a, b,
    FORMULA: tl.constexpr, GRADIENT: tl.constexpr, OF_Y: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program computes one block of BLOCK elements of dx and dz.

    DY, X, Z, DX, DZ (n,): float. OF_Y: whether GRADIENT takes the activation's result instead of x.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    DY += start
    X += start
    Z += start
    DX += start
    DZ += start
    offs = tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        dy = tl.load(DY + offs).to(tl.float32)
        x = tl.load(X + offs).to(tl.float32)
        y = FORMULA(x, a, b)
        tl.store(DZ + offs, (dy * y).to(DZ.dtype.element_ty))
        dy *= tl.load(Z + offs).to(tl.float32)
        dx = GRADIENT(dy, y if OF_Y else x, a, b)
        tl.store(DX + offs, dx.to(DX.dtype.element_ty))
    else:
        mask = offs < n - start
        dy = tl.load(DY + offs, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(X + offs, mask=mask, other=0.0).to(tl.float32)
        y = FORMULA(x, a, b)
        tl.store(DZ + offs, (dy * y).to(DZ.dtype.element_ty), mask=mask)
        dy *= tl.load(Z + offs, mask=mask, other=0.0).to(tl.float32)
        dx = GRADIENT(dy, y if OF_Y else x, a, b)
        tl.store(DX + offs, dx.to(DX.dtype.element_ty), mask=mask)


@tunable("BLOCK")
def _act_mul_config(itemsize):
    # As for an activation: 8 elements per lane, one 16-byte access in 16-bit dtypes.
    return {"BLOCK": 1024, "num_warps": 128 // lanes() if itemsize == 2 else 4}


def act_mul_fwd(x, z, formula, a=0.0, b=0.0):
    """x, z, dense and of one layout -> y = formula(x; a, b) * z, of that layout."""
    y = empty_as(x)
    n = y.numel()
    config = _act_mul_config(y.element_size())
    _act_mul_fwd_kernel(
        (cdiv(n, config["BLOCK"]),), dense_like(x, y), dense_like(z, y), y, n, a, b,
        FORMULA=getattr(pointwise, formula), **config,
    )  # fmt: skip
    return y


def act_mul_bwd(dy, x, z, formula, gradient, of_y, a=0.0, b=0.0):
    """dy, x, z of one shape -> dx, dz. `of_y`: `gradient` takes the activation's result, not x."""
    dx, dz = empty_as(x), empty_as(x)
    n = dx.numel()
    config = _act_mul_config(dx.element_size())
    _act_mul_bwd_kernel(
        (cdiv(n, config["BLOCK"]),), dense_like(dy, dx), dense_like(x, dx), dense_like(z, dx),
        dx, dz, n, a, b,
        FORMULA=getattr(pointwise, formula), GRADIENT=getattr(pointwise, gradient), OF_Y=of_y,
        **config,
    )  # fmt: skip
    return dx, dz
