"""The built-in functions of an interpreted kernel, remembered by the types of their arguments.

`x + y` asks Triton's semantics at each execution which casts and broadcasts the operands need. The
answer depends on the types of the tensors and on the values of all other arguments alone, and takes
ten times as long to find as NumPy takes to compute. So the first call writes down the steps: the
calls of the interpreter's builder with the origin of each handle. The next calls of the same types
repeat the steps.

A call is not remembered if a handle comes from elsewhere, or if the semantics read the value of a
tensor, except for one case: the truth of an argument is compared again at each call.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import TensorHandle

_MOST = 4000  # remembered calls of a function
_CONSTANT_BYTES = 1 << 14  # a larger constant is made again at each call
# steps that make the same handle at each call if no argument is a handle of the call
_PURE = frozenset((
    "cast_impl", "create_broadcast", "create_expand_dims", "create_fp_ext", "create_fp_to_fp",
    "create_fp_trunc", "create_int_cast", "create_make_range", "create_reshape", "create_si_to_fp",
    "create_splat", "create_ui_to_fp",
))  # fmt: skip
_NUMBERS = (int, bool, str, type(None))


class _Unknown(Exception):
    """An argument of a kind that has no key."""


# ---- keys ---------------------------------------------------------------------------------------

_identities: dict[tuple, object] = {}  # a description of a type: an object that stands for it


def identity(ty: Any) -> object:
    """The same object for equal types. Types compare and hash in Python, which is slow."""
    known = vars(ty).get("_fastnn_identity")
    if known is None:
        kind: tuple
        if type(ty) is tl.block_type:
            kind = "block", identity(ty.element_ty), *(int(n) for n in ty.shape)
        elif type(ty) is tl.pointer_type:
            kind = "pointer", identity(ty.element_ty), ty.address_space, ty.const
        elif type(ty) is tl.dtype:
            kind = "dtype", ty.name
        else:
            raise _Unknown
        known = ty._fastnn_identity = _identities.setdefault(kind, object())
    return known


def _add_key(arg: Any, key: list, handles: list) -> None:
    """Appends what the semantics may depend on to `key`, and the handles to `handles`."""
    kind = arg.__class__
    if kind is tl.tensor:
        key.append(arg._fastnn_identity)
        handles.append(arg.handle)
    elif kind in _NUMBERS:
        key += kind, arg
    elif kind is float:
        key += kind, arg.hex()  # nan equals nan here, and 0.0 is not -0.0
    elif kind is tl.constexpr:
        key.append(kind)
        _add_key(arg.value, key, handles)
    elif kind is tuple or kind is list or kind is tl.tuple:
        key += kind, len(arg)
        for part in arg:
            _add_key(part, key, handles)
    elif kind is slice:
        key.append(kind)
        for part in (arg.start, arg.stop, arg.step):
            _add_key(part, key, handles)
    elif isinstance(arg, tl.dtype):
        key += kind, identity(arg)
    else:
        raise _Unknown


# ---- recording ----------------------------------------------------------------------------------


class _Steps:
    """What a call does: steps of the builder, and the result in terms of their handles.

    Handles are numbered: first those of the arguments, then those that the steps return.
    """

    def __init__(self) -> None:
        self.n = 0
        self.steps: list[tuple] = []
        self.truths: list[tuple[int, bool]] = []  # of arguments whose truth was asked
        self.numbers: dict[int, int | None] = {}  # id of a handle: its number; None: a constant
        self.kept: list[Any] = []  # handles, so that no id is used twice
        self.complete = True

    def number(self, handle: Any) -> None:
        self.numbers[id(handle)] = self.n
        self.kept.append(handle)
        self.n += 1

    def is_constant(self, name: str, fills: list, out: Any) -> bool:
        pure = name in _PURE or name.startswith("get_")
        return pure and not fills and out.data.nbytes <= _CONSTANT_BYTES

    def step(self, name: str, args: tuple, out: Any) -> None:
        template, fills = list(args), []
        for i, arg in enumerate(args):
            if isinstance(arg, TensorHandle):
                origin: Any = self.numbers.get(id(arg), -1)
            elif isinstance(arg, (list, tuple)) and any(isinstance(a, TensorHandle) for a in arg):
                origin = [self.numbers.get(id(a), -1) for a in arg]
                if None in origin:
                    origin = -1
            else:
                continue
            if origin == -1 or (isinstance(origin, list) and -1 in origin):
                self.complete = False
            elif origin is not None:
                fills.append((i, origin))
                template[i] = None
        if isinstance(out, tl.dtype):
            return  # a type: the step is needed by the semantics only
        if isinstance(out, TensorHandle):
            if self.is_constant(name, fills, out):
                self.numbers[id(out)] = None
                self.kept.append(out)
                return
            self.number(out)
            returned = 1
        elif isinstance(out, tuple) and all(isinstance(h, TensorHandle) for h in out):
            for handle in out:
                self.number(handle)
            returned = len(out)
        elif out is None:
            returned = 0
        else:
            self.complete = False
            return
        self.steps.append((name, template, tuple(fills), returned))

    def returns(self, out: Any) -> Any:
        """The result, with the number of its handle, or the handle of a constant."""
        if out is None:
            return None
        if out.__class__ is tuple or out.__class__ is list:
            return out.__class__, [self.returns(part) for part in out]
        if out.__class__ is not tl.tensor or id(out.handle) not in self.numbers:
            self.complete = False
            return None
        number = self.numbers[id(out.handle)]
        return (out.handle if number is None else number), out.type

    def function(self, result: Any) -> Callable:
        """A function (builder, handles of the arguments) that repeats the steps."""
        constants: list[Any] = []

        def constant(value: Any) -> str:
            constants.append(value)
            return f"c{len(constants) - 1}"

        def argument(value: Any, origin: Any) -> str:
            if origin is None:
                return constant(value)
            if isinstance(origin, int):
                return f"h{origin}"
            return f"[{', '.join(f'h{number}' for number in origin)}]"

        def value(described: Any) -> str:
            if described is None:
                return "None"
            handle, ty = described
            if isinstance(ty, list):
                parts = "".join(f"{value(part)}, " for part in ty)
                return f"({parts})" if handle is tuple else f"[{parts}]"
            known = {name: v for name, v in vars(tl.tensor(None, ty)).items() if name != "handle"}
            of = f"h{handle}" if isinstance(handle, int) else constant(handle)
            return f"tensor({of}, {constant(known)})"

        n, lines = self.n - sum(step[3] for step in self.steps), []
        names = "".join(f"h{i}, " for i in range(n))
        if names:
            lines.append(f"{names} = handles")
        for name, template, fills, returned in self.steps:
            origins = dict(fills)
            args = ", ".join(argument(v, origins.get(i)) for i, v in enumerate(template))
            target = ", ".join(f"h{n + i}" for i in range(returned))
            n += returned
            lines.append(f"{target} = b.{name}({args})" if target else f"b.{name}({args})")
        lines.append(f"return {value(result)}")
        names = ", ".join(f"c{i}" for i in range(len(constants)))
        source = [f"def make({names}):", "    def run(b, handles):"]
        source += [f"        {line}" for line in lines] + ["    return run"]
        return _made("\n".join(source))(*constants)


@functools.cache
def _made(source: str) -> Callable:
    scope: dict[str, Any] = {"tensor": _tensor}
    exec(source, scope)
    return scope["make"]


def _tensor(handle: Any, known: dict) -> Any:
    """A tensor of the interpreter. All attributes except the handle follow from its type."""
    made = object.__new__(tl.tensor)
    vars(made).update(known)
    made.handle = handle
    return made


class _Recorder:
    """Stands for the builder while a call is recorded."""

    def __init__(self, builder: Any) -> None:
        self.stands_for = builder
        self.log: _Steps | None = None

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.stands_for, name)
        if not callable(method):
            return method

        def call(*args: Any, **kwargs: Any) -> Any:
            out = method(*args, **kwargs)
            log = self.log
            assert log is not None
            if kwargs:
                log.complete = False
            else:
                log.step(name, args, out)
            return out

        return call


class CallMemory:
    """Remembers the calls of built-in functions. The interpreter runs in one thread at a time."""

    def __init__(self) -> None:
        self.recorder = _Recorder(stock.interpreter_builder)
        self.semantic = copy.copy(stock.interpreter_semantic)
        self.semantic.builder = self.recorder

    def remembered(self, member: Callable) -> Callable:
        """The built-in function `member`, as an interpreted kernel calls it."""
        known: dict[tuple, tuple | None] = {}  # None: not to be remembered
        recorder, builder = self.recorder, stock.interpreter_builder
        tensor = tl.tensor

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("_semantic", None)
            if recorder.log is not None:  # within a function that is recorded
                return member(*args, **kwargs, _semantic=self.semantic)
            key: list[Any] = []
            handles: list[Any] = []
            try:
                for arg in args:
                    if arg.__class__ is tensor:
                        key.append(arg._fastnn_identity)
                        handles.append(arg.handle)
                    else:
                        _add_key(arg, key, handles)
                for name, arg in kwargs.items():
                    key.append(name)
                    _add_key(arg, key, handles)
            except _Unknown:
                return member(*args, **kwargs, _semantic=stock.interpreter_semantic)
            found = tuple(key)
            if found not in known:
                if len(known) >= _MOST:
                    known.clear()
                out, known[found] = self.record(member, args, kwargs)
                return out
            entry = known[found]
            if entry is not None:
                truths, run = entry
                if not truths or all(bool(handles[i].data) == truth for i, truth in truths):
                    return run(builder, handles)
            return member(*args, **kwargs, _semantic=stock.interpreter_semantic)

        return call

    def record(self, member: Callable, args: tuple, kwargs: dict) -> tuple[Any, tuple | None]:
        log = _Steps()

        def apart(arg: Any) -> Any:
            """The argument with handles of its own: one handle may be two arguments."""
            if arg.__class__ is tl.tensor:
                handle = TensorHandle(arg.handle.data, arg.handle.dtype, arg.handle.attr)
                log.number(handle)
                return tl.tensor(handle, arg.type)
            if arg.__class__ is tl.constexpr:
                return arg
            if arg.__class__ is tl.tuple:
                return tl.tuple([apart(part) for part in arg])
            return arg.__class__(map(apart, arg)) if arg.__class__ in (tuple, list) else arg

        args = tuple(map(apart, args))
        kwargs = {name: apart(arg) for name, arg in kwargs.items()}
        self.recorder.log = log
        try:
            out = member(*args, **kwargs, _semantic=self.semantic)
        finally:
            self.recorder.log = None
        result = log.returns(out)
        return out, (log.truths, log.function(result)) if log.complete else None

    def truth_asked(self, tensor: Any, truth: bool) -> None:
        """The semantics asked whether a tensor of one element is true."""
        log = self.recorder.log
        if log is not None:
            number = log.numbers.get(id(tensor.handle), -1)
            arguments = log.n - sum(step[3] for step in log.steps)
            if number is not None and 0 <= number < arguments:
                log.truths.append((number, truth))
            elif number is not None:
                log.complete = False

    def value_read(self) -> None:
        if self.recorder.log is not None:
            self.recorder.log.complete = False
