"""`torch.autograd.gradgradcheck`, of recurrent layers, bags, losses of sequences and distances.

Numeric derivatives need float64, which kernels do not take. Here each launch gets float32 copies.
What is checked are the gradients under `create_graph=True`: formulas in float64, of what the
forward on kernels kept. The tests of each op compare forced calls in float32 with float64.
"""

import pytest
import torch
from torch.autograd import gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence

import fastnn
import fastnn.functional as F
from fastnn import _record
from fastnn._mode import decisions
from fastnn._op import FLOATS
from fastnn.kernels._launch import Kernel
from fastnn.ops import REGISTRY, recurrent
from tests.marks import interpreted

pytestmark = interpreted
F64 = torch.float64


@pytest.fixture(autouse=True)
def kernels_take_float64(monkeypatch):
    launch = Kernel.__call__

    def narrowed(self, grid, *args, **options):
        copies = {}
        given = []
        for t in args:
            if isinstance(t, torch.Tensor) and t.dtype == F64:
                if id(t) not in copies:
                    copy = torch.empty_strided(t.shape, t.stride(), dtype=torch.float32).copy_(t)
                    copies[id(t)] = t, copy
                t = copies[id(t)][1]
            given.append(t)
        launch(self, grid, *given, **options)
        for t, copy in copies.values():
            if not torch.equal(copy, t.float()):  # written to, or never written
                t.copy_(copy)

    monkeypatch.setattr(Kernel, "__call__", narrowed)
    wide = (*FLOATS, F64)
    monkeypatch.setattr(recurrent, "FLOATS", wide)
    for op in REGISTRY.values():
        object.__setattr__(op, "dtypes", wide)
    with _record.paused():
        yield
    for op in REGISTRY.values():
        object.__setattr__(op, "dtypes", FLOATS)


def real(*shape):
    return torch.randn(*shape, dtype=F64, requires_grad=True)


def of_layer(name, *sizes, inputs, call=lambda m, *args: m(*args), **options):
    """A layer as a function of its inputs and its parameters."""
    layer = getattr(fastnn, name)(*sizes, **options).double()
    names = list(dict(layer.named_parameters()))

    def function(*given):
        parameters = dict(zip(names, given[len(inputs) :], strict=True))
        with torch.nn.utils.stateless._reparametrize_module(layer, parameters):
            return call(layer, *given[: len(inputs)])

    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    return function, (*inputs, *values)


def with_state(layer, x, h, c):
    y, (h, c) = layer(x, (h, c))
    return y, h, c


def packed(layer, x, h):
    y, h = layer(pack_padded_sequence(x, [3, 1], enforce_sorted=True), h)
    return y.data, h


INDEX = torch.tensor([[0, 2, 2], [1, 3, 0]])
TARGET = torch.tensor([0, 4, 2])
SIGNS = torch.tensor([1.0, -1.0, 1.0], dtype=F64)


def bags(mode, *weights):
    def function(table, *sample):
        sample = dict(zip(("per_sample_weights",), sample, strict=False))
        return F.embedding_bag(INDEX, table, mode=mode, padding_idx=1, **sample)

    return function, (real(4, 3), *weights)


CALLS = {
    "RNN": lambda: of_layer("RNN", 2, 3, inputs=(real(3, 2, 2),), bidirectional=True),
    "RNN, relu": lambda: of_layer("RNN", 2, 3, inputs=(real(2, 2, 2),), nonlinearity="relu"),
    "LSTM": lambda: of_layer(
        "LSTM", 2, 3, inputs=(real(3, 2, 2), real(1, 2, 3), real(1, 2, 3)), call=with_state
    ),
    "LSTM, projected": lambda: of_layer(
        "LSTM", 2, 3, inputs=(real(2, 2, 2), real(1, 2, 2), real(1, 2, 3)), call=with_state,
        proj_size=2,
    ),
    "GRU, packed": lambda: of_layer(
        "GRU", 2, 3, inputs=(real(3, 2, 2), real(1, 2, 3)), call=packed
    ),
    "RNNCell": lambda: of_layer("RNNCell", 2, 3, inputs=(real(2, 2), real(2, 3))),
    "LSTMCell": lambda: of_layer(
        "LSTMCell", 2, 3, inputs=(real(2, 2), real(2, 3), real(2, 3)),
        call=lambda m, x, h, c: m(x, (h, c)),
    ),
    "GRUCell": lambda: of_layer("GRUCell", 2, 3, inputs=(real(2, 2), real(2, 3))),
    "EmbeddingBag, sum": lambda: bags("sum", real(2, 3)),
    "EmbeddingBag, mean": lambda: bags("mean"),
    "EmbeddingBag, max": lambda: bags("max"),
    "Bilinear": lambda: of_layer("Bilinear", 2, 3, 2, inputs=(real(3, 2), real(3, 3))),
    "AdaptiveLogSoftmaxWithLoss": lambda: of_layer(
        "AdaptiveLogSoftmaxWithLoss", 4, 5, [2], div_value=2.0, inputs=(real(3, 4),),
        call=lambda m, x: tuple(m(x, TARGET)),
    ),
    "CosineEmbeddingLoss": lambda: of_layer(
        "CosineEmbeddingLoss", inputs=(real(3, 4), real(3, 4)),
        call=lambda m, a, b: m(a, b, SIGNS),
    ),
    "TripletMarginWithDistanceLoss": lambda: of_layer(
        "TripletMarginWithDistanceLoss", inputs=(real(3, 4), real(3, 4), real(3, 4)), margin=3.0
    ),
    "cosine_similarity": lambda: (lambda a, b: F.cosine_similarity(a, b, 0),
                                  (real(3, 4), real(3, 4))),
    "normalize": lambda: (lambda x: F.normalize(x, dim=0), (real(3, 4),)),
}  # fmt: skip


# These keep numbers that a kernel rounded: differences, the new state, and the result of one layer
# for the next.
KEPT_ROUNDED = ("AdaptiveLogSoftmaxWithLoss", "RNNCell", "TripletMarginWithDistanceLoss")


@pytest.mark.parametrize("which", CALLS)
def test_second_derivatives_are_numeric_ones(which):
    torch.manual_seed(0)
    function, inputs = CALLS[which]()
    steps = {"eps": 1e-3, "atol": 1e-3} if which in KEPT_ROUNDED else {}
    with fastnn.backend("triton"), decisions() as told:
        assert gradgradcheck(function, inputs, fast_mode=True, **steps)
    assert told and all(d.why is None for d in told)


def test_ctc_has_no_second_derivative_as_in_pytorch():
    x = torch.randn(5, 2, 4).log_softmax(-1).requires_grad_()
    said = []
    for of in (F.ctc_loss, torch.nn.functional.ctc_loss):
        with fastnn.backend("triton"):
            loss = of(x, INDEX[:, :2] + 1, (5, 5), (2, 2))
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError) as error:
            torch.autograd.grad(dx.sum(), x)
        said.append(str(error.value))
    assert said[0] == said[1]
