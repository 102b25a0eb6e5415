"""Real text as one long array of tokens, and the windows of it that a model trains on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgpt2.gpt2.data.shards import Shards, Tokens, array_content
from fastgpt2.gpt2.data.sources import HUB, Piece, cut, find_source
from fastgpt2.gpt2.data.tokenizer import Tokenizer, token_dtype
from fastgpt2.gpt2.ops import IGNORED_TARGET

MAX_SEED = 2**31 - 1
Say = Callable[[str], None]  # hears what a long computation is at


def silent(stage: str) -> None:
    """A `Say` for those who do not want to know."""


@dataclass(frozen=True)
class Text:
    """documents: texts. name: what the console calls them. prompt: a few words that such a text could begin with."""

    name: str
    documents: list[str]
    prompt: str = "\n"


def read_text(source: str | Path | None = None, say: Say = silent) -> Text:
    """The documents of a file, of every file below a folder, or of Python's standard library, in memory.

    source: see `sources.find_source`. None: the library's own sources, the text that every machine has, some megabytes.
    say: hears how many documents were read.
    Raises FileNotFoundError for a source that is missing, ValueError for one that is empty or cannot be read.
    """
    if source in HUB:
        raise ValueError(f"data is {source!r}, which is large: give the folder that `fastgpt2 prepare` made of it")
    found = find_source(source)
    documents = list(counted(found.texts(), say))
    if not documents:
        raise ValueError(f"{found.name} holds no text: give a text, JSONL or Parquet file, or a folder of them")
    return Text(found.name, documents, found.prompt)


def counted(documents: Iterable[str], say: Say) -> Iterator[str]:
    """Passes documents on and says how many there were so far."""
    for number, document in enumerate(documents, start=1):
        say(f"{number:,} documents read")
        yield document


def encode_text(text: Text, tokenizer: Tokenizer, say: Say = silent) -> np.ndarray:
    """`encode` of all documents, long ones in pieces, as `prepare` has them. say: hears how much of it is done."""
    total, done = sum(map(len, text.documents)), 0
    parts = [encode([], tokenizer)]
    for piece in (piece for document in text.documents for piece in cut([document])):
        parts.append(encode([piece], tokenizer))
        done += len(piece[0])
        say(f"{done / total:.0%} of {total:,} characters encoded")
    return np.concatenate(parts)


def encode(pieces: Iterable[Piece], tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of all pieces, (N,). Each document is followed by the tokenizer's end of text, if there is such a
    token.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    end = np.array([] if tokenizer.end_of_text is None else [tokenizer.end_of_text], dtype)
    parts = [part for text, ends in pieces for part in (tokenizer.encode(text), end if ends else end[:0])]
    return np.concatenate([end[:0], *parts])


def check_tokens(tokens: Tokens, vocab_size: int) -> None:
    """Raises ValueError, naming the shard, for a token that a model of this vocabulary does not have."""
    shards = tokens if isinstance(tokens, Shards) else Shards([np.asarray(tokens)], ["the data"])
    if len(shards) == 0:
        return
    for name, largest in zip(shards.names, shards.maxima(), strict=True):
        if largest >= vocab_size:
            raise ValueError(f"{name} holds token {largest}, vocab_size is {vocab_size}: allowed are below it")


def split(tokens: np.ndarray, val_fraction: float, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation): the last `val_fraction` of the tokens is held out, but at least one window.

    Raises ValueError if either part is shorter than one window of block_size tokens and the one after it.
    """
    held_out = max(int(len(tokens) * val_fraction), block_size + 1)
    if len(tokens) - held_out < block_size + 1:
        raise ValueError(
            f"the data has {len(tokens)} tokens; training and validation at block_size {block_size} need at least "
            f"{2 * (block_size + 1)}: give more text, or a smaller block_size"
        )
    return tokens[:-held_out], tokens[-held_out:]


class Windows:
    """Windows of block_size tokens, every one once an epoch, in an order that seed and epoch alone decide.

        windows = Windows(tokens, block_size, seed, rank, world_size)
        idx, targets = windows.next_batch(batch_size)           # this rank's part of the next global batch
        windows.load_state_dict(state)                          # what state_dict() gave, on any number of ranks

    The windows of one epoch do not overlap; their common offset changes from epoch to epoch, so that the tokens after
    the last whole window have their turn. A batch goes on into the next epoch where one ends.
    Ranks are disjoint: of each batch_size * world_size windows rank r gets the r-th batch_size. So N passes of one
    process see the same windows as one pass of each of N. `position`, the number of windows that all ranks together
    have given out, is the whole state: setting it goes to that place.
    Raises ValueError for tokens shorter than one window and for a seed or a rank out of range.
    """

    def __init__(self, tokens: Tokens, block_size: int, seed: int, rank: int = 0, world_size: int = 1):
        _check_length(tokens, block_size)
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed is {seed}, allowed are 0..{MAX_SEED}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, allowed are 0..{world_size - 1}: world_size is {world_size}")
        self.tokens, self.block_size, self.seed = tokens, block_size, seed
        self.rank, self.world_size = rank, world_size
        self.position = 0
        self.content = content(tokens)
        # One window fewer than fit, so that the offset has room.
        self.per_epoch = max(1, (len(tokens) - 1) // block_size - 1)
        self._epoch = -1

    def next_batch(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """idx and targets of this rank, (B, T) int64: targets are idx one token later."""
        first = self.position + self.rank * batch_size
        starts = [self._start(first + i) for i in range(batch_size)]
        self.position += batch_size * self.world_size
        return _batch(self.tokens, starts, self.block_size)

    def state_dict(self) -> dict[str, int]:
        """The position, and what it is a position in. Numbers that JSON holds; the same on every rank."""
        return {"position": self.position, **self._order_of()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes to the place of `state`. Raises ValueError if that was in other data or another order."""
        for name, value in self._order_of().items():
            if state.get(name, value) != value:
                raise ValueError(f"{name} of the data is {value}, the saved position has {state[name]}")
        self.position = state["position"]

    def _order_of(self) -> dict[str, int]:
        lengths = {"seed": self.seed, "block_size": self.block_size, "tokens": len(self.tokens)}
        return {**lengths, "content": self.content}

    def _start(self, position: int) -> int:
        epoch, i = divmod(position, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._epoch_seed(epoch))
            room = len(self.tokens) - 1 - self.per_epoch * self.block_size
            self._offset = int(torch.randint(room + 1, (), generator=generator))
            self._order = torch.randperm(self.per_epoch, generator=generator)
            self._epoch = epoch
        return self._offset + int(self._order[i]) * self.block_size

    def _epoch_seed(self, epoch: int) -> int:
        """The seed's draw number `epoch`. (Not seed and epoch as one number: a CPU generator keeps 32 bits of it.)"""
        generator = torch.Generator().manual_seed(self.seed)
        return int(torch.randint(MAX_SEED, (epoch + 1,), generator=generator)[-1])


def content(tokens: Tokens) -> int:
    """A checksum of all tokens. See `Shards.content`."""
    return tokens.content() if isinstance(tokens, Shards) else array_content(np.asarray(tokens))


def _check_length(tokens: Tokens, block_size: int) -> None:
    if len(tokens) < block_size + 1:
        name = "the data"
        if isinstance(tokens, Shards):
            name = tokens.names[0] + f" and {len(tokens.names) - 1} more shards" * (len(tokens.names) > 1)
        raise ValueError(f"{name} has {len(tokens)} tokens, one window of block_size {block_size} needs one more")


def document_starts(idx: Tensor, end_of_text: int) -> Tensor:
    """Where documents begin in idx (B, T): (n + 1,) int32, places in the flattened idx and, as the last number, B*T.
    GPT takes it as `document_starts`.

    An end of text is the first token of the document after it. The first token of each row begins a document, too.
    """
    begins = idx == end_of_text
    begins[:, 0] = True
    places = begins.flatten().nonzero().flatten()
    return torch.cat([places, places.new_tensor([idx.numel()])]).to(torch.int32)


def eval_batches(
    tokens: Tokens, block_size: int, batch_size: int, windows: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Always the same windows, at most `windows`, spread evenly over `tokens` and not overlapping, in batches.

    The windows are the same for any batch_size and world_size. Rank r gets the batches number r, r + world_size, and so
    on. All ranks get equally many batches: a rank for which no window is left gets one whose targets are all ignored.
    Raises ValueError for tokens shorter than one window.
    """
    _check_length(tokens, block_size)
    available = (len(tokens) - 1) // block_size
    count = min(available, windows)
    starts = [i * available // count * block_size for i in range(count)]
    for first in range(0, count, world_size * batch_size):
        mine = starts[first + rank * batch_size :][:batch_size]
        idx, targets = _batch(tokens, mine or starts[:1], block_size)
        yield idx, targets if mine else torch.full_like(targets, IGNORED_TARGET)


def strided(tokens: Tokens, block_size: int, stride: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All of `tokens` as (idx, targets), (B, T) int64 each: every token but the first is a target once, else ignored.

    A window begins `stride` tokens after the one before it, so that every token but those of the first window is
    predicted from at least block_size - stride tokens. T is block_size, or less for a shorter text.
    """
    if not 1 <= stride <= block_size:
        raise ValueError(f"stride is {stride}, allowed are 1..{block_size}: block_size is {block_size}")
    last = len(tokens) - 1  # targets are tokens 1..last
    if last < 1:
        raise ValueError(f"the text has {len(tokens)} tokens: to predict one, give at least two")
    T = min(block_size, last)
    starts = [*range(0, last - T, stride), last - T]
    new = [T, *(b - a for a, b in zip(starts, starts[1:], strict=False))]  # targets that no window before has
    for first in range(0, len(starts), batch_size):
        idx, targets = _batch(tokens, starts[first : first + batch_size], T)
        seen = torch.tensor([T - n for n in new[first : first + batch_size]])[:, None]
        yield idx, targets.masked_fill(torch.arange(T) < seen, IGNORED_TARGET)


def _batch(tokens: Tokens, starts: list[int], block_size: int) -> tuple[Tensor, Tensor]:
    rows = np.stack([tokens[s : s + block_size + 1] for s in starts]).astype(np.int64)
    both = torch.from_numpy(rows)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()
