"""`fastnn info`: what this machine has, and which functions would run on kernels here."""

from __future__ import annotations

import argparse

import torch

from fastnn import _cli, _gate, _mode, _native, _record, _runner
from fastnn._op import Op
from fastnn.kernels import _gpus

EXAMPLES = """\
  fastnn info
  fastnn info --only norm --only GELU # ops whose name contains one of these
  FASTNN_BACKEND=torch fastnn info    # how it looks with the kernels off
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="only ops whose name has NAME"
    )


def devices() -> list[str]:
    """One line per device that PyTorch sees."""
    lines = [f"cpu: {_cli.cpu_name()}"]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            lines.append(
                f"cuda:{i}: {properties.name}, {_gpus.architecture(i)}, "
                f"{properties.total_memory / 2**30:.0f} GiB, "
                f"{properties.multi_processor_count} multiprocessors"
            )
    if torch.backends.mps.is_available():
        lines.append("mps: runs stock, kernels need CUDA or ROCm")
    return lines


def plans() -> str:
    """Whether repeated calls are replayed, in words."""
    if not _record.enabled():
        return "no: FASTNN_PLANS=0"
    why = _runner.unavailable()
    if why is not None:
        return f"no: {why}"
    why = _native.unavailable()
    return "replayed in C++" if why is None else f"replayed in Python; C++: {why}"


def path(op: Op, why: str | None) -> str:
    """The path of an op here: the reason `why`, or else the answer of the first GPU's size gate."""
    if why is not None:
        return "stock"
    if _mode.INTERPRET:
        return "kernel, interpreted"
    if _mode.current_mode() == "triton":
        return "kernel"
    architecture = _gpus.architecture(0)
    source = _gate.crossover(op.name, architecture, op.variants[0]).source
    return f"{_gate.described(op.name, op.variants, architecture)} ({source})"


def _short(dtypes: tuple[torch.dtype, ...]) -> str:
    names = {"float": "fp", "bfloat": "bf", "int": "int"}
    found = []
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        kind = name.rstrip("0123456789")
        found.append(names.get(kind, kind) + name[len(kind) :])
    return " ".join(found)


def run(args: argparse.Namespace) -> int:
    console = _cli.console()
    from rich.table import Table

    from fastnn.ops import REGISTRY

    shown = {
        name: op
        for name, op in sorted(REGISTRY.items())
        if not args.only or any(o.lower() in name for o in args.only)
    }
    if not shown:
        raise _cli.nothing_matches("op", args.only)

    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, version in _cli.versions().items():
        facts.add_row(name, version)
    runtime = torch.version.cuda or torch.version.hip
    if runtime:
        facts.add_row("rocm" if torch.version.hip else "cuda", runtime)
    for line in devices():
        facts.add_row("device", line)
    facts.add_row("backend", f'"{_mode.current_mode()}"')
    why = _cli.why_no_kernels()
    how = "yes, interpreted on the CPU: slow, for tests" if _mode.INTERPRET else "yes"
    facts.add_row("kernels", how if why is None else f"no: {why}")
    facts.add_row("plans", plans())
    console.print(facts)

    rows = []
    for name, op in shown.items():
        summary = " ".join((op.fused.__doc__ or "").strip().split("\n\n")[0].split())
        rows.append((name, _short(op.dtypes), op.autocast or "", path(op, why), summary))
    columns = ("op", "dtypes", "autocast", "here", "what is fused")
    title = f"{len(REGISTRY)} ops with kernels, forward and backward"
    if args.only:
        title = f"{len(shown)} of {title}"
    console.print(
        _cli.table(
            title,
            columns,
            rows,
            console.width,
            narrow=("op", "autocast", "here"),
            left=columns,
            whole=("op",),
        )
    )
    return 0
