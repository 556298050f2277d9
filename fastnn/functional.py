"""`torch.nn.functional`, with the registered ops in place of their namesakes."""

import torch.nn.functional
from torch.nn.functional import *  # noqa: F403  (where editors and type checkers can see them)

from fastnn.ops import FUNCTIONS

globals().update(FUNCTIONS)


def __getattr__(name):
    return getattr(torch.nn.functional, name)


def __dir__():
    return sorted({*globals(), *dir(torch.nn.functional)})
