"""Each number that an op takes, at values that are infinite, nan, zero, negative, huge or tiny.

docs/scalars.md lists the numbers. Calls that the parity rows make are made again with such a value:
results, gradients and errors are those of stock.
"""

import itertools
import math
from collections import Counter

import pytest
import torch

from tests.calls import Call, differences, recorded
from tests.marks import interpreted
from tests.test_scalars import TABLE

UNUSUAL = (
    math.nan,
    math.inf,
    -math.inf,
    0.0,
    -1.0,
    1e300,
    2.5e-39,
)  # the last is a subnormal number
ROWS = 2  # recorded calls of an op that get each of these numbers, in turn of all its calls
# (ops, numbers, words of the difference) that stay: see docs/scalars.md.
STAYS = [
    ("hardshrink hardtanh", (math.nan,), "grad of input"),
    ("elu celu", (math.nan, math.inf, -math.inf), "nan in other places"),
    ("elu", (math.nan, math.inf, -math.inf), "memory of input: written"),  # nan, in place
    ("celu", (math.nan, math.inf, -math.inf), "memory of input: written"),
    ("batch_norm_act", (math.nan,), "grad of bias: finite where stock is not"),
]


def _stays(op: str, value: float, told: str) -> bool:
    return any(
        op in ops.split() and any(str(value) == str(n) for n in numbers) and words in told
        for ops, numbers, words in STAYS
    )


def _calls_with(op: str, number: str, turn: int) -> list[Call]:
    """Some recorded calls of the op, which are given the number by its name."""
    calls = [c for c in recorded().get(op, []) if sum(t.numel() for t in c.tensors().values()) >= 8]
    # a number as the gaussian loss takes one instead of a tensor
    calls = [c for c in calls if not isinstance(c.arguments.get(number), torch.Tensor)]
    return [calls[(turn + i) % len(calls)] for i in range(min(ROWS, len(calls)))]


@interpreted
@pytest.mark.parametrize("op", sorted({op for op, _ in TABLE}))
def test_unusual_numbers_end_as_in_stock(op, record_property):
    """Values, gradients and errors are those of stock for each number of the page."""
    counts: Counter[str] = Counter()
    wrong = []
    numbers = [number for of, number in TABLE if of == op]
    for turn, (number, value) in enumerate(itertools.product(numbers, UNUSUAL)):
        for call in _calls_with(op, number, turn):
            path, found = differences(call.with_(**{number: value}), {})
            counts[path if path in ("kernel", "error") else "stock"] += 1
            known = [w for w in found if _stays(op, value, w)]
            counts["differ as docs say"] += bool(known)
            wrong += [f"{number}={value}: {w} [{call.row}]" for w in found if w not in known]
    record_property("scalars", [item for item in counts.items() if item[1]])
    assert counts
    assert not wrong, "\n".join(wrong)
