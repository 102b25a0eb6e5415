"""`fastgpt2 plot`: the curves of several runs in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastgpt2.gpt2.command_line import parse
from fastgpt2.gpt2.options import CommandOptions, File, Positional, Repeated, Word
from fastgpt2.gpt2.training.plot import plot_runs


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Draws several runs in one picture: loss against tokens and against time of training, and HellaSwag where it was
    scored. Losses of runs on different texts or with different tokenizers do not compare.
    """

    runs: Positional[tuple[Annotated[str, Word("RUN")], ...]]  # folders of runs
    out: File = "runs.png"  # the picture, .png, .pdf or .svg
    # a horizontal line, such as 'GPT-2 124M, FineWeb-Edu=3.2924'; may be given several times
    reference: Repeated[tuple[Annotated[str, Word("NAME=LOSS")], ...]] = ()


def main(argv: Sequence[str]) -> int:
    """Writes a picture; returns 0."""
    args = parse(Options, argv, "fastgpt2 plot")
    plot_runs([Path(run) for run in args.runs], Path(args.out), dict(map(_reference, args.reference)))
    print(args.out)
    return 0


def _reference(text: str) -> tuple[str, float]:
    name, equals, value = text.rpartition("=")
    try:
        return name, float(value if equals and name else "")
    except ValueError:
        raise ValueError(f"--reference is {text!r}, expected NAME=LOSS, such as 'GPT-2 124M=3.29'") from None
