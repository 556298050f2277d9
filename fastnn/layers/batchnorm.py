"""Batch norm. Mirrors torch/nn/modules/batchnorm.py."""

import torch
import torch.nn as stock

import fastnn.functional as F
from fastnn.layers._layer import Layer, attributes, rebound

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "SyncBatchNorm",
]


def arguments(self, input):
    """Count the batch; return the arguments for `batch_norm`."""
    self._check_input_dim(input)
    factor = 0.0 if self.momentum is None else self.momentum
    if self.training and self.track_running_stats:
        (batches,) = attributes(self, "num_batches_tracked")
        if batches is not None:
            batches.add_(1)
            if self.momentum is None:  # the average over all batches
                factor = 1.0 / float(batches)
    used = not self.training or self.track_running_stats
    mean, var, weight, bias = attributes(self, "running_mean", "running_var", "weight", "bias")
    return (
        input,
        mean if used else None,
        var if used else None,
        weight,
        bias,
        self.training or (mean is None and var is None),
        factor,
        self.eps,
    )


def _forward(self, input):
    return F.batch_norm(*arguments(self, input))


class BatchNorm1d(stock.BatchNorm1d, metaclass=Layer, op=F.batch_norm, mirrors=True):
    forward = _forward


class LazyBatchNorm1d(stock.LazyBatchNorm1d, metaclass=Layer, op=F.batch_norm, mirrors=True):
    cls_to_become = BatchNorm1d  # type: ignore[assignment]
    forward = _forward


class BatchNorm2d(stock.BatchNorm2d, metaclass=Layer, op=F.batch_norm, mirrors=True):
    forward = _forward


class LazyBatchNorm2d(stock.LazyBatchNorm2d, metaclass=Layer, op=F.batch_norm, mirrors=True):
    cls_to_become = BatchNorm2d  # type: ignore[assignment]
    forward = _forward


class BatchNorm3d(stock.BatchNorm3d, metaclass=Layer, op=F.batch_norm, mirrors=True):
    forward = _forward


class LazyBatchNorm3d(stock.LazyBatchNorm3d, metaclass=Layer, op=F.batch_norm, mirrors=True):
    cls_to_become = BatchNorm3d  # type: ignore[assignment]
    forward = _forward


_across_processes = rebound(stock.SyncBatchNorm.forward)


class SyncBatchNorm(stock.SyncBatchNorm, metaclass=Layer):
    def forward(self, input):
        tracks = self.training and self.track_running_stats
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        # PyTorch's forward has the collectives, and the error for a missing buffer.
        if (self.training and distributed) or (tracks and self.num_batches_tracked is None):
            return _across_processes(self, input)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        return _forward(self, input)
