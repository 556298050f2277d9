"""Layer norm and RMS norm: row widths around the tile sizes, shapes, statistics, special values."""

import torch

from fastnn.testing import Case, randn, values

F32 = (torch.float32,)
WIDE = {"normalized_shape": 17000}

CASES: list[Case] = [
    *(
        Case(name, (randn(*shape),), {"normalized_shape": shape[dims:], **options})
        for name in ("LayerNorm", "RMSNorm")
        for shape, dims, options in (
            ((7, 768), 1, {}),
            ((130, 33), 1, {}),  # several rows in a tile, several tiles in a program
            ((3, 1025), 1, {}),
            ((4, 3, 5, 8), 2, {}),
            ((5, 1), 1, {}),
            ((6,), 0, {}),
            ((1, 1), 1, {}),
            ((2, 8), 1, {"elementwise_affine": False}),
            ((2, 8), 1, {"eps": 0.1}),
        )
    ),
    Case("LayerNorm", (randn(0, 4),), {"normalized_shape": 4}),
    Case("LayerNorm", (randn(3, 0),), {"normalized_shape": 0}),
    Case("RMSNorm", (randn(0, 4),), {"normalized_shape": 4}, stock="empty"),
    Case("LayerNorm", (randn(9, 40),), {"normalized_shape": 40, "bias": False}),
    # Beyond the widest row that is kept in registers, backward, then forward too.
    Case("LayerNorm", (randn(3, 8200),), {"normalized_shape": 8200}),
    Case("RMSNorm", (randn(3, 8200),), {"normalized_shape": 8200}, dtypes=F32),
    Case("LayerNorm", (randn(2, 17000),), WIDE),
    Case("RMSNorm", (randn(2, 17000),), WIDE, dtypes=F32),
    # If |mean| >> std, the formula E[x^2] - E[x]^2 loses all digits.
    Case("LayerNorm", (randn(4, 300, shift=1e3),), {"normalized_shape": 300}),
    Case("LayerNorm", (randn(1, 17000, shift=1e3),), WIDE, dtypes=F32),
    Case("LayerNorm", (randn(4, 32, scale=1e-4),), {"normalized_shape": 32}),
    Case("RMSNorm", (randn(4, 32, scale=1e-4),), {"normalized_shape": 32}),
    Case("LayerNorm", (values(3.0, 3.0, 3.0, 3.0),), {"normalized_shape": 4}),
    *(
        Case(name, (values(1.0, -2.0, bad, 0.5),), {"normalized_shape": 4})
        for name in ("LayerNorm", "RMSNorm")
        for bad in (float("nan"), float("inf"), -float("inf"))
    ),
    # Views: rows apart, expanded, columns apart.
    Case("LayerNorm", (randn(5, 48),), {"normalized_shape": 24}, view=lambda x: x[:, 8:32]),
    Case(
        "LayerNorm", (randn(5, 1, 24),), {"normalized_shape": 24}, view=lambda x: x.expand(5, 3, 24)
    ),
    Case(
        "RMSNorm",
        (randn(24, 5),),
        {"normalized_shape": 24},
        view=lambda x: x.t(),
        stock="layout" if torch.__version__ < "2.11" else None,
    ),
    Case(
        "LayerNorm",
        (randn(2, 3, 4, 5),),
        {"normalized_shape": (4, 5)},
        view=lambda x: x.to(memory_format=torch.channels_last),
    ),
    # Only some inputs require a gradient.
    *(
        Case(
            "layer_norm",
            (randn(40, 9, grad=x), (9,), randn(9, grad=w), randn(9, grad=b)),
        )
        for x, w, b in (
            (False, True, True),
            (False, False, True),
            (True, False, False),
            (True, True, False),
            (True, False, True),
        )
    ),
    Case("layer_norm", (randn(3, 9), (9,), None, randn(9))),
    Case("layer_norm", (randn(600, 70, grad=False), (70,), randn(70), randn(70)), dtypes=F32),
    Case("rms_norm", (randn(3, 9, grad=False), [9], randn(9)), {"eps": 1e-3}),
    # Declined.
    Case(
        "RMSNorm",
        (randn(2, 3, 4, 5),),
        {"normalized_shape": 5},
        view=lambda x: x.to(memory_format=torch.channels_last),
        stock="layout",
    ),
    Case(
        "LayerNorm",
        (randn(3, 4),),
        {"normalized_shape": 4},
        dtypes=(torch.float64,),
        stock="dtype",
    ),
]
