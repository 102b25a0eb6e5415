"""The optimizer and the learning-rate schedules of training."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn


def adamw(
    model: nn.Module, weight_decay: float, learning_rate: float, betas: Iterable[float], device_type: str
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and embeddings only (tensors of two and more dimensions).

    device_type: the type of the parameters' device, such as "cuda". On "cuda" and "cpu" the fused AdamW is used.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    beta1, beta2 = betas
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), fused=device_type in ("cuda", "cpu"))


def cosine_schedule(step: int, *, peak: float, floor: float, warmup: int, steps: int) -> float:
    """The learning rate of step `step`, from 0: linear warm-up to `peak`, then a cosine down to `floor` at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * progress))


def wsd_schedule(step: int, *, peak: float, floor: float, warmup: int, steps: int, decay: int) -> float:
    """The learning rate of step `step`, from 0: linear warm-up, then `peak`, then in the last `decay` steps a linear
    decay to `floor`. Source: Hu et al., "MiniCPM", 2024 (warmup, stable, decay)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    fallen = min(1.0, max(0, step - (steps - decay)) / max(1, decay))
    return peak + (floor - peak) * fallen
