"""Convolutions beyond the parity rows: the path, precision, layers, errors, second order."""

import copy
import warnings

import pytest
import torch
import torch.nn as stock

import fastnn
import fastnn.functional as F
from fastnn import _gate, kernels
from fastnn._strides import is_channels_last
from fastnn.kernels import _gpus
from fastnn.ops import linear
from fastnn.ops.conv import _precision, tf32_setting
from fastnn.testing import Case, assert_parity, check, randn
from tests.errors import assert_same_error
from tests.marks import interpreted

# What PyTorch says of the asymmetric padding that it adds; kernels add none.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


def tensors(*shapes, device="cpu"):
    torch.manual_seed(0)
    return [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("groups", [4, 1], ids=["direct", "products"])
@pytest.mark.parametrize("dilation", [1, 3])
def test_even_kernels_pad_more_at_the_end(groups, dilation, device):
    options = {"padding": "same", "groups": groups, "dilation": dilation}
    inputs = randn(1, 4, 7), randn(8, 4 // groups, 4), randn(8)
    assert_parity(Case("conv1d", inputs, options), torch.float32, device)


def test_same_padding_gives_no_warning_on_kernels(device):
    x, w = tensors((1, 2, 5), (2, 1, 2), device=device)
    with warnings.catch_warnings(), fastnn.backend("triton"):
        warnings.simplefilter("error")
        F.conv1d(x, w, padding="same", groups=2)


BAD = {
    "stride of 0": lambda F, x, w: F.conv1d(x, w, stride=0),
    "negative padding": lambda F, x, w: F.conv1d(x, w, padding=-1),
    "dilation of 0": lambda F, x, w: F.conv1d(x, w, dilation=0),
    "same with a stride": lambda F, x, w: F.conv1d(x, w, padding="same", stride=2),
    "no such padding": lambda F, x, w: F.conv1d(x, w, padding="full"),
    "two strides": lambda F, x, w: F.conv1d(x, w, stride=(1, 2)),
    "groups that do not divide": lambda F, x, w: F.conv1d(x, w, groups=4),
    "channels": lambda F, x, w: F.conv1d(x[:, :3], w),
    "bias": lambda F, x, w: F.conv1d(x, w, x.new_zeros(5)),
    "dimensions": lambda F, x, w: F.conv1d(x[None], w),
    "larger than the input": lambda F, x, w: F.conv1d(x, w, dilation=9),
    "two dtypes": lambda F, x, w: F.conv1d(x, w.bfloat16()),
    "no weights": lambda F, x, w: F.conv1d(x, w[:0]),
    "output_padding": lambda F, x, w: F.conv_transpose1d(x, w[:4], output_padding=1),
    "negative output_padding": lambda F, x, w: F.conv_transpose1d(x, w[:4], output_padding=-1),
}


@pytest.mark.parametrize("what", BAD)
def test_errors_are_those_of_stock(what, device):
    x, w = tensors((2, 4, 9), (6, 4, 3), device=device)
    ours, theirs = (lambda F=f: BAD[what](F, x, w) for f in (F, stock.functional))
    assert_same_error(ours, theirs, mode="triton")


LAYERS = {
    name: lambda nn, name=name: getattr(nn, name)(3, 2)
    for d in (1, 2, 3)
    for name in (f"LazyConv{d}d", f"LazyConvTranspose{d}d")
}


@pytest.mark.parametrize("name", LAYERS)
def test_lazy_layers_become_ours_and_run_on_kernels(name, device):
    x = torch.randn(1, 2, *(2,) * int(name[-2]), device=device)
    layer = LAYERS[name](fastnn).to(device)
    with fastnn.backend("triton"), fastnn.decisions() as heard:
        y = layer(x)
    assert type(layer) is getattr(fastnn, name.removeprefix("Lazy"))
    assert [why for _, why, _ in heard] == [None]
    twin = getattr(stock, name.removeprefix("Lazy"))(2, 3, 2).to(device)
    twin.load_state_dict(layer.state_dict())
    torch.testing.assert_close(y, twin(x))


def test_padding_modes_and_output_size(device):
    torch.manual_seed(0)
    for ours, its, options in (
        (fastnn.Conv2d, stock.Conv2d, {"padding_mode": "reflect", "padding": 1}),
        (fastnn.Conv1d, stock.Conv1d, {"padding_mode": "circular", "padding": "same"}),
    ):
        x = torch.randn(1, 4, *(5,) * (2 if ours is fastnn.Conv2d else 1), device=device)
        theirs = its(4, 4, 3, groups=4, **options).to(device)
        layer = ours(4, 4, 3, groups=4, **options).to(device)
        layer.load_state_dict(theirs.state_dict())
        with fastnn.backend("triton"):
            torch.testing.assert_close(layer(x), theirs(x))
    theirs = stock.ConvTranspose2d(4, 4, 3, stride=2, groups=4).to(device)
    layer = fastnn.convert(copy.deepcopy(theirs))
    x = torch.randn(1, 4, 2, 3, device=device)
    for size in ([5, 8], [6, 7], [1, 4, 5, 7]):
        with fastnn.backend("triton"):
            torch.testing.assert_close(layer(x, size), theirs(x, size))
    for wrong in ([4, 7], [5], [7, 7]):
        assert_same_error(layer, theirs, x, wrong, mode="triton")


@interpreted
def test_only_depthwise_convolutions_are_considered_in_auto():
    x = torch.empty(1 << 15, 16, 3, 3)

    def answer(*args, **options):
        with fastnn.backend("auto"), fastnn.decisions(), _gate.asked() as asked:
            F.conv2d(*args, **options)
        return asked[0][1]

    assert answer(x, torch.empty(32, 1, 3, 3), groups=16) == (x.numel(), "elements", "depthwise")
    for w, groups in ((torch.empty(16, 16, 1, 1), 1), (torch.empty(16, 4, 1, 1), 4)):
        assert "cuDNN is as fast" in answer(x, w, groups=groups).why
    wide = torch.empty(16, 1, 5, 5)
    assert "25 taps" in answer(x, wide, padding=2, groups=16).why
    last = x.to(memory_format=torch.channels_last)
    assert answer(last, wide, padding=2, groups=16).variant == "depthwise"


def test_precision_is_that_of_pytorchs_setting():
    for setting in ("tf32", "ieee"):
        with tf32_setting.set_to(setting):
            assert torch.backends.cudnn.conv.fp32_precision == setting
            for arch, here in (("sm_90", setting), ("gfx90a", "ieee"), ("cpu", "ieee")):
                with _gpus.simulated(arch):
                    assert _precision(-1) == (here, arch)


@pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="this PyTorch has no such setting"
)
def test_a_setting_for_all_products_is_read():
    # Helpers of PyTorch's own tests, once imported, let nobody set it.
    unfrozen = getattr(torch.backends, "__allow_nonbracketed_mutation")
    before = torch.backends.fp32_precision
    kinds = (
        (torch.backends.cudnn.conv, tf32_setting),
        (torch.backends.cuda.matmul, linear.tf32_setting),
    )
    try:
        for setting in ("tf32", "ieee"):
            with unfrozen():
                torch.backends.fp32_precision = setting
            for home, read in kinds:  # a kind that was set by itself keeps its own
                assert read() == ("tf32" if home.fp32_precision == "tf32" else "ieee")
    finally:
        with unfrozen():
            torch.backends.fp32_precision = before


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (1, 3, 4, 1)])
def test_strides_decide_on_channels_last_as_in_aten(shape):
    x = torch.randn(shape)
    odd = x.as_strided(shape, [7 if n == 1 else s for n, s in zip(shape, x.stride(), strict=True)])
    permuted = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for t in (x, odd, permuted, x.to(memory_format=torch.channels_last), x[:1].expand(shape)):
        suggested = torch._prims_common.suggest_memory_format(t)
        assert is_channels_last(t.shape, t.stride()) == (suggested is torch.channels_last), (
            t.stride()
        )


@interpreted
@pytest.mark.parametrize("what", ["CHUNK", "MOST_TAPS", "UNROLLED"])
def test_sizes_within_a_program_do_not_change_results(what, monkeypatch):
    monkeypatch.setattr(kernels.conv_direct, what, 2)
    monkeypatch.setattr(kernels.conv_direct, "multiprocessors", lambda index: 1)
    inputs = randn(1, 2, 3, 5), randn(2, 1, 2, 3), randn(2)
    for view in (None, lambda x: x.to(memory_format=torch.channels_last)):
        case = Case("conv2d", inputs, {"groups": 2, "padding": 1, "stride": (1, 2)}, view=view)
        assert not check(case, torch.float32).failures
