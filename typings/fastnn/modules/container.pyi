# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.modules.container import *
from torch.nn.modules.container import _V as _V
from torch.nn.modules.container import T as T
from torch.nn.modules.container import _addindent as _addindent
