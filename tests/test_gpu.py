"""Properties that only a GPU shows: streams, capture, devices, synchronisation, 64-bit offsets."""

import pytest
import torch
import torch.nn as stock

import fastnn
import fastnn.functional as F

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")


def build(nn, p=0.0):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.GELU(), nn.Dropout(p), nn.LayerNorm(128), nn.Linear(128, 32)
    )
    return model.cuda()


def test_no_host_synchronisation():
    model, loss = build(fastnn, 0.1), fastnn.CrossEntropyLoss()
    table = fastnn.Embedding(50, 64).cuda()
    index = torch.randint(50, (16,), device="cuda")
    target = torch.randint(32, (16,), device="cuda")
    with fastnn.backend("triton"):
        loss(model(table(index)), target).backward()  # compiles
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss(model(table(index)), target).backward()
        finally:
            torch.cuda.set_sync_debug_mode(before)


def test_side_stream():
    x = torch.randn(1 << 20, device="cuda")
    with fastnn.backend("triton"):
        F.gelu(x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(10**7)
            y = torch.full_like(x, 2.0)
            got = F.gelu(y)  # another stream would read y too early
        torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close(got, stock.functional.gelu(y))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_tensor_on_another_device_than_the_current_one():
    x = torch.randn(1000, device="cuda:1")
    with fastnn.backend("triton"):
        torch.testing.assert_close(F.gelu(x), stock.functional.gelu(x))
    assert torch.cuda.current_device() == 0


def test_capture_and_replay():
    model, its = build(fastnn), build(stock)
    x = torch.randn(8, 64, device="cuda")
    with fastnn.backend("triton"):
        fastnn.warmup(model, x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(8, 64))
        graph.replay()
        torch.testing.assert_close(y, its(x), rtol=1e-4, atol=1e-4)


def test_captured_dropout_draws_anew_at_each_replay():
    x = torch.ones(4096, device="cuda")
    with fastnn.backend("triton"):
        F.dropout(x, 0.5)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = F.dropout(x, 0.5)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)
    assert set(y.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("n", [1, 5, 4096, 4097, 1 << 20, (1 << 22) + 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_has_stocks_bits(n, dtype, p):
    x = torch.randn(n, device="cuda", dtype=dtype)
    for offset in (0, 1):
        v = x[offset:] if n > 1 else x
        leaves, outs = [v.detach().clone() if not offset else v.detach() for _ in range(2)], []
        for function, mode, leaf in zip(
            (F, stock.functional), ("triton", "torch"), leaves, strict=True
        ):
            leaf.requires_grad_()
            torch.manual_seed(7)
            with fastnn.backend(mode):
                outs.append([function.dropout(leaf, p), torch.rand(3, device="cuda")])
            outs[-1].append(torch.autograd.grad(outs[-1][0].sum(), leaf)[0])
        assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_more_than_two_to_the_31_elements():
    n = 2**31 + 4096 * 3 + 1
    if torch.cuda.mem_get_info()[0] < 5 * n:
        pytest.skip(f"needs {5 * n >> 30} GiB of free GPU memory")
    x = torch.full((n,), -1.0, device="cuda", dtype=torch.bfloat16)
    x[-3:] = torch.tensor([1.0, 2.0, 3.0])
    with fastnn.backend("triton"):
        y = F.relu(x)
    assert y[-3:].tolist() == [1.0, 2.0, 3.0] and y[: 2**31].max().item() == 0.0
