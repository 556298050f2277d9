"""The function of Liger Kernel for a row, if Liger is installed and has one."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch

from fastnn.bench.cases import BenchCase


def version() -> str | None:
    try:
        return importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        return None


def counterpart(case: BenchCase, layer: Any) -> Callable | None:
    """Liger's function of the inputs of `case`, with the parameters of the stock `layer`.

    None unless both compute the same: Liger's softmax is over the last dimension. In its forward,
    Liger's cross entropy writes the gradient into the logits. They are copied first here, as a
    caller who still needs them must do.
    """
    if version() is None or not case.train:
        return None
    last = case.options.get("dim", -1) == -1
    try:
        if case.name == "LayerNorm" and isinstance(case.options["normalized_shape"], int):
            norm = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
            return _owning(layer, lambda x: norm.apply(x, layer.weight, layer.bias, layer.eps))
        if case.name == "RMSNorm":
            rms = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
            eps = torch.finfo(torch.float32).eps
            return _owning(layer, lambda x: rms.apply(x, layer.weight, eps, 0.0, "llama", False))
        if case.name == "Softmax" and last:
            softmax = importlib.import_module("liger_kernel.ops.softmax").LigerSoftmaxFunction
            return lambda x: softmax.apply(x)
        if case.name == "CrossEntropyLoss" and len(case.inputs) == 2 and case.shape.count("x") == 1:
            loss = importlib.import_module("liger_kernel.transformers").LigerCrossEntropyLoss(
                **case.options
            )
            return lambda x, target: loss(x.clone(), target)
        if case.name == "Embedding":
            table = importlib.import_module("liger_kernel.ops.experimental.embedding")
            return _owning(layer, lambda i: table.LigerEmbeddingFunction.apply(layer.weight, i))
    except (ImportError, AttributeError):  # another version has it in another place
        return None
    return None


def _owning(layer, function):
    """`function` as a module that has the parameters of `layer`, so that their gradients count."""
    function.parameters = layer.parameters
    return function
