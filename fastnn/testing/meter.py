"""Count the bytes that kernels move, without a GPU, and predict a speedup from them.

    with traffic() as log:              # kernels, run by Triton's interpreter
        y = F.gelu(x)
    assert log.sectors.total() <= 1.05 * nbytes(x, y)

    with AtenTraffic() as stock:        # PyTorch's own operators
        torch.nn.functional.gelu(x)
    print(predict(stock, log, bandwidth=3.35e12))

A lane outside all tensors of the launch raises `IndexError`. The meter counts the bytes for which
Triton's loads, stores and atomics ask, tile by tile. It knows neither the width of the compiled
instructions (see `fastnn.testing.aot`), nor which accesses a cache would answer (see `distinct`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from fastnn.kernels import _interpreter

Array = Any  # np.ndarray

SECTOR = 32  # the least number of bytes that a GPU moves between its memory and a cache
_MAX_RUNS = 1 << 20


@dataclass(frozen=True)
class Cost:
    """Bytes moved and kernels launched; costs can be added."""

    bytes: int
    launches: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.launches + other.launches)


def nbytes(*tensors: Tensor) -> int:
    """The bytes that hold the elements of these tensors; an expanded dimension counts once."""
    total = 0
    for t in tensors:
        elements = 1
        for size, stride in zip(t.shape, t.stride(), strict=True):
            elements *= size if stride or not size else 1
        total += elements * t.element_size()
    return total


# ---- kernels ----------------------------------------------------------------------------------


class _Runs:
    """A set of bytes as intervals [start, end): one interval per row read, not one per element."""

    def __init__(self) -> None:
        self._starts: list[Array] = []
        self._ends: list[Array] = []
        self._held = 0
        self._limit = _MAX_RUNS

    def __bool__(self) -> bool:
        return self._held > 0

    def add(self, starts: Array, ends: Array) -> None:
        self._starts.append(starts)
        self._ends.append(ends)
        self._held += starts.size
        if self._held > self._limit:
            starts, ends = self.union()
            self._starts, self._ends, self._held = [starts], [ends], starts.size
            self._limit = max(_MAX_RUNS, 2 * starts.size)

    def union(self) -> tuple[Array, Array]:
        """Disjoint intervals in order."""
        if not self:
            return np.zeros(0, np.uint64), np.zeros(0, np.uint64)
        starts, ends = np.concatenate(self._starts), np.concatenate(self._ends)
        order = np.argsort(starts)
        starts, ends = starts[order], np.maximum.accumulate(ends[order])
        first = np.flatnonzero(np.append(True, starts[1:] > ends[:-1]))
        return starts[first], np.append(ends[first[1:] - 1], ends[-1])

    def size(self) -> int:
        starts, ends = self.union()
        return int((ends - starts).sum())

    def shared_with(self, starts: Array, ends: Array) -> int:
        """The bytes of this set that also lie in the given disjoint intervals."""
        both = _Runs()
        both.add(*self.union())
        both.add(starts, ends)
        return self.size() + int((ends - starts).sum()) - both.size()


def _runs(lanes: Array, size: int) -> tuple[Array, Array]:
    """The bytes that lanes of `size` bytes touch, as disjoint intervals in order."""
    steps = lanes[1:] - lanes[:-1]  # unsigned, so a step back is a huge one
    if (steps == size).all():
        return lanes[:1], lanes[-1:] + np.uint64(size)
    lanes = np.unique(lanes)
    last = np.flatnonzero(lanes[1:] - lanes[:-1] > size)
    return lanes[np.append(0, last + 1)], lanes[np.append(last, -1)] + np.uint64(size)


@dataclass
class Launch:
    """One kernel launch. The counters hold bytes under "load", "store" and "atomic"."""

    kernel: str
    grid: tuple[int, ...] = ()
    accesses: Counter[str] = field(default_factory=Counter)
    """Loads, stores and atomics executed, each a whole tile."""
    requested: Counter[str] = field(default_factory=Counter)
    """Bytes for which the unmasked lanes ask."""
    sectors: Counter[str] = field(default_factory=Counter)
    """Bytes of the 32-byte sectors of each access: what a GPU without a cache would move."""
    distinct: Counter[str] = field(default_factory=Counter)
    """Each byte once per launch: what a GPU with a perfect cache would move."""
    extent: int = 0
    """Bytes from the first to the last element of each tensor given. `distinct` of a kernel that
    only reads or only writes each tensor is not larger."""
    shared_writes: int | None = None
    """Bytes that one program stores, and that another program touches, or that the same program
    loads later without a barrier in between; None unless metered with `races=True`.

    Programs run in any order and at the same time, and so do the threads of a program. Such bytes
    are therefore races unless atomics put the accesses in order."""


class Log(list[Launch]):
    """The launches of a `traffic()` block, in order."""

    def _sum(self, counter: str) -> Counter[str]:
        return sum((getattr(launch, counter) for launch in self), Counter())

    requested = property(lambda self: self._sum("requested"))
    sectors = property(lambda self: self._sum("sectors"))
    distinct = property(lambda self: self._sum("distinct"))

    @property
    def cost(self) -> Cost:
        """The cost of the launches if each of them finds its bytes in memory, once."""
        return Cost(self.distinct.total(), len(self))

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("kernel", "grid", "requested", "sectors", "distinct", "shared writes")
        ]
        for launch in self:
            counts = (launch.requested, launch.sectors, launch.distinct)
            shared = "" if launch.shared_writes is None else str(launch.shared_writes)
            rows.append(
                (launch.kernel, str(launch.grid), *(str(c.total()) for c in counts), shared)
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


class _OutOfBounds(IndexError):
    pass


class _Meter:
    """Follows one launch."""

    def __init__(self, launch: Launch, distinct: bool, races: bool) -> None:
        self.launch = launch
        self.distinct: dict[str, _Runs] | None = {} if distinct else None
        self.races = races
        self.program: tuple[int, ...] | None = None
        self.touched, self.written = _Runs(), _Runs()  # by the program that runs now
        self.ordered = _Runs()  # what it wrote before its last barrier
        self.touches: list[tuple[Array, Array]] = []  # by each program before it
        self.writes = _Runs()
        self.loaded_back = 0  # bytes that a program loads after storing them
        self.spans: list[tuple[int, int, str]] = []

    def arguments(self, named: dict[str, Any]) -> None:
        """The memory that the launch may touch: each tensor from its first to its last element."""
        for name, value in named.items():
            for leaf in value if isinstance(value, tuple) else (value,):
                tensor = getattr(leaf, "base", leaf)  # of a descriptor or a reinterpreted one
                if not isinstance(tensor, Tensor):
                    tensor = leaf
                if isinstance(tensor, Tensor) and tensor.numel():
                    dims = zip(tensor.shape, tensor.stride(), strict=True)
                    elements = 1 + sum((size - 1) * stride for size, stride in dims)
                    start = tensor.data_ptr()
                    self.spans.append((start, start + elements * tensor.element_size(), name))
        self.launch.extent = sum(end - start for start, end, _ in self.spans)
        self.spans.sort()
        starts: list[int] = []
        ends: list[int] = []
        for start, end, _ in self.spans:  # overlapping spans are joined, adjacent spans are not
            if ends and start < ends[-1]:
                ends[-1] = max(ends[-1], end)
            else:
                starts.append(start)
                ends.append(end)
        self.starts, self.ends = np.array(starts, np.uint64), np.array(ends, np.uint64)

    def access(self, kind: str, pointers: Any, mask: Any) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        lanes = np.asarray(pointers.data)
        active = mask if isinstance(mask, np.ndarray) else np.asarray(mask.data)
        # From a tile and a scalar, the interpreter makes a mask of integers.
        lanes = lanes[np.broadcast_to(active.astype(bool), lanes.shape)]
        launch = self.launch
        launch.accesses[kind] += 1
        launch.requested[kind] += lanes.size * size
        if not lanes.size:
            return
        starts, ends = _runs(lanes, size)
        self._check(kind, starts, ends)
        first, last = starts // SECTOR, (ends - np.uint64(1)) // SECTOR
        twice = (first[1:] == last[:-1]).sum()
        launch.sectors[kind] += SECTOR * int((last - first + np.uint64(1)).sum() - twice)
        if self.distinct is not None:
            self.distinct.setdefault(kind, _Runs()).add(starts, ends)
        if self.races:
            program = interpreter.interpreter_builder.grid_idx
            if program != self.program:
                self._next_program()
                self.program = program
            if kind == "load" and self.written:
                self.loaded_back += self.written.shared_with(starts, ends)
            self.touched.add(starts, ends)
            if kind == "store":
                self.written.add(starts, ends)

    def _check(self, kind: str, starts: Array, ends: Array) -> None:
        span = np.searchsorted(self.starts, starts, side="right") - 1
        if self.ends.size:
            bad = (span < 0) | (ends > self.ends[span])
        else:
            bad = np.ones(starts.shape, bool)
        if bad.any():
            start, end = int(starts[bad][0]), int(ends[bad][0])
            raise _OutOfBounds(
                f"{self.launch.kernel}: {kind} out of bounds in program "
                f"{interpreter.interpreter_builder.grid_idx}, {self._where(start, end)}"
            )

    def _where(self, start: int, end: int) -> str:
        if not self.spans:
            return "with no tensor among its arguments"
        distance, side, name = min(
            (first - start, "before", name)
            if start < first
            else (end - last, "past the end of", name)
            for first, last, name in self.spans
        )
        return f"{distance} bytes {side} {name}"

    def _next_program(self) -> None:
        self.barrier()
        touched, written = self.touched.union(), self.ordered.union()
        self.ordered = _Runs()
        if touched[0].size:
            self.touches.append(touched)
            self.writes.add(*written)
        self.touched, self.written = _Runs(), _Runs()

    def barrier(self) -> None:
        """The threads of the program wait for each other, and see what all of them stored."""
        if self.written:
            self.ordered.add(*self.written.union())
            self.written = _Runs()

    def finish(self) -> None:
        self.launch.grid = tuple(interpreter.interpreter_builder.grid_dim)
        for kind, runs in (self.distinct or {}).items():
            self.launch.distinct[kind] = runs.size()
        if self.races:
            self._next_program()
            shared = self.writes.shared_with(*self._touched_twice().union())
            self.launch.shared_writes = shared + self.loaded_back

    def _touched_twice(self) -> _Runs:
        """The bytes that more than one program touched."""
        twice = _Runs()
        if self.touches:
            starts, ends = (np.concatenate(side) for side in zip(*self.touches, strict=True))
            at = np.concatenate([starts, ends])
            order = np.argsort(at)
            change = np.where(order < starts.size, 1, -1)
            at, programs = at[order], np.cumsum(change)
            many = np.flatnonzero(programs[:-1] > 1)
            twice.add(at[many], at[many + 1])
        return twice


@contextmanager
def traffic(*, distinct: bool = True, races: bool = False) -> Iterator[Log]:
    """Meters the kernels launched in the block; they must run in Triton's interpreter.

    `distinct` and `races` remember addresses; without them a launch costs no memory. An access
    outside the launch's tensors raises `IndexError`, which names the kernel and the program. The
    extent of a tensor goes from its first to its last element. An access between the rows of a
    slice is therefore not noticed.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("traffic: kernels are compiled here; set TRITON_INTERPRET=1 at start")
    _interpreter.install()  # before wrapping; otherwise leaving the block would undo it
    log = Log()
    meters: list[_Meter] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor

    def metered(kind: str, method: Callable, pointers: int, mask: int | None) -> Callable:
        def access(self, *args, **kwargs):
            active = np.ones((), bool) if mask is None else args[mask]
            meters[-1].access(kind, args[pointers], active)
            return method(self, *args, **kwargs)

        return access

    def call(self, *args, stock=executor.__call__, **kwargs):
        log.append(Launch(self.fn.__name__))
        meters.append(_Meter(log[-1], distinct, races))
        try:
            stock(self, *args, **kwargs)
        except InterpreterError as error:
            cause = error
            while cause is not None and not isinstance(cause, _OutOfBounds):
                cause = cause.__cause__
            if cause is None:
                raise
            raise IndexError(*cause.args) from None
        meters.pop().finish()

    def init_args(self, args, kwargs, stock=executor._init_args_hst):
        on_host, named = stock(self, args, kwargs)
        meters[-1].arguments(dict(zip(self.arg_names, on_host, strict=False)) | named)
        return on_host, named

    def create_barrier(self, stock=builder.create_barrier):
        meters[-1].barrier()
        return stock(self)

    patched: dict[tuple[Any, str], Callable] = {
        (builder, "create_barrier"): create_barrier,
        (executor, "__call__"): call,
        (executor, "_init_args_hst"): init_args,
    }
    for name, kind, pointers, mask in (
        ("create_masked_load", "load", 0, 1),
        ("create_masked_store", "store", 0, 2),
        ("create_atomic_rmw", "atomic", 1, 3),
        ("create_atomic_cas", "atomic", 0, None),
    ):
        patched[builder, name] = metered(kind, getattr(builder, name), pointers, mask)
    before = {(owner, name): getattr(owner, name) for owner, name in patched}
    for (owner, name), function in patched.items():
        setattr(owner, name, function)
    try:
        yield log
    finally:
        for (owner, name), function in before.items():
            setattr(owner, name, function)


# ---- PyTorch's operators ------------------------------------------------------------------------

_FREE = {"device", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_"}
_OVERWRITES = {"zero_", "fill_", "copy_", "normal_", "uniform_", "bernoulli_", "exponential_"}
# Operators that read only the elements of their first tensor that they return, one per index.
_GATHERS = {"embedding", "index_select", "index", "gather", "take"}
_GATHERS |= {"nll_loss_forward", "nll_loss2d_forward"}
# Operators that change only some elements of their first tensor: as many as their last one has.
_SCATTERS = {"index_add_", "scatter_"}
_UNREAD = {
    "nll_loss_backward": 1,
    "nll_loss2d_backward": 1,
    **{
        f"{name}_backward": 1
        for d in "23"
        for name in (
            f"max_pool{d}d_with_indices",
            f"adaptive_max_pool{d}d",
            f"fractional_max_pool{d}d",
            f"avg_pool{d}d",
            f"_adaptive_avg_pool{d}d",
        )
    },
}  # position of an argument that is used only for its shape
# Operators that fill their result with zeros before the kernel that adds to it.
_ZEROED = {
    f"{name}_backward"
    for d in "23"
    for name in (f"max_pool{d}d_with_indices", f"adaptive_max_pool{d}d", f"fractional_max_pool{d}d")
}
# What ATen's CUDA code does inside one operator: kernels besides the first, and passes over the
# largest operand besides those of arguments and results. Read in its sources, not measured.
_HIDDEN = {
    "native_layer_norm_backward": (1, 2),
    "native_batch_norm": (1, 1),
    "_batch_norm_with_update": (1, 1),
    "native_batch_norm_backward": (1, 2),
    "batch_norm_backward": (1, 2),
    "native_group_norm": (1, 1),
    "native_group_norm_backward": (2, 2),
    "binary_cross_entropy_with_logits": (4, 8),
    "soft_margin_loss": (4, 8),
    "soft_margin_loss_backward": (7, 16),
}
# Arguments of which ATen's CUDA code makes a dense copy if they are not contiguous.
_MADE_DENSE = {
    "native_layer_norm": (0,),
    "native_layer_norm_backward": (0, 1),
    "_softmax": (0,),
    "_log_softmax": (0,),
}
# Backward passes that on CUDA fill their result with zeros, and then add to it with atomics.
_SPATIAL = ("1d", "2d", "3d")
_PADS = {f"{kind}_pad{n}_backward" for kind in ("reflection", "replication") for n in _SPATIAL}
_ADDS = {"linear1d", "bilinear2d", "bicubic2d", "trilinear3d"}
_ADDS = _PADS | {f"upsample_{kind}_backward" for kind in _ADDS}
_ADDS |= {f"_upsample_{kind}2d_aa_backward" for kind in ("bilinear", "bicubic")}
_UNREAD |= dict.fromkeys(_PADS, 1)
# If the result is a scalar, these run a pointwise kernel and then a reduction.
_REDUCED = {"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy"}


@dataclass(frozen=True)
class AtenOp:
    """One operator that ran: bytes read and written, kernels launched on a GPU."""

    name: str
    read: int
    written: int
    launches: int


class AtenTraffic(TorchDispatchMode):
    """Counts the bytes that PyTorch's operators read and write in the block, forward and backward.

    It works on CPU tensors, whose operators are mostly those of a GPU. Exceptions are dropout (one
    kernel on a GPU, three operators on a CPU) and RMSNorm (one and several). Under `FakeTensorMode`
    with CUDA tensors the forward is that of a GPU. If one operator is known to run several kernels,
    an estimate is added. Make the gradient that starts a backward outside the block; otherwise its
    creation is counted too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[AtenOp] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and name not in _FREE and name != "_unsafe_view":
            self.ops.append(self._count(name, args, kwargs, out))
        return out

    @staticmethod
    def _count(name: str, args: Any, kwargs: Any, out: Any) -> AtenOp:
        unread = 0 if name in _OVERWRITES else _UNREAD.get(name)
        given = [a for i, a in enumerate(args) if i != unread]
        read = list({id(t): t for t in _tensors((given, kwargs))}.values())  # x * x reads x once
        results = _tensors(out)
        moved, written = nbytes(*read), nbytes(*results)
        if name in _GATHERS:
            moved += min(nbytes(read[0]), _gathered(name, read, results)) - nbytes(read[0])
        if name in _SCATTERS and len(read) == 3:
            written = nbytes(read[-1])
            moved += (written if name == "index_add_" else 0) - nbytes(read[0])
        launches, passes = _HIDDEN.get(name, (0, 0))
        if name == "native_batch_norm" and not args[5]:  # the statistics are given
            launches = passes = 0
        if name in _ADDS:
            launches, moved, written = 1, moved + written, 2 * written
        if name == "convolution_backward":  # a kernel each for dx, dw and db, which all read dy
            launches = max(0, sum(args[-1]) - 1)
            moved += launches * nbytes(args[0])
        if name == "constant_pad_nd":
            if max(args[1], default=0) > 0:  # filled, and then the input copied into it
                launches, written = 1, written + moved
            else:
                moved = written
        for i in _MADE_DENSE.get(name, ()):
            if not args[i].is_contiguous():
                size = nbytes(args[i])
                launches, moved, written = launches + 1, moved + size, written + size
        largest = max((nbytes(t) for t in (*read, *results)), default=0)
        if name in _ZEROED:
            launches, written = launches + 1, 2 * written
        if name in _REDUCED and results[0].numel() == 1 < read[0].numel():
            launches, passes = 1, 2
        return AtenOp(name, moved + passes * largest, written, 1 + launches)

    @property
    def read(self) -> int:
        return sum(op.read for op in self.ops)

    @property
    def written(self) -> int:
        return sum(op.written for op in self.ops)

    @property
    def launches(self) -> int:
        return sum(op.launches for op in self.ops)

    @property
    def cost(self) -> Cost:
        return Cost(self.read + self.written, self.launches)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _gathered(name: str, read: list[Tensor], results: list[Tensor]) -> int:
    if name.startswith("nll_loss"):
        return read[1].numel() * read[0].element_size()
    return nbytes(results[0])


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Gives functions of torch.nn.functional the operators that they have on CUDA.

    `AtenTraffic` counts them; on other devices these functions run more operators. The operators
    were read in ATen's sources. The results of the functions are not correct inside the block.
    """
    stock = torch.nn.functional
    silu = stock.silu  # x -> y is one kernel, and (dy, x) -> dx is one kernel
    composed = stock.dropout

    def dropout(input, p=0.5, training=True, inplace=False):
        if not training or inplace or p in (0, 1):  # no fused kernel takes these
            return composed(input, p, training, inplace)
        return torch.native_dropout(input, p, training)[0]

    def rms_norm(input, normalized_shape, weight=None, eps=None):  # one operator since torch 2.9
        return stock.layer_norm(input, normalized_shape, weight)

    def rrelu(input, lower=1.0 / 8, upper=1.0 / 3, training=False, inplace=False):
        return silu(input)  # in eval mode its noise is allocated but not used

    def one_kernel(input, inplace=False):  # on other devices there are more
        return silu(input)

    def gaussian_nll_loss(input, target, var, full=False, eps=1e-6, reduction="mean"):
        if isinstance(var, Tensor):
            torch.any(var < 0)  # stock then reads the value, and waits for the device
        else:
            var = var * torch.ones_like(input)
        if var.dim() < input.dim():
            var = var.unsqueeze(-1)
        loss = 0.5 * (torch.log(var.clone().clamp_(min=eps)) + (input - target) ** 2 / var)
        return loss if reduction == "none" else getattr(loss, reduction)()

    replaced: dict[str, Any] = {"dropout": dropout, "rms_norm": rms_norm, "rrelu": rrelu}
    replaced |= {"mish": one_kernel, "logsigmoid": one_kernel}
    replaced |= {"gaussian_nll_loss": gaussian_nll_loss}
    with mock.patch.multiple(stock, **replaced):
        yield


@dataclass(frozen=True)
class AllTraffic:
    """Our calls in an `all_traffic()` block: kernels, and PyTorch's operators between them."""

    kernels: Log
    aten: AtenTraffic

    @property
    def cost(self) -> Cost:
        return self.kernels.cost + self.aten.cost


@contextmanager
def all_traffic(*, races: bool = False) -> Iterator[AllTraffic]:
    """Counts what our calls in the block cost: kernels, and PyTorch's operators between them.

    Kernels must be interpreted, as in `traffic`; `races` has the same meaning as there.
    """
    _interpreter.install()  # before the interpreter is wrapped
    executor = interpreter.GridExecutor
    run = executor.__call__

    def call(self, *args, **kwargs):
        with _disable_current_modes():  # the interpreter's own operators are not ours
            return run(self, *args, **kwargs)

    with (
        mock.patch.object(executor, "__call__", call),
        traffic(races=races) as log,
        # Dispatch declines under a dispatch mode, but this mode only observes.
        mock.patch.object(torch._C, "_len_torch_dispatch_stack", lambda: 0),
        AtenTraffic() as aten,
    ):
        yield AllTraffic(log, aten)


# ---- prediction ---------------------------------------------------------------------------------

# Read off times that others published for kernels on an H100 (docs/benchmarks.md): the time of a
# call is that of its bytes, and about 6 us for each launch.
LAUNCH_US = 6.0


@dataclass(frozen=True)
class Prediction:
    """Times on a bandwidth-bound GPU, from bytes and launches alone. Not a measurement."""

    stock_us: float
    ours_us: float

    @property
    def speedup(self) -> float:
        return self.stock_us / self.ours_us

    def __str__(self) -> str:
        return (
            f"predicted {self.speedup:.2f}x (stock {self.stock_us:.1f} us, ours {self.ours_us:.1f} "
            "us; from bytes and launches, not measured)"
        )


def predict(stock: AtenTraffic | Cost, ours: Log | Cost, bandwidth: float) -> Prediction:
    """The predicted times of `stock` and `ours` on a GPU with `bandwidth` bytes per second.

    Each side takes the time to move its bytes, and `LAUNCH_US` for each launch.
    """
    stock = stock if isinstance(stock, Cost) else stock.cost
    ours = ours if isinstance(ours, Cost) else ours.cost
    per_us = bandwidth / 1e6
    return Prediction(
        stock_us=stock.bytes / per_us + stock.launches * LAUNCH_US,
        ours_us=ours.bytes / per_us + ours.launches * LAUNCH_US,
    )
