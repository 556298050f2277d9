"""Writes the parts of the documents that are derived from the code: `python -m tools.generate`.

README.md       each ```python block is run, in order and in one process, and its output becomes the
                ```text block after it; the tables of families and of models stand between markers.
docs/layers.md  its tables of layers and of functions, between their markers.
docs/ops.md     the whole file, from the record of each op.
docs/compile.md  its table of models, from bench/results/counted/models.json.
docs/api.md     its table of codes of reasons, from fastnn/_mode.py.
docs/compiled.md  its table of roofs, from bench/roofs.json.
docs/benchmarks.md  its table beside Liger, from bench/results/counted/beside.json.

`--check` compares and writes nothing. Only `python -m tools.generate --commands` writes
docs/commands.md, because that takes minutes: each ```sh line is run, and its output becomes the
```text block after it.
"""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.S)
COMMAND = re.compile(r"```sh\n(fastnn [^\n]*)\n```\n\n```text\n(?:(?!```)[^\n]*\n)*```\n")


def _layers() -> tuple[list[str], list[str]]:
    """Names of the layers of `torch.nn` that have kernels, and names of all its layers."""
    import torch.nn as stock

    from fastnn.layers._layer import OURS

    names = [n for n in dir(stock) if isinstance(getattr(stock, n), type)]
    names = [n for n in names if issubclass(getattr(stock, n), stock.Module) and n != "Module"]
    return [n for n in names if getattr(stock, n) in OURS], names


def _rest() -> dict[str, list[str]]:
    """The layers of `torch.nn` that have no kernels, by the reason."""
    import torch.nn as stock

    kinds: dict[str, list[str]] = {}
    ours, everything = _layers()
    for name in sorted({*everything} - {*ours}):
        cls = getattr(stock, name)
        if "forward" not in cls.__dict__ or cls.__name__.startswith("Container"):
            kind = "containers and base classes, which compute nothing themselves"
        elif name in ("Flatten", "Identity", "Unflatten"):
            kind = "pass-through layers, which return a view of their input"
        elif name == "CrossMapLRN2d":
            kind = "the old form of `LocalResponseNorm`, in Python"
        else:
            kind = "layers that run other layers"
        kinds.setdefault(kind, []).append(name)
    return kinds


def layers_table() -> str:
    ours, everything = _layers()
    rest = "; ".join(f"{kind}: " + ", ".join(f"`{n}`" for n in v) for kind, v in _rest().items())
    return (
        f"{len(ours)} of the {len(everything)} layers of `torch.nn` have kernels: "
        + ", ".join(f"`{n}`" for n in ours)
        + f". All others are PyTorch's own classes. {rest[:1].upper() + rest[1:]}.\n"
    )


def functions_table() -> str:
    """One row per op, with the path that it takes by default."""
    from fastnn import _gate
    from fastnn.ops import REGISTRY

    rows = ["| function | in `auto`, on a GPU | dtypes |", "| --- | --- | --- |"]
    for name, record in sorted(REGISTRY.items()):
        source = _gate.crossover(name, "default", record.variants[0]).source
        when = _gate.described(name, record.variants, "default")
        dtypes = ", ".join(str(d).removeprefix("torch.") for d in record.dtypes)
        rows.append(f"| `{name}` | {when} | {dtypes} |")
    return "\n".join(rows) + f"\n\nThe sizes are an {source}; `fastnn tune` measures them.\n"


# Families that share a line of the README's table. Any other family has a line of its own.
AREAS = {
    "activations, dropout": (("activation", "dropout", "glu", "prelu", "scale", "softmax"), None),
    "attention and transformers": (
        ("attention", "multihead_attention", "residual_norm", "rotary", "split"),
        "[attention](docs/attention.md), [transformers](docs/transformer.md)",
    ),
    "images": (
        ("conv", "fold", "padding", "shuffle", "upsampling"),
        "[convolution](docs/convolution.md), [images](docs/images.md)",
    ),
    "linear, embedding, recurrent": (
        ("linear", "embedding", "embedding_bag", "bilinear", "recurrent"),
        "[embeddings](docs/embedding.md), [recurrent layers](docs/recurrent.md)",
    ),
    "losses, distances": (
        (
            "cross_entropy",
            "ctc",
            "distance",
            "linear_cross_entropy",
            "loss",
            "multilabel_margin",
            "nll_loss",
        ),
        "[losses](docs/losses.md)",
    ),
    "norms": (
        ("norm", "channel_norm", "local_response_norm", "normalize"),
        "[norms](docs/norms.md)",
    ),
    "pooling": (("pooling",), "[pooling](docs/pooling.md)"),
}


def family_table() -> str:
    """The functions by family, related families on one line."""
    from fastnn.ops import FUNCTIONS

    families: dict[str, list[str]] = {}
    for name, function in FUNCTIONS.items():
        families.setdefault(function.op.fused.__module__.rpartition(".")[2], []).append(name)
    rows = ["| | functions with kernels, by family | more |", "| --- | --- | --- |"]
    placed = [family for members, _ in AREAS.values() for family in members]
    lines = dict(AREAS)
    lines |= {family: ((family,), None) for family in families if family not in placed}
    for area, (members, page) in sorted(lines.items()):
        named = "; ".join(
            ", ".join(f"`{name}`" for name in sorted(families[member])) for member in members
        )
        rows.append(f"| {area} | {named} | {page or '[functions](docs/ops.md)'} |")
    ours, everything = _layers()
    return (
        f"{len(ours)} of the {len(everything)} layers of `torch.nn` run on these functions. "
        "[docs/layers.md](docs/layers.md) lists\n"
        "them, and the size from which each function takes its kernel.\n\n" + "\n".join(rows) + "\n"
    )


def between(text: str, mark: str, content: str, around: str = "\n") -> str:
    """`text` with `content` between its two comments named `mark`, and `around` it."""
    pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->\n)", re.S)
    assert pattern.search(text), f"no place for {mark}"
    return pattern.sub(lambda m: f"{m[1]}{around}{content}{around}{m[2]}", text)


def ops_page() -> str:
    from fastnn import _gate
    from fastnn.ops import REGISTRY

    lines = [
        "# Functions with kernels",
        "",
        "Made by `python -m tools.generate` from the record of each op. What a function declines",
        "runs stock, and `fastnn.explain` says so. Tensors that are not read by their strides are",
        "made dense first.",
    ]
    for name, record in sorted(REGISTRY.items()):
        source = _gate.crossover(name, "default", record.variants[0]).source
        when = _gate.described(name, record.variants, "default")
        under = {"fp32": "float32", "lower": "the autocast dtype", None: "the input's dtype"}
        doc = " ".join((record.fused.__doc__ or "").split())
        lines += ["", f"## {name}", "", doc, ""]
        lines += [
            f"- dtypes: {', '.join(str(d).removeprefix('torch.') for d in record.dtypes)}",
            f"- read by strides: {', '.join(f'`{n}`' for n in record.strided) or 'none'}",
            f"- result under CUDA autocast: {under[record.autocast]}; "
            f"under CPU autocast: {under[record.autocast_cpu]}",
            f"- in `auto`, on a GPU: {when} ({source})",
            f"- under `torch.compile`: {record.compiled}"
            + ("; its launches are registered ops" if record.opaque else ""),
        ]
        if record.source:
            lines.append(f"- source: {record.source}")
    return "\n".join(lines) + "\n"


def run_blocks(text: str) -> str:
    """The README's text, in which each output block is replaced by the output of its code."""
    scope: dict = {"__name__": "readme"}

    def replace(match):
        code, printed = match.group(1), io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), scope)
        shown = f"\n```text\n{printed.getvalue()}```\n" if printed.getvalue() else ""
        return f"```python\n{code}```\n{shown}"

    return BLOCK.sub(replace, text)


def commands_page() -> None:
    """Run every command of docs/commands.md and write its output into the page."""
    page = ROOT / "docs" / "commands.md"
    environment = {**os.environ, "NO_COLOR": "1"}
    for name in ("COLUMNS", "TRITON_INTERPRET"):  # a user's shell does not have them
        environment.pop(name, None)
    with tempfile.TemporaryDirectory() as folder:

        def replace(match):
            command = [sys.executable, "-m", *shlex.split(match[1])]
            done = subprocess.run(
                command, cwd=folder, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            lines = [line.rstrip() for line in done.stdout.strip("\n").splitlines()]
            lines += [f"(exit code {done.returncode})"] if done.returncode else []
            return f"```sh\n{match[1]}\n```\n\n```text\n" + "\n".join(lines) + "\n```\n"

        page.write_text(COMMAND.sub(replace, page.read_text()))


def models_table() -> str:
    """What `fastnn bench --models` counted."""
    from fastnn.bench import traffic

    counted = json.loads((ROOT / "bench/results/counted/models.json").read_text())
    return f"Device: {counted['device']}.\n\n" + traffic.markdown(counted["models"])


def rows_of_models() -> str:
    """The models with the fewest and the most bytes, and the mean: lines of the models' table."""
    from fastnn.bench import traffic

    counted = json.loads((ROOT / "bench/results/counted/models.json").read_text())
    records = sorted(counted["models"], key=lambda r: traffic.ratio(r, traffic.AUTO) or 0.0)
    *lines, mean = traffic.rows(records)
    return traffic.markdown_of([lines[0], lines[-1], mean])


def beside_table() -> str:
    """Our kernels beside those of Liger, as `python -m bench.beside --write` counted them."""
    from fastnn.bench import beside

    return beside.table(json.loads(beside.PATH.read_text())["rows"])


def compile_time_table() -> str:
    """What compiling costs, as `python -m bench.compile_time --write` measured it."""
    from fastnn.bench import compile_time

    return compile_time.table(json.loads(compile_time.PATH.read_text()))


def stock_layers_table() -> str:
    """What fastnn adds to stock layers, as `python -m bench.stock_layers --write` counted it."""
    from fastnn.bench import stock_layers

    return stock_layers.table(json.loads(stock_layers.PATH.read_text())["layers"])


def codes_table() -> str:
    from fastnn._mode import CODES

    rows = ["| code | reason for PyTorch |", "| --- | --- |"]
    return "\n".join(rows + [f"| `{code}` | {meaning} |" for code, meaning in CODES.items()]) + "\n"


def main() -> int:
    if "--commands" in sys.argv:
        commands_page()
        return 0
    from fastnn.bench import roofs

    readme, layers = ROOT / "README.md", ROOT / "docs" / "layers.md"
    models = ROOT / "docs" / "compile.md"
    front = between(run_blocks(readme.read_text()), "families", family_table())
    front = between(front, "models", rows_of_models(), "")
    tables = between(layers.read_text(), "layers", layers_table())
    tables = between(tables, "functions", functions_table())
    compiled = ROOT / "docs" / "compiled.md"
    api = ROOT / "docs" / "api.md"
    roofed = between(compiled.read_text(), "roofs", roofs.by_kernel())
    benchmarks = ROOT / "docs" / "benchmarks.md"
    besides = between(benchmarks.read_text(), "liger", beside_table())
    tools = ROOT / "docs" / "tools.md"
    paid = between(tools.read_text(), "stock layers", stock_layers_table())
    stale = []
    pages = (
        (readme, front),
        (layers, tables),
        (ROOT / "docs" / "ops.md", ops_page()),
        (
            models,
            between(
                between(models.read_text(), "models", models_table()),
                "compile time",
                compile_time_table(),
            ),
        ),
        (compiled, roofed),
        (benchmarks, besides),
        (tools, paid),
        (api, between(api.read_text(), "codes", codes_table())),
    )
    for path, content in pages:
        if not path.exists() or path.read_text() != content:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(content)
    if "--check" in sys.argv and stale:
        print(f"stale: {', '.join(stale)}; run python -m tools.generate")
        return 1
    return 0


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") != "1":  # before anything is imported
        environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "tools.generate", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=environment, cwd=ROOT).returncode)
    sys.exit(main())
