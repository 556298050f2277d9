"""PTX on the CPU: single instructions against the text of the ISA, and rows on compiled code.

Rows run in separate processes, because `TRITON_INTERPRET`, which this process may have, forbids
compiling. `python -m tools.ptx` runs all rows; the tests run a share.
"""

import re
import struct

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

import fastnn
import fastnn.functional as F
from fastnn.kernels import _libdevice
from fastnn.kernels._launch import kernel
from fastnn.testing import Case, check, randn
from fastnn.testing.aot import emulate
from fastnn.testing.ptx import Memory, PtxKernel
from tests.test_aot import compiling, skip_unproven
from tools.ptx import EMULATED

# ---- single instructions ------------------------------------------------------------------------

MODULE = """
.version 8.7
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry probe(
    .param .u64 .ptr .global .align 1 probe_param_0,
    .param .u64 .ptr .global .align 1 probe_param_1,
    .param .u32 probe_param_2
)
.reqntid 32
{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<19>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [probe_param_0];
    ld.param.b64 %rd2, [probe_param_1];
    ld.param.b32 %r9, [probe_param_2];
    mov.u32 %r1, %tid.x;
    mad.wide.u32 %rd3, %r1, 12, %rd1;
    mad.wide.u32 %rd4, %r1, 8, %rd2;
    ld.global.b32 %r2, [%rd3];
    ld.global.b32 %r3, [%rd3+4];
    ld.global.b32 %r4, [%rd3+8];
    mov.b64 %rd5, {%r2, %r3};
    mov.b32 {%rs1, %rs2}, %r2;
    mov.b32 {%rs3, %rs4}, %r3;
    mov.b32 %r6, 0;
BODY
    st.global.v2.b32 [%rd4], {%r5, %r6};
    ret;
}
"""


def bits(value):
    """The 32 bits of a float, or of an integer modulo 2**32."""
    if isinstance(value, float):
        return struct.unpack("I", struct.pack("f", value))[0]
    return value % 2**32


def run(body, rows, blocks=1, shared=0, third=7):
    """The words %r5 and %r6 that `body` leaves in each thread. %r2 to %r4 are the thread's row."""
    words = np.zeros((32, 3), np.uint32)
    for i, row in enumerate(rows):
        words[i, : len(row)] = [bits(v) for v in row]
    out = np.zeros((32, 2), np.uint32)
    memory = Memory([(a.ctypes.data, a.nbytes) for a in (words, out)])
    program = PtxKernel(MODULE.replace("BODY", body))
    program.run((blocks,), 32, shared, [words.ctypes.data, out.ctypes.data, third], memory)
    return out


NAN, INF = float("nan"), float("inf")
CASES = [  # instruction, operands in %r2 to %r4, expected %r5
    ("add.s32 %r5, %r2, %r3;", (2**31 - 1, 1), -(2**31)),
    ("mul.lo.s32 %r5, %r2, %r3;", (70000, 70000), 70000 * 70000),
    ("mul.hi.u32 %r5, %r2, %r3;", (0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFE),
    ("mul.hi.s32 %r5, %r2, %r3;", (-(2**31), 3), -2),
    ("mad.lo.s32 %r5, %r2, %r3, %r4;", (-3, 5, 7), -8),
    ("div.s32 %r5, %r2, %r3;", (-7, 2), -3),
    ("rem.s32 %r5, %r2, %r3;", (-7, 2), -1),
    ("shl.b32 %r5, %r2, %r3;", (1, 32), 0),
    ("shr.s32 %r5, %r2, %r3;", (-8, 40), -1),
    ("shr.u32 %r5, %r2, %r3;", (0x80000000, 31), 1),
    ("shf.l.wrap.b32 %r5, %r2, %r3, %r4;", (0x80000001, 0x12345678, 4), 0x23456788),
    ("shf.r.wrap.b32 %r5, %r2, %r3, %r4;", (0x80000001, 0x12345678, 36), 0x88000000),
    ("bfe.u32 %r5, %r2, 8, 8;", (0x12345678,), 0x56),
    ("bfe.s32 %r5, %r2, 4, 4;", (0x80,), -8),
    ("bfi.b32 %r5, %r2, %r3, 8, 4;", (0x5, 0xFFFFFFFF), 0xFFFFF5FF),
    ("prmt.b32 %r5, %r2, %r3, 0x5410U;", (0x44332211, 0x88776655), 0x66552211),
    ("prmt.b32 %r5, %r2, %r3, 0xB;", (0x44332211, 0x88776655), 0x11111100),
    ("lop3.b32 %r5, %r2, %r3, %r4, 0x96;", (0b1100, 0b1010, 0b1001), 0b1111),
    ("popc.b32 %r5, %r2;", (0xF0F0,), 8),
    ("clz.b32 %r5, %r2;", (0x00010000,), 15),
    ("brev.b32 %r5, %r2;", (0x1,), 0x80000000),
    ("not.b32 %r5, %r2;", (0,), -1),
    ("min.s32 %r5, %r2, %r3;", (-1, 1), -1),
    ("max.f32 %r5, %r2, %r3;", (NAN, 1.0), 1.0),
    ("max.f32 %r5, %r2, %r3;", (-0.0, 0.0), 0.0),
    ("min.f32 %r5, %r2, %r3;", (0.0, -0.0), -0.0),
    ("neg.f32 %r5, %r2;", (0.0,), -0.0),
    ("copysign.f32 %r5, %r2, %r3;", (-1.0, 5.0), -5.0),
    ("add.f32 %r5, %r2, %r3;", (2.0**-140, 2.0**-140), 2.0**-139),
    ("add.ftz.f32 %r5, %r2, %r3;", (1e-40, 1.0), 1.0),
    ("mul.ftz.f32 %r5, %r2, %r3;", (1e-30, -1e-10), -0.0),
    # 1 + 2**-24 is halfway to the next number. A little more rounds up.
    ("fma.rn.f32 %r5, %r2, %r3, %r4;", (2.0**-12, 2.0**-12, 1.0), 1.0),
    ("fma.rn.f32 %r5, %r2, %r3, %r4;", (1.0, 1.0 + 2**-23, 2.0**-70), 1.0 + 2**-23),
    ("fma.rn.f32 %r5, %r2, %r3, %r4;", (2.0**-12, 2.0**-12 + 2.0**-35, 1.0), 1.0 + 2**-23),
    ("fma.rn.f32 %r5, %r2, %r3, %r4;", (1.0 + 2**-23, 2.0**-24, 1.0), 1.0 + 2**-23),
    ("fma.rm.f32 %r5, %r2, %r3, %r4;", (2.0**-12, -(2.0**-12), 1.0), 1.0 - 2**-24),
    ("fma.rm.f32 %r5, %r2, %r3, %r4;", (2.0**-13, -(2.0**-13), 1.0), 1.0 - 2**-24),
    ("add.rz.f32 %r5, %r2, %r3;", (1.0, 2.0**-24 + 2.0**-30), 1.0),
    ("div.rn.f32 %r5, %r2, %r3;", (1.0, 0.0), INF),
    ("sqrt.rn.f32 %r5, %r2;", (9.0,), 3.0),
    ("ex2.approx.ftz.f32 %r5, %r2;", (-3.0,), 0.125),
    ("rcp.approx.ftz.f32 %r5, %r2;", (4.0,), 0.25),
    ("cvt.rzi.s32.f32 %r5, %r2;", (-2.7,), -2),
    ("cvt.rni.s32.f32 %r5, %r2;", (2.5,), 2),
    ("cvt.rzi.s32.f32 %r5, %r2;", (NAN,), 0),
    ("cvt.rzi.s32.f32 %r5, %r2;", (1e20,), 2**31 - 1),
    ("cvt.rni.f32.f32 %r5, %r2;", (3.5,), 4.0),
    ("cvt.ftz.sat.f32.f32 %r5, %r2;", (NAN,), 0.0),
    ("cvt.sat.f32.f32 %r5, %r2;", (7.0,), 1.0),
    ("cvt.rn.f32.s32 %r5, %r2;", (2**24 + 1,), 2.0**24),
    ("cvt.rn.f32.u32 %r5, %r2;", (-1,), 2.0**32),
    ("cvt.rn.f16x2.f32 %r5, %r2, %r3;", (1.0, 65520.0), 0x3C007C00),
    ("cvt.rn.bf16x2.f32 %r5, %r2, %r3;", (1.0 + 2**-8, 1.0 + 3 * 2**-8), 0x3F803F82),
    ("cvt.u16.u32 %rs5, %r2; cvt.s32.s16 %r5, %rs5;", (0x18000,), -(2**15)),
    ("cvt.u16.u32 %rs5, %r2; cvt.f32.bf16 %r5, %rs5;", (0xBF80,), -1.0),
    ("cvt.u16.u32 %rs5, %r2; cvt.f32.f16 %r5, %rs5;", (0xC000,), -2.0),
    ("fma.rn.bf16 %rs5, %rs1, %rs3, %rs2; cvt.u32.u16 %r5, %rs5;", (0x80003F81, 0x3F81), 0x3F82),
    ("abs.bf16x2 %r5, %r2;", (0xBF80C000,), 0x3F804000),
    ("fma.rn.f16x2 %r5, %r2, %r3, %r4;", (0x3C004000, 0x40004000, 0x3C003C00), 0x42004500),
    ("add.rn.f32.bf16 %r5, %rs1, %r3;", (0x3F80, 2.0**-20), 1.0 + 2.0**-20),
    ("sub.rn.f32.f16 %r5, %rs1, %r3;", (0x3C00, 3.0), -2.0),
    ("mul.f32x2 %rd6, %rd5, %rd5; shr.u64 %rd6, %rd6, 32; cvt.u32.u64 %r5, %rd6;", (2.0, 3.0), 9.0),
    ("fma.rn.f32x2 %rd6, %rd5, %rd5, %rd5; cvt.u32.u64 %r5, %rd6;", (2.0, 3.0), 6.0),
    ("max.f32 %r5, %r2, %r3, %r4;", (1.0, NAN, 3.0), 3.0),
    ("redux.sync.max.f32 %r5, %r2, 0xffffffff;", (NAN,), 0.0),
    ("selp.b32 %r5, 1, 2, %p1;", (0,), 2),
    ("setp.ne.f32 %p2, %r2, %r2; selp.b32 %r5, 1, 0, %p2;", (NAN,), 0),
    ("setp.neu.f32 %p2, %r2, %r2; selp.b32 %r5, 1, 0, %p2;", (NAN,), 1),
    ("setp.gtu.f32 %p2, %r2, %r3; selp.b32 %r5, 1, 0, %p2;", (NAN, 1.0), 1),
    ("setp.num.f32 %p2, %r2, %r3; selp.b32 %r5, 1, 0, %p2;", (NAN, 1.0), 0),
    ("setp.lt.s32 %p2, %r2, 0; selp.b32 %r5, 1, 0, %p2;", (-1,), 1),
    ("setp.lt.u32 %p2, %r2, 0; selp.b32 %r5, 1, 0, %p2;", (-1,), 0),
    ("setp.lt.f16x2 %p2|%p3, %r2, %r3; selp.b32 %r5, 1, 0, %p3;", (0x3C000000, 0x40000000), 1),
    ("mov.b32 {_, %rs5}, %r2; cvt.u32.u16 %r5, %rs5;", (0x12345678,), 0x1234),
    ("shr.u64 %rd6, %rd5, 16; cvt.u32.u64 %r5, %rd6;", (0x11112222, 0x33334444), 0x44441111),
    ("mul.wide.s32 %rd6, %r2, %r3; shr.s64 %rd6, %rd6, 32; cvt.u32.u64 %r5, %rd6;", (-1, 1), -1),
    ("mov.b32 %r5, %r9;", (), 7),
]  # fmt: skip


@pytest.mark.parametrize(("body", "row", "want"), CASES, ids=[c[0][:40] for c in CASES])
def test_instruction(body, row, want):
    assert run(body, [row])[0, 0] == bits(want)


def test_nan_through_max():
    ((word, _), *_) = run("max.NaN.f32 %r5, %r2, %r3;", [(NAN, 1.0)])
    assert np.isnan(np.uint32(word).view(np.float32))


@pytest.mark.parametrize("function", ["ex2", "lg2", "rcp", "sqrt", "rsqrt"])
def test_approximate_functions_err_but_not_much(function):
    x = np.linspace(0.3, 3, 32, dtype=np.float32)
    got = run(f"{function}.approx.ftz.f32 %r5, %r2;", [(float(v),) for v in x])[:, 0]
    got, x = got.copy().view(np.float32).astype(float), x.astype(float)
    want = {"ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "sqrt": np.sqrt,
            "rsqrt": lambda v: v**-0.5}[function](x)  # fmt: skip
    error = abs(got / want - 1)
    assert 2**-25 < error.max() <= 2**-22 + 2**-24


def test_shuffles():
    row = [(i, 0, 100 + i) for i in range(32)]
    for body, want in (
        ("shfl.sync.bfly.b32 %r5, %r4, 8, 31, -1;", lambda i: 100 + (i ^ 8)),
        ("shfl.sync.idx.b32 %r5, %r4, 3, 31, -1;", lambda i: 103),
        (
            "shfl.sync.down.b32 %r5, %r4, 4, 31, -1;",
            lambda i: 100 + min(i + 4, i if i > 27 else 31),
        ),
        ("shfl.sync.up.b32 %r5, %r4, 1, 0, -1;", lambda i: 100 + max(i - 1, 0)),
        ("shfl.sync.idx.b32 %r5, %r4, 1, 0x1c1f, -1;", lambda i: 100 + (i & 28) + 1),
    ):
        assert run(body, row)[:, 0].tolist() == [want(i) for i in range(32)], body


def test_threads_part_and_meet():
    """Thread n runs a loop n times. Then each thread reads a value of its neighbour."""
    body = """
        mov.b32 %r7, 0;
    $L__loop:
        setp.ge.s32 %p1, %r7, %r1;
        @%p1 bra $L__done;
        add.s32 %r6, %r6, 2;
        add.s32 %r7, %r7, 1;
        bra.uni $L__loop;
    $L__done:
        shfl.sync.bfly.b32 %r5, %r6, 1, 31, -1;
        @!%p1 ret;
    """
    out = run(body, [])
    assert out[:, 1].tolist() == [2 * i for i in range(32)]
    assert out[:, 0].tolist() == [2 * (i ^ 1) for i in range(32)]


def test_threads_that_run_ahead_wait_at_a_barrier():
    """Some threads jump back to the start of the loop, which is earlier in the code, before the
    other threads follow."""
    body = """
        mov.b32 %r7, 0;
        shl.b32 %r8, %r1, 2;
        xor.b32 %r10, %r8, 64;
        setp.lt.s32 %p1, %r1, 7;
        bra.uni $L__head;
    $L__latch:
        add.s32 %r7, %r7, 1;
        setp.ge.s32 %p2, %r7, 3;
        @%p2 bra $L__done;
    $L__head:
        mad.lo.s32 %r11, %r7, 100, %r1;
        st.shared.b32 [%r8], %r11;
        bar.sync 0;
        ld.shared.b32 %r12, [%r10];
        add.s32 %r6, %r6, %r12;
        bar.sync 0;
        @%p1 bra $L__latch;
        shfl.sync.idx.b32 %r13, %r6, 20, 31, 0xffffff80;
        bra.uni $L__latch;
    $L__done:
        mov.b32 %r5, %r6;
    """
    with pytest.raises(RuntimeError, match="wait for each other"):
        run(body, [], blocks=2, shared=128)  # some threads of the warp never reach the shuffle
    out = run(re.sub(r"shfl.*;", "add.s32 %r6, %r6, 0;", body), [], blocks=2, shared=128)
    assert out[:, 0].tolist() == [3 * (i ^ 16) + 300 for i in range(32)]


def test_shared_memory_is_each_blocks_own_and_starts_as_nan():
    body = """
        shl.b32 %r7, %r1, 2;
        xor.b32 %r8, %r7, 4;
        ld.shared.b32 %r6, [%r7];
        add.s32 %r10, %r1, %r2;
        st.shared.b32 [%r7], %r10;
        bar.sync 0;
        ld.shared.b32 %r5, [%r8];
    """
    out = run(body, [], blocks=3, shared=128)
    assert out[:, 0].tolist() == [i ^ 1 for i in range(32)]
    assert (out[:, 1] == 0xFFFFFFFF).all()
    with pytest.raises(IndexError, match="shared memory"):
        run(body, [], shared=64)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("ld.global.b32 %r5, [%rd4+256];", "out of bounds"),
        ("ld.global.b32 %r5, [%rd4+2];", "does not divide"),
        ("setp.eq.s32 %p1, %r1, 31; @%p1 st.global.b32 [%rd1+384], %r2;", "1 threads out of"),
        ("ld.shared.b32 %r5, [global_smem+4];", "shared memory"),
    ],
)
def test_accesses_that_a_gpu_would_fault_on(body, words):
    with pytest.raises(IndexError, match=words):
        run(body, [])


def test_masked_accesses():
    body = """
        setp.lt.s32 %p1, %r1, 3;
        mov.u32 %r5, 0x9;
        @%p1 ld.global.b32 { %r5 }, [ %rd3 + 0 ];
    """
    out = run(body, [(i + 50,) for i in range(32)])
    assert out[:, 0].tolist() == [50, 51, 52] + [9] * 29


def test_what_is_not_known_is_an_error():
    for body in ("vadd.s32.s32.s32 %r5, %r2, %r3;", "add.f32.wide %r5, %r2, %r3;",
                 "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r5}, {%r2}, {%r3}, {%r4};",
                 "atom.global.add.f32 %r5, [%rd1], %r2;"):  # fmt: skip
        with pytest.raises(NotImplementedError):
            run(body, [])


# ---- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", EMULATED)
def test_rows(target):
    """Rows that are forced onto kernels agree with stock on the code compiled for a GPU, too."""
    skip_unproven(target)
    print(compiling(["-m", "tools.ptx", "--share", target]))


def barriers_are_needed():
    """Warps that run one by one agree with stock. Without the first barrier of CTC's gradient
    kernel a row overwrites the gradients of its labels, which only such warps notice."""
    from fastnn.testing import ptx

    x = torch.randn(2, 1, 600).log_softmax(-1).requires_grad_()
    y, sizes = torch.tensor([[300, 400]]), ((2,), (2,))  # columns of the second warp and later
    (want,) = torch.autograd.grad(torch.nn.functional.ctc_loss(x, y, *sizes), x)

    def right(apart):
        with emulate("cuda:90", apart), fastnn.backend("triton"):
            (dx,) = torch.autograd.grad(F.ctc_loss(x, y, *sizes), x)
        return torch.allclose(dx, want, atol=1e-6)

    assert all(right(apart) for apart in ("", "first", "last"))
    stock = ptx.PtxKernel.__init__

    def changed(self, code):
        kept = re.sub(r"bar\.sync[^;]*;", "", code, count=1) if "_ctc_bwd_kernel" in code else code
        stock(self, kept)

    ptx.PtxKernel.__init__ = changed
    try:
        assert [right(apart) for apart in ("", "first")] == [True, False]
    finally:
        ptx.PtxKernel.__init__ = stock


def a_wrong_kernel_is_noticed():
    """The emulator notices a wrong constant in the compiled code, as the interpreter does."""
    from fastnn.testing import ptx

    case = Case("GELU", (randn(3, 40),))
    with emulate("cuda:90"):
        assert check(case, torch.float32).failures == []
    stock = ptx.PtxKernel.__init__

    def changed(self, code):
        assert "0f3F3504F3" in code, "1 / sqrt(2) is not in the code"
        stock(self, code.replace("0f3F3504F3", "0f3F3504C3"))

    ptx.PtxKernel.__init__ = changed
    try:
        with emulate("cuda:90"):
            (failure, *_) = check(case, torch.float32).failures
    finally:
        ptx.PtxKernel.__init__ = stock
    assert "from float64" in failure


def a_thread_out_of_bounds_is_noticed():
    from fastnn.kernels import pointwise

    x = torch.randn(100)
    with emulate("cuda:90"), pytest.raises(IndexError, match="out of bounds"):
        pointwise._pointwise_fwd_kernel(
            (1,), x, x[:50].clone(), x, 100, 0.0, 0.0, FORMULA=pointwise.relu, KEEP=None,
            BLOCK=128, num_warps=4,
        )  # fmt: skip


@kernel()
def _apply_kernel(X, P, Y, FUNCTION: tl.constexpr):
    """A program computes Y = FUNCTION(X), or FUNCTION(X, P).

    X, Y (512,): fp32. P (1,): fp32, or None.
    """
    at = tl.arange(0, 512)
    x = tl.load(X + at)
    if P is None:
        y = FUNCTION(x)
    else:
        y = FUNCTION(x, tl.load(P))
    tl.store(Y + at, y)


@triton.jit
def exp(x):
    return libdevice.exp(x)


def applied(function, x, p=None):
    """(the result of the compiled function, that of PyTorch in float64)."""
    y = torch.empty_like(x)
    exponent = None if p is None else torch.tensor([p])
    with emulate("cuda:90"):
        _apply_kernel((1,), x, exponent, y, FUNCTION=function, num_warps=4)
    stock = torch.pow if function is _libdevice.power else getattr(torch, function.__name__)
    return y, stock(x.double(), *(() if p is None else (exponent.double(),)))


def subnormal_numbers_are_kept():
    """Most functions of libdevice make 0 of a subnormal number. What kernels call does not."""
    small = torch.exp2(torch.linspace(-149, -100, 256))
    cases = [(exp, torch.linspace(-104, -80, 512), None)]
    functions = [f for f in vars(_libdevice).values() if isinstance(f, triton.JITFunction)]
    for function in functions:
        if function is not _libdevice.power:
            cases.append((function, torch.cat([small, -small]), None))
    for p in (-9.0, -1.0, -0.5, 0.0, 0.3, 1.0, 3.0, 5.9, 7.0, 100.0):
        # the results are from below the smallest subnormal number to above the largest finite one
        most = max(abs(p), 1)
        x = torch.exp2(torch.linspace(-155 / most, 129 / most, 254))
        x = torch.cat([x, torch.tensor([0.0, 1.0]), small])
        cases.append((_libdevice.power, -x if p in (1, 3) else x, p))
    for function, x, p in cases:
        got, want = applied(function, x, p)
        wrong = ~((got - want).abs() <= 2**-20 * want.abs() + 2**-149)
        wrong &= got != want.float()  # both may be infinite
        assert not wrong.any(), (function.__name__, p, x[wrong], got[wrong], want[wrong])

    tiny = torch.exp2(torch.arange(-149.0, -120.0))
    for name, x in (
        ("elu", -tiny), ("selu", -tiny), ("tanh", tiny),
        ("softplus", torch.linspace(-103, -85, 50)), ("logsigmoid", torch.linspace(85, 103, 50)),
    ):  # fmt: skip
        stock = getattr(torch.nn.functional, name)
        with emulate("cuda:90"), fastnn.backend("triton"):
            error = (getattr(F, name)(x).double() - stock(x.double())).abs()
        most = 2**-23 * stock(x.double()).abs() * 4 + 2**-149
        assert (error <= most).all(), (name, x[error > most])


def only_nvidias_code():
    for target, error in (("hip:gfx942", "only NVIDIA"), ("cuda:9", "accepted are")):
        with pytest.raises(ValueError, match=error), emulate(target):
            pass


@pytest.mark.parametrize(
    "check",
    [
        a_wrong_kernel_is_noticed, barriers_are_needed, a_thread_out_of_bounds_is_noticed,
        only_nvidias_code, subnormal_numbers_are_kept,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_tool(check):
    compiling(["-c", f"from tests import test_ptx; test_ptx.{check.__name__}()"])
