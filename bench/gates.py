"""Computes the estimates of the size gate: `python -m bench.gates --host DIR/host.json`.

A kernel saves time on the GPU in proportion to the size of a call, and costs the host a time that
does not depend on the size. The estimate of a gate is the size at which the two are equal:

    saved bytes / bandwidth = max(0, host time of ours - host time of stock
                                     + 6 us * (launches of ours - launches of stock) + 2 us)

The bytes are those of `bench.predict`: both passes of the training rows of an op in bfloat16, on an
H100 of which both sides reach 3.05 TB/s. A launch costs the GPU 6 us beside its bytes. Both figures
come from a calibration against published times. Where the instructions of our launches take longer
than their bytes (`bench.roofs`), that time counts for ours. Of several rows of a variant, the one
that saves least for its size counts. The host times are those of `python -m bench.host`: of one
more call, by the Python runner of plans, against operators of stock that compute nothing.
Operators that `bench/null.cpp` does not replace do compute, so stock counts at most 5.2 us for
each launch on CUDA; no operator that is replaced needs more. The last 2 us are a margin. Ops that
a container runs for several members cost 8 us more. All of this is an estimate. `fastnn tune`
measures.

The program prints the table, and with `--write` it puts the new sizes into `crossover.json`, also
those of ops that have no line there. Ops whose bytes depend on data, or whose time is bound by
matrix products, keep what they have, except for `linear_act` after a product of PyTorch: there the
product is the same on both sides.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fastnn import _gate
from fastnn._gate import LEAST_OF_ESTIMATES as LEAST
from fastnn._gate import Work
from fastnn.bench.cases import CASES, BenchCase

BANDWIDTH = 3.05e12  # bytes per second, of both sides
LAUNCH = 6.0  # us on the GPU for each launch
EACH = 5.2  # us of the host: stock needs at most so much for each launch
MARGIN = 2.0  # us
GROUP = 8.0  # us, assumed: what a container needs to see that members may run as one op
GROUPED = ("batch_norm_act", "group_norm_act", "dropout_add")  # ops of containers begin so
SAVES = 0.03  # of the time of stock: a kernel that saves less never wins


class Estimate(NamedTuple):
    """The estimate for one op and variant.

    saved: us on the GPU per million units of size. host: us that a call costs the host more.
    least: the size from which the kernel wins; None if it never does. unit: what the size counts.
    """

    op: str
    variant: str
    saved: float
    host: float
    least: int | None
    unit: str = "elements"


def _rows() -> Iterator[tuple[str, Work, BenchCase]]:
    """(op, its work, row) for the training rows of one op."""
    from fastnn.bench.predict import ARCHITECTURE
    from fastnn.bench.tune import gate_work

    for case in CASES:
        asked = (
            gate_work(case, ARCHITECTURE, torch.bfloat16)
            if case.train and case.flops is None
            else []
        )
        for op, work in asked if len(asked) == 1 else ():
            if work is None:
                continue
            yield op, work, case


OUTPUTS = 8192, 3072  # of the product of an MLP of BERT-base


def _after_products() -> Iterator[tuple[str, Work, int, int]]:
    """(op, its work, bytes of stock, our bytes) of `linear_act` after a product of PyTorch.

    The product is the same on both sides, and is left out.
    """
    from fastnn.bench import traffic
    from fastnn.ops import REGISTRY
    from fastnn.ops.linear import linear_act
    from fastnn.testing.meter import as_on_cuda

    M, N = OUTPUTS
    sizes = (M, 768), (N, 768), (N,)
    for variant, options in (
        ("epilogue", {"activation": "gelu"}),
        ("dropout", {"activation": "gelu", "p": 0.1, "training": True}),
    ):
        x, w, b = (
            torch.empty(s, dtype=torch.bfloat16, device="meta", requires_grad=True) for s in sizes
        )
        with as_on_cuda(), traffic.Outside() as stock:
            y = REGISTRY["linear_act"].stock(x, w, b, **options)
            torch.autograd.grad(y, (x, w, b), torch.empty_like(y))
        ours = traffic.cost_of_call(linear_act, (x, w, b), options, 0)
        yield (
            "linear_act",
            Work(M * N, "outputs", variant),
            stock.cost.bytes,
            sum(c.bytes for c in ours),
        )


def rounded(size: float) -> int:
    """`size`, rounded up to a power of two below 2**20, and to a multiple of 2**20 above."""
    size = max(size, LEAST)
    if size <= 1 << 20:
        return 1 << math.ceil(math.log2(size))
    return -(-math.ceil(size) >> 20) << 20


def host_costs(rows: Sequence[dict], runner: str = "python") -> dict[str, float]:
    """Op -> how many us a call of ours costs the host more than stock; of several rows the most.

    runner: of plans, "python" or "native".
    """
    found: dict[str, float] = {}
    for row in rows:
        if len(row["ops"]) == 1:
            launches = row["ours_launches"] - row["stock_launches"]
            stock = min(row["stock_us"], EACH * row["stock_launches"])
            more = row[f"{runner}_us"] - stock + LAUNCH * launches + MARGIN
            op = row["ops"][0]
            more += GROUP if op.startswith(GROUPED) else 0.0
            found[op] = max(more, found.get(op, -math.inf))
    return found


def estimates(rows: Sequence[dict], runner: str = "python") -> list[Estimate]:
    """The estimates that follow from the rows of host.json."""
    from fastnn.bench.predict import predicted
    from fastnn.bench.roofs import least_us

    host = host_costs(rows, runner)
    rates: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for op, work, case in _rows():
        size = work.size
        if op not in host or size < 1 << 20:
            continue
        record = predicted(case, torch.bfloat16)
        if record["why"] is not None:
            continue
        stock, ours = (sum(p["bytes"] for p in record[side]) for side in ("stock", "ours"))
        stock_us, ours_us = (b / BANDWIDTH * 1e6 for b in (stock, ours))
        ours_us = max(ours_us, least_us(case.key(torch.bfloat16)) or 0.0)
        saved = (stock_us - ours_us) / size * 1e6
        rates.setdefault((op, work.variant, work.unit), []).append((saved, stock_us / size * 1e6))
    for op, work, theirs, ours in _after_products() if "linear_act" in host else ():
        saved, of = ((b / BANDWIDTH * 1e12) / work.size for b in (theirs - ours, theirs))
        rates[op, work.variant, work.unit] = [(saved, of)]
    found = []
    for (op, variant, unit), pairs in sorted(rates.items()):
        saved, of = min(pairs)
        wins = saved > SAVES * of
        least = rounded(max(host[op], 0.0) / saved * 1e6) if wins else None
        found.append(Estimate(op, variant, saved, host[op], least, unit))
    return found


def write(found: Sequence[Estimate], path: Path) -> None:
    """Put the estimates into the entry "default" of the table at `path`, new ops at their place."""
    table = _gate.read(path)
    lines = table["default"]["crossovers"]
    known = {(line["op"], line.get("variant", "")): line for line in lines}
    for e in found:
        if (e.op, e.variant) in known:
            known[e.op, e.variant]["least"] = e.least
            continue
        variant = {"variant": e.variant} if e.variant else {}
        at = next((i for i, line in enumerate(lines) if line["op"] > e.op), len(lines))
        lines.insert(at, {"op": e.op, **variant, "least": e.least, "unit": e.unit})
    path.write_text(_text(table))


def _text(table: dict) -> str:
    """The table as JSON, with one line for each crossover."""
    entries = []
    for name, entry in table.items():
        lines = ",\n".join(
            "      {{ {} }}".format(
                ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in x.items())
            )
            for x in entry["crossovers"]
        )
        rest = "".join(
            f"    {json.dumps(k)}: {json.dumps(v)},\n"
            for k, v in entry.items()
            if k != "crossovers"
        )
        entries.append(f'  {json.dumps(name)}: {{\n{rest}    "crossovers": [\n{lines}\n    ]\n  }}')
    return "{\n" + ",\n".join(entries) + "\n}\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gates", description=__doc__)
    parser.add_argument("--host", type=Path, required=True, metavar="FILE", help="a host.json")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the estimates as JSON")
    parser.add_argument("--write", action="store_true", help="put the sizes into crossover.json")
    parser.add_argument(
        "--runner", choices=("python", "native"), default="python", help="of plans; default: python"
    )
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") != "1":
        print(
            "bench.gates: bytes are counted in the interpreter: set TRITON_INTERPRET=1",
            file=sys.stderr,
        )
        return 2
    found = estimates(json.loads(args.host.read_text())["rows"], args.runner)
    print(f"{'op':34} {'variant':12} {'saves us/M':>10} {'host us':>8} {'from':>12} {'before':>12}")
    for e in found:
        before = _gate.crossover(e.op, "default", e.variant).least
        least = "never" if e.least is None else f"{e.least:,}"
        old = "never" if before == math.inf else f"{int(before):,}"
        print(f"{e.op:34} {e.variant:12} {e.saved:10.3f} {e.host:8.1f} {least:>12} {old:>12}")
    if args.out:
        lines = ",\n".join(json.dumps(e._asdict()) for e in found)
        args.out.write_text(f"[\n{lines}\n]\n")
    if args.write:
        write(found, _gate.TABLE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
