"""`fastgpt2 bench`, or `python -m fastgpt2.bench`: runs one of the commands in COMMANDS, or the default ones."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastgpt2.gpt2.ops import TRITON_INSTALLED

if not TRITON_INSTALLED:
    raise ImportError("fastgpt2 bench needs the package triton: pip install 'triton>=3.4' (Linux); it is not installed")

from fastgpt2.bench.audit import audit  # noqa: E402
from fastgpt2.bench.report import measured, report, roofline  # noqa: E402
from fastgpt2.bench.timing import generate, host, ops, pace, train, tune  # noqa: E402
from fastgpt2.gpt2.training.train_config import find_device  # noqa: E402

COMMANDS = (train, generate, ops, host, audit, tune, roofline, report)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command, or the default ones; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="fastgpt2 bench",
        description="Measures kernels and model. Without a command: a quick set for this machine, and a report of it.",
    )
    commands = parser.add_subparsers(metavar="COMMAND")
    for module in COMMANDS:
        module.add_command(commands)
    arguments = sys.argv[1:] if argv is None else list(argv)
    for line in [arguments] if arguments else pace.default_lines(find_device("auto")):
        options = parser.parse_args(line)
        if status := options.run(options):
            return status
    if not arguments:
        print("\n".join(measured.lines(find_device("auto"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
