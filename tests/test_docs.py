"""The documents agree with the code: examples are run, tables are generated."""

import importlib
import importlib.metadata
import re
import shlex
import subprocess
import sys
from pathlib import Path

import fastnn
from tests.versions import pinned

ROOT = Path(__file__).parents[1]


@pinned
def test_readme_and_op_pages_are_what_the_code_gives():
    command = [sys.executable, "-m", "tools.generate", "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_links_lead_somewhere():
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)
        for target in re.findall(r"\]\(([^)#:]+)\)", prose):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_documented_commands_are_ones_that_exist():
    """Their output is real, but it is not generated again here, because that takes minutes."""
    ran = []
    parser = importlib.import_module("fastnn.__main__")._parser()
    text = (ROOT / "docs" / "commands.md").read_text()
    for line in re.findall(r"^fastnn .*", re.sub(r"```text.*?```", "", text, flags=re.S), re.M):
        ran.append(parser.parse_args(shlex.split(line)[1:]).run.__module__)
    assert {"fastnn._cli.info", "fastnn._cli.parity", "fastnn._cli.bench"} < set(ran)
    assert "```text\n```" not in text, "python -m tools.generate --commands"


def test_readme_has_the_test_command_that_ci_runs():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert sum(line.startswith("pip install -c constraints.txt") for line in lines) == 2
    assert len(lines) <= 150, "what is longer belongs to docs/"


def test_the_site_leads_to_every_page():
    listed = re.findall(r"^ +- [^:]+: (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_the_worked_example_of_an_op_is_the_code():
    """CONTRIBUTING.md quotes an op; `...` stands for lines that the quotation leaves out."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    folders = ("kernels", "fastnn", "bench")
    code = [p.read_text() for f in folders for p in sorted((ROOT / f).rglob("*.py"))]
    whole = "\n".join(line.strip() for text in code for line in text.splitlines())
    quoted = re.findall(r"^ +```text\n(.*?)^ +```", page, re.M | re.S)
    assert len(quoted) >= 4
    for block in quoted:
        for line in filter(None, map(str.strip, block.splitlines())):
            assert line == "..." or line in whole, f"{line!r} is nowhere in the code"
    for place in re.findall(r"^\| `([^|]*)` \|", page, re.M):
        for path in re.findall(r"[\w/]+\.(?:py|json)", place):
            assert (ROOT / path).exists(), path


def test_the_version_stands_in_one_place():
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
    assert importlib.metadata.version("fastnn-triton") == fastnn.__version__
