"""How kernels that reduce along rows cut them up: tiles of whole rows, or chunks of long ones."""

from fastnn.kernels._config import tunable
from fastnn.kernels._sizes import cdiv, next_power_of_2

BLOCK = 2048  # the step through a row too long for registers
PROGRAMS = 512  # enough to fill a GPU


def as_rows(x, N):
    """x as (M, N) rows of unit stride, and their stride; a copy only where no view has that."""
    x = x.reshape(-1, N)
    if N > 1 and x.stride(1) != 1:
        x = x.contiguous()
    return x, (x.stride(0) if x.shape[0] > 1 else N)


@tunable("BLOCK_M")
def row_config(N, unit, least_warps=4, noise=False):
    """One row in a tile, or several short ones; `unit`, at most 8, divides N and all row strides.

    Up to 32 values for each thread of 16 warps, all there can be where a warp is 64 threads. Values
    accessed one by one take more registers, for an address and a predicate each; with `noise` among
    them, short rows that share a tile are half as many.
    """
    block = next_power_of_2(N)
    rows = max(1, (128 if noise else 256) * least_warps // block)
    return {
        "BLOCK_M": rows,
        "BLOCK_N": block,
        "num_warps": min(max(rows * block // (128 if unit == 1 else 512), least_warps), 16),
    }


def summing_programs(M, config, processors):
    """How many programs share M rows, where each then writes its own partial sum of every column.

    Two for each processor if they have 8 warps, and 36 rows for each: two partial sums in fp32,
    written and read, are then under a twentieth of the traffic of a norm in 16 bits. Few rows are
    no traffic to speak of, and are spread over all processors.
    """
    tiles = cdiv(M, config["BLOCK_M"])
    wanted = min(processors * 16 // config["num_warps"], max(M // 36, processors))
    return max(1, min(wanted, cdiv(tiles, 4)))


def fits(N, unit, most):
    """Whether a row is short enough for `row_config`, where `most` is the limit for wide access."""
    return N <= (most // 2 if unit == 1 else most)


def split(M, N):
    """(chunks of a row, blocks in each): as many programs as fill a GPU, of two blocks at least."""
    blocks = cdiv(N, BLOCK)
    wanted = min(max(PROGRAMS // M, 1), cdiv(blocks, 2))
    chunk_blocks = cdiv(blocks, wanted)
    return cdiv(blocks, chunk_blocks), chunk_blocks
