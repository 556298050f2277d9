"""Embedding: y[n] = W[index[n]]; dW[v] is the sum of the dy[n] with index[n] = v, or their mean.

Memory-bound. Bytes, N indices of D columns out of V rows:
    forward   2ND, as stock
    backward  here ND + VD: the owner of each row sums its run of the sorted indices and writes it
              stock fills dW with zeros first: ND + 2VD at worst

Each row is summed by one program in the order of the indices, in fp32, so equal inputs give equal
bits; long runs are summed by blocks of 64 first, so that one frequent index does not hold up all.
An index outside [0, V) reads nothing: its output is nan, and its gradient goes nowhere.
"""

import torch
import triton
import triton.language as tl

from fastnn.kernels._config import tunable
from fastnn.kernels._launch import kernel
from fastnn.kernels._sizes import cdiv, next_power_of_2
from fastnn.kernels._tl import dense

_RUN = tl.constexpr(64)  # sorted indices that make a block


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
def _sum_of_rows(DY, ORDER, first, last, D, c, in_row, acc, ROWS: tl.constexpr):
    r = tl.arange(0, ROWS)
    for i in range(first, last, ROWS):
        mask = r < last - i
        n = tl.load(ORDER + i + r, mask=mask, other=0)
        mask = mask[:, None] & in_row[None, :]
        acc += tl.load(DY + n[:, None] * D + c[None, :], mask=mask, other=0.0).to(tl.float32)
    return acc


@kernel(do_not_specialize=["col_tiles"])
def _embedding_bwd_blocks_kernel(
    DY, SORTED, ORDER, PARTIAL, D, col_tiles, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """A program sums COLS columns of one block of 64 sorted indices, if they are all the same.

    DY (N, D): float, contiguous. SORTED, ORDER (N,): ints, the sorted indices and where each was.
    PARTIAL (N // 64, D): fp32.
    """
    block = tl.program_id(0) // col_tiles
    first = block * _RUN
    if tl.load(SORTED + first) == tl.load(SORTED + first + _RUN - 1):
        c = tl.program_id(0) % col_tiles * COLS + tl.arange(0, COLS)
        acc = tl.zeros([ROWS, COLS], tl.float32)
        acc = _sum_of_rows(DY, ORDER, first, first + _RUN, D, c, c < D, acc, ROWS)
        tl.store(PARTIAL + block.to(tl.int64) * D + c, tl.sum(acc, 0), mask=c < D)


@kernel(do_not_specialize=["padding_idx", "col_tiles"])
def _embedding_bwd_dw_kernel(
    DY, BOUNDS, ORDER, PARTIAL, DW, D, padding_idx: tl.int64, col_tiles,
    BY_FREQUENCY: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program makes COLS columns of one row of dW, and loops over the run of its index.

    DY (N, D): float, contiguous. BOUNDS (V + 1,): ints, where the run of each row begins. ORDER
    (N,): ints. PARTIAL (N // 64, D): fp32, sums of whole blocks. DW (V, D): float, contiguous.
    """
    v = (tl.program_id(0) // col_tiles).to(tl.int64)
    c = tl.program_id(0) % col_tiles * COLS + tl.arange(0, COLS)
    r = tl.arange(0, ROWS)
    lo = tl.load(BOUNDS + v)
    hi = tl.load(BOUNDS + v + 1)
    hi = tl.where(v == padding_idx, lo, hi)
    # Whole blocks lie in [lo, hi) from `first` on; the rest of the run lies before and after them.
    first = tl.cdiv(lo, _RUN)
    last = tl.maximum(hi // _RUN, first)
    whole = last > first
    acc = tl.zeros([ROWS, COLS], tl.float32)
    acc = _sum_of_rows(DY, ORDER, lo, tl.where(whole, first * _RUN, hi), D, c, c < D, acc, ROWS)
    for i in range(first, last, ROWS):
        mask = (r < last - i)[:, None] & (c < D)[None, :]
        at = (i + r).to(tl.int64)[:, None] * D + c[None, :]
        acc += tl.load(PARTIAL + at, mask=mask, other=0.0)
    acc = _sum_of_rows(DY, ORDER, tl.where(whole, last * _RUN, hi), hi, D, c, c < D, acc, ROWS)
    dw = tl.sum(acc, 0)
    if BY_FREQUENCY:
        dw = dw / tl.maximum(hi - lo, 1).to(tl.float32)
    tl.store(DW + v * D + c, dw.to(DW.dtype.element_ty), mask=c < D)


@tunable("ROWS")
def _gather_config(D):
    COLS = min(next_power_of_2(D), 1024)
    # Of 64-bit addresses; those of 512 rows spill on sm_80.
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


def bwd(dy, indices, num_embeddings, padding_idx, scale_grad_by_freq):
    """dy (*indices.shape, D) -> dW (num_embeddings, D) in its dtype, with zeros in padding_idx."""
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
        (blocks * col_tiles,), dy, run, order, partial, D, col_tiles, **config
    )
    _embedding_bwd_dw_kernel(
        (num_embeddings * col_tiles,), dy, bounds, order, partial, dw, D, padding_idx, col_tiles,
        BY_FREQUENCY=scale_grad_by_freq, **config,
    )  # fmt: skip
    return dw
