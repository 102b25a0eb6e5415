"""The rule that `fastgpt2 verify` holds kernels to, and what it says of one result.

The rule: the error against the float64 truth is at most twice that of eager PyTorch in the same dtype. The error of an
op is the largest difference over the largest magnitude of the truth; that of the model's logits and gradients, where a
maximum over so many rounding errors is a matter of luck, the root mean square of the difference over that of the truth.
Where eager is exact by luck, the ratio is taken to the smallest error that can be expected: half a unit in the last
place, or 5e-6 for float32 (sums in another order; flash-attention's tests allow the same 1e-5 at a ratio of 2). A loss
is a mean, in which errors of tokens cancel by luck: it is held to the mean of eager's errors token by token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LIMIT = 2.0


@dataclass(frozen=True)
class Row:
    """One comparison. Errors are relative to the truth's largest magnitude; `to_hf` is None without transformers."""

    subject: str
    toggle: str
    result: str
    dtype: str
    error: float
    eager_error: float
    to_hf: float | None
    ratio: float

    @property
    def ok(self) -> bool:
        return self.ratio <= LIMIT


def expected_error(dtype: torch.dtype) -> float:
    """The smallest relative error that a result in `dtype` can be held to."""
    return max(torch.finfo(dtype).eps / 2, 5e-6 if dtype != torch.float64 else 0.0)


def largest(t: Tensor) -> float:
    return t.double().abs().max().item() if t.numel() else 0.0


def root_mean_square(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def mean_size(t: Tensor) -> float:
    return t.double().abs().mean().item() if t.numel() else 0.0


def compare(
    subject: str,
    toggle: str,
    result: str,
    ours: Tensor,
    eager: Tensor,
    hf: Tensor | None,
    truth: Tensor,
    *,
    size: Callable[[Tensor], float] = largest,
    expected: float = 0.0,
) -> Row:
    """One row; `ours` and `eager` have the same dtype. expected: an error, relative like the others, that eager's own
    may undercut by luck only."""
    scale = size(truth) or 1.0

    def distance(a: Tensor, b: Tensor) -> float:
        value = size(a.double() - b.double()) / scale
        return value if value == value else float("inf")

    error, eager_error = distance(ours, truth), distance(eager, truth)
    ratio = error / max(eager_error, expected, expected_error(ours.dtype))
    to_hf = None if hf is None else distance(ours, hf)
    return Row(subject, toggle, result, str(ours.dtype).removeprefix("torch."), error, eager_error, to_hf, ratio)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, T, V), (B, T) -> (B * T,), 0 where the target is negative."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    kept = targets.flatten()
    losses = F.cross_entropy(wide, kept.clamp(min=0), reduction="none")
    return torch.where(kept >= 0, losses, 0.0)
