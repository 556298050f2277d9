"""The command line: `fastnn`, or `python -m fastnn`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import fastnn
from fastnn._cli import CliError

# A subcommand is one line here and one file with: EXAMPLES, a string; arguments(parser); and
# run(args), which returns the exit code and raises CliError for what the user has to mend.
COMMANDS = {
    "demo": ("fastnn._cli.demo", "train a small GPT with torch.nn and with fastnn, and compare"),
    "parity": ("fastnn._cli.parity", "every function with kernels against stock and float64, here"),
    "bench": ("fastnn._cli.bench", "layers of real models timed; without a GPU, predicted"),
    "tune": ("fastnn._cli.tune", "launch configurations, and from which size kernels win, here"),
    "info": ("fastnn._cli.info", "versions, devices, and which ops can run on kernels here"),
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
    """Run one command. 0: done and passed; 1: a check failed; 2: it could not be run."""
    args = _parser().parse_args(argv)
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
