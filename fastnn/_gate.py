"""The size gate: in `auto`, it decides whether a call is large enough for the kernel to win.

Each op has a policy, a function of the call's arguments that is declared beside the op. The policy
says how much work the call is (`Work`), or why the kernel cannot win at any size (`Stock`). For
each op and variant, `crossover.json` gives the size from which the kernel wins.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.torch_version import TorchVersion

from fastnn import _build
from fastnn._mode import HAS_TRITON, INTERPRET, Stock
from fastnn.kernels import _gpus

TABLE = Path(__file__).with_name("crossover.json")


class Work(NamedTuple):
    """The amount of work in one call, as the gate compares it.

    size: how much of `unit` the call has to do.
    unit: what `size` counts, in the plural: "elements", "outputs", "logits", ...
    variant: which of the op's variants this call would run; "" for an op that has only one.
    """

    size: int
    unit: str = "elements"
    variant: str = ""


class Crossover(NamedTuple):
    """From which size the kernel wins.

    least: the least size at which the kernel wins; infinity if it never wins.
    source: where this figure comes from.
    unit: what the size counts.
    estimated: whether the figure is an estimate, which assumes that the host is the limit.
    """

    least: float
    source: str
    unit: str = "elements"
    estimated: bool = False

    def free(self) -> float:
        """The least size if the host costs nothing: only what a kernel saves on the GPU counts."""
        if self.estimated and self.least < math.inf:
            return min(self.least, LEAST_OF_ESTIMATES)
        return self.least

    def __str__(self) -> str:
        if self.least == math.inf:
            return "stock"
        return f"kernel from {int(self.least):,} {self.unit}"


NO_FIGURE = (
    "no size is known from which the kernel wins; `python -m bench.gates` estimates one, "
    "`fastnn tune` measures it"
)
LEAST_OF_ESTIMATES = 65536  # no estimate is lower: below, the GPU is idle most of the time

# "free" if the user says that the GPU is the limit. Then only what a kernel saves there counts.
_host = os.environ.get("FASTNN_HOST", "")
if _host not in ("", "free"):
    raise ValueError(f"FASTNN_HOST={_host!r}: accepted is 'free', or nothing")

Policy = Callable[..., Work | Stock]
Alerts = Callable[..., bool]


# ---- The table ----------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    """The table at `path`; {} if there is no file.

    The table has one entry per architecture, and the entry "default" for all others. An entry has
    the `source` of the figures and a list of `crossovers`. Each crossover has the fields `op`,
    `variant` ("" if left out), `unit` and `least` (None: the kernel never wins), and may have
    `native`, which stands for `least` where plans are to run in C++. PyTorch runs an op without a
    line. Fields that this version does not know are ignored.
    """
    return json.loads(path.read_text()) if path.exists() else {}


@functools.cache
def _shipped() -> Mapping[str, Any]:
    return read(TABLE)


_table: Mapping[str, Any] | None = None  # replaces the shipped table inside `using`


def table() -> Mapping[str, Any]:
    """The table in force."""
    return _shipped() if _table is None else _table


# Not whether the module is built: a call must take the same path before and after the build.
_in_cpp = functools.cache(_build.expected)


@functools.cache
def crossover(op: str, architecture: str, variant: str = "") -> Crossover:
    """The size from which the kernel of `op` wins on `architecture`."""
    why = unproven(architecture)
    for key in (architecture, "default"):
        if key not in table() or (why and key != architecture):
            continue
        entry = table()[key]
        for line in entry["crossovers"]:
            if line["op"] == op and line.get("variant", "") == variant:
                size = line["native"] if _in_cpp() and "native" in line else line["least"]
                least = math.inf if size is None else size
                unit, estimated = line.get("unit", "elements"), key == "default"
                found = Crossover(least, entry["source"], unit, estimated)
                return found._replace(least=found.free()) if _host == "free" else found
    return Crossover(math.inf, why or NO_FIGURE)


def described(op: str, variants: tuple[str, ...], architecture: str) -> str:
    """What runs `op` in `auto` on `architecture`, in words, for tables and documents."""
    texts: dict[str, list[str]] = {}
    for variant in variants:
        texts.setdefault(str(crossover(op, architecture, variant)), []).append(variant)
    if len(texts) == 1:
        return next(iter(texts))
    told = []
    for text, which in texts.items():
        told.append(f"{', '.join(v for v in which if v)}: {text}" if any(which) else text)
    return "; ".join(told)


def unproven(architecture: str) -> str | None:
    """Why estimates do not count on `architecture`; None if they count.

    Estimates count if the kernels were compiled for the architecture and the code was read, by a
    Triton not newer than the installed one. Figures that `fastnn tune` measured always count.
    """
    if not HAS_TRITON or architecture in ("cpu", "default"):
        return None
    # This import loads Triton, so it waits for the first question about a GPU.
    from fastnn import kernels

    least = _gpus.facts(architecture).compiled_from
    if least is None:
        return f"kernels were not compiled for {architecture}; `fastnn tune` measures them"
    if TorchVersion(kernels._launch.triton_version()) < least:
        return f"on {architecture} kernels need triton {least}"
    return None


@contextmanager
def using(new: Mapping[str, Any]) -> Iterator[None]:
    """Use the table `new` instead of the shipped one inside the block, in all threads."""
    global _table
    before, _table = _table, new
    crossover.cache_clear()
    _gpus.changed()
    try:
        yield
    finally:
        _table = before
        crossover.cache_clear()
        _gpus.changed()


# ---- The decision -------------------------------------------------------------------------------


_asked: list[tuple[str, Work | Stock]] | None = None


@contextmanager
def asked() -> Iterator[list[tuple[str, Work | Stock]]]:
    """Collect (op, its policy's answer) for every call in the block. All these calls run
    PyTorch."""
    global _asked
    before, _asked = _asked, []
    _gpus.changed()
    try:
        yield _asked
    finally:
        _asked = before
        _gpus.changed()


def answers() -> bool:
    """Whether the gate decides; False inside `asked()`."""
    return _asked is None


def decide(
    op: str,
    policy: Policy | None,
    device_index: int,
    args: tuple,
    kwargs: dict,
    free: bool = False,
    alerts: Alerts | None = None,
) -> Stock | str:
    """The variant of `op` to run, or why PyTorch is to run the call.

    `policy` says how much work the call is. Without a policy, the size is the element count of the
    first argument. `free`: the host costs nothing. `alerts`: whether PyTorch raises for the call on
    a GPU where only deterministic algorithms may run; there, the kernel runs at every size.
    """
    architecture = _gpus.architecture(device_index)
    if alerts is not None and only_deterministic() and _asked is None:
        with contextlib.suppress(Exception):  # arguments of the wrong kinds
            if architecture != "cpu" and not unproven(architecture) and alerts(*args, **kwargs):
                return ""
    try:
        work = Work(args[0].numel()) if policy is None else policy(*args, **kwargs)
    # arguments of the wrong kinds: PyTorch is going to reject them with its own error
    except Exception:
        return Stock("option", "the size of the call cannot be told from its arguments")
    if _asked is not None:
        _asked.append((op, work))
        return Stock("gate", "the gate was only asked")
    if isinstance(work, Stock):
        return work
    found = crossover(op, architecture, work.variant)
    least, source = found.free() if free else found.least, found.source
    if work.size >= least:
        return work.variant
    if source == NO_FIGURE:
        return Stock("gate", f"size gate: {source}")
    if least == math.inf:
        return Stock("gate", f"size gate: PyTorch is as fast at every size ({source})")
    return Stock(
        "gate",
        f"size gate: {work.size:,} {work.unit}; the kernel wins from {int(least):,} ({source})",
    )


# ---- Where PyTorch raises an error --------------------------------------------------------------
#
# Many backwards of PyTorch add with atomics on a GPU. After `torch.use_deterministic_algorithms(
# True)` they raise an error. Kernels of ours add in a fixed order, so they can run there.


def only_deterministic() -> bool:
    """Whether PyTorch raises an error instead of running an algorithm that is not deterministic."""
    return (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    )


def in_backward(input, *rest, **kwargs) -> bool:
    """The rule of ops of which only the backward raises."""
    return torch.is_grad_enabled() and input.requires_grad


def always(*args, **kwargs) -> bool:
    """The rule of ops that raise in the forward."""
    return True


# ---- Floors -------------------------------------------------------------------------------------
#
# Below the floor of an op, PyTorch runs on every device and in every variant. The public function
# then calls PyTorch without a question to the gate.


class Floor:
    """The floor of one op. Whoever needs it gets each new value through a function.

    The value is -1 while it is unknown: from the start, and after the table or the devices have
    changed, until the gate is asked about a call of the op. It is also -1 while it is held: there
    are plans for graph capture then, and a small call may need one of them.
    """

    def __init__(self):
        self._setters: list[Callable[[float], None]] = []
        self.value: float = -1
        self.known = False
        self._held = False
        _floors.append(self)

    def follow(self, setter: Callable[[float], None]) -> None:
        """Call `setter` with every new value, in which `NEVER` stands for infinity."""
        self._setters.append(setter)

    def set(self, least: float) -> None:
        """Tell the value to all who follow. -1: it is unknown."""
        self.known = least >= 0
        self._held &= self.known
        self._tell(-1 if self._held else least)

    def hold(self) -> None:
        """Let no call be small, until the table or the devices change."""
        self._held = True
        self._tell(-1)

    def _tell(self, value: float) -> None:
        global version
        version += 1
        self.value = value
        for setter in self._setters:
            setter(NEVER if value == math.inf else value)


NEVER = 1 << 62  # a floor above every size, as an integer: Python compares two integers faster
version = 0  # how often a floor changed
_floors: list[Floor] = []


def floor(op: str, variants: tuple[str, ...]) -> float:
    """The least size at which a kernel of `op` wins, in any variant on any device here."""
    indices = [*range(torch.cuda.device_count())] if torch.cuda.is_initialized() else []
    if INTERPRET or not indices:
        indices.append(-1)  # tensors on the CPU
    kinds = {_gpus.architecture(index) for index in indices}
    return min(crossover(op, kind, variant).least for kind in kinds for variant in variants)


def forget() -> None:
    """Forget all floors, because the table or the devices have changed."""
    for each in _floors:
        each.set(-1)


_gpus.on_change.append(forget)
