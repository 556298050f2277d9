# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.modules.lazy import *
from torch.nn.modules.lazy import _LazyProtocol as _LazyProtocol
