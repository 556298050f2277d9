"""Several processes: kernels on the shards of DTensors, tensor parallel plans, DDP, FSDP2.

The processes are started once for 2 and once for 4 of them, by a server that has imported this
file, so that nobody imports torch again. Each runs all cases and returns what is wrong.
"""

import collections
import multiprocessing
import os
import traceback
import warnings

import pytest
import torch
import torch.nn as stock
import torch.nn.functional as F

import fastnn
from fastnn.ops import FUNCTIONS, REGISTRY
from fastnn.testing.devices import simulated
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
    """What is wrong in one process.."""

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
        a.double().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
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
    """Each op with each of its ways to be split. In two dimensions only some ops, because PyTorch
    takes long to plan: those whose gradients or results are sums, and one without."""
    some = SPLIT if mesh.ndim == 1 else ("linear", "layer_norm", "gelu")
    for name in some:
        op = REGISTRY[name]
        args = CALLS.get(name, DEFAULT)()
        splits = [*op.split(**dict(zip(op.names, args, strict=False)))]
        ways = splits if mesh.ndim == 1 else [*splits, None]
        for i, way in enumerate(ways):
            here = [way, ways[i - 1]][: mesh.ndim]
            wrong.run(f"{name} {here}", one_call, name, args, here, mesh)


# ---- Calls that PyTorch runs --------------------------------------------------------------------


def declined(why, op, *args):
    """The same result as stock, and the reason."""
    with fastnn.decisions() as heard, simulated(least=0):
        got = FUNCTIONS[op](*args)
    assert why in heard[0].why, heard
    with fastnn.backend("torch"):
        want = FUNCTIONS[op](*args)
    assert torch.equal(got.full_tensor(), want.full_tensor())


def refusals(wrong, mesh):
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    whole, odd, x = normal(4, 8), distribute_tensor(normal(3, 8), mesh, [Shard(0)]), normal(4, 8)
    norm = distribute_tensor(x, mesh, [Shard(1)])
    part = DTensor.from_local(x, mesh, [Partial()])
    for why, *call in (
        ("placed as", "gelu", part),
        ("placed as", "layer_norm", norm, (8,)),
        ("equal shards", "gelu", odd),
        ("placed as", "silu", distribute_tensor(x, mesh, [Shard(0)]), True),
        ("no rule", "hardswish", distribute_tensor(x, mesh, [Shard(0)])),
        ("no rule", "dropout", distribute_tensor(x, mesh, [Shard(0)]), 0.5, False),
    ):
        wrong.run(f"declined: {call[0]}, {why}", declined, why, *call)

    def mixed():
        with (
            fastnn.backend("auto"),
            pytest.raises(RuntimeError, match="mixed torch"),
        ):
            fastnn.functional.linear(whole, distribute_tensor(whole, mesh, [Replicate()]))

    wrong.run("a mixture raises as in stock", mixed)


def edited(name, what, mesh):
    """An edit after the call raises where it raises in stock."""
    from torch.distributed.tensor import Shard, distribute_tensor

    raised = []
    for mode in ("torch", "triton"):
        x = distribute_tensor(normal(4, 8), mesh, [Shard(0)]).requires_grad_()
        with fastnn.backend(mode):
            given = x * 1
            out = FUNCTIONS[name](given)
            (given if what == "input" else out).add_(1)
            try:
                out.sum().backward()
                raised.append(None)
            except RuntimeError as e:
                raised.append(str(e)[:80])
    assert raised[0] == raised[1], raised


def hooked(mesh):
    """The hooks of a user see what is saved, and give it back."""
    from torch.distributed.tensor import Shard, distribute_tensor

    seen = []
    x = distribute_tensor(normal(4, 8), mesh, [Shard(0)]).requires_grad_()
    unpack = lambda t: seen.append("unpacked") or t + 0  # noqa: E731
    with fastnn.backend("triton"):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append("packed") or t, unpack):
            out = FUNCTIONS["gelu"](x)
        out.sum().backward()
    assert seen == ["packed", "unpacked"]
    want = normal(4, 8).requires_grad_()
    F.gelu(want).sum().backward()
    torch.testing.assert_close(x.grad.full_tensor(), want.grad)


def edits(wrong, mesh):
    for name in ("gelu", "sigmoid", "relu"):  # they keep the input, or the result
        for what in ("input", "result"):
            wrong.run(f"edit of the {what} of {name}", edited, name, what, mesh)
    wrong.run("hooks of saved tensors", hooked, mesh)


def pending(asks):
    """A collective that is not complete, as argument and as gradient."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh, x = asks, normal(4, 8).requires_grad_()
    with fastnn.backend("triton"):
        y = fastnn.functional.gelu(x)
        z = DTensor.from_local(y, mesh, [Replicate()])
        z = z.redistribute(placements=[Shard(0)], async_op=True)
        z = z.redistribute(placements=[Replicate()], async_op=True).to_local()
        assert type(z).__name__ == "AsyncCollectiveTensor"
        fastnn.functional.silu(z).square().sum().backward()
    want = normal(4, 8).double().requires_grad_()
    F.silu(F.gelu(want)).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), want.grad, rtol=1e-5, atol=1e-6)


def collectives(wrong, mesh):
    wrong.run("a pending collective", pending, mesh)


class NoMemory(torch.Tensor):
    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values):
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*[a.values if isinstance(a, cls) else a for a in args], **kwargs or {})


def test_a_gradient_without_memory_is_refused():
    """The kernel would read at address 0."""
    x = normal(3).requires_grad_()
    for f in (fastnn.functional.gelu, lambda x: fastnn.functional.softmax(x, -1)):
        for _ in range(3):  # on the long way, when it is recorded, and as a plan
            with fastnn.backend("triton"):
                y = f(x)
            with pytest.raises(TypeError, match="the gradient is a NoMemory"):
                torch.autograd.grad(y, x, NoMemory(normal(3)))


# ---- Plans of tensor parallelism, FSDP2, DDP ----------------------------------------------------


class Block(stock.Module):
    def __init__(self, nn):
        super().__init__()
        self.emb = nn.Embedding(12, 8)
        self.norm = nn.LayerNorm(8)
        self.up, self.act, self.down = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)
        self.head = nn.Sequential(nn.Linear(8, 12), nn.LogSoftmax(-1))

    def forward(self, ids):
        x = self.emb(ids)
        x = x + self.down(self.act(self.up(self.norm(x))))
        return self.head(x)


def block(way):
    torch.manual_seed(0)
    net = Block(fastnn if way == "import" else stock)
    return fastnn.convert(net) if way == "convert" else net


def tensor_parallel(net, mesh):
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor import parallel as p

    whole = p.PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    plan = {
        "emb": p.RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": p.SequenceParallel(),
        "up": p.ColwiseParallel(),
        "down": p.RowwiseParallel(output_layouts=Shard(1)),
        "head": whole,
        "head.0": p.ColwiseParallel(output_layouts=Replicate()),
    }
    return p.parallelize_module(
        net, mesh, {**plan, "up": p.ColwiseParallel(input_layouts=Shard(1))}
    )


def fsdp(net, mesh, low=False):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if low else MixedPrecisionPolicy()
    for part in (net.up, net.down):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return fully_shard(net, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def ddp(net, mesh, **options):
    return stock.parallel.DistributedDataParallel(net, process_group=mesh.get_group(), **options)


def of_one(mesh):
    return mesh if mesh.ndim == 1 else mesh["tp"]


WAYS = {
    "tensor parallel": lambda net, mesh: tensor_parallel(net, of_one(mesh)),
    "fully_shard": lambda net, mesh: fsdp(net, of_one(mesh)),
    "fully_shard, bfloat16": lambda net, mesh: fsdp(net, of_one(mesh), True),
    "ddp, buckets": lambda net, mesh: ddp(
        net, of_one(mesh), bucket_cap_mb=0.0001, gradient_as_bucket_view=True
    ),
    "ddp, static graph": lambda net, mesh: ddp(net, of_one(mesh), static_graph=True),
}
BOTH = {
    "tensor parallel and fully_shard": lambda net, mesh: fsdp(
        tensor_parallel(net, mesh["tp"]), mesh["dp"]
    ),
}


def trained(wrap, way, mesh, mode):
    """(losses, gradients, state) of two steps; all processes have the same data."""
    net = block(way)
    wrapped = wrap(net, mesh)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    ids = torch.arange(32).view(4, 8) % 12
    losses = []
    with fastnn.backend(mode), simulated(least=0), fastnn.decisions() as heard:
        for _ in range(2):
            optimizer.zero_grad()
            out = wrapped(ids)
            out = out.full_tensor() if hasattr(out, "full_tensor") else out
            loss = F.nll_loss(out.flatten(0, 1).float(), ids.flatten())
            loss.backward()
            losses.append(loss.detach())
            optimizer.step()
    whole = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t  # noqa: E731
    grads = {n: whole(p.grad) for n, p in net.named_parameters()}
    return losses, grads, {n: whole(t) for n, t in net.state_dict().items()}, heard


def exactly():
    net = block("stock").double()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    ids = torch.arange(32).view(4, 8) % 12
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.nll_loss(net(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
    grads = {n: p.grad for n, p in net.named_parameters()}
    return losses, grads, net.state_dict()


def one_way(name, wrap, how, mesh):
    its = trained(wrap, "stock", mesh, "torch")
    mine = trained(wrap, how, mesh, "auto")
    exact = exactly()
    unit = torch.finfo(torch.bfloat16 if "bfloat16" in name else torch.float32).eps
    for i, true in enumerate(exact[0]):
        far = abs(its[0][i] - true)
        assert abs(mine[0][i] - true) <= 2 * far + 4 * unit * true, (i, mine[0], its[0], true)
    for part in (1, 2):
        assert mine[part].keys() == its[part].keys() == exact[part].keys()
        for n, true in exact[part].items():
            far = (its[part][n] - true).abs().max()
            assert (mine[part][n] - true).abs().max() <= 2 * far + 4 * unit * max(
                true.abs().max(), 0.1
            ), (part, n)
    ran = collections.Counter(d.op.name for d in mine[3] if d.why is None)
    want = {"layer_norm": 2, "linear": 6, "gelu": 2, "log_softmax": 2}
    if "tensor parallel" in name:
        whys = {d.op.name: d.why for d in mine[3] if d.why}
        assert whys.keys() == {"embedding"} and "placed as" in whys["embedding"], whys
    else:
        want["embedding"] = 2
    fused = ran.pop("linear_act", 0)
    ran["linear"] += fused
    assert ran == want, (ran, want)


def models(wrong, mesh):
    for i, (name, wrap) in enumerate((WAYS if mesh.ndim == 1 else BOTH).items()):
        how = ("import", "convert")[i % 2]
        wrong.run(f"{name}, {how}", one_way, name, wrap, how, mesh)


def small_integers(wrap, mesh):
    """With them arithmetic is exact, so that no order of adding can be told from another."""
    found = []
    for mode in ("torch", "triton"):
        net = stock.Sequential(stock.Linear(8, 4), stock.ReLU(), stock.Linear(4, 2))
        with torch.no_grad():
            for i, p in enumerate(net.parameters()):
                p.copy_((normal(*p.shape, seed=i) * 2).round())
        if mode == "triton":
            wrapped = wrap(fastnn.convert(net), mesh)
        x = (normal(4, 8, seed=7) * 2).round()
        with fastnn.backend(mode):
            loss = (wrapped if mode == "triton" else net)(x).sum()
            loss.backward()
        whole = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in net.parameters()]
        found.append([loss.detach(), *whole])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def exact(wrong, mesh):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import parallel as p

    plan = {"0": p.ColwiseParallel(), "2": p.RowwiseParallel()}
    for name, wrap in (
        ("ddp", ddp),
        ("fully_shard", lambda net, mesh: fully_shard(net, mesh=mesh)),
        ("tensor parallel", lambda net, mesh: p.parallelize_module(net, mesh, plan)),
    ):
        wrong.run(f"small integers, {name}", small_integers, wrap, mesh)


# ---- Compiled models ----------------------------------------------------------------------------


class Residual(stock.Module):
    """The compiler makes an op of the product and the GELU, and one of the sum and the norm."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = stock.Linear(8, 16), stock.Linear(16, 8), stock.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + self.down(F.gelu(self.up(x)))).square().sum(-1).mean()


COMPILED = {
    "compiled": lambda net, mesh: fastnn.compile(net),
    "ddp of compiled": lambda net, mesh: ddp(fastnn.compile(net), mesh),
    "compiled ddp": lambda net, mesh: fastnn.compile(ddp(net, mesh)),
    "compiled ddp, views of buckets": lambda net, mesh: fastnn.compile(
        ddp(net, mesh, gradient_as_bucket_view=True)
    ),
    "ddp": ddp,
}


def steps(wrap, mesh, x, dtype=torch.float32, mode="triton"):
    """Losses and parameters of two steps, with the last gradients, and the rules that held."""
    from fastnn._compiler._backend import listen

    torch._dynamo.reset()
    torch.manual_seed(0)
    net = Residual().to(dtype)
    wrapped = net if wrap is None else COMPILED[wrap](net, mesh)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    told = []
    with fastnn.backend(mode), listen() as found:
        for _ in range(2):
            optimizer.zero_grad()
            loss = wrapped(x.to(dtype))
            loss.backward()
            told.append(loss.detach())
            optimizer.step()
    told += [t.detach() for p in net.parameters() for t in (p, p.grad)]
    return told, collections.Counter(f.rule for f in found if " " in f.rule)


def one_compiled(wrap, mesh):
    x = normal(8, 8, seed=3)
    alone, rules = steps("compiled", mesh, x)
    both_have_all, found = steps(wrap, mesh, x)
    # The mean of two equal gradients is that gradient, to the bit.
    assert all(torch.equal(a, b) for a, b in zip(alone, both_have_all, strict=True))
    wanted = {"linear, activation": 1, "dropout, add, norm": 1, "bias in a backward": 1}
    assert found == rules == wanted, (found, rules)
    mine = x.chunk(2)[mesh.get_rank()]
    ours, again = (steps(wrap, mesh, mine)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    its = steps("ddp", mesh, mine, mode="torch")[0]
    exact = steps("ddp", mesh, mine, torch.float64, "torch")[0]
    whole = steps(None, mesh, x, torch.float64, "torch")[0]
    for i, (got, want, true) in enumerate(zip(ours, its, exact, strict=True)):
        far, scale = (want - true).abs().max(), true.abs().max().clamp(min=0.1)
        assert (got - true).abs().max() <= 2 * far + 4 * torch.finfo(torch.float32).eps * scale, i
        if i > 1:  # the losses are those of the halves
            torch.testing.assert_close(true, whole[i])


def compiled(wrong, mesh):
    for wrap in ("ddp of compiled", "compiled ddp", "compiled ddp, views of buckets"):
        wrong.run(wrap, one_compiled, wrap, mesh)


def checkpoint(wrong, mesh):
    """Written by a sharded model of one kind, read by one of the other."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    def both_ways(write, read):
        path = f"{FOLDER[0]}/{write}"
        first = tensor_parallel(block(write), mesh)
        with torch.no_grad():
            [p.add_(1) for p in first.parameters()]
        dcp.save(get_model_state_dict(first), checkpoint_id=path)
        second = fsdp(block(read), mesh)
        state = get_model_state_dict(second)
        dcp.load(state, checkpoint_id=path)
        set_model_state_dict(second, state)
        for (n, a), (m, b) in zip(
            first.state_dict().items(), second.state_dict().items(), strict=True
        ):
            assert n == m and torch.equal(a.full_tensor(), b.full_tensor()), n

    for write, read in (("stock", "import"), ("convert", "stock"), ("import", "stock")):
        wrong.run(f"checkpoint of {write}, read by {read}", both_ways, write, read)


def context_parallel(wrong, mesh):
    """Left to stock: it replaces attention by a ring of calls, also for those who call ours."""
    from torch.distributed.tensor.experimental import context_parallel

    def attends():
        found = []
        for home in (F, fastnn.functional):
            q, k, v = (normal(2, 2, 8, 8, seed=i) for i in range(3))
            with fastnn.decisions() as heard, simulated(least=0), torch.no_grad():
                with context_parallel(mesh, buffers=[q, k, v], buffer_seq_dims=[2, 2, 2]):
                    with torch.nn.attention.sdpa_kernel(MATH):
                        found.append(home.scaled_dot_product_attention(q, k, v))
        assert torch.equal(*found) and not heard, heard

    wrong.run("context parallel", attends)


FOLDER = [""]


def process(rank, world, folder):
    from torch.distributed.device_mesh import init_device_mesh

    warnings.simplefilter("ignore")
    FOLDER[0] = folder
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    wrong = Wrong()
    shape = {2: (2,), 4: (2, 2)}[world]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[-len(shape) :])
    for group in GROUPS[world]:
        group(wrong, mesh)
    torch.save((wrong.cases, [*wrong]), f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


GROUPS = {
    2: [
        calls,
        refusals,
        collectives,
        edits,
        models,
        exact,
        compiled,
        checkpoint,
        context_parallel,
    ],
    4: [calls, models],
}


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
    assert not any(p.exitcode for p in running), f"a process died: {[p.exitcode for p in running]}"
    found = [torch.load(tmp_path / str(rank)) for rank in range(world)]
    record_property("setups", [(f"cases in {world} processes", found[0][0])])
    assert not any(wrong for _, wrong in found), "\n".join(w for _, ws in found[:1] for w in ws)
