"""The command line: `fastnn`, or `python -m fastnn`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import fastnn
from fastnn._cli import CliError

# To add a subcommand, add one line here and one file. The file has EXAMPLES, a string;
# arguments(parser); and run(args). run returns the exit code, and raises CliError for an error that
# the user can correct.
COMMANDS = {
    "demo": ("fastnn._cli.demo", "train a small GPT with torch.nn and with fastnn, and compare"),
    "parity": ("fastnn._cli.parity", "compare every function with kernels with stock and float64"),
    "bench": ("fastnn._cli.bench", "time layers of real models; without a GPU, predict speedups"),
    "tune": (
        "fastnn._cli.tune",
        "measure launch configurations, and from which size kernels win",
    ),
    "native": ("fastnn._cli.native", "build the C++ runner, by which a repeated call costs less"),
    "info": ("fastnn._cli.info", "print versions, devices, and which ops can run on kernels here"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastnn",
        description="torch.nn with fused Triton kernels: the tools around `import fastnn as nn`.",
        epilog="`fastnn <command> --help` shows a command's options and examples.",
    )
    parser.add_argument("--version", action="version", version=f"fastnn {fastnn.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="<command>", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = importlib.import_module(module)
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog="examples:\n" + command.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 if it passed, 1 if a check failed, 2 if it could not run."""
    parser, words = _parser(), sys.argv[1:] if argv is None else argv
    if not words:
        parser.exit(2, parser.format_help())
    args = parser.parse_args(words)
    try:
        return args.run(args)
    except (CliError, fastnn.BackendError, OSError) as error:
        print(f"fastnn: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastnn: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
