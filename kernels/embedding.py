"""Embedding: y[n] = W[index[n]]. dW[v] is the sum, or the mean, of the dy[n] with index[n] = v.

Memory-bound. Bytes, for N indices of D columns and V rows:
    forward   2ND, as stock
    backward  here ND + VD: the program of each row sums the row's run of sorted indices, and writes
              the row
              stock fills dW with zeros first: ND + 2VD at worst

One program sums each row in the order of the indices, in fp32, so equal inputs give equal bits.
Long runs are first summed in blocks of 64, so that one frequent index does not delay the others. An
index outside [0, V) reads nothing: its output is nan, and its gradient is dropped.
"""

import torch
import triton
import triton.language as tl

from fastnn.kernels._config import tunable
from fastnn.kernels._launch import kernel
from fastnn.kernels._sizes import cdiv, next_power_of_2
from fastnn.kernels._tl import dense

_RUN = tl.constexpr(64)  # sorted indices per block


@kernel(do_not_specialize=["N", "V", "col_tiles"])
def _embedding_fwd_kernel(
    W, INDEX, Y, N: tl.int64, V: tl.int64, D, stride_w, col_tiles,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program copies COLS columns of the rows of ROWS indices.

    W (V, D): float, unit stride in D. INDEX (N,): ints. Y (N, D): float, contiguous.
    """
    pid = tl.program_id(0)
    n = (pid // col_tiles).to(tl.int64) * ROWS
    col = pid % col_tiles * COLS
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLS)
    index = tl.load(INDEX + n + r, mask=r < N - n, other=0).to(tl.int64)
    valid = (index >= 0) & (index < V)
    tl.device_assert(valid | (r >= N - n), "embedding: index out of range")
    mask = (r < N - n)[:, None] & (c < D - col)[None, :]
    rows = index[:, None] * stride_w
    y = tl.load(W + col + rows + c[None, :], mask=mask & valid[:, None], other=float("nan"))
    tl.store(Y + n * D + col + r[:, None] * D + c[None, :], y, mask=mask)


@triton.jit
def _sum_of_rows(
    DY, ORDER, BAG, COUNT, SAMPLE, PLACE, first, last, D, c, in_row, acc, ROWS: tl.constexpr
):
    r = tl.arange(0, ROWS)
    for i in range(first, last, ROWS):
        mask = r < last - i
        n = tl.load(ORDER + i + r, mask=mask, other=0)
        row = n
        if BAG is not None:
            row = tl.load(BAG + n, mask=mask, other=-1).to(tl.int64)
            mask = row >= 0
        each = mask[:, None] & in_row[None, :]
        if PLACE is not None:
            at = tl.load(PLACE + row[:, None] * D + c[None, :], mask=each, other=0)
            each &= at == n[:, None].to(PLACE.dtype.element_ty)
        dy = tl.load(DY + row[:, None] * D + c[None, :], mask=each, other=0.0).to(tl.float32)
        if SAMPLE is not None:
            dy *= tl.load(SAMPLE + n, mask=mask, other=0.0).to(tl.float32)[:, None]
        if COUNT is not None:
            dy /= tl.load(COUNT + row, mask=mask, other=1).to(tl.float32)[:, None]
        acc += dy
    return acc


@kernel(do_not_specialize=["col_tiles"])
def _embedding_bwd_blocks_kernel(
    DY, SORTED, ORDER, BAG, COUNT, SAMPLE, PLACE, PARTIAL, D, col_tiles,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program sums COLS columns of one block of 64 sorted indices, if they are all the same.

    DY (N, D): float, contiguous. SORTED, ORDER (N,): ints, the sorted indices and their old
    positions. BAG, COUNT, SAMPLE, PLACE: as for the next kernel. PARTIAL (N // 64, D): fp32.
    """
    block = tl.program_id(0) // col_tiles
    first = block * _RUN
    if tl.load(SORTED + first) == tl.load(SORTED + first + _RUN - 1):
        c = tl.program_id(0) % col_tiles * COLS + tl.arange(0, COLS)
        acc = tl.zeros([ROWS, COLS], tl.float32)
        acc = _sum_of_rows(
            DY, ORDER, BAG, COUNT, SAMPLE, PLACE, first, first + _RUN, D, c, c < D, acc, ROWS
        )
        tl.store(PARTIAL + block.to(tl.int64) * D + c, tl.sum(acc, 0), mask=c < D)


@kernel(do_not_specialize=["padding_idx", "col_tiles"])
def _embedding_bwd_dw_kernel(
    DY, BOUNDS, ORDER, BAG, COUNT, SAMPLE, PLACE, PARTIAL, DW, D, padding_idx: tl.int64, col_tiles,
    BY_FREQUENCY: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program computes COLS columns of one row of dW, and loops over the run of its index.

    DY (N, D): float, contiguous; (B, D) for bags. BOUNDS (V + 1,): ints, the begin of each row's
    run. ORDER (N,): ints. PARTIAL (N // 64, D): fp32, sums of complete blocks. DW (V, D): float,
    contiguous. All of these are None without bags: BAG (N,): ints, the bag of each index, or -1.
    COUNT (B,): ints, the divisors of means. SAMPLE (N,): float, the weights. PLACE (B, D): ints,
    the position of the one index that has the gradient; as uint8, its last byte.
    """
    v = (tl.program_id(0) // col_tiles).to(tl.int64)
    c = tl.program_id(0) % col_tiles * COLS + tl.arange(0, COLS)
    r = tl.arange(0, ROWS)
    lo = tl.load(BOUNDS + v)
    hi = tl.load(BOUNDS + v + 1)
    hi = tl.where(v == padding_idx, lo, hi)
    # Complete blocks lie in [lo, hi) from `first` on. The rest of the run lies before and after
    # them.
    first = tl.cdiv(lo, _RUN)
    last = tl.maximum(hi // _RUN, first)
    whole = last > first
    acc = tl.zeros([ROWS, COLS], tl.float32)
    end = tl.where(whole, first * _RUN, hi)
    acc = _sum_of_rows(DY, ORDER, BAG, COUNT, SAMPLE, PLACE, lo, end, D, c, c < D, acc, ROWS)
    for i in range(first, last, ROWS):
        mask = (r < last - i)[:, None] & (c < D)[None, :]
        at = (i + r).to(tl.int64)[:, None] * D + c[None, :]
        acc += tl.load(PARTIAL + at, mask=mask, other=0.0)
    begin = tl.where(whole, last * _RUN, hi)
    acc = _sum_of_rows(DY, ORDER, BAG, COUNT, SAMPLE, PLACE, begin, hi, D, c, c < D, acc, ROWS)
    dw = tl.sum(acc, 0)
    if BY_FREQUENCY:
        dw = dw / tl.maximum(hi - lo, 1).to(tl.float32)
    tl.store(DW + v * D + c, dw.to(DW.dtype.element_ty), mask=c < D)


@tunable("ROWS")
def _gather_config(D):
    COLS = min(next_power_of_2(D), 1024)
    # With 512 rows of 64-bit addresses, sm_80 spills.
    return {"ROWS": min(2048 // COLS, 256), "COLS": COLS, "num_warps": 4}


def fwd(weight, indices):
    """weight (V, D) with unit stride in D, indices of any shape -> (*indices.shape, D)."""
    V, D = weight.shape
    N = indices.numel()
    y = weight.new_empty((*indices.shape, D))
    if not y.numel():
        return y
    config = _gather_config(D)
    ROWS = config["ROWS"]
    col_tiles = cdiv(D, config["COLS"])
    _embedding_fwd_kernel(
        (cdiv(N, ROWS) * col_tiles,), weight, dense(indices), y, N, V, D,
        weight.stride(0), col_tiles, **config,
    )  # fmt: skip
    return y


@tunable("ROWS")
def _config(D):
    COLS = min(next_power_of_2(D), 1024)
    num_warps = max(1, COLS // 256)
    return {"ROWS": min(16, 512 * num_warps // COLS), "COLS": COLS, "num_warps": num_warps}


def bwd(
    dy, indices, num_embeddings, padding_idx, scale_grad_by_freq,
    bag=None, count=None, sample=None, place=None,
):  # fmt: skip
    """dy (*indices.shape, D) -> dW (num_embeddings, D), of dy's dtype; zeros in row padding_idx.

    With `bag`, indices are (N,) and dy is (B, D); see the kernel.
    """
    D = dy.shape[-1]
    dw = dy.new_empty((num_embeddings, D))
    if not dw.numel():
        return dw
    indices = indices.reshape(-1)
    N = indices.numel()
    if num_embeddings < 2**31:
        indices = indices.to(torch.int32)  # half the passes of the sort
    run, order = torch.sort(indices, stable=True)
    rows = torch.arange(num_embeddings + 1, dtype=run.dtype, device=run.device)
    bounds = torch.searchsorted(run, rows, out_int32=N < 2**31)
    config = _config(D)
    col_tiles = cdiv(D, config["COLS"])
    blocks = N // _RUN.value
    partial = dy.new_empty((blocks, D), dtype=torch.float32)
    dy = dense(dy)
    _embedding_bwd_blocks_kernel(
        (blocks * col_tiles,), dy, run, order, bag, count, sample, place, partial, D, col_tiles,
        **config,
    )  # fmt: skip
    _embedding_bwd_dw_kernel(
        (num_embeddings * col_tiles,), dy, bounds, order, bag, count, sample, place, partial, dw,
        D, padding_idx, col_tiles, BY_FREQUENCY=scale_grad_by_freq, **config,
    )  # fmt: skip
    return dw
