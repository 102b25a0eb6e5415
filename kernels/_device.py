"""Properties of the machine: whether Triton runs on it, its architecture and size, and what its PyTorch supports.

`check_device`, `capability` and `sm_count` are the only functions that query the machine. They are always called
through this module, so that a test or a tool can replace them.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

# Whether Triton interprets kernels for debugging. Triton reads the variable when a kernel is decorated.
INTERPRETED = triton.knobs.runtime.interpret
TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


def check_device(*tensors: Tensor, instead: str = "kernels='torch'") -> None:
    """Raises RuntimeError unless Triton can run on these tensors: all on one CUDA or ROCm device, or on the CPU while
    Triton interprets kernels. instead: what else the user may give."""
    first = tensors[0]
    index = first.get_device()  # numbers are compared much faster than devices
    if index < 0 or any([t.get_device() != index for t in tensors]):  # -1 stands for both the CPU and meta
        devices = {str(t.device) for t in tensors}
        if len(devices) > 1:
            raise RuntimeError(f"tensors are on several devices: {', '.join(sorted(devices))}")
    if first.is_cuda:  # several times as fast as device.type
        return
    device = first.device
    if not (device.type == "cpu" and INTERPRETED):
        raise RuntimeError(
            f"Triton kernels run on CUDA and ROCm devices, these tensors are on '{device}': use {instead}, or "
            "set the environment variable TRITON_INTERPRET=1 before Python starts to interpret them slowly on the CPU"
        )
    if any(t.dtype == torch.bfloat16 for t in tensors) and not _interpreter_has_bfloat16():
        raise RuntimeError(
            "Triton's interpreter computes garbage in bfloat16 (triton issue 11584): use float16 or float32, or a GPU"
        )


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability (major, minor). (8, 0) on a CPU, where the interpreter accepts any tuning numbers."""
    return _properties(device)[0] if device.type == "cuda" else (8, 0)


def sm_count(device: torch.device) -> int:
    """The number of multiprocessors (compute units on ROCm). 2 on a CPU, so that kernels loop in small tests too."""
    return _properties(device)[1] if device.type == "cuda" else 2


@functools.cache
def _properties(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors, cached because PyTorch's query takes as long as a launch."""
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def architecture(device: torch.device) -> int | str:
    """The tuning table's name of an architecture: 80 ... 120, or "hip" on ROCm.

    gfx942 has capability (9, 4), which no NVIDIA GPU has, so that "hip" is found when compiling for it elsewhere too.
    """
    major, minor = capability(device)
    return "hip" if torch.version.hip or (major, minor) == (9, 4) else 10 * major + minor


def can_overlap(device: torch.device) -> bool:
    """Whether a kernel can begin before the previous one has ended (see _overlap.py)."""
    number = architecture(device)
    return not INTERPRETED and isinstance(number, int) and number >= 90


def has_tensor_descriptors(device: torch.device) -> bool:
    """Whether tiles of a matrix can be loaded by descriptors (TMA), which hardware can from sm_90 on."""
    number = architecture(device)
    return isinstance(number, int) and number >= 90


@functools.cache
def mixed_matmul(device: torch.device) -> str:
    """PyTorch's product of 16-bit matrices with an fp32 result on this device: "addmm" (can also add to a matrix), "mm"
    (cannot add), or "" if there is none."""
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    if device.type != "cuda" or (torch.version.hip and version < (2, 10)):
        return ""
    return "addmm" if version >= (2, 11) else "mm"


def _interpreter_has_bfloat16() -> bool:
    """Whether the interpreter rounds 1 + 3/512 to the nearest bfloat16, 1.0078125. A broken one truncates it to 1."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    value = TensorHandle(np.array([1 + 3 / 512], np.float32), tl.float32)
    return int(interpreter_builder.cast_impl(value, tl.bfloat16).data[0]) == 0x3F81
