# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.modules.padding import *
from torch.nn.modules.padding import _CircularPadNd as _CircularPadNd
from torch.nn.modules.padding import _ConstantPadNd as _ConstantPadNd
from torch.nn.modules.padding import _ntuple as _ntuple
from torch.nn.modules.padding import _pair as _pair
from torch.nn.modules.padding import _quadruple as _quadruple
from torch.nn.modules.padding import _ReflectionPadNd as _ReflectionPadNd
from torch.nn.modules.padding import _ReplicationPadNd as _ReplicationPadNd
from torch.nn.modules.padding import _size_2_t as _size_2_t
from torch.nn.modules.padding import _size_4_t as _size_4_t
from torch.nn.modules.padding import _size_6_t as _size_6_t
