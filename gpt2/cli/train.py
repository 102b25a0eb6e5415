"""`fastgpt2 train`: the settings of a run from presets, a YAML file and the command line, each over the one before."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastgpt2.gpt2.command_line import CommandLine
from fastgpt2.gpt2.options import CommandOptions, Folder
from fastgpt2.gpt2.output import run_console
from fastgpt2.gpt2.training import train
from fastgpt2.gpt2.training.pace import fitted
from fastgpt2.gpt2.training.progress import line
from fastgpt2.gpt2.training.run_folder import CONFIG, check_run
from fastgpt2.gpt2.training.settings import Settings
from fastgpt2.gpt2.training.train_config import TrainConfig, choose_preset, find_device, read_settings, sizes_of


@dataclass(frozen=True, kw_only=True)
class Options(Settings, CommandOptions):
    """Trains a model, from scratch or from the weights of --init-from, and writes a run folder with config.yaml,
    log.jsonl, checkpoint/ and loss.png. Without options: a small model on the sources of Python's library, in about two
    minutes on a CPU; on a GPU the whole preset baby. The defaults below are those of the preset, of the file and of the
    weights that were given.
    """

    resume: Folder | None = None  # a run to go on with, from its newest whole checkpoint


def main(argv: Sequence[str]) -> int:
    """Trains; returns 0, or 128 + the number of the signal that ended the run."""
    asked = parse(argv)
    config, resume = asked.config, asked.resume
    console = run_console(quiet=os.environ.get("RANK", "0") != "0")
    line(console, f"preset  {config.preset} ({asked.remark})")
    if asked.fit:
        config, step_ms = fitted(config)
        line(console, f"pace    a step takes about {step_ms:.0f} ms here: {config.steps} steps in about two minutes")
    result = train.train(config, resume=resume, console=console)
    return 0 if result.stopped_by is None else 128 + result.stopped_by


class Asked(NamedTuple):
    """What a command line of `fastgpt2 train` asks for."""

    config: TrainConfig
    remark: str  # why it is this preset
    resume: str | None  # the run to go on with
    fit: bool  # whether nobody said how long to train, so that the time of a step here decides


def parse(argv: Sequence[str]) -> Asked:
    """The settings of a run. Raises as `options.parse`, and ValueError for settings that do not go together."""
    line = CommandLine(Options, argv, "fastgpt2 train")
    typed = line.values
    # The preset, the file and the run that goes on say what the other options are by default.
    resume = typed.get("resume")
    if resume is not None:
        check_run(Path(resume))
    file = typed.get("config") or (resume and Path(resume) / CONFIG)
    from_file = read_settings(file) if file else {}
    with _naming(file, from_file):
        device = find_device(typed.get("device") or from_file.get("device") or "auto")
        given = {**from_file, **typed}
        init_from = None if resume else given.get("init_from")  # a run that goes on does not look there again
        preset, remark = choose_preset(given.get("preset"), device, init_from)
        base = dataclasses.asdict(TrainConfig.from_preset(preset)) | (sizes_of(init_from) if init_from else {})
    chosen = dataclasses.asdict(line.over({**base, **from_file, "preset": preset}))
    with _naming(file, from_file):
        config = TrainConfig(**{name: chosen[name] for name in base})
    said = typed.keys() & {"preset", "config", "resume", "steps", "init_from"}
    alone = os.environ.get("WORLD_SIZE", "1") == "1"  # ranks would measure different lengths
    return Asked(config, remark, resume, fit=alone and not said and device.type == "cpu")


@contextlib.contextmanager
def _naming(file: str | Path | None, from_file: Mapping[str, Any]) -> Iterator[None]:
    """Inside, an error about a value that stands in the file names the file too."""
    try:
        yield
    except ValueError as error:
        name, _, rest = str(error).partition(" is ")
        value = from_file.get(name)
        if value is not None and rest.startswith((f"{value},", f"{value!r},")):
            raise ValueError(f"{file}: {error}") from None
        raise
