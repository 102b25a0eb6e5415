"""The checkpoints of a run: whole or not there, the last few kept, damage noticed.

    RUN/checkpoints/step-00000250/     config.json, model.safetensors, the tokenizer: what `from_pretrained` reads
                                       training.pt: optimizer, data position, random numbers
                                       files.json: size and SHA-256 of each of these
    RUN/checkpoint                     a link to the newest one

Each is written into a folder of another name, flushed to disk and renamed, so that a kill at any moment leaves either
the checkpoint or a folder that nobody reads. A checkpoint is whole if the files are what files.json says and no weight
is infinite or NaN. Every reader checks that first; a run neither goes on from one that is not whole nor counts it among
the last few.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastgpt2.gpt2.data.tokenizer import Tokenizer
from fastgpt2.gpt2.files import write_atomically
from fastgpt2.gpt2.model import GPT

FOLDER, NEWEST, STATE, FILES = "checkpoints", "checkpoint", "training.pt", "files.json"
WEIGHTS = "model.safetensors"
UNFINISHED = ".unfinished"
PARTS = {"step", "config", "versions", "optimizer", "scaler", "watch", "windows", "random", "padding"}


def save_checkpoint(run: Path, step: int, model: GPT, tokenizer: Tokenizer, state: dict[str, Any], keep: int) -> Path:
    """Writes the checkpoint of `step`, then removes those older than the newest `keep` whole ones. Returns its folder.

    This one is among them, whatever lies beside it. Raises FloatingPointError, before anything is written, for weights
    that are infinite or no numbers.
    """
    if (name := _not_finite(model.named_parameters())) is not None:
        raise FloatingPointError(f"step {step}: {name} holds infinity or NaN, which is no checkpoint to go on from")
    final = run / FOLDER / f"step-{step:08}"
    folder = final.with_name(final.name + UNFINISHED)
    for leftover in final.parent.glob(f"*{UNFINISHED}"):
        shutil.rmtree(leftover)
    folder.mkdir(parents=True)
    model.save_pretrained(folder, tokenizer)
    _save_state(folder / STATE, {"step": step, **state})
    files = {path.name: _fingerprint(path) for path in sorted(folder.iterdir())}
    write_atomically(folder / FILES, json.dumps(files, indent=1) + "\n")
    _flush(folder)
    if final.exists():  # damaged, and made again by a run that resumed before it
        shutil.rmtree(final)
    os.replace(folder, final)
    _flush(final.parent)
    link_newest(run, final)
    _remove_old(run, final, keep)
    return final


def _save_state(path: Path, state: dict[str, Any]) -> None:
    try:
        with open(path, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # a disk that is full, which PyTorch says in words of its own
        reason = str(error).splitlines()[0]
        raise OSError(f"{path} cannot be written, is the disk full? ({reason})") from None


def saved_checkpoints(run: Path) -> list[Path]:
    """Folders of checkpoints, the newest first."""
    folders = (run / FOLDER).glob("step-*")
    return sorted((f for f in folders if f.is_dir() and not f.name.endswith(UNFINISHED)), reverse=True)


def find_corruption(folder: Path, *, only_weights: bool = False) -> str | None:
    """What is wrong with a checkpoint, None if nothing is.

    only_weights: do not look at training.pt, the largest of its files, which is read only to go on with a run.
    """
    try:
        expected = json.loads((folder / FILES).read_bytes())
        for name, fingerprint in expected.items():
            if only_weights and name == STATE:
                continue
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (folder / name).stat().st_size != fingerprint["bytes"]:
                return f"{name} has {(folder / name).stat().st_size} bytes, {fingerprint['bytes']} were written"
            if _fingerprint(folder / name) != fingerprint:
                return f"{name} is not what was written: its SHA-256 differs"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{FILES} cannot be used: {error}"
    if not {STATE, WEIGHTS} <= expected.keys():
        return f"{FILES} does not name all files"
    if (name := _not_finite(_stored_weights(folder / WEIGHTS))) is not None:
        return f"{name} in {WEIGHTS} holds infinity or NaN"
    return None


def newest_whole(run: Path, report: Callable[[str], None], *, only_weights: bool = False) -> Path | None:
    """The newest checkpoint of a run that is whole, None where there is none at all; `report` hears of damaged ones.

    only_weights: see `find_corruption`. Raises ValueError where there are checkpoints and none is whole.
    """
    found = []
    for folder in saved_checkpoints(run):
        wrong = find_corruption(folder, only_weights=only_weights)
        if wrong is None:
            return folder
        report(f"damaged {folder}: {wrong}")
        found.append(wrong)
    if found:
        raise ValueError(f"{run}: none of its checkpoints is whole, the newest: {found[0]}")
    return None


def folder_to_read(folder: Path, check: bool = True) -> Path:
    """Where the weights are that `folder` means: of a run the newest whole checkpoint, else the folder itself.

    check: take a run's newest whole checkpoint, with a warning about each newer one that is damaged. False: take its
    newest one, whatever its state. Folders that no run wrote are not checked.
    Raises ValueError for a checkpoint that is damaged, and where all of a run's are.
    """
    saved = saved_checkpoints(folder)
    if not check:
        return saved[0] if saved else folder
    damaged: list[str] = []
    found = newest_whole(folder, damaged.append, only_weights=True)
    if found is not None:
        for text in damaged:
            warnings.warn(f"{text}; {found.name} is taken instead", stacklevel=2)
        return found
    if (folder / FILES).exists() or (folder / STATE).exists():
        wrong = find_corruption(folder, only_weights=True)
        if wrong is not None:
            raise ValueError(f"{folder} is damaged: {wrong}; give the run's folder for its newest whole checkpoint")
    return folder


def load_checkpoint_state(folder: Path) -> dict[str, Any]:
    """What `save_checkpoint` got as state, and "step"; tensors on the CPU. ValueError where a part is missing."""
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    lacking = sorted(PARTS - (state.keys() if isinstance(state, dict) else set()))
    if lacking:
        raise ValueError(f"{folder / STATE} is no state of a run: it has no {', '.join(lacking)}")
    return state


def _remove_old(run: Path, new: Path, keep: int) -> None:
    """Of the checkpoints before `new`, what is older than the newest keep - 1 whole ones."""
    left = keep - 1
    for folder in saved_checkpoints(run):
        if folder < new:
            if left == 0:
                shutil.rmtree(folder)
            elif _is_whole(folder):
                left -= 1


def _is_whole(folder: Path) -> bool:
    """Whether `find_corruption` finds nothing; read once as long as no file's size and time of change are others."""
    stats = ((path.name, path.stat()) for path in sorted(folder.iterdir()))
    return _damage_of(folder, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)) is None


@functools.lru_cache(maxsize=64)
def _damage_of(folder: Path, files: tuple[tuple[str, int, int], ...]) -> str | None:
    return find_corruption(folder)


def _not_finite(weights: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first tensor with infinity or NaN in it."""
    return next((name for name, weight in weights if not bool(torch.isfinite(weight.detach()).all())), None)


def _stored_weights(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file:
        for name in file.keys():
            yield name, file.get_tensor(name)


def link_newest(run: Path, folder: Path) -> None:
    """RUN/checkpoint leads to `folder`. Raises FileExistsError where something is there that no run made."""
    link = run / NEWEST
    if link.exists() and not link.is_symlink():  # as in a copy that followed the link: cp -rL
        if not any(_same_files(link, saved) for saved in saved_checkpoints(run)):
            raise FileExistsError(f"{link} is no link and no copy of a checkpoint of this run: move it away")
        shutil.rmtree(link)
    temporary = run / f".{NEWEST}.{os.getpid()}.tmp"
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(folder.relative_to(run), target_is_directory=True)
    except OSError:  # Windows, for users without the right to: `saved_checkpoints` finds the folder without a link
        return
    os.replace(temporary, link)


def _same_files(a: Path, b: Path) -> bool:
    names = [folder / FILES for folder in (a, b)]
    return all(name.is_file() for name in names) and names[0].read_bytes() == names[1].read_bytes()


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
