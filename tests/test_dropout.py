"""Dropout has the bits of ATen, element by element; masks, gradients and generators as in stock."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as stock
import triton.language as tl
from torch.utils.checkpoint import checkpoint

import fastnn
import fastnn.functional as F
from fastnn import _rng, kernels
from fastnn.kernels import _philox
from fastnn.kernels._launch import kernel
from fastnn.testing.meter import traffic
from fastnn.testing.noise import recording
from tests.errors import assert_same_error
from tests.marks import interpreted

# ---- Bits: the closed form against ATen's kernels, which are emulated step by step ---------------


def philox(seed, counter, subsequence):
    """Philox4x32-10 of Salmon et al., for arrays of 64-bit counters and subsequences: (4, ...)."""
    u64 = np.uint64
    low = u64(0xFFFFFFFF)
    counter, subsequence = np.broadcast_arrays(u64(counter), u64(subsequence))
    c = [counter & low, counter >> u64(32), subsequence & low, subsequence >> u64(32)]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        a, b = c[0] * u64(0xD2511F53), c[2] * u64(0xCD9E8D57)
        c = [
            (b >> u64(32)) ^ c[1] ^ u64(k0),
            b & low,
            (a >> u64(32)) ^ c[3] ^ u64(k1),
            a & low,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c).astype(np.uint32)


def uniform(words):
    """As curand_uniform: numbers in (0, 1] in float32."""
    return words.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)


def aten_mask(n, p, seed, offset, blocks, vec):
    """The elements that a launch of ATen's kernels keeps, emulated thread by thread and step by
    step."""
    threads = np.arange(blocks * 256)
    calls = np.zeros(len(threads), np.int64)  # of curand_uniform4, per thread
    keep = np.zeros(n, bool)
    bound = np.float32(1 - p)

    def uniform4(active):
        u = uniform(philox(seed, offset // 4 + calls[active], threads[active]))
        calls[active] += 1
        return u

    if vec == 1:  # fused_dropout_kernel, and the grid-stride kernel of bernoulli_
        stride = len(threads)
        rounded = ((n - 1) // (stride * 4) + 1) * stride * 4
        for base in range(0, rounded, stride * 4):
            u = uniform4(np.full(len(threads), True))
            for i in range(4):
                at = base + threads + stride * i
                keep[at[at < n]] = u[i][at < n] < bound
    else:  # fused_dropout_kernel_vec
        base = threads * vec
        while (active := base < n).any():
            u = [x for _ in range(max(1, vec // 4)) for x in uniform4(active)]
            for i in range(vec):
                keep[base[active] + i] = u[i] < bound
            base = base + len(threads) * vec
    return keep


@kernel
def _keep_kernel(
    OUT, seed: tl.int64, offset: tl.int64, blocks, bound: tl.uint32,
    VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    keep = _philox.keep_mask(start, seed, offset, blocks, bound, VEC, BLOCK)
    tl.store(OUT + start + tl.arange(0, BLOCK), keep.to(tl.int8))


@kernel
def _keep_at_kernel(
    OUT, seed: tl.int64, offset: tl.int64, blocks, bound: tl.uint32,
    N: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * 16 + tl.arange(0, 16)
    group = rows[:, None] * (N // 4) + tl.arange(0, N // 4)[None, :]
    keep = _philox.keep_mask_at(group, seed, offset, blocks, bound, VEC)
    at = rows[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(OUT + at, keep.to(tl.int8))


def ours(n, p, seed, offset, blocks, vec, device, block=512):
    grid = -(-n // block)
    out = torch.zeros(grid * block, dtype=torch.int8, device=device)
    _keep_kernel(
        (grid,), out, seed, offset, blocks, _philox.bound(1 - p), VEC=vec, BLOCK=block, num_warps=4
    )
    return out[:n].cpu().numpy().astype(bool)


def test_philox_known_answers():
    """The authors' table of known answers: all zeros, all ones, digits of pi."""
    ones = 0xFFFFFFFFFFFFFFFF
    for seed, counter, subsequence, answer in (
        (0, 0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (ones, ones, ones, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (0x299F31D0A4093822, 0x85A308D3243F6A88, 0x0370734413198A2E,
         (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):  # fmt: skip
        assert tuple(int(w) for w in philox(seed, counter, subsequence)) == answer
    # torch.rand on a CUDA device after manual_seed(0)
    assert uniform(philox(0, 0, np.arange(3))[0]) == pytest.approx(
        [0.3990, 0.5167, 0.0249], abs=1e-4
    )


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.3, 0.5, 0.9, 1 - 1e-7, 1.0])
def test_bound_is_the_float_comparison(p):
    bound = _philox.bound(1 - p)
    near = np.clip(bound + np.arange(-600, 601), 0, 2**32 - 1).astype(np.uint32)
    kept = uniform(near) < np.float32(1 - p)
    assert (kept == (near < bound)).all()


@pytest.mark.parametrize("vec", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("n", "blocks"),
    [(8, 1), (1000, 4), (4096, 16), (40_008, 8), (50_000, 9)],  # the last two take several rounds
)
@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (-(2**63) + 12345, 2**34 - 8)])
def test_keep_mask_is_atens(n, blocks, vec, seed, offset, device):
    want = aten_mask(n, 0.3, seed, offset, blocks, vec)
    assert (ours(n, 0.3, seed, offset, blocks, vec, device) == want).all()


@pytest.mark.parametrize("vec", [1, 4])
def test_a_word_equal_to_the_bound_is_dropped(vec, device):
    word = int(philox(9, 0, 0)[0])
    out = torch.empty(512, dtype=torch.int8, device=device)
    for bound, kept in ((word, 0), (word + 1, 1)):
        _keep_kernel((1,), out, 9, 0, 2, bound, VEC=vec, BLOCK=512, num_warps=4)
        assert out[0] == kept


@pytest.mark.parametrize("n", [1, 7, 257, 9999])
def test_keep_mask_of_odd_sizes(n, device):
    blocks = -(-n // 256)
    want = aten_mask(n, 0.5, 3, 8, blocks, 1)
    assert (ours(n, 0.5, 3, 8, blocks, 1, device) == want).all()


@pytest.mark.parametrize("vec", [4, 8])
def test_keep_mask_of_tiles(vec, device):
    M, N, blocks = 48, 256, 1  # 12 rounds of 1024 or 6 of 2048 elements
    out = torch.empty(M, N, dtype=torch.int8, device=device)
    _keep_at_kernel((3,), out, 7, 20, blocks, _philox.bound(0.6), N=N, VEC=vec, num_warps=4)
    want = aten_mask(M * N, 0.4, 7, 20, blocks, vec).reshape(M, N)
    assert (out.cpu().numpy() == want).all()


# ---- Launches: geometry, width, the generator's increment ----------------------------------------


@pytest.mark.parametrize("vec", [1, 4])
@pytest.mark.parametrize("n", [1, 4, 256, 1000, 4096, 50_000])
def test_increment_covers_what_the_threads_draw(n, vec):
    """The offset advances by the largest number of words that a thread draws, in whole calls."""
    launch = _rng.launch_geometry(n * vec, 3)
    blocks = launch.blocks
    assert blocks == min(-(-n * vec // 256), 3)
    most = -(-n // (blocks * 256)) if vec == 4 else -(-n // (4 * blocks * 256))
    assert launch.increment == 4 * most


@pytest.mark.parametrize(
    ("n", "itemsize", "pointer", "vec"),
    [
        (1024, 4, 0, 4), (1024, 2, 0, 8), (1020, 2, 0, 4), (1026, 4, 0, 2), (1023, 4, 0, 1),
        (1024, 4, 8, 2), (1024, 4, 4, 1), (1024, 2, 8, 4), (1024, 2, 2, 1), (1026, 2, 16, 2),
    ],
)  # fmt: skip
def test_width_divides_the_size_and_the_pointer(n, itemsize, pointer, vec):
    assert _rng.launch_geometry(n, 1056, 16 // itemsize, pointer, itemsize).vec == vec


class Generator:
    """The Python side of a CUDA generator."""

    def __init__(self, seed, offset):
        self.seed, self.offset = seed, offset

    def get_offset(self):
        return self.offset

    def set_offset(self, offset):
        assert offset % 4 == 0
        self.offset = offset

    def initial_seed(self):
        return self.seed


class NewGenerator(Generator):
    """A generator that reserves numbers by itself, on the CPU and outside of capture."""

    def philox_state(self, increment):
        self.offset += increment
        return tuple(torch.tensor([v]) for v in (self.seed, self.offset - increment, 0))


@pytest.mark.parametrize("kind", [Generator, NewGenerator])
def test_reserving_advances_the_generator(kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    generator = kind(7, 40)
    assert _rng.reserve_numbers(generator, 12) == (7, 40, None, None)
    assert _rng.reserve_numbers(generator, 4) == (7, 52, None, None)
    assert generator.offset == 56


def test_reserving_takes_seeds_of_64_bits(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert _rng.reserve_numbers(Generator(2**64 - 1, 0), 4)[0] == -1


class OnDevice:
    """Stands for a CUDA tensor on a machine without CUDA."""

    is_cuda = True


def test_reserving_under_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    seed, offset = OnDevice(), OnDevice()

    class Prims:
        @staticmethod
        def inductor_reserve_rng_state(generator, increment):
            return seed, offset, torch.tensor([8])

    monkeypatch.setattr(torch.ops, "inductor_prims", Prims)
    assert _rng.reserve_numbers(Generator(7, 40), 12) == (0, 8, seed, offset)
    monkeypatch.setattr(torch.ops, "inductor_prims", object())
    assert _rng.reserve_numbers(Generator(7, 40), 12) is None


def test_state_on_the_device_draws_the_same(device):
    """Under capture the kernel reads seed and offset from tensors, and keeps the values it used."""
    x = torch.randn(3, 700, device=device)
    for launch, vec in (("elements", 4), ("elements", 1), ("channels", 1)):
        launch = getattr(kernels.dropout, launch)
        plain = _rng.plain_draw(x.get_device(), -5, 24, _rng.LaunchGeometry(3, vec, 4))
        args = (_philox.bound(0.7), 2.0, None)
        SEED, OFFSET = (torch.tensor([v], device=device) for v in (-5, 16))
        captured = _philox.Draw(0, 8, SEED, OFFSET, 3, vec)
        state = captured.new_state(x)
        y = launch(x, plain, *args, plain.new_state(x))
        assert 0 < (y == 0).float().mean() < 1
        assert torch.equal(launch(x, captured, *args, state), y)
        assert state[::2].tolist() == [-5, 24]
        OFFSET.fill_(96)  # the next replay; the backward of this one must still find its own offset
        again = captured.from_state(state)
        assert torch.equal(launch(x, again, *args, again.new_state(x)), y)


def test_gradient_under_capture(device, monkeypatch):
    """Forward and backward through autograd with the state on the device."""
    at = [torch.tensor([v], device=device) for v in (11, 400)]
    monkeypatch.setattr(_rng, "draw_for", lambda _, p: _philox.Draw(0, 4, *at, p.blocks, p.vec))
    x = torch.ones(1000, device=device, requires_grad=True)
    y = F.dropout(x, 0.5)
    at[1].add_(4096)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    assert torch.equal(dx, y)


# ---- The probe: whether this torch agrees --------------------------------------------------------


@pytest.fixture
def probed(monkeypatch):
    """The probe with ATen's kernels emulated: a device of one block, a generator, `native(vec)`."""
    generator = Generator(3, 80)
    monkeypatch.setattr(_rng, "most_blocks", lambda device: 1)
    monkeypatch.setattr(_rng, "probe_home", lambda device: ("cpu", generator))
    monkeypatch.setattr(_rng, "probe_results", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def native(widest, seed=3, extra=0):
        def draw(x, p, train=True):
            n = x.numel()
            launch = _rng.launch_geometry(
                n, 1, min(widest, 16 // x.element_size()), 0, x.element_size()
            )
            mask = aten_mask(n, p, seed, generator.offset, launch.blocks, launch.vec)
            generator.offset += launch.increment + extra
            return x, torch.from_numpy(mask)

        monkeypatch.setattr(torch, "native_dropout", draw)
        monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda x, p: draw(x, 1 - p)[1].to(x))

    yield native
    assert generator.offset == 80  # the probe leaves no trace


@interpreted
def test_probe_finds_the_width(probed):
    probed(8)
    assert (_rng.width_limit(0, 4), _rng.width_limit(0, 2)) == (4, 8)
    assert _rng.probe_bernoulli(0) == 1
    probed(4)
    assert _rng.width_limit(0, 2) == 8  # probed only once
    _rng.probe_results.clear()
    assert (_rng.width_limit(0, 4), _rng.width_limit(0, 2)) == (4, 4)


@pytest.mark.parametrize("difference", [{"seed": 4}, {"extra": 4}])
@interpreted
def test_probe_declines_another_layout_and_another_increment(probed, difference):
    probed(8, **difference)
    for answer in (_rng.width_limit(0, 4), _rng.width_limit(0, 2), _rng.probe_bernoulli(0)):
        assert "another way" in answer


def test_probe_does_not_run_under_capture(probed, monkeypatch):
    probed(8)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "capture" in _rng.width_limit(0, 4)
    assert not _rng.probe_results


# ---- Values: the arithmetic of ATen, rounding by rounding ----------------------------------------

CALLS = {
    "dropout": lambda x, p: F.dropout(x, p),
    "dropout in place": lambda x, p: F.dropout(x * 1, p, True, True),
    "dropout2d": lambda x, p: F.dropout2d(x.view(20, 5, 4, 5), p).view(-1),
    "alpha_dropout": lambda x, p: F.alpha_dropout(x, p, True),
    "feature_alpha_dropout": lambda x, p: F.feature_alpha_dropout(x.view(500, 4), p, True).view(-1),
}


@pytest.fixture(autouse=True)
def on_kernels():
    with fastnn.backend("triton"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("p", [0.1, 0.3, 0.71])  # 0.71: the scales of dy and x differ by a bit
def test_values_and_gradients_to_the_bit(name, p, dtype, device):
    with recording() as draws:
        x = torch.randn(2000, device=device).to(dtype)
        x[:4] = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
        x.requires_grad_()
        dy = torch.randn(2000, device=device).to(dtype)
        y = CALLS[name](x, p)
        (dx,) = torch.autograd.grad(y, x, dy)
    (draw,) = draws
    shape = {"dropout2d": (20, 5, 1), "feature_alpha_dropout": (500, 4, 1)}.get(name, (2000,))
    n = np.prod(shape)
    mask = torch.from_numpy(aten_mask(n, p, draw.seed, draw.offset, draw.blocks, draw.vec))
    mask = mask.view(shape).expand(*shape[:-1], 2000 // n).reshape(-1) if n < 2000 else mask
    x, y, dy, dx = (t.detach().cpu() for t in (x, y, dy, dx))
    if name == "dropout":
        keep = torch.tensor(1 - p)
        want = (x.float() * mask * (1 / keep.double()).float()).to(dtype)
        grad = (dy.float() * mask * torch.tensor(1 / (1 - p))).to(dtype)
    else:
        noise = mask.to(dtype)
        if "alpha" in name:
            alpha = 1.7580993408473766
            a = 1 / math.sqrt((alpha * alpha * p + 1) * (1 - p))
            b = noise.add(-1).mul_(alpha * a).add_(alpha * a * p)
            noise.mul_(a)
            want = (x * noise).add_(b)
        else:
            noise.div_(1 - p)
            want = x * noise
        grad = dy * noise
    assert torch.equal(y.nan_to_num(9e4), want.nan_to_num(9e4))
    assert torch.equal(dx, grad)
    assert torch.equal(dx.signbit(), grad.signbit())


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [8192, 8193, 8196])
def test_traffic(n, dtype):
    """Forward and backward move each byte once and nothing else. No mask is among the bytes."""
    x = torch.randn(n, dtype=dtype, requires_grad=True)
    for name in ("dropout", "alpha_dropout", "dropout1d"):
        shaped = x.view(1, -1, 1) if name == "dropout1d" else x
        with traffic(races=True) as log:
            y = getattr(F, name)(shaped, 0.5, True)
            torch.autograd.grad(y, x, torch.ones_like(y))
        assert len(log) == 2
        assert all(launch.shared_writes == 0 for launch in log)
        assert log.sectors.total() <= 1.05 * 4 * n * dtype.itemsize, name


def test_dropped_inf_becomes_nan(device):
    x = torch.full((4000,), float("inf"), device=device)
    y = F.dropout(x, 0.5)
    assert ((y == float("inf")) | y.isnan()).all()
    assert 0.45 < y.isnan().float().mean() < 0.55


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_fraction_kept_and_mean(p, device):
    y = F.dropout(torch.ones(40_000, device=device), p)
    kept = (y != 0).float().mean().item()
    assert abs(kept - (1 - p)) < 5 * math.sqrt(p * (1 - p) / 40_000)
    assert y.mean().item() == pytest.approx(kept / (1 - p), rel=1e-5)
    y = F.alpha_dropout(torch.randn(40_000, device=device), p, True)
    assert abs(y.mean().item()) < 0.1
    assert y.std().item() == pytest.approx(1, abs=0.1)


# ---- Generators, checkpoints, graphs -------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_seed_decides_the_mask(name, device):
    x = torch.randn(2000, device=device)
    torch.manual_seed(5)
    first, second = CALLS[name](x, 0.5), CALLS[name](x, 0.5)
    torch.manual_seed(5)
    assert torch.equal(first, CALLS[name](x, 0.5))
    assert not torch.equal(first, second)
    with torch.random.fork_rng():
        forked = CALLS[name](x, 0.5)
    assert torch.equal(forked, second)
    assert torch.equal(forked, CALLS[name](x, 0.5))


def _state(device):
    return torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()


@pytest.mark.parametrize("name", CALLS)
def test_generator_advances_only_when_something_is_drawn(name, device):
    x = torch.randn(2000, device=device)
    before = _state(device)
    for p in (0, 1, 0.0, 1.0):
        CALLS[name](x, p)
        assert torch.equal(_state(device), before)
    CALLS[name](x, 0.5)
    assert not torch.equal(_state(device), before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputes_the_mask(reentrant, device):
    layer = fastnn.Sequential(fastnn.Dropout(0.5), fastnn.Dropout(0.3))
    x = torch.ones(1000, device=device, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=reentrant)
    F.dropout(x)  # advances the generator
    (dx,) = torch.autograd.grad(y.sum(), x) if not reentrant else (None,)
    if reentrant:
        y.sum().backward()
        dx = x.grad
    torch.testing.assert_close(dx, y.detach())


@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives(name, device):
    """dx is linear in dy, with the noise of the forward. The same holds for all its derivatives."""
    x = torch.randn(2000, device=device, requires_grad=True)
    dy = torch.randn(2000, device=device, requires_grad=True)
    y = CALLS[name](x, 0.5)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    noise = (dx / dy).detach()
    assert len(noise.unique()) >= 2
    (ddy,) = torch.autograd.grad(dx.square().sum(), dy, create_graph=True)
    torch.testing.assert_close(ddy, 2 * noise.square() * dy)
    (dddy,) = torch.autograd.grad(ddy.sum(), dy)
    torch.testing.assert_close(dddy, 2 * noise.square())


@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_upstream_gradient_of_another_layout(layout, device):
    x = torch.ones(40, 30, device=device, requires_grad=True)
    y = F.dropout(x, 0.5)
    dy = torch.ones(1, 1, device=device).expand(40, 30)
    if layout == "transposed":
        dy = torch.ones(30, 40, device=device).t()
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], y)


@pytest.mark.parametrize("name", ["dropout", "dropout1d", "alpha_dropout", "feature_alpha_dropout"])
def test_in_place(name, device):
    """The result is the tensor itself, changed, with a new version, and the gradient passes."""
    leaf = torch.ones(30, 40, device=device, requires_grad=True)
    x = leaf * 2
    ours = getattr(F, name)
    version = x._version
    assert ours(x, 0.5, True, True) is x
    assert x._version > version
    (grad,) = torch.autograd.grad(x, leaf, torch.ones_like(x))
    if "alpha" not in name:
        assert torch.equal(grad, x)
    assert 0 < (grad == 0).float().mean() < 1
    plain = torch.ones(30, 40, device=device)
    assert ours(plain, 0.5, True, True) is plain
    assert plain._version >= 1
    assert not torch.equal(plain, torch.ones_like(plain))
    with pytest.raises(RuntimeError, match=r"leaf Variable .*that requires grad"):
        ours(leaf, 0.5, True, True)
    with torch.inference_mode():
        ours(torch.ones(30, 40, device=device), 0.5, True, True)


def test_saves_no_mask(device):
    x = torch.ones(1000, device=device, requires_grad=True)
    for name, call in CALLS.items():
        if name != "dropout in place":
            y = call(x.expand(2, 1000).reshape(-1), 0.5)
            saved, todo = [], [y.grad_fn]
            while todo:
                node = todo.pop()
                saved += [t for t in getattr(node, "saved_tensors", ()) if t is not None]
                todo += [f for f, _ in node.next_functions if f is not None]
            assert all(t.numel() <= 6 for t in saved), name


# ---- Behaviour of stock without noise ------------------------------------------------------------

FUNCTIONS = ["dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"]
FUNCTIONS += ["feature_alpha_dropout"]


def _input(name, device, **options):
    shape = {"dropout1d": (2, 3, 4), "dropout3d": (2, 3, 4, 5, 6)}.get(name, (2, 3, 4, 5))
    return torch.randn(shape, device=device, **options)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("options", [(0.0, True), (0, True), (0.5, False), (1.0, False)])
def test_nothing_to_drop_returns_the_input(name, options, inplace, device):
    x = _input(name, device, requires_grad=True)
    assert getattr(F, name)(x, *options, inplace) is x
    assert getattr(stock, name)(x, *options, inplace) is x
    empty = x.detach()[:0]
    assert getattr(F, name)(empty, 0.5, True, inplace) is empty


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("training", [True, False])
def test_p_out_of_range_is_stocks_error(name, p, training, device):
    x = _input(name, device)
    assert_same_error(getattr(F, name), getattr(stock, name), x, p, training)


@pytest.mark.parametrize(
    ("name", "dims"), [("dropout1d", 1), ("dropout1d", 4), ("feature_alpha_dropout", 1)]
)
def test_wrong_dimensions_are_stocks_error(name, dims, device):
    x = torch.randn([2] * dims, device=device)
    assert_same_error(getattr(F, name), getattr(stock, name), x, 0.5, True)


@pytest.mark.parametrize(("name", "dims"), [("dropout2d", 3), ("dropout2d", 2), ("dropout3d", 3)])
def test_dimensions_that_stock_warns_of_are_left_to_it(name, dims, device):
    with fastnn.backend("auto"), pytest.warns(UserWarning, match="Received a"):
        getattr(F, name)(torch.randn([2] * dims, device=device))


# ---- On a GPU: against stock itself --------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares with stock's CUDA kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["dropout", "alpha_dropout"])
def test_same_bits_as_stock_on_cuda(name, dtype):
    for n in (8, 1000, 1002, 1001, 300_007, 5_000_000):
        leaf = torch.randn(n, device="cuda", dtype=dtype, requires_grad=True)
        dy = torch.randn(n, device="cuda", dtype=dtype)
        for inplace in (False, True):
            results = []
            for functional in (F, stock):
                torch.manual_seed(17)
                y = getattr(functional, name)(leaf * 1, 0.3, True, inplace)
                results.append((y, *torch.autograd.grad(y, leaf, dy), torch.cuda.get_rng_state()))
            for ours, theirs in zip(*results, strict=True):
                assert torch.equal(ours, theirs), (n, inplace)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares with stock's CUDA kernels")
@pytest.mark.parametrize("name", FUNCTIONS[1:4] + FUNCTIONS[5:])
@pytest.mark.parametrize("channels_last", [False, True])
def test_same_channels_as_stock_on_cuda(name, channels_last):
    x = _input(name, "cuda")
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    results = []
    for functional in (F, stock):
        torch.manual_seed(17)
        results.append((getattr(functional, name)(x, 0.3, True), torch.cuda.get_rng_state()))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
def test_replays_draw_anew_and_as_stock():
    x = torch.ones(2**20, device="cuda", requires_grad=True)
    masks = []
    for functional in (F, stock):
        functional.dropout(x, 0.5).sum().backward()  # compiles, and probes
        torch.manual_seed(17)
        x.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = functional.dropout(x, 0.5)
            y.sum().backward()
        torch.manual_seed(17)
        for _ in range(2):
            x.grad.zero_()
            graph.replay()
            masks.append((y.detach().clone(), x.grad.clone()))
    assert not torch.equal(masks[0][0], masks[1][0])
    for ours, theirs in zip(masks[:2], masks[2:], strict=True):
        assert torch.equal(ours[0], ours[1])
        assert torch.equal(ours[0], theirs[0])
