"""Tiles, warps and stages of the attention kernels, from a GPU's row in the table of GPUs.

For 16-bit inputs, `config` chooses in this order:

1. the largest tile of a kernel for its head size, `_LARGEST`;
2. `RULES`: what else takes registers (a mask, dropout, operands beside the sums) makes it smaller;
3. warps: four for a forward whose values they can hold, else eight;
4. `EXCEPTIONS`: what the compiler needs on a GPU that the exception names;
5. stages: as many as are wanted, if shared memory can hold them.

Nothing here was timed. The rules and exceptions were found by compiling. Of the kernels that the
tests compile, none spills registers, except on AMD GPUs, where `auto` runs PyTorch. A rule's reason
says what takes the registers. Its number of spills (instructions that move a register to memory or
back) is that of one compile without the rule, for a head size in its range, by Triton 3.7.1.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from fastnn.kernels._config import tunable
from fastnn.kernels._gpus import GPU, facts
from fastnn.kernels._sizes import next_power_of_2

KINDS = ("fwd", "dkdv", "dq", "dmask")


class Shape(NamedTuple):
    """The properties of a call that determine its tiles."""

    L: int
    D: int
    E: int
    itemsize: int
    arch: str
    masked: bool = False
    causal: bool = False
    noisy: bool = False
    grouped: bool = False
    mask_itemsize: int = 0
    """Bytes per element of a float mask, which shared memory holds too; 0 for a bool mask."""

    @property
    def d(self) -> int:
        """The head size of a tile: a power of two, at least 16."""
        return max(next_power_of_2(max(self.D, self.E)), 16)

    @property
    def ragged(self) -> bool:
        """Whether a tile is wider than a head. All its accesses are then masked."""
        return max(self.D, self.E) != self.d

    @property
    def plain(self) -> bool:
        return not (self.masked or self.noisy)

    @property
    def gpu(self) -> GPU:
        return facts(self.arch)

    @property
    def beside(self) -> bool:
        """Whether operands and scores are in registers, together with the sums."""
        return self.gpu.sums_beside_operands


@dataclass(frozen=True)
class TileRule:
    """What to change for `kinds` if the head size is in `heads` and `where` holds."""

    why: str
    kinds: tuple[str, ...]
    heads: tuple[int, int]
    """The smallest and the largest `Shape.d`."""
    where: Callable[[Shape], bool]
    most: dict[str, int] = field(default_factory=dict)
    """Upper limits, by name."""
    sets: dict[str, int] = field(default_factory=dict)
    """New values, by name."""
    gpus: tuple[str, ...] = ()
    """The architectures that it applies to; empty for all."""

    def holds(self, kind: str, shape: Shape) -> bool:
        return (
            kind in self.kinds
            and self.heads[0] <= shape.d <= self.heads[1]
            and (not self.gpus or shape.arch in self.gpus)
            and self.where(shape)
        )

    def apply(self, chosen: dict[str, int]) -> dict[str, int]:
        limited = {k: min(chosen[k], n) for k, n in self.most.items()}
        return {**chosen, **limited, **self.sets}


def _tile(m: int, n: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n}


# For each kernel: (largest head size, BLOCK_M, BLOCK_N, wanted stages).
_LARGEST = {
    "fwd": ((128, 128, 64, 3), (256, 64, 32, 2)),
    "dkdv": ((64, 64, 128, 2), (128, 32, 128, 2), (256, 32, 64, 2)),
    # With 128 queries, L2 reads keys and values half as often: 107 us of 205 by `testing.roof`, for
    # 32 heads of 128 and 2048 queries on sm_90, whose tensor cores need 112.
    "dq": ((128, 128, 64, 2), (256, 64, 32, 2)),
    "dmask": ((64, 128, 64, 2), (128, 64, 64, 2), (256, 64, 32, 2)),
}

_EVERY, _SMALL, _MEDIUM, _LARGE = (16, 256), (16, 64), (128, 128), (256, 256)

RULES = (
    TileRule(
        "eight warps: 2 spills; four warps: 231 registers, so one block at a time",
        ("fwd",), (16, 32), lambda s: s.beside and s.plain, most=_tile(64, 64),
    ),
    TileRule(
        "mask and dropout together: 18 spills",
        ("fwd",), _SMALL, lambda s: s.beside and s.masked and s.noisy, most=_tile(64, 64),
    ),
    TileRule(
        "causal, with its loop over the diagonal: 8 spills",
        ("fwd",), _MEDIUM, lambda s: s.beside and s.causal, most=_tile(64, 64),
    ),
    TileRule(
        "a mask or dropout: 365 spills",
        ("fwd",), _MEDIUM, lambda s: s.beside and not s.plain,
        most={**_tile(64, 32), "num_stages": 2},
    ),
    TileRule(
        "mask and dropout together",
        ("fwd",), _MEDIUM, lambda s: s.masked and s.noisy, most=_tile(64, 64),
    ),
    TileRule(
        "a second sum, beside operands, a mask or dropout",
        ("dkdv",), _SMALL, lambda s: s.beside or not s.plain, most=_tile(32, 128),
    ),
    TileRule(
        "dropout, or a mask whose accesses are masked",
        ("dkdv",), _SMALL, lambda s: s.beside and (s.noisy or (s.masked and s.ragged)),
        most=_tile(32, 64),
    ),
    TileRule(
        "masked accesses, or mask and dropout together",
        ("dkdv",), _MEDIUM, lambda s: s.beside and (s.ragged or (s.masked and s.noisy)),
        most=_tile(32, 64),
    ),
    TileRule(
        "one more loop, over the heads of a group, around those of dk and dv",
        ("dkdv",), _EVERY, lambda s: s.grouped, most=_tile(64, 64),
    ),
    TileRule(
        "the same, with a mask, dropout or large heads",
        ("dkdv",), _EVERY, lambda s: s.grouped and not (s.plain and s.d <= 64), most=_tile(64, 32),
    ),
    TileRule(
        "a mask beside operands",
        ("dq", "dmask"), _SMALL, lambda s: s.beside and s.masked, most=_tile(64, 64),
    ),
    TileRule(
        "dropout beside operands: 8 spills; a small tile needs four warps",
        ("dq", "dmask"), _SMALL, lambda s: s.beside and s.noisy,
        most=_tile(64, 32), sets={"num_warps": 4},
    ),
    TileRule(
        "the same with a mask whose accesses are masked: four warps spill",
        ("dq", "dmask"), _SMALL, lambda s: s.beside and s.noisy and s.masked and s.ragged,
        sets={"num_warps": 8},
    ),
    TileRule(
        "operands, a mask or dropout beside a wide sum; masked accesses, heads of 121: 506 spills",
        ("dq",), _MEDIUM, lambda s: s.beside or not s.plain or s.ragged, most=_tile(64, 64),
    ),
    TileRule(
        "mask and dropout together (30 spills), or one more loop, around a sum of scores",
        ("dmask",), _SMALL, lambda s: s.grouped or (s.masked and s.noisy), most=_tile(64, 64),
    ),
    TileRule(
        "operands beside a sum of scores",
        ("dmask",), _MEDIUM, lambda s: s.beside, most=_tile(64, 32),
    ),
    TileRule(
        "mask and dropout together (2 spills), or dropout and large heads (8 spills)",
        ("dq",), (128, 256), lambda s: not s.beside and s.noisy and (s.masked or s.d > 128),
        most=_tile(32, 64),
    ),
    TileRule(
        "heads of 16: accesses are narrow, an address for each",
        ("fwd", "dq"), (16, 16), lambda s: True, most=_tile(64, 64),
    ),
    TileRule(
        "the same, with dropout",
        ("dq",), (16, 16), lambda s: s.noisy, most=_tile(64, 32),
    ),
)  # fmt: skip

_SM_120, _SMALL_SM = ("sm_120",), ("sm_86", "sm_89", "sm_120")
_LONE = {"maxnreg": 255}

EXCEPTIONS = (
    # sm_100: to apply a mask, a thread reads whole rows of scores from tensor memory.
    TileRule(
        "a mask, or dropout on small heads",
        ("fwd",), (16, 128), lambda s: (s.masked and s.d != 64) or (s.noisy and s.d < 64),
        most=_tile(64, 64), gpus=("sm_100",),
    ),
    TileRule(
        "a mask on large heads",
        ("fwd",), _LARGE, lambda s: s.masked, most=_tile(32, 32), gpus=("sm_100",),
    ),
    TileRule("a mask", ("dkdv",), _SMALL, lambda s: s.masked, most=_tile(64, 64), gpus=("sm_100",)),
    TileRule(
        "mask and dropout together on small heads",
        ("dq",), (16, 32), lambda s: s.masked and s.noisy, most=_tile(64, 64), gpus=("sm_100",),
    ),
    TileRule(
        "a mask on large heads",
        ("dq",), _LARGE, lambda s: s.masked, most=_tile(32, 32), gpus=("sm_100",),
    ),
    TileRule(
        "two stages: 105 spills",
        ("dmask",), _LARGE, lambda s: True, most={"num_stages": 1}, gpus=("sm_100",),
    ),
    TileRule(
        "heads of 16 fill half of the narrowest tile of tcgen05",
        ("fwd", "dq", "dmask"), (16, 16), lambda s: True,
        sets={**_tile(64, 32), "num_warps": 8, "num_stages": 2}, gpus=("sm_100",),
    ),
    TileRule(
        "heads of 16 fill half of the narrowest tile of tcgen05",
        ("dkdv",), (16, 16), lambda s: True,
        sets={**_tile(32, 64), "num_warps": 8, "num_stages": 2}, gpus=("sm_100",),
    ),
    # sm_86, sm_89, sm_120: ptxas keeps fewer values in registers than for sm_80.
    TileRule(
        "8 spills on sm_86 and sm_89, 48 on sm_120",
        ("fwd",), _MEDIUM, lambda s: s.plain,
        sets={**_tile(64, 64), "num_warps": 4, "num_stages": 3}, gpus=_SMALL_SM,
    ),
    TileRule(
        "a float mask: 5 spills",
        ("dkdv",), _MEDIUM, lambda s: s.masked, most=_tile(32, 64), gpus=_SMALL_SM,
    ),
    TileRule(
        "a float32 mask: 15 spills",
        ("dmask",), _SMALL, lambda s: s.mask_itemsize == 4, most=_tile(64, 32), gpus=_SMALL_SM,
    ),
    TileRule(
        "mask and dropout together: four warps spill",
        ("dq",), _SMALL, lambda s: s.masked and s.noisy, sets={"num_warps": 8}, gpus=_SMALL_SM,
    ),
    TileRule(
        "dropout: 14 spills; a float32 mask: 11; without either, more blocks at a time",
        ("fwd",), (16, 128), lambda s: s.plain or s.noisy or s.mask_itemsize == 4,
        sets={**_tile(64, 32), "num_warps": 8, "num_stages": 2}, gpus=_SM_120,
    ),
    TileRule("two sums", ("dkdv",), (16, 128), lambda s: True, most=_tile(32, 64), gpus=_SM_120),
    TileRule(
        "a mask (11 spills), dropout or large heads",
        ("dkdv",), (16, 128), lambda s: s.d > 64 or not s.plain, most=_tile(32, 32), gpus=_SM_120,
    ),
    TileRule(
        "a mask: 22 spills of dq, 18 of dmask",
        ("dq", "dmask"), _SMALL, lambda s: s.masked,
        most=_tile(32, 32), sets={"num_warps": 8}, gpus=_SM_120,
    ),
    TileRule(
        "mask and dropout together, around a sum of scores: 7 spills",
        ("dmask",), _SMALL, lambda s: s.masked and s.noisy, most=_tile(32, 16), gpus=_SM_120,
    ),
    TileRule(
        "one more loop, with a mask: 5 spills, with one stage 4",
        ("dkdv",), _LARGE, lambda s: s.grouped and s.masked,
        most=_tile(32, 16), gpus=_SM_120,
    ),
    # On AMD the kernels still spill, so `auto` runs PyTorch there.
    TileRule(
        "with more stages the next tiles wait in registers",
        KINDS, _EVERY, lambda s: s.gpu.matrix == "mfma", most={"num_stages": 1},
    ),
    TileRule(
        "64 KiB of shared memory",
        ("fwd", "dq", "dmask"), (128, 256), lambda s: s.gpu.matrix == "mfma", most=_tile(64, 32),
    ),
    TileRule(
        "64 KiB of shared memory",
        ("dkdv",), (128, 256), lambda s: s.gpu.matrix == "mfma", most=_tile(64, 64),
    ),
    # Without a limit, ptxas spills a few registers in these kernels, so that another block fits.
    TileRule("heads of 16", KINDS, (16, 16), lambda s: True, sets=_LONE, gpus=("sm_100", "sm_120")),
    TileRule("large heads", ("dq",), (128, 256), lambda s: True, sets=_LONE, gpus=("sm_100",)),
    TileRule("large heads", ("dkdv",), (128, 256), lambda s: True, sets=_LONE, gpus=_SM_120),
    TileRule(
        "heads of 16, with a mask or dropout",
        KINDS, (16, 16), lambda s: not s.plain, sets=_LONE, gpus=_SMALL_SM,
    ),
    TileRule(
        "large heads, with a mask or dropout",
        ("fwd",), (128, 256), lambda s: not s.plain, sets=_LONE, gpus=_SMALL_SM,
    ),
)  # fmt: skip


def _warps(kind: str, shape: Shape, m: int, n: int) -> int:
    """Four for a plain forward if each thread then holds few enough sums and scores; else eight."""
    most = 96 if shape.beside else 128  # of the 255 registers of a thread
    values = m * (shape.d + n) // (4 * 32)
    return 4 if kind == "fwd" and shape.plain and values <= most else 8


def shared_memory(kind: str, shape: Shape, chosen: dict[str, int]) -> int:
    """Bytes of shared memory that a program needs, approximately; fitted to the compiled kernels.

    It is the sum of: the rows that a program keeps; the rows that it loops over, once per stage
    (one stage less if a product takes its operands from registers); a float mask; and scores that
    move between layouts.
    """
    m, n, stages = chosen["BLOCK_M"], chosen["BLOCK_N"], chosen["num_stages"]
    kept, looped = (n, m) if kind == "dkdv" else (m, n)
    row = 2 * shape.d * shape.itemsize
    buffers = stages - shape.beside
    scores = (kind != "fwd") + shape.noisy
    bytes_kept = kept * row // (2 if kind == "fwd" else 1)
    return (
        bytes_kept
        + buffers * looped * row
        + (stages - 1) * m * n * shape.mask_itemsize
        + scores * m * n * shape.itemsize
    )


def _fitted(kind: str, shape: Shape, chosen: dict[str, int]) -> dict[str, int]:
    """Halve tiles down to 64, and then reduce the stages, until shared memory holds them."""
    while shared_memory(kind, shape, chosen) > shape.gpu.shared_per_block:
        larger = max("BLOCK_M", "BLOCK_N", key=chosen.__getitem__)
        if chosen[larger] > 64:
            chosen = {**chosen, larger: chosen[larger] // 2}
        elif chosen["num_stages"] > 1:
            chosen = {**chosen, "num_stages": chosen["num_stages"] - 1}
        else:
            break
    return chosen


def _without_tensor_cores(kind: str, shape: Shape) -> dict[str, int]:
    """For fp32. A thread holds whole rows of operands, so tiles are small; on every GPU."""
    d = shape.d
    wide = {"fwd": d > 64, "dkdv": d > 128}.get(kind, 64 < d <= 128)
    few = {"fwd": d <= 64, "dkdv": 16 < d <= 64, "dmask": False}.get(
        kind, d <= 64 and (d > 16 or shape.noisy)
    )
    return {
        **_tile(32 if wide else 16, 16),
        "num_warps": 4 if few else 8,
        "num_stages": 1 if kind == "dkdv" and d > 64 else 2,
        "maxnreg": 255,  # else ptxas spills a few registers, so that another block fits
    }


@tunable("BLOCK_M", "BLOCK_N")
def config(kind, shape):
    """Tiles, warps and stages of one of the kernels in `KINDS`."""
    if shape.itemsize == 4:
        return _without_tensor_cores(kind, shape)
    m, n, stages = next(tile for most, *tile in _LARGEST[kind] if shape.d <= most)
    chosen = {**_tile(m, n), "num_warps": 0, "num_stages": stages}
    for rule in RULES:
        if rule.holds(kind, shape):
            chosen = rule.apply(chosen)
    if not chosen["num_warps"]:
        chosen["num_warps"] = _warps(kind, shape, chosen["BLOCK_M"], chosen["BLOCK_N"])
    for rule in EXCEPTIONS:
        if rule.holds(kind, shape):
            chosen = rule.apply(chosen)
    return _fitted(kind, shape, chosen)


def apart(shape):
    """Whether two launches compute dk and dv: both sums do not fit in registers with the rest."""
    both = shape.noisy and shape.masked
    if shape.beside:
        return shape.d > 128 or both or (shape.d > 64 and not shape.plain)
    return shape.d > 128 or (shape.d > 64 and (shape.noisy or (shape.masked and shape.causal)))
