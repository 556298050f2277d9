"""Recurrent cells beyond their rows: single gradients, second derivatives, bad input, scripts."""

import copy

import pytest
import torch

import fastnn
import fastnn.functional as F
from fastnn import kernels
from fastnn.testing import Side, compare_sides, meter
from tests.errors import assert_same_error
from tests.marks import interpreted

CELLS = ("RNNCell", "LSTMCell", "GRUCell")


def three(name, *sizes, **options):
    """The layer of fastnn, of PyTorch and in float64, with equal parameters."""
    stock = getattr(torch.nn, name)(*sizes, **options)
    ours = getattr(fastnn, name)(*sizes, **options)
    ours.load_state_dict(stock.state_dict())
    return ours, stock, copy.deepcopy(stock).double()


@pytest.mark.parametrize("which", [0, 1])
def test_one_state_of_an_lstm_cell_has_a_gradient(which, device):
    """The other state then has no gradient, which is not the same as a gradient of zeros."""
    ours, stock, exact = (m.to(device) for m in three("LSTMCell", 3, 5))
    sides = (
        Side(lambda *a, m=m: m(*a)[which], dict(m.named_parameters())) for m in (ours, stock, exact)
    )
    state = torch.randn(2, 4, 5, device=device, requires_grad=True)
    result = compare_sides(
        *sides, (torch.randn(4, 3, device=device), tuple(state.detach().requires_grad_())),
        {}, device=device, mode="triton",
    )  # fmt: skip
    assert result.path == "kernel" and not result.failures


@pytest.mark.parametrize("name", CELLS)
def test_second_derivatives(name, device):
    """Gradients of squared gradients, for inputs, states and parameters, against float64."""
    found = []
    x0 = torch.randn(2, 3)
    for cell in three(name, 3, 4):
        cell.to(device)
        x = x0.to(device, cell.weight_hh.dtype).requires_grad_()
        with fastnn.backend("auto" if cell.weight_hh.dtype == torch.float64 else "triton"):
            y = cell(x)
        y = sum(t.square().sum() for t in y) if name == "LSTMCell" else y.square().sum()
        leaves = (x, *cell.parameters())
        first = torch.autograd.grad(y, leaves, create_graph=True)
        total = sum(g.square().sum() for g in first)
        found.append(torch.autograd.grad(total, leaves))
    for ours, stock, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


BAD = {
    "a wrong size": lambda m, x, h: m(x[:, :2], h),
    "a wrong state": lambda m, x, h: m(x, h[:, :2]),
    "another batch": lambda m, x, h: m(x[:2], h),
    "three dimensions": lambda m, x, h: m(x[None], h),
    "a state of three dimensions": lambda m, x, h: m(x, h[None]),
    "another dtype": lambda m, x, h: m(x.double(), h),
    "integers": lambda m, x, h: m(x.long(), h),
}


@pytest.mark.parametrize("name", CELLS)
def test_bad_input_raises_what_pytorch_raises(name, device):
    ours, stock, _ = (m.to(device) for m in three(name, 3, 4))
    x, h = torch.randn(5, 3, device=device), torch.randn(5, 4, device=device)
    for call in BAD.values():

        def with_state(m, call=call):
            return call((lambda x, h: m(x, (h, h))) if name == "LSTMCell" else m, x, h)

        assert_same_error(lambda: with_state(ours), lambda: with_state(stock), mode="auto")


def test_an_unknown_nonlinearity_raises_as_in_pytorch(device):
    ours, stock, _ = (m.to(device) for m in three("RNNCell", 3, 4, nonlinearity="gelu"))
    assert_same_error(ours, stock, torch.randn(2, 3, device=device))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", CELLS)
def test_scripts_compile_pytorchs_function(name):
    ours, stock, _ = three(name, 3, 4)
    x = torch.randn(2, 3)
    torch.testing.assert_close(torch.jit.script(ours)(x), stock(x), rtol=0, atol=0)


@interpreted
@pytest.mark.parametrize("biases", [True, False])
def test_bytes_are_those_of_the_docstring(biases):
    """In units of B * H floats: what each kernel reads and writes, once."""
    B, H = 8, 16

    def new(n):
        return torch.randn(B, n * H)

    def given(n):
        return [torch.randn(n * H) if biases else None for _ in range(2)]

    K = kernels.recurrent
    calls = {
        "rnn": (1, 3, lambda g: K.rnn_fwd(new(1), new(1), *g, False)),
        "lstm": (4, 15, lambda g: K.lstm_fwd(new(4), new(4), *g, new(1), True)),
        "gru": (3, 12, lambda g: K.gru_fwd(new(3), new(3), *g, new(1), True)),
        "rnn back": (0, 3, lambda g: K.rnn_bwd(new(1), new(1), False)),
        "lstm back": (0, 13, lambda g: K.lstm_bwd(new(1), new(1), new(1), new(1), new(4))),
        "gru back": (0, 13, lambda g: K.gru_bwd(new(1), new(1), new(4))),
    }
    for what, (gates, units, call) in calls.items():
        with meter.traffic() as log:
            call(given(gates))
        (launch,) = log
        moved = launch.distinct["load"] + launch.distinct["store"]
        of_biases = 2 * gates * H * 4 if biases else 0
        assert moved - of_biases == units * B * H * 4, what


def test_autograd_keeps_what_pytorch_keeps_on_a_gpu(device):
    """An edit of a saved tensor raises in the backward; so it does for each tensor here."""
    for edited in ("x", "h", "weight_ih", "bias_hh"):
        cell = fastnn.GRUCell(3, 4).to(device)
        given = {"x": torch.randn(2, 3, device=device), "h": torch.randn(2, 4, device=device)}
        with fastnn.backend("triton"):
            y = cell(given["x"].requires_grad_(), given["h"])
        with torch.no_grad():
            (given.get(edited) if edited in given else getattr(cell, edited)).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_functions_take_what_torch_takes(device):
    x, h = torch.randn(2, 3, device=device), torch.randn(2, 4, device=device)
    w, u = torch.randn(4, 3, device=device), torch.randn(4, 4, device=device)
    b = torch.randn(4, device=device)
    with fastnn.backend("auto"):  # one bias alone runs stock
        assert_same_error(F.lstm_cell, torch.lstm_cell, x, (h,), w, u, mode="auto")
    with pytest.raises(fastnn.BackendError, match="one bias"), fastnn.backend("triton"):
        F.rnn_relu_cell(x, h, w, u, b)
