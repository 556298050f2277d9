"""The meter counts small kernels with known traffic exactly, and catches all faults it must."""

import math
import re

import pytest
import torch
import torch.nn.functional as stock
import triton
import triton.language as tl

from fastnn._mode import BackendError
from fastnn.testing import Case, Traffic, count, counted_run, randn
from fastnn.testing.cases import CASES
from fastnn.testing.meter import AtenTraffic, Cost, as_on_cuda, nbytes, predict, traffic
from tests.marks import interpreted, stock_may_warn


@triton.jit
def _copy(X, Y, n, shift, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    tl.store(Y + offs, tl.load(X + offs + shift, mask=mask), mask=mask)


@triton.jit
def _copy_columns(X, Y, M: tl.constexpr, N: tl.constexpr):
    offs = tl.arange(0, M) * N + tl.program_id(0)
    tl.store(Y + offs, tl.load(X + offs))


@triton.jit
def _transpose(X, Y, M: tl.constexpr, N: tl.constexpr):
    m = tl.arange(0, M)
    n = tl.arange(0, N)
    x = tl.load(X + m[:, None] * N + n[None, :])
    tl.store(Y + n[:, None] * M + m[None, :], tl.trans(x))


@triton.jit
def _add_weight(X, W, Y, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    offs = tl.program_id(0) * BLOCK + cols
    tl.store(Y + offs, tl.load(X + offs) + tl.load(W + cols))


@triton.jit
def _neighbour(X, Y, OUT, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    tl.store(Y + pid * BLOCK + offs, tl.load(X + pid * BLOCK + offs))
    tl.store(OUT + pid, tl.sum(tl.load(Y + tl.maximum(pid - 1, 0) * BLOCK + offs)))


@triton.jit
def _through_memory(X, Y, BLOCK: tl.constexpr, BARRIER: tl.constexpr = False):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + offs, tl.load(X + offs))
    if BARRIER:
        tl.debug_barrier()
    tl.store(X + offs, tl.load(Y + offs) + 1)


@triton.jit
def _one_counter(COUNT, ATOMIC: tl.constexpr):
    if ATOMIC:
        tl.atomic_add(COUNT, 1)
    else:
        tl.store(COUNT, tl.load(COUNT) + 1)


def copy(n, block=256, **kwargs):
    x = torch.randn(n)
    y = torch.empty(n)
    with traffic(**kwargs) as log:
        _copy[(triton.cdiv(n, block),)](x, y, n, 0, block)
    assert torch.equal(x, y)
    return log


# ---- kernels -----------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.int8), ids=str)
def test_a_copy_moves_each_byte_once(dtype):
    x = torch.ones(1024, dtype=dtype)
    y = torch.empty_like(x)
    with traffic() as log:
        _copy[(4,)](x, y, 1024, 0, 256)
    (launch,) = log
    assert launch.kernel == "_copy" and launch.grid == (4, 1, 1)
    assert launch.accesses == {"load": 4, "store": 4}
    for counter in (launch.requested, launch.sectors, launch.distinct):
        assert counter == {"load": nbytes(x), "store": nbytes(y)}
    assert log.cost == Cost(nbytes(x, y), launches=1)


@interpreted
def test_a_masked_tail_moves_its_sector():
    (launch,) = copy(1003)
    assert launch.requested["load"] == launch.distinct["load"] == 4 * 1003
    assert launch.sectors["load"] == 32 * math.ceil(4 * 1003 / 32)


@interpreted
def test_a_column_walk_moves_a_sector_per_element():
    x, y = torch.randn(2, 64, 64)
    with traffic() as log:
        _copy_columns[(64,)](x, y, 64, 64)
    assert log.requested.total() == log.distinct.total() == nbytes(x, y)
    assert log.sectors.total() == 8 * nbytes(x, y)


@triton.jit
def _copy_even(X, Y, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(Y + offs, tl.load(X + 2 * offs))


@interpreted
def test_lanes_of_one_sector_move_it_once():
    x, y = torch.randn(512), torch.empty(256)
    with traffic() as log:
        _copy_even[(1,)](x, y, 256)
    assert log.requested["load"] == nbytes(x) / 2
    assert log.sectors["load"] == nbytes(x)


@interpreted
def test_a_tile_counts_whatever_order_it_is_touched_in():
    x, y = torch.randn(2, 32, 32)
    with traffic() as log:
        _transpose[(1,)](x, y, 32, 32)
    assert log.sectors == log.distinct == {"load": nbytes(x), "store": nbytes(y)}


@interpreted
def test_distinct_counts_what_all_programs_share_once():
    x, y = torch.randn(2, 16, 128)
    w = torch.randn(128)
    with traffic() as log:
        _add_weight[(16,)](x, w, y, 128)
    assert log.sectors["load"] == nbytes(x) + 16 * nbytes(w)
    assert log.distinct["load"] == nbytes(x, w)


@interpreted
def test_launches_add_up():
    x, y = torch.randn(2, 256)
    with traffic() as log:
        _copy[(1,)](x, y, 256, 0, 256)
        _copy[(1,)](y, x, 256, 0, 256)
    assert log.cost == Cost(2 * nbytes(x, y), launches=2)
    assert str(log).count("_copy") == 2


@interpreted
@pytest.mark.parametrize(
    "shift, where",
    (
        (1, "program (1, 0, 0), 4 bytes past the end of X"),
        (-1, "program (0, 0, 0), 4 bytes before X"),
    ),
)
def test_an_access_out_of_bounds_raises(shift, where):
    # Memory on both sides in this storage is readable, but only the tensor passed counts.
    x, y = torch.randn(3, 512)[1], torch.empty(512)
    message = f"_copy: load out of bounds in {where}"
    with pytest.raises(IndexError, match=re.escape(message)), traffic(distinct=False):
        _copy[(2,)](x, y, 512, shift, 256)


@interpreted
def test_a_mask_that_is_off_by_one_raises():
    x, y = torch.randn(2, 300).unbind()
    with pytest.raises(IndexError, match="_copy"), traffic():
        _copy[(2,)](x, y, 301, 0, 256)


@interpreted
def test_other_errors_of_a_kernel_stay_theirs():
    with pytest.raises(Exception, match="power of 2"), traffic():
        _copy[(1,)](torch.ones(8), torch.ones(8), 8, 0, 100)


@interpreted
def test_a_race_is_counted():
    x, y = torch.randn(4, 64), torch.empty(4, 64)
    with traffic(races=True) as log:
        _neighbour[(4,)](x, y, torch.empty(4), 64)
    # The next program reads each of rows 0 to 2, and the own program reads row 0.
    assert log[0].shared_writes == (3 + 1) * 64 * 4


@interpreted
def test_loading_back_what_was_stored_is_a_race():
    """Other threads of the program stored the value, and no thread waited for them."""
    with traffic(races=True) as log:
        _through_memory[(3,)](torch.randn(3, 64), torch.empty(3, 64), 64)
    assert log[0].shared_writes == 3 * 64 * 4


@interpreted
def test_a_barrier_puts_a_store_before_a_load():
    with traffic(races=True) as log:
        _through_memory[(3,)](torch.randn(3, 64), torch.empty(3, 64), 64, BARRIER=True)
    assert log[0].shared_writes == 0


@interpreted
@pytest.mark.parametrize("atomic", (True, False))
def test_atomics_are_no_race(atomic):
    count = torch.zeros(1, dtype=torch.int32)
    with traffic(races=True) as log:
        _one_counter[(5,)](count, atomic)
    assert count == 5
    assert log[0].shared_writes == (0 if atomic else 4)
    assert log.requested == ({"atomic": 20} if atomic else {"load": 20, "store": 20})


@interpreted
def test_no_race_in_programs_that_share_only_reads():
    x, y = torch.randn(2, 16, 128)
    with traffic(races=True) as log:
        _add_weight[(16,)](x, torch.randn(128), y, 128)
    assert log[0].shared_writes == 0


@interpreted
def test_a_million_elements():
    (launch,) = copy(1 << 20, block=1 << 14, races=True)
    assert launch.distinct.total() == launch.sectors.total() == 8 << 20
    assert launch.shared_writes == 0


@interpreted
def test_the_block_leaves_no_trace():
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    before = vars(InterpreterBuilder).copy(), vars(GridExecutor).copy()
    with pytest.raises(ZeroDivisionError), traffic():
        _ = 1 / 0
    assert (vars(InterpreterBuilder), vars(GridExecutor)) == before


def test_an_expanded_tensor_is_as_large_as_its_memory():
    assert nbytes(torch.ones(3, 1).expand(3, 100), torch.ones(2)) == 4 * 3 + 4 * 2
    assert nbytes(torch.ones(0, 5)) == 0


# ---- PyTorch's operators -----------------------------------------------------------------------

M, N = 64, 256
E = 4 * M * N


def counted(function):
    with AtenTraffic() as stock_traffic:
        function()
    return stock_traffic


def test_pointwise_operators():
    a, b = torch.randn(2, M, N)
    t = counted(lambda: stock.silu(a) * b)
    assert [op.name for op in t.ops] == ["silu", "mul"]
    assert (t.read, t.written, t.launches) == (3 * E, 2 * E, 2)
    assert counted(lambda: a * a).read == E


def test_views_and_allocations_move_nothing():
    a = torch.randn(M, N)
    assert counted(lambda: (torch.empty_like(a), a.t(), a.view(-1), a[3:], a.detach())).ops == []


def test_what_is_overwritten_is_not_read():
    a, b = torch.randn(2, M, N)
    t = counted(lambda: (a.zero_(), a.copy_(b), a.add_(b)))
    assert [(op.read, op.written) for op in t.ops] == [(0, E), (E, E), (2 * E, E)]


def test_a_gather_reads_what_it_returns():
    table, index = torch.randn(100_000, 8), torch.arange(16)
    assert counted(lambda: stock.embedding(index, table)).read == 16 * 8 * 4 + 16 * 8


def test_a_scatter_changes_as_much_as_it_is_given():
    table, rows, index = torch.randn(100_000, 8), torch.randn(16, 8), torch.arange(16)
    added = counted(lambda: table.index_add_(0, index, rows))
    assert (added.read, added.written) == (2 * 16 * 8 * 4 + 16 * 8, 16 * 8 * 4)
    places = torch.zeros(100_000, dtype=torch.int64)
    set_ = counted(lambda: places.scatter_(0, index, index + 1))
    assert set_.ops[-1].written == 16 * 8 and set_.ops[-1].read == 2 * 16 * 8


def test_cross_entropy_forward_and_backward():
    x, target = torch.randn(M, N, requires_grad=True), torch.randint(N, (M,))
    with AtenTraffic() as t:
        loss = stock.cross_entropy(x, target, reduction="none")
    assert t.cost.bytes == pytest.approx(2 * E, rel=0.05)
    seed = torch.ones(M)
    with AtenTraffic() as t:
        torch.autograd.grad(loss, x, seed)
    assert t.cost.bytes == pytest.approx(4 * E, rel=0.05)


def test_kernels_inside_one_operator():
    a, b = torch.randn(2, M, N)
    scalar = counted(lambda: stock.mse_loss(a, b))
    assert (scalar.read, scalar.launches) == (4 * E, 2)
    assert counted(lambda: stock.mse_loss(a, b, reduction="none")).cost == Cost(3 * E, 1)


# ---- a row ------------------------------------------------------------------------------------


@interpreted
def test_what_a_row_moves():
    e = 8 * 1024 * 4
    gelu = count(Case("GELU", (randn(8, 1024),)), torch.float32)
    assert gelu == Traffic(ours=Cost(5 * e, 2), stock=Cost(5 * e, 2), least=5 * e, races=0)
    # The mask that dropout keeps for its backward is not part of the least bytes.
    dropout = count(Case("Dropout", (randn(8, 1024),)), torch.float32)
    assert (dropout.ours.bytes, dropout.least) == (pytest.approx(4 * e, rel=0.01), 4 * e)
    assert dropout.stock == Cost(4 * e + 2 * e // 4, 2)
    n = 1024 * 4
    norm = count(Case("LayerNorm", (randn(8, 1024),), {"normalized_shape": 1024}), torch.float32)
    # forward x, w, b -> y; backward dy, x, w, b -> dx, dw, db
    assert norm.least == 2 * e + 2 * n + 3 * e + 4 * n


@interpreted
def test_the_count_of_a_row_that_goes_to_stock_raises():
    with pytest.raises(BackendError):
        count(Case("ReLU", (randn(3),)), torch.float64)


# ---- prediction --------------------------------------------------------------------------------


def test_prediction():
    large = predict(Cost(10**9, 6), Cost(3 * 10**8, 2), bandwidth=1e12)
    assert large.speedup == pytest.approx((1000 + 6 * 6) / (300 + 2 * 6))
    small = predict(Cost(1000, 6), Cost(300, 2), bandwidth=1e12)
    assert small.speedup == pytest.approx(3, rel=1e-3)
    assert str(large).startswith("predicted 3.32x") and "not measured" in str(large)


@interpreted
def test_prediction_from_counts():
    a, b = torch.randn(2, 4096).unbind()
    t = counted(lambda: (a + b) + b)
    with traffic() as log:
        _add_weight[(1,)](a, b, torch.empty_like(a), 4096)
    assert predict(t, log, bandwidth=1e6).speedup == pytest.approx(2, rel=0.01)


@stock_may_warn
def test_stock_is_counted_for_every_row():
    """`as_on_cuda` accepts all arguments of the functions whose operators it replaces."""
    counted = 0
    for case in CASES:
        if case.stock is None:
            with as_on_cuda(), AtenTraffic() as aten:
                counted_run(case, torch.nn, case.dtypes[-1])
            counted += aten.cost.bytes > 0
    assert counted >= 0.9 * len(CASES)
