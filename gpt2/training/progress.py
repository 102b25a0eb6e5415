"""Reports of a run: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import functools
import math
import shlex
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn, track
from rich.progress import Progress as RichProgress

from fastgpt2.gpt2 import hardware
from fastgpt2.gpt2.data.corpus import Corpus
from fastgpt2.gpt2.data.windows import Say
from fastgpt2.gpt2.evaluation.evaluate import Watch
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.output import visible
from fastgpt2.gpt2.training.run_folder import Record
from fastgpt2.gpt2.training.train_config import TrainConfig

RECENT_STEPS = 20
QUIET_S, LINE_EVERY_S = 2.0, 10.0  # time before the first line about a long computation, and between lines


class Progress:
    """Shows records: the latest one on a progress bar, and those with a validation loss as lines."""

    def __init__(self, console: Console, steps: int, done: int = 0):
        self._console = console
        self._recent: deque[Record] = deque(maxlen=RECENT_STEPS)
        self._bar = RichProgress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, completed=done, loss="-", rate="-")
        self._steps = steps

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(self, record: Record) -> None:
        if record.left_out is not None:
            line(self._console, f"step {record.step} left out: {record.left_out}")
        self._recent.append(record)
        losses = [r.loss for r in self._recent if math.isfinite(r.loss)]
        loss = sum(losses) / len(losses) if losses else math.nan
        rate = float(np.median([r.tokens_per_s for r in self._recent]))
        step_ms = float(np.median([r.step_ms for r in self._recent]))
        self._bar.update(self._task, completed=record.step, loss=f"{loss:.3f}", rate=f"{rate:,.0f}")
        if record.val_loss is not None:
            hellaswag = "" if record.hellaswag is None else f"hellaswag {record.hellaswag:.4f}  "
            line(
                self._console,
                f"step {record.step:>{len(str(self._steps))}}/{self._steps}  mean train loss {loss:.4f}  "
                f"val loss {record.val_loss:.4f}  {hellaswag}lr {record.lr:.2e}  {step_ms:.1f} ms/step  "
                f"{rate:,.0f} tokens/s{cost(record)}",
            )


def watched(console: Console, what: str, unit: str = "batches") -> Watch:
    """Passes items on and shows the progress: a bar on a terminal, elsewhere a line on standard error now and then."""
    if console.is_terminal:
        return functools.partial(track, description=what, console=console, transient=True)
    return functools.partial(_said_now_and_then, what=what, unit=unit)


def _said_now_and_then(items: Sequence[Any], what: str, unit: str) -> Iterator[Any]:
    begin = time.monotonic()
    due = begin + QUIET_S
    for done, item in enumerate(items, start=1):
        yield item
        if (now := time.monotonic()) >= due:
            left = (now - begin) / done * (len(items) - done)
            print(f"{what}: {done:,} of {len(items):,} {unit}, about {left:.0f} s left", file=sys.stderr, flush=True)
            due = now + LINE_EVERY_S


@contextlib.contextmanager
def stages(console: Console, what: str) -> Iterator[Say]:
    """Shows what a computation of unknown length is at: the argument of the last call of what the `with` is given.

    On a terminal beside a spinner; elsewhere, from two seconds on, as a line on standard error now and then.
    """
    if console.is_terminal or console.quiet:
        with console.status(what) as status:
            yield lambda stage: status.update(f"{what}: {stage}")
        return
    begin, ended, latest = time.monotonic(), threading.Event(), ["begun"]

    def tell() -> None:
        wait = QUIET_S
        while not ended.wait(wait):
            print(f"{what}: {latest[0]}, {time.monotonic() - begin:.0f} s so far", file=sys.stderr, flush=True)
            wait = LINE_EVERY_S

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield lambda stage: latest.__setitem__(0, stage)
    finally:
        ended.set()
        teller.join()


def cost(record: Record) -> str:
    """The MFU and peak memory of a step as text, as far as they are known."""
    mfu = "" if record.mfu is None else f"  MFU {record.mfu:.1%}"
    memory = "" if record.peak_memory_bytes is None else f"  peak {record.peak_memory_bytes / 2**30:.2f} GiB"
    return mfu + memory


def line(console: Console, text: str) -> None:
    """Prints exactly `text`, without rich's markup, colours and line breaks."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def announce(
    console: Console,
    config: TrainConfig,
    model: GPT,
    corpus: Corpus,
    folder: Path,
    processes: int,
    done: int,
    val_loss: float,
) -> None:
    """Prints what is about to be trained, in a few lines."""
    c = model.config
    kernels = ", ".join(f"{op} {how}" for op, how in vars(model.kernels).items())
    same = set(vars(model.kernels).values())
    documents = "" if corpus.n_documents is None else f"{corpus.n_documents:,} documents, "
    rows = {
        "text": f"{corpus.name}: {documents}{len(corpus.train):,} tokens and {len(corpus.val):,} held out, "
        f"vocabulary {corpus.tokenizer.vocab_size}",
        "model": f"{model.get_num_params() / 1e6:.2f}M parameters: {c.n_layer} layers, {c.n_head} heads, "
        f"width {c.n_embd}, block {c.block_size}",
        **({} if config.init_from is None else {"from": config.init_from}),
        "run": f"{config.steps} steps of {config.tokens_per_step(processes):,} tokens on {config.device} in "
        f"{config.dtype}, {f'{processes} processes with {config.parallel}, ' if processes > 1 else ''}"
        f"kernels {same.pop() if len(same) == 1 else kernels}{', compiled' if config.compile else ''}"
        f"{', as CUDA graphs' if config.as_cuda_graph(processes) else ''}",
        "MFU": _mfu_in_words(model),
        **({"warmup": _warmup_in_words(config)} if config.warmup >= config.steps else {}),
        "folder": str(folder),
        "start": f"val loss {val_loss:.4f} {f'after step {done}' if done else 'before training'}",
    }
    for name, value in rows.items():
        line(console, f"{name:<7} {value}")


def _warmup_in_words(config: TrainConfig) -> str:
    highest = config.lr * config.steps / config.warmup
    return f"{config.warmup} steps, which the run's {config.steps} end within: its highest rate is {highest:.2e}"


def _mfu_in_words(model: GPT) -> str:
    device = model.device
    peak = hardware.peak_flops(device)
    formula = (
        f"(6 N + 12 L H D T) x tokens/s / peak (PaLM, appendix B), {model.config.flops_per_token():.3g} FLOPs a token"
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{formula}, peak of {name} {'unknown' if peak is None else f'{peak / 1e12:.0f} TFLOP/s in bf16'}"


def show_sample(console: Console, prompt: str, sample: str) -> None:
    """Prints a text that the trained model generated after `prompt`."""
    line(console, f"\n--- a sample, from {prompt!r} ---\n{visible(sample, console.file)}\n---\n")


def show_end(console: Console, folder: Path, prompt: str, record: Record, stopped_by: signal.Signals | None) -> None:
    """Prints where the run's results are, and the signal that stopped it, if any."""
    if stopped_by is not None:
        line(console, f"stopped by {stopped_by.name} after step {record.step}, saved as it stands")
    line(console, f"run    {folder}")
    line(console, f"more   fastgpt2 sample --checkpoint {shell_word(str(folder))} --prompt {shell_word(prompt)}")


def shell_word(text: str) -> str:
    """`text` quoted for bash and zsh, with unprintable characters escaped."""
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + "".join(c if c.isprintable() and c not in "\\'" else _escaped(c) for c in text) + "'"


def _escaped(c: str) -> str:
    known = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\", "'": "\\'"}
    return known.get(c, f"\\U{ord(c):08x}")
