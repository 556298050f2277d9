"""Dropout of elements and of channels, and the alpha variants."""

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as stock

from fastnn import _rng, kernels
from fastnn._op import Function, Invalid, Stock, op, run


class Noise(NamedTuple):
    """The noise of an input, and how to draw it: all that the backward needs to know."""

    draw: Any  # kernels._philox.Draw
    launcher: str  # "elements", "channels" or "unbatched" of kernels/dropout.py
    bound: int  # an element is kept if its random word is below `bound`
    scale: float  # the factor of a kept element
    grad_scale: float  # the factor of its gradient: ATen computes the two in different ways
    shift: tuple[float, float] | None = None  # added to a kept and to a dropped element

    def kept(self):
        """What a node keeps: no tensors, which go through `save_for_backward`."""
        return self._replace(draw=self.draw.kept())


class Dropout(Function):
    """y = x * noise (+ shift). It is linear in x, so the backward is the same function of dy."""

    strided = ("dy",)

    @staticmethod
    def forward(ctx, x, noise, inplace):
        if inplace:
            ctx.mark_dirty(x)
            torch.autograd.graph.increment_version(x)
        state = noise.draw.new_state(x)
        out = x if inplace else None
        launch = getattr(kernels.dropout, noise.launcher)
        y = launch(x, noise.draw, noise.bound, noise.scale, noise.shift, state, out)
        ctx.save_for_backward(state)
        ctx.noise, ctx.layout = noise.kept(), y.stride()
        return y

    @staticmethod
    def backward(ctx, dy):
        (state,) = ctx.saved_tensors
        noise = ctx.noise
        if dy.stride() != ctx.layout:  # the random bits follow the storage order
            dy = dy.new_empty_strided(dy.shape, ctx.layout).copy_(dy)
        draw = noise.draw.from_state(state)
        back = noise._replace(draw=draw, scale=noise.grad_scale, shift=None)
        return run(Dropout, dy, back, False), None, None


# ---- The constants, rounded as ATen rounds them -------------------------------------------------


def _rounded(value: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu").to(dtype)


@functools.lru_cache(maxsize=256)
def native_scales(p: float) -> tuple[float, float]:
    keep = torch.tensor(1.0 - p, dtype=torch.float32, device="cpu").item()
    return 1.0 / keep, 1.0 / (1.0 - p)


@functools.lru_cache(maxsize=256)
def _bernoulli_scale(p: float, dtype: torch.dtype) -> float:
    return (1.0 / _rounded(1.0 - p, torch.float32)).to(dtype).item()


@functools.lru_cache(maxsize=256)
def _alpha_constants(p: float, dtype: torch.dtype) -> tuple[float, tuple[float, float]]:
    """(scale, (shift of kept, shift of dropped elements)), after a Bernoulli noise of 1 and 0."""
    alpha = 1.7580993408473766
    a = 1.0 / math.sqrt((alpha * alpha * p + 1.0) * (1.0 - p))
    noise = torch.tensor([1.0, 0.0], dtype=dtype, device="cpu")
    shift = noise.add(-1).mul_(alpha * a).add_(alpha * a * p)
    return noise.mul_(a)[0].item(), (shift[0].item(), shift[1].item())


# ---- The calls --------------------------------------------------------------------------------


def _early(x, p, training, inplace):
    """The answer if no kernel is needed: a refusal, or x itself if dropout does nothing."""
    if type(p) is not float and type(p) is not int:
        return Stock("option", f"p is a {type(p).__name__}")
    if not 0 <= p <= 1:
        return Invalid("option", f"p={p}")
    if type(training) is not bool or type(inplace) is not bool:
        return Stock("option", f"training={training!r}, inplace={inplace!r}")
    if p == 0 or not training or not x.numel():
        return x
    if inplace and x.requires_grad and torch.is_grad_enabled():
        if x.is_leaf:
            return Invalid("autograd", "a leaf that requires grad, in place")
        if x._is_view():
            return Stock("autograd", "in place in a view that requires grad")
    return None


def _dense(x) -> bool:
    return x.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(x)


def _fused(x, p, launcher, n, inplace, alpha=False):
    """Multiply by `bernoulli_` noise of n elements; for alpha dropout, then add the shift."""
    shift = None
    if p == 1:  # PyTorch multiplies by 0; it draws nothing and shifts nothing
        scale, draw = 0.0, _rng.draw_nothing(n, x.get_device())
    else:
        if n * x.element_size() >= 2**31:
            return Stock("size", f"noise of {n:,} elements; 32 bits cannot index so many")
        if alpha:
            scale, shift = _alpha_constants(p, x.dtype)
        else:
            scale = _bernoulli_scale(p, x.dtype)
        drawn = _rng.draw_bernoulli(n, x.get_device())
        if isinstance(drawn, str):
            return Stock("random", drawn)
        draw = drawn
    bound = kernels._philox.bound(1.0 - p)
    return run(Dropout, x, Noise(draw, launcher, bound, scale, scale, shift), inplace)


@op(stock=stock.dropout, strided=("input",))
def dropout(input, p=0.5, training=True, inplace=False):
    """Fused for dense layouts, also in place; the backward draws the mask again."""
    early = _early(input, p, training, inplace)
    if early is not None:
        return early
    if not _dense(input):
        return Stock("layout", f"strides {input.stride()} with gaps or overlaps")
    if inplace or p == 1:
        return _fused(input, p, "elements", input.numel(), inplace)
    if not input.is_contiguous() and _rng.width(input) == 1:
        return Stock(
            "layout", f"strides {input.stride()}: PyTorch does not draw in order of storage"
        )
    draw = _rng.draw_native(input)
    if isinstance(draw, str):
        return Stock("random", draw)
    noise = Noise(draw, "elements", kernels._philox.bound(1.0 - p), *native_scales(p))
    return run(Dropout, input, noise, False)


@op(stock=stock.alpha_dropout, strided=("input",), source="arXiv:1706.02515")
def alpha_dropout(input, p=0.5, training=False, inplace=False):
    """Fused for dense layouts, also in place; the backward draws the noise again."""
    early = _early(input, p, training, inplace)
    if early is not None:
        return early
    if not _dense(input):
        return Stock("layout", f"strides {input.stride()} with gaps or overlaps")
    return _fused(input, p, "elements", input.numel(), inplace, alpha=True)


def _feature(input, p, training, inplace, alpha=False, unbatched=False):
    early = _early(input, p, training, inplace)
    if early is not None:
        # PyTorch adds a batch dimension and removes it again. The result is a view, except in
        # place.
        return early.view_as(early) if unbatched and early is input and not inplace else early
    channel_dim = 0 if unbatched else 1
    if input.dim() <= channel_dim:
        return Invalid("shape", f"{input.dim()} dimensions")
    if not input.is_contiguous() and not input.movedim(channel_dim, -1).is_contiguous():
        return Stock("layout", f"strides {input.stride()}, neither contiguous nor channels last")
    n = input.shape[: channel_dim + 1].numel()
    return _fused(input, p, "unbatched" if unbatched else "channels", n, inplace, alpha)


@op(stock=stock.dropout1d, strided=("input",))
def dropout1d(input, p=0.5, training=True, inplace=False):
    """Fused for contiguous and channels-last layouts, also in place, without a noise tensor."""
    if input.dim() not in (2, 3):
        return Invalid("shape", f"{input.dim()} dimensions")
    return _feature(input, p, training, inplace, unbatched=input.dim() == 2)


@op(stock=stock.dropout2d, strided=("input",))
def dropout2d(input, p=0.5, training=True, inplace=False):
    """Fused for contiguous and channels-last layouts, also in place, without a noise tensor."""
    if input.dim() != 4:
        return Stock("shape", f"{input.dim()} dimensions, of which stock warns")
    return _feature(input, p, training, inplace)


@op(stock=stock.dropout3d, strided=("input",))
def dropout3d(input, p=0.5, training=True, inplace=False):
    """Fused for contiguous and channels-last layouts, also in place, without a noise tensor."""
    if input.dim() not in (4, 5):
        return Stock("shape", f"{input.dim()} dimensions, of which stock warns")
    return _feature(input, p, training, inplace, unbatched=input.dim() == 4)


@op(stock=stock.feature_alpha_dropout, strided=("input",), source="arXiv:1706.02515")
def feature_alpha_dropout(input, p=0.5, training=False, inplace=False):
    """Fused for contiguous and channels-last layouts, also in place, without a noise tensor."""
    return _feature(input, p, training, inplace, alpha=True)
