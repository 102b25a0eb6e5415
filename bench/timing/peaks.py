"""Measures this machine's speeds of copying and of matrix products, of which results give fractions."""

from __future__ import annotations

import torch

from fastgpt2.bench.timing.timing import measure

COPIED_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}
MATRIX = {"cuda": 8192, "cpu": 1024}  # rows and columns


def copy_bytes_per_s(device: torch.device) -> float:
    """Bytes read and written per second by a copy of contiguous memory."""
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    time = measure({"": lambda: target.copy_(source)}, device, budget_s=1.0, max_rounds=50, device_only=True)[""]
    return 2 * source.nbytes / (time.median_ms * 1e-3)


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of PyTorch's product of two large square matrices."""
    n = MATRIX[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    time = measure({"": lambda: a @ b}, device, budget_s=1.0, max_rounds=50, device_only=True)[""]
    return 2 * n**3 / (time.median_ms * 1e-3)
