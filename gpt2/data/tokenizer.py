"""Finding a tokenizer: by its name, in a folder or a file, on the hub.

from_spec("gpt2", []), from_spec("my_vocabulary", []), load(folder), download("organisation/name")
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgpt2.gpt2.data.nanogpt import META, KnownCharTokenizer, read_meta
from fastgpt2.gpt2.data.vocabularies import (
    ADDED_TOKENS,
    END_OF_TEXT,
    FILES,
    MERGES,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    UNKNOWN,
    VOCAB,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    LibraryTokenizer,
    Tokenizer,
    byte_level,
    printable,
    token_dtype,
)

if TYPE_CHECKING:
    import tokenizers

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "LibraryTokenizer",
    "Tokenizer",
    "download",
    "from_ranks_file",
    "from_spec",
    "gpt2",
    "is_named",
    "load",
    "token_dtype",
]

GPT2_VOCAB_SIZE = 50257
GPT2_SAYS = {"Hello world": [15496, 995], ", the": [11, 262]}  # no other vocabulary of that size does
OPENAI_VOCAB, OPENAI_MERGES = "encoder.json", "vocab.bpe"  # what became vocab.json and merges.txt
CHANGES_MERGES = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")  # of a BPE model, else GPT-2's
OFFLINE_HELP = (
    "give a local copy: --tokenizer FOLDER with HuggingFace's vocab.json and merges.txt (or tokenizer.json), "
    "or --tokenizer FILE with tiktoken's ranks"
)


def from_spec(spec: str, texts: Iterable[str]) -> Tokenizer:
    """ "char" (made from `texts`), "byte", "gpt2", or a path: a folder with a vocabulary, a file of ranks, meta.pkl."""
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
        return read_meta(path) if path.name == META else from_ranks_file(path)
    raise ValueError(f"tokenizer is {spec!r}, allowed are char, byte, gpt2, or the path of a vocabulary")


def is_named(spec: str, tokenizer: Tokenizer) -> bool:
    """Whether `spec` means this tokenizer. Needs no network, and "char" is every tokenizer of characters."""
    if spec == "char":
        return isinstance(tokenizer, CharTokenizer)
    if spec == "gpt2":
        size = isinstance(tokenizer, BPETokenizer) and tokenizer.vocab_size == GPT2_VOCAB_SIZE
        return size and all(tokenizer.encode(text).tolist() == ids for text, ids in GPT2_SAYS.items())
    return from_spec(spec, []) == tokenizer


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

    Raises OSError where none of them has it, and says how to give a local copy.
    """
    import tiktoken
    from huggingface_hub import try_to_load_from_cache

    for name in ("openai-community/gpt2", "gpt2"):
        cached = try_to_load_from_cache(name, TOKENIZER_JSON)
        if isinstance(cached, str):
            tokenizer = load(Path(cached).parent)
            assert isinstance(tokenizer, BPETokenizer)
            return BPETokenizer(tokenizer.ranks)  # saved the same, whatever else the cache holds
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever requests, the disk or a changed file raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise OSError(
            f"GPT-2's vocabulary is in no cache and could not be downloaded ({reason}); {OFFLINE_HELP}"
        ) from None
    return BPETokenizer(encoding._mergeable_ranks)


def download(name: str) -> Tokenizer:
    """The tokenizer of a model on the hub, from its cache or the network.

    Raises FileNotFoundError for a model that has no tokenizer files, or cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(name, allow_patterns=list(FILES))
    except Exception as error:  # its own errors, its HTTP library's, the operating system's
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{name!r} has no tokenizer that could be downloaded ({reason})") from None
    return load(folder)


# --------------------------------------------------------------------------------------------- HuggingFace's files


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint: tokenizer.json, or vocab.json and merges.txt as older GPT-2 folders have them, or
    under the names that OpenAI gave them, or nanoGPT's meta.pkl.

    Saved again, its files are the same. A vocabulary of GPT-2's form without <|endoftext|> gets it as its last token,
    to separate documents with. Raises FileNotFoundError for a folder with neither, ValueError for a file that cannot be
    used; both name it.
    """
    folder = Path(folder)
    path, vocab, merges = (folder / name for name in (TOKENIZER_JSON, VOCAB, MERGES))
    if (folder / OPENAI_VOCAB).is_file() and not vocab.is_file():
        vocab, merges = folder / OPENAI_VOCAB, folder / OPENAI_MERGES
    if path.is_file():
        what = f"{path} is no tokenizer that can be used here"
    elif vocab.is_file() and merges.is_file():
        what = f"{vocab} and {merges.name} are no GPT-2 vocabulary"
    elif (folder / META).is_file():
        return read_meta(folder / META)
    else:
        raise FileNotFoundError(f"{folder} holds no tokenizer.json, and no vocab.json with merges.txt")
    names = _special_names(folder)
    content = _read_json(path if path.is_file() else vocab)
    try:
        if not path.is_file():
            content = json.loads(_from_merges(vocab, merges, [*names.values(), END_OF_TEXT]).to_str())
        made = _special_case(content) or _by_library(content, names.get("eos_token", END_OF_TEXT))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{what}: {error}") from None
    made.files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    return made


def _special_case(content: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer of this tokenizer.json if it is one of characters, of bytes or of GPT-2's form, which are faster
    here than by HuggingFace's library. None for any other.
    """
    model, split = content["model"], content.get("pre_tokenizer") or {}
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    if content.get("normalizer") or any(model.get(name) for name in CHANGES_MERGES):
        return None
    if model["type"] == "WordLevel" and split.get("type") == "Split" and not added:
        tokens = sorted(model["vocab"], key=model["vocab"].get)
        numbered = [model["vocab"][token] for token in tokens] == list(range(len(tokens)))
        if not numbered or any(len(token) != 1 for token in tokens):
            return None
        if tokens[:1] == [UNKNOWN]:
            return CharTokenizer("".join(tokens[1:]))
        return KnownCharTokenizer("".join(tokens)) if model.get("unk_token") == UNKNOWN not in tokens else None
    if model["type"] != "BPE" or split.get("type") != "ByteLevel" or split.get("add_prefix_space"):
        return None
    if not model["merges"] and not added and model["vocab"] == {name: b for b, name in printable().items()}:
        return ByteTokenizer()
    ranks = _ranks(model["vocab"], model["merges"], added) if split.get("use_regex", True) else None
    return None if ranks is None else BPETokenizer(ranks)


def _ranks(vocab: dict[str, int], merges: list[Any], added: dict[str, int]) -> dict[bytes, int] | None:
    """tiktoken's form of a vocabulary: a token's id is also its priority, and <|endoftext|> comes after all others.

    None for a vocabulary that is not like this: special tokens before the others, say, or more than that one.
    """
    byte_of = {name: b for b, name in printable().items()}
    ranks = {name: i for name, i in vocab.items() if name != END_OF_TEXT}
    last = len(ranks)
    if added.keys() - {END_OF_TEXT} or {vocab.get(END_OF_TEXT, last), added.get(END_OF_TEXT, last)} != {last}:
        return None
    merged = [ranks.get("".join(merge.split(" ") if isinstance(merge, str) else merge), -1) for merge in merges]
    complete = byte_of.keys() <= ranks.keys() and len(merged) + len(byte_of) == len(ranks) and -1 not in merged
    rising = merged == sorted(set(merged)) and sorted(ranks.values()) == list(range(last))
    if not complete or not rising:
        return None
    return {bytes(byte_of[c] for c in name): i for name, i in ranks.items()}


def _by_library(content: dict[str, Any], end_of_text: str) -> LibraryTokenizer:
    from tokenizers import Tokenizer

    try:
        library = Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # it raises nothing more special
        raise ValueError(str(error)) from None
    if not library.get_vocab_size():
        raise ValueError("it has no tokens")
    if content["model"]["type"] == "BPE" and "ByteLevel" in json.dumps(content.get("pre_tokenizer")):
        if missing := [b for b, name in printable().items() if library.token_to_id(name) is None]:
            raise ValueError(f"the vocabulary has no token for byte {missing[0]}; all 256 are needed")
    return LibraryTokenizer(library, end_of_text if library.token_to_id(end_of_text) is not None else None)


def _from_merges(vocab: Path, merges: Path, special: Iterable[str]) -> tokenizers.Tokenizer:
    """The tokenizer of vocab.json and merges.txt, with the added and special tokens that their folder names."""
    from tokenizers import models

    try:
        library = byte_level(models.BPE.from_file(str(vocab), str(merges)), use_regex=True)
    except Exception as error:  # it raises nothing more special
        raise ValueError(str(error)) from None
    folder = vocab.parent
    added = _read_json(folder / ADDED_TOKENS) if (folder / ADDED_TOKENS).is_file() else {}
    for name in sorted(added, key=lambda name: added[name]):
        library.add_special_tokens([name])
        if library.token_to_id(name) != added[name]:
            raise ValueError(f"{ADDED_TOKENS} gives {name!r} id {added[name]}, the next is {library.token_to_id(name)}")
    library.add_special_tokens([name for name in dict.fromkeys(special) if library.token_to_id(name) is not None])
    return library


def _special_names(folder: Path) -> dict[str, str]:
    """eos_token, bos_token, ... of a folder, each with the token's name."""
    found: dict[str, str] = {}
    for file in (SPECIAL_TOKENS, TOKENIZER_CONFIG):
        settings = _read_json(folder / file) if (folder / file).is_file() else {}
        for key, value in settings.items():
            name = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(name, str):
                found[key] = name
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content
