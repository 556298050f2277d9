"""How kernels that reduce along rows divide the work: tiles of whole rows, or chunks of rows."""

from fastnn.kernels._config import tunable
from fastnn.kernels._sizes import cdiv, next_power_of_2

BLOCK = 2048  # the step through a row that is too long for registers
PROGRAMS = 512  # enough to fill a GPU


def as_rows(x, N):
    """x as (M, N) rows of unit stride, and the stride between rows; copies only if no view fits."""
    x = x.reshape(-1, N)
    if N > 1 and x.stride(1) != 1:
        x = x.contiguous()
    return x, (x.stride(0) if x.shape[0] > 1 else N)


@tunable("BLOCK_M")
def row_config(N, unit, least_warps=4, noise=False):
    """A tile of one row, or of several short rows.

    `unit`, at most 8, divides N and all row strides. A tile has up to 32 values for each thread of
    16 warps. More warps are impossible where a warp is 64 threads. Values that are accessed one by
    one need more registers, for an address and a predicate each. A program of more than four warps
    loops over its tiles, and waits for memory in each turn; it takes twice as many short rows at a
    time, unless values are accessed one by one. With `noise`, a tile of short rows has half as many
    rows. `least_warps=2` is for a program that reads one tensor and does not loop: each thread then
    has 32 values also of short rows, so that fewer threads take part in the sums of a row.
    """
    block = next_power_of_2(N)
    if least_warps == 2:
        if block <= 2048:
            tile = {"BLOCK_M": 2048 // block, "BLOCK_N": block, "num_warps": 4 if unit == 1 else 2}
            # Without a limit, ptxas spills a few registers, so that another block fits.
            return tile if unit == 8 else tile | {"maxnreg": 255}
        least_warps = 4
    loops = least_warps > 4 and unit > 1
    each = 64 if noise else 256 if loops else 128  # values of a warp, in vectors of two
    rows = max(1, 2 * each * least_warps // block)
    return {
        "BLOCK_M": rows,
        "BLOCK_N": block,
        "num_warps": min(max(rows * block // (128 if unit == 1 else 512), least_warps), 16),
    }


def summing_programs(M, config, processors):
    """How many programs share M rows, if each program writes its own partial sum of every column.

    At most two programs of 8 warps per multiprocessor, and at least 36 rows per program. The two
    partial sums, written and read in fp32, are then under a twentieth of the traffic of a 16-bit
    norm. If there are few rows, the traffic does not matter, and the rows are spread over all
    multiprocessors.
    """
    tiles = cdiv(M, config["BLOCK_M"])
    wanted = min(processors * 16 // config["num_warps"], max(M // 36, processors))
    return max(1, min(wanted, cdiv(tiles, 4)))


def fits(N, unit, most):
    """Whether a row is short enough for `row_config`. `most` is the limit for wide accesses."""
    return N <= (most // 2 if unit == 1 else most)


def split(M, N):
    """(chunks of a row, blocks per chunk): they fill a GPU, and have two blocks or more."""
    blocks = cdiv(N, BLOCK)
    wanted = min(max(PROGRAMS // M, 1), cdiv(blocks, 2))
    chunk_blocks = cdiv(blocks, wanted)
    return cdiv(blocks, chunk_blocks), chunk_blocks
