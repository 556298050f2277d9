"""Models of libraries, compiled for the backend "fastnn": which rules hold, and how often.

The spellings in those libraries change, so their versions are pinned by the extra `graph`.
"""

import collections
import copy

import pytest
import torch

import fastnn
from fastnn._compiler._backend import listen
from fastnn.testing import simulated
from tests.marks import interpreted

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


def convnext():
    return library("timm").models.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=10)


def resnet50():
    return library("timm").create_model("resnet50", num_classes=10)


def efficientnet():
    return library("timm").create_model("efficientnet_b0", num_classes=10)


def unet():
    return library("diffusers").UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 16), layers_per_block=1, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=2,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=4,
    )  # fmt: skip


def of_text(model, dtype):
    ids = torch.arange(16).view(2, 8) * 5 % (VOCABULARY - 1) + 1
    return lambda call: call(ids, labels=ids).loss


def of_sound(model, dtype):
    ids = torch.arange(16).view(2, 8) * 5 % (VOCABULARY - 1) + 1
    sound = torch.sin(torch.arange(2 * 8 * 16.0)).view(2, 8, 16).to(dtype)
    return lambda call: call(sound, labels=ids).loss


def of_images(size):
    def inputs(model, dtype):
        images = torch.sin(torch.arange(2 * 3 * size * size * 1.0)).view(2, 3, size, size)
        return lambda call: call(images.to(dtype)).float().square().mean()

    return inputs


def of_noise(model, dtype):
    noise = torch.sin(torch.arange(2 * 4 * 64.0)).view(2, 4, 8, 8).to(dtype)
    text = torch.cos(torch.arange(2 * 3 * 8.0)).view(2, 3, 8).to(dtype)
    return lambda call: call(noise, torch.tensor([3, 7]), text).sample.float().square().mean()


SITES = {
    gpt2: {
        "gelu written out": LAYERS, "dropout, add, norm": 2 * LAYERS,
        "cross_entropy of converted logits": 1,
    },
    bert: {
        "dropout, add, norm": 2 * LAYERS, "linear, activation": LAYERS + 1,
        "products of one tensor": LAYERS,
    },
    llama: {
        "rms_norm written out": 2 * LAYERS + 1, "dropout, add, norm": 2 * LAYERS,
        "activation, product": LAYERS, "cross_entropy of converted logits": 1,
        # query, key and value; the gated unit; the scale 1 of sines and cosines
        "products of one tensor": 2 * LAYERS, "nothing to do": 2,
    },
    t5: {
        # a norm before each of 2 and 3 branches of a layer, and one at the end of each stack
        "rms_norm written out": 5 * LAYERS + 2, "dropout, add, norm": 5 * LAYERS,
        "linear, activation, dropout": 2 * LAYERS, "products of one tensor": 3 * LAYERS,
    },
    whisper: {
        "sum of two layouts": 1, "contiguous before attention": 9 * LAYERS,
        "dropout, add, norm": 5 * LAYERS, "linear, activation, dropout": 2 * LAYERS,
        "products of one tensor": 3 * LAYERS,
    },
    swin: {
        # 4 blocks, and a merge of patches between the stages, which pads by nothing, too
        "nothing to do": 5, "unbind of a permutation": 4, "dropout, add, norm": 7,
        "linear, activation, dropout": 4,
    },
    vit: {
        "unbind of a permutation": LAYERS, "dropout, add, norm": 2 * LAYERS,
        "linear, activation, dropout": LAYERS,
    },
    convnext: {"linear, activation, dropout": 4, "scale, add": 4},
    resnet50: {
        "batch_norm, activation": 33, "batch_norm, add, relu": 16, "counters of batches": 53,
    },
    efficientnet: {
        "batch_norm, activation": 33, "gate of channels": 16, "mean beside another user": 16,
        "counters of batches": 49,
    },
    unet: {
        "nothing to do": 17, "sum of two layouts": 4, "dropout, add, norm": 8,
        "activation, product of halves": 4, "group_norm, activation": 17, "linear, activation": 1,
        "products of one tensor": 4,
    },
}  # fmt: skip


# Each is compared with float64, except for the networks that take minutes in the interpreter.
INPUTS = {
    gpt2: of_text, bert: of_text, llama: of_text, t5: of_text, whisper: of_sound,
    swin: of_images(56), vit: of_images(32), convnext: of_images(32), resnet50: of_images(32),
    efficientnet: of_images(64), unet: of_noise,
}  # fmt: skip
ONLY_COUNTED = (resnet50, efficientnet)


@pytest.mark.parametrize("build", SITES, ids=lambda build: build.__name__)
def test_sites_and_gradients(build):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = build().train().bfloat16()
    if build in ONLY_COUNTED:
        with listen() as found:
            INPUTS[build](model, torch.bfloat16)(fastnn.compile(model, fullgraph=True))
        assert fused_in(found) == SITES[build]
        return
    sides = {
        "exact": copy.deepcopy(model).double(), "stock": copy.deepcopy(model), "ours": model,
    }  # fmt: skip
    grads = {}
    with listen() as found, simulated(least=0):
        for side, one in sides.items():
            call = fastnn.compile(one, fullgraph=True) if side == "ours" else one
            INPUTS[build](one, one_dtype(one))(call).backward()
            grads[side] = [p.grad.double() for p in one.parameters() if p.grad is not None]
    assert fused_in(found) == SITES[build]
    largest = max(g.abs().max() for g in grads["exact"])
    total = dict.fromkeys(("stock", "ours"), 0.0)
    for side in total:
        for got, want in zip(grads[side], grads["exact"], strict=True):
            total[side] += (
                (got - want).abs().max() / want.abs().max().clamp(largest * 1e-4)
            ).item()
    assert total["ours"] <= 1.5 * total["stock"], total


def fused_in(found):
    return dict(collections.Counter(f.rule for f in found if " " in f.rule))


def one_dtype(model):
    return next(model.parameters()).dtype
