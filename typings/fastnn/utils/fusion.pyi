# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.utils.fusion import *
from torch.nn.utils.fusion import ConvT as ConvT
from torch.nn.utils.fusion import LinearT as LinearT
