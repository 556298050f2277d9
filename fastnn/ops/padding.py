"""Pads: constant, reflect, replicate, circular."""

import math

import torch
import torch.nn.functional as stock

from fastnn import kernels
from fastnn._op import Invalid, Stock, Work, in_backward, op, rounded, run
from fastnn.ops._linear_map import LinearMap, Maps, channels_last


def _wrong(size, before, after, mode):
    """Why PyTorch refuses to pad a dimension of that size; None if it does not."""
    if mode == "constant":
        left = size + min(before, 0), size + min(after, 0), size + before + after
        return f"crops of {before} and {after} from a size of {size}" if min(left) < 0 else None
    if size + before + after < 1:
        return "crops of all there is"
    most = {"reflect": size - 1, "replicate": math.inf, "circular": size}[mode]
    return (
        f"pads of {before} and {after} for a size of {size}" if max(before, after) > most else None
    )


_NARROW = 32  # elements of a row: fewer leave most threads of a warp idle


def _gains(input, pad, mode="constant", *rest):
    """The policy of the size gate: a kernel saves a pass that fills with zeros, or slices."""
    if input.dim() and input.shape[-1] < _NARROW:
        few = f"rows of {input.shape[-1]} elements, of which a kernel fills few threads"
        return Stock("gate", few)
    backward = torch.is_grad_enabled() and input.requires_grad
    if mode in ("reflect", "replicate") and not backward:
        return Stock("gate", "without a gradient PyTorch, too, reads and writes once")
    return Work(input.numel())


def _raises(input, pad, mode="constant", *rest):
    return mode == "reflect" and in_backward(input)


@op(stock=stock.pad, policy=_gains, strided=("input",), autocast_cpu="fp32", alerts=_raises)
def pad(input, pad, mode="constant", value=None, *, out_dtype=None):
    """Fused for up to 5 dimensions. The gradient is a gather, with the same bits each time. Under
    `torch.use_deterministic_algorithms(True)` no mode raises. PyTorch raises for reflect on CUDA.
    """
    dims = input.dim()
    if not isinstance(pad, (list, tuple)) or any(type(n) is not int for n in pad):
        return Stock("option", f"pad={pad!r}")
    if len(pad) % 2 or len(pad) > 2 * dims:
        return Invalid("shape", f"{len(pad)} pads for {dims} dimensions")
    if type(value) not in (int, float, type(None)):
        return Stock("option", f"value={value!r}")
    if mode not in ("constant", "reflect", "replicate", "circular"):
        return Invalid("option", f"mode={mode!r}")
    if mode != "constant":
        if len(pad) not in (2, 4, 6) or dims - len(pad) // 2 not in (1, 2):
            return Invalid("shape", f"{len(pad)} pads for {dims} dimensions")
        if value:
            return Invalid("option", f"mode={mode!r} with value={value!r}")
    if dims > kernels.gather.AXES:
        return Stock("shape", f"{dims} dimensions, of more than {kernels.gather.AXES}")
    pads = [(pad[i], pad[i + 1]) for i in range(len(pad) - 2, -1, -2)]
    pads = [(0, 0)] * (dims - len(pads)) + pads
    size = input.shape
    for n, (before, after) in zip(size, pads, strict=True):
        why = _wrong(n, before, after, mode) if before or after else None
        if why is not None:
            return Invalid("option", why)
    if mode == "constant" and max(pad, default=0) <= 0:
        return Stock("gate", "crops alone, of which PyTorch makes one copy")
    if mode == "circular" and min(pad) < 0:
        return Stock("option", "circular pads that are negative")
    if mode != "constant" and not input.numel():
        batched = dims - len(pad) // 2 == 2
        if not batched or 0 in size[1:]:
            return Stock("empty", "no elements")
    elements = math.prod(n + sum(both) for n, both in zip(size, pads, strict=True))
    if max(input.numel(), elements, *map(abs, pad)) >= kernels.gather.MOST:
        return Stock("size", f"{elements:,} elements by pad={pad}; 32 bits cannot index so many")
    fill = rounded(0.0 if value is None else value, input.dtype)
    if fill is None:
        return Invalid("option", f"value={value!r}")
    # On CUDA reflect and replicate pad make plain results, on a CPU they keep the layout.
    last = channels_last(input)
    kept = last and (mode == "constant" or (mode != "circular" and not input.is_cuda))
    listed = mode == "replicate" or (mode == "reflect" and len(pad) < 6)  # by autocast on the CPU
    given = input.dtype
    dtype = (out_dtype if listed else None) or given

    def forward(x, fill=fill):
        return kernels.gather.pad_fwd(x, pads, mode, fill, dtype, kept)

    def backward(dy):
        return kernels.gather.pad_bwd(dy, size, pads, mode, given, last)

    maps = Maps(forward, backward, lambda x: forward(x, 0.0), once=mode == "circular")
    return run(LinearMap, input, maps, mode in ("reflect", "replicate"))
