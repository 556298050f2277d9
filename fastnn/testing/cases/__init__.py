"""Every shape and option whose parity is checked, one row each, at the edges, not the middle.

A file per family, named as in fastnn/ops; each has its list `CASES`, and here is all of it, but
for layers, options and dtypes that the installed torch does not have.
"""

import dataclasses
import importlib
import inspect
import pkgutil

import torch

from fastnn.testing import Case


def _in_torch(case: Case) -> bool:
    if torch.__version__ < case.since:
        return False
    if not case.is_layer:
        return True
    layer = getattr(torch.nn, case.name, None)
    return layer is not None and case.options.keys() <= inspect.signature(layer).parameters.keys()


def _on_device(case: Case) -> Case:
    if torch.__version__ >= "2.11" or torch.cuda.is_available() or case.name != "SmoothL1Loss":
        return case
    kept = tuple(d for d in case.dtypes if d != torch.float16)  # stock's backward has none
    return dataclasses.replace(case, dtypes=kept)


CASES: list[Case] = [
    _on_device(case)
    for file in pkgutil.iter_modules(__path__)
    for case in importlib.import_module(f"{__name__}.{file.name}").CASES
    if _in_torch(case)
]
