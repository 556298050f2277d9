"""Several processes: kernels on the shards of DTensors, tensor parallel plans, DDP, FSDP2.

The processes are started once for 2 and once for 4 of them, by a server that has imported this
file, so that nobody imports torch again. Each runs all cases and returns what is wrong.
"""

import itertools
import multiprocessing
import os
import time
import traceback
import warnings

import pytest
import torch
import torch.nn as stock
import torch.nn.functional as F

import fastnn
from fastnn.ops import FUNCTIONS, REGISTRY
from tests.marks import interpreted

pytestmark = [
    interpreted,
    pytest.mark.skipif(os.name != "posix", reason="processes are forked by a server"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed"),
]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Calls of ops that have ways to be split. An op without a line gets one tensor.
CALLS = {
    "linear": lambda: (normal(4, 4, 8), normal(16, 8, seed=1), normal(16, seed=2)),
    "layer_norm": lambda: (normal(4, 4, 8), (8,), normal(8, seed=1), normal(8, seed=2)),
    "rms_norm": lambda: (normal(4, 4, 8), (8,), normal(8, seed=1)),
    "softmax": lambda: (normal(4, 4, 8), -1),
    "log_softmax": lambda: (normal(4, 4, 8), 1),
    "softmin": lambda: (normal(4, 4, 8), 0),
    "glu": lambda: (normal(4, 4, 8), 1),
    "embedding": lambda: (torch.arange(32).view(4, 8) % 7, normal(9, 8)),
    "scaled_dot_product_attention": lambda: tuple(normal(4, 4, 4, 8, seed=i) for i in range(3)),
    "act_mul": lambda: (normal(4, 4, 8), normal(4, 4, 8, seed=1)),
    "threshold": lambda: (normal(4, 4, 8), 0.1, 2.0),
}
MATH = torch.nn.attention.SDPBackend.MATH  # the others have no backward for DTensors on a CPU
DEFAULT = lambda: (normal(4, 4, 8),)  # noqa: E731
SPLIT = sorted(name for name, op in REGISTRY.items() if op.split is not None)


class Wrong(list):
    """What is wrong in one process. `with wrong.noted(...)` writes an error down."""

    def __init__(self):
        super().__init__()
        self.cases = 0

    def run(self, name, case, *args):
        self.cases += 1
        try:
            case(*args)
        except Exception as e:
            where = "".join(traceback.format_exception(e)[-3:])
            self.append(f"{name}: {where}")


def placed(args, names, ways, mesh):
    """The arguments as DTensors, and the leaves among them."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    found, leaves = [], []
    for name, value in zip(names, args, strict=False):
        if isinstance(value, torch.Tensor):
            places = [
                Shard(way.along[name]) if way is not None and name in way.along else Replicate()
                for way in ways
            ]
            value = distribute_tensor(value, mesh, places)
            if value.is_floating_point():
                value.requires_grad_()
                leaves.append(value)
        found.append(value)
    return found, leaves


def both(run, op, args, ways, mesh):
    """(output, gradients) of a call on DTensors."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    given, leaves = placed(args, op.names, ways, mesh)
    out = run(*given)
    places = [Replicate() if p.is_partial() else p for p in out.placements]
    weights = distribute_tensor(normal(*out.shape, seed=9), mesh, places)
    return out, *torch.autograd.grad(out, leaves, weights)


def one_call(name, args, ways, mesh):
    op = REGISTRY[name]
    with fastnn.backend("triton"), fastnn.decisions() as heard:
        mine = both(FUNCTIONS[name], op, args, ways, mesh)
    assert [(d.op.name, d.why) for d in heard] == [(name, None)]
    with fastnn.backend("torch"), torch.nn.attention.sdpa_kernel(MATH):
        its = both(op.stock, op, args, ways, mesh)
    leaves = [
        a.double().requires_grad_()
        if isinstance(a, torch.Tensor) and a.is_floating_point()
        else a
        for a in args
    ]
    exact = op.stock(*leaves)
    weights = normal(*exact.shape, seed=9).double()
    wanted = [a for a in leaves if isinstance(a, torch.Tensor) and a.requires_grad]
    exact = exact, *torch.autograd.grad((exact * weights).sum(), wanted)
    for i, (got, want, true) in enumerate(zip(mine, its, exact, strict=True)):
        assert got.placements == want.placements, (i, got.placements, want.placements)
        assert (got.shape, got.dtype) == (want.shape, want.dtype), i
        assert got.stride() == want.stride() or i, (i, got.stride(), want.stride())
        far = (want.full_tensor() - true).abs().max()
        scale = true.abs().max() * torch.finfo(torch.float32).eps
        assert (got.full_tensor() - true).abs().max() <= 2 * far + 4 * scale, i


def calls(wrong, mesh):
    """Each op with each of its ways to be split, in all dimensions of the mesh."""
    for name in SPLIT:
        op = REGISTRY[name]
        args = CALLS.get(name, DEFAULT)()
        splits = [*op.split(**dict(zip(op.names, args, strict=False)))]
        ways = splits if mesh.ndim == 1 else [*splits, None]
        for i, way in enumerate(ways):
            here = [way, ways[i - 1]][: mesh.ndim]
            wrong.run(f"{name} {here}", one_call, name, args, here, mesh)


def process(rank, world, folder):
    from torch.distributed.device_mesh import init_device_mesh

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    wrong = Wrong()
    shape = {2: (2,), 4: (2, 2)}[world]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("tp", "dp")[: len(shape)])
    for group in GROUPS[world]:
        group(wrong, mesh)
    print(rank, time.process_time(), flush=True)
    torch.save((wrong.cases, [*wrong]), f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


GROUPS = {2: [calls], 4: [calls]}


@pytest.mark.parametrize("world", [2, 4])
def test_processes(world, tmp_path, record_property):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch.distributed.tensor.parallel"])
    running = [context.Process(target=process, args=(r, world, tmp_path)) for r in range(world)]
    [p.start() for p in running]
    [p.join(240) for p in running]
    alive = [p for p in running if p.is_alive()]
    [p.kill() for p in alive]
    assert not alive, "processes wait for each other"
    found = [torch.load(tmp_path / str(rank)) for rank in range(world)]
    record_property("setups", [(f"cases in {world} processes", found[0][0])])
    assert not any(wrong for _, wrong in found), "\n".join(w for _, ws in found[:1] for w in ws)
