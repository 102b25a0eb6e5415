"""The rule that kernels are held to, by `fastgpt2 verify` and by the tests alike, and what it says of one result.

    error <= max(2 * eager's error, roundings * eps / 2 * scale) + 1e-5 * scale         (verify: one rounding, see RULE)

Both errors are distances from the float64 truth; scale is the truth's size, eps belongs to the dtype of the result.
The first term is the rule: at most twice as far from the truth as eager PyTorch in the same dtype. eps / 2 allows the
one rounding of a store where eager was exact by luck, and 1e-5 (84 eps of float32; of float64 for float64 results) sums
in another order. Sizes are largest magnitudes for an op; for the model's logits and gradients, where a maximum over so
many rounding errors is a matter of luck, root mean squares. A loss is a mean, in which errors of tokens cancel by luck:
it is held to the mean of eager's errors token by token, where that is more than eager's own.

The ratio that is shown is error / eager's error and nothing else; where eager's error is below what the other terms
allow, the result is "at rounding", and the ratio says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LIMIT = 2.0
SUM_EPS = 84  # times eps: 1e-5 in float32
RULE = f"error <= max({LIMIT:g} * eager's error, eps / 2) + 1e-5, relative to the size of the float64 result"


def rounding_error(scale: Tensor, dtype: torch.dtype, roundings: int = 1, cancelling: float = 0.0) -> Tensor:
    """What a result of size `scale` in `dtype` may be off by, however exact eager is: stores and sums."""
    stores, sums = _terms(scale, dtype, roundings, cancelling)
    return stores + sums


def allowed_error(
    eager_error: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    *,
    factor: float = LIMIT,
    roundings: int = 1,
    cancelling: float = 0.0,
) -> Tensor:
    """The rule. cancelling: how large the terms are where the truth is 0 because they cancel."""
    stores, sums = _terms(scale, dtype, roundings, cancelling)
    return torch.maximum(factor * eager_error, stores) + sums


def _terms(scale: Tensor, dtype: torch.dtype, roundings: int, cancelling: float) -> tuple[Tensor, Tensor]:
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    stores = roundings * torch.finfo(dtype).eps / 2 * scale
    return stores, SUM_EPS * torch.finfo(accumulator).eps * scale.clamp(min=cancelling)


@dataclass(frozen=True)
class Row:
    """One comparison. Errors are relative to the truth's size; `to_hf` is None without transformers."""

    subject: str
    toggle: str
    result: str
    dtype: str
    error: float
    eager_error: float
    to_hf: float | None
    allowed: float
    at_rounding: bool  # eager's error is below what rounding allows
    place: str = ""  # the layer, where a model's own are compared

    @property
    def ok(self) -> bool:
        """Never where even eager is infinitely far off: what overflowed, or was not a number, shows nothing."""
        return self.error <= self.allowed < float("inf")

    @property
    def ratio(self) -> float:
        """Of our error to eager's: infinite where only eager is exact, 1 where both are."""
        if self.eager_error:
            return self.error / self.eager_error
        return float("inf") if self.error else 1.0


def worst(rows: Sequence[Row]) -> Row:
    """The one that comes nearest to what the rule allows, or exceeds it most."""
    return max(rows, key=lambda row: row.error / row.allowed if row.allowed < float("inf") else row.allowed)


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
    scale, dtype = size(truth) or 1.0, ours.dtype

    def distance(a: Tensor, b: Tensor) -> float:
        value = size(a.double() - b.double()) / scale
        return value if value == value else float("inf")

    error, eager_error = distance(ours, truth), distance(eager, truth)
    one, base = torch.ones((), dtype=torch.float64), torch.tensor(max(eager_error, expected), dtype=torch.float64)
    return Row(
        *(subject, toggle, result, str(dtype).removeprefix("torch."), error, eager_error),
        to_hf=None if hf is None else distance(ours, hf),
        allowed=allowed_error(base, one, dtype).item(),
        at_rounding=eager_error < rounding_error(one, dtype).item(),
    )


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, T, V), (B, T) -> (B * T,), 0 where the target is negative."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    kept = targets.flatten()
    losses = F.cross_entropy(wide, kept.clamp(min=0), reduction="none")
    return torch.where(kept >= 0, losses, 0.0)
