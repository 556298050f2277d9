"""Finds launch configurations that beat the formulas on the present GPU: `fastnn tune`.

A question is a call of a configuration function with the arguments of some rows. The search begins
at the formula's answer. It climbs to the best neighbour, as long as a neighbour is faster by a
margin over all rows that ask the same question, and slower for none of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fastnn
from fastnn import kernels
from fastnn.bench import predict
from fastnn.bench.cases import BenchCase
from fastnn.bench.environment import environment, measured
from fastnn.bench.measure import Clock, interleaved
from fastnn.bench.run import (
    FORCED,
    Results,
    both_passes,
    compare_row,
    geometric_mean,
    in_mode,
    make_sides,
)

MARGIN = 0.03
MOST_STEPS = 4
MOST_ROWS = 4  # a question is judged by at most so many rows
REPEATS = 15

Row = tuple[BenchCase, torch.dtype]


@dataclass
class Question:
    """A configuration function of `kernels`, its arguments, and the rows that call it so."""

    function: Any  # kernels._config.Tunable
    arguments: str
    formula: dict
    rows: list[Row] = field(default_factory=list)

    @property
    def key(self) -> str:
        return f"{self.function.name}({self.arguments})"


def plan(rows: Iterable[Row], make: Callable[[BenchCase, torch.dtype], Callable]) -> list[Question]:
    """The questions that the rows ask; `make` returns a function that runs one row."""
    found: dict[str, Question] = {}
    for case, dtype in rows:
        with kernels._config.trying({}), kernels._config.heard() as heard:
            make(case, dtype)()
        for function, arguments, formula in heard:
            if not any(True for _ in function.neighbours(formula)):
                continue
            question = Question(function, arguments, formula)
            question = found.setdefault(question.key, question)
            if (case, dtype) not in question.rows:
                question.rows.append((case, dtype))
    return list(found.values())


@contextmanager
def without_a_gpu(target: str = "cuda:90") -> Iterator[Callable]:
    """Yields the `make` of a plan as on `target`. Rows launch, but nothing is compiled or run."""
    from fastnn.testing.aot import compile_only

    def make(case, dtype):
        def run():
            if predict.too_large(case, dtype) is None:
                inputs = [predict.unfilled(t) for t in case.make(dtype, "meta")]
                call = case.side(fastnn, dtype, "cpu")
                with in_mode(FORCED), torch.set_grad_enabled(case.train):
                    for each in predict.passes_of(case, call, inputs):
                        each()

        return run

    with compile_only(target, wanted=lambda what: False):
        yield make


def on(clock: Clock) -> Callable:
    """The `make` for a plan on the present GPU."""

    def make(case, dtype):
        _, ours = make_sides(case, dtype, clock.name)

        def run():
            with in_mode(FORCED):
                both_passes(case, ours, case.make(dtype, clock.name))()
            clock.clear()

        return run

    return make


def faster(question: Question, ahead: dict, behind: dict, clock: Clock, repeats: int) -> float:
    """How many times faster `ahead` is than `behind` over the rows. 0 if `ahead` fails, or is
    slower for one row."""
    ratios = []
    for case, dtype in question.rows[:MOST_ROWS]:
        _, ours = make_sides(case, dtype, clock.name)
        inputs = case.make(dtype, clock.name)
        calls = {}
        for name, config in (("ahead", ahead), ("behind", behind)):
            with _as(question, config), in_mode(FORCED):
                calls[name] = both_passes(case, ours, inputs)
                calls[name]()
        configs = {"ahead": ahead, "behind": behind}

        @contextmanager
        def around(name, configs=configs):
            with _as(question, configs[name]), in_mode(FORCED):
                yield

        times = interleaved(clock.executed, calls, repeats, around)
        ratios.append(times["behind"]["median"] / times["ahead"]["median"])
        del calls, inputs
        clock.clear()
        if ratios[-1] < 1 - MARGIN / 2:
            return 0.0
    return geometric_mean(ratios) or 0.0


def entry(question: Question, config: dict) -> dict[str, dict[str, dict]]:
    """A table that answers this question with `config`. All others are left to their formulas."""
    changes = question.function.changes(config, question.formula)
    return {question.function.name: {question.arguments: changes}}


def _as(question: Question, config: dict):
    return kernels._config.trying(entry(question, config))


def answer(question: Question, clock: Clock, repeats: int = REPEATS) -> dict:
    """Climb: {"changes", "gain", "tried"}. "changes" is empty if the formula's answer stays."""
    best, tried = question.formula, []
    gain = 1.0
    seen = [best]
    for _ in range(MOST_STEPS):
        step: tuple[float, dict | None] = (1 + MARGIN, None)
        for config in question.function.neighbours(best):
            if config in seen:
                continue
            seen.append(config)
            try:
                ratio = faster(question, config, best, clock, repeats)
            except Exception as e:  # no shared memory or registers left, or no such tile
                tried.append({"config": config, "error": f"{type(e).__name__}: {e}"[:120]})
                clock.clear()
                continue
            tried.append({"config": config, "over_the_best": ratio})
            step = max(step, (ratio, config), key=lambda s: s[0])
        if step[1] is None or not right(question, step[1], clock):
            break
        gain, best = gain * step[0], step[1]
    changes = question.function.changes(best, question.formula)
    return {"changes": changes, "gain": gain, "tried": tried}


def right(question: Question, config: dict, clock: Clock) -> bool:
    """Whether the rows pass parity with `config`."""
    with _as(question, config):
        found = [compare_row(case, dtype, clock) for case, dtype in question.rows[:1]]
    return not any(f["failures"] for f in found)


def run(
    questions: list[Question],
    results: Results,
    clock: Clock,
    *,
    repeats: int = REPEATS,
    out_of_time: Callable[[], bool] = lambda: False,
    on_question: Callable[[Question], None] = lambda question: None,
) -> bool:
    """Answer what `results` lacks, a line of kind "config" each. False if time ran out."""
    # Questions of most rows come first. If time runs out, the others keep their formula.
    for question in sorted(questions, key=lambda q: -len(q.rows)):
        if not results.has("config", question.key):
            if out_of_time():
                return False
            line = {"kind": "config", "key": question.key, "function": question.function.name}
            line |= {"arguments": question.arguments, "formula": question.formula}
            line["rows"] = [case.key(dtype) for case, dtype in question.rows]
            try:
                line |= answer(question, clock, repeats)
            except Exception as e:
                line |= {"changes": {}, "error": f"{type(e).__name__}: {e}"[:300]}
            results.add(line)
            clock.clear()  # raises if this process has lost the device
        on_question(question)
    return True


def table(results: Results) -> dict[str, dict[str, dict]]:
    """{function: {arguments: changes}} of all results."""
    found: dict[str, dict[str, dict]] = {}
    for line in results.of("config"):
        if line["changes"]:
            found.setdefault(line["function"], {})[line["arguments"]] = line["changes"]
    return found


def read(path: Path) -> dict[str, dict[str, dict]]:
    """The table at `path`; an empty table if there is no file."""
    return json.loads(path.read_text())["configs"] if path.exists() else {}


def write(path: Path, results: Results) -> None:
    """Put the results in the table at `path`. Older entries stay if this run did not ask them."""
    new, source = table(results), measured(results.environment or environment())
    old: dict = json.loads(path.read_text()) if path.exists() else {"source": "", "configs": {}}
    asked = {(line["function"], line["arguments"]) for line in results.of("config")}
    merged = {
        function: {k: v for k, v in entries.items() if (function, k) not in asked}
        for function, entries in old["configs"].items()
    }
    kept = any(merged.values())
    for function, entries in new.items():
        merged.setdefault(function, {}).update(entries)
    merged = {f: dict(sorted(e.items())) for f, e in sorted(merged.items()) if e}
    if kept:
        source = f"{source}; other entries {old['source']}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"source": source, "configs": merged}, indent=1) + "\n")
    kernels._config.shipped.cache_clear()
    kernels._config.forget_tables()


def describe(questions: list[Question]) -> Iterator[str]:
    """The plan, with one line per question."""
    for q in questions:
        near = sum(1 for _ in q.function.neighbours(q.formula))
        rows = "1 row" if len(q.rows) == 1 else f"{len(q.rows)} rows"
        yield f"{q.key}: {q.formula}, {near} neighbours, {rows}"
