"""Tiny ResNet, MobileNetV3, ConvNeXt and U-Net: trained on kernels, they follow PyTorch's curve."""

import pytest
import torch

import fastnn
from tests.marks import interpreted

STEPS = 2


def resnet(nn):
    class Bottleneck(nn.Module):
        def __init__(self, width, stride):
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(width, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
                nn.Conv2d(4, 4, 3, stride, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
                nn.Conv2d(4, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width),
            )  # fmt: skip
            self.down = nn.Conv2d(width, 2 * width, 1, stride, bias=False)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            return self.relu(self.body(x) + self.down(x))

    return nn.Sequential(
        nn.Conv2d(3, 6, 7, 2, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        Bottleneck(6, 1), Bottleneck(12, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(24, 5),
    )  # fmt: skip


def mobilenet(nn):
    class Squeeze(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.fc1, self.fc2 = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)
            self.relu, self.gate = nn.ReLU(), nn.Hardsigmoid()

        def forward(self, x):
            return x * self.gate(self.fc2(self.relu(self.fc1(self.pool(x)))))

    class Inverted(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12), nn.Hardswish(),
                nn.Conv2d(12, 12, 5, 1, 2, groups=12, bias=False), nn.BatchNorm2d(12),
                nn.Hardswish(), Squeeze(12), nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6),
            )  # fmt: skip

        def forward(self, x):
            return x + self.body(x)

    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.Hardswish(), Inverted(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


def convnext(nn):
    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.conv = nn.Conv2d(width, width, 7, padding=3, groups=width)
            self.norm = nn.LayerNorm(width, eps=1e-6)
            self.mlp = nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width))

        def forward(self, x):
            y = self.norm(self.conv(x).permute(0, 2, 3, 1))
            return x + self.mlp(y).permute(0, 3, 1, 2)

    return nn.Sequential(
        nn.Conv2d(3, 6, 4, 4), Block(6), Block(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.LayerNorm(6), nn.Linear(6, 5),
    )  # fmt: skip


def unet(nn):
    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.into = nn.Conv2d(3, 8, 3, padding=1)
            self.norm, self.act = nn.GroupNorm(2, 8), nn.SiLU()
            self.down = nn.Conv2d(8, 8, 3, 2, 1)
            self.middle = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
            self.up = nn.Upsample(scale_factor=2, mode="nearest")
            self.out = nn.Conv2d(16, 5, 1)

        def forward(self, x):
            x = self.act(self.norm(self.into(x)))
            y = self.up(self.middle(self.act(self.down(x))))
            return self.out(torch.cat([x, y], 1)).mean((2, 3))

    return UNet()


MODELS = {f.__name__: f for f in (resnet, mobilenet, convnext, unet)}


def curve(model, layout, mode):
    """The losses of a few steps, and the output in eval mode afterwards."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 16, 16, generator=generator).to(memory_format=layout)
    target = torch.tensor([1, 3])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    with fastnn.backend(mode):
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            return losses, model(x)


@interpreted
@pytest.mark.parametrize("how", ["swap", "convert"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_follows_the_curve_of_pytorch(name, how):
    layout = torch.contiguous_format if how == "swap" else torch.channels_last
    torch.manual_seed(0)
    its = MODELS[name](torch.nn).to(memory_format=layout)
    mine = MODELS[name](fastnn if how == "swap" else torch.nn).to(memory_format=layout)
    mine.load_state_dict(its.state_dict())
    if how == "convert":
        mine = fastnn.convert(mine)
    with fastnn.decisions() as heard, fastnn.backend("triton"), torch.no_grad():
        mine.eval()(torch.randn(2, 3, 16, 16).to(memory_format=layout))
        mine.train()
    ran = {op.name for op, why in heard if why is None}
    assert {"conv2d"} <= ran and len(ran) >= 4, ran
    stock, ours = curve(its, layout, "torch"), curve(mine, layout, "triton")
    assert stock[0][-1] < stock[0][0]
    torch.testing.assert_close(ours[0], stock[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1], stock[1], rtol=1e-3, atol=1e-4)
