# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.backends.thnn import *
from torch.nn.backends.thnn import _get_thnn_function_backend as _get_thnn_function_backend
