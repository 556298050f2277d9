"""The command line: its output, its exit codes, and no traceback for a user's mistake."""

import importlib
import importlib.metadata
import itertools
import pkgutil
import subprocess
import sys

import pytest

import fastnn
from fastnn import _cli, _mode
from fastnn.__main__ import COMMANDS, main
from fastnn._cli.parity import Outcome, _summary
from fastnn.bench import roofs
from fastnn.ops import REGISTRY
from fastnn.testing import simulated
from tests.marks import interpreted


def test_version_of_module_and_script():
    done = subprocess.run(
        [sys.executable, "-m", "fastnn", "--version"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, f"fastnn {fastnn.__version__}\n")
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="fastnn")
    assert script.load() is main


def test_every_command_file_is_registered():
    names = {f"fastnn._cli.{file.name}" for file in pkgutil.iter_modules(_cli.__path__)}
    commands = {name for name in names if hasattr(importlib.import_module(name), "EXAMPLES")}
    assert commands == {module for module, _ in COMMANDS.values()}


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_examples(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert f"examples:\n  fastnn {name}" in printed


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["demo", "--steps", "1"], ["demo", "--seed=x"]])
def test_a_mistake_ends_with_two(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert "usage: fastnn" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_missing_package_is_one_sentence(package, monkeypatch, capsys, tmp_path):
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # `import` then raises ImportError
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    expected = f"fastnn: this command needs {package}: pip install 'fastnn-triton[cli]'\n"
    assert capsys.readouterr().err == expected
    assert not (tmp_path / "out").exists()


def test_unwritable_folder_is_one_sentence(tmp_path, capsys):
    (tmp_path / "taken").write_text("a file")
    assert main(["demo", "--out", str(tmp_path / "taken")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("fastnn: ") and "taken" in printed and printed.count("\n") == 1


def test_interrupt_is_one_sentence(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(_cli, "console", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "fastnn: interrupted\n"


def test_library_and_help_need_no_cli_package():
    code = (
        "import sys; sys.modules.update(rich=None, matplotlib=None)\n"
        "from fastnn.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as ended: sys.exit(ended.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_parity_line_does_not_depend_on_which_row_ended_first():
    rows = [
        Outcome(
            "ReLU", f"ReLU({n})", "float32", "kernel", None, error, error, 1.0, [1.0, 1.0], 2, 1,
            0.0, [], bytes=n, least_bytes=64, stock_bytes=80,
        )
        for n, error in ((64, 0.5), (72, 0.25), (68, 0.75))
    ]  # fmt: skip
    lines = [_summary(list(order)) for order in itertools.permutations(rows)]
    assert all(line == lines[0] for line in lines)
    assert lines[0][0]["error"] == 0.75 and lines[0][0]["bytes"] == 72 / 64


@pytest.mark.parametrize("width", [80, 160, 176])
@interpreted
def test_parity_fits_the_terminal(monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    name = "MultiLabelSoftMarginLoss"
    assert main(["parity", "--only", name, "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert name in printed and "bfloat16" in printed and "\u2026" not in printed
    assert ("│        24 │" in printed) == (width >= 160)  # its gradients
    assert ("roof" in printed) == (width >= 176)


def test_parity_warns_of_the_roof_of_a_layer(monkeypatch):
    rows = {"Pad2d(8x8) bfloat16": [["a"], ["b"]], "Other(8x8) bfloat16": [["c"]]}
    launches = {
        name: {"issue": issue, "us": us, "spilled": 0}
        for name, issue, us in (("a", 1.25, 5.0), ("b", 9.0, 1.0), ("c", 7.0, 5.0))
    }
    monkeypatch.setattr(roofs, "shipped", lambda: {"rows": rows, "launches": launches})
    outcome = (
        "pad_2d",
        "pad_2d(8)",
        "float32",
        "kernel",
        None,
        0.0,
        0.0,
        1.0,
        [1.0],
        1,
        0,
        0.0,
        [],
    )
    assert _summary([Outcome(*outcome)])[0]["roof"] == "issue 1.2"  # "b" takes too little time
    assert _summary([Outcome("ReLU", *outcome[1:])])[0]["roof"] == ""


@pytest.mark.slow
def test_parity_of_code_compiled_for_a_gpu():
    """Runs in a process that may compile. `_start_over` makes one even under TRITON_INTERPRET=1."""
    command = [sys.executable, "-m", "fastnn", "parity", "--only", "Softshrink", "--emulate"]
    done = subprocess.run([*command, "sm_90"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compiled for sm_90, emulated on the CPU" in done.stdout and "0 failed" in done.stdout
    done = subprocess.run([*command, "gfx942"], capture_output=True, text=True)
    assert done.returncode == 2 and "accepted are sm_80" in done.stderr


def test_info_names_versions_and_every_op(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert all(version in printed for version in _cli.versions().values())
    first_words = {line.strip("│ ").split(" ")[0] for line in printed.splitlines()}
    assert REGISTRY and REGISTRY.keys() <= first_words


def test_without_a_command_the_help_is_shown(capsys):
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert all(f"    {name} " in printed for name in COMMANDS)


def test_info_of_some_ops(capsys):
    assert main(["info", "--only", "GELU", "--only", "softmax"]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [line.split()[1] for line in table] == ["gelu", "log_softmax", "softmax"]


@pytest.mark.parametrize("columns", [None, "80", "200"])
def test_info_fits_the_terminal_and_the_file(monkeypatch, capsys, columns):
    """A narrow terminal has fewer columns; a file has the whole table, whatever wrote it."""
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line.startswith("│")]
    assert max(map(len, printed.splitlines())) <= int(columns or _cli.WIDE)
    assert ("what is fused" in printed.split("\n┡")[0]) == (columns != "80")
    assert ("a wider terminal also shows: dtypes, what is fused" in printed) == (columns == "80")
    assert len(table) == len(REGISTRY) or columns != "80", "a line for each op"


@pytest.mark.parametrize(
    "argv", [["info"], ["parity"], ["bench"], ["bench", "--models"]], ids=lambda argv: argv[-1]
)
@interpreted
def test_only_without_a_match_says_so(argv, capsys):
    assert main([*argv, "--only", "nonsense", "--only", "more"]) == 2
    told = capsys.readouterr().err
    assert "has 'nonsense' or 'more' in its name" in told and told.count("\n") == 1


@interpreted
def test_models_that_cannot_be_imported_are_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert main(["bench", "--models", "--only", "timm"]) == 2
    told = capsys.readouterr().err
    assert "no model was counted: timm cannot be imported" in told and told.count("\n") == 1


def test_info_tells_why_no_kernel_can_run(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with fastnn.backend("torch"):
        assert main(["info"]) == 0
    assert "FASTNN_BACKEND=torch" in capsys.readouterr().out
    monkeypatch.setattr(_mode, "INTERPRET", True)
    assert _cli.why_no_kernels() is None
    monkeypatch.setattr(_mode, "HAS_TRITON", False)
    assert "triton is not installed" in _cli.why_no_kernels()


def test_info_reports_the_gate_of_the_gpu(monkeypatch):
    info = importlib.import_module("fastnn._cli.info")
    op = REGISTRY["gelu"]
    monkeypatch.setattr(_mode, "INTERPRET", False)
    for least, expected in ((4096, "kernel from 4,096 elements (here)"), (None, "stock (here)")):
        with simulated("sm_90", least={"gelu": least}, source="here"):
            assert info.path(op, None) == expected
    two = {("embedding", ""): 8, ("embedding", "few indices"): 9}
    with simulated("sm_90", least=two, source="here"):
        assert info.path(REGISTRY["embedding"], None) == (
            "kernel from 8 elements; few indices: kernel from 9 elements (here)"
        )
    assert info.path(op, "PyTorch finds no GPU") == "stock"
