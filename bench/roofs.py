"""The roofs of the launches of the rows, on an H100: `python -m bench.roofs [--write]`.

`bench/roofs.json` has them. For each row it has the launches of each pass, and for each launch what
`fastnn.testing.roof` counts in the compiled code. `fastnn bench`, the parity report and
docs/compiled.md show them as a warning. They are no predicted times.

    python -m bench.roofs              # compile what is not in the table, and judge it
    python -m bench.roofs --write      # the same, and write the table
    python -m bench.roofs --some       # at most `MOST` launches: the check of the tests

A launch is known by its kernel, grid, sizes, types and options, and by the source of its kernel. So
a changed kernel is compiled again, and only that. No launch may break a limit of
`fastnn.testing.roof.faults`, unless `EXCEPTIONS` has the reason. And no launch may issue more
instructions than the table has for it, beyond `GROWTH`: if that is meant, write the table again.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastnn
from fastnn.bench.cases import CASES, BenchCase

PATH = Path(__file__).with_name("roofs.json")
TARGET = "cuda:90"
MOST = 32  # launches that `--some` compiles
GROWTH = 1.05


class Exception_(NamedTuple):
    """Launches that may break a limit. kernel: a pattern. kind: as in `faults`."""

    kernel: str
    kind: str
    why: str


EXCEPTIONS: tuple[Exception_, ...] = ()


# ---- the table ----------------------------------------------------------------------------------


def shipped() -> dict[str, Any]:
    """The table: {"made": versions, "launches": {id: figures}, "rows": {key: [[id]]}}."""
    if not PATH.exists():
        return {"made": "", "launches": {}, "rows": {}}
    return json.loads(PATH.read_text())


def warning(launches: Iterable[dict]) -> str:
    """The worst of some launches, in a few words; "" if nothing keeps them from the bandwidth.

    "issue 1.3": a launch needs 1.3 times as long for its instructions as for its bytes.
    """
    found = [(x["share"], f"{x['part']} {x['share']:.1f}") for x in launches if _counts(x)]
    found = [(share, words) for share, words in found if share > 0.8]
    words = [max(found)[1]] if found else []
    words += ["spills"] if any(x["spilled"] for x in launches) else []
    return ", ".join(words)


def _counts(launch: dict) -> bool:
    from fastnn.testing.roof import SHORT_US

    return launch["us"] >= SHORT_US


def warning_of(key: str) -> str:
    """`warning` of the launches of a row; "" for a row that the table does not have."""
    table = shipped()
    return warning([table["launches"][i] for ids in table["rows"].get(key, ()) for i in ids])


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def _named(key: tuple) -> tuple[str, str]:
    """(id, source) of the key of a launch."""
    kernel, source, grid, arguments, meta = key
    sources = [source]
    plain = []
    for name, value in meta:
        if isinstance(value, tuple) and len(value) == 2:  # a function: its name, its source
            sources.append(value[1])
            value = value[0]
        plain.append((name, value))
    return _digest((kernel, grid, arguments, tuple(plain))), _digest(sources)


# ---- the sweep ----------------------------------------------------------------------------------


def rows() -> list[tuple[BenchCase, torch.dtype]]:
    """The rows that bytes bound, each in its narrowest dtype, in which instructions weigh most."""
    from fastnn.bench import predict

    found = []
    for case in CASES:
        dtype = min(case.dtypes, key=lambda t: t.itemsize)
        if case.flops is None and predict.too_large(case, dtype) is None:
            found.append((case, dtype))
    return found


def launched(
    case: BenchCase, dtype: torch.dtype, wanted: Callable[[str, str], bool]
) -> tuple[list[list[tuple[str, str]]], dict[str, dict]]:
    """((id, source) of the launches of each pass; the figures of those that are `wanted`)."""
    from fastnn.bench import predict
    from fastnn.bench.run import FORCED, _around
    from fastnn.testing.roof import Launch, capture

    passes: list[list[tuple[str, str]]] = []
    launches: list[Launch] = []

    def asked(key: tuple) -> None:
        passes[-1].append(_named(key))

    with capture(launches, TARGET, lambda key: wanted(*_named(key)), asked):
        passes.append([])
        inputs = [predict._unfilled(t) for t in case.make(dtype, "meta")]
        call = case.side(fastnn, dtype, "cpu")
        with _around(FORCED), torch.set_grad_enabled(case.train):
            for each in predict._passes(case, call, inputs):
                passes.append([])
                each()
    return passes[1:], {_named(x.key)[0]: _figures(x) for x in launches}


def _figures(launch: Any) -> dict[str, Any]:
    from fastnn.testing.roof import faults, roof

    figures = {"kernel": launch.kernel, "source": _named(launch.key)[1]}
    try:
        found = roof(launch)
    except NotImplementedError as e:
        return figures | {"why": str(e)[:80], "us": 0.0, "spilled": 0, "faults": {}}
    return figures | {
        "programs": found.programs,
        "warps": found.warps,
        "registers": found.registers,
        "blocks": found.blocks,
        "instructions": found.instructions,
        "us": round(found.us["dram"], 2),
        "issue": round(found.share("issue"), 3),
        "part": found.worst,
        "share": round(found.share(found.worst), 3),
        "spilled": found.spilled,
        "in_flight": found.in_flight,
        "faults": faults(found),
    }


def judged(figures: dict, before: dict | None) -> list[str]:
    """What is wrong with a launch, beyond `EXCEPTIONS`; `before` are its figures in the table."""
    wrong = [
        f"{figures['kernel']}: {words}"
        for kind, words in figures["faults"].items()
        if not any(kind == e.kind and re.fullmatch(e.kernel, figures["kernel"]) for e in EXCEPTIONS)
    ]
    if before and "instructions" in before and "instructions" in figures:
        was, now = before["instructions"], figures["instructions"]
        if now > GROWTH * was:
            wrong.append(f"{figures['kernel']}: {now} instructions of a warp, {was} in the table")
    return wrong


def main(arguments: list[str]) -> int:
    import triton

    began = time.perf_counter()
    some, write = "--some" in arguments, "--write" in arguments
    seed = int(os.environ.get("FASTNN_SEED", "0")) or int(time.time()) // 86400
    only = [a for a in arguments if not a.startswith("--")]
    table = shipped()
    before = table["launches"]
    chosen = [(c, d) for c, d in rows() if not only or any(o in str(c) for o in only)]
    nothing: Callable[[str, str], bool] = lambda name, source: False  # noqa: E731
    asked = {case.key(dtype): launched(case, dtype, nothing)[0] for case, dtype in chosen}
    sources = {name: source for ids in asked.values() for p in ids for name, source in p}
    new = [n for n, s in sources.items() if n not in before or before[n]["source"] != s]
    old = [n for n in sources if n not in set(new)]
    print(f"{len(chosen)} rows, {len(sources)} launches, {len(new)} not in the table")
    if some:
        draw = random.Random(seed)
        draw.shuffle(new)
        # Of each source one launch, then as many others as there is time for.
        first = list({sources[n]: n for n in new}.values())
        new = list(dict.fromkeys(first + new))[:MOST]
        new += draw.sample(old, min(4, len(old)))
        print(f"{len(new)} of them are compiled, seed {seed}")
    todo, found, wrong = set(new), {}, []
    for case, dtype in chosen:
        if any(n in todo for p in asked[case.key(dtype)] for n, _ in p):
            figures = launched(case, dtype, lambda name, source: name in todo)[1]
            todo -= figures.keys()
            found |= figures
            for name, x in figures.items():
                wrong += [f"{case}: {w}" for w in judged(x, None if write else before.get(name))]
                print(f"{case}: " + json.dumps(x), flush=True)
    for name in sources.keys() & before.keys() - found.keys():
        if before[name]["source"] == sources[name]:
            wrong += [f"in the table: {w}" for w in judged(before[name], None)]
    if write:
        kept = {n: x for n, x in before.items() if n in sources or only} | found
        passes = table["rows"] if only else {}
        passes |= {k: [[n for n, _ in p] for p in ids] for k, ids in asked.items()}
        made = f"Triton {triton.__version__}"
        lines = [f'"{n}": {json.dumps(kept[n])}' for n in sorted(kept)]
        named = [f"{json.dumps(k)}: {json.dumps(passes[k])}" for k in passes]
        PATH.write_text(
            f'{{"made": "{made}",\n"launches": {{\n' + ",\n".join(lines) + '\n},\n"rows": {\n'
            + ",\n".join(named) + "\n}}\n"
        )  # fmt: skip
    print(*(f"WRONG: {w}" for w in dict.fromkeys(wrong)), sep="\n")
    print(f"{time.perf_counter() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
