# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.modules.conv import *
from torch.nn.modules.conv import _ConvNd as _ConvNd
from torch.nn.modules.conv import _ConvTransposeMixin as _ConvTransposeMixin
from torch.nn.modules.conv import _ConvTransposeNd as _ConvTransposeNd
from torch.nn.modules.conv import _LazyConvXdMixin as _LazyConvXdMixin
from torch.nn.modules.conv import _pair as _pair
from torch.nn.modules.conv import _reverse_repeat_tuple as _reverse_repeat_tuple
from torch.nn.modules.conv import _single as _single
from torch.nn.modules.conv import _size_1_t as _size_1_t
from torch.nn.modules.conv import _size_2_t as _size_2_t
from torch.nn.modules.conv import _size_3_t as _size_3_t
from torch.nn.modules.conv import _triple as _triple
from torch.nn.modules.conv import convolution_notes as convolution_notes
