"""The optimizer and the learning-rate schedules of training."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from fastgpt2.gpt2 import ops


def adamw(
    model: nn.Module,
    weight_decay: float,
    learning_rate: float,
    betas: Iterable[float],
    device_type: str,
    *,
    optimizer: str = "torch",
    max_norm: float | None = None,
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and embeddings only (tensors of two and more dimensions).

    device_type: "cuda", "cpu", ... where the parameters are or will be.
    optimizer: "torch": PyTorch's, fused on CUDA and CPU. "triton": `TritonAdamW`, two launches with the clipping, whose
        speed has not been measured on a GPU yet; on a CPU under TRITON_INTERPRET=1 only.
    max_norm: with "triton", what `step` clips the norm of all gradients to, and notes as `grad_norm`.
    Raises ValueError for another optimizer or type of device, and for a max_norm with "torch"; RuntimeError where
        Triton does not run.
    """
    try:
        torch.device(device_type)
    except RuntimeError:
        raise ValueError(f"device_type is {device_type!r}, allowed are 'cuda', 'cpu' and others of PyTorch's") from None
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    beta1, beta2 = betas
    if optimizer == "triton":
        from fastgpt2.gpt2.training.triton_adamw import TritonAdamW

        if ops.TRITON_INSTALLED and device_type != "cuda":  # refused before a run begins, and not at its first step
            ops.check_adamw_device(torch.empty(0, device=device_type))
        return TritonAdamW(groups, lr=learning_rate, betas=(beta1, beta2), max_norm=max_norm)
    if optimizer != "torch":
        raise ValueError(f"optimizer is {optimizer!r}, allowed are 'torch' and 'triton'")
    if max_norm is not None:
        raise ValueError(
            f"max_norm is {max_norm} and optimizer 'torch', whose step does not clip: call "
            "torch.nn.utils.clip_grad_norm_ before it, or give optimizer='triton'"
        )
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
