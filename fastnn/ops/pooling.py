"""Pooling: maxima, means and power means of windows; unpooling.

Each op turns its arguments into a `kernels.pooling.Pooling`, or declines them. One
`autograd.Function` runs them all. A result has the layout that the stock result has on the same
device.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as stock

from fastnn import kernels
from fastnn._op import (
    Function,
    Invalid,
    Stock,
    Work,
    always,
    impossible,
    in_backward,
    op,
    run,
    second_order,
)
from fastnn._strides import is_channels_last


class Pool(Function):
    """x ([N], C, *) -> y, or (y, indices).

    Keeps x where stock does, and what `kernels.pooling.fwd` returns for each window: the place of
    the maximum, or a factor in fp32. `formula(x, samples)` is the stock function of these options.
    """

    strided = ("dy", "dindex")

    @staticmethod
    def forward(ctx, x, samples, spec, dtype, indices, formula):
        keep = ctx.needs_input_grad[0]
        y, index, at, slope = kernels.pooling.fwd(x, samples, spec, dtype, indices, keep)
        # Stock takes the mean of whole planes by another operator, which keeps nothing.
        kept = () if spec.is_mean_of_planes else (x, samples, at, slope)
        ctx.save_for_backward(*kept)
        ctx.rest = spec, dtype, formula, (x.shape, x.stride(), x.dtype)
        ctx.set_materialize_grads(False)
        if not indices:
            return y
        ctx.mark_non_differentiable(index)
        return y, index

    @staticmethod
    def backward(ctx, dy, dindex=None):
        spec, dtype, formula, layout = ctx.rest
        kept = (None,) * 4 if spec.is_mean_of_planes else ctx.saved_tensors
        x, samples, at, slope = kept
        if torch.is_grad_enabled():  # create_graph=True: a kernel's gradient would carry no graph
            if x is None:  # the gradient of a mean does not depend on values
                x = torch.zeros(layout[0], dtype=layout[2], device=dy.device, requires_grad=True)
            (dx,) = second_order(lambda x: formula(x.to(dtype), samples), (x,), dy, (True,))
        else:
            dx = kernels.pooling.bwd(dy, at, slope, x, samples, spec, dtype, layout)
        return dx, None, None, None, None, None


_INPUT = ("input",)  # read in place, whatever its strides

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


_channels_last = functools.lru_cache(maxsize=4096)(is_channels_last)

_FLOAT_MAX = torch.finfo(torch.float32).max

# Rows of a tensor, positions along an axis, elements of a window: sums of such numbers fit into the
# 32 bits in which kernels compute them.
_MOST = 2**28


def _unusable(input, dims):
    """Why no kernel pools `input`, if so."""
    if input.dim() not in (dims + 1, dims + 2):
        return Invalid("shape", f"{input.dim()} dimensions")
    if 0 in input.shape[-dims - 1 :]:
        return Invalid("shape", f"an input of shape {tuple(input.shape)}")
    return _too_large(input, dims, input.shape[-dims:])


def _too_large(input, dims, sizes):
    """Why no kernel walks through a tensor of the batch and channels of `input`, and of `sizes`."""
    channels = input.shape[-dims - 1]
    batch = input.shape[0] if input.dim() == dims + 2 else 1
    rows = batch * channels * math.prod(sizes) // min(sizes[-1], channels)
    if max(rows, channels, *sizes) >= _MOST:
        return Stock(
            "size", f"a tensor of {batch} x {channels} x {tuple(sizes)}: 32 bits are too few"
        )
    return None


def _regular(input, dims, kernel_size, stride, padding, dilation, ceil_mode):
    """(k, s, p, d, out) along the axes of `input`, or why not."""
    why = _unusable(input, dims)
    if why is not None:
        return why
    k = _along(kernel_size, dims)
    empty = stride is None or (type(stride) in (tuple, list) and not stride)
    s = k if empty else _along(stride, dims)
    p, d = _along(padding, dims), _along(dilation, dims)
    if None in (k, s, p, d) or type(ceil_mode) is not bool:
        return Invalid(
            "option",
            f"kernel_size={kernel_size!r}, stride={stride!r}, padding={padding!r}, "
            f"dilation={dilation!r}, ceil_mode={ceil_mode!r}",
        )
    out = []
    for size, a, b, c, e in zip(input.shape[-dims:], k, s, p, d, strict=True):
        if a < 1 or b < 1 or c < 0 or e < 1 or 2 * c > a or max(b, e) >= _MOST:
            return Invalid("option", f"kernel_size={a}, stride={b}, padding={c}, dilation={e}")
        span = size + 2 * c - e * (a - 1) - 1
        o = (span + (b - 1 if ceil_mode else 0)) // b + 1
        if ceil_mode and (o - 1) * b >= size + c:
            o -= 1
        if o < 1:
            return Invalid("shape", f"a window of {a} over {size}")
        if c and e > size:
            return Stock("option", f"dilation={e}: a window may lie in the padding alone")
        out.append(o)
    if math.prod(k) >= _MOST:
        return Stock("size", f"a window of {math.prod(k)} elements: 32 bits are too few")
    return _too_large(input, dims, out) or (k, s, p, d, tuple(out))


# ---- max ----------------------------------------------------------------------------------------

_SHARED = 4  # windows that may share an element


def _wins(input, k, s, d, by_size=False):
    """The answer of the size gate for maxima of regular windows. The limits are those up to which
    instructions take no longer than the bytes of PyTorch's kernels, on an H100."""
    if not kernels.pooling.in_cells(k, s, d, by_size):
        return Stock(
            "gate", f"windows of {k}, dilation {d}: the kernel computes positions too often to win"
        )
    taps, elements = math.prod(k), math.prod(s)
    if taps > _SHARED * elements:
        return Stock(
            "gate", f"windows of {k}, stride {s}: too many windows share an element for a kernel"
        )
    if taps > elements and input.stride(-len(k) - 1) != 1 and input.shape[-1] % 8:
        return Stock(
            "gate", f"windows overlap, in rows of {input.shape[-1]}: accesses would be narrow"
        )
    return Work(input.numel())


def _regular_wins(dims):
    """The policy of max pooling over `dims` dimensions."""

    def policy(
        input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False,
        return_indices=False, *, out_dtype=None,
    ):  # fmt: skip
        found = _regular(input, dims, kernel_size, stride, padding, dilation, ceil_mode)
        return found if isinstance(found, Stock) else _wins(input, found[0], found[1], found[3])

    return policy


def _adaptive_wins(dims):
    """The policy of adaptive max pooling over `dims` dimensions."""

    def policy(input, output_size, return_indices=False, *, out_dtype=None):
        found = _adaptive(input, dims, output_size)
        if isinstance(found, Stock):
            return found
        window, k, s, _ = found
        if window != "regular":
            return Stock(
                "gate", "windows of several sizes: the kernel computes positions too often to win"
            )
        return _wins(input, k, s, (1,) * dims, by_size=True)

    return policy


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

    def formula(x, samples):
        return function(x, k, s, p, d, ceil_mode)

    return run(Pool, input, None, spec, dtype or input.dtype, bool(return_indices), formula)


_MAX = {1: stock.max_pool1d, 2: stock.max_pool2d, 3: stock.max_pool3d}


def _max_last(input, dims, return_indices, stride=None):
    """Whether the result of max pooling is channels last."""
    shape, stride = input.shape, stride or input.stride()
    if dims == 3 and len(shape) == 4:
        shape, stride = (1, *shape), (shape[0] * stride[0], *stride)
    if len(shape) == dims + 1:
        return False
    if dims == 1 and not (input.is_cuda or return_indices):
        if not (input.requires_grad and torch.is_grad_enabled()):
            return False  # the CPU has a kernel of its own for this case
    return _channels_last(shape, stride)


@op(
    stock=stock.max_pool1d,
    strided=_INPUT,
    policy=_regular_wins(1),
    source="ATen's rules for nan, ties and ceil_mode",
)
def max_pool1d(
    input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False,
    *, out_dtype=None,
):  # fmt: skip
    """Fused like `max_pool2d`."""
    return _max_pool(
        1, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices, out_dtype
    )


@op(
    stock=stock.max_pool2d,
    strided=_INPUT,
    policy=_regular_wins(2),
    source="ATen's rules for nan, ties and ceil_mode",
)
def max_pool2d(
    input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False,
    *, out_dtype=None,
):  # fmt: skip
    """Fused for every window, contiguous and channels last, with one launch per direction.

    For the backward the kernel keeps one byte per window, where PyTorch keeps an int64 index; it
    keeps nothing if no gradient is wanted. The backward adds in a fixed order, without atomics.
    """
    return _max_pool(
        2, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices, out_dtype
    )


@op(
    stock=stock.max_pool3d,
    alerts=in_backward,
    strided=_INPUT,
    policy=_regular_wins(3),
    autocast_cpu="fp32",
    source="ATen's rules for nan, ties and ceil_mode",
)
def max_pool3d(
    input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False,
    *, out_dtype=None,
):  # fmt: skip
    """Fused like `max_pool2d`."""
    return _max_pool(
        3, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices, out_dtype
    )


# ---- mean ---------------------------------------------------------------------------------------


def _avg_pool(
    dims, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor, dtype
):
    found = _regular(input, dims, kernel_size, stride, padding, 1, ceil_mode)
    if isinstance(found, Stock):
        return found
    if type(count_include_pad) is not bool or (divisor is not None and type(divisor) is not int):
        return Invalid(
            "option", f"count_include_pad={count_include_pad!r}, divisor_override={divisor!r}"
        )
    if divisor == 0:
        return Invalid("option", "divisor_override=0")
    k, s, p, _, out = found
    if dims == 3 and any(n < a for n, a in zip(input.shape[-3:], k, strict=True)):
        return Invalid(
            "shape", f"an input of {tuple(input.shape[-3:])} below the kernel {k}, in 3-D"
        )
    spec = kernels.pooling.Pooling(
        "mean", "regular", dims, _three(out, 1), _three(k, 1), _three(s, 1), _three(p, 0),
        last=_last(input, dims), count_padding=count_include_pad, divisor=divisor,
    )  # fmt: skip

    def formula(x, samples):
        if dims == 1:
            return stock.avg_pool1d(x, k, s, p, ceil_mode, count_include_pad)
        return _AVG[dims](x, k, s, p, ceil_mode, count_include_pad, divisor)

    return run(Pool, input, None, spec, dtype or input.dtype, False, formula)


_AVG = {2: stock.avg_pool2d, 3: stock.avg_pool3d}


def _last(input, dims):
    """Whether the result of pooling other than max pooling is channels last; never in 3-D."""
    batched = input.dim() == dims + 2
    return batched and dims < 3 and _channels_last(input.shape, input.stride())


@op(stock=stock.avg_pool1d, strided=_INPUT)
def avg_pool1d(
    input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True
):  # fmt: skip
    """Fused like `avg_pool2d`."""
    return _avg_pool(
        1, input, kernel_size, stride, padding, ceil_mode, count_include_pad, None, None
    )


@op(stock=stock.avg_pool2d, strided=_INPUT)
def avg_pool2d(
    input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True,
    divisor_override=None,
):  # fmt: skip
    """Fused for every window, contiguous and channels last, with one launch per direction. Sums are
    float32; sums of more than 32 elements are float64."""
    return _avg_pool(
        2, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, None
    )


@op(stock=stock.avg_pool3d, strided=_INPUT, alerts=in_backward, autocast_cpu="fp32")
def avg_pool3d(
    input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True,
    divisor_override=None, *, out_dtype=None,
):  # fmt: skip
    """Fused like `avg_pool2d`. The result is never channels last, as in PyTorch."""
    return _avg_pool(
        3, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override,
        out_dtype,
    )  # fmt: skip


# ---- adaptive -----------------------------------------------------------------------------------


def _adaptive(input, dims, output_size):
    """(window, k, s, out) for windows that cover the input, or why not."""
    why = _unusable(input, dims)
    if why is not None:
        return why
    sizes = input.shape[-dims:]
    if dims > 1 and isinstance(output_size, tuple | list) and len(output_size) == dims:
        output_size = [size if o is None else o for o, size in zip(output_size, sizes, strict=True)]
    elif dims > 1 and type(output_size) is not int:
        return Invalid("option", f"output_size={output_size!r}")
    out = _along(output_size, dims)
    if out is None or min(out) < 0:
        return Invalid("option", f"output_size={output_size!r}")
    if min(out) == 0:
        return Stock("empty", "an empty result")
    pairs = list(zip(sizes, out, strict=True))
    why = _too_large(input, dims, out)
    if why is not None:
        return why
    if any((o + 1) * (size + 1) >= 2**31 for size, o in pairs):
        return Stock("size", f"{tuple(sizes)} to {out}: 32 bits are too few")
    if all(size % o == 0 for size, o in pairs):  # windows of equal size that do not overlap
        k = tuple(size // o for size, o in pairs)
        return "regular", k, k, out
    k = tuple(size // o + (2 if size % o else 0) for size, o in pairs)  # the most there can be
    return "adaptive", k, (1,) * dims, out


def _adaptive_pool(reduction, function, dims, input, output_size, indices, last, dtype):
    found = _adaptive(input, dims, output_size)
    if isinstance(found, Stock):
        return found
    window, k, s, out = found
    spec = kernels.pooling.Pooling(
        reduction, window, dims, _three(out, 1), _three(k, 1), _three(s, 1),
        last=last(input, dims, out), by_size=True,
    )  # fmt: skip

    def formula(x, samples):
        return function(x, out)

    return run(Pool, input, None, spec, dtype or input.dtype, bool(indices), formula)


def _avg_last(input, dims, out):
    if dims == 3 and out == (1, 1, 1):  # of the whole volume, which stock takes the mean of
        return input.dim() == 5 and _channels_last(input.shape, input.stride())
    return _last(input, dims)


def _adaptive_max_last(input, dims, out):
    return _last(input, dims)


def adaptive_mean(input, output_size, dtype=None):
    """Adaptive average pooling of input (N, C, *), over one to three dimensions."""
    dims = input.dim() - 2
    function = getattr(stock, f"adaptive_avg_pool{dims}d")
    return _adaptive_pool("mean", function, dims, input, output_size, False, _avg_last, dtype)


def _means_raise(input, output_size):
    """Whether PyTorch's backward raises: not for one mean, which is no pooling there."""
    one = output_size == 1 or (
        isinstance(output_size, tuple | list) and all(n == 1 for n in output_size)
    )
    return not one and in_backward(input)


@op(stock=stock.adaptive_avg_pool1d, strided=_INPUT, alerts=_means_raise)
def adaptive_avg_pool1d(input, output_size):
    """Fused like `adaptive_avg_pool2d`."""
    return _adaptive_pool(
        "mean", stock.adaptive_avg_pool1d, 1, input, output_size, False, _avg_last, None
    )


@op(stock=stock.adaptive_avg_pool2d, strided=_INPUT, alerts=_means_raise)
def adaptive_avg_pool2d(input, output_size):
    """Fused for every output size except 0, with one launch per direction. Sums are float64. The
    backward adds in a fixed order, without atomics."""
    return _adaptive_pool(
        "mean", stock.adaptive_avg_pool2d, 2, input, output_size, False, _avg_last, None
    )


@op(stock=stock.adaptive_avg_pool3d, strided=_INPUT, alerts=_means_raise, autocast_cpu="fp32")
def adaptive_avg_pool3d(input, output_size, *, out_dtype=None):
    """Fused like `adaptive_avg_pool2d`."""
    return _adaptive_pool(
        "mean", stock.adaptive_avg_pool3d, 3, input, output_size, False, _avg_last, out_dtype
    )


def _adaptive_max_pool(function, dims, input, output_size, return_indices, dtype=None):
    return _adaptive_pool(
        "max", function, dims, input, output_size, return_indices, _adaptive_max_last, dtype
    )


@op(
    stock=stock.adaptive_max_pool1d,
    strided=_INPUT,
    policy=_adaptive_wins(1),
    alerts=in_backward,
)
def adaptive_max_pool1d(input, output_size, return_indices=False):
    """Fused like `adaptive_max_pool2d`."""
    return _adaptive_max_pool(stock.adaptive_max_pool1d, 1, input, output_size, return_indices)


@op(
    stock=stock.adaptive_max_pool2d,
    strided=_INPUT,
    policy=_adaptive_wins(2),
    alerts=in_backward,
)
def adaptive_max_pool2d(input, output_size, return_indices=False):
    """Fused for every output size except 0, with one launch per direction. It keeps what
    `max_pool2d` keeps of a window. The backward adds in a fixed order, without atomics."""
    return _adaptive_max_pool(stock.adaptive_max_pool2d, 2, input, output_size, return_indices)


@op(
    stock=stock.adaptive_max_pool3d,
    strided=_INPUT,
    policy=_adaptive_wins(3),
    autocast_cpu="fp32",
)
def adaptive_max_pool3d(input, output_size, return_indices=False, *, out_dtype=None):
    """Fused like `adaptive_max_pool2d`. The result is never channels last, as in PyTorch."""
    return _adaptive_max_pool(
        stock.adaptive_max_pool3d, 3, input, output_size, return_indices, out_dtype
    )


# ---- power means --------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _pointwise(shape, stride):
    """The strides of a pointwise operator's result for such a tensor."""
    return torch.empty_strided(shape, stride, device="meta").abs().stride()


def _lp_pool(dims, input, norm_type, kernel_size, stride, ceil_mode, dtype):
    if type(norm_type) not in (int, float) or norm_type != norm_type:
        return Stock("option", f"norm_type={norm_type!r}")
    if abs(norm_type) > _FLOAT_MAX and not math.isinf(norm_type):
        return Stock("option", f"norm_type={norm_type!r} is no float32 number")
    one = type(kernel_size) is int
    each = type(kernel_size) in (tuple, list) and len(kernel_size) == dims > 1
    if norm_type == 0 or not (one or each):
        return Invalid("option", f"norm_type={norm_type!r}, kernel_size={kernel_size!r}")
    found = _regular(input, dims, kernel_size, stride, 0, 1, ceil_mode)
    if isinstance(found, Stock):
        return found
    k, s, _, _, out = found
    between = _pointwise(input.shape, input.stride())
    if math.isinf(norm_type):
        reduction = "max_abs" if norm_type > 0 else "min_abs"
        last = _max_last(input, dims, False, between)
        if input.is_cuda:
            dtype = None  # max pooling, which is on no list there
    else:
        reduction = "square" if norm_type == 2 else "power"
        last = input.dim() == dims + 2 and dims < 3 and _channels_last(input.shape, between)
    if reduction != "max_abs":
        # Stock ends with a pointwise operator, which makes a result that is dense in both layouts
        # contiguous.
        last = last and input.shape[1] > 1 and math.prod(out) > 1
    spec = kernels.pooling.Pooling(
        reduction, "regular", dims, _three(out, 1), _three(k, 1), _three(s, 1), last=last,
        norm=float(norm_type),
    )  # fmt: skip
    function = _LP[dims]

    def formula(x, samples):
        return function(x, norm_type, k[0] if dims == 1 else k, s, ceil_mode)

    return run(Pool, input, None, spec, dtype or input.dtype, False, formula)


_LP = {1: stock.lp_pool1d, 2: stock.lp_pool2d, 3: stock.lp_pool3d}


@op(stock=stock.lp_pool1d, strided=_INPUT, autocast="fp32")
def lp_pool1d(input, norm_type, kernel_size, stride=None, ceil_mode=False, *, out_dtype=None):
    """Fused like `lp_pool2d`."""
    return _lp_pool(1, input, norm_type, kernel_size, stride, ceil_mode, out_dtype)


@op(stock=stock.lp_pool2d, strided=_INPUT, autocast="fp32")
def lp_pool2d(input, norm_type, kernel_size, stride=None, ceil_mode=False, *, out_dtype=None):
    """Fused for every power except 0, also the infinite ones, with one launch per direction.

    Powers, sums and roots are float32. PyTorch rounds each of them to the dtype of the input, so in
    float16 a sum of squares above 65504 is infinite there, and finite here.
    """
    return _lp_pool(2, input, norm_type, kernel_size, stride, ceil_mode, out_dtype)


@op(stock=stock.lp_pool3d, strided=_INPUT, autocast="fp32", autocast_cpu="fp32")
def lp_pool3d(input, norm_type, kernel_size, stride=None, ceil_mode=False, *, out_dtype=None):
    """Fused like `lp_pool2d`."""
    return _lp_pool(3, input, norm_type, kernel_size, stride, ceil_mode, out_dtype)


# ---- fractional ---------------------------------------------------------------------------------


def _fractional(
    dims, input, kernel_size, output_size, output_ratio, return_indices, samples, dtype
):
    why = _unusable(input, dims)
    if why is not None:
        return why
    sizes = input.shape[-dims:]
    if output_size is None:
        if not isinstance(output_ratio, tuple | list) or len(output_ratio) != dims:
            return Invalid("option", f"output_ratio={output_ratio!r}")
        output_size = [int(size * r) for size, r in zip(sizes, output_ratio, strict=True)]
    k, out = _along(kernel_size, dims), _along(output_size, dims)
    if k is None or out is None:
        return Invalid("option", f"kernel_size={kernel_size!r}, output_size={output_size!r}")
    room = 0 if dims == 2 else 1
    for size, a, o in zip(sizes, k, out, strict=True):
        if a < 1 or o < 1 or o + a - 1 + room > size:
            return Invalid("shape", f"{o} windows of {a} over {size}")
    batch = input.shape[0] if input.dim() == dims + 2 else 1
    channels = input.shape[-dims - 1]
    if samples is None:
        samples = torch.rand(batch, channels, dims, dtype=input.dtype, device=input.device)
    if dtype is not None:  # autocast casts all tensors
        samples = samples.to(dtype)
    if (
        samples.dtype is not (dtype or input.dtype)
        or samples.dim() != 3
        or samples.shape[0] < batch
        or samples.shape[1:] != (channels, dims)
    ):
        return Invalid("option", f"_random_samples {tuple(samples.shape)} {samples.dtype}")
    # A copy, because ATen keeps indices instead: users may edit the samples.
    samples = samples.detach().clone(memory_format=torch.contiguous_format)
    impossible("it looks at the samples, or draws them")
    if not samples.is_cuda and not ((samples >= 0) & (samples <= 1)).all():
        return Stock("option", "_random_samples outside [0, 1]")
    spec = kernels.pooling.Pooling("max", "fractional", dims, _three(out, 1), _three(k, 1))
    function = stock.fractional_max_pool2d if dims == 2 else stock.fractional_max_pool3d

    def formula(x, samples):
        return function(x, k, out, _random_samples=samples)

    return run(Pool, input, samples, spec, dtype or input.dtype, bool(return_indices), formula)


@op(
    stock=stock.fractional_max_pool2d,
    strided=_INPUT,
    autocast_cpu="fp32",
    alerts=in_backward,
    source="arXiv:1412.6071",
)
def fractional_max_pool2d(
    input, kernel_size, output_size=None, output_ratio=None, return_indices=False,
    _random_samples=None, *, out_dtype=None,
):  # fmt: skip
    """Fused with one launch per direction. A seed gives the windows that it gives in PyTorch.

    It keeps what `max_pool2d` keeps of a window. The backward adds in a fixed order, without
    atomics.
    """
    return _fractional(
        2, input, kernel_size, output_size, output_ratio, return_indices, _random_samples, out_dtype
    )


@op(
    stock=stock.fractional_max_pool3d,
    strided=_INPUT,
    autocast_cpu="fp32",
    alerts=in_backward,
    source="arXiv:1412.6071",
)
def fractional_max_pool3d(
    input, kernel_size, output_size=None, output_ratio=None, return_indices=False,
    _random_samples=None, *, out_dtype=None,
):  # fmt: skip
    """Fused like `fractional_max_pool2d`."""
    return _fractional(
        3, input, kernel_size, output_size, output_ratio, return_indices, _random_samples, out_dtype
    )


# ---- unpooling ----------------------------------------------------------------------------------


class Unpool(Function):
    """x and indices ([N], C, *) -> y ([N], C, *out), 0 where no index points. Keeps the indices."""

    strided = ("dy",)

    @staticmethod
    def forward(ctx, x, indices, dims, out, last, dtype):
        ctx.save_for_backward(indices)
        ctx.rest = dims, x.dtype
        return kernels.pooling.unpool(x, indices, dims, out, last, dtype)

    @staticmethod
    def backward(ctx, dy):
        (indices,) = ctx.saved_tensors
        dims, dtype = ctx.rest
        if torch.is_grad_enabled():  # the gather has a derivative of its own
            found = dy.flatten(-dims).gather(-1, indices.flatten(-dims))
            dx = found.view(indices.shape).to(dtype)
        else:
            dx = kernels.pooling.unpool_bwd(dy, indices, dims, dtype)
        return dx, None, None, None, None, None


def _unpool(dims, input, indices, kernel_size, stride, padding, output_size, dtype):
    why = _unusable(input, dims)
    if why is not None:
        return why
    if not isinstance(indices, torch.Tensor) or indices.dtype is not torch.int64:
        return Invalid("dtype", "indices that are not a tensor of int64")
    if indices.shape != input.shape or not input.numel() or not input.is_floating_point():
        return Invalid("shape", f"input {tuple(input.shape)}, indices {tuple(indices.shape)}")
    k, p = _along(kernel_size, dims), _along(padding, dims)
    s = k if stride is None else _along(stride, dims)
    if None in (k, s, p) or min(s) < 1:
        return Invalid(
            "option", f"kernel_size={kernel_size!r}, stride={stride!r}, padding={padding!r}"
        )
    sizes = zip(input.shape[-dims:], k, s, p, strict=True)
    out = tuple((size - 1) * b + a - 2 * c for size, a, b, c in sizes)
    if output_size is not None:
        if not isinstance(output_size, tuple | list):
            return Invalid("option", f"output_size={output_size!r}")
        wanted = tuple(output_size[2:] if len(output_size) == dims + 2 else output_size)
        if len(wanted) != dims or any(type(o) is not int for o in wanted):
            return Invalid("option", f"output_size={output_size!r}")
        if any(abs(o - usual) >= b for o, usual, b in zip(wanted, out, s, strict=True)):
            return Invalid("option", f"output_size={output_size!r}")
        out = wanted
    if min(out) < 1:
        return Invalid("shape", f"a result of {out}")
    if math.prod(out) >= _MOST:
        return Stock("size", f"a result of {out}: 32 bits are too few")
    if not input.is_cuda:  # on a CPU the values can be read without waiting
        impossible("it looks at the indices")
        least, most = torch.aminmax(indices)
        if least < 0 or most >= math.prod(out):
            return Invalid("option", "an index outside the result")
    last = dims == 2 and not input.is_cuda and _last(input, 2)
    return run(Unpool, input, indices, dims, out, last, dtype or input.dtype)


_UNPOOL = {
    "strided": ("input", "indices"),
    "integers": (torch.int64,),
    "autocast_cpu": "fp32",
    "alerts": always,
}


@op(stock=stock.max_unpool1d, **_UNPOOL)
def max_unpool1d(
    input, indices, kernel_size, stride=None, padding=0, output_size=None, *, out_dtype=None
):
    """Fused like `max_unpool2d`."""
    return _unpool(1, input, indices, kernel_size, stride, padding, output_size, out_dtype)


@op(stock=stock.max_unpool2d, **_UNPOOL)
def max_unpool2d(
    input, indices, kernel_size, stride=None, padding=0, output_size=None, *, out_dtype=None
):
    """Fused. If an index occurs twice, the last element that has it is taken, each time.

    On CUDA an element whose index is outside the result is left out, and its gradient is 0; with
    TRITON_DEBUG=1 the kernel asserts. On a CPU such a call raises PyTorch's error. On a CPU the
    result for channels-last input is channels last, on CUDA it is contiguous, as in PyTorch.
    """
    return _unpool(2, input, indices, kernel_size, stride, padding, output_size, out_dtype)


@op(stock=stock.max_unpool3d, **_UNPOOL)
def max_unpool3d(
    input, indices, kernel_size, stride=None, padding=0, output_size=None, *, out_dtype=None
):
    """Fused like `max_unpool2d`."""
    return _unpool(3, input, indices, kernel_size, stride, padding, output_size, out_dtype)
