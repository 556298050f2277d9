"""Softmax and related layers, which in PyTorch are in torch/nn/modules/activation.py."""

import torch.nn as stock

import fastnn.functional as F
from fastnn.layers._layer import Layer
from fastnn.layers._marks import is_marked

__all__ = ["LogSoftmax", "Softmax", "Softmax2d", "Softmin"]


def _level(layer):
    """The `_stacklevel` for which a warning about `dim` names the same line as in PyTorch.

    PyTorch passes 5. Our forward lies one frame deeper, and that of a marked layer two.
    """
    return 7 if is_marked(layer) else 6


# The arguments that `forward` gives the op. The third is `_level(self)`: marked layers have the
# entry `_fastnn`. Without a dim PyTorch warns, and counts frames to find the user's line. A plan
# would run at another number of frames, so none is looked up then.
_GIVEN = (
    "self.dim is not None",
    "input, self.dim, 7 if '_fastnn' in self.__dict__ else 6, None",
)


class Softmin(stock.Softmin, metaclass=Layer):
    def forward(self, input):
        return F.softmin(input, self.dim, _stacklevel=_level(self))


class Softmax(
    stock.Softmax,
    metaclass=Layer,
    op=F.softmax,
    mirrors=True,
    given=_GIVEN,
    direct=("self.dim is not None", "input.softmax(self.dim)"),
):
    def forward(self, input):
        return F.softmax(input, self.dim, _stacklevel=_level(self))


class Softmax2d(stock.Softmax2d, metaclass=Layer):
    def forward(self, input):
        if input.dim() not in (3, 4):  # the check and the words of PyTorch
            raise ValueError(
                f"Softmax2d: expected input to be 3D or 4D, got {input.dim()}D instead"
            )
        return F.softmax(input, -3, _stacklevel=_level(self))


class LogSoftmax(
    stock.LogSoftmax,
    metaclass=Layer,
    op=F.log_softmax,
    mirrors=True,
    given=_GIVEN,
    direct=("self.dim is not None", "input.log_softmax(self.dim)"),
):
    def forward(self, input):
        return F.log_softmax(input, self.dim, _stacklevel=_level(self))
