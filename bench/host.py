"""Measures what calls cost the host, on any machine: `python -m bench.host --out DIR`.

It tells what one more call adds to a training step: the difference between a step of 12 calls and
one of 2, divided by 10. A step is forward and backward. So the start of autograd, which a step pays
once, is left out. For each layer or function the first training row of `fastnn.testing` is called,
12 times one after the other if the result has the shape of the input, else side by side.

Stock runs on the CPU. If there is a C++ compiler, its operators are replaced by ones that only
allocate (`null.cpp`), so that only the host side remains. Ours is measured in four ways: *declined*
by the size gate; *without plans*, as the first call of a signature; *Python* and *C++*, as every
call from the third on, by the two runners of plans. Launches go through Triton's own launcher into
an empty libcuda, if there is a C compiler, else to a driver that does nothing. No time includes the
launches by the GPU, so the numbers of launches stand beside the times.

Times are CPU time of one thread. The ways take turns, and the least time of many rounds counts.
With `--count`, instructions are counted too, by callgrind. They hardly depend on the machine, and
not on its load.

Then whole models with tiny tensors take their turns: all of it declined, and with kernels for all
that the gate would ever let through, as they are and compiled by `fastnn.compile` with the option
`replay`. At last layers over many steps, with a kernel for each step, take turns with PyTorch's
cells called in a loop; told is what one more step costs.

The estimates of the size gate follow from these figures (`python -m bench.gates`), and so do the
simulated steps (`python -m bench.steps`). The program writes DIR/host.json, and with
`--into PAGE.md` two tables between the markers of that page.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

import fastnn
from fastnn import _build, _mode, _native, _record, _rng, kernels
from fastnn.bench.models import ResNet, Step, TransformerSizes

FEW, MANY = 2, 12  # calls in the two steps
NULL = Path(__file__).with_name("null.cpp")
WAYS = ("stock", "declined", "without_plans", "python", "native")
MODEL_WAYS = ("stock", "declined", "python", "native", "compiled", "compiled_native")

# As deep as the real ones: what one call costs the host does not depend on the width.
MODELS = [
    Step("GPT-2", TransformerSizes(16, 2, 12, 4, 11, causal=True), 2),
    Step("BERT", TransformerSizes(16, 2, 12, 4, 12), 2),
    Step("ResNet-50", ResNet((3, 4, 6, 3), 5, 32, 4), 2),
]


RECURRENT = ("RNN", "LSTM", "GRU")
SHORT, LONG = 8, 264  # steps of the two sequences
STEP_WAYS = ("stock", "python", "native")


# ---- What is called -----------------------------------------------------------------------------


def _rows(only: Sequence[str]) -> Iterator:
    """The first row of each name that has gradients, and that runs on kernels in every mode."""
    from fastnn.testing.cases import CASES

    seen = set()
    for case in CASES:
        plain = case.stock is None and case.view is None and case.autocast is None
        if plain and case.name not in seen and (not only or case.name in only):
            inputs = [t for t in case.make(torch.float32, "cpu") if isinstance(t, Tensor)]
            empty = any(not t.numel() for t in inputs)  # nothing is launched
            if not empty and (case.is_layer or any(t.requires_grad for t in inputs)):
                seen.add(case.name)
                yield case


def _graded(tree) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.requires_grad]


def step(case, namespace, count: int) -> Callable[[], object]:
    """A function that runs forward and backward of `count` calls of a row, in one graph."""
    from fastnn.testing import side_of

    calls: list[tuple[Callable, list]] = []
    leaves: list[Tensor] = []
    for _ in range(count):
        side = side_of(case, namespace, torch.float32, "cpu")
        inputs = case.make(torch.float32, "cpu")
        options = {} if case.is_layer else dict(case.options)
        options = {k: v(torch.float32, "cpu") if callable(v) else v for k, v in options.items()}
        call = functools.partial(side.call, **options) if options else side.call
        calls.append((call, inputs))
        leaves += _graded([*inputs, *side.parameters.values(), *options.values()])
    call, inputs = calls[0]
    out = call(*inputs)
    first = inputs[0]
    single = isinstance(out, Tensor)
    chained = (
        single and isinstance(first, Tensor) and first.requires_grad and out.shape == first.shape
    )
    rest = [(call, inputs[1:]) for call, inputs in calls]
    if chained:
        others = {id(inputs[0]) for _, inputs in calls[1:]}
        leaves = [t for t in leaves if id(t) not in others]
    upstream = [torch.ones_like(t) for t in _graded(out)] * (1 if chained else count)

    def run():
        if chained:
            x = first
            for call, others in rest:
                x = call(x, *others)
            outs = [x]
        elif single:
            outs = [call(*inputs) for call, inputs in calls]
        else:
            outs = [t for call, inputs in calls for t in _graded(call(*inputs))]
        # What `torch.autograd.grad` does, but for its checks of each result. A model has one loss.
        return _engine_run_backward(
            (*outs,), (*upstream,), False, False, (*leaves,),
            allow_unreachable=True, accumulate_grad=False,
        )  # fmt: skip

    return run


def model_step(of: Step, namespace, compiler: Callable | None = None) -> Callable[[], object]:
    """A function that runs forward and backward of a model, compiled by `compiler` if given."""
    torch.manual_seed(0)
    model, data = of.build(namespace), of.data("cpu")
    parameters = list(model.parameters())
    call = model if compiler is None else compiler(model)
    return lambda: torch.autograd.grad(call(*data), parameters, allow_unused=True)


def sequence_step(name: str, ours: bool, length: int) -> Callable[[], object]:
    """A function that runs forward and backward of all steps: by our layer, or by PyTorch's cell.

    The recurrent weights do not fit the memory of a block, so that our layer launches a kernel for
    each step and pass.
    """
    width, batch = 256, 4
    namespace, kind = (fastnn, name) if ours else (torch.nn, f"{name}Cell")
    torch.manual_seed(0)
    layer = getattr(namespace, kind)(width, width)
    x = torch.zeros(length, batch, width)
    parts, parameters = x.unbind(), list(layer.parameters())
    if ours and kernels.recurrent_steps.one_kernel(layer.weight_hh_l0):
        raise AssertionError(f"{name}({width}, {width}) has one kernel for all steps")

    def run():
        if ours:
            y = layer(x)[0]
        else:
            state: Any = None
            for part in parts:
                state = layer(part, state)
            y = state[0] if name == "LSTM" else state
        return torch.autograd.grad(y, parameters, torch.ones_like(y))

    return run


# ---- Ways of calling ----------------------------------------------------------------------------


@functools.cache
def null() -> Any:
    """The module made of null.cpp; None without a C++ compiler."""
    try:
        _build.build(source=NULL)
        return _build.load(NULL)
    except _build.BuildError as e:
        print(f"bench.host: stock computes, because {e}", file=sys.stderr)
        return None


@functools.cache
def runner() -> Any:
    """The C++ runner; None without a C++ compiler."""
    try:
        _build.build()
        return _build.load()
    except _build.BuildError as e:
        print(f"bench.host: no C++ runner, because {e}", file=sys.stderr)
        return None


@contextmanager
def _computing_nothing() -> Iterator[None]:
    module = null()
    if module is None:
        yield
        return
    module.on()
    try:
        yield
    finally:
        module.off()


@contextmanager
def _plans(kept: dict) -> Iterator[None]:
    """Exactly the plans in `kept` exist inside the block. Those made there are added."""
    _record.forget()
    for plans, known in kept.items():
        plans.keep(known)
    try:
        yield
    finally:
        for plans in _record.everyone():
            kept[plans] = plans.kept()
        _record.forget()


class Way:
    """One way of running a step, with the plans that belong to it."""

    def __init__(self, name: str, mode: Callable = lambda: fastnn.backend("triton")):
        self.name = name
        self.mode = mode
        self.kept: dict = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.name not in ("stock", "declined"):
                stack.enter_context(self.mode())
            stack.enter_context(_plans(self.kept))
            if self.name in ("stock", "declined", "without_plans"):
                stack.enter_context(_record.paused())
            native = self.name.endswith("native")
            stack.enter_context(_native.using(runner() if native else None))
            yield


class Contest(NamedTuple):
    """Steps that take turns. `steps`: way -> the steps whose times are wanted."""

    ways: dict[str, Way]
    steps: dict[str, list[Callable[[], object]]]

    def warm(self, times: int = 5) -> None:
        """Run each step so often that its plans exist."""
        for name, way in self.ways.items():
            with way():
                for _ in range(times):
                    for call in self.steps[name]:
                        call()

    def time(self, rounds: int, each: int) -> dict[str, list[float]]:
        """way -> the least microseconds of each of its steps: the other rounds were disturbed."""
        least = {name: [float("inf")] * len(calls) for name, calls in self.steps.items()}
        for _ in range(rounds):
            for name, way in self.ways.items():
                with way():
                    for i, call in enumerate(self.steps[name]):
                        call()
                        start = time.thread_time()
                        for _ in range(each):
                            call()
                        took = (time.thread_time() - start) / each * 1e6
                        least[name][i] = min(least[name][i], took)
        return least

    def tally(self, label: str, each: int = 2) -> None:
        """Let callgrind write the instructions of `each` runs of each step, under its name."""
        for name, way in self.ways.items():
            with way():
                for i, call in enumerate(self.steps[name]):
                    call()
                    null().count(f"{label}/{name}/{i}", _repeated(call, each))


def _repeated(call: Callable[[], object], times: int) -> Callable[[], None]:
    def run():
        for _ in range(times):
            call()

    return run


def _possible(ways: Sequence[str]) -> list[str]:
    return [name for name in ways if not name.endswith("native") or runner() is not None]


def _contest(case) -> Contest:
    theirs, ours = ([step(case, side, n) for n in (FEW, MANY)] for side in (torch.nn, fastnn))
    ways = {name: Way(name) for name in _possible(WAYS)}
    return Contest(ways, {name: theirs if name == "stock" else ours for name in ways})


@contextmanager
def _open_gate() -> Iterator[None]:
    """Kernels run at every size, except where they never win."""
    from fastnn import _gate

    table = _gate.table()["default"]
    lines = [
        {**line, "least": None if line["least"] is None else 0} for line in table["crossovers"]
    ]
    with _gate.using({"default": {**table, "crossovers": lines}}):
        yield


def _replayed(model: Callable) -> Callable:
    return fastnn.compile(model, options={"replay": True})


def _model_contest(of: Step) -> Contest:
    ways = {name: Way(name, _open_gate) for name in _possible(MODEL_WAYS)}
    steps = {}
    for name in ways:
        steps[name] = [
            model_step(
                of,
                torch.nn if name == "stock" else fastnn,
                _replayed if name.startswith("compiled") else None,
            )
        ]
    return Contest(ways, steps)


def _sequence_contest(name: str) -> Contest:
    ways = {way: Way(way) for way in _possible(STEP_WAYS)}
    steps = {way: [sequence_step(name, way != "stock", n) for n in (SHORT, LONG)] for way in ways}
    return Contest(ways, steps)


# ---- Measuring ----------------------------------------------------------------------------------


def _launches(call: Callable[[], object]) -> int:
    """The launches of a call of ours: kernels, and operators of PyTorch as they count for stock.

    A draw of random numbers launches nothing on a GPU. What some ops look at on a CPU counts.
    """
    from fastnn.kernels._launch import Kernel
    from fastnn.testing.meter import AtenTraffic

    draw = _rng.draw_for

    def drawing(*args):
        with _disable_current_modes():
            return draw(*args)

    count = 0
    launch = Kernel.__call__

    def counting(self, *args, **kwargs):
        nonlocal count
        count += 1
        launch(self, *args, **kwargs)

    with (
        mock.patch.object(Kernel, "__call__", counting),
        mock.patch.object(_rng, "draw_for", drawing),
        _record.using(False),
        # Dispatch declines under a dispatch mode, but this mode only observes.
        mock.patch.object(torch._C, "_len_torch_dispatch_stack", lambda: 0),
        AtenTraffic() as aten,
    ):
        call()
    return count + aten.cost.launches


def _facts(case) -> dict:
    """What is said of a row beside its times."""
    from fastnn.testing.meter import AtenTraffic, as_on_cuda

    theirs = step(case, torch.nn, 1)
    with as_on_cuda(), AtenTraffic() as counted:
        theirs()
    ours = step(case, fastnn, 1)
    with fastnn.backend("triton"), fastnn.decisions() as heard:
        ours()
    with fastnn.backend("triton"):
        launches = _launches(ours)
    return {
        "name": case.name,
        "row": str(case),
        "ops": sorted({d.op.name for d in heard if d.why is None}),
        "stock_launches": counted.cost.launches,
        "ours_launches": launches,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Launches do nothing, stock computes nothing, and no garbage is collected."""
    from fastnn.testing.aot import has_compiler, launch_nothing

    with launch_nothing(real_launcher=has_compiler()), _computing_nothing(), _mode.awake():
        gc.collect()
        gc.disable()
        try:
            yield
        finally:
            gc.enable()


def slope(least: Sequence[float]) -> float:
    """What one more call costs, of a step of FEW calls and one of MANY."""
    return (least[1] - least[0]) / (MANY - FEW)


def measure(only: Sequence[str] = (), rounds: int = 40, each: int = 3) -> list[dict]:
    """One record for each row: the microseconds of one more call in each way, and the launches."""
    from fastnn.testing.aot import has_compiler, launch_nothing

    found = []
    for case in _rows(only):
        with launch_nothing(real_launcher=has_compiler()):
            record = _facts(case)
        with _quiet():
            contest = _contest(case)
            contest.warm()
            for name, least in contest.time(rounds, each).items():
                record[f"{name}_us"] = round(slope(least), 2)
        found.append(record)
    return found


def measure_models(rounds: int = 40) -> list[dict]:
    """One record for each model: the microseconds of a step in each way."""
    found = []
    for of in MODELS:
        with _quiet():
            contest = _model_contest(of)
            contest.warm()
            record: dict[str, Any] = {"name": of.name}
            for name, (least,) in contest.time(rounds, 1).items():
                record[f"{name}_us"] = round(least, 1)
        found.append(record)
    return found


def measure_steps(only: Sequence[str] = (), rounds: int = 40) -> list[dict]:
    """One record for each layer: the microseconds of one more step, forward and backward."""
    found = []
    for name in (n for n in RECURRENT if not only or n in only):
        with _quiet():
            contest = _sequence_contest(name)
            contest.warm()
            record: dict[str, Any] = {"name": name}
            for way, (short, long) in contest.time(rounds, 1).items():
                record[f"{way}_us"] = round((long - short) / (LONG - SHORT), 2)
        found.append(record)
    return found


# ---- Counting instructions ----------------------------------------------------------------------


def can_count() -> str | None:
    """Why instructions cannot be counted here; None if they can."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    if null() is None:
        return "there is no C++ compiler"
    return None


def _label(row: str) -> str:
    """The row in one line: the names of layers that hold others have several."""
    return " ".join(row.split())


def _counted(only: Sequence[str], models: Sequence[str]) -> None:
    """Count, under valgrind. All plans are made first, while nothing is counted."""
    with _quiet():
        contests = [(_label(str(case)), _contest(case)) for case in _rows(only)]
        contests += [(of.name, _model_contest(of)) for of in MODELS if of.name in models]
        for _, contest in contests:
            contest.warm()
        null().start()
        for label, contest in contests:
            contest.tally(label)


def instructions(
    only: Sequence[str] = (), models: Sequence[str] = ()
) -> dict[str, dict[str, list[int]]]:
    """Row or model -> way -> the instructions of two runs of each of its steps."""
    with tempfile.TemporaryDirectory(prefix="fastnn-callgrind-") as folder:
        command = [
            "valgrind", "--tool=callgrind", "--instr-atstart=no",
            f"--callgrind-out-file={folder}/out",
            sys.executable, "-m", "bench.host", "--out", folder, "--counted",
            *(f"--only={name}" for name in only), *(f"--model={name}" for name in models),
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"valgrind ended with code {done.returncode}: {done.stderr[-2000:]}")
        found: dict[str, dict[str, list[int]]] = {}
        dumps = sorted(Path(folder).glob("out.*"), key=lambda f: int(f.suffix[1:]))
        for file in dumps:
            text = file.read_text()
            said = re.search(r"^desc: Trigger: Client Request: (.*)/(\w+)/\d+$", text, re.M)
            count = re.search(r"^(?:totals|summary): (\d+)", text, re.M)
            if said and count:
                ways = found.setdefault(said[1], {})
                ways.setdefault(said[2], []).append(int(count[1]))
    return found


def ratios(counted: dict[str, list[int]]) -> dict[str, float]:
    """Way -> the instructions of one more call, or of the step of a model, over those of stock."""
    costs = {way: slope(n) if len(n) == 2 else n[0] for way, n in counted.items()}
    return {way: round(n / costs["stock"], 3) for way, n in costs.items() if way != "stock"}


# ---- Telling ------------------------------------------------------------------------------------

_TITLES = {
    "stock": "stock", "declined": "declined", "without_plans": "without plans", "python": "Python",
    "native": "C++", "compiled": "compiled and replayed, Python", "compiled_native": "C++",
}  # fmt: skip


def _cells(record: dict, ways: Sequence[str] = WAYS) -> list[str]:
    """The cells of all ways: the ratio to stock, by instructions if they were counted."""
    counted = record.get("instructions", {})
    cells = [f"{record['stock_us']:.1f}"]
    for way in ways[1:]:
        told = "-"
        if f"{way}_us" in record:
            told = f"{record[f'{way}_us'] / record['stock_us']:.2f}"
        if way in counted:
            told += f" ({counted[way]:.2f})"
        cells.append(told)
    return cells


def table(
    environment: dict,
    rows: Sequence[dict],
    models: Sequence[dict] = (),
    steps: Sequence[dict] = (),
) -> str:
    """The tables in Markdown, with the origin of their figures."""
    ways = [_TITLES[way] for way in WAYS]
    lines = [
        f"One core of {environment['cpu']}, torch {environment['torch']}, triton "
        f"{environment['triton']}, commit {environment['commit']}, {environment['time'][:10]}; "
        f"float32; launches through {environment['launcher']}; stock {environment['stock']}. "
        "Microseconds of stock for one more call, forward and backward; then ratios to it, and in "
        "brackets ratios of instructions.",
        "",
        f"| row | {' | '.join(ways)} | launches of stock | ours |",
        f"| --- |{' ---: |' * (len(ways) + 2)}",
    ]
    for r in rows:
        name = r["row"] if len(r["row"]) <= 60 else f"{r['name']}(...)"
        cells = [*_cells(r), str(r["stock_launches"]), str(r["ours_launches"])]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    if models:
        commit = models[0].get("commit")
        if commit:
            lines += ["", f"The models were measured at commit {commit}, {models[0]['time'][:10]}."]
        ways = [_TITLES[way] for way in MODEL_WAYS]
        lines += ["", f"| model | {' | '.join(ways)} |", f"| --- |{' ---: |' * len(ways)}"]
        lines += [f"| {r['name']} | " + " | ".join(_cells(r, MODEL_WAYS)) + " |" for r in models]
    if steps:
        ways = ["stock, its cell", *(_TITLES[way] for way in STEP_WAYS[1:])]
        lines += ["", f"| a step of | {' | '.join(ways)} |", f"| --- |{' ---: |' * len(ways)}"]
        lines += [f"| {r['name']} | " + " | ".join(_cells(r, STEP_WAYS)) + " |" for r in steps]
    return "\n".join(lines) + "\n"


_MARKED = re.compile(r"(<!-- host -->\n).*(<!-- /host -->\n)", re.S)


def _write(path: Path, origin: dict, **found: Sequence[dict]) -> None:
    parts = [f'"environment": {json.dumps(origin, indent=1)}']
    for name, records in found.items():
        told = ",\n".join(json.dumps(r) for r in records)
        parts.append(f'"{name}": [\n{told}\n]')
    path.write_text("{" + ",\n".join(parts) + "}\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--into", type=Path, metavar="PAGE.md", help="put tables between this page's markers"
    )
    parser.add_argument("--only", action="append", default=[], metavar="NAME")
    parser.add_argument("--rounds", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--count", action="store_true", help="count instructions, with valgrind")
    parser.add_argument("--no-models", action="store_true", help="rows only")
    parser.add_argument(
        "--models", action="store_true", help="models only, in place of those in DIR/host.json"
    )
    parser.add_argument("--steps", action="store_true", help="steps of recurrent layers only")
    parser.add_argument("--counted", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", action="append", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("bench.host: kernels are compiled: unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    from fastnn.bench.environment import environment
    from fastnn.testing.aot import has_compiler

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # stock warns in some rows
    if args.counted:
        _counted(args.only, args.model)
        return 0
    why = can_count() if args.count else None
    if why is not None:
        print(f"bench.host: instructions cannot be counted: {why}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "host.json"
    launcher = "Triton's launcher and an empty libcuda" if has_compiler() else "an empty driver"
    stock = "computes" if null() is None else "allocates and computes nothing"
    origin = {**environment(), "launcher": launcher, "stock": stock}
    if args.models:
        known = json.loads(path.read_text())
        origin, rows, steps = known["environment"], known["rows"], known["steps"]
        now = environment()
        models = [
            {**record, "commit": now["commit"], "time": now["time"]}
            for record in measure_models(args.rounds)
        ]
        args.only = ["none"]
    else:
        rows = [] if args.steps else measure(args.only, args.rounds)
        models = [] if args.no_models or args.steps else measure_models(args.rounds)
        steps = [] if args.no_models and not args.steps else measure_steps(args.only, args.rounds)
    _write(path, origin, rows=rows, models=models, steps=steps)
    if args.count:
        counted = instructions(args.only, [m["name"] for m in models])
        for record in models if args.models else [*rows, *models]:
            record["instructions"] = ratios(counted[_label(record.get("row", record["name"]))])
        _write(path, origin, rows=rows, models=models, steps=steps)
    print(path)
    if args.into:
        page = table(origin, rows, models, steps)
        args.into.write_text(
            _MARKED.sub(lambda m: m[1] + "\n" + page + m[2], args.into.read_text())
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
