"""Dropout of a branch, its addition to the residual, and the normalisation of the sum."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as stock

from fastnn import _rng, kernels
from fastnn._op import Function, Invalid, Stock, op, run, second_order
from fastnn.ops.dropout import Dropout, Noise, native_scales
from fastnn.ops.norm import FINFO_EPS, unfit


class How(NamedTuple):
    """What is done with the sum, and how the branch is dropped."""

    normalises: bool
    returns_sum: bool
    noise: Noise | None
    swapped: bool
    """The branch has its two leading dimensions swapped in memory. The noise follows that order."""
    eps: float = 0.0
    center: bool = True
    out_dtype: torch.dtype | None = None
    twice: bool = False
    """y is returned twice, and its gradient is the sum of two."""


def _random(noise: Noise | None):
    return (None, 0, 1.0) if noise is None else (noise.draw, noise.bound, noise.scale)


class ResidualNorm(Function):
    """z, x -> s = x + noise * z, y = norm(s), and y again if it is wanted twice.

    s is an output even if only y is wanted, so that a second derivative can pass through s. c is a
    bias that z contains, and gets the sum of z's gradient.
    """

    strided = ("ds",)

    @staticmethod
    def forward(ctx, z, x, weight, bias, c, how):
        wanted = any(ctx.needs_input_grad)
        state = None if how.noise is None else how.noise.draw.new_state(z)
        s, y, mean, rstd = kernels.residual_norm.fwd(
            z, x, weight, bias, how.eps, how.center, how.out_dtype, *_random(how.noise), state,
            how.swapped, wanted or how.returns_sum, how.normalises, wanted,
        )  # fmt: skip
        ctx.save_for_backward(s if how.normalises else None, weight, bias, mean, rstd, state)
        if how.noise is not None:
            how = how._replace(noise=how.noise.kept())
        ctx.rest = how, z.dtype, x.dtype, None if y is None else y.dtype, c is not None and c.dtype
        ctx.set_materialize_grads(False)
        if s is not None and not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(s)
        return (s, y, y.detach()) if how.twice else (s, y)

    @staticmethod
    def backward(ctx, ds, dy, more=None):
        s, weight, bias, mean, rstd, state = ctx.saved_tensors
        how, z_dtype, x_dtype, y_dtype, c_dtype = ctx.rest
        needs = ctx.needs_input_grad[:5]
        if dy is None:
            dy, more = more, None
        noise = how.noise
        if noise is not None:
            noise = noise._replace(draw=noise.draw.from_state(state), scale=noise.grad_scale)
        if dy is not None and not torch.is_grad_enabled():
            grads = kernels.residual_norm.bwd(
                dy, more, ds, s, weight, mean, rstd, *_random(noise), how.swapped,
                z_dtype if needs[0] else None, x_dtype if needs[1] else None,
                weight.dtype if needs[2] else None, bias.dtype if needs[3] else None,
                c_dtype if needs[4] else None,
            )  # fmt: skip
            return *grads, None
        dw = db = None
        if dy is not None:
            if more is not None:
                dy = dy + more

            def formula(s, *parameters):
                s = s.to(y_dtype)
                weight, bias = (t if t is None else t.to(y_dtype) for t in parameters)
                if how.center:
                    return stock.layer_norm(s, s.shape[-1:], weight, bias, how.eps)
                return stock.rms_norm(s, s.shape[-1:], weight, how.eps)

            through_y, dw, db = second_order(
                formula, (s, weight, bias), dy, (needs[0] or needs[1] or needs[4], *needs[2:4])
            )
            if through_y is not None:
                ds = through_y if ds is None else through_y + ds
        dz = dc = None
        if needs[0] or needs[4]:
            of_z = _dropped(ds.to(z_dtype), noise, how.swapped)
            dz = of_z if needs[0] else None
            dc = of_z.flatten(0, -2).sum(0, dtype=c_dtype) if needs[4] else None
        return dz, ds.to(x_dtype) if needs[1] else None, dw, db, dc, None


def _dropped(g, noise, swapped):
    if noise is None:
        return g
    g = run(Dropout, (g.transpose(0, 1) if swapped else g).contiguous(), noise, False)
    return g.transpose(0, 1) if swapped else g


# ---- The calls ----------------------------------------------------------------------------------


def _sum_dtype(z, x):
    return x.dtype if x.dtype == z.dtype else torch.float32


def _residual(x, keeps_layout):
    """x in a layout that the kernel takes, or why there is none."""
    if x.is_contiguous():
        return x
    like = torch.empty_like(x)  # has the layout of PyTorch's sum
    if x.dim() == 3 and x.stride(-1) == 1 and like.stride() == x.stride():
        return x
    if like.is_contiguous() or not keeps_layout:
        return x.contiguous()
    return Stock("layout", f"a residual with strides {x.stride()}")


def _fused(z, x, weight, bias, c, p, training, normalises, returns_sum, **norm):
    """(s, y), each None if it is not wanted, and y again with `twice`; or a refusal."""
    if z.shape != x.shape:
        return Stock("shape", f"a branch {tuple(z.shape)} and a residual {tuple(x.shape)}")
    if type(p) not in (float, int) or type(training) is not bool:
        return Stock("option", f"p={p!r}, training={training!r}")
    if not 0 <= p <= 1:
        return Invalid("option", f"p={p}")
    if not z.numel() or not z.dim():
        return Stock("empty", "no elements" if z.dim() else "0 dimensions")
    dtype = _sum_dtype(z, x)
    if not kernels.residual_norm.fits(z.shape[-1], dtype.itemsize):
        return Stock("size", f"rows of {z.shape[-1]:,} elements do not fit into registers")
    if why := too_many_rows(z):
        return why
    swapped = not z.is_contiguous()
    if swapped and (z.dim() != 3 or not z.transpose(0, 1).is_contiguous()):
        return Stock("layout", f"a branch with strides {z.stride()}")
    x = _residual(x, returns_sum)
    if isinstance(x, Stock):
        return x
    noise = None
    if training and p > 0:
        if z.numel() >= 2**31:
            return Stock("size", f"dropout of {z.numel():,} elements; 32 bits cannot index so many")
        bound = kernels._philox.bound(1.0 - p)
        if p == 1:
            noise = Noise(_rng.draw_nothing(z.numel(), z.get_device()), "elements", bound, 0.0, 0.0)
        else:
            if swapped and _rng.width(z) == 1:
                return Stock(
                    "layout", f"strides {z.stride()}: PyTorch does not draw in order of storage"
                )
            draw = _rng.draw_native(z)
            if isinstance(draw, str):
                return Stock("random", draw)
            noise = Noise(draw, "elements", bound, *native_scales(p))
    how = How(normalises, returns_sum, noise, swapped, **norm)
    return run(ResidualNorm, z, x, weight, bias, c, how)


def _normalised(
    z, x, normalized_shape, weight, bias, eps, p, training, prenorm, twice, c, center, out_dtype
):  # fmt: skip
    why = unfit(z, normalized_shape, eps, weight, bias)
    if why is not None:
        return why
    if len(normalized_shape) > 1:
        return Stock("shape", f"normalized_shape={tuple(normalized_shape)}")
    dtype = out_dtype or _sum_dtype(z, x)
    if any(t is not None and t.dtype != dtype for t in (weight, bias)):
        if out_dtype is None:
            return Invalid("dtype", "parameters in another dtype than the sum")
    if c is not None and (tuple(c.shape) != tuple(normalized_shape) or z.dim() < 2):
        return Stock("shape", f"input_bias {tuple(c.shape)} for rows of {z.shape[-1]:,} elements")
    out = _fused(
        z, x, weight, bias, c, p, training, True, bool(prenorm),
        eps=eps, center=center, out_dtype=out_dtype, twice=bool(twice),
    )  # fmt: skip
    if isinstance(out, Stock):
        return out
    results = out if prenorm else out[1:]
    return results if len(results) > 1 else results[0]


def _dropout_add(input, residual, p=0.5, training=True):
    return residual + stock.dropout(input, p, training)


@op(stock=_dropout_add, strided=("input", "residual"))
def dropout_add(input, residual, p=0.5, training=True):
    """`residual + dropout(input, p, training)`, for two tensors of one shape.

    It is one pass, and stores no mask. If nothing is dropped, it is an addition.
    """
    if not 0 <= p <= 1:
        return Invalid("option", f"p={p}")
    if p == 0 or not training:
        return residual + input
    out = _fused(input, residual, None, None, None, p, training, False, True)
    return out if isinstance(out, Stock) else out[0]


def too_many_rows(x) -> Stock | None:
    """Why kernels that count rows in 32 bits cannot take those of `x`, if so."""
    rows = x.numel() // x.shape[-1]
    return None if rows < 2**30 else Stock("size", f"{rows:,} rows; kernels take less than 2^30")


class WithBias(Function):
    """z, which contains the bias c -> z. The gradient of c is the sum of that of z."""

    strided = ("dz",)

    @staticmethod
    def forward(ctx, z, c):
        ctx.rest = c.shape, c.dtype
        return z.view_as(z)

    @staticmethod
    def backward(ctx, dz):
        shape, dtype = ctx.rest
        needs = ctx.needs_input_grad
        dc = dz.sum_to_size(shape).to(dtype) if needs[1] else None
        return dz if needs[0] else None, dc


def _composed(norm, input, residual, p, training, prenorm, twice, input_bias):
    if input_bias is not None:
        input = WithBias.apply(input, input_bias)
    s = residual + stock.dropout(input, p, training)
    y = norm(s)
    results = ((s, y) if prenorm else (y,)) + ((y,) if twice else ())
    return results if len(results) > 1 else y


def _dropout_add_layer_norm(
    input, residual, normalized_shape, weight=None, bias=None, eps=1e-5, p=0.0, training=False,
    prenorm=False, twice=False, input_bias=None,
):  # fmt: skip
    def norm(s):
        return stock.layer_norm(s, normalized_shape, weight, bias, eps)

    return _composed(norm, input, residual, p, training, prenorm, twice, input_bias)


@op(
    stock=_dropout_add_layer_norm,
    strided=("input", "residual"),
    autocast="fp32",
    source="arXiv:1706.03762, section 3.1; arXiv:2002.04745, figure 1",
)
def dropout_add_layer_norm(
    input, residual, normalized_shape, weight=None, bias=None, eps=1e-5, p=0.0, training=False,
    prenorm=False, twice=False, input_bias=None, *, out_dtype=None,
):  # fmt: skip
    """y = `layer_norm(s, ...)` with s = `residual + dropout(input, p, training)`; (s, y) if
    `prenorm`.

    This is the end of one transformer branch and the beginning of the next: one kernel per
    direction, and no stored mask. It takes two tensors of one shape, and a norm over the last
    dimension.

    With `twice`, y is also the last result once more: the same memory with a gradient of its own.
    The backward adds the two gradients as it reads them. `input_bias` (N,) is a bias that `input`
    contains, added without a gradient. Its values are not read. Its gradient is that of `input`,
    summed over the rows, in the same pass.
    """
    return _normalised(
        input, residual, normalized_shape, weight, bias, eps, p, training, prenorm, twice,
        input_bias, True, out_dtype,
    )  # fmt: skip


def _dropout_add_rms_norm(
    input, residual, normalized_shape, weight=None, eps=None, p=0.0, training=False, prenorm=False,
    twice=False, input_bias=None,
):  # fmt: skip
    def norm(s):
        return stock.rms_norm(s, normalized_shape, weight, eps)

    return _composed(norm, input, residual, p, training, prenorm, twice, input_bias)


@op(
    stock=_dropout_add_rms_norm,
    strided=("input", "residual"),
    autocast="fp32",
    source="arXiv:1910.07467",
)
def dropout_add_rms_norm(
    input, residual, normalized_shape, weight=None, eps=None, p=0.0, training=False, prenorm=False,
    twice=False, input_bias=None, *, out_dtype=None,
):  # fmt: skip
    """`dropout_add_layer_norm` with an RMS norm instead of the layer norm."""
    if eps is None:
        eps = FINFO_EPS
    return _normalised(
        input, residual, normalized_shape, weight, None, eps, p, training, prenorm, twice,
        input_bias, False, out_dtype,
    )  # fmt: skip
