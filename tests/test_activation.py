"""Activations: effects of an edit in place after the call, writing into x, second derivatives."""

import pytest
import torch
import torch.nn.functional as stock

import fastnn
import fastnn.functional as F
from fastnn.testing.cases.activation import ALL, IN_PLACE
from tests.errors import assert_same_error

IDS = {"ids": lambda row: row[0] if isinstance(row, tuple) else None}
EVERY = [*ALL, ("PReLU", {}), ("GLU", {})]


@pytest.fixture(autouse=True)
def forced():
    with fastnn.backend("triton"):
        yield


def both(row, **more):
    name, options = row
    return [getattr(nn, name)(**options, **more).eval() for nn in (torch.nn, fastnn)]


def base(device, *shape):
    return torch.linspace(-4, 4, 12, device=device).view(shape or (3, 4)).requires_grad_()


def outcome(call):
    """The result of `call`, or the exception that it raises, as text."""
    try:
        return call()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def gist(result):
    # PyTorch's text about an edited tensor names its autograd node.
    return result[:60] if isinstance(result, str) else result


@pytest.mark.parametrize("edited", ["x", "y"])
@pytest.mark.parametrize("row", EVERY, **IDS)
def test_an_edit_after_the_call_is_caught_where_stock_catches_it(row, edited, device):
    def run(layer):
        leaf = base(device)
        x = leaf * 1
        y = layer(x)
        (x if edited == "x" else y).add_(1)
        y.sum().backward()
        return leaf.grad

    theirs, mine = (gist(outcome(lambda layer=layer: run(layer))) for layer in both(row))
    assert type(theirs) is type(mine)
    if isinstance(theirs, str):
        assert mine == theirs
    else:
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("row", IN_PLACE, **IDS)
def test_in_place_returns_its_input_and_counts_a_version(row, device):
    for grad in (True, False):
        seen = []
        for layer in both(row, inplace=True):
            x = base(device).requires_grad_(grad) * 1
            y = layer(x)
            seen.append((y is x, x._version, y.requires_grad))
        assert seen[0] == seen[1]


@pytest.mark.parametrize("row", IN_PLACE, **IDS)
def test_an_edit_after_an_in_place_call_is_caught_where_stock_catches_it(row, device):
    def run(layer):
        leaf = base(device)
        y = layer(leaf * 1)
        y.mul_(2)
        y.sum().backward()
        return leaf.grad

    theirs, mine = (
        gist(outcome(lambda layer=layer: run(layer))) for layer in both(row, inplace=True)
    )
    assert type(theirs) is type(mine)
    if isinstance(theirs, str):
        assert mine == theirs
    else:
        torch.testing.assert_close(mine, theirs)


def view_of_leaf(device):
    return base(device)[1:]


def one_of_many(device):
    return (base(device) * 1).unbind()[1]


def made_without_grad(device):
    x = base(device) * 1
    with torch.no_grad():
        return x[1:]


def overlapping(device):
    return torch.ones(3, 1, device=device).expand(3, 4)


def inference_tensor(device):
    with torch.inference_mode():
        return torch.ones(3, device=device)


@pytest.mark.parametrize(
    "make", [base, view_of_leaf, one_of_many, made_without_grad, overlapping, inference_tensor]
)
@pytest.mark.parametrize("name", ["relu", "silu", "elu"])
def test_what_stock_will_not_write_into_fails_as_in_stock(name, make, device):
    errors, left = [], []
    for functions in (stock, F):
        x = make(device)
        with pytest.raises(RuntimeError) as error:
            getattr(functions, name)(x, inplace=True)
        errors.append(str(error.value))
        left.append(x.detach())  # stock may write before it raises
    assert errors[0] == errors[1]
    assert torch.equal(*left)


@pytest.mark.parametrize("row", IN_PLACE, **IDS)
@pytest.mark.parametrize("part", [(slice(None), 1), (1,), (slice(None), slice(0, None, 2))])
def test_in_place_on_a_view_reaches_its_base(row, part, device):
    gradients = []
    for layer in both(row, inplace=True):
        leaf = base(device)
        x = leaf * 1
        layer(x[part])
        (x * torch.arange(12, device=device).view(3, 4)).sum().backward()
        gradients.append((x.detach(), leaf.grad))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_in_place_in_inference_mode(device):
    with torch.inference_mode():
        for functions in (stock, F):
            x = torch.tensor([-1.0, 2.0], device=device)
            assert functions.relu(x, inplace=True) is x
            assert x.tolist() == [0, 2]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("row", EVERY, **IDS)
def test_second_and_third_derivatives(row, inplace, device):
    if inplace and row not in IN_PLACE:
        return
    derivatives = []
    for layer in both(row, **({"inplace": True} if inplace else {})):
        leaf = base(device)
        leaves = [leaf, *layer.parameters()]
        y = layer(leaf * 1)
        found = []
        for _ in range(3):
            loss = (y * torch.linspace(1, 2, y.numel(), device=device).view_as(y).sin()).sum()
            if not loss.requires_grad:
                break
            try:
                grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            except RuntimeError as error:  # stock has no second derivative of hardsigmoid
                assert "not implemented" in str(error)
                found.append(torch.full((), float("nan")))
                break
            found += [torch.zeros(()) if g is None else g.detach() for g in grads]
            if grads[0] is None:
                break
            y = grads[0]
        derivatives.append(found)
    torch.testing.assert_close(*derivatives[::-1], rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("row", EVERY, **IDS)
def test_a_gradient_that_is_not_finite_passes_as_in_stock(row, device):
    seen = []
    for layer in both(row):
        x = base(device, 12)
        y = layer(x)
        y.backward(torch.tensor([float("inf"), float("nan")], device=device).repeat(y.numel() // 2))
        seen.append(x.grad)
    # 0 * inf is nan: if stock selects a gradient, our kernel must not multiply instead.
    assert torch.equal(seen[0].isnan(), seen[1].isnan())
    assert torch.equal(seen[0].isinf(), seen[1].isinf())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["hardshrink", "softshrink"])
def test_a_threshold_is_rounded_to_the_dtype_as_in_stock(name, dtype, device):
    # Rounding gives a larger error against float64, so no parity row would show the difference.
    edge = torch.tensor(0.3).to(device, dtype)
    x = torch.stack([edge, -edge, edge * 0.99, edge * 1.01])
    seen = []
    for functions in (stock, F):
        leaf = x.clone().requires_grad_()
        y = getattr(functions, name)(leaf, 0.3)
        y.backward(torch.ones_like(y))
        seen.append((leaf.grad, y.detach() if name == "hardshrink" else y.detach() * 0))
    torch.testing.assert_close(*seen, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_softplus_to_float32_as_under_cuda_autocast(dtype, device):
    x = torch.randn(5, 7, device=device).to(dtype).requires_grad_()
    y = F.softplus.op.fused(x, out_dtype=torch.float32)
    expected = stock.softplus(x.float())
    dy = torch.randn_like(expected)
    torch.testing.assert_close(y, expected)
    mine, theirs = (torch.autograd.grad(out, x, dy, create_graph=True)[0] for out in (y, expected))
    assert mine.dtype == dtype
    torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        assert F.softplus.op.fused(x, out_dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("leaky_relu", (None,)),
        ("leaky_relu", (1e300,)),
        ("elu", ("a",)),
        ("celu", (0,)),
        ("celu", (0.0, True)),
        ("hardtanh", (1.0, -1.0)),
        ("softshrink", (-0.5,)),
        ("hardshrink", (None,)),
        ("threshold", (None, 1.0)),
        ("rrelu", (0.5, 0.1)),
        ("rrelu", (0.1, float("inf"))),
        ("prelu", (torch.ones(3),)),
        ("prelu", (torch.ones(1, 1),)),
        ("prelu", (torch.ones(1, dtype=torch.float16),)),
        ("glu", (1,)),
        ("glu", (7,)),
        ("glu", ("a",)),
    ],
)
def test_bad_arguments_raise_what_stock_raises(name, arguments, device):
    x = torch.ones(2, 5, device=device)
    assert_same_error(getattr(F, name), getattr(stock, name), x, *arguments)


def test_a_parameter_that_is_a_tensor_goes_to_stock(device):
    x = torch.randn(4, device=device)
    slope = torch.tensor(0.2)
    with pytest.raises(fastnn.BackendError, match="tensor"):
        F.leaky_relu(x, slope.to(device))
    with fastnn.backend("auto"):
        assert torch.equal(F.leaky_relu(x, slope), stock.leaky_relu(x, slope))
