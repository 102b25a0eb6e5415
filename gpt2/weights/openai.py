"""OpenAI's original checkpoints of GPT-2, written by TensorFlow and read here without it.

    hparams.json                         n_vocab, n_ctx, n_embd, n_head, n_layer
    model.ckpt.index                     a table of sorted keys: each tensor's dtype, shape and position
    model.ckpt.data-00000-of-00001       the tensors as raw numbers
    encoder.json, vocab.bpe              the vocabulary: `data.tokenizer.load` reads them

`model/h0/attn/c_attn/w` is (1, C, 3C). Otherwise weights are stored as in HuggingFace's files, which were made from
these.
Sources: openai/gpt-2, src/model.py; tensorflow, core/protobuf/tensor_bundle.proto.
"""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastgpt2.gpt2.weights.huggingface import StoredTensor
from fastgpt2.gpt2.weights.reading import read_json, read_numbers
from fastgpt2.gpt2.weights.sstable import read_table, varint

NAME = "OpenAI's TensorFlow checkpoint"
INDEX, SIZES_FILE = ".index", "hparams.json"
SIZES = {"n_vocab": "vocab_size", "n_ctx": "n_positions", "n_embd": "n_embd", "n_head": "n_head", "n_layer": "n_layer"}
# tensorflow, core/framework/types.proto.
DTYPES = {1: torch.float32, 14: torch.bfloat16, 19: torch.float16}
PARTS = {"g": "weight", "w": "weight", "b": "bias", "wte": "wte.weight", "wpe": "wpe.weight"}
# Of a key's BundleEntryProto, and of the shape in it. Numbers are varints, but for the checksum.
DTYPE, SHAPE, SHARD, OFFSET, SIZE, SLICES = 1, 2, 3, 4, 5, 7


def find(path: Path) -> Path | None:
    """The index file if `path` is one or a folder with hparams.json and one index, else None."""
    if path.is_file():
        return path if path.suffix == INDEX else None
    found = sorted(path.glob(f"*{INDEX}")) if (path / SIZES_FILE).is_file() else []
    if len(found) > 1:
        raise ValueError(f"{path} holds several checkpoints: give one of {', '.join(str(index) for index in found)}")
    return found[0] if found else None


def read(path: Path) -> tuple[dict[str, Any], list[StoredTensor]]:
    """Returns settings and weights in HuggingFace's form.

    Raises ValueError if the index is damaged, or if a tensor is not inside the data files beside it.
    """
    if not (path.parent / SIZES_FILE).is_file():
        raise FileNotFoundError(f"{path.parent / SIZES_FILE} is missing, which says the sizes of {path.name}'s model")
    sizes = read_json(path.parent / SIZES_FILE)
    settings = {ours: sizes[theirs] for theirs, ours in SIZES.items() if theirs in sizes}
    table = read_table(path)
    try:
        header = _message(table.pop(b"", b""))
        if header.get(2, [0]) != [0]:
            raise ValueError("its numbers are big-endian")
        shards = header.get(1, [1])[0]
        stored = [_tensor(path, name.decode(), _message(entry), shards) for name, entry in table.items()]
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or not OpenAI's: {error}") from None
    return {"model_type": "gpt2", **settings}, stored


def _tensor(path: Path, name: str, entry: dict[int, list[Any]], shards: int) -> StoredTensor:
    shape = tuple(_message(dim).get(1, [0])[0] for dim in _message(entry.get(SHAPE, [b""])[0]).get(2, []))
    shard, offset, size = (entry.get(field, [0])[0] for field in (SHARD, OFFSET, SIZE))
    number = entry.get(DTYPE, [0])[0]
    if SLICES in entry:
        raise ValueError(f"tensor {name!r} lies there in slices")
    file = path.with_suffix(f".data-{shard:05}-of-{shards:05}")
    if not file.is_file():
        raise ValueError(f"{file.name}, where tensor {name!r} lies, is missing")
    if name.endswith("/w") and shape[:1] == (1,):
        shape = shape[1:]
    dtype = DTYPES.get(number)
    if dtype is None:
        return StoredTensor(str(path), name, shape, f"TensorFlow's type {number}", lambda: torch.empty(0))
    if math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"tensor {name!r} has {size} bytes, {math.prod(shape) * dtype.itemsize} by its shape {shape}")
    if offset + size > file.stat().st_size:
        raise ValueError(f"{file.name} is cut short: tensor {name!r} ends after its {file.stat().st_size} bytes")
    return StoredTensor(
        str(file), _as_huggingface(name), shape, dtype, partial(read_numbers, file, offset, shape, dtype)
    )


def _as_huggingface(name: str) -> str:
    """model/h0/attn/c_attn/w becomes h.0.attn.c_attn.weight. Names that OpenAI does not use are not changed."""
    *where, part = name.removeprefix("model/").split("/")
    return ".".join((*(re.sub(r"^h(?=\d+$)", "h.", step) for step in where), PARTS.get(part, part)))


def _message(data: bytes) -> dict[int, list[Any]]:
    """Decodes a protocol buffer: field number -> its values (integers or bytes) in their order."""
    found: dict[int, list[Any]] = {}
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        value: int | bytes
        if tag & 7 == 0:
            value, at = varint(data, at)
        else:
            length, at = varint(data, at) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], at)
            value, at = data[at : at + length], at + length
        if at > len(data):
            raise IndexError("a field ends after the message")
        found.setdefault(tag >> 3, []).append(value)
    return found
