"""Runs that die: python every_kill.py FOLDER, with FOLDER/settings.json; leaves FOLDER/kill-N for every N.

The run in kill-N is killed by SIGKILL just before its N-th operation that changes a file or a folder of it. Each is
forked from one process, which imports everything once.
"""

import io
import json
import os
import signal
import sys
from pathlib import Path

import torch
from rich.console import Console

from fastgpt2.gpt2.training.run_folder import RunFolder
from fastgpt2.gpt2.training.train import TrainConfig, Trainer, train

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.truncate", "os.chmod"}


def die_before(count: int, folder: Path) -> None:
    seen = 0

    def watch(event: str, args: tuple) -> None:
        nonlocal seen
        if event == "open":
            path, _, flags = args
            changes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            path, changes = args[0] if args else None, event in CHANGES
        if changes and not isinstance(path, int) and str(folder) in os.fsdecode(path):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def begin(settings: dict) -> None:
    train(TrainConfig(**settings), console=Console(file=io.StringIO()))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    RunFolder.plot = Trainer.sample = lambda *args: None
    settings = json.loads((folder / "settings.json").read_text())
    begin({**settings, "out": str(folder / "alive"), "steps": 1})  # imports what is imported late
    for count in range(1, 1000):
        out = folder / f"kill-{count}"
        if (child := os.fork()) == 0:
            die_before(count, out)
            begin({**settings, "out": str(out)})
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            return
    raise SystemExit("it never ends")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
