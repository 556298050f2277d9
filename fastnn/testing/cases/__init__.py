"""Every shape and option whose parity is checked, one row each, at the edges, not the middle.

A file per family, named as in fastnn/ops; each has its list `CASES`, and here is all of it.
"""

import importlib
import pkgutil

from fastnn.testing import Case

CASES: list[Case] = [
    case
    for file in pkgutil.iter_modules(__path__)
    for case in importlib.import_module(f"{__name__}.{file.name}").CASES
]
