"""The size gate as on another device, or with other crossover sizes: for tests and tools."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Literal
from unittest import mock

from fastnn import _gate, _op
from fastnn.kernels import _gpus


@contextmanager
def simulated(
    architecture: str | None = None,
    *,
    least: int | Mapping[str | tuple[str, str], int | None] | None = None,
    others: Literal["never", "shipped"] = "never",
    source: str = "simulated",
    devices: Collection[str] = (),
) -> Iterator[None]:
    """Inside the block, dispatch decides as on another device; nothing is launched on that device.

    architecture: the architecture of every device, the CPU included: "sm_90", "gfx942", or one
        that the table of GPUs lacks. By default each device has its own.
    least: the size from which kernels win. A number holds for every op and variant. The keys of a
        mapping are ops, with all their variants, or (op, variant); None means never. The default
        is the shipped table.
    others: whether the ops that `least` does not name never win, or follow the shipped table.
    source: the source of these sizes, as reasons name it.
    devices: more types of devices whose tensors kernels take.

    Raises KeyError if `least` names an op that does not exist.
    """
    from fastnn.ops import REGISTRY

    with ExitStack() as stack:
        if architecture is not None:
            stack.enter_context(_gpus.simulated(architecture))
        if least is not None:
            named = dict.fromkeys(REGISTRY, least) if isinstance(least, int) else least
            sizes: dict[tuple[str, str], int | None] = {}
            for name, size in named.items():
                if isinstance(name, tuple):
                    sizes[name] = size
                else:
                    sizes |= {(name, variant): size for variant in REGISTRY[name].variants}
            lines = [{"op": o, "variant": v, "least": size} for (o, v), size in sizes.items()]
            if others == "shipped":
                lines += _gate.table()["default"]["crossovers"]
            table = {"default": {"source": source, "crossovers": lines}}
            stack.enter_context(_gate.using(table))
        if devices:
            wider = {*_op.kernel_devices, *devices}
            stack.enter_context(mock.patch.object(_op, "kernel_devices", wider))
        yield


@contextmanager
def surveyed() -> Iterator[list[str]]:
    """Collect the name of an op for each call in the block that takes the long way.

    These calls look at all arguments. A call below the floor does not, and a call that a plan
    replays does not.
    """
    names: list[str] = []
    survey = _op.survey

    def noting(op, args, kwargs):
        names.append(op.name)
        return survey(op, args, kwargs)

    with mock.patch.object(_op, "survey", noting):
        yield names
