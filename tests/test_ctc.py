"""CTC beyond its rows: what PyTorch rejects, bytes, races, labels that are no class, training."""

import pytest
import torch
import torch.nn.functional as stock

import fastnn
import fastnn.functional as F
from fastnn import _op
from fastnn._mode import decisions
from fastnn.testing.cases.ctc import given, labels, log_probs
from fastnn.testing.meter import traffic
from tests.errors import assert_same_error
from tests.marks import interpreted

pytestmark = interpreted

X = torch.randn(5, 2, 4).log_softmax(2)
Y = torch.tensor([[1, 2], [3, 1]])


@pytest.mark.parametrize(
    "args",
    [
        (X, Y, (6, 5), (1, 1)),
        (X, Y, (-1, 5), (1, 1)),
        (X, Y, (5, 5), (1, 1), 4),
        (X, Y, (5, 5), (1, 1), -1),
        (X, Y, (5,), (1, 1)),
        (X, Y, (5, 5), (1,)),
        (X, Y, (5, 5), (1, 3)),
        (X, Y, (5, 5), (1, -1)),
        (X, Y[:1], (5, 5), (1, 1)),
        (X, Y[0], (5, 5), (1, 2)),
        (X, Y, (5.0, 5.0), (1, 1)),
        (X, Y, torch.tensor([5.0, 5.0]), torch.tensor([1, 1])),
        (X, Y, (5, 5), (1, 1), 0, "other"),
        (X.half(), Y, (5, 5), (1, 1)),
        (X[0, 0], Y, (5, 5), (1, 1)),
        (X[:, 0], Y[0], (5,), (1,)),  # one sequence, and more targets than labels
    ],
    ids=lambda args: None,
)
def test_bad_input_raises_what_stock_raises(args):
    assert_same_error(F.ctc_loss, stock.ctc_loss, *args)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_targets_that_are_a_view_of_wider_rows(dtype):
    """Labels are often padded, and cut to the longest sequence of a batch."""
    wide = torch.tensor([[1, 2, 0, 3], [3, 1, 0, 0]], dtype=dtype)
    for view in (wide[:, :2], wide.T.contiguous().T[:, :2], wide[:, ::3]):
        given = X.clone().requires_grad_(), X.clone().requires_grad_()
        with fastnn.backend("triton"), traffic(distinct=False):
            loss = F.ctc_loss(given[0], view, (5, 5), (2, 1))
            loss.backward()
        expected = stock.ctc_loss(given[1], view.contiguous(), (5, 5), (2, 1))
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(given[0].grad, given[1].grad)


def test_what_the_passes_move():
    """The log-probabilities are read once and written once, but for the classes of the labels. No
    program touches what another one stores, or loads what it stored without a barrier."""
    T, N, C, L = 24, 2, 512, 9
    torch.manual_seed(0)
    x = log_probs(T, N, C)(torch.float32, "cpu")
    y = labels(N, L, high=4)(None, "cpu")  # many are equal
    with fastnn.backend("triton"), traffic(races=True) as launches:
        F.ctc_loss(x, y, (T, T - 3), (L, 5)).backward()
    assert [launch.kernel for launch in launches] == [
        "_ctc_fwd_kernel", "_loss_finish_kernel", "_ctc_posterior_kernel", "_ctc_bwd_kernel",
    ]  # fmt: skip
    assert not any(launch.shared_writes for launch in launches)
    states = 4 * T * N * (2 * L + 1) * 4  # stored and read twice
    moved = sum(sum(launch.distinct.values()) for launch in launches)
    assert 2 * x.nbytes <= moved + 3 * x.nbytes // T <= 2.2 * x.nbytes + states


def test_a_label_that_is_no_class_makes_its_sequence_nan():
    x = X.clone().requires_grad_()
    with fastnn.backend("triton"):
        loss = F.ctc_loss(x, torch.tensor([[1, 9], [3, 1]]), (5, 5), (2, 2), reduction="none")
        loss.sum().backward()
    assert loss.isnan().tolist() == [True, False]
    assert x.grad.isnan().any(2).any(0).tolist() == [True, False]


def test_deterministic_algorithms_change_nothing():
    grads = []
    for flag in (False, True):
        x = X.clone().requires_grad_()
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(flag)
        try:
            with fastnn.backend("triton"):
                F.ctc_loss(x, Y, given(5, 5)(None, "cpu"), given(2, 1)(None, "cpu")).backward()
        finally:
            torch.use_deterministic_algorithms(before)
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_auto_runs_kernels_where_stock_raises(simulate):
    """The settings of the tests allow only deterministic algorithms."""
    simulate("sm_90")
    for allowed in (True, False):
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(not allowed)
        try:
            with decisions() as told:
                F.ctc_loss(X.detach().requires_grad_(), Y, (5, 5), (2, 1))
        finally:
            torch.use_deterministic_algorithms(before)
        assert [d.why is None for d in told] == [not allowed]


def test_lengths_may_be_on_the_cpu(monkeypatch):
    """Kernels take tensors of a GPU. Of the arguments only the lengths may be elsewhere."""
    monkeypatch.setattr(_op, "kernel_devices", {"meta"})
    op = F.ctc_loss.op
    x, y, n = X.to("meta"), Y.to("meta"), given(5, 5)(None, "cpu")
    assert _op.survey(op, (x, y, n), {"target_lengths": n}) is x
    assert "is on cpu" in _op.survey(op, (x, Y, n, n), {}).why
    assert "is on cpu" in _op.survey(op, (X, y, n, n), {}).why


def test_a_recogniser_learns_as_with_stock():
    """Digits, drawn as noisy one-hot frames that are repeated, are read by a linear layer."""
    curves = []
    for nn, mode in ((torch.nn, "auto"), (fastnn, "triton")):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 5)
        optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
        loss_of = nn.CTCLoss()
        losses = []
        for _ in range(6):
            y = torch.randint(1, 5, (3, 3))
            frames = torch.nn.functional.one_hot(y.repeat_interleave(3, 1), 5).float()
            frames = frames + 0.1 * torch.randn(frames.shape)
            with fastnn.backend(mode):
                logits = model(frames).log_softmax(-1).transpose(0, 1)
                loss = loss_of(logits, y, (9, 9, 9), (3, 3, 3))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[1][-1] < 0.8 * curves[1][0]
