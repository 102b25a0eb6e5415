"""What a run trains on: tokens to learn from, tokens held out, and the tokenizer that made them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt2.gpt2.data import shards, windows
from fastgpt2.gpt2.data import tokenizer as tokenizers
from fastgpt2.gpt2.data.shards import Tokens
from fastgpt2.gpt2.data.tokenizer import Tokenizer
from fastgpt2.gpt2.data.windows import Say, silent


@dataclass(frozen=True)
class Corpus:
    """n_documents: None where it is not known. prompt: a few words that such a text could begin with."""

    name: str
    n_documents: int | None
    train: Tokens
    val: Tokens
    tokenizer: Tokenizer
    prompt: str = "\n"


def load_corpus(
    source: str | None,
    tokenizer: str | None,
    val_fraction: float,
    block_size: int,
    *,
    text_tokenizer: str | Callable[[], Tokenizer] = "char",
    rank: int = 0,
    world_size: int = 1,
    say: Say = silent,
) -> Corpus:
    """Token shards where `source` is a folder of them, else text, encoded here.

    source: see `windows.read_text` and `shards.open_tokens`. val_fraction: of a text; shards have a split of their own.
    tokenizer: see `tokenizers.from_spec`. None: the one that lies beside the shards; `text_tokenizer` for text, and for
        shards without a tokenizer.
    text_tokenizer: a name, or makes that of the model which is trained; "char" is then that one, if it is one.
    rank, world_size: of this process, among those that read the same shards.
    say: hears what is being done, for somebody who waits.
    Raises OSError or ValueError, naming the file, for data that cannot be used, for another tokenizer than the one that
    lies beside the shards, and for tokens outside its vocabulary.
    """
    if source is not None and Path(source).is_file() and Path(source).suffix in shards.SUFFIXES:
        raise ValueError(
            f"{source} is a file of tokens: give its folder, whose files have train and val in their names"
        )
    if source is None or not shards.holds_tokens(source):
        text = windows.read_text(source, say)
        say("finding the tokenizer")
        made = _named(tokenizer, text_tokenizer, text.documents)
        tokens = windows.encode_text(text, made, say)
        train, val = windows.split(tokens, val_fraction, block_size)
        return Corpus(text.name, len(text.documents), train, val, made, _known(text.prompt, train, made))
    made = shards_tokenizer(source, tokenizer, text_tokenizer)
    place: dict[str, Any] = dict(rank=rank, world_size=world_size, say=say)
    parts = {split: shards.open_tokens(source, split, **place) for split in shards.SPLITS}
    say("looking at every token")  # of shards without a manifest
    for part in parts.values():
        windows.check_tokens(part, made.vocab_size)
    n_documents = shards.read_manifest(source).n_documents if (Path(source) / shards.MANIFEST).is_file() else None
    return Corpus(source, n_documents, parts["train"], parts["val"], made, _known("\n", parts["train"], made))


def _named(spec: str | None, otherwise: str | Callable[[], Tokenizer], texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that `spec` names, where it names none `otherwise`."""
    if isinstance(otherwise, str):
        return tokenizers.from_spec(spec or otherwise, texts)
    if spec is None or (spec == "char" and tokenizers.is_named(spec, otherwise())):
        return otherwise()
    return tokenizers.from_spec(spec, texts)


def shards_tokenizer(folder: str, spec: str | None, otherwise: str | Callable[[], Tokenizer] = "char") -> Tokenizer:
    """The tokenizer that lies beside the shards of `folder`. If none lies there, the one that `spec` or else
    `otherwise` names. Raises ValueError if one lies there and `spec` names another.
    """
    try:
        made = tokenizers.load(folder)
    except FileNotFoundError:
        if not isinstance(otherwise, str) or (spec or otherwise) != "char":
            return _named(spec, otherwise, [])
        raise ValueError(
            f"{folder} holds tokens without their tokenizer, and tokenizer is 'char', which is made from text: "
            "name the one they were made with, such as gpt2"
        ) from None
    if spec is not None and not tokenizers.is_named(spec, made):
        raise ValueError(
            f"tokenizer is {spec!r}, and {folder} was encoded by another one, which lies there: leave tokenizer out"
        )
    return made


def _known(prompt: str, tokens: Tokens, tokenizer: Tokenizer) -> str:
    """`prompt`, or the first token of the text if the tokenizer lacks a character of `prompt`."""
    return tokenizer.decode(tokens[:1]) if tokenizer.unknown(prompt) else prompt
