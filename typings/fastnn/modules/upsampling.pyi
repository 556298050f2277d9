# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.modules.upsampling import *
from torch.nn.modules.upsampling import _ratio_2_t as _ratio_2_t
from torch.nn.modules.upsampling import _ratio_any_t as _ratio_any_t
from torch.nn.modules.upsampling import _size_2_t as _size_2_t
from torch.nn.modules.upsampling import _size_any_t as _size_any_t
