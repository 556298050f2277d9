"""Dropout: the bits are ATen's, element for element; masks, gradients and generators as stock."""

import os

import numpy as np
import pytest
import torch
import triton.language as tl
from fastnn.kernels._launch import kernel

from fastnn.kernels import _philox

interpreted = os.environ.get("TRITON_INTERPRET") == "1"

# ---- Which bits: the closed form against ATen's kernels, run literally ---------------------------


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
    """curand_uniform: (0, 1] in float32."""
    return words.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)


def aten_mask(n, p, seed, offset, blocks, vec):
    """What a launch of ATen's kernels keeps, thread by thread and step by step, as they loop."""
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


def ours(n, p, seed, offset, blocks, vec, block=512):
    grid = -(-n // block)
    out = torch.zeros(grid * block, dtype=torch.int8)
    if torch.cuda.is_available():
        out = out.cuda()
    _keep_kernel(
        (grid,), out, seed, offset, blocks, _philox.bound(1 - p), VEC=vec, BLOCK=block, num_warps=4
    )
    return out[:n].cpu().numpy().astype(bool)


def test_philox_known_answers():
    """From the authors' table of known answers: all zeros, all ones, digits of pi."""
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
    [(8, 1), (1000, 4), (4096, 16), (40_008, 8), (50_000, 9)],  # the last two: several rounds
)
@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (-(2**63) + 12345, 2**34 - 8)])
def test_keep_mask_is_atens(n, blocks, vec, seed, offset):
    want = aten_mask(n, 0.3, seed, offset, blocks, vec)
    assert (ours(n, 0.3, seed, offset, blocks, vec) == want).all()


@pytest.mark.parametrize("n", [1, 7, 257, 9999])
def test_keep_mask_of_odd_sizes(n):
    assert (ours(n, 0.5, 3, 8, -(-n // 256), 1) == aten_mask(n, 0.5, 3, 8, -(-n // 256), 1)).all()


@pytest.mark.parametrize("vec", [4, 8])
def test_keep_mask_of_tiles(vec, device):
    M, N, blocks = 48, 256, 1  # 12 rounds of 1024 or 6 of 2048 elements
    out = torch.empty(M, N, dtype=torch.int8, device=device)
    _keep_at_kernel((3,), out, 7, 20, blocks, _philox.bound(0.6), N=N, VEC=vec, num_warps=4)
    want = aten_mask(M * N, 0.4, 7, 20, blocks, vec).reshape(M, N)
    assert (out.cpu().numpy() == want).all()
