import collections
import contextlib
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when fastnn and the kernels are imported

import pytest

torch.set_num_threads(1)  # pytest-xdist fills the cores with processes


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def on_device(device):
    """Factories make their tensors on the device of the run."""
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
    """Elsewhere they do not, as on a GPU: see tests/marks.py."""
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
    """`torch.empty` fills with nan (integers: the largest) under deterministic algorithms."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


SWEEPS = {
    "strides": "Sweep of strides",
    "sizes": "Sweep of sizes",
    "magnitudes": "Sweep of magnitudes",
    "setups": "Set-ups, against stock",
}


def pytest_terminal_summary(terminalreporter):
    """What PyTorch's samples ran on, where tests say so by the property "path", and how many calls
    the sweeps made, which tell their counts by the name of the sweep."""
    paths = collections.Counter()
    sweeps = {name: collections.Counter() for name in SWEEPS}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "teardown":
                for name, value in report.user_properties:
                    if name == "path":
                        paths[tuple(value)] += 1
                    elif name in sweeps:
                        sweeps[name].update(dict(value))
    for name, counts in sweeps.items():
        if counts:
            told = ", ".join(f"{n} {what}" for what, n in counts.most_common())
            terminalreporter.section(SWEEPS[name])
            terminalreporter.write_line(f"{counts.total()} calls: {told}")
    if not paths:
        return
    write = terminalreporter.write_line
    on_kernels = sum(n for (_, path, _), n in paths.items() if path == "kernel")
    terminalreporter.section("PyTorch's samples")
    write(f"{on_kernels} of {paths.total()} runs on kernels; to stock:")
    for (what, path, reason), n in sorted(paths.items()):
        if path != "kernel":
            write(f"  {n:4} {what}: {reason.split('on PyTorch: ')[-1]}")
