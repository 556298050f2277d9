"""Parts of a long sweep, so that one can stop it, go on with it, or run its parts side by side."""

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def part(items: Iterable[T], arguments: list[str]) -> list[T]:
    """Those items that belong to part K of N, if `arguments` has `--part K/N`, which is removed;
    else all of them. Part K has every Nth item, so that each part takes about as long."""
    items = list(items)
    if "--part" not in arguments:
        return items
    at = arguments.index("--part")
    k, n = (int(number) for number in arguments[at + 1].split("/"))
    if not 1 <= k <= n:
        raise ValueError(f"--part {k}/{n}: K must be one of 1 to {n}")
    del arguments[at : at + 2]
    return items[k - 1 :: n]
