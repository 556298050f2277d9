"""Interpolation: nearest, linear and cubic, in one to three dimensions."""

import math

import torch
import torch.nn.functional as stock

from fastnn import kernels
from fastnn._op import Invalid, Stock, Work, in_backward, op, run
from fastnn.ops._linear_map import LinearMap, Maps, channels_last
from fastnn.ops.pooling import adaptive_mean

# Of each mode, the kernel's, and for how many dimensions of an image it is.
_MODES = {
    "nearest": ("nearest", (1, 2, 3)),
    "nearest-exact": ("nearest_exact", (1, 2, 3)),
    "linear": ("linear", (1,)),
    "bilinear": ("linear", (2,)),
    "trilinear": ("linear", (3,)),
    "bicubic": ("cubic", (2,)),
    "area": ("area", (1, 2, 3)),  # a pooling
}


def _per_dimension(what, value, dims, kinds):
    """`value` for each dimension; `Stock`, or `Invalid`, where it is none of these kinds."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * dims
    if len(values) != dims:
        return Invalid("shape", f"{what}={value!r} for {dims} dimensions")
    return values if all(type(v) in kinds for v in values) else Stock("option", f"{what}={value!r}")


def _image(input, size, scale_factor, recompute_scale_factor):
    """(sizes of the result's image, factors to go by); or `Stock`, or `Invalid`."""
    dims = input.dim() - 2
    none = [None] * dims
    if size is not None:
        sizes = _per_dimension("size", size, dims, (int,))
        return sizes if isinstance(sizes, Stock) else (sizes, none)
    factors = _per_dimension("scale_factor", scale_factor, dims, (int, float))
    if isinstance(factors, Stock):
        return factors
    if not all(0 < f < math.inf for f in factors):
        return Invalid("option", f"scale_factor={scale_factor!r}")
    sizes = [int(n * f) for n, f in zip(input.shape[2:], factors, strict=True)]
    return sizes, none if recompute_scale_factor else factors


def _autocast():
    return torch.is_autocast_enabled("cuda")


def _scales(was, sizes, factors, kind, align):
    return [
        kernels.upsampling.scale(n, out, factor, kind, align)
        for n, out, factor in zip(was, sizes, factors, strict=True)
    ]


def _gains(
    input, size=None, scale_factor=None, mode="nearest", align_corners=None,
    recompute_scale_factor=None, antialias=False,
):  # fmt: skip
    """The policy of the size gate: under autocast a kernel saves copies of the input, else the pass
    that fills the gradient with zeros. The kernels of images that double are fast enough for it."""
    if mode == "area":
        return Stock("gate", "mode='area': PyTorch's adaptive pooling is as fast at every size")
    copied = input.is_cuda and torch.is_autocast_enabled("cuda")
    adds = torch.is_grad_enabled() and input.requires_grad and not mode.startswith("nearest")
    if not (copied or adds):
        return Stock("gate", "no gradient that PyTorch adds up: it reads and writes once as well")
    image = _image(input, size, scale_factor, recompute_scale_factor)
    if isinstance(image, Stock):
        return image
    was, (sizes, factors) = tuple(input.shape[2:]), image
    kind, _ = _MODES.get(mode, ("", ()))
    align = bool(align_corners)
    scales = _scales(was, sizes, factors, kind, align)
    doubled = kernels.upsampling_cells.doubles(was, sizes, kind, align, scales) and not antialias
    if not doubled or (kind == "linear" and len(was) == 3):
        return Stock(
            "gate", "not a picture twice as large: to find places takes longer than the bytes"
        )
    return Work(input.numel())


def _raises(
    input, size=None, scale_factor=None, mode="nearest", align_corners=None,
    recompute_scale_factor=None, antialias=False,
):  # fmt: skip
    """Whether PyTorch's backward raises. Bilinear and trilinear run other code instead."""
    listed = mode in ("linear", "bicubic", "area") or (antialias and mode == "bilinear")
    return listed and in_backward(input)


@op(
    stock=stock.interpolate,
    strided=("input",),
    policy=_gains,
    settings=_autocast,
    autocast="fp32",
    alerts=_raises,
)
def interpolate(
    input, size=None, scale_factor=None, mode="nearest", align_corners=None,
    recompute_scale_factor=None, antialias=False, *, out_dtype=None,
):  # fmt: skip
    """Fused for nearest, nearest-exact, linear, bilinear, bicubic, trilinear and area, and for
    `antialias=True`.

    The gradient is a gather, with the same bits each time. Under
    `torch.use_deterministic_algorithms(True)` no mode raises. Under CUDA's autocast 16-bit input is
    read as it is, and the result is float32.

    With `antialias=True` the weights and the sums along the width stay in float32, where PyTorch
    rounds them to the type of the input.

    Values are those of CUDA. PyTorch differs on a CPU in two ways. Bicubic to the same size
    multiplies there, so that 0 * inf is nan; on CUDA it copies. A scale_factor is ignored there if
    the sizes are equal, or in mode nearest if one is twice the other.

    In the gradient, an output gives nothing to a place that has the weight 0 in it. PyTorch adds 0
    times the gradient of the output, which is nan if that is infinite.
    """
    if type(mode) is not str:
        return Stock("option", f"mode={mode!r}")
    if mode == "lanczos":
        why = "mode='lanczos', for CPUs alone"
        return Stock("option", why) if antialias else Invalid("option", f"{why}, without antialias")
    dims = input.dim() - 2
    kind, ranks = _MODES.get(mode, ("", ()))
    if dims not in ranks:
        return Invalid("shape", f"mode={mode!r} for {input.dim()} dimensions")
    if antialias and mode not in ("bilinear", "bicubic"):
        return Invalid("option", f"antialias=True, mode={mode!r}")
    if align_corners is not None and kind not in ("linear", "cubic"):
        return Invalid("option", f"align_corners={align_corners} with mode={mode!r}")
    if (size is None) == (scale_factor is None) or (size is not None and recompute_scale_factor):
        return Invalid("option", f"size={size}, scale_factor={scale_factor}")
    image = _image(input, size, scale_factor, recompute_scale_factor)
    if isinstance(image, Stock):
        return image
    sizes, factors = image
    if kind == "area":
        return adaptive_mean(input, tuple(sizes), out_dtype)
    if min(sizes) < 1 or 0 in input.shape[1:]:
        return Invalid("shape", f"{tuple(input.shape)} to {tuple(sizes)}")
    elements = math.prod((*input.shape[:2], *sizes))
    if max(elements, input.numel()) >= kernels.gather.MOST:
        return Stock("size", f"a result of {elements:,} elements; 32 bits cannot index so many")
    dtype = out_dtype or input.dtype
    was = tuple(input.shape[2:])
    align = bool(align_corners)
    same = tuple(sizes) == was
    if same and not antialias and not kind.startswith("nearest"):
        kind, align, factors = "nearest", False, [None] * dims
    scales = _scales(was, sizes, factors, kind, align)
    if same and antialias and any(s not in (0.0, 1.0) for s in scales):
        return Stock(
            "option", "antialias=True, equal sizes, but a factor: PyTorch's gradient is a copy"
        )
    given, last = input.dtype, channels_last(input)

    def forward(x):
        if antialias:
            return kernels.upsampling_antialias.fwd(x, sizes, kind, scales, dtype, last)
        return kernels.upsampling.fwd(x, sizes, kind, align, scales, dtype, last)

    def backward(dy):
        if antialias:
            return kernels.upsampling_antialias.bwd(dy, was, kind, scales, given, last)
        return kernels.upsampling.bwd(dy, was, kind, align, scales, given, last)

    return run(LinearMap, input, Maps(forward, backward, forward), False)
