"""Embedding."""

import torch
import torch.nn.functional as stock

from fastnn._op import Function, Invalid, Stock, Work, launcher, op, run
from fastnn._shards import Split

_fwd = launcher(
    "embedding",
    "fwd",
    "(Tensor weight, Tensor indices) -> Tensor",
    lambda weight, indices: weight.new_empty((*indices.shape, weight.shape[1])),
)
_bwd = launcher(
    "embedding",
    "bwd",
    "(Tensor dy, Tensor indices, SymInt num_embeddings, int padding_idx, bool by_freq) -> Tensor",
    lambda dy, indices, num_embeddings, padding_idx, by_freq: dy.new_empty(
        (num_embeddings, dy.shape[-1])
    ),
)

_FEW = 3072  # up to this many indices, PyTorch's backward does not sort, and is one launch
FEW = "few indices"  # the variant whose backward is PyTorch's


def _vectors(input, weight, *rest, **options):
    """The gate's policy: the number of elements of the result."""
    few = weight.is_cuda and input.numel() <= _FEW
    return Work(input.numel() * weight.shape[-1], variant=FEW if few else "")


class Embedding(Function):
    """weight (V, D), indices (*) -> (*, D). Saves only the indices, as PyTorch does."""

    @staticmethod
    def forward(ctx, weight, indices, padding_idx, scale_grad_by_freq, few):
        ctx.save_for_backward(indices)
        ctx.rest = weight.shape[0], padding_idx, scale_grad_by_freq, few
        return _fwd(weight, indices)

    @staticmethod
    def backward(ctx, dy):
        (indices,) = ctx.saved_tensors
        V, padding_idx, scale_grad_by_freq, few = ctx.rest
        # it is linear in dy, and PyTorch's formula has a derivative
        stocks = few or torch.is_grad_enabled()
        backward = torch.ops.aten.embedding_dense_backward if stocks else _bwd
        return backward(dy, indices, V, padding_idx, scale_grad_by_freq), None, None, None, None


def _splits(input, weight, padding_idx=None, max_norm=None, norm_type=2.0, *rest, **others):
    """By indices, and by columns of the weight."""
    if max_norm is not None or others.get("scale_grad_by_freq"):
        return []
    rows = [Split({"input": d}, d) for d in range(input.dim())]
    return [*rows, Split({"weight": 1}, input.dim())]


def padding_row(weight, indices, padding_idx, max_norm, sparse) -> int | Stock:
    """The row of the weight (V, D) that has no gradient, -1 for none; or why no kernel reads it."""
    V, D = weight.shape
    if not V and indices.numel():
        return Invalid("empty", "indices into no rows")
    if padding_idx is not None and (type(padding_idx) is not int or not -V <= padding_idx < V):
        return Invalid("option", f"padding_idx={padding_idx}")
    if max_norm is not None:
        return Stock("option", f"max_norm={max_norm} writes to the weight")
    if sparse:
        return Stock("option", "sparse=True")
    if weight.stride(1) != 1 and D > 1:
        return Stock("layout", f"a weight of strides {weight.stride()}")
    if padding_idx is None:
        return -1
    return padding_idx + V if padding_idx < 0 else padding_idx


@op(
    stock=stock.embedding,
    strided=("input", "weight"),  # the launchers copy indices that are not dense
    integers=(torch.int64, torch.int32),
    opaque=True,
    split=_splits,
    policy=_vectors,
    at_most="input.numel() * weight.shape[-1]",
    variants=("", FEW),
)
def embedding(
    input, weight, padding_idx=None, max_norm=None, norm_type=2.0,
    scale_grad_by_freq=False, sparse=False, *, variant="",
):  # fmt: skip
    """Fused for dense gradients, which are deterministic: the same bits each time.

    An index outside [0, V) gives a row of nan, and has no part in the gradient. Nothing outside the
    weight is read. PyTorch fails an assertion that ends the process's CUDA context, or raises
    IndexError on a CPU. With TRITON_DEBUG=1 the kernel asserts as well.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or input.is_floating_point():
        return Invalid(
            "dtype", f"weight {weight.dtype} {tuple(weight.shape)}, indices {input.dtype}"
        )
    if not weight.shape[0]:
        padding_idx = padding_idx or None  # PyTorch takes 0, although there is no such row
    padding = padding_row(weight, input, padding_idx, max_norm, sparse)
    if isinstance(padding, Stock):
        return padding
    few = variant == FEW
    return run(Embedding, weight, input, padding, bool(scale_grad_by_freq), few)
