# Written by `python -m tools.stubs`.
# ruff: noqa: F403  (whatever stock exports, by whatever name)

from torch.nn.modules.rnn import *
from torch.nn.modules.rnn import _apply_permutation as _apply_permutation
from torch.nn.modules.rnn import _rnn_impls as _rnn_impls
from torch.nn.modules.rnn import apply_permutation as apply_permutation
