"""LinearCrossEntropyLoss. Mirrors torch/nn/modules/linear_cross_entropy.py.

PyTorch has that file since torch 2.13. With an older torch, the class below has the same arguments,
parameters and keys.
"""

import math
from typing import Any

import torch.nn as stock

import fastnn.functional as F
from fastnn.layers._layer import Layer

__all__ = ["LinearCrossEntropyLoss"]


def _forward(self, input, target):
    shape = self.num_classes, *self.out_features
    bias = self.linear.bias
    return F.linear_cross_entropy(
        input,
        self.linear.weight.reshape(*shape, self.linear.in_features),
        target,
        linear_bias=None if bias is None else bias.reshape(shape),
        weight=self.weight,
        reduction=self.reduction,
        ignore_index=self.ignore_index,
        label_smoothing=self.label_smoothing,
        options=self.options,
    )


_Stock: Any = getattr(stock, "LinearCrossEntropyLoss", None)

if _Stock is not None:

    class LinearCrossEntropyLoss(_Stock, metaclass=Layer, boxes=("linear",)):
        forward = _forward

else:

    class LinearCrossEntropyLoss(stock.modules.loss._WeightedLoss):  # type: ignore[no-redef]
        """Cross entropy of `linear(input)` and `target`, as `torch.nn.LinearCrossEntropyLoss`.

        in_features, num_classes: sizes of the linear layer; its weight is
            (num_classes * prod(out_features), in_features).
        input: (N, in_features) or (in_features,).
        target: class indices (N, *out_features) or probabilities (N, num_classes, *out_features).

        Raises RuntimeError for a `weight` of another size than (num_classes,) or a
        `label_smoothing` outside [0, 1], NotImplementedError for `options`.
        """

        def __init__(
            self, in_features, num_classes, *, out_features=(), bias=False, device=None, dtype=None,
            reduction="mean", weight=None, ignore_index=None, label_smoothing=0.0, options=None,
        ):  # fmt: skip
            if weight is not None and weight.shape != (num_classes,):
                raise RuntimeError(f"weight of {tuple(weight.shape)}, not {(num_classes,)}")
            if not 0.0 <= label_smoothing <= 1.0:
                raise RuntimeError(f"label_smoothing={label_smoothing}, not between 0 and 1")
            if options is not None:
                raise NotImplementedError("LinearCrossEntropyLoss: this torch has no options")
            super().__init__(weight=weight, reduction=reduction)
            self.num_classes, self.out_features = num_classes, tuple(out_features)
            self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
            rows = math.prod(out_features, start=num_classes)
            self.linear = stock.Linear(in_features, rows, bias=bias, device=device, dtype=dtype)
            self.options = options

        forward = _forward
