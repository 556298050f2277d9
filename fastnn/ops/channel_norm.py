"""Norms with a scale per channel: batch, group and instance norm, and their activations."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as stock

from fastnn import kernels
from fastnn._op import Invalid, Stock, current_mode, op, run, second_order


class Spec(NamedTuple):
    """Which norm: statistics of `groups` in each sample, or across the samples if 0.

    `given`: they are the running ones, and are not computed.
    """

    groups: int
    eps: float
    given: bool = False
    momentum: float = 0.0
    format: torch.memory_format = torch.contiguous_format
    out_dtype: torch.dtype | None = None


def _norm(x, weight, bias, mean, var, spec):
    """Stock's formula, to be differentiated."""
    if spec.out_dtype is not None:
        x, weight, bias = (t if t is None else t.to(spec.out_dtype) for t in (x, weight, bias))
    if not spec.groups:
        return stock.batch_norm(x, mean, var, weight, bias, not spec.given, 0.0, spec.eps)
    return stock.group_norm(x, spec.groups, weight, bias, spec.eps)


class ChannelNorm(torch.autograd.Function):
    """x (N, C, *), weight and bias (C,) or None -> y, in x's layout.

    Saves what stock saves: x, weight, running statistics, and the statistics it computed.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, spec):
        dense = x.contiguous(memory_format=spec.format)  # a copy only where stock makes one
        y = torch.empty_like(x, dtype=spec.out_dtype, memory_format=spec.format)
        last = spec.format is not torch.contiguous_format
        affine = weight, bias
        running = running_mean, running_var
        mean = rstd = None
        if spec.given:
            kernels.channel_norm.apply(
                dense, *affine, *running, y, spec.groups, spec.eps, last=last
            )
        else:
            mean, rstd = kernels.channel_norm.fwd(
                dense, *affine, *running, y, spec.groups, spec.eps, spec.momentum, last=last
            )
        if spec.groups:
            running = None, None
        ctx.save_for_backward(x, weight, *running, mean, rstd)
        ctx.bias = None if bias is None else bias.dtype
        ctx.spec = spec
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, running_mean, running_var, mean, rstd = ctx.saved_tensors
        spec, needs = ctx.spec, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph=True: a kernel's gradient would carry no graph
            given = (running_mean, running_var) if spec.given else (None, None)

            def formula(x, weight, bias):
                return _norm(x, weight, bias, *given, spec)

            # Of the bias, only that it is added matters.
            bias = None
            if needs[2]:
                bias = torch.zeros(x.shape[1], dtype=ctx.bias, device=x.device, requires_grad=True)
            grads = second_order(formula, (x, weight, bias), dy, needs)
            return *grads, None, None, None
        if spec.given:
            mean, rstd = running_mean, running_var
        grads = kernels.channel_norm.bwd(
            dy.contiguous(memory_format=spec.format),
            x.contiguous(memory_format=spec.format),
            weight,
            None,
            mean,
            rstd,
            spec.groups,
            needs[0],
            weight.dtype if needs[1] else None,
            ctx.bias if needs[2] else None,
            spec.eps if spec.given else None,
            last=spec.format is not torch.contiguous_format,
        )
        return *grads, None, None, None


def _format(x, contiguous_first=True) -> torch.memory_format:
    """The memory format that ATen gives a result, by the strides of `x`, dense or not."""
    if (contiguous_first and x.is_contiguous()) or x.dim() not in (4, 5) or not x.stride(1):
        return torch.contiguous_format
    least = 0
    for d in (1, *range(x.dim() - 1, 1, -1), 0):  # from the innermost of channels last out
        size, stride = x.shape[d], x.stride(d)
        # One channel of one position may be either: ATen takes it for contiguous.
        if not size or stride < least or (d == 0 and least == x.stride(1)):
            return torch.contiguous_format
        least = stride * size
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


def _unfit(input, eps, momentum=0.0) -> Stock | None:
    """Why no kernel takes an input, whatever the norm."""
    if type(eps) not in (float, int):
        return Invalid(f"eps={eps!r}")
    if type(momentum) not in (float, int):
        return Stock(f"momentum={momentum!r}")
    if not input.numel():
        return Stock("no elements")
    if input.numel() >= 2**31:  # kernels count the elements of a channel in 32 bits
        return Stock(f"{input.numel()} elements")
    return None


def _of_channels(C, *tensors) -> Stock | None:
    """Why stock would reject parameters or statistics."""
    for t in tensors:
        if t is not None and tuple(t.shape) != (C,):
            return Invalid(f"{tuple(t.shape)} for {C} channels")
    return None


def _mixed(input, *tensors) -> bool:
    """Whether dtypes are mixed in a way other than float32 beside 16-bit input."""
    dtypes = {t.dtype for t in tensors if t is not None}
    return len(dtypes) > 1 or not dtypes <= {input.dtype, torch.float32}


@op(
    stock=stock.group_norm,
    autocast="fp32",
    source="arXiv:1803.08494; statistics: Welford (1962), Chan, Golub, LeVeque (1979)",
)
def group_norm(input, num_groups, weight=None, bias=None, eps=1e-5, *, out_dtype=None):
    """Fused for every number of groups, weight and bias each or not; channels last stays so."""
    if input.dim() < 2 or type(num_groups) is not int or num_groups <= 0:
        return Invalid(f"num_groups={num_groups!r}, input {tuple(input.shape)}")
    C = input.shape[1]
    if C % num_groups:
        return Invalid(f"{num_groups} groups of {C} channels")
    if input.numel() == num_groups:  # "more than 1 value per channel"
        return Invalid("one value in each group")
    why = _unfit(input, eps) or _of_channels(C, weight, bias)
    if why is not None:
        return why
    if out_dtype is None and any(p is not None and p.dtype != input.dtype for p in (weight, bias)):
        return Invalid("parameters in another dtype than the input")  # to CUDA
    weight, bias = (t if t is None else t.contiguous() for t in (weight, bias))
    spec = Spec(num_groups, float(eps), format=_format(input, False), out_dtype=out_dtype)
    return run(ChannelNorm, input, weight, bias, None, None, spec)


@op(
    stock=stock.batch_norm,
    source="arXiv:1502.03167; statistics: Welford (1962), Chan, Golub, LeVeque (1979)",
)
def batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1,
    eps=1e-5,
):  # fmt: skip
    """Fused in training, with running statistics or not, and in eval mode; float32 parameters with
    16-bit input too. Channels last stays so."""
    if input.dim() < 2:
        return Invalid(f"input {tuple(input.shape)}")
    why = _unfit(input, eps, momentum)
    if why is not None:
        return why
    C = input.shape[1]
    if eps < 0 or (training and eps == 0):
        return Invalid(f"eps={eps}")
    if training and input.numel() == C:
        return Invalid("one value in each channel")
    if not training and (running_mean is None or running_var is None):
        return Invalid("eval mode without running statistics")
    tensors = running_mean, running_var, weight, bias
    why = _of_channels(C, *tensors)
    if why is not None:
        return why
    if _mixed(input, *tensors):
        return Invalid("parameters or statistics in other dtypes")
    if not training and current_mode() == "auto":
        return Stock("training=False: stock makes one pass too")
    if (running_mean is None) != (running_var is None):
        return Stock("one running statistic without the other")
    if any(t is not None and (t.requires_grad or not t.is_contiguous()) for t in tensors[:2]):
        return Stock("running statistics that require grad, or are strided")
    weight, bias = (t if t is None else t.contiguous() for t in (weight, bias))
    spec = Spec(0, float(eps), not training, float(momentum), _format(input))
    return run(ChannelNorm, input, weight, bias, running_mean, running_var, spec)


@op(
    stock=stock.instance_norm,
    source="arXiv:1607.08022; statistics: Welford (1962), Chan, Golub, LeVeque (1979)",
)
def instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True,
    momentum=0.1, eps=1e-5,
):  # fmt: skip
    """Fused with the input's statistics, running ones updated or not, and with the running ones."""
    if input.dim() < 2:
        return Invalid(f"input {tuple(input.shape)}")
    why = _unfit(input, eps, momentum)
    if why is not None:
        return why
    C = input.shape[1]
    if use_input_stats and input.shape[2:].numel() == 1:
        return Invalid("one value in each instance")
    if not use_input_stats and (running_mean is None or running_var is None):
        return Invalid("running statistics are not there")
    tensors = running_mean, running_var, weight, bias
    why = _of_channels(C, *tensors)
    if why is not None:
        return why
    if _mixed(input, weight, bias):
        return Invalid("parameters in other dtypes")
    if (running_mean is None) != (running_var is None) or _mixed(input, *tensors):
        return Stock("running statistics in another dtype, or one without the other")
    if any(t is not None and (t.requires_grad or not t.is_contiguous()) for t in tensors[:2]):
        return Stock("running statistics that require grad, or are strided")
    weight, bias = (t if t is None else t.contiguous() for t in (weight, bias))
    if torch.is_grad_enabled():
        # Stock repeats these for the samples: edits between here and backward do not matter.
        weight = weight if weight is None else weight.clone()
        if not use_input_stats:
            running_mean, running_var = running_mean.clone(), running_var.clone()
    # Not channels last: stock's result is contiguous.
    if not use_input_stats:
        spec = Spec(0, float(eps), given=True)
        return run(ChannelNorm, input, weight, bias, running_mean, running_var, spec)
    spec = Spec(C, float(eps), momentum=float(momentum))
    y = run(ChannelNorm, input, weight, bias, running_mean, running_var, spec)
    if running_mean is not None and not running_mean.is_inference():
        torch.autograd.graph.increment_version((running_mean, running_var))
    return y
