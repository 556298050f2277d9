"""Softmax family: row lengths around the tile sizes, every dim, dtypes, special values."""

import torch

from fastnn.testing import FLOATS, Case, randn, values

F32 = (torch.float32,)
BF16 = (torch.bfloat16,)
INF, NAN = float("inf"), float("nan")

CASES: list[Case] = [
    *(
        Case(name, (randn(*shape),), {"dim": dim})
        for name in ("Softmax", "LogSoftmax", "Softmin")
        for shape, dim in (
            ((7, 768), 1),
            ((37, 33), -1),  # several rows in a tile
            ((2, 1025), 1),
            ((3, 70, 5), 1),  # columns
            ((4, 3, 2, 9), 0),
            ((5, 1), 1),
            ((5, 1, 4), 1),
            ((4, 1), 0),
            ((0, 3), 1),
            ((3, 0), 1),
            ((0, 3), 0),
            ((), 0),
        )
    ),
    Case("Softmax2d", (randn(2, 19, 3, 5),)),
    Case("Softmax2d", (randn(4, 3, 3),)),
    Case("softmax", (randn(6), 0)),
    Case("log_softmax", (randn(6), -1)),
    Case("softmin", (randn(3, 600, 40),), {"dim": 1}, dtypes=F32),  # longer than a tile's columns
    Case("log_softmax", (randn(600, 3),), {"dim": 0}),
    Case("softmax", (randn(1, 17000, scale=4), 1)),  # longer than registers
    Case("log_softmax", (randn(2, 17000), 1), dtypes=BF16),
    # The kernel casts by itself, to wider and to narrower dtypes.
    *(
        Case(name, (randn(5, 40),), {"dim": 1, "dtype": dtype})
        for name in ("softmax", "log_softmax", "softmin")
        for dtype in FLOATS
    ),
    Case("softmax", (randn(5, 40, 3),), {"dim": 1, "dtype": torch.float32}),
    *(
        Case(name, (values(*row),), {"dim": 0})
        for name in ("softmax", "log_softmax", "softmin")
        for row in (
            (1.0, NAN, 2.0),
            (1.0, INF, 2.0),
            (1.0, -INF, 2.0),
            (-INF, -INF, -INF),
            (INF, INF, INF),
            (1e4, -1e4, 1.0, 1e4),
            (NAN, NAN),
        )
    ),
    Case("softmax", (randn(9, 48), 1), view=lambda x: x[:, 8:32]),
    Case("log_softmax", (randn(9, 48), 1), view=lambda x: x.t()),
    Case("softmax", (randn(9, 1, 8), 2), view=lambda x: x.expand(9, 3, 8)),
    Case("Softmax2d", (randn(2, 8, 3, 4),), view=lambda x: x.to(memory_format=torch.channels_last)),
    Case("softmax", (randn(3, 4), 1, 3, torch.float64), dtypes=F32, stock="dtype"),
    Case("softmax", (randn(3, 4), 1), dtypes=(torch.float64,), stock="dtype"),
    # Gumbel noise, which PyTorch draws
    Case("gumbel_softmax", (randn(7, 70),)),
    Case("gumbel_softmax", (randn(3, 5, 4),), {"tau": 0.5, "dim": 1}),
    Case("gumbel_softmax", (randn(6),), {"tau": 2, "hard": True}),
    Case("gumbel_softmax", (randn(4, 9),), {"hard": True}, view=lambda x: x.t()),
    Case("gumbel_softmax", (randn(2, 1025),), {"tau": -1.5}, dtypes=BF16),
    Case("gumbel_softmax", (randn(),), dtypes=F32),
    Case("gumbel_softmax", (randn(0, 3),), stock="empty"),
    Case("gumbel_softmax", (randn(2, 3),), {"tau": 0}, stock="option", dtypes=F32),
    Case("gumbel_softmax", (randn(2, 3),), autocast=torch.bfloat16, stock="autocast", dtypes=F32),
]
