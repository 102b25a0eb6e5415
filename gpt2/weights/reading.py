"""Reading that several formats of weights share: JSON, PyTorch's pickles without running code, raw numbers."""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgpt2.gpt2.weights.huggingface import StoredTensor

STORED = {torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: "<i2"}  # NumPy has no bfloat16: its bits


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises ValueError naming the file if it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON, is it cut short? ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def load_pickle(path: Path) -> Any:
    """Reads what `torch.save` wrote, if it is tensors and plain values only. Raises ValueError for a damaged file."""
    try:
        # Mapped, not read, where the format allows it (PyTorch's own before 1.6 was no zip file).
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (PermissionError, FileNotFoundError):
        raise
    except Exception as error:  # damaged files raise anything, among it OSError (a seek to before the beginning)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is not a whole PyTorch file of tensors, is it cut short? ({reason})") from None


def pickled_tensors(path: Path) -> Iterator[StoredTensor]:
    """The tensors of a file that holds them by name."""
    return tensors_of(load_pickle(path), path)


def tensors_of(state: Any, path: Path) -> Iterator[StoredTensor]:
    """The tensors of `state`, read from `path`. Raises ValueError if it holds anything else, or too few numbers."""
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected tensors by name")
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise ValueError(f"{path} holds a tensor under {name!r}, expected names")
        if isinstance(tensor, Tensor) and tensor.layout != torch.strided:
            raise ValueError(f"{path}: tensor {name!r} is {tensor.layout}, expected a dense one")
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: {name!r} is a {type(tensor).__name__}, expected a tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: tensor {name!r} has fewer numbers than its shape {tuple(tensor.shape)}")
        yield StoredTensor(str(path), name, tuple(tensor.shape), tensor.dtype, partial(lambda t: t, tensor))


def read_numbers(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Reads little-endian numbers from byte `offset` of a file. Raises ValueError if the file is too short."""
    stored, count = STORED[dtype], math.prod(shape)
    numbers = np.fromfile(path, stored, count, offset=offset)
    if len(numbers) < count:
        raise ValueError(
            f"{path} is cut short: {count} numbers were expected from byte {offset}, {len(numbers)} are there"
        )
    return torch.from_numpy(numbers.astype(np.dtype(stored).newbyteorder("="), copy=False)).view(dtype).view(shape)


def transposed(tensor: StoredTensor) -> StoredTensor:
    """The same tensor, transposed when it is read."""
    return dataclasses.replace(tensor, shape=tensor.shape[::-1], read=lambda: tensor.read().t())
