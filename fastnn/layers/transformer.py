"""Transformers. Mirrors torch/nn/modules/transformer.py.

In an encoder or decoder layer the end of a branch (dropout, residual, norm) runs as one op, and so
does the feed-forward's first half (linear, activation, dropout), where nothing could tell: see
`_Fused`. What is not fused is called as stock calls it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as stock
from torch import Tensor
from torch.nn.modules import transformer as _stock

import fastnn.functional as F
from fastnn import _mode
from fastnn._mode import current_mode
from fastnn.layers._layer import OURS, Layer, as_torch_made, rebound, watched
from fastnn.layers.activation import MultiheadAttention
from fastnn.layers.container import _FUSES, _plainly, _Told
from fastnn.layers.dropout import Dropout
from fastnn.layers.linear import Linear
from fastnn.layers.normalization import LayerNorm, RMSNorm
from fastnn.ops import REGISTRY
from fastnn.ops.linear import linear_act
from fastnn.ops.residual_norm import dropout_add, dropout_add_layer_norm, dropout_add_rms_norm

__all__ = [
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]

_MEMBERS = {c.__name__: c for c in (MultiheadAttention, Linear, Dropout, LayerNorm)}

# What `linear_act` is told for an activation that is a function.
_FUNCTIONS: dict[object, _Told] = {
    function: (name, 0.0, 0.0)
    for name in ("relu", "gelu", "silu", "mish", "selu", "hardswish", "sigmoid", "tanh")
    for home in (F, stock.functional, torch)
    for function in (getattr(home, name, None),)
    if function is not None
}


def _activation(layer) -> Any:
    act = layer.activation
    if isinstance(act, stock.Module):
        fuses = _FUSES.get(OURS.get(type(act), type(act)))
        return fuses(act) if fuses is not None and watched(act) is None else None
    try:
        return _FUNCTIONS.get(act)
    except TypeError:  # not hashable
        return None


def _is(module, *classes) -> bool:
    """Whether it is exactly of one of our classes, or of the stock class that one stands for."""
    return OURS.get(type(module), type(module)) in classes


class _Fused:
    """A layer's members, run as few ops where these are what they seem and nobody watches."""

    def __init__(self, layer):
        self.layer = layer

    def tell(self, name: str, why: str) -> None:
        _mode.note(REGISTRY[name], f"not fused: {why}")

    def feed_forward(self, x: Tensor) -> Tensor:
        """All of stock's `_ff_block` but for the last dropout."""
        layer = self.layer
        told = _activation(layer)
        linear, dropout = layer.linear1, layer.dropout
        why = None
        if not _is(linear, Linear):
            why = f"linear1 is a {type(linear).__name__}"
        elif not _is(dropout, Dropout) or (dropout.inplace and dropout.training):
            why = f"dropout is {dropout}"
        elif told is None:
            why = f"the activation is {getattr(layer.activation, '__name__', layer.activation)}"
        else:
            why = watched(linear, dropout)
        if why is not None:
            self.tell("linear_act", why)
            x = dropout(layer.activation(linear(x)))
        else:
            x = linear_act(x, linear.weight, linear.bias, *told, dropout.p, dropout.training)
        return layer.linear2(x)

    def _plain_dropout(self, dropout) -> str | None:
        if not _is(dropout, Dropout) or (dropout.inplace and dropout.training):
            return f"a dropout is {dropout}"
        return watched(dropout)

    def add(self, x: Tensor, z: Tensor, dropout) -> Tensor:
        """x + dropout(z)"""
        why = self._plain_dropout(dropout)
        if why is not None:
            self.tell("dropout_add", why)
            return x + dropout(z)
        if not dropout.training or dropout.p == 0:
            return x + z
        return dropout_add(z, x, dropout.p, dropout.training)

    def add_norm(self, x: Tensor, z: Tensor, dropout, norm, prenorm: bool):
        """norm(x + dropout(z)); (x + dropout(z), its norm) if `prenorm`."""
        why = self._plain_dropout(dropout)
        if why is None and not _is(norm, LayerNorm, RMSNorm):
            why = f"a norm is a {type(norm).__name__}"
        why = why or watched(norm)
        if why is not None:
            self.tell("dropout_add_layer_norm", why)
            s = x + dropout(z)
            return (s, norm(s)) if prenorm else norm(s)
        how = norm.eps, dropout.p, dropout.training, prenorm
        if _is(norm, RMSNorm):
            return dropout_add_rms_norm(z, x, norm.normalized_shape, norm.weight, *how)
        return dropout_add_layer_norm(z, x, norm.normalized_shape, norm.weight, norm.bias, *how)


# The methods that stock's forward is made of, and that ours does not call.
_BLOCKS: dict[type, dict[str, Any]] = {
    cls: {
        name: as_torch_made(method) for name, method in vars(cls).items() if name.endswith("_block")
    }
    for cls in (stock.TransformerEncoderLayer, stock.TransformerDecoderLayer)
}


def _one_by_one(layer, stocks: type) -> bool:
    """Whether stock's code must run: no kernel can, somebody looks on, or overrides a block."""
    if _plainly() or current_mode() == "torch":
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


def _encode(layer, src, src_mask, src_key_padding_mask, is_causal):
    if (
        not isinstance(src, Tensor)  # stock says what is wrong with it
        or _one_by_one(layer, stock.TransformerEncoderLayer)
        or _has_stocks_kernel(layer, src)
    ):
        return layer._plain(src, src_mask, src_key_padding_mask, is_causal)
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
        return layer._plain(
            tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
            tgt_is_causal, memory_is_causal,
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
    _plain = rebound(stock.TransformerEncoderLayer.forward, "_plain")

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if torch.jit.is_scripting():  # TorchScript compiles this branch alone
            src = self._plain(src, src_mask, src_key_padding_mask, is_causal)
        else:
            src = _encode(self, src, src_mask, src_key_padding_mask, is_causal)
        return src


class TransformerDecoderLayer(stock.TransformerDecoderLayer, metaclass=Layer):
    __init__ = rebound(stock.TransformerDecoderLayer.__init__, **_MEMBERS)
    _plain = rebound(stock.TransformerDecoderLayer.forward, "_plain")

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
        if torch.jit.is_scripting():
            tgt = self._plain(
                tgt,
                memory,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                tgt_is_causal,
                memory_is_causal,
            )
        else:
            tgt = _decode(
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
        return tgt


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
