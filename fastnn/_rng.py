"""Random numbers from PyTorch's generators, reserved exactly as ATen's own kernels reserve them.

So `torch.manual_seed`, `fork_rng` and `torch.utils.checkpoint` work as usual, and on CUDA a seed
gives the same mask as in PyTorch. `kernels/_philox.py` describes the layout of the bits. This file
has the launch geometry that determines the layout, the reservation, and the check that the
installed PyTorch agrees. If a step fails, the function returns the reason as a string.
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastnn import kernels
from fastnn._plan import active

if TYPE_CHECKING:
    from fastnn.kernels._philox import Draw  # type: ignore[import-not-found]

_THREADS = 256  # threads per block in all random kernels of ATen
# every thread draws several times, and some threads draw once less than others
_ROUNDS_OF_PROBE = 2.5


class LaunchGeometry(NamedTuple):
    """How ATen would launch a random kernel for a number of elements."""

    blocks: int
    vec: int
    increment: int  # of the generator's offset


def launch_geometry(
    n: int, most_blocks: int, vec: int = 1, pointer: int = 0, itemsize: int = 1
) -> LaunchGeometry:
    """The launch for n > 0 elements, with accesses at most `vec` wide.

    The width is halved until it divides n and the pointer is aligned to it. For `bernoulli_` it is
    1.
    """
    blocks = min(-(-n // _THREADS), most_blocks)
    while vec > 1 and (n % vec or pointer % (vec * itemsize)):
        vec //= 2
    return LaunchGeometry(blocks, vec, ((n - 1) // (4 * _THREADS * blocks) + 1) * 4)


@functools.cache
def most_blocks(device: int) -> int:
    """The largest grid that ATen gives a random kernel. The interpreter (-1) acts as an H100."""
    if device < 0:
        played = kernels._gpus.GPUS["sm_90"]
        return played.sms * (played.warps_per_sm * played.lanes // _THREADS)
    p = torch.cuda.get_device_properties(device)
    return p.multi_processor_count * (p.max_threads_per_multi_processor // _THREADS)


# ---- Reserving --------------------------------------------------------------------------------

_lock = threading.Lock()


def _signed(value: int) -> int:
    value &= 2**64 - 1
    return value - (value >> 63 << 64)


def reserve_numbers(generator, increment: int):
    """(seed, offset, SEED, OFFSET) of a `Draw`; advances the generator. None if that is impossible.

    The two tensors are None if no graph is being captured.
    """
    reserve = getattr(generator, "philox_state", None)
    if reserve is None:
        if not torch.cuda.is_current_stream_capturing():
            with _lock:  # reading and advancing are two calls
                offset = generator.get_offset()
                generator.set_offset(offset + increment)
            return _signed(generator.initial_seed()), offset, None, None
        prims = torch.ops.inductor_prims
        if not hasattr(prims, "inductor_reserve_rng_state"):
            return None
        reserve = functools.partial(prims.inductor_reserve_rng_state, generator)
    seed, offset, within = reserve(increment)
    # The tensors are filled anew for each replay. This call's numbers begin `within` after their
    # offset.
    if seed.is_cuda:
        return 0, int(within), seed, offset
    return int(seed), int(offset) + int(within), None, None


@functools.cache
def _no_state(device: int) -> tuple[Tensor, Tensor]:
    """Where no graph is captured: zeros for kernels to read, and a place they may write to, of
    which these zeros are the end (`Draw.new_state`)."""
    where = f"cuda:{device}" if device >= 0 else "cpu"
    scratch = torch.zeros(6, dtype=torch.int64, device=where)
    return scratch[4:], scratch


def plain_draw(device: int, seed: int, offset: int, launch: LaunchGeometry) -> Draw:
    zeros, scratch = _no_state(device)
    if active.recorder is not None:
        active.recorder.log.lasting(zeros, scratch)
    Draw = kernels._philox.Draw
    return Draw(seed, offset, zeros, zeros, launch.blocks, launch.vec, scratch)


def draw_for(device: int, launch: LaunchGeometry) -> Draw | str:
    recorder = active.recorder
    if recorder is None:
        return _drawn(device, launch)
    if recorder.asks:
        seed, offset = recorder.numbers()
        return plain_draw(device, seed, offset, launch)
    with recorder.log.pause():
        draw = _drawn(device, launch)
    recorder.log.drew(device, launch, draw)
    return draw


def numbers(device: int, launch: LaunchGeometry) -> tuple[int, int]:
    """The seed and offset of the next draw. Only while no graph is captured."""
    if device < 0:
        return _seed_of_cpu(), 0
    reserved = reserve_numbers(torch.cuda.default_generators[device], launch.increment)
    assert reserved is not None
    return reserved[:2]


class _Seed(threading.local):
    """A tensor of one number, into which each thread draws."""

    def __init__(self):
        with torch.inference_mode(False):
            self.tensor = torch.empty((), dtype=torch.int64, device="cpu")


_seed = _Seed()


def _seed_of_cpu() -> int:
    return int(_seed.tensor.random_(-(2**63), 2**63 - 1))


def _drawn(device: int, launch: LaunchGeometry) -> Draw | str:
    if device < 0:
        return plain_draw(device, _seed_of_cpu(), 0, launch)
    reserved = reserve_numbers(torch.cuda.default_generators[device], launch.increment)
    if reserved is None:
        return "this torch cannot reserve random numbers under graph capture"
    seed, offset, SEED, OFFSET = reserved
    if SEED is None:
        return plain_draw(device, seed, offset, launch)
    return kernels._philox.Draw(seed, offset, SEED, OFFSET, launch.blocks, launch.vec)


def draw_native(x: Tensor) -> Draw | str:
    """What `torch.native_dropout(x)` draws, in storage order. x: dense, not empty.

    If `vec` is 1, the order is the logical order. A caller whose x is not contiguous checks for
    that case before (`width`).
    """
    device = x.get_device()
    widest = width_limit(device, x.element_size())
    if isinstance(widest, str):
        return widest
    return draw_for(device, _native_geometry(x, widest))


def draw_native_of_new(n: int, itemsize: int, device: int) -> Draw | str:
    """What `native_dropout` draws for n > 0 elements of a dense tensor yet to be allocated.

    Allocators align to more than the widest access, so that no address need be known.
    """
    widest = width_limit(device, itemsize)
    if isinstance(widest, str):
        return widest
    return draw_for(device, launch_geometry(n, most_blocks(device), widest, 0, itemsize))


def draw_bernoulli(n: int, device: int) -> Draw | str:
    """What `bernoulli_` draws for n > 0 elements, in storage order."""
    agrees = probe_bernoulli(device)
    if isinstance(agrees, str):
        return agrees
    return draw_for(device, launch_geometry(n, most_blocks(device)))


def exponential(like: Tensor) -> Tensor:
    """Exponential noise of the shape and dtype of `like`, contiguous, drawn by PyTorch itself."""
    return torch.empty_like(like, memory_format=torch.contiguous_format).exponential_()


def draw_own(increment: int, device: int) -> Draw | str:
    """The next `increment` numbers of each thread, for a kernel that lays them out itself.

    `increment` is a multiple of 4. The draw has `vec` 0, because it follows no layout of ATen.
    """
    return draw_for(device, LaunchGeometry(1, 0, increment))


def draw_nothing(n: int, device: int) -> Draw:
    """For p = 1, where PyTorch does not advance the generator. With bound 0, for any n."""
    return plain_draw(device, 0, 0, launch_geometry(n, most_blocks(device))._replace(vec=4))


def width(x: Tensor) -> int:
    """How wide `native_dropout` accesses the dense tensor x. 1 means the logical order."""
    widest = width_limit(x.get_device(), x.element_size())
    return 1 if isinstance(widest, str) else _native_geometry(x, widest).vec


def _native_geometry(x: Tensor, widest: int) -> LaunchGeometry:
    blocks = most_blocks(x.get_device())
    return launch_geometry(x.numel(), blocks, widest, x.data_ptr(), x.element_size())


# ---- Does the installed PyTorch work as we expect? ---------------------------------------------
#
# The probe runs once per device and width, against PyTorch's own function. It puts the generator
# back, so that the user's random numbers do not change.


def width_limit(device: int, itemsize: int) -> int | str:
    """The widest access of PyTorch's `native_dropout`, or why its bits cannot be matched."""
    return 16 // itemsize if device < 0 else _once(("native", device, itemsize), _probe_native)


def probe_bernoulli(device: int) -> int | str:
    return 1 if device < 0 else _once(("bernoulli", device, 4), _probe_plain)


probe_results: dict[tuple, int | str] = {}


def _once(key: tuple, probe) -> int | str:
    known = probe_results.get(key)
    if known is None:
        if torch.cuda.is_current_stream_capturing():
            return "first use under graph capture; call it once before"
        known = probe_results[key] = probe(*key[1:])
    return known


def probe_home(device: int):
    """The device on which the probe runs, and the generator whose state it must put back."""
    return f"cuda:{device}", torch.cuda.default_generators[device]


def _probe_native(device: int, itemsize: int) -> int | str:
    dtype = torch.float32 if itemsize == 4 else torch.float16
    for vec in (16 // itemsize, 4):  # 16-bit accesses became 8 wide in a later release
        n = int(_ROUNDS_OF_PROBE * most_blocks(device) * _THREADS) * vec
        x = torch.ones(n, dtype=dtype, device=probe_home(device)[0])
        if _agrees(device, x, vec, lambda x: torch.native_dropout(x, 0.5, True)[1]):
            return vec
    return f"this torch lays out its dropout mask in another way ({dtype})"


def _probe_plain(device: int, itemsize: int) -> int | str:
    n = int(_ROUNDS_OF_PROBE * most_blocks(device) * _THREADS) * 4 + 1
    x = torch.ones(n, device=probe_home(device)[0])
    if _agrees(device, x, 1, lambda x: torch.empty_like(x).bernoulli_(0.5)):
        return 1
    return "this torch lays out the numbers of bernoulli_ in another way"


def _agrees(device: int, x: Tensor, vec: int, native) -> bool:
    _, generator = probe_home(device)
    launch = launch_geometry(x.numel(), most_blocks(device), vec, x.data_ptr(), x.element_size())
    with torch.no_grad(), _lock:
        before = generator.get_offset()
        mask = native(x)
        advanced = generator.get_offset() - before
        generator.set_offset(before)
        seed = _signed(generator.initial_seed())
        draw = plain_draw(x.get_device(), seed, before, launch)
        y = kernels.dropout.elements(x, draw, kernels._philox.bound(0.5), 1.0)
        return advanced == launch.increment and torch.equal(y.bool(), mask.bool())
