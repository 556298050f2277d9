"""Signs of zeros. Every op is called with 0.0 and -0.0 in place of its input, forced onto kernels.

Where a result or a gradient is zero here and in PyTorch, the signs are equal. Zeros compare equal,
so no other test sees a sign. A division by the result, or `signbit`, does.
"""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from fastnn.ops import REGISTRY
from fastnn.testing.noise import replaying
from tests.calls import Call, Upstream, attempt, forced, recorded
from tests.marks import interpreted

INPUTS = ("input", "input1", "query")

# Op -> results whose zeros may have another sign; docs/magnitudes.md gives the reasons.
LISTED = {
    "group_norm": {"output 0"},
    "group_norm_act": {"output 0"},
    "linear_act": {"grad of weight"},
    "prelu": {"grad of weight"},
}


def mixed(t: Tensor) -> Tensor:
    negative = torch.arange(t.numel()).view(t.shape) % 3 == 1
    return torch.where(negative, -0.0, 0.0).to(t.dtype)


def negative(t: Tensor) -> Tensor:
    return torch.full_like(t, -0.0)


def signs(call: Call) -> list[str] | None:
    """Results with other signs than in stock; None if the call does not run on kernels."""
    ours, draws = forced(call, {}, upstream=Upstream(0))
    if ours.values is None:
        return None
    with replaying(draws) if draws else nullcontext():
        stock = attempt(call, call.op.stock, {}, upstream=Upstream(0))
    found = []
    for what, a in ours.values.items():
        b = (stock.values or {}).get(what)
        if b is None or not what.startswith(("output", "grad")) or not a.is_floating_point():
            continue
        if ((a == 0) & (b == 0) & (a.signbit() != b.signbit())).any():
            found.append(what)
    return found


@interpreted
@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_zeros_have_the_signs_of_stock(name, record_property):
    runs = 0
    for fill in (mixed, negative):
        for call in recorded().get(name, ()):
            inputs = {k: t for k, t in call.tensors().items() if k in INPUTS}
            inputs = {k: fill(t) for k, t in inputs.items() if t.is_floating_point()}
            if not inputs or min(t.numel() for t in inputs.values()) < 4:
                continue
            found = signs(call.with_(**inputs))
            if found is not None:
                runs += 1
                other = set(found) - LISTED.get(name, set())
                assert not other, f"{fill.__name__} zeros: {sorted(other)}   [{call.row}]"
                break
    record_property("zeros", [("calls", runs)])
    if not runs:
        pytest.skip("no call with a float input of four elements runs on kernels")
