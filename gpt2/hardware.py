"""Peak rates of GPUs from their data sheets (None for unknown hardware, never a guess), the CPU, and memory."""

from __future__ import annotations

import ctypes
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Gpu:
    """Peak rates of one GPU.

    part: whole words that the driver's name of the device contains. bf16_flops: dense bf16 tensor-core FLOP/s with
    fp32 accumulation. bytes_per_s: memory bandwidth.
    """

    part: str
    bf16_flops: float
    bytes_per_s: float


# The first match counts.
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


# With one of these words in its name, a device is a different GPU or a part of one.
OTHERS = {"Ti", "SUPER", "D", "Laptop", "Mobile", "Max-Q", "MIG"}


def gpu_by_name(name: str) -> Gpu | None:
    """The peak rates of a device by its name, such as "NVIDIA H100 80GB HBM3"; None if it is unknown."""
    if OTHERS & set(name.split()):
        return None
    return next((gpu for gpu in GPUS if re.search(rf"(?<!\w){re.escape(gpu.part)}(?!\w)", name)), None)


def gpu(device: torch.device) -> Gpu | None:
    """The peak rates of a CUDA or ROCm device; None if it is unknown."""
    return gpu_by_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bf16 FLOP/s of a CUDA or ROCm device; None if it is unknown."""
    found = gpu(device)
    return None if found is None else found.bf16_flops


def cpu_vendor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The maker of the CPU as x86 processors state it, such as "AuthenticAMD" or "GenuineIntel"; "" if unknown."""
    try:
        with open(cpuinfo, encoding="utf-8", errors="replace") as file:
            first = file.read(4096)  # the first core's entry; a file for hundreds of cores takes long to read
    except OSError:
        return ""
    found = re.search(r"^vendor_id\s*:\s*(\S+)", first, re.MULTILINE)
    return found[1] if found else ""


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of glibc's `mallopt`


def keep_freed_memory() -> bool:
    """Lets this process keep the memory that it frees, for its next allocations. -> Whether the C library can (glibc).

    On a CPU, the activations and gradients of a training step are freed, and the next step allocates as many. glibc
    gives large ones back to the system, which must clear all of their pages anew. With this, a process stays as large
    as its peak, which fragments make about a tenth larger.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS; Windows
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def peak_memory_bytes(device: torch.device) -> int | None:
    """Peak memory in bytes: of PyTorch's allocator on a GPU, of the whole process elsewhere; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream. False while torch.compile traces."""
    traced = torch.compiler.is_compiling()
    return not traced and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
