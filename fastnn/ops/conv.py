"""Convolutions and transposed convolutions over one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as stock
from torch import Tensor

from fastnn import kernels
from fastnn._op import Function, Invalid, Stock, Work, op, run, second_order
from fastnn.kernels import _gpus
from fastnn.ops.linear import precision_of

_FEW_PAIRS = 16  # pairs of channels in a group, for which matrix products are mostly padding
_LIMIT = 2**31  # elements of a sample, and positions of a channel, that kernels can index


class Plan(NamedTuple):
    """One convolution. Of each list, the last `dims` entries count; those before them do nothing.

    `small` is the tensor whose positions the taps are placed on: the output, or the input of a
    transposed convolution. `big` is the other one.
    """

    dims: int
    transposed: bool
    options: tuple[Any, ...]  # PyTorch's arguments after the bias
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]  # before the first position
    dilation: tuple[int, ...]
    groups: int
    out: tuple[int, ...]  # the sizes of the output
    last: bool  # whether tensors are channels last
    how: tuple[str, str] | None  # precision and architecture of the matrix products, if there are

    def formula(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """PyTorch's function of the same call."""
        name = f"conv_transpose{self.dims}d" if self.transposed else f"conv{self.dims}d"
        return getattr(stock, name)(input, weight, bias, *self.options)

    def batch(self, t: Tensor) -> Tensor:
        """t (N, C, *), or t (C, *) as a batch of one."""
        return t if t.dim() == self.dims + 2 else t.unsqueeze(0)

    @property
    def geometry(self) -> tuple[Any, ...]:
        return self.kernel_size, self.stride, self.padding, self.dilation, self.dims


# ---- Layouts -------------------------------------------------------------------------------------


def _channels_last(t: Tensor) -> bool:
    """Whether ATen takes `t` (N, C, *) for channels last; strides at sizes of 1 count, too."""
    shape, strides = list(t.shape), list(t.stride())
    if t.dim() == 3:  # ATen runs it as (N, C, 1, L)
        shape.insert(2, 1)
        strides.insert(2, shape[3] * strides[2])
    if strides[1] == 0:
        return False
    least = 0
    for d in (1, *range(len(shape) - 1, 1, -1), 0):
        if shape[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * max(shape[d], 1)
    return True


def _runs_channels_last(batch: Tensor, weight: Tensor) -> bool:
    # ATen makes input of one dimension contiguous first.
    return (batch.dim() > 3 and _channels_last(batch)) or _channels_last(weight)


def _volume(t: Tensor, last: bool) -> Tensor:
    """t (N, C, *) -> (N, C, D, H, W), contiguous or channels last; copies only if it must."""
    if last:
        t = t.movedim(1, -1).contiguous().movedim(-1, 1)
    else:
        t = t.contiguous()
    for _ in range(5 - t.dim()):
        t = t.unsqueeze(2)
    return t


def _new(like: Tensor, shape: Sequence[int], last: bool, single: bool) -> Tensor:
    """A new tensor (N, C, *), channels last if `last`; (C, *) of a `single` sample."""
    if not last:
        return like.new_empty(shape[1:] if single else shape)
    strides, size = [0] * len(shape), 1
    for d in (1, *range(len(shape) - 1, 1, -1), 0):
        strides[d], size = size, size * shape[d]
    made = (shape[1:], strides[1:]) if single else (shape, strides)
    # In its final shape: a view that was made here could not be edited in place later.
    return torch.empty_strided(*made, dtype=like.dtype, device=like.device)


# ---- The products --------------------------------------------------------------------------------


def _weight(weight: Tensor, last: bool) -> Tensor:
    """weight (K, C, *) with taps in one dimension, before the channels in memory if `last`."""
    if last:
        return weight.movedim(1, -1).contiguous().view(weight.shape[0], -1, weight.shape[1])
    return weight.contiguous().view(*weight.shape[:2], -1)


def _gather(source: Tensor, weight: Tensor, bias: Tensor | None, to: Tensor, plan: Plan, up: bool):
    """Writes `to`. up: from `small` to `big`, else from `big` to `small`. Both are volumes."""
    each, C = weight.shape[0] // plan.groups, weight.shape[1]
    outs, reads = (C, each) if up else (each, C)
    if plan.how is not None:
        kernels.conv.gather(
            source, _weight(weight, plan.last), bias, to, outs, reads, plan.geometry, up, plan.last,
            *plan.how,
        )  # fmt: skip
        return
    w = _weight(weight, False)
    k, c, tap = w.stride()
    strides = (each * k, c, k, tap) if up else (each * k, k, c, tap)
    kernels.conv_direct.gather(
        source, w, strides, bias, to, outs, reads, plan.geometry, up, plan.last
    )


def _weight_gradient(small: Tensor, big: Tensor, weight: Tensor, plan: Plan, want_db: bool):
    """(dw, db); db, the sums of `small`, is None unless wanted, and where another kernel is due."""
    dw = weight.new_empty(weight.shape)
    sizes = dw.view(*weight.shape[:2], -1), weight.shape[0] // plan.groups, weight.shape[1]
    if plan.how is not None:
        kernels.conv.weight_gradient(small, big, *sizes, plan.geometry, plan.last, *plan.how)
        return dw, None
    _, db = kernels.conv_direct.weight_gradient(
        small, big, *sizes, plan.geometry, plan.last, want_db
    )
    return dw, db


def _channel_sums(dy: Tensor, last: bool) -> Tensor:
    """dy (N, K, D, H, W), contiguous or channels last -> (K,)."""
    if last:
        rows = dy.movedim(1, -1).reshape(-1, dy.shape[1])
        return kernels.epilogue.bwd(rows, want_dz=False)[1]
    return dy.sum((0, 2, 3, 4), dtype=dy.dtype)  # which autocast then leaves as it is


def tf32_setting() -> str:
    """PyTorch's setting for float32 convolutions on a GPU: "tf32" or "ieee"."""
    cudnn: Any = torch.backends.cudnn
    return precision_of(lambda: cudnn.conv.fp32_precision, lambda: cudnn.allow_tf32)


def _precision(device_index: int) -> tuple[str, str]:
    """("tf32" or "ieee", architecture) of products on a device."""
    arch = _gpus.architecture(device_index)
    gpu = _gpus.facts(arch)
    # The setting is one of CUDA; a CPU, on which kernels are interpreted, follows another one.
    return (tf32_setting() if gpu.tf32 and gpu.name != "cpu" else "ieee"), arch


class Conv(Function):
    """input (N, C, *) or (C, *), weight, bias or None -> output (N, K, *) or (K, *)."""

    strided = ("dy",)

    @staticmethod
    def forward(ctx, input, weight, bias, plan):
        ctx.save_for_backward(input, weight)
        ctx.rest = plan
        x = plan.batch(input)
        K = weight.shape[1] * plan.groups if plan.transposed else weight.shape[0]
        y = _new(input, (x.shape[0], K, *plan.out), plan.last, x is not input)
        x, to = _volume(x, plan.last), _volume(plan.batch(y), plan.last)
        _gather(x, weight, bias, to, plan, plan.transposed)
        return y

    @staticmethod
    def backward(ctx, dy):
        input, weight = ctx.saved_tensors
        plan = ctx.rest
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True: a kernel's gradient would carry no graph
            dx, dw = second_order(plan.formula, (input, weight), dy, needs[:2])
            db = plan.batch(dy).flatten(2).sum((0, 2)) if needs[2] else None
            return dx, dw, db, None
        dx = dw = db = None
        x, dy = plan.batch(input), _volume(plan.batch(dy), plan.last)
        if needs[0]:
            dx = _new(input, x.shape, plan.last, x is not input)
            to = _volume(plan.batch(dx), plan.last)
            _gather(dy, weight, None, to, plan, not plan.transposed)
        if needs[1]:
            x = _volume(x, plan.last)
            small, big = (x, dy) if plan.transposed else (dy, x)
            dw, db = _weight_gradient(small, big, weight, plan, needs[2] and not plan.transposed)
        if needs[2] and db is None:
            db = _channel_sums(dy, plan.last)
        return dx, dw, db, None


# ---- The arguments -------------------------------------------------------------------------------


def _ints(value: Any, dims: int) -> tuple[int, ...] | None:
    """An option as `dims` ints; None if it is not of ints, or not of so many."""
    if type(value) is int:
        return (value,) * dims
    if not isinstance(value, (tuple, list)) or any(type(v) is not int for v in value):
        return None
    values = tuple(value)
    return values * dims if len(values) == 1 else values if len(values) == dims else None


def _planned(
    dims: int, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any,
    dilation: Any, groups: Any, output_padding: Any = None,
) -> Plan | Stock:  # fmt: skip
    """The plan of a call, of a transposed convolution if `output_padding` is given."""
    transposed = output_padding is not None
    options: tuple[Any, ...] = stride, padding, dilation, groups
    if transposed:
        options = stride, padding, output_padding, groups, dilation
    if input.dim() not in (dims + 1, dims + 2) or weight.dim() != dims + 2:
        return Invalid(f"input {tuple(input.shape)}, weight {tuple(weight.shape)}")
    if input.dtype != weight.dtype or (bias is not None and bias.dtype != input.dtype):
        return Invalid("several dtypes")
    strides, dilations = _ints(stride, dims), _ints(dilation, dims)
    if strides is None or min(strides) < 1 or dilations is None or min(dilations) < 1:
        return Invalid(f"stride={stride!r}, dilation={dilation!r}")
    kernel_size = tuple(weight.shape[2:])
    reach = [d * (k - 1) for k, d in zip(kernel_size, dilations, strict=True)]
    if padding in ("same", "valid") and not transposed:
        if padding == "same" and max(strides) > 1:
            return Invalid("padding='same' with a stride")
        both = reach if padding == "same" else [0] * dims
        before = tuple(b // 2 for b in both)
    else:
        given = _ints(padding, dims)
        if given is None or min(given) < 0:
            return Invalid(f"padding={padding!r}")
        before, both = given, [2 * p for p in given]
    if type(groups) is not int or not 1 <= groups <= weight.shape[0] or weight.shape[0] % groups:
        return Invalid(f"groups={groups!r}")
    sizes = input.shape[-dims:]
    C = input.shape[-dims - 1]
    if transposed:
        more = _ints(output_padding, dims)
        if more is None or any(
            not 0 <= m < max(s, d) for m, s, d in zip(more, strides, dilations, strict=True)
        ):
            return Invalid(f"output_padding={output_padding!r}")
        reads, K = weight.shape[0], weight.shape[1] * groups
        out = [
            (i - 1) * s - b + r + m + 1
            for i, s, b, r, m in zip(sizes, strides, both, reach, more, strict=True)
        ]
    else:
        reads, K = weight.shape[1] * groups, weight.shape[0]
        out = [
            (i + b - r - 1) // s + 1 for i, s, b, r in zip(sizes, strides, both, reach, strict=True)
        ]
    if C != reads or (bias is not None and tuple(bias.shape) != (K,)):
        return Invalid(f"{C} channels, weight {tuple(weight.shape)} in {groups} groups")
    if not input.numel() or not weight.numel():
        return Stock("no elements")
    if min(out) < 1:
        return Invalid(f"an output of {tuple(out)}")
    batch = input if input.dim() == dims + 2 else input.unsqueeze(0)
    positions = max(sizes.numel(), torch.Size(out).numel())
    if max(C, K, batch.shape[0]) * positions >= _LIMIT:
        return Stock("more elements of a sample, or positions of a channel, than 32 bits can index")
    last = _runs_channels_last(batch, weight)
    direct = weight.shape[0] // groups * weight.shape[1] <= _FEW_PAIRS
    how = None if direct else _precision(input.get_device())
    ones, zeros = (1,) * (3 - dims), (0,) * (3 - dims)
    return Plan(
        dims, transposed, options, ones + kernel_size, ones + strides, zeros + before,
        ones + dilations, groups, tuple(out), last, how,
    )  # fmt: skip


def _conv(dims, input, weight, bias, *options):
    plan = _planned(dims, input, weight, bias, *options)
    return plan if isinstance(plan, Stock) else run(Conv, input, weight, bias, plan)


# ---- The ops -------------------------------------------------------------------------------------

_MOST_TAPS = 9  # of a channels-first kernel, whose loads are single elements


def _depthwise(input, weight, bias, stride, padding, dilation, groups, *more):
    """The gate's policy: kernels win only where every channel reads one channel.

    The arguments of a transposed convolution have other names, but `groups` has the same place.
    """
    dims = weight.dim() - 2
    if groups == 1 or groups != input.shape[-dims - 1]:
        return Stock("not depthwise, and cuDNN is as fast for every other convolution")
    batch = input if input.dim() == dims + 2 else input.unsqueeze(0)
    taps = weight.shape[2:].numel()
    if taps > _MOST_TAPS and not _runs_channels_last(batch, weight):
        return Stock(f"{taps} taps, and channels are not last: PyTorch's kernel is as fast")
    return Work(input.numel(), "elements", "depthwise")


def _op(name: str):
    return op(
        stock=getattr(stock, name),
        strided=("input", "weight"),
        autocast="lower",
        autocast_cpu="lower",
        policy=_depthwise,
        settings=tf32_setting,
        variants=("depthwise",),
    )


@_op("conv1d")
def conv1d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """As conv2d."""
    return _conv(1, input, weight, bias, stride, padding, dilation, groups)


@_op("conv2d")
def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """Fused with its bias, for every stride, padding, dilation and number of groups.

    The sums of a depthwise convolution read its tensors once in each direction.
    """
    return _conv(2, input, weight, bias, stride, padding, dilation, groups)


@_op("conv3d")
def conv3d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """As conv2d."""
    return _conv(3, input, weight, bias, stride, padding, dilation, groups)


@_op("conv_transpose1d")
def conv_transpose1d(
    input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
):  # fmt: skip
    """As conv2d."""
    return _conv(1, input, weight, bias, stride, padding, dilation, groups, output_padding)


@_op("conv_transpose2d")
def conv_transpose2d(
    input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
):  # fmt: skip
    """As conv2d: the kernels of the gradients of conv2d."""
    return _conv(2, input, weight, bias, stride, padding, dilation, groups, output_padding)


@_op("conv_transpose3d")
def conv_transpose3d(
    input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
):  # fmt: skip
    """As conv2d."""
    return _conv(3, input, weight, bias, stride, padding, dilation, groups, output_padding)
