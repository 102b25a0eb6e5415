"""`fastgpt2 plot`: the curves of several runs in one picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastgpt2.gpt2.training.plot import plot_runs


def main(argv: Sequence[str]) -> int:
    """Writes a picture; returns 0."""
    args = parser().parse_args(argv)
    plot_runs([Path(run) for run in args.runs], Path(args.out), dict(args.reference))
    print(args.out)
    return 0


def parser() -> argparse.ArgumentParser:
    """What can be typed after `fastgpt2 plot`."""
    parser = argparse.ArgumentParser(
        prog="fastgpt2 plot",
        description="Overlays runs in one picture: loss against tokens and against time of training, and HellaSwag "
        "where it was scored. Losses of runs on different texts or tokenizers do not compare.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument(
        "--out", default="runs.png", metavar="FILE", help="the picture, .png, .pdf or .svg (%(default)s)"
    )
    parser.add_argument(
        "--reference",
        action="append",
        default=[],
        type=_reference,
        metavar="NAME=LOSS",
        help="a horizontal line, such as 'GPT-2 124M, FineWeb-Edu=3.2924'; may be given several times",
    )
    return parser


def _reference(text: str) -> tuple[str, float]:
    name, equals, value = text.rpartition("=")
    try:
        return name, float(value if equals and name else "")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=LOSS, such as 'GPT-2 124M=3.29'") from None
