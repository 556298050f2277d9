"""Records the bits that every parity row computes on kernels, and compares two records.

    python tools/bits.py record before.json     # on the commit before a refactor
    python tools/bits.py record after.json      # on the commit after it
    python tools/bits.py compare before.json after.json

A refactor changes no output. `compare` names each row whose outputs, gradients or written inputs
have other bits, and each row that only one record has. The exit code is 1 if there is such a row,
else 0. The rows run in Triton's interpreter, on the CPU and without a GPU. `--only TEXT` takes the
rows whose name contains TEXT.
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before fastnn is imported
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch


def _digest(tensor: torch.Tensor) -> str:
    dense = tensor.detach().contiguous().reshape(-1)
    return hashlib.sha256(dense.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def _row(case, dtype: torch.dtype) -> dict[str, str]:
    """Name of each result -> its digest; {"stock": reason} if no kernel runs."""
    import fastnn
    from fastnn import testing

    torch.manual_seed(0)
    inputs = case.make(dtype, "cpu")
    side = testing.side_of(case, fastnn, dtype, "cpu")
    options = {}
    if not case.is_layer:
        options = {k: v(dtype, "cpu") if callable(v) else v for k, v in case.options.items()}
    if case.view is not None:
        side = testing.Side(testing.viewing(case.view, side.call), side.parameters)
    given = testing.fresh_leaves((tuple(inputs), options))
    try:
        with fastnn.backend("triton"):
            ran = testing.run_side(side, given, "cpu", case.autocast)
    except fastnn.BackendError as error:
        return {"stock": str(error)}
    found = {name: _digest(t) for name, t in ran.named.items()}
    found |= {f"input {i} afterwards": _digest(t) for i, t in enumerate(testing.tensors_of(given))}
    buffers = side.call.named_buffers() if isinstance(side.call, torch.nn.Module) else ()
    return found | {f"buffer {name}": _digest(t) for name, t in buffers}


def record(path: Path, only: str) -> None:
    from fastnn.testing import interpreter
    from fastnn.testing.cases import CASES

    interpreter.install()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # `torch.empty` fills with nan
    found: dict[str, dict[str, str]] = {}
    for case in CASES:
        for dtype in case.dtypes:
            name = f"{case} {str(dtype).removeprefix('torch.')}"
            if only not in name:
                continue
            while name in found:  # two rows with one name differ in the values of their inputs
                name += " again"
            found[name] = _row(case, dtype)
    path.write_text(json.dumps(found, indent=0) + "\n")
    kernels = sum("stock" not in row for row in found.values())
    print(f"{len(found)} rows, {kernels} on kernels: {path}")


def compare(before: Path, after: Path) -> int:
    old, new = (json.loads(path.read_text()) for path in (before, after))
    wrong = 0
    for name in sorted({*old, *new}):
        if name not in old or name not in new:
            print(f"only in {before if name in old else after}: {name}")
            wrong += 1
        elif old[name] != new[name]:
            a, b = old[name], new[name]
            what = sorted(k for k in {*a, *b} if a.get(k) != b.get(k))
            print(f"differs: {name}: {', '.join(what)}")
            wrong += 1
    print(f"{len(old)} and {len(new)} rows, {wrong} differ")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("record")
    one.add_argument("file", type=Path)
    one.add_argument("--only", default="", metavar="TEXT")
    two = commands.add_parser("compare")
    two.add_argument("before", type=Path)
    two.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "record":
        record(args.file, args.only)
        return 0
    return compare(args.before, args.after)


if __name__ == "__main__":
    sys.exit(main())
