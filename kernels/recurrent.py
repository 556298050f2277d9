"""The gates of recurrent cells, after the two products GI = x W_ih^T and GH = h W_hh^T.

    RNN     h' = act(gi + gh)                             act is tanh or relu
    LSTM    i, f, o = sigmoid(gi + gh)   g = tanh(gi + gh)   c' = f c + i g   h' = o tanh(c')
    GRU     r, z = sigmoid(gi + gh)      n = tanh(gi_n + r gh_n)   h' = n + z (h - n)

Each gate has its own columns of gi and gh, to which the biases are added first. Memory-bound. In
units of B * H elements, with gradients:
    RNN     forward 3; backward 3         PyTorch: forward 5; backward 3
    LSTM    forward 15; backward 13       PyTorch: the same, by two kernels of its own
    GRU     forward 12; backward 13       PyTorch: the same, by two kernels of its own

The backward gives the gradients of gi and gh. They are the same tensor, except for the GRU, whose
gh_n is multiplied by r. The bias gradients are their sums over the batch.
"""

import triton
import triton.language as tl

from fastnn.kernels._config import tunable
from fastnn.kernels._launch import kernel
from fastnn.kernels._libdevice import tanh
from fastnn.kernels._sizes import cdiv, next_power_of_2
from fastnn.kernels._tl import dense
from fastnn.kernels.pointwise import logistic


@triton.jit
def _tile(B, H, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """This program's rows of the batch, its columns, and which of them exist."""
    blocks = tl.cdiv(H, BLOCK_H)
    b = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    j = tl.program_id(0) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    return b, j, (b < B) & (j < H)


@triton.jit
def _half(G, BIAS, row, col, mask):
    """One of the two products, with its bias, at columns `col`."""
    g = tl.load(G + row + col, mask=mask, other=0.0).to(tl.float32)
    if BIAS is not None:
        g += tl.load(BIAS + col, mask=mask, other=0.0).to(tl.float32)
    return g


@triton.jit
def _gate(GI, GH, BI, BH, row, col, mask):
    return _half(GI, BI, row, col, mask) + _half(GH, BH, row, col, mask)


@triton.jit
def _put(OUT, at, value, mask):
    tl.store(OUT + at, value.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def _get(X, at, mask):
    return tl.load(X + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _put4(GATES, at, H, g0, g1, g2, g3, mask):
    """Store what a row of gates keeps for the backward."""
    _put(GATES, at, g0, mask)
    _put(GATES, at + H, g1, mask)
    _put(GATES, at + 2 * H, g2, mask)
    _put(GATES, at + 3 * H, g3, mask)


@triton.jit
def _get4(GATES, at, H, mask):
    g0 = _get(GATES, at, mask)
    g1 = _get(GATES, at + H, mask)
    g2 = _get(GATES, at + 2 * H, mask)
    g3 = _get(GATES, at + 3 * H, mask)
    return g0, g1, g2, g3


@triton.jit
def _put_lstm_gradients(DG, at, H, i, f, g, o, c, dc, do, mask):
    """c: before the step. do: the gradient of o. Stores the gradients of the sums in the gates."""
    _put(DG, at, dc * g * (1.0 - i) * i, mask)
    _put(DG, at + H, dc * c * (1.0 - f) * f, mask)
    _put(DG, at + 2 * H, dc * i * (1.0 - g * g), mask)
    _put(DG, at + 3 * H, do * (1.0 - o) * o, mask)


@triton.jit
def _put_gru_gradients(DGI, DGH, at, H, r, z, n, m, h, dy, mask):
    """h: before the step. m: its part of n. Stores the gradients of the sums in the gates."""
    dz = dy * (h - n) * (1.0 - z) * z
    dn = dy * (1.0 - z) * (1.0 - n * n)
    dr = dn * m * (1.0 - r) * r
    _put(DGI, at, dr, mask)
    _put(DGI, at + H, dz, mask)
    _put(DGI, at + 2 * H, dn, mask)
    _put(DGH, at, dr, mask)
    _put(DGH, at + H, dz, mask)
    _put(DGH, at + 2 * H, dn * r, mask)


@kernel(do_not_specialize=["B"])
def _rnn_cell_fwd_kernel(
    GI, GH, BI, BH, Y, B, H,
    RELU: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A program computes y of one tile of the batch and the hidden units.

    GI, GH, Y (B, H): float, contiguous. BI, BH (H,): float, or None.
    """
    b, j, mask = _tile(B, H, BLOCK_B, BLOCK_H)
    g = _gate(GI, GH, BI, BH, b * H, j, mask)
    if RELU:
        y = tl.where(g < 0, 0.0, g)
    else:
        y = tanh(g)
    _put(Y, b * H + j, y, mask)


@kernel(do_not_specialize=["B"])
def _rnn_cell_bwd_kernel(
    DY, Y, DG, B, H, RELU: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr
):
    """A program computes the gradient of the sum of the products for one tile.

    DY, Y, DG (B, H): float, contiguous.
    """
    b, j, mask = _tile(B, H, BLOCK_B, BLOCK_H)
    at = b * H + j
    dy = _get(DY, at, mask)
    y = _get(Y, at, mask)
    if RELU:
        dg = tl.where(y <= 0, 0.0, dy)
    else:
        dg = dy * (1.0 - y * y)
    _put(DG, at, dg, mask)


@kernel(do_not_specialize=["B"])
def _lstm_cell_fwd_kernel(
    GI, GH, BI, BH, C, Y, YC, GATES, B, H, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr
):
    """A program computes h' (Y) and c' (YC) of one tile of the batch and the hidden units.

    GI, GH (B, 4H): float, contiguous. BI, BH (4H,): float, or None. C, Y, YC (B, H): float,
    contiguous. GATES (B, 4H): float, contiguous, or None: i, f, g, o.
    """
    b, j, mask = _tile(B, H, BLOCK_B, BLOCK_H)
    row = b * H * 4
    i = logistic(_gate(GI, GH, BI, BH, row, j, mask))
    f = logistic(_gate(GI, GH, BI, BH, row, j + H, mask))
    g = tanh(_gate(GI, GH, BI, BH, row, j + 2 * H, mask))
    o = logistic(_gate(GI, GH, BI, BH, row, j + 3 * H, mask))
    c = tl.fma(f, _get(C, b * H + j, mask), i * g)
    _put(Y, b * H + j, o * tanh(c), mask)
    _put(YC, b * H + j, c, mask)
    if GATES is not None:
        _put4(GATES, row + j, H, i, f, g, o, mask)


@kernel(do_not_specialize=["B"])
def _lstm_cell_bwd_kernel(
    DY, DYC, C, YC, GATES, DG, DC, B, H, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr
):
    """A program computes the gradients of the gates and of c for one tile.

    DY, DYC (B, H): float, contiguous, or None. C, YC, DC (B, H), GATES, DG (B, 4H): float,
    contiguous.
    """
    b, j, mask = _tile(B, H, BLOCK_B, BLOCK_H)
    row = b * H * 4
    at = b * H + j
    i, f, g, o = _get4(GATES, row + j, H, mask)
    dc = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    do = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    if DYC is not None:
        dc += _get(DYC, at, mask)
    if DY is not None:
        dy = _get(DY, at, mask)
        t = tanh(_get(YC, at, mask))
        do = dy * t
        dc += dy * o * (1.0 - t * t)
    _put_lstm_gradients(DG, row + j, H, i, f, g, o, _get(C, at, mask), dc, do, mask)
    _put(DC, at, dc * f, mask)


@kernel(do_not_specialize=["B"])
def _gru_cell_fwd_kernel(
    GI, GH, BI, BH, HX, Y, GATES, B, H, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr
):
    """A program computes h' (Y) of one tile of the batch and the hidden units.

    GI, GH (B, 3H): float, contiguous. BI, BH (3H,): float, or None. HX, Y (B, H): float,
    contiguous. GATES (B, 4H): float, contiguous, or None: r, z, n, and h's part of n.
    """
    b, j, mask = _tile(B, H, BLOCK_B, BLOCK_H)
    row = b * H * 3
    at = b * H + j
    r = logistic(_gate(GI, GH, BI, BH, row, j, mask))
    z = logistic(_gate(GI, GH, BI, BH, row, j + H, mask))
    m = _half(GH, BH, row, j + 2 * H, mask)
    n = tanh(tl.fma(r, m, _half(GI, BI, row, j + 2 * H, mask)))
    h = _get(HX, at, mask)
    _put(Y, at, tl.fma(z, h - n, n), mask)
    if GATES is not None:
        _put4(GATES, b * H * 4 + j, H, r, z, n, m, mask)


@kernel(do_not_specialize=["B"])
def _gru_cell_bwd_kernel(
    DY, HX, GATES, DGI, DGH, DH, B, H, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr
):
    """A program computes the gradients of both products and of h for one tile.

    DY, HX, DH (B, H), GATES (B, 4H), DGI, DGH (B, 3H): float, contiguous.
    """
    b, j, mask = _tile(B, H, BLOCK_B, BLOCK_H)
    r, z, n, m = _get4(GATES, b * H * 4 + j, H, mask)
    at = b * H + j
    dy = _get(DY, at, mask)
    _put_gru_gradients(DGI, DGH, b * H * 3 + j, H, r, z, n, m, _get(HX, at, mask), dy, mask)
    _put(DH, at, dy * z, mask)


@tunable("BLOCK_B", "BLOCK_H")
def _cell_config(H):
    BLOCK_H = min(next_power_of_2(H), 512)
    return {"BLOCK_B": 512 // BLOCK_H, "BLOCK_H": BLOCK_H, "num_warps": 4}


def _launch(one, tensors, B, H, **options):
    config = _cell_config(H)
    grid = (cdiv(B, config["BLOCK_B"]) * cdiv(H, config["BLOCK_H"]),)
    one(grid, *tensors, B, H, **options, **config)


def rnn_fwd(gi, gh, b_ih, b_hh, relu):
    """gi, gh (B, H), b_ih, b_hh (H,) or None -> h' (B, H)."""
    y = gi.new_empty(gi.shape)
    _launch(_rnn_cell_fwd_kernel, (gi, gh, b_ih, b_hh, y), *gi.shape, RELU=relu)
    return y


def rnn_bwd(dy, y, relu):
    """dy, y (B, H) -> the gradient of gi, and of gh."""
    dg = y.new_empty(y.shape)
    _launch(_rnn_cell_bwd_kernel, (dy, dense(y), dg), *y.shape, RELU=relu)
    return dg


def lstm_fwd(gi, gh, b_ih, b_hh, c, keep):
    """gi, gh (B, 4H), b_ih, b_hh (4H,) or None, c (B, H) -> h', c' (B, H), gates (B, 4H) or None.

    keep: whether the gates are wanted.
    """
    B, H = c.shape
    y, yc = c.new_empty((B, H)), c.new_empty((B, H))
    gates = c.new_empty((B, 4 * H)) if keep else None
    _launch(_lstm_cell_fwd_kernel, (gi, gh, b_ih, b_hh, dense(c), y, yc, gates), B, H)
    return y, yc, gates


def lstm_bwd(dy, dyc, c, yc, gates):
    """dy, dyc (B, H), one of them may be None; the rest as in `lstm_fwd` -> the gradient of gi, and
    of gh; the gradient of c."""
    dg, dc = gates.new_empty(gates.shape), c.new_empty(c.shape)
    _launch(_lstm_cell_bwd_kernel, (dy, dyc, dense(c), dense(yc), gates, dg, dc), *c.shape)
    return dg, dc


def gru_fwd(gi, gh, b_ih, b_hh, h, keep):
    """gi, gh (B, 3H), b_ih, b_hh (3H,) or None, h (B, H) -> h' (B, H), gates (B, 4H) or None.

    keep: whether the gates are wanted.
    """
    B, H = h.shape
    y = h.new_empty((B, H))
    gates = h.new_empty((B, 4 * H)) if keep else None
    _launch(_gru_cell_fwd_kernel, (gi, gh, b_ih, b_hh, dense(h), y, gates), B, H)
    return y, gates


def gru_bwd(dy, h, gates):
    """dy, h (B, H), gates (B, 4H) -> the gradients of gi, of gh, and of h past both products."""
    B, H = h.shape
    dgi, dgh = h.new_empty((B, 3 * H)), h.new_empty((B, 3 * H))
    dh = h.new_empty((B, H))
    _launch(_gru_cell_bwd_kernel, (dy, dense(h), gates, dgi, dgh, dh), B, H)
    return dgi, dgh, dh
