# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.parallel import *
from torch.nn.parallel import DistributedDataParallelCPU as DistributedDataParallelCPU
