"""The rows: ours against stock and float64, forward and backward, forced onto kernels."""

import math

import pytest
import torch

from fastnn.testing import _compare, assert_parity, count
from fastnn.testing.cases import CASES


@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(c, d, id=f"{c}-{d}".replace("torch.", "")) for c in CASES for d in c.dtypes],
)
def test_parity(case, dtype, device):
    assert_parity(case, dtype, device)
    if device == "cpu" and case.stock is None and dtype is case.dtypes[-1]:
        # Raises where a lane reads or writes out of bounds.
        assert count(case, dtype).races == 0


@pytest.mark.parametrize(
    ("ours", "stock", "exact", "right"),
    [
        (math.nan, math.nan, math.nan, True),
        (math.nan, math.nan, 1.0, True),
        (math.nan, 1.0, math.nan, True),
        (math.nan, 1.0, 1.0, False),
        (math.nan, math.inf, 1e9, False),
        (math.inf, math.inf, 1e9, True),
        (math.inf, math.nan, 1e9, True),  # too large for float16
        (-math.inf, math.nan, 1e9, False),
        (math.inf, math.nan, 1.0, False),
        (math.inf, 65504.0, 65530.0, False),
        (1.0, math.nan, 1.0, True),
        (1.0, math.nan, math.inf, False),
        (1.0, 1.0, 1.0, True),
    ],
)
def test_where_nan_and_infinity_may_be(ours, stock, exact, right):
    half = [torch.tensor([v, 1.0], dtype=torch.float16) for v in (ours, stock)]
    _, said = _compare("output", *half, torch.tensor([exact, 1.0], dtype=torch.float64))
    assert (said is None) == right


def test_a_row_beyond_its_bound_is_judged_by_several_draws(monkeypatch):
    """By the largest errors over them: luck is forgiven, twice stock's error is not."""
    from fastnn import testing

    unit = 1e-7
    # Errors of ours and of stock, draw by draw.
    lucky = [(3.0, 0.5), (2.0, 1.0), (1.0, 2.0), (2.0, 1.0), (1.0, 1.0)]
    worse = [(3.0, 0.5), (2.0, 1.0), (6.0, 2.0), (2.0, 1.0), (1.0, 1.0)]
    broken = [(3.0, 0.5), (2.0, 1.0), (1.0, 2.0), (2.0, 1.0), (1.0, 1.0)]
    for draws, failure, said in (
        (lucky, None, None),
        (worse, None, "output: 6e-07"),
        (broken, "differs", "differs"),
    ):
        asked = []

        def one(case, dtype, device, mode, draw, draws=draws, failure=failure, asked=asked):
            asked.append(draw)
            a, b = draws[draw]
            found = testing.Comparison("output", a * unit, b * unit, (2 * b + 1) * unit)
            return testing.Result("kernel", None, [found], [failure] if failure and draw else [])

        monkeypatch.setattr(testing, "_check", one)
        result = testing.check(CASES[0], torch.float32)
        assert asked == [0, 1, 2, 3, 4]
        assert (said is None and not result.failures) or any(said in f for f in result.failures)
        assert len(result.comparisons) == 1
    monkeypatch.setattr(
        testing, "_check",
        lambda *args: testing.Result("kernel", None, [testing.Comparison("output", 1, 1, 3)]),
    )  # fmt: skip
    assert testing.check(CASES[0], torch.float32).failures == []
