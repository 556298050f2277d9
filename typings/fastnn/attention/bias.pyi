# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.attention.bias import *
from torch.nn.attention.bias import _calculate_scale as _calculate_scale
from torch.nn.attention.bias import _input_requires_grad as _input_requires_grad
from torch.nn.attention.bias import _postprocess_flash_output as _postprocess_flash_output
from torch.nn.attention.bias import _raise_kernel_warnings as _raise_kernel_warnings
from torch.nn.attention.bias import _validate_sdpa_input as _validate_sdpa_input
