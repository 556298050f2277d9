"""What a node of a captured graph computes, however the user's code spelt it.

Dynamo records `x + y`, `torch.add(x, y)`, `x.add(y)` and `x += y` as four kinds of nodes. `call`
gives all of them one name and one set of arguments. The other functions here say what a node
writes, whether it draws random numbers, and which memory its result may share.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Call:
    """What a node computes: the function's name, and its arguments by name, with defaults."""

    name: str
    arguments: dict[str, Any]
    inplace: bool
    """Whether the result overwrites the first argument."""

    def __getitem__(self, argument: str) -> Any:
        """An argument. With `dynamic=True`, Dynamo passes an `eps` as a symbol; whoever asks for it
        gets its value, and a guard on it."""
        given = self.arguments[argument]
        v = value(given)
        if isinstance(v, (float, torch.SymFloat)) and argument not in _OPERANDS:
            return float(v)
        return given


# Functions that have several spellings, or that are builtins and so tell no signature. A function
# that `torch.nn.functional` writes in Python tells its own.
_SIGNATURES: dict[str, Callable] = {
    "add": lambda input, other, alpha=1: None,
    "sub": lambda input, other, alpha=1: None,
    "mul": lambda input, other: None,
    "div": lambda input, other, rounding_mode=None: None,
    "neg": lambda input: None,
    "pow": lambda input, exponent: None,
    "square": lambda input: None,
    "sqrt": lambda input: None,
    "rsqrt": lambda input: None,
    "reciprocal": lambda input: None,
    "exp": lambda input: None,
    "erf": lambda input: None,
    "mean": lambda input, dim=None, keepdim=False, dtype=None: None,
    "tanh": lambda input: None,
    "sigmoid": lambda input: None,
    "relu": lambda input: None,
    "selu": lambda input: None,
    "silu": lambda input, inplace=False: None,
    "mish": lambda input, inplace=False: None,
    "elu": lambda input, alpha=1.0, inplace=False: None,
    "hardswish": lambda input, inplace=False: None,
    "hardsigmoid": lambda input, inplace=False: None,
    "hardtanh": lambda input, min_val=-1.0, max_val=1.0, inplace=False: None,
    "relu6": lambda input, inplace=False: None,
    "leaky_relu": lambda input, negative_slope=0.01, inplace=False: None,
    "softplus": lambda input, beta=1.0, threshold=20.0: None,
    "gelu": lambda input, approximate="none": None,
    "linear": lambda input, weight, bias=None: None,
    "addmm": lambda input, mat1, mat2, beta=1, alpha=1: None,
    "layer_norm": F.layer_norm,
    "rms_norm": F.rms_norm,
    "group_norm": F.group_norm,
    "batch_norm": F.batch_norm,
    "dropout": F.dropout,
    "cross_entropy": F.cross_entropy,
    "nll_loss": F.nll_loss,
    "log_softmax": F.log_softmax,
    "softmax": F.softmax,
    "pad": lambda input, pad, mode="constant", value=None: None,
    "unbind": lambda input, dim=0: None,
    "chunk": lambda input, chunks, dim=0: None,
    "contiguous": lambda input: None,
    "getitem": lambda input, index: None,
    "scaled_dot_product_attention": lambda query, key, value, attn_mask=None, dropout_p=0.0,
        is_causal=False, scale=None, enable_gqa=False: None,
}  # fmt: skip
_OPERANDS = frozenset(("input", "other", "exponent"))
_ALIASES = {
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "subtract": "sub",
    "negative": "neg",
}
_OPERATORS = {
    "add": "add",
    "sub": "sub",
    "mul": "mul",
    "truediv": "div",
    "pow": "pow",
    "neg": "neg",
    "getitem": "getitem",
}
# Functions of one name whose signature in `torch` differs from that in `torch.nn.functional`.
_ONLY_FUNCTIONAL = {"layer_norm", "group_norm", "batch_norm", "dropout", "nll_loss"}
_LOG_SOFTMAX = inspect.signature(lambda input, dim=None, dtype=None: None)


class _Spelling(NamedTuple):
    name: str
    signature: inspect.Signature
    inplace: bool


def _signature(name: str, function: Any) -> inspect.Signature:
    if isinstance(function, FunctionType) and function.__module__.startswith("torch"):
        return inspect.signature(function)
    if name in ("softmax", "log_softmax"):
        return _LOG_SOFTMAX
    return inspect.signature(_SIGNATURES[name])


def _spellings() -> tuple[dict[Any, _Spelling], dict[str, _Spelling]]:
    functions: dict[Any, _Spelling] = {}
    methods: dict[str, _Spelling] = {}
    names = {**{n: n for n in _SIGNATURES}, **_ALIASES}
    for spelt, name in names.items():
        homes: tuple[ModuleType, ...] = (F,) if name in _ONLY_FUNCTIONAL else (F, torch)
        for suffix in ("", "_"):
            for home in homes:
                function = getattr(home, spelt + suffix, None)
                if function is not None:
                    functions[function] = _Spelling(name, _signature(name, function), bool(suffix))
            if hasattr(Tensor, spelt + suffix) and name not in _ONLY_FUNCTIONAL:
                signature = _signature(name, None)
                methods[spelt + suffix] = _Spelling(name, signature, bool(suffix))
    functions[torch._C._nn.pad] = functions[F.pad]  # what `F.pad` calls
    for spelt, name in _OPERATORS.items():
        signature = inspect.signature(_SIGNATURES[name])
        functions[getattr(operator, spelt)] = _Spelling(name, signature, False)
        if hasattr(operator, f"i{spelt}"):
            functions[getattr(operator, f"i{spelt}")] = _Spelling(name, signature, True)
    return functions, methods


_FUNCTIONS, _METHODS = _spellings()


def value(node: Any) -> Any:
    """What Dynamo knows of the result of a node: a fake tensor, a number, ...; None if nothing."""
    return node.meta.get("example_value") if isinstance(node, Node) else None


def same_sizes(one: Iterable[Any], other: Iterable[Any]) -> bool:
    """Whether two shapes, or two strides, are equal at all sizes for which the graph will run.

    With dynamic shapes, `==` asks whether they are equal in this call, and PyTorch then compiles
    anew for sizes with another answer. For example, (n, 4, 8) == (4, 8) asks whether n is 4.
    """
    return statically_known_true(sym_eq(tuple(one), tuple(other)))


def call(node: Any) -> Call | None:
    """What `node` computes; None if it is not a call of a function that has a name here."""
    if not isinstance(node, Node):
        return None
    if node.op == "call_function":
        spelling = _FUNCTIONS.get(node.target)
    elif node.op == "call_method":
        spelling = _METHODS.get(str(node.target))
    else:
        return None
    if spelling is None:
        return None
    try:
        bound = spelling.signature.bind(*node.args, **node.kwargs)
    except TypeError:  # for example `out=`
        return None
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    inplace = spelling.inplace or bool(arguments.pop("inplace", False))
    # `a += b` for an `a` that is a number makes a new object, like `a + b`.
    return Call(spelling.name, arguments, inplace and isinstance(value(node), Tensor))


# ---- Conversions and views ----------------------------------------------------------------------

_CONVERSIONS = frozenset(("to", "float", "half", "bfloat16", "type", "type_as"))
_VIEWS = frozenset(
    ("view", "reshape", "contiguous", "transpose", "permute", "flatten", "unflatten", "unsqueeze",
     "squeeze", "expand", "expand_as", "view_as", "reshape_as", "t", "detach", "chunk", "split",
     "unbind", "narrow", "select", "swapaxes", "movedim", "getitem", "getattr", "alias", "mT")
)  # fmt: skip


def _target_name(node: Node) -> str:
    target = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def is_conversion(node: Any) -> bool:
    """Whether a node changes the floating dtype of a tensor, and nothing else."""
    if not isinstance(node, Node) or node.op != "call_method" or node.target not in _CONVERSIONS:
        return False
    new, old = value(node), value(node.args[0])
    return (
        isinstance(new, Tensor)
        and isinstance(old, Tensor)
        and new.is_floating_point()
        and old.is_floating_point()
        and new.device == old.device
        and "memory_format" not in node.kwargs
        and not node.kwargs.get("copy")
    )


def is_view(node: Any) -> bool:
    """Whether the result of a node may share the memory of its first argument."""
    return (
        isinstance(node, Node)
        and node.op in ("call_function", "call_method")
        and _target_name(node) in _VIEWS | _CONVERSIONS
        and bool(node.args)
        and isinstance(node.args[0], Node)
    )


def is_widening(node: Any) -> bool:
    """Whether a node changes the dtype of a tensor without changing a value."""
    if not is_conversion(node):
        return False
    new, old = value(node).dtype, value(node.args[0]).dtype
    return torch.promote_types(new, old) == new


def is_reshape(node: Any) -> bool:
    """Whether a node is a view of its first argument in the same dtype, by constants only."""
    return (
        is_view(node)
        and not is_conversion(node)
        and isinstance(value(node), Tensor)
        and isinstance(value(node.args[0]), Tensor)
        and value(node).dtype == value(node.args[0]).dtype
        and not any(
            isinstance(value(n), Tensor) for n in node.all_input_nodes if n is not node.args[0]
        )
    )


def keeps_rows(node: Any) -> bool:
    """Whether a node gives a contiguous tensor other dimensions, except for the last one."""
    names = "view", "reshape", "flatten", "unflatten"
    if not is_reshape(node) or _target_name(node) not in names:
        return False
    new, old = value(node), value(node.args[0])
    if not new.dim() or not old.dim() or not same_sizes(new.shape[-1:], old.shape[-1:]):
        return False
    return new.is_contiguous() and old.is_contiguous()


def parts_of(node: Any) -> tuple[Node, int] | None:
    """(x, n), if a node gives the n equal parts of the last dimension of x; None for others."""
    if (
        not isinstance(node, Node)
        or _target_name(node) not in ("split", "chunk")
        or not is_view(node)
    ):
        return None
    x, *rest = node.args
    given = dict(zip(("size", "dim"), rest, strict=False), **node.kwargs)
    v, parts = value(x), value(node)
    if not isinstance(v, Tensor) or not isinstance(parts, (tuple, list)) or not v.dim():
        return None
    if given.get("dim", 0) not in (-1, v.dim() - 1):
        return None
    first = parts[0].shape
    if not all(same_sizes(first, p.shape) for p in parts):
        return None
    return x, len(parts)  # type: ignore[return-value]


# Functions without a signature here that always give new memory.
_MAKE_NEW = frozenset(
    ("sin", "cos", "conv1d", "conv2d", "conv3d", "matmul", "bmm", "addmm", "cat", "stack", "roll",
     "scaled_dot_product_attention", "mse_loss", "embedding", "max_pool2d", "clone")
)  # fmt: skip


def makes_new(node: Node) -> bool:
    """Whether a call is of a function that always gives new memory."""
    return _target_name(node) in _MAKE_NEW and "out" not in node.kwargs


def roots(node: Node) -> set[Node]:
    """The nodes whose memory the result of `node` may share: itself, if it makes a tensor."""
    found: set[Node] = set()
    todo, seen = [node], set()
    while todo:
        one = todo.pop()
        if one in seen:
            continue
        seen.add(one)
        known = call(one)
        if is_view(one):
            todo.append(one.args[0])  # type: ignore[arg-type]
        elif known is not None and known.inplace:
            todo.append(known["input"])
        elif one.op in ("placeholder", "get_attr"):
            found.add(one)
        elif known is not None and known.name != "dropout":
            found.add(one)
        elif makes_new(one):
            found.add(one)
        else:  # unknown: any argument may be shared. Dropout that drops nothing returns its input.
            found.add(one)
            todo.extend(one.all_input_nodes)
    return found


def is_alone(node: Any) -> bool:
    """Whether `node` holds new memory that is read through this node only, by one user.

    To overwrite it is then the same as to make a new tensor.
    """
    while isinstance(node, Node) and len(node.users) == 1:
        if is_view(node):
            node = node.args[0]
            continue
        known = call(node)
        if known is None or known.name == "dropout":
            return False
        if not known.inplace:
            return True
        node = known["input"]
    return False


# ---- Effects ------------------------------------------------------------------------------------

_STATISTICS = ("running_mean", "running_var")


def writes(node: Node) -> list[Node]:
    """The nodes whose memory a call writes."""
    known = call(node)
    if known is not None:
        if known.inplace:
            return [a for a in (known["input"],) if isinstance(a, Node)]
        if known.name == "batch_norm" and known["training"] is not False:
            return [known[s] for s in _STATISTICS if isinstance(known[s], Node)]
    written = [n for n in tree_leaves(node.kwargs.get("out")) if isinstance(n, Node)]
    name = _target_name(node)
    overwrites = name.endswith("_") and not name.endswith("__")
    overwrites |= name in ("setitem", "__setitem__") or bool(node.kwargs.get("inplace"))
    overwrites |= node.op == "call_function" and getattr(operator, name, None) is node.target and (
        name.startswith("i") and name[1:] in vars(operator)
    )  # fmt: skip
    if overwrites:
        first = node.args[0] if node.args else node.kwargs.get("input")
        written += [a for a in (first,) if isinstance(a, Node)]
    return written


# They have no tag, and draw if they have a dropout.
_MAY_DRAW = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))


def _is_known_not_to_draw(node: Node, name: str) -> bool:
    if is_view(node) or node.target is getattr or getattr(operator, name, None) is node.target:
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded not in node.target.tags
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    if packet is None or name in _MAY_DRAW:
        return False
    tags = [getattr(packet, overload).tags for overload in packet.overloads()]
    return not any(torch.Tag.nondeterministic_seeded in t for t in tags)


def draws(node: Node) -> bool:
    """Whether a call may take random numbers from a generator."""
    if node.op not in ("call_function", "call_method"):
        return False
    known = call(node)
    if known is not None and known.name == "scaled_dot_product_attention":
        return bool(known.arguments["dropout_p"] != 0.0)
    if known is not None:
        return known.name == "dropout" and known["training"] is not False
    name = _target_name(node)
    return not _is_known_not_to_draw(node, name)


def has_free_layout(node: Node) -> bool:
    """Whether nobody can tell the strides of the result of `node`.

    Its users give a contiguous result for any strides, or add it to something, and nobody can tell
    the strides of that sum.
    """
    for user in node.users:
        known = call(user)
        if known is None or known.inplace:
            return False
        if known.name in ("layer_norm", "rms_norm", "linear"):
            if known["input"] is not node:
                return False
            continue
        sum_of = value(user)
        same = isinstance(sum_of, Tensor) and same_sizes(sum_of.shape, value(node).shape)
        if known.name != "add" or not same or not has_free_layout(user):
            return False
    return bool(node.users)


_KNOWN_HOMES = ("torch", "_operator", "operator", "math")


def is_opaque(node: Node) -> bool:
    """Whether a call may have effects that `writes` and `draws` do not tell.

    Such are higher-order operators, functions from outside of PyTorch, operators whose schema says
    that they write, and switches such as those of autocast.
    """
    if node.op == "call_module":
        return True
    if node.op != "call_function":
        return False
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(getattr(target, name)._schema.is_mutable for name in target.overloads())
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    if target is getattr:  # for example of `x.device`
        return False
    home = getattr(target, "__module__", None) or ""
    if home.split(".")[0] not in _KNOWN_HOMES and type(target).__name__ != "method_descriptor":
        return True
    return _target_name(node).startswith("_") or "autograd" in home
