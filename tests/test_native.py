"""The C++ runner: it replays what the Python runner replays, and every build ends well.

The module is built once for the user's cache folder, in 20 to 30 seconds. Steps of interpreted
kernels are called back from C++; the child process at the end of this file launches compiled
kernels, into an empty libcuda that tells what it is given. `python -m tests.test_native 2000` makes
2000 random sequences of calls, with TRITON_INTERPRET=1; `python -m tests.test_native leaks 100000`
makes 100,000 calls; with `python` behind it, by the Python runner.
"""

import contextlib
import ctypes
import gc
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch

import fastnn
import fastnn.functional as F
from fastnn import _build, _gate, _native, _plan, _record
from fastnn.ops import FUNCTIONS, REGISTRY
from fastnn.testing import seed, tensors_of
from tests import test_batches, test_plans
from tests.calls import Call, Upstream, fresh
from tests.marks import interpreted

SHARE = 5  # of the ops, one in so many


def runner_module():
    if why := _build.unsupported():
        pytest.skip(why)
    if _build.compiler() is None:
        pytest.skip("there is no C++ compiler")
    _build.build()
    return _build.load()


@pytest.fixture(scope="module")
def module():
    return runner_module()


@pytest.fixture
def native(module):
    with _native.using(module), _record.using(True):
        yield module


def _is_native(plan) -> bool:
    return type(plan).__module__ == "fastnn.native"


def _ready(name):
    return [p for plans in REGISTRY[name].plans.ready.values() for p in plans]


# ---- The tests of plans, in C++ -----------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("name", [n for n in REGISTRY if n not in test_plans.WITHOUT][::SHARE])
def test_a_replay_equals_the_call_bit_for_bit(native, name, record_property):
    for call in test_plans.share(name)[:1]:
        reference = test_plans.without_plans(call)
        _record.forget()
        for _ in range(4):
            with test_plans.counted() as surveys:
                found = test_plans.outcome(call)
            assert test_plans.unequal(found, reference) is None
        kinds = {"C++" if _is_native(p) else "Python" for p in _ready(name)}
        record_property("plans", [("replayed in " + " and ".join(sorted(kinds)), not surveys)])


def test_which_plans_are_not_taken_is_told(native):
    """A result that is a view of what an operator of PyTorch made stays with the Python runner."""
    refused = _native.left_to_python.total()

    class Heard:
        raw = (torch.ones(4)[1:],)

    program = _plan.Program(1, torch.device("cpu"), {}, False, (), (1,), ())
    assert _native.call(None, None, program, program, (), Heard, 0, [], None, None) is None
    assert (
        _native.left_to_python.total() == refused + 1
        and _native.left_to_python["a result is a view"]
    )


CHECKS = [
    test_plans.test_the_memory_of_a_parameter_may_move,
    test_plans.test_a_subclass_and_a_list_that_changed_take_the_long_way,
    test_plans.test_another_device_does_not_fit_a_plan,
    test_plans.test_functorch_and_tracing_take_the_long_way,
    test_plans.test_a_copied_context_keeps_its_mode,
    test_plans.test_freed_memory_does_not_fit_a_plan,
    test_plans.test_a_node_has_the_name_of_its_function,
    test_plans.test_versions_are_checked_and_buffers_freed_as_without_a_plan,
    test_plans.test_a_zero_with_another_sign_is_another_argument,
    test_plans.test_second_derivatives_of_a_replay,
    test_batches.test_a_batch_of_gradients_of_a_replayed_call,
    test_plans.test_a_draw_of_the_backward_is_that_of_its_forward,
    test_plans.test_hooks_see_what_is_kept,
    test_plans.test_calls_under_autocast_have_plans,
    test_plans.test_an_upstream_gradient_of_another_layout,
    test_plans.test_no_tensor_is_kept_by_a_plan,
    test_plans.test_many_calls_leave_nothing,
    test_plans.test_plans_are_bounded_where_shapes_never_repeat,
    test_plans.test_plans_are_replayed_under_a_default_device,
]


@interpreted
@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__.removeprefix("test_"))
def test_of_plans(native, check):
    check()


@interpreted
@pytest.mark.parametrize("name", ["layer_norm", "dropout", "cross_entropy", "linear"])
def test_whatever_changes_the_answer_is_right(native, name):
    test_plans.test_whatever_changes_the_answer_is_right(name, lambda *told: None)


@interpreted
@pytest.mark.parametrize("seed", range(1000, 1004))
def test_a_sequence_of_calls_equals_the_same_without_plans(native, seed):
    assert test_plans.sequence(seed) is None


@interpreted
@pytest.mark.parametrize("gradients", test_plans.GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", test_plans.TWICE)
def test_a_result_that_is_given_twice_is_replayed_bit_for_bit(native, case, dtype, gradients):
    left = _native.left_to_python.total()
    found = test_plans.differ_twice(test_plans.TWICE[case], dtype, gradients)
    assert found == (None, True) and _native.left_to_python.total() == left


@interpreted
@pytest.mark.parametrize("case", [*test_plans.TWICE][::2])
def test_results_of_one_memory_are_two_tensors(native, case):
    left = _native.left_to_python.total()
    for edited in (0, 1):
        for grad in (True, False):
            test_plans.test_results_of_one_memory_are_two_tensors(case, edited, grad)
    assert _native.left_to_python.total() == left


# ---- What only C++ can get wrong ----------------------------------------------------------------


def _norm():
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    call = lambda: F.layer_norm(x, (8,), w)  # noqa: E731
    test_plans._warm(lambda: torch.autograd.grad(call().sum(), (x, w)))
    (plan,) = _ready("layer_norm")
    assert _is_native(plan)
    return x, w, lambda: test_plans._replayed(call)


@interpreted
def test_a_list_among_the_arguments_fits_until_it_changes(native):
    x, w = torch.randn(3, 9, requires_grad=True), torch.ones(9, requires_grad=True)
    sizes, pads = [9], [1, 1]
    plans = REGISTRY["rms_norm"].plans, REGISTRY["pad"].plans
    with fastnn.backend("triton"):
        for _ in range(5):
            F.rms_norm(x, sizes, w).sum().backward()
            assert F.pad(x, pads).shape == (3, 11)
        assert [p.count for p in plans] == [1, 1] and all(map(_is_native, _ready("rms_norm")))
        pads[0] = 2
        for _ in range(4):
            assert F.pad(x, pads).shape == (3, 12)
    assert [p.count for p in plans] == [1, 2]


@interpreted
def test_an_exception_of_python_passes_through(native):
    x, w, call = _norm()

    class Mine(Exception):
        pass

    def fail(t):
        raise Mine

    for _ in range(3):
        with torch.autograd.graph.saved_tensors_hooks(fail, fail), pytest.raises(Mine):
            call()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, fail):
            y = call()
        with pytest.raises(Mine):
            y.sum().backward()
    assert x.grad is None and w.grad is None


@interpreted
def test_a_node_outlives_its_plan_and_is_freed(native):
    x, ws = torch.randn(4, 8, requires_grad=True), [torch.randn(8, requires_grad=True)]
    call = lambda: F.layer_norm(x, (8,), *ws)  # noqa: E731
    test_plans._warm(lambda: torch.autograd.grad(call().sum(), (x, *ws)))
    y = test_plans._replayed(call)
    kept = weakref.ref(ws[0])
    _record.forget()
    y.sum().backward(retain_graph=True)
    assert x.grad is not None
    ws.clear()
    assert kept() is not None
    del y
    assert kept() is None


@interpreted
def test_anomaly_mode_names_the_line_of_the_call(native):
    _, _, call = _norm()
    with torch.autograd.set_detect_anomaly(True, check_nan=True), pytest.warns(UserWarning):
        y = call()
        y.register_hook(lambda g: g * float("nan"))
        with pytest.raises(RuntimeError, match=r"NormBackward.*returned nan values"):
            y.sum().backward()


@interpreted
def test_hooks_on_the_node_and_the_result(native):
    _, _, call = _norm()
    told = []
    y = call()
    y.retain_grad()
    y.register_hook(lambda g: told.append("result") or 2 * g)
    y.grad_fn.register_prehook(lambda g: told.append("before") or None)
    y.grad_fn.register_hook(lambda dx, g: told.append("after") or None)
    y.sum().backward()
    assert told == ["result", "before", "after"] and torch.equal(y.grad, torch.full((4, 8), 2.0))
    assert [type(n).__name__ for n, _ in y.grad_fn.next_functions] == ["AccumulateGrad"] * 2


@interpreted
def test_an_output_without_a_gradient_counts_as_zeros(native):
    x = torch.randn(1, 2, 8, requires_grad=True)
    call = lambda: F.max_pool1d(x, 2, return_indices=True)  # noqa: E731
    test_plans._warm(lambda: torch.autograd.grad(call()[0].sum(), x))
    y, indices = test_plans._replayed(call)
    assert not indices.requires_grad and indices.grad_fn is None and y.requires_grad
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.sum() == y.numel()


# ---- PyTorch's linear in one node ---------------------------------------------------------------


def _linear(shape=(2, 3, 8), dtype=torch.float32, needs=(True, True, True), bias=True):
    torch.manual_seed(7)
    sizes = shape, (6, 8), (6,)
    made = [torch.randn(s).to(dtype).requires_grad_(n) for s, n in zip(sizes, needs, strict=True)]
    return made if bias else [*made[:2], None]


def _bits_of_linear(function, given, upstream=None, create_graph=False):
    """[result, gradients, second derivatives if asked for]."""
    y = function(*given)
    leaves = [t for t in given if t is not None and t.requires_grad]
    dy = torch.randn(y.shape).to(y.dtype) if upstream is None else upstream(y)
    grads = torch.autograd.grad(y, leaves, dy, create_graph=create_graph)
    if not create_graph:
        return [y, *grads]
    loss = sum(g.pow(2).sum() for g in grads) + y.exp().sum()
    return [y, *grads, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 8), (4, 8), (1, 8), (5, 1, 2, 8), (1, 1, 8)], ids=str)
def test_linear_has_the_bits_of_stock(module, shape, dtype, bias):
    def apart(y):
        return torch.ones((), dtype=y.dtype).expand(y.shape)

    def turned(y):
        return torch.randn(y.shape[::-1]).to(y.dtype).permute(*range(y.dim())[::-1])

    for needs in itertools.product((True, False), repeat=3 if bias else 2):
        if not any(needs):
            continue
        needs = (*needs, True)[:3]
        given = _linear(shape, dtype, needs, bias)
        for upstream, create_graph in (
            (None, False),
            (apart, False),
            (turned, False),
            (None, True),
        ):
            found = []
            for function in (module.linear, torch.nn.functional.linear):
                torch.manual_seed(1)
                found.append(_bits_of_linear(function, given, upstream, create_graph))
            assert found[0][0].grad_fn.name() == "LinearBackward"
            for one, other in zip(*found, strict=True):
                assert one.dtype == other.dtype and one.stride() == other.stride()
                assert torch.equal(one, other)


def test_linear_ends_as_in_stock(module):
    """Buffers are freed, versions are checked, and what is not needed may be edited."""
    for function in (module.linear, torch.nn.functional.linear):
        x, w, b = _linear()
        y = function(x, w, b)
        y.sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            y.sum().backward()
        y = function(x, w, b)
        y.sum().backward(retain_graph=True)
        with torch.no_grad():
            b.add_(1)
        y.sum().backward(retain_graph=True)
        y.mul_(2)
        y.sum().backward(retain_graph=True)
        with torch.no_grad():
            w.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        x, w, b = _linear(needs=(False, True, True))  # the weight is not kept
        y = function(x, w, b)
        with torch.no_grad():
            w.add_(1)
        y.sum().backward()
        kept = weakref.ref(x)
        y = function(x, w, b)
        del x
        assert kept() is not None
        del y
        assert kept() is None


def test_linear_tells_hooks(module):
    for function in (module.linear, torch.nn.functional.linear):
        x, w, b = _linear()
        told = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, told=told: told.append(tuple(t.shape)) or t.clone(), lambda t: t
        ):
            y = function(x, w, b)
        y.retain_grad()
        y.register_hook(lambda g, told=told: told.append("result"))
        y.grad_fn.register_prehook(lambda g, told=told: told.append("before"))
        w.register_hook(lambda g, told=told: told.append("weight"))
        y.sum().backward()
        assert told[-3:] == ["result", "before", "weight"] and len(told) == 5
        assert torch.equal(y.grad, torch.ones_like(y))
    with torch.autograd.set_detect_anomaly(True, check_nan=True), pytest.warns(UserWarning):
        y = module.linear(*_linear())
        y.register_hook(lambda g: g * float("nan"))
        with pytest.raises(RuntimeError, match=r"LinearBackward.*returned nan values"):
            y.sum().backward()


def test_linear_of_a_batch_of_gradients(module):
    found = []
    for function in (module.linear, torch.nn.functional.linear):
        given = _linear()
        y = function(*given)
        dy = torch.linspace(-1, 1, 4 * y.numel()).view(4, *y.shape)
        found.append(torch.autograd.grad(y, given, dy, is_grads_batched=True))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@contextlib.contextmanager
def _inference():
    with torch.inference_mode():
        yield


LINEAR_OF_STOCK = {
    "no_grad": torch.no_grad,
    "inference": _inference,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "a function mode": test_plans.Functions,
    "a dispatch mode": test_plans.Operators,
    "forward derivatives": torch.autograd.forward_ad.dual_level,
}


@pytest.mark.parametrize("state", LINEAR_OF_STOCK)
def test_linear_is_stock_where_somebody_watches(module, state):
    given, found = _linear(), []
    for function in (module.linear, torch.nn.functional.linear):
        with LINEAR_OF_STOCK[state]():
            found.append(function(*given))
    one, other = found
    assert torch.equal(one, other) and one.dtype == other.dtype
    assert type(one.grad_fn) is type(other.grad_fn)


def test_linear_is_stock_for_other_tensors(module):
    """And it raises what stock raises."""
    x, w, b = _linear()

    class Mine(torch.Tensor):
        pass

    for given in (
        (x.detach().as_subclass(Mine), w, b), (x[..., ::2], w[:, ::2], b),
        (x, w.t().contiguous().t(), b), (x[0, 0], w, b), (x[:0], w, b), (x, w, b.double()),
        (x, w[0], b[0]), (x.int(), w, b), (x, w, b[:1]), (x.to("meta"), w.to("meta"), None),
        (x.detach(), w.detach(), None), (x.detach()._neg_view(), w, b), (x, w), (x,), (x, w, 3),
    ):  # fmt: skip
        found = []
        for function in (module.linear, torch.nn.functional.linear):
            try:
                y = function(*given)
                found.append((type(y), y.shape, y.dtype, y.device, type(y.grad_fn)))
                found[-1] += (None if y.is_meta else y.detach().tolist(),)
            except (RuntimeError, TypeError) as e:
                found.append(str(e))
        assert found[0] == found[1]
    want = torch.func.vmap(lambda x: torch.nn.functional.linear(x, w, b))(x)
    assert torch.equal(torch.func.vmap(lambda x: module.linear(x, w, b))(x), want)


def test_linear_takes_what_a_hook_unpacks_with_other_strides(module):
    x, w, b = torch.randn(3, 5, 8), torch.randn(4, 8), torch.randn(4)
    w.requires_grad_()
    turned = lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)  # noqa: E731
    found = []
    for call in (torch.nn.functional.linear, module.linear):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, turned):
            y = call(x, w, b)
        found.append(torch.autograd.grad(y.sum(), w)[0])
    torch.testing.assert_close(*found)


@interpreted
@pytest.mark.parametrize("act", ["gelu", "relu", "leaky_relu"])
def test_the_linears_of_a_compiled_model_have_one_node(native, act):
    """And its gradients have the same bits as with the Python runner."""
    torch.manual_seed(0)
    nn = torch.nn
    one, two, norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)
    leaves = [*one.parameters(), *two.parameters(), *norm.parameters()]
    x = torch.randn(4, 16)

    def call(x):
        y = two(getattr(nn.functional, act)(one(x)))
        return norm(x + y)

    line = {"op": "dropout_add_layer_norm", "least": 0}
    norms = {"source": "a test", "crossovers": [line]}
    found = []
    for module in (native, None):
        torch._dynamo.reset()
        with _native.using(module), _record.using(True), _gate.using({"default": norms}):
            compiled = fastnn.compile(call)
            y = compiled(x)
            names, todo = Counter(), [y.grad_fn]
            while todo:
                node = todo.pop()
                names[node.name()] += 1
                todo += [n for n, _ in node.next_functions if n is not None]
            found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        assert names["LinearBackward"] == (2 if module else 0)
        assert ("AddmmBackward0" in names) != bool(module)
    torch._dynamo.reset()
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


# ---- Compiled kernels, in another process -------------------------------------------------------


@pytest.mark.parametrize(
    "what", [("launches",), ("leaks", "10000"), ("leaks", "5000", "python")], ids="-".join
)
def test_compiled_kernels(module, what):
    from fastnn.testing.aot import has_compiler

    if torch.cuda.is_available() or not has_compiler():
        pytest.skip("the empty libcuda needs a C compiler, and no GPU")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_native", *what],
        capture_output=True, text=True, env=environment, timeout=560,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


_TELLS = r"""
static void (*tell)(void *, unsigned *, void **);
void set_tell(void (*f)(void *, unsigned *, void **)) { tell = f; }
int cuLaunchKernel(void *f, unsigned x, unsigned y, unsigned z, unsigned a, unsigned b, unsigned c,
                   unsigned shared, void *stream, void **params, void **extra)
{ unsigned n[7] = {x, y, z, a, b, c, shared}; if (tell) tell(f, n, params); return 0; }
int cuLaunchKernelEx(unsigned *config, void *f, void **params, void **extra)
{ if (tell) tell(f, config, params); return 0; }
"""

# PyTorch takes the memory of CPU tensors by `posix_memalign`. Here no two tensors have one address.
_HEAP = r"""
#include <stdlib.h>
#include <sys/mman.h>
void __libc_free(void *);
static char *begin, *next, *end;
int posix_memalign(void **to, size_t alignment, size_t size)
{
    size = (size + 255) & ~(size_t)255;
    if (!begin) {
        size_t most = (size_t)1 << 38;
        begin = mmap(0, most, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                     -1, 0);
        next = begin, end = begin + most;
    }
    *to = __atomic_fetch_add(&next, size, __ATOMIC_RELAXED);
    return (char *)*to + size > end ? 12 : 0;
}
void free(void *p) { if ((char *)p < begin || (char *)p >= end) __libc_free(p); }
"""


def in_a_heap_without_reuse(arguments: list[str]) -> int:
    """Runs this file in another process, and returns its exit code."""
    with tempfile.TemporaryDirectory(prefix="fastnn-heap-") as folder:
        source, library = Path(folder, "heap.c"), Path(folder, "heap.so")
        source.write_text(_HEAP)
        compiler = _build.compiler()
        assert compiler is not None
        subprocess.run(
            [compiler, "-x", "c", str(source), "-shared", "-fPIC", "-o", str(library)], check=True
        )
        return subprocess.run(
            [sys.executable, "-m", "tests.test_native", *arguments],
            env={**os.environ, "LD_PRELOAD": str(library)},
        ).returncode


_SIZES = {
    "i1": ctypes.c_int32, "i32": ctypes.c_int32, "u32": ctypes.c_uint32,
    "i64": ctypes.c_int64, "u64": ctypes.c_uint64, "fp32": ctypes.c_uint32,
}  # fmt: skip


class _Driver:
    """What the driver is told by launches of kernels for which plans were translated."""

    def __init__(self):
        self.kinds: dict[int, list[str]] = {}
        self.told: list[tuple] = []
        translated = _native._launch

        def listening(step):
            compiled = step.compiled[0]
            found = [k for k in compiled.src.signature.values() if k != "constexpr"]
            self.kinds[compiled.function] = found
            return translated(step)

        _native._launch = listening
        self.hook = ctypes.CFUNCTYPE(
            None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint32), ctypes.POINTER(ctypes.c_void_p)
        )(self.tell)

    def tell(self, function, numbers, params):
        if function not in self.kinds:  # not a replay
            return
        kinds = self.kinds[function]
        values = []
        for i, kind in enumerate(kinds):
            holds = ctypes.c_uint64 if kind[0] == "*" else _SIZES[kind]
            value = ctypes.cast(params[i], ctypes.POINTER(holds)).contents.value
            values.append(("at", value) if kind[0] == "*" else value)
        last = [
            ctypes.cast(params[i], ctypes.POINTER(ctypes.c_uint64)).contents.value
            for i in (len(values), len(values) + 1)
        ]
        assert last == [0, 0]
        self.told.append((function, tuple(numbers[:7]), values))

    def heard(self, call: Call) -> list[tuple]:
        """What the driver is told by a call and its backward. Each address is named by the tensor
        in which it is: an argument, a result, a gradient, or the n-th of the others."""
        mine, _ = fresh(call, {})
        seed("cpu")
        upstream = Upstream(0)
        self.told.clear()
        try:
            outs = tensors_of(FUNCTIONS[call.op.name](**mine.arguments))
        except fastnn._mode.BackendError:
            return []
        leaves = {k: mine.arguments[k] for k in sorted(call.wanting)}
        wanted = [t for t in outs if t.requires_grad]
        into = [upstream.gradient(i, t) for i, t in enumerate(wanted)]
        grads = (None,) * len(leaves)
        if wanted:
            grads = torch.autograd.grad(wanted, [*leaves.values()], into, allow_unused=True)
        known = {
            **mine.tensors(),
            **{f"result {i}": t for i, t in enumerate(outs)},
            **{f"gradient of result {i}": t for i, t in enumerate(into)},
            **{f"gradient of {k}": g for k, g in zip(leaves, grads, strict=True) if g is not None},
        }
        others: dict[int, int] = {}

        def named(value):
            if not isinstance(value, tuple) or not value[1]:
                return value
            for name, t in known.items():
                offset = value[1] - t.untyped_storage().data_ptr()
                if 0 <= offset < t.untyped_storage().nbytes():
                    return name, offset
            return others.setdefault(value[1], len(others))

        return [(f, n, [named(v) for v in values]) for f, n, values in self.told]


def _launched() -> list[Call]:
    x, w, b = torch.randn(6, 40), torch.randn(40), torch.randn(40)
    norm = {"input": x, "normalized_shape": (40,), "weight": w, "bias": b}
    loss = {"input": x, "target": torch.randint(40, (6,)), "label_smoothing": 0.1}
    given = {
        "layer_norm": norm,
        "cross_entropy": loss,
        "dropout": {"input": x.bfloat16(), "p": 0.3},
        "leaky_relu": {"input": x, "negative_slope": -0.3},
    }
    return [
        Call(REGISTRY[name], name, a, frozenset(a) & {"input", "weight", "bias"})
        for name, a in given.items()
    ]


def launches(*names: str) -> None:
    """The driver is given the same without plans and by both runners: kernel, grid, shared bytes,
    each pointer and number. `names`: the ops of which a row is called; "all": all ops."""
    from fastnn.testing import aot

    for name in ("cuLaunchKernel", "cuLaunchKernelEx"):
        aot.LIBCUDA = aot.LIBCUDA.replace(f"NOTHING({name}) ", "")
    aot.LIBCUDA += _TELLS
    torch.set_num_threads(1)
    driver = _Driver()
    told: Counter[str] = Counter()
    differ = []
    with aot.launch_nothing(real_launcher=True), fastnn.backend("triton"):
        numbers = itertools.count(16, 16)
        fastnn.kernels._launch.driver.active.utils.load_binary = lambda *args: (
            None, next(numbers), 0, 0, 1 << 20
        )  # fmt: skip
        ctypes.CDLL("libcuda.so.1").set_tell(driver.hook)
        of = REGISTRY if names == ("all",) else names
        calls = [c for name in of for c in test_plans.share(name)[:1]] if names else _launched()
        for call in calls:
            replayed = {}
            for runner in ("C++", "Python"):
                module = _build.load() if runner == "C++" else None
                with _native.using(module), _record.using(True):
                    for _ in range(4):
                        replayed[runner] = driver.heard(call)
                    plans = _ready(call.op.name)
                    in_cpp = sum(map(_is_native, plans))
                    assert in_cpp == (0 if runner == "Python" else in_cpp if names else len(plans))
                    assert plans or names, _record.unplanned
                    told["plans in C++"] += in_cpp
            with _record.using(False):
                wanted = driver.heard(call)
            differ += [(call.row, r, heard, wanted) for r, heard in replayed.items()
                       if heard != wanted]  # fmt: skip
            told["launches compared"] += len(wanted)
            how = "with a plan" if plans and wanted else "without" if wanted else "on PyTorch"
            told[f"calls {how}"] += 1
    print(dict(told), dict(_native.left_to_python))
    assert not differ, differ
    assert told["launches compared"] >= 2 * len(calls) or names
    assert not _native.left_to_python or names


def leaks(count: int, runner: str = "native") -> None:
    """Memory, references and threads after many calls; long chains of nodes."""
    from fastnn.testing.aot import launch_nothing

    def pages():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1])

    torch.set_num_threads(1)
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    shape, one, other = (8,), torch.ones(4, 8), torch.randn(4, 8, dtype=torch.float64)
    with (
        launch_nothing(real_launcher=True),
        _native.using(_build.load() if runner == "native" else None),
        fastnn.backend("triton"),
        _record.using(True),
    ):

        def step(x=x):
            return torch.autograd.grad(F.layer_norm(x, shape, w), (x, w), one)

        def refused():
            assert plan(other, shape, w, None, 1e-5) is _plan.UNFIT

        def fail(t):
            raise ValueError

        def failing():
            try:
                with torch.autograd.graph.saved_tensors_hooks(fail, fail):
                    F.layer_norm(x, shape, w)
            except ValueError:
                return
            raise AssertionError

        test_plans._warm(step)
        (plan,) = _ready("layer_norm")
        assert _is_native(plan) is (runner == "native")
        watched = x, w, shape, plan, _plan.UNFIT
        for call, times in ((step, count), (refused, count), (failing, count // 20)):
            for _ in range(times // 10):
                call()
            gc.collect()
            before = pages(), len(gc.get_objects()), [sys.getrefcount(o) for o in watched]
            for _ in range(times):
                call()
            gc.collect()
            assert [sys.getrefcount(o) for o in watched] == before[2]
            assert len(gc.get_objects()) <= before[1] + 10
            grown = (pages() - before[0]) * 4
            assert grown < 4096, f"{call.__name__}: {grown} kB after {times} calls"
        y = x
        for _ in range(30_000):
            y = F.gelu(y)
        del y  # frees the chain without recursion
        errors, done = [], []
        end = time.time() + 3

        def work():
            try:
                mine = torch.randn(4, 8, requires_grad=True)
                while time.time() < end:
                    dx, _ = step(mine)
                    F.layer_norm(mine, shape, w).sum().backward(inputs=[mine])
                    done.append(dx.shape)
            except Exception as e:
                errors.append(e)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for t in threads:
            t.start()
        while any(t.is_alive() for t in threads):
            _record.forget()  # plans come and go
            time.sleep(0.01)
        assert not errors and len(done) > 8, errors


# ---- Builds -------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FASTNN_NATIVE", "1")
    if why := _build.unsupported():
        pytest.skip(why)
    return tmp_path / "cache"


def _fake(folder, body):
    tool = folder / "compiler"
    tool.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\n{body}\n')
    tool.chmod(0o755)
    return str(tool)


def _told() -> str:
    """What `fastnn info` says of the C++ runner, in a process that starts no build."""
    with mock.patch.object(_build, "start"), _native.using(None):
        _native._asked = False
        return _native.unavailable() or ""


def test_no_compiler(cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(_build.BuildError, match="no C\\+\\+ compiler"):
        _build.build()
    _build.start()
    assert not cache.exists() and "not built" in _told()


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("echo 'x.h: fatal error: no such file' >&2; exit 1", "fatal error: no such file"),
        ("exit 0", "wrote nothing"),
        ("kill -9 $$", "code -9"),
    ],
)
def test_a_broken_compiler(cache, monkeypatch, tmp_path, body, why):
    monkeypatch.setenv("CXX", _fake(tmp_path, body))
    with pytest.raises(_build.BuildError, match=why):
        _build.build()
    assert why in _told()
    assert not list(cache.glob("*.tmp")) and not list(cache.glob("*.so"))
    with mock.patch.object(threading, "Thread", side_effect=AssertionError):
        _build.start()  # it is not tried again in the background


def test_a_module_that_cannot_be_loaded(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", _fake(tmp_path, "echo garbage > $2"))
    _build.build()
    assert "cannot be loaded" in _told()


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("FASTNN_NATIVE", "1")
    monkeypatch.setenv("FASTNN_CACHE", str(file / "cache"))
    if not _build.unsupported() and _build.compiler():
        with pytest.raises(_build.BuildError, match="cannot be used"):
            _build.build()
        assert "not built" in _told()


def test_two_builds_and_one_that_is_killed(cache, monkeypatch, tmp_path):
    ran = tmp_path / "ran"
    monkeypatch.setenv("CXX", _fake(tmp_path, f"echo run >> {ran}; sleep 1; echo module > $2"))
    program = "from fastnn import _build; _build.build()"
    first = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    while not ran.exists() and first.poll() is None:
        time.sleep(0.02)
    assert not _build.path().exists()  # it appears only when it is complete
    with pytest.raises(_build.BuildError, match="another process"):
        _build.build(wait=False)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    left = list(cache.glob("*.tmp"))
    assert len(left) == 1
    said = []
    others = [threading.Thread(target=_build.build, args=(said.append,)) for _ in range(2)]
    for t in others:
        t.start()
    for t in others:
        t.join()
    assert len(ran.read_text().split()) == 2  # the killed one, and one of the two
    assert not list(cache.glob("*.tmp")) and _build.path().read_text() == "module\n"


def test_the_background_build_waits_for_nothing(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", _fake(tmp_path, "sleep 1; echo module > $2"))
    start = time.monotonic()
    _build.start()
    assert time.monotonic() - start < 5
    end = time.monotonic() + 60
    while not _build.path().exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert _build.path().exists()


def test_it_is_off_unless_asked_for(monkeypatch):
    for value in (None, "0", ""):
        monkeypatch.delenv("FASTNN_NATIVE", raising=False)
        if value is not None:
            monkeypatch.setenv("FASTNN_NATIVE", value)
        assert not _build.wanted() and "FASTNN_NATIVE" in _told()


if __name__ == "__main__":
    if sys.argv[1] == "launches" and "LD_PRELOAD" not in os.environ:
        sys.exit(in_a_heap_without_reuse(sys.argv[1:]))
    elif sys.argv[1] == "launches":
        launches(*sys.argv[2:])
    elif sys.argv[1] == "leaks":
        leaks(int(sys.argv[2]), *sys.argv[3:])
    else:
        with _native.using(runner_module()):
            sys.exit(test_plans.main(sys.argv[1]))
