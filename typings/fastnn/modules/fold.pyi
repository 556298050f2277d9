# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.modules.fold import *
from torch.nn.modules.fold import _size_any_t as _size_any_t
