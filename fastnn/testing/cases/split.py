"""Parts of the last dimension: layouts of their gradients, rows of heads, stock calls."""

from fastnn.testing import Case, randn


def case(shape, parts, heads=None, bias=True, stock=None):
    inputs = randn(*shape), randn(shape[-1]) if bias else None, parts, heads
    return Case("split_features", inputs, stock=stock)


CASES: list[Case] = [
    case((5, 6), 2),
    case((1, 3), 3),
    case((6,), 3),
    case((130, 3 * 129), 3),  # one past a block of columns, and several programs of rows
    case((2, 70, 24), 3, 2),
    case((2, 3, 5, 16), 2, 4),
    case((3, 7, 30), 3, 5),  # heads of two elements
    case((70, 24), 3, bias=False),
    Case("split_features", (randn(70, 24, grad=False), randn(24), 3, 2)),
    Case("split_features", (randn(70, 24), randn(24, grad=False), 3, 2)),
    # Calls that run stock.
    case((4, 8), 4, stock="option"),
    case((0, 6), 2, stock="empty"),
    case((4, 7), 2, bias=False, stock="shape"),
    Case("split_features", (randn(4, 6), randn(2, 3), 2), stock="shape"),
    Case("split_features", (randn(6, 4), None, 2), view=lambda t: t.t(), stock="layout"),
]
