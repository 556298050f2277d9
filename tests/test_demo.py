"""The demo passes on this machine, and fails if one side is broken on purpose."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import fastnn
from fastnn import _mode
from fastnn.__main__ import main
from fastnn._cli import demo, training
from tests.marks import interpreted

TINY = replace(training.CPU_QUICK, steps=6)
KERNELS = replace(training.INTERPRETED_QUICK, steps=4)
CPU = torch.device("cpu")


def _compare(size, ours, mode="torch", out=None):
    return training.compare(size, mode=mode, device=CPU, seed=0, title="", ours=ours, out=out)


def _with(**layers):
    """torch.nn with some of its layers replaced."""
    return SimpleNamespace(**{**vars(torch.nn), **layers})


class TanhGELU(torch.nn.GELU):
    def __init__(self):
        super().__init__(approximate="tanh")


class NearbyNorm(torch.nn.LayerNorm):
    def __init__(self, width):
        super().__init__(width, eps=1.1e-5)


class ExtraBuffer(torch.nn.LayerNorm):
    def __init__(self, width):
        super().__init__(width)
        self.register_buffer("extra", torch.zeros(1))


class SavesMore(torch.nn.LayerNorm):
    """Trains and loads as in stock, but stock cannot load what it saves."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "extra"] = torch.zeros(1)


class LosesBias(torch.nn.LayerNorm):
    """Accepts a bias and leaves it at 0. The start of training does not show it, because the bias
    starts at 0."""

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self.bias.data.zero_()


def test_quick_demo(tmp_path):
    drop = ("TRITON_INTERPRET", "FASTNN_BACKEND")
    environment = {k: v for k, v in os.environ.items() if k not in drop}
    done = subprocess.run(
        [sys.executable, "-m", "fastnn", "demo", "--quick", "--out", str(tmp_path)],
        env={**environment, "OMP_NUM_THREADS": "1"},  # the other test workers have the cores
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"demo.png", "demo.json", "stock.pt", "fastnn.pt"}
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"

    report = json.loads((tmp_path / "demo.json").read_text())
    full, kernels = report["comparisons"]
    assert report["passed"] and full["passed"] and kernels["passed"]
    for run in (full, kernels):
        assert run["loss_verdict"]["coincide"] and run["gradient_verdict"]["coincide"]
        for losses in run["losses"].values():
            assert min(losses[-3:]) < losses[0] - 0.5  # the loss of one batch of text is noisy
        assert run["step_ms"]["stock"] > 0 and run["step_bytes"]["stock"] > 0
    assert len(full["moves"]) == 2
    if not torch.cuda.is_available():
        assert full["losses"]["fastnn"] == full["losses"]["stock"]
        assert full["samples"]["fastnn"] == full["samples"]["stock"]
        assert all(row["path"] == "stock" for row in full["layers"])
    assert kernels["layers"] and all(row["path"] == "kernel" for row in kernels["layers"])


def test_stock_beside_stock_has_equal_bits(tmp_path):
    result = _compare(replace(TINY, dropout=0.2), fastnn, out=tmp_path)
    assert result.passed and result.largest_difference == 0
    assert result.step_bytes["stock"] == result.step_bytes["fastnn"] > 0


@pytest.mark.parametrize("layers", [{"GELU": TanhGELU}, {"LayerNorm": NearbyNorm}])
def test_a_wrong_layer_parts_the_curves(layers):
    assert not _compare(TINY, _with(**layers)).passed


@interpreted
@pytest.mark.parametrize(
    ("layers", "coincide"),
    [({}, True), ({"GELU": TanhGELU}, False), ({"LayerNorm": NearbyNorm}, False)],
)
def test_a_wrong_layer_is_beyond_rounding(layers, coincide):
    """The criterion for kernels tells other rounding from another formula, even from a near one."""
    result = _compare(KERNELS, SimpleNamespace(**{**_ours(), **layers}), mode="triton")
    assert result.coincide is coincide, (result.loss_verdict, result.gradient_verdict)


@interpreted
def test_a_model_of_encoder_layers_trains_to_the_same_curve():
    result = _compare(replace(KERNELS, encoder=True), fastnn, mode="triton")
    assert result.coincide, (result.loss_verdict, result.gradient_verdict)
    names = {row["op"] for row in result.layers if row["path"] == "kernel"}
    assert {"dropout_add_layer_norm", "multi_head_attention_forward", "linear_act"} <= names


@interpreted
def test_a_gradient_that_adamw_hides():
    """A gradient with a wrong constant factor trains the same model. Only its norm differs."""

    class ScaledGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, dx):
            return dx * 1.001

    class Norm(fastnn.LayerNorm):
        def forward(self, x):
            weight = ScaledGradient.apply(self.weight)
            return fastnn.functional.layer_norm(x, (x.shape[-1],), weight, self.bias, self.eps)

    result = _compare(KERNELS, SimpleNamespace(**{**_ours(), "LayerNorm": Norm}), mode="triton")
    assert result.loss_verdict.coincide
    assert not result.gradient_verdict.coincide and not result.passed


def _ours():
    return {
        name: getattr(fastnn, name) for name in (*vars(torch.nn), "functional") if name[0] != "_"
    }


def test_kernels_and_dropout_are_not_compared():
    with pytest.raises(ValueError, match="dropout must be 0"):
        _compare(TINY, fastnn, mode="triton")


@pytest.mark.parametrize(
    ("layer", "moved", "word"),
    [(SavesMore, [True, False], "extra"), (LosesBias, [False, True], "logits differ by")],
)
def test_a_checkpoint_that_does_not_move(layer, moved, word, tmp_path):
    result = _compare(TINY, _with(LayerNorm=layer), out=tmp_path)
    assert result.coincide and not result.passed
    assert [m.moved for m in result.moves] == moved
    assert word in result.moves[moved.index(False)].finding


def test_weights_that_cannot_be_shared():
    with pytest.raises(training.DemoError, match="extra"):
        _compare(TINY, _with(LayerNorm=ExtraBuffer))


def test_a_broken_layer_makes_the_command_fail(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fastnn, "GELU", TanhGELU)
    monkeypatch.setattr(_mode, "HAS_TRITON", False)  # no second run, because the first is tested
    argv = ["demo", "--quick", "--steps", "4", "--out", str(tmp_path)]
    assert main(argv) == 1
    printed = capsys.readouterr().out
    assert "FAIL" in printed and "not run: triton is not installed" in printed
    assert json.loads((tmp_path / "demo.json").read_text())["passed"] is False
    monkeypatch.undo()
    monkeypatch.setattr(_mode, "HAS_TRITON", False)
    assert main(argv) == 0


def test_a_worker_that_fails_is_one_sentence():
    broken = replace(training.INTERPRETED_QUICK, heads=3)
    with pytest.raises(training.DemoError, match=r"interpreted kernels failed: .*Error"):
        training.compare_interpreted(broken, 0, lambda step, losses: None)


def test_missing_text_is_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 2
    assert "pydoc_data.topics, which this Python lacks" in capsys.readouterr().err


def _bits(stock, ours):
    return training.judge_bits({"stock": stock, "fastnn": ours})


def test_bits():
    assert _bits([1.0, 2.0], [1.0, 2.0]).coincide
    apart = _bits([1.0, 2.0, 3.0], [1.0, 2.0000002, 3.0])
    assert not apart.coincide and "first at step 1" in apart.finding
    nan = float("nan")
    assert not _bits([1.0, nan], [1.0, nan]).coincide


def test_rounding():
    exact = [5.0, 4.0, 3.0, 2.0]
    stock = [5.0, 4.0 + 1e-6, 3.0, 2.0]
    twin = [5.0, 4.0, 3.0 - 4e-6, 2.0]

    def judge(ours):
        curves = {"stock": stock, "fastnn": ours, "float64": exact, "twin 1": twin}
        return training.judge_rounding(curves).coincide

    assert judge(exact) and judge(stock) and judge(twin)
    assert judge([5.0, 4.0, 3.0, 2.0 + 7.9e-6])  # the twin reached it at an earlier step
    assert not judge([5.0, 4.0, 3.0, 2.0 + 9e-6])
    assert not judge([5.0, 4.0 + 4e-6, 3.0, 2.0])  # too early: the envelope only grows at step 2
    assert not judge([5.0, 4.0, float("nan"), 2.0])


def test_sides_start_equal_and_see_equal_batches():
    torch.manual_seed(0)
    stock = training.build(torch.nn, TINY)
    ours = training.build(fastnn, TINY)
    assert isinstance(ours.norm, fastnn.LayerNorm)
    assert ours.load_state_dict(stock.state_dict(), strict=True)
    text, held_out = training.text()
    assert len(text) > 8 * len(held_out) > 100_000
    first = next(training.batches(text, TINY, 3, CPU))
    again = next(training.batches(text, TINY, 3, CPU))
    other = next(training.batches(text, TINY, 4, CPU))
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], other[0])
    assert torch.equal(first[0][:, 1:], first[1][:, :-1])


def test_peak_memory_counts_what_is_alive_at_once():
    n = 2**20

    def run():
        a = torch.zeros(n)
        b = a + 1  # a and b alive
        del a
        return b * 2  # b and the result alive

    _, peak = training.peak_memory(run, CPU)
    assert 0 <= peak - 2 * 4 * n < 100  # the scalars 1 and 2 are tensors for a moment


def test_repeated_layers_are_shown_once():
    rows = [
        {"layer": f"blocks.{i}.mlp.1", "op": "gelu", "path": "kernel", "reason": None}
        for i in range(3)
    ]
    assert demo.grouped(rows) == [("blocks.*.mlp.*  (x3)", "gelu", "kernel", "")]
