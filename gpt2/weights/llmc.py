"""llm.c's checkpoints, such as gpt2_124M.bin: a header, then every weight in one order, all of one dtype.

    256 int32     magic, version, block_size, vocab_size, n_layer, n_head, n_embd, padded vocab_size, then zeros
    version 3     float32
    version 5     bfloat16

Each kind of weight is stored for all layers before the next kind. Weights of linear layers are (out, in); HuggingFace's
files have them transposed. Numbers are little-endian. Source: karpathy/llm.c, train_gpt2.py, write_model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgpt2.gpt2.weights.huggingface import CONV1D, StoredTensor
from fastgpt2.gpt2.weights.reading import read_numbers, transposed

NAME = "llm.c's .bin"
MAGIC, HEADER_BYTES = 20240326, 1024
DTYPES = {3: torch.float32, 5: torch.bfloat16}
SIZES = ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")


def find(path: Path) -> Path | None:
    """`path` if it is a file that begins with llm.c's magic number, else None."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return path if file.read(4) == MAGIC.to_bytes(4, "little") else None


def read(path: Path) -> tuple[dict[str, Any], list[StoredTensor]]:
    """Returns settings and weights in HuggingFace's form.

    Raises ValueError if the file's length is not what its header says, before memory of those sizes is allocated.
    """
    header = np.fromfile(path, "<i4", HEADER_BYTES // 4).tolist()
    if len(header) < HEADER_BYTES // 4:
        raise ValueError(f"{path} is cut short: its header alone has {HEADER_BYTES} bytes")
    version, *numbers, padded_vocab_size = header[1:8]
    settings = dict(zip(SIZES, numbers, strict=True))
    if version not in DTYPES:
        raise ValueError(f"{path} is of version {version}, read are 3 (float32) and 5 (bfloat16)")
    if min(numbers) < 1 or padded_vocab_size < settings["vocab_size"]:
        raise ValueError(f"{path}: its header has sizes that no model has, {settings}, padded to {padded_vocab_size}")
    dtype, C, L = DTYPES[version], settings["n_embd"], settings["n_layer"]
    tables: dict[str, tuple[int, ...]] = {
        "wte.weight": (padded_vocab_size, C),
        "wpe.weight": (settings["n_positions"], C),
    }
    in_tables, in_layer = (sum(map(math.prod, shapes.values())) for shapes in (tables, _layer(C)))
    expected = HEADER_BYTES + dtype.itemsize * (in_tables + L * in_layer + 2 * C)
    if (size := path.stat().st_size) != expected:
        raise ValueError(f"{path} has {size} bytes, a model of its header's sizes has {expected}: is it cut short?")
    return {"model_type": "gpt2", **settings}, list(_tensors(path, settings, tables, dtype))


def _layer(C: int) -> dict[str, tuple[int, ...]]:
    """The weights of one layer with their shapes in the file, in the file's order."""
    return {
        "ln_1.weight": (C,),
        "ln_1.bias": (C,),
        "attn.c_attn.weight": (3 * C, C),
        "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C),
        "attn.c_proj.bias": (C,),
        "ln_2.weight": (C,),
        "ln_2.bias": (C,),
        "mlp.c_fc.weight": (4 * C, C),
        "mlp.c_fc.bias": (4 * C,),
        "mlp.c_proj.weight": (C, 4 * C),
        "mlp.c_proj.bias": (C,),
    }


def _tensors(
    path: Path, settings: dict[str, int], tables: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> Iterator[StoredTensor]:
    C, L = settings["n_embd"], settings["n_layer"]
    inside = {f"h.{i}.{name}": shape for name, shape in _layer(C).items() for i in range(L)}
    offset = HEADER_BYTES
    for name, shape in {**tables, **inside, "ln_f.weight": (C,), "ln_f.bias": (C,)}.items():
        kept = (settings["vocab_size"], C) if name == "wte.weight" else shape  # without its padding
        read = partial(read_numbers, path, offset, kept, dtype)
        tensor = StoredTensor(str(path), name, kept, dtype, read)
        yield transposed(tensor) if name.endswith(CONV1D) else tensor
        offset += math.prod(shape) * dtype.itemsize
