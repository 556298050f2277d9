"""The rows: ours against stock and float64, forward and backward, forced onto kernels.

Where kernels are interpreted, each row runs twice in one of its dtypes, for equal bits: the dtypes
take turns. `fastnn parity` runs each row twice in all of them.
"""

import math

import pytest
import torch

from fastnn.testing import assert_parity, compare_tensors, count
from fastnn.testing.cases import CASES


@pytest.mark.parametrize(
    ("case", "dtype", "turn"),
    [
        pytest.param(c, d, i % len(c.dtypes) == n, id=f"{c}-{d}".replace("torch.", ""))
        for i, c in enumerate(CASES)
        for n, d in enumerate(c.dtypes)
    ],
)
def test_parity(case, dtype, turn, device, record_property):
    twice = turn or device != "cpu"
    record_property("bits", [("in two runs, for equal bits" if twice else "in one run", 1)])
    result = assert_parity(case, dtype, device, twice=twice)
    if result.draws > 1:
        record_property("draws", (f"{case} {dtype}", result.draws))
    if result.path == "kernel":
        ratios = [min(c.ratio, 1e9) for c in result.comparisons if c.elements]
        record_property("ratios", (case.name, ratios))
    if device == "cpu" and case.stock is None and dtype is case.dtypes[-1]:
        # Raises if a lane reads or writes out of bounds.
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
    _, said = compare_tensors("output", *half, torch.tensor([exact, 1.0], dtype=torch.float64))
    assert (said is None) == right


def test_a_row_beyond_its_bound_is_judged_by_several_draws(monkeypatch):
    """The largest errors over the draws count. Bad luck passes; twice the error of stock fails."""
    from fastnn import testing

    def judged(ours, stock, failure=None):
        """(failures, number of draws), given the errors of each draw in ulps."""
        asked = []

        def one(case, dtype, device, mode, draw, twice):
            asked.append(draw)
            a, b = ours[draw % len(ours)] * 1e-7, stock[draw % len(stock)] * 1e-7
            found = testing.Comparison("output", a, b, 2 * b + 1e-7)
            return testing.Result("kernel", None, [found], [failure] if failure and draw else [])

        monkeypatch.setattr(testing, "check_draw", one)
        result = testing.check(CASES[0], torch.float32)
        assert len(result.comparisons) == 1
        return result.failures, len(asked)

    assert judged([3.0], [1.0]) == ([], 1)
    assert judged([3.0, 2.0], [0.5, 1.0, 2.0]) == ([], 5)
    assert judged([6.0], [*[1.0] * 20, 3.0]) == ([], 25)  # one of many draws is hard
    failures, draws = judged([6.0], [2.0, 1.0])
    assert draws == 25 and "output: 6e-07 from float64, bound 5e-07" in failures[0]
    failures, draws = judged([3.0, 1.0], [0.5, 1.0], "differs")
    assert draws == 5 and set(failures) >= {"differs"}
