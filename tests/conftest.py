import collections
import contextlib
import gc
import os
import random
import statistics
import sys

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when fastnn and the kernels are imported

import pytest

torch.set_num_threads(1)  # pytest-xdist fills the cores with processes

# `torch.manual_seed` also seeds devices that are not there. For each of the three it keeps a stack
# trace, in case the device is used later. In a test that takes half a millisecond.
for kind in (torch.cuda, torch.xpu, torch.mtia):
    if not kind.is_available():
        kind.manual_seed_all = lambda seed: None


# The quick tier, `pytest -m quick`: every test of these files, and a share of the others.
QUICK_FILES = {
    "test_checkout", "test_cli", "test_docs", "test_gate", "test_gpus", "test_layout", "test_model",
    "test_scalars",
}  # fmt: skip
SHARE = 24  # one test in so many, of each file; others for each file


def pytest_collection_modifyitems(items):
    from tests.marks import interpreted, stock_may_warn  # after TRITON_INTERPRET is set

    for item in items:
        where = {"device", "on_device"} & set(item.fixturenames)
        if (
            where
            or "unpool" in item.nodeid.lower()
            or interpreted.mark in item.iter_markers("skipif")
        ):
            item.add_marker(stock_may_warn)
    count: collections.Counter[str] = collections.Counter()
    for item in items:
        name = item.path.stem
        count[name] += 1
        slow = item.get_closest_marker("slow")
        if slow is None and (name in QUICK_FILES or count[name] % SHARE == len(name) % SHARE):
            item.add_marker(pytest.mark.quick)


def pytest_collection_finish():
    gc.freeze()  # the modules and tests stay; a collection then looks at the objects of one test


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, whatever ran before it in its process."""
    random.seed(0)
    torch.manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def on_device(device):
    """Factory functions of torch make their tensors on the device of the run."""
    with torch.device(device):
        yield


@pytest.fixture
def simulate():
    """`fastnn.testing.simulated(...)`, from the call on until the test ends."""
    from fastnn.testing import simulated

    with contextlib.ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(simulated(*args, **kwargs))


@pytest.fixture(autouse=True)
def kernels_take_cpu_tensors_where_declared(request, monkeypatch):
    """In other tests kernels refuse CPU tensors, as on a GPU: see tests/marks.py."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from fastnn import _op
    from fastnn.kernels._launch import Kernel
    from tests.marks import interpreted

    fixtures = {"device", "on_device"} & set(request.fixturenames)
    if fixtures or interpreted.mark in request.node.iter_markers("skipif"):
        return

    def refuse(self, *args, **kwargs):
        pytest.fail(f"{self} is launched by a test that does not say where it runs")

    monkeypatch.setattr(_op, "kernel_devices", {"cuda"})
    monkeypatch.setattr(Kernel, "__call__", refuse)


@pytest.fixture(scope="session", autouse=True)
def repaired_interpreter():
    if os.environ.get("TRITON_INTERPRET") == "1":
        from fastnn.testing import interpreter

        interpreter.install()


@pytest.fixture(autouse=True)
def uninitialised_memory_reads_as_nan():
    """Under deterministic algorithms `torch.empty` fills with nan, or with the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


SWEEPS = {
    "bits": "Rows in a dtype",
    "strides": "Sweep of strides",
    "sizes": "Sweep of sizes",
    "magnitudes": "Sweep of magnitudes",
    "lifetimes": "Sweep of lifetimes",
    "setups": "Set-ups, against stock",
    "marks": "Questions to converted layers, against stock",
    "zeros": "Sweep of zeros with both signs",
    "scalars": "Sweep of numbers that are infinite, nan, zero or negative",
}


def pytest_terminal_summary(terminalreporter):
    """Prints the paths of PyTorch's samples, which tests report by the property "path"; the number
    of calls of each sweep, which a sweep reports by its name; the rows that needed more than one
    draw of their inputs, by the property "draws"; and the errors of the rows, divided by those of
    stock, by the property "ratios"."""
    paths = collections.Counter()
    draws = {}
    ratios = collections.defaultdict(list)
    sweeps = {name: collections.Counter() for name in SWEEPS}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "teardown":
                for name, value in report.user_properties:
                    if name == "path":
                        paths[tuple(value)] += 1
                    elif name == "draws":
                        draws[value[0]] = value[1]
                    elif name == "ratios":
                        ratios[value[0]] += value[1]
                    elif name in sweeps:
                        sweeps[name].update(dict(value))
    write = terminalreporter.write_line
    for name, counts in sweeps.items():
        if counts:
            told = ", ".join(f"{n} {what}" for what, n in counts.most_common())
            terminalreporter.section(SWEEPS[name])
            write(f"{counts.total()} calls: {told}")
    if draws:
        terminalreporter.section("Rows judged by more than one draw of their inputs")
        for row, n in sorted(draws.items()):
            write(f"  {n:2} draws: {row}")
    if ratios:
        terminalreporter.section("Errors against float64, divided by those of stock")
        median = {name: statistics.median(r) for name, r in ratios.items() if r}
        write(f"median of {len(median)} layers and functions; above 1.0:")
        for name, m in sorted(median.items()):
            if m > 1:
                write(f"  {m:.2f} {name}, of {len(ratios[name])} tensors")
    if not paths:
        return
    on_kernels = sum(n for (_, path, _), n in paths.items() if path == "kernel")
    terminalreporter.section("PyTorch's samples")
    write(f"{on_kernels} of {paths.total()} runs on kernels; to stock:")
    for (what, path, reason), n in sorted(paths.items()):
        if path != "kernel":
            write(f"  {n:4} {what}: {reason.split('on PyTorch: ')[-1]}")
