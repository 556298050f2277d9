"""The function of Liger Kernel for a row, if Liger is installed and has one."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch

from fastnn.bench.cases import BenchCase

# The rows of which Liger may have the function.
NAMES = (
    "LayerNorm", "RMSNorm", "GroupNorm", "Softmax", "act_mul", "KLDivLoss", "CrossEntropyLoss",
    "Embedding",
)  # fmt: skip


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
    options = case.options
    try:
        if case.name == "LayerNorm" and isinstance(options["normalized_shape"], int):
            norm = _of("layer_norm", "LigerLayerNormFunction")
            return _owning(layer, lambda x: norm.apply(x, layer.weight, layer.bias, layer.eps))
        if case.name == "RMSNorm":
            rms = _of("rms_norm", "LigerRMSNormFunction")
            eps = torch.finfo(torch.float32).eps
            return _owning(layer, lambda x: rms.apply(x, layer.weight, eps, 0.0, "llama", False))
        if case.name == "GroupNorm" and "channels last" not in case.shape:
            group = _of("group_norm", "LigerGroupNormFunction")
            sizes = layer.num_channels, layer.num_groups, layer.eps
            return _owning(layer, lambda x: group.apply(x, layer.weight, layer.bias, *sizes))
        if case.name == "Softmax" and options.get("dim", -1) == -1:
            softmax = _of("softmax", "LigerSoftmaxFunction")
            return lambda x: softmax.apply(x)
        if case.name == "act_mul":
            gelu = options.get("activation") == "gelu_tanh"
            gated = _of("geglu", "LigerGELUMulFunction") if gelu else None
            gated = gated or _of("swiglu", "LigerSiLUMulFunction")
            return lambda x, gate: gated.apply(x, gate)
        if case.name == "KLDivLoss" and not options.get("log_target"):
            # Targets of the other rows want a gradient, which Liger does not compute.
            kl, reduction = (
                _of("kl_div", "LigerKLDivLossFunction"),
                options.get("reduction", "mean"),
            )
            return lambda x, target: kl.apply(x, target, reduction)
        if case.name == "CrossEntropyLoss" and len(case.inputs) == 2 and case.shape.count("x") == 1:
            loss = importlib.import_module("liger_kernel.transformers").LigerCrossEntropyLoss(
                **options
            )
            return lambda x, target: loss(x.clone(), target)
        if case.name == "Embedding":
            table = _of("experimental.embedding", "LigerEmbeddingFunction")
            return _owning(layer, lambda i: table.apply(layer.weight, i))
    except (ImportError, AttributeError):  # another version has it in another place
        return None
    return None


def _of(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)


def _owning(layer, function):
    """`function` as a module that has the parameters of `layer`, so that their gradients count."""
    function.parameters = layer.parameters
    return function
