"""Dropout: y = x * noise, with noise = scale where an element (or its channel) is kept, else 0.

The noise comes from a reserved part of the generator's stream (`_philox`). The backward, dx = dy *
noise, draws the same noise again, so no mask is stored. Passes over the elements (R read, W write):

    stock   dropout    forward 1R 1W + 1 byte mask   backward 2R 1W, one R is the mask
            in place   empty, 1W, 1R 1W, 2R 1W       backward 2R 1W
    here    all        forward 1R 1W                 backward 1R 1W

Alpha dropout adds one of two constants to each element: one if it is kept, the other if dropped.
"""

import torch
import triton
import triton.language as tl

from fastnn.kernels import _philox
from fastnn.kernels._config import tunable
from fastnn.kernels._launch import kernel
from fastnn.kernels._sizes import cdiv, next_power_of_2
from fastnn.kernels._tl import empty_as_product

_RUNTIME = ["n", "seed", "offset", "blocks", "bound", "tiles"]


@triton.jit
def _drop(x, keep, scale, kept, dropped, dtype: tl.constexpr, SHIFT: tl.constexpr):
    # A product, not a select: a dropped inf becomes nan, as in PyTorch.
    y = x.to(tl.float32) * tl.where(keep, scale, 0.0)
    if SHIFT:
        # PyTorch multiplies and adds in two steps, and rounds after each. So this is compiled
        # without fused multiply-add.
        y = y.to(dtype).to(tl.float32) + tl.where(keep, kept, dropped)
    return y.to(dtype)


@kernel(do_not_specialize=_RUNTIME)
def _dropout_kernel(
    X, Y, n: tl.int64, scale, seed: tl.int64, offset: tl.int64, SEED, OFFSET, STATE,
    blocks, bound: tl.uint32, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program drops elements of one block of BLOCK, by a draw whose accesses are VEC wide.

    X, Y (n,): float. SEED, OFFSET, STATE: int64, or None; see _philox.load_state and save_state.
    """
    seed, offset = _philox.load_state(seed, offset, SEED, OFFSET)
    _philox.save_state(STATE, seed, offset)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    keep = _philox.keep_mask(start, seed, offset, blocks, bound, VEC, BLOCK)
    X += start
    Y += start
    offs = tl.arange(0, BLOCK)
    if start + BLOCK <= n:  # no mask, so that accesses are 128 bits wide for every n
        x = tl.load(X + offs)
        tl.store(Y + offs, _drop(x, keep, scale, 0.0, 0.0, Y.dtype.element_ty, False))
    else:
        mask = offs < n - start
        x = tl.load(X + offs, mask=mask, other=0.0)
        tl.store(Y + offs, _drop(x, keep, scale, 0.0, 0.0, Y.dtype.element_ty, False), mask=mask)


@kernel(do_not_specialize=_RUNTIME)
def _strided_dropout_kernel(
    X, Y, n: tl.int64, scale, kept, dropped, seed: tl.int64, offset: tl.int64, SEED,
    OFFSET, STATE, blocks, bound: tl.uint32, tiles, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program drops four blocks of BLOCK, T apart. One Philox call decides on four elements.

    X, Y (n,): float. SEED, OFFSET, STATE: int64, or None; see _philox.load_state and save_state.
    """
    # With VEC 1, the four words of a call belong to elements T apart. So a program takes four runs.
    seed, offset = _philox.load_state(seed, offset, SEED, OFFSET)
    _philox.save_state(STATE, seed, offset)
    T = blocks.to(tl.int64) * _philox.THREADS
    tile = tl.program_id(0) % tiles
    call = tl.program_id(0) // tiles
    offs = tl.arange(0, BLOCK)
    counter = offset // 4 + call + tl.zeros([BLOCK], tl.int64)
    words = _philox.words(counter, tile * BLOCK + offs, seed)
    for i in tl.static_range(4):
        keep = words[i] < bound
        start = (call.to(tl.int64) * 4 + i) * T + tile * BLOCK
        left = tl.minimum(T - tile * BLOCK, n - start)
        x_ptr = X + start + offs
        y_ptr = Y + start + offs
        if left >= BLOCK:
            x = tl.load(x_ptr)
            tl.store(y_ptr, _drop(x, keep, scale, kept, dropped, Y.dtype.element_ty, SHIFT))
        elif left > 0:
            mask = offs < left
            x = tl.load(x_ptr, mask=mask, other=0.0)
            y = _drop(x, keep, scale, kept, dropped, Y.dtype.element_ty, SHIFT)
            tl.store(y_ptr, y, mask=mask)


@kernel(do_not_specialize=[*_RUNTIME, "rows", "row_tiles", "col_tiles"])
def _feature_dropout_kernel(
    X, Y, rows: tl.int64, cols, scale, kept, dropped, seed: tl.int64, offset: tl.int64,
    SEED, OFFSET, STATE, blocks, bound: tl.uint32, row_tiles, col_tiles, SHIFT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program drops whole channels in one tile of ROWS by COLS.

    X, Y (outer, rows, cols): float, contiguous. SEED, OFFSET, STATE: int64, or None; see
    _philox.load_state and save_state.
    """
    # X is (outer, rows, cols): (1, N * C, positions), or channels last (N, positions, C).
    seed, offset = _philox.load_state(seed, offset, SEED, OFFSET)
    _philox.save_state(STATE, seed, offset)
    pid = tl.program_id(0)
    col = pid % col_tiles * COLS
    row = (pid // col_tiles % row_tiles).to(tl.int64) * ROWS
    outer = (pid // col_tiles // row_tiles).to(tl.int64)
    if CHANNELS_LAST:
        channel = outer * cols + col
        keep = _philox.keep_mask(channel, seed, offset, blocks, bound, 1, COLS)[None, :]
    else:
        keep = _philox.keep_mask(row, seed, offset, blocks, bound, 1, ROWS)[:, None]
    r = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, COLS)[None, :]
    start = (outer * rows + row) * cols + col
    mask = (r < rows - row) & (c < cols - col)
    x = tl.load(X + start + r * cols + c, mask=mask, other=0.0)
    y = _drop(x, keep, scale, kept, dropped, Y.dtype.element_ty, SHIFT)
    tl.store(Y + start + r * cols + c, y, mask=mask)


@tunable("BLOCK")
def _element_config(itemsize):
    return {"BLOCK": 1024, "num_warps": 4}


@tunable("ROWS", "COLS")
def _config(cols, channels_last):
    # The bits of a channel are drawn once per thread that holds part of it, so a thread holds much
    # of one.
    COLS = min(next_power_of_2(cols), 128 if channels_last else 2048)
    return {"ROWS": 4096 // COLS if channels_last else 2048 // COLS, "COLS": COLS, "num_warps": 4}


def elements(x, draw, bound, scale, shift=None, state=None, out=None):
    """x dense -> y, with the layout of x; in `out` if given. Each element is dropped on its own.

    `bound`: from `_philox.bound`. `shift`: the constants added to a kept and to a dropped element.
    """
    y = empty_as_product(x, shift is not None) if out is None else out
    n = x.numel()
    random = (draw.seed, draw.offset, draw.SEED, draw.OFFSET, state, draw.blocks, bound)
    if draw.vec > 1:
        config = _element_config(x.element_size())
        _dropout_kernel(
            (cdiv(n, config["BLOCK"]),), x, y, n, scale, *random, VEC=draw.vec, **config
        )  # fmt: skip
        return y
    BLOCK = 2048 // x.element_size()
    kept, dropped = shift or (0.0, 0.0)
    threads = draw.blocks * _philox.THREADS.value
    tiles = cdiv(threads, BLOCK)
    _strided_dropout_kernel(
        (tiles * cdiv(n, 4 * threads),), x, y, n, scale, kept, dropped, *random, tiles,
        SHIFT=shift is not None, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return y


def channels(x, draw, bound, scale, shift=None, state=None, out=None):
    """x (N, C, ...), contiguous or channels last -> y, laid out as x; drops whole channels."""
    N, C = x.shape[:2]
    y = empty_as_product(x, x.numel() == N * C) if out is None else out
    positions = x.numel() // (N * C)
    channels_last = not x.is_contiguous()
    outer, rows, cols = (N, positions, C) if channels_last else (1, N * C, positions)
    kept, dropped = shift or (0.0, 0.0)
    config = _config(cols, channels_last)
    row_tiles, col_tiles = cdiv(rows, config["ROWS"]), cdiv(cols, config["COLS"])
    _feature_dropout_kernel(
        (outer * row_tiles * col_tiles,), x, y, rows, cols, scale, kept, dropped,
        draw.seed, draw.offset, draw.SEED, draw.OFFSET, state, draw.blocks, bound,
        row_tiles, col_tiles, SHIFT=shift is not None, CHANNELS_LAST=channels_last,
        **config, enable_fp_fusion=False,
    )  # fmt: skip
    return y


def unbatched(x, draw, bound, scale, shift=None, state=None, out=None):
    """Like `channels`, for x (C, ...)."""
    y = torch.empty_like(x) if out is None else out
    channels(x.unsqueeze(0), draw, bound, scale, shift, state, y.unsqueeze(0))
    return y
