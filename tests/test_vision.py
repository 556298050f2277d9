"""Tiny ResNet, MobileNetV3, ConvNeXt and U-Net: trained on kernels, they follow PyTorch's curve.

Convolutions and what follows them run as one op.
"""

import pytest
import torch
import torch.nn as stock

import fastnn
import fastnn.functional as F
from fastnn import _gate, kernels
from fastnn.kernels import _gpus
from fastnn.testing import Case, count
from fastnn.testing.meter import AtenTraffic, all_traffic
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
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("how", ["swap", "convert"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_follows_the_curve_of_pytorch(name, how, layout):
    torch.manual_seed(0)
    its = MODELS[name](torch.nn).to(memory_format=layout)
    mine = MODELS[name](fastnn if how == "swap" else torch.nn).to(memory_format=layout)
    mine.load_state_dict(its.state_dict())
    if how == "convert":
        mine = fastnn.convert(mine)
    stock = curve(its, layout, "torch")
    with fastnn.decisions() as heard:
        ours = curve(mine, layout, "triton")
    ran = {op.name for op, why, _ in heard if why is None}
    assert {"conv2d"} <= ran and len(ran) >= 4, ran
    assert stock[0][-1] < stock[0][0]
    torch.testing.assert_close(ours[0], stock[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1], stock[1], rtol=1e-3, atol=1e-4)


# ---- What follows a convolution ------------------------------------------------------------------

NORMED = [("conv_batch_norm_act", None)]
ACT = [("conv_act", None)]
IN_TRAINING = (
    "not fused: BatchNorm2d is in training mode, and its statistics are those of the batch"
)
APART = [("conv_batch_norm_act", IN_TRAINING), ("conv2d", None)]
CHAINS = {
    "depthwise, norm, act": (lambda n: [n.Conv2d(8, 8, 3, padding=1, groups=8), n.BatchNorm2d(8),
        n.Hardswish()], NORMED, [*APART, ("batch_norm_act", None)]),
    "dense, norm, act": (lambda n: [n.Conv2d(8, 16, 3, 2, bias=False), n.BatchNorm2d(16),
        n.ReLU(inplace=True)], NORMED, [*APART, ("batch_norm_act", None)]),
    "dense, norm": (lambda n: [n.Conv2d(8, 8, 1), n.BatchNorm2d(8, affine=False)], NORMED,
        [*APART, ("batch_norm", None)]),
    "1x1, act": (lambda n: [n.Conv2d(8, 8, 1), n.SiLU()], ACT, ACT),
    "depthwise, act": (lambda n: [n.Conv2d(8, 16, (1, 3), groups=8, padding="same"), n.ReLU()],
        ACT, ACT),
}  # fmt: skip


def chain(name, device, train=False):
    torch.manual_seed(0)
    its = stock.Sequential(*CHAINS[name][0](stock))
    with torch.no_grad():
        for t in (*its.parameters(), *its.buffers()):
            if t.is_floating_point():
                t.uniform_(0.2, 1.2)
    mine = fastnn.Sequential(*CHAINS[name][0](fastnn))
    mine.load_state_dict(its.state_dict())
    return mine.to(device).train(train), its.to(device).train(train)


def image(device, layout=torch.contiguous_format, dtype=torch.float32, *shape):
    x = torch.randn(shape or (2, 8, 6, 5), device=device).to(dtype, memory_format=layout)
    return x.requires_grad_()


def paths(net, x, mode="triton"):
    with fastnn.backend(mode), fastnn.decisions() as heard:
        y = net(x)
    return [(op.name, why) for op, why, _ in heard], y


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", CHAINS)
def test_a_convolution_and_what_follows_run_as_one(name, train, layout, device):
    mine, its = chain(name, device, train)
    for frozen in (None, 0, 1):
        for net in (mine, its):
            for i, member in enumerate(net):
                member.requires_grad_(i != frozen)
        x = image(device, layout)
        heard, y = paths(mine, x)
        assert heard == CHAINS[name][2 if train else 1]
        z = its(x)
        same(y, z)
        assert y.stride() == z.stride()
        dy = torch.randn_like(z)
        wanted = [x, *(p for p in mine.parameters() if p.requires_grad)]
        theirs = [x, *(p for p in its.parameters() if p.requires_grad)]
        for a, b in zip(
            torch.autograd.grad(y, wanted, dy), torch.autograd.grad(z, theirs, dy), strict=True
        ):
            same(a, b)
    for a, b in zip(mine.buffers(), its.buffers(), strict=True):
        same(a, b)


@pytest.mark.parametrize("name", ["depthwise, norm, act", "dense, norm"])
def test_second_derivatives_and_edits(name, device):
    mine, its = chain(name, device)
    found = []
    for net, mode in ((mine, "triton"), (its, "torch")):
        torch.manual_seed(1)
        x = image(device)
        with fastnn.backend(mode):
            (dx,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(dx.square().sum(), [x, *net.parameters()]))
    for a, b in zip(*found, strict=True):
        same(a, b)


def test_statistics_are_read_when_it_runs(device):
    mine, its = chain("dense, norm, act", device)
    x = image(device).detach()
    with torch.no_grad():
        same(paths(mine, x)[1], its(x))  # twice, so that the third call is a replay
        same(paths(mine, x)[1], its(x))
        for net in (mine, its):
            net[1].running_mean.add_(1)
            net[1].running_var.mul_(3)
        same(paths(mine, x)[1], its(x))
        state = {k: v + 0.5 for k, v in its.state_dict().items() if k != "1.num_batches_tracked"}
        for net in (mine, its):
            net.load_state_dict(state, strict=False)
        same(paths(mine, x)[1], its(x))
        assert paths(mine, x)[0] == NORMED


def _nothing(*args):
    return None


class Scaled(fastnn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def own_forward(self, x, weight, bias):
    return F.conv2d(x, weight, bias) * 2


WATCHED = {
    "a hook on Conv2d": lambda net: net[0].register_forward_hook(_nothing),
    "a hook on BatchNorm2d": lambda net: net[1].register_forward_pre_hook(_nothing),
    "Conv2d has a forward of its own": lambda net: setattr(net[0], "forward", net[0].forward),
    "Conv2d._conv_forward was replaced": lambda net: setattr(
        net[0], "_conv_forward", own_forward.__get__(net[0])
    ),
    "Conv2d has padding_mode='circular'": lambda net: setattr(net[0], "padding_mode", "circular"),
    "BatchNorm2d has no running statistics": lambda net: (
        setattr(net[1], "running_mean", None), setattr(net[1], "running_var", None)
    ),
    None: lambda net: net.__setitem__(1, Scaled(8).to(net[0].weight.device).eval()),
}  # fmt: skip


@pytest.mark.parametrize("why", WATCHED, ids=str)
def test_members_that_somebody_watches_run_apart(why, device):
    mine, _ = chain("dense, norm", device)
    WATCHED[why](mine)
    x = image(device)
    heard, y = paths(mine, x)
    assert not {("conv_batch_norm_act", None), ("conv_act", None)} & {*heard}, heard
    assert ("conv2d", None) in heard and heard[-1] == ("batch_norm", None)
    if why is not None:
        assert heard[0] == ("conv_batch_norm_act", f"not fused: {why}")
    same(y, mine[1](mine[0](x)))


def test_a_method_replaced_on_the_class_is_called(device, monkeypatch):
    mine, _ = chain("1x1, act", device)
    for cls in (stock.Conv2d, fastnn.Conv2d):
        with monkeypatch.context() as patch:
            patch.setattr(cls, "_conv_forward", own_forward)
            heard, _ = paths(mine, image(device))
            assert ("conv_act", None) not in heard
            assert heard[0] == ("conv_act", "not fused: Conv2d._conv_forward was replaced")


def test_one_sample_raises_what_the_norm_raises(device):
    mine, _ = chain("dense, norm, act", device)
    with pytest.raises(ValueError, match="expected 4D input"):
        paths(mine, image(device)[0])
    conv = fastnn.Sequential(fastnn.Conv2d(8, 4, 1), fastnn.ReLU()).to(device)
    heard, y = paths(conv, image(device)[0])
    assert heard == ACT and y.shape == (4, 6, 5)


@interpreted
def test_under_autocast_statistics_stay_in_float32():
    mine, its = chain("depthwise, norm, act", "cpu")
    x = image("cpu").detach()
    mine[1].running_mean += 1e-3  # which 16 bits would lose
    its.load_state_dict(mine.state_dict())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        heard, y = paths(mine, x)
        want = its(x)
    assert heard == NORMED and y.dtype == want.dtype == torch.bfloat16
    exact = its.double()(x.double())
    assert (y - exact).square().mean() <= (want - exact).square().mean()


@interpreted
def test_in_auto_dense_convolutions_fuse_where_a_pass_outweighs_cudnn():
    x = torch.empty(1 << 13, 64, 4, 4, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    w, statistics = torch.empty(64, 64, 1, 1).bfloat16(), [torch.empty(64)] * 2

    def answer(op, *args, **options):
        with _gpus.simulated("sm_90"), fastnn.decisions(), _gate.asked() as asked:
            op(*args, **options)
        return asked[0][1]

    dense = (x.numel(), "elements", "dense")
    assert answer(F.conv_act, x, w) == dense
    assert answer(F.conv_batch_norm_act, x, w, None, *statistics, activation="relu") == dense
    big = torch.empty(64, 64, 3, 3).bfloat16()  # 576 products for an output
    assert "576 products" in answer(F.conv_act, x, big).why
    assert answer(F.conv_batch_norm_act, x, big, None, *statistics, activation="relu") == dense
    assert "576 products" in answer(F.conv_batch_norm_act, x, big, None, *statistics).why
    assert "float32" in answer(F.conv_act, x.float(), w.float()).why
    assert "channels are not last" in answer(F.conv_act, x.contiguous(), w.expand(64, 64, 2, 2)).why
    tracked = torch.empty(64, 384, 1, 1).bfloat16().requires_grad_()
    assert "384 products" in answer(F.conv_act, x.repeat(1, 6, 1, 1), tracked).why
    deep = torch.empty(64, 1, 3, 3).bfloat16()
    assert answer(F.conv_act, x, deep, groups=64) == (x.numel(), "elements", "depthwise")
    net = fastnn.Sequential(fastnn.Conv2d(64, 64, 3), fastnn.ReLU())
    rows = fastnn.explain(net, x.float()[:4])
    assert (rows[0].op, rows[0].path) == ("conv_act", "stock") and "cuDNN" in rows[0].reason


@interpreted
@pytest.mark.parametrize("activation", ["silu", "mish"])
@pytest.mark.parametrize("last", [False, True])
def test_slices_of_a_wide_tile_give_the_bits_of_narrow_tiles(activation, last, monkeypatch):
    """What follows the sums of a tile of 128 columns is computed in slices of it."""
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(1, 9, 12, 11).to(memory_format=layout)
    w, bias = torch.randn(100, 9, 1, 2), torch.randn(100)
    statistics = torch.randn(100), torch.rand(100) + 0.5, torch.randn(100), torch.randn(100)

    def results(columns):
        slices = []
        launch = kernels.conv._conv_gemm_kernel

        def launched(*args, **options):
            slices.append(options["SLICES"])
            return launch(*args, **options)

        config = {"BLOCK_M": 64, "BLOCK_N": columns, "BLOCK_K": 16}
        with monkeypatch.context() as patch, fastnn.backend("triton"):
            patch.setattr(kernels.conv, "_config", lambda *a: {**config, "num_warps": 4})
            patch.setattr(kernels.conv, "_conv_gemm_kernel", launched)
            y = F.conv_act(x, w, bias, activation=activation)
            normed = F.conv_batch_norm_act(x, w, bias, *statistics, activation=activation)
        return slices, y, normed

    slices, *wide = results(128)
    assert slices == [8 if activation == "mish" else 4] * 2
    slices, *narrow = results(64)
    assert slices == [1, 1]
    for a, b in zip(wide, narrow, strict=True):
        assert torch.equal(a, b)


# Bytes against PyTorch, if each kernel reads its tensors once. In training, its operators move
# 19 times the elements: convolution 2, norm 3, activation 2; activation 3, norm 5, gradients of
# input and weight 4. Kernels move 13 times: 2, 3; 5, 3; or 10 if a statistic fits in registers.
@interpreted
@pytest.mark.parametrize(
    ("train", "whole", "most", "launches"),
    [(False, True, 0.4, 1), (True, True, 0.6, 5), (True, False, 0.72, 9)],
    ids=["eval", "training, a statistic fits in registers", "training"],
)
def test_bytes_of_a_depthwise_convolution_norm_and_act(train, whole, most, launches, monkeypatch):
    if not whole:
        for limit in ("WHOLE", "WHOLE_BWD"):
            monkeypatch.setattr(kernels.channel_norm, limit, 0)
    monkeypatch.setattr(kernels.channel_norm, "PROGRAMS", 32)
    monkeypatch.setattr(kernels.conv_direct, "multiprocessors", lambda index: 4)

    def made(n):
        members = n.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), n.BatchNorm2d(32), n.SiLU()
        net = n.Sequential(*members).bfloat16().train(train)
        x = torch.empty(2, 32, 16, 16).bfloat16().to(memory_format=torch.channels_last)
        return net, x.normal_().requires_grad_(train)

    with torch.set_grad_enabled(train):
        net, x = made(stock)
        dy = torch.randn_like(x)
        with AtenTraffic() as theirs:
            y = net(x)
            if train:
                y.backward(dy)
        net, x = made(fastnn)
        with fastnn.backend("triton"), all_traffic() as ours:
            y = net(x)
            if train:
                y.backward(dy)
    ratio = ours.cost.bytes / theirs.cost.bytes
    assert ratio <= most, ratio
    assert len(ours.kernels) <= launches, [launch.kernel for launch in ours.kernels]


@interpreted
@pytest.mark.parametrize("width", [3, 5])
def test_a_depthwise_convolution_moves_each_tensor_once_in_a_pass(width, monkeypatch):
    """Forward and backward, with a bias: at most 1.15 times the least bytes."""
    monkeypatch.setattr(kernels.conv_direct, "multiprocessors", lambda index: 1)
    case = Case(
        "Conv2d",
        (lambda dtype, device: image(device, torch.channels_last, dtype, 4, 32, 16, 16),),
        {"in_channels": 32, "out_channels": 32, "kernel_size": width, "groups": 32},
    )
    moved = count(case, torch.bfloat16)
    assert moved.ours.bytes <= 1.15 * moved.least, moved
