# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.utils.memory_format import *
from torch.nn.utils.memory_format import _M as _M
