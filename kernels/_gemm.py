"""What kernels that multiply matrices share: which tile a program computes, how large tiles are,
and how many programs share the sum of a tile. Sums are fp32.

A kernel brings two parts of its own: how it loads its operands, and what follows a sum
(epilogue.py).
"""

import triton
import triton.language as tl

from fastnn.kernels._gpus import KIB, facts
from fastnn.kernels._sizes import cdiv, next_power_of_2


@triton.jit
def tile_of(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of the tile of a program, among tiles_m x tiles_n tiles.

    Programs take GROUP_M rows of tiles column by column, so that their operands are in L2.
    """
    group = pid // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return group * GROUP_M + within % height, within // height


# By matrix instructions: (BLOCK_M, BLOCK_N, BLOCK_K of 16-bit inputs, num_warps, num_stages),
# largest first. None spills, and all fit in shared memory. This was found by compiling; they are
# not yet timed.
_TILES = {
    "mma": ((128, 256, 32, 8, 3), (128, 128, 32, 8, 4), (64, 64, 64, 4, 4)),
    "wgmma": ((128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (64, 64, 64, 4, 5)),
    "tcgen05": ((128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (64, 64, 64, 4, 5)),
    "mfma": ((256, 128, 32, 8, 2), (128, 128, 32, 4, 2), (64, 64, 64, 4, 2)),
}
# For "mma" with less than 128 KiB of shared memory, and for the interpreter, for which large tiles
# are no gain.
_SMALL_TILES = ((128, 128, 32, 8, 3), (64, 64, 32, 4, 3))


def _tiles(gpu):
    small = gpu.shared_per_block < 128 * KIB or not gpu.backend
    return _SMALL_TILES if gpu.matrix == "mma" and small else _TILES[gpu.matrix]


def largest_tile(M, N, itemsize, precision, arch, sms, aligned, epilogue):
    """The largest tile with which there are at least as many tiles as multiprocessors (`sms`)."""
    if itemsize == 4 and precision == "ieee":  # no tensor cores: operands are in registers
        return (64, 64, 32, 8, 2) if aligned or epilogue else (64, 64, 32, 4, 3)
    # each load is one element, too narrow for an asynchronous copy to shared memory
    if not aligned:
        return 64, 64, 32, 8 if epilogue else 4, 2
    gpu = facts(arch)
    tiles = _tiles(gpu)
    # Formulas, and even more random words, make kernels with many sums spill, most of all if the
    # operands are in registers too. The same is true of tf32 operands that do not run along K.
    most = 128 * 128 if epilogue or itemsize == 4 else 128 * 256
    if epilogue == "noise" or (epilogue and gpu.matrix == "mma"):
        most = 64 * 64
    widest = max(64, next_power_of_2(M)), max(64, next_power_of_2(N))
    for tile in tiles:
        # A tile that is wider than the matrix would mostly multiply zeros.
        if tile[0] * tile[1] > most or tile[0] > widest[0] or tile[1] > widest[1]:
            continue
        if cdiv(M, tile[0]) * cdiv(N, tile[1]) >= sms:
            return tile
    return tiles[-1]


def shares(tiles, steps, sms):
    """(steps of a program, programs) that share the sum of one tile.

    They fill the GPU, with about 8 steps each.
    """
    programs = max(1, min(sms // max(tiles, 1), cdiv(steps, 8), 32))
    each = cdiv(steps, programs)
    return each, cdiv(steps, each)
