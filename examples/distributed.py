"""Trains a small model in several processes: DDP, FSDP2 or tensor parallelism.

    torchrun --nproc-per-node 2 examples/distributed.py --how ddp
    torchrun --nproc-per-node 2 examples/distributed.py --how fsdp tp

Without torchrun it trains in one process. The losses are those of one process, up to the order in
which processes add. It uses NCCL where there are GPUs, and else gloo.
"""

import argparse
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import fastnn as nn

WORDS, WIDTH, BATCH, LENGTH = 32, 16, 8, 12


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.act = nn.GELU()
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, words):
        x = self.embedding(words)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def tensor_parallel(model, mesh):
    """The sequence is split between the blocks, and the features inside of them."""
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    for i in range(len(model.blocks)):
        plan[f"blocks.{i}.norm"] = SequenceParallel()
        plan[f"blocks.{i}.up"] = ColwiseParallel(input_layouts=Shard(1))
        plan[f"blocks.{i}.down"] = RowwiseParallel(output_layouts=Shard(1))
    return parallelize_module(model, mesh, plan)


def prepared(how, mesh, device, dtype):
    torch.manual_seed(0)
    model = Model().to(device, dtype)
    if mesh is None:
        return model
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if how == "tp":
        return tensor_parallel(model, mesh)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model, mesh, splits_batch, device, steps):
    """Prints a loss per step, the mean over the whole batch."""
    rank, world = (mesh.get_rank(), mesh.size()) if mesh is not None else (0, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss_of = nn.CrossEntropyLoss()
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        words = torch.randint(WORDS, (BATCH, LENGTH), generator=generator).to(device)
        if splits_batch:
            words = words.chunk(world)[rank]
        optimizer.zero_grad()
        loss = loss_of(model(words).flatten(0, 1), (words.flatten() + 1) % WORDS)
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if splits_batch:
            dist.all_reduce(mean)
            mean /= world
        if rank == 0:
            print(f"step {step}  loss {mean.item():.17g}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--how", nargs="+", choices=("ddp", "fsdp", "tp"), default=["ddp"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--double", action="store_true", help="float64, to compare losses")
    args = parser.parse_args()

    world, gpu = int(os.environ.get("WORLD_SIZE", 1)), torch.cuda.is_available()
    device, mesh = torch.device("cpu"), None
    if gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if gpu else "gloo")
        mesh = init_device_mesh(device.type, (world,))
    for how in args.how:
        model = prepared(how, mesh, device, torch.float64 if args.double else torch.float32)
        if mesh is None or mesh.get_rank() == 0:
            print(f"{how if mesh is not None else 'alone'}, {world} on {device.type}", flush=True)
        train(model, mesh, mesh is not None and how != "tp", device, args.steps)
    if mesh is not None:
        dist.barrier()
        dist.destroy_process_group()
        # A thread of gloo lets go of the tensors of a collective after the collective is over, and
        # needs Python for that. FSDP and DTensor keep this thread alive, so nothing waits for it.
        # If Python ends first, the thread aborts the process. So the process ends without that.
        sys.stdout.flush()
        os._exit(0)
    else:
        print("trained")


if __name__ == "__main__":
    main()
