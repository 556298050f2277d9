# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.modules.instancenorm import *
from torch.nn.modules.instancenorm import _InstanceNorm as _InstanceNorm
from torch.nn.modules.instancenorm import _LazyNormBase as _LazyNormBase
from torch.nn.modules.instancenorm import _NormBase as _NormBase
