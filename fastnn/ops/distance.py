"""Distances, similarities, and losses that are computed from one number per row.

A `RowOp` says which device functions compute an op, and which PyTorch function it stands for. Each
op below says what its tensors and numbers are, and which calls it declines.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as stock
from torch import Tensor

from fastnn import kernels
from fastnn._op import Function, Invalid, Stock, Work, is_dense, op, rounded, run, second_order
from fastnn.ops.loss import INTEGERS, broadcast, common_dtype, multilabel, number, own, refuse
from fastnn.ops.nll_loss import resolve_reduction, too_long


class RowOp(NamedTuple):
    """An op on rows, by the names of its functions in kernels/distance.py."""

    name: str
    step: str
    sums: int
    stock: Callable[..., Tensor]
    """y from (x1, x2, x3, target, weight), the numbers and the flags. Differentiable."""
    by_class: bool = False
    """Whether the target is the index of a class."""
    keeps_y: bool = False
    """Whether stock keeps y, so that editing it in place before the backward is an error."""
    of_kept: Callable[..., Tensor] | None = None
    """Where stock keeps differences in place of the tensors, and so do we: y of up to three of them
    and the numbers, differentiable; `differences` says of which two tensors each is."""
    differences: tuple[tuple[int, int], ...] = ()


def _multi_margin(x, x2, x3, target, weight, dim, p, eps, margin, norm, swap):
    return stock.multi_margin_loss(x, target, norm, margin, weight, reduction="none")


def _multilabel(x, target, weight, t, w, dim, *numbers):
    return stock.multilabel_soft_margin_loss(x, target, weight, reduction="none")


def _triplet(near, far, *rest):
    *swapped, p, margin = rest
    far = far.norm(p, -1)
    for k in swapped:
        far = torch.min(far, k.norm(p, -1))
    return (margin + near.norm(p, -1) - far).clamp_min(0)


PAIRWISE = RowOp(
    "pairwise", "pairwise_step", 1,
    lambda a, b, c, t, w, dim, p, eps, *rest: torch.pairwise_distance(a, b, p, eps),
    keeps_y=True, of_kept=lambda k, p, *rest: k.norm(p, -1), differences=((0, 1),),
)  # fmt: skip
COSINE = RowOp(
    "cosine", "products_step", 3,
    lambda a, b, c, t, w, dim, p, eps, *rest: stock.cosine_similarity(a, b, dim, eps),
)  # fmt: skip
COSINE_EMBEDDING = RowOp(
    "cosine_embedding", "products_step", 3,
    lambda a, b, c, t, w, dim, p, eps, margin, *rest: torch.cosine_embedding_loss(
        a, b, t, margin, 0
    ),
)  # fmt: skip
TRIPLET = RowOp(
    "triplet", "triplet_step", 2,
    lambda a, b, c, t, w, dim, p, eps, margin, norm, swap: torch.triplet_margin_loss(
        a, b, c, margin, p, eps, swap, 0
    ),
    of_kept=_triplet, differences=((0, 1), (0, 2), (1, 2)),
)  # fmt: skip
MULTI_MARGIN = RowOp("multi_margin", "multi_margin_step", 2, _multi_margin, by_class=True)
MULTILABEL_SOFT = RowOp("multilabel_soft", "multilabel_soft_step", 1, _multilabel)


class Rows(Function):
    """One number for each row along `dim` of up to three tensors; reduced if there is a divisor.

    Differences that are kept are outputs, so that a second derivative finds its way through them.
    """

    strided = ("dkept",)

    @staticmethod
    def forward(ctx, x1, x2, x3, target, weight, rows, dim, numbers, norm, swap, divisor, dtype):
        xs = (x1, x2, x3)
        shape = broadcast(*xs)
        views = [x if x is None else classes_second(x.expand(shape), dim) for x in xs]
        flags = rows.by_class, norm, swap
        sums = rows.sums + swap
        rest = () if divisor is not None else (*shape[:dim], *shape[dim + 1 :])
        y = torch.empty(rest, dtype=dtype, device=x1.device)
        # As many differences as sums.
        keeps = sums if rows.of_kept and any(ctx.needs_input_grad) else 0
        stats, kept = kernels.distance.fwd(
            views, target, weight, rows.step, rows.name, sums, numbers, flags, divisor, y,
            rows.of_kept is not None, keeps,
        )  # fmt: skip
        if divisor is None:
            y = _laid_out_as_stocks(y, shape, dim, xs)
        kept = [classes_back(k, dim) for k in kept]
        saved = (*kept, *(None,) * (3 - keeps)) if rows.of_kept else xs
        ctx.save_for_backward(*saved, target, weight, stats, y if rows.keeps_y else None)
        kinds = [x if x is None else (x.shape, x.dtype) for x in xs]
        ctx.rest = rows, dim, shape, numbers, norm, swap, divisor, dtype, kinds
        ctx.set_materialize_grads(False)
        return y, *kept

    @staticmethod
    def backward(ctx, dy, *dkept):
        x1, x2, x3, target, weight, stats, _ = ctx.saved_tensors
        rows, dim, _, numbers, norm, swap, divisor, dtype, _ = ctx.rest
        xs = (x1, x2, x3)
        needs = ctx.needs_input_grad[:3]
        if rows.of_kept and (dy is None or torch.is_grad_enabled()):
            grads = _through_kept(ctx, dy, dkept, xs[: len(dkept)], needs)
        elif torch.is_grad_enabled():

            def formula(*xs):
                cast = [x if x is None else x.to(dtype) for x in xs]
                w = weight if weight is None else weight.to(dtype)
                y = rows.stock(*cast, target, w, dim, *numbers, norm, swap)
                return y if divisor is None else y.sum() / divisor

            grads = second_order(formula, xs, dy, needs)
        else:
            grads = _gradients(ctx, dy, xs, target, weight, stats, needs)
        return *grads, *(None,) * 9


def _through_kept(ctx, dy, dkept, kept, needs):
    """The gradients of x1, x2 and x3 by way of their differences, with graphs of their own."""
    rows, *_, numbers, _, _, divisor, _, _ = ctx.rest
    if dy is not None:

        def formula(*kept):
            y = rows.of_kept(*kept, numbers[0], numbers[2])
            return y if divisor is None else y.sum() / divisor

        through = second_order(formula, kept, dy, (True,) * len(kept))
        dkept = [a if b is None else a + b for a, b in zip(through, dkept, strict=True)]
    grads: list = [None, None, None]
    for d, (plus, minus) in zip(dkept, rows.differences, strict=False):
        if d is not None:
            grads[plus] = d if grads[plus] is None else grads[plus] + d
            grads[minus] = -d if grads[minus] is None else grads[minus] - d
    return [g if need else None for g, need in zip(grads, needs, strict=True)]


def _gradients(ctx, dy, xs, target, weight, stats, needs):
    rows, dim, shape, numbers, norm, swap, divisor, _, kinds = ctx.rest
    device = stats.device
    wanted: list[Tensor | None] = [None, None, None]
    for k, (kind, need) in enumerate(zip(kinds, needs, strict=True)):
        if need:
            whole = kind[0] == shape
            like = next(x for x in (xs[k], *xs) if x is not None)
            wanted[k] = (
                torch.empty_like(like, dtype=kind[1])
                if whole
                else torch.empty(shape, dtype=torch.float32, device=device)
            )
    gradient = f"{rows.name}_of_kept" if rows.of_kept else f"{rows.name}_grad"
    made = kernels.distance.bwd(
        dy,
        [x if x is None else classes_second(x.expand(shape), dim) for x in xs],
        [w if w is None else classes_second(w, dim) for w in wanted],
        target, weight, stats, gradient, numbers, (rows.by_class, norm, swap), divisor,
    )  # fmt: skip
    # Autograd sums the gradients of broadcast inputs.
    return [d if d is None else classes_back(d, dim) for d in made]


def classes_second(x, dim):
    """x (N, C, ...), with `dim` as C; x (C,) stays as it is."""
    if x.dim() == 1:
        return x
    return x.unsqueeze(0) if dim == 0 else x.movedim(dim, 1)


def classes_back(x, dim):
    if x.dim() == 1:
        return x
    return x.squeeze(0) if dim == 0 else x.movedim(1, dim)


def _laid_out_as_stocks(y, shape, dim, xs):
    present = [x for x in xs if x is not None]
    if all(x.shape == shape and is_dense(x) for x in present):
        return y
    strides = _strides_of_sums(tuple([(x.shape, x.stride()) for x in present]), dim)
    if strides == y.stride():
        return y
    return torch.empty_strided(y.shape, strides, dtype=y.dtype, device=y.device).copy_(y)


@functools.lru_cache(maxsize=4096)
def _strides_of_sums(layouts, dim):
    """The strides of a sum over `dim` of the result of pointwise operators on these layouts."""
    metas = [torch.empty_strided(*layout, device="meta") for layout in layouts]
    return sum(metas[1:], metas[0]).sum(dim).stride()


def _rows(rows, xs, dim, numbers, norm, swap, divisor, dtype, target=None, weight=None):
    return run(Rows, *xs, target, weight, rows, dim, numbers, norm, swap, divisor, dtype)[0]


def _norm(p):
    """The constexpr NORM for the exponent p; None if the kernels have no such norm."""
    if p in (1, 2):
        return int(p)
    return 0 if number(p) and 0 < p <= 64 else None


def _row_shape(dim, *xs):
    """(common shape of `xs`, `dim` as an index from 0 on), or why there are no rows."""
    shape = broadcast(*xs)
    if shape is None:
        return Invalid("shape", "tensors that do not broadcast")
    if not shape:
        return Stock("shape", "tensors without dimensions")
    if isinstance(dim, bool) or not isinstance(dim, int) or not -len(shape) <= dim < len(shape):
        return Invalid("option", f"dim={dim!r}")
    if shape[dim] == 0:
        return Stock("empty", "rows without elements")
    if why := too_long(shape[dim]):
        return why
    return shape, dim % len(shape)


FEW_ROWS = 64


def in_rows(*args, dim=-1, **options):
    """The gate's policy for kernels in which one program computes one row.

    The size is the element count of the largest tensor.
    """
    most = max((v for v in args if isinstance(v, Tensor)), key=Tensor.numel)
    width = most.shape[dim] if most.dim() else 1
    if most.numel() < FEW_ROWS * width:
        return Stock(
            "gate",
            f"{most.numel() // width} rows: a kernel's program computes one row, so fewer than "
            f"{FEW_ROWS} rows leave most of the GPU idle",
        )
    return Work(most.numel())


def _along(x1, x2, dim=1, eps=1e-8):
    return in_rows(x1, x2, dim=dim)


@op(
    stock=stock.cosine_similarity,
    strided=("x1", "x2"),
    policy=_along,
    at_most="max(x1.numel(), x2.numel())",
    autocast="fp32",
)
def cosine_similarity(x1, x2, dim=1, eps=1e-8, *, out_dtype=None):
    """Fused: one kernel per direction. PyTorch's chain needs 35."""
    why = refuse((x1, x2), "none")
    if why is not None:
        return why
    found = _row_shape(dim, x1, x2)
    if isinstance(found, Stock):
        return found
    if not number(eps) or eps < 0:
        return Invalid("option", f"eps={eps!r}")
    dtype = out_dtype or common_dtype(x1, x2)
    if isinstance(dtype, Stock):
        return dtype
    xs = own(x1, x2), own(x2, x1), None
    return _rows(COSINE, xs, found[1], (2.0, float(eps), 0.0), 2, False, None, dtype)


@op(
    stock=stock.pairwise_distance,
    strided=("x1", "x2"),
    policy=in_rows,
    at_most="max(x1.numel(), x2.numel())",
    autocast="fp32",
)
def pairwise_distance(x1, x2, p=2.0, eps=1e-6, keepdim=False, *, out_dtype=None):
    """Fused for positive exponents up to 64."""
    why = refuse((x1, x2), "none")
    if why is not None:
        return why
    found = _row_shape(-1, x1, x2)
    if isinstance(found, Stock):
        return found
    norm = _norm(p)
    if norm is None:
        return Stock("option", f"p={p!r}; kernels take exponents above 0, up to 64")
    if not number(eps):
        return Invalid("option", f"eps={eps!r}")
    dtype = out_dtype or common_dtype(x1, x2)
    if isinstance(dtype, Stock):
        return dtype
    numbers = float(p), float(eps), 0.0
    y = _rows(PAIRWISE, (x1, x2, None), found[1], numbers, norm, False, None, dtype)
    return y.unsqueeze(-1) if keepdim else y


@op(
    stock=stock.triplet_margin_loss,
    strided=("anchor", "positive", "negative"),
    policy=in_rows,
    at_most="max(anchor.numel(), positive.numel(), negative.numel())",
    autocast="fp32",
    autocast_cpu="fp32",
    source="doi:10.5244/C.30.119",
)
def triplet_margin_loss(
    anchor, positive, negative, margin=1.0, p=2, eps=1e-6, swap=False, size_average=None,
    reduce=None, reduction="mean", *, out_dtype=None,
):  # fmt: skip
    """Fused with the distances, the swap and the reduction, for positive exponents up to 64."""
    legacy = size_average, reduce
    xs = anchor, positive, negative
    return _triplet_loss(xs, margin, p, eps, swap, legacy, reduction, out_dtype)


@op(
    stock=stock.triplet_margin_with_distance_loss,
    strided=("anchor", "positive", "negative"),
    policy=in_rows,
    at_most="max(anchor.numel(), positive.numel(), negative.numel())",
    autocast="fp32",
)
def triplet_margin_with_distance_loss(
    anchor, positive, negative, *, distance_function=None, margin=1.0, swap=False,
    reduction="mean", out_dtype=None,
):  # fmt: skip
    """Fused as `triplet_margin_loss` is, if the distance is the default, `pairwise_distance`."""
    if distance_function not in (None, stock.pairwise_distance, pairwise_distance):
        name = getattr(distance_function, "__name__", type(distance_function).__name__)
        return Stock("option", f"distance_function={name}: kernels have pairwise_distance")
    xs = anchor, positive, negative
    return _triplet_loss(xs, margin, 2.0, 1e-6, swap, (None, None), reduction, out_dtype)


def _triplet_loss(xs, margin, p, eps, swap, legacy, reduction, out_dtype):
    """The loss of (anchor, positive, negative), or why no kernel computes it."""
    why = refuse(xs, reduction)
    if why is not None:
        return why
    if not number(margin) or margin <= 0 or not number(eps):
        return Invalid("option", f"margin={margin!r}, eps={eps!r}")
    if len({x.dim() for x in xs}) > 1:
        return Invalid("shape", "tensors of different dimensions")
    found = _row_shape(-1, *xs)
    if isinstance(found, Stock):
        return found
    norm = _norm(p)
    if norm is None:
        return Stock("option", f"p={p!r}; kernels take exponents above 0, up to 64")
    dtype = out_dtype or common_dtype(*xs)
    if isinstance(dtype, Stock):
        return dtype
    size_average, reduce = legacy
    reduction = resolve_reduction(size_average, reduce, reduction)
    shape, dim = found
    divisor = row_divisor(reduction, shape[:-1].numel())
    numbers = float(p), float(eps), float(margin)
    return _rows(TRIPLET, xs, dim, numbers, norm, bool(swap), divisor, dtype)


def row_divisor(reduction, rows):
    return {"none": None, "sum": 1, "mean": rows}[reduction]


@op(
    stock=stock.cosine_embedding_loss,
    strided=("input1", "input2"),
    policy=in_rows,
    at_most="max(input1.numel(), input2.numel(), target.numel())",
    integers=INTEGERS,
    autocast="fp32",
    autocast_cpu="fp32",
)
def cosine_embedding_loss(
    input1, input2, target, margin=0, size_average=None, reduce=None, reduction="mean", *,
    out_dtype=None,
):  # fmt: skip
    """Fused with the similarity and the reduction."""
    why = refuse((input1, input2, target), reduction)
    if why is not None:
        return why
    if not number(margin):
        return Invalid("option", f"margin={margin!r}")
    if not input2.is_floating_point():
        return Stock("dtype", f"an input in {input2.dtype}")
    if target.dim() > 1 or not input1.dim() == input2.dim() == target.dim() + 1:
        return Invalid("shape", "a target without one number for each row")
    if input1.shape[-1] != input2.shape[-1]:
        # PyTorch computes the norm of each before it broadcasts
        return Stock("shape", "rows of two lengths")
    found = _row_shape(-1, input1, input2)
    if isinstance(found, Stock):
        return found
    shape, dim = found
    if target.shape != shape[:-1]:
        return Stock("shape", f"a target of shape {tuple(target.shape)}")
    dtype = out_dtype or common_dtype(input1, input2)
    if isinstance(dtype, Stock):
        return dtype
    if size_average is not None or reduce is not None:
        reduction = resolve_reduction(size_average, reduce, reduction)
    xs = input1, input2, None
    numbers = 2.0, 0.0, float(margin)
    divisor = row_divisor(reduction, target.numel())
    target = own(target.detach(), input1, input2)  # stock keeps masks of it
    return _rows(COSINE_EMBEDDING, xs, dim, numbers, 2, False, divisor, dtype, target)


@op(
    stock=stock.multi_margin_loss,
    strided=("input",),
    integers=(torch.int64,),
    autocast="fp32",
    autocast_cpu="fp32",
)
def multi_margin_loss(
    input, target, p=1, margin=1.0, weight=None, size_average=None, reduce=None, reduction="mean",
    *, out_dtype=None,
):  # fmt: skip
    """Fused with its reduction; deterministic.

    A target outside [0, C) makes the loss and its gradients nan. PyTorch fails an assertion, after
    which the process cannot use CUDA any more, or raises RuntimeError on a CPU. With TRITON_DEBUG=1
    the kernel asserts as well.
    """
    why = refuse((input, target), reduction, (weight,))
    if why is not None:
        return why
    if isinstance(p, Tensor) or p not in (1, 2) or not number(margin):
        return Invalid("option", f"p={p!r}, margin={margin!r}")
    if not 1 <= input.dim() <= 2 or target.dtype != torch.int64:
        return Invalid(
            "dtype", "an input that is not (N, C) or (C,), or a target that is not int64"
        )
    shape = input.shape[:-1]
    if input.shape[-1] == 0:
        return Stock("empty", "no classes")
    if why := too_long(input.shape[-1], "classes"):
        return why
    if target.shape != shape and not (not shape and target.shape == (1,)):
        return Invalid("shape", f"a target of shape {tuple(target.shape)}")
    if target.shape != shape:
        return Stock("shape", "a 1-d target of a 1-d input")
    if weight is not None:
        if weight.shape != input.shape[-1:]:
            return Invalid("shape", "a weight that is not one value per class")
        if weight.requires_grad and torch.is_grad_enabled():
            return Invalid("autograd", "a weight that requires grad")
        if weight.dtype != input.dtype and out_dtype is None:
            return Invalid("dtype", f"a weight in {weight.dtype}")
    if size_average is not None or reduce is not None:
        reduction = resolve_reduction(size_average, reduce, reduction)
    xs = input, None, None
    dtype = out_dtype or input.dtype
    kept = rounded(margin, dtype)
    if kept is None:
        return Invalid("dtype", f"margin={margin!r} in {dtype}")
    numbers = float(p), 0.0, kept
    divisor = row_divisor(reduction, target.numel())
    dim = input.dim() - 1
    return _rows(MULTI_MARGIN, xs, dim, numbers, int(p), False, divisor, dtype, target, weight)


@op(
    stock=stock.multilabel_soft_margin_loss,
    strided=("input", "target", "weight"),
    integers=INTEGERS,
    autocast="fp32",
)
def multilabel_soft_margin_loss(
    input, target, weight=None, size_average=None, reduce=None, reduction="mean", *, out_dtype=None
):
    """Fused with its reduction, with weights and broadcasting."""
    why = refuse((input, target), reduction, (weight,))
    if why is not None:
        return why
    found = _row_shape(-1, input, target, weight)
    if isinstance(found, Stock):
        return found
    shape, dim = found
    if input.dim() != len(shape) or input.shape[-1] != shape[-1]:
        return Stock("layout", "an input that is broadcast")
    dtype = out_dtype or common_dtype(input, target, weight)
    if isinstance(dtype, Stock):
        return dtype
    if size_average is not None or reduce is not None:
        reduction = resolve_reduction(size_average, reduce, reduction)
    C = shape[-1]
    input = own(input, target)
    if reduction == "none":
        xs = input, target, weight
        return _rows(MULTILABEL_SOFT, xs, dim, (0.0, 0.0, 0.0), 2, False, None, dtype)
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        return Stock("autograd", "a weight that requires grad")
    return multilabel(input, target, weight, C if reduction == "sum" else shape.numel(), dtype)
