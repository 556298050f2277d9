"""Parity: the proof that a layer or function of fastnn equals the stock one, for us and for users.

A `Case` is a row: a layer or function, inputs, options, and the path that the call must take.
`check` runs the row in three ways, as fastnn, as stock and as stock in float64, forward and
backward, and returns a `Result`.

The rule: our error against float64 may be at most twice the error of stock in the same dtype, plus
one unit in the last place at the scale of the result. If a result has only a few numbers, the
largest error of stock is a matter of luck. A row beyond its bound is therefore run with more
inputs, and judged by the largest errors of both sides over all of them. The bound stays the same.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import fastnn
import fastnn.functional
from fastnn._mode import CODES, BackendError, Code, Mode, backend, decisions
from fastnn._op import FLOATS
from fastnn.ops.norm import FINFO_EPS
from fastnn.testing.devices import simulated
from fastnn.testing.noise import recording, replaying

if TYPE_CHECKING:
    from fastnn.testing import meter

__all__ = [
    "FLOATS",
    "Case",
    "Comparison",
    "Result",
    "Side",
    "Traffic",
    "assert_parity",
    "check",
    "classes",
    "compare_sides",
    "count",
    "randn",
    "simulated",
    "values",
]

Maker = Callable[[torch.dtype, str], Any]


def randn(*shape: int, grad: bool = True, scale: float = 1.0, shift: float = 0.0) -> Maker:
    """A maker of normal values in `shape`, in the row's dtype. `grad`: it requires a gradient."""

    def make(dtype, device):
        x = torch.randn(shape) * scale + shift
        return x.to(device, dtype).requires_grad_(grad)

    return make


def values(*numbers: float, grad: bool = True) -> Maker:
    """A maker of a vector with exactly these numbers, in the dtype of the row."""

    def make(dtype, device):
        return torch.tensor(numbers).to(device, dtype).requires_grad_(grad)

    return make


def classes(*shape: int, high: int, ignore: int | None = None) -> Maker:
    """A maker of class indices in int64 below `high`. If given, every third is `ignore`."""

    def make(dtype, device):
        t = torch.randint(high, shape)
        if ignore is not None:
            t.view(-1)[::3] = ignore
        return t.to(device)

    return make


@dataclass(frozen=True)
class Case:
    """One row.

    - `name`: a layer of torch.nn ("LayerNorm") or a function of torch.nn.functional ("layer_norm").
    - `inputs`: makers of the positional arguments, or plain values.
    - `options`: keyword arguments of the layer or of the function. Makers are called.
    - `view`: a function that is applied to the first input (a transpose, a slice, channels_last).
    - `stock`: the code of the reason, if the row must run stock. docs/api.md lists the codes.
    - `dtypes`: the dtypes in which the row runs.
    - `autocast`: the row runs under autocast to this dtype.
    - `train`: whether the layer is in training mode.
    - `members`: the members of a container, as makers. Each gets the namespace that has its class.
    - `since`: the first torch version that runs the row. Older versions leave the row out.
    """

    name: str
    inputs: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    view: Callable[[Tensor], Tensor] | None = None
    stock: Code | None = None
    dtypes: tuple[torch.dtype, ...] = FLOATS
    autocast: torch.dtype | None = None
    train: bool = True
    members: tuple[Callable[[Any], torch.nn.Module], ...] = ()
    since: str = "0"

    def __post_init__(self):
        if self.stock is not None and self.stock not in CODES:
            raise ValueError(f"Case: stock={self.stock!r} is no code; codes are {', '.join(CODES)}")

    @property
    def is_layer(self) -> bool:
        return self.name[0].isupper()

    def __str__(self) -> str:
        made = torch.random.get_rng_state()
        shapes = [_shape(v) for v in self.make(torch.float32, "cpu")]
        shapes += [str(member(torch.nn)) for member in self.members]
        options = [f"{k}={_told(v)}" for k, v in self.options.items()]
        torch.random.set_rng_state(made)
        notes = [f"autocast={self.autocast}"] if self.autocast else []
        notes += ["view"] if self.view else []
        return f"{self.name}({', '.join(shapes + options + notes)})"

    def make(self, dtype: torch.dtype, device: str) -> list:
        """The inputs, as leaves; the generator's state decides their values."""
        return [v(dtype, device) if callable(v) else v for v in self.inputs]


def _shape(v) -> str:
    if isinstance(v, Tensor):
        return "x".join(map(str, v.shape))
    if isinstance(v, (tuple, list)) and any(isinstance(t, Tensor) for t in v):
        return f"({', '.join(map(_shape, v))})"
    return repr(v)


@dataclass(frozen=True)
class Comparison:
    """One compared tensor: our largest error against float64, that of stock, and the bound; and the
    number of elements compared, where that is known."""

    what: str
    ours: float
    stock: float
    bound: float
    elements: int = 0

    @property
    def ratio(self) -> float:
        """Our error divided by the error of stock; 1 if both are exact."""
        if self.ours == self.stock:
            return 1.0
        return self.ours / self.stock if self.stock else math.inf

    @property
    def failure(self) -> str | None:
        """Says in words that our error is beyond the bound; None if it is not."""
        if self.ours <= self.bound:
            return None
        return (
            f"{self.what}: {self.ours:.3g} from float64, bound {self.bound:.3g} "
            f"(stock is {self.stock:.3g} away)"
        )


@dataclass
class Result:
    """The outcome of a check: the path, a `Comparison` per tensor, each difference in words, and
    the number of draws of inputs that were needed (see `check`). If PyTorch ran, `reason` says why
    in words, and `code` is the kind of the reason."""

    path: str
    reason: str | None
    comparisons: list[Comparison] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    draws: int = 1
    code: Code | None = None

    def _judge(self) -> Result:
        self.failures += [c.failure for c in self.comparisons if c.failure]
        return self


@dataclass
class Side:
    """One side of a comparison: the function to call, and the parameters whose gradients count."""

    call: Any
    parameters: dict[str, Tensor] = field(default_factory=dict)


def side_of(case: Case, namespace, dtype, device) -> Side:
    if not case.is_layer:
        ours = getattr(fastnn.functional, case.name)  # stock may not have a name for it
        return Side(ours if namespace is fastnn else ours.op.stock)
    options = {k: v(dtype, device) if callable(v) else v for k, v in case.options.items()}
    members = [member(namespace) for member in case.members]
    layer = getattr(namespace, case.name)(*members, **options).to(device, dtype).train(case.train)
    return Side(layer, dict(layer.named_parameters()))


def fresh_leaves(tree, dtype=None):
    """The tree, in which each tensor is a new leaf of the same layout; in `dtype`, if given."""

    def fresh(v):
        if isinstance(v, torch.dtype) and dtype is not None and v.is_floating_point:
            return dtype  # an option such as softmax(dtype=...)
        if not isinstance(v, Tensor):
            return v
        new = v.detach().clone(memory_format=torch.preserve_format)
        if dtype is not None and new.is_floating_point():
            new = new.to(dtype)
        return new.requires_grad_(v.requires_grad)

    return tree_map(fresh, tree)


def _told(option: Any) -> str:
    """An option as text for the name of a row. A maker is told by the shape of the tensor, or the
    name of the function, that it makes, so that the name is the same in every process."""
    made = option(torch.float32, "cpu") if callable(option) else option
    if callable(made):
        return getattr(made, "__name__", str(made))
    return "x".join(map(str, made.shape)) if isinstance(made, Tensor) else str(option)


def in_float64(stock: Side) -> Side:
    """Stock in float64. The eps of an RMS norm that is not given depends on the dtype; it is that
    of the other sides."""
    if isinstance(stock.call, torch.nn.Module):
        twin = copy.deepcopy(stock.call).double()
        for module in twin.modules():
            if getattr(module, "eps", 0.0) is None:
                module.eps = FINFO_EPS  # type: ignore[assignment]
        return Side(twin, dict(twin.named_parameters()))
    try:
        eps = inspect.signature(stock.call).parameters.get("eps")
    except ValueError:  # a function of C++
        return stock
    if eps is None or eps.default is not None:
        return stock
    return Side(lambda *given, **options: stock.call(*given, **{"eps": FINFO_EPS, **options}))


def tensors_of(tree) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


@dataclass
class _Run:
    named: dict[str, Tensor]  # outputs, then the gradient of each input and parameter that has one
    layouts: list[tuple]
    upstream: list[Tensor]


def seed(device: str) -> None:
    """As `torch.manual_seed`, which without a GPU would keep a stack trace of each call."""
    torch.default_generator.manual_seed(1)
    if device == "cuda":
        torch.cuda.manual_seed_all(1)


def run_side(side: Side, inputs, device, autocast=None, upstream=None, draw=0) -> _Run:
    for p in side.parameters.values():
        p.grad = None
    seed(device)
    args, kwargs = inputs
    with torch.autocast(device, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        out = side.call(*args, **kwargs)
    outs = tensors_of(out)
    named = {f"output {i}" if i else "output": t.detach().clone() for i, t in enumerate(outs)}
    layouts = [(t.dtype, tuple(t.shape), t.stride(), t.requires_grad) for t in outs]
    wanting = [t for t in outs if t.requires_grad]
    if upstream is None:
        g = torch.Generator().manual_seed(2 + draw)
        upstream = [torch.randn(t.shape, generator=g).to(t.device, t.dtype) for t in wanting]
    if wanting:
        given = [u.to(t.dtype) for u, t in zip(upstream, wanting, strict=True)]
        kept = [u.clone() for u in given]
        torch.autograd.backward(wanting, given)
        if any(not torch.equal(a, b) for a, b in zip(given, kept, strict=True)):
            named["an incoming gradient was written to"] = torch.full((1,), math.nan)
        for i, x in enumerate(tensors_of(inputs)):
            if x.grad is not None:
                named[f"grad of input {i}"] = x.grad
        for name, p in side.parameters.items():
            if p.grad is not None:
                named[f"grad of {name}"] = p.grad
    return _Run(named, layouts, upstream)


def compare_tensors(
    what: str, ours: Tensor, stock: Tensor, exact: Tensor
) -> tuple[Comparison | None, str | None]:
    """The errors at the elements where all sides are finite; in words, what is wrong elsewhere."""
    ours64, stock64 = ours.double(), stock.double()
    # Stock may disagree with stock in float64: gelu(inf) is nan in CPU float32, and inf in float64.
    # Then either value is right. An infinity is also right where a value is too large for the dtype
    # and stock makes it nan. A finite value is right where one of the two is finite; it is compared
    # below.
    rounded = exact.to(stock.dtype)
    for a in (math.nan, math.inf, -math.inf):
        is_a = torch.isnan if math.isnan(a) else (lambda t, a=a: t == a)
        if (is_a(ours64) & ~is_a(stock64) & ~is_a(rounded)).any():
            return None, f"{what}: {a} in other places than stock"
    finite = exact.isfinite() & stock64.isfinite()
    if not ours64[finite].isfinite().all():
        return None, f"{what}: not finite where stock is"
    if ours64[~exact.isfinite() & ~stock64.isfinite()].isfinite().any():
        return None, f"{what}: finite where stock is not"
    if not finite.any():
        return Comparison(what, 0.0, 0.0, 0.0), None
    exact = exact[finite]
    error = (ours64[finite] - exact).abs().max().item()
    its = (stock64[finite] - exact).abs().max().item()
    bound = 2 * its + torch.finfo(stock.dtype).eps * exact.abs().max().item()
    return Comparison(what, error, its, bound, exact.numel()), None


def compare_sides(
    ours: Side,
    stock: Side,
    exact: Side,
    args: Sequence,
    kwargs: dict | None = None,
    *,
    device: str = "cpu",
    mode: Mode = "triton",
    autocast: torch.dtype | None = None,
    inplace: bool = False,
    twice: bool = True,
) -> Result:
    """Call the three sides on the same inputs, `exact` in float64; say where ours is not stock.

    Compares values, gradients, nan and inf, dtypes, shapes, strides, and whether a graph is
    attached. With `twice`, our side runs twice and must give the same bits. Incoming gradients must
    stay unchanged, and inputs too, unless stock writes to them. Then the new contents of the inputs
    are compared, except with `inplace`. Under `mode="triton"` a call that goes to stock ends the
    comparison: `path` is "stock".
    """
    return compare_unjudged(
        ours, stock, exact, args, kwargs or {}, device, mode, autocast, inplace, twice
    )._judge()


def compare_unjudged(
    ours: Side, stock: Side, exact: Side, args: Sequence, kwargs: dict,
    device: str, mode: Mode, autocast: torch.dtype | None, inplace: bool, twice: bool = True,
    draw: int = 0,
) -> Result:  # fmt: skip
    """`compare_sides`, without the judgement of errors."""
    inputs = (tuple(args), kwargs)
    result = Result("kernel", None)
    fail = result.failures.append

    def weigh(what: str, *values: Tensor) -> None:
        comparison, failure = compare_tensors(what, *values)
        if comparison is not None:
            result.comparisons.append(comparison)
        if failure is not None:
            fail(failure)

    mine = fresh_leaves(inputs)
    try:
        with backend(mode), decisions() as heard:
            with recording() as draws:
                got = run_side(ours, mine, device, autocast, draw=draw)
            if twice:
                again = run_side(ours, fresh_leaves(inputs), device, autocast, got.upstream)
            else:
                again = got
    except BackendError as e:
        result.path, result.reason, result.code = "stock", str(e), e.code
        return result
    # On CUDA, stock in the same dtype must draw the same noise by itself.
    with replaying(draws) if draws and device == "cpu" else nullcontext():
        theirs = fresh_leaves(inputs)
        want = run_side(stock, theirs, device, autocast, got.upstream)
    wide = [u.double() for u in got.upstream]
    with replaying(draws) if draws else nullcontext():
        exactly = fresh_leaves(inputs, torch.float64)
        truth = run_side(exact, exactly, device, None, wide)
    declined = [d for d in heard if d.why is not None]
    if declined:
        result.path, result.reason, result.code = "stock", declined[0].why, declined[0].code
    if not heard:
        fail("nothing was dispatched")
    sides = (tensors_of(tree) for tree in (inputs, mine, theirs, exactly))
    for i, (before, x, its, true) in enumerate(zip(*sides, strict=True)):
        if torch.equal(its.nan_to_num(), before.nan_to_num()):
            if not torch.equal(x.nan_to_num(), before.nan_to_num()):
                fail("an input was written to")
        elif not inplace:  # running statistics, which count as results
            weigh(f"input {i} afterwards", x, its, true)
    if got.layouts != want.layouts:
        fail(f"(dtype, shape, strides, requires_grad) {got.layouts}; stock {want.layouts}")
    if got.named.keys() != want.named.keys():
        fail(f"results {sorted(got.named)}; stock {sorted(want.named)}")
    for what in got.named:
        if what not in want.named:
            continue
        a, b = got.named[what], want.named[what]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            fail(f"{what}: {a.dtype} {tuple(a.shape)}; stock {b.dtype} {tuple(b.shape)}")
            continue
        if not torch.equal(a.nan_to_num(), again.named[what].nan_to_num()):
            fail(f"{what}: two runs differ")
        if a.is_floating_point() and a.numel():
            weigh(what, a, b, truth.named[what])
        elif not torch.equal(a, b):
            fail(f"{what}: differs from stock")
    return result


_DRAWS = (5, 25)  # how often a row's inputs are drawn, if fewer draws leave it beyond its bound


def check(
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    mode: Mode = "triton",
    *,
    twice: bool = True,
) -> Result:
    """Run one row in one dtype as fastnn, as stock and as stock in float64, and compare them.

    The row must take the path that it states. With `twice`, fastnn runs twice on the first inputs
    and must give the same bits.

    If the row is beyond its bound, other inputs and incoming gradients are drawn, and the row is
    judged by the largest errors over 5 draws. If the row is still beyond its bound, it is judged by
    the largest errors over 25 draws. Returns a `Result`, whose `failures` lists every difference.
    """
    results = [check_draw(case, dtype, device, mode, 0, twice)]
    comparisons = results[0].comparisons
    for draws in _DRAWS:
        if any(r.failures for r in results) or not any(c.failure for c in comparisons):
            break
        more = range(len(results), draws)
        results += [check_draw(case, dtype, device, mode, n, twice=False) for n in more]
        comparisons = over_draws(results)
    failures = [failure for r in results for failure in r.failures]
    first = results[0]
    return Result(
        first.path, first.reason, comparisons, failures, len(results), first.code
    )._judge()


def over_draws(results: Sequence[Result]) -> list[Comparison]:
    """The largest errors of each tensor over several draws."""
    found: dict[str, list[Comparison]] = {}
    for c in (c for r in results for c in r.comparisons):
        found.setdefault(c.what, []).append(c)
    pooled = []
    for what, these in found.items():
        stock = max(c.stock for c in these)
        unit = max(c.bound - 2 * c.stock for c in these)
        pooled.append(Comparison(what, max(c.ours for c in these), stock, 2 * stock + unit))
    return pooled


def check_draw(
    case: Case, dtype: torch.dtype, device: str, mode: Mode, draw: int, twice: bool = True
) -> Result:
    torch.manual_seed(draw)
    inputs = case.make(dtype, device)
    stock, ours = (side_of(case, n, dtype, device) for n in (torch.nn, fastnn))
    kwargs = {}
    if case.is_layer:
        ours.call.load_state_dict(stock.call.state_dict(), strict=True)
        stock.call.load_state_dict(ours.call.state_dict(), strict=True)
    else:
        kwargs = {k: v(dtype, device) if callable(v) else v for k, v in case.options.items()}
    exact = in_float64(stock)
    if case.view is not None:
        ours, stock, exact = (
            Side(viewing(case.view, s.call), s.parameters) for s in (ours, stock, exact)
        )
    inplace = bool(case.options.get("inplace"))
    result = compare_unjudged(
        ours, stock, exact, inputs, kwargs, device, mode, case.autocast, inplace, twice, draw
    )
    if case.stock is not None and case.stock != result.code:
        got = f"{result.path} ({result.code}: {result.reason})"
        result.failures.append(f"expected stock ({case.stock}); got {got}")
    if case.stock is None and result.path == "stock" and mode == "triton":
        result.failures.append(f"expected a kernel; got stock ({result.reason})")
    return result


@dataclass(frozen=True)
class Traffic:
    """The bytes and launches of a row, forward and backward together, counted without a GPU.

    ours: our kernels, and PyTorch's operators between them.
    stock: the operators that stock runs on CUDA, an estimate (see `meter.AtenTraffic`).
    least: bytes of inputs, parameters, outputs and gradients, once in each pass that needs them.
        A saved tensor counts only if it is one of these. An op that gathers can stay below `least`.
    races: bytes that kernels store and touch again in no certain order (see `meter.Launch`).
    """

    ours: meter.Cost
    stock: meter.Cost
    least: int
    races: int


def count(case: Case, dtype: torch.dtype) -> Traffic:
    """The traffic of a row on kernels.

    Raises `BackendError` if the row goes to stock, and RuntimeError unless kernels run in Triton's
    interpreter.
    """
    from fastnn.testing import meter  # which needs Triton

    with backend("triton"), meter.all_traffic(races=True) as ours:
        least = counted_run(case, fastnn, dtype)
    with meter.as_on_cuda(), meter.AtenTraffic() as stock:
        counted_run(case, torch.nn, dtype)
    races = sum(launch.shared_writes or 0 for launch in ours.kernels)
    return Traffic(ours.cost, stock.cost, least, races)


def counted_run(case: Case, namespace, dtype: torch.dtype) -> int:
    """Runs the row forward and backward; returns the least bytes that it must move."""
    from torch.utils._python_dispatch import _disable_current_modes

    from fastnn.testing.meter import nbytes

    torch.manual_seed(0)
    with _disable_current_modes():  # count only what the call itself does
        side = side_of(case, namespace, dtype, "cpu")
        inputs = case.make(dtype, "cpu")
        options = {k: v(dtype, "cpu") if callable(v) else v for k, v in case.options.items()}
        first, *rest = inputs
        arguments = [first if case.view is None else case.view(first), *rest]
    saved: list[Tensor] = []

    def pack(t):
        saved.append(t)
        return t

    with (
        torch.autocast("cpu", dtype=case.autocast, enabled=case.autocast is not None),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        outs = tensors_of(side.call(*arguments, **({} if case.is_layer else options)))
    given = [*tensors_of(arguments), *side.parameters.values()]
    given += [] if case.is_layer else tensors_of(options)
    least = nbytes(*given, *outs)
    wanting = [t for t in outs if t.requires_grad]
    leaves = [t for t in (*tensors_of(inputs), *side.parameters.values()) if t.requires_grad]
    if wanting and leaves:
        with _disable_current_modes():
            upstream = [torch.ones_like(t) for t in wanting]
        grads = torch.autograd.grad(wanting, leaves, upstream, allow_unused=True)
        known = {t.data_ptr() for t in (*given, *outs)}
        again = {t.data_ptr(): t for t in saved if t.data_ptr() in known}
        least += nbytes(*upstream, *again.values(), *(g for g in grads if g is not None))
    return least


def viewing(view, call):
    return lambda x, *rest, **options: call(view(x), *rest, **options)


def assert_parity(
    case: Case, dtype: torch.dtype, device: str = "cpu", *, twice: bool = True
) -> Result:
    """Run `check`, and raise AssertionError with every difference if there is one.

    Returns the `Result`. The arguments are those of `check`.
    """
    result = check(case, dtype, device, twice=twice)
    if result.failures:
        lines: Sequence[str] = [f"{case} in {dtype}, path {result.path}:", *result.failures]
        raise AssertionError("\n  ".join(lines))
    return result
