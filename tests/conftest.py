import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when fastnn and the kernels are imported

import pytest


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session", autouse=True)
def repaired_interpreter():
    if os.environ.get("TRITON_INTERPRET") == "1":
        from fastnn.testing import interpreter

        interpreter.install()


@pytest.fixture(autouse=True)
def uninitialised_memory_reads_as_nan():
    """`torch.empty` fills with nan (integers: the largest) while deterministic algorithms are on."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
