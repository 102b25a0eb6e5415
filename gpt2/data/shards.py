"""Token shards: a text as files of tokens, read through memory maps as one long array.

    tokens = open_tokens(folder, "train")       # folder: what `fastgpt2 prepare` writes, or another project's shards
    len(tokens), tokens[start:stop]             # (stop - start,) uint16 or uint32, across the ends of shards

A prepared folder holds shards as .npy, the tokenizer, and manifest.json with the length and SHA-256 of every shard.
A folder without a manifest may hold files of other projects: nanoGPT's .bin (uint16 and nothing else), build-nanogpt's
.npy, llm.c's .bin (256 int32 of header, then uint16). The word train or val in a file's name says which part it is:
fineweb_val_000000.bin is val, medieval_train.bin is train.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastgpt2.gpt2.files import write_atomically

MANIFEST, FORMAT, VERSION = "manifest.json", "fastgpt2 tokens", 1
SPLITS = ("train", "val")
NAMES = {"train": {"train", "training"}, "val": {"val", "valid", "validation"}}
SUFFIXES = (".bin", ".npy")
# karpathy/llm.c, dev/data/data_common.py: int32 magic, version, number of tokens, then zeros up to 256 numbers.
LLMC_MAGIC, LLMC_VERSION, LLMC_HEADER_BYTES = 20240520, 1, 1024
CHUNK_BYTES = 1 << 24


class Tokens(Protocol):
    """One long array of tokens: a NumPy array or `Shards`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> np.ndarray: ...


class Shards:
    """Arrays (N_i,) one after another as if they were one of (sum N_i,).

    names: what errors call each of them. maxima: the largest token of each, if it is known. sha256s: of each file, if
    it was compared.
    """

    def __init__(
        self,
        parts: Sequence[np.ndarray],
        names: Sequence[str] | None = None,
        maxima: Sequence[int] | None = None,
        sha256s: Sequence[str] | None = None,
    ):
        self.parts = list(parts)
        self.names = [f"shard {i}" for i in range(len(parts))] if names is None else list(names)
        self._maxima, self._sha256s = maxima, sha256s
        self._ends = np.cumsum([len(part) for part in parts]).tolist()

    def maxima(self) -> Sequence[int]:
        """The largest token of each part; the first call may read all of them."""
        if self._maxima is None:
            with ThreadPoolExecutor() as threads:
                self._maxima = list(threads.map(lambda part: int(part.max()), self.parts))
        return self._maxima

    def content(self) -> int:
        """A checksum of all tokens: the CRC-32 of the files' checksums if these are known, otherwise of every token,
        all of which are then read.
        """
        if self._sha256s is None:
            with ThreadPoolExecutor() as threads:
                parts = [f"{part:08x}" for part in threads.map(array_content, self.parts)]
        return zlib.crc32("".join(parts if self._sha256s is None else self._sha256s).encode())

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: slice, /) -> np.ndarray:
        """A copy of tokens[start:stop]; step must be 1."""
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError(f"tokens are read in order, the step is {step}: allowed is 1")
        pieces = []
        first = bisect_right(self._ends, start)
        for part, end in zip(self.parts[first:], self._ends[first:], strict=True):
            if start >= stop:
                break
            begin = end - len(part)
            pieces.append(part[start - begin : stop - begin])
            start = end
        return np.concatenate(pieces) if pieces else np.array(self.parts[0][:0])


def array_content(tokens: np.ndarray) -> int:
    """CRC-32 of every token (N,) as uint32."""
    found = 0
    for first in range(0, len(tokens), CHUNK_BYTES):
        found = zlib.crc32(tokens[first : first + CHUNK_BYTES].astype("<u4").tobytes(), found)
    return found


@dataclass(frozen=True)
class Shard:
    """One line of the manifest."""

    file: str
    tokens: int
    sha256: str
    max_token: int


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds. `position`: where `prepare` goes on, None for a folder that is finished."""

    source: dict[str, Any]
    vocab_size: int
    end_of_text: int | None
    train: tuple[Shard, ...] = ()
    val: tuple[Shard, ...] = ()
    n_documents: int = 0
    position: dict[str, Any] | None = None

    def save(self, folder: Path) -> None:
        fields = {("documents" if name == "n_documents" else name): v for name, v in dataclasses.asdict(self).items()}
        content = {"format": FORMAT, "version": VERSION, **fields}
        write_atomically(folder / MANIFEST, json.dumps(content, indent=1) + "\n")

    def shards(self, split: str) -> tuple[Shard, ...]:
        return {"train": self.train, "val": self.val}[split]


def read_manifest(folder: str | Path) -> Manifest:
    """Raises FileNotFoundError where there is none, ValueError for one that is no manifest of ours."""
    path = Path(folder) / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        if (content.pop("format"), content.pop("version")) != (FORMAT, VERSION):
            raise ValueError(f"its format is not {FORMAT!r}, version {VERSION}")
        for split in SPLITS:
            content[split] = tuple(Shard(**shard) for shard in content[split])
        return Manifest(n_documents=content.pop("documents"), **content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no manifest of token shards: {error}") from None


def write_shard(folder: Path, file: str, tokens: np.ndarray) -> Shard:
    """tokens (N,) as a .npy file, whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, tokens)
    content = buffer.getvalue()
    write_atomically(folder / file, content)
    return Shard(file, len(tokens), hashlib.sha256(content).hexdigest(), int(tokens.max()))


# ------------------------------------------------------------------------------------------------------- reading


def holds_tokens(path: str | Path) -> bool:
    """Whether `path` is a folder of token shards, and not text that is still to be encoded.

    A folder of token shards has a manifest, or files of tokens that are named train or val, or only files of tokens.
    """
    path = Path(path)
    if not path.is_dir() or (path / MANIFEST).is_file():
        return path.is_dir()
    files = [f for f in path.iterdir() if not f.name.startswith(".")]
    tokens = [f for f in files if f.suffix in SUFFIXES and f.is_file()]
    return bool(tokens) and (len(tokens) == len(files) or any(_split(f) for f in tokens))


def open_tokens(
    folder: str | Path,
    split: str,
    *,
    rank: int = 0,
    world_size: int = 1,
    say: Callable[[str], None] = lambda stage: None,
) -> Shards:
    """The tokens of one split, memory-mapped. Reads every shard of a manifest once, to compare its checksum.

    rank, world_size: each process compares its own part of the shards; the tokens are all of them.
    say: hears how many shards were compared.
    Raises FileNotFoundError for a folder, a split or a shard that is missing, ValueError for a shard that is cut
    short, changed or in no known format, and for a folder that is not finished; each names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{str(folder)!r}: there is no such folder of token shards")
    if not (folder / MANIFEST).is_file():
        files = _files(folder, split)
        if not files:
            kinds = " or ".join(f"*{split}*{suffix}" for suffix in SUFFIXES)
            raise FileNotFoundError(f"{folder} holds no {split} tokens: expected {MANIFEST}, or files {kinds}")
        return Shards([_map(file) for file in files], names=[str(file) for file in files])
    manifest = read_manifest(folder)
    if manifest.position is not None:
        raise ValueError(f"{folder} is not finished: give the same `fastgpt2 prepare` again, it goes on from there")
    shards = manifest.shards(split)
    if not shards:
        raise FileNotFoundError(f"{folder / MANIFEST} lists no {split} shard")
    parts = [_listed(folder, shard) for shard in shards]
    mine = shards[rank::world_size]
    with ThreadPoolExecutor() as threads:
        for done, _ in enumerate(threads.map(lambda shard: _compare_checksum(folder, shard), mine)):
            say(f"{done} of {len(mine)} {split} shards compared with their checksums")
    names = [str(folder / shard.file) for shard in shards]
    return Shards(parts, names, [shard.max_token for shard in shards], [shard.sha256 for shard in shards])


def _files(folder: Path, split: str) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if f.suffix in SUFFIXES and f.is_file() and _split(f) == split)


def _split(file: Path) -> str | None:
    """train or val, by the words of a file's name. Raises ValueError where that is not clear."""
    words = {word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", file.stem)}
    said = [split for split, names in NAMES.items() if words & names]
    if len(said) == 2 or (not said and any(split in file.stem for split in SPLITS)):
        raise ValueError(f"{file} may be train or val: name it one of them, as a word of its own")
    return said[0] if said else None


def _listed(folder: Path, shard: Shard) -> np.ndarray:
    path = folder / shard.file
    if Path(shard.file).name != shard.file or "\\" in shard.file:
        raise ValueError(f"{folder / MANIFEST} lists {shard.file!r}, expected names of files beside it")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, {MANIFEST} lists it")
    tokens = _map(path)
    if len(tokens) != shard.tokens:
        raise ValueError(f"{path} holds {len(tokens)} tokens, {MANIFEST} says {shard.tokens}")
    return tokens


def _compare_checksum(folder: Path, shard: Shard) -> None:
    digest = hashlib.sha256()
    with open(folder / shard.file, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != shard.sha256:
        raise ValueError(f"{folder / shard.file} was changed: its SHA-256 is not the one in {MANIFEST}")


def _map(path: Path) -> np.ndarray:
    """The tokens of one file in any of the formats, (N,)."""
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is an empty file, expected tokens")
    tokens = _map_npy(path) if path.suffix == ".npy" else _map_bin(path, size)
    if len(tokens) == 0:
        raise ValueError(f"{path} holds no tokens")
    return tokens


def _map_npy(path: Path) -> np.ndarray:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is cut short, or no .npy file: {error}") from None
    if not isinstance(tokens, np.ndarray):
        tokens.close()
        raise ValueError(f"{path} holds several arrays, as .npz files do: expected one, (N,) uint16 or uint32")
    if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
        raise ValueError(f"{path} holds {tokens.dtype} of shape {tokens.shape}, expected (N,) uint16 or uint32")
    return tokens


def _map_bin(path: Path, size: int) -> np.ndarray:
    with open(path, "rb") as file:
        header = file.read(LLMC_HEADER_BYTES)
    if size % 2:
        raise ValueError(f"{path} is cut short, or no file of uint16 tokens: {size} bytes")
    numbers = np.frombuffer(header[: len(header) // 4 * 4], "<i4")
    # Headers other than llm.c's are told from nanoGPT's bare tokens by the zeros that fill them up.
    has_header = numbers[:1].tolist() == [LLMC_MAGIC] or (len(numbers) == 256 and not numbers[3:].any())
    if has_header:
        if len(numbers) < 256:
            raise ValueError(f"{path} is cut short: {size} bytes, its header alone has {LLMC_HEADER_BYTES}")
        magic, version, expected = numbers[:3].tolist()
        if (magic, version) != (LLMC_MAGIC, LLMC_VERSION):
            raise ValueError(
                f"{path} has a header with magic {magic}, version {version}; expected llm.c's {LLMC_MAGIC}, "
                f"version {LLMC_VERSION}"
            )
        if size != LLMC_HEADER_BYTES + 2 * expected:
            found = (size - LLMC_HEADER_BYTES) // 2
            raise ValueError(f"{path} holds {found} tokens, its header says {expected}")
    offset = LLMC_HEADER_BYTES if has_header else 0
    return np.memmap(path, "<u2", mode="r", offset=offset) if size > offset else np.empty(0, np.uint16)
