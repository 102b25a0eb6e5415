"""The folder of a run: config.yaml, about.json, log.jsonl, checkpoints/ and loss.png."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgpt2.gpt2 import linear
from fastgpt2.gpt2.data.corpus import Corpus
from fastgpt2.gpt2.files import LOCK, exclusive, write_atomically
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.ops import kernels_digest
from fastgpt2.gpt2.training.log import LOG, read_log
from fastgpt2.gpt2.training.train_config import TrainConfig, read_settings, settings_text

CONFIG, ABOUT, PLOT = "config.yaml", "about.json", "loss.png"


@dataclass(frozen=True)
class Record:
    """The record of one step, a line of log.jsonl. Losses are in nats a token; times do not include validation.

    tokens: all tokens trained on so far. loss: the mean over the step's passes, before its update. mfu: the model's
    FLOP/s by `GPTConfig.flops_per_token` divided by the peak of all GPUs; None if the peak is unknown.
    peak_memory_bytes: of this process. val_loss, hellaswag (`nanogpt_acc_norm`): after the update. left_out: the reason
    if the step's update was left out.
    """

    step: int
    tokens: int
    loss: float
    lr: float
    grad_norm: float
    step_ms: float
    tokens_per_s: float
    mfu: float | None = None
    peak_memory_bytes: int | None = None
    val_loss: float | None = None
    hellaswag: float | None = None
    left_out: str | None = None

    def numbers(self) -> dict[str, float]:
        """All numbers that the record has, by name, without the step."""
        values = dataclasses.asdict(self)
        return {k: v for k, v in values.items() if isinstance(v, int | float) and k != "step"}

    def line(self) -> str:
        """The record as one line of JSON, in which NaN and infinity are null."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        return json.dumps(values, allow_nan=False) + "\n"


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @classmethod
    def create(cls, out: str | None, preset: str, held: contextlib.ExitStack) -> RunFolder:
        """Creates the folder `out`, or runs/DATE-TIME-PRESET, and locks it for this process until `held` is closed.

        Files of a run that was killed before its config.yaml was written are deleted. Raises FileExistsError if the
        folder has other files, BlockingIOError if another run uses it.
        """
        if out is None:
            named = Path("runs") / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{preset}"
            candidates = [named, *(named.with_name(f"{named.name}-{i}") for i in range(2, 100))]
        else:
            candidates = [Path(out)]
        for path in candidates:
            if not _is_new(path):
                continue
            try:
                held.enter_context(exclusive(path))
            except BlockingIOError:
                if out is not None:
                    raise
                continue
            if _is_new(path):  # no other process has used it before this one locked it
                for leftover in path.iterdir():
                    if leftover.name != LOCK:
                        leftover.unlink()
                return cls(path)
        path = candidates[0]
        if (path / CONFIG).is_file():
            raise FileExistsError(f"out is {str(path)!r}, which holds a run: --resume {path} goes on with it")
        raise FileExistsError(f"out is {str(path)!r}, which is not an empty folder: choose another")

    def write_config(self, config: TrainConfig, model: GPT, corpus: Corpus) -> None:
        """Writes all settings to config.yaml, which `--config` reads, and to about.json what they led to."""
        content: dict[str, Any] = {
            "model": dataclasses.asdict(model.config),
            "kernels": dataclasses.asdict(model.kernels),
            "text": {
                "name": corpus.name,
                "documents": corpus.n_documents,
                "tokens": len(corpus.train),
                "held_out": len(corpus.val),
            },
            "versions": versions(model.device),
        }
        write_atomically(self.path / ABOUT, json.dumps(content, indent=2) + "\n")
        write_atomically(self.path / CONFIG, settings_text(config))

    def set_steps(self, steps: int) -> None:
        """config.yaml says how long the run is, also where it is longer than it was begun."""
        config = TrainConfig(**read_settings(self.path / CONFIG))
        if config.steps != steps:
            write_atomically(self.path / CONFIG, settings_text(dataclasses.replace(config, steps=steps)))

    def log(self, record: Record) -> None:
        """Appends the record to the log as one line, in one write."""
        with open(self.path / LOG, "a", encoding="utf-8") as file:
            file.write(record.line())

    def rewind_log(self, step: int) -> dict[str, Any] | None:
        """Removes the log's lines after `step`. Returns the record of `step`, or None if the log has no line of it."""
        kept = [record for record in read_log(self.path / LOG) if record["step"] <= step]
        write_atomically(self.path / LOG, "".join(json.dumps(record) + "\n" for record in kept))
        return kept[-1] if kept and kept[-1]["step"] == step else None

    def sweep(self) -> None:
        """Removes temporary files that a process left when it was killed while writing."""
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink()

    def plot(self) -> None:
        from fastgpt2.gpt2.training.plot import plot_losses

        plot_losses(self.path / LOG, self.path / PLOT, title=self.path.name)


def _is_new(path: Path) -> bool:
    """Whether `path` is missing, empty, or has only what a run leaves that is killed before it writes config.yaml."""
    if not path.exists():
        return True
    temporary = tuple(f".{name}." for name in (ABOUT, CONFIG))
    ours = (f.name in (LOCK, ABOUT) or f.name.startswith(temporary) for f in path.iterdir()) if path.is_dir() else ()
    return path.is_dir() and all(ours)


def check_run(folder: Path) -> None:
    """Raises FileNotFoundError if `folder` is not the folder of a run."""
    if not (folder / CONFIG).is_file():
        if (folder / LOCK).is_file() and _is_new(folder):
            raise FileNotFoundError(
                f"resume is {str(folder)!r}, where a run was killed before its settings were written: begin it again "
                "with the same command"
            )
        raise FileNotFoundError(f"resume is {str(folder)!r}, which is no run: it has no {CONFIG}")


def versions(device: torch.device) -> dict[str, str]:
    """The versions on which a run's numbers depend besides its settings; on a CPU also who multiplies matrices."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__), "kernels": kernels_digest()}
    return found | ({"matrix products": linear.library()} if device.type == "cpu" else {})
