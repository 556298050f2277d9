"""The launches of the rows compile for GPUs that are not present, into code without known faults.

Kernels are compiled in separate processes, because `TRITON_INTERPRET`, which this process may have,
forbids compiling. The rows make about 4000 specialisations, and a compile takes a third of a
second. The tests therefore compile only specialisations that differ in what decides on registers
and shared memory, each for one of four targets. `python -m tools.aot` compiles all.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl

from fastnn import _gate
from fastnn.kernels import _config
from fastnn.kernels._launch import kernel
from fastnn.testing import Case, check, randn
from fastnn.testing.aot import TARGETS, code_faults, compile_only, launch_nothing
from tests.marks import interpreted
from tools.aot import put

# The targets for which the tests compile a share. All other targets are compiled by hand.
SHARED = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")


def compiling(code):
    """Runs code in a process that compiles; returns its output."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *code], env=env, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[max(said.find("WRONG"), 0) :]
    return done.stdout


def skip_unproven(target):
    """Skips the test if this Triton is not trusted to compile for `target`."""
    why = _gate.unproven(TARGETS[target].architecture)
    if why:
        pytest.skip(why)


@pytest.mark.parametrize("target", SHARED)
def test_rows(target):
    skip_unproven(target)
    print(compiling(["-m", "tools.aot", "--share", target]))


# ---- the tool ----------------------------------------------------------------------------------


@kernel(do_not_specialize=["n"])
def _copy(X, Y, n, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    offs = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)) * STRIDE
    tl.store(Y + offs, tl.load(X + offs))


@triton.jit
def _spill(X, Y, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(X + offs)
    tl.store(Y + offs, x - tl.sum(x * x))


@triton.jit
def _dot(A, B, C, K, N: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, N)
    acc = tl.zeros((N, N), tl.float32)
    for k in range(0, K, N):
        a = tl.load(A + at[:, None] * K + k + at[None, :])
        b = tl.load(B + (k + at[:, None]) * N + at[None, :])
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(C + at[:, None] * N + at[None, :], acc)


@triton.jit
def _count(X, BLOCK: tl.constexpr):
    tl.atomic_add(X + tl.arange(0, BLOCK), 1.0)


def wide_accesses():
    x, y = torch.ones(2, 4096)
    with compile_only("cuda:90") as records:
        for _ in range(2):  # the second launch is the same specialisation
            _copy((4,), x, y, 4096, STRIDE=1, BLOCK=1024, num_warps=4)
        _copy((2,), x, y, 4096, STRIDE=2, BLOCK=1024, num_warps=4)
        _copy((4,), x[1:], y, 4095, STRIDE=1, BLOCK=1024, num_warps=4)
        _copy((4,), x, y, 4096, STRIDE=1, BLOCK=128, num_warps=4)
    wide, strided, unaligned, small = records
    assert (wide.loads, wide.loads_wide, wide.stores_wide) == (2, 2, 2)
    assert (wide.num_warps, wide.blocks, wide.occupancy) == (4, 16, 1.0)
    assert (wide.load_tile, wide.store_tile) == (32, 32)
    assert wide.signature == {"X": "*fp32:16", "Y": "*fp32:16", "n": "i32"}
    assert wide.constexprs == {"STRIDE": 1, "BLOCK": 1024}
    assert code_faults(wide, streaming=True) == []
    assert code_faults(strided) == [] and code_faults(strided, streaming=True) == [
        "no loads of 128 bits, of 8; 32 bytes per thread",
        "no stores of 128 bits, of 8; 32 bytes per thread",
    ]
    assert not unaligned.aligned and code_faults(unaligned, streaming=True) == []
    assert small.load_tile == 4 and code_faults(small, streaming=True) == []
    assert torch.equal(y, torch.ones(4096)), "launched"


def spills():
    x, y = torch.ones(2, 1 << 14)
    with compile_only("cuda:90") as records:
        _spill[(1,)](x, y, 1 << 14, num_warps=1)  # 512 values per thread
    (record,) = records
    assert record.spills and record.stack
    (fault,) = code_faults(record)
    assert "spills" in fault


def dots():
    for target, kind in (("cuda:80", "mma"), ("cuda:90", "wgmma"), ("cuda:100", "tcgen05")):
        with compile_only(target) as records:
            for dtype, precision in ((torch.bfloat16, "ieee"), (torch.float32, "ieee")):
                a, b, c = torch.ones(3, 64, 64)
                args = a.to(dtype), b.to(dtype), c, 64, 64, precision
                _dot[(1,)](*args, num_stages=1)
        half, full = records
        assert half.dots == 1 and list(half.tensor_core) == [kind] and code_faults(half) == []
        assert code_faults(replace(half, tensor_core={})) == [
            "1 dots without a tensor core instruction"
        ]
        assert full.dots == 0 and full.tensor_core == {}


def shared_memory():
    a, b, c = torch.ones(3, 128, 128)
    with compile_only("cuda:80") as records:
        _dot[(1,)](a, b, c, 128, 128, "tf32", num_stages=4, num_warps=8)
    (record,) = records
    assert record.shared == 3 * 2 * 128 * 128 * 4
    assert f"{record.shared} bytes of shared memory, of 166912" in code_faults(record)


def float_atomics():
    with compile_only("cuda:90") as records:
        _count[(1,)](torch.zeros(128), 128)
        _count[(1,)](torch.zeros(128, dtype=torch.int32), 128)
    floats, ints = records
    assert code_faults(floats) == ["1 atomics on floats: equal inputs give unequal bits"]
    assert code_faults(ints) == []


def gfx942():
    if _gate.unproven("gfx942"):
        return  # an older Triton has no linker
    x, y = torch.ones(2, 4096)
    with compile_only("hip:gfx942") as records:
        _copy((2,), x, y, 4096, STRIDE=1, BLOCK=2048, num_warps=4)
        _copy((1,), x, y, 4096, STRIDE=2, BLOCK=2048, num_warps=4)
        _spill[(1,)](x, y, 1 << 15, num_warps=1)
        _dot[(1,)](*torch.ones(2, 64, 64).bfloat16(), x, 64, 64, "ieee")
    wide, strided, spilling, dot = records
    assert wide.loads_wide and wide.stores_wide and code_faults(wide, streaming=True) == []
    assert code_faults(strided, streaming=True)
    assert "spills" in code_faults(spilling)[0]
    assert dot.tensor_core["mfma"] and code_faults(dot) == []


def passing_over():
    x, y = torch.ones(2, 4096)
    with compile_only("cuda:90", lambda what: what.constexprs["BLOCK"] == 128) as records:
        for block in (1024, 128):
            _copy((4,), x, y, 4096, STRIDE=1, BLOCK=block)
    assert [record.constexprs["BLOCK"] for record in records] == [128]


def nothing_runs():
    x, y = torch.ones(4096), torch.zeros(4096)
    with launch_nothing():
        for _ in range(3):
            _copy((4,), x, y, 4096, STRIDE=1, BLOCK=1024)
    assert not y.any()


def a_page():
    x, y = torch.ones(2, 4096)
    with compile_only("cuda:90") as records:
        for block in (1024, 128):
            _copy((4,), x, y, 4096, STRIDE=1, BLOCK=block, num_warps=4)
    with tempfile.NamedTemporaryFile(suffix=".md") as page:
        Path(page.name).write_text("before\n<!-- compiled -->\nold\n<!-- /compiled -->\nafter\n")
        put(records, page.name)
        text = Path(page.name).read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert re.search(r"\| `_copy` \| sm_90 \| 2 \| \d+ \| 0 \| 0 \| 100% \|  \|", text), text


TOOL = (
    wide_accesses,
    spills,
    dots,
    shared_memory,
    float_atomics,
    gfx942,
    passing_over,
    nothing_runs,
    a_page,
)


def test_the_tool():
    compiling(["-c", "from tests.test_aot import *\nfor prove in TOOL: prove()"])


def test_an_interpreting_process_is_refused():
    if not triton.knobs.runtime.interpret:
        pytest.skip("kernels are compiled in this process")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), compile_only("cuda:90"):
        pass


# ---- roofs -------------------------------------------------------------------------------------


def test_no_launch_needs_more_instructions_than_its_bytes_allow():
    """Launches that the table does not have are compiled, at most `MOST`; and all are judged."""
    skip_unproven("cuda:90")
    print(compiling(["-m", "fastnn.bench.roofs", "--some"]))


@kernel(do_not_specialize=["n"])
def _sum_of_some(X, Y, n, BLOCK: tl.constexpr):
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        acc += tl.load(X + start + tl.arange(0, BLOCK))
    tl.store(Y + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), acc)


@triton.jit
def _in_place(X, BLOCK: tl.constexpr):
    here = X + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(here, tl.load(here) + 1)


def roofs():
    from fastnn.testing.roof import capture, capture_any, disassembled, faults, roof

    x, y = torch.ones(1 << 16), torch.ones(1 << 20)
    launches = []
    with capture(launches):
        for n in (1 << 12, 1 << 13, 1 << 13):  # the third is the second again
            _sum_of_some((1024,), x, y, n, BLOCK=512, num_warps=4)
    short, long = map(roof, launches)
    turns = [(1 << 12) // 512, (1 << 13) // 512]
    each = (long.instructions - short.instructions) / (turns[1] - turns[0])
    code = disassembled(launches[0].cubin)
    adds = sum(i.op == "FADD" for i in code)
    assert adds % 4 == 0  # four elements of a thread, in each copy of the unrolled loop
    assert 5 <= each <= 12, each  # a load and four additions, and the loop's own
    assert long.us["fma"] > 1.8 * short.us["fma"]
    assert short.dram == 4 * (1024 * 512 + (1 << 12))  # X comes from memory once
    assert short.in_flight >= 16 * 128 * short.blocks
    assert not long.spilled and "issue" not in faults(short)

    launches = []
    with capture_any(launches):  # of a kernel that is not ours
        sms = torch.cuda.get_device_properties(x.device).multi_processor_count
        _in_place[(64,)](x, BLOCK=1024, num_warps=4)
    (added,) = map(roof, launches)
    assert added.programs == 64 and added.dram == 2 * x.nbytes  # loaded and stored
    assert added.sms == sms == 132


# Faults that make a launch slow and no result wrong: the row, the kernel, the function that is
# changed in its file, what stands there, and what is put there.
SLOW = {
    "a division for each element": (
        "ReLU(64x256x56x56)", "_pointwise_fwd_kernel", "pointwise.relu",
        "tl.where(x < 0, 0.0, x)", "tl.where(x < 0, 0.0, tl.div_rn(x, a + 1.0))",  # a is 0.0
    ),
    "accesses of 2 bytes": (
        "LayerNorm(8192x768", "_norm_fwd_kernel", "norm._norm_fwd_kernel",
        "offs = m[:, None]", "offs = tl.program_id(2) + m[:, None]",
    ),
    "a doubled loop": (
        "LayerNorm(4096x12288", "_norm_bwd_wide_kernel", "norm._norm_bwd_wide_kernel",
        "start + chunk_blocks * BLOCK, N), BLOCK)", "start + chunk_blocks * BLOCK, N), BLOCK // 2)",
    ),
}  # fmt: skip


@contextmanager
def planted(where, old, new):
    """In the block, a function of a file of kernels is that of a copy with `new` for `old`."""
    file, name = where.split(".")
    module = importlib.import_module(f"fastnn.kernels.{file}")
    source = Path(module.__file__).read_text()
    assert old in source
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"slow_{file}.py"
        path.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        copy = importlib.util.module_from_spec(spec)
        with mock.patch.dict(_config.TUNABLES):  # the copy is no file that a search may tune
            spec.loader.exec_module(copy)
        with mock.patch.object(module, name, getattr(copy, name)):
            yield


def slow_faults():
    from fastnn.bench import roofs

    table = roofs.shipped()["launches"]
    for fault, (row, name, *change) in SLOW.items():
        (case, dtype), *_ = [(c, d) for c, d in roofs.rows() if str(c).startswith(row)]

        def of_kernel(launch, source, name=name):
            return launch in table and table[launch]["kernel"] == name

        with planted(*change):
            ((launch, found),) = roofs.launched(case, dtype, of_kernel)[1].items()
        noticed = roofs.judged(found, table[launch], case.key(dtype))
        print(f"{fault}: {noticed}")
        assert any("in the table" in words for words in noticed), fault


def test_the_roof():
    print(compiling(["-c", "from tests.test_aot import *\nroofs()\nslow_faults()"]))


@interpreted
@pytest.mark.parametrize("fault", SLOW)
def test_slow_faults_leave_results_right(fault):
    n = 8200 if "wide" in SLOW[fault][1] else 40
    layer = SLOW[fault][0].partition("(")[0]
    case = Case(layer, (randn(3, n),), {"normalized_shape": n} if layer == "LayerNorm" else {})
    with planted(*SLOW[fault][2:]):
        assert check(case, torch.float32).failures == []
