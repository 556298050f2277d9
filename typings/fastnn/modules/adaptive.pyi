# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.modules.adaptive import *
from torch.nn.modules.adaptive import _ASMoutput as _ASMoutput
