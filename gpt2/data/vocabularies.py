"""Text to tokens and back: characters, bytes, GPT-2's byte-pair encoding, and any vocabulary of HuggingFace's.

    ids = tokenizer.encode(text)        # (N,) uint16 or uint32, as narrow as the vocabulary allows
    text = tokenizer.decode(ids)
    tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.special_tokens, tokenizer.save(folder)

All are saved as HuggingFace's tokenizer.json, so `transformers` reads a checkpoint's tokenizer as well. GPT-2's
algorithm is tiktoken's here, whatever the vocabulary: its encoding is three to four times as fast as that of
HuggingFace's `tokenizers` (AMD EPYC, one thread: 5.4 against 1.3 MB/s). That library does everything else.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgpt2.gpt2.files import write_atomically

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
TOKENIZER_JSON, TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
VOCAB, MERGES, ADDED_TOKENS = "vocab.json", "merges.txt", "added_tokens.json"
# All that belongs to a tokenizer in HuggingFace's folders, in the order in which it is written.
FILES = (TOKENIZER_JSON, VOCAB, MERGES, ADDED_TOKENS, SPECIAL_TOKENS, "chat_template.jinja", TOKENIZER_CONFIG)
# The splits before any merge, from openai/gpt-2, src/encoder.py.
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# Whitespace that tiktoken's regular expressions give up on when it is a million long; \x1c..\x1f are none to them.
_LONG_SPACE = re.compile(r"(?<![^\S\x1c-\x1f])[^\S\x1c-\x1f]{10000,}")

Detokenizer = Callable[[Iterable[int], bool], str]


class Tokenizer(ABC):
    """One vocabulary. Tokens are 0..vocab_size-1.

    end_of_text: the token that ends a document, None where there is no such token.
    special_tokens: names of tokens that stand for no text, such as <|endoftext|>, each with its token.
    files: what `save` writes instead of files of its own, by name; set for a vocabulary that was read from a folder.
    """

    vocab_size: int
    end_of_text: int | None = None
    special_tokens: Mapping[str, int] = {}
    files: Mapping[str, bytes] = {}

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Tokens of `text`, (N,). The name of a special token is read as ordinary characters."""

    def encode_with_special(self, text: str) -> np.ndarray:
        """As `encode`, but where the name of a special token stands, that token is meant.

        Raises ValueError for a tokenizer without special tokens.
        """
        if not self.special_tokens:
            raise ValueError("special_tokens is set, and the tokenizer has no special tokens")
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)  # text, name, text, ..., text
        token = self.special_tokens
        ids = [np.array([token[part]]) if i % 2 else self.encode(part) for i, part in enumerate(parts)]
        return np.concatenate(ids).astype(token_dtype(self.vocab_size))

    def unknown(self, text: str) -> str:
        """The characters of `text` that have no token, each once."""
        return ""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`. Raises ValueError for an id outside the vocabulary."""

    @abstractmethod
    def detokenizer(self, prompt: Iterable[int] = ()) -> Detokenizer:
        """`decode` for tokens that come one after another, behind those of `prompt`.

        detokenizer(ids, final) returns the text that is certain by now: a character is held back until it is whole or,
        with final, no token follows. All that it returns together is what `decode` adds to the prompt's text.
        """

    @abstractmethod
    def _library(self) -> tokenizers.Tokenizer:
        """The same vocabulary in HuggingFace's library, to be saved."""

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, which `load` and transformers read, and tokenizer_config.json, which names it to
        transformers. A tokenizer that was read from a folder is written as it was there, byte for byte. Files of
        another tokenizer that lies in `folder` are removed."""
        files = self.files or self.own_files()
        for name in FILES:
            if name not in files:
                (Path(folder) / name).unlink(missing_ok=True)
        for name, content in files.items():
            write_atomically(Path(folder) / name, content)

    def own_files(self) -> dict[str, bytes]:
        """What `save` writes for a vocabulary that was read from no folder."""
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if self.end_of_text is not None:
            settings["eos_token"] = END_OF_TEXT
        saved = self._library().to_str(pretty=True)
        return {TOKENIZER_JSON: saved.encode(), TOKENIZER_CONFIG: json.dumps(settings, indent=1).encode()}

    @abstractmethod
    def _content(self) -> Any:
        """What decides which tokens a text has."""

    def __eq__(self, other: object) -> bool:
        """Whether both give every text the same tokens."""
        return type(self) is type(other) and self._content() == other._content()  # type: ignore[attr-defined]

    def _checked(self, ids: Iterable[int]) -> np.ndarray:
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
        wrong = array[(array < 0) | (array >= self.vocab_size)]
        if wrong.size:
            raise ValueError(f"ids holds token {wrong[0]}, allowed are 0..{self.vocab_size - 1}")
        return array


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The narrowest dtype that tokens are kept in."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


class CharTokenizer(Tokenizer):
    """One token a character (Unicode code point). Token 0 stands for every character that is not in `characters`."""

    def __init__(self, characters: str):
        self.characters = characters
        self.vocab_size = 1 + len(characters)
        codes = _code_points(characters)
        if len(set(characters) - {UNKNOWN}) != len(characters):
            raise ValueError(f"characters holds one twice, or {UNKNOWN!r}, which stands for unknown ones")
        self._codes = np.concatenate([_code_points(UNKNOWN), codes])  # token -> code point
        self._tokens = np.zeros(0x110000, token_dtype(self.vocab_size))  # code point -> token
        self._tokens[codes] = np.arange(1, self.vocab_size)

    @classmethod
    def from_text(cls, texts: Iterable[str], coverage: float = 0.9999) -> CharTokenizer:
        """The most frequent characters that together make up `coverage` of `texts`; the rare rest is unknown."""
        counts: np.ndarray = np.zeros(0x110000, np.int64)
        for text in texts:
            codes, found = np.unique(_code_points(text), return_counts=True)
            counts[codes] += found
        counts[ord(UNKNOWN)] = 0
        codes = np.flatnonzero(counts)
        codes = codes[np.argsort(-counts[codes], kind="stable")]
        before = np.cumsum(counts[codes]) - counts[codes]
        return cls(_text(np.sort(codes[before < coverage * counts.sum()])))

    def encode(self, text: str) -> np.ndarray:
        return self._tokens[_code_points(text)]

    def unknown(self, text: str) -> str:
        return "".join(c for c in dict.fromkeys(text) if self._tokens[ord(c)] == 0 and c != UNKNOWN)

    def decode(self, ids: Iterable[int]) -> str:
        return _text(self._codes[self._checked(ids)])

    def detokenizer(self, prompt: Iterable[int] = ()) -> Detokenizer:
        return lambda ids, final: self.decode(ids)

    def _library(self) -> tokenizers.Tokenizer:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        vocab = {UNKNOWN: 0, **{c: i for i, c in enumerate(self.characters, start=1)}}
        made = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        made.decoder = decoders.Fuse()
        return made

    def _content(self) -> str:
        return self.characters


class ByteTokenizer(Tokenizer):
    """One token a byte of UTF-8: nothing is unknown, and nothing has to be learned from a text."""

    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._checked(ids).astype(np.uint8).tobytes()

    def detokenizer(self, prompt: Iterable[int] = ()) -> Detokenizer:
        return _utf8_detokenizer(self.decode_bytes)

    def _library(self) -> tokenizers.Tokenizer:
        from tokenizers import models

        return byte_level(models.BPE({name: byte for byte, name in printable().items()}, []), use_regex=False)

    def _content(self) -> None:
        return None


class BPETokenizer(Tokenizer):
    """GPT-2's byte-pair encoding with any vocabulary: `ranks` gives every token's id, which is also its priority.

    `<|endoftext|>` has the id after the last.
    """

    def __init__(self, ranks: dict[bytes, int]):
        import tiktoken

        if missing := [b for b in range(256) if bytes([b]) not in ranks]:
            raise ValueError(f"the vocabulary has no token for byte {missing[0]}; all 256 are needed")
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(f"the vocabulary's {len(ranks)} tokens are not numbered 0..{len(ranks) - 1}")
        self.ranks = ranks
        self.vocab_size = len(ranks) + 1
        self.end_of_text = len(ranks)
        self.special_tokens = {END_OF_TEXT: self.end_of_text}
        self._encoding = tiktoken.Encoding(
            "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=dict(self.special_tokens)
        )

    def encode(self, text: str) -> np.ndarray:
        ids: list[int] = []
        done = 0
        for run in _LONG_SPACE.finditer(text):
            end = run.end() - (run.end() < len(text))  # as GPT2_PATTERN has it, the last one goes with what follows
            ids += self._encoding.encode_ordinary(text[done : run.start()])
            ids += self._encoding._encode_single_piece(text[run.start() : end])
            done = end
        ids += self._encoding.encode_ordinary(text[done:])
        return np.array(ids, token_dtype(self.vocab_size))

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes(self._checked(ids).tolist())

    def detokenizer(self, prompt: Iterable[int] = ()) -> Detokenizer:
        return _utf8_detokenizer(self.decode_bytes)

    def _library(self) -> tokenizers.Tokenizer:
        from tokenizers import models

        names = {token: "".join(printable()[b] for b in token) for token in self.ranks}
        merges = [_last_merge(token, self.ranks) for token in self.ranks if len(token) > 1]
        vocab = {name: self.ranks[token] for token, name in names.items()}
        made = byte_level(models.BPE(vocab, [(names[a], names[b]) for a, b in merges]), use_regex=True)
        made.add_special_tokens([END_OF_TEXT])
        return made

    def _content(self) -> dict[bytes, int]:
        return self.ranks


class LibraryTokenizer(Tokenizer):
    """Any other vocabulary, by HuggingFace's `tokenizers`: special tokens before all others, Unigram, WordPiece, ...

    library: is changed: it neither pads nor cuts texts, and reads names of special tokens as ordinary characters.
    end_of_text: the name of the token, None where there is none.
    A text may come back changed, as a vocabulary of small letters changes it.
    """

    def __init__(self, library: tokenizers.Tokenizer, end_of_text: str | None = None):
        library.no_padding()
        library.no_truncation()
        library.encode_special_tokens = True
        added = library.get_added_tokens_decoder()
        self.library = library
        self.vocab_size = 1 + max(library.get_vocab(with_added_tokens=True).values())
        self.end_of_text = None if end_of_text is None else library.token_to_id(end_of_text)
        self.special_tokens = {token.content: i for i, token in added.items() if token.special}
        unknown = getattr(library.model, "unk_token", None)
        self._unknown = None if unknown is None else library.token_to_id(unknown)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._ids(text), token_dtype(self.vocab_size))

    def _ids(self, text: str) -> list[int]:
        return self.library.encode(text, add_special_tokens=False).ids

    def unknown(self, text: str) -> str:
        ids = ((c, self._ids(c)) for c in dict.fromkeys(text) if not c.isspace())
        return "".join(c for c, found in ids if not found or self._unknown in found)

    def decode(self, ids: Iterable[int]) -> str:
        return self.library.decode(self._checked(ids).tolist(), skip_special_tokens=False)

    def detokenizer(self, prompt: Iterable[int] = ()) -> Detokenizer:
        return _Stream(self, list(prompt))

    def _library(self) -> tokenizers.Tokenizer:
        return self.library

    def _content(self) -> Any:
        return json.loads(self.library.to_str())


class _Stream:
    """A `Detokenizer` by the library's own."""

    def __init__(self, tokenizer: LibraryTokenizer, prompt: list[int]):
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._ids = tokenizer, prompt
        self._stream = DecodeStream(skip_special_tokens=False)
        for token in prompt:
            self._stream.step(tokenizer.library, token)
        self._given = len(tokenizer.decode(prompt))

    def __call__(self, ids: Iterable[int], final: bool) -> str:
        new = self._tokenizer._checked(ids).tolist()
        self._ids += new
        piece = "".join(self._stream.step(self._tokenizer.library, token) or "" for token in new)
        if final:  # the library's stream has no end: what it still holds back is what the whole text has more
            piece = self._tokenizer.decode(self._ids)[self._given :]
        self._given += len(piece)
        return piece


# ------------------------------------------------------------------------------------------------------- helpers


def _utf8_detokenizer(decode_bytes: Callable[[Iterable[int]], bytes]) -> Detokenizer:
    codec = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return lambda ids, final: codec.decode(decode_bytes(ids), final)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)


def _text(codes: np.ndarray) -> str:
    return codes.astype("<u4").tobytes().decode("utf-32-le", errors="surrogatepass")


@functools.cache
def printable() -> dict[int, str]:
    """Bytes as the characters that vocab.json and merges.txt write for them (openai/gpt-2, bytes_to_unicode)."""
    shown = {b: chr(b) for b in range(256) if chr(b).isprintable() and chr(b) != " "}
    hidden = [b for b in range(256) if b not in shown]
    return shown | {b: chr(256 + i) for i, b in enumerate(hidden)}


def byte_level(model: tokenizers.models.BPE, use_regex: bool) -> tokenizers.Tokenizer:
    """Byte-pair encoding of bytes, as GPT-2 has it. use_regex: split texts into words first."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    made.decoder = decoders.ByteLevel()
    return made


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that `token` is merged from: merge its bytes by rank until two parts are left."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:], strict=False)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]
