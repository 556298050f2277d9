"""Transformers. Mirrors torch/nn/modules/transformer.py.

In an encoder or decoder layer the end of a branch (dropout, residual, norm) runs as one op, and so
does the feed-forward's first half (linear, activation, dropout), where nothing could tell: by the
rules of `_fusion.py`. What is not fused is called as stock calls it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as stock
from torch import Tensor
from torch.nn.modules import transformer as _stock

import fastnn.functional as F
from fastnn._mode import current_mode, idle
from fastnn.layers._fusion import (
    DROPOUT_ADD,
    DROPOUT_ADD_LAYER_NORM,
    DROPOUT_ADD_RMS_NORM,
    LINEAR_ACT,
    counts_as,
    fit,
    plainly,
)
from fastnn.layers._layer import OURS, Layer, as_torch_made, rebound
from fastnn.layers.activation import MultiheadAttention
from fastnn.layers.dropout import Dropout
from fastnn.layers.linear import Linear
from fastnn.layers.normalization import LayerNorm, RMSNorm

__all__ = [
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]

_MEMBERS = {c.__name__: c for c in (MultiheadAttention, Linear, Dropout, LayerNorm)}


class _Fused:
    """A layer's members, run as few ops where these are what they seem and nobody watches."""

    def __init__(self, layer):
        self.layer = layer

    def feed_forward(self, x: Tensor) -> Tensor:
        """All of stock's `_ff_block` but for the last dropout."""
        layer = self.layer
        linear, activation, dropout = layer.linear1, layer.activation, layer.dropout
        members = linear, activation, dropout
        names = "linear1", "the activation", "dropout"
        what = None if LINEAR_ACT.small(x, linear) else fit(LINEAR_ACT, members, names)
        if what is None:
            x = dropout(activation(linear(x)))
        else:
            x = LINEAR_ACT.op(*LINEAR_ACT.arguments(x, *what))
        return layer.linear2(x)

    def add(self, x: Tensor, z: Tensor, dropout) -> Tensor:
        """x + dropout(z)"""
        what = (
            None if DROPOUT_ADD.small(z, dropout) else fit(DROPOUT_ADD, (dropout,), ("a dropout",))
        )
        if what is None:
            return x + dropout(z)
        if not dropout.training or dropout.p == 0:
            return x + z
        return DROPOUT_ADD.op(*DROPOUT_ADD.arguments(z, *what, x))

    def add_norm(self, x: Tensor, z: Tensor, dropout, norm, prenorm: bool):
        """norm(x + dropout(z)); (x + dropout(z), its norm) if `prenorm`."""
        rms = counts_as(norm) is RMSNorm
        rule = DROPOUT_ADD_RMS_NORM if rms else DROPOUT_ADD_LAYER_NORM
        what = None if rule.small(z, norm) else fit(rule, (dropout, norm), ("a dropout", "a norm"))
        if what is None:
            s = x + dropout(z)
            return (s, norm(s)) if prenorm else norm(s)
        return rule.op(*rule.arguments(z, *what, x, prenorm))


# The methods that stock's forward is made of, and that ours does not call.
_BLOCKS: dict[type, dict[str, Any]] = {
    cls: {
        name: as_torch_made(method) for name, method in vars(cls).items() if name.endswith("_block")
    }
    for cls in (stock.TransformerEncoderLayer, stock.TransformerDecoderLayer)
}


def _one_by_one(layer, stocks: type) -> bool:
    """Whether stock's code must run: no kernel can, somebody looks on, or overrides a block."""
    if idle() or torch.compiler.is_compiling() or plainly() or current_mode() == "torch":
        return True
    return any(
        name in layer.__dict__ or getattr(type(layer), name) is not method
        for name, method in _BLOCKS[stocks].items()
    )


def _has_stocks_kernel(layer, src: Tensor) -> bool:
    """Whether stock may run all of the layer as its inference kernel, or on nested tensors."""
    attention = layer.self_attn
    if src.is_nested:
        return True
    if not (
        not layer.training
        and torch.backends.mha.get_fastpath_enabled()
        and src.dim() == 3
        and attention.batch_first
        and attention._qkv_same_embed_dim
        and attention.in_proj_bias is not None
        and layer.activation_relu_or_gelu
        and attention.num_heads % 2 == 0
        and not torch.is_autocast_enabled()
        and layer.norm1.eps == layer.norm2.eps
    ):
        return False
    return not torch.is_grad_enabled() or not any(
        t.requires_grad for t in (src, *layer.parameters())
    )


_encode_as_stock = rebound(stock.TransformerEncoderLayer.forward)
_decode_as_stock = rebound(stock.TransformerDecoderLayer.forward)


def _encode(layer, src, src_mask, src_key_padding_mask, is_causal):
    if (
        not isinstance(src, Tensor)  # stock says what is wrong with it
        or _one_by_one(layer, stock.TransformerEncoderLayer)
        or _has_stocks_kernel(layer, src)
    ):
        return _encode_as_stock(layer, src, src_mask, src_key_padding_mask, is_causal)
    src_key_padding_mask = F._canonical_mask(  # type: ignore[attr-defined]
        mask=src_key_padding_mask,
        mask_name="src_key_padding_mask",
        other_type=F._none_or_dtype(src_mask),  # type: ignore[attr-defined]
        other_name="src_mask",
        target_type=src.dtype,
    )
    src_mask = F._canonical_mask(  # type: ignore[attr-defined]
        mask=src_mask,
        mask_name="src_mask",
        other_type=None,
        other_name="",
        target_type=src.dtype,
        check_other=False,
    )

    def attend(x):
        return layer.self_attn(
            x, x, x, attn_mask=src_mask, key_padding_mask=src_key_padding_mask,
            need_weights=False, is_causal=is_causal,
        )[0]  # fmt: skip

    fused = _Fused(layer)
    x = src
    if layer.norm_first:
        x, y = fused.add_norm(x, attend(layer.norm1(x)), layer.dropout1, layer.norm2, True)
        return fused.add(x, fused.feed_forward(y), layer.dropout2)
    x = fused.add_norm(x, attend(x), layer.dropout1, layer.norm1, False)
    return fused.add_norm(x, fused.feed_forward(x), layer.dropout2, layer.norm2, False)


def _decode(
    layer, tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
    tgt_is_causal, memory_is_causal,
):  # fmt: skip
    if not isinstance(tgt, Tensor) or _one_by_one(layer, stock.TransformerDecoderLayer):
        return _decode_as_stock(
            layer, tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask,
            memory_key_padding_mask, tgt_is_causal, memory_is_causal,
        )  # fmt: skip

    def attend(x):
        return layer.self_attn(
            x, x, x, attn_mask=tgt_mask, key_padding_mask=tgt_key_padding_mask,
            is_causal=tgt_is_causal, need_weights=False,
        )[0]  # fmt: skip

    def look_up(x):
        return layer.multihead_attn(
            x, memory, memory, attn_mask=memory_mask, key_padding_mask=memory_key_padding_mask,
            is_causal=memory_is_causal, need_weights=False,
        )[0]  # fmt: skip

    fused = _Fused(layer)
    x = tgt
    if layer.norm_first:
        x, y = fused.add_norm(x, attend(layer.norm1(x)), layer.dropout1, layer.norm2, True)
        x, y = fused.add_norm(x, look_up(y), layer.dropout2, layer.norm3, True)
        return fused.add(x, fused.feed_forward(y), layer.dropout3)
    x = fused.add_norm(x, attend(x), layer.dropout1, layer.norm1, False)
    x = fused.add_norm(x, look_up(x), layer.dropout2, layer.norm2, False)
    return fused.add_norm(x, fused.feed_forward(x), layer.dropout3, layer.norm3, False)


class TransformerEncoderLayer(stock.TransformerEncoderLayer, metaclass=Layer):
    __init__ = rebound(stock.TransformerEncoderLayer.__init__, **_MEMBERS)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        return _encode(self, src, src_mask, src_key_padding_mask, is_causal)


class TransformerDecoderLayer(stock.TransformerDecoderLayer, metaclass=Layer):
    __init__ = rebound(stock.TransformerDecoderLayer.__init__, **_MEMBERS)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        return _decode(
            self,
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            tgt_is_causal,
            memory_is_causal,
        )


def _clones(module, N):
    """Stock's `_get_clones`, of our classes: copies are nobody else's, so they may be converted."""
    clones = _stock._get_clones(module, N)
    for layer in clones.modules():
        layer.__class__ = OURS.get(type(layer), type(layer))
    return clones


class TransformerEncoder(stock.TransformerEncoder, metaclass=Layer):
    __init__ = rebound(stock.TransformerEncoder.__init__, _get_clones=_clones)


class TransformerDecoder(stock.TransformerDecoder, metaclass=Layer):
    __init__ = rebound(stock.TransformerDecoder.__init__, _get_clones=_clones)


class Transformer(stock.Transformer, metaclass=Layer):
    __init__ = rebound(
        stock.Transformer.__init__,
        LayerNorm=LayerNorm,
        TransformerDecoder=TransformerDecoder,
        TransformerDecoderLayer=TransformerDecoderLayer,
        TransformerEncoder=TransformerEncoder,
        TransformerEncoderLayer=TransformerEncoderLayer,
    )
