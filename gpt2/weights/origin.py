"""What a model came with besides its weights, so that it is saved with all of it again.

A HuggingFace folder says more than what the model is: which token ends a text, how to generate, the tokenizer with its
special tokens and chat template, a README. `GPT.origin` holds it from `from_pretrained` to `save_pretrained`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastgpt2.gpt2.config import GPTConfig
from fastgpt2.gpt2.data.vocabularies import FILES as TOKENIZER_FILES
from fastgpt2.gpt2.weights.checkpoints import FILES, STATE

CONFIG, GENERATION = "config.json", "generation_config.json"
OF_THIS_FOLDER = (CONFIG, FILES, STATE)  # rewritten, or true of one folder only
WEIGHTS = (".safetensors", ".bin", ".index.json", ".h5", ".msgpack", ".ot", ".pt", ".pth", ".ckpt", ".onnx", ".gguf")
LARGEST_FILE = 2**26  # bytes: all files are kept in memory
END_TOKENS = ("bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class Origin:
    """settings: what config.json holds. text: the same as it stands there, "" for a live model.

    config: what settings say that the model is. dtype: of all its weights, None where they differ.
    files: the other files of the folder, by name, but for weights, folders and files above LARGEST_FILE.
    """

    settings: Mapping[str, Any]
    config: GPTConfig
    dtype: torch.dtype | None
    text: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)


def other_files(folder: Path) -> dict[str, bytes]:
    """`Origin.files` of a folder."""
    files = (f for f in sorted(folder.iterdir()) if f.is_file() and not f.name.startswith("."))
    wanted = (f for f in files if f.name not in OF_THIS_FOLDER and not f.name.endswith(WEIGHTS))
    return {f.name: f.read_bytes() for f in wanted if f.stat().st_size <= LARGEST_FILE}


def settings_with(
    origin: Origin,
    made: Mapping[str, Any],
    config: GPTConfig,
    dtype: torch.dtype,
    names: Iterable[tuple[str, tuple[str, ...]]],
    end_of_text: int | None,
) -> dict[str, Any]:
    """The settings of `origin`, changed only where the model is another one now.

    made: all settings of the model, as they are for one without an origin; config, dtype: what it is.
    names: (a field of GPTConfig, what the setting that says it is called; of several names the first is the usual one).
    end_of_text: as for `ends_with`.
    """
    settings = dict(origin.settings)
    for ours, theirs in names:
        if getattr(config, ours) != getattr(origin.config, ours):
            settings |= {name: made[theirs[0]] for name in theirs if name in settings or name == theirs[0]}
    for name in ("torch_dtype", "dtype"):
        if name in settings and dtype != origin.dtype:
            settings[name] = str(dtype).removeprefix("torch.")
    return ends_with(settings, end_of_text)


def ends_with(settings: dict[str, Any], end_of_text: int | None) -> dict[str, Any]:
    """`settings` in which end_of_text ends a text, None: in which what ends a text stays as it is."""
    ends = settings.get("eos_token_id")
    if end_of_text is None or end_of_text in (ends if isinstance(ends, list) else [ends]):
        return settings
    return {**settings, **dict.fromkeys(END_TOKENS, end_of_text)}


def generation_settings(origin: Origin | None) -> dict[str, Any]:
    """What generation_config.json says; {} if there is none, or one that is no JSON object."""
    try:
        settings = json.loads(origin.files[GENERATION]) if origin is not None else {}
    except (KeyError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def generation_file(origin: Origin | None, end_of_text: int | None) -> bytes | None:
    """generation_config.json of a model that end_of_text stops, None if it has nothing to say. None as end_of_text: it
    is as it was."""
    settings = generation_settings(origin)
    found = ends_with(settings, end_of_text)
    if found == settings:
        return None if origin is None else origin.files.get(GENERATION)
    return (json.dumps(found, indent=2) + "\n").encode()


def write_files(
    folder: Path, files: Mapping[str, bytes], write: Callable[[Path, bytes], None], tokenizer: Any = None
) -> None:
    """The tokenizer, or that of `files`, and all of `files` that `folder` does not have: somebody else's stay."""
    theirs = any((folder / name).exists() for name in TOKENIZER_FILES)
    if tokenizer is not None:
        tokenizer.save(folder)
    for name, content in files.items():
        belongs = name in TOKENIZER_FILES
        if name == GENERATION or not (theirs or tokenizer is not None if belongs else (folder / name).exists()):
            write(folder / name, content)
