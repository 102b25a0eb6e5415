"""Text to tokens and back: characters, bytes, or GPT-2's byte-pair encoding (through tiktoken).

    ids = tokenizer.encode(text)        # (N,) uint16 or uint32, as narrow as the vocabulary allows
    text = tokenizer.decode(ids)
    tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.save(folder);  load(folder)

All three are written as HuggingFace's tokenizer.json, so `transformers` reads a checkpoint's tokenizer as well.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import functools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt2.gpt2.files import write_atomically

GPT2_VOCAB_SIZE = 50257
END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
GPT2_SAYS = {"Hello world": [15496, 995], ", the": [11, 262]}  # no other vocabulary of that size does
# The splits before any merge, from openai/gpt-2, src/encoder.py.
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# Whitespace that tiktoken's regular expressions give up on when it is a million long; \x1c..\x1f are none to them.
_LONG_SPACE = re.compile(r"(?<![^\S\x1c-\x1f])[^\S\x1c-\x1f]{10000,}")
OFFLINE_HELP = (
    "give a local copy: --tokenizer FOLDER with HuggingFace's vocab.json and merges.txt (or tokenizer.json), "
    "or --tokenizer FILE with tiktoken's ranks"
)


class Tokenizer(ABC):
    """One vocabulary. Tokens are 0..vocab_size-1; `end_of_text` ends a document, None where there is no such token."""

    vocab_size: int
    end_of_text: int | None = None

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Tokens of `text`, (N,)."""

    def unknown(self, text: str) -> str:
        """The characters of `text` that have no token, each once."""
        return ""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`. Raises ValueError for an id outside the vocabulary."""

    @abstractmethod
    def decoder(self) -> Callable[[Iterable[int], bool], str]:
        """`decode` for tokens that come one after another: decoder(ids, final) is the text that is certain by now.

        A character is held back until it is whole or, with final, nothing follows; what is given in all is `decode`'s.
        """

    @abstractmethod
    def _model(self) -> dict[str, Any]:
        """The entries of tokenizer.json that differ between tokenizers."""

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, which `load` and transformers read, and what tells transformers to read it."""
        folder = Path(folder)
        empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
        content = {"version": "1.0", "added_tokens": [], **empty, **self._model()}
        write_atomically(folder / "tokenizer.json", json.dumps(content, ensure_ascii=False, indent=1))
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if self.end_of_text is not None:
            settings["eos_token"] = END_OF_TEXT
        write_atomically(folder / "tokenizer_config.json", json.dumps(settings, indent=1))

    def __eq__(self, other: object) -> bool:
        """Whether both give every text the same tokens."""
        return type(self) is type(other) and self._model() == other._model()  # type: ignore[attr-defined]

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

    def decoder(self) -> Callable[[Iterable[int], bool], str]:
        return lambda ids, final: self.decode(ids)

    def _model(self) -> dict[str, Any]:
        vocab = {UNKNOWN: 0, **{c: i for i, c in enumerate(self.characters, start=1)}}
        split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": UNKNOWN}
        return {"pre_tokenizer": split, "decoder": {"type": "Fuse"}, "model": model}


class ByteTokenizer(Tokenizer):
    """One token a byte of UTF-8: nothing is unknown, and nothing has to be learned from a text."""

    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._checked(ids).astype(np.uint8).tobytes()

    def decoder(self) -> Callable[[Iterable[int], bool], str]:
        return _utf8_decoder(self.decode_bytes)

    def _model(self) -> dict[str, Any]:
        return _byte_level({_printable()[b]: b for b in range(256)}, merges=[], use_regex=False)


class BPETokenizer(Tokenizer):
    """GPT-2's byte-pair encoding with any vocabulary: `ranks` gives every token's id, which is also its priority.

    `<|endoftext|>` has the id after the last. It is never made from text: `encode` reads it as ordinary characters.
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
        self._encoding = tiktoken.Encoding(
            "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: self.end_of_text}
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

    def decoder(self) -> Callable[[Iterable[int], bool], str]:
        return _utf8_decoder(self.decode_bytes)

    def _model(self) -> dict[str, Any]:
        names = {token: "".join(_printable()[b] for b in token) for token in self.ranks}
        merges = [[names[part] for part in _last_merge(token, self.ranks)] for token in self.ranks if len(token) > 1]
        vocab = {name: self.ranks[token] for token, name in names.items()}
        special = dict(id=self.end_of_text, content=END_OF_TEXT, special=True)
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        return {"added_tokens": [{**special, **flags}], **_byte_level(vocab, merges, use_regex=True)}


# ------------------------------------------------------------------------------------------------------- reading


def from_spec(spec: str, texts: Iterable[str]) -> Tokenizer:
    """ "char" (made from `texts`), "byte", "gpt2", or a path: a folder with a vocabulary, or a file of ranks."""
    if spec == "char":
        return CharTokenizer.from_text(texts)
    if spec == "byte":
        return ByteTokenizer()
    if spec == "gpt2":
        return gpt2()
    path = Path(spec)
    if path.is_dir():
        return load(path)
    if path.is_file():
        return from_ranks_file(path)
    raise ValueError(f"tokenizer is {spec!r}, allowed are char, byte, gpt2, or the path of a vocabulary")


def is_named(spec: str, tokenizer: Tokenizer) -> bool:
    """Whether `spec` means this tokenizer. Needs no network, and "char" is every tokenizer of characters."""
    if spec == "char":
        return isinstance(tokenizer, CharTokenizer)
    if spec == "gpt2":
        size = isinstance(tokenizer, BPETokenizer) and tokenizer.vocab_size == GPT2_VOCAB_SIZE
        return size and all(tokenizer.encode(text).tolist() == ids for text, ids in GPT2_SAYS.items())
    return from_spec(spec, []) == tokenizer


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint: tokenizer.json, or vocab.json and merges.txt as older GPT-2 folders have them.

    Raises FileNotFoundError where there is neither, ValueError for a file that cannot be used; both name it.
    """
    folder = Path(folder)
    path, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if path.is_file():
        content = _read_json(path)
        try:
            return _from_json(content)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no tokenizer that can be used here: {error}") from None
    if vocab.is_file() and merges.is_file():
        pairs = [line.split(" ") for line in merges.read_text("utf-8").splitlines() if line and line[:9] != "#version:"]
        try:
            return _from_merges(_read_json(vocab), pairs)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{vocab} and {merges.name} are no GPT-2 vocabulary: {error}") from None
    raise FileNotFoundError(f"{folder} holds no tokenizer.json, and no vocab.json with merges.txt")


def from_ranks_file(path: str | Path) -> BPETokenizer:
    """tiktoken's format: a line a token, base64 and rank."""
    ranks = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"{path}, line {number} is not a token in base64 and its rank: {line[:40]!r}") from None
    try:
        return BPETokenizer(ranks)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def gpt2() -> BPETokenizer:
    """OpenAI's vocabulary of 50257 tokens, from HuggingFace's or tiktoken's cache, or else from the network.

    Raises OSError where there is none, and says how to give a local one.
    """
    import tiktoken
    from huggingface_hub import try_to_load_from_cache

    for name in ("openai-community/gpt2", "gpt2"):
        cached = try_to_load_from_cache(name, "tokenizer.json")
        if isinstance(cached, str):
            tokenizer = load(Path(cached).parent)
            assert isinstance(tokenizer, BPETokenizer)
            return tokenizer
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever requests, the disk or a changed file raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise OSError(
            f"GPT-2's vocabulary is in no cache and could not be downloaded ({reason}); {OFFLINE_HELP}"
        ) from None
    return BPETokenizer(encoding._mergeable_ranks)


def download(name: str) -> Tokenizer:
    """The tokenizer of a model on the hub, from its cache or the network. FileNotFoundError where it brings none."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(name, allow_patterns=["tokenizer.json", "vocab.json", "merges.txt"])
    except Exception as error:  # its own errors, its HTTP library's, the operating system's
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{name!r} has no tokenizer that could be downloaded ({reason})") from None
    return load(folder)


def _from_json(content: dict[str, Any]) -> Tokenizer:
    model = content["model"]
    if model["type"] == "WordLevel":
        tokens = sorted(model["vocab"], key=model["vocab"].get)
        if tokens[:1] != [UNKNOWN] or [model["vocab"][t] for t in tokens] != list(range(len(tokens))):
            raise ValueError(f"token 0 is not {UNKNOWN!r}, or tokens are not numbered from 0 without gaps")
        if longer := [t for t in tokens if len(t) != 1]:
            raise ValueError(f"token {longer[0]!r} is not one character")
        return CharTokenizer("".join(tokens[1:]))
    if model["type"] != "BPE" or (content.get("pre_tokenizer") or {}).get("type") != "ByteLevel":
        raise ValueError(f"it holds a {model['type']} model; allowed are WordLevel, and BPE on bytes as GPT-2 has it")
    plain = not model["merges"] and not content.get("added_tokens")
    if plain and model["vocab"] == {_printable()[b]: b for b in range(256)}:
        return ByteTokenizer()
    return _from_merges(model["vocab"], [m.split(" ") if isinstance(m, str) else m for m in model["merges"]])


def _from_merges(vocab: dict[str, int], merges: list[list[str]]) -> BPETokenizer:
    """HuggingFace's form of a vocabulary. tiktoken takes a token's id for its priority, so they must agree."""
    byte_of = {name: b for b, name in _printable().items()}
    ranks = {bytes([b]): vocab[name] for name, b in byte_of.items()}
    before = -1
    for first, second in merges:
        rank = vocab[first + second]
        if rank <= before:
            raise ValueError(f"merge {first!r} {second!r} comes late for its id {rank}: ids must rise with the merges")
        before = ranks[bytes(byte_of[c] for c in first + second)] = rank
    if beyond := set(vocab) - {"".join(_printable()[b] for b in token) for token in ranks} - {END_OF_TEXT}:
        raise ValueError(f"token {min(beyond)!r} is made by no merge")
    tokenizer = BPETokenizer(ranks)
    if vocab.get(END_OF_TEXT, tokenizer.end_of_text) != tokenizer.end_of_text:
        raise ValueError(
            f"{END_OF_TEXT} has id {vocab[END_OF_TEXT]}, expected {tokenizer.end_of_text}, after all others"
        )
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


# ------------------------------------------------------------------------------------------------------- helpers


def _utf8_decoder(decode_bytes: Callable[[Iterable[int]], bytes]) -> Callable[[Iterable[int], bool], str]:
    codec = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return lambda ids, final: codec.decode(decode_bytes(ids), final)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)


def _text(codes: np.ndarray) -> str:
    return codes.astype("<u4").tobytes().decode("utf-32-le", errors="surrogatepass")


@functools.cache
def _printable() -> dict[int, str]:
    """Bytes as the characters that vocab.json and merges.txt write for them (openai/gpt-2, bytes_to_unicode)."""
    shown = {b: chr(b) for b in range(256) if chr(b).isprintable() and chr(b) != " "}
    hidden = [b for b in range(256) if b not in shown]
    return shown | {b: chr(256 + i) for i, b in enumerate(hidden)}


def _byte_level(vocab: dict[str, int], merges: list[list[str]], use_regex: bool) -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    return {"pre_tokenizer": level, "decoder": level, "model": {"type": "BPE", "vocab": vocab, "merges": merges}}


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two parts that `token` is merged from: merge its bytes by rank until two parts are left."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:], strict=False)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
