"""Each reason for PyTorch has a code of the closed vocabulary, and words."""

import ast
from pathlib import Path
from typing import get_args

import pytest
import torch

import fastnn
import fastnn.functional as F
from fastnn._mode import CODES, Code, Stock
from fastnn.testing import Case, check, randn, side_of, tensors_of
from fastnn.testing.cases import CASES
from tests.errors import assert_same_error
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


def test_a_forced_call_runs_as_in_pytorch_where_the_result_has_no_elements():
    """Rows that are declined for want of elements: forced, they raise if the result has some."""
    raised = []
    for case in CASES:
        if case.stock != "empty":
            continue
        dtype = case.dtypes[0]
        options = {} if case.is_layer else case.options
        options = {k: v(dtype, "cpu") if callable(v) else v for k, v in options.items()}
        inputs = case.make(dtype, "cpu")
        ours, theirs = (side_of(case, namespace, dtype, "cpu") for namespace in (fastnn, torch.nn))
        made = tensors_of(theirs.call(*inputs, **options))
        try:
            with fastnn.backend("triton"), fastnn.decisions() as heard:
                mine = tensors_of(ours.call(*inputs, **options))
            raised.append(False)
            layouts = [[(t.shape, t.stride(), t.dtype) for t in side] for side in (mine, made)]
            assert layouts[0] == layouts[1], case
            assert [d.code for d in heard] == ["empty"], case
        except fastnn.BackendError as error:
            raised.append(True)
            assert error.code == "empty"
        assert raised[-1] == any(t.numel() for t in made), case
    assert True in raised and False in raised


@pytest.mark.parametrize("name", ["pixel_shuffle", "pixel_unshuffle"])
def test_a_backward_without_elements_raises_what_pytorch_raises(name):
    stock = getattr(torch.nn.functional, name)

    def backward(function, x, factor):
        function(x, factor).sum().backward()

    for shape in ((0, 4, 2, 2), (2, 0, 4, 4), (2, 4, 0, 4), (2, 4, 2, 0)):
        x = torch.zeros(shape, requires_grad=True)
        assert_same_error(
            lambda x: backward(getattr(F, name), x, 2), lambda x: backward(stock, x, 2), x
        )
        with fastnn.backend("triton"):
            backward(getattr(F, name), x, 1)
        assert x.grad.shape == x.shape


def test_a_forced_compiled_call_without_elements_runs_as_in_pytorch():
    with fastnn.backend("triton"):
        call = torch.compile(lambda x: F.rms_norm(x, (4,)), backend="eager", fullgraph=True)
        assert call(torch.zeros(0, 4)).shape == (0, 4)
    torch.compiler.reset()
