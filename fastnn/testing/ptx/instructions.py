"""What each instruction does, except the instructions of tensor cores.

A maker takes the parts of an opcode and the operands of an instruction. It returns a function that
runs the instruction on a `Machine` for the threads of a mask. It raises NotImplementedError for
everything that it does not know, and never guesses.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastnn.testing.ptx import values
from fastnn.testing.ptx.machine import WARP, Machine, Mask
from fastnn.testing.ptx.values import HALVES, TYPES, UNSIGNED, Array, width

Run = Callable[[Machine, Mask], None]
Get = Callable[[Machine], Array]
Put = Callable[[Machine, Array, Mask], None]
_SPECIAL = ("%tid", "%ctaid", "%ntid", "%nctaid", "%laneid", "%warpid")


class Names:
    """Registers by name, numbered in the order in which they appear; reads and writes operands."""

    def __init__(self, declared: dict[str, str]):
        """`declared`: the types of registers, by the first letters of their names."""
        self._declared = declared
        self.numbers: dict[str, int] = {}
        self.dtypes: list[Any] = []

    def register(self, name: str) -> int:
        number = self.numbers.get(name)
        if number is None:
            special = name.startswith(_SPECIAL)
            number = self.numbers[name] = len(self.dtypes)
            self.dtypes.append(
                TYPES["u32" if special else self._declared[name.rstrip("0123456789")]]
            )
        return number

    def get(self, operand: str, kind: str) -> Get:
        """Reads an operand as a type of PTX."""
        if kind not in TYPES:
            raise NotImplementedError(kind)
        dtype = TYPES[kind]
        if not operand.startswith("%"):
            constant = _constant(operand, dtype)
            return lambda machine: constant
        number = self.register(operand)
        held, wanted = np.dtype(self.dtypes[number]), np.dtype(dtype)
        if held == wanted:
            return lambda machine: machine.registers[number]
        if held.itemsize == wanted.itemsize:
            return lambda machine: machine.registers[number].view(dtype)
        narrow = UNSIGNED[8 * wanted.itemsize]
        return lambda machine: machine.registers[number].astype(narrow).view(dtype)

    def put(self, operand: str) -> Put:
        """Writes a value of any type with the register's width, or extends a narrower value."""
        if operand == "_":
            return _discard
        number = self.register(operand)
        held = np.dtype(self.dtypes[number])

        def put(machine: Machine, value: Array, mask: Mask) -> None:
            if value.dtype != held:
                if value.itemsize != held.itemsize:
                    value = value.astype(
                        f"{'i' if value.dtype.kind == 'i' else 'u'}{held.itemsize}"
                    )
                value = value.view(held)
            machine.put(number, value, mask)

        return put

    def address(self, operand: str, kind: str) -> Get:
        """The address [base + offset] in global memory (u64) or shared memory (u32)."""
        found = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if found is None:
            raise NotImplementedError(operand)
        offset = _constant(found[2] or "0", TYPES[kind])
        if not found[1].startswith("%"):  # `global_smem`, which begins at 0
            return lambda machine: offset
        base = self.get(found[1], kind)
        if not offset[0]:
            return base
        return lambda machine: base(machine) + offset


def _discard(machine: Machine, value: Array, mask: Mask) -> None:
    pass


def _constant(operand: str, dtype: Any) -> Array:
    wanted = np.dtype(dtype)
    if operand == "global_smem":
        return np.zeros(1, wanted)
    if found := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", operand):
        return np.array([int(found[1], 16)], np.uint32).view(wanted)
    if found := re.fullmatch(r"0[dD]([0-9A-Fa-f]{16})", operand):
        return np.array([int(found[1], 16)], np.uint64).view(wanted)
    number = int(operand.rstrip("U"), 0)
    if wanted == np.bool_:
        return np.array([bool(number)])
    bits = 8 * wanted.itemsize
    return np.array([number % (1 << bits)], UNSIGNED[bits]).view(wanted)


def told(parts: Sequence[str], operands: Sequence[str]) -> str:
    """An instruction as text, for messages."""
    return " ".join([".".join(parts), *operands])


def names_in(operand: str) -> list[str]:
    """The registers of `{%r1, %r2}`, or of `%r1`."""
    return [v.strip() for v in operand.strip("{}").split(",")]


Maker = Callable[[Names, list[str], list[str]], Run]
MAKERS: dict[str, Maker] = {}  # key: the first part of an opcode


def makes(*opcodes: str) -> Callable[[Maker], Maker]:
    def register(make: Maker) -> Maker:
        MAKERS.update(dict.fromkeys(opcodes, make))
        return make

    return register


def computes(names: Names, operands: Sequence[str], kinds: Sequence[str], f: Callable) -> Run:
    """operands[0] = f(operands[1:]); the sources are read as `kinds`."""
    put = names.put(operands[0])
    gets = [names.get(o, k) for o, k in zip(operands[1:], kinds, strict=True)]

    def run(machine: Machine, mask: Mask) -> None:
        put(machine, f(*[get(machine) for get in gets]), mask)

    return run


def _of_halves(names: Names, operands: Sequence[str], kind: str, f: Callable) -> Run:
    """`f` of 16-bit floats, one or two in each register, computed in float64 and rounded once."""
    read, rounded = HALVES[kind.removesuffix("x2")]

    def once(*given: Array) -> Array:
        return rounded(f(*[read(v).astype(np.float64) for v in given]))

    def twice(*given: Array) -> Array:
        low, high = (
            once(*[(v >> np.uint32(at)).astype(np.uint16) for v in given]) for at in (0, 16)
        )
        return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))

    if kind.endswith("x2"):
        return computes(names, operands, ["b32"] * (len(operands) - 1), twice)
    return computes(names, operands, ["b16"] * (len(operands) - 1), once)


def _is_half(kind: str) -> bool:
    return kind.removesuffix("x2") in HALVES


def _of_mixed(names: Names, operands: Sequence[str], kind: str, f: Callable) -> Run:
    """`f` of 16-bit floats, except that the last operand is a float32."""
    read, _ = HALVES[kind]

    def mixed(*given: Array) -> Array:
        return f(*[read(v).astype(np.float32) for v in given[:-1]], given[-1])

    return computes(names, operands, ["b16"] * (len(operands) - 2) + ["f32"], mixed)


def _of_pairs(names: Names, operands: Sequence[str], f: Callable) -> Run:
    """`f` of two float32 in each 64-bit register."""

    def pairs(*given: Array) -> Array:
        low, high = (
            f(*[(v >> np.uint64(at)).astype(np.uint32).view(np.float32) for v in given])
            for at in (0, 32)
        )
        wide = [np.ascontiguousarray(v).view(np.uint32).astype(np.uint64) for v in (low, high)]
        return wide[0] | (wide[1] << np.uint64(32))

    return computes(names, operands, ["b64"] * (len(operands) - 1), pairs)


def _of_floats(names: Names, parts: list[str], operands: Sequence[str], f: Callable) -> Run:
    """`f` of floats, with any number of floats in a register."""
    kind = parts[-1]
    if kind == "f32x2":
        return _of_pairs(names, operands, _finished(f, parts))
    if _is_half(kind) and "f32" in parts:
        return _of_mixed(names, operands, kind, _finished(f, parts))
    if _is_half(kind):
        return _of_halves(names, operands, kind, f)
    return computes(names, operands, [kind] * (len(operands) - 1), _finished(f, parts))


def _mode(parts: Sequence[str]) -> str:
    return next((p for p in parts if p in ("rn", "rz", "rm", "rp")), "rn")


def _finished(f: Callable, parts: Sequence[str]) -> Callable:
    """`f` with the effects of .ftz and .sat."""

    def finished(*given: Array) -> Array:
        out = values.flush(f(*map(values.flush, given))) if "ftz" in parts else f(*given)
        return values.saturate(out) if "sat" in parts else out

    return finished if "ftz" in parts or "sat" in parts else f


# ---- arithmetic ---------------------------------------------------------------------------------

_ARITHMETIC: dict[str, Callable] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


@makes("add", "sub", "mul")
def _arithmetic(names: Names, parts: list[str], operands: list[str]) -> Run:
    f: Callable = _ARITHMETIC[parts[0]]
    kind, mode = parts[-1], _mode(parts)
    known = {"rn", "rz", "rm", "rp", "ftz", "sat", "lo", "hi", "wide"}
    known |= {"f32"} if kind in HALVES else set()
    if set(parts[1:-1]) - known or ("sat" in parts and "f" not in kind):
        raise NotImplementedError(".".join(parts))
    if kind[0] in "su":
        f = _PRODUCTS[parts[1]] if parts[0] == "mul" else f
        return computes(names, operands, [kind] * 2, f)
    if mode != "rn":
        if kind not in ("f32", "f32x2"):
            raise NotImplementedError(".".join(parts))
        in_double = f

        def f(a, b):  # exact in float64, except for sums of very unequal parts
            return values.to_f32(in_double(a.astype(np.float64), b.astype(np.float64)), mode)

    return _of_floats(names, parts, operands, f)


def _wide(a: Array) -> Array:
    return a.astype(np.int64 if a.dtype.kind == "i" else np.uint64)


def _in_full(a: Array, b: Array) -> Array:
    product = _wide(a) * _wide(b)
    return product.astype(f"{a.dtype.kind}{2 * a.itemsize}")


def _upper(a: Array, b: Array) -> Array:
    """The upper half of a product of integers."""
    if a.itemsize < 8:
        product = _wide(a) * _wide(b)
        return (product >> product.dtype.type(8 * a.itemsize)).astype(a.dtype)
    products = a.astype(object) * b.astype(object)
    return (products // 2**64).astype(a.dtype)


_PRODUCTS: dict[str, Callable] = {"lo": np.multiply, "hi": _upper, "wide": _in_full}


@makes("mad")
def _mad(names: Names, parts: list[str], operands: list[str]) -> Run:
    how, kind = parts[1:]
    product = _PRODUCTS[how]
    third = f"{kind[0]}{2 * width(kind)}" if how == "wide" else kind
    return computes(names, operands, [kind, kind, third], lambda a, b, c: product(a, b) + c)


@makes("fma")
def _fma(names: Names, parts: list[str], operands: list[str]) -> Run:
    def f(a, b, c):  # exact for results of 16 bits; float64 results are rounded twice
        return a * b + c

    if "f32" in parts or parts[-1] == "f32x2":
        f = functools.partial(values.fma_f32, mode=_mode(parts))
    elif parts[-1] != "f64" and not _is_half(parts[-1]):
        raise NotImplementedError(".".join(parts))
    return _of_floats(names, parts, operands, f)


def _quotient(a: Array, b: Array) -> Array:
    b = np.where(b == 0, b.dtype.type(1), b)
    quotient = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)


def _remainder(a: Array, b: Array) -> Array:
    return a - _quotient(a, b) * b


def _rough_quotient(a: Array, b: Array) -> Array:
    return values.approximate(a.astype(np.float64) / b, 2**-23)  # 2 units in the last place


@makes("div", "rem")
def _divide(names: Names, parts: list[str], operands: list[str]) -> Run:
    kind = parts[-1]
    f: Callable = _quotient if parts[0] == "div" else _remainder
    if kind[0] == "f":
        rough = "full" in parts or "approx" in parts
        f = _rough_quotient if kind == "f32" and rough else np.divide
    return computes(names, operands, [kind] * 2, _finished(f, parts))


def _rsqrt(x: Array) -> Array:
    return 1.0 / np.sqrt(x)


# Each function with its relative error. The error is the one that the ISA allows, except for ex2.
# The ISA allows 2**-22.5 for ex2. With that error CUDA's expf, which ends in ex2, would have more
# than the one ulp that its documentation states.
_FUNCTIONS: dict[str, tuple[Callable, float]] = {
    "ex2": (np.exp2, 2**-23),
    "lg2": (np.log2, 2**-22),
    "rcp": (np.reciprocal, 2**-23),
    "sqrt": (np.sqrt, 2**-23),
    "rsqrt": (_rsqrt, 2**-22.9),
    "tanh": (np.tanh, 2**-11),
    "sin": (np.sin, 2**-20.5),
    "cos": (np.cos, 2**-20.5),
}


@makes(*_FUNCTIONS)
def _function(names: Names, parts: list[str], operands: list[str]) -> Run:
    in_double, relative = _FUNCTIONS[parts[0]]
    kind = parts[-1]
    if kind not in ("f32", "f64") or (kind == "f64" and "approx" in parts):
        raise NotImplementedError(".".join(parts))

    def f(x):
        exact = in_double(x.astype(np.float64))
        if kind == "f64":
            return exact
        return (
            values.approximate(exact, relative)
            if "approx" in parts
            else values.to_f32(exact, _mode(parts))
        )

    return computes(names, operands, [kind], _finished(f, parts))


@makes("min", "max")
def _extreme(names: Names, parts: list[str], operands: list[str]) -> Run:
    largest, kind = parts[0] == "max", parts[-1]
    if "xorsign" in parts:
        raise NotImplementedError(".".join(parts))
    if kind[0] in "su":
        return computes(names, operands, [kind] * 2, np.maximum if largest else np.minimum)
    of_nan = "NaN" in parts
    f = (np.maximum if of_nan else np.fmax) if largest else (np.minimum if of_nan else np.fmin)

    def of_two(a, b):
        # +0 counts as larger than -0.
        return np.where(a == b, np.where(np.signbit(a) == largest, b, a), f(a, b))

    return _of_floats(names, parts, operands, lambda *given: functools.reduce(of_two, given))


@makes("abs", "neg")
def _sign(names: Names, parts: list[str], operands: list[str]) -> Run:
    return _of_floats(names, parts, operands, np.abs if parts[0] == "abs" else np.negative)


@makes("copysign")
def _copysign(names: Names, parts: list[str], operands: list[str]) -> Run:
    return computes(names, operands, [parts[-1]] * 2, lambda a, b: np.copysign(b, a))


# ---- bits ---------------------------------------------------------------------------------------

_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@makes("and", "or", "xor", "not")
def _logic(names: Names, parts: list[str], operands: list[str]) -> Run:
    kind = parts[-1]
    if parts[0] == "not":
        return computes(names, operands, [kind], np.invert)
    return computes(names, operands, [kind] * 2, _LOGIC[parts[0]])


@makes("shl", "shr")
def _shift(names: Names, parts: list[str], operands: list[str]) -> Run:
    kind = parts[-1]
    bits = width(kind)
    f = np.left_shift if parts[0] == "shl" else np.right_shift

    def shift(a, by):
        out = f(a, np.minimum(by, bits - 1).astype(a.dtype))
        if kind[0] == "s":  # the last step has left its sign
            return out
        return np.where(by < bits, out, a.dtype.type(0))

    return computes(names, operands, [kind, "u32"], shift)


@makes("shf")
def _funnel(names: Names, parts: list[str], operands: list[str]) -> Run:
    left, wrap = parts[1] == "l", parts[2] == "wrap"

    def funnel(low, high, by):
        n = (by & np.uint32(31) if wrap else np.minimum(by, np.uint32(32))).astype(np.uint64)
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        return ((both << n) >> np.uint64(32) if left else both >> n).astype(np.uint32)

    return computes(names, operands, ["b32", "b32", "u32"], funnel)


@makes("bfe")
def _extract(names: Names, parts: list[str], operands: list[str]) -> Run:
    kind = parts[-1]
    bits = width(kind)

    def extract(a, position, length):
        above = bits - np.minimum(position + length, bits)
        out = np.left_shift(a, above.astype(a.dtype))
        down = np.minimum(bits - np.minimum(length, bits), bits - 1)
        out = np.right_shift(out, down.astype(a.dtype))
        return np.where(length == 0, a.dtype.type(0), out)

    return computes(names, operands, [kind, "u32", "u32"], extract)


@makes("bfi")
def _insert(names: Names, parts: list[str], operands: list[str]) -> Run:
    kind = parts[-1]

    def insert(a, b, position, length):
        one, at = a.dtype.type(1), position.astype(a.dtype)
        field = (one << length.astype(a.dtype)) - one
        return (b & ~(field << at)) | ((a & field) << at)

    return computes(names, operands, [kind, kind, "u32", "u32"], insert)


@makes("prmt")
def _permute(names: Names, parts: list[str], operands: list[str]) -> Run:
    if parts != ["prmt", "b32"]:
        raise NotImplementedError(".".join(parts))

    def permute(a, b, how):
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        out = np.zeros(1, np.uint64)
        for i in range(4):
            select = (how >> np.uint32(4 * i)).astype(np.uint64)
            byte = (both >> ((select & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = np.where(byte >> np.uint64(7), np.uint64(255), np.uint64(0))
            byte = np.where(select & np.uint64(8), sign, byte)
            out = out | (byte << np.uint64(8 * i))
        return out.astype(np.uint32)

    return computes(names, operands, ["b32"] * 3, permute)


@makes("lop3")
def _lop3(names: Names, parts: list[str], operands: list[str]) -> Run:
    table = int(operands[4], 0)

    def lookup(a, b, c):
        out = np.zeros(1, a.dtype)
        for i in range(8):
            if table >> i & 1:
                out = out | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
        return out

    return computes(names, operands[:4], ["b32"] * 3, lookup)


@makes("popc", "clz", "brev")
def _count(names: Names, parts: list[str], operands: list[str]) -> Run:
    kind = parts[-1]

    def count(a):
        place = np.arange(width(kind), dtype=a.dtype)
        bits = (a[..., None] >> place) & a.dtype.type(1)  # the lowest first
        if parts[0] == "popc":
            return bits.sum(-1, dtype=np.uint32)
        if parts[0] == "clz":
            return (np.cumsum(bits[..., ::-1], -1) == 0).sum(-1, dtype=np.uint32)
        return (bits[..., ::-1] << place).sum(-1, dtype=a.dtype)

    return computes(names, operands, [kind], count)


# ---- comparison and conversion ------------------------------------------------------------------


@makes("selp")
def _select(names: Names, parts: list[str], operands: list[str]) -> Run:
    return computes(
        names, operands, [parts[-1], parts[-1], "pred"], lambda a, b, p: np.where(p, a, b)
    )


_COMPARISONS: dict[str, Callable] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


def _comparison(how: str, of_floats: bool) -> Callable:
    if of_floats and how == "ne":
        return lambda a, b: (a < b) | (a > b)
    if of_floats and len(how) == 3 and how.endswith("u"):
        ordered = _COMPARISONS[how[:2]]
        return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)
    return _COMPARISONS[how]


@makes("setp")
def _set_predicate(names: Names, parts: list[str], operands: list[str]) -> Run:
    kind = parts[-1]
    compare = _comparison(parts[1], "f" in kind)
    puts = [names.put(p) for p in operands[0].split("|")]
    logic = next((_LOGIC[p] for p in parts[2:-1] if p in _LOGIC), None)
    if (len(puts) > 1) != kind.endswith("x2") or (logic is None) != (len(operands) == 3):
        raise NotImplementedError(".".join(parts))
    if _is_half(kind):
        read, _ = HALVES[kind.removesuffix("x2")]
        gets = [names.get(o, "b32" if kind.endswith("x2") else "b16") for o in operands[1:3]]

        def run(machine: Machine, mask: Mask) -> None:
            both = [get(machine) for get in gets]
            for i, put in enumerate(puts):
                halves = [(v >> v.dtype.type(16 * i)).astype(np.uint16) for v in both]
                put(machine, compare(*map(read, halves)), mask)

        if logic is not None:
            raise NotImplementedError(".".join(parts))
        return run
    if "ftz" in parts:
        exact = compare

        def compare(a, b):
            return exact(values.flush(a), values.flush(b))

    if logic is None:
        return computes(names, operands, [kind] * 2, compare)
    return computes(names, operands, [kind, kind, "pred"], lambda a, b, c: logic(compare(a, b), c))


@makes("mov")
def _move(names: Names, parts: list[str], operands: list[str]) -> Run:
    to, what = operands
    kind = parts[-1]
    if to.startswith("{"):
        puts = [names.put(piece) for piece in names_in(to)]
        bits = width(kind) // len(puts)
        whole = names.get(what, kind)

        def unpack(machine: Machine, mask: Mask) -> None:
            value = whole(machine)
            for i, put in enumerate(puts):
                part = value >> value.dtype.type(i * bits)
                put(machine, part.astype(UNSIGNED[bits]), mask)

        return unpack
    if what.startswith("{"):
        pieces = names_in(what)
        bits = width(kind) // len(pieces)

        def pack(*given: Array) -> Array:
            out = np.zeros(1, TYPES[kind])
            for i, v in enumerate(given):
                out = out | (v.astype(out.dtype) << out.dtype.type(i * bits))
            return out

        return computes(names, [to, *pieces], [f"b{bits}"] * len(pieces), pack)
    return computes(names, operands, [kind], lambda a: a)


_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@makes("cvt")
def _convert(names: Names, parts: list[str], operands: list[str]) -> Run:
    how, to, kind = parts[1:-2], parts[-2], parts[-1]
    if set(how) - {"rn", "rz", "rm", "rp", "ftz", "sat", *_INTEGRAL}:
        raise NotImplementedError(".".join(parts))
    if to.endswith("x2"):
        _, rounded = HALVES[to.removesuffix("x2")]
        if _mode(how) != "rn" or kind != "f32" or "sat" in how:
            raise NotImplementedError(".".join(parts))

        def pair(high, low):
            both = [rounded(v).astype(np.uint32) for v in (low, high)]
            return both[0] | (both[1] << np.uint32(16))

        return computes(names, operands, [kind] * 2, pair)
    if to not in TYPES and to not in HALVES:
        raise NotImplementedError(".".join(parts))
    f = _conversion(to, kind, how)
    return computes(names, operands, ["b16" if kind in HALVES else kind], f)


def _conversion(to: str, kind: str, how: list[str]) -> Callable:
    integral = next((_INTEGRAL[p] for p in how if p in _INTEGRAL), None)
    mode = _mode(how)
    if "f" not in kind and "f" not in to:
        if "sat" in how:
            raise NotImplementedError(f"cvt.sat.{to}.{kind}")
        return lambda a: a.astype(TYPES[to])
    if to in HALVES and mode != "rn":
        raise NotImplementedError(f"cvt.{mode}.{to}.{kind}")

    def to_integer(a: Array) -> Array:
        assert integral is not None
        limits = np.iinfo(TYPES[to])
        whole = integral(np.nan_to_num(a.astype(np.float64), posinf=np.inf, neginf=-np.inf))
        top = math.nextafter(float(limits.max) + 1, 0)
        return np.clip(whole, float(limits.min), top).astype(TYPES[to])

    def to_float(a: Array) -> Array:
        if integral is not None:
            a = integral(a)
        if to in HALVES:
            return HALVES[to][1](a)
        if to == "f32" and a.dtype == np.float64:
            out = values.to_f32(a, mode)
        elif mode == "rn" or a.itemsize < np.dtype(TYPES[to]).itemsize:
            out = a.astype(TYPES[to])
        else:
            raise NotImplementedError(f"cvt.{mode}.{to}.{kind}")
        return values.saturate(out) if "sat" in how else out

    def convert(a: Array) -> Array:
        if kind in HALVES:
            a = HALVES[kind][0](a)
        flushed = "ftz" in how
        if flushed and a.dtype == np.float32:
            a = values.flush(a)
        out = to_float(a) if "f" in to else to_integer(a)
        return values.flush(out) if flushed and out.dtype == np.float32 else out

    return convert


# ---- memory -------------------------------------------------------------------------------------


def _space(parts: Sequence[str]) -> str:
    """The memory space: global or shared. Raises NotImplementedError for a generic address."""
    spaces = [p.partition("::")[0] for p in parts]
    for space in ("global", "shared"):
        if space in spaces:
            return space
    raise NotImplementedError(".".join(parts))


_ADDRESS = {"global": "u64", "shared": "u32"}


@makes("ld")
def _load(names: Names, parts: list[str], operands: list[str]) -> Run:
    text = told(parts, operands)
    space, dtype = _space(parts), TYPES[parts[-1]]
    puts = [names.put(r) for r in names_in(operands[0])]
    at = names.address(operands[1], _ADDRESS[space])

    def run(machine: Machine, mask: Mask) -> None:
        address = at(machine)
        if space == "global" and address.size == 1 and mask is None:
            found = machine.memory.load(address, dtype, len(puts), text)
        else:
            where, (address,) = machine.chosen(mask, address)
            if space == "global":
                found = machine.memory.load(address, dtype, len(puts), text)
            else:
                block = machine.block[where]
                found = machine.shared.load(block, address, dtype, len(puts), text)
        for put, v in zip(puts, found.T, strict=True):
            if mask is None:
                put(machine, np.ascontiguousarray(v), None)
            else:
                all_lanes = np.zeros(machine.lanes, dtype)
                all_lanes[mask] = v
                put(machine, all_lanes, mask)

    return run


@makes("st")
def _store(names: Names, parts: list[str], operands: list[str]) -> Run:
    text = told(parts, operands)
    space = _space(parts)
    gets = [names.get(r, parts[-1]) for r in names_in(operands[1])]
    at = names.address(operands[0], _ADDRESS[space])

    def run(machine: Machine, mask: Mask) -> None:
        where, (address, *given) = machine.chosen(mask, at(machine), *[g(machine) for g in gets])
        if space == "global":
            machine.memory.store(address, np.stack(given, -1), text)
        else:
            machine.shared.store(machine.block[where], address, np.stack(given, -1), text)

    return run


_ATOMIC = {"max": np.maximum, "min": np.minimum, "add": np.add}


@makes("atom")
def _atomic(names: Names, parts: list[str], operands: list[str]) -> Run:
    text = told(parts, operands)
    kind = parts[-1]
    f = _ATOMIC.get(parts[-2])
    if f is None or _space(parts) != "global" or kind[0] not in "su":
        raise NotImplementedError(text)
    put, at = names.put(operands[0]), names.address(operands[1], _ADDRESS["global"])
    value = names.get(operands[2], kind)

    def run(machine: Machine, mask: Mask) -> None:
        _, (address, given) = machine.chosen(mask, at(machine), value(machine))
        address, given = np.broadcast_arrays(address, given)
        old = machine.memory.load(address, given.dtype, 1, text)[:, 0]
        now: dict[int, Any] = {}
        for i, where in enumerate(address.tolist()):  # the threads come in their order
            old[i] = now.get(where, old[i])
            now[where] = f(old[i], given[i])
        places = np.array(list(now), np.uint64)
        machine.memory.store(places, np.array(list(now.values()), given.dtype)[:, None], text)
        all_lanes = old
        if mask is not None:
            all_lanes = np.zeros(machine.lanes, old.dtype)
            all_lanes[mask] = old
        put(machine, all_lanes, mask)

    return run


def nothing(machine: Machine, mask: Mask) -> None:
    pass


@makes("bar", "barrier", "fence", "membar", "griddepcontrol")
def _wait(names: Names, parts: list[str], operands: list[str]) -> Run:
    return nothing


@makes("cp")
def _copy(names: Names, parts: list[str], operands: list[str]) -> Run:
    text = told(parts, operands)
    if parts[1:3] in (["async", "commit_group"], ["async", "wait_group"], ["async", "wait_all"]):
        return nothing
    if parts[1] != "async" or "bulk" in parts:
        raise NotImplementedError(text)
    to, source = names.address(operands[0], "u32"), names.address(operands[1], "u64")
    size = int(operands[2], 0)
    wanted = names.get(operands[3] if len(operands) > 3 else operands[2], "u32")

    def run(machine: Machine, mask: Mask) -> None:
        where, (at, address, read) = machine.chosen(
            mask, to(machine), source(machine), wanted(machine)
        )
        if ((read != 0) & (read != size)).any():
            raise NotImplementedError(f"{text}: a copy in part")
        found = np.zeros((at.size, size), np.uint8)
        found[read > 0] = machine.memory.load(address[read > 0], np.uint8, size, text)
        machine.shared.store(machine.block[where], at, found.view(np.uint32), text)

    return run


# ---- warps --------------------------------------------------------------------------------------


@makes("shfl")
def _shuffle(names: Names, parts: list[str], operands: list[str]) -> Run:
    how = parts[2]
    result, *valid = operands[0].split("|")
    put, put_valid = names.put(result), names.put(valid[0] if valid else "_")
    value, by, clamp = (names.get(o, "b32") for o in operands[1:4])

    def run(machine: Machine, mask: Mask) -> None:
        lane = machine.thread % WARP
        b, c = by(machine).astype(np.int64) & 31, clamp(machine).astype(np.int64)
        segment = (c >> 8) & 31
        low = lane & segment
        limit = low | (c & 31 & ~segment)
        if how == "idx":
            source = low | (b & ~segment)
        else:
            source = {"bfly": lane ^ b, "up": lane - b, "down": lane + b}[how]
        inside = source >= limit if how == "up" else source <= limit
        source = np.where(inside, source, lane) + (machine.thread - lane)
        put(machine, machine.spread(value(machine))[source], mask)
        put_valid(machine, inside, mask)

    return run


_REDUCTIONS: dict[str, Callable] = {"max": np.max, "min": np.min, "add": np.sum}
_REDUCTIONS_OF_NUMBERS: dict[str, Callable] = {"max": np.fmax.reduce, "min": np.fmin.reduce}


@makes("redux")
def _redux(names: Names, parts: list[str], operands: list[str]) -> Run:
    kind = parts[-1]
    # For floats, nan is ignored unless .NaN asks for it.
    of_numbers = kind == "f32" and "NaN" not in parts
    reduce = (_REDUCTIONS_OF_NUMBERS if of_numbers else _REDUCTIONS).get(parts[2])
    if reduce is None or kind[0] not in "suf" or "abs" in parts:
        raise NotImplementedError(".".join(parts))
    put = names.put(operands[0])
    value, members = names.get(operands[1], kind), names.get(operands[2], "b32")

    def run(machine: Machine, mask: Mask) -> None:
        if (members(machine) != np.uint32(0xFFFFFFFF)).any():
            raise NotImplementedError(f"{'.'.join(parts)} of some threads of a warp")
        warps = machine.spread(value(machine)).reshape(-1, WARP)
        put(machine, np.repeat(reduce(warps, axis=1).astype(warps.dtype), WARP), mask)

    return run
