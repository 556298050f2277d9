"""Models of libraries, compiled for the backend "fastnn": which rules hold, and how often.

The spellings in those libraries change, so their versions are pinned by the extra `graph`.
"""

import collections
import copy
import functools
import multiprocessing

import pytest
import torch
import torch.nn as stock

import fastnn
from fastnn._compiler._backend import listen
from fastnn.testing import simulated
from tests.marks import interpreted
from tests.test_compile_training import MODELS as KINDS
from tests.trained import GRAPHS, classes, compared, in_one_of_two, wave

pytestmark = [
    interpreted,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
]
PINNED = {"transformers": "5.24.0", "timm": "1.0.31", "diffusers": "0.42.1"}


def library(name):
    """A library; skips the test if it is absent, or of another version than the counts."""
    made = pytest.importorskip(name, reason="needs the extra `graph`", exc_type=ImportError)
    if made.__version__ != PINNED[name]:
        pytest.skip(f"the counts are those of {name} {PINNED[name]}, not of {made.__version__}")
    return made


LAYERS, WIDTH, VOCABULARY = 2, 32, 97


# ---- Models -------------------------------------------------------------------------------------


def gpt2():
    transformers = library("transformers")
    config = transformers.GPT2Config(
        n_layer=LAYERS, n_embd=WIDTH, n_head=2, vocab_size=VOCABULARY, n_positions=16,
        bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        use_cache=False,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # its default makes transformers warn, which ends the graph
    return model


def bert():
    transformers = library("transformers")
    config = transformers.BertConfig(
        num_hidden_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=2, intermediate_size=64,
        vocab_size=VOCABULARY, max_position_embeddings=16, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def llama():
    transformers = library("transformers")
    config = transformers.LlamaConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, vocab_size=VOCABULARY, max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def t5():
    transformers = library("transformers")
    config = transformers.T5Config(
        num_layers=LAYERS, num_decoder_layers=LAYERS, d_model=WIDTH, d_kv=16, num_heads=2, d_ff=64,
        vocab_size=VOCABULARY, dropout_rate=0.0, decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def whisper():
    transformers = library("transformers")
    config = transformers.WhisperConfig(
        d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8,
        vocab_size=VOCABULARY, max_source_positions=8, max_target_positions=16, dropout=0.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, use_cache=False,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def swin():
    return library("timm").models.SwinTransformer(
        img_size=56, embed_dim=16, depths=(2, 2), num_heads=(2, 2), num_classes=10,
        drop_path_rate=0.0,
    )  # fmt: skip


def vit():
    return library("timm").models.VisionTransformer(
        img_size=32, embed_dim=WIDTH, depth=LAYERS, num_heads=2, num_classes=10
    )


def vit_of_transformers():
    transformers = library("transformers")
    config = transformers.ViTConfig(
        image_size=32, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2,
        intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def convnext():
    return library("timm").models.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=10)


def resnet50():
    return library("timm").create_model("resnet50", num_classes=10)


def resnet18():
    return library("timm").create_model("resnet18", num_classes=10)


def efficientnet():
    return library("timm").create_model("efficientnet_b0", num_classes=10)


def mobilenet():
    return library("timm").create_model("mobilenetv3_large_100", num_classes=10)


def tiny_resnet(block):
    resnet = library("timm").models.resnet
    return resnet.ResNet(
        getattr(resnet, block), (1, 1, 1, 1), channels=(8, 8, 8, 8), stem_width=8, num_classes=10,
        output_stride=8,  # with one place left, a norm of two images has two values to go by
    )  # fmt: skip


def tiny_mobile(cls, *stages, **options):
    """A network of inverted residual blocks, spelt as timm spells EfficientNet and MobileNet."""
    timm = library("timm")
    return getattr(timm.models, cls)(
        timm.models._efficientnet_builder.decode_arch_def([[s] for s in stages]),
        stem_size=8, num_features=32, num_classes=10, **options,
    )  # fmt: skip


def tiny_efficientnet():
    return tiny_mobile(
        "EfficientNet", "ds_r1_k3_s1_e1_c8_se0.25", "ir_r2_k3_s2_e3_c16_se0.25",
        act_layer=stock.SiLU,
    )  # fmt: skip


def tiny_mobilenet():
    squeeze = functools.partial(
        library("timm").models._efficientnet_blocks.SqueezeExcite,
        gate_layer="hard_sigmoid", force_act_layer=stock.ReLU,
    )  # fmt: skip
    return tiny_mobile(
        "MobileNetV3", "ds_r1_k3_s1_e1_c8_nre", "ir_r1_k5_s2_e3_c16_se0.25_nre",
        "ir_r1_k3_s1_e3_c16", "cn_r1_k1_s1_c32",
        act_layer=stock.Hardswish, se_layer=squeeze,
    )  # fmt: skip


def unet():
    return library("diffusers").UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 16), layers_per_block=1, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=2,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=4,
    )  # fmt: skip


class Task(stock.Module):
    """A model of a library that returns its loss. batch: (n, shift) -> what it takes."""

    def __init__(self, model, loss, batch):
        super().__init__()
        self.model, self.loss, self.batch = model, loss, batch

    def forward(self, *inputs):
        return self.loss(self.model, *inputs)


def words(n, shift):
    return (classes(n, 8, count=VOCABULARY - 1) + int(10 * shift)) % (VOCABULARY - 1) + 1


def of_text(model):
    return Task(model, lambda m, ids: m(ids, labels=ids).loss, lambda n, shift: (words(n, shift),))


def of_sound(model):
    def batch(n, shift):
        return wave(n, 8, 16, shift=shift), words(n, shift)

    return Task(model, lambda m, sound, ids: m(sound, labels=ids).loss, batch)


def of_images(size):
    def task(model):
        def loss(m, images):
            made = m(images)
            return getattr(made, "logits", made).float().square().mean()

        return Task(model, loss, lambda n, shift: (wave(n, 3, size, size, shift=shift),))

    return task


def of_noise(model):
    def batch(n, shift):
        times = torch.arange(n) * 5 % 50 + 3
        return wave(n, 4, 8, 8, shift=shift), times, wave(n, 3, 8, shift=shift + 1)

    return Task(model, lambda m, *inputs: m(*inputs).sample.float().square().mean(), batch)


# ---- Sites --------------------------------------------------------------------------------------

SITES = {
    gpt2: {
        "gelu written out": LAYERS, "dropout, add, norm": 2 * LAYERS,
        "cross_entropy of converted logits": 1,
        "product of rows": 4 * LAYERS, "linear, activation": LAYERS,
        # the end of each branch, and the product that is query, key and value
        "bias in a backward": 3 * LAYERS, "table that is multiplied": 1,
    },
    bert: {
        "dropout, add, norm": 2 * LAYERS, "linear, activation": LAYERS + 1,
        "products of one tensor": LAYERS,
        # the end of each branch; each result but that of the last layer has two users
        "bias in a backward": 2 * LAYERS, "two gradients": 2 * LAYERS - 1,
        "table that is multiplied": 1,
    },
    llama: {
        "rms_norm written out": 2 * LAYERS + 1, "dropout, add, norm": 2 * LAYERS,
        "activation, product": LAYERS, "cross_entropy of converted logits": 1,
        # query, key and value; the gated unit; the scale 1 of sines and cosines
        "products of one tensor": 2 * LAYERS, "nothing to do": 2,
        "rotary written out": 2 * LAYERS,
    },
    t5: {
        # a norm before each of 2 and 3 branches of a layer, and one at the end of each stack
        "rms_norm written out": 5 * LAYERS + 2, "dropout, add, norm": 5 * LAYERS,
        "linear, activation, dropout": 2 * LAYERS, "products of one tensor": 3 * LAYERS,
        # the words of the encoder and of the decoder
        "table that is multiplied": 2,
    },
    whisper: {
        "sum of two layouts": 1, "contiguous before attention": 9 * LAYERS,
        "scale before attention": 3 * LAYERS,
        "dropout, add, norm": 5 * LAYERS, "linear, activation, dropout": 2 * LAYERS,
        "products of one tensor": 3 * LAYERS,
        # the result of the encoder is read by each layer of the decoder
        "bias in a backward": 5 * LAYERS, "two gradients": 1, "table that is multiplied": 1,
    },
    swin: {
        # 4 blocks, and a merge of patches between the stages, which pads by nothing, too
        "nothing to do": 5, "unbind of a permutation": 4, "dropout, add, norm": 7,
        "linear, activation, dropout": 4,
        "bias in a backward": 7,
    },
    vit: {
        "unbind of a permutation": LAYERS, "dropout, add, norm": 2 * LAYERS,
        "linear, activation, dropout": LAYERS,
        "bias in a backward": 3 * LAYERS,
    },
    vit_of_transformers: {
        "dropout, add, norm": 2 * LAYERS, "linear, activation": LAYERS,
        "products of one tensor": LAYERS,
        "bias in a backward": 2 * LAYERS,
    },
    convnext: {"linear, activation, dropout": 4, "scale, add": 4},
    resnet50: {
        "batch_norm, activation": 33, "batch_norm, add, relu": 16, "counters of batches": 53,
        "two gradients": 15,
    },
    resnet18: {
        "batch_norm, activation": 9, "batch_norm, add, relu": 8, "counters of batches": 20,
        "two gradients": 7,
    },
    mobilenet: {
        "batch_norm, activation": 31, "batch_norm, add": 10, "two gradients": 4,
        "gate of channels": 8, "mean beside another user": 8,
        "means of planes": 8,
        "counters of batches": 46,
    },
    efficientnet: {
        "batch_norm, activation": 33, "batch_norm, add": 9, "two gradients": 4,
        "gate of channels": 16, "mean beside another user": 16,
        "means of planes": 16,
        "counters of batches": 49,
    },
    unet: {
        "nothing to do": 17, "sum of two layouts": 4, "dropout, add, norm": 8,
        "activation, product of halves": 4, "group_norm, activation": 17, "linear, activation": 1,
        "products of one tensor": 4,
        "bias in a backward": 12, "norm that passes its input on": 12,
    },
}  # fmt: skip


TASKS = {
    gpt2: of_text, bert: of_text, llama: of_text, t5: of_text, whisper: of_sound,
    swin: of_images(56), vit: of_images(32), vit_of_transformers: of_images(32),
    convnext: of_images(32), resnet50: of_images(32), resnet18: of_images(32),
    efficientnet: of_images(64), mobilenet: of_images(64), unet: of_noise,
}  # fmt: skip
# Sites are counted in the real network, which takes minutes in the interpreter. This one trains.
TINY = {
    resnet50: functools.partial(tiny_resnet, "Bottleneck"),
    resnet18: functools.partial(tiny_resnet, "BasicBlock"),
    efficientnet: tiny_efficientnet, mobilenet: tiny_mobilenet,
}  # fmt: skip
of_all = pytest.mark.parametrize("build", SITES, ids=lambda build: build.__name__)


def tiny(build):
    """The task of the model, at a width that the interpreter can train."""
    if build in TINY:
        return of_images(32)(TINY[build]())
    return TASKS[build](build())


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@of_all
def test_sites(build):
    """How often each rule holds, in bfloat16."""
    task = TASKS[build](build()).bfloat16()
    inputs = [t.bfloat16() if t.is_floating_point() else t for t in task.batch(2, 0.0)]
    with listen() as found:
        fastnn.compile(task, fullgraph=True)(*inputs)
    assert named(found) == SITES[build]


def named(found):
    return dict(collections.Counter(f.rule for f in found if " " in f.rule))


# ---- Training -----------------------------------------------------------------------------------


@of_all
def test_gradients_in_bfloat16(build):
    """The errors of three draws are added up: those of one, of so small a model, are luck."""
    total = dict.fromkeys(("stock", "ours"), 0.0)
    for seed in range(3):
        torch.manual_seed(seed)
        for side, error in errors_in_bfloat16(tiny(build).bfloat16()).items():
            total[side] += error
    assert total["ours"] <= 1.5 * total["stock"], total


def errors_in_bfloat16(task):
    """Side -> the sum of the largest errors of the gradients against float64."""
    sides = {"exact": copy.deepcopy(task).double(), "stock": copy.deepcopy(task), "ours": task}
    grads = {}
    with simulated(least=0):
        for side, one in sides.items():
            call = fastnn.compile(one, fullgraph=True) if side == "ours" else one
            dtype = torch.double if side == "exact" else torch.bfloat16
            inputs = [t.to(dtype) if t.is_floating_point() else t for t in one.batch(2, 0.0)]
            call(*inputs).backward()
            grads[side] = [p.grad.double() for p in one.parameters() if p.grad is not None]
    exact = grads.pop("exact")
    largest = max(g.abs().max() for g in exact)
    return {
        side: sum(
            ((got - want).abs().max() / want.abs().max().clamp(largest * 1e-4)).item()
            for got, want in zip(found, exact, strict=True)
        )
        for side, found in grads.items()
    }


# A pad of the labels is no call for a kernel; the interpreter takes minutes for convolutions of a
# ResNet, which PyTorch runs if nothing is forced.
NOT_FORCED = (gpt2, llama, resnet50, resnet18)


@pytest.mark.parametrize("low", [False, True], ids=["float32", "autocast"])
@of_all
def test_five_steps_are_as_exact_as_in_pytorch(build, low):
    """Batches of several sizes, then evaluation. PyTorch compiles no graph for each size."""
    found = compared(tiny(build), low, not low and build not in NOT_FORCED, fullgraph=True)
    print(build.__name__, low, found)
    assert found.ratio <= 2, found
    assert found.graphs <= GRAPHS, found
    assert found.same, "the second training has other bits"


def test_two_processes(tmp_path):
    """`DistributedDataParallel` of each compiled model, here and in tests/test_compile_training.py.

    Each process has batches of its own.
    """
    for name in PINNED:
        library(name)
    builds = {kind.__name__: kind for kind in KINDS}
    builds |= {build.__name__: functools.partial(tiny, build) for build in SITES}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    running = [
        context.Process(target=in_one_of_two, args=(rank, builds, str(tmp_path)))
        for rank in range(2)
    ]
    [p.start() for p in running]
    [p.join(3600) for p in running]
    alive = [p for p in running if p.is_alive()]
    [p.kill() for p in alive]
    assert not alive, "processes wait for each other"
    for rank in range(2):
        found = torch.load(tmp_path / str(rank))
        assert found.keys() == builds.keys()
        print(rank, found)
        wrong = {n: f for n, f in found.items() if isinstance(f, str) or f[0] > 2 or not f[1]}
        assert not wrong, wrong
