"""Convolutions and transposed convolutions over one, two and three dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as stock
from torch import Tensor

from fastnn import kernels
from fastnn._op import Function, Invalid, Stock, Work, op, run, second_order
from fastnn._strides import is_channels_last
from fastnn.kernels import _gpus
from fastnn.ops.activation import refuse_numbers
from fastnn.ops.channel_norm import Act, checked_activation, mixed_dtypes, of_channels
from fastnn.ops.linear import ACTIVATIONS, GEMM_ARCHITECTURES, Fp32Precision

_FEW_PAIRS = 16  # pairs of channels in a group, for which matrix products are mostly padding
_LIMIT = 2**31  # elements of a sample, and positions of a channel, that kernels can index


class Convolution(NamedTuple):
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

    def sums_both(self, weight: Tensor) -> bool:
        """Whether one kernel sums both gradients: each channel reads one channel, by few taps."""
        if weight.shape[0] != self.groups or weight.shape[1] != 1:
            return False
        taps, index = math.prod(self.kernel_size), weight.get_device()
        return kernels.conv_direct.sums_both(taps, self.last, index)

    @property
    def is_linear(self) -> bool:
        """Whether products of it are one of matrices that are views: rows are positions."""
        ones = self.kernel_size == self.stride == (1, 1, 1) and not any(self.padding)
        return ones and self.groups == 1 and self.last and not self.transposed


# ---- Layouts -------------------------------------------------------------------------------------


def _runs_channels_last(batch: Tensor, weight: Tensor) -> bool:
    # ATen makes input of one dimension contiguous first.
    last = batch.dim() > 3 and is_channels_last(batch.shape, batch.stride())
    return last or is_channels_last(weight.shape, weight.stride())


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


def _rows(t: Tensor) -> Tensor:
    """A volume (N, C, D, H, W) that is channels last -> (N * D * H * W, C), a view."""
    return t.movedim(1, -1).view(-1, t.shape[1])


# ---- The products --------------------------------------------------------------------------------


def _weight(weight: Tensor, last: bool) -> Tensor:
    """weight (K, C, *) with taps in one dimension, before the channels in memory if `last`."""
    if last:
        return weight.movedim(1, -1).contiguous().view(weight.shape[0], -1, weight.shape[1])
    return weight.contiguous().view(*weight.shape[:2], -1)


def _gather(
    source: Tensor, weight: Tensor, bias: Tensor | None, to: Tensor, plan: Convolution, up: bool,
    z: Tensor | None = None, norm: tuple | None = None, act: tuple | None = None,
):  # fmt: skip
    """Writes `to`. up: from `small` to `big`, else from `big` to `small`. Both are volumes.

    z, norm and act: what follows, as in `kernels.conv_direct.follows`.
    """
    if plan.how is not None and plan.is_linear and norm is None:
        w = weight.reshape(weight.shape[:2])
        if up:
            kernels.linear.bwd_dx(_rows(source), w, *plan.how, dx=_rows(to))
        else:
            more = {"z": None if z is None else _rows(z), "act": act}
            kernels.linear.fwd(_rows(source), w, bias, *plan.how, y=_rows(to), **more)
        return
    after = {"z": z, "norm": norm, "act": act}
    each, C = weight.shape[0] // plan.groups, weight.shape[1]
    outs, reads = (C, each) if up else (each, C)
    if plan.how is not None:
        kernels.conv.gather(
            source, _weight(weight, plan.last), bias, to, outs, reads, plan.geometry, up, plan.last,
            *plan.how, **after,
        )  # fmt: skip
        return
    w = _weight(weight, False)
    k, c, tap = w.stride()
    strides = (each * k, c, k, tap) if up else (each * k, k, c, tap)
    kernels.conv_direct.gather(
        source, w, strides, bias, to, outs, reads, plan.geometry, up, plan.last, **after
    )


def _weight_gradient(small: Tensor, big: Tensor, weight: Tensor, plan: Convolution, want_db: bool):
    """(dw, db); db, the sums of `small`, is None unless wanted, and where another kernel is due."""
    dw = weight.new_empty(weight.shape)
    if plan.how is not None and plan.is_linear:
        kernels.linear.bwd_dw(_rows(small), _rows(big), *plan.how, dw=dw.view(weight.shape[:2]))
        return dw, None
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
        return kernels.epilogue.bwd(_rows(dy), want_dz=False)[1]
    return dy.sum((0, 2, 3, 4), dtype=dy.dtype)  # which autocast then leaves as it is


_CUDNN: Any = torch.backends.cudnn
tf32_setting = Fp32Precision("conv", lambda: _CUDNN.conv, lambda: _CUDNN)


def _precision(device_index: int) -> tuple[str, str]:
    """("tf32" or "ieee", architecture) of products on a device."""
    arch = _gpus.architecture(device_index)
    gpu = _gpus.facts(arch)
    # The setting is one of CUDA; a CPU, on which kernels are interpreted, follows another one.
    return (tf32_setting() if gpu.tf32 and gpu.name != "cpu" else "ieee"), arch


def _result(input: Tensor, weight: Tensor, plan: Convolution) -> Tensor:
    x = plan.batch(input)
    K = weight.shape[1] * plan.groups if plan.transposed else weight.shape[0]
    return _new(input, (x.shape[0], K, *plan.out), plan.last, x is not input)


def _convolve(input, weight, bias, y, plan, z=None, norm=None, act=None):
    """Writes y, and z if given."""
    x, to = (_volume(plan.batch(t), plan.last) for t in (input, y))
    if z is not None:
        z = _volume(plan.batch(z), plan.last)
    _gather(x, weight, bias, to, plan, plan.transposed, z, norm, act)


def _gradients(dy, input, weight, plan, needs, db=None):
    """dy, a volume -> (dx, dw, db), each None unless needed. `db` may already be known."""
    dx = dw = None
    to: Any = None
    x = plan.batch(input)
    want_db = needs[2] and db is None
    both = needs[0] and needs[1] and plan.sums_both(weight)
    if needs[0]:
        dx = _new(input, x.shape, plan.last, x is not input)
        to = _volume(plan.batch(dx), plan.last)
    if needs[1]:
        x = _volume(x, plan.last)
    if both:  # dy is read once
        dw = weight.new_empty(weight.shape)
        found = kernels.conv_direct.both_gradients(
            dy, x, weight, to, dw.view(*weight.shape[:2], -1), plan.geometry, not plan.transposed,
            plan.last, want_db,
        )  # fmt: skip
        db = found if db is None else db
    elif needs[0]:
        assert to is not None  # made above
        _gather(dy, weight, None, to, plan, not plan.transposed)
    if needs[1] and not both:
        small, big = (x, dy) if plan.transposed else (dy, x)
        sums = want_db and not plan.transposed
        dw, found = _weight_gradient(small, big, weight, plan, sums)
        db = found if db is None else db
    if needs[2] and db is None:
        db = _channel_sums(dy, plan.last)
    return dx, dw, db


class Conv(Function):
    """input (N, C, *) or (C, *), weight, bias or None -> output (N, K, *) or (K, *)."""

    strided = ("dy",)

    @staticmethod
    def forward(ctx, input, weight, bias, plan):
        ctx.save_for_backward(input, weight)
        ctx.rest = plan
        y = _result(input, weight, plan)
        _convolve(input, weight, bias, y, plan)
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
        dy = _volume(plan.batch(dy), plan.last)
        return *_gradients(dy, input, weight, plan, needs), None


class After(NamedTuple):
    """What follows a convolution: a norm with running statistics, if eps is given; then `act`."""

    act: Act | None
    eps: float | None

    def __call__(self, z, mean, var, scale, shift):
        """PyTorch's formula."""
        if self.eps is not None:
            z = stock.batch_norm(z, mean, var, scale, shift, False, 0.0, self.eps)
        return z if self.act is None else self.act(z)

    @property
    def keeps_y(self) -> bool:
        return self.act is not None and self.act.formula.keeps == "y"


class ConvAct(Function):
    """input, weight and bias as for `Conv`, the norm's mean, var, scale and shift, each (K,) or
    None -> y, and z, the result of the convolution, if it is kept.

    z is an output, so that a second derivative can pass through z.
    """

    strided = ("dy", "dz_of_second")

    @staticmethod
    def forward(ctx, input, weight, bias, mean, var, scale, shift, plan, after):
        y, z = _result(input, weight, plan), None
        if any(ctx.needs_input_grad) and (after.eps is not None or not after.keeps_y):
            z = _result(input, weight, plan)
        given = after.act
        act = None if given is None else (given.formula.value, given.a, given.b)
        norm = None if after.eps is None else (mean, var, scale, shift, after.eps)
        _convolve(input, weight, bias, y, plan, z, norm, act)
        # PyTorch's convolution keeps both of them, unless none of its tensors wants a gradient.
        kept = (input, weight) if any(ctx.needs_input_grad[:3]) else (None, None)
        ctx.save_for_backward(*kept, mean, var, scale, shift, z, y if after.keeps_y else None)
        ctx.rest = plan, after, None if shift is None else shift.dtype
        ctx.set_materialize_grads(False)
        return y, z

    @staticmethod
    def backward(ctx, dy, dz_of_second):
        input, weight, mean, var, scale, shift, z, y = ctx.saved_tensors
        plan, after, shift_dtype = ctx.rest
        needs = ctx.needs_input_grad
        dz, dscale, dshift = dz_of_second, None, None
        if torch.is_grad_enabled():
            if dy is not None:
                if z is None:
                    through_y = after.act.formula.stock(dy, y, after.act.a, after.act.b)
                else:
                    through_y, dscale, dshift = second_order(
                        lambda z, *parameters: after(z, mean, var, *parameters),
                        (z, scale, shift), dy, (True, *needs[5:7]),
                    )  # fmt: skip
                dz = through_y if dz is None else through_y + dz
            dx = dw = db = None
            if any(needs[:2]):
                dx, dw = second_order(plan.formula, (input, weight), dz, needs[:2])
            if needs[2]:
                db = plan.batch(dz).flatten(2).sum((0, 2))
            return dx, dw, db, None, None, dscale, dshift, None, None
        db = None
        if dy is not None:
            z, y = (None if t is None else _volume(plan.batch(t), plan.last) for t in (z, y))
            through_y, db, dscale, dshift = _through(
                _volume(plan.batch(dy), plan.last), mean, var, scale, shift, z, y, plan, after,
                any(needs[:3]), needs[2] and dz is None,
                scale.dtype if needs[5] else None, shift_dtype if needs[6] else None,
            )  # fmt: skip
            if dz is not None and through_y is not None:
                through_y = through_y + _volume(plan.batch(dz), plan.last)
            dz = through_y
        else:
            dz = _volume(plan.batch(dz), plan.last)
        dx = dw = None
        if any(needs[:3]):
            dx, dw, db = _gradients(dz, input, weight, plan, needs, db)
        return dx, dw, db, None, None, dscale, dshift, None, None


def _through(
    dy, mean, var, scale, shift, z, y, plan, after, want_dz, want_db, dscale_dtype, dshift_dtype
):  # fmt: skip
    """dy, a volume -> dz, the part of dy that comes through what follows; db, dscale and dshift.

    Each is None unless wanted, and db also where it would cost a pass of its own.
    """
    act = after.act
    formula: Any = None if act is None else act.formula
    if after.eps is not None:
        rest: dict[str, Any] = {"last": plan.last}
        if act is not None:
            value = formula.value if formula.keeps == "y" else None
            rest.update(formula=value, gradient=formula.gradient, a=act.a, b=act.b)
        dz, dscale, dshift, _ = kernels.channel_norm.bwd(
            dy, z, scale, shift, mean, var, 0, want_dz, dscale_dtype, dshift_dtype, after.eps,
            **rest,
        )  # fmt: skip
        return dz, None, dscale, dshift
    saved = y if z is None else z
    if plan.last and plan.how is not None:
        dz, db = kernels.epilogue.bwd(
            _rows(dy), _rows(saved), formula.gradient, None, act.a, act.b, want_db=want_db
        )
        N, K, *sizes = dy.shape
        return dz.view(N, *sizes, K).movedim(-1, 1), db, None, None
    return kernels.pointwise.bwd(dy, saved, formula.gradient, act.a, act.b), None, None, None


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
) -> Convolution | Stock:  # fmt: skip
    """The plan of a call, of a transposed convolution if `output_padding` is given."""
    transposed = output_padding is not None
    options: tuple[Any, ...] = stride, padding, dilation, groups
    if transposed:
        options = stride, padding, output_padding, groups, dilation
    if input.dim() not in (dims + 1, dims + 2) or weight.dim() != dims + 2:
        return Invalid("shape", f"input {tuple(input.shape)}, weight {tuple(weight.shape)}")
    if input.dtype != weight.dtype or (bias is not None and bias.dtype != input.dtype):
        return Invalid("dtype", "several dtypes")
    strides, dilations = _ints(stride, dims), _ints(dilation, dims)
    if strides is None or min(strides) < 1 or dilations is None or min(dilations) < 1:
        return Invalid("option", f"stride={stride!r}, dilation={dilation!r}")
    kernel_size = tuple(weight.shape[2:])
    reach = [d * (k - 1) for k, d in zip(kernel_size, dilations, strict=True)]
    if padding in ("same", "valid") and not transposed:
        if padding == "same" and max(strides) > 1:
            return Invalid("option", "padding='same' with a stride")
        both = reach if padding == "same" else [0] * dims
        before = tuple(b // 2 for b in both)
    else:
        given = _ints(padding, dims)
        if given is None or min(given) < 0:
            return Invalid("option", f"padding={padding!r}")
        before, both = given, [2 * p for p in given]
    if type(groups) is not int or not 1 <= groups <= weight.shape[0] or weight.shape[0] % groups:
        return Invalid("option", f"groups={groups!r}")
    sizes = input.shape[-dims:]
    C = input.shape[-dims - 1]
    if transposed:
        more = _ints(output_padding, dims)
        if more is None or any(
            not 0 <= m < max(s, d) for m, s, d in zip(more, strides, dilations, strict=True)
        ):
            return Invalid("option", f"output_padding={output_padding!r}")
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
        return Invalid("shape", f"{C} channels, weight {tuple(weight.shape)} in {groups} groups")
    if not input.numel() or not weight.numel():
        return Stock("empty", "no elements")
    if min(out) < 1:
        return Invalid("shape", f"an output of {tuple(out)}")
    batch = input if input.dim() == dims + 2 else input.unsqueeze(0)
    positions = max(sizes.numel(), torch.Size(out).numel())
    if max(max(C, K, batch.shape[0]) * positions, weight.numel()) >= _LIMIT:
        return Stock(
            "size",
            "more elements of a sample or weight, or positions of a channel, than 32 bits index",
        )
    last = _runs_channels_last(batch, weight)
    direct = weight.shape[0] // groups * weight.shape[1] <= _FEW_PAIRS
    how = None if direct else _precision(input.get_device())
    ones, zeros = (1,) * (3 - dims), (0,) * (3 - dims)
    return Convolution(
        dims, transposed, options, ones + kernel_size, ones + strides, zeros + before,
        ones + dilations, groups, tuple(out), last, how,
    )  # fmt: skip


def _conv(dims, input, weight, bias, *options):
    plan = _planned(dims, input, weight, bias, *options)
    return plan if isinstance(plan, Stock) else run(Conv, input, weight, bias, plan)


def _transposed(dims, input, weight, bias, stride, padding, dilation, groups, output_padding):
    if output_padding is None:
        return Invalid("option", "output_padding=None")
    return _conv(dims, input, weight, bias, stride, padding, dilation, groups, output_padding)


# ---- The ops -------------------------------------------------------------------------------------

_MOST_TAPS = 9  # of a channels-first kernel, whose loads are single elements


def _depthwise(input, weight, bias, stride, padding, dilation, groups, *more):
    """The gate's policy: kernels win only where every channel reads one channel.

    The arguments of a transposed convolution have other names, but `groups` has the same place.
    """
    dims = weight.dim() - 2
    if groups == 1 or groups != input.shape[-dims - 1]:
        return Stock("gate", "not depthwise, and cuDNN is as fast for every other convolution")
    batch = input if input.dim() == dims + 2 else input.unsqueeze(0)
    taps = weight.shape[2:].numel()
    if taps > _MOST_TAPS and not _runs_channels_last(batch, weight):
        return Stock("gate", f"{taps} taps, and channels are not last: PyTorch's kernel is as fast")
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
    return _transposed(1, input, weight, bias, stride, padding, dilation, groups, output_padding)


@_op("conv_transpose2d")
def conv_transpose2d(
    input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
):  # fmt: skip
    """As conv2d: the kernels of the gradients of conv2d."""
    return _transposed(2, input, weight, bias, stride, padding, dilation, groups, output_padding)


@_op("conv_transpose3d")
def conv_transpose3d(
    input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
):  # fmt: skip
    """As conv2d."""
    return _transposed(3, input, weight, bias, stride, padding, dilation, groups, output_padding)


# ---- Convolution, norm, activation ---------------------------------------------------------------

# Estimates from bytes and FLOPs, not timed. At 0.7 of the speed of cuDNN, our products still win by
# the passes that they save, for so many products of an output per pass; see linear.py. If z is
# written too, half a pass is lost.
_PRODUCTS = 512


def _wins(input, weight, bias, stride, padding, dilation, groups, passes, tracked):
    """The gate's policy, for a convolution whose result `passes` passes would follow."""
    chosen = _depthwise(input, weight, bias, stride, padding, dilation, groups)
    if groups != 1 or not isinstance(chosen, Stock):
        return chosen
    C, products = weight.shape[1], weight.shape[1:].numel()
    most = _PRODUCTS * passes
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tracked):
        most -= _PRODUCTS // 2
    if products > most:
        return Stock(
            "gate", f"{products} products for an output: cuDNN saves more than a pass takes"
        )
    if input.element_size() != 2 or C % 8 or weight.shape[0] % 8:
        return Stock(
            "gate", "cuDNN is faster for products of float32, or of channels not in eights"
        )
    if _gpus.architecture(input.get_device()) not in GEMM_ARCHITECTURES:
        return Stock("gate", "for dense convolutions on this GPU there is no estimate")
    if not _runs_channels_last(input, weight):
        return Stock(
            "gate", "channels are not last, and cuDNN is as fast for every dense convolution"
        )
    return Work(input.numel(), "elements", "dense")


def _after(activation, a, b) -> Act | Stock | None:
    if activation is None:
        return None
    if activation not in ACTIVATIONS:
        return Invalid("option", f"activation={activation!r}")
    return refuse_numbers(a, b, activation=activation or "") or Act(activation, float(a), float(b))


def _stock_conv(input, weight, *rest):
    return getattr(stock, f"conv{min(max(weight.dim() - 2, 1), 3)}d")(input, weight, *rest)


def _conv_then_act(
    input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, activation="relu", a=0.0,
    b=0.0,
):  # fmt: skip
    act = checked_activation("conv_act", activation, a, b)
    return act(_stock_conv(input, weight, bias, stride, padding, dilation, groups))


def _act_wins(
    input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, activation="relu", a=0.0,
    b=0.0,
):  # fmt: skip
    tracked = input, weight, bias
    return _wins(input, weight, bias, stride, padding, dilation, groups, 1, tracked)


@op(
    stock=_conv_then_act,
    strided=("input", "weight"),
    autocast="lower",
    autocast_cpu="lower",
    policy=_act_wins,
    settings=tf32_setting,
    variants=("depthwise", "dense"),
)
def conv_act(
    input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, activation="relu", a=0.0,
    b=0.0,
):  # fmt: skip
    """`activation(conv(input, weight, bias, stride, padding, dilation, groups), a, b)`, one kernel.

    `Sequential` calls it for a convolution and the activation after it. weight (K, C / groups, *)
    has one, two or three dimensions of taps. The activations, and a and b, are those of
    `linear_act`. Raises ValueError for any other activation.
    """
    act = _after(activation, a, b)
    if act is None or isinstance(act, Stock):
        return act or Invalid("option", "activation=None")
    plan = _planned(weight.dim() - 2, input, weight, bias, stride, padding, dilation, groups)
    if isinstance(plan, Stock):
        return plan
    rest = plan, After(act, None)
    return run(ConvAct, input, weight, bias, None, None, None, None, *rest)[0]


def _conv_then_norm_then_act(
    input, weight, bias, running_mean, running_var, norm_weight=None, norm_bias=None, eps=1e-5,
    stride=1, padding=0, dilation=1, groups=1, activation=None, a=0.0, b=0.0,
):  # fmt: skip
    z = _stock_conv(input, weight, bias, stride, padding, dilation, groups)
    y = stock.batch_norm(
        z, running_mean, running_var, norm_weight, norm_bias, False, 0.0, eps
    )  # fmt: skip
    return (
        y if activation is None else checked_activation("conv_batch_norm_act", activation, a, b)(y)
    )


def _norm_wins(
    input, weight, bias, running_mean, running_var, norm_weight=None, norm_bias=None, eps=1e-5,
    stride=1, padding=0, dilation=1, groups=1, activation=None, a=0.0, b=0.0,
):  # fmt: skip
    tracked = input, weight, bias, norm_weight, norm_bias
    passes = 1 if activation is None else 2
    return _wins(input, weight, bias, stride, padding, dilation, groups, passes, tracked)


@op(
    stock=_conv_then_norm_then_act,
    strided=("input", "weight"),
    autocast="lower",
    autocast_cpu="lower",
    lowered=("input", "weight", "bias"),
    policy=_norm_wins,
    settings=tf32_setting,
    variants=("depthwise", "dense"),
)
def conv_batch_norm_act(
    input, weight, bias, running_mean, running_var, norm_weight=None, norm_bias=None, eps=1e-5,
    stride=1, padding=0, dilation=1, groups=1, activation=None, a=0.0, b=0.0,
):  # fmt: skip
    """`conv`, then `batch_norm` in eval mode, then the activation if there is one, in one kernel.

    `Sequential` calls it for a convolution and the BatchNorm after it in eval mode. The kernel
    reads running_mean, running_var, norm_weight and norm_bias, each (K,), when it is called, so
    nothing goes stale. The result of the convolution is kept if a gradient is wanted. The rest is
    as in `conv_act`.
    """
    act = _after(activation, a, b)
    if isinstance(act, Stock):
        return act
    plan = _planned(weight.dim() - 2, input, weight, bias, stride, padding, dilation, groups)
    if isinstance(plan, Stock):
        return plan
    if type(eps) not in (float, int) or eps < 0:
        return Invalid("option", f"eps={eps!r}")
    if running_mean is None or running_var is None:
        return Invalid("option", "no running statistics")
    if input.dim() != plan.dims + 2:
        return Stock("shape", "one sample, whose first dimension batch_norm takes for a batch")
    tensors = running_mean, running_var, norm_weight, norm_bias
    why = of_channels(weight.shape[0], *tensors)
    if why is not None:
        return why
    if mixed_dtypes(input, *tensors):
        return Invalid("dtype", "parameters or statistics in other dtypes")
    if any(t.requires_grad for t in tensors[:2]):
        return Stock("autograd", "running statistics that require grad")
    rest = plan, After(act, float(eps))
    return run(ConvAct, input, weight, bias, *tensors, *rest)[0]
