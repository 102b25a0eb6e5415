"""What a call of the model may be given: checked before anything is computed, without waiting for a GPU.

Shapes and dtypes are known on the host. Values are where the tensor is: on a CPU a wrong one is a ValueError that names
it, on a GPU a device-side assertion, under torch.compile a RuntimeError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgpt2.gpt2.config import GPTConfig

if TYPE_CHECKING:
    from fastgpt2.gpt2.cache import KVCache


def check_tokens(name: str, tokens: Tensor, config: GPTConfig, shape: torch.Size | None = None) -> None:
    """`tokens`, the argument `name`, must be (B, T) int64 or have `shape`, T at most block_size, every token in the
    vocabulary; the argument "targets" may have negative ones too."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name} is a {type(tokens).__name__}, expected a tensor (B, T) of int64 tokens")
    if tokens.dtype != torch.int64:
        raise TypeError(f"{name} is {tokens.dtype}, expected int64 tokens")
    if tokens.dim() != 2 or (shape is not None and tokens.shape != shape):
        wanted = "(B, T)" if shape is None else tuple(shape)
        raise ValueError(f"{name} has shape {tuple(tokens.shape)}, expected {wanted}")
    if tokens.size(1) == 0:
        raise ValueError(f"{name} is empty: its shape is {tuple(tokens.shape)}, a sequence has at least one token")
    if tokens.size(1) > config.block_size:
        raise ValueError(f"{name} has {tokens.size(1)} tokens a row, block_size is {config.block_size}")
    check_range(name, tokens, "vocab_size", config.vocab_size, negative=name == "targets")


def check_range(name: str, tokens: Tensor, limit: str, size: int, negative: bool = False) -> None:
    """`tokens`, the argument `name`, must be in 0..size - 1, where `limit` is the name of `size`; or be `negative`."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return  # inside of vmap values are not to be seen
    right = tokens == tokens.clamp(min=None if negative else 0, max=size - 1)
    allowed = f"{limit} is {size}: allowed are 0..{size - 1}"
    out_of_range = f"{name} holds a token out of range, {allowed}"
    if torch.compiler.is_compiling():
        torch._assert_async(right.all(), out_of_range)
        return
    try:
        torch._assert_async(right.all(), out_of_range)  # waits for no GPU
    except RuntimeError:
        raise ValueError(f"{name} holds token {int(tokens[~right][0])}, {allowed}") from None


def check_documents(documents: Tensor, idx: Tensor, cache: KVCache | None) -> None:
    """`documents` must be (n + 1,) int32, rise from 0 to the number of tokens of `idx`, which it may repeat at its end,
    and come without a cache."""
    if cache is not None:
        raise ValueError("documents cannot be used together with a cache: allowed is one of them")
    if documents.dtype != torch.int32 or documents.dim() != 1 or documents.numel() < 2:
        raise ValueError(f"documents is {documents.dtype} {tuple(documents.shape)}, expected int32 (n + 1,)")
    steps = documents.diff()
    rises = (steps > 0) | ((steps == 0) & (documents[1:] == idx.numel()))
    right = (documents[0] == 0) & (documents[-1] == idx.numel()) & rises.all()
    if torch.compiler.is_compiling():
        torch._assert_async(right, "documents is expected to rise from 0 to the number of tokens of idx")
        return
    expected = f"expected to rise from 0 to {idx.numel()}, the tokens of idx"
    try:
        torch._assert_async(right, f"documents is {expected}")  # waits for no GPU
    except RuntimeError:
        raise ValueError(f"documents is {documents.tolist()}, {expected}") from None
