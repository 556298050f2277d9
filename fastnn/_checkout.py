"""Refuses to import kernels that belong to another checkout than the package.

In a wheel, the folders `kernels` and `bench` are inside the package. In a checkout they are beside
the package, and an editable install finds them by an absolute path. If Python runs in a second
checkout, it finds `fastnn` there and the kernels in the first checkout. Tests would then check
kernels that nobody has changed.
"""

import importlib.util
import os.path

_PACKAGE = os.path.dirname(os.path.abspath(__file__))
_TREE = os.path.dirname(_PACKAGE)


def _refuse(found: str) -> ImportError:
    return ImportError(
        f"fastnn is imported from {_PACKAGE}, but {found}. The two must come from one checkout or "
        "from one wheel: otherwise this code would run, and its tests would judge, kernels that do "
        "not belong to it. Use one virtual environment for each checkout: activate it and run "
        f"`pip install -e .` in {_TREE}",
        name="fastnn",
        path=_PACKAGE,
    )


for _name in ("kernels", "bench"):
    _spec = importlib.util.find_spec(f"fastnn.{_name}")
    if _spec is None or _spec.origin is None:
        raise _refuse(f"no module fastnn.{_name} is installed")
    _folder = os.path.dirname(_spec.origin)
    _wanted = os.path.join(_PACKAGE, _name), os.path.join(_TREE, _name)
    # The second comparison follows links. It costs two system calls, and is rarely needed.
    if _folder not in _wanted and not any(
        os.path.exists(folder) and os.path.samefile(folder, _folder) for folder in _wanted
    ):
        raise _refuse(f"fastnn.{_name} is found in {_folder}")
