"""The tokens that `fastgpt2 verify --model` runs: of a text, of a file of ids, or of the Python library's sources."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgpt2.gpt2.config import GPTConfig
from fastgpt2.gpt2.data.sources import find_source
from fastgpt2.gpt2.data.tokenizer import Tokenizer

IDS = (".npy", ".pt")
CHARACTERS_A_TOKEN = 20  # more than any text has: what is read of a text is cut after that


def read_batch(file: str | None, tokenizer: Tokenizer | None, config: GPTConfig, tokens: int) -> Tensor:
    """(B, T + 1) int64: B*T is at most `tokens`, in two rows or more where there are as many.

    file: text, .npy or .pt with ids (B, T) of any integer dtype, or None. tokenizer: for text.
    Raises ValueError naming the file and what is wrong with it.
    """
    if tokens < 1:
        raise ValueError(f"--tokens is {tokens}, allowed are whole numbers of at least 1")
    if file is not None and Path(file).suffix in IDS:
        rows = _ids(Path(file))
        T = min(rows.size(1) - 1, config.block_size, max(1, tokens // 2))
        rows = rows[: max(1, tokens // T), : T + 1]
    else:
        assert tokenizer is not None
        row = _encoded(file, tokenizer, tokens)
        T = min(len(row) - 1, config.block_size, max(1, tokens // 2))
        B = max(1, min(len(row) // (T + 1), tokens // T))
        rows = row[: B * (T + 1)].view(B, T + 1)
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"--batch {file} holds token {low if low < 0 else high}, the model has 0..{config.vocab_size - 1}"
        )
    return rows


def _ids(path: Path) -> Tensor:
    try:
        if path.suffix == ".npy":
            ids = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.int64, casting="safe"))
        else:
            ids = torch.load(path, map_location="cpu", weights_only=True)
    except (ValueError, TypeError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} holds no token ids: {str(error).splitlines()[0]}") from None
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 2 or ids.size(0) < 1 or ids.size(1) < 2:
        found = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"{path} holds {found}, expected integers (B, T), T at least 2")
    return ids.long()


def _encoded(file: str | None, tokenizer: Tokenizer, tokens: int) -> Tensor:
    most = CHARACTERS_A_TOKEN * (tokens + 2)
    text = ""
    for document in find_source(file).texts():
        text += document
        if len(text) >= most:
            break
    row = torch.from_numpy(tokenizer.encode(text[:most]).astype(np.int64))
    if len(row) < 2:
        raise ValueError(f"--batch {file} is {len(row)} tokens long, expected two or more")
    return row
