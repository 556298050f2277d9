"""Writes the stubs in which type checkers find the submodules of torch.nn under fastnn's name.

    python -m tools.stubs

At run time `fastnn.utils.rnn` is PyTorch's module and has no file here, but checkers need a file.
Each stub re-exports all names of PyTorch's file, also private ones, because people import
`_BatchNorm`.
"""

import ast
from pathlib import Path

import torch.nn

from fastnn import _namespace

ROOT = Path(__file__).parents[1] / "typings" / "fastnn"
HEADER = "# Written by `python -m tools.stubs`.\n"


def stock_files():
    """Every public submodule: its dotted path below torch.nn, and the file that checkers read."""
    base = Path(torch.nn.__file__).parent
    for path in sorted(base.rglob("*.py")):
        relative = path.relative_to(base)
        module = relative.with_suffix("").parts
        if module[-1] == "__init__":
            module = module[:-1]
        if not module or module[0] in _namespace.OWN or any(m.startswith("_") for m in module):
            continue
        yield module, path.with_suffix(".pyi") if path.with_suffix(".pyi").exists() else path


def _statements(body):
    """Module-level statements, those under `if` and `try` included."""
    for statement in body:
        yield statement
        for block in ("body", "orelse", "finalbody"):
            if isinstance(statement, ast.If | ast.Try):
                yield from _statements(getattr(statement, block, ()))
        for handler in getattr(statement, "handlers", ()):
            yield from _statements(handler.body)


def _from_nn(statement):
    """Whether an import takes names from torch.nn or its successor torch.ao.nn."""
    source = statement.module or ""
    return statement.level > 0 or source.startswith(("torch.nn.", "torch.ao.nn."))


def stub(module, path):
    """The text of one stub."""
    tree, listed, defined = ast.parse(path.read_text()), None, set()
    for statement in _statements(tree.body):
        targets = []
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(statement.name)
        elif isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        elif isinstance(statement, ast.ImportFrom) and _from_nn(statement):
            names = {alias.asname or alias.name for alias in statement.names}
            defined.update(name for name in names if name[0] == "_")
        elif isinstance(statement, ast.Delete):
            defined -= {target.id for target in statement.targets if isinstance(target, ast.Name)}
        for target in targets:
            names = [node.id for node in ast.walk(target) if isinstance(node, ast.Name)]
            if names == ["__all__"]:
                listed = {ast.literal_eval(name) for name in statement.value.elts}
            elif not isinstance(target, ast.Attribute | ast.Subscript):
                defined.update(names)
    exported = {name for name in defined if name[0] != "_"} if listed is None else listed
    rest = (n for n in defined - exported - {"*", "_"} if not n.startswith("__"))
    stock = ".".join(("torch.nn", *module))
    lines = [_reexport(stock, name) for name in sorted(rest, key=_rank)]
    long = any(len(part) > 100 for line in lines for part in line.splitlines())
    unlint = f"# ruff: noqa: F403{', E501' * long}  (whatever stock exports, by whatever name)\n"
    return HEADER + "\n".join([unlint, f"from {stock} import *", *lines, ""])


def _rank(name):
    """The linter's order of imported names: constants, classes, then the rest."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2
    return kind, name.lower()


def _reexport(stock, name):
    line = f"from {stock} import {name} as {name}"
    return line if len(line) <= 100 else f"from {stock} import (\n    {name} as {name},\n)"


def stubs():
    """Path below typings/fastnn/ -> text, for the torch that is installed."""
    files = list(stock_files())
    packages = {module[:-1] for module, _ in files} | {m for m, p in files if p.stem == "__init__"}
    return {
        Path(*m, "__init__.pyi") if m in packages else Path(*m).with_suffix(".pyi"): stub(m, path)
        for m, path in files
    }


def written():
    """Path below typings/fastnn/ -> text, for the stubs that exist."""
    found = {path.relative_to(ROOT): path.read_text() for path in ROOT.rglob("*.pyi")}
    return {path: text for path, text in found.items() if text.startswith(HEADER)}


def main():
    for path in written():
        (ROOT / path).unlink()
    for path, text in stubs().items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text)


if __name__ == "__main__":
    main()
