"""Training: text in, a run folder out.

    from fastgpt2.gpt2.training.train import TrainConfig, train

    result = train(TrainConfig.from_preset("baby-smoke", data="my_texts", steps=500))
    result.model, result.tokenizer, result.folder
    train(resume=result.folder)                         # after a kill: the same losses and weights, bit for bit

One step: the passes whose mean gradient is clipped and given to AdamW, at a learning rate that rises linearly and falls
by a cosine or, with `schedule="wsd"`, late and linearly. Same config, same CPU: same losses, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import signal
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastgpt2.gpt2.data import tokenizer as tokenizers
from fastgpt2.gpt2.data import windows as data
from fastgpt2.gpt2.data.corpus import Corpus, load_corpus
from fastgpt2.gpt2.data.tokenizer import Tokenizer
from fastgpt2.gpt2.evaluation.hellaswag import read_examples
from fastgpt2.gpt2.files import exclusive
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.output import run_console
from fastgpt2.gpt2.training.log import LOG, read_log
from fastgpt2.gpt2.training.progress import Progress, announce, line, show_end, show_sample
from fastgpt2.gpt2.training.ranks import Ranks
from fastgpt2.gpt2.training.run_folder import CONFIG, Record, RunFolder, check_run, versions
from fastgpt2.gpt2.training.stop_signals import StopSignals
from fastgpt2.gpt2.training.trackers import Tracker, check_trackers, open_trackers
from fastgpt2.gpt2.training.train_config import TrainConfig, choose_preset, find_device, read_settings
from fastgpt2.gpt2.training.trainer import Trainer
from fastgpt2.gpt2.weights.checkpoints import link_newest, load_checkpoint_state, newest_whole, save_checkpoint
from fastgpt2.gpt2.weights.pretrained import from_pretrained

# What may differ where a run goes on: where its data lies (what it is, the saved position knows), where and how it is
# computed, and what is kept of it.
WATCHING = ("keep", "hellaswag", "tensorboard", "wandb")
COMPUTING = (
    *("device", "kernels", "optimizer", "compile", "cuda_graph", "recompute", "parallel"),
    *("bad_steps", "spike"),
)
FREE_TO_CHANGE = ("data", "out", *COMPUTING, *WATCHING)
__all__ = ["TrainConfig", "TrainResult", "Trainer", "train"]


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves. `stopped_by` is the signal that ended it early, if one did."""

    folder: Path
    model: GPT
    tokenizer: Tokenizer
    steps: int
    loss: float
    val_loss: float
    stopped_by: signal.Signals | None


def train(
    config: TrainConfig | None = None, *, resume: str | Path | None = None, console: Console | None = None
) -> TrainResult:
    """Trains one model from scratch and writes its run folder; reports to `console` (default: standard output).

    config: default: baby on a GPU, baby-smoke without one; with `resume`, the run's own.
    resume: the folder of a run that did not reach its end: goes on from its newest whole checkpoint.
    A first SIGINT, SIGTERM or SIGHUP ends the run after its step and saves what stands; a second leaves at once.
    Sets PyTorch's global seed. Under torchrun every rank calls this; rank 0 writes.
    A folder is one run's at a time: BlockingIOError where another process has it.
    Raises ValueError or OSError before the first step for data or settings that do not work or, with `resume`, are not
    the run's, FloatingPointError when the loss is no longer a number: what was saved last then stands.
    """
    if resume is not None:
        config = _config_of(Path(resume), config)
    elif config is None:
        config = TrainConfig.from_preset(choose_preset(None, find_device("auto"))[0])
    config = config.on_this_machine()
    ranks = Ranks.join(config.device)
    try:
        if config.parallel == "fsdp" and ranks.size == 1 and resume is None:
            raise ValueError("parallel is 'fsdp' and there is one process: start more with torchrun")
        with contextlib.ExitStack() as held:
            return _train(config, None if resume is None else Path(resume), ranks, console or run_console(), held)
    except BaseException as error:
        if ranks.size > 1:
            # DDP must be freed before its process group is left: freed after it, by the last frame that holds it, it
            # would wait for a thread that waits for Python.
            traceback.clear_frames(error.__traceback__)
        raise
    finally:
        ranks.leave()


def _train(
    config: TrainConfig, resumed: Path | None, ranks: Ranks, console: Console, held: contextlib.ExitStack
) -> TrainResult:
    """resumed: the folder of the run that goes on, None for a new one. held: until the end of the run."""
    stop = StopSignals(launched=ranks.size > 1)
    if not ranks.first:
        console = Console(quiet=True)
    if resumed is not None:
        ranks.broadcast(lambda: held.enter_context(exclusive(resumed)))
    check_trackers(config)
    text = (config.data, config.tokenizer, config.val_fraction, config.block_size)
    place: dict[str, Any] = dict(rank=ranks.rank, world_size=ranks.size)
    corpus = ranks.on_all(lambda: load_corpus(*text, text_tokenizer=config.text_tokenizer(), **place))
    examples = ranks.broadcast(lambda: read_examples(config.hellaswag) if config.hellaswag else [])
    torch.manual_seed(config.seed)
    trainer = Trainer(config, corpus.tokenizer, corpus.train, corpus.val, ranks)
    held_out = {"tokens": len(corpus.val), "content": data.content(corpus.val)}
    done = 0 if resumed is None else _restore(trainer, resumed, held_out, console)
    val_loss = trainer.validation_loss()  # also meets what a kernel refuses, before anything is written

    new = resumed is None
    if resumed is None:
        folder = ranks.broadcast(lambda: _new_folder(config, trainer.model, corpus, held))
    else:
        folder = RunFolder(resumed)
        ranks.broadcast(lambda: _rewind(folder, done, config.steps, console))
    trackers = ranks.on_all(lambda: _begin_tracking(config, folder.path, done, new) if ranks.first else [])
    announce(console, config, trainer.model, corpus, folder.path, ranks.size, done, val_loss)

    record, stopped_by = None, None
    with stop, Progress(console, config.steps, done) as progress:
        for step in range(done + 1, config.steps + 1):
            record = trainer.step(step)
            number = ranks.all_reduce_max(stop.received or 0)  # may come at any moment: looked at once a step
            stopped_by = signal.Signals(number) if number else None
            due = step % config.eval_interval == 0 or step == config.steps
            if due and stopped_by is None:
                val_loss = trainer.validation_loss()
                score = trainer.hellaswag(examples) if examples else None
                record = dataclasses.replace(record, val_loss=val_loss, hellaswag=score)
            if ranks.first:
                folder.log(record)
            for tracker in trackers:
                tracker.log(record)
            progress.show(record)
            if due or stopped_by is not None:
                _save(trainer, folder.path, step, held_out)
            if stopped_by is not None:
                break
    for tracker in trackers:
        tracker.close()
    model = trainer.whole_model()
    if ranks.first:
        folder.plot()
        if stopped_by is None:
            show_sample(console, corpus.prompt, trainer.sample(model, corpus.prompt))
    if record is None:  # resumed at its end
        record = Record(**read_log(folder.path / LOG)[-1])
    show_end(console, folder.path, corpus.prompt, record, stopped_by)
    return TrainResult(folder.path, model, corpus.tokenizer, record.step, record.loss, val_loss, stopped_by)


def _new_folder(config: TrainConfig, model: GPT, corpus: Corpus, held: contextlib.ExitStack) -> RunFolder:
    folder = RunFolder.create(config.out, config.preset, held)
    folder.write_config(config, model, corpus)
    return folder


def _rewind(folder: RunFolder, done: int, steps: int, console: Console) -> None:
    """The folder as it was after step `done`. Raises ValueError where that was the last one and the log lacks it."""
    folder.sweep()
    if folder.rewind_log(done) is None and done:
        if done == steps:
            raise ValueError(
                f"{folder.path / LOG} has no line of step {done}, and the run is at its end: nothing to do"
            )
        line(console, f"note    {folder.path / LOG} has no line of step {done}: its curves have a gap")


def _begin_tracking(config: TrainConfig, folder: Path, done: int, new: bool) -> list[Tracker]:
    """A new folder goes where that fails: the same command would find it in its way."""
    try:
        return open_trackers(config, folder, done)
    except Exception:
        if new:
            shutil.rmtree(folder)
        raise


def _save(trainer: Trainer, folder: Path, step: int, held_out: dict[str, int]) -> None:
    model, config = trainer.whole_model(), trainer.config
    state = {**trainer.state_dict(), "config": dataclasses.asdict(config), "versions": versions(), "val": held_out}

    def save() -> None:
        if trainer.ranks.first:
            save_checkpoint(folder, step, model, trainer.tokenizer, state, config.keep)

    trainer.ranks.on_all(save)


def _config_of(run: Path, config: TrainConfig | None) -> TrainConfig:
    """The settings of a run that goes on. Raises ValueError naming a setting in which `config` differs from them."""
    check_run(run)
    saved = TrainConfig(**read_settings(run / CONFIG))
    if config is None:
        return saved
    _check_same(config.on_this_machine(), dataclasses.asdict(saved), run)
    return config


def _check_same(config: TrainConfig, before: dict[str, Any], run: Path) -> None:
    """Raises ValueError for a setting that is not what it was and that a run may not change."""
    for name, value in dataclasses.asdict(config).items():
        if name == "total_batch_tokens" and before[name] is None:
            continue  # what it was then depends on the ranks: see `_check_step`
        if name not in FREE_TO_CHANGE and value != before[name]:
            raise ValueError(
                f"{name} is {value!r}, the run {run} was begun with {before[name]!r}: leave it out, or begin a new run"
            )


def _check_step(trainer: Trainer, state: dict[str, Any], run: Path) -> None:
    """Raises ValueError where a step would be of other tokens than it was: on another number of ranks, say."""
    config, ranks, before = trainer.config, trainer.ranks.size, len(state["random"])
    was = TrainConfig(**state["config"]).tokens_per_step(before)
    if (now := config.tokens_per_step(ranks)) != was:
        raise ValueError(
            f"a step of {run} has {was} tokens, on {before} ranks; on {ranks} it would have {now}: give "
            f"total_batch_tokens {was}, or as many ranks as there were"
        )


def _restore(trainer: Trainer, run: Path, held_out: dict[str, int], console: Console) -> int:
    """Loads the newest whole checkpoint; returns its step, 0 for a run that was killed before its first one.

    Raises ValueError where there are checkpoints and none is whole, and for data that is not the run's.
    """
    folder = newest_whole(run, lambda text: line(console, text))
    if folder is None:
        line(console, f"resumes {run} from the beginning, it has no checkpoint yet")
        return 0
    state = load_checkpoint_state(folder)
    _check_same(trainer.config, state["config"], run)  # config.yaml may have been edited
    _check_step(trainer, state, run)
    if tokenizers.load(folder) != trainer.tokenizer:
        raise ValueError(f"{folder} was trained on tokens of another tokenizer than the data's")
    trainer.load_state_dict(from_pretrained(folder, check=False), state)
    for name, value in state.get("val", {}).items():
        if held_out[name] != value:
            raise ValueError(f"{name} of the held-out data is {held_out[name]}, the run was validated with {value}")
    trainer.ranks.broadcast(lambda: link_newest(run, folder))  # a kill may have come before it
    line(console, f"resumes {folder}")
    if trainer.config.parallel == "fsdp" and trainer.ranks.size == 1:
        line(console, "note    parallel is fsdp, and this one process has all of the model")
    for name, version in versions().items():
        if state["versions"][name] != version:
            line(console, f"note    {name} was {state['versions'][name]}, is {version}: losses may differ in rounding")
    if len(state["random"]) != trainer.ranks.size and trainer.config.dropout:
        line(console, f"note    saved by {len(state['random'])} ranks, now {trainer.ranks.size}: dropout differs")
    return state["step"]
