"""Losses. Mirrors torch/nn/modules/loss.py."""

import warnings

import torch
import torch.nn as stock
from typing_extensions import deprecated  # torch depends on it

import fastnn.functional as F
from fastnn.layers._fusion import counts_as, plainly
from fastnn.layers._layer import STOCK, Layer, attributes, watched

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CTCLoss",
    "CosineEmbeddingLoss",
    "CrossEntropyLoss",
    "GaussianNLLLoss",
    "HingeEmbeddingLoss",
    "HuberLoss",
    "KLDivLoss",
    "L1Loss",
    "MSELoss",
    "MarginRankingLoss",
    "MultiLabelMarginLoss",
    "MultiLabelSoftMarginLoss",
    "MultiMarginLoss",
    "NLLLoss",
    "NLLLoss2d",
    "PoissonNLLLoss",
    "SmoothL1Loss",
    "SoftMarginLoss",
    "TripletMarginLoss",
    "TripletMarginWithDistanceLoss",
]


class L1Loss(stock.L1Loss, metaclass=Layer, op=F.l1_loss):
    def forward(self, input, target):
        return F.l1_loss(input, target, reduction=self.reduction)


class NLLLoss(
    stock.NLLLoss,
    metaclass=Layer,
    op=F.nll_loss,
    mirrors=True,
    given=(
        "input, target, *_attributes(self, 'weight'), None, self.ignore_index, None, self.reduction"
    ),
):
    def forward(self, input, target):
        (weight,) = attributes(self, "weight")
        return F.nll_loss(
            input,
            target,
            weight=weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )


with warnings.catch_warnings():
    # PyTorch warns when it is subclassed; our class warns when it is constructed
    warnings.simplefilter("ignore", FutureWarning)

    @deprecated(vars(stock.NLLLoss2d)["__deprecated__"], category=FutureWarning)
    class NLLLoss2d(stock.NLLLoss2d, metaclass=Layer):
        forward = NLLLoss.forward


class PoissonNLLLoss(stock.PoissonNLLLoss, metaclass=Layer, op=F.poisson_nll_loss):
    def forward(self, log_input, target):
        return F.poisson_nll_loss(
            log_input,
            target,
            log_input=self.log_input,
            full=self.full,
            eps=self.eps,
            reduction=self.reduction,
        )


class GaussianNLLLoss(stock.GaussianNLLLoss, metaclass=Layer, op=F.gaussian_nll_loss):
    def forward(self, input, target, var):
        return F.gaussian_nll_loss(
            input, target, var, full=self.full, eps=self.eps, reduction=self.reduction
        )


class KLDivLoss(stock.KLDivLoss, metaclass=Layer, op=F.kl_div):
    def forward(self, input, target):
        return F.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


class MSELoss(stock.MSELoss, metaclass=Layer, op=F.mse_loss):
    def forward(self, input, target):
        return F.mse_loss(input, target, reduction=self.reduction)


class BCELoss(stock.BCELoss, metaclass=Layer, op=F.binary_cross_entropy, mirrors=True):
    def forward(self, input, target):
        (weight,) = attributes(self, "weight")
        return F.binary_cross_entropy(input, target, weight=weight, reduction=self.reduction)


class BCEWithLogitsLoss(
    stock.BCEWithLogitsLoss, metaclass=Layer, op=F.binary_cross_entropy_with_logits, mirrors=True
):
    def forward(self, input, target):
        weight, pos_weight = attributes(self, "weight", "pos_weight")
        return F.binary_cross_entropy_with_logits(
            input, target, weight, pos_weight=pos_weight, reduction=self.reduction
        )


class HingeEmbeddingLoss(stock.HingeEmbeddingLoss, metaclass=Layer, op=F.hinge_embedding_loss):
    def forward(self, input, target):
        return F.hinge_embedding_loss(input, target, margin=self.margin, reduction=self.reduction)


class MultiLabelMarginLoss(
    stock.MultiLabelMarginLoss, metaclass=Layer, op=F.multilabel_margin_loss
):
    def forward(self, input, target):
        return F.multilabel_margin_loss(input, target, reduction=self.reduction)


class SmoothL1Loss(stock.SmoothL1Loss, metaclass=Layer, op=F.smooth_l1_loss):
    def forward(self, input, target):
        return F.smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class HuberLoss(stock.HuberLoss, metaclass=Layer, op=F.huber_loss):
    def forward(self, input, target):
        return F.huber_loss(input, target, reduction=self.reduction, delta=self.delta)


class SoftMarginLoss(stock.SoftMarginLoss, metaclass=Layer, op=F.soft_margin_loss):
    def forward(self, input, target):
        return F.soft_margin_loss(input, target, reduction=self.reduction)


class CrossEntropyLoss(
    stock.CrossEntropyLoss,
    metaclass=Layer,
    op=F.cross_entropy,
    mirrors=True,
    given=(
        "input, target, *_attributes(self, 'weight'), None, self.ignore_index, None, "
        "self.reduction, self.label_smoothing"
    ),
    direct=(
        "type(target) is _tensor_type and self.weight is None and self.reduction in _REDUCTIONS",
        "_nn.cross_entropy_loss(input, target, None, _REDUCTIONS[self.reduction], "
        "self.ignore_index, self.label_smoothing)",
    ),
):
    def forward(self, input, target):
        (weight,) = attributes(self, "weight")
        return F.cross_entropy(
            input,
            target,
            weight=weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class MultiLabelSoftMarginLoss(
    stock.MultiLabelSoftMarginLoss, metaclass=Layer, op=F.multilabel_soft_margin_loss
):
    def forward(self, input, target):
        return F.multilabel_soft_margin_loss(
            input, target, weight=self.weight, reduction=self.reduction
        )


class CosineEmbeddingLoss(stock.CosineEmbeddingLoss, metaclass=Layer, op=F.cosine_embedding_loss):
    def forward(self, input1, input2, target):
        return F.cosine_embedding_loss(
            input1, input2, target, margin=self.margin, reduction=self.reduction
        )


class MarginRankingLoss(stock.MarginRankingLoss, metaclass=Layer, op=F.margin_ranking_loss):
    def forward(self, input1, input2, target):
        return F.margin_ranking_loss(
            input1, input2, target, margin=self.margin, reduction=self.reduction
        )


class MultiMarginLoss(stock.MultiMarginLoss, metaclass=Layer, op=F.multi_margin_loss):
    def forward(self, input, target):
        return F.multi_margin_loss(
            input,
            target,
            p=self.p,
            margin=self.margin,
            weight=self.weight,
            reduction=self.reduction,
        )


class TripletMarginLoss(stock.TripletMarginLoss, metaclass=Layer, op=F.triplet_margin_loss):
    def forward(self, anchor, positive, negative):
        return F.triplet_margin_loss(
            anchor,
            positive,
            negative,
            margin=self.margin,
            p=self.p,
            eps=self.eps,
            swap=self.swap,
            reduction=self.reduction,
        )


def _default_as_none(distance):
    """None for the distance that is the default, if nobody watches it."""
    if (
        not torch.compiler.is_compiling()
        and STOCK.get(counts_as(distance)) is stock.PairwiseDistance
        and (distance.norm, distance.eps, distance.keepdim) == (2.0, 1e-6, False)
        and not plainly()
        and watched(distance) is None
    ):
        return None
    return distance


class TripletMarginWithDistanceLoss(stock.TripletMarginWithDistanceLoss, metaclass=Layer):
    def forward(self, anchor, positive, negative):
        return F.triplet_margin_with_distance_loss(
            anchor,
            positive,
            negative,
            distance_function=_default_as_none(self.distance_function),
            margin=self.margin,
            swap=self.swap,
            reduction=self.reduction,
        )


class CTCLoss(stock.CTCLoss, metaclass=Layer):
    def forward(self, log_probs, targets, input_lengths, target_lengths):
        return F.ctc_loss(
            log_probs,
            targets,
            input_lengths,
            target_lengths,
            self.blank,
            self.reduction,
            self.zero_infinity,
        )
