"""Other projects' checkpoints, by what a path holds: one table, and a file for each format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastgpt2.gpt2.config import GPTConfig
from fastgpt2.gpt2.weights import llmc, nanogpt, openai
from fastgpt2.gpt2.weights.huggingface import StoredTensor, config_from_huggingface


class Format(NamedTuple):
    """find: the file to read where a path holds this format. read: its settings and weights as HuggingFace has them."""

    name: str
    find: Callable[[Path], Path | None]
    read: Callable[[Path], tuple[dict[str, Any], list[StoredTensor]]]


FORMATS = tuple(Format(module.NAME, module.find, module.read) for module in (llmc, openai, nanogpt))


class Checkpoint(NamedTuple):
    """A model that is known and not read yet.

    source: the file, for errors. folder: where it lies, if that is one of HuggingFace's.
    """

    config: GPTConfig
    tensors: list[StoredTensor]
    source: str
    folder: Path | None = None


def read_foreign(path: Path, override_args: Mapping[str, Any] | None = None) -> Checkpoint | None:
    """What `path`, a file or folder, holds in one of `FORMATS`; None where it holds none.

    override_args: see `config_from_huggingface`. Raises ValueError, naming the file, for one that is damaged.
    """
    for format in FORMATS:
        file = format.find(path)
        if file is not None:
            settings, tensors = format.read(file)
            return Checkpoint(config_from_huggingface(settings, str(file), override_args), tensors, str(file))
    return None
