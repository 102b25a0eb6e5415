"""Checkpoints as HuggingFace has them: read from a local folder or the hub, written so that transformers reads them.

A folder holds config.json and the weights, the first of these that is there: model.safetensors,
model.safetensors.index.json (shards), pytorch_model.bin, pytorch_model.bin.index.json. None of it needs transformers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt2.gpt2.data.tokenizer import Tokenizer
from fastgpt2.gpt2.files import replace, temporary_beside, write_atomically
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.ops import Kernels
from fastgpt2.gpt2.weights.checkpoints import folder_to_read, saved_checkpoints
from fastgpt2.gpt2.weights.formats import FORMATS, Checkpoint, read_foreign
from fastgpt2.gpt2.weights.huggingface import (
    BUFFERS,
    TOKEN_TABLE,
    StoredTensor,
    build,
    config_from_huggingface,
    config_to_huggingface,
    huggingface_state,
    unwrap,
)
from fastgpt2.gpt2.weights.origin import (
    CONFIG,
    GENERATION,
    TOKENIZER_FILES,
    Origin,
    generation_file,
    other_files,
    write_files,
)
from fastgpt2.gpt2.weights.reading import pickled_tensors, read_json

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SMALL = (GENERATION, *TOKENIZER_FILES)  # of a model on the hub, fetched with its weights
# The hub's short names: a cache may hold either one.
HUB_NAMES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
LOCAL_INSTEAD = (
    f"without a network, pass a local folder with {CONFIG} and {SAFETENSORS[0]} (or {PICKLED[0]}): "
    "GPT.from_pretrained('path/to/folder')"
)


def from_pretrained(
    name_or_folder: str | Path,
    override_args: Mapping[str, Any] | None = None,
    *,
    kernels: str | Kernels = "auto",
    check: bool = True,
) -> GPT:
    """GPT-2's weights from a local folder or from the hub, on the CPU, in float32 whatever the files hold.

    name_or_folder: an existing folder, a checkpoint in another project's format (see `formats.FORMATS`), or a name on
        the hub: "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2", "organisation/name". What was downloaded
        before is found without a network. Of a run of `fastgpt2 train` it is the newest whole checkpoint.
    override_args: dropout (0 by default), vocab_multiple, activation; as in nanoGPT, the rest is the checkpoint's.
    check: compare the files of a run's checkpoint with what the run wrote (reads them once more).
    The model is in train mode, as a new one is.
    Raises FileNotFoundError for a folder that is no checkpoint, OSError if a download fails, ValueError for a
    checkpoint that is damaged or of a model that is not implemented here; it names the file, and the tensor or setting.
    """
    found = open_checkpoint(name_or_folder, override_args, check=check)
    model = build(found.config, found.tensors, found.source, dtype=torch.float32, kernels=kernels)
    if found.folder is not None:
        model.origin = _origin(found.folder, found.tensors)
    return model


def open_checkpoint(
    name_or_folder: str | Path, override_args: Mapping[str, Any] | None = None, *, check: bool = True
) -> Checkpoint:
    """What `from_pretrained` builds, with the same arguments and errors: no weight is read yet."""
    path = Path(name_or_folder)
    ours = not str(name_or_folder) or (path / CONFIG).exists() or saved_checkpoints(path)
    if not ours and (foreign := read_foreign(path, override_args)) is not None:
        return foreign
    folder = _find(name_or_folder, check)
    weights = _weights_file(folder)
    config = config_from_huggingface(read_json(folder / CONFIG), str(folder / CONFIG), override_args)
    return Checkpoint(config, list(_stored(weights)), str(weights), folder)


def _origin(folder: Path, stored: Iterable[StoredTensor]) -> Origin:
    """What a checkpoint's folder holds besides weights. Its config has the folder's values, overridden or not."""
    settings = read_json(folder / CONFIG)
    # Padding that is refused is allowed where it was overridden, and is written back as it was.
    config = config_from_huggingface(settings, str(folder / CONFIG), {"vocab_multiple": 1})
    said = settings.get("fastgpt2", {}).get("vocab_multiple", 1)
    (dtype, *others) = {tensor.dtype for tensor in stored if not tensor.name.endswith(BUFFERS)}
    return Origin(
        settings,
        dataclasses.replace(config, vocab_multiple=said),
        dtype if isinstance(dtype, torch.dtype) and not others else None,
        (folder / CONFIG).read_text(encoding="utf-8"),
        other_files(folder),
    )


def save_pretrained(model: nn.Module, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Writes config.json and model.safetensors, which `GPT2LMHeadModel.from_pretrained` and `from_pretrained` read.

    model: a GPT, also compiled or inside DistributedDataParallel. Weights keep their dtype; those that were read from
        16-bit files and are unchanged become 16-bit again. Padded rows of the vocabulary are cut off; a model without
        biases gets zero ones, and is without them again when read back here.
    tokenizer: is saved beside it, and its end of text stands in config.json and generation_config.json.
    A model of `from_pretrained` is saved with all that its folder held besides: settings of config.json that do not say
    what the model is, generation_config.json, tokenizer files, chat template, README. `folder` keeps files that it has.
    Until the last moment the folder holds what it held before, and at no moment a mix that loads.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    gpt, folder = unwrap(model), Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, save_pretrained writes into a folder")
    origin: Origin | None = gpt.origin
    state = {name: t.cpu().contiguous() for name, t in huggingface_state(gpt).items()}
    state = _narrow_again(state, None if origin is None else origin.dtype)
    end = None if tokenizer is None else tokenizer.end_of_text
    settings = config_to_huggingface(gpt.config, state[TOKEN_TABLE].dtype, origin, end)
    text = json.dumps(settings, indent=2) + "\n"
    if origin is not None and settings == origin.settings and origin.text:
        text = origin.text
    files = {} if origin is None else dict(origin.files)
    if how := generation_file(origin, end if origin is not None else settings["eos_token_id"]):
        files[GENERATION] = how
    folder.mkdir(parents=True, exist_ok=True)
    config_path, weights_path = folder / CONFIG, folder / SAFETENSORS[0]
    with temporary_beside(weights_path) as temporary:
        mode = temporary.stat().st_mode
        try:
            save_file(state, str(temporary), metadata={"format": "pt"})
        except SafetensorError as error:  # a disk that is full
            raise OSError(f"{weights_path} cannot be written: {error}") from None
        temporary.chmod(mode)  # safetensors makes files that only their owner may read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if config_path.exists() and config_path.read_text(encoding="utf-8") != text:
            config_path.unlink()  # new weights must not meet old settings, not even after a crash right here
        replace(temporary, weights_path)
        write_files(folder, files, write_atomically, tokenizer)
        write_atomically(config_path, text)


def _narrow_again(state: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """float32 weights in the 16-bit dtype that they were read from, where every one of them is still what it was."""
    if dtype not in (torch.float16, torch.bfloat16) or any(t.dtype != torch.float32 for t in state.values()):
        return state
    narrow = {name: t.to(dtype) for name, t in state.items()}
    return narrow if all(torch.equal(narrow[name].float(), t) for name, t in state.items()) else state


# ------------------------------------------------------------------------------------------------ finding a folder


def _find(name_or_folder: str | Path, check: bool) -> Path:
    """The local folder of a checkpoint, downloaded where it has to be."""
    if not str(name_or_folder):
        raise ValueError("the checkpoint's name is empty: pass a folder, or a name on the hub, such as 'gpt2'")
    folder = Path(name_or_folder)
    # A folder of a hub name that holds no checkpoint is not meant: this project's own sources are in one called gpt2.
    meant = (folder / CONFIG).exists() or str(name_or_folder) not in HUB_NAMES or saved_checkpoints(folder)
    if folder.is_dir() and meant:
        return folder_to_read(folder, check)
    if folder.is_file():
        known = ", ".join(format.name for format in FORMATS)
        raise NotADirectoryError(
            f"{folder} is a file, pass the folder that holds {CONFIG} and the weights; files that are read are {known}"
        )
    if isinstance(name_or_folder, str) and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name_or_folder):
        return _download(name_or_folder)
    raise FileNotFoundError(f"{folder} is neither a folder that exists nor a name on the hub, such as 'gpt2'")


def _download(name: str) -> Path:
    """The hub's files in its cache: config.json and weights, as safetensors where they exist."""
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise ImportError(f"downloading {name!r} needs the package huggingface_hub; {LOCAL_INSTEAD}") from None

    failure: Exception | None = None
    for repository in dict.fromkeys((name, HUB_NAMES.get(name, name))):
        try:
            for files in (SAFETENSORS, PICKLED):
                shards = f"{files[0].replace('.', '-*.')}"
                folder = Path(snapshot_download(repository, allow_patterns=[CONFIG, *SMALL, *files, shards]))
                if any((folder / file).exists() for file in files):
                    return folder
            _weights_file(folder)
        except Exception as error:  # its own errors, its HTTP library's, the operating system's
            failure = error
    reason = str(failure).strip().splitlines()[0]
    raise OSError(
        f"{name!r} is no local folder and could not be downloaded from the model hub "
        f"({type(failure).__name__}: {reason}); {LOCAL_INSTEAD}"
    ) from None


def _weights_file(folder: Path) -> Path:
    names = (*SAFETENSORS, *PICKLED)
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found or not (folder / CONFIG).is_file():
        lacking = CONFIG if found else "weights" if (folder / CONFIG).is_file() else f"{CONFIG} and no weights"
        raise FileNotFoundError(
            f"{folder} is no checkpoint, it has no {lacking}: looked for {CONFIG} and one of {', '.join(names)}"
        )
    return found[0]


# -------------------------------------------------------------------------------------------------- reading files


def _stored(weights: Path) -> Iterator[StoredTensor]:
    """The tensors of a weights file or of the shards that an index names."""
    read = _safetensors if weights.name in SAFETENSORS else pickled_tensors
    if weights.suffix != ".json":
        yield from read(weights)
        return
    shard_of = read_json(weights).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise ValueError(f"{weights} has no weight_map from tensors to shards")
    for shard in sorted(set(shard_of.values())):
        path = weights.parent / shard
        if Path(shard).name != shard or not path.is_file():
            raise FileNotFoundError(f"{weights} names the shard {shard!r}, which is not in {weights.parent}")
        tensors = list(read(path))
        there = {tensor.name for tensor in tensors}
        for name, expected in shard_of.items():
            if expected == shard and name not in there:
                raise ValueError(f"{path}: tensor {name!r} is missing, {weights.name} says that it is here")
        yield from tensors


def _safetensors(path: Path) -> Iterator[StoredTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file, is it cut short? ({error})") from None
    for name in file.keys():
        view = file.get_slice(name)
        dtype = view.get_dtype()
        yield StoredTensor(
            str(path),
            name,
            tuple(view.get_shape()),
            SAFETENSORS_DTYPES.get(dtype, dtype),
            partial(file.get_tensor, name),
        )
