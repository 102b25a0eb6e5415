"""Where a run's numbers go besides log.jsonl: TensorBoard and Weights & Biases, each where the settings ask for it."""

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

        # What a resumed run computes again replaces what stands there.
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def log(self, record: Record) -> None:
        for name, value in record.numbers().items():
            self._writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of that name in the project fastgpt2; WANDB_MODE=offline keeps it in RUN/wandb."""

    def __init__(self, config: TrainConfig, folder: Path, done: int):
        import wandb

        identity = folder / "wandb-id"  # names are not unique: a/run and b/run
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
                f"wandb is True, and it cannot be used: {str(error).splitlines()[0]} (`wandb login`, or "
                "WANDB_MODE=offline in the environment)"
            ) from None

    def log(self, record: Record) -> None:
        self._run.log(record.numbers(), step=record.step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, type[TensorBoard] | type[Wandb]] = {"tensorboard": TensorBoard, "wandb": Wandb}


def check_trackers(config: TrainConfig) -> None:
    """Raises ImportError for one that the settings ask for and that is not installed."""
    for package in TRACKERS:
        if getattr(config, package) and importlib.util.find_spec(package) is None:
            raise ImportError(f"{package} is True, and the package is not installed: pip install 'fastgpt2[watch]'")


def open_trackers(config: TrainConfig, folder: Path, done: int) -> list[Tracker]:
    """Those that the settings ask for. done: steps that a resumed run has behind it."""
    return [tracker(config, folder, done) for name, tracker in TRACKERS.items() if getattr(config, name)]
