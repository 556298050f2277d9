"""Elementwise losses: around a block, every reduction, broadcasting, layouts, special values."""

import torch

from fastnn.testing import Case, randn, values

INF, NAN = float("inf"), float("nan")
REDUCTIONS = ("mean", "sum", "none")


class Named:
    """A maker with a name, for a row that has the maker among its options."""

    def __init__(self, name, make):
        self.name = name
        self.make = make

    def __call__(self, dtype, device):
        return self.make(dtype, device)

    def __repr__(self):
        return self.name


def uniform(*shape, grad=True, low=0.05, high=0.95):
    """Maker of values between `low` and `high`; with `grad` a leaf with a gradient."""

    def make(dtype, device):
        x = torch.rand(shape) * (high - low) + low
        return x.to(device, dtype).requires_grad_(grad)

    return Named("x".join(map(str, shape)) or "number", make)


def signs(*shape, dtype=None):
    """Maker of -1 and 1, in the row's dtype or in `dtype`."""

    def make(row_dtype, device):
        return (torch.randint(2, shape) * 2 - 1).to(device, dtype or row_dtype)

    return make


def counts(*shape, dtype=None, grad=False):
    """Maker of whole numbers from 0 to 4, in the row's dtype or in `dtype`."""

    def make(row_dtype, device):
        return torch.randint(5, shape).to(device, dtype or row_dtype).requires_grad_(grad)

    return make


def of(maker, dtype):
    """`maker`, always in `dtype`, whatever the dtype of the row."""
    return lambda row_dtype, device: maker(dtype, device)


def labels(*numbers):
    """Maker of these numbers as targets."""
    return Named(str(numbers), values(*numbers, grad=False))


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


def transposed(x):
    return x.transpose(0, 1)


def halved(x):
    return x[..., ::2]


REGRESSION = {
    "MSELoss": {},
    "L1Loss": {},
    "SmoothL1Loss": {"beta": 0.7},
    "HuberLoss": {"delta": 0.7},
}
SPECIAL = values(0.0, -0.0, 1e-6, -3.0, 3.0, 1e4, -1e4, INF, -INF, NAN, 0.5, 1.0)
ZEROS = labels(*(0.0,) * 12)
ONES = labels(*(1.0,) * 12)
MINUS = labels(*(-1.0,) * 12)

CASES: list[Case] = [
    # one element past a block, one block, one element, no element, no dimensions
    Case("MSELoss", (randn(3, 1025), randn(3, 1025))),
    Case("MSELoss", (randn(1024), randn(1024, grad=False)), {"reduction": "sum"}),
    *(
        Case("MSELoss", (randn(*shape), randn(*shape)), {"reduction": reduction})
        for shape in ((1,), (0, 3), ())
        for reduction in REDUCTIONS
    ),
    *(
        Case(name, (randn(3, 5, 7, scale=2.0), randn(3, 5, 7)), {"reduction": reduction} | options)
        for name, options in REGRESSION.items()
        for reduction in REDUCTIONS
    ),
    *(
        Case(name, (SPECIAL, ZEROS), {"reduction": reduction} | options)
        for name, options in REGRESSION.items()
        for reduction in ("none", "mean")
    ),
    *(
        Case(name, (randn(40, scale=scale), randn(40, scale=scale)), options)
        for name, options in REGRESSION.items()
        for scale in (1e-3, 1e3)
    ),
    Case("SmoothL1Loss", (values(-1.0, 1.0, 0.5, -0.5), labels(0.0, 0.0, 0.0, 0.0))),
    Case("HuberLoss", (values(-1.0, 1.0, 0.5, -0.5), labels(0.0, 0.0, 0.0, 0.0))),
    Case("SmoothL1Loss", (randn(3, 5), randn(3, 5)), {"beta": 0.0}),
    # a gradient of one of them, of neither, of the target alone
    Case("MSELoss", (randn(3, 5, grad=False), randn(3, 5))),
    Case("HuberLoss", (randn(3, 5, grad=False), randn(3, 5, grad=False))),
    # layouts: of both, of one, with gaps, with more dimensions than a kernel walks
    Case("MSELoss", (randn(2, 3, 4, 5), randn(2, 3, 4, 5)), view=channels_last),
    Case("MSELoss", (randn(4, 3, 6), randn(3, 4, 6)), {"reduction": "none"}, view=transposed),
    Case("L1Loss", (randn(4, 3, 6), randn(3, 4, 6)), view=transposed),
    Case("HuberLoss", (randn(3, 10), randn(3, 5)), {"reduction": "none"}, view=halved),
    Case("SmoothL1Loss", (randn(3, 10), randn(3, 5)), view=halved),
    Case("MSELoss", (randn(3, 1), randn(3, 5)), view=lambda x: x.expand(3, 5)),
    Case(
        "MSELoss", (randn(2, 3, 4, 2, 3), randn(4, 3, 2, 2, 3)),
        view=lambda x: x.transpose(0, 2)[:, :, :, ::2].expand(4, 3, 2, 2, 3),
        dtypes=(torch.float32,),
    ),
    Case(
        "MSELoss", (randn(3, 2, 3, 2, 3), randn(3, 2, 3, 2, 3)), {"reduction": "none"},
        view=lambda x: x.permute(4, 3, 2, 1, 0), dtypes=(torch.float32,),
    ),
    # weights
    *(
        Case(
            name, (randn(3, 400), randn(3, 400)),
            {"reduction": r, "weight": uniform(3, 400, grad=False)},
        )
        for name in ("mse_loss", "l1_loss", "huber_loss")
        for r in REDUCTIONS
    ),
    Case("mse_loss", (randn(3, 5), randn(3, 5)), {"weight": uniform(3, 5)}, stock="autograd"),
    # dtypes: a result in the widest of them, integer targets, float32 under autocast
    # (in older torch versions the gradient of the stock MSELoss raises)
    Case("MSELoss", (randn(3, 5), of(randn(3, 5), torch.float32)), since="2.13"),
    Case("L1Loss", (of(randn(3, 5), torch.float32), randn(3, 5))),
    Case("MSELoss", (randn(3, 5), counts(3, 5, dtype=torch.int64)), since="2.13"),
    Case("HuberLoss", (of(randn(3, 5), torch.float32), randn(3, 5)), stock="dtype",
         dtypes=(torch.float16,)),
    *(
        Case(name, (randn(3, 5), randn(3, 5)), options, autocast=dtype)
        for name, options in REGRESSION.items()
        for dtype in (torch.bfloat16, torch.float16)
    ),
    Case("MSELoss", (randn(3, 5), randn(3, 5)), dtypes=(torch.float64,), stock="dtype"),
    # binary cross entropy
    *(
        Case("BCELoss", (uniform(3, 343), uniform(3, 343)), {"reduction": r}) for r in REDUCTIONS
    ),
    *(
        Case(
            "BCELoss", (uniform(2, 3, 5), uniform(2, 3, 5, grad=False)),
            {"weight": uniform(*shape, grad=False)},
        )
        for shape in ((2, 3, 5), (5,), (3, 1), ())
    ),
    Case("BCELoss", (values(0.0, 1.0, 0.0, 1.0, 0.5), labels(0.0, 1.0, 1.0, 0.0, 0.25)),
         {"reduction": "none"}),
    Case("BCELoss", (values(0.0, 1.0, 0.3), values(0.5, 0.5, 0.5))),
    Case("BCELoss", (uniform(0, 3), uniform(0, 3))),
    Case("BCELoss", (uniform(3, 5), uniform(3, 5)), autocast=torch.bfloat16),
    *(
        Case("BCEWithLogitsLoss", (randn(3, 343, scale=3.0), uniform(3, 343)), {"reduction": r})
        for r in REDUCTIONS
    ),
    *(
        Case(
            "BCEWithLogitsLoss",
            (randn(2, 3, 4, 5), uniform(2, 3, 4, 5)),
            {"weight": uniform(*w, grad=False), "pos_weight": uniform(*v, grad=False, high=3.0),
             "reduction": r},
            view=view,
        )
        for w, v, r, view in (
            ((5,), (3, 1, 1), "mean", None),
            ((2, 1, 1, 1), (5,), "none", channels_last),
            ((4, 1), (1,), "sum", None),
            ((2, 3, 4, 5), (2, 3, 4, 5), "mean", None),
        )
    ),
    *(
        Case("BCEWithLogitsLoss", (SPECIAL, target), {"reduction": "none"})
        for target in (ZEROS, ONES, labels(*(0.25,) * 12))
    ),
    Case("binary_cross_entropy_with_logits", (values(-80.0, -20.0, 20.0, 80.0), labels(0, 0, 1, 1)),
         {"pos_weight": labels(3.0), "reduction": "none"}),
    Case("BCEWithLogitsLoss", (randn(3, 5), uniform(3, 5)), autocast=torch.float16),
    Case("BCEWithLogitsLoss", (randn(3, 5), of(uniform(3, 5), torch.float32)),
         dtypes=(torch.float16,), stock="dtype"),
    # Kullback-Leibler
    *(
        Case(
            "kl_div", (randn(9, 115), uniform(9, 115, grad=grad)),
            {"reduction": r, "log_target": log},
        )
        for grad, log in ((True, False), (True, True), (False, False))
        for r in ("batchmean", "sum", "none")
    ),
    Case("kl_div", (randn(3, 5), uniform(5)), {"reduction": "batchmean"}),
    Case("kl_div", (randn(5), uniform(3, 5)), {"reduction": "batchmean"}),
    Case("kl_div", (randn(3, 1), uniform(5)), {"reduction": "none"}),
    Case("kl_div", (randn(), uniform()), {"reduction": "batchmean"}),
    Case("kl_div", (SPECIAL, ZEROS), {"reduction": "none"}),
    Case("kl_div", (SPECIAL, ONES), {"reduction": "none"}),
    *(
        Case(
            "kl_div", (SPECIAL, values(0, 1, 0.5, -1, 0, INF, NAN, 1, 1, least, 2, 1e-6)),
            {"reduction": "none", "log_target": log},
        )
        for least, log in ((1, False), (-INF, True))
    ),
    Case("KLDivLoss", (randn(3, 5), uniform(3, 5)), {"reduction": "batchmean"},
         autocast=torch.bfloat16),
    Case("KLDivLoss", (randn(0, 5), uniform(0, 5)), {"reduction": "sum"}),
    # Poisson
    *(
        Case(
            "PoissonNLLLoss",
            (randn(3, 343) if log_input else uniform(3, 343), counts(3, 343)),
            {"log_input": log_input, "full": full, "reduction": r},
        )
        for log_input, full, r in (
            (True, False, "mean"),
            (True, True, "none"),
            (False, False, "sum"),
            (False, True, "mean"),
        )
    ),
    *(
        Case(
            "PoissonNLLLoss",
            (uniform(12), values(0, 1, 0.5, 1.5, 2, 3, 7, 50, -1, INF, NAN, 1e4)),
            {"log_input": log_input, "full": True, "reduction": "none"},
        )
        for log_input in (True, False)
    ),
    Case("PoissonNLLLoss", (SPECIAL, ONES), {"reduction": "none"}),
    Case("PoissonNLLLoss", (SPECIAL, ONES), {"reduction": "none", "log_input": False}),
    Case("PoissonNLLLoss", (randn(3, 5), counts(3, 5, dtype=torch.int64))),
    Case("PoissonNLLLoss", (randn(3, 5), counts(5))),
    Case("PoissonNLLLoss", (randn(3, 5), counts(3, 5)), autocast=torch.bfloat16),
    # Gaussian
    *(
        Case("GaussianNLLLoss", (randn(3, 343), randn(3, 343), uniform(*shape)),
             {"full": full, "reduction": r})
        for shape, full, r in (
            ((3, 343), False, "mean"),
            ((3, 1), True, "sum"),
            ((3,), False, "none"),
            ((3, 343), True, "none"),
        )
    ),
    Case("GaussianNLLLoss", (randn(2, 3, 4), randn(2, 3, 4), uniform(2, 1, 4)), since="2.11"),
    Case("GaussianNLLLoss", (randn(3, 5), randn(5), uniform(3, 5))),
    Case("GaussianNLLLoss", (randn(3, 5), randn(3, 5), 0.3)),
    Case("GaussianNLLLoss", (randn(3, 5), randn(3, 5), 0.0),
         {"full": True, "reduction": "sum", "eps": 0.1}),
    Case("GaussianNLLLoss", (randn(4), randn(4), values(0.0, 1e-9, 2.0, NAN)),
         {"reduction": "none"},  # in float16 a gradient overflows
         dtypes=(torch.float32, torch.bfloat16)),
    Case("GaussianNLLLoss", (SPECIAL, ONES, ONES), {"reduction": "none"}),
    Case("GaussianNLLLoss", (randn(3), randn(3), values(0.0, 0.3, 2.0)), {"eps": 0.0}),
    # hinge, soft margin, ranking
    *(
        Case("HingeEmbeddingLoss", (randn(3, 343), signs(3, 343)), {"reduction": r, "margin": 0.7})
        for r in REDUCTIONS
    ),
    *(
        Case("HingeEmbeddingLoss", (SPECIAL, target), {"reduction": "none"})
        for target in (ZEROS, ONES, MINUS)
    ),
    Case("HingeEmbeddingLoss", (randn(3, 1), signs(5, dtype=torch.int64))),
    Case("HingeEmbeddingLoss", (randn(3, 5), of(signs(3, 5), torch.float32))),
    Case("HingeEmbeddingLoss", (randn(3, 5), randn(3, 5))),
    Case("HingeEmbeddingLoss", (randn(3, 5), signs(3, 5)), autocast=torch.bfloat16),
    *(
        Case("SoftMarginLoss", (randn(3, 343), signs(3, 343)), {"reduction": r})
        for r in REDUCTIONS
    ),
    *(
        Case("SoftMarginLoss", (SPECIAL, target), {"reduction": "none"})
        for target in (ZEROS, ONES, MINUS)
    ),
    Case("SoftMarginLoss", (randn(3, 5), signs(5, dtype=torch.int64))),
    Case("SoftMarginLoss", (randn(3, 5), signs(3, 5)), autocast=torch.bfloat16),
    *(
        Case("MarginRankingLoss", (randn(3, 343), randn(3, 343), signs(3, 343)),
             {"reduction": r, "margin": 0.3})
        for r in REDUCTIONS
    ),
    Case("MarginRankingLoss", (randn(3, 1), randn(1, 5), signs(1, 1, dtype=torch.int64))),
    Case("MarginRankingLoss", (randn(3, 5), randn(3, 5), randn(3, 5, grad=False))),
    Case("MarginRankingLoss", (randn(3, 5), randn(3, 5), randn(3, 5))),
    Case("MarginRankingLoss", (SPECIAL, ZEROS, ONES), {"reduction": "none"}),
    Case("MarginRankingLoss", (randn(3, 5), randn(3, 5), signs(3, 5)), autocast=torch.bfloat16),
]  # fmt: skip
