"""Norms with a scale per channel: batch, group and instance norm, and their activations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as stock

from fastnn import kernels
from fastnn._op import Function, Invalid, Stock, Work, impossible, op, rounded, run, second_order
from fastnn._strides import is_channels_last
from fastnn.ops.activation import refuse_numbers
from fastnn.ops.linear import ACTIVATIONS, stock_activation


class Act(NamedTuple):
    """An activation, with the arguments that `linear_act` takes for it."""

    name: str
    a: float
    b: float

    @property
    def formula(self):
        return ACTIVATIONS[self.name]

    def __call__(self, z):
        return stock_activation(self.name)(z, self.a, self.b)


class Spec(NamedTuple):
    """Which norm it is.

    groups: how many groups of each sample have statistics of their own; 0 for statistics across the
        samples.
    given: the statistics are the running ones, and are not computed.
    twice: y is returned twice, and its gradient is the sum of two. There is a residual.
    means: the mean of each plane of y is returned, too. There is no residual.
    skip: x is returned, too, and its other gradient is added to the one that goes through the norm.
    """

    groups: int
    eps: float
    given: bool = False
    momentum: float = 0.0
    format: torch.memory_format = torch.contiguous_format
    out_dtype: torch.dtype | None = None
    act: Act | None = None
    twice: bool = False
    means: bool = False
    skip: bool = False

    @property
    def last(self):
        return self.format is not torch.contiguous_format


def _norm(x, weight, bias, mean, var, spec):
    """PyTorch's formula, to be differentiated."""
    if spec.out_dtype is not None:
        x, weight, bias = (t if t is None else t.to(spec.out_dtype) for t in (x, weight, bias))
    if spec.groups:
        y = stock.group_norm(x, spec.groups, weight, bias, spec.eps)
    else:
        y = stock.batch_norm(x, mean, var, weight, bias, not spec.given, 0.0, spec.eps)
    return y if spec.act is None else spec.act(y)


class ChannelNorm(Function):
    """x (N, C, *), weight and bias (C,) or None, residual like x or None -> y, or y twice, or y and
    the means of its planes (N, C, 1, ...), or y and x.

    y has x's layout.

    It saves what PyTorch saves: x, weight, running statistics, the computed statistics, and y if
    the gradient of the activation is computed from y. With an activation it also saves the bias,
    because the backward computes the activation's input again.
    """

    strided = ("dy", "more")

    @staticmethod
    def forward(ctx, x, weight, bias, residual, running_mean, running_var, spec):
        y = torch.empty_like(x, dtype=spec.out_dtype, memory_format=spec.format)
        # copies only if PyTorch copies too
        dense = x.contiguous(memory_format=spec.format)
        given = dense, weight, bias, running_mean, running_var, y, spec.groups, spec.eps
        rest: dict[str, Any] = {"last": spec.last}
        if residual is not None:
            rest["residual"] = residual.contiguous(memory_format=spec.format)
        act = spec.act
        if act is not None:
            rest.update(formula=act.formula.value, a=act.a, b=act.b)
        mean = rstd = None
        if spec.given:
            kernels.channel_norm.apply(*given, **rest)
        else:
            mean, rstd = kernels.channel_norm.fwd(*given, spec.momentum, **rest)
        if spec.groups:
            running_mean = running_var = None
        keeps_y = act is not None and act.formula.keeps == "y"
        if any(ctx.needs_input_grad[:3]):
            ctx.save_for_backward(
                x,
                weight,
                # with a residual, the gradient of the activation is computed from y
                None if act is None or residual is not None else bias,
                running_mean,
                running_var,
                mean,
                rstd,
                y if keeps_y else None,
            )
        else:  # the gradient of a residual is that of the activation
            ctx.save_for_backward(*(None,) * 7, y if keeps_y else None)
        ctx.bias = None if bias is None else bias.dtype
        ctx.has_residual = residual is not None
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        if spec.means:
            return y, y.mean(_places(y), True)
        if spec.skip:
            again = x.detach()
            if not ctx.needs_input_grad[0]:
                ctx.mark_non_differentiable(again)
            return y, again
        return (y, y.detach()) if spec.twice else y

    @staticmethod
    def backward(ctx, dy, more=None):
        x, weight, bias, *running, mean, rstd, y = ctx.saved_tensors
        spec, needs = ctx.spec, ctx.needs_input_grad[:4]
        beside = None  # the other gradient of x
        if spec.skip:
            beside, more = more, None
            if dy is None:
                return beside, *(None,) * 6
        if spec.means and more is not None:
            more = more / x.shape[2:].numel()
            if dy is None or torch.is_grad_enabled():
                dy = more.expand(x.shape) if dy is None else dy + more
                more = None
        if dy is None:
            dy, more = more, None
        if more is not None and (torch.is_grad_enabled() or not any(needs[:3])):
            dy, more = dy + more, None
        if not any(needs[:3]):
            return None, None, None, _of_residual(spec.act, dy, y), None, None, None
        if torch.is_grad_enabled():  # create_graph=True: a kernel's gradient would carry no graph
            dx, *grads = _differentiable_gradients(ctx, dy, x, weight, bias, running, y, needs)
            if beside is not None and needs[0]:
                dx = dx + beside
            return dx, *grads, None, None, None
        if spec.given:
            mean, rstd = running
        rest: dict[str, Any] = {"last": spec.last}
        if beside is not None:
            rest["rest"] = beside.contiguous(memory_format=spec.format)
        if spec.act is not None:
            formula = spec.act.formula
            rest.update(
                formula=formula.value if formula.keeps == "y" else None,
                gradient=formula.gradient,
                a=spec.act.a,
                b=spec.act.b,
                y=y if ctx.has_residual else None,
            )
        if more is not None:
            rest.update(more=more.contiguous(memory_format=spec.format), each=spec.means)
        *grads, dz = kernels.channel_norm.bwd(
            dy.contiguous(memory_format=spec.format),
            x.contiguous(memory_format=spec.format),
            weight,
            bias,
            mean,
            rstd,
            spec.groups,
            needs[0],
            weight.dtype if needs[1] else None,
            ctx.bias if needs[2] else None,
            spec.eps if spec.given else None,
            **rest,
        )
        if dz is None:  # nothing stands between y and the residual
            dz = dy
        return *grads, dz if needs[3] else None, None, None, None


def _of_residual(act, dy, y):
    """The gradient of a residual, and of the norm that it is added to."""
    return dy if act is None else act.formula.stock(dy, y, act.a, act.b)


def _differentiable_gradients(ctx, dy, x, weight, bias, running, y, needs):
    """Gradients of x, weight, bias and residual, with graphs of their own."""
    spec = ctx.spec
    mean, var = running if spec.given else (None, None)
    dz = dy
    if ctx.has_residual:  # the gradient of relu is computed from y
        dz = _of_residual(spec.act, dy, y)
        spec = spec._replace(act=None)
    if bias is None and needs[2]:  # the bias is only added, so its value does not matter
        bias = torch.zeros(x.shape[1], dtype=ctx.bias, device=x.device, requires_grad=True)

    def formula(x, weight, bias):
        return _norm(x, weight, bias, mean, var, spec)

    return *second_order(formula, (x, weight, bias), dz, needs[:3]), dz if needs[3] else None


def _places(x):
    """The dimensions of a plane."""
    return tuple(range(2, x.dim()))


def _format(x, contiguous_first=True) -> torch.memory_format:
    """The memory format that ATen gives a result, from the strides of `x`, dense or not."""
    if (contiguous_first and x.is_contiguous()) or x.dim() == 3:
        return torch.contiguous_format
    if not is_channels_last(x.shape, x.stride()):
        return torch.contiguous_format
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


def _unfit(input, eps, momentum=0.0) -> Stock | None:
    """Why no kernel takes the input, for every norm."""
    if type(eps) not in (float, int):
        return Invalid("option", f"eps={eps!r}")
    if type(momentum) not in (float, int):
        return Stock("option", f"momentum={momentum!r}")
    if not input.numel():
        return Stock("empty", "no elements")
    if input.numel() >= 2**31:  # kernels count the elements of a channel in 32 bits
        return Stock("size", f"{input.numel():,} elements; kernels take less than 2^31")
    return None


def of_channels(C, *tensors) -> Stock | None:
    """Why PyTorch would reject parameters or statistics."""
    for t in tensors:
        if t is not None and tuple(t.shape) != (C,):
            return Invalid("shape", f"{tuple(t.shape)} for {C} channels")
    return None


def mixed_dtypes(input, *tensors) -> bool:
    """Whether dtypes are mixed in another way than float32 together with a 16-bit input."""
    dtypes = {t.dtype for t in tensors if t is not None}
    return len(dtypes) > 1 or not dtypes <= {input.dtype, torch.float32}


def _group_norm(input, num_groups, weight, bias, eps, out_dtype, act=None, skip=False):
    if input.dim() < 2 or type(num_groups) is not int or num_groups <= 0:
        return Invalid("shape", f"num_groups={num_groups!r}, input {tuple(input.shape)}")
    C = input.shape[1]
    if C % num_groups:
        return Invalid("shape", f"{num_groups} groups of {C} channels")
    if input.numel() == num_groups:  # PyTorch: "Expected more than 1 value per channel"
        return Invalid("shape", "one value in each group")
    why = _unfit(input, eps) or of_channels(C, weight, bias)
    if why is not None:
        return why
    if weight is None and bias is not None:
        return Stock("option", "a bias without a weight")
    if out_dtype is None and any(p is not None and p.dtype != input.dtype for p in (weight, bias)):
        return Invalid("dtype", "parameters in another dtype than the input")  # CUDA rejects them
    format = _format(input, False)
    kept = rounded(eps, out_dtype or input.dtype)
    if kept is None:
        return Stock("dtype", f"eps={eps} in {input.dtype}")
    if skip and not input.is_contiguous(memory_format=format):
        return Stock("layout", f"an input with strides {input.stride()}, returned as it is")
    input = input.contiguous(memory_format=format)  # which is what stock keeps for the backward
    spec = Spec(num_groups, kept, format=format, out_dtype=out_dtype, act=act, skip=skip)
    return run(ChannelNorm, input, weight, bias, None, None, None, spec)


# Variants by what is saved. If the kernels hold the values of a statistic in registers, they read
# them once, and PyTorch reads them twice. If they do not, they make as many passes as PyTorch. For
# group norm of channels-last tensors, PyTorch makes copies.
SEVERAL = "several passes"
CHANNELS_LAST = "channels last"


def _of_groups(input, num_groups, *rest, **options):
    """The gate's policy: the number of elements, and what is saved."""
    last = _format(input) is not torch.contiguous_format
    once = kernels.channel_norm.reads_once(input, num_groups, last)
    return Work(input.numel(), variant=CHANNELS_LAST if last else "" if once else SEVERAL)


@op(
    stock=stock.group_norm,
    strided=("input",),
    policy=_of_groups,
    variants=("", SEVERAL, CHANNELS_LAST),
    autocast="fp32",
    source="arXiv:1803.08494; statistics: Welford (1962), Chan, Golub, LeVeque (1979)",
)
def group_norm(input, num_groups, weight=None, bias=None, eps=1e-5, *, out_dtype=None):
    """Fused for every number of groups, with or without weight and bias; keeps channels last."""
    return _group_norm(input, num_groups, weight, bias, eps, out_dtype)


def _batch_norm(
    input, running_mean, running_var, weight, bias, training, momentum, eps, act=None,
    residual=None, twice=False, means=False,
):  # fmt: skip
    if input.dim() < 2:
        return Invalid("shape", f"input {tuple(input.shape)}")
    why = _unfit(input, eps, momentum)
    if why is not None:
        return why
    C = input.shape[1]
    if eps < 0 or (training and eps == 0):
        return Invalid("option", f"eps={eps}")
    if training and input.numel() == C:
        return Invalid("shape", "one value in each channel")
    if not training and (running_mean is None or running_var is None):
        return Invalid("option", "eval mode without running statistics")
    tensors = running_mean, running_var, weight, bias
    why = of_channels(C, *tensors)
    if why is not None:
        return why
    if mixed_dtypes(input, *tensors):
        return Invalid("dtype", "parameters or statistics in other dtypes")
    if (running_mean is None) != (running_var is None):
        return Stock("option", "one running statistic without the other")
    if any(t is not None and (t.requires_grad or not t.is_contiguous()) for t in tensors[:2]):
        return Stock("autograd", "running statistics that require grad, or are strided")
    spec = Spec(
        0, float(eps), not training, float(momentum), _format(input), None, act, twice, means
    )
    return run(ChannelNorm, input, weight, bias, residual, running_mean, running_var, spec)


def _in_training(input, mean, var, weight=None, bias=None, training=False, *rest, **options):
    """The gate's policy: in eval mode no pass can be saved."""
    if not training:
        return Stock("gate", "training=False: PyTorch also makes one pass")
    last = _format(input) is not torch.contiguous_format
    once = kernels.channel_norm.reads_once(input, 0, last)
    return Work(input.numel(), variant="" if once else SEVERAL)


def _of_instances(input, *rest, **options):
    """The gate's policy: the number of elements, and what is saved."""
    once = kernels.channel_norm.reads_once(input, input.shape[1])
    return Work(input.numel(), variant="" if once else SEVERAL)


@op(
    stock=stock.batch_norm,
    policy=_in_training,
    variants=("", SEVERAL),
    strided=("input", "running_mean", "running_var"),
    source="arXiv:1502.03167; statistics: Welford (1962), Chan, Golub, LeVeque (1979)",
)
def batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1,
    eps=1e-5,
):  # fmt: skip
    """Fused in training and in eval mode, with or without running statistics; keeps channels last.

    Parameters may be float32 with a 16-bit input.
    """
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


@op(
    stock=stock.instance_norm,
    policy=_of_instances,
    variants=("", SEVERAL),
    strided=("input", "running_mean", "running_var"),
    source="arXiv:1607.08022; statistics: Welford (1962), Chan, Golub, LeVeque (1979)",
)
def instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True,
    momentum=0.1, eps=1e-5,
):  # fmt: skip
    """Fused with the statistics of the input, and with running statistics, which it updates."""
    if input.dim() < 2:
        return Invalid("shape", f"input {tuple(input.shape)}")
    why = _unfit(input, eps, momentum)
    if why is not None:
        return why
    C = input.shape[1]
    if use_input_stats and input.shape[2:].numel() == 1:
        return Invalid("shape", "one value in each instance")
    if not use_input_stats and (running_mean is None or running_var is None):
        return Invalid("option", "use_input_stats=False without running statistics")
    tensors = running_mean, running_var, weight, bias
    why = of_channels(C, *tensors)
    if why is not None:
        return why
    if mixed_dtypes(input, weight, bias):
        return Invalid("dtype", "parameters in other dtypes")
    if (running_mean is None) != (running_var is None) or mixed_dtypes(input, *tensors):
        return Stock("dtype", "running statistics in another dtype, or one without the other")
    if any(t is not None and (t.requires_grad or not t.is_contiguous()) for t in tensors[:2]):
        return Stock("autograd", "running statistics that require grad, or are strided")
    given = (running_mean, running_var) if use_input_stats else ()
    if any(t is not None and t.is_inference() for t in given):
        if not torch.is_inference_mode_enabled():
            return Invalid("autograd", "running statistics made under inference_mode")
    if torch.is_grad_enabled():
        # PyTorch repeats these for each sample, so edits between forward and backward do not
        # matter.
        weight = None if weight is None else weight.clone()
        if not use_input_stats:
            running_mean, running_var = running_mean.clone(), running_var.clone()
    # Not channels last, because PyTorch's result is contiguous.
    if not use_input_stats:
        spec = Spec(0, float(eps), given=True)
        return run(ChannelNorm, input, weight, bias, None, running_mean, running_var, spec)
    spec = Spec(C, float(eps), momentum=float(momentum))
    y = run(ChannelNorm, input, weight, bias, None, running_mean, running_var, spec)
    if running_mean is not None and not running_mean.is_inference():
        impossible("it counts a version")  # a plan would not
        torch.autograd.graph.increment_version((running_mean, running_var))
    return y


# ---- norm and activation -------------------------------------------------------------------------


def checked_activation(name, activation, a, b):
    """The activation of that name. Raises ValueError if there is none."""
    if activation not in ACTIVATIONS:
        accepted = ", ".join(ACTIVATIONS)
        raise ValueError(f"{name}: activation {activation!r}; accepted are {accepted}")
    return Act(activation, a, b)


def _group_norm_then_act(
    input, num_groups, weight=None, bias=None, eps=1e-5, activation="silu", a=0.0, b=0.0,
    skip=False,
):  # fmt: skip
    y = stock.group_norm(input, num_groups, weight, bias, eps)
    if activation is not None:
        y = checked_activation("group_norm_act", activation, a, b)(y)
    return (y, input) if skip else y


@op(stock=_group_norm_then_act, strided=("input",), autocast="fp32")
def group_norm_act(
    input, num_groups, weight=None, bias=None, eps=1e-5, activation="silu", a=0.0, b=0.0,
    skip=False, *, out_dtype=None,
):  # fmt: skip
    """`activation(group_norm(input, num_groups, weight, bias, eps), a, b)`, in the norm's passes.

    `Sequential` calls it for a GroupNorm and the activation after it. input (N, C, *). The
    activations, and a and b, are those of `linear_act`. With `activation=None` there is none.
    Raises ValueError for any other activation.

    With `skip`, the result is a pair: y, and the input, for its other users: the same memory with a
    gradient of its own. The backward adds that gradient to the other one as it writes the latter.
    """
    act = None
    if activation is not None:
        if activation not in ACTIVATIONS:
            return Invalid("option", f"activation={activation!r}")
        why = refuse_numbers(a, b, activation=activation)
        if why is not None:
            return why
        act = Act(activation, float(a), float(b))
    return _group_norm(input, num_groups, weight, bias, eps, out_dtype, act, bool(skip))


def _batch_norm_then_act(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1,
    eps=1e-5, activation="relu", a=0.0, b=0.0, means=False,
):  # fmt: skip
    act = checked_activation("batch_norm_act", activation, a, b)
    y = act(
        stock.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    )
    return (y, y.mean(_places(y), True)) if means else y


@op(stock=_batch_norm_then_act, strided=("input", "running_mean", "running_var"))
def batch_norm_act(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1,
    eps=1e-5, activation="relu", a=0.0, b=0.0, means=False,
):  # fmt: skip
    """`activation(batch_norm(input, ..., eps), a, b)`, in the norm's passes.

    `Sequential` calls it for a BatchNorm and the activation after it. input (N, C, *). The
    activations, and a and b, are those of `linear_act`. With `means`, the result is a pair: y, and
    the mean of each of its planes (N, C, 1, ...). The backward adds the gradient of a mean to that
    of its plane as it reads the latter. Raises ValueError for any other activation.
    """
    if activation not in ACTIVATIONS:
        return Invalid("option", f"activation={activation!r}")
    why = refuse_numbers(a, b, activation=activation)
    if why is not None:
        return why
    if means and input.dim() < 3:
        return Stock("shape", f"input {tuple(input.shape)} has no planes")
    act = Act(activation, float(a), float(b))
    return _batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, eps, act,
        means=bool(means),
    )  # fmt: skip


def _batch_norm_then_add_relu(
    input, residual, running_mean, running_var, weight=None, bias=None, training=False,
    momentum=0.1, eps=1e-5, twice=False, relu=True,
):  # fmt: skip
    y = stock.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    y = y + residual
    y = stock.relu(y) if relu else y
    return (y, y) if twice else y


@op(
    stock=_batch_norm_then_add_relu,
    strided=("input", "residual", "running_mean", "running_var"),
    source="arXiv:1512.03385, figure 2",
)
def batch_norm_add_relu(
    input, residual, running_mean, running_var, weight=None, bias=None, training=False,
    momentum=0.1, eps=1e-5, twice=False, relu=True,
):  # fmt: skip
    """`relu(batch_norm(input, ..., eps) + residual)` in the norm's passes: the end of a residual
    block.

    Without `relu`, it is the end of an inverted residual block (arXiv:1801.04381, figure 4).

    input (N, C, *). If the residual has another shape or dtype than the input, PyTorch computes the
    call. Raises what `batch_norm` raises.

    With `twice`, the result is a pair: the same memory twice, each with a gradient of its own. The
    backward adds the two gradients as it reads them.
    """
    if residual.shape != input.shape or residual.dtype != input.dtype:
        return Stock("shape", f"residual {tuple(residual.shape)}, input {tuple(input.shape)}")
    if _format(residual) != _format(input):
        return Stock("layout", "input and residual in different memory formats")
    act = Act("relu", 0.0, 0.0) if relu else None
    return _batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, eps, act, residual,
        bool(twice),
    )  # fmt: skip
