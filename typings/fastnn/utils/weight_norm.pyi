# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.utils.weight_norm import *
from torch.nn.utils.weight_norm import T_module as T_module
