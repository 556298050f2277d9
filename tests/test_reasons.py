"""Each reason for PyTorch has a code of the closed vocabulary, and words."""

import ast
from pathlib import Path
from typing import get_args

import pytest
import torch

import fastnn
import fastnn.functional as F
from fastnn._mode import CODES, Code, Stock
from fastnn.testing import Case, check, randn
from tests.marks import interpreted

pytestmark = interpreted
FOLDER = Path(fastnn.__file__).parent


def _refusals():
    """(file, call) for each refusal that the package makes."""
    for path in sorted(FOLDER.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", None))
                if name in ("Stock", "Invalid", "Misfit"):
                    yield f"{path.name}:{node.lineno}", node


def test_every_refusal_has_a_code():
    found = [*_refusals()]
    wrong, codes = [], set()
    for where, call in found:
        code = call.args[0] if len(call.args) == 2 and not call.keywords else None
        if isinstance(code, ast.Attribute) and code.attr == "code":
            continue  # that of another refusal
        if not isinstance(code, ast.Constant) or code.value not in CODES:
            wrong.append(where)
        else:
            codes.add(code.value)
    assert not wrong and len(found) > 350
    assert codes == set(CODES) == set(get_args(Code)), "a code that nothing uses"


def test_a_refusal_without_a_code_is_an_error():
    with pytest.raises(TypeError):
        Stock("words alone")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="no code; codes are mode"):
        Case("relu", (randn(3),), stock="words")  # type: ignore[arg-type]


def test_a_row_fails_if_the_code_is_another():
    row = Case("relu", (randn(3),), stock="layout", dtypes=(torch.float64,))
    (failure,) = check(row, torch.float64).failures
    assert "expected stock (layout); got stock (dtype: " in failure


def test_users_can_ask_for_the_code():
    x = torch.ones(3, dtype=torch.float64)
    with fastnn.decisions() as heard:
        F.relu(x)
        F.relu(x.float())
        with fastnn.backend("torch"):
            F.relu(x)
    assert [d.code for d in heard] == ["dtype", heard[1].code, "mode"]
    assert [d.code is None for d in heard] == [d.why is None for d in heard]
    with fastnn.backend("triton"):
        with pytest.raises(fastnn.BackendError) as error:
            F.relu(x)
        assert error.value.code == "dtype"
        (row,) = fastnn.explain(fastnn.ReLU(), x.float())
        assert (row.path, row.code) == ("kernel", None)
    (row,) = fastnn.explain(fastnn.ReLU(), x)
    assert row.code == "dtype" and "float64" in row.reason
