"""Random bits for dropout, assigned to the elements exactly as ATen's CUDA kernels assign them.

ATen starts T threads, each with its own subsequence of Philox4x32-10. Element e gets word w of the
Philox call whose counter is offset/4 + c. With i = e % VEC:

    VEC 4, 8  q = e // VEC   subsequence q % T   c = q // T * (VEC // 4) + i // 4   w = e % 4
    VEC 2     q = e // 2     subsequence q % T   c = q // T                         w = e % 2
    VEC 1     q = e // T     subsequence e % T   c = q // 4                         w = q % 4

VEC is the access width of `native_dropout`, or 1 for `bernoulli_`. An element is kept if
float32(word) * 2**-32 + 2**-33 < float32(1 - p). The left side is monotone in the word. So the host
turns the test into `word < bound` once per p, which saves a conversion and a multiply-add per
element.
"""

import functools
import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl

THREADS = tl.constexpr(256)  # threads of an ATen block; `blocks` such blocks have T threads


class Draw(NamedTuple):
    """Random numbers reserved from a generator, and which element gets which number.

    The kernel's seed is `seed` plus what `SEED` holds, its offset `offset` plus what `OFFSET`
    holds. Each replay of a captured CUDA graph refills the two tensors; elsewhere they hold 0, so
    that a call before the capture compiles just what the capture needs.

    Between the passes a node keeps the draw without its tensors (`kept`), and saves the state.
    """

    seed: int | None
    offset: int
    SEED: torch.Tensor | None
    OFFSET: torch.Tensor | None
    blocks: int
    vec: int
    scratch: torch.Tensor | None = None  # None under capture

    def new_state(self, like):
        """int64, where the forward kernel keeps what it used (`save_state`).

        Under capture the backward needs it, for it may belong to another graph. Elsewhere it is one
        tensor for all calls, of which the last two elements stay 0.
        """
        return like.new_empty(4, dtype=torch.int64) if self.scratch is None else self.scratch

    def kept(self):
        """The draw without its tensors; under capture, whose seed is in the state, it has none."""
        if self.SEED is None:
            return self
        seed = None if self.scratch is None else self.seed
        return self._replace(seed=seed, SEED=None, OFFSET=None, scratch=None)

    def from_state(self, STATE):
        """The draw of the backward, given the state of the forward."""
        kept = self.kept()
        if kept.seed is None:
            return kept._replace(seed=0, offset=0, SEED=STATE, OFFSET=STATE[2:])
        zeros = STATE[4:]
        return kept._replace(SEED=zeros, OFFSET=zeros, scratch=STATE)


def by_four(N, draw):
    """The constexpr `BY_FOUR` of `keep_tile`, for a matrix of N columns."""
    return draw is not None and draw.vec >= 4 and N % 4 == 0


def random_arguments(draw, bound):
    """The kernel arguments of a `Draw`; for None, arguments that are cheap to pass."""
    if draw is None:
        return 0, 0, None, None, 1, 0
    return draw.seed, draw.offset, draw.SEED, draw.OFFSET, draw.blocks, bound


def _float32(x):
    return struct.unpack("f", struct.pack("f", x))[0]


@functools.lru_cache(maxsize=256)
def bound(keep):
    """How many of the 2**32 words keep an element, if it is kept with probability `keep`."""
    keep = _float32(keep)
    low, high = 0, 2**32
    while low < high:
        word = (low + high) // 2
        if _float32(_float32(word) * 2.0**-32 + 2.0**-33) < keep:
            low = word + 1
        else:
            high = word
    return low


@triton.jit
def load_state(seed, offset, SEED, OFFSET):
    """The seed and offset of a `Draw`."""
    if SEED is not None:
        seed += tl.load(SEED)
        offset += tl.load(OFFSET)
    return seed, offset


@triton.jit
def save_state(STATE, seed, offset):
    """Store the seed and offset of the forward for `Draw.from_state`."""
    if STATE is not None:
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(STATE, seed)
            # not + 1: with + 2, OFFSET of the backward is aligned to 16 bytes
            tl.store(STATE + 2, offset)


@triton.jit
def words(counter, subsequence, seed):
    """The four words of Philox at (int64 counter, int32 subsequence), each with their shape."""
    lo = (counter & 0xFFFFFFFF).to(tl.uint32)
    hi = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    subsequence = subsequence.to(tl.uint32)
    return tl.philox(seed, lo, hi, subsequence, subsequence * 0)


@triton.jit
def _interleave(a, b, c, d):
    # (G,) four times -> (4 * G,). A thread then holds neighbours and stores them in one access.
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape([4 * a.shape[0]])


@triton.jit
def _pick(a, b, c, d, w):
    """Word w of the four."""
    return tl.where(w < 2, tl.where(w == 0, a, b), tl.where(w == 2, c, d))


@triton.jit
def keep_mask(start, seed, offset, blocks, bound, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """Which of the elements start to start + BLOCK, in storage order, are kept: int1 (BLOCK,).

    start: int64, a multiple of BLOCK; seed, offset: int64 (`load_state`); bound: uint32 (`bound`);
    blocks, VEC: of the `Draw`. One call of Philox serves 4 elements for VEC 4 and 8, 2 for VEC 2,
    and 1 for VEC 1. So VEC 1 needs a kernel of its own.
    """
    # T is either at least the element count or the device's full thread count (thousands, so larger
    # than BLOCK). A block therefore passes the end of T at most once, and one scalar division is
    # enough for all its lanes.
    T = blocks.to(tl.int64) * THREADS
    base = start // VEC
    rnd = base // T
    first = (base - rnd * T).to(tl.int32)
    threads = T.to(tl.int32)
    counter = offset // 4
    if VEC == 1:
        thread = first + tl.arange(0, BLOCK)
        over = thread >= threads
        q = rnd + over.to(tl.int64)
        a, b, c, d = words(counter + q // 4, tl.where(over, thread - threads, thread), seed)
        w = (q % 4).to(tl.int32)
        word = _pick(a, b, c, d, w)
    elif VEC == 2:
        thread = first + tl.arange(0, BLOCK // 2)
        over = thread >= threads
        q = rnd + over.to(tl.int64)
        a, b, c, d = words(counter + q, tl.where(over, thread - threads, thread), seed)
        word = tl.join(a, b).reshape([BLOCK])
    else:
        CALLS: tl.constexpr = VEC // 4
        group = tl.arange(0, BLOCK // 4)
        thread = first + group // CALLS
        over = thread >= threads
        q = (rnd + over.to(tl.int64)) * CALLS + group % CALLS
        a, b, c, d = words(counter + q, tl.where(over, thread - threads, thread), seed)
        word = _interleave(a, b, c, d)
    return word < bound


@triton.jit
def keep_mask_at(group, seed, offset, blocks, bound, VEC: tl.constexpr):
    """`keep_mask` for tiles -> int1 (R, 4 * C).

    group: (R, C), the value e // 4 of runs of 4 elements. VEC is 4 or 8. This takes a division per
    4 elements, so prefer `keep_mask` for elements in storage order.
    """
    CALLS: tl.constexpr = VEC // 4
    q = group // CALLS
    T = blocks * THREADS
    rnd = q // T
    counter = offset // 4 + rnd.to(tl.int64) * CALLS + group % CALLS
    a, b, c, d = words(counter, (q - rnd * T).to(tl.int32), seed)
    word = tl.join(tl.join(a, c), tl.join(b, d)).reshape([a.shape[0], 4 * a.shape[1]])
    return word < bound


@triton.jit
def keep_tile(
    m0, n0, N, seed, offset, blocks, bound,
    VEC: tl.constexpr, BY_FOUR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Which elements of a tile of a contiguous (M, N) matrix are kept: int1 (BLOCK_M, BLOCK_N).

    BY_FOUR: N divides by 4 and VEC is at least 4, so one call of Philox serves 4 elements. M * N is
    below 2**31.
    """
    rows = m0 + tl.arange(0, BLOCK_M)[:, None]
    if BY_FOUR:
        runs = rows * (N // 4) + n0 // 4 + tl.arange(0, BLOCK_N // 4)[None, :]
        keep = keep_mask_at(runs, seed, offset, blocks, bound, VEC)
    else:
        e = rows * N + n0 + tl.arange(0, BLOCK_N)[None, :]
        T = blocks * THREADS
        q = e // VEC
        round = q // T
        if VEC == 1:
            call = round // 4
            w = round % 4
        elif VEC == 2:
            call = round
            w = e % 2
        else:
            call = round * (VEC // 4) + e % VEC // 4
            w = e % 4
        a, b, c, d = words(offset // 4 + call.to(tl.int64), q - round * T, seed)
        keep = _pick(a, b, c, d, w) < bound
    return keep
