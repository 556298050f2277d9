"""The size gate: in `auto`, whether a call is large enough for the kernel to win.

Each op has a policy, a function of the call's arguments beside the op. The policy says what the
call amounts to (`Work`), or why the kernel cannot win at any size (`Stock`). `crossover.json` says
from which size on the kernel wins, by op and variant.
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
    """What one call amounts to, as the gate compares it.

    size: how much of `unit` the call has to do.
    unit: what `size` counts, in the plural: "elements", "outputs", "logits", ...
    variant: which of the op's ways to run this call would take; "" for an op that has one.
    """

    size: int
    unit: str = "elements"
    variant: str = ""


class Slow(Stock):
    """Declines a call that a kernel could run, and for which PyTorch is as fast or faster."""


class Crossover(NamedTuple):
    """The least size at which the kernel wins, infinity where it never does; who says so; and what
    the size counts."""

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
    """The table at `path`; {} where there is no file.

    Per architecture, and under "default" for all others: the `source` of the figures, and a list of
    `crossovers`, each with the fields `op`, `variant` ("" if left out), `unit` and `least` (None:
    the kernel never wins). A field that this version does not know is ignored.
    """
    return json.loads(path.read_text()) if path.exists() else {}


@functools.cache
def _shipped() -> Mapping[str, Any]:
    return read(TABLE)


_table: Mapping[str, Any] | None = None  # in place of the shipped one, inside `using`


def table() -> Mapping[str, Any]:
    """The table in force."""
    return _shipped() if _table is None else _table


@functools.cache
def crossover(op: str, architecture: str, variant: str = "") -> Crossover:
    """From which size on the kernel of `op` wins on `architecture`."""
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
    """Who runs `op` in `auto` on `architecture`, in words: for tables and documents."""
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
    """Why estimates do not count on `architecture`, or None if they do.

    They do where the kernels were compiled and read, by a Triton at least as new as this one.
    What `fastnn tune` measured counts in any case.
    """
    if not HAS_TRITON or architecture in ("cpu", "default"):
        return None
    from fastnn import kernels  # Triton is loaded with it, on the first question about a GPU

    least = _gpus.facts(architecture).compiled_from
    if least is None:
        return f"kernels were not compiled for {architecture}; `fastnn tune` measures them"
    if TorchVersion(kernels._launch.triton_version()) < least:
        return f"on {architecture} kernels need triton {least}"
    return None


@contextmanager
def using(new: Mapping[str, Any]) -> Iterator[None]:
    """`new` in place of the shipped table, inside the block and in all threads."""
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
    """Collects (op, what its policy says) of every call in the block, all of which run PyTorch."""
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

    The call amounts to what `policy` says, or to the `most` elements that one of its tensors has.
    """
    try:
        work = Work(most) if policy is None else policy(*args, **kwargs)
    except Exception:  # arguments of the wrong kinds, which PyTorch is going to reject in its words
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
# A call that the gate declined need not be asked about again. To remember "PyTorch" wrongly would
# cost speed, never a right answer.

_MOST = 1024  # calls remembered per op
_memories: list[set] = []


def memory() -> set:
    """A new set, for the calls of one op that were declined."""
    _memories.append(set())
    return _memories[-1]


def remember(declined: set, key: tuple) -> None:
    """Add `key` to `declined`, unless it would keep a tensor alive."""
    if not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(key)):
        if len(declined) >= _MOST:  # of a model whose shapes never repeat
            declined.clear()
        declined.add(key)


def forget() -> None:
    """Forget all of them: the table, or the device, is another one."""
    for declined in _memories:
        declined.clear()


_gpus.on_change.append(forget)
