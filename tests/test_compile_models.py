"""Models of `transformers`, compiled for the backend "fastnn": which rules hold, and how often.

The spellings in that library change, so the version is pinned by the extra `graph`.
"""

import collections
import copy

import pytest
import torch

import fastnn
from fastnn._compiler._backend import listen
from fastnn.testing import simulated
from tests.marks import interpreted

transformers = pytest.importorskip("transformers", reason="needs the extra `graph`")
pytestmark = [
    interpreted,
    pytest.mark.slow,
    pytest.mark.skipif(
        transformers.__version__ != "5.24.0", reason="the counts are those of transformers 5.24.0"
    ),
]

LAYERS, WIDTH, VOCABULARY = 2, 32, 97


def gpt2():
    config = transformers.GPT2Config(
        n_layer=LAYERS, n_embd=WIDTH, n_head=2, vocab_size=VOCABULARY, n_positions=16,
        bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        use_cache=False,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # its default makes transformers warn, which ends the graph
    return model


def bert():
    config = transformers.BertConfig(
        num_hidden_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=2, intermediate_size=64,
        vocab_size=VOCABULARY, max_position_embeddings=16, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def llama():
    config = transformers.LlamaConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, vocab_size=VOCABULARY, max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def t5():
    config = transformers.T5Config(
        num_layers=LAYERS, num_decoder_layers=LAYERS, d_model=WIDTH, d_kv=16, num_heads=2, d_ff=64,
        vocab_size=VOCABULARY, dropout_rate=0.0, decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


SITES = {
    gpt2: {
        "gelu written out": LAYERS, "dropout, add, norm": 2 * LAYERS,
        "cross_entropy of converted logits": 1,
    },
    bert: {"dropout, add, norm": 2 * LAYERS, "linear, activation": LAYERS + 1},
    llama: {
        "rms_norm written out": 2 * LAYERS + 1, "dropout, add, norm": 2 * LAYERS,
        "activation, product": LAYERS, "cross_entropy of converted logits": 1,
    },
    t5: {
        # a norm before each of 2 and 3 branches of a layer, and one at the end of each stack
        "rms_norm written out": 5 * LAYERS + 2, "dropout, add, norm": 5 * LAYERS,
        "linear, activation, dropout": 2 * LAYERS,
    },
}  # fmt: skip


@pytest.mark.parametrize("build", SITES, ids=lambda build: build.__name__)
def test_sites_and_gradients(build):
    torch._dynamo.reset()
    model = build().train().bfloat16()
    ids = torch.randint(1, VOCABULARY, (2, 8))
    sides = {
        "exact": copy.deepcopy(model).double(), "stock": copy.deepcopy(model), "ours": model,
    }  # fmt: skip
    grads = {}
    with listen() as found, simulated(least=0):
        for side, one in sides.items():
            call = fastnn.compile(one, fullgraph=True) if side == "ours" else one
            call(ids, labels=ids).loss.backward()
            grads[side] = [p.grad.double() for p in one.parameters() if p.grad is not None]
    assert dict(collections.Counter(f.rule for f in found if " " in f.rule)) == SITES[build]
    largest = max(g.abs().max() for g in grads["exact"])
    total = dict.fromkeys(("stock", "ours"), 0.0)
    for side in total:
        for got, want in zip(grads[side], grads["exact"], strict=True):
            total[side] += (
                (got - want).abs().max() / want.abs().max().clamp(largest * 1e-4)
            ).item()
    assert total["ours"] <= 1.5 * total["stock"], total
