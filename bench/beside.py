"""Our kernels beside those of Liger, without a GPU: `python -m bench.beside [--write] [ROW ...]`.

Each row of `bench.cases` of which Liger has a counterpart (`bench.liger`, extra `bench`) is
compiled for an H100, ours and Liger's, in its narrowest dtype. `fastnn.testing.roof` counts both. A
launch takes the time of the part of the GPU that needs longest; an operator of PyTorch takes the
time of its bytes. Registers that a kernel spills count as bytes too, once, as stores to memory:
that is an assumption. What a launch costs by itself is left out, so launches are counted beside it.
This is no measurement: it says what the compiled code needs at the least. A row has no figure if
Liger does not take it, or if its kernels add by atomics, which are not counted.

`--write` puts the figures into bench/results/counted/beside.json, from which
`python -m tools.generate` makes a table of docs/benchmarks.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

import fastnn
from fastnn.bench import liger
from fastnn.bench.cases import BenchCase

PATH = Path(__file__).parent / "results" / "counted" / "beside.json"


def rows() -> list[tuple[BenchCase, torch.dtype]]:
    """The rows that bytes bound and that Liger may have, each in its narrowest dtype."""
    from fastnn.bench import roofs

    return [
        (case, dtype)
        for case, dtype in roofs.rows()
        if case.train and case.build is None and case.name in liger.NAMES
    ]


def _passes(call: Callable, inputs: list[Any], theirs: bool) -> list[Callable]:
    kept: list[torch.Tensor] = []
    parameters = list(call.parameters()) if hasattr(call, "parameters") else []
    leaves = [t for t in (*inputs, *parameters) if isinstance(t, torch.Tensor) and t.requires_grad]

    def forward() -> None:
        kept.append(call(*inputs))
        # The gradient of a loss is 1, for which some functions have a shorter way.
        one = kept[0].dim() == 0
        kept.append(torch.ones_like(kept[0]) if one else torch.empty_like(kept[0]))

    def backward() -> None:
        if theirs:  # one autograd function. Inside `torch.autograd.grad`, `_OnCuda` is off.
            node: Any = kept[0].grad_fn
            node.apply(kept[1], *[None] * (len(node._input_metadata) - 1))  # of its other results
        else:
            torch.autograd.grad(kept[0], leaves, kept[1])

    return [forward, backward]


def counted(call: Callable, inputs: list[Any], theirs: bool) -> list[dict[str, Any]]:
    """For each pass: microseconds, and the kernels and operators that it runs."""
    from fastnn.kernels import _gpus
    from fastnn.testing.meter import AtenTraffic
    from fastnn.testing.roof import CompiledLaunch, capture_any, roof

    found = []
    for run in _passes(call, inputs, theirs):
        launches: list[CompiledLaunch] = []
        with (
            capture_any(launches),
            AtenTraffic() as aten,
            # Dispatch of fastnn declines under a dispatch mode, but this mode only observes.
            mock.patch.object(torch._C, "_len_torch_dispatch_stack", lambda: 0),
            _as_on_cuda() if theirs else fastnn.backend("triton"),
        ):
            run()
        made = [roof(x) for x in launches]
        # The gradient of the pass is made in the first one, and costs nothing.
        operators = [op for op in aten.ops if op.name not in ("ones_like", "empty_like", "fill_")]
        moved = sum(op.read + op.written for op in operators)
        per_us = _gpus.GPUS["sm_90"].reached / 1e6
        spilled = sum(r.spilled for r in made)
        took = sum(max(*r.us.values(), r.us["dram"] + r.spilled / 2 / per_us) for r in made)
        found.append(
            {
                "us": float(took + moved / per_us),
                "spilled": spilled,
                "launches": len(made) + sum(op.launches for op in operators),
                "runs": [f"{r.kernel}: {r.us[r.worst]:.1f} {r.worst}, {r.us['dram']:.1f} bytes"
                         for r in made] + [op.name for op in operators],
            }
        )  # fmt: skip
    return found


_DEVICE = torch.Tensor.device.__get__  # type: ignore[attr-defined]


class _OnCuda(TorchFunctionMode):
    """In the block, CPU tensors say that they are on CUDA, by which Liger sets its grids."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if torch.device("cuda") == kwargs.get("device", None):
            kwargs["device"] = "cpu"
        out = func(*args, **kwargs)
        return torch.device("cuda") if func == _DEVICE else out


@contextmanager
def _as_on_cuda() -> Iterator[None]:
    with (
        _OnCuda(),
        mock.patch.object(torch.cuda, "device", lambda device: nullcontext()),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
    ):
        yield


def compared(case: BenchCase, dtype: torch.dtype) -> dict[str, Any] | None:
    """The record of a row; None if Liger has no counterpart."""
    from fastnn.bench import predict

    stock = case.side(torch.nn, dtype, "cpu")
    theirs = liger.counterpart(case, stock)
    if theirs is None:
        return None
    record: dict[str, Any] = {"row": case.key(dtype), "from": case.model}
    for name, call in (("ours", case.side(fastnn, dtype, "cpu")), ("liger", theirs)):
        inputs = [predict.unfilled(t) for t in case.make(dtype, "meta")]
        try:
            record[name] = counted(call, inputs, name == "liger")
        except (NotImplementedError, RuntimeError) as e:
            atomics = isinstance(e, NotImplementedError) and "atom" in str(e)
            record["why"] = f"{name}: {'atomics' if atomics else str(e).splitlines()[0]}"
            break
    return record


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: microseconds of both, and ours over theirs, for forward, backward, and both.

    The gradients of some losses are computed in the forward. Then only both passes are compared.
    """
    lines = [
        "| row | from | pass | us, ours | us, Liger | ratio | launches, ours | Liger "
        "| MB spilled, Liger |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for record in records:
        head = [f"`{record['row']}`", record["from"]]
        if "why" in record:
            lines.append("| " + " | ".join([*head, record["why"], *[""] * 6]) + " |")
            continue
        forward, backward = zip(record["ours"], record["liger"], strict=True)
        pairs = {"forward": forward, "backward": backward}
        sums = [
            {key: sum(p[key] for p in passes) for key in ("us", "launches", "spilled")}
            for passes in (record["ours"], record["liger"])
        ]
        early = backward[1]["us"] < 0.01 * forward[1]["us"]
        for name, (ours, theirs) in {**({} if early else pairs), "both": tuple(sums)}.items():
            cells = [name, f"{ours['us']:.1f}", f"{theirs['us']:.1f}"]
            cells.append(f"{ours['us'] / theirs['us']:.2f}")
            cells += [str(side["launches"]) for side in (ours, theirs)]
            cells.append(f"{theirs['spilled'] / 1e6:.0f}" if theirs["spilled"] else "")
            lines.append("| " + " | ".join(head + cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    if liger.version() is None:
        print("Liger is not installed: pip install 'fastnn[bench]'")
        return 1
    only = [a for a in arguments if not a.startswith("--")]
    records = []
    for case, dtype in rows():
        if only and not any(o in str(case) for o in only):
            continue
        record = compared(case, dtype)
        if record is not None:
            records.append(record)
            print(json.dumps(record), file=sys.stderr, flush=True)
    print(table(records), end="")
    if "--write" in arguments:
        if only:  # the other rows stay
            new = {record["row"]: record for record in records}
            kept = json.loads(PATH.read_text())["rows"]
            records = [new.pop(record["row"], record) for record in kept] + [*new.values()]
        lines = ",\n".join(json.dumps(r) for r in records)
        made = {"liger": liger.version(), "torch": torch.__version__}
        PATH.write_text(f'{{"made": {json.dumps(made)},\n"rows": [\n{lines}\n]}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
