"""Whose estimates `auto` follows: architectures that kernels were compiled for, by a new Triton."""

import math

import pytest
import torch
import triton

import fastnn
import fastnn.functional as F
from fastnn import _op
from fastnn.kernels import _gpus
from fastnn.testing.aot import TARGETS

COMPILED = {gpu.name: gpu.compiled_from for gpu in _gpus.GPUS.values() if gpu.compiled_from}


@pytest.fixture(autouse=True)
def asked_anew():
    _op._crossover.cache_clear()
    yield
    _op._crossover.cache_clear()


def test_every_architecture_of_the_list_can_be_compiled_for():
    assert set(COMPILED) <= {target.architecture for target in TARGETS.values()}


@pytest.mark.parametrize("architecture", ["sm_75", "sm_999", "gfx1100"])
def test_stock_where_kernels_were_not_compiled(architecture, monkeypatch, device):
    monkeypatch.setattr(_op, "architecture", lambda index: architecture)
    x = torch.randn(8, 4, device=device)
    with fastnn.backend("auto"), fastnn.decisions() as heard:
        F.soft_margin_loss(x.expand(2**16, 8, 4), torch.ones_like(x))
    assert f"kernels were not compiled for {architecture}" in heard[0].why


@pytest.mark.parametrize("architecture", COMPILED)
def test_stock_where_triton_is_too_old(architecture, monkeypatch):
    at_least = COMPILED[architecture]
    monkeypatch.setattr(triton, "__version__", f"{at_least}.0")
    assert _op._crossover("layer_norm", architecture)[0] < math.inf
    _op._crossover.cache_clear()
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    why = f"on {architecture} kernels need triton {at_least}"
    assert _op._crossover("layer_norm", architecture) == (math.inf, why)


def test_what_was_measured_counts_everywhere(monkeypatch):
    measured = {"source": "measured", "least": {"relu": 7, "gelu": None}}
    monkeypatch.setattr(_op, "_crossovers", lambda: {"sm_999": measured})
    assert _op._crossover("relu", "sm_999") == (7, "measured")
    assert _op._crossover("gelu", "sm_999") == (math.inf, "measured")
    assert "sm_999" in _op._crossover("silu", "sm_999")[1]
