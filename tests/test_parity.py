"""The rows: ours against stock and float64, forward and backward, forced onto kernels."""

import pytest

from fastnn.testing import assert_parity, count
from fastnn.testing.cases import CASES


@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(c, d, id=f"{c}-{d}".replace("torch.", "")) for c in CASES for d in c.dtypes],
)
def test_parity(case, dtype, device):
    assert_parity(case, dtype, device)
    if device == "cpu" and case.stock is None and dtype is case.dtypes[-1]:
        count(case, dtype)  # which raises where a lane reads or writes out of bounds
