"""The KV cache: keys and values of the tokens that a model has read, so that the next token needs the work of one.

    cache = KVCache(model, B, S)
    logits, _ = model(prompts, cache=cache)    # (B, T) tokens at positions 0..T-1 fill the cache
    logits, _ = model(token, cache=cache)      # (B, 1), one token a row, is appended at the row's next position

Both return logits (B, 1, V) of each row's last token. The memory for S positions is allocated at once. Positions are
absolute, so a row cannot grow beyond S; `start` empties the cache for another prompt.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from fastgpt2.gpt2 import ops
from fastgpt2.gpt2.config import GPTConfig
from fastgpt2.gpt2.ops import Kernels


class CachedModel(Protocol):
    """The attributes of a model that a cache needs. `GPT` has them."""

    config: GPTConfig
    transformer: Any

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...


class KVCache:
    """Keys and values of up to S tokens in each of B rows, in the dtype in which the model computes (inside autocast,
    autocast's dtype).

    lengths: (B,) int32 on the model's device, the number of tokens in each row.
    longest: an upper bound of `lengths`, kept on the host so that the device need not be asked.
    whole: attention reads all S positions instead of the first `longest`, and `longest` is not updated. Every token
        then has the same shapes, as CUDA graphs and torch.compile need. The caller ensures that rows stay within S.
    Raises ValueError if B is below 1 or S is not in 1..block_size.
    """

    def __init__(self, model: CachedModel, B: int, S: int, whole: bool = False):
        config, device = model.config, model.device
        if B < 1:
            raise ValueError(f"B is {B}, allowed are whole numbers of at least 1")
        if not 1 <= S <= config.block_size:
            raise ValueError(f"S is {S}, allowed are 1..{config.block_size} (block_size)")
        # Zeros, because attention multiplies positions not yet written by 0, and 0 * NaN is NaN.
        shape = (len(model.transformer.h), 2, B, config.n_head, S, config.head_size)
        self.keys_values = torch.zeros(shape, dtype=self.dtype_for(model), device=device)
        self.lengths = torch.zeros(B, dtype=torch.int32, device=device)
        self.longest = 0
        self.whole = whole
        self._prompt_lengths: Tensor | None = None
        self._even = True  # all rows are known to have the same length

    @staticmethod
    def dtype_for(model: CachedModel) -> torch.dtype:
        """The dtype of a cache that is created now: autocast's dtype inside autocast, else the model's."""
        kind = model.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype

    def start(self, lengths: Tensor | None = None) -> None:
        """Empties the cache for new prompts.

        lengths (B,) int64: the number of real tokens in each row of the prompts; the rest of a row, at its end, is
            padding. By default every token is real.
        """
        self.keys_values.zero_()  # the previous text may have left NaN
        self.lengths.zero_()
        self.longest = 0
        self._prompt_lengths = lengths
        self._even = lengths is None or lengths.size(0) == 1
        if lengths is not None and lengths.device.type == "cpu":  # on a GPU this would wait for the device
            self._even = bool((lengths == lengths[0]).all())

    # ------------------------------------------------------------------------------------- called by the model

    def make_room(self, idx: Tensor, targets: Tensor | None, training: bool) -> None:
        """Adds the tokens of idx (B, T) to `longest`. Raises ValueError for a call that a cache does not support."""
        B, S = self.keys_values.size(2), self.keys_values.size(4)
        if targets is not None or training:
            remedy = "leave out targets" if targets is not None else "call model.eval() first"
            raise ValueError(f"cache is for generating text: {remedy}")
        if idx.size(0) != B:
            raise ValueError(f"idx has {idx.size(0)} rows, the cache {B}")
        if not self.continues(idx) and self.longest:
            raise ValueError(f"idx has {idx.size(1)} tokens a row and the cache is not empty: cache.start() empties it")
        if self.longest + idx.size(1) > S:
            raise ValueError(f"idx makes rows of {self.longest + idx.size(1)} tokens, the cache has room for {S}")
        if not self.whole:
            self.longest += idx.size(1)

    def continues(self, idx: Tensor) -> bool:
        """Whether idx continues the cached rows. One token a row does, also in an empty cache; more are new prompts."""
        return idx.size(1) == 1

    def attention(self, layer: int, qkv: Tensor, n_head: int, scale: float, kernels: Kernels) -> Tensor:
        """Writes k and v of qkv (B, T, 3*C) into the cache and attends over all cached tokens: (B, T, C)."""
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
        """Adds the tokens of x (B, T, C) to `lengths` and returns each row's last token (B, 1, C)."""
        if self.continues(x):
            self.lengths += 1
            return x
        if self._prompt_lengths is None:
            self.lengths.fill_(x.size(1))
            return x[:, -1:]
        self.lengths.copy_(self._prompt_lengths)
        rows = torch.arange(x.size(0), device=x.device)
        return x[rows, self._prompt_lengths.long() - 1][:, None]
