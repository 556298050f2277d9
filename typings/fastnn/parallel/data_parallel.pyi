# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.parallel.data_parallel import *
from torch.nn.parallel.data_parallel import T as T
from torch.nn.parallel.data_parallel import _check_balance as _check_balance
