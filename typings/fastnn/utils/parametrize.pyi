# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.utils.parametrize import *
from torch.nn.utils.parametrize import _cache as _cache
from torch.nn.utils.parametrize import _cache_enabled as _cache_enabled
from torch.nn.utils.parametrize import _inject_new_class as _inject_new_class
from torch.nn.utils.parametrize import _inject_property as _inject_property
from torch.nn.utils.parametrize import _maybe_set as _maybe_set
from torch.nn.utils.parametrize import (
    _register_parameter_or_buffer as _register_parameter_or_buffer,
)
