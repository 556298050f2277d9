"""The record of one accelerated function, and the one place that picks kernel or stock.

An op file declares a function under its name and signature in `torch.nn.functional`; `@op` makes
of it a plain function that runs stock while no kernel could run, and otherwise asks `dispatch`.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import linecache
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.torch_version import TorchVersion
from torch.utils._device import DeviceContext

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

Mode = Literal["auto", "triton", "torch"]
_MODES = ("auto", "triton", "torch")

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
_KERNEL_DEVICES = {"cuda", "cpu"} if INTERPRET else {"cuda"}

_initial = os.environ.get("FASTNN_BACKEND", "auto")
if _initial not in _MODES:
    raise ValueError(f"FASTNN_BACKEND={_initial!r}: accepted are {', '.join(_MODES)}")
_mode: ContextVar[Mode | None] = ContextVar("fastnn_backend", default=None)


class BackendError(RuntimeError):
    """Under `backend("triton")`, a call that would have run stock. Names the op and the reason."""


class Stock(NamedTuple):
    """Returned by a fused function to decline a call; `why` is read after "stock: "."""

    why: str


class Invalid(Stock):
    """Declines a call that stock is going to reject: in every mode the user gets stock's error."""


# ---- Whether anything but stock can be chosen -------------------------------------------------
#
# While `_idle` holds, every op goes straight to stock. No CUDA tensor exists before CUDA is
# initialised, and asking for a device at import would initialise it (and break a later fork).

_lock = threading.Lock()
_idle = True
_watching = 0  # open `decisions()` blocks, in all threads
_open_modes: list[Mode] = []  # of all open `backend()` blocks, in all threads, oldest first
_awake = INTERPRET
_fallback: Mode = _initial  # type: ignore[assignment]  # for threads that opened no block


def _settle() -> None:
    """Derive `_idle` and `_fallback` from what is open."""
    global _idle, _fallback
    _fallback = _open_modes[-1] if _open_modes else _initial  # type: ignore[assignment]
    _idle = not (_awake or _watching or _initial == "triton" or "triton" in _open_modes)


def _wake() -> None:
    global _awake
    with _lock:
        _awake = True
        _settle()


if HAS_TRITON and (torch.version.cuda or torch.version.hip):
    torch.cuda._lazy_call(_wake)  # at once if CUDA is up, else when the first CUDA tensor is made
_settle()


def idle() -> bool:
    """True where no kernel can run and nobody asks why: stock may be called directly."""
    return _idle


def current_mode() -> Mode:
    """The mode in force: "auto", "triton" or "torch"."""
    return _mode.get() or _fallback


# A constant to Dynamo, without `torch.compiler.assume_constant_result`, which would import Dynamo.
current_mode._dynamo_marked_constant = True  # type: ignore[attr-defined]


class backend:
    """`with fastnn.backend(mode):` chooses who runs the calls made inside.

    "auto": kernels where they win, stock elsewhere. "triton": kernels at every size; a call that
    would go to stock for any cause but its size raises `BackendError`. "torch": stock, always.
    The default is the environment variable `FASTNN_BACKEND`, else "auto".

    Holds in this thread, and in threads that opened no block of their own (those of autograd and of
    DataParallel) while it is the block opened last. Raises ValueError for any other mode.
    """

    def __init__(self, mode: Mode):
        if mode not in _MODES:
            raise ValueError(f"backend: expected one of {', '.join(_MODES)}; got {mode!r}")
        self.mode = mode
        self._tokens: list = []

    def __enter__(self) -> backend:
        self._tokens.append(_mode.set(self.mode))
        with _lock:
            _open_modes.append(self.mode)
            _settle()
        return self

    def __exit__(self, *exc) -> None:
        _mode.reset(self._tokens.pop())
        with _lock:
            # The newest of this mode: among equals it does not matter whose it was.
            del _open_modes[len(_open_modes) - 1 - _open_modes[::-1].index(self.mode)]
            _settle()


# ---- Telling which path ran ---------------------------------------------------------------------


class Decision(NamedTuple):
    """One dispatch: the op, and None if a kernel ran, else the reason for stock."""

    op: Op
    why: str | None


_heard: ContextVar[tuple[list[Decision], ...]] = ContextVar("fastnn_decisions", default=())


@contextmanager
def decisions() -> Iterator[list[Decision]]:
    """Collect a `Decision` for every dispatch made inside the block, in this thread."""
    global _watching
    mine: list[Decision] = []
    token = _heard.set((*_heard.get(), mine))
    with _lock:
        _watching += 1
        _settle()
    try:
        yield mine
    finally:
        _heard.reset(token)
        with _lock:
            _watching -= 1
            _settle()


# ---- The size gate ------------------------------------------------------------------------------


@functools.cache
def _crossovers() -> Mapping[str, Any]:
    return json.loads(Path(__file__).with_name("crossover.json").read_text())


@functools.cache
def _crossover(name: str, architecture: str) -> tuple[float, str]:
    """(least size at which the kernel wins, where that figure comes from)."""
    tables = _crossovers()
    why = _unproven(architecture)
    for key in (architecture, "default"):
        table = tables.get(key)
        if table is not None and name in table["least"] and (key == architecture or not why):
            least = table["least"][name]
            return (float("inf") if least is None else least), table["source"]
    return float("inf"), why or "no figure"


def _unproven(architecture: str) -> str | None:
    """Why estimates do not count there, if so: its kernels were never compiled, or not by this
    Triton. What `fastnn tune` measured counts in any case."""
    if not HAS_TRITON or architecture in ("cpu", "default"):
        return None
    from fastnn import kernels  # Triton is loaded with it, on the first question about a GPU

    least = _crossovers().get("compiled", {}).get(architecture)
    if least is None:
        return f"kernels were not compiled for {architecture}; `fastnn tune` measures them"
    if TorchVersion(kernels._launch.triton_version()) < least:
        return f"on {architecture} kernels need triton {least}"
    return None


@functools.cache
def architecture(device_index: int) -> str:
    """The name of a device's architecture: "sm_90", "gfx942", or "cpu" for the interpreter."""
    if device_index < 0:
        return "cpu"
    properties = torch.cuda.get_device_properties(device_index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


# ---- The record and its dispatch ----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Op:
    """What fastnn knows of one function. Everything else is derived from these fields."""

    name: str
    fused: Callable  # stock's signature; returns the result, or Stock(why)
    stock: Callable  # the fallback, and the reference of every check
    dtypes: tuple[torch.dtype, ...] = FLOATS
    integers: tuple[torch.dtype, ...] = ()  # dtypes of index arguments, where there are any
    autocast: Literal["fp32", "lower", None] = None  # the list that CUDA autocast has it on
    autocast_cpu: Literal["fp32", "lower", None] = None
    compiled: Literal["stock", "opaque"] = "stock"  # who runs it under torch.compile
    opaque: bool = False  # whether its launches are registered, so that a graph can hold them
    size: Callable[..., int] | None = None  # what the gate compares; default: most elements
    source: str = ""

    def __repr__(self):
        return f"Op({self.name})"

    def autocast_list(self, device_type: str):
        return self.autocast if device_type == "cuda" else self.autocast_cpu


_SCALARS = frozenset((int, float, bool, str, type(None), torch.dtype, torch.Size, FunctionType))


def _refuse_mode_stack() -> str | None:
    for i in range(torch._C._len_torch_function_stack()):
        mode = torch._C._get_function_stack_at(i)
        if type(mode) is not DeviceContext:  # `with torch.device(...)` only concerns factories
            return f"a torch function mode is active ({type(mode).__name__})"
    return None


def _refuse_tensor(op: Op, t: Tensor) -> str | None:
    if t.device.type not in _KERNEL_DEVICES:
        return f"a tensor on {t.device.type}"
    if t.layout is not torch.strided or t.is_nested:
        return "a sparse, nested or otherwise not strided tensor"
    dtype = t.dtype
    if dtype not in op.dtypes and dtype not in op.integers:
        return f"{dtype}"
    if t.is_neg():
        return "a tensor with a pending negation"
    return None


def _survey(op: Op, args: tuple, kwargs: dict) -> str | tuple[Tensor, int]:
    """Why no kernel can take this call, of the reasons all ops share; else a tensor among the
    arguments and the most elements that one of them has."""
    if not HAS_TRITON:
        return "triton is not installed"
    if torch._C._are_functorch_transforms_active():
        return "inside a functorch transform (vmap, grad, jacrev, ...)"
    if torch._C._get_tracing_state() is not None:
        return "inside torch.jit.trace"
    if forward_ad._current_level >= 0:
        return "forward-mode automatic differentiation"
    if torch._C._len_torch_dispatch_stack():
        return "a torch dispatch mode is active (FakeTensorMode, FlopCounterMode, ...)"
    if torch._C._len_torch_function_stack() and (why := _refuse_mode_stack()):
        return why
    first = None
    index = most = 0
    for value in (*args, *kwargs.values()) if kwargs else args:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            why = _refuse_tensor(op, value)
            if why is not None:
                return why
            if first is None:
                first, index = value, value.get_device()
            elif index != value.get_device():
                return "tensors on several devices"
            most = max(most, value.numel())
        elif kind not in _SCALARS:
            if isinstance(value, Tensor):
                return f"a tensor subclass ({kind.__name__})"
            if hasattr(kind, "__torch_function__"):
                return f"an argument that overrides torch functions ({kind.__name__})"
    if first is None:
        return "no tensor among the arguments"
    return first, most


def _gate(op: Op, device_index: int, most: int, args, kwargs) -> str | None:
    """Why stock is the faster one at this size, if it is."""
    least, source = _crossover(op.name, architecture(device_index))
    if least == float("inf"):
        return f"stock is as fast at every size ({source})"
    try:
        size = op.size(*args, **kwargs) if op.size else most
    except Exception:  # arguments of the wrong kinds, which stock is going to reject in its words
        return "arguments without a size"
    if size < least:
        return f"size gate: {size} is below {least} ({source})"
    return None


def _under_autocast(op: Op, device_type: str, args: tuple, kwargs: dict):
    """Arguments as stock autocast would pass them on, with the result's dtype where it sets one."""
    rule = op.autocast_list(device_type)
    if rule is None or not torch.is_autocast_enabled(device_type):
        return args, kwargs
    if rule == "fp32":
        # The kernel reads 16-bit values as they are and writes fp32: no pass to convert them.
        return args, {**kwargs, "out_dtype": torch.float32}
    low = torch.get_autocast_dtype(device_type)

    def cast(v):
        return v.to(low) if isinstance(v, Tensor) and v.is_floating_point() else v

    return tuple(map(cast, args)), {k: cast(v) for k, v in kwargs.items()}


def _forced_onto_stock(name: str, why: str) -> NoReturn:
    raise BackendError(f"{name}: backend('triton'), but stock: {why}")


# Dynamo then runs it as it is while tracing: the user meets the error, not Dynamo's words for it.
_forced_onto_stock._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _dispatch_compiling(op: Op, args: tuple, kwargs: dict):
    """The choice as Dynamo traces it: stock, or the fused function with its launches opaque."""
    # Dynamo guards on the global it reads, so that another mode makes another graph.
    mode = current_mode() if _fallback else "auto"
    why = 'backend("torch")' if mode == "torch" else "torch.compile fuses the stock formula"
    if op.opaque and mode != "torch" and (mode == "triton" or op.compiled == "opaque"):
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        known = all(t.dtype in op.dtypes or t.dtype in op.integers for t in tensors)
        if HAS_TRITON and known and tensors and tensors[0].device.type in _KERNEL_DEVICES:
            passed = _under_autocast(op, tensors[0].device.type, args, kwargs)
            out = op.fused(*passed[0], **passed[1])
            if not isinstance(out, Stock):
                return out
            why = out.why
        else:
            why = "a device or dtype that kernels do not take"
    if mode == "triton":
        _forced_onto_stock(op.name, why)
    return op.stock(*args, **kwargs)


def dispatch(op: Op, args: tuple, kwargs: dict):
    """Run `op` by the path that its record, the arguments and the mode call for."""
    if torch.compiler.is_compiling():
        return _dispatch_compiling(op, args, kwargs)
    mode = _mode.get() or _fallback
    why: str | None
    invalid = False
    if mode == "torch":
        why = 'backend("torch")'
    else:
        found = _survey(op, args, kwargs)
        if isinstance(found, str):
            why = found
        else:
            tensor, most = found
            why = None
            if mode == "auto":
                why = _gate(op, tensor.get_device(), most, args, kwargs)
        if why is None:
            passed = _under_autocast(op, tensor.device.type, args, kwargs)
            out = op.fused(*passed[0], **passed[1])
            if not isinstance(out, Stock):
                for heard in _heard.get():
                    heard.append(Decision(op, None))
                return out
            why, invalid = out.why, isinstance(out, Invalid)
    for heard in _heard.get():
        heard.append(Decision(op, why))
    if mode != "triton":
        return op.stock(*args, **kwargs)
    if invalid:
        op.stock(*args, **kwargs)  # raises what stock raises
    _forced_onto_stock(op.name, why)


_NO_KEYWORDS: dict = {}


def _front(record: Op) -> Callable:
    """The plain function that users call: stock at once while idle, else `dispatch`.

    Written out from the fused function's signature, so that arguments bind, default and fail as
    declared, at the cost of one call.
    """
    name = record.name
    declared: list[str] = []
    positional: list[str] = []
    keyword: list[str] = []
    defaults = {}
    for p in inspect.signature(record.fused).parameters.values():
        if p.name == "out_dtype":
            continue
        if p.kind is p.KEYWORD_ONLY:
            keyword.append(f"{p.name}={p.name}")
            if len(keyword) == 1:
                declared.append("*")
        else:
            positional.append(p.name)
        if p.default is not p.empty:
            defaults[f"_{p.name}"] = p.default
        declared.append(p.name if p.default is p.empty else f"{p.name}=_{p.name}")
    passed = ", ".join(positional + keyword)
    dispatched = ", ".join(positional)
    # A warning's stack level counts the frames that lie between: this function, then dispatch.
    passed = passed.replace("_stacklevel", "_stacklevel + 1")
    dispatched = dispatched.replace("_stacklevel", "_stacklevel + 2")
    lines = [
        f"def make(stock, record, {', '.join(defaults)}):",
        f"    def {name}({', '.join(declared)}):",
        "        if _idle:",
        f"            return stock({passed})",
        f"        return dispatch(record, ({dispatched},), "
        + (f"dict({', '.join(keyword)}))" if keyword else "_NO_KEYWORDS)"),
        f"    return {name}",
    ]
    if not isinstance(record.stock, FunctionType):  # a builtin, which also takes out=
        declared += ["out=None"] if keyword else ["*", "out=None"]
        lines[1] = f"    def {name}({', '.join(declared)}):"
        lines[2:2] = [
            "        if out is not None:",
            f"            return stock({passed}, out=out)",
        ]
    file = f"<fastnn.functional.{name}>"
    source = "\n".join(lines) + "\n"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    scope: dict = {}
    exec(compile(source, file, "exec"), globals(), scope)
    return scope["make"](record.stock, record, **defaults)


def _tell_torchscript(call: Callable, stock: Callable) -> None:
    """Have TorchScript compile stock where it meets `call`."""
    call.__prepare_scriptable__ = lambda: stock  # type: ignore[attr-defined]
    if not isinstance(stock, FunctionType):
        # A builtin is looked up by identity, in a table that is slow to build: only listed here.
        builtins = torch.jit._builtins
        entry = call, f"aten::{stock.__name__}"
        if builtins._builtin_table is None:
            builtins._builtin_ops.append(entry)
        else:
            builtins._register_builtin(*entry)


def op(*, stock: Callable, **fields) -> Callable[[Callable], Callable]:
    """Declare a fused function under its name and signature in `torch.nn.functional`.

    The decorated function becomes a plain function of the same signature that dispatches; its `Op`
    is its attribute `op`. A keyword-only `out_dtype` stays between dispatch and the fused function.
    """

    def declare(fused: Callable) -> Callable:
        record = Op(name=fused.__name__, fused=fused, stock=stock, **fields)
        call = _front(record)
        call.__qualname__ = record.name
        call.__module__ = "fastnn.functional"
        call.__doc__ = stock.__doc__ or fused.__doc__
        call.op = record  # type: ignore[attr-defined]
        _tell_torchscript(call, stock)
        return call

    return declare


# ---- What op files call -------------------------------------------------------------------------


def rounded(number: Any, dtype: torch.dtype) -> Any:
    """A Python number as ATen sees it where it converts it to `dtype` before it computes.

    None if it does not fit, which is an error there. What is no number is returned as it is. Which
    numbers ATen converts on CUDA is told in docs/scalars.md.
    """
    return _rounded(float(number), dtype) if isinstance(number, (int, float)) else number


@functools.lru_cache
def _rounded(number: float, dtype: torch.dtype) -> float | None:
    found = torch.tensor(number, dtype=dtype, device="cpu").item()
    return found if math.isinf(found) == math.isinf(number) else None


class _NoGraph:
    """Stands for an autograd context where no gradient is wanted; keeps nothing."""

    needs_input_grad = (False,) * 32

    def __setattr__(self, name, value):
        pass

    def _ignore(self, *args):
        pass

    save_for_backward = mark_non_differentiable = set_materialize_grads = _ignore

    def mark_dirty(self, *tensors):
        for t in tensors:
            if not t.is_inference():  # those count no versions
                torch.autograd.graph.increment_version(t)  # as `apply` does


_NO_GRAPH = _NoGraph()


def run(function: type[torch.autograd.Function], *args):
    """`function.apply(*args)`, or its bare forward where autograd has nothing to record."""
    if torch.is_grad_enabled():
        for value in args:
            if isinstance(value, Tensor) and value.requires_grad:
                return function.apply(*args)
    if torch.compiler.is_compiling():
        return function.apply(*args)
    return function.forward(_NO_GRAPH, *args)


def second_order(formula: Callable, inputs: tuple, grad_outputs, needed: tuple[bool, ...]):
    """Gradients of the stock `formula(*inputs)` that carry a graph of their own.

    For a backward that runs under `create_graph=True`, where a kernel's result could not be
    differentiated again. Entries of `inputs` that are None or not `needed` get None.
    """
    with torch.enable_grad():
        # Aliases: the same tensor twice among the inputs must not collect the other's gradient.
        aliases = [t if t is None else t.view_as(t) for t in inputs]
        devices = {t.device.type for t in aliases if t is not None}
        with torch.autocast(devices.pop(), enabled=False):
            outputs = formula(*aliases)
        wanted = [t for t, need in zip(aliases, needed, strict=False) if need and t is not None]
        grads = iter(
            torch.autograd.grad(outputs, wanted, grad_outputs, create_graph=True, allow_unused=True)
            if wanted
            else ()
        )
    return tuple(
        next(grads) if need and t is not None else None
        for t, need in zip(aliases, needed, strict=False)
    )


def launcher(file: str, function: str, schema: str, fake: Callable):
    """`fastnn.kernels.<file>.<function>`, callable in eager and inside a compiled graph.

    `schema` is the function's signature in the language of `torch.library`, and `fake` returns
    tensors of the right shapes, dtypes and strides without launching. Eager calls go to the
    launcher itself; a graph holds the opaque op `fastnn::<file>_<function>`.
    """
    from fastnn import kernels

    name = f"fastnn::{file}_{function}"

    def launch(*args):
        return getattr(getattr(kernels, file), function)(*args)

    torch.library.define(name, schema)
    torch.library.impl(name, ("CUDA", "CPU"))(launch)
    torch.library.register_fake(name)(fake)
    opaque = getattr(torch.ops.fastnn, f"{file}_{function}").default

    def call(*args):
        if torch.compiler.is_compiling():
            return opaque(*args)
        return launch(*args)

    return call
