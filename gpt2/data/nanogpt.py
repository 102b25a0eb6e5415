"""meta.pkl, the vocabulary that lies beside nanoGPT's shards of characters: read without running any of it.

    {"vocab_size": 65, "stoi": {"\\n": 0, " ": 1, ...}, "itos": {0: "\\n", 1: " ", ...}}

A pickle is a program. This one's instructions are looked at first, and only those that make dictionaries, lists, text
and whole numbers are let through: none that names code, none that takes memory which the file does not fill.
Source: karpathy/nanoGPT, data/shakespeare_char/prepare.py.
"""

from __future__ import annotations

import pickle
import pickletools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgpt2.gpt2.data.vocabularies import UNKNOWN, CharTokenizer

if TYPE_CHECKING:
    import tokenizers

META = "meta.pkl"
LARGEST_BYTES = 2**26  # a dictionary of every character there is takes less
INSTRUCTIONS = {
    *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET"),
    *("EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "LIST", "APPEND", "APPENDS"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"),
}


class KnownCharTokenizer(CharTokenizer):
    """One token a character, from 0, and none for any other character: a text with one is refused."""

    def __init__(self, characters: str):
        super().__init__(characters)
        self.vocab_size = len(characters)
        self._codes = self._codes[1:]  # without the token for unknown ones

    def encode(self, text: str) -> np.ndarray:
        tokens = super().encode(text)
        if not tokens.all():
            wrong = self.unknown(text)[0]
            raise ValueError(f"the text holds {wrong!r}, none of the vocabulary's {self.vocab_size} characters")
        return tokens - 1

    def unknown(self, text: str) -> str:
        return super().unknown(text) + UNKNOWN * (UNKNOWN in text)

    def _library(self) -> tokenizers.Tokenizer:
        from tokenizers import models

        made = super()._library()
        made.model = models.WordLevel({c: i for i, c in enumerate(self.characters)}, unk_token=UNKNOWN)
        return made


def read_meta(path: Path) -> KnownCharTokenizer:
    """Raises ValueError, naming the file, for anything else than nanoGPT's vocabulary of characters."""
    content = _unpickled(path)
    stoi, itos = (content.get(name) if isinstance(content, dict) else None for name in ("stoi", "itos"))
    if not isinstance(stoi, dict) or not isinstance(itos, dict):
        raise ValueError(f"{path} is no vocabulary of nanoGPT's: it has no dictionaries stoi and itos")
    characters: list[Any] = [itos.get(i) for i in range(len(itos))]
    if not all(isinstance(c, str) and len(c) == 1 for c in characters):
        raise ValueError(f"{path}: itos does not give each of 0..{len(itos) - 1} one character")
    if stoi != {c: i for i, c in enumerate(characters)} or content.get("vocab_size", len(itos)) != len(itos):
        raise ValueError(f"{path}: stoi, itos and vocab_size do not belong together")
    try:
        return KnownCharTokenizer("".join(characters))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _unpickled(path: Path) -> Any:
    if path.stat().st_size > LARGEST_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, a vocabulary of characters has up to {LARGEST_BYTES}"
        )
    content = path.read_bytes()
    try:
        for instruction, argument, _ in pickletools.genops(content):
            if instruction.name not in INSTRUCTIONS:
                raise ValueError(f"it holds {instruction.name}, and not only dictionaries, lists, text and numbers")
            if instruction.name.endswith("PUT") and (argument or 0) > len(content):
                raise ValueError(f"it puts something at place {argument}")
        return pickle.loads(content)
    except Exception as error:  # damaged files raise anything
        raise ValueError(f"{path} is no vocabulary of nanoGPT's, is it cut short? ({error})") from None
