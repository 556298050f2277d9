"""Pooling. Mirrors torch/nn/modules/pooling.py."""

# The stubs of PyTorch's functions do not accept all arguments that PyTorch's layers pass to them.
# mypy: disable-error-code="arg-type, call-overload"

import torch.nn as stock

import fastnn.functional as F
from fastnn.layers._layer import Layer

__all__ = [
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "FractionalMaxPool2d",
    "FractionalMaxPool3d",
    "LPPool1d",
    "LPPool2d",
    "LPPool3d",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MaxUnpool1d",
    "MaxUnpool2d",
    "MaxUnpool3d",
]


_GIVEN_TO_MAX_POOL = (
    "input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, "
    "self.return_indices"
)


def _max_pool(dims):
    """What PyTorch's call of a layer that returns no indices comes to."""
    options = "self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode"
    return (
        "not self.return_indices and self.stride is not None",
        f"_torch.max_pool{dims}d(input, {options})",
    )


class MaxPool1d(
    stock.MaxPool1d,
    metaclass=Layer,
    op=F.max_pool1d,
    given=_GIVEN_TO_MAX_POOL,
    direct=_max_pool(1),
):
    def forward(self, input):
        return F.max_pool1d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            ceil_mode=self.ceil_mode,
            return_indices=self.return_indices,
        )


class MaxPool2d(
    stock.MaxPool2d,
    metaclass=Layer,
    op=F.max_pool2d,
    given=_GIVEN_TO_MAX_POOL,
    direct=_max_pool(2),
):
    def forward(self, input):
        return F.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            ceil_mode=self.ceil_mode,
            return_indices=self.return_indices,
        )


class MaxPool3d(
    stock.MaxPool3d,
    metaclass=Layer,
    op=F.max_pool3d,
    given=_GIVEN_TO_MAX_POOL,
    direct=_max_pool(3),
):
    def forward(self, input):
        return F.max_pool3d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            ceil_mode=self.ceil_mode,
            return_indices=self.return_indices,
        )


class MaxUnpool1d(stock.MaxUnpool1d, metaclass=Layer, op=F.max_unpool1d):
    def forward(self, input, indices, output_size=None):
        return F.max_unpool1d(
            input, indices, self.kernel_size, self.stride, self.padding, output_size
        )


class MaxUnpool2d(stock.MaxUnpool2d, metaclass=Layer, op=F.max_unpool2d):
    def forward(self, input, indices, output_size=None):
        return F.max_unpool2d(
            input, indices, self.kernel_size, self.stride, self.padding, output_size
        )


class MaxUnpool3d(stock.MaxUnpool3d, metaclass=Layer, op=F.max_unpool3d):
    def forward(self, input, indices, output_size=None):
        return F.max_unpool3d(
            input, indices, self.kernel_size, self.stride, self.padding, output_size
        )


class AvgPool1d(stock.AvgPool1d, metaclass=Layer, op=F.avg_pool1d):
    def forward(self, input):
        return F.avg_pool1d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
        )


class AvgPool2d(stock.AvgPool2d, metaclass=Layer, op=F.avg_pool2d):
    def forward(self, input):
        return F.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AvgPool3d(stock.AvgPool3d, metaclass=Layer, op=F.avg_pool3d):
    def forward(self, input):
        return F.avg_pool3d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class FractionalMaxPool2d(stock.FractionalMaxPool2d, metaclass=Layer, op=F.fractional_max_pool2d):
    def forward(self, input):
        return F.fractional_max_pool2d(
            input,
            self.kernel_size,
            self.output_size,
            self.output_ratio,
            self.return_indices,
            _random_samples=self._random_samples,
        )


class FractionalMaxPool3d(stock.FractionalMaxPool3d, metaclass=Layer, op=F.fractional_max_pool3d):
    def forward(self, input):
        return F.fractional_max_pool3d(
            input,
            self.kernel_size,
            self.output_size,
            self.output_ratio,
            self.return_indices,
            _random_samples=self._random_samples,
        )


class LPPool1d(stock.LPPool1d, metaclass=Layer, op=F.lp_pool1d):
    def forward(self, input):
        return F.lp_pool1d(
            input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode
        )


class LPPool2d(stock.LPPool2d, metaclass=Layer, op=F.lp_pool2d):
    def forward(self, input):
        return F.lp_pool2d(
            input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode
        )


class LPPool3d(stock.LPPool3d, metaclass=Layer, op=F.lp_pool3d):
    def forward(self, input):
        return F.lp_pool3d(
            input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode
        )


class AdaptiveMaxPool1d(stock.AdaptiveMaxPool1d, metaclass=Layer, op=F.adaptive_max_pool1d):
    def forward(self, input):
        return F.adaptive_max_pool1d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool2d(stock.AdaptiveMaxPool2d, metaclass=Layer, op=F.adaptive_max_pool2d):
    def forward(self, input):
        return F.adaptive_max_pool2d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool3d(stock.AdaptiveMaxPool3d, metaclass=Layer, op=F.adaptive_max_pool3d):
    def forward(self, input):
        return F.adaptive_max_pool3d(input, self.output_size, self.return_indices)


class AdaptiveAvgPool1d(stock.AdaptiveAvgPool1d, metaclass=Layer, op=F.adaptive_avg_pool1d):
    def forward(self, input):
        return F.adaptive_avg_pool1d(input, self.output_size)


class AdaptiveAvgPool2d(stock.AdaptiveAvgPool2d, metaclass=Layer, op=F.adaptive_avg_pool2d):
    def forward(self, input):
        return F.adaptive_avg_pool2d(input, self.output_size)


class AdaptiveAvgPool3d(stock.AdaptiveAvgPool3d, metaclass=Layer, op=F.adaptive_avg_pool3d):
    def forward(self, input):
        return F.adaptive_avg_pool3d(input, self.output_size)
