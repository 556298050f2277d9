"""Whole training steps: GPT-2, BERT-base, ViT-B/16 and ResNet-50, built from any `nn` namespace.

The models are written as a user would write them. `import fastnn as nn` therefore replaces in them
what it replaces for users.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TransformerSizes:
    """The sizes of a transformer. `patch`: the size of image patches, instead of a vocabulary."""

    width: int
    heads: int
    layers: int
    length: int
    classes: int
    causal: bool = False
    dropout: float = 0.1
    patch: int | None = None


@dataclass(frozen=True)
class ResNet:
    """The number of blocks per stage. The first stage has 64 channels."""

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    classes: int = 1000
    image: int = 224
    width: int = 64


def transformer(nn: Any, size: TransformerSizes):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
            self.qkv = nn.Linear(size.width, 3 * size.width)
            self.proj = nn.Sequential(nn.Linear(size.width, size.width), nn.Dropout(size.dropout))
            self.mlp = nn.Sequential(
                nn.Linear(size.width, 4 * size.width),
                nn.GELU(),
                nn.Linear(4 * size.width, size.width),
                nn.Dropout(size.dropout),
            )

        def forward(self, x):
            B, T, C = x.shape
            qkv = self.qkv(self.norm1(x)).view(B, T, 3, size.heads, C // size.heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=size.causal)
            x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
            return x + self.mlp(self.norm2(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            if size.patch is None:
                self.token = nn.Embedding(size.classes, size.width)
            else:
                self.token = nn.Conv2d(3, size.width, size.patch, size.patch)
            self.position = nn.Embedding(size.length, size.width)
            self.blocks = nn.Sequential(*(Block() for _ in range(size.layers)))
            self.norm = nn.LayerNorm(size.width)
            self.head = nn.Linear(size.width, size.classes)
            self.loss = nn.CrossEntropyLoss()

        def forward(self, x, targets):
            x = self.token(x)
            if size.patch is not None:
                x = x.flatten(2).transpose(1, 2)
            x = x + self.position(torch.arange(size.length, device=x.device))
            x = self.norm(self.blocks(x))
            x = x.mean(1) if size.patch is not None else x.flatten(0, 1)
            return self.loss(self.head(x), targets.flatten())

    return Model()


def resnet(nn: Any, size: ResNet):
    class Bottleneck(nn.Module):
        def __init__(self, inner, width, stride):
            super().__init__()
            self.main = nn.Sequential(
                nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width),
            )  # fmt: skip
            self.short = nn.Identity()
            if stride != 1 or inner != 4 * width:
                self.short = nn.Sequential(
                    nn.Conv2d(inner, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
                )
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.relu(self.main(x) + self.short(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            first = size.width
            layers = [
                nn.Conv2d(3, first, 7, 2, 3, bias=False), nn.BatchNorm2d(first), nn.ReLU(),
                nn.MaxPool2d(3, 2, 1),
            ]  # fmt: skip
            inner = first
            for stage, blocks in enumerate(size.blocks):
                for i in range(blocks):
                    width = first << stage
                    layers.append(Bottleneck(inner, width, 2 if stage and not i else 1))
                    inner = 4 * width
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, size.classes)]
            self.layers = nn.Sequential(*layers)
            self.loss = nn.CrossEntropyLoss()

        def forward(self, x, targets):
            return self.loss(self.layers(x), targets)

    return Model()


@dataclass(frozen=True)
class Step:
    """A model and a batch."""

    name: str
    size: TransformerSizes | ResNet
    batch: int

    def build(self, nn: Any) -> torch.nn.Module:
        make: Callable = resnet if isinstance(self.size, ResNet) else transformer
        return make(nn, self.size)

    def data(self, device: str) -> tuple[Tensor, Tensor]:
        size, n = self.size, self.batch
        if isinstance(size, TransformerSizes) and size.patch is None:
            shape = (n, size.length)
            tokens = torch.randint(size.classes, shape, device=device)
            return tokens, torch.randint(size.classes, shape, device=device)
        if isinstance(size, ResNet):
            side = size.image
        else:
            assert size.patch is not None
            side = int(size.length**0.5) * size.patch
        x = torch.randn(n, 3, side, side, device=device)
        return x, torch.randint(size.classes, (n,), device=device)


STEPS = [
    Step("GPT-2 small", TransformerSizes(768, 12, 12, 1024, 50257, causal=True), 8),
    Step("BERT-base", TransformerSizes(768, 12, 12, 512, 30522), 16),
    Step("ViT-B/16", TransformerSizes(768, 12, 12, 196, 1000, patch=16), 64),
    Step("ResNet-50", ResNet(), 64),
]
TINY = [
    Step("GPT, tiny", TransformerSizes(16, 2, 1, 4, 11, causal=True), 2),
    Step("ViT, tiny", TransformerSizes(16, 2, 1, 4, 5, patch=2), 2),
    Step("ResNet, tiny", ResNet((1, 1), 5, 16, 4), 2),
]
