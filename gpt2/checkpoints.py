"""The checkpoints of a run: whole or not there, the last few kept, damage noticed.

    RUN/checkpoints/step-00000250/     config.json, model.safetensors, the tokenizer: what `from_pretrained` reads
                                       training.pt: optimizer, data position, random numbers
                                       files.json: size and SHA-256 of each of these
    RUN/checkpoint                     a link to the newest one

Each is written into a folder of another name, flushed to disk and renamed, so that a kill at any moment leaves either
the checkpoint or a folder that nobody reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from fastgpt2.gpt2.files import write_atomically
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.tokenizer import Tokenizer

FOLDER, NEWEST, STATE, FILES = "checkpoints", "checkpoint", "training.pt", "files.json"
UNFINISHED = ".unfinished"


def save_checkpoint(run: Path, step: int, model: GPT, tokenizer: Tokenizer, state: dict[str, Any], keep: int) -> Path:
    """Writes the checkpoint of `step`, then removes all but the newest `keep`. Returns its folder."""
    final = run / FOLDER / f"step-{step:08}"
    folder = final.with_name(final.name + UNFINISHED)
    for leftover in final.parent.glob(f"*{UNFINISHED}"):
        shutil.rmtree(leftover)
    folder.mkdir(parents=True)
    tokenizer.save(folder)
    model.save_pretrained(folder)
    with open(folder / STATE, "wb") as file:
        torch.save({"step": step, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    files = {path.name: _fingerprint(path) for path in sorted(folder.iterdir())}
    write_atomically(folder / FILES, json.dumps(files, indent=1) + "\n")
    _flush(folder)
    if final.exists():  # damaged, and made again by a run that resumed before it
        shutil.rmtree(final)
    os.replace(folder, final)
    _flush(final.parent)
    _link_newest(run, final)
    for old in saved_checkpoints(run)[keep:]:
        shutil.rmtree(old)
    return final


def saved_checkpoints(run: Path) -> list[Path]:
    """Folders of checkpoints, the newest first."""
    folders = (run / FOLDER).glob("step-*")
    return sorted((f for f in folders if f.is_dir() and not f.name.endswith(UNFINISHED)), reverse=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, None if nothing is."""
    try:
        expected = json.loads((folder / FILES).read_bytes())
        for name, fingerprint in expected.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (folder / name).stat().st_size != fingerprint["bytes"]:
                return f"{name} has {(folder / name).stat().st_size} bytes, {fingerprint['bytes']} were written"
            if _fingerprint(folder / name) != fingerprint:
                return f"{name} is not what was written: its SHA-256 differs"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{FILES} cannot be used: {error}"
    return None if {STATE, "model.safetensors"} <= expected.keys() else f"{FILES} does not name all files"


def load_checkpoint_state(folder: Path) -> dict[str, Any]:
    """What `save_checkpoint` got as state, and "step"; tensors on the CPU."""
    return torch.load(folder / STATE, map_location="cpu", weights_only=True)


def _link_newest(run: Path, folder: Path) -> None:
    temporary = run / f".{NEWEST}.{os.getpid()}.tmp"
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(folder.relative_to(run), target_is_directory=True)
    except OSError:  # Windows, for users without the right to: `saved_checkpoints` finds the folder without a link
        return
    os.replace(temporary, run / NEWEST)


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _flush(folder: Path) -> None:
    """The names in a folder to disk, where the system has that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
