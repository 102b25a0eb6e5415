"""`fastgpt2 prepare`: text to token shards, from the command line."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastgpt2.gpt2.command_line import parse
from fastgpt2.gpt2.data import sources
from fastgpt2.gpt2.data.prepare import SHARD_TOKENS, prepare
from fastgpt2.gpt2.data.shards import Manifest
from fastgpt2.gpt2.options import CommandOptions, Folder, Source, about
from fastgpt2.gpt2.output import run_console
from fastgpt2.gpt2.training.progress import LINE_EVERY_S, QUIET_S, line, shell_word


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Encodes text into token shards with a checksummed manifest, which `fastgpt2 train --data` reads. After a kill the
    same command goes on where it was.
    """

    source: Annotated[
        tuple[Source, ...],
        about(
            f"{', '.join(sources.HUB)} (from the HuggingFace hub), python (Python's own sources), or files and folders "
            "of text, .jsonl and .parquet with a field text"
        ),
    ] = ("python",)
    out: Folder  # where the shards go
    # gpt2, char, byte, or a vocabulary: a folder with HuggingFace's files, or tiktoken's ranks
    tokenizer: Source = "gpt2"
    # tokens held out for validation, from the beginning; None: 100,000,000 of fineweb-edu, 4,400,000 of openwebtext, a
    # tenth of the first shard of others
    val_tokens: int | None = None
    shard_tokens: int = SHARD_TOKENS  # tokens of a shard
    processes: int | None = None  # processes that encode; None: one a core


def main(argv: Sequence[str]) -> int:
    """Writes the shards, or goes on with them; returns 0."""
    args = parse(Options, argv, "fastgpt2 prepare")
    console = run_console()
    source = sources.find_source(*args.source)
    line(console, f"from    {source.name}, {args.tokenizer} tokens")
    with _Bar(console, source) as bar:
        manifest = prepare(
            source,
            args.out,
            args.tokenizer,
            val_tokens=args.val_tokens,
            shard_tokens=args.shard_tokens,
            processes=args.processes,
            report=bar.show,
            say=bar.say,
        )
    train, val = (sum(shard.tokens for shard in part) for part in (manifest.train, manifest.val))
    line(console, f"folder  {args.out}: {manifest.n_documents:,} documents, vocabulary {manifest.vocab_size}")
    line(console, f"tokens  {train:,} in {len(manifest.train)} training shards, {val:,} for validation")
    line(console, f"next    fastgpt2 train --data {shell_word(args.out)}")
    return 0


class _Bar:
    """Documents and tokens so far: a bar on a terminal, lines elsewhere, one a shard and now and then one between."""

    def __init__(self, console: Console, source: sources.Source):
        self._console, self._source = console, source
        self._bar = Progress(
            TextColumn("documents"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[tokens]} tokens  {task.fields[rate]} tokens/s  shard {task.fields[shard]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("prepare", total=None, tokens="-", rate="-", shard="-")
        self._start: tuple[float, int] | None = None
        self._shards = 0
        self._due = time.monotonic() + QUIET_S

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(self, manifest: Manifest, n_documents: int, tokens: int) -> None:
        now = time.perf_counter()
        started, before = self._start = self._start or (now, tokens)
        rate = f"{(tokens - before) / (now - started):,.0f}" if now > started else "-"
        shards = len(manifest.val) + len(manifest.train)
        total = self._source.n_documents
        self._bar.update(
            self._task, completed=n_documents, total=total, tokens=f"{tokens:,}", rate=rate, shard=str(shards)
        )
        if not self._console.is_terminal:
            so_far = f"{n_documents:,} documents, {tokens:,} tokens so far"
            if shards > self._shards:
                line(self._console, f"shard {shards:>5}: {so_far}")
            else:
                self.say(so_far)
        self._shards = shards

    def say(self, stage: str) -> None:
        """A line about what is being done, the first after two seconds, then one every ten."""
        if (now := time.monotonic()) >= self._due:
            line(self._console, f"at      {stage}")
            self._due = now + LINE_EVERY_S
