"""The command line: ``fastseq doctor``, ``fastseq verify``, ``fastseq demo``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import torch

from .. import __version__

COMMANDS = {
    "doctor": "what is installed, built and available here, and what to do about the rest",
    "verify": "every kernel against its reference on this machine, with a table of errors",
    "demo": "train two models with torch's modules and with fastseq's, and compare",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; those of the process by default.

    Returns:
        The exit status: 0 when all is well, 1 when something fails, 2 for wrong arguments, 130 when
        interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if not arguments:
        parser.print_help()
        return 2
    command: str = parser.parse_args(arguments[:1]).command
    try:
        status: int = importlib.import_module(f".{command}", __package__).run(arguments[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="fastseq",
        usage="fastseq [--help] [--version] command ...",
        description="Fused kernels for sequence models, as drop-in parts of PyTorch.",
        epilog="commands:\n"
        + "".join(f"  {name:<{width}}  {does}\n" for name, does in COMMANDS.items())
        + "\n`fastseq command --help` shows the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"fastseq {__version__} (torch {torch.__version__})"
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument("command", choices=COMMANDS, metavar="command", help=argparse.SUPPRESS)
    return parser
