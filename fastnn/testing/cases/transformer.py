"""Transformer layers and their stacks: orders of norm and of dimensions, activations, masks."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from fastnn.testing import Case, randn
from fastnn.testing.cases.multihead_attention import causal, hidden

F32 = (torch.float32,)
SMALL = {"d_model": 8, "nhead": 2, "dim_feedforward": 12}


def encoder_layer(shape=(5, 2, 8), *masks, dtypes=None, **options):
    fields = {} if dtypes is None else {"dtypes": dtypes}
    fields |= {k: options.pop(k) for k in ("train", "stock", "autocast") if k in options}
    return Case("TransformerEncoderLayer", (randn(*shape), *masks), SMALL | options, **fields)


def decoder_layer(shape=(5, 2, 8), memory=(7, 2, 8), *masks, **options):
    fields = {k: options.pop(k) for k in ("train", "dtypes") if k in options}
    inputs = (randn(*shape), randn(*memory), *masks)
    return Case("TransformerDecoderLayer", inputs, SMALL | options, **fields)


class Given:
    """A maker whose value is a function or a layer. (A callable option counts as a maker.)"""

    def __init__(self, activation):
        self.activation = activation

    def __call__(self, dtype, device):
        return self.activation

    def __repr__(self):
        return getattr(self.activation, "__name__", str(self.activation))


def square(x):
    return x * x


def stack(name, layer, *inputs, first=False, norm=False, **fields):
    """A stack of two layers. The layer given is a stock layer; each side makes its own of it."""
    layer = getattr(nn, layer)

    def member(namespace):
        torch.manual_seed(5)
        return layer(8, 2, 12, dropout=0.3, batch_first=first, norm_first=norm)

    options = {"num_layers": 2, **({"enable_nested_tensor": False} if "En" in name else {})}
    return Case(name, inputs, options, members=(member,), **fields)


CASES: list[Case] = [
    *(
        row(*shapes, norm_first=norm_first, batch_first=batch_first, **options)
        for row, shapes in ((encoder_layer, ((3, 5, 8),)), (decoder_layer, ((3, 5, 8), (3, 5, 8))))
        for norm_first, batch_first in itertools.product((False, True), repeat=2)
        for options in ({"dropout": 0.3, "dtypes": F32}, {"train": False, "dtypes": F32})
    ),
    *(
        encoder_layer((3, 2, 8), activation=activation, dropout=0.3, dtypes=F32)
        for activation in (
            "gelu",
            *map(Given, (torch.tanh, nn.functional.silu, nn.GELU("tanh"), nn.ReLU())),
        )
    ),
    encoder_layer(activation=Given(square), dtypes=F32, stock="fusion"),
    encoder_layer((3, 2, 8), norm_first=True, dropout=0.3),
    decoder_layer((3, 2, 8), (3, 2, 8), dropout=0.3),
    encoder_layer(bias=False, layer_norm_eps=1e-3, dropout=0.3, dtypes=F32),
    encoder_layer((5, 8), dropout=0.3, dtypes=F32),  # no batch
    encoder_layer((5, 2, 8), causal(5), dtypes=F32),
    encoder_layer((5, 2, 8), causal(5), None, True, dtypes=F32),
    encoder_layer((5, 2, 8), hidden(5, 5), hidden(2, 5), dtypes=F32, norm_first=True),
    encoder_layer((5, 2, 8), hidden(4, 5, 5), hidden(2, 5), dtypes=F32),
    encoder_layer((5, 2, 8), randn(4, 5, 5), dtypes=F32),
    encoder_layer((17, 2, 8), dim_feedforward=40, dropout=0.2, dtypes=F32),
    *(encoder_layer(dropout=0.0, autocast=low, dtypes=F32) for low in (torch.bfloat16,)),
    decoder_layer((5, 2, 8), (7, 2, 8), causal(5), hidden(5, 7), hidden(2, 5, floating=True),
                  hidden(2, 7), dtypes=F32),
    decoder_layer((5, 8), (7, 8), causal(5), None, None, None, True, dtypes=F32),
    stack(
        "TransformerEncoder", "TransformerEncoderLayer", randn(5, 2, 8), causal(5), dtypes=F32
    ),
    stack(
        "TransformerEncoder", "TransformerEncoderLayer", randn(2, 5, 8), None, hidden(2, 5),
        first=True, norm=True, dtypes=F32,
    ),
    stack(
        "TransformerDecoder", "TransformerDecoderLayer", randn(3, 4, 8), randn(5, 4, 8), causal(3),
        dtypes=F32,
    ),
    Case(
        "Transformer",
        (randn(2, 5, 8), randn(2, 7, 8)),
        {**SMALL, "num_encoder_layers": 1, "num_decoder_layers": 1, "batch_first": True},
        dtypes=F32,
    ),
]  # fmt: skip
