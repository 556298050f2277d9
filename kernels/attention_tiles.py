"""What the attention kernels share: where a program works, and its tiles of scores.

`rows` and `cols` index a tile from its corner (m0, n0). Each has size 1 in the dimension of the
other. So the same code works on tiles of queries by keys and of keys by queries.
"""

import triton
import triton.language as tl

from fastnn.kernels import _philox
from fastnn.kernels._launch import kernel

LOG2E = tl.constexpr(1.4426950408889634)

# The constexpr VEC of the kernels says which draw decides on an element: 0 for no dropout, ROWS, or
# the access width that `native_dropout` has for a contiguous (B * H, L, S).
ROWS = tl.constexpr(-1)

# The constexpr EDGE says what a tile may cross: nothing (0), the diagonal, or also the last key.
DIAGONAL = tl.constexpr(1)
PAST_END = tl.constexpr(2)

# Integers whose divisibility does not change the code. G is not one of them. If G is known to be 1,
# there is no loop over the heads of a group, and the sums can stay in the tensor cores' own memory
# or layout between two loops.
_RUNTIME = [
    "H", "L", "S", "seed", "offset", "blocks", "bound",
    *(f"stride_{x}" for x in (
        "qb", "qh", "qm", "kb", "kh", "kn", "vb", "vh", "vn", "ob", "oh", "om", "mb", "mh", "mm",
        "mn", "db", "dh", "dm", "wb", "wh", "wm", "wn",
    )),
]  # fmt: skip


def attention_kernel(*more):
    """An entry kernel. `more` names more integers whose divisibility does not change the code."""

    def decorate(fn):
        names = fn.__code__.co_varnames[: fn.__code__.co_argcount]
        return kernel(fn, do_not_specialize=[n for n in (*_RUNTIME, *more) if n in names])

    return decorate


# ---- Where a program works -----------------------------------------------------------------------


@triton.jit
def query_block(L, H, BLOCK_M: tl.constexpr, LAST_FIRST: tl.constexpr):
    """(i, b, h, m0) of this program: batch and head i, which is head h of batch b; first query m0.

    The program has BLOCK_M queries. LAST_FIRST: programs run from the last block to the first.
    """
    blocks_m = tl.cdiv(L, BLOCK_M)
    i = tl.program_id(0) // blocks_m
    m = tl.program_id(0) % blocks_m
    if LAST_FIRST:
        m = blocks_m - 1 - m
    m0 = m * BLOCK_M
    return i, (i // H).to(tl.int64), (i % H).to(tl.int64), m0


@triton.jit
def at_head(X, b, h, stride_b, stride_h, UNIT: tl.constexpr):
    """X at head h of batch b. Strides are divided by UNIT, so that the compiler sees the factor."""
    return X + (b * stride_b + h * stride_h) * UNIT


@triton.jit
def key_range(S, m0, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(inner, end) of the keys that queries from m0 on see. Tiles before `inner` are complete."""
    end = S
    inner = S // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = tl.minimum(S, m0 + BLOCK_M)
        inner = tl.minimum(inner, (m0 + 1) // BLOCK_N * BLOCK_N)
    return inner, end


# ---- Tiles ---------------------------------------------------------------------------------------


@triton.jit
def row_tile(X, stride, left, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK, BLOCK_D): rows from X on. `left` of them exist; the others are zeros."""
    r = tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    if D == BLOCK_D:
        return tl.load(X + r * stride + d, mask=r < left, other=0.0)
    return tl.load(X + r * stride + d, mask=(r < left) & (d < D), other=0.0)


@triton.jit
def store_rows(X, x, stride, left, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    r = tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(X + r * stride + d, x.to(X.dtype.element_ty), mask=(r < left) & (d < D))


@triton.jit
def broadcast_tile(
    X, m0, n0, rows, cols, L, S, stride_m, stride_n,
    BY_ROW: tl.constexpr, BY_COL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """The values of X, an (L, S) matrix through its strides, at the tile.

    The result has size 1 in a dimension along which X is constant. BY_ROW, BY_COL: 0 if the stride
    is 0; BY_COL is 1 if the stride is 1.
    """
    X += m0 * stride_m.to(tl.int64)
    if BY_ROW:
        X += tl.minimum(rows, L - 1 - m0) * stride_m  # rows past the end read the last row again
    if BY_COL:
        if BY_COL == 1:
            X += n0 + cols
        else:
            X += n0 * stride_n.to(tl.int64)
            X += cols * stride_n
        if EDGE == PAST_END:
            x = tl.load(X, mask=cols < S - n0, other=0.0)
        else:
            x = tl.load(X)
    else:
        x = tl.load(X)
    return x


@triton.jit
def logits(
    s, m0, n0, rows, cols, L, S, MASK, stride_mm, stride_mn, scale,
    KEEP: tl.constexpr, BY_ROW: tl.constexpr, BY_COL: tl.constexpr, CAUSAL: tl.constexpr,
    EXACT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """t of a tile whose products are s; t / `scale` unless EXACT."""
    if EXACT:
        s *= scale
    if MASK is not None:
        mask = broadcast_tile(
            MASK, m0, n0, rows, cols, L, S, stride_mm, stride_mn, BY_ROW, BY_COL, EDGE
        )
        if KEEP:  # a sum, as in PyTorch: a nan stays nan
            s += tl.where(mask != 0, 0.0, -float("inf"))
        else:
            s += mask.to(tl.float32)
    if EDGE == PAST_END:
        s = tl.where(cols < S - n0, s, -float("inf"))
    if EDGE and CAUSAL:
        s = tl.where(rows + m0 >= cols + n0, s, -float("inf"))
    return s


@triton.jit
def weights_of(t, top, rest, scale, EXACT: tl.constexpr):
    """p from t and the two statistics of its row. If EXACT, p of an only key is exactly 1."""
    if EXACT:
        return tl.exp2((t - top - rest) * LOG2E)
    return tl.exp2(t * (scale * LOG2E) - (top + rest) * LOG2E)


@triton.jit
def kept_tile(
    i, m0, n0, L, S, seed, offset, blocks, bound,
    VEC: tl.constexpr, BY_FOUR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Which weights of a tile of batch and head i are kept: int1 (BLOCK_M, BLOCK_N)."""
    if VEC == ROWS:
        zero = tl.zeros((BLOCK_M, BLOCK_N // 4), tl.int32)
        row = (m0 + tl.arange(0, BLOCK_M))[:, None] + zero
        call = (n0 // 4 + tl.arange(0, BLOCK_N // 4))[None, :] + zero
        counter = offset // 4 + call.to(tl.int64)
        lo = (counter & 0xFFFFFFFF).to(tl.uint32)
        hi = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
        a, b, c, d = tl.philox(seed, lo, hi, row.to(tl.uint32), (i + zero).to(tl.uint32))
        word = tl.join(tl.join(a, c), tl.join(b, d)).reshape([BLOCK_M, BLOCK_N])
        keep = word < bound
    else:
        keep = _philox.keep_tile(
            i * L + m0, n0, S, seed, offset, blocks, bound, VEC, BY_FOUR, BLOCK_M, BLOCK_N
        )
    return keep
