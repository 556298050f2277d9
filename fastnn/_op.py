"""The record of one accelerated function, and the one place that picks kernel or stock.

An op file declares a function under its name and signature in `torch.nn.functional`; `@op` turns it
into a plain function that runs stock where nothing could run a kernel, and otherwise asks `dispatch`.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
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
_mode: ContextVar[Mode] = ContextVar("fastnn_backend", default=_initial)  # type: ignore[arg-type]


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

_idle = True
_scopes = 0  # open `backend()` and `decisions()` blocks, in all threads
_awake = INTERPRET or _initial == "triton"


def _set_idle() -> None:
    global _idle
    _idle = not (_awake or _scopes)


def _wake() -> None:
    global _awake
    _awake = True
    _set_idle()


if HAS_TRITON and (torch.version.cuda or torch.version.hip):
    torch.cuda._lazy_call(_wake)  # at once if CUDA is up, else when the first CUDA tensor is made
_set_idle()


@contextmanager
def _scope() -> Iterator[None]:
    global _scopes
    _scopes += 1
    _set_idle()
    try:
        yield
    finally:
        _scopes -= 1
        _set_idle()


def idle() -> bool:
    """True where no kernel can run and nobody asks why: stock may be called directly."""
    return _idle


@torch.compiler.assume_constant_result
def current_mode() -> Mode:
    """The mode in force in this thread: "auto", "triton" or "torch"."""
    return _mode.get()


_guarded = _initial  # a copy of the mode last set, for Dynamo, which guards on globals only


def _guard_mode(mode: str) -> None:
    global _guarded
    _guarded = mode


class backend:
    """`with fastnn.backend(mode):` chooses who runs the calls made inside, in this thread.

    "auto": kernels where they win, stock elsewhere. "triton": kernels at every size; a call that
    would go to stock for any cause but its size raises `BackendError`. "torch": stock, always.
    The default is the environment variable `FASTNN_BACKEND`, else "auto".

    Raises ValueError for any other mode.
    """

    def __init__(self, mode: Mode):
        if mode not in _MODES:
            raise ValueError(f"backend: expected one of {', '.join(_MODES)}; got {mode!r}")
        self.mode = mode
        self._open: list = []

    def __enter__(self) -> backend:
        scope = _scope()
        scope.__enter__()
        self._open.append((scope, _mode.set(self.mode)))
        _guard_mode(self.mode)
        return self

    def __exit__(self, *exc) -> None:
        scope, token = self._open.pop()
        _mode.reset(token)
        scope.__exit__(None, None, None)
        _guard_mode(_mode.get())


# ---- Telling which path ran ---------------------------------------------------------------------


class Decision(NamedTuple):
    """One dispatch: the op, and None if a kernel ran, else the reason for stock."""

    op: Op
    why: str | None


_heard: ContextVar[tuple[list[Decision], ...]] = ContextVar("fastnn_decisions", default=())


@contextmanager
def decisions() -> Iterator[list[Decision]]:
    """Collect a `Decision` for every dispatch made inside the block, in this thread."""
    mine: list[Decision] = []
    token = _heard.set((*_heard.get(), mine))
    try:
        with _scope():
            yield mine
    finally:
        _heard.reset(token)


# ---- The size gate ------------------------------------------------------------------------------


@functools.cache
def _crossovers() -> Mapping[str, Any]:
    return json.loads(Path(__file__).with_name("crossover.json").read_text())


@functools.cache
def _crossover(name: str, architecture: str) -> tuple[float, str]:
    """(least size at which the kernel wins, where that figure comes from)."""
    tables = _crossovers()
    for key in (architecture, "default"):
        table = tables.get(key)
        if table is not None and name in table["least"]:
            least = table["least"][name]
            return (float("inf") if least is None else least), table["source"]
    return float("inf"), "no figure"


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
    size: Callable[..., int] | None = None  # what the gate compares; default: elements of the
    flops: Callable[..., int] | None = None  # largest tensor. FLOPs, where compute-bound
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


def refusal(op: Op, args: tuple, kwargs: dict) -> str | None:
    """Why no kernel can take this call, of the reasons that all ops share; None if one may."""
    if not HAS_TRITON:
        return "triton is not installed"
    if torch._C._are_functorch_transforms_active():
        return "inside a functorch transform (vmap, grad, jacrev, ...)"
    if forward_ad._current_level >= 0:
        return "forward-mode automatic differentiation"
    if torch._C._len_torch_dispatch_stack():
        return "a torch dispatch mode is active (FakeTensorMode, FlopCounterMode, ...)"
    if torch._C._len_torch_function_stack() and (why := _refuse_mode_stack()):
        return why
    index = None
    for value in (*args, *kwargs.values()) if kwargs else args:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            why = _refuse_tensor(op, value)
            if why is not None:
                return why
            if index is None:
                index = value.get_device()
            elif index != value.get_device():
                return "tensors on several devices"
        elif kind not in _SCALARS:
            if isinstance(value, Tensor):
                return f"a tensor subclass ({kind.__name__})"
            if hasattr(kind, "__torch_function__"):
                return f"an argument that overrides torch functions ({kind.__name__})"
    if index is None:
        return "no tensor among the arguments"
    return None


def _tensors(args, kwargs) -> list[Tensor]:
    return [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]


def _gate(op: Op, args, kwargs) -> str | None:
    """Why stock is the faster one at this size, if it is."""
    tensors = _tensors(args, kwargs)
    least, source = _crossover(op.name, architecture(tensors[0].get_device()))
    if least == float("inf"):
        return f"stock is as fast at every size ({source})"
    try:
        size = op.size(*args, **kwargs) if op.size else max(t.numel() for t in tensors)
    except (TypeError, IndexError):
        return None  # arguments that do not fit: the fused function will say so
    if size < least:
        return f"size gate: {size} is below {least} ({source})"
    return None


def _under_autocast(op: Op, args, kwargs):
    """Arguments as stock autocast would pass them on, and the dtype of the result if it sets one."""
    device = _tensors(args, kwargs)[0].device.type
    rule = op.autocast_list(device)
    if rule is None or not torch.is_autocast_enabled(device):
        return args, kwargs
    if rule == "fp32":
        # The kernel reads 16-bit values as they are and writes fp32: no pass to convert them.
        return args, {**kwargs, "out_dtype": torch.float32}
    low = torch.get_autocast_dtype(device)

    def cast(v):
        return v.to(low) if isinstance(v, Tensor) and v.is_floating_point() else v

    return tuple(map(cast, args)), {k: cast(v) for k, v in kwargs.items()}


def _run_fused(op: Op, args, kwargs):
    try:
        return op.fused(*args, **kwargs)
    except TypeError:
        try:
            inspect.signature(op.fused).bind(*args, **kwargs)
        except TypeError:
            return Invalid("the arguments do not fit the signature")
        raise


def _kept_from_kernel(op: Op, mode: Mode, args, kwargs) -> str | None:
    if mode == "torch":
        return 'backend("torch")'
    return refusal(op, args, kwargs) or (_gate(op, args, kwargs) if mode == "auto" else None)


def _dispatch_compiling(op: Op, args, kwargs):
    """The choice as Dynamo traces it: stock, or the fused function with its launches opaque."""
    mode = current_mode() if _guarded else "auto"  # reads the global: a new mode is a new graph
    why = "torch.compile fuses the stock formula"
    if mode == "torch":
        why = 'backend("torch")'
    elif op.opaque and (mode == "triton" or op.compiled == "opaque"):
        tensors = _tensors(args, kwargs)
        plain = all(t.device.type in _KERNEL_DEVICES for t in tensors)
        known = all(t.dtype in op.dtypes or t.dtype in op.integers for t in tensors)
        if HAS_TRITON and tensors and plain and known:
            args, kwargs = _under_autocast(op, args, kwargs)
            out = op.fused(*args, **kwargs)
            if not isinstance(out, Stock):
                return out
            why = out.why
        else:
            why = "a device or dtype that kernels do not take"
    if mode == "triton":
        raise BackendError(f"{op.name}: backend('triton'), but stock: {why}")
    return op.stock(*args, **kwargs)


def dispatch(op: Op, args: tuple, kwargs: dict):
    """Run `op` by the path that its record, the arguments and the mode call for."""
    if torch.compiler.is_compiling():
        return _dispatch_compiling(op, args, kwargs)
    mode = _mode.get()
    invalid = False
    why = _kept_from_kernel(op, mode, args, kwargs)
    if why is None:
        out = _run_fused(op, *_under_autocast(op, args, kwargs))
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
    raise BackendError(f"{op.name}: backend('triton'), but stock: {why}")


def op(*, stock: Callable, **fields) -> Callable[[Callable], Callable]:
    """Declare a fused function under its name and signature in `torch.nn.functional`.

    The decorated function becomes a plain function of the same signature that dispatches; its `Op`
    is its attribute `op`. A keyword-only `out_dtype` stays between dispatch and the fused function.
    """

    def declare(fused: Callable) -> Callable:
        record = Op(name=fused.__name__, fused=fused, stock=stock, **fields)

        def call(*args, **kwargs):
            if _idle:
                return stock(*args, **kwargs)
            return dispatch(record, args, kwargs)

        signature = inspect.signature(fused)
        shown = [p for p in signature.parameters.values() if p.name != "out_dtype"]
        call.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
        call.__name__ = call.__qualname__ = record.name
        call.__module__ = "fastnn.functional"
        call.__doc__ = stock.__doc__ or fused.__doc__
        call.op = record  # type: ignore[attr-defined]
        call.__prepare_scriptable__ = lambda: stock  # type: ignore[attr-defined]  # TorchScript
        return call

    return declare


# ---- What op files call -------------------------------------------------------------------------


class _NoGraph:
    """Stands for an autograd context where no gradient is wanted; keeps nothing."""

    needs_input_grad = (False,) * 32

    def __setattr__(self, name, value):
        pass

    def _ignore(self, *args):
        pass

    save_for_backward = mark_non_differentiable = mark_dirty = set_materialize_grads = _ignore


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
    tensors of the right shapes, dtypes and strides without launching. Eager calls go to the launcher
    itself; a graph holds the opaque op `fastnn::<file>_<function>`.
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
