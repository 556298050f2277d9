# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.intrinsic.modules.fused import *
from torch.nn.intrinsic.modules.fused import _FusedModule as _FusedModule
