"""Keys and values of the tokens that a model has read, so that the next token costs one token's work.

    cache = KVCache(model, B, S)
    logits, _ = model(prompts, cache=cache)    # (B, T) tokens at positions 0..T-1: the cache is filled
    logits, _ = model(token, cache=cache)      # (B, 1), each at its row's next position: appended

Both return logits (B, 1, V) of each row's last token. All memory is taken at the beginning. Positions are absolute, so
a row cannot slide past S: `start` empties the cache for another prompt.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from fastgpt2.gpt2 import ops
from fastgpt2.gpt2.config import GPTConfig
from fastgpt2.gpt2.ops import Kernels


class CachedModel(Protocol):
    """What a cache asks of a model: a `GPT` has it."""

    config: GPTConfig
    transformer: Any

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...


class KVCache:
    """Room for S tokens in each of B rows, in the dtype that the model computes in (autocast's inside autocast).

    lengths: (B,) int32 on the model's device, the tokens that each row holds.
    longest: the longest row's length, or more, known without asking the device.
    whole: attention is given all S positions, not only the first `longest`, and `longest` is not counted: every token
        is the same work, as CUDA graphs and torch.compile need it. The caller sees to it that there is room.
    """

    def __init__(self, model: CachedModel, B: int, S: int, whole: bool = False):
        config, device = model.config, model.device
        if B < 1:
            raise ValueError(f"B is {B}, a cache has at least 1 row")
        if not 1 <= S <= config.block_size:
            raise ValueError(f"S is {S}, allowed are 1..{config.block_size} (block_size)")
        # Zeros, because attention multiplies what is not yet written by 0, and 0 * NaN is NaN.
        shape = (len(model.transformer.h), 2, B, config.n_head, S, config.head_size)
        self.keys_values = torch.zeros(shape, dtype=self.dtype_for(model), device=device)
        self.lengths = torch.zeros(B, dtype=torch.int32, device=device)
        self.longest = 0
        self.whole = whole
        self._prompt_lengths: Tensor | None = None
        self._even = True  # all rows are known to hold as many tokens

    @staticmethod
    def dtype_for(model: CachedModel) -> torch.dtype:
        """What a cache made now would have."""
        kind = model.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype

    def start(self, lengths: Tensor | None = None) -> None:
        """Empties the cache. lengths (B,): how many tokens of each row of the next prompts are real; the rest, at the
        row's end, is padding. Default: all."""
        self.keys_values.zero_()  # the last text may have left NaN
        self.lengths.zero_()
        self.longest = 0
        self._prompt_lengths = lengths
        self._even = lengths is None or lengths.size(0) == 1
        if lengths is not None and lengths.device.type == "cpu":  # elsewhere the answer would have to be waited for
            self._even = bool((lengths == lengths[0]).all())

    # ------------------------------------------------------------------------------------- called by the model

    def make_room(self, idx: Tensor, targets: Tensor | None, training: bool) -> None:
        """Counts the tokens to come. Raises ValueError where `model(idx, targets, cache)` cannot be computed."""
        B, S = self.keys_values.size(2), self.keys_values.size(4)
        if targets is not None or training:
            raise ValueError(f"cache is for writing text: {'leave out targets' if targets is not None else 'eval()'}")
        if idx.size(0) != B:
            raise ValueError(f"idx has {idx.size(0)} rows, the cache {B}")
        if not self.continues(idx) and self.longest:
            raise ValueError(f"idx has {idx.size(1)} tokens a row and the cache is not empty: cache.start() empties it")
        if self.longest + idx.size(1) > S:
            raise ValueError(f"idx makes rows of {self.longest + idx.size(1)} tokens, the cache has room for {S}")
        if not self.whole:
            self.longest += idx.size(1)

    def continues(self, idx: Tensor) -> bool:
        """One token a row goes on from what is there (also from nothing); more are new prompts."""
        return idx.size(1) == 1

    def attention(self, layer: int, qkv: Tensor, n_head: int, scale: float, kernels: Kernels) -> Tensor:
        """Writes k and v of qkv (B, T, 3*C) into the cache; attention over all that is there: (B, T, C)."""
        cache = self.keys_values[layer]
        if self.continues(qkv):
            seen = cache if self.whole else cache[:, :, :, : self.longest]
            full = self._even and not self.whole
            return ops.decode_attention(qkv, seen, self.lengths, n_head, scale, kernels, full)
        B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
        kv = qkv[:, :, C:].view(B, T, 2, n_head, C // n_head)
        cache[:, :, :, :T] = kv.permute(2, 0, 3, 1, 4)
        return ops.causal_attention(qkv, n_head, scale, 0.0, kernels)

    def last(self, x: Tensor) -> Tensor:
        """Counts the tokens of x (B, T, C) as read; returns each row's last one (B, 1, C)."""
        if self.continues(x):
            self.lengths += 1
            return x
        if self._prompt_lengths is None:
            self.lengths.fill_(x.size(1))
            return x[:, -1:]
        self.lengths.copy_(self._prompt_lengths)
        rows = torch.arange(x.size(0), device=x.device)
        return x[rows, self._prompt_lengths.long() - 1][:, None]
