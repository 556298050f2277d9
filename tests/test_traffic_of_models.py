"""`fastnn.bench.traffic`: what a step of a model moves, eager and compiled."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastnn.bench import traffic
from fastnn.testing.meter import Cost, nbytes
from tests.marks import interpreted

pytestmark = interpreted


class Block(nn.Module):
    """A product, a GELU, a product, and dropout, add, norm; the loss reads converted logits."""

    def __init__(self, width=256):
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x, labels):
        x = self.norm(x + F.dropout(self.down(torch.tanh(self.up(x))), 0.5, self.training))
        return F.cross_entropy(x.float(), labels)


ROWS, WIDTH = 4096, 256


def model(build=lambda: (Block(), (torch.empty(ROWS, WIDTH), torch.zeros(ROWS).long()), {})):
    return traffic.Model("a block", "torch", build)


@pytest.fixture(scope="module")
def record():
    return traffic.counted(model())


def test_eager_is_the_sum_of_its_passes(record):
    e = ROWS * WIDTH * 2
    by, wide = record["stock"]["by"], 2 * e
    assert (by["tanh"], by["tanh_backward"]) == (2 * e, 3 * e)
    assert (by["native_dropout"], by["native_dropout_backward"]) == (2.5 * e, 2.5 * e)
    assert by["_to_copy"] == 2 * (e + wide)  # the logits, and their gradient
    assert by["_log_softmax"] == 2 * wide
    assert not traffic.PRODUCTS & by.keys() or not sum(by.get(p, 0) for p in traffic.PRODUCTS)
    assert record["stock"]["bytes"] == sum(by.values())


def test_kernels_count_what_they_move_at_the_real_size(record):
    e = ROWS * WIDTH * 2
    by = record["open"]["by"]
    # cross_entropy reads the logits in each direction and writes their gradient, in 16 bits.
    assert by["fastnn cross_entropy"] == pytest.approx(3 * e, rel=0.05)
    # Reads z and x, writes the sum and y; then reads dy and the sum, and writes dz, as x needs no
    # gradient. Each program writes its sums for the weight and the bias in float32.
    assert by["fastnn dropout_add_layer_norm"] == pytest.approx(7 * e, rel=0.06)
    assert "native_dropout" not in by and "_log_softmax" not in by
    assert record["rules"]["dropout, add, norm"] == 1
    assert record["open"]["bytes"] == sum(by.values()) < 0.6 * record["stock"]["bytes"]
    assert record["open"]["launches"] < record["stock"]["launches"]


def test_the_gate_leaves_small_calls_to_pytorch(record):
    # All calls of this model are below the crossovers of an H100, except those that it names.
    assert record["open"]["bytes"] <= record["auto"]["bytes"] <= record["stock"]["bytes"]
    assert record["auto"]["by"] != record["open"]["by"]


def test_a_declined_call_counts_as_pytorch_runs_it_on_cuda():
    class Drop(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(64, device="meta"))

        def forward(self, x):
            return F.dropout(x * self.weight, 0.5, self.training).sum()

    x = torch.empty(64, 64, device="meta")
    found = traffic.counted(model(lambda: (Drop(), (x,), {})), ("stock", "auto"))
    assert found["rules"] == {"dropout": 1}
    assert found["auto"] == found["stock"]
    assert "native_dropout" in found["auto"]["by"]


def test_attention_moves_no_bytes_and_keeps_the_layout_of_a_fused_kernel():
    q = torch.empty(2, 3, 8, 4, device="meta", requires_grad=True)
    with traffic.Outside() as counted:
        y = traffic.fused_attention(q, q, q)
        y.transpose(1, 2).reshape(2, 8, 12)
    assert counted.cost == Cost(0, 0)
    assert y.shape == q.shape


def test_sum_for_the_bias_of_a_convolution_counts():
    x = torch.empty(2, 3, 8, 8, device="meta")
    layers = [nn.Conv2d(3, 4, 3, bias=b, device="meta") for b in (True, False)]
    found = []
    for layer in layers:
        y = layer(x)
        dy = torch.empty_like(y)
        with traffic.Outside() as counted:
            torch.autograd.grad(y, list(layer.parameters()), dy)
        found.append(counted.cost.bytes)
    assert found == [nbytes(dy), 0]


def test_an_absent_library_is_a_row_that_says_so():
    def build():
        raise ImportError("no such library")

    record = traffic.counted(model(build))
    assert "no such library" in record["why"]
    assert traffic.rows([record])[0][2] == record["why"]
    assert traffic.mean([record], "auto") is None
