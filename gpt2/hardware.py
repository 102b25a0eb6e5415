"""What a GPU can do at most, by its makers' data sheets (unknown hardware is None, never a guess), and memory used."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """One row of the data sheets. `part` is whole words of the name that the driver gives.

    bf16_flops: dense bf16 tensor-core FLOP/s with fp32 accumulation. bytes_per_s: of its memory.
    """

    part: str
    bf16_flops: float
    bytes_per_s: float


# First match counts.
GPUS = (
    Gpu("B200", 2250e12, 8000e9),
    Gpu("H200 NVL", 835e12, 4800e9),
    Gpu("H200", 989e12, 4800e9),
    Gpu("H100 PCIe", 756e12, 2000e9),
    Gpu("H100 NVL", 835e12, 3900e9),
    Gpu("H100", 989e12, 3350e9),
    Gpu("A100-SXM4-40GB", 312e12, 1555e9),
    Gpu("A100-PCIE-40GB", 312e12, 1555e9),
    Gpu("A100 80GB PCIe", 312e12, 1935e9),
    Gpu("A100", 312e12, 2039e9),
    Gpu("RTX 5090", 209.5e12, 1792e9),
    Gpu("RTX 4090", 165.2e12, 1008e9),
    Gpu("RTX 3090", 71e12, 936e9),
    Gpu("MI300X", 1307.4e12, 5300e9),
)


# Words that make another GPU of a name, or a part of one.
OTHERS = {"Ti", "SUPER", "D", "Laptop", "Mobile", "Max-Q", "MIG"}


def gpu_by_name(name: str) -> Gpu | None:
    """The data sheet of a device's name such as "NVIDIA H100 80GB HBM3", or None where it is not known."""
    if OTHERS & set(name.split()):
        return None
    return next((gpu for gpu in GPUS if re.search(rf"(?<!\w){re.escape(gpu.part)}(?!\w)", name)), None)


def gpu(device: torch.device) -> Gpu | None:
    """The data sheet of a CUDA or ROCm device, or None where it is not known."""
    return gpu_by_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bf16 FLOP/s of a CUDA or ROCm device, or None where it is not known."""
    found = gpu(device)
    return None if found is None else found.bf16_flops


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory at one time: of PyTorch's allocator on a GPU, of this whole process elsewhere; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_capturing() -> bool:
    """Whether what is launched now becomes part of a CUDA graph. False where code is traced to be compiled."""
    traced = torch.compiler.is_compiling()
    return not traced and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
