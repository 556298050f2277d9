# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.modules.activation import *
from torch.nn.modules.activation import _arg_requires_grad as _arg_requires_grad
from torch.nn.modules.activation import _check_arg_device as _check_arg_device
from torch.nn.modules.activation import _is_make_fx_tracing as _is_make_fx_tracing
