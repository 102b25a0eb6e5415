"""Checkpoints in other projects' formats: a table of the formats, each of which has a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastgpt2.gpt2.config import GPTConfig
from fastgpt2.gpt2.weights import llmc, nanogpt, openai
from fastgpt2.gpt2.weights.huggingface import StoredTensor, config_from_huggingface


class Format(NamedTuple):
    """One format of files.

    find: returns the file to read if a path is in this format, else None. read: returns settings and weights in
    HuggingFace's form.
    """

    name: str
    find: Callable[[Path], Path | None]
    read: Callable[[Path], tuple[dict[str, Any], list[StoredTensor]]]


FORMATS = tuple(Format(module.NAME, module.find, module.read) for module in (llmc, openai, nanogpt))


class Checkpoint(NamedTuple):
    """A checkpoint whose settings have been read and whose weights have not.

    source: the file, for errors. folder: the folder of the file if it is in HuggingFace's format.
    """

    config: GPTConfig
    tensors: list[StoredTensor]
    source: str
    folder: Path | None = None


def read_foreign(path: Path, override_args: Mapping[str, Any] | None = None) -> Checkpoint | None:
    """Opens `path`, a file or folder, if it is in one of `FORMATS`; returns None if not.

    override_args: see `config_from_huggingface`. Raises ValueError naming the file if it is damaged.
    """
    for format in FORMATS:
        file = format.find(path)
        if file is not None:
            settings, tensors = format.read(file)
            return Checkpoint(config_from_huggingface(settings, str(file), override_args), tensors, str(file))
    return None
