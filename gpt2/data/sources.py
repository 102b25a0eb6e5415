"""Where text comes from: local text, JSONL and Parquet files, Python's own sources, and two data sets of the hub.

A source gives its documents in a fixed order, in batches, and can go on before any of them:

    source = find_source("fineweb-edu")             # or openwebtext, python, a file, a folder
    for position, pieces in source.batches(): ...   # pieces: [(text, whether a document ends with it), ...]
    source.batches(position)                        # that batch again, and those after it; JSON can hold a position

A long document comes in pieces, so that memory stays small and processes can share it. It is cut only between two
lines, after a character that is no space and before another. There the tokenizers of characters and of bytes and
GPT-2's byte-pair encoding cut as well, so that the tokens of the pieces are those of the document; for any other
vocabulary the tokens of a document are, by definition here, those of its pieces.

HuggingFace's `datasets` streams the hub's data, but not local files: it resumes by document, too, but its JSON reader
names neither the file nor the line of an error (release 5.2 says "Expected object or value" and nothing else), and its
text reader holds whole documents in memory.
"""

from __future__ import annotations

import codecs
import json
import os
import platform
import re
import sysconfig
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from fastgpt2.gpt2.data import shards
from fastgpt2.gpt2.data.shards import SUFFIXES as TOKEN_SUFFIXES
from fastgpt2.gpt2.files import LOCK

Piece: TypeAlias = tuple[str, bool]
Position: TypeAlias = dict[str, Any]

PIECE_CHARACTERS = 1 << 20
READ_BYTES = 1 << 20
TEXT_FIELD = "text"
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character: JSON can write one that stands alone
_CUT = re.compile(r"\S\n(?=\S)")


class Source(ABC):
    """name: on the console. n_documents: None where it is not known. prompt: words that a text could begin with.

    val_tokens: how many tokens at the beginning are usually held out, None where it depends on the length.
    """

    name: str
    n_documents: int | None = None
    prompt: str = "\n"
    val_tokens: int | None = None

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What identifies this source, in values that JSON can hold."""

    def inputs(self) -> dict[str, list[int]]:
        """Each local file that is read: [size in bytes, time of its last change in ns]. {} for the hub's data."""
        return {}

    @abstractmethod
    def batches(self, position: Position | None = None) -> Iterator[tuple[Position, list[Piece]]]:
        """All batches, or those from `position` on. Raises OSError or ValueError naming what cannot be read."""

    def texts(self) -> Iterator[str]:
        """Whole documents, one after another."""
        parts: list[str] = []
        for _, pieces in self.batches():
            for text, ends in pieces:
                parts.append(text)
                if ends:
                    yield "".join(parts)
                    parts = []


def cut(chunks: Iterable[str]) -> Iterator[Piece]:
    """The pieces of one document, whose text comes in chunks: PIECE_CHARACTERS long, or a little longer. An empty
    document has no pieces.
    """
    rest, searched, empty = "", PIECE_CHARACTERS, True
    for chunk in chunks:
        rest += chunk
        start = 0
        while match := _CUT.search(rest, max(start + PIECE_CHARACTERS, searched)):
            yield rest[start : match.end()], False
            start, empty = match.end(), False
        rest = rest[start:]
        searched = max(PIECE_CHARACTERS, len(rest) - 2)
    if rest or not empty:
        yield rest, True


# -------------------------------------------------------------------------------------------------- local files


class Files(Source):
    """Local files: a text file is one document, a .jsonl or .parquet file has one in the field "text" of each row."""

    def __init__(self, name: str, files: list[Path], prompt: str = "\n"):
        self.name, self.files, self.prompt = name, files, prompt

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "files": len(self.files), "bytes": sum(f.stat().st_size for f in self.files)}

    def inputs(self) -> dict[str, list[int]]:
        stats = ((str(file), file.stat()) for file in self.files if file.exists())
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats}

    def batches(self, position: Position | None = None) -> Iterator[tuple[Position, list[Piece]]]:
        position = position or {"file": 0, "piece": 0}
        size = 0
        batch: list[Piece] = []
        for i, file in enumerate(self.files[position["file"] :], start=position["file"]):
            for j, piece in enumerate(_pieces(file)):
                if i == position["file"] and j < position["piece"]:
                    continue
                if size >= PIECE_CHARACTERS:
                    yield position, batch
                    position, size, batch = {"file": i, "piece": j}, 0, []
                batch.append(piece)
                size += len(piece[0])
        if batch:
            yield position, batch


def _pieces(file: Path) -> Iterator[Piece]:
    read = {".jsonl": _jsonl, ".parquet": _parquet}.get(file.suffix)
    if read is None:
        yield from cut(_decoded(file))
    else:
        for document in read(file):
            yield from cut([document])


def _decoded(file: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    before = 0
    with open(file, "rb") as content:
        while True:
            chunk = content.read(READ_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                yield decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                at = before - pending + error.start
                raise ValueError(f"{file} is not UTF-8 text: {error.reason} at byte {at}") from None
            if not chunk:
                return
            before += len(chunk)


def _jsonl(file: Path) -> Iterator[str]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}, line {number} is not JSON: {error}") from None
            if not isinstance(row, dict) or not isinstance(row.get(TEXT_FIELD), str):
                raise ValueError(f"{file}, line {number} has no string in a field {TEXT_FIELD!r}")
            if surrogate := SURROGATE.search(row[TEXT_FIELD]):
                code = f"\\u{ord(surrogate[0]):04x}"
                raise ValueError(f"{file}, line {number} holds {code} alone, half of a character: that is no text")
            yield row[TEXT_FIELD]


def _parquet(file: Path) -> Iterator[str]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{file} needs the package pyarrow: pip install 'fastgpt2[data]'") from None
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is no Parquet file: {error}") from None
    if TEXT_FIELD not in table.schema_arrow.names:
        raise ValueError(f"{file} has no column {TEXT_FIELD!r}, there are {', '.join(table.schema_arrow.names)}")
    batches = table.iter_batches(columns=[TEXT_FIELD])
    while True:
        try:
            batch = next(batches, None)
        except (ValueError, OSError) as error:
            raise ValueError(f"{file} is damaged: {error}") from None
        if batch is None:
            return
        for value in batch.column(0).to_pylist():
            if not isinstance(value, str):
                raise ValueError(f"{file} holds {value!r} in column {TEXT_FIELD!r}, expected text")
            yield value


# ----------------------------------------------------------------------------------------------------------- hub


class HubDataset(Source):
    """A data set of the HuggingFace hub, read from the network row by row: only what is made from it is stored."""

    def __init__(self, name: str, dataset: str, config: str | None, val_tokens: int):
        self.name, self.dataset, self.config, self.val_tokens = name, dataset, config, val_tokens

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "dataset": self.dataset, "config": self.config}

    def batches(self, position: Position | None = None) -> Iterator[tuple[Position, list[Piece]]]:
        rows = self._open()
        if position:
            rows.load_state_dict(position)
        position, size = rows.state_dict(), 0
        batch: list[Piece] = []
        try:
            for row in rows:
                pieces = list(cut([row[TEXT_FIELD]]))
                batch.extend(pieces)
                size += len(row[TEXT_FIELD])
                if size >= PIECE_CHARACTERS:
                    yield position, batch
                    position, size, batch = rows.state_dict(), 0, []
        except Exception as error:  # of its HTTP libraries, Arrow's, the operating system's
            raise OSError(
                f"{self.dataset} broke off ({_reason(error)}); give the same command again, it goes on"
            ) from None
        if batch:
            yield position, batch

    def _open(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise ImportError(f"{self.name} needs the package datasets: pip install 'fastgpt2[data]'") from None
        try:
            rows = datasets.load_dataset(self.dataset, self.config, split="train", streaming=True)
        except Exception as error:
            raise OSError(
                f"{self.dataset} could not be opened ({_reason(error)}); without a network, give the folder of its "
                "Parquet files"
            ) from None
        split = (rows.info.splits or {}).get("train")
        self.n_documents = split.num_examples if split else None
        return rows


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


# What is held out: build-nanogpt's first shard of 100M tokens, and as many tokens as nanoGPT's 0.05% of OpenWebText.
HUB = {
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", 100_000_000),
    "openwebtext": ("Skylion007/openwebtext", None, 4_400_000),
}


def find_source(spec: str | Path | None, *more: str | Path) -> Source:
    """The source that `spec` names: None or "python" for the sources of Python's library, a name in `HUB`, or the path
    of a file or of a folder, which stands for all files below it.

    more: paths of further files and folders, read after it. Hidden files in a folder are left out; so are runs and
    token shards that lie in it, with a warning. Raises FileNotFoundError for a path that does not exist, ValueError for
    an empty folder, for a folder with files of tokens, and for the folder of a run or of token shards.
    """
    if more:
        parts = [find_source(part) for part in (spec, *more)]
        files = [file for part in parts if isinstance(part, Files) for file in part.files]
        for part in parts:
            if not isinstance(part, Files):
                raise ValueError(f"source {part.name!r} is the hub's and stands alone; allowed beside others are files")
        return Files(", ".join(part.name for part in parts), files)
    if spec is None or spec == "python":
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        return Files(f"the sources of Python {platform.python_version()}", files, prompt="def ")
    if spec in HUB:
        return HubDataset(str(spec), *HUB[str(spec)])
    path = Path(spec)
    if path.is_file():
        return Files(str(path), [path])
    if not path.is_dir():
        raise FileNotFoundError(f"there is no such file or folder: {str(spec)!r}")
    if _made_here(path):
        raise ValueError(f"{path} was written by fastgpt2 train or prepare: give a folder of text")
    files = sorted(_below(path))
    for file in files:
        if file.suffix in TOKEN_SUFFIXES:
            raise ValueError(f"{path} is a folder of text, and {file} looks like tokens: move it away")
    if not files:
        raise ValueError(f"{path} holds no files: give a text, JSONL or Parquet file, or a folder of them")
    return Files(str(path), files)


def _below(folder: Path) -> Iterator[Path]:
    """Every file below a folder, except hidden ones and those in folders that fastgpt2 wrote."""
    for name, folders, files in os.walk(folder):
        here = Path(name)
        for below in sorted(folders):
            if not below.startswith(".") and _made_here(here / below):
                warnings.warn(f"{here / below} was written by fastgpt2 and is no part of {folder}", stacklevel=3)
                folders.remove(below)
        folders[:] = [below for below in folders if not below.startswith(".")]
        yield from (here / file for file in files if not file.startswith(".") and (here / file).is_file())


def _made_here(folder: Path) -> bool:
    """Whether a folder is a run's or one of prepared shards, finished or not."""
    if (folder / LOCK).is_file():
        return True
    try:
        return bool(shards.read_manifest(folder))
    except (OSError, ValueError):
        return False
