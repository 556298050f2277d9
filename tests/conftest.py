import collections
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


@pytest.fixture(autouse=True)
def kernels_take_cpu_tensors_where_declared(request, monkeypatch):
    """Elsewhere they do not, as on a GPU: see tests/marks.py."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from fastnn.kernels._launch import Kernel

    from fastnn import _op
    from tests.marks import interpreted

    fixtures = {"device", "on_device"} & set(request.fixturenames)
    if fixtures or interpreted.mark in request.node.iter_markers("skipif"):
        return

    def refuse(self, *args, **kwargs):
        pytest.fail(f"{self} is launched by a test that does not say where it runs")

    monkeypatch.setattr(_op, "_KERNEL_DEVICES", {"cuda"})
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


def pytest_terminal_summary(terminalreporter):
    """What PyTorch's samples ran on, where tests say so by the property "path"; how many tensors of
    what magnitudes were compared, by the property "magnitudes"."""
    paths = collections.Counter()
    swept = []
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "teardown":
                for name, value in report.user_properties:
                    if name == "path":
                        paths[tuple(value)] += 1
                    elif name == "magnitudes":
                        swept.append(value)
    if swept:
        runs, listed = (sum(counts) for counts in zip(*swept, strict=True))
        terminalreporter.section("magnitudes")
        terminalreporter.write_line(
            f"{len(swept)} rows, {runs} runs; {listed} differences, listed in docs/magnitudes.md"
        )
    if not paths:
        return
    write = terminalreporter.write_line
    on_kernels = sum(n for (_, path, _), n in paths.items() if path == "kernel")
    terminalreporter.section("PyTorch's samples")
    write(f"{on_kernels} of {paths.total()} runs on kernels; to stock:")
    for (what, path, reason), n in sorted(paths.items()):
        if path != "kernel":
            write(f"  {n:4} {what}: {reason.split('but stock: ')[-1]}")
