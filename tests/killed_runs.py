"""Runs that die: python killed_runs.py FOLDER, with FOLDER/runs.json = [[settings, place, count], ...]

place: "step", "update", "sync", "rename", "remove" or "log"; the run is killed by SIGKILL just before that happens for
the `count`-th time. Prints the status of each. Each is forked from one process, which imports everything once.
"""

import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from rich.console import Console

from fastgpt2.gpt2.training.run_folder import RunFolder
from fastgpt2.gpt2.training.train import TrainConfig, Trainer, train

PLACES = {
    "step": (Trainer, "step"),
    "update": (torch.optim.AdamW, "step"),
    "sync": (os, "fsync"),
    "rename": (os, "replace"),
    "remove": (shutil, "rmtree"),
    "log": (RunFolder, "log"),
}


def die_at(place: str, count: int) -> None:
    owner, name = PLACES[place]
    original, seen = getattr(owner, name), 0

    def counting(*args, **kwargs):
        nonlocal seen
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counting)


def begin(settings: dict) -> None:
    train(TrainConfig(**settings), console=Console(file=io.StringIO()))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    RunFolder.plot = Trainer.sample = lambda *args: None
    runs = json.loads((folder / "runs.json").read_text())
    begin({**runs[0][0], "out": str(folder / "alive"), "steps": 1})  # imports what is imported late
    for settings, place, count in runs:
        if (child := os.fork()) == 0:
            die_at(place, count)
            begin(settings)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
