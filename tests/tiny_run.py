"""Runs of a model so small that a test can afford many."""

import io
from pathlib import Path

from rich.console import Console

from fastgpt2.gpt2.training.log import read_log
from fastgpt2.gpt2.training.train import TrainConfig, TrainResult, train

TINY = dict(
    steps=20, batch_size=4, block_size=16, n_layer=1, n_head=2, n_embd=32, dropout=0.0, lr=1e-2, min_lr=1e-3, warmup=5,
    eval_interval=10, eval_tokens=128, tokenizer="byte", device="cpu",
)  # fmt: skip


def settings_in(folder: Path) -> dict:
    """Settings of a tiny run on a text of some thousand bytes."""
    (folder / "text.txt").write_text("".join(f"line {i}: the cat sat on the mat.\n" for i in range(200)))
    return {**TINY, "data": str(folder / "text.txt"), "out": str(folder / "run")}


def run(settings: dict, **more) -> tuple[TrainResult, list[dict], str]:
    """Trains and returns (result, log, what the console said)."""
    return finish(TrainConfig(**{**settings, **more}))


def finish(config: TrainConfig | None, resume: Path | None = None) -> tuple[TrainResult, list[dict], str]:
    """As `run`; resume: the folder of a run to go on with."""
    console = Console(file=io.StringIO(), width=80)
    result = train(config, resume=resume, console=console)
    return result, read_log(result.folder / "log.jsonl"), console.file.getvalue()
