"""The calls of ops that the parity rows make, to be made again with other tensors.

A row of a layer calls ops with its parameters, buffers and masks among the arguments. Here all of
them are arguments, by name. Each call is compared with stock, and with stock in float64.
"""

from __future__ import annotations

import functools
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fastnn
from fastnn import testing as parity
from fastnn._front import parameters
from fastnn._mode import BackendError, backend, decisions
from fastnn._op import Op, intercept
from fastnn.testing.cases import CASES
from fastnn.testing.noise import recording, replaying

LARGEST = 1 << 13  # elements of a tensor, because the interpreter is slow


@dataclass(frozen=True)
class Call:
    """One call of an op. `arguments` are bound to the names of its parameters. The tensors are
    dense and detached; the tensors named in `wanting` get gradients."""

    op: Op
    row: str
    arguments: dict
    wanting: frozenset[str]

    def tensors(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.arguments.items() if isinstance(v, Tensor)}

    def with_(self, **changed) -> Call:
        return replace(self, arguments={**self.arguments, **changed})

    def kind(self):
        """A key of everything, except sizes, that distinguishes this call from others of the op."""
        return tuple(
            (k, v.dim(), v.dtype, k in self.wanting, 1 in v.shape)
            if isinstance(v, Tensor)
            else (k, str(v))
            for k, v in self.arguments.items()
        )


@functools.cache
def recorded() -> dict[str, list[Call]]:
    """Name of an op -> the calls in float32 that the rows make, one of each kind."""
    found: dict[str, dict] = {}
    for case in CASES:
        if torch.float32 not in case.dtypes or case.autocast is not None:
            continue
        for call in _calls_of(case):
            found.setdefault(call.op.name, {}).setdefault(call.kind(), call)
    return {name: sorted(calls.values(), key=_elements) for name, calls in found.items()}


def _elements(call):
    return sum(t.numel() for t in call.tensors().values())


def _calls_of(case):
    calls = []

    def record(op, args, kwargs):
        names = [p.name for p in parameters(op.fused)]
        bound = {**dict(zip(names, args, strict=False)), **kwargs}
        tensors = [v for v in bound.values() if isinstance(v, Tensor)]
        if all(t.numel() <= LARGEST for t in tensors):
            wanting = [k for k, v in bound.items() if isinstance(v, Tensor) and v.requires_grad]
            if bound.get("inplace"):  # an error on a leaf
                wanting = [k for k in wanting if k != "input"]
            copies: dict[int, Tensor] = {}  # a tensor given twice stays one tensor
            for k, v in bound.items():
                if isinstance(v, Tensor):
                    copy = v.detach().clone(memory_format=torch.contiguous_format)
                    bound[k] = copies.setdefault(id(v), copy)
            calls.append(Call(op, str(case), bound, frozenset(wanting)))
        with backend("torch"):
            return op.stock(*args, **kwargs)

    torch.manual_seed(0)
    inputs = case.make(torch.float32, "cpu")
    if any(isinstance(v, Tensor) and v.numel() > LARGEST for v in inputs):
        return calls
    side = parity.side_of(case, fastnn, torch.float32, "cpu")
    options = {k: v(torch.float32, "cpu") if callable(v) else v for k, v in case.options.items()}
    if case.view is not None:
        inputs[0] = case.view(inputs[0])
    with intercept(record), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        side.call(*inputs, **({} if case.is_layer else options))
    return calls


@dataclass
class Outcome:
    """The outcome of a call: its results and gradients, or its error."""

    error: Exception | None = None
    values: dict[str, Tensor] | None = None
    path: str = "kernel"
    reason: str = ""


def _invoke(call: Call, function, bases, upstream, layout):
    """Results by name. The tensors of `bases` were made to hold arguments."""
    arguments = dict(call.arguments)
    positional, keyword = [], {}
    for p in parameters(call.op.fused):
        if p.name not in arguments:
            continue
        if p.kind is p.KEYWORD_ONLY:
            keyword[p.name] = arguments[p.name]
        else:
            positional.append(arguments[p.name])
    out = function(*positional, **keyword)
    outs = parity.tensors_of(out)
    named = {f"output {i}": t for i, t in enumerate(outs)}
    differentiable = [t for t in outs if t.requires_grad]
    if upstream is not None and differentiable:
        leaves = {k: arguments[k] for k in sorted(call.wanting)}
        given = []
        for i, t in enumerate(differentiable):
            made = upstream.gradient(i, t)
            given.append(made if layout is None else layout(made)[0])
        kept = [g.clone() for g in given]
        # Autograd defines the strides of gradients when it stores them; before that, nobody does.
        torch.autograd.backward(differentiable, given)
        for g, k in zip(given, kept, strict=True):
            assert torch.equal(g, k), "an incoming gradient was written to"
        named |= {f"grad of {k}": x.grad for k, x in leaves.items() if x.grad is not None}
    named |= {f"{k} afterwards": arguments[k] for k in bases}
    named |= {f"memory of {k}": base for k, base in bases.items()}
    return {k: t.detach() for k, t in named.items()}


class Upstream:
    """Incoming gradients, the same for each side of a comparison."""

    def __init__(self, draw: int):
        self.draw = draw
        self.made: list[Tensor] = []

    def gradient(self, i: int, like: Tensor) -> Tensor:
        while len(self.made) <= i:
            g = torch.Generator().manual_seed(2 + i + 100 * self.draw)
            self.made.append(torch.randn(like.shape, generator=g))
        return self.made[i].to(like.dtype)


def fresh(call: Call, layouts: dict, dtype=None) -> tuple[Call, dict[str, Tensor]]:
    """The call with new tensors, laid out by `layouts` of arguments, and the tensors that hold
    them."""
    made, bases = {}, {}
    copies: dict[int, Tensor] = {}
    for name, given in call.tensors().items():
        t = given.to(dtype) if dtype is not None and given.is_floating_point() else given
        if name in layouts:
            made[name], bases[name] = layouts[name](t)
        else:
            made[name] = bases[name] = copies.setdefault(id(given), t.clone())
        if name in call.wanting:
            made[name] = made[name].detach().requires_grad_()
    if dtype is not None:
        for name, given in call.arguments.items():
            if isinstance(given, torch.dtype) and given.is_floating_point:
                made[name] = dtype  # an option such as softmax(dtype=...)
    return call.with_(**made), bases


def attempt(call, function, layouts, *, dtype=None, upstream=None, layout=None) -> Outcome:
    mine, bases = fresh(call, layouts, dtype)
    parity.seed("cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Outcome(values=_invoke(mine, function, bases, upstream, layout))
    except BackendError as e:
        return Outcome(path="stock", reason=str(e).split("but stock: ")[-1])
    except Exception as e:
        return Outcome(error=e)


def forced(call, layouts, *, upstream, layout=None) -> tuple[Outcome, list]:
    with backend("triton"), decisions(), recording() as draws:
        function = getattr(fastnn.functional, call.op.name)
        return attempt(call, function, layouts, upstream=upstream, layout=layout), draws


def differences(call: Call, layouts: dict, layout=None) -> tuple[str, list[str]]:
    """(path or reason, differences from stock) of the call, with arguments laid out by `layouts`
    and incoming gradients laid out by `layout`.

    Errors beyond the bound of parity are judged as in parity, by the largest errors over several
    draws. Here incoming gradients are drawn, and the order of the values in each tensor.
    """
    path, wrong, comparisons = _compared(call, layouts, layout, 0)
    found = [comparisons]
    while any(c.failure for c in comparisons) and len(found) < DRAWS:
        again = _shuffled(call, len(found))
        found.append(_compared(again, layouts, layout, len(found))[2])
        comparisons = parity.over_draws([parity.Result("kernel", None, cs) for cs in found])
    failed = [c for c in comparisons if c.failure]
    usual = _usual_bounds(call) if failed else {}
    return path, wrong + [
        f"{c.failure}, {CANCELS}" if c.ours <= usual.get(c.what, -1.0) else str(c.failure)
        for c in failed
    ]


CANCELS = "within the bound of the same call with other values"


def _usual_bounds(call: Call) -> dict[str, float]:
    """The bound of each result of the call as it was recorded, whose values are drawn: the error of
    stock there, and the unit in the last place there. If an argument has equal values only, terms
    may cancel. What is left of them is the rounding of terms that are as large as here."""
    found = [_compared(_shuffled(call, draw), {}, None, draw)[2] for draw in range(DRAWS)]
    pooled = parity.over_draws([parity.Result("kernel", None, cs) for cs in found])
    return {c.what: c.bound for c in pooled}


DRAWS = 25


def _shuffled(call, draw):
    """The call with the values of each tensor in another order; a single value is made smaller."""
    g = torch.Generator().manual_seed(draw)
    copies: dict[int, Tensor] = {}
    for t in call.tensors().values():
        if t.is_floating_point() and id(t) not in copies:
            copies[id(t)] = t.flatten()[torch.randperm(t.numel(), generator=g)].view(t.shape)
            if t.numel() == 1:
                copies[id(t)] = t * (1 - 0.5 * torch.rand((), generator=g))
    return call.with_(**{k: copies.get(id(t), t) for k, t in call.tensors().items()})


def _compared(call, layouts, layout, draw):
    """(path or reason, failures, comparisons of errors)."""
    upstream = Upstream(draw)
    ours, draws = forced(call, layouts, upstream=upstream, layout=layout)
    if ours.path == "stock":
        return ours.reason, [], []

    def theirs(dtype=None):
        with replaying(draws) if draws else nullcontext():
            return attempt(
                call, call.op.stock, layouts, dtype=dtype, upstream=upstream, layout=layout
            )

    stock = theirs()
    if ours.error is not None or stock.error is not None:
        a, b = ours.error, stock.error
        same = type(a) is type(b) and str(a).splitlines()[:1] == str(b).splitlines()[:1]
        return "error", [] if same else [f"{a!r}; stock {b!r}"[:300]], []
    if ours.values.keys() != stock.values.keys():
        return "kernel", [f"results {sorted(ours.values)}; stock {sorted(stock.values)}"], []
    exact = None
    wrong, comparisons = [], []
    for what, a in ours.values.items():
        b = stock.values[what]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            wrong.append(f"{what}: {a.dtype} {tuple(a.shape)}; stock {b.dtype} {tuple(b.shape)}")
            continue
        if what.startswith("memory"):  # nothing may be written there
            if not torch.equal(a.isnan(), b.isnan()):
                wrong.append(f"{what}: written to beside the tensor")
            continue
        # By autograd a gradient has the strides of its tensor, but any strides at sizes of 1.
        ignored = 1 if what.startswith("grad") else 0
        strides = [
            [d for d, size in zip(t.stride(), t.shape, strict=True) if size > ignored]
            for t in (a, b)
        ]
        if strides[0] != strides[1]:
            wrong.append(f"{what}: strides {a.stride()}; stock {b.stride()}")
        if torch.equal(a.nan_to_num(7), b.nan_to_num(7)) and torch.equal(a.isnan(), b.isnan()):
            continue
        exact = exact or theirs(torch.float64)
        if exact.error is not None:
            if not torch.allclose(a, b, equal_nan=True, rtol=1e-4, atol=1e-4):
                wrong.append(f"{what}: differs from stock")
            continue
        comparison, failure = parity.compare_tensors(what, a, b, exact.values[what])
        if failure is not None:
            wrong.append(failure)
        else:
            comparisons.append(comparison)
    return "kernel", wrong, comparisons
