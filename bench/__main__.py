"""`fastgpt2 bench`, or `python -m fastgpt2.bench`: runs one of the commands in COMMANDS, or the default ones."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from fastgpt2.gpt2.ops import TRITON_INSTALLED

if not TRITON_INSTALLED:
    raise ImportError("fastgpt2 bench needs the package triton: pip install 'triton>=3.4' (Linux); it is not installed")

from fastgpt2.bench.audit import audit  # noqa: E402
from fastgpt2.bench.report import measured, report, roofline  # noqa: E402
from fastgpt2.bench.timing import generate, host, ops, pace, race, train, tune  # noqa: E402
from fastgpt2.gpt2.cli.cli import in_a_process  # noqa: E402
from fastgpt2.gpt2.command_line import choose, parse  # noqa: E402
from fastgpt2.gpt2.options import Positional, Word  # noqa: E402
from fastgpt2.gpt2.training.train_config import find_device  # noqa: E402

PROG = "fastgpt2 bench"
COMMANDS = (train, generate, ops, race, host, audit, tune, roofline, report)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measures kernels and model. Without a command: a quick set for this machine, and a report of it."""

    command: Positional[Annotated[str | None, Word("COMMAND ...")]] = None  # one of those below; each has a --help


def main(argv: Sequence[str]) -> int:
    """Runs one command, or the default ones; returns the exit status."""
    modules = {module.__name__.rpartition(".")[2]: module for module in COMMANDS}
    chosen, rest = choose(Options, {name: module.HELP for name, module in modules.items()}, argv, PROG)
    for name, *words in [[chosen.command, *rest]] if chosen.command else pace.default_lines(find_device("auto")):
        if status := modules[name].main(parse(modules[name].Options, words, f"{PROG} {name}")):
            return status
    if chosen.command is None:
        print("\n".join(measured.lines(find_device("auto"))))
    return 0


if __name__ == "__main__":
    sys.exit(in_a_process(main))
