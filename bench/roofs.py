"""The roofs of the launches of the rows, on an H100: `python -m bench.roofs [--write]`.

`bench/roofs.json` has them. For each row it has the launches of each pass, and for each launch what
`fastnn.testing.roof` counts in the compiled code. `fastnn bench` and docs/compiled.md show them as
a warning. They are no predicted times. The gate (`bench.gates`) believes them where they are long.

    python -m bench.roofs              # compile what is not in the table, and judge it
    python -m bench.roofs --write      # the same, and write the table
    python -m bench.roofs --some       # at most `MOST` launches: the check of the tests

A launch is known by its kernel, grid, sizes, types and options, and by the source of its kernel. So
a changed kernel is compiled again, and only that. No launch may break a limit of
`fastnn.testing.roof.faults`, unless `EXCEPTIONS` has the reason. And no launch may issue more
instructions than the table has for it, beyond `GROWTH`: if that is meant, write the table again.
"""

from __future__ import annotations

import functools
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


class Allowed(NamedTuple):
    """Kernels that may break a limit, in some rows.

    kernels: a pattern. most: of instructions, as a share of the time of the bytes. least: KiB that
    a multiprocessor asks for at the same time. rows: a pattern that the key of the row contains.
    """

    kernels: str
    most: float
    least: float
    why: str
    rows: str = ""


EXCEPTIONS = (
    # Pooling. Rows without a name of their own have kernel sizes of 2.
    Allowed("_cells_bwd", 13.5, 14, "25 windows send to each element a share", "kernel_size=25"),
    Allowed("_cells_fwd", 3.3, 32, "a window of 25 elements is added up anew", "kernel_size=25"),
    Allowed("_cells_bwd", 3.8, 10, "9 windows send to each element a share", "AvgPool.*size=3"),
    Allowed("_cells_fwd", 1.3, 32, "a window of 9 elements is added up anew", "AvgPool.*size=3"),
    Allowed("_cells_(fwd|bwd)", 1.0, 11, "gradients are read first: few bytes for many elements"),
    Allowed("_pool_bwd", 380, 5, "a search for the windows of each element", "Fractional.*3d"),
    Allowed("_pool_bwd", 90, 6, "a search for the windows of each element", "Fractional"),
    Allowed("_pool_bwd", 42, 5, "windows of unequal sizes; stock in `auto`", "output_size=6"),
    Allowed("_pool_bwd", 5.2, 10, "a division for each element", "output_size=1"),
    Allowed("_pool_fwd", 7.5, 20, "the place of each window is looked up", "Fractional"),
    Allowed("_pool_fwd", 2.2, 4, "windows of unequal sizes have a mask for each element"),
    Allowed("_unpool_.*", 2.6, 20, "an index for each element, which is divided into positions"),
    # Maps between images. All of them run stock in `auto`, but for pads.
    Allowed("_gather_.*", 1.0, 15, "pads of three dimensions: a place near an edge has many terms"),
    Allowed("_interpolate_.*", 25, 9, "16 weights, each from 3 products, and an index", "bicubic"),
    Allowed("_interpolate_.*", 15, 9, "a scale that is no whole number: up to 9 x 9 places", "513"),
    Allowed("_antialias_bwd", 1300, 8, "all weights of a window, again for each element"),
    Allowed("_antialias_fwd", 33, 8, "the weights of a window, again for each element"),
    Allowed("_fold", 28, 20, "49 windows over an element, of which most do not exist", "Unfold"),
    Allowed("_(fold|unfold)", 2.0, 20, "an index for each element, from divisions"),
    Allowed("_doubled_bwd", 1.45, 32, "volumes: a place has 64 results, which lie in 16 lines"),
    # Losses.
    Allowed("_multilabel_margin_.*", 34, 16, "each class is compared with each target"),
    Allowed("_ctc_.*", 6.0, 2, "each step waits for the step before it; stock in `auto`"),
    Allowed("_rows_.*", 2.4, 32, "a short row has a sum of its own", "MultiLabelSoft"),
    Allowed("_rows_.*", 1.6, 20, "a short row has a sum of its own", "MultiMargin"),
    Allowed("_rows_.*", 1.5, 4, "three sums and products for each pair of elements"),
    Allowed("_loss_fwd", 1.79, 19, "log and log1p of libdevice for each element", "^BCELoss"),
    Allowed("_loss_(fwd|bwd)", 1.7, 14, "the row of weights is loaded anew", "pos_weight"),
    Allowed("_loss_(fwd|bwd)", 1.2, 24, "an exponential and a division", "WithLogits|MultiLabel"),
    Allowed("_loss_fwd", 0.93, 32, "an exponential and a logarithm", "SoftMargin"),
    Allowed("_loss_fwd", 0.9, 11, "log of libdevice takes registers", "KLDiv|Gaussian"),
    Allowed("_loss_fwd", 0.8, 15, "the sums in fp32 of each lane take registers"),
    Allowed("_nll_loss_bwd", 0.8, 11, "it only stores, and loads one gradient for a row"),
    Allowed("_cross_entropy_fwd", 1.55, 22, "a second sum, with the smoothing", "label_smoothing"),
    Allowed("_cross_entropy_fwd", 1.45, 32, "probabilities are a second tensor", "4096x1000"),
    Allowed(
        "_cross_entropy_.*", 1.25, 24, "rows are no multiple of 8: narrow accesses", "50257|30522"
    ),
    Allowed("_cross_entropy_.*", 1.0, 15, "an exponential for each element; 21 classes a program"),
    # Elements.
    Allowed("_pointwise_fwd", 1.0, 18, "an exponential and a logarithm", "Softplus"),
    Allowed("_pointwise_bwd", 1.05, 32, "an exponential and two exact divisions", "Mish"),
    Allowed(
        "_pointwise_fwd",
        0.8,
        18,
        "an exponential and an exact division take registers",
        "Mish",
    ),
    Allowed("_pointwise_(fwd|bwd)", 0.93, 22, "erf, expm1 and exp of libdevice"),
    Allowed("_act_(mul|glu)_.*", 0.8, 24, "exp of libdevice takes registers, so programs are few"),
    Allowed("_(strided_)?dropout", 0.95, 16, "ten rounds of Philox for four elements"),
    # Rows.
    Allowed("_residual_norm_.*", 1.25, 32, "ten rounds of Philox for four elements"),
    Allowed("_norm_fwd", 2.3, 32, "half of a tile does not exist, and accesses are narrow", "4099"),
    Allowed("_norm_.*", 1.5, 32, "rows are no multiple of 8: narrow accesses", "4099"),
    Allowed("_norm_bwd_params", 0.8, 22, "sums of dw and db take registers"),
    Allowed("_norm_fwd_chunk", 0.8, 15, "a step of Welford's recurrence takes registers"),
    Allowed("_softmax_fwd", 1.0, 32, "rows of 320: three of eight lanes have no work", "gumbel"),
    Allowed("_softmax_fwd", 1.45, 32, "rows are no multiple of 8: narrow accesses", "4099"),
    Allowed("_softmax_bwd", 0.95, 32, "rows are no multiple of 8: narrow accesses", "4099"),
    Allowed("_softmax_.*long", 0.9, 20, "rows are no multiple of 8: narrow accesses", "50257"),
    Allowed("_softmax_columns_.*", 1.95, 15, "two exponentials for each element"),
    Allowed("_softmax_fwd_(chunk|long)", 0.8, 15, "an access for each thread and step", "262144"),
    # Channels.
    Allowed("_channel_.*", 1.8, 24, "groups of 20 planes of 32 x 32, and SiLU", "640x32x32"),
    Allowed(
        "_channel_(fwd|bwd)", 1.4, 32, "sums of each group across lanes, and SiLU", "128x32x32"
    ),
    Allowed("_channel_sums", 1.2, 32, "SiLU and its derivative", "SiLU"),
    Allowed("_channel_.*", 1.05, 15, "sums across lanes for a few elements of each"),
    Allowed("_planes_fwd", 0.95, 32, "a quarter of a tile of 7 x 7 planes does not exist"),
    Allowed("_lrn_.*", 1.5, 20, "planes of odd size: a window of registers for each", "55x55"),
    Allowed("_lrn_.*", 1.2, 28, "a root, a square and a division or two for each element"),
    # Embeddings.
    Allowed("_embedding_bwd_dw", 2.1, 32, "a bit for each index that names a row"),
    Allowed("_embedding_bwd_blocks", 3.5, 2, "a bit for each index that names a row"),
    Allowed("_embedding_bag_fwd", 8.1, 32, "rows of a bag are added one by one; stock in `auto`"),
)
# Kernels of few programs that take more than 3 us.
FEW = {
    "_embedding_bwd_blocks": "a program counts the indices of a block of a table",
    "_ctc_(fwd|posterior)": "a program has all steps of a sequence",
}


def allowed(kernel: str, row: str) -> Allowed | None:
    """The first of `EXCEPTIONS` that a kernel has in a row; None if it has none."""
    kernel = kernel.removesuffix("_kernel")
    for e in EXCEPTIONS:
        if re.fullmatch(e.kernels, kernel) and re.search(e.rows, row):
            return e
    return None


def wrong_with(figures: dict, row: str) -> list[str]:
    """The limits that a launch breaks, in words, beyond what `EXCEPTIONS` and `FEW` allow."""
    kernel, exception = figures["kernel"], allowed(figures["kernel"], row)
    kinds = dict(figures["faults"])
    if exception and figures.get("issue", 0) <= exception.most:
        kinds.pop("issue", None)
    if exception and figures.get("in_flight", 0) >= 1024 * exception.least:
        kinds.pop("in flight", None)
    if any(re.fullmatch(k, kernel.removesuffix("_kernel")) for k in FEW):
        kinds.pop("fill", None)
    return [f"{kernel}: {words}" for words in kinds.values()]


def unneeded() -> list[str]:
    """The entries of `EXCEPTIONS` and `FEW` that no launch of the table needs, in words.

    Nor may a limit be a tenth wider than what the worst launch needs.
    """
    table = shipped()
    worst: dict[Allowed, list[float]] = {e: [0.8, 32.0] for e in EXCEPTIONS}
    few = set(FEW)
    for row, passes in table["rows"].items():
        for figures in (table["launches"].get(n) for names in passes for n in names):
            if not figures or not figures["faults"]:
                continue
            exception = allowed(figures["kernel"], row)
            if exception and "issue" in figures["faults"]:
                worst[exception][0] = max(worst[exception][0], figures["issue"])
            if exception and "in flight" in figures["faults"]:
                worst[exception][1] = min(worst[exception][1], figures["in_flight"] / 1024)
            if "fill" in figures["faults"]:
                few -= {k for k in few if re.fullmatch(k, figures["kernel"][: -len("_kernel")])}
    loose = [
        f"{e.kernels} {e.rows}: at most {e.most} and at least {e.least} KiB are allowed, "
        f"{issue:.2f} and {flight:.0f} KiB are needed"
        for e, (issue, flight) in worst.items()
        if e.most > 1.1 * issue or e.least < flight / 1.1 - 1 or (issue, flight) == (0.8, 32.0)
    ]
    return loose + [f"{k}: every launch fills the GPU" for k in sorted(few)]


# ---- the table ----------------------------------------------------------------------------------


@functools.cache
def shipped() -> dict[str, Any]:
    """The table: {"made": versions, "launches": {id: figures}, "rows": {key: [[id]]}}."""
    if not PATH.exists():
        return {"made": "", "launches": {}, "rows": {}}
    return json.loads(PATH.read_text())


def warning(launches: Iterable[dict]) -> str:
    """The worst of some launches, in a few words; "" if nothing keeps them from the bandwidth.

    "issue 1.3": a launch needs 1.3 times as long for its instructions as for its bytes.
    """
    launches = list(launches)
    most = max((x["issue"] for x in launches if "issue" in x and _counts(x)), default=0)
    words = [f"issue {most:.1f}"] if most > 0.8 else []
    words += ["spills"] if any(x["spilled"] for x in launches) else []
    return ", ".join(words)


def _counts(launch: dict) -> bool:
    return launch["us"] >= 3.0  # less than that is latency, as in `fastnn.testing.roof`


def warning_of(key: str) -> str:
    """`warning` of the launches of a row; "" for a row that the table does not have."""
    table = shipped()
    ids = [i for launches in table["rows"].get(key, ()) for i in launches]
    return warning([table["launches"][i] for i in ids if i in table["launches"]])


def warning_of_name(name: str) -> str:
    """`warning` of all rows of a layer or function, of which "MaxPool2d" and "max_pool2d" are one.

    "" if the table has no such row.
    """
    table = shipped()
    wanted = name.replace("_", "").lower()
    passes = [
        ids
        for key, ids in table["rows"].items()
        if key.partition("(")[0].replace("_", "").lower() == wanted
    ]
    names = {n for ids in passes for p in ids for n in p}
    return warning(table["launches"][n] for n in sorted(names) if n in table["launches"])


def by_kernel() -> str:
    """Markdown with a line for each kernel, with the worst of its launches of 3 us and more."""
    lines = [
        "| kernel | launches | instructions / bytes | KiB in flight | registers | spilled bytes |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    kernels: dict[str, list[dict]] = {}
    for launch in shipped()["launches"].values():
        kernels.setdefault(launch["kernel"], []).append(launch)
    for kernel, launches in sorted(kernels.items()):
        long = [x for x in launches if _counts(x)]
        issue = f"{max(x['issue'] for x in long):.2f}" if long else ""
        flight = f"{min(x['in_flight'] for x in long) / 1024:.0f}" if long else ""
        counted = [x for x in launches if "registers" in x]
        if not counted:  # an instruction that the emulator does not know, or an address unknown
            continue
        registers, spilled = (max(x[k] for x in counted) for k in ("registers", "spilled"))
        cells = (f"`{kernel}`", len(launches), issue, flight, registers, spilled)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


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
    from fastnn.bench.run import FORCED, in_mode
    from fastnn.testing.roof import CompiledLaunch, capture

    passes: list[list[tuple[str, str]]] = []
    launches: list[CompiledLaunch] = []

    def asked(key: tuple) -> None:
        if all(key[2]):  # a grid of no programs is not launched
            passes[-1].append(_named(key))

    with capture(launches, TARGET, lambda key: wanted(*_named(key)), asked):
        passes.append([])
        inputs = [predict.unfilled(t) for t in case.make(dtype, "meta")]
        call = case.side(fastnn, dtype, "cpu")
        with in_mode(FORCED), torch.set_grad_enabled(case.train):
            for each in predict.passes_of(case, call, inputs):
                passes.append([])
                each()
    return passes[1:], {_named(x.key)[0]: _figures(x) for x in launches}


def _figures(launch: Any) -> dict[str, Any]:
    from fastnn.testing.roof import faults, roof

    figures = {"kernel": launch.kernel, "source": _named(launch.key)[1]}
    try:
        found = roof(launch)
    # An instruction that the emulator does not know; or an address that an earlier launch would
    # have written.
    except (NotImplementedError, IndexError) as e:
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


def least_us(row: str) -> float | None:
    """The least time of both passes on the GPU, in us, by the table; None for a row it lacks.

    row: the key of a row in a dtype, as `BenchCase.key` gives it.

    A launch takes the time of its bytes or of its instructions, whichever is longer. Only the bytes
    of PyTorch's kernels are known, so a comparison with them is careful.
    """
    table = shipped()
    launches = [table["launches"].get(n) for names in table["rows"].get(row, ()) for n in names]
    if not launches or not all(x and "us" in x for x in launches):
        return None
    return sum(x["us"] * max(1.0, x["issue"]) for x in launches if x)


def judged(figures: dict, before: dict | None, row: str) -> list[str]:
    """What is wrong with a launch of a row, beyond `EXCEPTIONS`.

    `before` are its figures in the table.
    """
    wrong = wrong_with(figures, row)
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
    todo = set(new)
    found: dict[str, dict] = {}
    wrong: list[str] = []

    def wanted(name: str, source: str) -> bool:
        return name in todo

    for case, dtype in chosen:
        key = case.key(dtype)
        for name in {n for p in asked[key] for n, _ in p} & before.keys():
            if before[name]["source"] == sources[name]:
                wrong += [f"in the table, {key}: {w}" for w in judged(before[name], None, key)]
        if any(n in todo for p in asked[key] for n, _ in p):
            figures = launched(case, dtype, wanted)[1]
            todo -= figures.keys()
            found |= figures
            for name, x in figures.items():
                last = None if write else before.get(name)
                wrong += [f"{case}: {w}" for w in judged(x, last, key)]
                print(f"{case}: " + json.dumps(x), flush=True)
    if write:
        passes = table["rows"] if only else {}
        passes |= {k: [[n for n, _ in p] for p in ids] for k, ids in asked.items()}
        named_by_rows = {n for ids in passes.values() for p in ids for n in p}
        kept = {n: x for n, x in (before | found).items() if n in named_by_rows}
        made = f"Triton {triton.__version__}"
        lines = [f'"{n}": {json.dumps(kept[n])}' for n in sorted(kept)]
        named = [f"{json.dumps(k)}: {json.dumps(passes[k])}" for k in passes]
        PATH.write_text(
            f'{{"made": "{made}",\n"launches": {{\n' + ",\n".join(lines) + '\n},\n"rows": {\n'
            + ",\n".join(named) + "\n}}\n"
        )  # fmt: skip
    if not only and not write:
        wrong += [f"an exception is too wide: {words}" for words in unneeded()]
    print(*(f"WRONG: {w}" for w in dict.fromkeys(wrong)), sep="\n")
    print(f"{time.perf_counter() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
