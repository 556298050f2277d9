"""The table of GPUs: a new architecture is one more row, and no other code has to name it."""

import re
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton

from fastnn import _gate, kernels
from fastnn._cli import parity
from fastnn.kernels import _gpus
from fastnn.ops.linear import matmul_precision
from fastnn.testing.aot import TARGETS
from tests.marks import interpreted

ROOT = Path(__file__).parents[1]
NEW = replace(_gpus.GPUS["sm_89"], name="sm_199", sms=7, compiled_from="3.4")


@pytest.fixture
def one_more_row():
    _gate.crossover.cache_clear()
    with mock.patch.dict(_gpus.GPUS, {NEW.name: NEW}):
        yield
    _gate.crossover.cache_clear()


@pytest.mark.usefixtures("one_more_row")
def test_a_row_is_all_that_a_new_architecture_needs():
    target = TARGETS["cuda:199"]  # of the compile checks
    assert target.facts == NEW and target.gpu.arch == 199 and "cuda:199" in list(TARGETS)
    assert _gate.unproven("sm_199") is None  # the gate
    assert _gate.crossover("layer_norm", "sm_199") == _gate.crossover("layer_norm", "sm_89")
    assert "sm_199" in parity.emulated("sm_199")[0]  # the command line
    with _gpus.simulated("sm_199"):  # launch configurations
        assert _gpus.architecture(0) == kernels._config.here() == "sm_199"
        assert _gpus.multiprocessors(0) == 7
        assert kernels.linear._config(256, 512, 2, "ieee", "sm_199", 7, True, None)


def test_without_its_row_the_gate_stays_shut():
    assert NEW.name not in _gpus.GPUS
    assert "were not compiled for sm_199" in _gate.unproven("sm_199")
    assert "cuda:199" not in TARGETS


@pytest.mark.usefixtures("one_more_row")
def test_the_row_says_from_which_triton_on(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    assert _gate.unproven("sm_199") == "on sm_199 kernels need triton 3.4"


@interpreted
def test_multiprocessors_of_the_simulated_gpu_decide_on_the_launch():
    """A tall matrix product is split among all multiprocessors."""
    grids = []
    stock = kernels.linear._gemm_kernel

    def launch(grid, *args, **meta):
        grids.append(grid)
        return stock(grid, *args, **meta)

    a, b = torch.ones(8192, 16).bfloat16(), torch.ones(8192, 16).bfloat16()
    with mock.patch.object(kernels.linear, "_gemm_kernel", launch):
        for name in ("sm_90", "sm_199"):
            with mock.patch.dict(_gpus.GPUS, {NEW.name: NEW}), _gpus.simulated(name):
                assert torch.equal(
                    kernels.linear.bwd_dw(a, b, "ieee", name), torch.full((16, 16), 8192.0)
                )
    splits = [grid[1] for grid in grids]
    assert splits[0] > splits[1] > 1, splits


def test_simulated_gpus_nest_and_end():
    before = _gpus.architecture(-1), _gpus.multiprocessors(-1)
    with _gpus.simulated("sm_90"):
        with _gpus.simulated("gfx942"):
            assert (_gpus.architecture(3), _gpus.multiprocessors(3)) == ("gfx942", 304)
        assert (_gpus.architecture(-1), _gpus.multiprocessors(-1)) == ("sm_90", 132)
        with pytest.raises(KeyError), _gpus.simulated("sm_80"):
            raise KeyError
        assert _gpus.architecture(-1) == "sm_90"
    assert (_gpus.architecture(-1), _gpus.multiprocessors(-1)) == before


def test_rows_are_consistent():
    for name, gpu in _gpus.GPUS.items():
        assert name == gpu.name
        assert gpu.shared_per_block + gpu.shared_reserved <= gpu.shared_per_sm
        # The largest block has at least 64 registers per thread.
        assert 1024 * 64 <= gpu.registers_per_sm
        assert gpu.warps_per_sm % _gpus.SCHEDULERS == 0
        assert (gpu.backend == "") == (name == "cpu")


def test_an_architecture_without_a_row_is_taken_for_a_small_one():
    for name in ("sm_75", "sm_999", "gfx1100"):
        least = min(gpu.shared_per_block for gpu in _gpus.GPUS.values())
        assert _gpus.facts(name).shared_per_block <= least
        assert _gpus.facts(name).compiled_from is None


# Kernel files in which the compiler needs an exception for an architecture.
EXCEPTIONS = {"attention_config.py", "linear.py", "loss.py"}


def test_kernel_files_name_no_architecture():
    found = {
        path.name
        for path in (ROOT / "kernels").glob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"[\"'](sm_\d+|gfx\w+)[\"']", line) and path.name != "_gpus.py"
    }
    assert found <= EXCEPTIONS


def test_float32_products_are_exact_on_a_gpu_without_tf32():
    """It holds even if torch's setting allows tf32. Triton cannot compile a tf32 product there."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    found = {}
    try:
        for name in _gpus.GPUS:
            with _gpus.simulated(name):
                found[name] = matmul_precision(-1)
    finally:
        torch.set_float32_matmul_precision(before)
    assert {name for name, how in found.items() if how == "ieee"} == {"gfx90a", "gfx950"}
