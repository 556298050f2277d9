"""`import fastnn as nn` finds all that `import torch.nn as nn` finds, and finds the same thing."""

import functools
import importlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import textwrap
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn
import torch.nn.functional

import fastnn
import fastnn.functional
from fastnn import _namespace

ROOT = Path(__file__).parents[1]
STOCK = Path(torch.nn.__file__).parent
SUBMODULES = sorted(
    ".".join(path.relative_to(STOCK).with_suffix("").parts).removesuffix(".__init__")
    for path in STOCK.rglob("*.py")
    if path != STOCK / "__init__.py"
)
ALIASED = [name for name in SUBMODULES if name.partition(".")[0] not in _namespace.OWN]
PUBLIC = sorted(name for name in dir(torch.nn) if not name.startswith("_"))


def python(program, *args, **env):
    """Run a program in a new interpreter with warnings as errors; returns its output."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program), *args]
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def stands_for(ours, stock):
    """Whether `ours` is the stock object, or an accelerated object in its place."""
    if inspect.isclass(stock):
        return issubclass(ours, stock) and ours.__name__ == stock.__name__
    if stock is torch.nn.functional:
        return ours is sys.modules["fastnn.functional"]
    return ours is stock


# ---- Names


def test_enumeration_is_not_empty():
    assert len(PUBLIC) > 150 and len(SUBMODULES) > 100
    assert {"utils.rnn", "attention.bias", "modules.batchnorm", "quantized.dynamic"} < set(ALIASED)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name(name):
    assert stands_for(getattr(fastnn, name), getattr(torch.nn, name))
    assert name in dir(fastnn)


def test_accelerated_layers_are_the_ones_found():
    replaced = [name for name in PUBLIC if getattr(fastnn, name) is not getattr(torch.nn, name)]
    assert set(replaced) >= {"functional", "ReLU"}
    for name in set(replaced) - {"functional"}:
        assert getattr(fastnn, name).__module__.startswith("fastnn.layers.")


@pytest.mark.parametrize("name", sorted(vars(torch.nn.functional)))
def test_functional_name(name):
    """Private names too, since code imports `_Reduction`, `_pad`, `has_torch_function_unary`."""
    ours = getattr(fastnn.functional, name)
    stock = getattr(torch.nn.functional, name)
    if name.startswith("__"):
        return  # each module has its own
    assert name in dir(fastnn.functional)
    assert ours is stock or ours.op.stock is stock


def test_star_import():
    stock, ours = {}, {}
    exec("from torch.nn import *", stock)
    exec("from fastnn import *", ours)
    assert ours.keys() == stock.keys()
    stock.pop("__builtins__")
    assert all(stands_for(ours[name], stock[name]) for name in stock)
    assert ours["ReLU"] is fastnn.ReLU is not stock["ReLU"]


def test_a_name_added_to_torch_nn_later_is_found(monkeypatch):
    assert not hasattr(fastnn, "AddedLater")
    added = type("AddedLater", (torch.nn.Module,), {})
    monkeypatch.setattr(torch.nn, "AddedLater", added, raising=False)
    scope = {}
    exec("from fastnn import *", scope)
    assert fastnn.AddedLater is added is scope["AddedLater"]


def test_a_missing_name_is_fastnns_error():
    with pytest.raises(AttributeError, match="module 'fastnn' has no attribute 'Liner'") as raised:
        fastnn.Liner  # noqa: B018
    assert raised.value.name == "Liner" and raised.value.obj is fastnn
    with pytest.raises(ImportError, match="cannot import name 'Liner' from 'fastnn'"):
        exec("from fastnn import Liner")


# ---- Submodules


@pytest.mark.parametrize("name", ALIASED)
def test_submodule(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, about files that it will remove
        stock = importlib.import_module(f"torch.nn.{name}")
    assert importlib.import_module(f"fastnn.{name}") is stock
    assert importlib.util.find_spec(f"fastnn.{name}") is stock.__spec__
    # Import statements can give another object than sys.modules: `utils.weight_norm` is a function.
    parent, _, child = f".{name}".rpartition(".")
    for statement in ("import {0} as found", "from {1} import {2} as found"):
        theirs, ours = {}, {}
        exec(statement.format(f"torch.nn.{name}", f"torch.nn{parent}", child), theirs)
        exec(statement.format(f"fastnn.{name}", f"fastnn{parent}", child), ours)
        assert ours["found"] is theirs["found"]
    along = functools.partial(functools.reduce, getattr, name.split("."))
    assert along(fastnn) is along(torch.nn)


# Prints for each submodule everything that the import system could have changed. It runs with
# PyTorch's name and with ours, in opposite orders, so that ours is imported first and removed
# first.
DESCRIBE = """
    import importlib, importlib.util, json, sys, warnings
    package, names = sys.argv[1], sys.argv[2:]
    importlib.import_module(package)
    importlib.import_module("torch.nn")
    told = {}
    for name in names:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fresh = "torch.nn." + name not in sys.modules
            found = importlib.util.find_spec(f"{package}.{name}")
            assert found is not None, name
            assert not fresh or "torch.nn." + name not in sys.modules, f"looking loaded {name}"
            module = importlib.import_module(f"{package}.{name}")
        assert module is sys.modules["torch.nn." + name], name
        told[name] = [f"{w.category.__name__}: {w.message}" for w in caught]
    for name in names:
        module = sys.modules["torch.nn." + name]
        parent, _, child = module.__name__.rpartition(".")
        assert module.__spec__.loader is module.__loader__, name
        assert not module.__spec__._initializing, name
        told[name] += [
            module.__name__, module.__package__, module.__file__, module.__spec__.name,
            module.__spec__.origin, module.__spec__.parent, type(module.__loader__).__name__,
            list(getattr(module, "__path__", ())),
            type(getattr(sys.modules[parent], child)).__name__,
        ]
    loaded = {id(m): getattr(m, "__file__", None) for m in sys.modules.values()}
    stock = [f for f in loaded.values() if f and "/torch/nn/" in f]
    assert len(stock) == len(set(stock)), "a torch file was loaded twice"
    print(json.dumps(told, sort_keys=True))
"""


def test_imports_by_either_name_leave_stock_the_same():
    stock = json.loads(python(DESCRIBE, "torch.nn", *ALIASED))
    assert any(told[-1] == "function" for told in stock.values())  # as utils.weight_norm
    assert json.loads(python(DESCRIBE, "fastnn", *ALIASED)) == stock
    assert json.loads(python(DESCRIBE, "fastnn", *reversed(ALIASED))) == stock


@pytest.mark.parametrize("parent", ["", *(n for n in ALIASED if (STOCK / n).is_dir())])
def test_a_missing_submodule_is_reported_under_our_name(parent):
    name = ".".join(filter(None, ("fastnn", parent, "no_such_file")))
    assert importlib.util.find_spec(name) is None
    with pytest.raises(ModuleNotFoundError, match=name.replace(".", r"\.")) as raised:
        importlib.import_module(name)
    assert raised.value.name == name


def test_own_files_stay_ours():
    assert {"functional", "kernels", "bench", "layers", "ops", "testing", "_op"} <= _namespace.OWN
    homes = (ROOT / "fastnn", ROOT / "kernels", ROOT / "bench")
    for name in _namespace.OWN - {"__main__"}:
        module = importlib.import_module(f"fastnn.{name}")
        assert getattr(fastnn, name) is module
        assert any(home in Path(module.__file__).parents for home in homes)
        assert module.__spec__.name == module.__name__ == f"fastnn.{name}"


def test_functional_is_the_only_name_taken_from_stock():
    """A file with the name of a torch.nn file would hide that one. A new torch may cause it too."""
    assert {name for name in SUBMODULES if name in _namespace.OWN} == {"functional"}


def test_threads_and_reloads():
    python(
        """
        import importlib, sys, threading, warnings
        import fastnn, torch.nn
        warnings.simplefilter("ignore")  # of PyTorch, about files that it will remove

        names = sys.argv[1:]
        start = threading.Barrier(8)
        seen, errors = [], []

        def work(package):
            start.wait()
            try:
                seen.append([importlib.import_module(f"{package}.{n}") for n in names])
                exec("\\n".join(f"import {package}.{n}" for n in names))
            except BaseException as e:
                errors.append(e)

        threads = [threading.Thread(target=work, args=(p,)) for p in ["fastnn", "torch.nn"] * 4]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert not errors, errors
        for module, *others in zip(*seen):
            assert all(other is module for other in others)
            assert module.__spec__.name == module.__name__ and module.__name__[:9] == "torch.nn."

        def sound():
            finders = [f for f in sys.meta_path if type(f).__module__ == "fastnn._namespace"]
            assert len(finders) == 1
            assert fastnn.functional is sys.modules["fastnn.functional"]
            assert fastnn.functional.__name__ == "fastnn.functional"
            assert callable(torch.nn.utils.weight_norm)
            assert fastnn.ReLU is not torch.nn.ReLU

        sound()
        importlib.reload(fastnn)
        sound()
        for name, module in sys.modules.copy().items():
            # All but the files of ours, whose operators torch registers once in a process.
            again = name in ("fastnn", "fastnn._namespace") or module.__name__ != name
            if name.partition(".")[0] == "fastnn" and again:
                del sys.modules[name]
        import fastnn
        import fastnn.utils.weight_norm
        sound()
        """,
        *ALIASED,
    )


def test_a_package_keeps_a_function_named_as_its_file(monkeypatch, tmp_path):
    """`torch.nn.utils.weight_norm` is one. This test makes one in a package that `import torch`
    does not load."""
    (tmp_path / "late").mkdir()
    (tmp_path / "late/__init__.py").write_text("from .tool import tool\n")
    (tmp_path / "late/tool.py").write_text("def tool(): pass\n")
    monkeypatch.setattr(torch.nn, "__path__", [*torch.nn.__path__, str(tmp_path)])
    try:
        importlib.import_module("fastnn.late.tool")
        late = sys.modules["fastnn.late"]
        assert late is torch.nn.late is fastnn.late and late.__name__ == "torch.nn.late"
        assert isinstance(late.tool, types.FunctionType)
        assert sys.modules["fastnn.late.tool"] is sys.modules["torch.nn.late.tool"]
    finally:
        for name in [name for name in sys.modules if ".late" in name]:
            del sys.modules[name]
        for package in (torch.nn, fastnn):
            vars(package).pop("late", None)


def test_a_half_loaded_module_is_not_mirrored(monkeypatch):
    """Its import may still fail. Code that imports it by our name must wait for the thread that
    loads it."""
    half = types.ModuleType("torch.nn.half_loaded")
    half.__spec__ = importlib.util.spec_from_loader(half.__name__, None)
    half.__spec__._initializing = True
    monkeypatch.setitem(sys.modules, half.__name__, half)
    _namespace.install()
    assert "fastnn.half_loaded" not in sys.modules
    half.__spec__._initializing = False
    monkeypatch.setitem(sys.modules, "fastnn.half_loaded", None)  # absent again after the test
    del sys.modules["fastnn.half_loaded"]
    _namespace.install()
    assert sys.modules["fastnn.half_loaded"] is half


# ---- What importing costs


def test_import_adds_little_to_that_of_torch():
    """Neither Triton nor a package of torch that `import torch` does not load, such as Dynamo."""
    added = python(
        """
        import sys, torch
        before = set(sys.modules)
        import fastnn
        print(*(name for name in sys.modules if name not in before))
        """
    ).split()
    assert "fastnn.layers" in added
    known = {"fastnn", "torch", *sys.stdlib_module_names}
    assert [name for name in added if name.partition(".")[0] not in known] == []
    torch_files = [name for name in added if name.startswith("torch.")]
    assert len(torch_files) <= 2, torch_files


def test_without_triton():
    python(
        """
        import sys
        sys.modules["triton"] = None  # its import raises ImportError
        import torch, fastnn, fastnn.functional as F

        def train(nn):
            torch.manual_seed(0)
            model = nn.Sequential(
                nn.Linear(4, 8), nn.ReLU(), nn.LayerNorm(8), nn.Dropout(0.5), nn.Linear(8, 3)
            )
            loss = nn.CrossEntropyLoss()(model(torch.randn(5, 4)), torch.arange(5) % 3)
            loss.backward()
            return [loss, *(p.grad for p in model.parameters())]

        for ours, stock in zip(train(fastnn), train(torch.nn), strict=True):
            assert torch.equal(ours, stock)
        x = torch.randn(4, 8)
        assert torch.equal(F.relu(x), torch.relu(x))
        model = fastnn.revert(fastnn.convert(torch.nn.Sequential(torch.nn.ReLU())))
        assert type(model[0]) is torch.nn.ReLU and str(fastnn.explain(model, x))
        try:
            with fastnn.backend("triton"):
                fastnn.ReLU()(x)
        except fastnn.BackendError as e:
            assert "relu" in str(e) and "riton" in str(e), e
        else:
            raise AssertionError("nothing could have run a kernel")
        """
    )
