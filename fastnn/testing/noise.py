"""The same random noise on both sides of a comparison.

Stock has no float64 kernel and no CPU kernel that draws the same noise as a fastnn kernel. The
draws of our side are therefore recorded, and the stock formula with its autograd runs over that
noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastnn import _record, _rng, kernels


@contextmanager
def recording() -> Iterator[list]:
    """Collect every `Draw`, and noise of PyTorch, that kernels get. No plan runs in the block."""
    draws: list = []

    def noting(draw):
        def noted(*args):
            drawn = draw(*args)
            draws.append(drawn)
            return drawn

        return mock.patch.object(_rng, draw.__name__, noted)

    with noting(_rng.draw_for), noting(_rng.exponential), _record.using(False):
        yield draws


class replaying(TorchDispatchMode):
    """Inside the block, the n-th noise that stock makes comes from the n-th recorded draw."""

    def __init__(self, draws: list):
        super().__init__()
        self.draws = iter(draws)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bernoulli_.float:
            noise, keep = args if len(args) > 1 else (args[0], 0.5)  # defaults are left out
            flat = noise.as_strided((noise.numel(),), (1,))
            flat.copy_(self._mask(noise, keep))
            return noise
        if func is torch.ops.aten.exponential_.default:
            return args[0].copy_(next(self.draws))
        if func is torch.ops.aten.native_dropout.default:
            x, p, _ = args
            mask = torch.empty_like(x, dtype=torch.bool)
            mask.as_strided((x.numel(),), (1,)).copy_(self._mask(x, 1.0 - p))
            return x * mask * (1.0 / (1.0 - p)), mask
        return func(*args, **(kwargs or {}))

    def _mask(self, like: Tensor, keep: float) -> Tensor:
        """0 and 1 for the elements of `like`, in storage order."""
        draw, bound = next(self.draws), kernels._philox.bound(keep)
        if draw.vec == 0:  # attention's own layout
            kept = kernels.attention.keep(like, kernels.attention.WeightDropout(draw, bound, 1.0))
            return kept.view(-1).to(like.dtype)
        ones = torch.ones(like.numel(), device=like.device)
        return kernels.dropout.elements(ones, draw, bound, 1.0)
