"""Checks of the model's arguments, made before anything is computed and without waiting for a GPU.

Shapes and dtypes are known on the host. Values are checked where the tensor is: a wrong value is a ValueError that
names it on a CPU, a device-side assertion on a GPU, and a RuntimeError under torch.compile.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgpt2.gpt2.config import GPTConfig

if TYPE_CHECKING:
    from fastgpt2.gpt2.cache import KVCache


def check_tokens(name: str, tokens: Tensor, config: GPTConfig, shape: torch.Size | None = None) -> None:
    """Checks the argument `name`: int64, of `shape` or, by default, (B, T) with T in 1..block_size, every token in the
    vocabulary. The argument "targets" may hold negative values too. Raises TypeError or ValueError."""
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
    """Raises ValueError unless every value of `tokens`, the argument `name`, is in 0..size - 1.

    limit: what the error calls `size`. negative: negative values are allowed too.
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return  # values cannot be read inside vmap
    right = tokens == tokens.clamp(min=None if negative else 0, max=size - 1)
    allowed = f"{limit} is {size}: allowed are 0..{size - 1}"
    out_of_range = f"{name} holds a token out of range, {allowed}"
    if torch.compiler.is_compiling():
        torch._assert_async(right.all(), out_of_range)
        return
    try:
        torch._assert_async(right.all(), out_of_range)  # does not wait for a GPU
    except RuntimeError:
        raise ValueError(f"{name} holds token {int(tokens[~right][0])}, {allowed}") from None


def check_document_starts(document_starts: Tensor, idx: Tensor, cache: KVCache | None) -> None:
    """Raises ValueError unless `document_starts` is (n + 1,) int32, rises from 0 to the number of tokens of `idx`,
    which it may repeat at its end, and `cache` is None."""
    if cache is not None:
        raise ValueError("document_starts cannot be used together with a cache: give one of them")
    if document_starts.dtype != torch.int32 or document_starts.dim() != 1 or document_starts.numel() < 2:
        found = f"{document_starts.dtype} {tuple(document_starts.shape)}"
        raise ValueError(f"document_starts is {found}, expected int32 (n + 1,)")
    steps = document_starts.diff()
    rises = (steps > 0) | ((steps == 0) & (document_starts[1:] == idx.numel()))
    right = (document_starts[0] == 0) & (document_starts[-1] == idx.numel()) & rises.all()
    if torch.compiler.is_compiling():
        torch._assert_async(right, "document_starts is expected to rise from 0 to the number of tokens of idx")
        return
    expected = f"expected to rise from 0 to {idx.numel()}, the number of tokens of idx"
    try:
        torch._assert_async(right, f"document_starts is {expected}")  # does not wait for a GPU
    except RuntimeError:
        raise ValueError(f"document_starts is {document_starts.tolist()}, {expected}") from None


def renamed_documents(document_starts: Tensor | None, documents: Tensor | None) -> Tensor | None:
    """The argument document_starts, for which `documents` is the former name, accepted with a DeprecationWarning.

    Raises ValueError if both are given.
    """
    if documents is None:
        return document_starts
    if document_starts is not None:
        raise ValueError("documents is the former name of document_starts, and both are given: give document_starts")
    if not torch.compiler.is_compiling():
        said = "documents is now document_starts; the former name goes with the next release"
        warnings.warn(said, DeprecationWarning, stacklevel=3)
    return documents
