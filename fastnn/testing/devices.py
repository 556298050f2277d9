"""The gate as on another device, or by other figures: for tests and tools."""

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
    """Inside the block, dispatch decides as on another device; nothing is launched on it.

    architecture: what every device counts as, the CPU included: "sm_90", "gfx942", or one that the
        table of GPUs lacks. The default is what each device is.
    least: from which size on kernels win. A number holds for every op and variant. A mapping names
        ops, with all their variants, or (op, variant); None is never. The default is the shipped
        table.
    others: of the ops that `least` does not name, whether they never win, or by the shipped table.
    source: who says so, as reasons tell it.
    devices: the types of devices whose tensors kernels take, besides those that they take anyway.

    Raises KeyError for an op in `least` that there is not.
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
