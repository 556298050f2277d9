# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.quantized.modules.conv import *
from torch.nn.quantized.modules.conv import _reverse_repeat_padding as _reverse_repeat_padding
