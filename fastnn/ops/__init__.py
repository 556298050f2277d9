"""Imports every op file in this folder. `REGISTRY` maps the name of a function to its `Op`."""

import importlib
import pkgutil

from fastnn._op import Op

_files = [importlib.import_module(f"{__name__}.{f.name}") for f in pkgutil.iter_modules(__path__)]

FUNCTIONS = {
    name: value
    for file in _files
    for name, value in vars(file).items()
    if isinstance(getattr(value, "op", None), Op)
}
REGISTRY: dict[str, Op] = {name: function.op for name, function in FUNCTIONS.items()}
