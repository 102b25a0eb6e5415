"""What machine this is: whether Triton runs on it, how large it is, what its PyTorch can do.

The three questions about the machine (`check_device`, `capability`, `sm_count`) are asked here and nowhere else, and
always through this module, so that a test or a tool can answer them differently.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

# Compiled kernels may be interpreted for debugging; Triton reads the variable when a kernel is decorated.
INTERPRETED = triton.knobs.runtime.interpret
TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


def check_device(*tensors: Tensor) -> None:
    """Raises RuntimeError unless Triton can run on these tensors: one CUDA or ROCm device, or an interpreted CPU."""
    on_one_device(tensors)
    if tensors[0].is_cuda:  # its device's type, by name, takes several times as long
        return
    device = tensors[0].device
    if not (device.type == "cpu" and INTERPRETED):
        raise RuntimeError(
            f"Triton kernels run on CUDA and ROCm devices, these tensors are on '{device}': use kernels='torch', or "
            "set the environment variable TRITON_INTERPRET=1 before Python starts, to interpret them on the CPU, slowly"
        )
    if any(t.dtype == torch.bfloat16 for t in tensors) and not _interpreter_has_bfloat16():
        raise RuntimeError(
            "Triton's interpreter computes garbage in bfloat16 (triton issue 11584): use float16 or float32, or a GPU"
        )


def on_one_device(tensors: Sequence[Tensor]) -> None:
    """Raises RuntimeError where tensors are on more than one device."""
    index = tensors[0].get_device()  # a number is compared much faster than a device
    if index < 0 or any([t.get_device() != index for t in tensors]):  # -1 is the CPU, and meta
        devices = {str(t.device) for t in tensors}
        if len(devices) > 1:
            raise RuntimeError(f"tensors are on several devices: {', '.join(sorted(devices))}")


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; (8, 0) for the interpreter, which ignores the numbers chosen by it."""
    return _properties(device)[0] if device.type == "cuda" else (8, 0)


def sm_count(device: torch.device) -> int:
    """Multiprocessors (compute units on ROCm); 2 for the interpreter, so that small grids still loop."""
    return _properties(device)[1] if device.type == "cuda" else 2


@functools.cache
def _properties(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and multiprocessors, kept because asking PyTorch takes as long as a launch."""
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def architecture(device: torch.device) -> int | str:
    """What tuning numbers are chosen by: 80 ... 120, or "hip" (gfx942 says (9, 4), which no NVIDIA GPU does)."""
    major, minor = capability(device)
    return "hip" if torch.version.hip or (major, minor) == (9, 4) else 10 * major + minor


def can_overlap(device: torch.device) -> bool:
    """Whether a kernel may begin before the one before it has ended (_overlap.py)."""
    number = architecture(device)
    return not INTERPRETED and isinstance(number, int) and number >= 90


def mixed_matmul(device: torch.device) -> str:
    """How PyTorch multiplies 16-bit matrices into fp32 here: "addmm" (and adds), "mm" (cannot add), "" (cannot)."""
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    if device.type != "cuda" or (torch.version.hip and version < (2, 10)):
        return ""
    return "addmm" if version >= (2, 11) else "mm"


def _interpreter_has_bfloat16() -> bool:
    """Asks the interpreter to round 1 + 3/512 to bfloat16: to nearest it is 1.0078125, cut off it is 1."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    value = TensorHandle(np.array([1 + 3 / 512], np.float32), tl.float32)
    return int(interpreter_builder.cast_impl(value, tl.bfloat16).data[0]) == 0x3F81
