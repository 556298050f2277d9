"""The table of fusion rules, and the grouping of neighbours that is remembered."""

import copy
import pickle

import pytest
import torch
import torch.nn as stock

import fastnn
from fastnn.layers import _fusion

NEIGHBOURS = [rule for rule in _fusion.RULES if rule.neighbours]
MADE = {
    "Linear": lambda: fastnn.Linear(4, 4),
    "BatchNorm1d": lambda: fastnn.BatchNorm1d(4),
    "BatchNorm2d": lambda: fastnn.BatchNorm2d(4),
    "BatchNorm3d": lambda: fastnn.BatchNorm3d(4),
    "GroupNorm": lambda: fastnn.GroupNorm(2, 4),
    "Conv1d": lambda: fastnn.Conv1d(4, 4, 1),
    "Conv2d": lambda: fastnn.Conv2d(4, 4, 1),
    "Conv3d": lambda: fastnn.Conv3d(4, 4, 1),
}


@pytest.fixture(autouse=True)
def no_size_gate(simulate):
    simulate(least=0, source="the test")


def make(cls):
    return MADE.get(cls.__name__, cls)()


def names(net, x):
    with fastnn.backend("triton"), fastnn.decisions() as heard:
        net(x)
    return [(op.name, why) for op, why, _ in heard]


@pytest.mark.parametrize("rule", NEIGHBOURS, ids=lambda rule: rule.op.__name__)
def test_each_rule_runs_its_op_for_every_class_it_names(rule, device):
    lead, *between = (p for p in rule.places if p is not rule.places[-1] or not p.optional)
    end = next(p for p in rule.places if fastnn.ReLU in p.tells)
    between = [make(next(iter(p.tells))).eval() for p in between if p is not end]
    for first in lead.tells:
        for second in end.tells:
            if not isinstance(second, type) or not issubclass(second, stock.Module):
                continue
            net = fastnn.Sequential(make(first), *between, make(second)).to(device)
            dims = int(first.__name__[-2]) if first.__name__[-1] == "d" else 0
            x = torch.randn(3, 4, *(2,) * max(0, dims - (first is fastnn.BatchNorm1d)))
            assert names(net, x.to(device)) == [(rule.op.__name__, None)], (first, second)


CHANGES = {
    "a hook": lambda net: net[0].register_forward_hook(lambda *a: None),
    "a forward of its own": lambda net: setattr(net[1], "forward", torch.tanh),
    "another class": lambda net: setattr(net[0], "__class__", stock.Linear),
    "another member": lambda net: net.__setitem__(1, stock.Softsign()),
    "one more between": lambda net: net.insert(1, stock.Identity()),
    "a setting": lambda net: setattr(net[1], "approximate", "?"),
    "the mode": None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_remembered_gives_way_to_a_change(change, device):
    net = fastnn.Sequential(fastnn.Linear(4, 4), fastnn.GELU()).to(device)
    x = torch.randn(3, 4, device=device)
    assert names(net, x) == names(net, x) == [("linear_act", None)]
    if change == "the mode":
        with fastnn.backend("torch"), fastnn.decisions() as heard:
            net(x)
        assert [op.name for op, _, _ in heard] == ["linear", "gelu"]
        return
    CHANGES[change](net)
    with fastnn.decisions() as heard:
        if change == "a setting":
            with pytest.raises(RuntimeError, match="approximate"):
                net(x)
        else:
            net(x)
    assert ("linear_act", None) not in [(op.name, why) for op, why, _ in heard]


def test_a_parameter_put_in_as_an_attribute_is_the_one_read(device):
    net = fastnn.Sequential(fastnn.Linear(4, 4), fastnn.ReLU()).to(device)
    x = torch.randn(3, 4, device=device)
    net(x)
    weight = net[0].weight.detach() * 2
    del net[0].weight
    net[0].weight = weight  # a plain tensor, as pruning leaves one
    assert names(net, x) == [("linear_act", None)]
    with fastnn.backend("triton"):
        want = torch.relu(stock.functional.linear(x, weight, net[0].bias))
        torch.testing.assert_close(net(x), want)


def test_remembering_leaves_no_trace_on_the_model(device):
    net = fastnn.Sequential(fastnn.Linear(4, 4), fastnn.GELU()).to(device)
    before = set(vars(net)), repr(net), list(net.state_dict()), pickle.dumps(net)
    net(torch.randn(3, 4, device=device))
    assert (set(vars(net)), repr(net), list(net.state_dict()), pickle.dumps(net)) == before
    assert set(vars(copy.deepcopy(net))) == before[0]


def test_what_members_fuse_is_known_by_their_classes_alone(device):
    class Mine(stock.Module):
        def forward(self, x):
            return x

    def nodes(tree):
        return {cls: nodes(node.next) for cls, node in tree.items()}

    before = nodes(_fusion.LEADERS)
    assert {fastnn.Linear, stock.Linear} <= {*before}
    for n in range(3):
        net = fastnn.Sequential(*[Mine()] * n, fastnn.Linear(4, 4), fastnn.ReLU(), Mine())
        x = torch.randn(2, 4, device=device)
        assert names(net.to(device), x) == [("linear_act", None)]
    assert nodes(_fusion.LEADERS) == before


def test_members_of_our_classes_and_marked_ones_fuse_with_each_other(device):
    x = torch.randn(2, 4, device=device)
    for marked in range(8):
        made = [fastnn.Linear(4, 4), fastnn.ReLU(), fastnn.Dropout(0.5)]
        for i, its in enumerate((stock.Linear(4, 4), stock.ReLU(), stock.Dropout(0.5))):
            if marked >> i & 1:
                made[i] = fastnn.convert(its)
        net = fastnn.Sequential(*made).to(device)
        assert names(net, x) == [("linear_act", None)]
        if marked & 4:  # without its mark, the optional member runs by itself, on PyTorch
            fastnn.revert(net[2])
            assert names(net, x) == [("linear_act", None)]
            torch.manual_seed(3)
            out = net(x)
            torch.manual_seed(3)
            torch.testing.assert_close(out, net[2](net[1](net[0](x))))
        if marked & 1:
            fastnn.revert(net[0])
            assert ("linear_act", None) not in names(net, x)
