"""Pooling: max, mean and power means over windows; unpooling.

An op below turns its arguments into a `kernels.pooling.Pooling`, or declines them; one
`autograd.Function` runs all.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as stock

from fastnn import kernels
from fastnn._op import Invalid, Stock, op, run, second_order


class Pool(torch.autograd.Function):
    """x ([N], C, *) -> y, or (y, indices). Keeps x, as stock does, and what `fwd` says of each
    window: a byte, or a factor in fp32."""

    @staticmethod
    def forward(ctx, x, samples, spec, dtype, indices, formula):
        keep = ctx.needs_input_grad[0]
        y, index, at, slope = kernels.pooling.fwd(x, samples, spec, dtype, indices, keep)
        ctx.save_for_backward(x, samples, at, slope)
        ctx.rest = spec, dtype, formula
        if not indices:
            return y
        ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        return y, index

    @staticmethod
    def backward(ctx, dy, dindex=None):
        if dy is None:
            return (None,) * 6
        x, samples, at, slope = ctx.saved_tensors
        spec, dtype, formula = ctx.rest
        if torch.is_grad_enabled():  # create_graph=True: a kernel's gradient would carry no graph
            (dx,) = second_order(lambda x: formula(x.to(dtype)), (x,), dy, (True,))
        else:
            dx = kernels.pooling.bwd(dy, at, slope, x, samples, spec, dtype)
        return dx, None, None, None, None, None


# ---- arguments ----------------------------------------------------------------------------------


def _along(value, dims):
    """An int, or ints for each axis, as a tuple of `dims`; None if it is neither."""
    if type(value) is int:
        return (value,) * dims
    if isinstance(value, tuple | list) and all(type(v) is int for v in value):
        if len(value) == dims:
            return tuple(value)
        if len(value) == 1:
            return (value[0],) * dims
    return None


def _three(values, fill):
    return (fill,) * (3 - len(values)) + tuple(values)


@functools.lru_cache(maxsize=4096)
def _channels_last(shape, stride, lead=2):
    """Whether ATen makes a result of (N, C, *) with such strides channels last. A tensor of three
    dimensions has it inserted the one that stock does."""
    if len(shape) == 3:
        shape, stride = (*shape[:2], 1, shape[2]), (*stride[:2], shape[2] * stride[2], stride[2])
    if stride[1] == 0 or 0 in shape:
        return False
    least = 0
    for d in (1, *range(len(shape) - 1, 1, -1), 0):
        if stride[d] < least or (d == 0 and least == stride[1]):
            return False
        least = stride[d] * max(shape[d], 1) if shape[d] > 1 else stride[d]
    return True


def _unusable(input, dims, name):
    """Why no kernel pools `input`, if so."""
    if input.dim() not in (dims + 1, dims + 2):
        return Invalid(f"{input.dim()} dimensions")
    if 0 in input.shape[-dims - 1 :]:
        return Invalid(f"an input of shape {tuple(input.shape)}")
    if input.numel() // min(input.shape[-1], input.shape[-dims - 1]) >= 2**31:
        return Stock(f"{input.numel()} elements")  # rows that 32 bits do not count
    return None


def _regular(input, dims, kernel_size, stride, padding, dilation, ceil_mode):
    """(k, s, p, d, out) along the axes of `input`, or why not."""
    why = _unusable(input, dims, "pool")
    if why is not None:
        return why
    k = _along(kernel_size, dims)
    s = k if stride is None or stride == () or stride == [] else _along(stride, dims)
    p, d = _along(padding, dims), _along(dilation, dims)
    if None in (k, s, p, d) or type(ceil_mode) is not bool:
        return Invalid(
            f"kernel_size={kernel_size!r}, stride={stride!r}, padding={padding!r}, "
            f"dilation={dilation!r}, ceil_mode={ceil_mode!r}"
        )
    out = []
    for size, a, b, c, e in zip(input.shape[-dims:], k, s, p, d, strict=True):
        if a < 1 or b < 1 or c < 0 or e < 1 or 2 * c > a:
            return Invalid(f"kernel_size={a}, stride={b}, padding={c}, dilation={e}")
        span = size + 2 * c - e * (a - 1) - 1
        o = (span + (b - 1 if ceil_mode else 0)) // b + 1
        if ceil_mode and (o - 1) * b >= size + c:
            o -= 1
        if o < 1:
            return Invalid(f"a window of {a} over {size}")
        if c and e > size:
            return Stock(f"dilation={e}: a window may lie in the padding alone")
        out.append(o)
    return k, s, p, d, tuple(out)


# ---- max ----------------------------------------------------------------------------------------


def _max_pool(
    dims, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices, dtype
):
    found = _regular(input, dims, kernel_size, stride, padding, dilation, ceil_mode)
    if isinstance(found, Stock):
        return found
    k, s, p, d, out = found
    spec = kernels.pooling.Pooling(
        "max", "regular", dims, _three(out, 1), _three(k, 1), _three(s, 1), _three(p, 0),
        _three(d, 1), _max_last(input, dims, return_indices),
    )  # fmt: skip
    function = _MAX[dims]

    def formula(x):
        return function(x, k, s, p, d, ceil_mode)

    return run(Pool, input, None, spec, dtype or input.dtype, bool(return_indices), formula)


_MAX = {1: stock.max_pool1d, 2: stock.max_pool2d, 3: stock.max_pool3d}


def _max_last(input, dims, return_indices):
    shape, stride = input.shape, input.stride()
    if dims == 3 and len(shape) == 4:
        shape, stride = (1, *shape), (shape[0] * stride[0], *stride)
    if len(shape) == dims + 1:
        return False
    if dims == 1 and not (input.is_cuda or return_indices):
        if not (input.requires_grad and torch.is_grad_enabled()):
            return False  # a kernel of its own on a CPU
    return _channels_last(shape, stride)


@op(stock=stock.max_pool1d, source="ATen's rules for nan, ties and ceil_mode")
def max_pool1d(
    input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False,
    *, out_dtype=None,
):  # fmt: skip
    """Fused, as max_pool2d is."""
    return _max_pool(
        1, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices, out_dtype
    )


@op(stock=stock.max_pool2d, source="ATen's rules for nan, ties and ceil_mode")
def max_pool2d(
    input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False,
    *, out_dtype=None,
):  # fmt: skip
    """Fused for every window, channels first and last, one launch each way.

    For the gradient a byte is kept of each window, where stock keeps an index of eight; without a
    gradient nothing. The backward adds up in a fixed order, without atomics: the same bits each
    time, and `torch.use_deterministic_algorithms(True)` has nothing to raise.
    """
    return _max_pool(
        2, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices, out_dtype
    )


@op(stock=stock.max_pool3d, autocast_cpu="fp32", source="ATen's rules for nan, ties and ceil_mode")
def max_pool3d(
    input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False,
    *, out_dtype=None,
):  # fmt: skip
    """Fused, as max_pool2d is."""
    return _max_pool(
        3, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices, out_dtype
    )
