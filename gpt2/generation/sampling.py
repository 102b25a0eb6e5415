"""Sampling the next token from the model's distribution or from a part of it.

    l = logits, with repetition_penalty applied to tokens that have already occurred
    p = softmax(l / temperature), restricted to the top_k likeliest tokens, then to the smallest set of tokens with at
        least top_p of the remaining probability, then to tokens with at least min_p of the likeliest's probability

Everything is computed on the logits' device without waiting for it. B is the batch, V the vocabulary.
Sources: top-p, Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020; min-p, Nguyen et al., "Turning Up
the Heat", 2025; repetition penalty, Keskar et al., "CTRL", 2019, section 4.1.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import torch
from torch import Tensor

# Smaller temperatures would round to 0 in float32. At this one the likeliest token is always sampled.
SMALLEST_TEMPERATURE = 1e-30


@dataclass(frozen=True)
class Sampling:
    """The settings of sampling.

    temperature: above 0. Small values prefer likely tokens.
    top_k: samples from exactly this number of tokens; ties are cut by position. None, or more than V, means all.
    top_p: in (0, 1].
    min_p: in [0, 1], relative to the probability of the likeliest token.
    repetition_penalty: above 0. Values above 1 make tokens that occur in the row less likely.
    greedy: takes the likeliest token, as top_k=1 does. temperature, top_k, top_p and min_p then have no effect.
    Raises ValueError naming the setting, its value and what is allowed, TypeError for a value that is not a number.
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
    """Samples tokens (B, 1) int64 from logits (B, V).

    generator: on the logits' device. seen: (B, V) bool, the tokens to which repetition_penalty applies.
    """
    if seen is not None and sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.greedy or sampling.top_k == 1:
        return logits.argmax(dim=-1, keepdim=True)
    if logits.dtype != torch.float64:
        logits = logits.float()
    # Shifted so that the largest logit is 0: a small temperature then gives 0 and -inf, never inf - inf.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / max(sampling.temperature, SMALLEST_TEMPERATURE)
    if sampling.min_p:
        # p >= min_p * p_max, where the scaled logit of p_max is 0. The threshold is the same before and after the other
        # restrictions.
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
