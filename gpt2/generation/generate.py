"""Generating tokens: each one is sampled from the model's distribution of the next token.

    ids = generate(model, idx, 100, top_k=50)              (B, T) -> (B, T + 100)
    for tokens in Generation(model, idx, 100, Sampling(top_k=50)): ...      (B,) at a time, as they are sampled

The tokens are those that the model would generate without a cache: see `Decoder`.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt2.gpt2.generation.decoder import Decoder
from fastgpt2.gpt2.generation.sampling import Sampling, next_token
from fastgpt2.gpt2.model import GPT, unwrap

# Checking whether all rows have stopped waits for the GPU, so it is done once in this number of tokens.
STOP_CHECK_INTERVAL = 32

Prompts = Tensor | Sequence[Sequence[int] | Tensor]


def generate(
    model: nn.Module,
    idx: Prompts,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    greedy: bool = False,
    *,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    **more: Any,
) -> Tensor:
    """Continues idx by n tokens: (B, T + n) int64. n is max_new_tokens, or less if every row reached a stop token.

    model: a GPT, also compiled, in DistributedDataParallel or in peft's wrapper; the GPT inside computes.
    idx: (B, T) int64, or B prompts of different lengths, which are padded on the left to the longest one.
    generator: on the model's device; by default the device's own generator.
    temperature, top_k, top_p, min_p, repetition_penalty, greedy: see `Sampling`.
    more: prompt_lengths, stop_tokens, vocab_size, crop, compile, cuda_graph, as in `Generation`.
    Raises ValueError or TypeError naming the argument, its value and what is allowed.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, greedy)
    generation = Generation(model, idx, max_new_tokens, sampling, generator, **more)
    for _ in generation:
        pass
    return generation.ids


class Generation(Iterator[Tensor]):
    """An iterator over the sampled tokens, (B,) int64 at a time, on the model's device.

    idx, max_new_tokens, generator: as for `generate`.
    prompt_lengths: B numbers in 1..T. The prompt of row b is its last prompt_lengths[b] tokens, and the tokens before
        them are padding. By default whole rows, or the lengths of a list of prompts.
    stop_tokens: a row that sampled one of them repeats it from then on. Iteration ends when all rows have sampled one.
    vocab_size: only the first so many tokens are sampled, for a table with more rows than there are tokens. By default
        the model's.
    with_logprobs: keeps `logprobs`.
    crop: if a prompt is longer than block_size, the model sees its end, with a warning. With False it is an error.
    compile, cuda_graph: as for `Decoder`.
    """

    def __init__(
        self,
        model: nn.Module,
        idx: Prompts,
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
        generator: torch.Generator | None = None,
        *,
        prompt_lengths: Sequence[int] | Tensor | None = None,
        stop_tokens: Sequence[int] = (),
        vocab_size: int | None = None,
        with_logprobs: bool = False,
        crop: bool = True,
        compile: bool = False,
        cuda_graph: bool = True,
    ):
        model = unwrap(model)
        device, V = model.device, model.config.vocab_size
        if not isinstance(idx, Tensor):
            idx, prompt_lengths = _left_padded(idx, prompt_lengths, device)
        pads = _checked_prompts(idx, prompt_lengths, model, crop)
        if not isinstance(max_new_tokens, int | numbers.Integral) or max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {max_new_tokens!r}, allowed are whole numbers of at least 0")
        if not isinstance(stop_tokens, Collection):
            raise TypeError(f"stop_tokens is {stop_tokens!r}, expected a list of tokens")
        for token in stop_tokens:
            if not 0 <= token < V:
                raise ValueError(f"stop_tokens holds {token}, vocab_size is {V}: allowed are 0..{V - 1}")
        if vocab_size is not None and not 1 <= vocab_size <= V:
            raise ValueError(f"vocab_size is {vocab_size}, the model's is {V}: allowed are 1..{V}")
        B, T = idx.shape
        self.vocab_size = V if vocab_size is None else vocab_size
        self.sampling, self.generator = sampling, generator
        self.tokens = torch.zeros(B, T + max_new_tokens, dtype=torch.int64, device=device)
        self.tokens[:, :T] = idx
        self.T = self.end = T
        self._logprobs = torch.zeros(B, max_new_tokens, dtype=torch.float32, device=device) if with_logprobs else None
        self.stop = torch.tensor(list(stop_tokens), device=device) if len(stop_tokens) else None
        self.stop_interval = 1 if device.type == "cpu" else STOP_CHECK_INTERVAL
        self.stopped = torch.zeros(B, dtype=torch.bool, device=device)
        self.written = torch.zeros(B, dtype=torch.int64, device=device)  # new tokens up to and including a row's stop
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            real = torch.arange(T, device=device) >= pads[:, None]
            self.seen = torch.zeros(B, V, dtype=torch.bool, device=device)
            self.seen.scatter_(1, torch.where(real, self.tokens[:, :T], self.tokens[:, T - 1 : T]), True)
        self.decoder = Decoder(model, self.tokens, pads, compile=compile, cuda_graph=cuda_graph)
        self.closed = False

    def close(self) -> None:
        """Ends the iteration and keeps the captured graph for the model's next text."""
        self.decoder.release()
        self.closed = True

    @torch.no_grad()
    def __next__(self) -> Tensor:
        if self.closed or self.end == self.tokens.size(1) or self._all_stopped():
            self.close()
            raise StopIteration
        logits = self.decoder.logits(self.end)  # (B, V)
        seen = None if self.seen is None else self.seen[:, : self.vocab_size]
        token = next_token(logits[:, : self.vocab_size], self.sampling, self.generator, seen)  # (B, 1)
        if self.stop is not None:
            token = torch.where(self.stopped[:, None], self.tokens[:, self.end - 1 : self.end], token)
        if self._logprobs is not None:
            chosen = logits.gather(1, token).squeeze(1).float() - logits.float().logsumexp(dim=1)
            self._logprobs[:, self.end - self.T] = chosen.masked_fill(self.stopped, 0.0)
        if self.seen is not None:
            self.seen.scatter_(1, token, True)
        self.tokens[:, self.end : self.end + 1] = token
        self.end += 1
        if self.stop is not None:
            self.written += ~self.stopped
            self.stopped |= torch.isin(token.squeeze(1), self.stop)
        return token.squeeze(1)

    @property
    def ids(self) -> Tensor:
        """(B, T + n) int64: the prompts, padded on the left, and the tokens generated up to the last row's stop."""
        return self.tokens[:, : self.T + self._n()]

    @property
    def logprobs(self) -> Tensor:
        """(B, n) float32: the log-probability of every new token under the model's distribution at temperature 1,
        whatever the settings of sampling. 0 after a row's stop. Raises ValueError if with_logprobs is False."""
        if self._logprobs is None:
            raise ValueError("with_logprobs is False: log-probabilities were not kept")
        return self._logprobs[:, : self._n()]

    def _n(self) -> int:
        return self.end - self.T if self.stop is None else int(self.written.max())

    def _all_stopped(self) -> bool:
        return self.stop is not None and (self.end - self.T) % self.stop_interval == 0 and bool(self.stopped.all())


# --------------------------------------------------------------------------------------------------------- prompts


def _left_padded(
    prompts: Sequence[Sequence[int] | Tensor], prompt_lengths: Any, device: torch.device
) -> tuple[Tensor, list[int]]:
    """Prompts of different lengths -> (B, longest), zeros on the left, and their lengths."""
    if prompt_lengths is not None:
        raise ValueError("prompt_lengths is for idx of shape (B, T); a list of prompts has lengths of its own")
    rows = [torch.as_tensor(prompt, device=device) for prompt in prompts]
    for i, row in enumerate(rows):
        if row.dim() != 1 or not row.numel():
            raise ValueError(f"idx[{i}] has shape {tuple(row.shape)}: a prompt is a row of at least one token")
        if row.is_floating_point():
            raise TypeError(f"idx[{i}] is {row.dtype}, expected int64 tokens")
    if not rows:
        raise ValueError("idx is empty: give at least one prompt")
    longest = max(map(len, rows))
    padded = [torch.nn.functional.pad(row.long(), (longest - len(row), 0)) for row in rows]
    return torch.stack(padded), [len(row) for row in rows]


def _checked_prompts(idx: Tensor, prompt_lengths: Sequence[int] | Tensor | None, model: GPT, crop: bool) -> Tensor:
    """The number of padding tokens on the left of each row: (B,) int64. Raises ValueError or TypeError."""
    V, S, device = model.config.vocab_size, model.config.block_size, model.device
    if idx.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"idx is {idx.dtype}, expected int64 tokens")
    if idx.dim() != 2:
        raise ValueError(f"idx has shape {tuple(idx.shape)}, expected (B, T)")
    if idx.numel() == 0:
        raise ValueError(f"idx is an empty prompt, its shape is {tuple(idx.shape)}: give at least one token")
    if idx.device != device:
        raise ValueError(f"idx is on {idx.device}, the model on {device}")
    low, high = (int(v) for v in idx.aminmax())
    if low < 0 or high >= V:
        wrong = low if low < 0 else high
        raise ValueError(f"idx holds token {wrong}, vocab_size is {V}: allowed are 0..{V - 1}")
    B, T = idx.shape
    lengths = torch.as_tensor([T] * B if prompt_lengths is None else prompt_lengths, device=device)
    if lengths.shape != (B,) or lengths.is_floating_point() or int(lengths.min()) < 1 or int(lengths.max()) > T:
        raise ValueError(f"prompt_lengths is {lengths.tolist()}, expected {B} numbers in 1..{T}")
    if (longest := int(lengths.max())) > S:
        said = f"a prompt has {longest} tokens, block_size is {S}"
        if not crop:
            raise ValueError(f"{said}, and crop is False: long prompts are refused")
        warnings.warn(f"{said}: the model sees the last {S}", stacklevel=4)
    return T - lengths.long()
