"""Bags of embeddings: y[b] is the sum, the mean or the maximum of W[index[n]] over n in bag b.

Memory-bound. Bytes, for N indices in B bags, D columns and V rows:
    forward   ND + BD, as PyTorch, in one launch; N more of the bag of each index, for the backward
    backward  sum, mean   ND + VD: each row of dW sums the gradients of the bags of its indices
              maximum     as much; besides, ND places of maxima are read: a byte each if all bags
                          have the same width, up to 256, else four
              weights     2ND + N: the products of the rows and the gradients of their bags
              PyTorch fills dW with zeros first. Its gradient of the maximum adds with atomics

The backward is that of `embedding`, by sorted indices, so equal inputs give equal bits. A bag that
is empty, or has only the index for padding, is zeros. The maximum follows PyTorch: the first of
equal values has the gradient, and a nan counts only if the bag begins with it. An index outside
[0, V) reads nothing: its bag is nan.
"""

import torch
import triton
import triton.language as tl

from fastnn.kernels import embedding
from fastnn.kernels._config import tunable
from fastnn.kernels._launch import kernel
from fastnn.kernels._sizes import cdiv, next_power_of_2
from fastnn.kernels._tl import dense

SUM, MEAN, MAX = 0, 1, 2


@triton.jit
def _bag(OFFSETS, b, N, B, width):
    """The positions [begin, end) of bag b, never outside [0, N)."""
    if OFFSETS is None:
        begin = b * width
        end = begin + width
    else:
        begin = tl.load(OFFSETS + b).to(tl.int64)
        # indices past the last offset belong to the last bag
        end = tl.load(OFFSETS + b + 1, mask=b + 1 < B, other=0).to(tl.int64)
        end = tl.where(b + 1 < B, end, N)
    return tl.minimum(tl.maximum(begin, 0), N), tl.minimum(end, N)


@kernel(do_not_specialize=["N", "B", "V", "width", "padding_idx", "col_tiles"])
def _embedding_bag_fwd_kernel(
    W, INDEX, OFFSETS, SAMPLE, Y, BAG, COUNT, PLACE, N: tl.int64, B: tl.int64, V: tl.int64, D,
    stride_w, width: tl.int64, padding_idx: tl.int64, col_tiles,
    MODE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program computes COLS columns of one bag, and loops over ROWS of its indices at a time.

    W (V, D): float, unit stride in D. INDEX (N,): ints. OFFSETS (B,): ints, or None if all bags
    have `width` indices. SAMPLE (N,): float, or None. Y (B, D): float, contiguous. BAG (N,): ints,
    the bag of each index, -1 outside of all, or None. COUNT (B,): ints, the indices of each bag
    that are not padding, or None. PLACE (B, D): ints, where the maximum is, -1 if nowhere, or None;
    as uint8, the last byte of it.
    """
    b = (tl.program_id(0) // col_tiles).to(tl.int64)
    tile = tl.program_id(0) % col_tiles
    c = tile * COLS + tl.arange(0, COLS)
    r = tl.arange(0, ROWS)
    begin, end = _bag(OFFSETS, b, N, B, width)
    # Offsets should begin with 0. The first bag's program marks what lies before them.
    start = tl.where(b == 0, 0, begin)
    count = tl.zeros([ROWS], tl.int64)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    if MODE == 2:
        acc = tl.full([ROWS, COLS], -float("inf"), tl.float32)
        place = tl.zeros([ROWS, COLS], tl.int64) + N  # past all positions
        spoilt = tl.zeros([ROWS, COLS], tl.int32)
        first = N
    for i in range(start, end, ROWS):
        n = i + r
        inside = n < end
        index = tl.load(INDEX + n, mask=inside, other=0).to(tl.int64)
        valid = (index >= 0) & (index < V)
        tl.device_assert(valid | ~inside, "embedding_bag: index out of range")
        in_bag = inside & (n >= begin)
        if BAG is not None:
            of = tl.where(in_bag, b, -1).to(BAG.dtype.element_ty)
            tl.store(BAG + n, of, mask=inside & (tile == 0))
        kept = in_bag & ((index != padding_idx) | ~valid)
        count += kept.to(tl.int64)
        mask = (kept & valid)[:, None] & (c < D)[None, :]
        x = tl.load(W + index[:, None] * stride_w + c[None, :], mask=mask, other=0.0)
        x = tl.where((kept & ~valid)[:, None], float("nan"), x.to(tl.float32))
        if MODE == 2:
            at = tl.where(kept, n, N)
            first = tl.minimum(first, tl.min(at, 0))
            spoils = (x != x) & (~valid | (n == first))[:, None]
            spoilt |= spoils.to(tl.int32)
            better = kept[:, None] & (x == x) & ((x > acc) | (place == N))
            acc = tl.where(better, x, acc)
            place = tl.where(better, at[:, None], place)
        else:
            if SAMPLE is not None:
                x *= tl.load(SAMPLE + n, mask=kept, other=0.0).to(tl.float32)[:, None]
            acc += x
    total = tl.sum(count, 0)
    if MODE == 2:
        y = tl.max(acc, 0)
        place = tl.min(tl.where(acc == y[None, :], place, N), 0)
        spoilt = tl.max(spoilt, 0) > 0
        y = tl.where(spoilt, float("nan"), tl.where(total > 0, y, 0.0))
        if PLACE is not None:
            place = tl.where(total > 0, tl.where(spoilt, first, place), -1)
            tl.store(PLACE + b * D + c, place.to(PLACE.dtype.element_ty), mask=c < D)
    else:
        y = tl.sum(acc, 0)
    if MODE == 1:
        y = y / tl.maximum(total, 1).to(tl.float32)
        if COUNT is not None:
            if tile == 0:
                tl.store(COUNT + b, total.to(COUNT.dtype.element_ty))
    tl.store(Y + b * D + c, y.to(Y.dtype.element_ty), mask=c < D)


@kernel(do_not_specialize=["N", "V", "padding_idx"])
def _embedding_bag_bwd_sample_kernel(
    DY, W, INDEX, BAG, DSAMPLE, N: tl.int64, V: tl.int64, D, stride_w, padding_idx: tl.int64,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program computes the gradients of the weights of ROWS indices; 0 for padding.

    DY (B, D): float, contiguous. W (V, D): float, unit stride in D. INDEX, BAG (N,): ints.
    DSAMPLE (N,): float, contiguous.
    """
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = tl.load(INDEX + n, mask=n < N, other=0).to(tl.int64)
    b = tl.load(BAG + n, mask=n < N, other=-1).to(tl.int64)
    valid = (index >= 0) & (index < V)
    kept = (b >= 0) & ((index != padding_idx) | ~valid)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for col in range(0, D, COLS):
        c = col + tl.arange(0, COLS)
        mask = (kept & valid)[:, None] & (c < D)[None, :]
        w = tl.load(W + index[:, None] * stride_w + c[None, :], mask=mask, other=0.0)
        dy = tl.load(DY + b[:, None] * D + c[None, :], mask=mask, other=0.0)
        acc += w.to(tl.float32) * dy.to(tl.float32)
    total = tl.where(kept & ~valid, float("nan"), tl.sum(acc, 1))
    tl.store(DSAMPLE + n, total.to(DSAMPLE.dtype.element_ty), mask=n < N)


@tunable("ROWS")
def _config(D):
    COLS = min(next_power_of_2(D), 256)
    config = {"ROWS": max(1, min(1024 // COLS, 16)), "COLS": COLS, "num_warps": 4}
    config["maxnreg"] = 255  # else ptxas spills 3 registers of a maximum, so that a block more fits
    return config


@tunable("ROWS")
def _sample_config(D):
    COLS = min(next_power_of_2(D), 128)
    return {"ROWS": max(1, min(2048 // COLS, 64)), "COLS": COLS, "num_warps": 4}


def fwd(weight, indices, offsets, bags, width, sample, mode, padding_idx, saves):
    """weight (V, D) with unit stride in D, indices (N,), offsets (bags,) or None -> y (bags, D).

    Without offsets all bags have `width` indices. Also returned, if `saves` and if the backward of
    the mode reads them, else None: bag (N,), count (bags,), place (bags, D).
    """
    V, D = weight.shape
    N = indices.numel()
    y = weight.new_empty((bags, D))
    ints = torch.int32 if max(N, bags) < 2**31 else torch.int64
    bag = indices.new_empty((N,), dtype=ints) if saves else None
    count = indices.new_empty((bags,), dtype=ints) if saves and mode == MEAN else None
    place = None
    if saves and mode == MAX:
        # Positions in one bag differ in their last byte.
        place = indices.new_empty((bags, D), dtype=torch.uint8 if 0 < width <= 256 else ints)
    if y.numel():
        config = _config(D)
        col_tiles = cdiv(D, config["COLS"])
        _embedding_bag_fwd_kernel(
            (bags * col_tiles,), weight, dense(indices),
            None if offsets is None else dense(offsets),
            None if sample is None else dense(sample),
            y, bag, count, place, N, bags, V, D, weight.stride(0), width, padding_idx, col_tiles,
            MODE=mode, **config,
        )  # fmt: skip
    elif bag is not None:
        bag.fill_(-1)
    return y, bag, count, place


def bwd(dy, indices, num_embeddings, padding_idx, bag, count, sample, place):
    """dy (B, D), and what the forward saved -> dW (num_embeddings, D), of dy's dtype."""
    sample = None if sample is None else dense(sample)
    return embedding.bwd(dy, indices, num_embeddings, padding_idx, False, bag, count, sample, place)


def bwd_sample(dy, weight, indices, bag, padding_idx):
    """dy (B, D), weight (V, D) with unit stride in D -> the gradients of the weights (N,)."""
    V, D = weight.shape
    N = indices.numel()
    dsample = weight.new_empty((N,))
    if not D:
        return dsample.zero_()
    config = _sample_config(D)
    _embedding_bag_bwd_sample_kernel(
        (cdiv(N, config["ROWS"]),), dense(dy), weight, dense(indices), bag, dsample, N, V, D,
        weight.stride(0), padding_idx, **config,
    )  # fmt: skip
    return dsample
