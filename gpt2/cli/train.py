"""`fastgpt2 train`: the settings of a run from presets, a YAML file and the command line, each over the one before."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from fastgpt2.gpt2.output import run_console
from fastgpt2.gpt2.training import train
from fastgpt2.gpt2.training.pace import fitted
from fastgpt2.gpt2.training.progress import line
from fastgpt2.gpt2.training.recipe import TrainConfig, choose_preset, find_device, read_settings
from fastgpt2.gpt2.training.run_folder import CONFIG, check_run
from fastgpt2.gpt2.training.settings import Settings

DESCRIPTION = (
    "Trains a model from scratch and writes a run folder with config.yaml, log.jsonl, checkpoint/ and loss.png. "
    "Without options: a small model on the sources of Python's library, in about two minutes on a CPU; on a GPU "
    "the whole preset baby. Defaults below are those of the preset and the file that were given."
)


@dataclass(frozen=True)
class Options(Settings):
    """What can be typed after `fastgpt2 train`."""

    config: str | None = None  # a YAML file of settings, such as a run's config.yaml; the command line goes over it
    resume: str | None = None  # the folder of a run to go on with, from its newest whole checkpoint


def main(argv: Sequence[str]) -> int:
    """Trains; returns 0, or 128 + the number of the signal that ended the run."""
    config, remark, resume = parse(argv)
    console = run_console(quiet=os.environ.get("RANK", "0") != "0")
    line(console, f"preset  {config.preset} ({remark})")
    if _is_ours_to_size(argv):
        config, step_ms = fitted(config)
        line(console, f"pace    a step takes about {step_ms:.0f} ms here: {config.steps} steps in about two minutes")
    result = train.train(config, resume=resume, console=console)
    return 0 if result.stopped_by is None else 128 + result.stopped_by


def _is_ours_to_size(argv: Sequence[str]) -> bool:
    """Whether nobody said how long to train, on what is no GPU. Ranks would measure different lengths."""
    asked = _looked_for(argv, ("preset", "config", "resume", "steps", "device"))
    said = any(asked[name] is not None for name in ("preset", "config", "resume", "steps"))
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return alone and not said and find_device(asked["device"] or "auto").type == "cpu"


def parse(argv: Sequence[str]) -> tuple[TrainConfig, str, str | None]:
    """(the settings, what to say about the preset, the run to go on with if one is). Leaves with status 2 for an option
    that does not exist."""
    # Preset, file and run say what the other options' defaults are, so they are looked for first.
    asked = _looked_for(argv, ("preset", "config", "device", "resume"))
    if asked["resume"] is not None:
        check_run(Path(asked["resume"]))
    file = asked["config"] or (asked["resume"] and Path(asked["resume"]) / CONFIG)
    from_file = read_settings(file) if file else {}
    with _naming(file, from_file):
        device = find_device(asked["device"] or from_file.get("device") or "auto")
        preset, remark = choose_preset(asked["preset"] or from_file.get("preset"), device)
        base = dataclasses.asdict(TrainConfig.from_preset(preset))
    options = tyro.cli(
        Options,
        prog="fastgpt2 train",
        description=DESCRIPTION,
        args=[*_as_arguments(from_file), *argv],
        default=Options(**base),
    )
    if options.resume and options.out and Path(options.out).resolve() != Path(options.resume).resolve():
        raise ValueError(f"out is {options.out!r}, and {options.resume} goes on where it is: leave --out out")
    values = {name: value for name, value in dataclasses.asdict(options).items() if name in base}
    with _naming(file, from_file):
        return TrainConfig(**{**values, "preset": preset}), remark, options.resume


@contextlib.contextmanager
def _naming(file: str | Path | None, from_file: Mapping[str, Any]) -> Iterator[None]:
    """Errors about a value that stands in the file name the file too."""
    try:
        yield
    except ValueError as error:
        name, _, rest = str(error).partition(" is ")
        value = from_file.get(name)
        if value is not None and rest.startswith((f"{value},", f"{value!r},")):
            raise ValueError(f"{file}: {error}") from None
        raise


def _looked_for(argv: Sequence[str], names: Sequence[str]) -> dict[str, str | None]:
    """The last value that `argv` gives to each of these options."""
    found: dict[str, str | None] = dict.fromkeys(names)
    for i, word in enumerate(argv):
        option, equals, value = word.partition("=")
        if option.removeprefix("--") in names and option.startswith("--"):
            found[option[2:]] = value if equals else next(iter(argv[i + 1 : i + 2]), None)
    return found


def _as_arguments(settings: Mapping[str, Any]) -> list[str]:
    """The same, typed: so a file's values are read and refused as those of the command line."""
    words = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        flag = f"--{option}" if value else f"--no-{option}"
        words.append(flag if isinstance(value, bool) else f"--{option}={value}")
    return words
