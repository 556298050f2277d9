"""Instance norm. Mirrors torch/nn/modules/instancenorm.py."""

import torch.nn as stock

import fastnn.functional as F
from fastnn.layers._layer import Layer

__all__ = [
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
]


def _apply_instance_norm(self, input):
    return F.instance_norm(
        input,
        self.running_mean,
        self.running_var,
        self.weight,
        self.bias,
        self.training or not self.track_running_stats,
        self.momentum if self.momentum is not None else 0.0,
        self.eps,
    )


class InstanceNorm1d(stock.InstanceNorm1d, metaclass=Layer):
    _apply_instance_norm = _apply_instance_norm


class LazyInstanceNorm1d(stock.LazyInstanceNorm1d, metaclass=Layer):
    cls_to_become = InstanceNorm1d  # type: ignore[assignment]
    _apply_instance_norm = _apply_instance_norm


class InstanceNorm2d(stock.InstanceNorm2d, metaclass=Layer):
    _apply_instance_norm = _apply_instance_norm


class LazyInstanceNorm2d(stock.LazyInstanceNorm2d, metaclass=Layer):
    cls_to_become = InstanceNorm2d  # type: ignore[assignment]
    _apply_instance_norm = _apply_instance_norm


class InstanceNorm3d(stock.InstanceNorm3d, metaclass=Layer):
    _apply_instance_norm = _apply_instance_norm


class LazyInstanceNorm3d(stock.LazyInstanceNorm3d, metaclass=Layer):
    cls_to_become = InstanceNorm3d  # type: ignore[assignment]
    _apply_instance_norm = _apply_instance_norm
