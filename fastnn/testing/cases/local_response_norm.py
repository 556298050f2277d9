"""Local response norm: windows, edges of the channels, exponents, special values."""

import torch

from fastnn.testing import Case, randn, values

F32 = (torch.float32,)
BF16 = (torch.bfloat16,)

CASES: list[Case] = [
    Case("LocalResponseNorm", (randn(2, 5, 7),), {"size": 3}),
    Case(
        "LocalResponseNorm",
        (randn(2, 7, 4, 4),),
        {"size": 2, "alpha": 0.5, "beta": 0.6},
        dtypes=F32,
    ),
    Case("LocalResponseNorm", (randn(1, 3, 2, 3, 2),), {"size": 1, "alpha": 1.0}, dtypes=F32),
    Case("LocalResponseNorm", (randn(1, 4, 6),), {"size": 8, "alpha": 2.0}),  # wider than C
    Case("LocalResponseNorm", (randn(1, 9, 3),), {"size": 7, "k": 2.0}, dtypes=F32),
    Case("local_response_norm", (randn(1, 41, 3), 1, 0.1), dtypes=BF16),  # in chunks
    Case("local_response_norm", (randn(1, 120, 1), 3, 1.0), dtypes=F32),
    Case("local_response_norm", (randn(1, 3, 1040), 4, 0.1), dtypes=F32),
    Case("local_response_norm", (randn(2, 4, 5), 3, 1, 1, 1)),
    Case("local_response_norm", (randn(2, 4, 5), 3, 1e-2, 2.0, 0.5), dtypes=F32),
    Case("local_response_norm", (randn(2, 4, 5, scale=1e3), 3)),
    Case("local_response_norm", (randn(2, 4, 5), 3), autocast=torch.bfloat16),
    Case("local_response_norm", (randn(2, 4, 5, 1), 3), autocast=torch.bfloat16),
    Case(
        "local_response_norm",
        (values(1.0, 2.0, float("nan"), 3.0, 1.0, 2.0, float("inf"), 0.0), 3),
        view=lambda x: x.view(1, 8, 1),
    ),
    Case("local_response_norm", (randn(1, 2, 3), 9), stock="size"),
    Case("local_response_norm", (randn(0, 2, 3), 3), stock="empty"),
    Case("local_response_norm", (randn(1, 2, 3), 3), dtypes=(torch.float64,), stock="dtype"),
    Case(
        "local_response_norm",
        (randn(1, 2, 3, 4), 3),
        view=lambda x: x.to(memory_format=torch.channels_last),
        stock="layout",
    ),
]
