"""Launch configurations: a table tuned on a GPU, which ships with the package, else a formula.

    @tunable("BLOCK")
    def _config(itemsize):
        return {"BLOCK": 1024, "num_warps": 4}

`_config(2)` returns the result of the formula, with the changes that `configs/<architecture>.json`
lists for these arguments. `fastnn tune` measures and writes that table. There is no search at run
time.
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
_tried: Mapping[str, Mapping[str, dict]] | None = None  # replaces the shipped table
_heard: list[tuple[Tunable, str, dict]] | None = None


def _device() -> int:
    return -1 if knobs.runtime.interpret else driver.active.get_current_device()


def here() -> str:
    """The architecture of the current device. Its table has this name."""
    return _gpus.architecture(_device())


def lanes() -> int:
    """Threads per warp of the current device, which may have no row in the table of GPUs."""
    return 32 if knobs.runtime.interpret else driver.active.get_current_target().warp_size


@functools.cache
def shipped(name: str) -> Mapping[str, Mapping[str, dict]]:
    """{function: {arguments: changes to the formula}} of an architecture; {} if none was tuned."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text())["configs"] if path.exists() else {}


def _bucket(value: Any) -> str:
    if type(value) is int and value > 32:
        return str(next_power_of_2(value))
    if isinstance(value, tuple):
        return f"({', '.join(map(_bucket, value))})"
    return str(value)


class Tunable:
    """A configuration function; see `tunable`. Each call returns a new dict."""

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
        """The table's key for a call: its arguments, with sizes rounded up to powers of two."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return ", ".join(map(_bucket, bound.arguments.values()))

    def __call__(self, *args, **kwargs) -> dict:
        name = here()
        call = (name, args, *kwargs.items()) if kwargs else (name, args)
        known = self._known.get(call)
        if known is None or _heard is not None:
            known = self._ask(name, args, kwargs)
            if len(self._known) > 4096:  # a model whose sizes never repeat
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
        """The configurations one step away from `config`.

        A step halves or doubles one size, one option, or one size together with the warps.
        `num_stages` goes up or down by one.
        """

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
        """The entries of `config` that differ from the formula: the table stores only these."""
        return {k: v for k, v in config.items() if formula[k] != v}


def tunable(*sizes: str) -> Callable[[Callable[..., dict]], Tunable]:
    """Decorates a function of shape and dtype that returns a launch configuration.

    The configuration has constexpr sizes and compile options. `sizes` names those of its entries
    that are powers of two and may be replaced by any other power of two.
    """
    return lambda formula: Tunable(formula, sizes)


def forget_tables() -> None:
    for one in TUNABLES.values():
        one._known.clear()
    _gpus.changed()


@contextmanager
def trying(table: Mapping[str, Mapping[str, dict]]) -> Iterator[None]:
    """Use `table` instead of the shipped one: {function: {arguments: changes to the formula}}."""
    global _tried
    before, _tried = _tried, table
    forget_tables()
    try:
        yield
    finally:
        _tried = before
        forget_tables()


@contextmanager
def heard() -> Iterator[list[tuple[Tunable, str, dict]]]:
    """Collect (function, key, the formula's result) for every configuration that is asked for."""
    global _heard
    before, _heard = _heard, []
    try:
        yield _heard
    finally:
        _heard = before
