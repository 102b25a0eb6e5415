"""Training: text in, a run folder out.

    from fastgpt2.gpt2.training.train import TrainConfig, train

    result = train(TrainConfig.from_preset("baby-smoke", data="my_texts", steps=500))
    result.model, result.tokenizer, result.folder
    train(resume=result.folder)                         # after a kill: the same losses and weights, bit for bit

A step averages the gradients of its passes, clips them and updates the weights with AdamW. The learning rate rises
linearly and then falls as a cosine or, with `schedule="wsd"`, linearly in the last steps. The same config on the same
CPU gives the same losses bit for bit.
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
from fastgpt2.gpt2.data.corpus import Corpus, load_corpus
from fastgpt2.gpt2.data.tokenizer import Tokenizer
from fastgpt2.gpt2.data.windows import content
from fastgpt2.gpt2.evaluation.hellaswag import read_examples
from fastgpt2.gpt2.files import exclusive
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.output import run_console
from fastgpt2.gpt2.training.begin import beginning
from fastgpt2.gpt2.training.log import LOG, read_log
from fastgpt2.gpt2.training.progress import Progress, announce, line, show_end, show_sample, stages
from fastgpt2.gpt2.training.ranks import Ranks
from fastgpt2.gpt2.training.run_folder import CONFIG, Record, RunFolder, check_run, versions
from fastgpt2.gpt2.training.stop_signals import StopSignals
from fastgpt2.gpt2.training.trackers import Tracker, check_trackers, open_trackers
from fastgpt2.gpt2.training.train_config import TrainConfig, choose_preset, find_device, read_settings
from fastgpt2.gpt2.training.trainer import Trainer
from fastgpt2.gpt2.weights.checkpoints import link_newest, load_checkpoint_state, newest_whole, save_checkpoint
from fastgpt2.gpt2.weights.pretrained import from_pretrained

# The settings that may change when a run is resumed: the path of its data (the saved state checks that the content is
# the same), how it is computed, and what is reported and kept.
WATCHING = ("keep", "hellaswag", "tensorboard", "wandb")
COMPUTING = (
    *("device", "kernels", "optimizer", "compile", "cuda_graph", "recompute", "parallel"),
    *("bad_steps", "spike"),
)
FREE_TO_CHANGE = ("data", "out", *COMPUTING, *WATCHING)
__all__ = ["TrainConfig", "TrainResult", "Trainer", "train"]


@dataclass(frozen=True)
class TrainResult:
    """The result of a run. steps: the last step. loss, val_loss: the last ones, in nats a token. stopped_by: the signal
    that ended the run early, if any."""

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
    """Trains one model and writes its run folder; reports to `console` (default: standard output).

    config: by default preset baby on a GPU and baby-smoke without one; with `resume`, the run's own settings.
    resume: the folder of a run. It continues from the newest complete checkpoint to its end or, with more `steps`, on.

    The first SIGINT, SIGTERM or SIGHUP ends the run after the current step and saves it; a second one ends it at once.
    Sets PyTorch's global seed. Under torchrun every rank calls this, and rank 0 writes.
    Raises ValueError or OSError before the first step if data or settings are not usable or, with `resume`, are not
    those of the run; BlockingIOError if another process uses the folder; FloatingPointError if the loss or gradient
    becomes NaN, infinite or a spike. The last checkpoint then remains.
    """
    if resume is not None:
        config = _config_of(Path(resume), config)
    elif config is None:
        config = TrainConfig.from_preset(choose_preset(None, find_device("auto"))[0])
    config = config.on_this_machine()
    ranks = Ranks.join(config.device)
    try:
        if config.parallel == "fsdp" and ranks.size == 1 and resume is None:
            raise ValueError("parallel is 'fsdp' and there is one process: start several with torchrun")
        with contextlib.ExitStack() as held:
            return _train(config, None if resume is None else Path(resume), ranks, console or run_console(), held)
    except BaseException as error:
        if ranks.size > 1:
            # The frames of the error hold DDP, which must be freed before its process group is destroyed. Freed later,
            # it would wait for a thread that itself waits for the interpreter's lock.
            traceback.clear_frames(error.__traceback__)
        raise
    finally:
        ranks.leave()


def _train(
    config: TrainConfig, resumed: Path | None, ranks: Ranks, console: Console, held: contextlib.ExitStack
) -> TrainResult:
    """resumed: the folder of the run to resume; None for a new run. held: closed at the end of the run."""
    stop = StopSignals(launched=ranks.size > 1)
    if not ranks.first:
        console = Console(quiet=True)
    if resumed is not None:
        ranks.broadcast(lambda: held.enter_context(exclusive(resumed)))
    check_trackers(config)
    text = (config.data, config.tokenizer, config.val_fraction, config.block_size)
    place: dict[str, Any] = dict(rank=ranks.rank, world_size=ranks.size)
    starting = held.enter_context(contextlib.ExitStack())
    place["say"] = say = starting.enter_context(stages(console, "start"))
    saved = None if resumed is None else newest_whole(resumed, lambda text: line(console, text))
    if config.init_from is not None:
        say("loading the weights")
    begun = ranks.on_all(lambda: beginning(config, saved))
    otherwise = config.text_tokenizer() if begun is None else begun.tokenizer
    corpus = ranks.on_all(lambda: load_corpus(*text, text_tokenizer=otherwise, **place))
    if begun is not None:
        begun.check_tokenizer(corpus.tokenizer)
    examples = ranks.broadcast(lambda: read_examples(config.hellaswag) if config.hellaswag else [])
    say("preparing the model")
    torch.manual_seed(config.seed)
    model = None if begun is None else begun.model
    trainer = Trainer(config, corpus.tokenizer, corpus.train, corpus.val, ranks, model)
    held_out = {"tokens": len(corpus.val), "content": content(corpus.val)}
    done = 0 if resumed is None else _restore(trainer, resumed, saved, held_out, console)
    say("computing the validation loss")
    val_loss = trainer.validation_loss()  # before anything is written, so that an error of a kernel leaves no folder
    starting.close()

    new = resumed is None
    if resumed is None:
        folder = ranks.broadcast(lambda: _new_folder(config, trainer.model, corpus, held))
    else:
        folder = RunFolder(resumed)
        ranks.broadcast(lambda: _rewind(folder, done, config.steps, console))
        ranks.broadcast(lambda: folder.set_steps(config.steps))
    trackers = ranks.on_all(lambda: _begin_tracking(config, folder.path, done, new) if ranks.first else [])
    announce(console, config, trainer.model, corpus, folder.path, ranks.size, done, val_loss)
    if ranks.first and begun is not None and new and (note := begun.note(corpus.tokenizer)):
        line(console, f"note    {note}")

    if done >= config.steps:
        line(console, f"done    all {done} steps were trained before; --resume RUN --steps N goes on to step N")
    record, stopped_by = None, None
    with stop, Progress(console, config.steps, done) as progress:
        for step in range(done + 1, config.steps + 1):
            record = trainer.step(step)
            number = ranks.all_reduce_max(stop.received or 0)  # read once a step, so that all ranks stop together
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
    if record is None:  # the resumed run had already reached its end
        record = Record(**read_log(folder.path / LOG)[-1])
    show_end(console, folder.path, corpus.prompt, record, stopped_by)
    return TrainResult(folder.path, model, corpus.tokenizer, record.step, record.loss, val_loss, stopped_by)


def _new_folder(config: TrainConfig, model: GPT, corpus: Corpus, held: contextlib.ExitStack) -> RunFolder:
    folder = RunFolder.create(config.out, config.preset, held)
    folder.write_config(config, model, corpus)
    return folder


def _rewind(folder: RunFolder, done: int, steps: int, console: Console) -> None:
    """Resets the folder to its state after step `done`. Raises ValueError if that is the last step and the log has no
    line of it."""
    folder.sweep()
    if folder.rewind_log(done) is None and done:
        if done == steps:
            raise ValueError(
                f"{folder.path / LOG} has no line of step {done}, and the run is at its end: nothing to do"
            )
        line(console, f"note    {folder.path / LOG} has no line of step {done}: its curves have a gap")


def _begin_tracking(config: TrainConfig, folder: Path, done: int, new: bool) -> list[Tracker]:
    """Opens the trackers. If that fails, deletes a new folder, so that the same command can be repeated."""
    try:
        return open_trackers(config, folder, done)
    except Exception:
        if new:
            shutil.rmtree(folder)
        raise


def _save(trainer: Trainer, folder: Path, step: int, held_out: dict[str, int]) -> None:
    model, config = trainer.whole_model(), trainer.config
    state = {
        **trainer.state_dict(),
        "config": dataclasses.asdict(config),
        "versions": versions(trainer.model.device),
        "val": held_out,
    }

    def save() -> None:
        if trainer.ranks.first:
            save_checkpoint(folder, step, model, trainer.tokenizer, state, config.keep)

    trainer.ranks.on_all(save)


def _config_of(run: Path, config: TrainConfig | None) -> TrainConfig:
    """The settings with which a run is resumed: `config`, or the saved ones if it is None. Raises ValueError naming a
    setting in which `config` differs and must not."""
    check_run(run)
    saved = TrainConfig(**read_settings(run / CONFIG))
    if config is None:
        return saved
    if config.out is not None and Path(config.out).resolve() != run.resolve():
        raise ValueError(f"out is {config.out!r}, and {run} goes on where it is: leave out out")
    _check_same(config.on_this_machine(), dataclasses.asdict(saved), run)
    return config


def _check_same(config: TrainConfig, before: dict[str, Any], run: Path) -> None:
    """Raises ValueError for a setting that differs from the run's and must not change."""
    for name, value in dataclasses.asdict(config).items():
        if name == "total_batch_tokens" and before[name] is None:
            continue  # its value depended on the number of ranks: `_check_step` compares it
        if name == "steps" and value > before[name]:
            continue
        if name not in FREE_TO_CHANGE and value != before[name]:
            raise ValueError(
                f"{name} is {value!r}, the run {run} was begun with {before[name]!r}: leave it out, or begin a new run"
            )


def _check_step(trainer: Trainer, state: dict[str, Any], run: Path) -> None:
    """Raises ValueError if a step would have another number of tokens than before, as with another number of ranks."""
    config, ranks, before = trainer.config, trainer.ranks.size, len(state["random"])
    was = TrainConfig(**state["config"]).tokens_per_step(before)
    if (now := config.tokens_per_step(ranks)) != was:
        raise ValueError(
            f"a step of {run} has {was} tokens, on {before} ranks; on {ranks} it would have {now}: give "
            f"total_batch_tokens {was}, or as many ranks as there were"
        )


def _restore(trainer: Trainer, run: Path, folder: Path | None, held_out: dict[str, int], console: Console) -> int:
    """Loads the checkpoint in `folder` and returns its step, or 0 for a run that was killed before its first one.

    Raises ValueError if the data is not the run's.
    """
    if folder is None:
        line(console, f"resumes {run} from the beginning, it has no checkpoint yet")
        return 0
    state = load_checkpoint_state(folder)
    before = dataclasses.asdict(TrainConfig(**state["config"]))  # which an older version wrote, perhaps
    _check_same(trainer.config, before, run)  # config.yaml may have been edited
    _check_step(trainer, state, run)
    if tokenizers.load(folder) != trainer.tokenizer:
        raise ValueError(f"{folder} was trained on tokens of another tokenizer than the data's")
    trainer.load_state_dict(from_pretrained(folder, check=False), state)
    for name, value in state.get("val", {}).items():
        if held_out[name] != value:
            raise ValueError(f"{name} of the held-out data is {held_out[name]}, the run was validated with {value}")
    trainer.ranks.broadcast(lambda: link_newest(run, folder))  # the run may have been killed before it made the link
    line(console, f"resumes {folder}")
    if trainer.config.parallel == "fsdp" and trainer.ranks.size == 1:
        line(console, "note    parallel is fsdp, and this one process has all of the model")
    for name, version in versions(trainer.model.device).items():
        if (before := state["versions"].get(name, version)) != version:
            line(console, f"note    {name} was {before}, is {version}: losses may differ in rounding")
    if len(state["random"]) != trainer.ranks.size and trainer.config.dropout:
        line(console, f"note    saved by {len(state['random'])} ranks, now {trainer.ranks.size}: dropout differs")
    return state["step"]
