# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.grad import *
from torch.nn.grad import _pair as _pair
from torch.nn.grad import _single as _single
from torch.nn.grad import _triple as _triple
