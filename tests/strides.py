"""The same numbers in other memory: `strided(x, "every other")`, for tests of what takes tensors of any strides."""

from __future__ import annotations

import math

import torch
from torch import Tensor

STRIDES = ("contiguous", "every other", "transposed", "offset", "expanded")


def strided(x: Tensor, how: str) -> Tensor:
    """x with other strides; between its numbers lie NaN, or integers far out of any range.

    "expanded" has what lies at the first index of the last dimension everywhere in it.
    """
    if x.dim() == 0 or x.numel() == 0 or how == "contiguous":
        return x
    if how == "expanded":
        return x[..., :1].clone().expand_as(x)
    if how == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    step, start = (2, 0) if how == "every other" else (1, 1)
    C = x.shape[-1]
    wide = torch.full((*x.shape[:-1], start + step * C), math.nan if x.is_floating_point() else 2**30).to(x)
    return wide[..., start : start + step * C : step].copy_(x)
