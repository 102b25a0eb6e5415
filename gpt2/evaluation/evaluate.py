"""The loss of a model on text."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt2.gpt2.context import Context
from fastgpt2.gpt2.data.tokenizer import Tokenizer
from fastgpt2.gpt2.data.windows import Text, encode_text, strided
from fastgpt2.gpt2.model import GPT
from fastgpt2.gpt2.ops import IGNORED_TARGET

Watch = Callable[[Sequence[Any]], Iterable[Any]]  # yields its items, perhaps showing progress, as rich.progress.track


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in eval mode and gradients are off. Afterwards each module is in its former mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def total_loss(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    find_document_starts: Callable[[Tensor], Tensor] | None = None,
) -> tuple[float, int]:
    """(sum of the cross-entropy in nats, number of tokens) over all batches of (idx, targets), each (B, T) int64.

    Negative targets are ignored. find_document_starts: computes the model's argument document_starts from idx; by
    default attention crosses documents.
    """
    total, tokens = 0.0, 0
    with evaluating(model):
        for idx, targets in batches:
            more = {}
            if find_document_starts is not None:
                more["document_starts"] = find_document_starts(idx).to(device)
            _, loss = model(idx.to(device), targets.to(device), **more)
            count = int((targets >= 0).sum())
            total += loss.item() * count
            tokens += count
    return total, tokens


def mean_loss(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """The mean cross-entropy in nats a token over all batches. See `total_loss`."""
    total, tokens = total_loss(model, batches, device)
    return total / tokens


def windows_at_once(model: GPT, device: torch.device) -> int:
    """The number of windows of block_size tokens in a batch without gradients: 8, or on a GPU up to 64 if half of its
    free memory holds their logits, probabilities and one block's activations in fp32."""
    if device.type != "cuda":
        return 8
    free, _ = torch.cuda.mem_get_info(device)
    c = model.config
    window_bytes = 4 * c.block_size * (3 * c.vocab_size + 24 * c.n_embd)
    return max(8, min(64, free // 2 // window_bytes))


@dataclass(frozen=True)
class TextLoss:
    """loss: nats a token. bits_per_byte: bits a byte of text, which can be compared between different tokenizers."""

    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float


def text_loss(
    model: GPT,
    tokenizer: Tokenizer,
    text: Text,
    *,
    stride: int | None = None,
    batch_size: int = 8,
    device: torch.device,
    watch: Watch = iter,
    tokens: np.ndarray | None = None,
) -> TextLoss:
    """The loss of the model over every token of a text.

    Each document is preceded by the end of text, as in training. If the tokenizer has no such token, the first token
    of the text cannot be predicted and is not counted.
    stride: see `windows.strided`, by default block_size. batch_size: windows in a batch.
    tokens: `windows.encode_text` of the text, where that was done before.
    Raises ValueError for a stride that is not in 1..block_size, or a text of one token.
    """
    T = model.config.block_size
    if tokens is None:
        tokens = encode_text(text, tokenizer)
    if tokenizer.end_of_text is not None:
        tokens = np.roll(tokens, 1)  # moves the end of text from the end of each document to its beginning
    batches = list(strided(tokens, T, T if stride is None else stride, batch_size))
    total, count = total_loss(model, watch(batches), device)
    size = sum(len(document.encode()) for document in text.documents)
    return TextLoss(count, total / count, math.exp(total / count), total / math.log(2) / size)


def continuation_loss(
    model: GPT,
    rows: Sequence[tuple[np.ndarray, int]],
    *,
    batch_size: int,
    device: torch.device,
    watch: Watch = iter,
) -> np.ndarray:
    """The cross-entropy in nats of the last n tokens of each row given the tokens before them, summed: (N,) float64.

    rows: N pairs (tokens, n) with n below the number of tokens. Rows longer than block_size + 1 are cut to their end.
    Rows of similar length share a batch; padding is on the right, where no token attends to it.
    """
    V, T = model.config.vocab_size, model.config.block_size
    losses = np.empty(len(rows))
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    with evaluating(model):
        for batch in watch([order[i : i + batch_size] for i in range(0, len(order), batch_size)]):
            kept = [rows[i][0][-T - 1 :].astype(np.int64) for i in batch]
            idx = torch.zeros(len(batch), len(kept[0]) - 1, dtype=torch.int64)
            targets = torch.full_like(idx, IGNORED_TARGET)
            for row, (i, tokens) in enumerate(zip(batch, kept, strict=True)):
                end = len(tokens) - 1
                begin = max(0, end - rows[i][1])
                idx[row, :end] = torch.from_numpy(tokens[:-1])
                targets[row, begin:end] = torch.from_numpy(tokens[begin + 1 :])
            x = model.transformer(idx.to(device), Context(model.kernels))  # (B, T, C)
            counted = targets >= 0
            logits = model.lm_head(x[counted.to(device)])[:, :V]  # only at positions whose target counts
            nats = F.cross_entropy(logits.float(), targets[counted].to(device), reduction="none")
            losses[batch] = (
                torch.zeros(counted.shape, dtype=torch.float64).masked_scatter(counted, nats.double().cpu()).sum(1)
            )
    return losses
