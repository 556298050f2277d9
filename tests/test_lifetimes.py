"""What a call keeps for its backward, how long, and who may see it or touch it: as stock has it.

Every row that runs on kernels is a subject: functions, layers, Sequentials with fused neighbours,
attention and transformer layers. `pytest` runs a share of them, which has every name in it, and
edits inputs of a fourth of that; `python -m tests.test_lifetimes` runs all, in all their dtypes.

Storages are told apart by weak references that C++ keeps, and every operator's result is among
them, so that it does not matter whether a tensor is held by autograd, by an attribute or a cycle.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when fastnn is imported

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import Node, save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

import fastnn
from fastnn import _mode
from fastnn._mode import BackendError, backend
from fastnn.testing import Case, fresh_leaves, seed, side_of, tensors_of, viewing
from fastnn.testing.cases import CASES
from tests.parts import part

# ---- Storages -----------------------------------------------------------------------------------


class Made(NamedTuple):
    """A storage, and how it was made."""

    nbytes: int
    itemsize: int
    how: str


def nbytes(storages: Iterable[Made]) -> int:
    return sum(s.nbytes for s in storages)


class Storages(TorchDispatchMode):
    """Knows each storage that an operator made in the block, and whether it is still alive.

    Storages of `given` tensors do not count. fastnn's dispatch does not see this mode, and this
    mode does not see the interpreter's own operators.
    """

    def __init__(self, given: Iterable[Tensor]):
        super().__init__()
        self.known: dict[int, tuple[StorageWeakRef, Made]] = {}
        self.given = {t.untyped_storage()._cdata for t in given}
        self.patch = pytest.MonkeyPatch()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        taken = {t.untyped_storage()._cdata for t in tensors_of((args, kwargs))}
        for t in tensors_of(out):
            if t.untyped_storage()._cdata not in taken:  # else a view
                self.note(t, func)
        return out

    def note(self, t: Tensor, func) -> None:
        storage = t.untyped_storage()
        # The weak reference keeps the address from being given to another one.
        if storage._cdata not in self.known and storage._cdata not in self.given:
            made = Made(storage.nbytes(), t.element_size(), f"{func} {tuple(t.shape)} {t.dtype}")
            self.known[storage._cdata] = StorageWeakRef(storage), made

    def __enter__(self):
        if _mode.INTERPRET:
            from triton.runtime import interpreter

            launch = interpreter.GridExecutor.__call__

            def call(*args, **kwargs):
                with _disable_current_modes():
                    return launch(*args, **kwargs)

            self.patch.setattr(interpreter.GridExecutor, "__call__", call)
        self.patch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
        return super().__enter__()

    def __exit__(self, *exc):
        super().__exit__(*exc)
        self.patch.undo()

    def alive(self, *but: Tensor) -> list[Made]:
        """Those that are alive, but for the storages of some tensors."""
        left_out = {t.untyped_storage()._cdata for t in but}
        return [
            made
            for cdata, (ref, made) in self.known.items()
            if cdata not in left_out and not ref.expired()
        ]


@contextmanager
def no_collector() -> Iterator[None]:
    """What a cycle holds stays, and is seen."""
    gc.collect()
    gc.freeze()  # so that collections from now on look at new objects alone
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()


# ---- A row's calls ------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """A case in one dtype, of which ours and stock's calls are made as often as need be."""

    case: Case
    dtype: torch.dtype
    device: str

    def __post_init__(self):
        torch.manual_seed(0)
        case, dtype, device = self.case, self.dtype, self.device
        self.inputs = case.make(dtype, device)
        self.options = {}
        if not case.is_layer:
            self.options = {
                k: v(dtype, device) if callable(v) else v for k, v in case.options.items()
            }
        stock, ours = (side_of(case, n, dtype, device).call for n in (torch.nn, fastnn))
        if case.is_layer:
            ours.load_state_dict(stock.state_dict())
        self.sides = {True: ours, False: stock}

    def call(self, ours: bool) -> Call:
        side = self.sides[ours]
        side = copy.deepcopy(side) if self.case.is_layer else side
        inputs, options = fresh_leaves((tuple(self.inputs), self.options))
        return Call(self, ours, side, list(inputs), options)


@dataclasses.dataclass
class Call:
    """One side of a row, with tensors of its own, not yet run."""

    row: Row
    ours: bool
    side: Any
    inputs: list
    options: dict

    @property
    def given(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        found = {f"input {i}": t for i, t in enumerate(self.inputs) if isinstance(t, Tensor)}
        found |= {f"option {k}": t for k, t in self.options.items() if isinstance(t, Tensor)}
        if self.row.case.is_layer:
            found |= {f"parameter {n}": p for n, p in self.side.named_parameters()}
            found |= {f"buffer {n}": p for n, p in self.side.named_buffers()}
        return found

    def replace(self, name: str, made: Tensor) -> None:
        kind, key = name.split(" ", 1)
        if kind == "input":
            self.inputs[int(key)] = made
        elif kind == "option":
            self.options[key] = made
        else:
            *path, last = key.split(".")
            module = self.side.get_submodule(".".join(path))
            module._buffers[last] = made

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {n: t for n, t in self.given.items() if t.requires_grad}

    def forward(self, fresh: bool = False) -> list[Tensor]:
        """The results that want a gradient. `fresh`: of copies, which nobody else holds."""
        case = self.row.case
        inputs, options = self.inputs, self.options
        if fresh:
            copied = lambda t: t.clone() if isinstance(t, Tensor) else t  # noqa: E731
            inputs, options = tree_map(copied, (inputs, options))
        seed(self.row.device)
        call = self.side if case.view is None else viewing(case.view, self.side)
        low = case.autocast
        with (
            backend("triton") if self.ours else nullcontext(),
            torch.autocast(self.row.device, dtype=low or torch.bfloat16, enabled=low is not None),
        ):
            out = call(*inputs, **options)
        return [t for t in tensors_of(out) if t.requires_grad]

    def root(self, fresh: bool = False) -> Tensor:
        """One number that all results lead to, which keeps none of them."""
        return total(self.forward(fresh))

    def gradients(self, root: Tensor, retain: bool = False) -> list[Tensor | None]:
        leaves = list(self.leaves.values())
        return list(torch.autograd.grad(root, leaves, retain_graph=retain, allow_unused=True))


def total(outs: list[Tensor]) -> Tensor:
    return torch.stack([t.float().sum() for t in outs]).sum()


def same_bits(a, b) -> bool:
    return len(a) == len(b) and all(
        (x is None and y is None)
        or (x is not None and y is not None and torch.equal(x.nan_to_num(), y.nan_to_num()))
        for x, y in zip(a, b, strict=True)
    )


def nearly(a, b) -> bool:
    """Up to rounding: stock adds in another order if the layout of an incoming gradient differs."""
    return len(a) == len(b) and all(
        (x is None and y is None)
        or (x is not None and y is not None and torch.allclose(x, y, 0.0, 1e-6, equal_nan=True))
        for x, y in zip(a, b, strict=True)
    )


# ---- (a), (b), (c), (d): what is held, how long, and who sees it ---------------------------------


def _error(call: Callable, *args) -> tuple[str, str] | None:
    try:
        call(*args)
    except Exception as e:
        return type(e).__name__, str(e)
    return None


@dataclasses.dataclass
class Held:
    """What one side holds, and what a second backward says."""

    between: list  # from forward to backward, by the graph alone: inputs were copies
    afterwards: list  # by the loss, after its backward
    left: list  # by nobody that can be named: after all is deleted
    unseen: list  # beside what hooks for saved tensors took away
    attributes: list[str]  # of nodes, that are tensors or hold some
    gradients: list
    failures: list[str]
    second: tuple[str, str] | None


def held(row: Row, ours: bool) -> Held:
    """Call one side several times, with no collector at work."""
    failures = []
    with no_collector():
        call = row.call(ours)
        with Storages(call.given.values()) as made:
            root = call.root(fresh=True)
            between = made.alive(root)
            attributes = attributes_with_tensors(root)
            first = call.gradients(root, retain=True)
            again = call.gradients(root)
            if not same_bits(first, again):
                failures.append("a second backward of a graph retained has other gradients")
            del again
            grads = [g for g in first if g is not None]
            afterwards = made.alive(root, *grads)
            attributes += attributes_with_tensors(root)
            second = _error(call.gradients, root)
            del root
            left = made.alive(*grads)
            del grads
        call = row.call(ours)
        with Storages(call.given.values()) as made:
            call.root(fresh=True)  # and no backward
            left += made.alive()
        call = row.call(ours)
        with Storages(call.given.values()) as made:
            with saved_tensors_hooks(taken_away, lambda t: t):
                root = call.root(fresh=True)
            unseen = made.alive(root)
            if not same_bits(first, call.gradients(root)):
                failures.append("saved_tensors_hooks change the gradients")
            del root
        if ours:
            call = row.call(ours)
            with save_on_cpu():
                root = call.root(fresh=True)
            if not same_bits(first, call.gradients(root)):
                failures.append("save_on_cpu changes the gradients")
            del root
    return Held(between, afterwards, left, unseen, attributes, first, failures, second)


def taken_away(t: Tensor) -> Tensor:
    """A copy that `Storages` does not see."""
    with _disable_current_modes():
        return t.clone()


def attributes_with_tensors(root: Tensor) -> list[str]:
    """Attributes of the graph's nodes that hold tensors, in whatever they hold them."""
    found = []
    seen: set[Node] = set()
    todo = [root.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
        for name, value in getattr(node, "__dict__", {}).items():
            found += [f"{node.name()}.{name}{where}" for where in _tensors_in(value)]
    return found


def _tensors_in(value: Any, where: str = "", depth: int = 6) -> list[str]:
    if isinstance(value, Tensor):
        return [where]
    if isinstance(value, dict):
        parts = list(value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        parts = list(zip(value._fields, value, strict=True))
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = list(enumerate(value))
    elif dataclasses.is_dataclass(value):
        parts = list(vars(value).items())
    elif callable(value) and getattr(value, "__closure__", None):
        parts = [("closure", [c.cell_contents for c in value.__closure__])]
    else:
        return []
    if not depth:
        return []
    return [f for k, v in parts for f in _tensors_in(v, f"{where}.{k}", depth - 1)]


def _may_hold(row: Row) -> int:
    """Bytes that docs name, beyond what stock holds."""
    case = row.case
    given = row.call(True).given
    if "linear_cross_entropy" in case.name or case.name == "LinearCrossEntropyLoss":
        # docs/losses.md: the gradients, made with the loss, and what they are multiplied from
        return 2 * sum(t.nbytes for t in given.values() if t.is_floating_point())
    if case.view is not None and case.name in KEEP_VIEWS:
        return given["input 0"].nbytes
    sizes = given.get("input 1")
    if case.name in PACKED and sizes is not None and sizes.dtype == torch.int64:
        # docs/recurrent.md: which rows take part in each step, the first states once more, and
        # the gates, of which a GRU has four numbers
        states = [t for t in tensors_of(row.call(True).inputs) if t.dim() == 3]
        gates = 4 * given["input 0"].shape[0] * sum(t[:, 0].nbytes for t in states)
        return 11 * sizes.nbytes + sum(t.nbytes for t in states) + gates
    if case.name in (*PACKED, "RNN", "LSTM", "GRU"):
        return sum(t.nbytes for t in row.call(True).forward()[1:])  # as large as the first states
    return 0


PACKED = ("lstm", "gru", "rnn_tanh", "rnn_relu")


# docs/losses.md, docs/attention.md: these keep an input, and with a view all that it is a part of.
KEEP_VIEWS = ("cross_entropy", "CrossEntropyLoss", "scaled_dot_product_attention")


def _large(row: Row, side: Held) -> int:
    """Bytes in storages of at least half as many elements as the largest tensor given has.

    What is smaller are statistics: at most a few float32 numbers a row.
    """
    largest = max(t.numel() for t in row.call(True).given.values())
    return nbytes(s for s in side.between if 2 * s.nbytes // s.itemsize >= max(largest, 48))


def disagreements(row: Row) -> list[str]:
    """In which of this ours differs from stock."""
    ours, stock = held(row, True), held(row, False)
    found = list(ours.failures)
    may = _may_hold(row)
    more = nbytes(ours.between) > nbytes(stock.between) + may
    if more and _large(row, ours) > _large(row, stock) + may:
        found.append(f"held between the passes: {ours.between}; stock {stock.between}")
    for what in ("afterwards", "left", "unseen"):
        mine, its = getattr(ours, what), getattr(stock, what)
        if nbytes(mine) > nbytes(its):
            found.append(f"{what}: {mine}; stock {its}")
    found += [f"a tensor on a node: {a}" for a in ours.attributes]
    if ours.second != stock.second:
        found.append(f"a second backward: {ours.second}; stock {stock.second}")
    return found


# ---- (e): edits ----------------------------------------------------------------------------------


def _write(t: Tensor) -> None:
    with torch.no_grad():
        if t.dtype == torch.bool:
            t.logical_not_()
        elif t.is_floating_point():
            t.mul_(0.5)
        else:
            t.zero_()


_TOLD = ("modified by an inplace operation", "Inference tensors cannot be saved")


def outcome(row: Row, ours: bool, name: str, kind: str) -> tuple[str, list]:
    """What comes of a call one of whose tensors is written to before the backward ("written"), and
    wants no gradient ("frozen"), or was made under inference_mode ("inference"). The name "output"
    stands for all results."""
    call = row.call(ours)
    t = call.given.get(name)
    if kind != "written":
        t.requires_grad_(False)
    if kind == "inference":
        with torch.inference_mode():
            call.replace(name, t.detach().clone())
    if not call.leaves:
        return "no graph", []
    try:
        outs = call.forward()
        if not outs:
            return "no graph", []
        if kind != "inference":
            for each in outs if t is None else [t]:
                _write(each)
        return "runs", call.gradients(total(outs))
    except BackendError:
        return "stock", []
    except RuntimeError as e:
        told = [words for words in _TOLD if words in str(e)]
        return f"raises {told[0] if told else e}", []


def kinds(case: Case, name: str, t: Tensor) -> list[str]:
    if name == "input 0" and case.name in ("group_norm", "GroupNorm", "group_norm_act"):
        return ["written"]  # PyTorch's CPU kernel is not safe for the other edits
    found = ["written"] + (["frozen"] if t.requires_grad else [])
    return found if name.startswith("parameter") else [*found, "inference"]


# What ends otherwise than in stock: here alone it raises or runs, or both raise, with other words.
RAISES, RUNS, WORDS = "raises here alone", "runs here alone", "both raise"


def _way(mine: str, its: str) -> str:
    ways = {("raises", "runs"): RAISES, ("runs", "raises"): RUNS, ("raises", "raises"): WORDS}
    return ways.get((mine.split()[0], its.split()[0]), f"{mine}; stock {its}")


# (names, tensor, way, why)
_FUSED = "stock's fused kernels, on CUDA, keep what we keep; its formula on a CPU keeps products"
_CUDNN = (
    "cuDNN's backward keeps input, states, result and all parameters; PyTorch's CPU formula less"
)
_BIAS = "docs/norms.md: the bias, from which the norm's result is computed again"
_LOGITS = "docs/ops.md: the logits, for stock's table of log-probabilities"
_CAST = "docs/design.md: 16-bit tensors, of which stock under autocast keeps a float32 copy"
_VIEWS = "both raise; the stock layer first tells that the edited parts are views"
_WHOLE = "docs/ops.md: input and weight, from which logits are multiplied anew"
_MASK = "docs/attention.md: the mask, from which the weights are computed again"
_INPUT = "docs/ops.md: the input, of which the activation is computed again"
_HALVES = "both raise; PyTorch's formula first tells that its halves are views"
_PARTS = "both raise; PyTorch's formula names another view function"
_STATES = "both raise; PyTorch's formula first tells that the states are views"
_AGAIN = "docs/recurrent.md: what PyTorch's formula takes, for second derivatives"
_LAYERS = "TransformerEncoderLayer TransformerDecoderLayer"
EXCEPTIONS = (
    ("linear_cross_entropy LinearCrossEntropyLoss", "input", RAISES, _WHOLE),
    ("cross_entropy CrossEntropyLoss", "input 0", RAISES, _LOGITS),
    ("PoissonNLLLoss", "input 0", RAISES, "docs/losses.md: for stock's exponential of the input"),
    ("scaled_dot_product_attention", "input", RAISES, _FUSED),
    ("scaled_dot_product_attention", "option attn_mask", RAISES, _FUSED),
    ("scaled_dot_product_attention", "output", RAISES, _FUSED),
    ("scaled_dot_product_attention", "output", RUNS, "docs/attention.md: not kept if keys are few"),
    ("MultiheadAttention", "input 3", RAISES, _MASK),
    ("MultiheadAttention", "input 5", RAISES, _MASK),
    ("TransformerEncoderLayer", "input 1", RAISES, _MASK),
    ("MultiheadAttention", "output", RUNS, "docs/attention.md: what stock keeps is computed again"),
    ("RMSNorm rms_norm", "input", RAISES, _FUSED),
    ("dropout_add_rms_norm", "output", RAISES, _FUSED),  # with prenorm=True, the norm's input
    (
        "TransformerEncoderLayer TransformerDecoderLayer",
        "parameter self_attn.in_proj",
        WORDS,
        _VIEWS,
    ),
    ("group_norm_act", "input 3", RAISES, _BIAS),
    ("batch_norm_act", "input 4", RAISES, _BIAS),
    ("conv_batch_norm_act", "input 6", RAISES, _BIAS),
    # biases: for second derivatives
    ("RNN LSTM GRU", "parameter bias", RAISES, _CUDNN),
    ("RNN LSTM GRU", "parameter weight_hh", RAISES, _CUDNN),  # of one step, without a given state
    ("RNN LSTM GRU", "input 1", WORDS, _STATES),
    ("RNN LSTM GRU", "output", RAISES, _CUDNN),
    # ATen's fused cells, on CUDA, keep the biases, and that of an LSTM its new state c
    ("LSTMCell GRUCell", "parameter bias", RAISES, _FUSED),
    ("LSTMCell", "output", RAISES, _FUSED),
    ("LSTMCell GRUCell", "parameter weight_hh", RAISES, _AGAIN),
    ("act_mul", "input 0", RAISES, _INPUT),
    ("act_glu", "input 0", WORDS, _HALVES),
    ("split_features", "output", WORDS, _PARTS),
    ("split_features", "input 0", WORDS, _PARTS),
    ("split_features", "input 0", "stock; stock no graph", "it is declined"),
    ("rnn_tanh rnn_relu lstm gru", "input", RAISES, _CUDNN),
    ("rnn_tanh rnn_relu lstm gru", "input 2", WORDS, _CUDNN),
)


_PLACE = "docs/attention.md: batch-first inputs are read in place; stock keeps transposed copies"


def excepted(case: Case, name: str, way: str) -> str | None:
    attends = case.name in ("MultiheadAttention", "Transformer", *_LAYERS.split())
    if attends and case.options.get("batch_first") and way == RAISES:
        if name in ("input 0", "input 1", "input 2"):
            return _PLACE
    if case.autocast is not None and name.startswith("input") and way == RAISES:
        return _CAST
    for names, tensor, of, why in EXCEPTIONS:
        if case.name in names.split() and name.startswith(tensor) and way == of:
            return why
    return None


def edits(row: Row) -> tuple[int, list[str], list[str]]:
    """(how many, those that end otherwise than in stock, those of them that are excepted)."""
    tried, found, known = 0, [], []
    plain: dict = {}

    def unedited(ours: bool) -> list:
        if ours not in plain:
            call = row.call(ours)
            plain[ours] = call.gradients(call.root())
        return plain[ours]

    given: dict[str, Tensor | None] = {"output": None, **row.call(True).given}
    for name, t in given.items():
        for kind in ["written"] if t is None else kinds(row.case, name, t):
            mine, its = (outcome(row, ours, name, kind) for ours in (True, False))
            tried += 1
            way = _way(mine[0], its[0])
            if mine[0] == its[0]:
                if mine[0] == "runs" and kind == "written":
                    alike = [nearly(m[1], unedited(o)) for m, o in ((mine, True), (its, False))]
                    if alike[0] != alike[1]:
                        found.append(f"{name}: an edit reaches one gradient and not the other")
            elif (why := excepted(row.case, name, way)) is None:
                found.append(f"{name} {kind}: {mine[0]}; stock {its[0]}")
            elif way == RUNS and kind == "written" and not nearly(mine[1], unedited(True)):
                found.append(f"{name}: an edit that raises in stock changes the gradient")
            else:
                known.append(f"{row.case.name}, {name} {kind}: {way}: {why}")
    return tried, found, known


# ---- Which rows ----------------------------------------------------------------------------------


def subjects() -> list[tuple[Case, torch.dtype]]:
    return [(c, d) for c in CASES if c.stock is None for d in c.dtypes]


def _kind(case: Case) -> tuple:
    """Rows of one kind keep the same things."""
    torch.manual_seed(0)
    members = tuple(type(member(torch.nn)).__name__ for member in case.members)
    options = case.options
    drops = bool(options.get("dropout") or options.get("dropout_p"))
    return case.name, members, case.train, options.get("reduction"), "inplace" in options, drops


def share() -> list[tuple[Case, torch.dtype]]:
    """Of each kind the smallest row that is not tiny, in its dtypes by turns."""
    least: dict[tuple, tuple[int, Case]] = {}
    for case in CASES:
        if case.stock is None:
            size = sum(t.numel() for t in tensors_of(case.make(torch.float32, "cpu")))
            kind = _kind(case)
            if size >= 12 and (kind not in least or size < least[kind][0]):
                least[kind] = size, case
    return [(c, c.dtypes[i % len(c.dtypes)]) for i, (_, c) in enumerate(least.values())]


def edited() -> list[tuple[Case, torch.dtype]]:
    """Of the share, all losses and distances, of which edits of targets were once an error, and a
    fourth of the others. A whole Transformer has so many tensors that it takes a minute."""
    chosen = []
    for i, (case, dtype) in enumerate(share()):
        loss = any(word in case.name for word in ("oss", "imilarity", "istance", "kl_div", "KLDiv"))
        if (loss or i % 4 == 0) and case.name != "Transformer":
            chosen.append((case, dtype))
    return chosen


def has_graph(row: Row) -> bool:
    """Whether a gradient is wanted. Also fills what the first call of each pass fills."""
    for ours in (False, True):
        call = row.call(ours)
        outs = call.forward() if call.leaves else []
        if outs:
            call.gradients(total(outs))
        # what Python's modules keep when they first see a mode for dispatch
        with Storages([]):
            row.call(ours).forward(fresh=True)
    return bool(outs)


def told(value) -> str:
    return str(value).removeprefix("torch.")


each_row = pytest.mark.parametrize(("case", "dtype"), share(), ids=told)
ignored = pytest.mark.filterwarnings("ignore::UserWarning")  # stock's, of broadcasting and means


@ignored
@each_row
def test_nothing_is_held_longer_or_out_of_sight(case, dtype, device, record_property):
    row = Row(case, dtype, device)
    if not has_graph(row):
        pytest.skip("no gradient is wanted")
    record_property("lifetimes", [("rows", 1)])
    found = disagreements(row)
    assert not found, "\n".join([str(case), *found])


@ignored
@pytest.mark.parametrize(("case", "dtype"), edited(), ids=told)
def test_edits_end_as_in_stock(case, dtype, device, record_property):
    row = Row(case, dtype, device)
    if not has_graph(row):
        pytest.skip("no gradient is wanted")
    tried, found, known = edits(row)
    counts = [("edits", tried), ("edits that end otherwise, as documented", len(known))]
    record_property("lifetimes", counts)
    assert not found, "\n".join([str(case), *found])


def main(arguments: list[str]) -> int:
    """All rows, or part K of N of them (`--part K/N`), of which only those whose names contain one
    of the other arguments."""
    from fastnn.testing import interpreter

    interpreter.install()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    counts: Counter[str] = Counter()
    listed: Counter[str] = Counter()
    for case, dtype in part(subjects(), arguments):
        if arguments and not any(a in str(case) for a in arguments):
            continue
        row = Row(case, dtype, device)
        if not has_graph(row):
            continue
        tried, found, known = edits(row)
        counts += Counter({"rows": 1, "edits": tried, "documented": len(known)})
        listed.update(known)
        found += disagreements(row)
        print(f"{case}, {told(dtype)}: {tried} edits, {len(found)} differences", flush=True)
        if found:
            counts["rows that differ"] += 1
            print(*found, sep="\n  ", flush=True)
    print(*(f"{n} {what}" for what, n in sorted(listed.items())), sep="\n")
    print(dict(counts))
    return counts["rows that differ"] > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
