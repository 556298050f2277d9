"""Where a test runs: kernels take CPU tensors only in Triton's interpreter.

A test that launches kernels, or forces calls onto them, must say where. It uses the fixture
`device`, or makes all its tensors there by `on_device`, or is marked `interpreted`. conftest.py
enforces that.
"""

import pytest
from triton import knobs

interpreted = pytest.mark.skipif(
    not knobs.runtime.interpret, reason="kernels are compiled in this process"
)
on_device = pytest.mark.usefixtures("on_device")

# Tests run under deterministic algorithms, so that new memory reads as nan. PyTorch then warns of
# some operations of its own: of max_unpool on every device, and of more on CUDA. conftest.py marks
# the tests that run on the device or unpool. Other tests with such a call use the mark. On a CPU,
# PyTorch also warns of the first LSTM of a process that has projections.
stock_may_warn = pytest.mark.filterwarnings(
    "ignore:(.* does not have a deterministic implementation|LSTM with projections):UserWarning"
)
