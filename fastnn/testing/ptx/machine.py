"""What runs: a register file, shared memory, and the way to the tensors of a launch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from fastnn.testing.ptx.values import Array

WARP = 32
Mask = Array | None  # the threads for which an instruction runs; None means all


class Memory:
    """Global memory: only the bytes of the tensors of a launch, at their addresses."""

    def __init__(self, spans: Iterable[tuple[int, int]]):
        """`spans`: the first address and the number of bytes of each storage."""
        found = sorted({(start, size) for start, size in spans if size})
        self._starts = np.array([start for start, _ in found], np.uint64)
        self._ends = np.array([start + size for start, size in found], np.uint64)
        self._bytes = [
            np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start))
            for start, size in found
        ]

    def _by_span(self, at: Array, size: int, what: str) -> Iterator[tuple[Any, Array, Array]]:
        """Yields, for each storage, the addresses in it, its bytes, offsets of accessed bytes."""
        if not at.size:
            return
        if (at % np.uint64(size)).any():
            raise IndexError(f"{what}: an address that {size} does not divide")
        span = np.searchsorted(self._starts, at, "right") - 1
        outside = (span < 0) | (at + np.uint64(size) > self._ends[span])
        if outside.any():
            raise IndexError(f"{what}: {int(outside.sum())} threads out of bounds")
        for s in np.unique(span):
            here: Any = slice(None) if (span == s).all() else span == s
            first = (at[here] - self._starts[s]).astype(np.int64)
            yield here, self._bytes[s], first[:, None] + np.arange(size)

    def load(self, at: Array, dtype: Any, count: int, what: str) -> Array:
        """(threads, count) elements of `dtype`, `count` of them from each address on."""
        out = np.empty((at.size, np.dtype(dtype).itemsize * count), np.uint8)
        for here, data, offsets in self._by_span(at, out.shape[1], what):
            out[here] = data[offsets]
        return out.view(dtype)

    def store(self, at: Array, values: Array, what: str) -> None:
        """Writes (threads, count) values, `count` of them from each address on."""
        raw = np.ascontiguousarray(values).view(np.uint8)
        for here, data, offsets in self._by_span(at, raw.shape[1], what):
            data[offsets] = raw[here]


class Shared:
    """The shared memory of blocks that run side by side. It is full of nan at the start."""

    def __init__(self, blocks: int, size: int):
        self._limit = size
        self._stride = -(-max(size, 16) // 1024) * 1024  # a swizzle covers 1024 bytes
        self._data = np.full(blocks * self._stride, 0xFF, np.uint8)

    def _first(self, block: Array, at: Array, size: int, what: str) -> Array:
        at = at.astype(np.int64)
        if (at % size).any():
            raise IndexError(f"{what}: a shared address that {size} does not divide")
        if ((at < 0) | (at + size > self._limit)).any():
            raise IndexError(f"{what}: outside the {self._limit} bytes of shared memory")
        return (block * self._stride + at) // size

    def load(self, block: Array, at: Array, dtype: Any, count: int, what: str) -> Array:
        """(..., count) elements of `dtype`, from each address of a block on."""
        first = self._first(block, at, np.dtype(dtype).itemsize * count, what)
        return self._data.view(dtype)[first[..., None] * count + np.arange(count)]

    def store(self, block: Array, at: Array, values: Array, what: str) -> None:
        count = values.shape[-1]
        first = self._first(block, at, values.itemsize * count, what)
        self._data.view(values.dtype)[first[..., None] * count + np.arange(count)] = values


class Machine:
    """The blocks that run side by side.

    `registers[i]` has one element per thread, or a single element if all threads agree. Arrays are
    replaced and never written into.
    """

    def __init__(self, memory: Memory, shared: int, blocks: int, threads: int, dtypes: Sequence):
        self.memory = memory
        self.lanes = blocks * threads
        self.shared = Shared(blocks, shared)
        self.block = np.repeat(np.arange(blocks), threads)  # of each thread
        self.thread = np.arange(self.lanes)
        self.registers: list[Array] = [
            np.zeros(1, dtype) if dtype is np.bool_ else np.full(1, np.iinfo(dtype).max, dtype)
            for dtype in dtypes
        ]
        self.arguments: list[Array] = []

    def put(self, register: int, value: Array, mask: Mask) -> None:
        if mask is not None:
            value = np.where(mask, value, self.registers[register])
        self.registers[register] = value

    def spread(self, value: Array) -> Array:
        """The value with one element per thread."""
        return value if value.size == self.lanes else np.broadcast_to(value, (self.lanes,))

    def chosen(self, mask: Mask, *values: Array) -> tuple[Any, list[Array]]:
        """(an index that selects the threads of `mask`, the values at these threads)."""
        if mask is None:
            return slice(None), [self.spread(v) for v in values]
        return mask, [self.spread(v)[mask] for v in values]
