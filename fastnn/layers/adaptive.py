"""AdaptiveLogSoftmaxWithLoss. Mirrors torch/nn/modules/adaptive.py."""

import itertools
from typing import Any

import torch
import torch.nn as stock
from torch.nn.modules.adaptive import _ASMoutput

import fastnn.functional as F
from fastnn import _op
from fastnn._mode import current_mode, idle
from fastnn.layers._fusion import plainly
from fastnn.layers._layer import STOCK, Layer, rebound, watched
from fastnn.layers.container import Sequential
from fastnn.layers.linear import Linear

__all__ = ["AdaptiveLogSoftmaxWithLoss"]


_as_stock = rebound(stock.AdaptiveLogSoftmaxWithLoss.forward)


def _plain(layer, cls):
    """Whether the layer is of this class, and nobody watches it, so that its members are all."""
    return type(layer) in (cls, STOCK[cls]) and watched(layer) is None


def _apart(self, input, target):
    """Why the members run one by one, as in PyTorch; None if their losses can be fused."""
    if torch.compiler.is_compiling() or idle() or plainly() or current_mode() == "torch":
        return "no kernel can run, or somebody looks on at all layers"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a mode looks on at all operators"
    if input.device.type not in _op.kernel_devices or torch.is_autocast_enabled(input.device.type):
        return "a device without kernels, or autocast"
    if input.dim() != target.dim() + 1 or target.dim() > 1 or target.dtype != torch.int64:
        return "arguments that PyTorch refuses, or other integers"
    if (
        not target.numel()
        or input.shape[:-1] != target.shape
        or input.shape[-1] != self.in_features
        or input.dtype != self.head.weight.dtype
    ):
        return "no rows, or arguments that PyTorch refuses"
    pairs = all(_plain(pair, Sequential) and len(pair) == 2 for pair in self.tail)
    if not pairs or not all(_plain(m, Linear) for m in (self.head, *itertools.chain(*self.tail))):
        return "a member that is watched, or is not a Linear"
    return None


class AdaptiveLogSoftmaxWithLoss(stock.AdaptiveLogSoftmaxWithLoss, metaclass=Layer):
    def forward(self, input_, target_):
        if _apart(self, input_, target_) is not None:
            return _as_stock(self, input_, target_)
        batched = target_.dim() > 0
        x, target = (input_, target_) if batched else (input_.unsqueeze(0), target_.unsqueeze(0))
        # Targets in the order of their clusters, and one wait for the device to learn how many
        # there are of each; PyTorch waits at least once for each cluster.
        ends = torch.tensor(self.cutoffs, device=target.device)
        cluster = torch.where(target < 0, len(ends), torch.bucketize(target, ends, right=True))
        order = torch.argsort(cluster, stable=True)
        counts = torch.bincount(cluster, minlength=len(ends) + 1).tolist()
        if counts[-1]:
            return _as_stock(self, input_, target_)  # raises
        head_target = torch.where(cluster == 0, target, self.shortlist_size + cluster - 1)
        loss = F.linear_cross_entropy(
            x, self.head.weight, head_target, linear_bias=self.head.bias, reduction="none"
        )
        start = counts[0]
        parts = []
        for i, count in enumerate(counts[1:-1]):
            if not count:
                continue
            rows = order[start : start + count]
            start += count
            pair: Any = self.tail[i]
            inner, outer = pair
            hidden = F.linear(x.index_select(0, rows), inner.weight, inner.bias)
            within = target.index_select(0, rows) - self.cutoffs[i]
            parts.append(
                F.linear_cross_entropy(
                    hidden, outer.weight, within, linear_bias=outer.bias, reduction="none"
                )
            )
        if parts:
            tails = torch.cat(parts)
            loss = loss + torch.zeros_like(loss).index_copy(0, order[counts[0] :], tails)
        output = -loss
        if not batched:
            output = output.squeeze(0)
        return _ASMoutput(output, (-output).mean())

    def _get_full_log_prob(self, input, head_output):
        head = F.log_softmax(head_output, dim=1)
        parts = [head[:, : self.shortlist_size]]
        for i, tail in enumerate(self.tail):
            cluster = head[:, self.shortlist_size + i].unsqueeze(1)
            parts.append(F.log_softmax(tail(input), dim=1) + cluster)
        return torch.cat(parts, dim=1)
