"""Attention: layouts, masks of every broadcast shape, causal, groups, dropout, ragged, empty."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastnn.testing import Case, randn


def attention(q, k, v, *, view=None, stock=None, dtypes=None, autocast=None, **options):
    fields = {} if dtypes is None else {"dtypes": dtypes}
    return Case(
        "scaled_dot_product_attention", (q, k, v), options, view=view, stock=stock,
        autocast=autocast, **fields,
    )  # fmt: skip


def row(B, H, L, S, D, E=None, heads_k=None, **options):
    """q (B, H, L, D), k (B, H, S, D), v (B, H, S, E)."""
    heads_k = heads_k or H
    shapes = (B, H, L, D), (B, heads_k, S, D), (B, heads_k, S, D if E is None else E)
    return attention(*(randn(*shape) for shape in shapes), **options)


def transposed(*shape):
    """(B, H, N, D), in memory (B, N, H, D) as a projection gives it."""
    B, H, N, D = shape

    def make(dtype, device):
        return randn(B, N, H, D)(dtype, device).detach().transpose(1, 2).requires_grad_()

    return make


@dataclass(frozen=True)
class Mask:
    """Maker of a mask: a bool mask of the keys to keep, or a float mask that is added.

    empty: a row that may see no key. least: the value of a third of a float mask, and of its first
    row. view: a function that is applied to the mask; its result is the leaf.
    """

    kind: str
    shape: tuple[int, ...]
    empty: int | None = None
    least: float | None = None
    grad: bool = False
    view: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __call__(self, dtype, device):
        if self.kind == "keeps":
            mask = torch.rand(self.shape) < 0.7
            if self.empty is not None:
                mask[..., self.empty, :] = False
            mask = mask.to(device)
        else:
            mask = torch.randn(self.shape)
            if self.least is not None:
                mask[torch.rand(self.shape) < 0.3] = self.least
                mask[..., 0, :] = self.least
            mask = mask.to(device, dtype)
        if self.view is not None:
            mask = self.view(mask)
        return mask.requires_grad_(self.grad)

    def __repr__(self):
        view = " view" if self.view else ""
        return f"{self.kind} {'x'.join(map(str, self.shape))}{view}{' grad' if self.grad else ''}"


def keeps(*shape, **fields):
    return Mask("keeps", shape, **fields)


def adds(*shape, **fields):
    return Mask("adds", shape, **fields)


FP32 = (torch.float32,)
LOW = (torch.bfloat16, torch.float16)

SHAPES = [
    row(1, 2, 1, 1, 8),
    row(2, 2, 1, 19, 16),  # one query, as in decoding
    row(1, 2, 19, 1, 16),
    row(2, 3, 17, 33, 16),
    row(2, 3, 9, 11, 1),
    row(1, 1, 130, 65, 24),  # past a block of queries, and of keys
    row(1, 1, 65, 130, 64),
    row(1, 2, 5, 7, 80, 40),
    row(1, 1, 9, 70, 256, dtypes=LOW),
    row(1, 1, 4, 5, 257, stock="size"),
    row(2, 2, 0, 5, 8, stock="empty"),
    row(2, 2, 5, 0, 8, stock="empty"),
    row(0, 2, 5, 5, 8, stock="empty"),
    row(1, 2, 5, 5, 8, 0, stock="empty"),
    attention(randn(5, 8), randn(7, 8), randn(7, 8)),
    attention(randn(3, 5, 8), randn(3, 7, 8), randn(3, 7, 8)),
    attention(randn(2, 2, 2, 5, 8), randn(2, 2, 2, 7, 8), randn(2, 2, 2, 7, 8)),
    # Batches that broadcast: one head of keys for all, one batch, fewer dims.
    attention(randn(2, 3, 5, 8), randn(2, 1, 7, 8), randn(2, 1, 7, 8)),
    attention(randn(2, 3, 5, 8), randn(1, 3, 7, 8), randn(2, 1, 7, 8)),
    attention(randn(5, 8), randn(2, 3, 7, 8), randn(3, 7, 8)),
    attention(randn(2, 1, 2, 5, 8), randn(3, 1, 7, 8), randn(3, 1, 7, 8)),
    # Layouts.
    attention(transposed(2, 3, 5, 8), transposed(2, 3, 7, 8), transposed(2, 3, 7, 8)),
    row(2, 2, 5, 7, 8, view=lambda q: q.transpose(0, 1)),
    row(2, 2, 5, 5, 5, view=lambda q: q.mT),
    row(2, 2, 10, 7, 8, view=lambda q: q[:, :, ::2]),
    row(2, 2, 5, 7, 8, view=lambda q: q.repeat(1, 1, 1, 2)[..., ::2]),
    row(1, 2, 5, 7, 8, view=lambda q: q.expand(3, 2, 5, 8)),
    row(2, 2, 5, 7, 8, autocast=torch.bfloat16),
    row(2, 2, 5, 7, 8, dtypes=(torch.float64,), stock="dtype"),
]

OPTIONS = [
    row(2, 2, 5, 7, 8, scale=0.3),
    row(2, 2, 5, 7, 8, scale=-1.5),
    row(2, 2, 5, 7, 8, scale=0),
    row(1, 2, 70, 70, 16, is_causal=True),
    row(1, 2, 9, 70, 16, is_causal=True),
    row(1, 1, 140, 19, 16, is_causal=True),
    row(2, 4, 5, 7, 8, heads_k=2, enable_gqa=True),
    row(1, 4, 66, 67, 16, heads_k=2, enable_gqa=True, is_causal=True),
    row(2, 2, 5, 7, 8, enable_gqa=True),
    attention(randn(4, 5, 8), randn(2, 7, 8), randn(2, 7, 8), enable_gqa=True),
    attention(randn(2, 4, 5, 8), randn(1, 2, 7, 8), randn(1, 2, 7, 8), enable_gqa=True),
    attention(
        randn(2, 4, 5, 8), randn(2, 4, 7, 8), randn(2, 2, 7, 8), enable_gqa=True, stock="shape"
    ),
    row(2, 3, 9, 11, 16, dropout_p=0.3),
    row(1, 2, 66, 70, 16, dropout_p=0.5, is_causal=True),
    row(1, 4, 9, 70, 16, heads_k=2, dropout_p=0.2, enable_gqa=True, attn_mask=keeps(9, 70)),
    row(2, 3, 9, 11, 16, dropout_p=1.0),
    row(2, 3, 9, 11, 16, dropout_p=0),
]

MASKS = [
    # Every broadcast shape, kept or added, in one tile of keys and in two.
    *(
        row(1, 3, 9, S, 16, attn_mask=make(*shape), dtypes=FP32)
        for S in (20, 70)
        for make in (keeps, adds)
        for shape in ((1, 1), (1, S), (9, 1), (9, S), (3, 1, S), (3, 9, S), (1, 3, 9, S))
    ),
    row(2, 3, 9, 11, 16, attn_mask=adds(2, 1, 1, 11)),
    row(2, 3, 9, 11, 16, attn_mask=keeps(2, 3, 9, 11)),
    row(2, 3, 9, 11, 16, attn_mask=keeps(9, 11)),
    row(2, 3, 9, 11, 16, attn_mask=keeps(3, 9, 11)),
    row(2, 3, 9, 11, 16, attn_mask=keeps(2, 1, 9, 11, empty=3)),
    row(1, 3, 9, 70, 16, attn_mask=keeps(1, 1, 9, 70, empty=3)),
    row(2, 3, 9, 11, 16, attn_mask=adds(9, 11, least=-math.inf)),
    row(1, 3, 9, 70, 16, attn_mask=adds(9, 70, least=-math.inf)),
    attention(randn(9, 8), randn(11, 8), randn(11, 8), attn_mask=keeps(9, 11)),
    attention(randn(3, 9, 8), randn(3, 11, 8), randn(3, 11, 8), attn_mask=adds(3, 9, 11)),
    attention(*(randn(2, 2, 3, 9, 8) for _ in range(3)), attn_mask=adds(2, 2, 1, 9, 9)),
    attention(*(randn(2, 2, 3, 9, 8) for _ in range(3)), attn_mask=keeps(9, 9)),
    attention(
        *(randn(2, 2, 3, 9, 8) for _ in range(3)), attn_mask=keeps(2, 1, 9, 9), stock="shape"
    ),
    # Through strides: transposed, every second one, expanded.
    row(1, 3, 9, 70, 16, attn_mask=adds(70, 9, view=lambda m: m.t())),
    row(1, 3, 9, 70, 16, attn_mask=keeps(18, 140, view=lambda m: m[::2, ::2])),
    row(2, 3, 9, 11, 16, attn_mask=keeps(2, 1, 1, 11, view=lambda m: m.expand(2, 3, 9, 11))),
    # Gradients of masks.
    *(
        row(2, 2, 9, S, 16, attn_mask=adds(*shape, grad=True))
        for S in (20, 70)
        for shape in ((9, S), (1, S), (2, 1, 9, S), (1, 2, 1, S), (2, 2, 9, S))
    ),
    row(1, 2, 66, 70, 16, attn_mask=adds(66, 70, grad=True)),
    row(1, 2, 130, 20, 16, attn_mask=adds(1, 20, grad=True), dropout_p=0.3),
    row(2, 4, 9, 20, 16, heads_k=2, attn_mask=adds(4, 1, 20, grad=True), enable_gqa=True),
    row(1, 2, 9, 20, 16, attn_mask=adds(20, 9, grad=True, view=lambda m: m.t())),
    row(1, 2, 9, 20, 16, attn_mask=adds(9, 1, grad=True), stock="autograd"),
]

CASES: list[Case] = [*SHAPES, *OPTIONS, *MASKS]
