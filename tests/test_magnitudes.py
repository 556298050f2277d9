"""Every pointwise op, norm, loss, softmax and distance over the whole range of its dtype.

Tensors have values from the smallest subnormal number to the largest finite number, with both
signs, and with one infinity or nan among them. The rule for each element of a result or gradient:

- It is finite where stock and float64, rounded to the dtype, are both finite.
- It is not finite where both are nan. If the inputs are finite, it is also not finite where neither
  of both is finite.
- If all tensors have one magnitude, its error is within the bound of `fastnn.testing`: twice the
  largest error of stock, plus one unit in the last place of the largest result. As there, a row
  beyond the bound is drawn again, and judged by the largest errors over 5 draws, and if need be
  over 25. Errors below the smallest normal number of float32 do not count.

Rows that are constant, nearly constant, or far from zero are also tested for each norm, with the
same bound.

`pytest` runs a share; `python -m tests.test_magnitudes` runs every filling of every tensor.
"""

import importlib
import math
import pkgutil
import re
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastnn
import fastnn.functional as F
from fastnn import kernels
from fastnn._mode import backend, decisions
from fastnn.ops import REGISTRY
from fastnn.testing import (
    Case,
    Comparison,
    Result,
    compare_unjudged,
    fresh_leaves,
    in_float64,
    over_draws,
    randn,
    run_side,
    side_of,
    tensors_of,
)
from fastnn.testing import cases as rows
from tests.marks import interpreted
from tests.parts import part

# Families of rows that are not swept, with the reason.
APART = {
    "attention": "products of matrices, whose sums overflow where stock's do",
    "dropout": "a product with a number that is drawn; tests/test_dropout.py has infinities",
    "embedding": "a copy",
    "embedding_bag": "sums of copies",
    "linear": "products of matrices, whose sums overflow where stock's do",
    "linear_cross_entropy": "products of matrices, whose sums overflow where stock's do",
    "multihead_attention": "products of matrices, whose sums overflow where stock's do",
    "recurrent": "products of matrices, whose sums overflow where stock's do",
    "transformer": "products of matrices, whose sums overflow where stock's do",
}
# Options that do not change the arithmetic.
SHAPES = {"reduction", "normalized_shape", "dim", "ignore_index", "keepdim", "inplace", "prenorm"}
SHAPES |= {"kernel_size", "stride", "padding", "dilation", "output_padding", "padding_mode"}
SHAPES |= {"in_channels", "out_channels", "bias"}


def _elements(case: Case) -> int:
    """Number of elements of the largest input; 0 if there is no input, or if it is not finite."""
    tensors = tensors_of(case.make(torch.float32, "cpu"))
    if not all(t.isfinite().all() for t in tensors):
        return 0
    return max((t.numel() for t in tensors), default=0)


def _family(name: str) -> str:
    """The name, without the number of dimensions if the kernels are the same for all."""
    return re.sub(r"(?i)^(lazy)?(conv.*)[123]d$", r"\2", name)


def _arithmetic(case: Case) -> tuple:
    """A key of the arithmetic. Rows with equal keys differ only in shapes and numbers."""
    options = [
        (k, v if isinstance(v, (str, bool, torch.dtype)) or k == "p" else None)
        for k, v in sorted(case.options.items())
        if k not in SHAPES and not k.startswith("num_")
    ]
    tensors = [isinstance(v, Tensor) for v in case.make(torch.float32, "cpu")]
    return _family(case.name), str(case.members), str(options), str(tensors)


def _chosen() -> dict[str, Case]:
    """For each op with each set of options, the row nearest to 100 elements, all finite."""
    found: dict[tuple, list[Case]] = {}
    for file in pkgutil.iter_modules(rows.__path__):
        if file.name in APART:
            continue
        for case in importlib.import_module(f"{rows.__name__}.{file.name}").CASES:
            plain = case.stock is None and case.autocast is None and case.view is None
            add = case.name.startswith("dropout_add")  # like dropout, unless nothing is drawn
            drawn = add and case.options.get("training", case.name == "dropout_add")
            if plain and rows.in_torch(case) and not case.options.get("inplace") and not drawn:
                found.setdefault(_arithmetic(case), []).append(case)

    def distance(case):
        return abs(math.log((_elements(case) + 1e-3) / 100))

    chosen = [min(cases, key=distance) for cases in found.values()]
    return {str(case): case for case in chosen if 0 < _elements(case) < 5000}


# ---- fillings of tensors ------------------------------------------------------------------------

Filling = Callable[[Tensor, torch.Generator], Tensor]


def _binades(dtype):
    """The exponents of two of the smallest subnormal number and of the largest finite number."""
    info = torch.finfo(dtype)
    return round(math.log2(info.smallest_normal * info.eps)), int(math.log2(info.max))


def _unit(x):
    """x in float64, scaled so that its largest element is just below 2. Times a power of two it
    stays finite."""
    x = x.double()
    return x / x.abs().max().clamp(min=1e-300) * (2 - 2**-7)


def _drawn(x, generator, shape):
    """x with a random magnitude of the whole range for each element of `shape`."""
    low, high = _binades(x.dtype)
    powers = torch.randint(low, high + 1, shape, generator=generator)
    return (_unit(x) * torch.exp2(powers.double())).to(x.dtype)


def each(x, generator):
    """Every element has another magnitude."""
    return _drawn(x, generator, x.shape)


def outer(x, generator):
    """The magnitude changes along the first dimension."""
    return _drawn(x, generator, (*x.shape[:1], *(1 for _ in x.shape[1:])))


def inner(x, generator):
    """The magnitude changes along all dimensions except the first."""
    return _drawn(x, generator, (1, *x.shape[1:]) if x.dim() > 1 else x.shape)


def scaled(part):
    """All elements have one magnitude, from the smallest to the largest as `part` goes from 0 to 1.
    Whether a sum of the largest numbers overflows depends on the order of its terms. These elements
    therefore add up to the largest number at most."""

    def fill(x, generator):
        low, high = _binades(x.dtype)
        most = math.ceil(math.log2(x.numel() + 1)) if x.numel() < 1000 else 0
        return (_unit(x) * 2.0 ** round(low + part * (high - most - low))).to(x.dtype)

    fill.__name__ = f"scaled({part:.2f})"
    return fill


def one(value):
    """Only one element changes."""

    def fill(x, generator):
        filled = x.clone()
        at = int(torch.randint(x.numel(), (), generator=generator))
        filled.view(-1)[at] = torch.finfo(x.dtype).max if value == "max" else value
        return filled

    fill.__name__ = f"one({value})"
    return fill


SCALES = [scaled(i / 12) for i in range(13)]
ONES = [one(value) for value in (math.inf, -math.inf, math.nan, "max")]
FILLINGS: list[Filling] = [each, each, outer, outer, inner, *SCALES, *ONES]


# ---- what is compared ---------------------------------------------------------------------------


def _sides(case: Case, dtype, filling: Filling, which: int | None, seed: int):
    """Ours, stock, float64 and their arguments, with tensor `which` or all tensors filled. None if
    there is no such tensor. Parameters of layers are filled too."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    inputs = case.make(dtype, "cpu")
    stock, ours = (side_of(case, n, dtype, "cpu") for n in (torch.nn, fastnn))
    kwargs = {}
    if not case.is_layer:
        kwargs = {k: v(dtype, "cpu") if callable(v) else v for k, v in case.options.items()}
    inputs, kwargs = fresh_leaves((inputs, kwargs))
    made = [*tensors_of((inputs, kwargs)), *stock.parameters.values()]
    made = [t for t in made if t.is_floating_point() and t.numel()]
    if which is not None and which >= len(made):
        return None
    with torch.no_grad():
        for t in made if which is None else [made[which]]:
            t.copy_(filling(t, generator))
    if case.is_layer:
        ours.call.load_state_dict(stock.call.state_dict())
    return ours, stock, in_float64(stock), inputs, kwargs


def _outside(error: Exception) -> bool:
    """Whether stock refuses the values of probabilities or of variances."""
    return "between 0 and 1" in str(error) or "negative entry" in str(error)


def compared(case: Case, dtype, filling: Filling, which: int | None, seed: int) -> Result | None:
    """The faults of a row with this filling, and its errors; None if stock refuses the row."""
    made = _sides(case, dtype, filling, which, seed)
    if made is None:
        return None
    ours, stock, exact, inputs, kwargs = made
    try:
        theirs = run_side(stock, fresh_leaves((inputs, kwargs)), "cpu")
        truth = run_side(
            exact, fresh_leaves((inputs, kwargs), torch.float64), "cpu", None,
            [u.double() for u in theirs.upstream],
        )  # fmt: skip
    except (RuntimeError, ValueError) as e:
        if _outside(e):
            return None
        raise
    with backend("triton"), decisions() as heard:
        mine = run_side(ours, fresh_leaves((inputs, kwargs)), "cpu", None, theirs.upstream)
    HEARD.update(op.name for op, _, _ in heard)
    finite = all(
        t.isfinite().all() for t in tensors_of((inputs, kwargs)) if t.is_floating_point()
    ) and all(p.isfinite().all() for p in stock.parameters.values())
    result = Result("kernel", None)
    for what, a in mine.named.items():
        b, c = theirs.named.get(what), truth.named[what]
        if b is None or not a.is_floating_point() or not a.numel():
            continue
        result.failures += [f"{what}: {w}" for w in _wrong(a, b, c, finite)]
        if filling.__name__.startswith("scaled"):
            result.comparisons += _errors(what, a, b, c)
    return result


HEARD: set[str] = set()  # the ops that were swept


def _floor(dtype):
    """Errors up to this size do not count: half a subnormal number, and the errors of intermediate
    values that are subnormal."""
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps / 2 + torch.finfo(torch.float32).smallest_normal


def _wrong(ours, stock, exact, finite: bool) -> list[str]:
    rounded = exact.to(stock.dtype).double()
    a, b = ours.double(), stock.double()
    both = b.isfinite() & rounded.isfinite()
    wrong = []

    def tell(where, what):
        if where.any():
            at = int(where.flatten().nonzero()[0])
            values = (t.flatten()[at].item() for t in (a, b, exact))
            wrong.append("{}: {:.4g} for stock's {:.4g}, float64's {:.4g}".format(what, *values))

    tell(both & ~a.isfinite(), "not finite where both are")
    tell(b.isnan() & exact.isnan() & a.isfinite(), "finite where both are nan")
    if finite:
        tell(~b.isfinite() & ~rounded.isfinite() & a.isfinite(), "finite where neither is")
    return wrong


def _errors(what, ours, stock, exact) -> list[Comparison]:
    """The largest errors at the elements where all sides are finite, with their bound."""
    good = stock.isfinite() & exact.to(stock.dtype).isfinite() & ours.isfinite()
    a, b, c = ours[good].double(), stock[good].double(), exact[good]
    # If float64 gives only zeros, rounding made them.
    if not c.numel() or not c.any():
        return []
    its, unit = (b - c).abs().max().item(), torch.finfo(stock.dtype).eps * c.abs().max().item()
    bound = 2 * its + unit + _floor(stock.dtype)
    return [Comparison(what, (a - c).abs().max().item(), its, bound, c.numel())]


# ---- what differs, and why it stays -------------------------------------------------------------
#
# (row, filling, words of the fault, reason); docs/magnitudes.md lists them for users.

VECTORS = "CUDA's branch: `x <= 0` is false of nan. The CPU's vector code takes the other one"
UNREAD = "a row whose target is ignored is not read: its gradient is 0"
ALPHA = "the CPU multiplies x by rstd * weight, and has inf - inf; CUDA has an infinity"
MASS = "class probabilities whose sum passes the largest number: the kernel keeps the sum itself"
ORDER = "factors and terms near the largest number: the order of products decides, in stock too"
TINY = "the product of the incoming gradient and an input is subnormal, and rounded to the dtype"
OUTSIDE = "a matrix product multiplies the zeros of the padding, too, as cuDNN does; a CPU does not"
PRODUCTS = r"[Cc]onv(?!.*groups)"
THRESHOLD = "CUDA rounds the threshold to the dtype (docs/scalars.md); the CPU does not"
EXPONENT = (
    "the exponent of a power is float32, as on CUDA; the CPU computes with a float64 exponent"
)

LISTED: list[tuple[str, str, str, str]] = [
    ("Threshold|threshold", r"scaled\(0\.50", "beyond the bound", THRESHOLD),
    # pow(b, 1 / p): a rounded exponent costs |log b| units in the last place, up to 87
    (r"(LPPool|lp_pool).*3\.5", r"scaled", "beyond the bound", EXPONENT),
    (
        "RMSNorm|rms_norm|LayerNorm|layer_norm|dropout_add|conv_batch_norm",
        r"one\(max",
        "finite where neither is",
        ORDER,
    ),
    (
        "ELU|CELU|SELU|Hardswish|elu|.*activation=(elu|hardswish)",
        r"one\(nan",
        r"grad of input \d: finite where both are nan",
        VECTORS,
    ),
    (
        "CrossEntropy|cross_entropy|nll_loss|NLLLoss",
        r"one\((-?inf|nan)",
        "grad .* finite where",
        UNREAD,
    ),
    (
        "(conv_)?batch_norm|BatchNorm|instance_norm|InstanceNorm",
        r"one\(-?inf",
        "finite where both are nan",
        ALPHA,
    ),
    (
        "batch_norm|BatchNorm|group_norm|GroupNorm|instance_norm|InstanceNorm",
        r"one\(max|each|outer|inner|scaled\(1.00",
        "not finite where both are",
        ORDER,
    ),
    (
        "CrossEntropyLoss|cross_entropy",
        r"each|outer|inner|scaled\(1.00|one\(max",
        "not finite where",
        MASS,
    ),
    (PRODUCTS, r"one\((-?inf|nan)", "not finite where both are", OUTSIDE),
    (
        "[Bb]ilinear",
        r"one\(max|each|outer|inner|scaled\(1.00",
        "grad of input 0: not finite where both are",
        ORDER,
    ),
    ("Bilinear|bilinear", r"scaled\(0\.00", "beyond the bound", TINY),
    ("[Cc]onv", r"one\(max|each|outer|inner|scaled\(1.00", "not finite where both are", ORDER),
    # nan in one order of terms, and -inf in the other, of which relu makes 0
    ("conv_", r"scaled\((0\.[89]|1)", "not finite where both are: nan", ORDER),
    ("CosineSimilarity", r"scaled", "beyond the bound", "products of what is below eps underflow"),
]


def _reason(name: str, filling: Filling, told: str) -> str | None:
    for rows_, fillings, words, why in LISTED:
        if (
            re.match(rows_, name)
            and re.match(fillings, filling.__name__)
            and re.search(words, told)
        ):
            return why
    return None


CHOSEN = _chosen()


def _share(number: int):
    """(filling, tensor or None for all, seed): the share of a row that `pytest` runs. Each row has
    another share."""
    yield each, None, number
    yield outer, None, number
    for i in range(number % 3, len(SCALES), 3):
        yield SCALES[i], None, i
    for i in range(number % 2, len(ONES), 2):
        yield ONES[i], None, number
    for which in range(3):
        one_of = [each, inner, *SCALES, *ONES]
        yield one_of[(7 * number + 5 * which) % len(one_of)], which, number


def _all():
    for k, filling in enumerate(FILLINGS):
        for which in (None, 0, 1, 2, 3, 4):
            yield filling, which, k


def _beyond(first: Result, case: Case, *rest) -> list[str]:
    """Which errors are beyond their bound, over as many draws as `fastnn.testing` makes."""
    results, told = [first], [c.failure for c in first.comparisons if c.failure]
    *how, seed = rest
    for draws in (5, 25):
        if told:
            again = [compared(case, *how, seed + 100 * k) for k in range(len(results), draws)]
            results += [r for r in again if r is not None]
            told = [c.failure for c in over_draws(results) if c.failure]
    return [t.replace(" from float64", " from float64, beyond the bound", 1) for t in told]


def swept(name: str, share) -> tuple[int, list[str], list[str]]:
    """(number of runs, faults, listed differences) of a row; dtypes take turns."""
    case = CHOSEN[name]
    dtypes = [d for d in case.dtypes if d in fastnn.testing.FLOATS]
    runs, faults, listed = 0, [], []
    for turn, (filling, which, seed) in enumerate(share):
        dtype = dtypes[(turn + seed) % len(dtypes)]
        found = compared(case, dtype, filling, which, seed)
        if found is None:
            continue
        runs += 1
        failed = found.failures + _beyond(found, case, dtype, filling, which, seed)
        for told in failed:
            why = _reason(name, filling, told)
            line = f"{filling.__name__} of {'all' if which is None else which} in {dtype}: {told}"
            (faults if why is None else listed).append(line if why is None else why)
    return runs, faults, listed


@interpreted
@pytest.mark.parametrize("number", range(len(CHOSEN)), ids=list(CHOSEN))
def test_magnitudes(number, record_property):
    runs, faults, listed = swept(list(CHOSEN)[number], _share(number))
    record_property("magnitudes", [("compared", runs), ("listed differences", len(listed))])
    assert runs and not faults, "\n".join(faults)


@interpreted
def test_every_op_is_swept_or_said_why_not():
    HEARD.clear()
    for name in CHOSEN:
        swept(name, [(SCALES[6], None, 0)])
    heard = {_family(name) for name in HEARD}
    for name, op in REGISTRY.items():
        assert _family(name) in heard or op.fused.__module__.split(".")[-1] in APART, name


# ---- rows that are difficult for a norm ---------------------------------------------------------

NORMS = [n for n, c in CHOSEN.items() if re.search("[nN]orm", n) and "add_relu" not in n]
CENTRES = (12345.6, -0.7)


def constant(x, centre):
    return torch.full_like(x, centre)


def nearly(x, centre):
    """Values one or two units in the last place beside `centre`."""
    step = torch.finfo(x.dtype).eps * 2.0 ** math.floor(math.log2(abs(centre)))
    return constant(x, centre) + x.sign() * (1 + (x.abs() > 1)) * step


def far(x, centre):
    return x + centre


PATHS = ("whole", "long", "split")


@interpreted
@pytest.mark.parametrize("number", range(len(NORMS)), ids=NORMS)
def test_rows_that_are_constant_or_far_from_zero(number, monkeypatch, record_property):
    """The rows of a norm take its paths in turn."""
    _trouble(NORMS[number], PATHS[number % 3], monkeypatch, record_property)


@interpreted
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", [
    Case("layer_norm", (randn(3, 1000), (1000,), randn(1000), randn(1000))),
    Case("batch_norm", (randn(3, 2, 70), None, None, randn(2), randn(2), True)),
    Case("group_norm", (randn(2, 4, 70), 2, randn(4), randn(4))),
    Case("instance_norm", (randn(1, 2, 150),)),
    Case("instance_norm", (randn(3, 2, 150), None, None, randn(2), randn(2))),
], ids=str)  # fmt: skip
def test_wide_rows_that_are_constant_or_far_from_zero(case, path, monkeypatch, record_property):
    monkeypatch.setitem(CHOSEN, str(case), case)
    _trouble(str(case), path, monkeypatch, record_property)


def _trouble(name, path, monkeypatch, record_property):
    if path != "whole":
        monkeypatch.setattr(kernels.norm, "ROW", 0)
        monkeypatch.setattr(kernels.norm, "ROW_BWD", 0)
        monkeypatch.setattr(kernels._rows, "BLOCK", 32)
        monkeypatch.setattr(kernels._rows, "PROGRAMS", 1 if path == "long" else 32)
        monkeypatch.setattr(kernels.channel_norm, "WHOLE", 0)
        monkeypatch.setattr(kernels.channel_norm, "WHOLE_BWD", 0)
        monkeypatch.setattr(kernels.channel_norm, "TILE", 64)
        monkeypatch.setattr(kernels.channel_norm, "PROGRAMS", 1 if path == "long" else 32)
    case, runs = CHOSEN[name], 0
    dtype = case.dtypes[len(name) % len(case.dtypes)]
    for filling in (constant, nearly, far):
        results, failures = [], ["none drawn"]
        for seed in range(5):  # as in `fastnn.testing`: beyond its bound, more draws
            if seed > 0 and not failures:
                break
            for centre in CENTRES:
                sides = _sides(case, dtype, lambda x, _, f=filling, c=centre: f(x, c), 0, seed)
                done = compare_unjudged(*sides, "cpu", "triton", None, False, twice=False)
                results.append(done)
                runs += 1
            # Results of a norm are of order 1, so this is a unit in the last place of 1.
            unit = torch.finfo(torch.float32).eps
            failures = [failure for r in results for failure in r.failures] + [
                f"{c.what}: {c.ours:.3g} from float64, bound {c.bound:.3g}"
                for c in over_draws(results)
                if c.ours > c.bound + unit
            ]
        assert not failures, f"{filling.__name__} in {dtype}: " + "; ".join(failures)
    record_property("magnitudes", [("compared", runs)])


@interpreted
@pytest.mark.parametrize(
    ("x", "options", "dy", "wanted"),
    [
        ([0.0, 0.0], {"eps": 1e-39}, [0.1, -0.1], [1e38, -1e38]),
        ([1e-39, 1e-39], {"eps": 0.0, "p": 1.0}, [1e-5, 0.0], [2.5e33, -2.5e33]),
        ([1e38, 2e38], {"p": 1.0}, [3e38, 0.0], [2 / 3, -1 / 3]),
    ],
)
def test_the_gradient_of_normalize_divides_by_lengths_of_any_size(x, options, dy, wanted):
    x = torch.tensor([x], requires_grad=True)
    with backend("triton"):
        F.normalize(x, **options).backward(torch.tensor([dy]))
    assert torch.allclose(x.grad, torch.tensor([wanted]), rtol=1e-6, atol=0)


if __name__ == "__main__":
    from fastnn.testing import interpreter

    interpreter.install()
    torch.set_num_threads(1)
    total = 0
    for name in part(CHOSEN, sys.argv):  # --part K/N
        runs, faults, listed = swept(name, _all())
        total += runs
        told = f"{runs} runs, {len(listed)} listed differences, {len(faults)} faults"
        print(f"{name}: {told}", *faults, sep="\n    ", flush=True)
    print(f"{total} runs; ops: {', '.join(sorted(HEARD))}")
