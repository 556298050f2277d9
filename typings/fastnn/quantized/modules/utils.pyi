# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.quantized.modules.utils import *
from torch.nn.quantized.modules.utils import _hide_packed_params_repr as _hide_packed_params_repr
from torch.nn.quantized.modules.utils import _ntuple_from_first as _ntuple_from_first
from torch.nn.quantized.modules.utils import _pair_from_first as _pair_from_first
from torch.nn.quantized.modules.utils import _quantize_weight as _quantize_weight
