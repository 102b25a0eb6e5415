"""The next token: drawn from the model's distribution, or from a part of it.

    l = logits, those of tokens that are already there made less likely by repetition_penalty
    p = softmax(l / temperature), cut to the top_k likeliest tokens, then to the smallest set that holds top_p of what
        is left, then to those with at least min_p of the likeliest's probability, and drawn from in proportion

All on the logits' device, without waiting for it. B is the batch, V the vocabulary.
Sources: top-p, Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020; min-p, Nguyen et al., "Turning Up
the Heat", 2025; repetition penalty, Keskar et al., "CTRL", 2019, section 4.1.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import torch
from torch import Tensor

# Below this a temperature would round to 0 in float32; what it means, always the likeliest token, stays.
SMALLEST_TEMPERATURE = 1e-30


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    temperature: above 0; small ones prefer likely tokens.
    top_k: exactly that many tokens, ties cut by position; None or more than there are: all.
    top_p: in (0, 1].
    min_p: in [0, 1], relative to the likeliest token.
    repetition_penalty: above 0; more than 1 makes tokens of the row so far less likely.
    greedy: always the likeliest token, as top_k=1; temperature, top_k, top_p and min_p then do not matter.
    Raises ValueError naming the setting, its value and what is allowed, TypeError for what is no number.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    greedy: bool = False

    def __post_init__(self):
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
            value, kind = getattr(self, name), numbers.Integral if name == "top_k" else numbers.Real
            optional = value is None and name in ("top_k", "top_p", "min_p")
            if not optional and (not isinstance(value, kind) or isinstance(value, bool)):
                raise TypeError(f"{name} is {value!r}, expected a {'whole ' * (name == 'top_k')}number")
        if not self.greedy and not 0.0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature}, allowed are numbers above 0; for the likeliest token: greedy"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, allowed are None and 1 and above")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}, allowed are None and 0 < top_p <= 1")
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p is {self.min_p}, allowed are None and 0 <= min_p <= 1")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}, allowed are numbers above 0")


def next_token(
    logits: Tensor,
    sampling: Sampling,
    generator: torch.Generator | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """Logits (B, V) -> tokens (B, 1), drawn as `sampling` says.

    generator: on the logits' device. seen: (B, V) bool, the tokens that repetition_penalty is for.
    """
    if seen is not None and sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.greedy or sampling.top_k == 1:
        return logits.argmax(dim=-1, keepdim=True)
    if logits.dtype != torch.float64:
        logits = logits.float()
    # The likeliest is at 0, so that a small temperature gives 0 and -inf, never inf - inf.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / max(sampling.temperature, SMALLEST_TEMPERATURE)
    if sampling.min_p:
        # p >= min_p * p_max, and the likeliest's logarithm is 0. Before the other cuts, to which it is the same.
        least = math.log(sampling.min_p)
    V = logits.size(-1)
    if sampling.top_k is None and sampling.top_p is None:
        if sampling.min_p:
            scaled = scaled.masked_fill(scaled < least, -math.inf)
        return torch.multinomial(scaled.softmax(dim=-1), 1, generator=generator)
    values, tokens = scaled.topk(min(sampling.top_k or V, V), dim=-1)  # (B, K), likeliest first
    probabilities = values.softmax(dim=-1)
    outside = torch.zeros_like(values, dtype=torch.bool)
    if sampling.top_p is not None:
        outside |= probabilities.cumsum(dim=-1) - probabilities >= sampling.top_p
    if sampling.min_p:
        outside |= values < least
    outside[:, 0] = False
    probabilities = probabilities.masked_fill(outside, 0.0)
    return tokens.gather(-1, torch.multinomial(probabilities, 1, generator=generator))
