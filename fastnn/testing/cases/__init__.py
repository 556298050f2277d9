"""Every shape and option whose parity is checked, one row each, at the edges, not the middle.

A file per family, named as in fastnn/ops; each has its list `CASES`, and here is all of it, but
for layers, constructor options and mixtures of dtypes that the installed torch does not have.
"""

import importlib
import inspect
import pkgutil

import torch

from fastnn.testing import Case


def _in_torch(case: Case) -> bool:
    if tuple(map(int, torch.__version__.split(".")[:2])) < case.since:
        return False
    if not case.is_layer:
        return True
    layer = getattr(torch.nn, case.name, None)
    return layer is not None and case.options.keys() <= inspect.signature(layer).parameters.keys()


CASES: list[Case] = [
    case
    for file in pkgutil.iter_modules(__path__)
    for case in importlib.import_module(f"{__name__}.{file.name}").CASES
    if _in_torch(case)
]
