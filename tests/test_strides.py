"""Each tensor argument of an op, in turn in every layout that a user's tensor may have.

The op calls of the parity rows are made again with a new layout of one argument (an input,
parameter, index, target, mask, weight or statistic) or of the incoming gradients. The calls are
forced onto kernels, and every access is checked. The memory around a view holds nans or invalid
indices. `python -m tests.test_strides all` makes all calls, `pytest` one for each op, argument and
layout.
"""

import functools
import math
import mmap
import sys
import time
from collections import Counter
from contextlib import nullcontext
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import fastnn
from fastnn import kernels
from fastnn import testing as parity
from fastnn._function import Function
from fastnn._mode import Stock, backend
from fastnn._strides import is_dense
from fastnn.ops import REGISTRY
from fastnn.testing import meter
from fastnn.testing.cases import CASES
from fastnn.testing.noise import recording, replaying
from tests.calls import CANCELS, Call, Upstream, differences, forced, recorded
from tests.marks import interpreted
from tests.parts import part

# ---- Layouts: a tensor -> (a tensor like it, the memory that holds it), or None ------------------


def _poison(t: Tensor):
    """The value that lies beside a view of this dtype, and that nothing may read or write."""
    if t.dtype == torch.bool:
        return True
    return math.nan if t.is_floating_point() else torch.iinfo(t.dtype).max // 2


def column(t: Tensor):
    """Every third element of a larger tensor."""
    base = t.new_full((*t.shape, 3), _poison(t))
    view = base[..., 1]
    view.copy_(t)
    return view, base


def rows(t: Tensor):
    """Rows of a wider tensor."""
    if not t.dim():
        return None
    base = t.new_full((*t.shape[:-1], t.shape[-1] + 3), _poison(t))
    view = base[..., 1:-2]
    view.copy_(t)
    return view, base


def expanded(t: Tensor):
    """One element, expanded to the whole shape."""
    if t.numel() < 2:
        return None
    base = t.new_full((3,), _poison(t))
    base[1] = t.flatten()[0]
    return base[1].expand(t.shape), base


def spread(t: Tensor):
    """The first slice of the first dimension, expanded along that dimension."""
    if t.dim() < 2 or t.numel() < 2:
        return None
    base = t[:1].clone()
    return base.expand(t.shape), base


def transposed(t: Tensor):
    """The dimensions in the opposite order in memory."""
    if t.dim() < 2:
        return None
    base = t.permute(*reversed(range(t.dim()))).contiguous()
    return base.permute(*reversed(range(t.dim()))), base


def offset(t: Tensor):
    """One element past an aligned address."""
    base = t.new_full((t.numel() + 2,), _poison(t))
    view = base[1:-1].view(t.shape)
    view.copy_(t)
    return view, base


def odd(t: Tensor):
    """Unusual strides of dimensions of size 1, and of a single element."""
    if 1 not in t.shape:
        return None
    strides = [7 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)]
    base = t.clone(memory_format=torch.contiguous_format)
    return base.as_strided(t.shape, strides), base


def single(t: Tensor):
    """An unusual stride of a single element; `attempts` makes a call of single elements for it."""
    return odd(t) if t.dim() and t.numel() == 1 else None


def channels_last(t: Tensor):
    if t.dim() not in (4, 5):
        return None
    format = torch.channels_last if t.dim() == 4 else torch.channels_last_3d
    base = t.clone().contiguous(memory_format=format)
    return base, base


@functools.cache
def _address_space() -> mmap.mmap:
    """32 GiB of zeros, of which only the pages that are written to take memory."""
    no_reserve = 0x4000  # MAP_NORESERVE of Linux, which has a name since Python 3.13
    return mmap.mmap(-1, 1 << 35, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)


def _apart(t: Tensor, dim: int):
    """Elements of `dim` so far apart that 32 bits do not hold the offset of the last one, and if
    there is room, of all but the first two."""
    if t.dtype == torch.float64:  # the reference, for which strides do not matter
        return t, t
    strides, n = [0] * t.dim(), 1
    for d in reversed([d for d in range(t.dim()) if d != dim]):
        strides[d], n = n, n * t.shape[d]
    last, room = t.shape[dim] - 1, len(_address_space()) // t.element_size()
    # 32 bits hold the stride itself, or a kernel would be compiled for strides of 64 bits.
    strides[dim] = max(n, -(-(2**31) // last), min(2**30, (room - n) // last))
    flat = torch.frombuffer(_address_space(), dtype=t.dtype, count=n + last * strides[dim])
    view = flat.as_strided(t.shape, strides)
    return view.copy_(t), view


def outer_apart(t: Tensor):
    """The first dimension of more than one element, with a stride that passes 32 bits."""
    dims = [d for d, size in enumerate(t.shape) if size > 1]
    return _apart(t, dims[0]) if dims else None


def inner_apart(t: Tensor):
    """The last such dimension."""
    dims = [d for d, size in enumerate(t.shape) if size > 1]
    return _apart(t, dims[-1]) if len(dims) > 1 else None


LAYOUTS = (column, rows, expanded, spread, transposed, offset, odd, single, channels_last)
FAR = (outer_apart, inner_apart)
GRADIENTS = "incoming gradients"

# pytest makes one of so many calls of these ops, because an interpreted call takes long.
SHARE = {"multi_head_attention_forward": 4}
SHARE |= {f"conv{kind}{dims}d": 6 for kind in ("", "_transpose") for dims in (1, 2, 3)}
SHARE |= {"conv_act": 6, "conv_batch_norm_act": 9}

PACKED = ("lstm", "gru", "rnn_tanh", "rnn_relu")

# Differences from stock that stay, by op and words of the difference: see docs/design.md.
KNOWN = {
    (
        "dropout",
        "strides",
    ): "empty_like on CUDA, as here, keeps odd strides of size 1; a CPU does not",
    ("nll_loss", "grad_input must be contiguous"): "stock rejects channels last in its backward",
    ("batch_norm", "grad of input: finite"): "stock reads a strided weight as dense on a CPU",
    **{
        (op, "exceeds dimension size"): "stock reads strided sizes of a packed sequence as dense"
        for op in PACKED
    },
    ("gru_cell", "output 0: strides"): "as on CUDA, dense; a CPU may take the strides of hx",
    (
        "binary_cross_entropy_with_logits",
        "(stock is 0 away)",
    ): "stock adds a tiny term to 1",
    ("logsigmoid", "output 0: strides"): "contiguous on a CPU; as the input on CUDA, and here",
    **{
        (f"max_unpool{d}d", "view size is not compatible"): "stock rejects indices without a view"
        for d in "23"
    },
}


# On a CPU stock takes channels-last gradients of one sample of instance_norm for dense ones.
WRONG_ON_A_CPU = "instance_norm", GRADIENTS, "channels_last", "grad of input"


def _known(name, difference):
    return any(op == name and words in difference for op, words in KNOWN)


def _float32_mean(name, call, difference):
    """Whether it is a running mean whose error is at most one unit in the last place of the largest
    term: instance_norm adds up in float32, as on CUDA; a CPU adds up in float64."""
    if name != "instance_norm" or not difference.startswith("running_mean afterwards: "):
        return False
    term = call.arguments["input"].abs().max().item() * call.arguments.get("momentum", 0.1)
    return float(difference.split()[2]) <= torch.finfo(torch.float32).eps * term


def _listed(name, argument, layout, difference, call):
    """Whether docs/design.md gives the reason of this difference."""
    op, gradients, last, words = WRONG_ON_A_CPU
    if (name, argument, layout) == (op, gradients, last):
        if difference.startswith(words):
            return True
    if layout == "single" and ": strides " in difference:
        return True
    if layout == "expanded" and difference.endswith(CANCELS):
        return True
    if name in PACKED and layout in [far.__name__ for far in FAR]:
        sizes = call.arguments.get(argument)  # stock reads them as dense
        if isinstance(sizes, Tensor) and not sizes.is_floating_point():
            return True
    return _float32_mean(name, call, difference) or _known(name, difference)


def _of_single_elements(calls: list[Call]) -> list[Call]:
    """The calls with every size 1, one of each kind. `.contiguous()` keeps any strides of a single
    element. Integers are 0, which is a class and a place of all tensors."""
    found: dict = {}
    for call in calls:
        made = {}
        for k, t in call.tensors().items():
            one = t[(slice(1),) * t.dim()].clone(memory_format=torch.contiguous_format)
            made[k] = one if t.dtype == torch.bool or t.is_floating_point() else one * 0
        if all(t.numel() for t in made.values()):
            ones = call.with_(**made)
            found.setdefault(ones.kind(), ones)
    return list(found.values())


def attempts(name: str, layouts=LAYOUTS):
    """All (argument, layout, the calls of the op that have such an argument)."""
    every = recorded().get(name, [])
    ones = _of_single_elements(every)
    arguments = sorted({argument for call in every for argument in call.tensors()})
    for argument in (*arguments, GRADIENTS):
        for layout in layouts:
            calls = ones if layout is single else every
            if argument == GRADIENTS:
                those = [c for c in calls if c.wanting]
            else:
                those = [c for c in calls if argument in c.tensors()]
                those = [c for c in those if layout(c.arguments[argument]) is not None]
            yield argument, layout, those


def _again(layout):
    """The layout for incoming gradients, whose shapes are known later. If the layout does not apply
    to a gradient, the gradient stays as it is."""
    return lambda t: layout(t) or (t, t)


def run(call: Call, argument: str, layout):
    with meter.traffic(distinct=False):
        if argument == GRADIENTS:
            return differences(call, {}, _again(layout))
        return differences(call, {argument: layout})


def sweep(name: str, every: bool, layouts=LAYOUTS):
    counts: Counter = Counter()
    wrong, stock = [], []
    for n, (argument, layout, calls) in enumerate(attempts(name, layouts)):
        if not calls:
            counts["not possible"] += 1
            continue
        if not every and n % SHARE.get(name, 1):
            counts["left out of pytest"] += 1
            continue
        start = n % min(len(calls), 4)  # the smallest calls in turn
        for call in calls[start:] + calls[:start]:
            path, found = run(call, argument, layout)
            counts[path if path in ("kernel", "error") else "stock"] += 1
            if path not in ("kernel", "error"):
                stock.append((argument, layout.__name__, path))
            layout_name = layout.__name__
            listed = [w for w in found if _listed(name, argument, layout_name, w, call)]
            if listed:
                counts["differs as docs say"] += 1
            found = [w for w in found if w not in listed]
            wrong += [f"{argument}, {layout.__name__}: {w}   [{call.row}]" for w in found]
            if path == "kernel" and not every:
                break
            if not every and counts["stock"] > 40:
                break
    return counts, wrong, stock


@interpreted
@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_arguments_in_every_layout(name, record_property):
    counts, wrong, _ = sweep(name, every=False)
    record_property("strides", tuple(counts.items()))
    assert not wrong, "\n".join(wrong)
    assert counts["kernel"], f"{name}: no row has it on kernels"


@interpreted
@pytest.mark.parametrize("number", range(len(REGISTRY)), ids=sorted(REGISTRY))
def test_elements_that_are_further_apart_than_32_bits_count(number, record_property):
    """One of the two layouts for each op; `python -m tests.test_strides far` has both."""
    name = sorted(REGISTRY)[number]
    counts, wrong, _ = sweep(name, every=False, layouts=FAR[number % 2 :][:1])
    record_property("strides", tuple(counts.items()))
    assert not wrong, "\n".join(wrong)
    assert counts["kernel"] or name in SHARE, f"{name}: no row has it on kernels"


def _meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def _classes(count):
    return _meta(1, count), _meta(1, dtype=torch.int64)


def _recurrent(width):
    """Arguments of an RNN of so many hidden units."""
    weights = _meta(width, 3), _meta(width, width)
    return _meta(2, 1, 3), _meta(1, 1, width), weights, False, 1, 0.0, False, False, False


# Calls of which kernels would count something in 32 bits that these do not hold.
# The smallest sizes that run on PyTorch: with one element more of a tile, 32 bits would overflow.
LARGE = {
    "conv2d": (_meta(1, 2**16, 1, 1), _meta(2**15, 2**16, 1, 1)),
    "cosine_similarity": (_meta(1, 2**30), _meta(1, 2**30)),
    "cross_entropy": _classes(2**30),
    "linear": (_meta(256, 8), _meta(2**23 + 1, 8)),
    "log_softmax": (_meta(2**30), 0),
    "multi_margin_loss": _classes(2**30),
    "nll_loss": _classes(2**30),
    "normalize": (_meta(1, 2**30),),
    "prelu": (_meta(1, 2**31), _meta(2**31)),
    "rnn_tanh": _recurrent(2**16),
    "softmax": (_meta(1, 2**30), 1),
}


@pytest.mark.parametrize("name", LARGE)
def test_sizes_that_32_bits_do_not_count_run_stock(name):
    declined = REGISTRY[name].fused(*LARGE[name])
    assert isinstance(declined, Stock) and declined.code == "size", declined


@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_of_many_channels_are_narrow_enough_for_32_bits(itemsize):
    for channels in (3, 128, 2**20, 2**26 + 1, 2**27, 2**28, 2**31 - 1):
        config = kernels.prelu.tile_config(16, channels, 1, itemsize)
        assert (config["BLOCK_R"] - 1) * channels + config["BLOCK_K"] < 2**31
        assert config["BLOCK_R"] * config["BLOCK_K"] * itemsize == 4096


@interpreted
def test_the_gradient_of_a_mask_whose_rows_are_far_apart():
    """The kernel writes to rows of as many elements as there are keys, which may be 2**24."""
    q, k, v, dout = torch.randn(4, 1, 1, 16, 8)
    mask = torch.zeros(1, 1, 16, 16)
    out, stats = kernels.attention.fwd(q, k, v, mask, scale=0.5)
    near, apart = torch.zeros(16, 16), outer_apart(torch.zeros(16, 16))[0]
    for dmask in (near, apart):
        kernels.attention.bwd(
            dout, q, k, v, mask, out, stats, scale=0.5, dmask=dmask[None, None],
            want=(False, False, False),
        )  # fmt: skip
    assert torch.equal(near, apart) and near.any()


# ---- Layers whose parameters are views -----------------------------------------------------------

LAYERS = {
    case.name: case
    for case in reversed(CASES)
    if case.is_layer and case.stock is None and case.autocast is None and case.view is None
    and torch.float32 in case.dtypes
    # These are made of layers that are there.
    and case.name not in ("Transformer", "TransformerEncoder", "TransformerDecoder")
}  # fmt: skip


@interpreted
@pytest.mark.parametrize("name", sorted(LAYERS))
def test_layers_with_parameters_that_are_views(name):
    """`torch.func.functional_call` and parametrisations give such parameters."""
    case = LAYERS[name]
    torch.manual_seed(0)
    inputs = case.make(torch.float32, "cpu")
    ours, stock = (parity.side_of(case, n, torch.float32, "cpu") for n in (fastnn, torch.nn))
    if not ours.parameters:
        pytest.skip("a layer without parameters")
    stock.call.load_state_dict(ours.call.state_dict())

    def called(side, layout):
        parity.seed("cpu")
        views = {k: (layout(p.detach()) or (p.detach(), p))[0] for k, p in side.parameters.items()}
        views = {k: v.requires_grad_() for k, v in views.items()}
        given = [v.detach().clone() if isinstance(v, Tensor) else v for v in inputs]
        out = torch.func.functional_call(side.call, views, tuple(given))
        outs = [t for t in parity.tensors_of(out) if t.requires_grad]
        sum(t.sum() for t in outs).backward()
        return [*(t.detach() for t in parity.tensors_of(out)), *(v.grad for v in views.values())]

    ran = 0
    for layout in (column, expanded, rows):
        try:
            with backend("triton"), recording() as draws, meter.traffic(distinct=False):
                got = called(ours, layout)
        except fastnn.BackendError as e:  # of the one that strides decline
            assert "a weight of strides" in str(e)
            continue
        ran += 1
        with replaying(draws):
            want = called(stock, layout)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert ran


@interpreted
@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_saved_tensors_that_hooks_give_back_in_other_strides(name):
    """A hook of saved tensors may return any strides. Kernels of a backward rely on their own."""
    call = next((c for c in recorded().get(name, ()) if c.wanting), None)
    if call is None:
        pytest.skip("no row takes a gradient")
    hooks = torch.autograd.graph.saved_tensors_hooks
    for change in (lambda t: column(t)[0], lambda t: transposed(t)):
        results = []
        for hooked in (False, True, True, True):  # a call, one that is recorded, one replayed
            around = (
                hooks(lambda t: t, lambda t, c=change: c(t.detach())) if hooked else nullcontext()
            )
            with around, meter.traffic(distinct=False):
                outcome, _ = forced(call, {}, upstream=Upstream(0))
            if outcome.values is None:
                pytest.skip(f"the call runs stock: {outcome.reason or outcome.error}")
            results.append(outcome.values)
        first, *others = results
        for other in others:
            assert all(torch.equal(other[k].nan_to_num(), v.nan_to_num()) for k, v in first.items())


class _Optional(Function):
    """x -> x, or x twice. `backward` notes what it is given."""

    heard: ClassVar[list] = []

    @staticmethod
    def forward(ctx, x, twice):
        y = x.clone()
        if twice:
            ctx.set_materialize_grads(False)
        return (y, x.clone()) if twice else y

    @staticmethod
    def backward(ctx, dy, more=None):
        _Optional.heard.append([g if g is None else is_dense(g) for g in (dy, more)])
        given = [g for g in (dy, more) if g is not None]
        return sum(given[1:], given[0]), None


@pytest.mark.parametrize("twice", [False, True])
def test_a_gradient_may_be_optional(twice):
    """It is made dense where there is one. A forward with one result needs no zeros for it."""
    x = torch.randn(3, 4, requires_grad=True)
    outs = _Optional.apply(x, twice)
    outs = outs if twice else (outs,)
    apart = torch.randn(3, 8)[:, ::2]
    for wanted in ([0], [1], [0, 1]) if twice else ([0],):
        _Optional.heard.clear()
        (dx,) = torch.autograd.grad([outs[i] for i in wanted], x, [apart] * len(wanted),
                                    retain_graph=True)  # fmt: skip
        assert torch.equal(dx, apart * len(wanted))
        assert _Optional.heard == [[True if i in wanted else None for i in (0, 1)]]
    if not twice:
        _Optional.heard.clear()
        nothing = _Nothing.apply(outs[0])
        assert torch.autograd.grad(nothing, x, torch.ones(3, 4), allow_unused=True) == (None,)
        assert not _Optional.heard


class _Nothing(torch.autograd.Function):
    """x -> x without a gradient of it."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


def transposed(t: Tensor) -> Tensor:
    """The same values in memory of the reverse order of dimensions."""
    return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))


@interpreted
@pytest.mark.parametrize("name", ["split_features", "act_glu"])
@pytest.mark.parametrize(
    "layout", ["every second", "backwards in memory", "one column", "expanded"]
)
def test_a_bias_that_the_input_contains_may_be_a_view(name, layout):
    """It gets the gradient, and only its length and dtype count."""
    torch.manual_seed(0)
    x = torch.randn(5, 12)
    bias = {
        "every second": lambda: torch.randn(24)[::2],
        "backwards in memory": lambda: torch.randn(12, 2).t()[1],
        "one column": lambda: torch.randn(12, 3)[:, 1],
        "expanded": lambda: torch.randn(1).expand(12),
    }[layout]()
    assert not bias.is_contiguous()
    found = []
    function = getattr(fastnn.functional, name)
    for call, b in ((function, bias), (function, bias.contiguous()), (function.op.stock, bias)):
        mine, b = x.clone().requires_grad_(), b.detach().requires_grad_()
        with backend("torch" if call is function.op.stock else "triton"):
            out = call(mine, input_bias=b)
            parts = out if isinstance(out, tuple) else (out,)
            grads = torch.autograd.grad([p.sin().sum() for p in parts], (mine, b))
        found.append([*(p.detach() for p in parts), *grads])
    for view, dense, its in zip(*found, strict=True):
        assert torch.equal(view, dense)
        torch.testing.assert_close(view, its)


if __name__ == "__main__":
    from fastnn.testing import interpreter

    interpreter.install()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    total: Counter = Counter()
    names = part(sorted(REGISTRY), sys.argv)  # --part K/N
    for name in sys.argv[2:] or names:
        start = time.process_time()
        far = sys.argv[1:2] == ["far"]
        every = sys.argv[1:2] == ["all"]
        counts, wrong, stock = sweep(name, every, FAR if far else LAYOUTS)
        total += counts
        print(f"{name}: {dict(counts)} in {time.process_time() - start:.1f} s", flush=True)
        for line in wrong:
            print("   ", line)
        for line, k in Counter(stock).items():
            print("    stock:", k, *line)
    print(dict(total))
