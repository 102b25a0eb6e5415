"""Options that several of bench's commands take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastgpt2.bench.report.record import FOLDER
from fastgpt2.gpt2.options import CommandOptions, Name, Word


@dataclass(frozen=True, kw_only=True)
class NanogptOption(CommandOptions):
    nanogpt: Annotated[Path, Word("MODEL_PY")] | None = None  # nanoGPT's model.py, to compare with it


@dataclass(frozen=True, kw_only=True)
class DeviceOption(CommandOptions):
    device: Name = "auto"  # cpu, cuda, cuda:1, ...; auto: the GPU where there is one


@dataclass(frozen=True, kw_only=True)
class OutOption(CommandOptions):
    out: Annotated[Path, Word("FOLDER")] = FOLDER  # where the result file goes

    def __post_init__(self) -> None:
        """Raises ValueError where no folder can be, before minutes of measuring."""
        there = next((place for place in (self.out, *self.out.parents) if place.exists()), None)
        if there is not None and not there.is_dir():
            raise ValueError(f"--out is {str(self.out)!r}, and {there} is a file: give a folder")
