"""One rank of runs on two: torchrun --nproc_per_node=2 rank_runs.py FOLDER, FOLDER/runs.json = [[settings, die], ...]

Where `die` is a step, both ranks fail there and then go on with the run.
"""

import io
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from fastgpt2.gpt2.training.run_folder import RunFolder
from fastgpt2.gpt2.training.train import TrainConfig, Trainer, train


class Failure(Exception):
    pass


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    RunFolder.plot = lambda self: None
    sample = Trainer.sample
    dist.init_process_group("gloo")
    original = Trainer.step
    for settings, die in json.loads((folder / "runs.json").read_text()):

        def step(self, at, die=die):
            if at == die:
                raise Failure
            return original(self, at)

        Trainer.step = step
        # In Triton's interpreter a sample would be most of the time.
        Trainer.sample = (lambda *args: "") if settings.get("kernels") == "triton" else sample
        console = Console(file=io.StringIO(), width=200)
        try:
            train(TrainConfig(**settings), console=console)
        except Failure:
            Trainer.step = original
            train(resume=settings["out"], console=console)
        if console.file.getvalue():  # rank 0's alone
            Path(settings["out"], "said.txt").write_text(console.file.getvalue())
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
