"""What every accelerated layer shares: its stock class, and behaving like that class.

A plain subclass gives a wrong answer to two questions: whether `isinstance(layer, nn.Linear)` holds
when code that knows only `torch.nn` built the layer, and whether torch.fx may step into the layer.
Also, tools replace methods on a class, most of all `torch.nn.Linear.forward`, and functions of
`torch.nn.functional`. A subclass with a method of its own would hide the replacement.
"""

from __future__ import annotations

import functools
import linecache
import re
from abc import ABCMeta
from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch.fx
import torch.nn
from torch.compiler import is_dynamo_compiling
from torch.nn import Module

from fastnn import _front as _front_of_op
from fastnn import _mode
from fastnn.layers._standing import STANDING

STOCK: dict[type, type] = {}  # accelerated class -> the stock class it stands for
OURS: dict[type, type] = {}  # stock class -> accelerated class


class Method(NamedTuple):
    """One method of an accelerated class, in place of a method of its stock class."""

    name: str
    ours: Any  # as the class declares it
    made: Any  # PyTorch's; None if it was replaced before fastnn was imported
    op: Any  # the record of the op that it runs; None: of several, or of none
    mirrors: bool = False  # whether it does what PyTorch's does, if F is torch.nn.functional
    direct: tuple[str, str] | None = None  # what PyTorch's comes to for a tensor (`Layer`)
    given: tuple[str, str] | None = None  # the arguments that ours gives the op (`Layer`)


METHODS: dict[type, tuple[Method, ...]] = {}  # of a stock class
BOXES: dict[type, tuple[str, ...]] = {}  # class -> members of which it only reads the parameters

# ---- What somebody replaced: methods of a class, functions of torch.nn.functional ---------------

# For each accelerated and each stock class: its original forward, the stock class, and the stock
# class's original forward.
_AS_MADE: dict[type, tuple[Any, type, Any]] = {}

# For each accelerated and each stock class: the functions that its methods call.
_CALLED: dict[type, dict[str, tuple]] = {}

# The values of a layer class's `__call__` that count as original. `explain` adds its own.
CALLS: set[Callable] = {torch.nn.Module._wrapped_call_impl}
_CALL_IMPL = torch.nn.Module._call_impl
_GETATTR = Module.__getattr__


def attributes(layer: Any, *names: str) -> list[Any]:
    """The attributes of a layer that have these names, most of all parameters and buffers.

    Python finds those only after a search that ends in `Module.__getattr__`, which takes longer
    than the guard of a plan. Where nobody could tell, this looks where that method looks. Tracers
    replace the method, subclasses may have such attributes of their own, and tools keep others in
    the `__dict__` of a layer.
    """
    if is_dynamo_compiling() or type(layer) not in _AS_MADE or Module.__getattr__ is not _GETATTR:
        return [getattr(layer, name) for name in names]
    d = layer.__dict__
    parameters, buffers = d["_parameters"], d["_buffers"]
    found = []
    for name in names:  # a comprehension takes longer
        if name in d:
            found.append(getattr(layer, name))
        elif name in parameters:
            found.append(parameters[name])
        elif name in buffers:
            found.append(buffers[name])
        else:
            found.append(getattr(layer, name))
    return found


def weight_and_bias(layer: Any) -> tuple[Any, Any]:
    """`attributes(layer, "weight", "bias")`, which most layers need."""
    if is_dynamo_compiling():
        return layer.weight, layer.bias
    return _known_weight_and_bias(layer)


def _known_weight_and_bias(layer: Any) -> tuple[Any, Any]:
    """`weight_and_bias(layer)`, where it is known that Dynamo does not trace the call."""
    if type(layer) in _AS_MADE and Module.__getattr__ is _GETATTR:
        d = layer.__dict__
        if "weight" not in d and "bias" not in d:
            parameters = d["_parameters"]
            try:
                return parameters["weight"], parameters["bias"]
            except KeyError:
                pass
    return layer.weight, layer.bias


def as_torch_made(method: Any) -> Any:
    """`method`, or None if it is not PyTorch's, because it was replaced before fastnn's import."""
    home = getattr(method, "__globals__", {}).get("__name__", "torch")
    return method if home.split(".")[0] == "torch" else None


_functional = torch.nn.functional

# The modules from which torch.nn.functional has its functions. It also has helpers from elsewhere.
_HOMES = ("torch", "torch._C._nn", "torch.nn.functional")


def _codes(code: CodeType) -> list[CodeType]:
    """The code itself, and that of the functions and comprehensions in it."""
    inner = [c for const in code.co_consts if isinstance(const, CodeType) for c in _codes(const)]
    return [code, *inner]


@functools.cache
def called(method: Any) -> dict[str, tuple]:
    """The functions of `torch.nn.functional` that PyTorch's `method` calls, at any depth.

    For each name the functions that count as original: those at the first question, which is asked
    when fastnn is imported. Later, `patch` or a tool may have put others there. The names are those
    in the code, so there may be too many of them, for example that of an attribute of the layer.
    """
    found: dict[str, tuple] = {}
    seen: set[str] = set()
    todo = [method]
    while todo:
        code = getattr(todo.pop(), "__code__", None)
        for name in {n for c in _codes(code) for n in c.co_names} if code else ():
            function = vars(_functional).get(name)
            if name in seen or not callable(function) or isinstance(function, type):
                continue
            seen.add(name)
            its = as_torch_made(function)
            if its is None or (name[0] != "_" and its.__module__ in _HOMES):
                found[name] = (
                    *(() if its is None else (its,)),
                    *((STANDING[name],) if name in STANDING else ()),
                )
            todo.append(function)
    return dict(sorted(found.items()))


def replaced(cls: type) -> str | None:
    """What the class runs that is no longer the original, in words; None if all is.

    `cls` is an accelerated class, or a stock class that has an accelerated twin.
    """
    forward, its, its_forward = _AS_MADE[cls]
    if cls in STOCK and cls.forward is not forward:  # type: ignore[attr-defined]
        return f"{cls.__name__}.forward was replaced"
    if its.forward is not its_forward:  # type: ignore[attr-defined]
        return f"torch.nn.{its.__name__}.forward was replaced"
    if cls.__call__ not in CALLS or cls._call_impl is not _CALL_IMPL:  # type: ignore[attr-defined]
        return f"{cls.__name__}.__call__ was replaced"
    here = vars(_functional)
    for name, originals in _CALLED[cls].items():
        if not any(here.get(name) is f for f in originals):
            return f"torch.nn.functional.{name} was replaced"
    return None


# For each accelerated and each stock class: whether `replaced` would return None.
_INTACT: dict[type, Callable[[], bool]] = {}


def _asked(cls: type, given: dict[str, Any]) -> list[str]:
    """Sources of what `replaced(cls)` asks. They find objects under the names added to `given`."""
    forward, its, its_forward = _AS_MADE[cls]
    n = len(given)
    given |= {f"_cls{n}": cls, f"_its{n}": its, f"_forward{n}": forward}
    given[f"_its_forward{n}"] = its_forward
    asked = [f"_cls{n}.forward is _forward{n}"] if cls in STOCK else []
    asked += [f"_its{n}.forward is _its_forward{n}", f"_cls{n}.__call__ in CALLS"]
    asked += [f"_cls{n}._call_impl is _CALL_IMPL"]
    for name, originals in _CALLED[cls].items():
        same = []
        for original in originals:
            same.append(f"_functional.{name} is _f{len(given)}")
            given[f"_f{len(given)}"] = original
        asked += [f"({' or '.join(same) or 'False'})"]
    return asked


def generated(name: str, parameters: Sequence[str], lines: Sequence[str], given: dict) -> Any:
    """A function of this name, with a body of these lines. It finds what is in `given`."""
    body = "\n        ".join(lines)
    source = (
        f"def make({', '.join(given)}):\n    def {name}({', '.join(parameters)}):\n"
        f"        {body}\n    return {name}\n"
    )
    scope: dict = {}
    exec(source, globals(), scope)
    return scope["make"](**given)


def _intact(cls: type) -> Callable[[], bool]:
    """A function that asks what `replaced(cls)` asks, in a tenth of the time."""
    given: dict[str, Any] = {}
    lines = ["try:", f"    return {' and '.join(_asked(cls, given))}"]
    return generated("intact", [], [*lines, "except AttributeError:", "    return False"], given)


def unwatched(names: Sequence[str], kinds: Sequence[type], given: dict[str, Any]) -> list[str]:
    """Sources of what `watched` asks of layers with these names, which are of these classes.

    They find objects under the names added to `given`, and put the `__dict__` of a layer `m` into
    `_dict_m`. The classes are accelerated ones, or stock classes that have accelerated twins.
    """
    asked: list[str] = []
    for name in names:
        d = f"_dict_{name}"
        asked += [
            f"not (({d} := {name}.__dict__)['_forward_hooks'] or {d}['_forward_pre_hooks'] "
            f"or {d}['_backward_hooks'] or {d}['_backward_pre_hooks'] or 'forward' in {d} "
            f"or '_call_impl' in {d})",
            f"('_compiled_call_impl' not in {d} or {d}['_compiled_call_impl'] is None)",
        ]
    for kind in dict.fromkeys(kinds):
        asked += _asked(kind, given)
    return asked


def watched(*layers: Any) -> str | None:
    """What would notice that these layers are not called one by one, in words; None if nothing.

    It looks at everything that is attached to one layer or to its class. `replaced` says which
    classes are accepted.
    """
    for layer in layers:
        d = layer.__dict__
        if (
            d["_forward_hooks"]
            or d["_forward_pre_hooks"]
            or d["_backward_hooks"]
            or d["_backward_pre_hooks"]
        ):
            return f"a hook on {type(layer).__name__}"
        if "forward" in d or "_call_impl" in d or d.get("_compiled_call_impl") is not None:
            return f"{type(layer).__name__} has a forward of its own"
        cls = type(layer)
        if cls not in _INTACT or not _INTACT[cls]():
            why = replaced(cls)
            if why is not None:
                return why
    return None


def _shortcuts(
    method: Method, asked: _front_of_op.Below, same: list[str], passed: list[str]
) -> list[str]:
    """Lines that return at once what a small call, or a call that has a plan, returns.

    same: sources of whether the functions that PyTorch's method calls are original. passed: the
    arguments.
    """
    # If PyTorch's method was replaced before the import, the replacement is always called.
    given, direct = (method.given, method.direct) if method.made is not None else (None, None)
    parameters = ["weight, bias = _known_weight_and_bias(self)"]
    exactly = "type(self) is _this_class"
    original = " and ".join([exactly, *same])
    lines = []
    wanted = "0 < _the_floor"
    if "weight" in asked.tensors and "weight" not in passed:
        lines += [f"    weight = _attributes(self, 'weight')[0] if {exactly} else None"]
    if given is not None:
        if_given, values = given
        holds = f"{original} and {if_given}" if if_given else original
        wanted = "(0 < _the_floor or the_plans)"
        reads = parameters * _names_parameters(values)
        lines += [f"    if the_tables and {holds}:"]
        lines += _front_of_op.indented(8, reads + _front_of_op.from_tables(values, "_mode."))
    lines += [
        f"    if {wanted} and {asked.ready}:",
        "        try:",
        f"            _is_small = _mode._plain and {asked.quiet} < {asked.least}",
        "        except Exception:",
        "            _is_small = False",
        "        if _is_small:",
    ]
    if direct is not None:
        condition, result = direct
        lines += [f"            if {original}:"]
        if "weight" not in passed and "weight" not in asked.tensors:
            lines += _front_of_op.indented(16, parameters * _names_parameters(condition + result))
        lines += _front_of_op.indented(16, [f"if {condition or True}:", f"    return {result}"])
    lines += [f"            return _small_method({', '.join(passed)})"]
    if given is not None:
        lines += [f"        if the_plans and {holds}:"]
        plans = _front_of_op.from_plans(asked.tensors[0], values, "_mode.")
        lines += _front_of_op.indented(12, reads + plans)
    return ["if _mode._uniform and not _is_compiling():", *lines]


def front(cls: type, its: type, method: Method, twin: Any = None) -> Any:
    """The function that runs in place of `method.ours`.

    On our class it calls the stock class's method if that one was replaced and ours was not. On
    marked layers of the stock class (`twin` is then a copy of PyTorch's method) nothing of the kind
    is needed: whoever replaces the stock class's method is called first.

    It calls PyTorch's method if no kernel can run, if the call is below the floor of the op, if a
    function that PyTorch's method calls was replaced in `torch.nn.functional`, or if the first
    argument is no tensor. Else it calls `method.ours`. It is generated as source code from the
    signature, so that arguments bind and fail as declared. TorchScript, which compiles the source
    of `__wrapped__`, finds PyTorch's there.
    """
    name, op = method.name, method.op
    declared: list[str] = []
    passed: list[str] = []
    defaults: dict[str, Any] = {**_front_of_op.BELOW, **_DIRECT}
    same: list[str] = []  # for each function that PyTorch's method calls, whether it is original
    for number, (function, originals) in enumerate(called(method.made).items()):
        either = []
        for i, original in enumerate(originals):
            defaults[f"_original_{number}_{i}"] = original
            either.append(f"_functional.{function} is _original_{number}_{i}")
        same.append(f"({' or '.join(either) or 'False'})")
    for p in signature(method.ours).parameters.values():
        assert p.kind is Parameter.POSITIONAL_OR_KEYWORD, (cls, name, p)
        declared.append(p.name if p.default is p.empty else f"{p.name}=_{p.name}")
        passed.append(p.name)
        if p.default is not p.empty:
            defaults[f"_{p.name}"] = p.default
    given = ", ".join(passed)
    lines = []
    define = ""
    if twin is None:
        lines += [
            f"        if _its_class.{name} is not _as_made:",
            f"            if _our_class.{name} is {name}:",
            f"                return _its_class.{name}({given})",
            f"            return _our_method({given})",
        ]
    lines += ["        if _mode._idle:", f"            return _its_method({given})"]
    if op is not None:
        asked = _front_of_op.below(op, passed[1], "_mode.")
        assert {*asked.tensors, *asked.others} <= {*passed, "weight"}, (cls, asked)
        define = asked.define
        defaults |= _front_of_op.plans_of(op)
        lines += _front_of_op.indented(8, _shortcuts(method, asked, same, passed))
    for one in same:
        lines += [f"        if not {one}:", f"            return _its_method({given})"]
    # A Sequential hands on what its first member takes. Recurrent layers tell why a PackedSequence
    # runs stock.
    if not issubclass(its, (torch.nn.Sequential, torch.nn.RNNBase)):
        lines += [f"        if not isinstance({passed[1]}, _tensor_class):"]
        lines += [f"            return _its_method({given})"]
    lines = [
        "def make(_mode, _functional, _tensor_class, _our_class, _its_class, _this_class, "
        f"_as_made, _its_method, _our_method, _small_method, {', '.join(defaults)}):",
        "    _the_floor = -1",
        define,
        f"    def {name}({', '.join(declared)}):",
        *lines,
        f"        return _our_method({given})",
        "    def set_floor(least):",
        "        nonlocal _the_floor",
        "        _the_floor = least",
        f"    return {name}, set_floor",
    ]
    made = method.made
    side = cls if twin is None else its
    file = f"<fastnn: {side.__module__}.{side.__name__}.{name}>"
    source = "\n".join(lines) + "\n"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    scope: dict = {}
    # TorchScript looks up the names of PyTorch's method in these globals.
    exec(compile(source, file, "exec"), getattr(its, name).__globals__, scope)
    small = rebound(method.ours, F=_functional) if method.mirrors else twin or made
    function, set_floor = scope["make"](
        _mode, _functional, torch.Tensor, cls, its, side, made, twin or made, method.ours, small,
        **defaults,
    )  # fmt: skip
    if op is not None:
        op.floor.follow(set_floor)
    return functools.update_wrapper(function, getattr(its, name))


# What the sources of `direct` and `given` may name.
_DIRECT = {
    "_torch": torch,
    "_nn": torch._C._nn,
    "_Parameter": torch.nn.Parameter,
    "_known_weight_and_bias": _known_weight_and_bias,
    "_attributes": attributes,
    "_REDUCTIONS": {"none": 0, "mean": 1, "sum": 2},
}


def _names_parameters(source: str) -> bool:
    return re.search(r"(?<![.'])\b(weight|bias)\b", source) is not None


# ---- The metaclass -----------------------------------------------------------------------------


class Layer(ABCMeta):
    """Metaclass of accelerated layers. `class ReLU(stock.ReLU, metaclass=Layer)` registers one.

    `op=F.relu` names the function that `forward`, or else `_conv_forward`, calls with its first
    argument first, if it calls no other. Calls that are too small for its kernels then go to
    PyTorch's method at once.
    `mirrors=True`: or to our own `forward`, over `torch.nn.functional`. It must then differ from
    PyTorch's in nothing but how it reads parameters.
    `direct=(condition, result)` are sources. They say what PyTorch's `forward` comes to for an
    exact tensor: the operator of PyTorch that it calls at last, after questions that only other
    classes answer. A small call runs this where the condition holds ("": always). The sources name
    `self`, the arguments, what is in `_DIRECT`, and the `weight` and `bias` of the layer.
    `given` is the source of the arguments that our `forward` gives the op, all of them and in
    order; or a pair of a condition and that source. With it a plan is looked up before our
    `forward` and the function run.
    Both read attributes that `forward` may read again. So they hold for exactly this class, of
    which attributes are values: a subclass, as `parametrize` makes one, may compute them.
    `boxes` are the names of members that the layer never calls: it reads their parameters.

    It derives from ABCMeta, so that users can still mix `abc.ABC` into their subclasses.
    """

    def __new__(
        mcls,
        name,
        bases,
        namespace,
        op=None,
        boxes=(),
        mirrors=False,
        direct=None,
        given=None,
        **kwargs,
    ):
        ours = namespace.get("__module__", "").startswith("fastnn.layers.")
        if ours:
            namespace.setdefault("__doc__", bases[0].__doc__)
        cls: Any = super().__new__(mcls, name, bases, namespace, **kwargs)
        if ours:
            its: Any = bases[0]
            STOCK[cls], OURS[its] = its, cls
            BOXES[its] = BOXES[cls] = boxes
            main = "forward" if "forward" in namespace else "_conv_forward"
            METHODS[its] = tuple(
                Method(
                    key,
                    method,
                    as_torch_made(getattr(its, key)),
                    op.op if op is not None and key == main else None,
                    mirrors and key == main,
                    direct if key == main else None,
                    (("", given) if isinstance(given, str) else given) if key == main else None,
                )
                for key, method in namespace.items()
                if isinstance(method, FunctionType) and hasattr(its, key) and key[:2] != "__"
            )
            for method in METHODS[its]:
                setattr(cls, method.name, front(cls, its, method))
            its_forward = as_torch_made(its.forward)
            _AS_MADE[cls] = cls.forward, its, its_forward
            _AS_MADE[its] = its_forward, its, its_forward
            names = {n: f for m in METHODS[its] for n, f in called(m.made).items()}
            _CALLED[cls] = _CALLED[its] = names
            _INTACT[cls], _INTACT[its] = _intact(cls), _intact(its)
        return cls

    # A stock layer counts as an instance of the accelerated class: `isinstance(m, nn.Linear)` asks
    # whether m is a linear layer.
    def __instancecheck__(cls, instance: Any) -> bool:
        if cls in STOCK:
            return isinstance(instance, STOCK[cls])
        return super().__instancecheck__(instance)

    def __subclasscheck__(cls, subclass: type) -> bool:
        if cls in STOCK:
            return issubclass(subclass, STOCK[cls])
        return super().__subclasscheck__(subclass)


def rebound(function: Any, /, **names: Any) -> Any:
    """A function with the code of `function`, whose globals have `names` in place of their own.

    With it, a PyTorch method calls our functions or builds our layers, and stays PyTorch's in all
    else, in every version of PyTorch.
    """
    scope = {**function.__globals__, **names}
    del scope["__name__"]  # With this entry, Dynamo would look the names up in PyTorch's module.
    name, closure = function.__name__, function.__closure__
    twin = FunctionType(function.__code__, scope, name, function.__defaults__, closure)
    twin.__module__ = function.__module__
    twin.__kwdefaults__ = function.__kwdefaults__
    twin.__annotations__ = function.__annotations__
    twin.__doc__ = function.__doc__
    return twin


_fx_is_leaf = torch.fx.Tracer.is_leaf_module


def _is_leaf_module(self, m, module_qualified_name):
    # fx treats a layer as a leaf if its class is defined under torch.nn. If fx stepped into a
    # Dropout, it would freeze the training flag into the graph.
    stock = STOCK.get(type(m))
    if stock is not None:
        return stock is not torch.nn.Sequential
    return _fx_is_leaf(self, m, module_qualified_name)


torch.fx.Tracer.is_leaf_module = _is_leaf_module  # type: ignore[method-assign]
