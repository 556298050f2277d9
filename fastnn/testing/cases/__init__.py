"""The parity rows: one row for each shape and option, at the edges rather than in the middle.

There is one file per family, named as in fastnn/ops, with a list `CASES`. The list `CASES` here has
all of them, except the layers, options and dtypes that the installed torch does not have.
"""

import dataclasses
import importlib
import inspect
import pkgutil

import torch

from fastnn.testing import Case


def in_torch(case: Case) -> bool:
    if torch.__version__ < case.since:
        return False
    if not case.is_layer:
        return True
    layer = getattr(torch.nn, case.name, None)
    if layer is None:
        return False
    parameters = inspect.signature(layer).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):  # as those of an LSTM
        return True
    return case.options.keys() <= parameters.keys()


def _on_device(case: Case) -> Case:
    if torch.__version__ >= "2.11" or torch.cuda.is_available() or case.name != "SmoothL1Loss":
        return case
    kept = tuple(d for d in case.dtypes if d != torch.float16)  # the stock backward lacks it
    return dataclasses.replace(case, dtypes=kept)


CASES: list[Case] = [
    _on_device(case)
    for file in pkgutil.iter_modules(__path__)
    for case in importlib.import_module(f"{__name__}.{file.name}").CASES
    if in_torch(case)
]
