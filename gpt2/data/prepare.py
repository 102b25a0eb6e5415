"""From text to a folder of token shards, on all cores, and on again after a kill.

    prepare(find_source("fineweb-edu"), "data/fineweb-edu")             # then: fastgpt2 train --data data/fineweb-edu

Documents are encoded in order, each ended by the tokenizer's end of text, and cut into shards of equal length; the
first tokens are validation, the rest is training. A shard appears whole, then the manifest lists it together with the
place in the source where the next one begins. So the same call after a kill makes the same files as one without.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt2.gpt2.data import shards
from fastgpt2.gpt2.data import tokenizer as tokenizers
from fastgpt2.gpt2.data.shards import Manifest
from fastgpt2.gpt2.data.sources import Piece, Position, Source
from fastgpt2.gpt2.data.tokenizer import Tokenizer
from fastgpt2.gpt2.data.vocabularies import FILES as TOKENIZER_FILES
from fastgpt2.gpt2.data.windows import Say, counted, encode, silent
from fastgpt2.gpt2.files import LOCK, exclusive, write_atomically

SHARD_TOKENS = 100_000_000
VAL_PART = 10  # of a source without a usual validation set: one token in so many of its first shard
INPUTS = "inputs.json"  # see `Source.inputs`
BATCHES_AHEAD = 4  # a process


def prepare(
    source: Source,
    out: str | Path,
    tokenizer: str = "gpt2",
    *,
    val_tokens: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    processes: int | None = None,
    report: Callable[[Manifest, int, int], None] = lambda manifest, n_documents, tokens: None,
    say: Say = silent,
) -> Manifest:
    """Writes shards, tokenizer and manifest into `out`; goes on where the same call was killed.

    tokenizer: see `tokenizers.from_spec`; "char" reads the source once more, before everything else.
    val_tokens: held out, from the beginning. Default: the source's own number, or a tenth of its first shard.
    processes: that encode; default: one a core. The files do not depend on it.
    report: called with the manifest so far, and how many documents and tokens are encoded so far.
    say: hears what is being done before that.
    Raises ValueError for a number out of range, a source too short for both splits, or a folder that was begun with
    other settings; FileExistsError for a folder with other files in it; BlockingIOError where another process is
    writing into it; and what the source raises.
    """
    out = Path(out)
    val_tokens = source.val_tokens if val_tokens is None else val_tokens
    processes = os.cpu_count() or 1 if processes is None else processes
    for name, value in (("val_tokens", val_tokens), ("shard_tokens", shard_tokens), ("processes", processes)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, allowed are whole numbers of at least 1")
    settings = {**source.describe(), "tokenizer": tokenizer, "val_tokens": val_tokens}
    settings["shard_tokens"] = shard_tokens
    manifest = _begun(out, settings, source)  # before a lock is put into somebody else's folder
    if manifest is not None and manifest.position is None:
        return manifest
    with exclusive(out):
        return _prepare(source, out, settings, processes, report, say)


def _prepare(
    source: Source,
    out: Path,
    settings: dict[str, Any],
    processes: int,
    report: Callable[[Manifest, int, int], None],
    say: Say,
) -> Manifest:
    tokenizer, val_tokens, shard_tokens = (settings[name] for name in ("tokenizer", "val_tokens", "shard_tokens"))
    manifest = _begun(out, settings, source)
    for half_written in out.glob(".*.tmp"):  # by a call that was killed
        half_written.unlink()
    if manifest is None:
        made = tokenizers.from_spec(tokenizer, counted(source.texts(), say))
        made.save(out)
        write_atomically(out / INPUTS, json.dumps(source.inputs(), indent=1) + "\n")
        start = {"source": None, "skip": 0, "documents": 0}
        manifest = Manifest(settings, made.vocab_size, made.end_of_text, position=start)
        manifest.save(out)
    if manifest.position is None:
        return manifest
    writer = _Writer(out, manifest, val_tokens, shard_tokens)
    n_documents, skip = manifest.position["documents"], manifest.position["skip"]
    for position, pieces, tokens in _encoded(out, source.batches(manifest.position["source"]), processes):
        writer.add(_Batch(tokens, position, skip, n_documents))
        n_documents, skip = n_documents + sum(ends for _, ends in pieces), 0
        report(writer.manifest, n_documents, writer.tokens)
    _check_inputs(out, source)  # what changed while it was read may be there twice or not at all
    return writer.finish(n_documents)


def _begun(out: Path, settings: dict[str, Any], source: Source) -> Manifest | None:
    """The manifest of a folder that these settings began, None for a new folder."""
    if (out / shards.MANIFEST).is_file():
        manifest = shards.read_manifest(out)
        if manifest.source.get("name") == source.name:
            _check_inputs(out, source)
        for name in sorted(settings.keys() | manifest.source.keys()):
            if manifest.source.get(name) != settings.get(name):
                raise ValueError(
                    f"{out} was begun with {name} {manifest.source.get(name)!r}, now it is {settings.get(name)!r}: "
                    "choose another folder, or delete it"
                )
        spec = settings["tokenizer"]
        if spec not in ("char", "byte", "gpt2") and tokenizers.from_spec(spec, []) != tokenizers.load(out):
            raise ValueError(f"{out} was begun with another vocabulary than {spec} holds now: choose another folder")
        return manifest
    ours = (INPUTS, *TOKENIZER_FILES, LOCK)
    if out.exists() and any(f.name not in ours and f.suffix != ".tmp" for f in out.iterdir()):
        raise FileExistsError(f"out is {str(out)!r}, which is not an empty folder: choose another")
    return None


def _check_inputs(out: Path, source: Source) -> None:
    """Raises ValueError naming a file that is not what it was when `out` was begun."""
    try:
        before = json.loads((out / INPUTS).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{out} does not say what it was made from: {error}; delete it and begin again") from None
    now = source.inputs()
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            how = "is gone" if name not in now else "is new" if name not in before else "was changed"
            raise ValueError(f"{name} {how} since {out} was begun: delete that folder, or choose another")


# ------------------------------------------------------------------------------------------------------ encoding


def _encoded(
    folder: Path, batches: Iterable[tuple[Position, list[Piece]]], processes: int
) -> Iterator[tuple[Position, list[Piece], np.ndarray]]:
    """Each batch with its tokens, in order. With `processes` 1, this process encodes them itself."""
    if processes == 1:
        made = tokenizers.load(folder)
        for position, pieces in batches:
            yield position, pieces, encode(pieces, made)
        return
    waiting: deque[tuple[Position, list[Piece], Future[np.ndarray]]] = deque()
    # Not forked: the hub's reader has threads.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, _start_process, (folder,)) as pool:
        try:
            for position, pieces in batches:
                waiting.append((position, pieces, pool.submit(_encode, pieces)))
                if len(waiting) >= processes * BATCHES_AHEAD:
                    position, pieces, future = waiting.popleft()
                    yield position, pieces, future.result()
            while waiting:
                position, pieces, future = waiting.popleft()
                yield position, pieces, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


_tokenizer: Tokenizer  # of a process of the pool


def _start_process(folder: Path) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizer = tokenizers.load(folder)


def _end_with_parent() -> None:
    """A killed parent says nothing to its pool, which would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(pieces: list[Piece]) -> np.ndarray:
    return encode(pieces, _tokenizer)


# ------------------------------------------------------------------------------------------------------- writing


@dataclasses.dataclass
class _Batch:
    """Tokens of which the first `skip` are written, where the source has them, how many documents are before them."""

    tokens: np.ndarray
    position: Position
    skip: int
    n_documents: int


class _Writer:
    """Collects tokens until they fill a shard: first those of validation, then of training."""

    def __init__(self, folder: Path, manifest: Manifest, val_tokens: int | None, shard_tokens: int):
        self.folder, self.manifest = folder, manifest
        self.val_tokens, self.shard_tokens = val_tokens, shard_tokens
        self._batches: deque[_Batch] = deque()
        self._waiting = 0
        self.tokens = sum(shard.tokens for split in shards.SPLITS for shard in manifest.shards(split))

    def add(self, batch: _Batch) -> None:
        self._batches.append(batch)
        self._waiting += len(batch.tokens) - batch.skip
        self.tokens += len(batch.tokens) - batch.skip
        if not self.manifest.val and self._waiting > (self.val_tokens or self.shard_tokens):
            self._write_validation()
        while self.manifest.val and self._waiting > self.shard_tokens:
            self._write("train", self.shard_tokens)

    def finish(self, n_documents: int) -> Manifest:
        """Writes what is left, and a manifest without a place to go on."""
        if not self.manifest.val:
            self._write_validation()
        if self._waiting:
            self._write("train", self._waiting)
        self.manifest = dataclasses.replace(self.manifest, n_documents=n_documents, position=None)
        self.manifest.save(self.folder)
        return self.manifest

    def _write_validation(self) -> None:
        count = self.val_tokens or min(self._waiting, self.shard_tokens) // VAL_PART
        if not 0 < count < self._waiting:
            raise ValueError(
                f"{self.manifest.source['name']} has {self._waiting} tokens, val_tokens is {count}: both validation "
                "and training need some"
            )
        self._write("val", count)

    def _write(self, split: str, count: int) -> None:
        """The next `count` tokens as shards; then the manifest, which makes them count."""
        written = list(self.manifest.shards(split))
        for first in range(0, count, self.shard_tokens):
            tokens = self._take(min(self.shard_tokens, count - first))
            written.append(shards.write_shard(self.folder, f"{split}_{len(written):05}.npy", tokens))
        next_batch = self._batches[0]
        position = {"source": next_batch.position, "skip": next_batch.skip, "documents": next_batch.n_documents}
        more: dict[str, Any] = {split: tuple(written), "position": position}
        self.manifest = dataclasses.replace(self.manifest, **more)
        self.manifest.save(self.folder)

    def _take(self, count: int) -> np.ndarray:
        self._waiting -= count
        parts = []
        while count:
            batch = self._batches[0]
            part = batch.tokens[batch.skip : batch.skip + count]
            batch.skip += len(part)
            count -= len(part)
            parts.append(part)
            if batch.skip == len(batch.tokens) and len(self._batches) > 1:
                self._batches.popleft()
        return np.concatenate(parts)
