"""Which path runs a call: the mode in force, and a record of the decisions.

A mode is "auto" (kernels where they win), "triton" (kernels at every size) or "torch" (PyTorch).
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

Mode = Literal["auto", "triton", "torch"]
_MODES = ("auto", "triton", "torch")

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"

_initial = os.environ.get("FASTNN_BACKEND", "auto")
if _initial not in _MODES:
    raise ValueError(f"FASTNN_BACKEND={_initial!r}: accepted are {', '.join(_MODES)}")
_mode: ContextVar[Mode | None] = ContextVar("fastnn_backend", default=None)


Code = Literal[
    "mode",
    "device",
    "dtype",
    "layout",
    "shape",
    "empty",
    "size",
    "option",
    "autograd",
    "autocast",
    "random",
    "gate",
    "hook",
    "fusion",
    "distributed",
]

# The kinds of reasons for PyTorch. The words of a reason are for people, and may change; its code
# is for programs and tests.
CODES: dict[Code, str] = {
    "mode": "the backend, a mode of PyTorch, a transform or a tracer decides",
    "device": "kernels do not run on this device, or the tensors are on several devices",
    "dtype": "a dtype, or a mix of dtypes, that no kernel takes",
    "layout": "strides, a memory format or a kind of tensor that no kernel takes",
    "shape": "shapes that no kernel takes, or that do not fit each other",
    "empty": "there are no elements",
    "size": "more elements, or longer rows, than a kernel can index or hold",
    "option": "an argument, or a combination of arguments, that no kernel takes",
    "autograd": "autograd requires what a kernel does not do: a gradient, or an edit in place",
    "autocast": "autocast would give other dtypes than the kernel",
    "random": "the kernel cannot draw the random numbers that PyTorch draws",
    "gate": "PyTorch is as fast or faster for this call",
    "hook": "a hook, or a function that was replaced, would notice the difference",
    "fusion": "neighbours do not run as one op; each runs by itself",
    "distributed": "DTensors that are placed in a way that no kernel takes",
}


class BackendError(RuntimeError):
    """A call under `backend("triton")` that no kernel can run. The text names op and reason.

    - `code`: the kind of the reason. docs/api.md explains all codes.
    """

    code: Code | None = None


class Stock(NamedTuple):
    """Declines a call, which then runs on PyTorch.

    code: the kind of the reason. why: the reason in words, read after "stock: ".
    """

    code: Code
    why: str


class Invalid(Stock):
    """Declines a call that PyTorch is going to reject. Every mode then raises PyTorch's error."""


# ---- Whether anything but PyTorch can be chosen ------------------------------------------------
#
# While `_idle` is true, every op calls PyTorch at once. No CUDA tensor exists before CUDA is
# initialised. We do not ask for a device at import, because that would initialise CUDA and break a
# later fork.

_lock = threading.Lock()
_idle = True
_plain = True  # every mode is "auto" and no `decisions()` is open: earlier decisions stay valid
_uniform: Mode | None = None  # the mode of every thread, unless a `decisions()` is open
_blocks = False  # whether any `backend()` block was ever opened
_watching = 0  # open `decisions()` blocks, in all threads
_open_modes: list[Mode] = []  # of all open `backend()` blocks, in all threads, oldest first
_awake = INTERPRET
_fallback: Mode = _initial  # type: ignore[assignment]  # for threads that opened no block


def _settle() -> None:
    """Derive `_idle`, `_plain` and `_fallback` from the blocks that are open."""
    global _idle, _plain, _fallback, _uniform
    _fallback = _open_modes[-1] if _open_modes else _initial  # type: ignore[assignment]
    _idle = not (_awake or _watching or _initial == "triton" or "triton" in _open_modes)
    _plain = not _watching and all(mode == "auto" for mode in (_initial, *_open_modes))
    open_modes: set[Any] = {*_open_modes} or {_initial}
    _uniform = open_modes.pop() if len(open_modes) == 1 and not _watching else None


def _wake() -> None:
    global _awake
    with _lock:
        _awake = True
        _settle()


@contextmanager
def awake() -> Iterator[None]:
    """Inside the block each call is decided about, as once CUDA is initialised. For benchmarks."""
    global _awake
    before, _awake = _awake, True
    _settle()
    try:
        yield
    finally:
        _awake = before
        _settle()


if HAS_TRITON and (torch.version.cuda or torch.version.hip):
    torch.cuda._lazy_call(_wake)  # at once if CUDA is initialised, else at the first CUDA tensor
_settle()


def function_mode() -> TorchFunctionMode | None:
    """A torch function mode that is active and may see calls of functions; None if there is none.

    `with torch.device(...)` and `torch.set_default_device(...)` are modes too, but concern only
    functions that make tensors.
    """
    for i in range(torch._C._len_torch_function_stack()):
        mode = torch._C._get_function_stack_at(i)
        if type(mode) is not DeviceContext:
            return mode
    return None


def idle() -> bool:
    """True if no kernel can run and no one asks why. PyTorch may then be called directly."""
    return _idle


def plain() -> bool:
    """Whether the mode of this thread is "auto" and nobody asks what ran."""
    return _plain and (not _blocks or current_mode() == "auto")


_function_modes = torch._C._len_torch_function_stack
_is_tracing = torch._C._is_tracing


def is_quiet() -> bool:
    """Whether `plain()` holds, and nobody notices that attributes of a tensor are read.

    Function modes and `torch.jit.trace` notice it.
    """
    return (
        _plain
        and (not _blocks or _mode.get() in (None, _uniform))
        and not _function_modes()
        and not _is_tracing()
    )


def uniform() -> Mode | None:
    """The mode that is in force in every thread; None if they differ or somebody asks what ran.

    A context that was copied inside a block keeps the mode of that block (`asyncio`). In such a
    context the answer is None, too.
    """
    return _uniform if _mode.get() in (None, _uniform) else None


def context() -> ContextVar[Mode | None]:
    """The variable that holds the mode of a context; None: no block was opened in it."""
    return _mode


def current_mode() -> Mode:
    """The mode in force: "auto", "triton" or "torch"."""
    return _mode.get() or _fallback


# Makes the function a constant to Dynamo. `torch.compiler.assume_constant_result` does the same,
# but imports Dynamo.
current_mode._dynamo_marked_constant = True  # type: ignore[attr-defined]


def traced_mode() -> Mode:
    """The mode in force, for a function that Dynamo traces.

    Dynamo guards on the global `_fallback`, which is read here. So a change of mode makes a new
    graph.
    """
    return current_mode() if _fallback else "auto"


class backend:
    """`with fastnn.backend(mode):` chooses what runs the calls inside the block.

    - `"auto"`: kernels run where they win, and PyTorch runs elsewhere.
    - `"triton"`: kernels run at every size. A call that would go to PyTorch for any other reason
      than its size raises `BackendError`, unless its result has no elements.
    - `"torch"`: PyTorch always runs.

    The default mode is the environment variable `FASTNN_BACKEND`, or else "auto".

    The block holds in this thread. It also holds in threads that opened no block of their own
    (those of autograd and of DataParallel), as long as it is the most recently opened block.

    Raises ValueError for any other mode.
    """

    def __init__(self, mode: Mode):
        if mode not in _MODES:
            raise ValueError(f"backend: expected one of {', '.join(_MODES)}; got {mode!r}")
        self.mode = mode
        self._tokens: list = []

    def __enter__(self) -> backend:
        global _blocks
        _blocks = True
        self._tokens.append(_mode.set(self.mode))
        with _lock:
            _open_modes.append(self.mode)
            _settle()
        return self

    def __exit__(self, *exc) -> None:
        _mode.reset(self._tokens.pop())
        with _lock:
            # Remove the newest entry of this mode. Equal entries are the same to all threads.
            del _open_modes[len(_open_modes) - 1 - _open_modes[::-1].index(self.mode)]
            _settle()


class rehearsal(backend):
    """The mode "graph" inside the block: as "auto", but as if the host cost nothing.

    `warmup` runs a model in it. Under graph capture, calls then find the plans that were made.
    """

    def __init__(self):
        self.mode: Any = "graph"
        self._tokens: list = []


_HAS_STREAMS = bool(torch.version.cuda or torch.version.hip)


def capturing() -> bool:
    """Whether the current stream records a CUDA graph, of which a replay costs the host nothing."""
    return _HAS_STREAMS and torch.cuda.is_current_stream_capturing()


# ---- Telling which path ran ---------------------------------------------------------------------


class Decision(NamedTuple):
    """The path that one call took.

    - `op`: the record of the function that was called.
    - `why`: None if a kernel ran. Otherwise the reason why PyTorch ran, in words.
    - `code`: None if a kernel ran. Otherwise the kind of the reason, one of `CODES`.
    """

    op: Any
    why: str | None
    code: Code | None


_heard: ContextVar[tuple[list[Decision], ...]] = ContextVar("fastnn_decisions", default=())


def note(op: Any, declined: Stock | None) -> None:
    """Tell every open `decisions()` block of this thread what ran `op`.

    declined: None if a kernel ran, else the reason why PyTorch ran.
    """
    for heard in _heard.get():
        if declined is None:
            heard.append(Decision(op, None, None))
        else:
            heard.append(Decision(op, declined.why, declined.code))


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
