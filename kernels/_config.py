"""Launch configurations: those tuned on a GPU, which ship with the package, else a formula.

    @tunable("BLOCK")
    def _config(itemsize):
        return {"BLOCK": 1024, "num_warps": 4}

`_config(2)` is the formula's answer, changed by what `configs/<architecture>.json` says for it.
`fastnn tune` measures and writes that table; nothing is searched for at run time.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from triton import knobs
from triton.runtime import driver

from fastnn.kernels import _gpus
from fastnn.kernels._sizes import next_power_of_2

FOLDER = Path(__file__).with_name("configs")
OPTIONS = ("num_warps", "num_stages")
LARGEST_WARPS = 16

TUNABLES: dict[str, Tunable] = {}
_tried: Mapping[str, Mapping[str, dict]] | None = None  # in place of the shipped table
_heard: list[tuple[Tunable, str, dict]] | None = None


def _device() -> int:
    return -1 if knobs.runtime.interpret else driver.active.get_current_device()


def here() -> str:
    """The architecture of the present device, after which its table is named."""
    return _gpus.architecture(_device())


def lanes() -> int:
    """Threads of a warp on the present device, which may have no row in the table of GPUs."""
    return 32 if knobs.runtime.interpret else driver.active.get_current_target().warp_size


@functools.cache
def shipped(name: str) -> Mapping[str, Mapping[str, dict]]:
    """{function: {arguments: what it changes}} of an architecture; empty where none was tuned."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text())["configs"] if path.exists() else {}


def _bucket(value: Any) -> str:
    if type(value) is int and value > 32:
        return str(next_power_of_2(value))
    if isinstance(value, tuple):
        return f"({', '.join(map(_bucket, value))})"
    return str(value)


class Tunable:
    """A configuration function; see `tunable`. Returns a dict of its own at each call."""

    def __init__(self, formula: Callable[..., dict], sizes: tuple[str, ...]):
        functools.update_wrapper(self, formula)
        self.formula = formula
        self.sizes = sizes
        self.name = f"{formula.__module__.rpartition('.')[2]}.{formula.__name__}"
        self._signature = inspect.signature(formula)
        self._known: dict = {}
        TUNABLES[self.name] = self

    def __repr__(self):
        return f"Tunable({self.name})"

    def key(self, *args, **kwargs) -> str:
        """What the table files a call under: its arguments, sizes rounded up to powers of two."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return ", ".join(map(_bucket, bound.arguments.values()))

    def __call__(self, *args, **kwargs) -> dict:
        name = here()
        call = (name, args, *kwargs.items()) if kwargs else (name, args)
        known = self._known.get(call)
        if known is None or _heard is not None:
            known = self._ask(name, args, kwargs)
            if len(self._known) > 4096:  # of a model whose sizes never repeat
                self._known.clear()
            self._known[call] = known
        return dict(known)

    def _ask(self, name: str, args: tuple, kwargs: dict) -> dict:
        formula = self.formula(*args, **kwargs)
        key = self.key(*args, **kwargs)
        if _heard is not None:
            _heard.append((self, key, formula))
        table = shipped(name) if _tried is None else _tried
        return {**formula, **table.get(self.name, {}).get(key, {})}

    def neighbours(self, config: dict) -> Iterator[dict]:
        """Configurations one step away: a size or option halved or doubled, or a size with the
        warps."""

        def stepped(*names: str, up: bool) -> dict | None:
            new = dict(config)
            for name in names:
                step = 1 if name == "num_stages" else new[name]
                new[name] = new[name] + step if up else new[name] - (step + 1) // 2
                most = LARGEST_WARPS if name == "num_warps" else 1 << 16
                if not 1 <= new[name] <= most or new[name] == config[name]:
                    return None
            return new

        sizes = [name for name in self.sizes if name in config]
        singles = [(name,) for name in (*sizes, *OPTIONS) if name in config]
        for names in (*singles, *((name, "num_warps") for name in sizes)):
            for up in (True, False):
                new = stepped(*names, up=up)
                if new is not None:
                    yield new

    def changes(self, config: dict, formula: dict) -> dict:
        """The entries of `config` that the table has to hold."""
        return {k: v for k, v in config.items() if formula[k] != v}


def tunable(*sizes: str) -> Callable[[Callable[..., dict]], Tunable]:
    """Decorates a function of shape and dtype that returns a launch configuration: constexpr sizes
    and compile options. `sizes` names the powers of two in it that any other may take the place of.
    """
    return lambda formula: Tunable(formula, sizes)


def _forget() -> None:
    for one in TUNABLES.values():
        one._known.clear()


@contextmanager
def trying(table: Mapping[str, Mapping[str, dict]]) -> Iterator[None]:
    """`table` in place of the shipped one, as {function: {arguments: what it changes}}."""
    global _tried
    before, _tried = _tried, table
    _forget()
    try:
        yield
    finally:
        _tried = before
        _forget()


@contextmanager
def heard() -> Iterator[list[tuple[Tunable, str, dict]]]:
    """Collects (function, key, the formula's answer) of every configuration asked for."""
    global _heard
    before, _heard = _heard, []
    try:
        yield _heard
    finally:
        _heard = before
