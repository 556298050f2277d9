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
    "fastnn._batches": 1,
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


def test_a_class_name_has_one_meaning():
    """An autograd function may have the name of its layer."""
    homes: dict[str, set[str]] = {}
    for folder in ("fastnn", "kernels", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            at = str(path.relative_to(ROOT))
            if at.startswith(("fastnn/ops", "fastnn/layers")):
                at = "an op or its layer"
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    homes.setdefault(node.name, set()).add(at)
    assert {name for name, at in homes.items() if len(at) > 1} == set()


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


# Functions that make 0 of a subnormal number on an NVIDIA GPU; and a function and the start of the
# name of a file that may call it -> why.
LOSSY = re.compile(r"(.+\.)?libdevice\.(?!exp$)\w+|tl\.(math\.)?(exp2|rsqrt|sqrt)")
MAY_LOSE = {("tl.exp2", "attention"): "a weight below 1e-38 is nothing beside one of at least 1"}


def test_kernels_call_no_function_that_loses_subnormal_numbers():
    """Of libdevice a kernel calls `exp`. All else stands in kernels/_libdevice.py, with what keeps
    subnormal numbers."""
    for path in sorted((ROOT / "kernels").glob("*.py")):
        if path.stem in ("_libdevice", "_interpreter", "_interpreter_steps"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names if alias.asname]
                of = getattr(node, "module", None) or ""
                assert not of.endswith("libdevice") or of == "fastnn.kernels._libdevice", where
                assert not any(name.endswith("libdevice") for name in names), where
            elif isinstance(node, ast.Attribute):
                name = ast.unparse(node)
                may = any(name == n and path.stem.startswith(stem) for n, stem in MAY_LOSE)
                assert may or not LOSSY.fullmatch(name), f"{where}: {name} loses subnormal numbers"


# ---- Private names ------------------------------------------------------------------------------
#
# A name with a leading underscore belongs to its file. A module with one (fastnn._op) is internal
# to the project, and the names in it that have none are for all files of the project.

# (file that reaches, file that has the name) -> why it may. "*" stands for any file.
MAY_REACH = {
    # Their fronts are generated to run in its namespace, and a Sequential is as short: a call of
    # a function instead of a variable costs each call of an op tens of nanoseconds.
    ("fastnn._front", "fastnn._mode"): {"_mode"},
    ("fastnn.layers.container", "fastnn._mode"): {"_plain"},
    # The formula of a file for its launches: tuned tables know it as file._config.
    ("*", "fastnn.kernels.*"): {"_config"},
    # The same tests, with the other runner.
    ("tests.test_native", "tests.test_plans"): {"_replayed", "_warm"},
}


def our_modules():
    """Name of a module -> its file, for all that the project consists of."""
    found = {}
    for folder in ("fastnn", "kernels", "bench", "tests", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [*path.relative_to(ROOT).with_suffix("").parts]
            package = ["fastnn"] if folder in ("kernels", "bench") else []
            found[".".join(package + parts).removesuffix(".__init__")] = path
    return found


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def of_one_subject(reaching, reached):
    """Whether both are files of one family of kernels, or a file and the tests named after it."""
    last = reached.rsplit(".", 1)[-1]
    if reaching.startswith("fastnn.kernels.") and reached.startswith("fastnn.kernels."):
        mine = reaching.rsplit(".", 1)[-1]
        families = [f for f in FAMILIES if mine == f or mine.startswith(f"{f}_")]
        return any(last == f or last.startswith(f"{f}_") for f in families)
    subject = reaching.rsplit(".", 1)[-1].removeprefix("test_")
    within = [part.lstrip("_") for part in reached.split(".")]
    return ".test_" in reaching and subject in within


def crossings():
    """(module, line, module that has the name, private name), for each that a file reaches for."""
    found = our_modules()
    trees = {name: ast.parse(path.read_text()) for name, path in found.items()}
    own = {
        name: {
            *(n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))),
            *(n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not is_load(n)),
        }
        for name, tree in trees.items()
    }
    for name, tree in trees.items():
        known = {}  # local name -> module
        reached = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    first = alias.name.split(".")[0]
                    known[alias.asname or first] = alias.name if alias.asname else first
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if f"{node.module}.{alias.name}" in found:
                        known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                    reached.append((node.lineno, node.module, alias.name))

        def module(node, known=known):
            if isinstance(node, ast.Name):
                return known.get(node.id)
            base = module(node.value) if isinstance(node, ast.Attribute) else None
            return base and f"{base}.{node.attr}"

        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                reached.append((node.lineno, module(node.value), node.attr))
            # as in monkeypatch.setattr(_op, "_name", ...) and getattr(_op, "_name")
            elif isinstance(node, ast.Call) and len(node.args) > 1:
                word = node.args[1]
                if isinstance(word, ast.Constant) and isinstance(word.value, str):
                    reached.append((node.lineno, module(node.args[0]), word.value))
        for line, other, what in reached:
            if other in found and other != name and is_private(what) and what in own[other]:
                yield name, line, other, what


def is_load(node):
    return isinstance(node.ctx, ast.Load)


def test_private_names_stay_in_their_file():
    """Names of GPU kernels (_gemm_kernel) begin with an underscore as everywhere in Triton, and are
    not private."""
    excused, wrong = set(), []
    for name, line, other, what in crossings():
        family = f"{other.rsplit('.', 1)[0]}.*"
        keys = [
            k for k in ((name, other), ("*", other), ("*", family)) if what in MAY_REACH.get(k, ())
        ]
        excused |= {(key, what) for key in keys}
        if not (keys or what.endswith("_kernel") or of_one_subject(name, other)):
            wrong.append(f"{name}:{line} reaches for {other}.{what}")
    assert not wrong, "\n".join(wrong)
    idle = [(k, w) for k, names in MAY_REACH.items() for w in names if (k, w) not in excused]
    assert not idle, f"no file needs {idle}"
