"""Writes the function that users call, from the signature of an op's fused function.

The function is generated as source code for two reasons. Its arguments bind, default and fail as
declared, at the cost of one call. And it pickles by name, and Dynamo and TorchScript can follow it.
"""

from __future__ import annotations

import inspect
import linecache
import sys
import warnings
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch

from fastnn import _mode

# Keyword-only arguments that dispatch passes to a fused function, and that no user sees.
PRIVATE = ("out_dtype", "variant")

_NO_KEYWORDS: dict = {}
_EXACT_TYPES = frozenset((torch.Tensor, torch.nn.Parameter))
FRAMES = 2  # frames between the user and PyTorch's function: ours, and `dispatch`
_FILE = "<fastnn.functional."


def depth() -> int:
    """The `stacklevel` for a warning that is to name the user's line.

    The user's line called a function that `front` made. The level counts the frames from the caller
    of `depth` to that line.
    """
    level = 1
    frame = sys._getframe(1)
    while not frame.f_code.co_filename.startswith(_FILE):
        level += 1
        if frame.f_back is None:  # no such function is on the stack
            return 1
        frame = frame.f_back
    return level + 1


def warn(message: str) -> None:
    """Warn the user, naming the line that called a function made by `front`."""
    warnings.warn(message, stacklevel=depth())


def _key(declared: list[inspect.Parameter], settings: bool) -> str:
    """The source of an expression whose value determines the answer of the gate.

    The value identifies a call that was declined, so that the gate is not asked about it again. It
    holds, for an argument without a default: the shape and whether it requires a gradient, if it is
    a tensor, else the argument itself; for an argument with the default None: whether it is None;
    for any other argument: the argument itself.
    """
    first = declared[0].name
    parts = ["is_grad_enabled()", f"{first}.dtype", f"{first}.device"]
    for p in declared:
        if p.default is p.empty:
            # A tensor subclass would see that its attributes are read.
            facts = f"({p.name}.shape, {p.name}.requires_grad)"
            parts.append(f"{facts} if type({p.name}) in _exact_types else {p.name}")
        else:
            parts.append(f"{p.name} is None" if p.default is None else p.name)
    return f"({', '.join(parts)}, {'_its_settings()' if settings else ''})"


def parameters(fused: Callable) -> list[inspect.Parameter]:
    """The parameters of `fused` that users see."""
    declared = inspect.signature(fused).parameters.values()
    return [p for p in declared if p.name not in PRIVATE]


def front(record: Any, dispatch: Callable) -> Callable:
    """The public function of `record`, an `Op`.

    It calls PyTorch at once if no kernel can run, or if the gate declined the same call before.
    Else it calls `dispatch(record, args, kwargs, key)`. `args` are the positional arguments in the
    order of the signature. `key` identifies the call in the memory of declined calls, or is None.
    """
    name = record.name
    declared: list[str] = []
    positional: list[str] = []
    keyword: list[str] = []
    defaults = {}
    seen = parameters(record.fused)
    key = _key(seen, record.settings is not None)
    for p in seen:
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
    # A warning by PyTorch's function must name the line that called this function. The stack level
    # counts the frames between them: this function, then `dispatch`.
    passed = passed.replace("_stacklevel", "_stacklevel + 1")
    dispatched = dispatched.replace("_stacklevel", f"_stacklevel + {FRAMES}")
    # Names that are not parameters begin with an underscore and have two words: no parameter does.
    lines = [
        "def make(stock, record, dispatch, no_keywords, is_compiling, is_grad_enabled, "
        f"_function_modes, _exact_types, {', '.join(defaults)}):",
        "    _declined_calls, _its_settings = record.declined, record.settings",
        f"    def {name}({', '.join(declared)}):",
        "        if _idle:",
        f"            return stock({passed})",
        "        _this_call = None",
        "        if _plain and not is_compiling() and not _function_modes() "
        f"and type({positional[0]}) in _exact_types:",
        "            try:",
        f"                _this_call = {key}",
        "                _was_declined = _this_call in _declined_calls",
        "            except Exception:  # arguments of the wrong kinds, or not hashable",
        "                _this_call = _was_declined = None",
        "            if _was_declined:",
        f"                return stock({passed})",
        f"        return dispatch(record, ({dispatched},), "
        + (f"dict({', '.join(keyword)}), _this_call)" if keyword else "no_keywords, _this_call)"),
        f"    return {name}",
    ]
    if not isinstance(record.stock, FunctionType):  # a builtin, which also takes out=
        declared += ["out=None"] if keyword else ["*", "out=None"]
        lines[2] = f"    def {name}({', '.join(declared)}):"
        lines[3:3] = [
            "        if out is not None:",
            f"            return stock({passed}, out=out)",
        ]
    file = f"{_FILE}{name}>"
    source = "\n".join(lines) + "\n"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    scope: dict = {}
    # The code runs in the namespace of `_mode`, because it reads `_idle` and `_plain` there.
    exec(compile(source, file, "exec"), vars(_mode), scope)
    call = scope["make"](
        record.stock, record, dispatch, _NO_KEYWORDS, torch.compiler.is_dynamo_compiling,
        torch.is_grad_enabled, torch._C._len_torch_function_stack, _EXACT_TYPES, **defaults,
    )  # fmt: skip
    call.__qualname__ = name
    call.__module__ = "fastnn.functional"
    call.__doc__ = record.stock.__doc__ or record.fused.__doc__
    call.op = record
    _tell_torchscript(call, record.stock)
    return call


class _Overloads:
    """The names of the overloads of a function that TorchScript has compiled. It compiles them when
    it first needs them, as for `interpolate`, of which the type of `size` decides on one."""

    def __init__(self, stock: Callable):
        self.stock = stock

    def __iter__(self) -> Iterator[str]:
        return (f.qualified_name for f in torch.jit._script._get_overloads(self.stock))


def _tell_torchscript(call: Callable, stock: Callable) -> None:
    """Make TorchScript compile PyTorch's function where a scripted function calls `call`."""
    call.__prepare_scriptable__ = lambda: stock  # type: ignore[attr-defined]
    state, internal = torch.jit._state, torch._jit_internal
    declared = internal._get_fn_overloads(internal._qualified_name(stock))
    if declared or state._try_get_jit_cached_overloads(stock):
        state._jit_function_overload_caching[call] = _Overloads(stock)
    if not isinstance(stock, FunctionType):
        # TorchScript finds a builtin by identity in a table. Building the table is slow, so this
        # only adds to the list from which it is built.
        builtins = torch.jit._builtins
        entry = call, f"aten::{stock.__name__}"
        if builtins._builtin_table is None:
            builtins._builtin_ops.append(entry)
        else:
            builtins._register_builtin(*entry)
