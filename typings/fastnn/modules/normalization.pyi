# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.modules.normalization import *
from torch.nn.modules.normalization import _cross_map_lrn2d as _cross_map_lrn2d
from torch.nn.modules.normalization import _shape_t as _shape_t
