"""Writes the function that users call, from the signature of an op's fused function.

The function is generated as source code for two reasons. Its arguments bind, default and fail as
declared, at the cost of one call. And it pickles by name, and Dynamo and TorchScript can follow it.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import linecache
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any, NamedTuple

import torch

from fastnn import _mode
from fastnn._plan import UNFIT, impossible

# Keyword-only arguments that dispatch passes to a fused function, and that no user sees.
PRIVATE = ("out_dtype", "variant")

_NO_KEYWORDS: dict = {}
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
    impossible("it warns")  # a plan would not
    warnings.warn(message, stacklevel=depth())


def parameters(fused: Callable) -> list[inspect.Parameter]:
    """The parameters of `fused` that users see."""
    declared = inspect.signature(fused).parameters.values()
    return [p for p in declared if p.name not in PRIVATE]


class Below(NamedTuple):
    """Sources that ask whether a call is below the floor of its op.

    tensors: the arguments of which the size is a function; they must be exactly of class Tensor.
    others: other arguments that the size depends on.
    kinds: whether the tensors are of these classes.
    ready: whether nobody would notice that attributes of the tensors are read. Dynamo can trace
        nothing of it, so `_is_compiling` is asked first. It is asked before the floor, too: Dynamo
        guards what it reads, and would compile the model again when the floor becomes known.
    size: a bound on the size of the call.
    quiet: the same, by `_its_size` without modes under a default device. There PyTorch would run a
        function in Python for each attribute that is read.
    define: a line that defines `_its_size`.
    least: the floor: `_the_floor`, or 0 while the kernel is to run calls of every size.
    """

    tensors: tuple[str, ...]
    others: tuple[str, ...]
    kinds: str
    ready: str
    size: str
    quiet: str
    define: str
    least: str

    def size_of(self, arguments: Mapping[str, Any]) -> float | None:
        """The bound for a call with these arguments; None if they are of the wrong kinds."""
        try:
            return eval(self.size, {}, dict(arguments))
        except Exception:  # PyTorch rejects them at the call
            return None


def below(record: Any, first: str, home: str = "") -> Below:
    """The sources for `record`, an `Op`. `first` is the name of its first argument.

    They use the names in `BELOW`, and globals of `_mode`, which `home` stands before.
    """
    size = record.at_most or f"{first}.numel()"
    tree = list(ast.walk(ast.parse(size, mode="eval")))
    read = {
        n.value.id for n in tree if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
    }
    loaded = [n for n in tree if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
    made = {n.target.id for n in tree if isinstance(n, ast.NamedExpr)}
    names = {n.id for n in loaded} - vars(builtins).keys() - made
    tensors = tuple(sorted(read))
    kinds = " and ".join(
        f"(type({t}) is _tensor_type or type({t}) is _parameter_type)" for t in tensors
    )
    copied = f"(not {home}_blocks or _context_mode() in (None, {home}_uniform))"
    modes = "(not (_its_modes := _function_modes()) or _one_function_mode() is None)"
    ready = f"{copied} and {modes} and not _is_tracing() and {kinds}"
    least = "_the_floor"
    if record.alerts is not None:
        least = "(0 if _is_deterministic() and not _only_warns() else _the_floor)"
    others = tuple(sorted(names - read))
    given = ", ".join(tensors + others)
    quiet = f"({size} if not _its_modes else _without_modes(_its_size, {given}))"
    define = f"    _its_size = lambda {given}: {size}"
    return Below(tensors, others, kinds, ready, size, quiet, define, least)


def _without_modes(function: Callable, *args: Any) -> Any:
    """`function(*args)`. No torch function mode of this thread sees what it does."""
    with torch._C.DisableTorchFunction():
        return function(*args)


def bound(record: Any, taken: str, sources: Mapping[str, str]) -> Callable[..., bool]:
    """A function of the arguments `taken`: whether a call of an op is below its floor.

    sources: of the op's arguments that the size depends on. The function asks nothing else. So
    `_mode.is_quiet()` must hold where it is called, and Dynamo must not trace it.
    """
    asked = below(record, next(iter(sources)))
    lines = [
        "def make(_tensor_type, _parameter_type, _is_deterministic, _only_warns):",
        "    _the_floor = -1",
        f"    def is_below({taken}):",
        "        try:",
        *(f"            {name} = {source}" for name, source in sources.items()),
        f"            return {asked.kinds} and {asked.size} < {asked.least}",
        "        except Exception:",
        "            return False",
        "    def set_floor(least):",
        "        nonlocal _the_floor",
        "        _the_floor = least",
        "    return is_below, set_floor",
    ]
    scope: dict = {}
    exec("\n".join(lines), scope)
    names = "_tensor_type", "_parameter_type", "_is_deterministic", "_only_warns"
    is_below, set_floor = scope["make"](*(BELOW[name] for name in names))
    record.floor.follow(set_floor)
    return is_below


BELOW = {
    "_context_mode": _mode._mode.get,
    "_is_compiling": torch.compiler.is_dynamo_compiling,
    "_function_modes": torch._C._len_torch_function_stack,
    "_one_function_mode": _mode.function_mode,
    "_without_modes": _without_modes,
    "_is_tracing": torch._C._is_tracing,  # sizes would be tensors
    "_tensor_type": torch.Tensor,
    "_parameter_type": torch.nn.Parameter,
    "_is_deterministic": torch._C._get_deterministic_algorithms,
    "_only_warns": torch._C._get_deterministic_algorithms_warn_only,
}


class _Inside(threading.local):
    """The functions of torch.nn.functional whose replacements this thread is calling."""

    names: frozenset[str] = frozenset()


_inside = _Inside()


def _given(parameters: list[inspect.Parameter], values: tuple) -> tuple[list, dict]:
    """(args, kwargs) without the values that are defaults, as far as one can leave them out."""
    args: list = []
    kwargs = {}
    last = 0
    for p, value in zip(parameters, values, strict=True):
        same = value is p.default or (type(value) is type(p.default) and value == p.default)
        if p.kind is p.KEYWORD_ONLY:
            if not same:
                kwargs[p.name] = value
            continue
        args.append(value)
        if not same:
            last = len(args)
    return args[:last], kwargs


def _others(name: str, parameters: list[inspect.Parameter]) -> tuple[Callable, Callable]:
    """What a public function asks of the function that stands under its name in
    `torch.nn.functional`: whether somebody else replaced PyTorch's, and its result.

    Such a replacement may call our function, which then runs as always.
    """

    def is_another(there: Any) -> bool:
        ours = getattr(there, "op", None)  # an attribute of our functions, and of what `patch` sets
        return (ours is None or ours.name != name) and name not in _inside.names

    def another(*values):
        args, kwargs = _given(parameters, values)
        before = _inside.names
        _inside.names = before | {name}
        try:
            return getattr(torch.nn.functional, name)(*args, **kwargs)
        finally:
            _inside.names = before

    return is_another, another


def plans_of(record: Any) -> dict[str, Any]:
    """What the sources of `from_tables` and `from_plans` name, for `record`, an `Op`."""
    return {
        "the_plans": record.plans.ready,
        "the_tables": record.plans.tables,
        "is_graphed": record.plans.graphed,
        "unfit": UNFIT,
        "is_grad_enabled": torch.is_grad_enabled,
    }


def from_tables(arguments: str, home: str = "") -> list[str]:
    """Lines that return what a plan of the C++ runner makes of a call, if one fits.

    arguments: the source of all arguments of the op, in order. home: as in `below`.
    """
    return [
        "for _one_table in the_tables:",
        "    if is_graphed:",
        "        break",
        f"    _its_result = _one_table({home}_uniform, {arguments})",
        "    if _its_result is not unfit:",
        "        return _its_result",
    ]


def from_plans(keyed_by: str, arguments: str, home: str = "") -> list[str]:
    """Lines that return what a plan of the Python runner makes of a call, if one fits.

    keyed_by: the argument by whose shape plans are found. `Below.ready` must hold.
    """
    return [
        "if the_plans:",
        f"    _this_mode = {home}_uniform",
        f"    if is_graphed and _this_mode == 'auto' and {home}capturing():",
        "        _this_mode = 'graph'",
        f"    _this_key = {keyed_by}.shape, is_grad_enabled(), _this_mode",
        "    for _one_plan in the_plans.get(_this_key, ()):",
        f"        _its_result = _one_plan({arguments})",
        "        if _its_result is not unfit:",
        "            return _its_result",
    ]


def indented(by: int, lines: list[str]) -> list[str]:
    """The lines, each moved to the right by so many blanks."""
    return [" " * by + line for line in lines]


def front(record: Any, dispatch: Callable) -> Callable:
    """The public function of `record`, an `Op`.

    A function that somebody put in place of PyTorch's in `torch.nn.functional` is called. Else it
    calls PyTorch at once if no kernel can run, or if the call is smaller than the op's floor
    (`_gate.floor`). Else it calls `dispatch(record, args, kwargs)`. `args` are the positional
    arguments in the order of the signature.

    Its attribute `op` is the record, and `small` a function of the arguments of `record.at_most`:
    whether a call with them is below the floor.
    """
    name = record.name
    declared: list[str] = []
    positional: list[str] = []
    keyword: list[str] = []
    names: list[str] = []  # of the keyword-only ones
    defaults = {}
    for p in parameters(record.fused):
        if p.kind is p.KEYWORD_ONLY:
            keyword.append(f"{p.name}={p.name}")
            names.append(p.name)
            if len(keyword) == 1:
                declared.append("*")
        else:
            positional.append(p.name)
        if p.default is not p.empty:
            defaults[f"_{p.name}"] = p.default
        declared.append(p.name if p.default is p.empty else f"{p.name}=_{p.name}")
    passed = ", ".join(positional + keyword)
    dispatched = ", ".join(positional)
    values = ", ".join(positional + names)
    # A warning by PyTorch's function must name the line that called this function. The stack level
    # counts the frames between them: this function, then `dispatch`.
    passed = passed.replace("_stacklevel", "_stacklevel + 1")
    dispatched = dispatched.replace("_stacklevel", f"_stacklevel + {FRAMES}")
    asked = below(record, positional[0])
    # To parse keywords takes PyTorch as long as to ask whether they are needed.
    as_few = [f"return stock({passed})"]
    if names:
        defaulted = " and ".join(f"{n} is _{n}" for n in names)
        few = ", ".join(positional).replace("_stacklevel", "_stacklevel + 1")
        as_few = [f"if {defaulted}:", f"    return stock({few})", *as_few]
    replaced = []
    if vars(torch.nn.functional).get(name) is record.stock:
        replaced = [
            f"        if _functional.{name} is not stock and _is_another(_functional.{name}):",
            f"            return _call_another({values})",
        ]
    # Names that are not parameters begin with an underscore and have two words: no parameter does.
    lines = [
        "def make(stock, record, dispatch, no_keywords, _functional, _is_another, _call_another, "
        f"{', '.join((*plans_of(record), *BELOW, *defaults))}):",
        "    _the_floor = -1",
        asked.define,
        f"    def {name}({', '.join(declared)}):",
        *replaced,
        "        if _idle:",
        f"            return stock({passed})",
        "        if _uniform and not _is_compiling():",
        "            if the_tables:",
        *indented(16, from_tables(values)),
        f"            if {asked.ready}:",
        "                try:",
        f"                    _is_small = _plain and {asked.quiet} < {asked.least}",
        "                except Exception:  # arguments of the wrong kinds",
        "                    _is_small = False",
        "                if _is_small:",
        *indented(20, as_few),
        *indented(16, from_plans(asked.tensors[0], values)),
        f"        return dispatch(record, ({dispatched},), "
        + (f"dict({', '.join(keyword)}))" if keyword else "no_keywords)"),
        f"    def small({', '.join(asked.tensors + asked.others)}):",
        "        try:",
        f"            return _plain and not _is_compiling() and 0 < _the_floor and {asked.ready}"
        f" and {asked.quiet} < {asked.least}",
        "        except Exception:",
        "            return False",
        "    def set_floor(least):",
        "        nonlocal _the_floor",
        "        _the_floor = least",
        f"    return {name}, small, set_floor",
    ]
    if not isinstance(record.stock, FunctionType):  # a builtin, which also takes out=
        declared += ["out=None"] if keyword else ["*", "out=None"]
        lines[3] = f"    def {name}({', '.join(declared)}):"
        lines[4:4] = [
            "        if out is not None:",
            f"            return stock({passed}, out=out)",
        ]
    file = f"{_FILE}{name}>"
    source = "\n".join(lines) + "\n"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    scope: dict = {}
    # The code runs in the namespace of `_mode`, because it reads `_idle` and `_plain` there.
    exec(compile(source, file, "exec"), vars(_mode), scope)
    call, call_small, set_floor = scope["make"](
        record.stock, record, dispatch, _NO_KEYWORDS, torch.nn.functional,
        *_others(name, parameters(record.fused)), **plans_of(record), **BELOW, **defaults,
    )  # fmt: skip
    record.floor.follow(set_floor)
    call.__qualname__ = name
    call.__module__ = "fastnn.functional"
    call.__doc__ = record.stock.__doc__ or record.fused.__doc__
    call.op = record
    call.small = call_small
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
    two = torch._jit_internal.boolean_dispatched.get(stock)
    if two is not None:  # `max_pool2d` and its like: which of two functions runs, a flag decides
        torch._jit_internal.boolean_dispatched[call] = two
        call.__signature__ = inspect.signature(stock)  # type: ignore[attr-defined]
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
