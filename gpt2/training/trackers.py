"""Trackers that receive a run's numbers besides log.jsonl: TensorBoard and Weights & Biases, if the settings ask."""

from __future__ import annotations

import dataclasses
import importlib.util
import uuid
from pathlib import Path
from typing import Any, Protocol

from fastgpt2.gpt2.files import write_atomically
from fastgpt2.gpt2.training.run_folder import Record
from fastgpt2.gpt2.training.train_config import TrainConfig

PROJECT = "fastgpt2"


class Tracker(Protocol):
    def log(self, record: Record) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard: `tensorboard --logdir runs`."""

    def __init__(self, config: TrainConfig, folder: Path, done: int):
        from torch.utils.tensorboard import SummaryWriter

        # Steps that a resumed run repeats replace their earlier entries.
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def log(self, record: Record) -> None:
        for name, value in record.numbers().items():
            self._writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run in the project fastgpt2, named as the run's folder. WANDB_MODE=offline keeps it in RUN/wandb."""

    def __init__(self, config: TrainConfig, folder: Path, done: int):
        import wandb

        identity = folder / "wandb-id"  # needed because names are not unique: a/run and b/run
        if not identity.exists():
            write_atomically(identity, uuid.uuid4().hex[:8])
        try:
            self._run: Any = wandb.init(
                project=PROJECT,
                name=folder.resolve().name,
                id=identity.read_text(),
                dir=str(folder),
                config=dataclasses.asdict(config),
                resume="allow",
            )
        except wandb.errors.Error as error:
            raise RuntimeError(
                f"wandb is True, but it cannot be used: {str(error).splitlines()[0]} (run `wandb login`, or set the "
                "environment variable WANDB_MODE=offline)"
            ) from None

    def log(self, record: Record) -> None:
        self._run.log(record.numbers(), step=record.step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, type[TensorBoard] | type[Wandb]] = {"tensorboard": TensorBoard, "wandb": Wandb}


def check_trackers(config: TrainConfig) -> None:
    """Raises ImportError if the settings ask for a tracker whose package is not installed."""
    for package in TRACKERS:
        if getattr(config, package) and importlib.util.find_spec(package) is None:
            raise ImportError(f"{package} is True, but the package is not installed: pip install 'fastgpt2[watch]'")


def open_trackers(config: TrainConfig, folder: Path, done: int) -> list[Tracker]:
    """The trackers that the settings ask for. done: the number of steps that a resumed run has completed."""
    return [tracker(config, folder, done) for name, tracker in TRACKERS.items() if getattr(config, name)]
