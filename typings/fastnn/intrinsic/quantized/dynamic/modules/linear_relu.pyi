# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.intrinsic.quantized.dynamic.modules.linear_relu import *
