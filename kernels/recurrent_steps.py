"""All steps of one direction of a recurrent layer, in one kernel per direction of time.

    h[t] = gates(gi[t], h[t-1] W_hh^T)        gi = x W_ih^T + b_ih, one product for all steps

The gates are those of kernels/recurrent.py. The rows of a batch do not depend on each other. A
program therefore takes 16 rows through all steps, and programs never wait for each other. In each
step it reads the state before the step, which all its threads wrote, and W_hh, which stays in L2.
PyTorch without cuDNN launches some 10 kernels a step and layer forward, and some 20 backward.

The backward goes through the steps in the other order. In each step it computes the gradients of
the gates, and then, from all of them, the gradient of the state before the step. The gradients of
the weights are one product each, over all steps, after the kernel. The order of every sum is fixed.

Sums are in fp32; the states, and the gates that are kept, have the dtype of x, as in PyTorch. The
gradient of the state is carried in fp32.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from fastnn.kernels._config import tunable
from fastnn.kernels._launch import kernel
from fastnn.kernels._sizes import cdiv, next_power_of_2
from fastnn.kernels._tl import dense
from fastnn.kernels.pointwise import logistic
from fastnn.kernels.recurrent import _get, _put

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@triton.jit
def _weight(W, j, k, H):
    """A tile of W_hh^T: rows k of the state, columns j of the gates."""
    mask = (j < H)[None, :] & (k < H)[:, None]
    return tl.load(W + j[None, :] * H + k[:, None], mask=mask, other=0.0)


@kernel(do_not_specialize=["T", "N", "slots"])
def _steps_fwd_kernel(
    GI, W, BH, HP, CS, Y, HN, GATES, T, N, H, stride_y, slots,
    LSTM: tl.constexpr, GRU: tl.constexpr, RELU: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK_B rows of the batch through all steps, BLOCK_J hidden units at a time.

    G is the number of gates. GI (T, N, G * H): float, contiguous. W (G * H, H): float, contiguous.
    BH (G * H,): float, or None. HP (slots, N, H): float, contiguous; the state before step t is in
    slot t % slots, the state after it in the next slot (the one before, if REVERSE), and the first
    one is there already. CS (slots, N, H): likewise, the cells after s steps in slot s % slots;
    None without LSTM. Y (T, N, H): float, rows stride_y apart. HN (N, H): float, contiguous. GATES
    (T, N, 4 * H): float, contiguous, or None; only of LSTM and GRU.
    """
    G: tl.constexpr = 4 if LSTM else 3 if GRU else 1
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    for s in range(T):
        t = s
        after = s + 1
        if REVERSE:
            t = T - 1 - s
            after = t + slots - 1
        row = tl.cast(t, tl.int64) * N + b
        old = HP + (tl.cast(t % slots, tl.int64) * N + b) * H
        new = HP + (tl.cast(after % slots, tl.int64) * N + b) * H
        # The threads of this program have written the state of the step before.
        tl.debug_barrier()
        for j0 in range(0, H, BLOCK_J):
            j = j0 + tl.arange(0, BLOCK_J)
            acc0 = tl.zeros([BLOCK_B, BLOCK_J], tl.float32)
            acc1 = tl.zeros([BLOCK_B, BLOCK_J], tl.float32)
            acc2 = tl.zeros([BLOCK_B, BLOCK_J], tl.float32)
            acc3 = tl.zeros([BLOCK_B, BLOCK_J], tl.float32)
            for k0 in range(0, H, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                h = tl.load(old + k[None, :], mask=(b < N) & (k < H)[None, :], other=0.0)
                acc0 = tl.dot(h, _weight(W, j, k, H), acc0, input_precision="ieee")
                if LSTM or GRU:
                    acc1 = tl.dot(h, _weight(W + H * H, j, k, H), acc1, input_precision="ieee")
                    acc2 = tl.dot(h, _weight(W + 2 * H * H, j, k, H), acc2, input_precision="ieee")
                if LSTM:
                    acc3 = tl.dot(h, _weight(W + 3 * H * H, j, k, H), acc3, input_precision="ieee")
            mask = (b < N) & (j < H)[None, :]
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
                g = libdevice.tanh(_get(GI, gi + 2 * H, mask) + acc2)
                o = logistic(_get(GI, gi + 3 * H, mask) + acc3)
                c = CS + (tl.cast(s % slots, tl.int64) * N + b) * H
                c_new = CS + (tl.cast((s + 1) % slots, tl.int64) * N + b) * H
                c = f * _get(c, j, mask) + i * g
                _put(c_new, j, c, mask)
                y = o * libdevice.tanh(c)
                if GATES is not None:
                    _put(GATES, kept, i, mask)
                    _put(GATES, kept + H, f, mask)
                    _put(GATES, kept + 2 * H, g, mask)
                    _put(GATES, kept + 3 * H, o, mask)
            elif GRU:
                r = logistic(_get(GI, gi, mask) + acc0)
                z = logistic(_get(GI, gi + H, mask) + acc1)
                n = libdevice.tanh(_get(GI, gi + 2 * H, mask) + r * acc2)
                y = n + z * (_get(old, j, mask) - n)
                if GATES is not None:
                    _put(GATES, kept, r, mask)
                    _put(GATES, kept + H, z, mask)
                    _put(GATES, kept + 2 * H, n, mask)
                    _put(GATES, kept + 3 * H, acc2, mask)
            else:
                g = _get(GI, gi, mask) + acc0
                if RELU:
                    y = tl.where(g < 0, 0.0, g)
                else:
                    y = libdevice.tanh(g)
            _put(Y, row * stride_y + j, y, mask)
            _put(new, j, y, mask)
            _put(HN, b * H + j, y, mask & (s == T - 1))


@kernel(do_not_specialize=["T", "N"])
def _steps_bwd_kernel(
    HP, DY, GATES, CS, W, DGI, DGH, DH, DC, T, N, H, stride_dy,
    LSTM: tl.constexpr, GRU: tl.constexpr, RELU: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK_B rows of the batch back through all steps.

    HP, CS (T + 1, N, H): float, contiguous, as in the forward; CS is None without LSTM. DY (T, N,
    H): float, rows stride_dy apart, or None. GATES, W: as in the forward. DGI, DGH (T, N, G * H):
    float, contiguous, the gradients of both products; the same tensor, except for a GRU. DH, DC (N,
    H): fp32, contiguous, the gradients of the states; at first those after the last step, and in
    the end those before the first. DC is None without LSTM.
    """
    G: tl.constexpr = 4 if LSTM else 3 if GRU else 1
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    for back in range(T):
        s = T - 1 - back
        t = s
        after = s + 1
        if REVERSE:
            t = back
            after = (back + T) % (T + 1)
        row = tl.cast(t, tl.int64) * N + b
        for j0 in range(0, H, BLOCK_J):
            j = j0 + tl.arange(0, BLOCK_J)[None, :]
            mask = (b < N) & (j < H)
            at = b * H + j
            dh = _get(DH, at, mask)
            if DY is not None:
                dh += _get(DY, row * stride_dy + j, mask)
            kept = row * (4 * H) + j
            dg = row * (G * H) + j
            if LSTM:
                i = _get(GATES, kept, mask)
                f = _get(GATES, kept + H, mask)
                g = _get(GATES, kept + 2 * H, mask)
                o = _get(GATES, kept + 3 * H, mask)
                c = CS + (tl.cast(s, tl.int64) * N + b) * H + j
                tanh = libdevice.tanh(_get(c, tl.cast(N, tl.int64) * H, mask))
                dc = _get(DC, at, mask) + dh * o * (1.0 - tanh * tanh)
                _put(DGI, dg, dc * g * (1.0 - i) * i, mask)
                _put(DGI, dg + H, dc * _get(c, 0, mask) * (1.0 - f) * f, mask)
                _put(DGI, dg + 2 * H, dc * i * (1.0 - g * g), mask)
                _put(DGI, dg + 3 * H, dh * tanh * (1.0 - o) * o, mask)
                _put(DC, at, dc * f, mask)
            elif GRU:
                r = _get(GATES, kept, mask)
                z = _get(GATES, kept + H, mask)
                n = _get(GATES, kept + 2 * H, mask)
                dz = dh * (_get(HP, row * H + j, mask) - n) * (1.0 - z) * z
                dn = dh * (1.0 - z) * (1.0 - n * n)
                dr = dn * _get(GATES, kept + 3 * H, mask) * (1.0 - r) * r
                _put(DGI, dg, dr, mask)
                _put(DGI, dg + H, dz, mask)
                _put(DGI, dg + 2 * H, dn, mask)
                _put(DGH, dg, dr, mask)
                _put(DGH, dg + H, dz, mask)
                _put(DGH, dg + 2 * H, dn * r, mask)
                _put(DH, at, dh * z, mask)
            else:
                y = _get(HP, (tl.cast(after, tl.int64) * N + b) * H + j, mask)
                if RELU:
                    _put(DGI, dg, tl.where(y <= 0, 0.0, dh), mask)
                else:
                    _put(DGI, dg, dh * (1.0 - y * y), mask)
        tl.debug_barrier()
        for j0 in range(0, H, BLOCK_J):
            j = j0 + tl.arange(0, BLOCK_J)[None, :]
            mask = (b < N) & (j < H)
            acc = tl.zeros([BLOCK_B, BLOCK_J], tl.float32)
            for k0 in range(0, G * H, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                there = k < G * H
                a = tl.load(
                    DGH + row * (G * H) + k[None, :], mask=(b < N) & there[None, :], other=0.0
                )
                w = tl.load(W + k[:, None] * H + j, mask=there[:, None] & (j < H), other=0.0)
                acc = tl.dot(a, w, acc, input_precision="ieee")
            if GRU:
                acc += _get(DH, b * H + j, mask)
            tl.store(DH + b * H + j, acc, mask=mask)
        tl.debug_barrier()


@tunable("BLOCK_B", "BLOCK_J", "BLOCK_K")
def _config(H, itemsize):
    size = max(16, min(next_power_of_2(H), 64 // itemsize))
    config = {"BLOCK_B": 16, "BLOCK_J": size, "BLOCK_K": size, "num_warps": 4, "num_stages": 1}
    # Without a limit, ptxas spills a few registers, so that another block fits. Here no more blocks
    # than multiprocessors are to be expected.
    config["maxnreg"] = 255
    return config


def _kind(kind):
    return {"LSTM": kind == "lstm", "GRU": kind == "gru", "RELU": kind == "rnn_relu"}


def fwd(gi, w, bias, h0, c0, y, hn, kind, reverse, keep):
    """gi (T, N, G * H), w (G * H, H), bias (G * H,) or None, h0, c0 (N, H) -> the gates (T, N, 4 *
    H) or None, the states, as the kernel says (T + 1, N, H), the cells (T + 1, N, H) or None.

    kind: a key of `GATES`. y (T, N, H), with rows at equal distances, and hn (N, H) are written.
    keep: whether the backward will follow. If not, two slots take turns.
    """
    T, N, _ = gi.shape
    H = h0.shape[1]
    bias = None if bias is None else dense(bias)
    slots = T + 1 if keep else 2
    states = h0.new_empty((slots, N, H))
    states[(T - 1) % slots if reverse else 0].copy_(h0)
    cells = None
    if c0 is not None:
        cells = c0.new_empty((slots, N, H))
        cells[0].copy_(c0)
    gated = kind in ("lstm", "gru")
    gates = gi.new_empty((T, N, 4 * H)) if keep and gated else None
    config = _config(H, gi.element_size())
    _steps_fwd_kernel(
        (cdiv(N, config["BLOCK_B"]),), gi, dense(w), bias, states, cells, y, hn, gates, T, N, H,
        y.stride(1), slots, **_kind(kind), REVERSE=reverse, **config,
    )  # fmt: skip
    return gates, states, cells


def bwd(dy, dhn, dcn, gates, states, cells, w, kind, reverse):
    """dy (T, N, H), with rows at equal distances, dhn, dcn (N, H), or None for each; the rest as in
    `fwd` -> the gradients of gi, of the other product, of h0 and of c0 (or None).
    """
    N, H = states.shape[1:]
    T = states.shape[0] - 1

    def carried(given):
        if given is None:
            return torch.zeros((N, H), dtype=torch.float32, device=states.device)
        return given.to(torch.float32, copy=True)

    dh = carried(dhn)
    dc = carried(dcn) if kind == "lstm" else None
    dgi = states.new_empty((T, N, GATES[kind] * H))
    dgh = torch.empty_like(dgi) if kind == "gru" else dgi
    config = _config(H, states.element_size())
    _steps_bwd_kernel(
        (cdiv(N, config["BLOCK_B"]),), states, dy, gates, cells, dense(w), dgi, dgh, dh, dc, T,
        N, H, dy.stride(1) if dy is not None else 0, **_kind(kind), REVERSE=reverse,
        **config,
    )  # fmt: skip
    return dgi, dgh, dh.to(states.dtype), dc.to(states.dtype) if dc is not None else None
