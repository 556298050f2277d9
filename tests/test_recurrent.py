"""Recurrent cells beyond their rows: single gradients, second derivatives, bad input, scripts."""

import contextlib
import copy

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastnn
import fastnn.functional as F
from fastnn import _gate, kernels
from fastnn._mode import Stock, decisions
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


@pytest.mark.parametrize("frozen", [(), ("x",), ("h",), ("weight_ih", "bias_hh"), ("weight_hh",)])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_third_derivatives_of_a_cell_of_which_some_tensors_are_frozen(nonlinearity, frozen, device):
    """An RNN's cell keeps only what a gradient that is wanted reads."""
    found = []
    x0, h0 = torch.randn(2, 3), torch.randn(2, 4)
    for cell in three("RNNCell", 3, 4, nonlinearity=nonlinearity):
        cell.to(device)
        dtype = cell.weight_hh.dtype
        leaves = {
            "x": x0.to(device, dtype),
            "h": h0.to(device, dtype),
            **dict(cell.named_parameters()),
        }
        leaves = {k: t.requires_grad_(k not in frozen) for k, t in leaves.items()}
        with fastnn.backend("auto" if dtype == torch.float64 else "triton"):
            total = cell(leaves["x"], leaves["h"]).square().sum()
        wanted = [t for t in leaves.values() if t.requires_grad]
        for _ in range(2):
            grads = torch.autograd.grad(total, wanted, create_graph=True, materialize_grads=True)
            total = sum(g.square().sum() for g in grads)
        found.append(torch.autograd.grad(total, wanted, materialize_grads=True))
    for ours, stock, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-3)


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


# ---- All steps -----------------------------------------------------------------------------------

LAYERS = ("RNN", "LSTM", "GRU")


def last(out):
    """The output of all steps."""
    return out[0]


@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives_of_a_layer(name, device):
    found = []
    x0 = torch.randn(3, 2, 3)
    for layer in three(name, 3, 2, bidirectional=True):
        layer.to(device)
        x = x0.to(device, layer.weight_hh_l0.dtype).requires_grad_()
        with fastnn.backend("auto" if x.dtype == torch.float64 else "triton"):
            y = last(layer(x)).square().sum()
        leaves = (x, *layer.parameters())
        first = torch.autograd.grad(y, leaves, create_graph=True)
        total = sum(g.square().sum() for g in first)
        found.append(torch.autograd.grad(total, leaves))
    for ours, stock, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize(
    ("name", "hidden", "options"),
    [
        ("LSTM", 16, {}),
        pytest.param("RNN", 3, {}, marks=pytest.mark.slow),
        pytest.param("GRU", 16, {}, marks=pytest.mark.slow),
        pytest.param("LSTM", 16, {"proj_size": 8}, marks=pytest.mark.slow),
    ],
)
def test_errors_do_not_grow_faster_with_the_steps(name, hidden, options, device):
    """The mean square over 16 sequences of 512 steps is no larger than that of PyTorch.

    Pooled over ten draws, the roots of the mean squares are 0.92 (LSTM), 0.94 (GRU), 0.98 (RNN) and
    0.99 (projections) of those of PyTorch on a CPU.
    """
    torch.manual_seed(0)
    ours, stock, exact = (m.to(device) for m in three(name, 2, hidden, **options))
    x = torch.randn(512, 16, 2, device=device)
    with fastnn.backend("triton"), torch.no_grad(), decisions() as told:
        y = last(ours(x))
    assert [d.why for d in told] == [None]
    with torch.no_grad():
        theirs, right = last(stock(x)), last(exact(x.double()))
    error, its = ((t.double() - right).square().mean().item() for t in (y, theirs))
    assert error <= its


@interpreted
@pytest.mark.parametrize("name", LAYERS)
def test_the_number_of_launches_does_not_depend_on_the_steps(name):
    counts = []
    for steps in (1, 4):
        layer = getattr(fastnn, name)(3, 4)
        x = torch.randn(steps, 2, 3, requires_grad=True)
        with fastnn.backend("triton"), meter.traffic(distinct=False) as log:
            last(layer(x)).sum().backward()
        counts.append([launch.kernel for launch in log])
    assert counts[0] == counts[1]
    assert [k for k in counts[0] if "steps" in k] == ["_steps_fwd_kernel", "_steps_bwd_kernel"]


@pytest.mark.parametrize("name", LAYERS)
def test_a_parametrised_weight(name, device):
    """`weight_norm` makes a new weight for each call, and keeps it out of the parameters."""
    ours, stock, exact = (m.to(device) for m in three(name, 3, 4))
    for layer in (ours, stock, exact):
        torch.nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    sides = (Side(m, dict(m.named_parameters())) for m in (ours, stock, exact))
    result = compare_sides(
        *sides, (torch.randn(2, 3, 3, device=device),), {}, device=device, mode="triton"
    )
    assert result.path == "kernel" and not result.failures


def test_two_layers_share_a_weight(device):
    """Its gradient is the sum of both."""
    layers = [m.to(device) for m in three("GRU", 4, 4, num_layers=2)]
    for layer in layers:
        layer.weight_hh_l1 = layer.weight_hh_l0
    sides = (Side(m, dict(m.named_parameters())) for m in layers)
    result = compare_sides(
        *sides, (torch.randn(2, 3, 4, device=device),), {}, device=device, mode="triton"
    )
    assert result.path == "kernel" and not result.failures


class Packed(torch.nn.Module):
    """A layer that is given its input (T, N, I) as a packed sequence, and gives tensors."""

    def __init__(self, layer, lengths, ordered):
        super().__init__()
        self.layer = layer
        self.lengths = lengths
        self.ordered = ordered

    def forward(self, x, state=None):
        torch.manual_seed(3)  # for dropout
        packed = pack_padded_sequence(x, self.lengths, enforce_sorted=self.ordered)
        y, state = self.layer(packed, state)
        for mine, given in zip(y[1:], packed[1:], strict=True):  # batch sizes, orders
            assert mine is given or torch.equal(mine, given)
        return y.data, state


PACKED = {
    "sorted": ("LSTM", [4, 3, 3, 1], {}),
    "unsorted": ("GRU", [1, 4, 2, 4], {"bidirectional": True}),
    "two layers": ("LSTM", [1, 3, 2], {"num_layers": 2, "bidirectional": True, "bias": False}),
    "dropout": ("GRU", [2, 3, 1], {"num_layers": 2, "dropout": 0.5}),
    "projections": ("LSTM", [2, 3, 1], {"proj_size": 2, "num_layers": 2, "bidirectional": True}),
    "tanh": ("RNN", [2, 5, 1], {"bidirectional": True}),
    "relu": ("RNN", [2, 2], {"nonlinearity": "relu"}),
    "one row": ("GRU", [3], {}),
}


@pytest.mark.parametrize("stated", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("which", PACKED)
def test_packed_sequences(which, stated, device):
    """Rows that end early keep their states, and backward in time begin at their own end."""
    name, lengths, options = PACKED[which]
    if device != "cpu" and "dropout" in options:
        pytest.skip("cuDNN draws random numbers of its own")
    ordered = lengths == sorted(lengths, reverse=True)
    three_layers = [m.to(device) for m in three(name, 3, 5, **options)]
    sides = (Side(Packed(m, lengths, ordered), dict(m.named_parameters())) for m in three_layers)
    given = [torch.randn(max(lengths), len(lengths), 3, device=device)]
    if stated:
        both = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
        h = torch.randn(both, len(lengths), options.get("proj_size", 5), device=device)
        c = torch.randn(both, len(lengths), 5, device=device)
        given.append((h, c) if name == "LSTM" else h)
    result = compare_sides(*sides, tuple(given), {}, device=device, mode="triton")
    assert result.path == "kernel" and not result.failures


@interpreted
@pytest.mark.parametrize("which", ["unsorted", "two layers", "tanh"])
def test_a_kernel_for_each_step_gives_the_bits_of_one_kernel(which, monkeypatch):
    """Weights that do not fit one block: programs share the hidden units, steps are launched."""
    name, lengths, options = PACKED[which]
    results = []
    for together in (True, False):
        monkeypatch.setattr(kernels.recurrent_steps, "one_kernel", lambda *w, t=together: t)
        torch.manual_seed(0)
        layer = getattr(fastnn, name)(3, 18, **options)
        x = torch.randn(max(lengths), len(lengths), 3, requires_grad=True)
        found = []
        for model in (layer, Packed(layer, lengths, False)):
            with fastnn.backend("triton"):
                y, _ = model(x)
            found += [y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))]
        results.append(found)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@interpreted
@pytest.mark.parametrize(("hidden", "together"), [(100, True), (256, False)])
def test_the_launches_of_two_layers_over_128_steps(hidden, together, monkeypatch):
    """Small layers: 1 kernel forward and 1 backward. Large ones: the same for each step."""
    launched = []
    for name in ("_steps_fwd_kernel", "_steps_bwd_kernel"):
        monkeypatch.setattr(
            kernels.recurrent_steps, name, lambda *args, n=name, **options: launched.append(n)
        )
    layer = fastnn.LSTM(hidden, hidden, 2)
    assert kernels.recurrent_steps.one_kernel(layer.weight_hh_l0) == together
    with fastnn.backend("triton"), meter.traffic(distinct=False) as log:
        last(layer(torch.zeros(128, 1, hidden))).sum().backward()
    steps = 1 if together else 128
    assert launched == ["_steps_fwd_kernel"] * 2 * steps + ["_steps_bwd_kernel"] * 2 * steps
    others = [launch.kernel for launch in log]
    assert len(others) <= 4, others  # both bias gradients of a layer are one sum


def test_bad_batch_sizes_raise_what_pytorch_raises(device):
    ours, stock, _ = (m.to(device) for m in three("GRU", 3, 4))
    data, h = torch.randn(5, 3, device=device), torch.randn(1, 3, 4, device=device)
    for values in ([3, 2, 1], [2, 3], [4, 1]):
        sizes = torch.tensor(values, dtype=torch.int64)
        args = data, sizes, h
        rest = True, 1, 0.0, False, False
        assert_same_error(
            lambda m, a=args, r=rest: (F if m is ours else torch).gru(*a, m._flat_weights, *r),
            lambda m, a=args, r=rest: torch.gru(*a, m._flat_weights, *r), stock, mode="auto",
        )  # fmt: skip


BAD_LAYER = {
    "a wrong size": lambda m, x, h: m(x[..., :2], h),
    "a wrong state": lambda m, x, h: m(x, h[..., :2]),
    "another batch": lambda m, x, h: m(x[:, :1], h),
    "one dimension": lambda m, x, h: m(x[0, 0], h),
    "a state of two dimensions": lambda m, x, h: m(x, h[0]),
    "another dtype": lambda m, x, h: m(x.double(), h),
    "no steps": lambda m, x, h: m(x[:0], h),
}


@pytest.mark.parametrize("name", LAYERS)
def test_bad_input_of_a_layer_raises_what_pytorch_raises(name, device):
    ours, stock, _ = (m.to(device) for m in three(name, 3, 4))
    x, h = torch.randn(2, 5, 3, device=device), torch.randn(1, 5, 4, device=device)
    for call in BAD_LAYER.values():

        def with_state(m, call=call):
            return call((lambda x, h: m(x, (h, h))) if name == "LSTM" else m, x, h)

        assert_same_error(lambda: with_state(ours), lambda: with_state(stock), mode="auto")


class Holding(torch.nn.Module):
    def __init__(self, member):
        super().__init__()
        self.member = member

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.member(x)[0]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["LSTM", "GRU"])  # PyTorch can script no RNN
def test_scripts_of_models_with_layers(name):
    ours, stock, _ = three(name, 3, 4, num_layers=2)
    x = torch.randn(2, 2, 3)
    scripted = torch.jit.script(Holding(ours))
    torch.testing.assert_close(scripted(x), last(stock(x)), rtol=0, atol=0)


def test_a_character_model_follows_the_curve_of_pytorch(device):
    """Six steps of Adam on one line of text: the losses are those of PyTorch."""
    text = torch.tensor([ord(c) % 13 for c in "the cat sat on the mat, m"]).to(device)
    x, target = torch.nn.functional.one_hot(text[:-1].view(4, 6).t(), 13).float(), text[1:]
    target = target.view(4, 6).t().reshape(-1)
    curves, trained = [], []
    for nn in (torch.nn, fastnn):
        torch.manual_seed(0)
        lstm, head = nn.LSTM(13, 8).to(device), torch.nn.Linear(8, 13).to(device)
        adam = torch.optim.Adam([*lstm.parameters(), *head.parameters()], lr=0.05)
        curve = []
        for _ in range(6):
            adam.zero_grad()
            with fastnn.backend("triton"):
                y = last(lstm(x))
            loss = torch.nn.functional.cross_entropy(head(y).flatten(0, 1), target)
            loss.backward()
            adam.step()
            curve.append(loss.item())
        curves.append(curve)
        trained.append((lstm, head))
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-4, atol=1e-4)
    assert curves[1][-1] < 0.85 * curves[1][0]
    for (giver, _), (taker, _) in (trained, trained[::-1]):  # checkpoints, both ways
        other = copy.deepcopy(taker)
        other.load_state_dict(giver.state_dict())
        with fastnn.backend("triton"):
            torch.testing.assert_close(last(other(x)), last(giver(x)), rtol=1e-5, atol=1e-6)


# ---- What `auto` does ----------------------------------------------------------------------------


def reason(call):
    with decisions() as told:
        call()
    (code,) = {d.why.split(":")[0].split(" reads ")[0] if d.why else None for d in told}
    return code


CUDNN = "cuDNN runs all steps of a layer"


@interpreted
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("dtype", "version", "takes"),
    [
        (torch.float32, 90000, True),
        (torch.float16, 90000, True),
        (torch.bfloat16, 90000, False),
        (torch.bfloat16, 91300, True),
        (torch.float32, None, False),
    ],
)
def test_auto_leaves_all_steps_to_cudnn_where_it_runs_them(
    dtype, version, takes, packed, monkeypatch, simulate
):
    """It takes bfloat16 from version 9.13 on; without it PyTorch launches kernels for each step."""
    simulate("sm_90", least=0)
    monkeypatch.setattr(torch, "cudnn_is_acceptable", lambda t: version is not None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    for options in ({}, {"proj_size": 2}):
        layer = fastnn.LSTM(3, 4, **options).to(dtype)
        model = Packed(layer, [2, 1], True) if packed else layer
        found = reason(lambda m=model: m(torch.randn(2, 2, 3, dtype=dtype)))
        assert found == (CUDNN if takes else None), options


@interpreted
@pytest.mark.parametrize(
    ("rows", "hidden", "options", "why"),
    [
        (64, 512, {}, None),
        (4096, 512, {}, "blocks"),  # 256 of them, which read 1 MiB each
        (16, 64, {"proj_size": 32}, None),
        (16, 512, {"proj_size": 256}, "one block"),
    ],
)
def test_auto_takes_kernels_that_read_few_weights(
    rows, hidden, options, why, monkeypatch, simulate
):
    """By the model: a block reads all of them in each step, PyTorch's product does it once."""
    simulate("sm_90", least=0)
    monkeypatch.setattr(torch, "cudnn_is_acceptable", lambda t: False)
    asked = []
    with meta_calls(asked):
        fastnn.LSTM(8, hidden, **options)(torch.randn(1, rows, 8))
    assert asked == [why]


@contextlib.contextmanager
def meta_calls(asked):
    """Collects what the policy of `lstm` says; the calls themselves run PyTorch."""
    with _gate.asked() as answers:
        yield
    for _, work in answers:
        asked.append(work.why.split(" read")[0] if isinstance(work, Stock) else None)


@interpreted
@pytest.mark.parametrize(
    ("setting", "takes"), [(":16:8", False), (":4096:2", False), (":4096:8", True), (None, False)]
)
def test_auto_takes_kernels_where_cudnn_may_differ(setting, takes, monkeypatch, simulate):
    """By PyTorch's page on LSTM, of those settings with which PyTorch multiplies at all."""
    simulate("sm_90", least={})
    monkeypatch.setattr(torch, "cudnn_is_acceptable", lambda t: True)
    if setting is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    else:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", setting)
    x, layer = torch.randn(2, 2, 3), fastnn.GRU(3, 4)
    before = torch.are_deterministic_algorithms_enabled()
    for allowed in (True, False):
        torch.use_deterministic_algorithms(not allowed)
        try:
            found = reason(lambda: layer(x))
        finally:
            torch.use_deterministic_algorithms(before, warn_only=True)
        assert (found is None) == (takes and not allowed)
