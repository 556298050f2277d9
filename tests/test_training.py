"""What training code builds around layers: checkpointing, DDP, FSDP, hooks, tied weights."""

import os

import pytest
import torch
import torch.nn as stock
from torch.utils.checkpoint import checkpoint

import fastnn

WIDTH = 6


def build(nn):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(WIDTH, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, WIDTH), nn.ReLU()
    )


@pytest.fixture
def pair(on_device):
    ours, its = build(fastnn), build(stock)
    return ours, its, torch.randn(5, WIDTH)


def grads(model, run=None):
    model.zero_grad()
    (run or model)().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(pair, reentrant):
    ours, its, x = pair
    x.requires_grad_()
    with fastnn.backend("triton"):
        got = grads(ours, lambda: checkpoint(ours, x, use_reentrant=reentrant))
    close(got, grads(its, lambda: its(x)))


def test_checkpoint_recomputes_on_the_same_path(pair):
    """The recomputation runs inside the backward, and on a GPU in another thread."""
    ours, _, x = pair
    with fastnn.backend("triton"):
        loss = checkpoint(ours, x, use_reentrant=False).sum()
    with fastnn.backend("triton"), fastnn.decisions() as heard:
        loss.backward()
    assert heard and not any(d.why for d in heard)


def test_saved_tensor_hooks_and_inference_mode(pair):
    ours, its, x = pair
    with fastnn.backend("triton"), torch.autograd.graph.save_on_cpu():
        got = grads(ours, lambda: ours(x))
    close(got, grads(its, lambda: its(x)))
    with fastnn.backend("triton"), torch.inference_mode():
        close(ours(x), its(x))


def test_tied_weights_and_accumulation(pair):
    ours, its, x = pair
    for model in (ours, its):
        model[3].weight = stock.Parameter(model[0].weight.detach().t().contiguous())
        model[0].weight = model[3].weight if WIDTH == 8 else model[0].weight
    with fastnn.backend("triton"):
        for model in (ours, its):
            model.zero_grad()
            for _ in range(2):
                (model(x).sum() + model(2 * x).sum()).backward()
    close([p.grad for p in ours.parameters()], [p.grad for p in its.parameters()])


def test_optimizers_fused_step_and_grad_scaler(pair):
    ours, its, x = pair
    for model in (ours, its):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with fastnn.backend("triton"):
            for _ in range(3):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
    close(list(ours.parameters()), list(its.parameters()))


@pytest.fixture
def group(tmp_path, device):
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{tmp_path}/store",
        rank=0,
        world_size=1,
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(os.name != "posix", reason="file:// stores of this test are for POSIX")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_ddp(pair, group):
    ours, its, x = pair
    wrapped = stock.parallel.DistributedDataParallel(ours)
    with fastnn.backend("triton"):
        got = grads(ours, lambda: wrapped(x))
    close(got, grads(its, lambda: its(x)))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_fsdp(pair, group, device):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ours, its, x = pair
    want = grads(its, lambda: its(x))
    fully_shard(ours, mesh=init_device_mesh(device, (1,)))
    with fastnn.backend("triton"), fastnn.decisions() as heard:
        ours(x).sum().backward()
    assert not any(d.why for d in heard)
    close([p.grad.full_tensor() for p in ours.parameters()], want)
