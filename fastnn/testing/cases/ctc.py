"""CTC: one step and many, lengths that differ, equal labels, losses that are infinite, layouts."""

import torch

from fastnn.testing import Case

F32 = (torch.float32,)


def log_probs(*shape):
    """Maker of log-probabilities of classes (the last dimension); a leaf."""

    def make(dtype, device):
        return torch.randn(shape).log_softmax(-1).to(device, dtype).requires_grad_()

    return make


def labels(*shape, high, blank=0, dtype=torch.int64):
    """Maker of labels below `high` that are not blank. Where `high` is small, some are equal."""

    def make(_, device):
        y = torch.randint(0, high - 1, shape)
        return (y + (y >= blank)).to(device, dtype)

    return make


def given(*values, dtype=torch.int64):
    """Maker of these integers."""
    return lambda _, device: torch.tensor(values, dtype=dtype, device=device)


CASES: list[Case] = [
    *(
        Case(
            "CTCLoss",
            (log_probs(9, 4, 6), labels(4, 4, high=6, dtype=kind), (9, 8, 1, 9), (4, 3, 2, 0)),
            {"reduction": reduction, "zero_infinity": True},
            dtypes=F32,
        )
        for reduction, kind in (("none", torch.int64), ("mean", torch.int64), ("sum", torch.int32))
    ),
    Case("CTCLoss", (log_probs(9, 2, 6), labels(2, 4, high=3), (9, 9), (4, 0)), dtypes=F32),
    Case("CTCLoss", (log_probs(1, 1, 1), labels(1, 1, high=2), (1,), (0,)), dtypes=F32),
    Case("CTCLoss", (log_probs(1, 1, 3), labels(1, 1, high=3), (1,), (1,)), dtypes=F32),
    # several warps, which pass labels on through shared memory
    Case("CTCLoss", (log_probs(136, 1, 200), labels(128, high=200), given(136), given(128)),
         dtypes=F32),
    Case("CTCLoss", (log_probs(40, 1, 5), labels(16, high=3), given(40), given(16)), dtypes=F32),
    Case(
        "CTCLoss",
        (log_probs(12, 4, 1030), labels(9, high=1030, dtype=torch.int32),
         given(12, 7, 12, 0), given(4, 2, 3, 0)),
        {"reduction": "sum"},
        dtypes=F32,
    ),
    Case(
        "CTCLoss",
        (log_probs(2, 7, 5), labels(2, 2, high=5, blank=3), (7, 6), (2, 1)),
        {"blank": 3, "reduction": "none"},
        view=lambda x: x.transpose(0, 1),
        dtypes=F32,
    ),
    Case("ctc_loss", (log_probs(6, 5), given(2, 2, 1), given(6), given(3)), dtypes=F32),
    Case("ctc_loss", (log_probs(6, 5), given(1, 3), (6,), (2,), 0, "none"), dtypes=F32),
    Case("ctc_loss", (log_probs(5, 2, 7), labels(2, 2, high=5), (7, 6), (2, 1)),
         view=lambda x: x.transpose(0, 2), dtypes=F32),
    Case("CTCLoss", (log_probs(5, 2, 4), labels(2, 2, high=4), (5, 4), (2, 1)),
         autocast=torch.bfloat16),
    Case("CTCLoss", (log_probs(5, 1, 4), labels(1, 2, high=4, dtype=torch.float32), (5,), (2,)),
         stock="dtype", dtypes=F32),
    Case("CTCLoss", (log_probs(5, 1, 4), labels(1, 2, high=4), (5,), (2,)), stock="dtype",
         dtypes=(torch.float64,)),
]  # fmt: skip
