"""The rows that are timed: shapes of real models, odd shapes, and shapes around a crossover."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastnn.functional
from fastnn._op import FLOATS
from fastnn.testing import Case, Maker

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class BenchCase(Case):
    """A `Case` that is timed; its first dimension can be changed with `at`.

    model: the model from which the shape comes.
    rows: the size of the first dimension.
    shaped: rows -> makers of the inputs.
    build: namespace -> module, if the row is more than one layer of that namespace.
    flops: of a forward, for a row that matrix products bound; None for one that memory bounds.
    rereads: the backward needs an input, or the output, again.
    gathers: only the rows of its parameters that the indices name are read.
    """

    model: str = ""
    rows: int = 1
    shaped: Callable[[int], tuple[Maker, ...]] = lambda rows: ()
    build: Callable[[Any], nn.Module] | None = None
    flops: Callable[[int], int] | None = None
    rereads: bool = True
    gathers: bool = False

    def at(self, rows: int) -> BenchCase:
        """The same row with another first dimension."""
        return dataclasses.replace(self, rows=rows, inputs=self.shaped(rows))

    @property
    def shape(self) -> str:
        """Shapes of the inputs, such as "8192x768, 8192", and their layout if it is not usual."""
        made = self.make(FP32, "meta")
        return ", ".join(
            "x".join(map(str, t.shape)) + ("" if t.is_contiguous() else " channels last")
            for t in made
            if isinstance(t, Tensor)
        )

    def __str__(self) -> str:
        options = [f"{k}={v}" for k, v in self.options.items()]
        options += [] if self.train else ["eval"]
        return f"{self.name}({', '.join([self.shape, *options])})"

    def key(self, dtype: torch.dtype) -> str:
        """The name under which a result is filed."""
        return f"{self} {str(dtype).removeprefix('torch.')}"

    def side(self, namespace: Any, dtype: torch.dtype, device: str) -> Callable:
        """The layer, or the function with its options, from `torch.nn` or from `fastnn`."""
        if self.build is None and not self.is_layer:
            function = getattr(namespace.functional, self.name, None)
            if function is None:  # only fastnn has it
                function = getattr(fastnn.functional, self.name).op.stock
            return lambda *inputs: function(*inputs, **self.options)
        with torch.device(device):
            options = {k: v(FP32, device) if callable(v) else v for k, v in self.options.items()}
            layer = self.build or (lambda n: getattr(n, self.name)(**options))
            return layer(namespace).to(dtype=dtype).train(self.train)


def normal(*shape: int) -> Maker:
    """As `fastnn.testing.randn`, but made on the device that needs it, which may be "meta". These
    tensors are large."""

    def make(dtype, device):
        return torch.randn(shape, dtype=dtype, device=device, requires_grad=True)

    return make


def indices(*shape: int, high: int, ignored: float = 0.0) -> Maker:
    """Class indices below `high`; a share of about `ignored` of them is -100."""

    def make(dtype, device):
        t = torch.randint(high, shape, device=device)
        if ignored and device != "meta":
            t[torch.rand(shape, device=device) < ignored] = -100
        return t

    return make


def probabilities(*shape: int) -> Maker:
    def make(dtype, device):
        return torch.randn(shape, dtype=dtype, device=device).softmax(1)

    return make


def row(name: str, model: str, rows: int, shaped: Any, dtypes=(BF16,), **fields) -> BenchCase:
    """A row with one input (rows, *shaped), or with the inputs that the function `shaped` makes."""
    if not callable(shaped):
        rest = shaped if isinstance(shaped, tuple) else (shaped,)
        shaped = lambda n: (normal(n, *rest),)  # noqa: E731
    inputs = shaped(rows)
    return BenchCase(
        name, inputs, model=model, rows=rows, shaped=shaped, dtypes=tuple(dtypes), **fields
    )


# ---- Activations ------------------------------------------------------------------------------

WIDE = "MLP of width 4096, 8k tokens"


def _layer_scale(channels: int, side: int) -> Callable[[int], tuple]:
    """A branch, a scale for each channel, which are last, and a residual."""
    return lambda n: (
        normal(n, side, side, channels), normal(channels), normal(n, side, side, channels),
    )  # fmt: skip


def _product(length: int, width: int) -> Callable[[int], tuple]:
    """The result of a product, and its bias."""
    return lambda n: (normal(n, length, width), normal(width))


def _turned_heads(length: int, heads: int, width: int) -> Callable[[int], tuple]:
    """Queries as a product leaves them, and the cosines and sines of their places."""

    def angles(n: int) -> Maker:
        return lambda dtype, device: torch.randn(n, length, 1, width, dtype=dtype, device=device)

    return lambda n: (normal(n, length, heads, width), angles(n), angles(n))


ACTIVATIONS = [
    row("GELU", "BERT-base, 16 x 512", 8192, 3072, FLOATS),
    row("GELU", "ViT-B/16, 64 images", 64 * 197, 3072),
    row("GELU", "GPT-2 XL, 8 x 1024", 8192, 6400, options={"approximate": "tanh"}),
    row("GELU", "GPT-2, eval", 8192, 3072, train=False),
    row("GELU", "one sentence", 16, 3072),
    row("GELU", "odd", 1021, 4099),
    row("SiLU", "Llama 3 8B, 4k tokens", 4096, 14336, (BF16, FP32)),
    row("SiLU", "Llama 3 70B, 1k tokens", 1024, 28672),
    row("ReLU", "ResNet-50, 64 images", 64, (256, 56, 56), (BF16, FP32)),
    row("ReLU", "ResNet-50, 1 image", 1, (256, 56, 56)),
    row("ReLU6", "MobileNetV2, 64 images", 64, (144, 56, 56)),
    row("relu6", "MobileNetV2, 64 images", 64, (144, 56, 56)),
    row("Hardswish", "MobileNetV3, 64 images", 64, (240, 28, 28)),
    row("Hardsigmoid", "MobileNetV3, 64 images", 64, (240, 28, 28)),
    row("LeakyReLU", "DCGAN, 128 images", 128, (128, 32, 32)),
    row("Mish", "YOLOv4, 16 images", 16, (64, 152, 152)),
    row("PReLU", "ESRGAN-like, 16 images", 16, (64, 128, 128), (BF16, FP32),
        options={"num_parameters": 64}),
    row("GLU", "Conformer, 32 x 400", 32 * 400, 1024, (BF16, FP32)),
    row("GLU", "over channels", 32, (1024, 400), options={"dim": 1}),
    row("act_mul", "Llama 3 8B, 4k tokens", 4096, lambda n: (normal(n, 14336), normal(n, 14336))),
    row("act_mul", "T5 v1.1 base, 16 x 512", 8192, lambda n: (normal(n, 2048), normal(n, 2048)),
        options={"activation": "gelu_tanh"}),
    row("act_glu", "Stable Diffusion, 4 images", 16384, 2560, options={"activation": "gelu"}),
    row("act_glu", "Phi-3 mini, 4k tokens", 4096, 16384, options={"first": True}),
    row("scale_add", "ConvNeXt-T, 64 images", 64, _layer_scale(96, 56)),
    row("scale_add", "EfficientNet-B0, 64 images", 64,
        lambda n: (normal(n, 144, 56, 56), normal(n, 144, 1, 1))),
    row("rotary", "Llama 1B, 2 x 2048", 2, _turned_heads(2048, 32, 64)),
    row("split_features", "GPT-2, 8 x 1024", 8, _product(1024, 2304), options={"parts": 3}),
    row("split_features", "ViT-B/16, 64 images", 64, _product(197, 2304),
        options={"parts": 3, "heads": 12}),
    *(row(name, WIDE, 8192, 4096) for name in (
        "ELU", "CELU", "SELU", "Sigmoid", "Tanh", "LogSigmoid", "Hardtanh", "Hardshrink",
        "Softshrink", "Softplus",
    )),
    row("Softsign", WIDE, 8192, 4096, FLOATS),
    row("Tanhshrink", WIDE, 8192, 4096, FLOATS),
    row("Threshold", WIDE, 8192, 4096, options={"threshold": 0.1, "value": 0.0}),
    row("RReLU", WIDE, 8192, 4096, train=False),
]  # fmt: skip

# ---- Normalisation ----------------------------------------------------------------------------


def layer_norm(model: str, rows: int, n: int, dtypes=(BF16,), **fields) -> BenchCase:
    return row("LayerNorm", model, rows, n, dtypes, options={"normalized_shape": n}, **fields)


def rms_norm(model: str, rows: int, n: int, dtypes=(BF16,)) -> BenchCase:
    return row("RMSNorm", model, rows, n, dtypes, options={"normalized_shape": n})


NORMS = [
    layer_norm("BERT-base, 16 x 512", 8192, 768, FLOATS),
    layer_norm("BERT-large, 16 x 512", 8192, 1024),
    layer_norm("GPT-2 XL, 8 x 1024", 8192, 1600, (BF16, FP32)),
    layer_norm("ViT-B/16, 64 images", 64 * 197, 768),
    layer_norm("GPT-3, 4k tokens", 4096, 12288),
    layer_norm("GPT-2, eval", 8192, 768, train=False),
    layer_norm("one sentence", 16, 768),
    layer_norm("odd", 1021, 4099),
    layer_norm("few huge rows", 16, 1 << 20),
    row("LayerNorm", "ConvNeXt-like, last three dims", 64, (64, 56, 56),
        options={"normalized_shape": (64, 56, 56)}),
    rms_norm("Llama 3 8B, 8k tokens", 8192, 4096, FLOATS),
    rms_norm("Llama 3 70B, 4k tokens", 4096, 8192),
    rms_norm("QK norm, 32 heads x 2k tokens", 32 * 2048, 128),
    rms_norm("one sentence", 16, 4096),
]  # fmt: skip


def channels_last(*shape: int) -> Maker:
    """As `normal`, but channels last."""

    def make(dtype, device):
        format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        x = torch.randn(shape, dtype=dtype, device=device)
        return x.contiguous(memory_format=format).requires_grad_()

    return make


def batch_norm(model: str, rows: int, *shape: int, last=False, dtypes=(BF16,), **fields):
    """BatchNorm of (rows, *shape); channels last if `last`."""
    name = f"BatchNorm{max(len(shape) - 1, 1)}d"
    shaped = (lambda n: (channels_last(n, *shape),)) if last else shape
    return row(name, model, rows, shaped, dtypes, options={"num_features": shape[0]}, **fields)


def group_norm(model: str, rows: int, groups: int, *shape: int, last=False, dtypes=(BF16,)):
    """GroupNorm of (rows, *shape); channels last if `last`."""
    shaped = (lambda n: (channels_last(n, *shape),)) if last else shape
    options = {"num_groups": groups, "num_channels": shape[0]}
    return row("GroupNorm", model, rows, shaped, dtypes, options=options)


def then(model: str, rows: int, norm: str, args: tuple, activation: str, *shape: int, last=False):
    """A norm and the activation after it, in a Sequential."""

    def build(namespace):
        return namespace.Sequential(
            getattr(namespace, norm)(*args), getattr(namespace, activation)()
        )  # fmt: skip

    shaped = (lambda n: (channels_last(n, *shape),)) if last else shape
    return row(f"Sequential[{norm}, {activation}]", model, rows, shaped, build=build)


class BlockEnd(nn.Module):
    """The end of a residual block: relu(batch_norm(x) + residual)."""

    def __init__(self, namespace, channels: int):
        super().__init__()
        self.norm = namespace.BatchNorm2d(channels)
        self.ours = getattr(namespace.functional, "batch_norm_add_relu", None)

    def forward(self, x, residual):
        norm = self.norm
        if self.ours is None:
            return torch.relu(norm(x) + residual)
        statistics = norm.running_mean, norm.running_var
        return self.ours(
            x, residual, *statistics, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps
        )


CHANNEL_NORMS = [
    batch_norm("ResNet-50, stem, 64 images", 64, 64, 112, 112, dtypes=(BF16, FP32)),
    batch_norm("ResNet-50, 64 images", 64, 256, 56, 56),
    batch_norm("ResNet-50, channels last", 64, 256, 56, 56, last=True, dtypes=(BF16, FP32)),
    batch_norm("ResNet-50, stage 3", 64, 1024, 14, 14),
    batch_norm("ResNet-50, last stage", 64, 2048, 7, 7),
    batch_norm("ResNet-50, eval", 64, 256, 56, 56, train=False),
    batch_norm("ResNet-50, 1 image", 1, 256, 56, 56),
    batch_norm("TCN, 256 sequences", 256, 512, 128),
    batch_norm("R(2+1)D, 16 clips", 16, 64, 8, 56, 56),
    then("ResNet-50, 64 images", 64, "BatchNorm2d", (256,), "ReLU", 256, 56, 56),
    then("ResNet-50, channels last", 64, "BatchNorm2d", (256,), "ReLU", 256, 56, 56, last=True),
    row("BatchNorm2d, add, relu", "ResNet-50, end of a block, 64 images", 64,
        lambda n: (normal(n, 256, 56, 56), normal(n, 256, 56, 56)),
        build=lambda namespace: BlockEnd(namespace, 256)),
    then("MobileNetV3, 64 images", 64, "BatchNorm2d", (240,), "Hardswish", 240, 28, 28),
    group_norm("Stable Diffusion, 64 x 64", 16, 32, 320, 64, 64, dtypes=(BF16, FP32)),
    group_norm("Stable Diffusion, channels last", 16, 32, 320, 64, 64, last=True),
    group_norm("Stable Diffusion, 16 x 16", 16, 32, 1280, 16, 16),
    group_norm("ConvNeXt-like, one group", 64, 1, 96, 56, 56),
    then("Stable Diffusion, 64 x 64", 16, "GroupNorm", (32, 320), "SiLU", 320, 64, 64),
    then("Stable Diffusion, 32 x 32", 16, "GroupNorm", (32, 640), "SiLU", 640, 32, 32),
    then("DDPM, CIFAR-10, 128 images", 128, "GroupNorm", (32, 128), "SiLU", 128, 32, 32),
    row("InstanceNorm2d", "CycleGAN, 16 images", 16, (256, 64, 64),
        options={"num_features": 256}),
    row("InstanceNorm2d", "style transfer, 16 images", 16, (128, 128, 128), (BF16, FP32),
        options={"num_features": 128, "affine": True}),
    row("InstanceNorm2d", "style transfer, 16 large images", 16, (32, 512, 512),
        options={"num_features": 32, "affine": True}),
    row("LocalResponseNorm", "AlexNet, 128 images", 128, (96, 55, 55), (BF16, FP32),
        options={"size": 5}),
    row("LocalResponseNorm", "GoogLeNet, 128 images", 128, (192, 56, 56), options={"size": 5}),
]  # fmt: skip

# ---- Convolution ------------------------------------------------------------------------------


def convolution(
    model: str, rows: int, K: int, kernel: tuple[int, ...], *shape: int, name="Conv", last=False,
    dtypes=(BF16,), **options,
):  # fmt: skip
    """Conv1d, 2d or 3d of (rows, *shape) with K output channels; channels last if `last`."""
    dims = len(kernel)
    options = {"in_channels": shape[0], "out_channels": K, "kernel_size": kernel, **options}
    stride, groups = options.get("stride", 1), options.get("groups", 1)
    pairs = math.prod(kernel) * K * shape[0] // groups
    positions = math.prod(shape[1:])
    if name == "Conv":
        positions //= stride**dims
    return row(
        f"{name}{dims}d", model, rows, (lambda n: (channels_last(n, *shape),)) if last else shape,
        dtypes, options=options, flops=lambda n: 2 * n * positions * pairs,
    )  # fmt: skip


def depthwise(model: str, rows: int, kernel: tuple[int, ...], *shape: int, **fields):
    return convolution(model, rows, shape[0], kernel, *shape, groups=shape[0], **fields)


def followed(
    model: str, rows: int, K: int, kernel: int, activation: str, *shape: int, norm=True,
    train=False, **options,
):  # fmt: skip
    """Conv2d of channels-last images, a norm and an activation, in a Sequential."""
    groups = options.get("groups", 1)
    products = shape[0] // groups * kernel**2 * K * shape[1] * shape[2]

    def build(namespace):
        conv = namespace.Conv2d(shape[0], K, kernel, bias=not norm, **options)
        norms = (namespace.BatchNorm2d(K),) if norm else ()
        return namespace.Sequential(conv, *norms, getattr(namespace, activation)())

    kind = f"Conv2d {K}, {kernel}x{kernel}{', depthwise' if groups > 1 else ''}"
    name = f"Sequential[{kind}, {'BatchNorm2d, ' if norm else ''}{activation}]"
    return row(
        name, model, rows, lambda n: (channels_last(n, *shape),), build=build, train=train,
        flops=lambda n: 2 * n * products,
    )  # fmt: skip


CONVOLUTIONS = [
    followed("MobileNetV3, 64 images", 64, 240, 5, "Hardswish", 240, 28, 28, groups=240,
        padding=2),
    followed("MobileNetV3, 64 images", 64, 240, 5, "Hardswish", 240, 28, 28, groups=240,
        padding=2, train=True),
    followed("ResNet-50, 64 images", 64, 256, 1, "ReLU", 64, 56, 56),
    followed("SqueezeNet, 64 images", 64, 128, 1, "ReLU", 32, 27, 27, norm=False),
    depthwise("MobileNetV3, 64 images", 64, (5, 5), 240, 28, 28, last=True, padding=2),
    depthwise("MobileNetV2, 64 images", 64, (3, 3), 144, 56, 56, padding=1, dtypes=(BF16, FP32)),
    depthwise("MobileNetV2, channels last", 64, (3, 3), 144, 56, 56, last=True, padding=1,
        dtypes=(BF16, FP32)),
    depthwise("EfficientNet-B0, stride 2", 64, (3, 3), 96, 112, 112, last=True, padding=1,
        stride=2),
    depthwise("ConvNeXt-T, 64 images", 64, (7, 7), 96, 56, 56, last=True, padding=3),
    depthwise("Conformer, 32 x 400", 32, (31,), 512, 400, padding=15),
    depthwise("X3D, 8 clips", 8, (3, 3, 3), 54, 16, 56, 56, last=True, padding=1),
    convolution("ResNet-50, 64 images", 64, 64, (3, 3), 64, 56, 56, last=True, padding=1),
    convolution("ResNet-50, stem", 64, 64, (7, 7), 3, 224, 224, stride=2, padding=3),
    convolution("DCGAN, 128 images", 128, 128, (4, 4), 256, 16, 16, name="ConvTranspose",
        stride=2, padding=1),
    convolution("WaveNet, 8 x 8000", 8, 128, (2,), 128, 8000, dilation=64),
    convolution("WaveNet, upsampling", 8, 80, (16,), 80, 400, name="ConvTranspose", stride=8,
        padding=4),
    convolution("3-d U-Net, 2 volumes", 2, 64, (3, 3, 3), 64, 32, 64, 64, padding=1),
    convolution("3-d U-Net, upsampling", 2, 64, (2, 2, 2), 128, 16, 32, 32, name="ConvTranspose",
        stride=2),
]  # fmt: skip

# ---- Pooling ----------------------------------------------------------------------------------


def pool(name: str, model: str, rows: int, *shape: int, last=False, dtypes=(BF16,), **options):
    """Pooling of (rows, *shape), channels last if `last`; what it keeps is small beside that."""
    shaped = (lambda n: (channels_last(n, *shape),)) if last else shape
    # Windows of fractional pooling depend on samples; PyTorch cannot count the 3-D backward.
    drawn = name == "FractionalMaxPool3d"
    return row(name, model, rows, shaped, dtypes, options=options, rereads=False, gathers=drawn)


def unpool(name: str, model: str, rows: int, *shape: int):
    """Unpooling of (rows, *shape) by windows of 2 along each axis, not by their true indices."""
    high = math.prod(shape[1:]) * 2 ** (len(shape) - 1)
    return row(
        name, model, rows, lambda n: (normal(n, *shape), indices(n, *shape, high=high)),
        options={"kernel_size": 2}, rereads=False, gathers=True,
    )  # fmt: skip


STEM = {"kernel_size": 3, "stride": 2, "padding": 1}
POOLING = [
    pool("MaxPool2d", "ResNet-50, stem, 64 images", 64, 64, 112, 112, dtypes=(BF16, FP32), **STEM),
    pool("MaxPool2d", "ResNet-50, stem, channels last", 64, 64, 112, 112, last=True, **STEM),
    pool("MaxPool2d", "VGG-16, 64 images", 64, 64, 224, 224, kernel_size=2),
    pool("MaxPool2d", "U-Net, 8 images, channels last", 8, 128, 256, 256, last=True,
        kernel_size=2),
    pool("MaxPool1d", "speech, 64 clips", 64, 512, 1600, kernel_size=2),
    pool("MaxPool3d", "3-d U-Net, 2 volumes", 2, 32, 64, 128, 128, kernel_size=2),
    pool("AvgPool2d", "DenseNet transition, 64 images", 64, 256, 56, 56, kernel_size=2),
    pool("AvgPool2d", "Inception-v3 branch, channels last", 64, 192, 35, 35, last=True,
        kernel_size=3, stride=1, padding=1),
    pool("AvgPool1d", "moving average, 64 series", 64, 64, 4096, kernel_size=25, stride=1,
        padding=12),
    pool("AvgPool3d", "I3D, 4 clips", 4, 192, 16, 56, 56, kernel_size=2),
    pool("AdaptiveAvgPool2d", "ResNet-50, head, channels last", 256, 2048, 7, 7, last=True,
        output_size=1),
    pool("AdaptiveAvgPool2d", "DeepLab, pyramid of 6, 8 images", 8, 2048, 65, 65, output_size=6),
    pool("AdaptiveAvgPool1d", "speech, 64 clips", 64, 512, 1600, output_size=400),
    pool("AdaptiveAvgPool3d", "I3D, head, 16 clips", 16, 1024, 4, 14, 14, output_size=(4, 7, 7)),
    pool("AdaptiveMaxPool2d", "detector, 64 images", 64, 256, 56, 56, output_size=28),
    pool("AdaptiveMaxPool1d", "speech, 64 clips", 64, 512, 1600, output_size=400),
    pool("AdaptiveMaxPool3d", "video, 8 clips", 8, 128, 8, 56, 56, output_size=(4, 28, 28)),
    *(
        row(name, "power mean, like a VGG stage", 16, shape,
            options={"norm_type": 2, "kernel_size": 2})
        for name, shape in (
            ("LPPool1d", (256, 6400)), ("LPPool2d", (128, 112, 112)), ("LPPool3d", (64, 16, 56, 56))
        )
    ),
    pool("FractionalMaxPool2d", "Graham's net, 64 images", 64, 160, 94, 94, kernel_size=2,
        output_ratio=(0.7, 0.7)),
    pool("FractionalMaxPool3d", "volumes, 4", 4, 32, 64, 64, 64, kernel_size=2,
        output_ratio=(0.7, 0.7, 0.7)),
    unpool("max_unpool1d", "speech decoder, 16 clips", 16, 256, 800),
    unpool("max_unpool2d", "SegNet decoder, 8 images", 8, 64, 112, 112),
    unpool("max_unpool3d", "3-d decoder, 2 volumes", 2, 32, 32, 32, 32),
]  # fmt: skip

# ---- Softmax ----------------------------------------------------------------------------------

SOFTMAX = [
    row("Softmax", "BERT-base attention, 8 x 512", 8 * 12, (512, 512), (BF16, FP32),
        options={"dim": -1}),
    row("Softmax", "Llama attention, 2k x 2k", 32, (2048, 2048), options={"dim": -1}),
    row("Softmax", "sampling, vocabulary of Llama 2", 256, 32000, options={"dim": -1}),
    row("Softmax", "sampling, vocabulary of Llama 3", 256, 128256, (BF16, FP32),
        options={"dim": -1}, train=False),
    row("Softmax", "odd", 1021, 4099, options={"dim": -1}),
    row("gumbel_softmax", "wav2vec 2.0, two codebooks", 48000, 320, (BF16, FP32)),
    row("Softmax", "over the first of two", 4096, 4096, options={"dim": 0}),
    row("Softmax", "rows of 262144", 64, 262144, options={"dim": -1}),
    row("Softmax", "router of 64 experts", 8192, 64, options={"dim": -1}),
    row("LogSoftmax", "vocabulary of GPT-2", 2048, 50257, (BF16, FP32), options={"dim": -1}),
    row("LogSoftmax", "ImageNet, 256 images", 256, 1000, options={"dim": -1}),
    row("Softmin", "distances", 2048, 4096, options={"dim": -1}),
    row("Softmax2d", "segmentation, 21 classes", 16, (21, 128, 128)),
]  # fmt: skip

# ---- Dropout ----------------------------------------------------------------------------------


def dropout(name: str, model: str, rows: int, shaped, dtypes=(BF16,), p=0.1) -> BenchCase:
    return row(name, model, rows, shaped, dtypes, options={"p": p}, rereads=False)


DROPOUT = [
    dropout("Dropout", "BERT-base, 16 x 512", 8192, 768, (BF16, FP32)),
    dropout("Dropout", "BERT-base attention, 8 x 512", 8 * 12, (512, 512), FLOATS),
    dropout("Dropout", "AlexNet head", 256, 4096, p=0.5),
    dropout("Dropout", "odd", 1021, 4099),
    dropout("Dropout1d", "speech, 32 x 512 channels", 32, (512, 400), p=0.2),
    dropout("Dropout2d", "ENet, 16 images", 16, (128, 128, 128), p=0.1),
    dropout("Dropout3d", "video, 4 clips", 4, (64, 16, 56, 56), p=0.2),
    dropout("AlphaDropout", "SELU network", 8192, 1024),
    dropout("FeatureAlphaDropout", "SELU network, images", 32, (128, 56, 56)),
]

# ---- Embedding --------------------------------------------------------------------------------


def embedding(model: str, batch: int, length: int, v: int, d: int, dtypes=(BF16,)) -> BenchCase:
    return row(
        "Embedding", model, batch, lambda n: (indices(n, length, high=v),), dtypes,
        options={"num_embeddings": v, "embedding_dim": d}, rereads=False, gathers=True,
    )  # fmt: skip


EMBEDDING = [
    embedding("BERT-base, 16 x 512", 16, 512, 30522, 768, (BF16, FP32)),
    embedding("GPT-2 XL, 8 x 1024", 8, 1024, 50257, 1600),
    embedding("Llama 2 7B, 4 x 2048", 4, 2048, 32000, 4096),
    embedding("Llama 3 8B, 4 x 2048", 4, 2048, 128256, 4096),
    embedding("one sentence", 1, 16, 50257, 768),
    embedding("few rows, many indices", 64, 4096, 512, 256),
    row(
        "EmbeddingBag",
        "DLRM, 8192 x 64 indices",
        8192,
        lambda n: (indices(n, 64, high=100000),),
        options={"num_embeddings": 100000, "embedding_dim": 128, "mode": "sum"},
        rereads=False,
        gathers=True,
    ),
    row(
        "EmbeddingBag",
        "fastText, 4096 texts of 256",
        4096,
        lambda n: (indices(n, 256, high=50000),),
        (FP32,),
        options={"num_embeddings": 50000, "embedding_dim": 64},
        rereads=False,
        gathers=True,
    ),
    row(
        "EmbeddingBag",
        "maxima of 4096 x 32",
        4096,
        lambda n: (indices(n, 32, high=50000),),
        (FP32,),
        options={"num_embeddings": 50000, "embedding_dim": 128, "mode": "max"},
        rereads=False,
        gathers=True,
    ),
]

BILINEAR = [
    row(
        "Bilinear",
        "biaffine labels, 4096 x 128",
        4096,
        lambda n: (normal(n, 128), normal(n, 128)),
        (BF16, FP32),
        options={"in1_features": 128, "in2_features": 128, "out_features": 50},
        flops=lambda n: 2 * n * 128 * 128 * 50,
    ),
]
# ---- Recurrent cells --------------------------------------------------------------------------


def cell(name: str, model: str, batch: int, width: int, dtypes=(BF16, FP32), **options):
    def states(n):
        one = normal(n, width)
        both = lambda dtype, device: (one(dtype, device), one(dtype, device))  # noqa: E731
        return normal(n, width), both if name == "LSTMCell" else one

    options = {"input_size": width, "hidden_size": width, **options}
    products = {"RNNCell": 1, "GRUCell": 3, "LSTMCell": 4}[name] * 2
    return row(
        name, model, batch, states, dtypes, options=options,
        flops=lambda n: 2 * products * n * width * width,
    )  # fmt: skip


def sequence(
    name: str, model: str, steps: int, batch: int, width: int, dtypes=(BF16, FP32), **options
):
    gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[name]
    state = options.get("proj_size") or width
    numbers = gates * (width + state) * width + (state * width if state != width else 0)
    return row(
        name, model, steps, (batch, width), dtypes, flops=lambda n: 2 * numbers * n * batch,
        options={"input_size": width, "hidden_size": width, **options},
    )  # fmt: skip


class Packed(nn.Module):
    """A GRU over a padded batch whose texts have lengths from 2 to all steps."""

    def __init__(self, namespace):
        super().__init__()
        self.layer = namespace.GRU(256, 256)

    def forward(self, x):
        steps, texts = x.shape[:2]
        lengths = (torch.arange(texts, 0, -1) * steps // texts).clamp_min(1)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths)
        return self.layer(packed)[0].data


RECURRENT = [
    sequence("LSTM", "characters, 64 x 128 steps", 128, 64, 256),
    sequence("GRU", "characters, 64 x 128 steps", 128, 64, 256),
    sequence("RNN", "characters, 64 x 128 steps", 128, 64, 256),
    sequence("RNN", "with relu", 128, 64, 256, nonlinearity="relu"),
    sequence("LSTM", "with projections", 128, 64, 256, proj_size=64),
    row(
        "GRU of a packed batch",
        "characters, 64 texts of 2 to 128",
        128,
        (64, 256),
        (BF16, FP32),
        build=Packed,
        flops=lambda n: 2 * 6 * (n + 2) // 2 * 64 * 256**2,
    ),
    cell("RNNCell", "4096 sequences", 4096, 1024),
    cell("RNNCell", "with relu", 4096, 1024, nonlinearity="relu"),
    cell("LSTMCell", "4096 sequences", 4096, 1024),
    cell("GRUCell", "4096 sequences", 4096, 1024),
]

# ---- Losses -----------------------------------------------------------------------------------


def cross_entropy(model, rows, classes, dtypes=(BF16,), ignored=0.0, **options) -> BenchCase:
    def shaped(n):
        return normal(n, classes), indices(n, high=classes, ignored=ignored)

    return row("CrossEntropyLoss", model, rows, shaped, dtypes, options=options)


def image(*shape: int):
    """Logits (n, C, ...) and class indices (n, ...)."""
    return lambda n: (normal(n, *shape), indices(n, *shape[1:], high=shape[0]))


LOSSES = [
    cross_entropy("Llama 2, 8k tokens", 8192, 32000, FLOATS),
    cross_entropy("GPT-2, 8k tokens", 8192, 50257, (BF16, FP32)),
    cross_entropy("Llama 3, 4k tokens", 4096, 128256),
    cross_entropy("BERT, masked, 15 % kept", 8192, 30522, ignored=0.85),
    cross_entropy("label smoothing", 8192, 32000, label_smoothing=0.1),
    cross_entropy("ImageNet, 256 images", 256, 1000, (BF16, FP32)),
    cross_entropy("two classes", 32, 2),
    row("CrossEntropyLoss", "soft targets, 4096 images", 4096, lambda n: (
        normal(n, 1000), probabilities(n, 1000))),
    row("CrossEntropyLoss", "segmentation, 21 classes", 16, image(21, 128, 128)),
    row("NLLLoss", "vocabulary of Llama 2", 8192, lambda n: (
        normal(n, 32000), indices(n, high=32000)), rereads=False),
    row("NLLLoss", "segmentation, 21 classes", 16, image(21, 128, 128), rereads=False),
]  # fmt: skip


def among(low: float, high: float) -> Callable[..., Maker]:
    """Makers of values between `low` and `high`, without a gradient: targets and weights."""

    def maker(*shape: int) -> Maker:
        return lambda dtype, device: (
            torch.rand(shape, dtype=dtype, device=device).mul_(high - low).add_(low)
        )

    return maker


unit, positive = among(0.01, 0.99), among(0.5, 2.0)


class Weights:
    """A maker of weights with a name, for a row that has the maker among its options."""

    def __init__(self, *shape: int):
        self.shape = shape

    def __call__(self, dtype, device):
        return positive(*self.shape)(dtype, device)

    def __repr__(self):
        return "x".join(map(str, self.shape))


def plus_minus(*shape: int) -> Maker:
    return lambda dtype, device: torch.rand(shape, dtype=dtype, device=device).sub_(0.5).sign_()


def activated(*shape: int) -> Maker:
    """Values between 0 and 1 with a gradient: inputs of BCELoss."""
    return lambda dtype, device: unit(*shape)(dtype, device).requires_grad_()


def pair(*shape: int, target: Callable[..., Maker] = positive, made=normal):
    """An input (n, ...) and a target of its shape."""
    return lambda n: (made(n, *shape), target(n, *shape))


def embeddings(width: int, count: int, *target: Callable[..., Maker]):
    """`count` tensors (n, width) with a gradient, and targets (n)."""
    return lambda n: (*(normal(n, width) for _ in range(count)), *(t(n) for t in target))


class Recognition(nn.Module):
    """CTC of log-probabilities (N, T, C) whose sequences all have the same lengths."""

    def __init__(self, namespace):
        super().__init__()
        self.loss = namespace.CTCLoss(blank=31)

    def forward(self, x, target):
        steps, labels = ((t.shape[1],) * t.shape[0] for t in (x, target))
        return self.loss(x.transpose(0, 1), target, steps, labels)


LOSSES += [
    row("MSELoss", "DDPM, CIFAR-10, 128 images", 128, pair(3, 32, 32)),
    row("MSELoss", "latent diffusion, 256 images", 256, pair(4, 64, 64), (BF16, FP32)),
    row("MSELoss", "regression, 32k x 4096", 32768, pair(4096), FLOATS),
    row("MSELoss", "per element", 8192, pair(4096), options={"reduction": "none"}),
    row("L1Loss", "CycleGAN, 64 images", 64, pair(3, 256, 256), (BF16, FP32)),
    row("SmoothL1Loss", "SSD300, boxes of 128 images", 128, pair(8732, 4)),
    row("HuberLoss", "32k x 4096", 32768, pair(4096)),
    row("BCELoss", "autoencoder, 32k x 784", 32768, pair(784, target=unit, made=activated)),
    row("BCEWithLogitsLoss", "U-Net masks, 16 images", 16, pair(1, 512, 512, target=unit)),
    row("BCEWithLogitsLoss", "multi-label, 32k x 1000", 32768, pair(1000, target=unit),
        (BF16, FP32)),
    row("BCEWithLogitsLoss", "with pos_weight", 32768, pair(1000, target=unit),
        options={"pos_weight": Weights(1000)}),
    row("KLDivLoss", "distillation, 4k tokens of Llama 2", 4096, lambda n: (
        normal(n, 32000), probabilities(n, 32000)), (BF16, FP32),
        options={"reduction": "batchmean"}),
    row("KLDivLoss", "targets in logarithms", 4096, pair(32000),
        options={"reduction": "batchmean", "log_target": True}),
    row("PoissonNLLLoss", "counts, 8k x 4096", 8192, pair(4096)),
    row("GaussianNLLLoss", "heteroscedastic, 8k x 4096", 8192, lambda n: (
        normal(n, 4096), positive(n, 4096), positive(n, 4096))),
    row("HingeEmbeddingLoss", "32k x 4096", 32768, pair(4096, target=plus_minus)),
    row("SoftMarginLoss", "32k x 4096", 32768, pair(4096, target=plus_minus)),
    row("MarginRankingLoss", "4M pairs", 1 << 22, lambda n: (
        normal(n), normal(n), plus_minus(n))),
    row("CosineSimilarity", "sentences, 64k x 768", 65536, embeddings(768, 2), FLOATS),
    row("CosineSimilarity", "feature maps", 16, lambda n: (
        normal(n, 256, 64, 64), normal(n, 256, 64, 64))),
    row("normalize", "CLIP, 32k x 512", 32768, 512, FLOATS),
    row("normalize", "feature maps", 16, (256, 64, 64)),
    row("PairwiseDistance", "64k x 512", 65536, embeddings(512, 2), (BF16, FP32)),
    row("TripletMarginWithDistanceLoss", "faces, 32k x 512", 32768, embeddings(512, 3), (FP32,)),
    row("TripletMarginLoss", "faces, 32k x 512", 32768, embeddings(512, 3), (BF16, FP32)),
    row("TripletMarginLoss", "with the swap", 32768, embeddings(512, 3),
        options={"swap": True}),
    row("CosineEmbeddingLoss", "64k x 512", 65536, embeddings(512, 2, plus_minus)),
    row("MultiMarginLoss", "ImageNet, 32k images", 32768, lambda n: (
        normal(n, 1000), indices(n, high=1000)), gathers=True),
    row("MultiLabelMarginLoss", "COCO, 64k images", 65536, lambda n: (
        normal(n, 80), indices(n, 80, high=80, ignored=0.5)), gathers=True),
    row("CTC of a batch first", "characters, 32 x 10 s", 32, lambda n: (
        normal(n, 500, 32), indices(n, 120, high=31)), (FP32,), build=Recognition, gathers=True),
    row("MultiLabelSoftMarginLoss", "COCO, 64k images", 65536, pair(80, target=unit)),
    row("MultiLabelSoftMarginLoss", "COCO, per image", 65536, pair(80, target=unit),
        options={"reduction": "none"}),
]  # fmt: skip

# ---- Linear, and what follows it --------------------------------------------------------------


def linear(model: str, rows: int, k: int, n: int, dtypes=(BF16,)) -> BenchCase:
    return row(
        "Linear", model, rows, k, dtypes, options={"in_features": k, "out_features": n},
        flops=lambda m: 2 * m * n * k,
    )  # fmt: skip


def sequential(model: str, rows: int, k: int, n: int, activation: str, p: float = 0.0, **fields):
    """Linear, an activation, and dropout if p is not 0. The name of the row lists them."""

    def build(namespace):
        tail = [namespace.Dropout(p)] if p else []
        return namespace.Sequential(namespace.Linear(k, n), getattr(namespace, activation)(), *tail)

    name = f"Sequential[Linear {n}, {activation}{', Dropout' if p else ''}]"
    return row(name, model, rows, k, build=build, flops=lambda m: 2 * m * n * k, **fields)


def vocabulary(model: str, rows: int, k: int, classes: int) -> BenchCase:
    """A vocabulary head and its loss in one function."""
    return row(
        "LinearCrossEntropyLoss", model, rows,
        lambda n: (normal(n, k), indices(n, high=classes)),
        options={"in_features": k, "num_classes": classes}, flops=lambda m: 2 * m * k * classes,
    )  # fmt: skip


def residual(name: str, model: str, rows: int, width: int, **options) -> BenchCase:
    """The end of a branch: dropout, the residual, and a norm without parameters if it has one."""
    if "norm" in name:
        options["normalized_shape"] = (width,)
    return row(
        name, model, rows, lambda n: (normal(n, width), normal(n, width)),
        options={"p": 0.1, "training": True, **options},
    )  # fmt: skip


RESIDUALS = [
    residual("dropout_add", "BERT-base, 16 x 512", 8192, 768),
    residual("dropout_add_layer_norm", "BERT-base, 16 x 512", 8192, 768),
    residual("dropout_add_layer_norm", "GPT-2 XL, before the norm", 8192, 1600, prenorm=True),
    residual("dropout_add_rms_norm", "4k tokens of width 4096", 4096, 4096, prenorm=True),
]

LINEAR = [
    vocabulary("Llama 2 7B, 8k tokens", 8192, 4096, 32000),
    vocabulary("GPT-2, 32k tokens", 32768, 768, 50257),
    linear("BERT-base MLP, 16 x 512", 8192, 768, 3072, (BF16, FP32)),
    linear("GPT-2 XL, 8 x 1024", 8192, 1600, 6400),
    linear("Llama 3 8B, 4k tokens", 4096, 4096, 14336),
    linear("small K", 16384, 128, 512),
    linear("one sentence", 16, 768, 3072),
    linear("odd", 1021, 515, 1023),
    sequential("BERT-base MLP, 16 x 512", 8192, 768, 3072, "GELU", dtypes=(BF16, FP32)),
    sequential("BERT-base MLP, eval", 8192, 768, 3072, "GELU", train=False),
    sequential("OPT 1.3B MLP, 4 x 2048", 8192, 2048, 8192, "ReLU"),
    sequential("transformer MLP with dropout", 8192, 1024, 4096, "ReLU", p=0.1),
    sequential("small K", 16384, 128, 512, "SiLU"),
]

# ---- Attention --------------------------------------------------------------------------------


def padding(*shape: int) -> Maker:
    """A bool mask that keeps the first nine tenths of the keys."""

    def make(dtype, device):
        kept = torch.arange(shape[-1], device=device) < shape[-1] * 9 // 10
        return kept.expand(shape).contiguous()

    return make


def attention(
    model: str, rows: int, heads: int, length: int, width: int, dtypes=(BF16,), heads_k=None,
    mask: Callable[[int], Maker] | None = None, **options,
):  # fmt: skip
    """`scaled_dot_product_attention` of (rows, heads, length, width)."""

    def shaped(n):
        sizes = heads, heads_k or heads, heads_k or heads
        tensors = tuple(normal(n, h, length, width) for h in sizes)
        return (*tensors, mask(n)) if mask else tensors

    def flops(n):
        return 4 * n * heads * length * length * width // (2 if options.get("is_causal") else 1)

    return row(
        "scaled_dot_product_attention", model, rows, shaped, dtypes, options=options, flops=flops
    )


ATTENTION = [
    attention("BERT-base, 16 x 512", 16, 12, 512, 64, (BF16, FP16)),
    attention("BERT-base, padded", 16, 12, 512, 64, mask=lambda n: padding(n, 1, 1, 512)),
    attention("BERT-large, padded, dropout", 16, 16, 512, 64, dropout_p=0.1,
        mask=lambda n: padding(n, 1, 1, 512)),
    attention("Graphormer, a bias with its gradient", 64, 32, 128, 24,
        mask=lambda n: normal(n, 32, 128, 128)),
    attention("GPT-2, 8 x 1024", 8, 12, 1024, 64, is_causal=True),
    attention("GPT-2 XL, dropout", 8, 25, 1024, 64, is_causal=True, dropout_p=0.1),
    attention("Llama 3 8B, 4k tokens", 1, 32, 4096, 128, heads_k=8, is_causal=True,
        enable_gqa=True),
    attention("ViT-B/16, 64 images", 64, 12, 197, 64),
    attention("ViT-L/16, 64 images", 64, 16, 197, 64),
    row("scaled_dot_product_attention", "three dims, 192 x 512", 192, lambda n: tuple(
        normal(n, 512, 64) for _ in range(3)), flops=lambda n: 4 * n * 512 * 512 * 64),
]  # fmt: skip

# ---- Transformers -----------------------------------------------------------------------------


class _Calling(nn.Module):
    """A layer and the arguments of its call. Returns the first result if there are several."""

    def __init__(self, layer: nn.Module, call: Callable):
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, *inputs: Tensor) -> Tensor:
        out = self.call(self.layer, *inputs)
        return out[0] if isinstance(out, tuple) else out


def _causally(layer, x):
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, x.dtype)
    return layer(x, mask, is_causal=True)


def encoder(
    model: str, rows: int, length: int, width: int, heads: int, layers: int = 1, norm_first=False,
    causal=False, rms=False, **fields,
):  # fmt: skip
    """One encoder layer or a stack of them on (rows, length, width), with gelu and dropout 0.1."""

    def build(namespace):
        layer = namespace.TransformerEncoderLayer(
            width, heads, 4 * width, 0.1, "gelu", batch_first=True, norm_first=norm_first
        )
        if rms:
            layer.norm1, layer.norm2 = (namespace.RMSNorm(width, eps=1e-5) for _ in range(2))
        if layers > 1:
            layer = namespace.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        return _Calling(layer, _causally if causal else lambda layer, x: layer(x))

    def flops(n):
        return layers * n * length * (24 * width * width + 4 * length * width)

    name = f"TransformerEncoder[{layers}]" if layers > 1 else "TransformerEncoderLayer"
    name += "[norm_first]" if norm_first else "[RMSNorm]" if rms else ""
    return row(name, model, rows, (length, width), build=build, flops=flops, **fields)


def weighted(model: str, rows: int, queries: int, keys: int, width: int, heads: int, **options):
    """`MultiheadAttention` with returned weights, as is its default. Only its output is used."""

    def build(namespace):
        layer = namespace.MultiheadAttention(width, heads, batch_first=True, **options)
        if queries == keys:
            return _Calling(layer, lambda layer, x: layer(x, x, x))
        return _Calling(layer, lambda layer, x, y: layer(x, y, y))

    def shaped(n):
        return tuple(normal(n, m, width) for m in dict.fromkeys((queries, keys)))

    def flops(n):
        return n * (4 * (queries + keys) * width * width + 6 * queries * keys * width)

    return row("MultiheadAttention[weights]", model, rows, shaped, build=build, flops=flops)


def decoder(model: str, rows: int, queries: int, keys: int, width: int, heads: int, inner: int):
    def build(namespace):
        return namespace.TransformerDecoderLayer(width, heads, inner, batch_first=True)

    def flops(n):
        square = n * queries * width * (14 * width + 4 * inner) + 4 * n * keys * width * width
        return square + 4 * n * queries * (queries + keys) * width

    def shaped(n):
        return normal(n, queries, width), normal(n, keys, width)

    return row("TransformerDecoderLayer", model, rows, shaped, build=build, flops=flops)


TRANSFORMERS = [
    encoder("BERT-base, 16 x 512", 16, 512, 768, 12),
    encoder("BERT-large, 16 x 512", 16, 512, 1024, 16),
    encoder("BERT-base, whole, 16 x 512", 16, 512, 768, 12, layers=12),
    encoder("GPT-2 small, 8 x 1024", 8, 1024, 768, 12, norm_first=True, causal=True),
    encoder("GPT-2 XL, 4 x 1024", 4, 1024, 1600, 25, norm_first=True, causal=True),
    encoder("ViT-B/16, 64 images", 64, 197, 768, 12, norm_first=True),
    encoder("ViT-L/16, 32 images", 32, 197, 1024, 16, norm_first=True),
    encoder("BERT-base with RMSNorm", 16, 512, 768, 12, rms=True),
    weighted("BERT-base, 16 x 512", 16, 512, 512, 768, 12, dropout=0.1),
    weighted("DETR, 100 queries, 16 images", 16, 100, 1050, 256, 8, dropout=0.1),
    decoder("DETR, 100 queries, 16 images", 16, 100, 1050, 256, 8, 2048),
]

# ---- Index maps and interpolation ---------------------------------------------------------------


def mapped(name: str, model: str, rows: int, *shape: int, last=False, dtypes=(BF16,), **options):
    """An index map or interpolation of (rows, *shape); channels last if `last`."""
    shaped = (lambda n: (channels_last(n, *shape),)) if last else shape
    return row(name, model, rows, shaped, dtypes, options=options, rereads=False)


MAPS = [
    mapped("ZeroPad2d", "MobileNetV2 of TensorFlow, 64 images", 64, 96, 112, 112,
           padding=(0, 1, 0, 1)),
    mapped("ConstantPad1d", "WaveNet-like, causal, 16 x 1 s", 16, 512, 16000,
           padding=(2, 0), value=0.0),
    mapped("ReflectionPad2d", "CycleGAN, 16 images", 16, 64, 256, 256,
           padding=3, dtypes=(BF16, FP32)),
    mapped("ReflectionPad2d", "CycleGAN, channels last", 16, 64, 256, 256, padding=3, last=True),
    mapped("ReplicationPad3d", "3-d U-Net, 2 volumes", 2, 32, 64, 64, 64, padding=1),
    mapped("CircularPad2d", "panoramas, 16 images", 16, 64, 128, 512, padding=(1, 1, 0, 0)),
    mapped("PixelShuffle", "ESPCN-like, x2, 16 images", 16, 256, 128, 128, upscale_factor=2),
    mapped("PixelShuffle", "channels last", 16, 256, 128, 128, upscale_factor=2, last=True),
    mapped("PixelUnshuffle", "Real-ESRGAN, x2, 16 images", 16, 64, 256, 256, downscale_factor=2),
    mapped("ChannelShuffle", "ShuffleNet, 64 images", 64, 240, 56, 56, groups=3),
    mapped("Unfold", "T2T-ViT, 64 images", 64, 3, 224, 224, kernel_size=7, stride=4, padding=2),
    mapped("Fold", "patches of 3 x 3, 16 images", 16, 576, 4096,
           output_size=64, kernel_size=3, padding=1),
    mapped("Upsample", "U-Net of Stable Diffusion, 8 latents", 8, 640, 64, 64, scale_factor=2.0),
    mapped("Upsample", "U-Net, 8 images", 8, 128, 128, 128,
           scale_factor=2.0, mode="bilinear", dtypes=(BF16, FP32)),
    mapped("Upsample", "U-Net, channels last", 8, 128, 128, 128,
           scale_factor=2.0, mode="bilinear", last=True),
    mapped("interpolate", "DeepLab, 4 images", 4, 21, 65, 65, size=(513, 513), mode="bilinear"),
    mapped("Upsample", "super-resolution, 16 images", 16, 32, 128, 128,
           scale_factor=2.0, mode="bicubic"),
    mapped("interpolate", "CLIP, 16 pictures", 16, 3, 1024, 768,
           size=(224, 224), mode="bicubic", antialias=True),
    mapped("Upsample", "3-d U-Net, 2 volumes", 2, 64, 32, 32, 32,
           scale_factor=2.0, mode="trilinear"),
]  # fmt: skip

CASES = [
    *ACTIVATIONS, *NORMS, *CHANNEL_NORMS, *CONVOLUTIONS, *POOLING, *SOFTMAX, *DROPOUT, *EMBEDDING,
    *BILINEAR,
    *RECURRENT, *LOSSES, *RESIDUALS, *LINEAR, *ATTENTION, *TRANSFORMERS, *MAPS,
]  # fmt: skip

# Rows with independent results. On a GPU the ends of a row beyond 2**31 elements are compared.
HUGE = [
    row("GELU", "huge", (2**31 >> 12) + 3, 4096),
    row("LayerNorm", "huge", (2**31 >> 12) + 3, 4096, options={"normalized_shape": 4096}),
    row("RMSNorm", "huge", (2**31 >> 12) + 3, 4096, options={"normalized_shape": 4096}),
    row("Softmax", "huge", (2**31 >> 12) + 3, 4096, options={"dim": -1}),
    row("LogSoftmax", "huge", 2**31 // 32000 + 3, 32000, options={"dim": -1}),
    row("GLU", "huge", (2**31 >> 12) + 3, 4096),
    row("CrossEntropyLoss", "huge", 2**31 // 32000 + 3, lambda n: (
        normal(n, 32000), indices(n, high=32000)), options={"reduction": "none"}),
    row("Embedding", "huge", (2**31 >> 12) + 3, lambda n: (indices(n, high=512),),
        options={"num_embeddings": 512, "embedding_dim": 4096}),
]  # fmt: skip


def matching(
    only: list[str] | None = None, dtypes: list[torch.dtype] | None = None, rows=None
) -> list[tuple[BenchCase, torch.dtype]]:
    """(row, dtype) of the rows whose name or model contains one of `only`, whatever its case."""
    return [
        (case, dtype)
        for case in (CASES if rows is None else rows)
        if not only or any(o.lower() in f"{case.name} {case.model}".lower() for o in only)
        for dtype in case.dtypes
        if not dtypes or dtype in dtypes
    ]
