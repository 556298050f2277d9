# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.modules.loss import *
from torch.nn.modules.loss import _Loss as _Loss
from torch.nn.modules.loss import _WeightedLoss as _WeightedLoss
