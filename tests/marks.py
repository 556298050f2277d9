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
