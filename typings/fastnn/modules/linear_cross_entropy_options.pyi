# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.modules.linear_cross_entropy_options import *
from torch.nn.modules.linear_cross_entropy_options import _AUTO_DEFAULTS as _AUTO_DEFAULTS
from torch.nn.modules.linear_cross_entropy_options import _AUTO_FALLBACK as _AUTO_FALLBACK
from torch.nn.modules.linear_cross_entropy_options import _AutoDefault as _AutoDefault
