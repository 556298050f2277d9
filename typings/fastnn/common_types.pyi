# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.common_types import *
from torch.nn.common_types import _maybe_indices_t as _maybe_indices_t
from torch.nn.common_types import _ratio_2_t as _ratio_2_t
from torch.nn.common_types import _ratio_3_t as _ratio_3_t
from torch.nn.common_types import _ratio_any_t as _ratio_any_t
from torch.nn.common_types import _scalar_or_tuple_1_t as _scalar_or_tuple_1_t
from torch.nn.common_types import _scalar_or_tuple_2_t as _scalar_or_tuple_2_t
from torch.nn.common_types import _scalar_or_tuple_3_t as _scalar_or_tuple_3_t
from torch.nn.common_types import _scalar_or_tuple_4_t as _scalar_or_tuple_4_t
from torch.nn.common_types import _scalar_or_tuple_5_t as _scalar_or_tuple_5_t
from torch.nn.common_types import _scalar_or_tuple_6_t as _scalar_or_tuple_6_t
from torch.nn.common_types import _scalar_or_tuple_any_t as _scalar_or_tuple_any_t
from torch.nn.common_types import _size_1_t as _size_1_t
from torch.nn.common_types import _size_2_opt_t as _size_2_opt_t
from torch.nn.common_types import _size_2_t as _size_2_t
from torch.nn.common_types import _size_3_opt_t as _size_3_opt_t
from torch.nn.common_types import _size_3_t as _size_3_t
from torch.nn.common_types import _size_4_t as _size_4_t
from torch.nn.common_types import _size_5_t as _size_5_t
from torch.nn.common_types import _size_6_t as _size_6_t
from torch.nn.common_types import _size_any_opt_t as _size_any_opt_t
from torch.nn.common_types import _size_any_t as _size_any_t
from torch.nn.common_types import _tensor_list_t as _tensor_list_t
