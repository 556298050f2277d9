"""Multi-head attention: with and without weights, every mask and layout, odd sizes, dropout."""

from __future__ import annotations

import math

import torch

from fastnn.testing import Case, randn

F32 = (torch.float32,)


def hidden(*shape, floating=False, every=2):
    """A mask of the last keys of every second row: True, or minus infinity."""

    def make(dtype, device):
        mask = torch.zeros(shape, dtype=torch.bool, device=device)
        mask.view(-1, shape[-1])[::every, shape[-1] * 2 // 3 :] = True
        if not floating:
            return mask
        return torch.zeros(shape, dtype=dtype, device=device).masked_fill(mask, -math.inf)

    return make


def causal(n):
    def make(dtype, device):
        return torch.full((n, n), -math.inf, dtype=dtype, device=device).triu(1)

    return make


def layer(L, B, E, H, S=None, kdim=None, vdim=None, view=None, dtypes=None, **options):
    """A row with distinct q, k and v, shaped as `batch_first` says; no batch if `B` is None."""
    forward = {k: options.pop(k) for k in CALL if k in options}
    first = options.get("batch_first", False)

    def shape(n, e):
        return (n, e) if B is None else (B, n, e) if first else (n, B, e)

    S = S or L
    inputs = (shape(L, E), shape(S, kdim or E), shape(S, vdim or E))
    given = tuple(forward.get(name, default) for name, default in CALL.items())
    return Case(
        "MultiheadAttention",
        (*(randn(*s) for s in inputs), *given),
        {"embed_dim": E, "num_heads": H, "kdim": kdim, "vdim": vdim, **options},
        view=view,
        **({} if dtypes is None else {"dtypes": dtypes}),
    )


CALL = {
    "key_padding_mask": None,
    "need_weights": True,
    "attn_mask": None,
    "average_attn_weights": True,
    "is_causal": False,
}


CASES: list[Case] = [
    *(
        layer(5, 2, 8, 2, 7, need_weights=need, average_attn_weights=average, **options)
        for need, average in ((True, True), (True, False), (False, True))
        for options in (
            {},
            {"dropout": 0.4},
            {"batch_first": True, "dropout": 0.4},
            {"attn_mask": hidden(5, 7), "key_padding_mask": hidden(2, 7)},
            {"attn_mask": hidden(4, 5, 7), "dropout": 0.4},
        )
    ),
    *(
        layer(5, 3, 12, 3, **options, dtypes=F32)
        for options in (
            {"attn_mask": randn(9, 5, 5)},
            {"attn_mask": randn(5, 5)},
            {"attn_mask": randn(5, 5), "key_padding_mask": randn(3, 5, grad=False)},
            {"attn_mask": causal(5), "is_causal": True},
            {"attn_mask": causal(5), "is_causal": True, "need_weights": False},
            {"attn_mask": randn(5, 5, grad=False), "need_weights": False},
            {"key_padding_mask": hidden(3, 5, floating=True)},
            {"key_padding_mask": hidden(3, 5), "batch_first": True},
        )
    ),
    layer(5, 2, 8, 1, 7, bias=False),
    layer(5, 2, 8, 2, 7, kdim=6, vdim=4),
    layer(5, 2, 8, 2, 7, kdim=6, vdim=4, bias=False, batch_first=True, dtypes=F32),
    layer(
        5,
        2,
        8,
        2,
        7,
        add_bias_kv=True,
        add_zero_attn=True,
        dtypes=F32,
        attn_mask=hidden(5, 7),
        key_padding_mask=hidden(2, 7),
    ),
    layer(5, 2, 8, 2, add_bias_kv=True, need_weights=False, attn_mask=causal(5), dtypes=F32),
    layer(5, 2, 8, 2, add_zero_attn=True, dropout=0.4, batch_first=True, dtypes=F32),
    # No batch.
    layer(5, None, 8, 2, 7),
    layer(5, None, 8, 2, 7, key_padding_mask=hidden(7), attn_mask=hidden(2, 5, 7), dtypes=F32),
    layer(5, None, 8, 2, average_attn_weights=False, dropout=0.4, dtypes=F32),
    layer(5, None, 8, 2, 7, need_weights=False, dtypes=F32),
    # Past a tile; head sizes that are no power of two, and above one; one query, one key.
    layer(130, 1, 24, 2, 70, dropout=0.2, dtypes=F32),
    layer(67, 1, 40, 2, 131, average_attn_weights=False, dtypes=F32),
    layer(34, 2, 80, 1, 33),
    layer(1, 2, 8, 2, 1),
    layer(3, 4, 12, 2, 40, dropout=0.4),
    # A row that may see no key: nan if weights are returned, 0 if they are not.
    layer(4, 2, 8, 2, key_padding_mask=hidden(2, 4, floating=True, every=1), attn_mask=causal(4)),
    *(
        layer(3, 2, 8, 2, 3, key_padding_mask=everything, need_weights=need, dtypes=F32)
        for need in (True, False)
        for everything in (lambda dtype, device: torch.ones(2, 3, dtype=torch.bool, device=device),)
    ),
    layer(3, 2, 8, 2, dropout=1.0, dtypes=F32),
]
