"""Where a test runs: kernels take CPU tensors in Triton's interpreter alone.

A test that launches kernels, or forces calls onto them, does so on the fixture `device`, makes all
its tensors there by `on_device`, or is marked `interpreted`; conftest.py holds it to that.
"""

import pytest
from triton import knobs

interpreted = pytest.mark.skipif(
    not knobs.runtime.interpret, reason="kernels are compiled in this process"
)
on_device = pytest.mark.usefixtures("on_device")
