"""Imports run downward: a file imports from layers with smaller numbers and from its own folder."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.nn import modules

ROOT = Path(__file__).parents[1]

# The longest prefix wins. `fastnn` by itself is the __init__ of the package.
RANKS = {
    "fastnn._checkout": 0,
    "fastnn.kernels": 0,
    "fastnn._build": 1,
    "fastnn._graph": 1,
    "fastnn._mode": 1,
    "fastnn._plan": 1,
    "fastnn._rng": 2,
    "fastnn._scalars": 1,
    "fastnn._shards": 0,
    "fastnn._strides": 1,
    "fastnn._front": 2,
    "fastnn._function": 2,
    "fastnn._gate": 2,
    "fastnn._native": 2,
    "fastnn._runner": 3,
    "fastnn._record": 4,
    "fastnn._op": 5,
    "fastnn.ops": 6,
    "fastnn.functional": 7,
    "fastnn.layers": 8,
    "fastnn._compiler": 8,
    "fastnn._namespace": 8,
    "fastnn._model": 9,
    "fastnn": 10,
    "fastnn.testing": 11,
    "fastnn.bench": 12,
    "fastnn._cli.training": 13,
    "fastnn._cli": 14,
    "fastnn.__main__": 15,
}
# Folders whose files may import each other.
FOLDERS = (
    "fastnn.kernels",
    "fastnn.ops",
    "fastnn.layers",
    "fastnn._compiler",
    "fastnn.testing",
    "fastnn.bench",
    "fastnn._cli",
)


def home(module):
    return max((p for p in RANKS if module == p or module.startswith(p + ".")), key=len)


FILES = [
    pytest.param(path, module, id=module)
    for folder, package in (("fastnn", "fastnn"), ("kernels", "fastnn.kernels"))
    for path in sorted((ROOT / folder).rglob("*.py"))
    for module in [
        ".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts)).removesuffix(
            ".__init__"
        )
    ]
]


def imports(path):
    """The names of our own modules that a file imports, at any place in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from fastnn import kernels` imports a module; `from fastnn._op import op` does not.
            deeper = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [d if d in RANKS else node.module for d in deeper]
        else:
            continue
        yield from (n for n in names if n.split(".")[0] == "fastnn")


@pytest.mark.parametrize(("path", "module"), FILES)
def test_imports_run_downward(path, module):
    mine = home(module)
    for name in imports(path):
        other = home(name)
        if name != module and not (mine == other and mine in FOLDERS):
            assert RANKS[other] < RANKS[mine], f"{module} imports {name}, which is not below it"


@pytest.mark.parametrize(("path", "module"), FILES)
def test_only_kernel_files_import_triton(path, module):
    tree = ast.parse(path.read_text())
    names = {
        alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        (node.module or "").split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    }
    if not module.startswith(("fastnn.kernels.", "fastnn.testing", "fastnn.bench", "fastnn._cli")):
        assert "triton" not in names, f"{module} imports triton"


def test_import_stays_light():
    """`import fastnn` imports neither Triton nor Dynamo nor a command-line library."""
    heavy = ["triton", "torch._dynamo", "torch._inductor", "rich", "matplotlib", "numpy.testing"]
    code = (
        "import sys, torch, torch.nn; had = set(sys.modules); import fastnn; "
        f"print(sorted(set({heavy}) & (set(sys.modules) - had)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


FAMILIES = {path.stem for path in (ROOT / "fastnn" / "ops").glob("[a-z]*.py")}
# Kernel files with parts for several families.
PARTS = {"epilogue", "gather", "pointwise"}


def test_a_family_has_one_name():
    """The name of a family is that of its file in fastnn/ops. Its kernels, rows and tests have it.

    Layers stand in files named as in torch.nn.modules, or as their family.
    """
    for path in (ROOT / "kernels").glob("[a-z]*.py"):
        family = any(path.stem == f or path.stem.startswith(f"{f}_") for f in FAMILIES)
        assert family or path.stem in PARTS, f"{path.name} is named as no family"
    rows = {path.stem for path in (ROOT / "fastnn" / "testing" / "cases").glob("[a-z]*.py")}
    assert rows == FAMILIES | {"transformer"}  # layers made of several families
    torch_files = {path.stem for path in Path(modules.__file__).parent.glob("[a-z]*.py")}
    layers = {path.stem for path in (ROOT / "fastnn" / "layers").glob("[a-z]*.py")}
    assert layers <= torch_files | FAMILIES
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert not tests & {f"{family}es" for family in FAMILIES}
    assert not tests & {f"{family}s" for family in FAMILIES}


def entry_kernels():
    """(file, its tree, function) for each kernel that is launched."""
    for path in sorted((ROOT / "kernels").glob("*.py")):
        tree = ast.parse(path.read_text())
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                by = [ast.unparse(d).split("(")[0] for d in node.decorator_list]
                if {"kernel", "attention_kernel"} & set(by):
                    yield path, tree, node


def test_kernels_say_what_a_program_does_and_what_its_pointers_are():
    """The first line of a kernel's docstring says what a program does. The docstring, or that of
    the file, explains each name in capitals."""
    found = list(entry_kernels())
    assert len(found) >= 60
    for path, tree, node in found:
        where = f"{path.name}: {node.name}"
        text = ast.get_docstring(node) or ""
        assert re.match(r"(A|The one) program .*\.$", text.split("\n")[0] or "-"), where
        words = set(re.findall(r"\w+", text + (ast.get_docstring(tree) or "")))
        names = {a.arg for a in node.args.args if a.annotation is None and a.arg.isupper()}
        assert names <= words, f"{where}: {sorted(names - words)}"
