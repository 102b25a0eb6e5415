"""Options that several of bench's commands take."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastgpt2.bench.report.record import FOLDER


def add_nanogpt(command: argparse.ArgumentParser) -> None:
    command.add_argument("--nanogpt", type=Path, metavar="MODEL_PY", help="nanoGPT's model.py, to compare with it")


def add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; default: the GPU where there is one")


def add_out(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, default=FOLDER, help="folder of the result file; default: %(default)s")
