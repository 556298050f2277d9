# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.utils.stateless import *
from torch.nn.utils.stateless import _functional_call as _functional_call
from torch.nn.utils.stateless import _reparametrize_module as _reparametrize_module
from torch.nn.utils.stateless import _untie_named_tensors_map as _untie_named_tensors_map
