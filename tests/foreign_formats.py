"""Other projects' checkpoints as those projects write them, from a `GPT2LMHeadModel`, without the package's own code.

write_nanogpt(folder, hf)      ckpt.pt of karpathy/nanoGPT's train.py
write_llmc(path, hf)           the .bin of karpathy/llm.c's train_gpt2.py, write_model
write_openai(folder, hf)       the folder that openai/gpt-2's download_model.py makes
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

LINEAR = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def layers(model: Any) -> dict[str, torch.Tensor]:
    """Weights by name, without their prefix and the head, linear layers (in, out)."""
    state = model.state_dict()
    return {k.removeprefix("transformer."): v.float() for k, v in state.items() if not k.startswith("lm_head")}


# ------------------------------------------------------------------------------------------------------------ nanoGPT


def write_nanogpt(
    folder: Path, model: Any, *, bias: bool = True, compiled: bool = False, legacy: bool = False, **model_args: Any
) -> Path:
    weights = {k: v.t().contiguous() if k.endswith(LINEAR) else v for k, v in layers(model).items()}
    prefix = "_orig_mod.transformer." if compiled else "transformer."
    state = {prefix + k: v for k, v in weights.items() if bias or not k.endswith(".bias")}
    state[prefix.replace("transformer.", "lm_head.weight")] = state[f"{prefix}wte.weight"]
    config = model.config
    sizes = dict(
        n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, block_size=config.n_positions, bias=bias,
        vocab_size=config.vocab_size, dropout=0.2,
    )  # fmt: skip
    checkpoint = {
        "model": state,
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]},
        "model_args": {**sizes, **model_args},
        "iter_num": 250,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out", "dataset": "shakespeare_char", "compile": True, "learning_rate": 1e-3},
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, folder / "ckpt.pt", _use_new_zipfile_serialization=not legacy)
    return folder / "ckpt.pt"


# -------------------------------------------------------------------------------------------------------------- llm.c


def write_llmc(path: Path, model: Any, dtype: torch.dtype = torch.float32, multiple: int = 128) -> Path:
    config, weights = model.config, layers(model)
    V = config.vocab_size
    padded = -(-V // multiple) * multiple
    header = torch.zeros(256, dtype=torch.int32)
    sizes = [config.n_positions, V, config.n_layer, config.n_head, config.n_embd, padded]
    header[:8] = torch.tensor([20240326, {torch.float32: 3, torch.bfloat16: 5}[dtype], *sizes])
    table = torch.full((padded, config.n_embd), 7.0)  # what lies in the padding is nobody's business
    table[:V] = weights["wte.weight"]
    kinds = (
        "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias",
        "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
    )  # fmt: skip
    tensors = [table, weights["wpe.weight"]]
    for kind in kinds:
        for i in range(config.n_layer):
            tensor = weights[f"h.{i}.{kind}"]
            tensors.append(tensor.t() if kind in LINEAR else tensor)
    tensors += [weights["ln_f.weight"], weights["ln_f.bias"]]
    with open(path, "wb") as file:
        file.write(header.numpy().tobytes())
        for tensor in tensors:
            bits = tensor.to(dtype).contiguous().view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
            file.write(bits.numpy().tobytes())
    return path


# --------------------------------------------------------------------------------------------------------- TensorFlow


def write_openai(folder: Path, model: Any, block_entries: int = 5) -> Path:
    """As TensorFlow 1 did: one data file, and an index whose blocks hold `block_entries` keys each."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    hparams = dict(
        n_vocab=config.vocab_size, n_ctx=config.n_positions, n_embd=config.n_embd, n_head=config.n_head,
        n_layer=config.n_layer,
    )  # fmt: skip
    (folder / "hparams.json").write_text(json.dumps(hparams))
    data, entries = b"", {b"": field(1, 1) + field(3, field(1, 1))}  # the header: one shard, little-endian, version 1
    tensors = {openai_name(name): tensor for name, tensor in layers(model).items()}
    for name in sorted(tensors):
        array = tensors[name].numpy().astype("<f4")
        array = array[None] if name.endswith("/w") else array
        entries[name.encode()] = bundle_entry(array, len(data))
        data += array.tobytes()
    (folder / "model.ckpt.data-00000-of-00001").write_bytes(data)
    (folder / "model.ckpt.index").write_bytes(table(entries, block_entries))
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
    return folder


def openai_name(name: str) -> str:
    path, kind = name.replace("h.", "h", 1).rsplit(".", 1)
    if path in ("wte", "wpe"):
        return f"model/{path}"
    norm = path.rsplit(".", 1)[-1].startswith("ln_")
    return f"model/{path.replace('.', '/')}/{'b' if kind == 'bias' else 'g' if norm else 'w'}"


def number(value: int) -> bytes:
    """A varint."""
    out = b""
    while value > 127:
        out += bytes([value % 128 + 128])
        value //= 128
    return out + bytes([value])


def field(number_of_field: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return number(number_of_field * 8) + number(value)
    return number(number_of_field * 8 + 2) + number(len(value)) + value


def bundle_entry(array: np.ndarray, offset: int, dtype: int = 1) -> bytes:
    """BundleEntryProto; zeros are left out, as protocol buffers do."""
    shape = b"".join(field(2, field(1, size)) for size in array.shape)
    place = field(4, offset) if offset else b""
    checksum = number(6 * 8 + 5) + struct.pack("<I", crc32c(array.tobytes()))
    return field(1, dtype) + field(2, shape) + place + field(5, array.nbytes) + checksum


def table(entries: dict[bytes, bytes], block_entries: int) -> bytes:
    """An SSTable: data blocks, an empty meta index, the index, the footer."""
    keys = sorted(entries)
    out, index = b"", {}
    for first in range(0, len(keys), block_entries):
        some = keys[first : first + block_entries]
        content = block({key: entries[key] for key in some})
        index[some[-1]] = number(len(out)) + number(len(content))
        out += sealed(content)
    handles = b""
    for content in (block({}), block(index, restart_every=1)):
        handles += number(len(out)) + number(len(content))
        out += sealed(content)
    return out + handles.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def block(entries: dict[bytes, bytes], restart_every: int = 16) -> bytes:
    out, restarts, before = b"", [0], b""
    for i, (key, value) in enumerate(entries.items()):
        shared = 0
        if i % restart_every == 0:
            restarts = [*restarts, len(out)] if i else restarts
        else:
            while shared < min(len(key), len(before)) and key[shared] == before[shared]:
                shared += 1
        out += number(shared) + number(len(key) - shared) + number(len(value)) + key[shared:] + value
        before = key
    return out + b"".join(struct.pack("<I", r) for r in (*restarts, len(restarts)))


def sealed(content: bytes, compression: int = 0) -> bytes:
    content += bytes([compression])
    return content + struct.pack("<I", crc32c(content))


def crc32c(data: bytes) -> int:
    """Bit by bit, then masked."""
    crc = 2**32 - 1
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc // 2 ^ (0x82F63B78 if crc % 2 else 0)
    crc ^= 2**32 - 1
    return ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) % 2**32
