"""`fastnn.<x>` is `torch.nn.<x>` for each `x` for which fastnn has no file.

It is one module under two names, never a second copy of a PyTorch file. The classes of a copy would
fail `isinstance`, and its globals would drift from those that the rest of PyTorch reads.
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

# The modules that have a file here. In an editable install, `kernels` and `bench` are beside this
# folder, so a listing of the folder does not show them.
OWN = {module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])}
OWN |= {"kernels", "bench"}


def public():
    """The names that `from torch.nn import *` gives now: a library may add names to torch.nn."""
    names = getattr(torch.nn, "__all__", None)
    return list(names) if names else [name for name in vars(torch.nn) if name[0] != "_"]


def _alias(stock):
    """'torch.nn.utils.rnn' -> 'fastnn.utils.rnn'; None for other names, or if we have the file."""
    head, _, rest = stock.partition(STOCK + ".")
    return None if head or not rest or rest.partition(".")[0] in OWN else f"{OURS}.{rest}"


def _mirror():
    """Register each loaded submodule of torch.nn under its second name.

    `import` takes a name that it finds in sys.modules, and looks no further. Without this entry,
    the finder would import `fastnn.utils.weight_norm`. That import would end by binding the module
    in its parent, torch.nn.utils, and so would replace the function of the same name there.
    """
    for name, module in sys.modules.copy().items():
        alias = _alias(name)
        if alias is None or alias in sys.modules:
            continue
        # Another thread is loading this module, and holds the lock of its stock name. Leave the
        # module to the finder.
        if not getattr(getattr(module, "__spec__", None), "_initializing", False):
            sys.modules.setdefault(alias, module)


class _Finder(MetaPathFinder, Loader):
    """Runs before the path finder, which would load the file again by the parent's `__path__`."""

    def find_spec(self, fullname, path=None, target=None):
        head, _, rest = fullname.partition(OURS + ".")
        stock = f"{STOCK}.{rest}"
        if head or _alias(stock) is None:
            return None
        # The import system has already loaded the parent under both names, unless the parent is not
        # from torch.nn.
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
        # The import system has just replaced the module's `__spec__` by the spec of the alias. It
        # leaves all other attributes that exist alone.
        module.__spec__ = module.__spec__.loader_state
        _mirror()


def install():
    if not any(type(finder).__module__ == __name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _mirror()
