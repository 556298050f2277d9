"""GLU: every dimension, halves that lie together or apart, special values."""

from fastnn.testing import Case, randn, values
from fastnn.testing.cases.activation import channels_last

CASES: list[Case] = [
    *(
        Case("GLU", (x,), options, view=view)
        for x, options, view in (
            (randn(5, 34, scale=4.0), {}, None),
            (randn(2, 4098), {}, None),
            (randn(4, 6, 5), {"dim": 0}, None),
            (randn(3, 6, 5), {"dim": 1}, None),
            (randn(3, 2), {}, None),
            (randn(8), {"dim": 0}, None),
            (randn(0, 4), {}, None),
            (randn(4, 0), {}, None),
            (randn(2, 6, 4, 4), {"dim": 1}, channels_last),
            (randn(2, 6, 4, 4), {"dim": 2}, channels_last),
            (randn(6, 4), {}, lambda x: x.t()),
            (randn(5, 40), {}, lambda x: x[:, 3:17]),
            (randn(5, 40), {}, lambda x: x[:, ::2]),
            (randn(3, 4, 5), {"dim": 1}, lambda x: x[:, ::2]),  # halves that lie apart
            (randn(5, 1), {}, lambda x: x.expand(5, 8)),
            (randn(1, 6, 1), {"dim": 1}, None),
        )
    ),
    Case("GLU", (values(1.0, 2.0, float("nan"), 3.0, 9.0, float("inf"), -float("inf"), 1.0,
                        -90.0, 90.0),), {"dim": 0}),
]  # fmt: skip
