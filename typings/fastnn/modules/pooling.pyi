# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.modules.pooling import *
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd as _AdaptiveAvgPoolNd
from torch.nn.modules.pooling import _AdaptiveMaxPoolNd as _AdaptiveMaxPoolNd
from torch.nn.modules.pooling import _AvgPoolNd as _AvgPoolNd
from torch.nn.modules.pooling import _LPPoolNd as _LPPoolNd
from torch.nn.modules.pooling import _MaxPoolNd as _MaxPoolNd
from torch.nn.modules.pooling import _MaxUnpoolNd as _MaxUnpoolNd
from torch.nn.modules.pooling import _pair as _pair
from torch.nn.modules.pooling import _ratio_2_t as _ratio_2_t
from torch.nn.modules.pooling import _ratio_3_t as _ratio_3_t
from torch.nn.modules.pooling import _single as _single
from torch.nn.modules.pooling import _size_1_t as _size_1_t
from torch.nn.modules.pooling import _size_2_opt_t as _size_2_opt_t
from torch.nn.modules.pooling import _size_2_t as _size_2_t
from torch.nn.modules.pooling import _size_3_opt_t as _size_3_opt_t
from torch.nn.modules.pooling import _size_3_t as _size_3_t
from torch.nn.modules.pooling import _size_any_opt_t as _size_any_opt_t
from torch.nn.modules.pooling import _size_any_t as _size_any_t
from torch.nn.modules.pooling import _triple as _triple
