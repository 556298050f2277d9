"""The size gate: in `auto`, it decides whether a call is large enough for the kernel to win.

Each op has a policy, a function of the call's arguments that is declared beside the op. The policy
says how much work the call is (`Work`), or why the kernel cannot win at any size (`Stock`). For
each op and variant, `crossover.json` gives the size from which the kernel wins.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.torch_version import TorchVersion
from torch.utils._pytree import tree_leaves

from fastnn._mode import HAS_TRITON, Stock
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


class Slow(Stock):
    """Declines a call that a kernel could run, because PyTorch is as fast or faster."""


class Crossover(NamedTuple):
    """From which size the kernel wins.

    least: the least size at which the kernel wins; infinity if it never wins.
    source: where this figure comes from.
    unit: what the size counts.
    """

    least: float
    source: str
    unit: str = "elements"

    def __str__(self) -> str:
        if self.least == math.inf:
            return "stock"
        return f"kernel from {int(self.least):,} {self.unit}"


Policy = Callable[..., Work | Stock]


# ---- The table ----------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    """The table at `path`; {} if there is no file.

    The table has one entry per architecture, and the entry "default" for all others. An entry has
    the `source` of the figures and a list of `crossovers`. Each crossover has the fields `op`,
    `variant` ("" if left out), `unit` and `least` (None: the kernel never wins). Fields that this
    version does not know are ignored.
    """
    return json.loads(path.read_text()) if path.exists() else {}


@functools.cache
def _shipped() -> Mapping[str, Any]:
    return read(TABLE)


_table: Mapping[str, Any] | None = None  # replaces the shipped table inside `using`


def table() -> Mapping[str, Any]:
    """The table in force."""
    return _shipped() if _table is None else _table


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
                least = math.inf if line["least"] is None else line["least"]
                return Crossover(least, entry["source"], line.get("unit", "elements"))
    return Crossover(math.inf, why or "no figure")


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
    forget()
    try:
        yield
    finally:
        _table = before
        crossover.cache_clear()
        forget()


# ---- The decision -------------------------------------------------------------------------------


_asked: list[tuple[str, Work | Stock]] | None = None


@contextmanager
def asked() -> Iterator[list[tuple[str, Work | Stock]]]:
    """Collect (op, its policy's answer) for every call in the block. All these calls run
    PyTorch."""
    global _asked
    before, _asked = _asked, []
    forget()
    try:
        yield _asked
    finally:
        _asked = before
        forget()


def decide(
    op: str, policy: Policy | None, most: int, device_index: int, args: tuple, kwargs: dict
) -> Stock | str:
    """The variant of `op` to run, or why PyTorch is to run the call.

    `policy` says how much work the call is. Without a policy, the size is `most`, the element count
    of the largest tensor among the arguments.
    """
    try:
        work = Work(most) if policy is None else policy(*args, **kwargs)
    # arguments of the wrong kinds: PyTorch is going to reject them with its own error
    except Exception:
        return Stock("the size of the call cannot be told from its arguments")
    if _asked is not None:
        _asked.append((op, work))
        return Stock("the gate was only asked")
    if isinstance(work, Stock):
        return Slow(work.why)
    least, source, _ = crossover(op, _gpus.architecture(device_index), work.variant)
    if work.size >= least:
        return work.variant
    if least == math.inf:
        return Slow(f"size gate: PyTorch is as fast at every size ({source})")
    return Slow(
        f"size gate: {work.size:,} {work.unit}; the kernel wins from {int(least):,} ({source})"
    )


# ---- Decisions remembered -----------------------------------------------------------------------
#
# The gate need not be asked again about a call that it declined. If "PyTorch" is remembered
# wrongly, the call is slower, but its result is still right.

_MOST = 1024  # calls remembered per op
_memories: list[set] = []


def memory() -> set:
    """A new set for the declined calls of one op."""
    _memories.append(set())
    return _memories[-1]


def remember(declined: set, key: tuple) -> None:
    """Add `key` to `declined`, unless it would keep a tensor alive."""
    if not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(key)):
        if len(declined) >= _MOST:  # a model whose shapes never repeat
            declined.clear()
        declined.add(key)


def forget() -> None:
    """Forget all declined calls, because the table or the device has changed."""
    for declined in _memories:
        declined.clear()


_gpus.on_change.append(forget)
