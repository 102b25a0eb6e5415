"""nanoGPT's ckpt.pt: what its train.py saves with torch.save.

    model_args    n_layer, n_head, n_embd, block_size, vocab_size, bias, dropout
    model         the weights, under HuggingFace's names, after `_orig_mod.` where the model was compiled
    ...           optimizer, iter_num, best_val_loss, config: not read

Weights of linear layers are (out, in); HuggingFace's files have them transposed. The activation is the exact
GELU. Until June 2023 nanoGPT used the tanh form, which the file does not record; for such a file pass
`override_args={"activation": "gelu_tanh"}`.
Source: karpathy/nanoGPT, train.py and model.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastgpt2.gpt2.weights.huggingface import CONV1D, SIZES, StoredTensor
from fastgpt2.gpt2.weights.reading import load_pickle, tensors_of, transposed

NAME = "nanoGPT's ckpt.pt"
CHECKPOINT = "ckpt.pt"
SUFFIXES = (".pt", ".pth")
COMPILED = "_orig_mod."
LINEAR = tuple(name.removesuffix(".weight") for name in CONV1D)


def find(path: Path) -> Path | None:
    """The file to read if `path` is such a file or a folder with a ckpt.pt, else None."""
    if path.is_file() and path.suffix in SUFFIXES:
        return path
    return path / CHECKPOINT if (path / CHECKPOINT).is_file() else None


def read(path: Path) -> tuple[dict[str, Any], list[StoredTensor]]:
    """Returns settings and weights in HuggingFace's form. Raises ValueError if the file is not nanoGPT's."""
    content = load_pickle(path)
    model_args = content.get("model_args") if isinstance(content, Mapping) else None
    if not isinstance(model_args, Mapping) or not isinstance(content.get("model"), Mapping):
        raise ValueError(f"{path} is not {NAME}: it has no model and model_args")
    lacking = [name for name in SIZES if name not in model_args]
    if lacking:
        raise ValueError(f"{path}: model_args has no {', '.join(lacking)}")
    settings = {theirs[0]: model_args[ours] for ours, theirs in SIZES.items()}
    settings |= {"model_type": "gpt2", "activation_function": "gelu"}
    bias = model_args.get("bias", True)  # files from before there was a choice do not say
    settings["fastgpt2"] = {"bias": bias}
    stored = [_as_huggingface(tensor) for tensor in tensors_of(content["model"], path)]
    return settings, stored if bias else stored + _zero_biases(stored)


def _as_huggingface(tensor: StoredTensor) -> StoredTensor:
    tensor = dataclasses.replace(tensor, name=tensor.name.removeprefix(COMPILED))
    return transposed(tensor) if tensor.name.endswith(CONV1D) else tensor


def _zero_biases(stored: list[StoredTensor]) -> list[StoredTensor]:
    """Zeros for the biases that a model with bias=False does not have and HuggingFace's format requires."""
    names = {tensor.name for tensor in stored}
    zeros = []
    for tensor in stored:
        layer, _, kind = tensor.name.rpartition(".")
        has_bias = layer.endswith(LINEAR) or ".ln_" in tensor.name
        if kind == "weight" and has_bias and tensor.shape and f"{layer}.bias" not in names:
            shape = tensor.shape[-1:]
            read = partial(torch.zeros, shape)
            zeros.append(StoredTensor(tensor.source, f"{layer}.bias", shape, torch.float32, read))
    return zeros
