"""GPT-2s of HuggingFace with random weights of a trained model's scale, and folders that hold them in every format.

hf = hf_gpt2(n_layer=2, n_embd=64, n_head=4)       every weight, bias and gain random: no term is 0 or 1 by luck
write_folder(folder, hf, "model.safetensors")      as the hub, transformers or an old script would have written it
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from fastgpt2 import GPT
from fastgpt2.gpt2.weights.huggingface import huggingface_state

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where Triton runs, interpreted or not
TINY: dict[str, Any] = dict(n_layer=2, n_embd=32, n_head=2, n_positions=24, vocab_size=61)
FORMATS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "legacy.bin",
)


def hf_gpt2(seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> GPT2LMHeadModel:
    """A GPT2LMHeadModel in train mode, without dropout: `TINY` with other settings, weights drawn from `seed`."""
    no_dropout = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    settings = {**TINY, **no_dropout, "bos_token_id": None, "eos_token_id": None, **settings}
    model = GPT2LMHeadModel(GPT2Config(**settings, attn_implementation="eager")).to(dtype)
    randomise(model, seed)
    return model


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights N(0, 0.02 ... 0.1), biases N(0, 0.05), gains N(1, 0.1); same values in any dtype, up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    for i, (name, parameter) in enumerate(model.named_parameters()):
        std = 0.05 if name.endswith("bias") else (0.02, 0.05, 0.1)[i % 3] if parameter.dim() > 1 else 0.1
        mean = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std + mean)


def state_of(
    model: GPT2LMHeadModel, *, prefix: bool = True, head: bool = True, buffers: bool = False
) -> dict[str, Tensor]:
    """Its weights as files have them: with `transformer.` or not, with lm_head.weight or not, with old mask buffers."""
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    if buffers:
        T = model.config.n_positions
        for layer in range(model.config.n_layer):
            mask = torch.ones(T, T, dtype=torch.uint8).tril().view(1, 1, T, T)
            state[f"transformer.h.{layer}.attn.bias"] = mask
            state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    if not head:
        del state["lm_head.weight"]
    return state if prefix else {k.removeprefix("transformer."): v for k, v in state.items()}


def write_folder(folder: Path, model: GPT2LMHeadModel, file: str = FORMATS[0], **layout: bool) -> Path:
    """config.json and the weights, in one of `FORMATS`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    write_weights(folder, state_of(model, **layout), file)
    return folder


def write_weights(folder: Path, state: dict[str, Any], file: str = FORMATS[0]) -> None:
    if file.endswith(".index.json"):
        names, kind = list(state), file.removesuffix(".index.json")
        stem, suffix = kind.split(".")
        weight_map = {}
        for i in range(3):
            shard = f"{stem}-0000{i + 1}-of-00003.{suffix}"
            part = {n: state[n] for n in names[i::3]}
            _write(folder / shard, part)
            weight_map |= dict.fromkeys(part, shard)
        (folder / file).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    elif file == "legacy.bin":
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    else:
        _write(folder / file, state)


def _write(path: Path, state: dict[str, Any]) -> None:
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path, metadata={"format": "pt"})
    else:
        torch.save(state, path)


def same_weights(ours: GPT, hf: torch.nn.Module) -> bool:
    """Bit for bit, in their layout."""
    state, theirs = huggingface_state(ours), dict(hf.named_parameters())
    return state.keys() == theirs.keys() and all(torch.equal(state[k], theirs[k].float()) for k in state)
