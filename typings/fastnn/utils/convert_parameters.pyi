# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.utils.convert_parameters import *
from torch.nn.utils.convert_parameters import _check_param_device as _check_param_device
