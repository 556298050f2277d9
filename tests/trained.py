"""Models that train in PyTorch, in float64, and compiled for the backend "fastnn".

A model here returns its loss, and its `batch(n, shift)` gives a batch of n samples, the same on
every machine.
"""

import copy
import warnings
from collections import Counter
from typing import NamedTuple

import torch

import fastnn
from fastnn._compiler._backend import listen
from fastnn.testing import simulated

BATCHES = (2, 2, 3, 4, 2)  # five steps; the second size makes PyTorch compile for any size
GRAPHS = 3  # for the first size, for any size, and for the evaluation


def wave(*shape, shift=0.0):
    """Numbers between -1 and 1 that are the same on every machine and do not repeat."""
    n = torch.Size(shape).numel()
    return torch.sin(torch.arange(n, dtype=torch.float64) * 0.7368 + shift).view(shape)


def classes(*shape, count):
    n = torch.Size(shape).numel()
    return (torch.arange(n) * 7 % 11 % count).view(shape)


def _to(inputs, dtype):
    return [t.to(dtype) if t.is_floating_point() else t for t in inputs]


def trained(model, call, dtype, low=False, batches=BATCHES, rank=None):
    """The loss of each step, the gradients of each step, and the loss in evaluation afterwards.

    low: whether autocast converts to bfloat16. rank: that of one of several processes, of which
        each has batches of its own; they evaluate nothing.
    """

    def loss_of(n, shift):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            return call(*_to(model.batch(n, shift + 3 * (rank or 0)), dtype))

    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    told = []
    for step, n in enumerate(batches):
        optimizer.zero_grad()
        loss = loss_of(n, 0.3 * step)
        loss.backward()
        told += [
            loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None),
        ]  # fmt: skip
        optimizer.step()
    if rank is None:
        model.eval()
        with torch.no_grad():
            told.append(loss_of(3, 9.0))
    return told


def distance(told, exact):
    """The sum of the errors of all results, each over the largest number of the exact one.

    The gradient of a bias before a norm is 0, and what is left of it is rounding. Numbers below
    1e-4 of the largest of all gradients therefore count against that.
    """
    floor = 1e-4 * max(t.abs().max() for t in exact)
    return sum(
        ((one.double() - true).abs().max() / true.abs().max().clamp(min=floor)).item()
        for one, true in zip(told, exact, strict=True)
    )


class Compared(NamedTuple):
    """What a comparison found.

    ratio: the distance of the compiled model from float64, over that of PyTorch.
    ran: the ops that ran kernels.
    stayed: (op, code of the reason) of the calls that ran on PyTorch.
    rules: how often each rule held, in all graphs.
    graphs: how many graphs PyTorch compiled.
    same: whether a second training had the same bits.
    """

    ratio: float
    ran: set
    stayed: set
    rules: Counter
    graphs: int
    same: bool


def compared(model, low=False, forced=True, **options):
    """Train `model` in PyTorch, in float64 and, twice, compiled with `options`, on kernels.

    low: under autocast to bfloat16. forced: every call must run kernels; else calls that kernels
        do not take run on PyTorch, as with any size in `auto`.
    """
    exact_model, reference = copy.deepcopy(model).double(), copy.deepcopy(model)
    first = copy.deepcopy(model.state_dict())
    exact = trained(exact_model, exact_model, torch.float64)
    theirs = trained(reference, reference, torch.float32, low)
    torch._dynamo.utils.counters.clear()
    kernels = fastnn.backend("triton") if forced else simulated(least=0)
    with kernels, fastnn.decisions() as heard, listen() as found:
        call = fastnn.compile(model, **options)
        ours = trained(model, call, torch.float32, low)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        model.load_state_dict(first)
        again = trained(model, call, torch.float32, low)
    return Compared(
        distance(ours, exact) / distance(theirs, exact),
        {d.op.name for d in heard if d.why is None},
        {(d.op.name, d.code) for d in heard if d.why is not None},
        Counter(f.rule for f in found),
        graphs,
        all(map(torch.equal, ours, again)),
    )


# ---- Two processes ------------------------------------------------------------------------------


def in_one_of_two(rank, builds, folder):
    """A process of `DistributedDataParallel`: trains what each of `builds` makes, and compares.

    Writes {name: (our distance from float64 over stock's, ops that ran kernels)}, or what was
    raised, to the file of its rank in `folder`.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    found = {}
    for name, build in builds.items():
        torch._dynamo.reset()
        try:
            with torch._dynamo.config.patch(allow_rnn=True):
                found[name] = _by_two(build, rank)
        except Exception as e:
            found[name] = f"{type(e).__name__}: {e}"
        torch.save(found, f"{folder}/{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _by_two(build, rank):
    def made(dtype, compiler=lambda model: model):
        torch.manual_seed(0)
        model = build().to(dtype)
        return model, torch.nn.parallel.DistributedDataParallel(compiler(model))

    def told(model, call, dtype):
        return trained(model, call, dtype, batches=(2,) * len(BATCHES), rank=rank)

    exact = told(*made(torch.float64), torch.float64)
    theirs = told(*made(torch.float32), torch.float32)
    # Of a small model with batch norms, five steps may turn one rounding into a distance that all
    # can see. So stock trains again, with weights that lie half a unit in the last place apart.
    model, call = made(torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 6e-8 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    moved = told(model, call, torch.float32)
    fair = max(distance(theirs, exact), distance(moved, exact))
    with simulated(least=0), fastnn.decisions() as heard:
        model, call = made(torch.float32, fastnn.compile)
        first = copy.deepcopy(model.state_dict())
        ours = told(model, call, torch.float32)
        last = [p.detach().clone() for p in model.parameters()]
        model.load_state_dict(first)
        again = told(model, call, torch.float32)
    assert all(map(torch.equal, ours, again)), "the second training has other bits"
    for p in last:  # both processes end with one set of parameters, to the bit
        other = p.clone()
        torch.distributed.broadcast(other, 0)
        assert torch.equal(other, p), "the processes have two sets of parameters"
    ran = {d.op.name for d in heard if d.why is None}
    return distance(ours, exact) / fair, sorted(ran)
