"""`fastnn.<x>` is `torch.nn.<x>` for each `x` that fastnn has no file of its own for.

One module under two names, never a second copy of a torch file: a copy's classes would fail
`isinstance`, and its globals would drift from those that the rest of torch reads.
"""

import importlib
import importlib.util
import pkgutil
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch.nn

OURS, STOCK = __name__.rpartition(".")[0], torch.nn.__name__

# What has a .py file here. An editable install maps `kernels` and `bench` from beside this folder,
# so that no listing of it shows them.
OWN = {module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])}
OWN |= {"kernels", "bench"}


def public():
    """What `from torch.nn import *` gives just now: a library may add to torch.nn as it loads."""
    names = getattr(torch.nn, "__all__", None)
    return list(names) if names else [name for name in vars(torch.nn) if name[0] != "_"]


def _alias(stock):
    """'torch.nn.utils.rnn' -> 'fastnn.utils.rnn'; None for a name under neither, or one of ours."""
    head, _, rest = stock.partition(STOCK + ".")
    return None if head or not rest or rest.partition(".")[0] in OWN else f"{OURS}.{rest}"


def _mirror():
    """Give each stock submodule that is loaded its second name.

    A name found in sys.modules is all that `import` looks at. Left to the finder, the import of
    `fastnn.utils.weight_norm` would end by binding that module in its parent, torch.nn.utils, in
    place of the function of the same name which torch.nn.utils binds there.
    """
    for name, module in sys.modules.copy().items():
        alias = _alias(name)
        if alias is None or alias in sys.modules:
            continue
        # Half loaded in another thread, whose lock goes by the stock name: leave it to the finder.
        if not getattr(getattr(module, "__spec__", None), "_initializing", False):
            sys.modules.setdefault(alias, module)


class _Finder(MetaPathFinder, Loader):
    """Before the path finder, which would load a stock file again from its parent's `__path__`."""

    def find_spec(self, fullname, path=None, target=None):
        head, _, rest = fullname.partition(OURS + ".")
        stock = f"{STOCK}.{rest}"
        if head or _alias(stock) is None:
            return None
        # The import system has loaded the parent already, under both names, unless it is not ours.
        if not hasattr(sys.modules.get(stock.rpartition(".")[0]), "__path__"):
            return None
        found = sys.modules.get(stock)
        spec: ModuleSpec | None
        spec = getattr(found, "__spec__", None) if found else importlib.util.find_spec(stock)
        if found is None and spec is None:
            return None
        alias = ModuleSpec(fullname, self, origin=spec.origin if spec else None)
        alias.submodule_search_locations = spec.submodule_search_locations if spec else None
        return alias

    def create_module(self, spec):
        module = importlib.import_module(STOCK + spec.name.removeprefix(OURS))
        spec.loader_state = getattr(module, "__spec__", None)
        return module

    def exec_module(self, module):
        # The import system has just written the alias's spec over stock's, the one attribute that
        # it does not leave alone when it is there.
        module.__spec__ = module.__spec__.loader_state
        _mirror()


def install():
    if not any(type(finder).__module__ == __name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _mirror()
