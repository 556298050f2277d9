"""All steps of one direction of a recurrent layer.

    h[t] = gates(gi[t], h[t-1] W_hh^T)        gi = x W_ih^T + b_ih, one product for all steps
    h[t] = W_hr gates(...)                    an LSTM with `proj_size`

The gates are those of kernels/recurrent.py. The rows of a batch do not depend on each other. A
program therefore takes 16 rows, and programs never wait for each other. Small layers run in one
kernel: in each step a program reads the state before the step, which all its threads wrote, and
W_hh. If W_hh is larger than the memory of a block, a kernel is launched for each step, and each
program computes some of the hidden units. PyTorch without cuDNN launches some 10 kernels a step and
layer forward, and some 20 backward.

The backward goes through the steps in the other order. In each step it computes the gradient of the
state, a product with the gradients of the gates of the step that follows, and then the gradients of
the gates. The gradients of the weights are one product each, over all steps, after the kernel. The
order of every sum is fixed.

The rows of a packed sequence take part in some steps only. A table says for each step where its
rows are. The state before a row's first step is h0; the states after its last step are hn and cn.

Sums are in fp32; the states, and the gates that are kept, have the dtype of x, as in PyTorch. The
gradient of the state is carried in fp32.
"""

import torch
import triton
import triton.language as tl

from fastnn.kernels import _gpus
from fastnn.kernels._config import here, tunable
from fastnn.kernels._launch import kernel
from fastnn.kernels._libdevice import tanh
from fastnn.kernels._sizes import cdiv, next_power_of_2
from fastnn.kernels._tl import dense
from fastnn.kernels.pointwise import logistic
from fastnn.kernels.recurrent import (
    _get,
    _get4,
    _put,
    _put4,
    _put_gru_gradients,
    _put_lstm_gradients,
)

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
COLUMNS = 5  # of the table of a packed sequence
ROWS = 16  # of the batch, in a program


@triton.jit
def _place(TABLE, b, s, T, N, slots, REVERSE: tl.constexpr):
    """Rows of step s in the input, in the states before and after it; which rows of the batch take
    part in it, and for which it is the last step.

    For step -1, of the backward only, `took_part` says nothing: a mask of the step would cost the
    forward scalar registers, of which AMD GPUs have few.

    TABLE (T, 5): int64, or None: the first row of a step and the number of its rows, the first row
    of the states after the step before and their number, and the number of rows of the next step.
    """
    if TABLE is not None:
        there = s >= 0
        TABLE += s * 5
        row = tl.load(TABLE, mask=there, other=0) + b
        took_part = b < tl.load(TABLE + 1, mask=there, other=0)
        before = tl.where(
            b < tl.load(TABLE + 3, mask=there, other=0),
            tl.load(TABLE + 2, mask=there, other=0) + b,
            b,
        )
        after = row + N
        final = took_part & (b >= tl.load(TABLE + 4, mask=there, other=0))
    else:
        t = s
        follow = s + 1
        if REVERSE:
            t = T - 1 - s
            follow = t + slots - 1
        row = tl.cast(t, tl.int64) * N + b
        before = tl.cast(t % slots, tl.int64) * N + b
        after = tl.cast(follow % slots, tl.int64) * N + b
        took_part = b < N
        final = took_part & (s == T - 1)
    return row, before, after, took_part, final


@triton.jit
def _weight(W, j, k, rows, width):
    """A tile of W^T: columns k, and rows j of `rows`."""
    mask = (j < rows)[None, :] & (k < width)[:, None]
    # One address and a tile of offsets: a tile of addresses takes more registers on AMD GPUs.
    return tl.load(W + (j[None, :] * width + k[:, None]), mask=mask, other=0.0)


@triton.jit
def _product(A, here, W, j, K, stride, width, acc, BLOCK_K: tl.constexpr):
    """acc + A[:, :K] W[:K, j], for rows A of a matrix, and W with rows `stride` apart."""
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        a = tl.load(A + k[None, :], mask=here & (k < K)[None, :], other=0.0)
        w = tl.load(
            W + k[:, None] * stride + j[None, :],
            mask=(k < K)[:, None] & (j < width)[None, :],
            other=0.0,
        )
        acc = tl.dot(a, w, acc, input_precision="ieee")
    return acc


@kernel(do_not_specialize=["T", "N", "slots", "first", "last"])
def _steps_fwd_kernel(
    GI, W, BH, HP, CS, Y, HN, CN, GATES, M, WR, TABLE, T, N, H, P, stride_y, slots, first, last,
    LSTM: tl.constexpr, GRU: tl.constexpr, RELU: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK_B rows of the batch through the steps from `first` to `last`.

    Programs along axis 1 share the hidden units; then there is one step. G is the number of gates;
    R is T * N, or the rows of a packed sequence. GI (R, G * H): float, contiguous. W (G * H, P):
    float, contiguous. BH (G * H,): float, or None. HP (slots * N, P): float, contiguous; the state
    before step t is in slot t % slots, the state after it in the next slot (the one before, if
    REVERSE), and the first one is there already. CS (slots * N, H): likewise; None without LSTM.
    With a TABLE, HP and CS are (N + R, P or H): the first states, and those after each row of the
    input. Y (R, P): float, rows stride_y apart. HN (N, P), CN (N, H): float, contiguous. GATES (R,
    4 * H): float, contiguous, or None; only of LSTM and GRU. M (R, H), WR (P, H): float,
    contiguous, or None: what is projected, and the weight. TABLE: see `_place`.
    """
    G: tl.constexpr = 4 if LSTM else 3 if GRU else 1
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    for s in range(first, last):
        row, before, after, took_part, final = _place(TABLE, b, s, T, N, slots, REVERSE)
        old = HP + before * P
        new = HP + after * P
        # The threads of this program have written the state of the step before.
        tl.debug_barrier()
        for j0 in range(tl.program_id(1) * BLOCK_J, H, tl.num_programs(1) * BLOCK_J):
            j = j0 + tl.arange(0, BLOCK_J)
            acc0 = tl.zeros([BLOCK_B, BLOCK_J], tl.float32)
            acc1 = tl.zeros([BLOCK_B, BLOCK_J], tl.float32)
            acc2 = tl.zeros([BLOCK_B, BLOCK_J], tl.float32)
            acc3 = tl.zeros([BLOCK_B, BLOCK_J], tl.float32)
            for k0 in range(0, P, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                h = tl.load(old + k[None, :], mask=took_part & (k < P)[None, :], other=0.0)
                acc0 = tl.dot(h, _weight(W, j, k, H, P), acc0, input_precision="ieee")
                if LSTM or GRU:
                    w1 = _weight(W + H * P, j, k, H, P)
                    acc1 = tl.dot(h, w1, acc1, input_precision="ieee")
                    w2 = _weight(W + 2 * H * P, j, k, H, P)
                    acc2 = tl.dot(h, w2, acc2, input_precision="ieee")
                if LSTM:
                    w3 = _weight(W + 3 * H * P, j, k, H, P)
                    acc3 = tl.dot(h, w3, acc3, input_precision="ieee")
            mask = took_part & (j < H)[None, :]
            if BH is not None:
                acc0 += _get(BH, j, j < H)[None, :]
                if LSTM or GRU:
                    acc1 += _get(BH, j + H, j < H)[None, :]
                    acc2 += _get(BH, j + 2 * H, j < H)[None, :]
                if LSTM:
                    acc3 += _get(BH, j + 3 * H, j < H)[None, :]
            j = j[None, :]
            gi = row * (G * H) + j
            kept = row * (4 * H) + j
            if LSTM:
                i = logistic(_get(GI, gi, mask) + acc0)
                f = logistic(_get(GI, gi + H, mask) + acc1)
                g = tanh(_get(GI, gi + 2 * H, mask) + acc2)
                o = logistic(_get(GI, gi + 3 * H, mask) + acc3)
                c = tl.fma(f, _get(CS, before * H + j, mask), i * g)
                _put(CS, after * H + j, c, mask)
                _put(CN, b * H + j, c, mask & final)
                y = o * tanh(c)
                if GATES is not None:
                    _put4(GATES, kept, H, i, f, g, o, mask)
            elif GRU:
                r = logistic(_get(GI, gi, mask) + acc0)
                z = logistic(_get(GI, gi + H, mask) + acc1)
                n = tanh(tl.fma(r, acc2, _get(GI, gi + 2 * H, mask)))
                y = tl.fma(z, _get(old, j, mask) - n, n)
                if GATES is not None:
                    _put4(GATES, kept, H, r, z, n, acc2, mask)
            else:
                g = _get(GI, gi, mask) + acc0
                if RELU:
                    y = tl.where(g < 0, 0.0, g)
                else:
                    y = tanh(g)
            if WR is None:
                _put(Y, row * stride_y + j, y, mask)
                _put(new, j, y, mask)
                _put(HN, b * H + j, y, mask & final)
            else:
                _put(M, row * H + j, y, mask)
        if WR is not None:
            tl.debug_barrier()
            for p0 in range(0, P, BLOCK_J):
                p = p0 + tl.arange(0, BLOCK_J)
                acc0 = tl.zeros([BLOCK_B, BLOCK_J], tl.float32)
                acc1 = tl.zeros([BLOCK_B, BLOCK_J], tl.float32)
                for k0 in range(0, H, BLOCK_K):
                    k = k0 + tl.arange(0, BLOCK_K)
                    m = tl.load(
                        M + row * H + k[None, :], mask=took_part & (k < H)[None, :], other=0.0
                    )
                    w = _weight(WR, p, k, P, H)
                    if M.dtype.element_ty == tl.float32:
                        # Nothing but the rounding of this sum enters the next state, and every
                        # later one. Two sums of half the terms each have errors half as large.
                        even = k % 2 == 0
                        m1 = tl.where(even[None, :], 0.0, m)
                        w1 = tl.where(even[:, None], 0.0, w)
                        acc1 = tl.dot(m1, w1, acc1, input_precision="ieee")
                        m = tl.where(even[None, :], m, 0.0)
                        w = tl.where(even[:, None], w, 0.0)
                    acc0 = tl.dot(m, w, acc0, input_precision="ieee")
                acc0 += acc1
                mask = took_part & (p < P)[None, :]
                p = p[None, :]
                _put(Y, row * stride_y + p, acc0, mask)
                _put(new, p, acc0, mask)
                _put(HN, b * P + p, acc0, mask & final)


@triton.jit
def _gates_bwd(
    HP, GATES, CS, DGI, DGH, DH, DC, dh, row, before, after, b, j, mask, H,
    LSTM: tl.constexpr, GRU: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Store the gradients of the gates, and what passes the gates, of one tile."""
    G: tl.constexpr = 4 if LSTM else 3 if GRU else 1
    at = b * H + j
    dg = row * (G * H) + j
    if LSTM:
        i, f, g, o = _get4(GATES, row * (4 * H) + j, H, mask)
        t = tanh(_get(CS, after * H + j, mask))
        dc = _get(DC, at, mask) + dh * o * (1.0 - t * t)
        c = _get(CS, before * H + j, mask)
        _put_lstm_gradients(DGI, dg, H, i, f, g, o, c, dc, dh * t, mask)
        _put(DC, at, dc * f, mask)
    elif GRU:
        r, z, n, m = _get4(GATES, row * (4 * H) + j, H, mask)
        h = _get(HP, before * H + j, mask)
        _put_gru_gradients(DGI, DGH, dg, H, r, z, n, m, h, dh, mask)
        _put(DH, at, dh * z, mask)
    else:
        y = _get(HP, after * H + j, mask)
        if RELU:
            _put(DGI, dg, tl.where(y <= 0, 0.0, dh), mask)
        else:
            _put(DGI, dg, dh * (1.0 - y * y), mask)


@kernel(do_not_specialize=["T", "N", "first", "last"])
def _steps_bwd_kernel(
    HP, DY, GATES, CS, W, DGI, DGH, DH, DC, DP, WR, TABLE, T, N, H, P, stride_dy, first, last,
    LSTM: tl.constexpr, GRU: tl.constexpr, RELU: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK_B rows of the batch back through steps T - 1 - first to T - last.

    Step -1 is the gradient of the state before the first step. Programs along axis 1 share the
    hidden units; then there is one step. HP ((T + 1) * N, P), CS ((T + 1) * N, H): float,
    contiguous, as in the forward; CS is None without LSTM. DY (R, P): float, rows stride_dy apart,
    or None. GATES, W, WR, TABLE: as in the forward. DGI, DGH (R, G * H): float, contiguous, the
    gradients of both products; the same tensor, except for a GRU. DH (N, P), DC (N, H): fp32,
    contiguous, the gradients of the states; at first those after the last step, and in the end
    those before the first. DC is None without LSTM. DP (R, P): float, contiguous, or None: the
    gradient of what WR gives.
    """
    G: tl.constexpr = 4 if LSTM else 3 if GRU else 1
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    for back in range(first, last):
        s = T - 1 - back
        row, before, after, took_part, final = _place(TABLE, b, s, T, N, T + 1, REVERSE)
        took_part &= s >= 0  # step -1 is a gradient, and no step
        # the rows that take part in the step that follows, in which their state was used
        used = (b < N) & (back > 0)
        if TABLE is not None:
            at_next = TABLE + (s + 1) * 5
            next_row = tl.load(at_next, mask=back > 0, other=0) + b
            used = b < tl.load(at_next + 1, mask=back > 0, other=0)
        elif REVERSE:
            next_row = row - N
        else:
            next_row = row + N
        # The threads of this program have written the gradients of that step.
        tl.debug_barrier()
        for j0 in range(tl.program_id(1) * BLOCK_J, P, tl.num_programs(1) * BLOCK_J):
            j = j0 + tl.arange(0, BLOCK_J)
            dh = tl.zeros([BLOCK_B, BLOCK_J], tl.float32)
            K = tl.where(back > 0, G * H, 0)
            dh = _product(DGH + next_row * (G * H), used, W, j, K, P, P, dh, BLOCK_K)
            exists = (j < P)[None, :]
            j = j[None, :]
            if GRU:
                dh += _get(DH, b * P + j, (used | final) & exists)
            else:
                dh += _get(DH, b * P + j, final & exists)
            # a row that begins after this step
            tl.store(DH + b * P + j, dh, mask=used & ~took_part & exists)
            mask = took_part & exists
            if DY is not None:
                dh += _get(DY, row * stride_dy + j, mask)
            if WR is None:
                _gates_bwd(
                    HP, GATES, CS, DGI, DGH, DH, DC, dh, row, before, after, b, j, mask, H,
                    LSTM, GRU, RELU,
                )  # fmt: skip
            else:
                _put(DP, row * P + j, dh, mask)
        if WR is not None:
            tl.debug_barrier()
            for j0 in range(0, H, BLOCK_J):
                j = j0 + tl.arange(0, BLOCK_J)
                dh = tl.zeros([BLOCK_B, BLOCK_J], tl.float32)
                dh = _product(DP + row * P, took_part, WR, j, P, H, H, dh, BLOCK_K)
                mask = took_part & (j < H)[None, :]
                _gates_bwd(
                    HP, GATES, CS, DGI, DGH, DH, DC, dh, row, before, after, b, j[None, :], mask, H,
                    LSTM, GRU, RELU,
                )  # fmt: skip


@tunable("BLOCK_B", "BLOCK_J", "BLOCK_K")
def _config(H, itemsize):
    # A tile of 32 spills scalar registers on AMD GPUs.
    widest = 16 if _gpus.facts(here()).backend == "hip" else 64 // itemsize
    size = max(16, min(next_power_of_2(H), widest))
    config = {"BLOCK_B": ROWS, "BLOCK_J": size, "BLOCK_K": size, "num_warps": 4, "num_stages": 1}
    # Without a limit, ptxas spills a few registers, so that another block fits. Here no more blocks
    # than multiprocessors are to be expected.
    config["maxnreg"] = 255
    return config


def one_kernel(w, w_hr=None):
    """Whether one kernel goes through all steps, because the weights fit the memory of a block.

    A step of a projected LSTM needs all hidden units twice, so a block has to compute all of them.
    """
    gpu = _gpus.facts(_gpus.architecture(w.get_device()))
    return w_hr is not None or w.numel() * w.element_size() <= gpu.shared_per_block


def _launch(one, tensors, sizes, most, kind, reverse, together):
    """Launch `one` for all of `most` steps at once, or for each step."""
    N, H = sizes[1:3]
    config = _config(H, tensors[0].element_size())
    options = {
        "LSTM": kind == "lstm", "GRU": kind == "gru", "RELU": kind == "rnn_relu",
        "REVERSE": reverse, **config,
    }  # fmt: skip
    rows = cdiv(N, config["BLOCK_B"])
    if together:
        one((rows, 1), *tensors, *sizes, 0, most, **options)
        return
    grid = rows, cdiv(H, config["BLOCK_J"])
    for step in range(most):
        one(grid, *tensors, *sizes, step, step + 1, **options)


def fwd(gi, w, bias, h0, c0, y, hn, cn, w_hr, table, T, kind, reverse, keep):
    """gi (R, G * H), w (G * H, P), bias (G * H,) or None, h0 (N, P), c0 (N, H) or None, w_hr (P, H)
    or None -> the gates (R, 4 * H) or None, the states and the cells or None, as the kernel says,
    and what was projected (R, H), or None.

    kind: a key of `GATES`. table: None, or of a packed sequence, as `_place` says. y (R, P), with
    rows at equal distances, hn and cn are written. keep: whether the backward will follow. If not,
    two slots take turns.
    """
    N, P = h0.shape
    H = w.shape[0] // GATES[kind]
    bias = None if bias is None else dense(bias)
    together = one_kernel(w, w_hr)
    slots = T + 1 if keep else 2
    rows = slots * N if table is None else N + gi.shape[0]
    start = (T - 1) % slots * N if reverse and table is None else 0

    def holding(first):
        states = first.new_empty((rows, first.shape[1]))
        states[start : start + N].copy_(first)
        return states

    states = holding(h0)
    cells = None if c0 is None else holding(c0)
    gated = kind in ("lstm", "gru")
    gates = gi.new_empty((gi.shape[0], 4 * H)) if keep and gated else None
    projected = None if w_hr is None else gi.new_empty((gi.shape[0], H))
    w_hr = None if w_hr is None else dense(w_hr)
    _launch(
        _steps_fwd_kernel,
        (gi, dense(w), bias, states, cells, y, hn, cn, gates, projected, w_hr, table),
        (T, N, H, P, y.stride(-2), slots), T, kind, reverse, together,
    )  # fmt: skip
    return gates, states, cells, projected


def bwd(dy, dhn, dcn, gates, states, cells, w, w_hr, table, T, N, R, kind, reverse, want_dh0):
    """dy (R, P), with rows at equal distances, dhn (N, P), dcn (N, H), or None for each; the rest
    as in `fwd` -> the gradients of gi, of the other product, of h0 (or None), of c0 (or None), and
    of what w_hr gives (or None).
    """
    P = states.shape[1]
    H = w.shape[0] // GATES[kind]

    def carried(given, width):
        if given is None:
            return torch.zeros((N, width), dtype=torch.float32, device=states.device)
        return given.to(torch.float32, copy=True)

    dh = carried(dhn, P)
    dc = carried(dcn, H) if kind == "lstm" else None
    dgi = states.new_empty((R, GATES[kind] * H))
    dgh = torch.empty_like(dgi) if kind == "gru" else dgi
    dp = None if w_hr is None else states.new_empty((R, P))
    together = one_kernel(w, w_hr)
    w_hr = None if w_hr is None else dense(w_hr)
    _launch(
        _steps_bwd_kernel,
        (states, dy, gates, cells, dense(w), dgi, dgh, dh, dc, dp, w_hr, table),
        (T, N, H, P, dy.stride(-2) if dy is not None else 0), T + want_dh0, kind, reverse, together,
    )  # fmt: skip
    dh0 = dh.to(states.dtype) if want_dh0 else None
    return dgi, dgh, dh0, dc.to(states.dtype) if dc is not None else None, dp
