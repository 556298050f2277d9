"""Gated units: every dimension and layout, every activation, special values."""

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
    *(
        Case("act_mul", (randn(3, 7, scale=3.0), randn(3, 7)), {"activation": name, "a": a, "b": b})
        for name, a, b in (
            ("relu", 0.0, 0.0), ("leaky_relu", 0.1, 0.0), ("elu", 0.7, 1.0), ("selu", 0.0, 0.0),
            ("gelu", 0.0, 0.0), ("gelu_tanh", 0.0, 0.0), ("silu", 0.0, 0.0), ("mish", 0.0, 0.0),
            ("sigmoid", 0.0, 0.0), ("tanh", 0.0, 0.0), ("hardtanh", -0.5, 0.25),
            ("hardsigmoid", 0.0, 0.0), ("hardswish", 0.0, 0.0),
        )
    ),
    *(
        Case("act_mul", (randn(*shape), randn(*shape)))
        for shape in ((1025,), (2, 1024), (1,), (), (0, 4), (3, 1, 5))
    ),
    Case("act_mul", (randn(2, 3, 4, 5), randn(2, 3, 4, 5, grad=False))),
    *(  # with the gradient of a bias that the halves contain
        Case("act_glu", (randn(*shape),), options | {"input_bias": randn(shape[-1])})
        for shape, options in (
            ((5, 34), {"activation": "gelu"}),
            ((2, 70, 6), {"first": True}),  # several programs of rows
            ((3, 258), {"activation": "hardtanh", "a": 1.0, "b": 2.0}),  # f(0) is not 0
            ((1, 2), {"activation": "sigmoid", "first": True}),
        )
    ),
    *(
        Case("act_glu", (randn(5, 34),), {"activation": name, "a": a, "b": b, "first": first})
        for name, a, b, first in (
            ("leaky_relu", 0.1, 0.0, True), ("elu", 0.7, 1.0, False), ("gelu", 0.0, 0.0, False),
            ("gelu_tanh", 0.0, 0.0, True), ("silu", 0.0, 0.0, True), ("sigmoid", 0.0, 0.0, False),
        )
    ),
    Case("act_glu", (randn(40, 6, grad=False),), {"input_bias": randn(6)}),
    Case("act_glu", (randn(40, 6),), {"input_bias": randn(6, grad=False)}),
    Case("act_glu", (randn(6, 4),), {"dim": 0, "input_bias": randn(4)}, stock="shape"),
    Case("act_glu", (randn(4, 6),), {"input_bias": randn(4)}, view=lambda t: t.t(), stock="layout"),
    Case("act_glu", (randn(0, 4), -1, "silu", 0.0, 0.0, False, randn(4)), stock="empty"),
    *(
        Case("act_glu", (x,), options, view=view)
        for x, options, view in (
            (randn(2, 1030), {}, None),
            (randn(4, 6, 5), {"dim": 0, "first": True}, None),
            (randn(3, 6, 5), {"dim": 1}, None),
            (randn(8), {"dim": 0}, None),
            (randn(0, 4), {}, None),
            (randn(2, 6, 4, 4), {"dim": 1}, channels_last),
            (randn(5, 40), {"first": True}, lambda x: x[:, 3:17]),
            (randn(5, 1), {}, lambda x: x.expand(5, 8)),
        )
    ),
    # Calls that run stock.
    Case("act_mul", (randn(4, 5), randn(5)), stock="dtype"),
    Case("act_mul", (randn(4, 5, grad=False), randn(4, 5))),
    Case("act_mul", (randn(4, 3), randn(3, 4)), view=lambda x: x.t(), stock="layout"),
    Case("act_mul", (values(1.0, float("nan"), float("inf"), -float("inf"), -90.0, 90.0, 0.0),
                     values(2.0, 1.0, 3.0, 1.0, 4.0, -1.0, float("nan")))),
]  # fmt: skip
