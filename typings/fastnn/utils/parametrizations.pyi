# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.utils.parametrizations import *
from torch.nn.utils.parametrizations import _is_orthogonal as _is_orthogonal
from torch.nn.utils.parametrizations import _make_orthogonal as _make_orthogonal
from torch.nn.utils.parametrizations import _OrthMaps as _OrthMaps
from torch.nn.utils.parametrizations import _Orthogonal as _Orthogonal
from torch.nn.utils.parametrizations import _SpectralNorm as _SpectralNorm
from torch.nn.utils.parametrizations import _WeightNorm as _WeightNorm
