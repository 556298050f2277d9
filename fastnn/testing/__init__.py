"""Parity: the proof that an accelerated layer or function equals stock's, for us and for users.

A `Case` is a row: a layer or function, inputs, options, and the path it must take. `check` runs it
three times, ours, stock's and stock's in float64, forward and backward, and returns a `Result`.

The rule: our error against float64 may be at most twice stock's own error in the same dtype, plus
one unit in the last place at the scale of the result.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fastnn
import fastnn.functional
from fastnn._op import FLOATS, BackendError, Mode, backend, decisions

__all__ = [
    "FLOATS",
    "Case",
    "Comparison",
    "Result",
    "assert_parity",
    "check",
    "classes",
    "randn",
    "values",
]

Maker = Callable[[torch.dtype, str], Any]


def randn(*shape: int, grad: bool = True, scale: float = 1.0, shift: float = 0.0) -> Maker:
    """Maker of normal values in `shape`, in the row's dtype; a leaf that wants its gradient."""

    def make(dtype, device):
        x = torch.randn(shape) * scale + shift
        return x.to(device, dtype).requires_grad_(grad)

    return make


def values(*numbers: float, grad: bool = True) -> Maker:
    """Maker of exactly these numbers, as a vector in the row's dtype."""

    def make(dtype, device):
        return torch.tensor(numbers).to(device, dtype).requires_grad_(grad)

    return make


def classes(*shape: int, high: int, ignore: int | None = None) -> Maker:
    """Maker of int64 class indices below `high`; with `ignore`, every third one is that instead."""

    def make(dtype, device):
        t = torch.randint(high, shape)
        if ignore is not None:
            t.view(-1)[::3] = ignore
        return t.to(device)

    return make


@dataclass(frozen=True)
class Case:
    """One row.

    name: a layer of torch.nn ("LayerNorm") or a function of torch.nn.functional ("layer_norm").
    inputs: makers of the positional arguments, or plain values.
    options: keyword arguments of the layer's constructor, or of the function.
    view: applied to the first input after making it (a transpose, a slice, channels_last, ...).
    stock: words of the reason, where stock is the path expected.
    dtypes: what it is run in.
    autocast: run under autocast to this dtype.
    train: the layer's mode.
    """

    name: str
    inputs: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    view: Callable[[Tensor], Tensor] | None = None
    stock: str | None = None
    dtypes: tuple[torch.dtype, ...] = FLOATS
    autocast: torch.dtype | None = None
    train: bool = True

    @property
    def is_layer(self) -> bool:
        return self.name[0].isupper()

    def __str__(self) -> str:
        made = torch.random.get_rng_state()
        shapes = [
            "x".join(map(str, v.shape)) if isinstance(v, Tensor) else repr(v)
            for v in self.make(torch.float32, "cpu")
        ]
        torch.random.set_rng_state(made)
        options = [f"{k}={v}" for k, v in self.options.items()]
        notes = [f"autocast={self.autocast}"] if self.autocast else []
        notes += ["view"] if self.view else []
        return f"{self.name}({', '.join(shapes + options + notes)})"

    def make(self, dtype: torch.dtype, device: str) -> list:
        """The inputs, as leaves; the generator's state decides their values."""
        return [v(dtype, device) if callable(v) else v for v in self.inputs]


@dataclass(frozen=True)
class Comparison:
    """One compared tensor: largest errors against float64, ours and stock's, and the bound."""

    what: str
    ours: float
    stock: float
    bound: float

    @property
    def ratio(self) -> float:
        """Our error over stock's; 1 where both are exact."""
        if self.ours == self.stock:
            return 1.0
        return self.ours / self.stock if self.stock else math.inf


@dataclass
class Result:
    """What `check` found: the path, a `Comparison` per tensor, and every disagreement in words."""

    case: Case
    dtype: torch.dtype
    path: str
    reason: str | None
    comparisons: list[Comparison] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def _target(case: Case, namespace, dtype, device):
    """The callable of the row, and its parameters by name."""
    if not case.is_layer:
        function = getattr(namespace.functional, case.name)
        return (lambda *a: function(*a, **case.options)), {}
    layer = getattr(namespace, case.name)(**case.options).to(device, dtype).train(case.train)
    return layer, dict(layer.named_parameters())


def _leaves(values, dtype=None):
    """Fresh leaves of the same layout and, given a dtype, in that one."""
    out = []
    for v in values:
        if isinstance(v, Tensor):
            fresh = v.detach().clone(memory_format=torch.preserve_format)
            if dtype is not None and fresh.is_floating_point():
                fresh = fresh.to(dtype)
            v = fresh.requires_grad_(v.requires_grad)
        out.append(v)
    return out


def _tensors(out) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [t for t in out if isinstance(t, Tensor)]


def _run(case: Case, target, parameters, inputs, device, upstream=None, autocast=True):
    """Named results: outputs, then the gradient of each input and parameter that wants one."""
    for p in parameters.values():
        p.grad = None
    torch.manual_seed(1)
    args = list(inputs)
    if case.view:
        args[0] = case.view(args[0])
    enabled = case.autocast is not None and autocast
    with torch.autocast(device, dtype=case.autocast or torch.bfloat16, enabled=enabled):
        out = target(*args)
    outs = _tensors(out)
    named = {f"output {i}" if i else "output": t.detach().clone() for i, t in enumerate(outs)}
    layouts = [(t.dtype, tuple(t.shape), t.stride(), t.requires_grad) for t in outs]
    wanting = [t for t in outs if t.requires_grad]
    if wanting:
        if upstream is None:
            g = torch.Generator().manual_seed(2)
            upstream = [torch.randn(t.shape, generator=g).to(t.device, t.dtype) for t in wanting]
        kept = [g.clone() for g in upstream]
        torch.autograd.backward(
            wanting, [u.to(t.dtype) for u, t in zip(upstream, wanting, strict=True)]
        )
        if any(not torch.equal(a, b) for a, b in zip(upstream, kept, strict=True)):
            named["an incoming gradient was written to"] = torch.full((1,), math.nan)
        for i, x in enumerate(inputs):
            if isinstance(x, Tensor) and x.grad is not None:
                named[f"grad of input {i}"] = x.grad
        for name, p in parameters.items():
            if p.grad is not None:
                named[f"grad of {name}"] = p.grad
    return named, layouts, upstream


def _compare(
    what: str, ours: Tensor, stock: Tensor, exact: Tensor
) -> tuple[Comparison, str | None]:
    ours64, stock64 = ours.double(), stock.double()
    # Where stock's own dtypes disagree (gelu(inf) is nan in CPU float32, inf in float64), either is
    # right; a finite value is right where either of the two is finite, and is compared below.
    for a in (math.nan, math.inf, -math.inf):
        is_a = torch.isnan if math.isnan(a) else (lambda t, a=a: t == a)
        if (is_a(ours64) & ~is_a(stock64) & ~is_a(exact)).any():
            return Comparison(what, math.inf, 0.0, 0.0), f"{what}: {a} in other places than stock"
    finite = exact.isfinite() & stock64.isfinite()
    if not ours64[finite].isfinite().all():
        return Comparison(what, math.inf, 0.0, 0.0), f"{what}: not finite where stock is"
    if ours64[~exact.isfinite() & ~stock64.isfinite()].isfinite().any():
        return Comparison(what, math.inf, 0.0, 0.0), f"{what}: finite where stock is not"
    if not finite.any():
        return Comparison(what, 0.0, 0.0, 0.0), None
    exact = exact[finite]
    error = (ours64[finite] - exact).abs().max().item()
    its = (stock64[finite] - exact).abs().max().item()
    bound = 2 * its + torch.finfo(stock.dtype).eps * exact.abs().max().item()
    said = f"{what}: {error:.3g} from float64, bound {bound:.3g} (stock is {its:.3g} away)"
    return Comparison(what, error, its, bound), said if error > bound else None


def check(case: Case, dtype: torch.dtype, device: str = "cpu", mode: Mode = "triton") -> Result:
    """Run one row in one dtype, and say everything that differs from stock.

    Compares values, gradients, nan and inf, dtypes, shapes, strides, whether a graph is attached;
    runs ours twice and wants the same bits; wants inputs and incoming gradients left as they were.
    """
    torch.manual_seed(0)
    inputs = case.make(dtype, device)
    stock, stock_parameters = _target(case, torch.nn, dtype, device)
    ours, parameters = _target(case, fastnn, dtype, device)
    result = Result(case, dtype, "kernel", None)
    fail = result.failures.append
    if case.is_layer:
        ours.load_state_dict(stock.state_dict(), strict=True)
        stock.load_state_dict(ours.state_dict(), strict=True)
        exact = copy.deepcopy(stock).double()
        exact_parameters = dict(exact.named_parameters())
    else:
        exact, exact_parameters = stock, {}

    want, want_layout, upstream = _run(case, stock, stock_parameters, _leaves(inputs), device)
    wide = _leaves(inputs, torch.float64)
    wide_upstream = [u.double() for u in upstream or ()]
    truth, _, _ = _run(case, exact, exact_parameters, wide, device, wide_upstream, autocast=False)

    mine = _leaves(inputs)
    try:
        with backend(mode), decisions() as heard:
            got, layout, _ = _run(case, ours, parameters, mine, device, upstream)
            again, _, _ = _run(case, ours, parameters, _leaves(inputs), device, upstream)
    except BackendError as e:
        result.path, result.reason = "stock", str(e)
        if case.stock is None or case.stock not in result.reason:
            fail(f"expected {case.stock or 'a kernel'}; got {result.reason}")
        return result
    whys = [why for _, why in heard if why is not None]
    if whys:
        result.path, result.reason = "stock", whys[0]
    if not heard:
        fail("nothing was dispatched")
    if case.stock is not None and not any(case.stock in why for why in whys):
        fail(f"expected stock ({case.stock}); the path was {result.path} ({result.reason})")
    if case.stock is None and whys and mode == "triton":
        fail(f"expected a kernel; got stock ({whys[0]})")

    for x, before in zip(mine, inputs, strict=True):
        if isinstance(x, Tensor) and not case.options.get("inplace"):
            if not torch.equal(x.nan_to_num(), before.nan_to_num()):
                fail("an input was written to")
    if layout != want_layout:
        fail(f"(dtype, shape, strides, requires_grad) {layout}; stock {want_layout}")
    if got.keys() != want.keys():
        fail(f"results {sorted(got)}; stock {sorted(want)}")
    for what in got.keys() & want.keys():
        a, b = got[what], want[what]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            fail(f"{what}: {a.dtype} {tuple(a.shape)}; stock {b.dtype} {tuple(b.shape)}")
            continue
        if not torch.equal(a.nan_to_num(), again[what].nan_to_num()):
            fail(f"{what}: two runs differ")
        if a.is_floating_point() and a.numel():
            comparison, failure = _compare(what, a, b, truth[what])
            result.comparisons.append(comparison)
            if failure:
                fail(failure)
        elif not torch.equal(a, b):
            fail(f"{what}: differs from stock")
    return result


def assert_parity(case: Case, dtype: torch.dtype, device: str = "cpu") -> Result:
    """`check`, raising AssertionError with every disagreement. Returns the `Result`."""
    result = check(case, dtype, device)
    if result.failures:
        lines: Sequence[str] = [f"{case} in {dtype}, path {result.path}:", *result.failures]
        raise AssertionError("\n  ".join(lines))
    return result
