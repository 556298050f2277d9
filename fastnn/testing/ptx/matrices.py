"""Tensor cores: products of matrices that lie in the registers of a warp, or in shared memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastnn.testing.ptx.instructions import Get, Names, Run, makes, names_in, nothing, told
from fastnn.testing.ptx.machine import WARP, Machine, Mask
from fastnn.testing.ptx.values import HALVES, Array, from_tf32


def _warps(machine: Machine, registers: Sequence[Array]) -> Array:
    """The registers as one array (register, warp, lane)."""
    return np.stack([machine.spread(v) for v in registers]).reshape(len(registers), -1, WARP)


def _whole_warps(mask: Mask, what: str) -> Any:
    """An index of the warps of a mask. Raises NotImplementedError if the mask splits a warp."""
    if mask is None:
        return slice(None)
    warps = mask.reshape(-1, WARP)
    if (warps != warps[:, :1]).any():
        raise NotImplementedError(f"{what}: of some threads of a warp")
    return warps[:, 0]


def _decoded(raw: Array, kind: str) -> Array:
    """The elements of a matrix, decoded from their bits."""
    return from_tf32(raw) if kind == "tf32" else HALVES[kind][0](raw)


def _elements(words: Array, kind: str) -> Array:
    """Registers as elements of a matrix, (..., elements in a register), the lowest first."""
    words = np.ascontiguousarray(words)[..., None]
    return _decoded(words if kind == "tf32" else words.view(np.uint16), kind)


def _product(a: Array, b: Array, c: Array) -> Array:
    return (a.astype(np.float64) @ b.astype(np.float64) + c).astype(np.float32)


class _Fragment(NamedTuple):
    """Rows and columns of the matrix elements that a warp's registers hold. Both have the axes
    (register, lane, element in a register)."""

    rows: Array
    columns: Array

    def gather(self, elements: Array, shape: tuple[int, int]) -> Array:
        """(register, warp, lane, element) -> (warp, *shape)."""
        out = np.empty((elements.shape[1], *shape), elements.dtype)
        out[:, self.rows, self.columns] = elements.transpose(1, 0, 2, 3)
        return out


def _fragment(registers: int, elements: int, place: Callable) -> _Fragment:
    i, lane, j = np.ogrid[:registers, :WARP, :elements]
    shape = np.zeros((registers, WARP, elements), int)
    rows, columns = place(i, lane, j)
    return _Fragment(rows + shape, columns + shape)


# PTX ISA 8.7, "Matrix fragments for mma.m16n8k16" and "mma.m16n8k8".
_A16 = _fragment(4, 2, lambda i, t, j: (t // 4 + 8 * (i & 1), t % 4 * 2 + j + 8 * (i >> 1)))
_B16 = _fragment(2, 2, lambda i, t, j: (t % 4 * 2 + j + 8 * i, t // 4))
_A32 = _fragment(4, 1, lambda i, t, j: (t // 4 + 8 * (i & 1), t % 4 + 4 * (i >> 1)))
_B32 = _fragment(2, 1, lambda i, t, j: (t % 4 + 4 * i, t // 4))
_C32 = _fragment(4, 1, lambda i, t, j: (t // 4 + 8 * (i >> 1), t % 4 * 2 + (i & 1)))


@makes("mma")
def _mma(names: Names, parts: list[str], operands: list[str]) -> Run:
    kind = parts[7]
    places = {
        ("m16n8k16", "f16"): (_A16, _B16),
        ("m16n8k16", "bf16"): (_A16, _B16),
        ("m16n8k8", "tf32"): (_A32, _B32),
    }.get((parts[3], kind))
    if places is None or parts[4:] != ["row", "col", "f32", kind, kind, "f32"]:
        raise NotImplementedError(".".join(parts))
    k = int(parts[3].rpartition("k")[2])
    puts = [names.put(r) for r in names_in(operands[0])]
    a, b, c = ([names.get(r, "b32") for r in names_in(o)] for o in operands[1:])

    def run(machine: Machine, mask: Mask) -> None:
        left, right, before = (_warps(machine, [g(machine) for g in gets]) for gets in (a, b, c))
        out = _product(
            places[0].gather(_elements(left, kind), (16, k)),
            places[1].gather(_elements(right, kind), (k, 8)),
            _C32.gather(before.view(np.float32)[..., None], (16, 8)),
        )
        found = out[:, _C32.rows[..., 0], _C32.columns[..., 0]]  # (warp, register, lane)
        for i, put in enumerate(puts):
            put(machine, found[:, i].reshape(-1), mask)

    return run


# ---- 8x8 matrices of 16 bits, between shared memory and registers --------------------------------


def _places(parts: list[str]) -> Callable[[Machine, Array, int], tuple[Array, Array, Any]]:
    """For matrix i of a warp: block and address of each element of a thread, and the type to move.

    Lanes 8i to 8i+7 give the addresses of the rows of the matrix. Lane t holds element 2(t%4) and
    the next element of row t/4, or of column t/4 if the matrix is transposed.
    """
    if parts[-1] != "b16" or "m8n8" not in parts:
        raise NotImplementedError(".".join(parts))
    lane = np.arange(WARP)

    def places(machine: Machine, address: Array, i: int) -> tuple[Array, Array, Any]:
        rows = machine.spread(address).reshape(-1, WARP)
        block = machine.block.reshape(-1, WARP)[..., None]
        if "trans" in parts:
            pair = 2 * (lane[:, None] % 4) + np.arange(2)
            at = rows[:, 8 * i + pair] + 2 * (lane[:, None] // 4)
            return np.broadcast_to(block, at.shape), at, np.uint16
        at = rows[:, 8 * i + lane // 4] + 4 * (lane % 4)
        return block, at[..., None], np.uint32

    return places


@makes("ldmatrix")
def _load_matrix(names: Names, parts: list[str], operands: list[str]) -> Run:
    text = told(parts, operands)
    puts = [names.put(r) for r in names_in(operands[0])]
    address, places = names.address(operands[1], "u32"), _places(parts)

    def run(machine: Machine, mask: Mask) -> None:
        warps = _whole_warps(mask, text)
        for i, put in enumerate(puts):
            block, at, dtype = places(machine, address(machine), i)
            found = machine.shared.load(block[warps], at[warps], dtype, 1, text)[..., 0]
            words = np.zeros((len(at), WARP), np.uint32)
            words[warps] = np.ascontiguousarray(found).view(np.uint32)[..., 0]
            put(machine, words.reshape(-1), mask)

    return run


@makes("stmatrix")
def _store_matrix(names: Names, parts: list[str], operands: list[str]) -> Run:
    text = told(parts, operands)
    gets = [names.get(r, "b32") for r in names_in(operands[1])]
    address, places = names.address(operands[0], "u32"), _places(parts)

    def run(machine: Machine, mask: Mask) -> None:
        warps = _whole_warps(mask, text)
        for i, get in enumerate(gets):
            block, at, dtype = places(machine, address(machine), i)
            words = np.ascontiguousarray(machine.spread(get(machine)))
            elements = words[:, None].view(dtype).reshape(at.shape)[..., None]
            machine.shared.store(block[warps], at[warps], elements[warps], text)

    return run


# ---- Hopper: products by groups of four warps, of operands in shared memory ----------------------

_GROUP = 4 * WARP
_SWIZZLED_ROW = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes, by a descriptor's mode; 0 has no swizzle


def operand_addresses(descriptors: Array, rows: int, k: int, size: int, *, k_first: bool) -> Array:
    """(group, row, k): addresses of an operand's elements, of `size` bytes, by its descriptors.

    The elements are adjacent along k (`k_first`), or along the rows (for B: along the columns).
    In that direction a tile has as many bytes as the swizzle is wide. In the other direction it has
    eight elements. A descriptor says how far apart the tiles are. See PTX ISA 8.7, "Asynchronous
    warpgroup level matrix", "matrix descriptor" and "canonical layouts".
    """
    d = descriptors.astype(np.int64)[:, None, None]
    start, leading, stride = ((d >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    modes = np.unique(descriptors >> np.uint64(62)).tolist()
    if (d >> 49 & 7).any() or len(modes) > 1:
        raise NotImplementedError("wgmma: descriptors with a base offset, or of several modes")
    wide = _SWIZZLED_ROW[modes[0]]
    row, column = np.arange(rows)[None, :, None], np.arange(k)[None, None, :]
    along, across = (column * size, row) if k_first else (row * size, column)
    if modes[0] == 0 and not k_first:
        leading, stride = stride, leading
    at = start + along % wide + along // wide * leading + across % 8 * wide + across // 8 * stride
    return at ^ (at >> 7 & wide // 16 - 1) << 4


@makes("wgmma")
def _wgmma(names: Names, parts: list[str], operands: list[str]) -> Run:
    if parts[1] in ("fence", "commit_group", "wait_group"):
        return nothing
    text = told(parts, operands[1:])
    found = re.fullmatch(r"m64n(\d+)k(\d+)", parts[4])
    kind = parts[6]
    if found is None or parts[5:] != ["f32", kind, kind] or kind not in ("f16", "bf16", "tf32"):
        raise NotImplementedError(text)
    if operands[4:6] != ["1", "1"]:  # the factors of the operands
        raise NotImplementedError(text)
    n, k = int(found[1]), int(found[2])
    size = 4 if kind == "tf32" else 2
    puts = [names.put(r) for r in names_in(operands[0])]
    old = [names.get(r, "f32") for r in names_in(operands[0])]
    keep = names.get(operands[3], "pred")
    in_registers = operands[1].startswith("{")
    a = [names.get(r, "b32" if in_registers else "b64") for r in names_in(operands[1])]
    b = names.get(operands[2], "b64")
    transposed = [o == "1" for o in operands[6:]] or [False, False]
    # Row and column of the element that thread t of the group has in register i.
    i, t = np.ogrid[: len(puts), :_GROUP]
    rows = t // WARP * 16 + t % WARP // 4 + 8 * (i // 2 % 2)
    columns = 8 * (i // 4) + t % 4 * 2 + i % 2

    def run(machine: Machine, mask: Mask) -> None:
        groups = machine.lanes // _GROUP
        chosen: Any = slice(None)
        if mask is not None:
            chosen = mask.reshape(groups, _GROUP).all(1)
            if mask.sum() != chosen.sum() * _GROUP:
                raise NotImplementedError(f"{text}: by a part of a group of warps")

        def by_group(value: Array) -> Array:
            return machine.spread(value).reshape(groups, _GROUP)[chosen]

        def in_shared(get: Get, rows: int, k_first: bool) -> Array:
            descriptors = by_group(get(machine))
            if (descriptors != descriptors[:, :1]).any():
                raise IndexError(f"{text}: threads disagree about an operand")
            at = operand_addresses(descriptors[:, 0], rows, k, size, k_first=k_first)
            block = by_group(machine.block)[:, :1, None]
            dtype = np.uint32 if size == 4 else np.uint16
            return _decoded(machine.shared.load(block, at, dtype, 1, text)[..., 0], kind)

        if in_registers:
            place = _A32 if kind == "tf32" else _A16
            words = _warps(machine, [get(machine) for get in a])
            left = place.gather(_elements(words, kind), (16, k)).reshape(groups, 64, k)[chosen]
        else:
            left = in_shared(a[0], 64, not transposed[0])
        right = in_shared(b, n, not transposed[-1]).transpose(0, 2, 1)
        before = np.stack([by_group(get(machine)) for get in old], 1)  # (group, register, thread)
        total = np.empty((len(before), 64, n), np.float32)
        total[:, rows, columns] = np.where(by_group(keep(machine))[:, None], before, 0)
        total = _product(left, right, total)
        out = np.zeros((groups, len(puts), _GROUP), np.float32)
        out[chosen] = total[:, rows, columns]
        for i, put in enumerate(puts):
            put(machine, out[:, i].reshape(-1), mask)

    return run
