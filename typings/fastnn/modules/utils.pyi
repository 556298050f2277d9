# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.modules.utils import *
from torch.nn.modules.utils import _list_with_default as _list_with_default
from torch.nn.modules.utils import _ntuple as _ntuple
from torch.nn.modules.utils import _pair as _pair
from torch.nn.modules.utils import _quadruple as _quadruple
from torch.nn.modules.utils import _reverse_repeat_tuple as _reverse_repeat_tuple
from torch.nn.modules.utils import _single as _single
from torch.nn.modules.utils import _triple as _triple
