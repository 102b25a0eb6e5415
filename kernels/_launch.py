"""How kernels are launched: what machine this is, and every tuning number, per op and architecture.

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


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's, which kernels call too, takes ten times as long on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()


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


# ------------------------------------------------------------------------------------------------ tuning numbers
#
# TABLE[op][variant][architecture]; an architecture that is missing takes "default". Architectures are compute
# capabilities (80, 86, 89, 90, 100, 120) and "hip". A variant is what else decides: "16" or "32" for the bits of an
# element, a width, ... Values are the kernel's block sizes and the launch options num_warps and num_stages.

# Where rows of an architecture were measured, as `fastgpt2 bench tune` notes it; the others follow from compiled code.
TUNED: dict[int | str, str] = {90: "NVIDIA H200, 2026-11-26"}

TABLE: dict[str, dict[str, dict[int | str, dict[str, int]]]] = {
    # Variants: bits of an element x padded head size (up to 64, up to 128), then " bounded" (documents, a window) or
    # " dropout" (with or without them), whose bounds and random numbers take registers: smaller tiles, or they spill.
    # A program of attention_fwd takes BLOCK_M queries, or twice as many without bounds; BLOCK_N divides BLOCK_M.
    "attention_fwd": {
        "16x64": {
            "default": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
            120: {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3},
        },
        "16x64 bounded": {"default": {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3}},
        "16x64 dropout": {"default": {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3}},
        "16x128": {
            "default": {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
            90: {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        },
        "16x128 bounded": {"default": {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}},
        "16x128 dropout": {
            "default": {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
            100: {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2},
            120: {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2},
        },
        "32x64": {"default": {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 3}},
        "32x64 bounded": {"default": {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}},
        "32x64 dropout": {
            "default": {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
            86: {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
            89: {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
        },
        "32x128": {"default": {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}},
        "64x64": {"default": {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}},
        "64x128": {"default": {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}},
    },
    "attention_delta": {
        "16x64": {"default": {"BLOCK_M": 64, "num_warps": 4}},
        "16x128": {"default": {"BLOCK_M": 32, "num_warps": 4}},
        "32x64": {"default": {"BLOCK_M": 32, "num_warps": 4}},
        "32x128": {"default": {"BLOCK_M": 16, "num_warps": 4}},
        "64x64": {"default": {"BLOCK_M": 16, "num_warps": 4}},
        "64x128": {"default": {"BLOCK_M": 16, "num_warps": 4}},
    },
    "attention_bwd": {
        "16x64": {
            "default": {
                **{"DKV_BLOCK_M": 32, "DKV_BLOCK_N": 64, "DQ_BLOCK_M": 64, "DQ_BLOCK_N": 64},
                **{"num_warps": 4, "num_stages": 3},
            },
            # 32 rows a warp: fewest reads of shared memory for each product; 255 registers.
            80: {
                **{"DKV_BLOCK_M": 32, "DKV_BLOCK_N": 128, "DQ_BLOCK_M": 128, "DQ_BLOCK_N": 32},
                **{"num_warps": 4, "num_stages": 2},
            },
            100: {
                **{"DKV_BLOCK_M": 64, "DKV_BLOCK_N": 64, "DQ_BLOCK_M": 64, "DQ_BLOCK_N": 64},
                **{"num_warps": 4, "num_stages": 2},
            },
        },
        "16x64 bounded": {
            "default": {
                **{"DKV_BLOCK_M": 32, "DKV_BLOCK_N": 64, "DQ_BLOCK_M": 64, "DQ_BLOCK_N": 32},
                **{"num_warps": 4, "num_stages": 2},
            },
            80: {
                **{"DKV_BLOCK_M": 32, "DKV_BLOCK_N": 64, "DQ_BLOCK_M": 64, "DQ_BLOCK_N": 32},
                **{"num_warps": 4, "num_stages": 3},
            },
        },
        "16x64 dropout": {
            "default": {
                **{"DKV_BLOCK_M": 32, "DKV_BLOCK_N": 32, "DQ_BLOCK_M": 32, "DQ_BLOCK_N": 32},
                **{"num_warps": 4, "num_stages": 1},
            },
        },
        "16x128": {
            "default": {
                **{"DKV_BLOCK_M": 32, "DKV_BLOCK_N": 64, "DQ_BLOCK_M": 64, "DQ_BLOCK_N": 32},
                **{"num_warps": 8, "num_stages": 2},
            },
            "hip": {
                **{"DKV_BLOCK_M": 16, "DKV_BLOCK_N": 64, "DQ_BLOCK_M": 64, "DQ_BLOCK_N": 16},
                **{"num_warps": 4, "num_stages": 1},
            },
        },
        "16x128 bounded": {
            "default": {
                **{"DKV_BLOCK_M": 32, "DKV_BLOCK_N": 32, "DQ_BLOCK_M": 32, "DQ_BLOCK_N": 32},
                **{"num_warps": 8, "num_stages": 2},
            },
            "hip": {
                **{"DKV_BLOCK_M": 16, "DKV_BLOCK_N": 64, "DQ_BLOCK_M": 64, "DQ_BLOCK_N": 16},
                **{"num_warps": 4, "num_stages": 1},
            },
        },
        "16x128 dropout": {
            "default": {
                **{"DKV_BLOCK_M": 32, "DKV_BLOCK_N": 32, "DQ_BLOCK_M": 32, "DQ_BLOCK_N": 32},
                **{"num_warps": 8, "num_stages": 2},
            },
            "hip": {
                **{"DKV_BLOCK_M": 16, "DKV_BLOCK_N": 64, "DQ_BLOCK_M": 64, "DQ_BLOCK_N": 16},
                **{"num_warps": 4, "num_stages": 1},
            },
        },
        "32x64": {
            "default": {
                **{"DKV_BLOCK_M": 16, "DKV_BLOCK_N": 32, "DQ_BLOCK_M": 32, "DQ_BLOCK_N": 16},
                **{"num_warps": 4, "num_stages": 1},
            },
        },
        "32x64 dropout": {
            "default": {
                **{"DKV_BLOCK_M": 16, "DKV_BLOCK_N": 16, "DQ_BLOCK_M": 16, "DQ_BLOCK_N": 16},
                **{"num_warps": 4, "num_stages": 1},
            },
        },
        "32x128": {
            "default": {
                **{"DKV_BLOCK_M": 16, "DKV_BLOCK_N": 16, "DQ_BLOCK_M": 16, "DQ_BLOCK_N": 16},
                **{"num_warps": 8, "num_stages": 1},
            },
        },
        "64x64": {
            "default": {
                **{"DKV_BLOCK_M": 16, "DKV_BLOCK_N": 16, "DQ_BLOCK_M": 16, "DQ_BLOCK_N": 16},
                **{"num_warps": 4, "num_stages": 1},
            },
        },
        "64x128": {
            "default": {
                **{"DKV_BLOCK_M": 16, "DKV_BLOCK_N": 16, "DQ_BLOCK_M": 16, "DQ_BLOCK_N": 16},
                **{"num_warps": 4, "num_stages": 1},
            },
        },
    },
    # A tile is 8 to 16 KiB of keys and as many of values, STAGES of them under way. A cache of up to ONE_SPLIT places
    # is not split: merging takes longer than reading its few tiles one after another.
    "decode_attention": {
        "16x64": {"default": {"BLOCK_N": 64, "num_warps": 4, "STAGES": 3, "PROGRAMS_PER_SM": 2, "ONE_SPLIT": 256}},
        "16x128": {"default": {"BLOCK_N": 32, "num_warps": 4, "STAGES": 3, "PROGRAMS_PER_SM": 2, "ONE_SPLIT": 256}},
        "32x64": {"default": {"BLOCK_N": 32, "num_warps": 4, "STAGES": 3, "PROGRAMS_PER_SM": 2, "ONE_SPLIT": 256}},
        "32x128": {"default": {"BLOCK_N": 32, "num_warps": 4, "STAGES": 2, "PROGRAMS_PER_SM": 2, "ONE_SPLIT": 256}},
        "64x64": {"default": {"BLOCK_N": 16, "num_warps": 4, "STAGES": 1, "PROGRAMS_PER_SM": 2, "ONE_SPLIT": 256}},
        "64x128": {"default": {"BLOCK_N": 16, "num_warps": 4, "STAGES": 1, "PROGRAMS_PER_SM": 2, "ONE_SPLIT": 256}},
    },
    "decode_merge": {
        "32x64": {"default": {"BLOCK_P": 16, "num_warps": 4}},
        "32x128": {"default": {"BLOCK_P": 16, "num_warps": 4}},
        "64x64": {"default": {"BLOCK_P": 16, "num_warps": 4}},
        "64x128": {"default": {"BLOCK_P": 16, "num_warps": 4}},
    },
    # Variants: bits of an element x rows of a program. A program takes as many of the weight's rows as makes
    # PER_SM of them, from MIN_N to BLOCK_N. A thread's part of one row of the weight is one or two 128-bit accesses.
    "decode_linear": {
        "16x1": {"default": {"BLOCK_N": 16, "MIN_N": 4, "PER_SM": 4, "BLOCK_K": 1024, "num_stages": 1, "num_warps": 4}},
        "16x16": {
            "default": {"BLOCK_N": 32, "MIN_N": 8, "PER_SM": 1, "BLOCK_K": 256, "num_stages": 3, "num_warps": 4},
            90: {"BLOCK_N": 32, "MIN_N": 8, "PER_SM": 1, "BLOCK_K": 256, "num_stages": 4, "num_warps": 4},
        },
        "16x32": {
            "default": {"BLOCK_N": 32, "MIN_N": 8, "PER_SM": 1, "BLOCK_K": 256, "num_stages": 3, "num_warps": 4},
            120: {"BLOCK_N": 32, "MIN_N": 8, "PER_SM": 1, "BLOCK_K": 256, "num_stages": 2, "num_warps": 4},
        },
        "32x1": {"default": {"BLOCK_N": 4, "MIN_N": 4, "PER_SM": 4, "BLOCK_K": 512, "num_stages": 1, "num_warps": 4}},
        "32x16": {"default": {"BLOCK_N": 32, "MIN_N": 8, "PER_SM": 1, "BLOCK_K": 64, "num_stages": 3, "num_warps": 4}},
        "32x32": {"default": {"BLOCK_N": 32, "MIN_N": 8, "PER_SM": 1, "BLOCK_K": 64, "num_stages": 3, "num_warps": 4}},
        "64x1": {"default": {"BLOCK_N": 8, "MIN_N": 4, "PER_SM": 4, "BLOCK_K": 256, "num_stages": 1, "num_warps": 4}},
        "64x16": {"default": {"BLOCK_N": 16, "MIN_N": 16, "PER_SM": 1, "BLOCK_K": 64, "num_stages": 1, "num_warps": 4}},
        "64x32": {"default": {"BLOCK_N": 16, "MIN_N": 16, "PER_SM": 1, "BLOCK_K": 64, "num_stages": 1, "num_warps": 4}},
    },
    # Variants: bytes of a row at most. SPAN_BYTES: what the warps of one row take in one go, 512 each. MIN_ROWS: for a
    # program; at 64 the partial sums that backward writes and reads stay below 5% of its traffic.
    "layer_norm_fwd": {
        "512": {"default": {"num_warps": 1, "PROGRAMS_PER_SM": 16}},
        "1024": {"default": {"num_warps": 1, "PROGRAMS_PER_SM": 16}},
        "1536": {"default": {"num_warps": 1, "PROGRAMS_PER_SM": 16}},
        "2048": {"default": {"num_warps": 1, "PROGRAMS_PER_SM": 16}},
        "4096": {"default": {"num_warps": 2, "PROGRAMS_PER_SM": 8}, 80: {"num_warps": 4, "PROGRAMS_PER_SM": 4}},
        "8192": {"default": {"num_warps": 4, "PROGRAMS_PER_SM": 4}},
        "16384": {"default": {"num_warps": 8, "PROGRAMS_PER_SM": 2}},
        "32768": {"default": {"num_warps": 16, "PROGRAMS_PER_SM": 1}},
        "65536": {"default": {"num_warps": 32, "PROGRAMS_PER_SM": 1}},
        "2048 dropout": {"default": {"num_warps": 2, "PROGRAMS_PER_SM": 8}},
        "4096 dropout": {"default": {"num_warps": 2, "PROGRAMS_PER_SM": 8}, 80: {"num_warps": 4, "PROGRAMS_PER_SM": 4}},
    },
    "layer_norm_bwd": {
        "512": {"default": {"ROWS": 8, "SPAN_BYTES": 512, "num_warps": 8, "PROGRAMS_PER_SM": 2, "MIN_ROWS": 64}},
        "1024": {"default": {"ROWS": 8, "SPAN_BYTES": 512, "num_warps": 8, "PROGRAMS_PER_SM": 2, "MIN_ROWS": 64}},
        "1536": {"default": {"ROWS": 8, "SPAN_BYTES": 512, "num_warps": 8, "PROGRAMS_PER_SM": 1, "MIN_ROWS": 64}},
        "2048": {"default": {"ROWS": 4, "SPAN_BYTES": 1024, "num_warps": 8, "PROGRAMS_PER_SM": 1, "MIN_ROWS": 64}},
        "4096": {
            "default": {"ROWS": 2, "SPAN_BYTES": 2048, "num_warps": 8, "PROGRAMS_PER_SM": 1, "MIN_ROWS": 64},
            90: {"ROWS": 4, "SPAN_BYTES": 2048, "num_warps": 8, "PROGRAMS_PER_SM": 1, "MIN_ROWS": 64},
        },
        "8192": {"default": {"ROWS": 1, "SPAN_BYTES": 4096, "num_warps": 8, "PROGRAMS_PER_SM": 1, "MIN_ROWS": 64}},
        "16384": {"default": {"ROWS": 1, "SPAN_BYTES": 4096, "num_warps": 8, "PROGRAMS_PER_SM": 1, "MIN_ROWS": 64}},
        "32768": {"default": {"ROWS": 1, "SPAN_BYTES": 8192, "num_warps": 16, "PROGRAMS_PER_SM": 1, "MIN_ROWS": 64}},
        "65536": {"default": {"ROWS": 1, "SPAN_BYTES": 16384, "num_warps": 32, "PROGRAMS_PER_SM": 1, "MIN_ROWS": 64}},
        "1536 dropout": {
            "default": {"ROWS": 4, "SPAN_BYTES": 1024, "num_warps": 8, "PROGRAMS_PER_SM": 1, "MIN_ROWS": 64}
        },
        "4096 dropout": {
            "default": {"ROWS": 2, "SPAN_BYTES": 2048, "num_warps": 8, "PROGRAMS_PER_SM": 1, "MIN_ROWS": 64}
        },
    },
    # Variants: bits of an element. 256 columns are a warp's 128-bit accesses and divide every MLP width of GPT-2.
    "gelu_fwd": {
        "16": {"default": {"ROWS": 16, "BLOCK_C": 256, "num_warps": 4}},
        "32": {"default": {"ROWS": 8, "BLOCK_C": 256, "num_warps": 4}},
        "64": {"default": {"ROWS": 4, "BLOCK_C": 256, "num_warps": 4}},
    },
    "gelu_bwd": {
        "16": {
            "default": {"ROWS": 8, "BLOCK_C": 256, "num_warps": 4, "PROGRAMS_PER_SM": 16, "MIN_ROWS": 64},
            90: {"ROWS": 4, "BLOCK_C": 128, "num_warps": 2, "PROGRAMS_PER_SM": 16, "MIN_ROWS": 64},
        },
        "32": {"default": {"ROWS": 8, "BLOCK_C": 256, "num_warps": 4, "PROGRAMS_PER_SM": 16, "MIN_ROWS": 64}},
        "64": {"default": {"ROWS": 4, "BLOCK_C": 256, "num_warps": 4, "PROGRAMS_PER_SM": 16, "MIN_ROWS": 64}},
    },
    # Variants: bits of a logit. Few, wide programs an SM, so that the rows between their two readings fit into L2: 6 MB
    # where sm_86 has it, 40 MB and more on the others.
    "cross_entropy": {
        "16": {"default": {"BLOCK_V": 4096, "num_warps": 16}, 86: {"BLOCK_V": 8192, "num_warps": 32}},
        "32": {"default": {"BLOCK_V": 4096, "num_warps": 16}},
        "64": {"default": {"BLOCK_V": 1024, "num_warps": 8}},
    },
    "loss_total": {"": {"default": {"BLOCK_N": 4096, "num_warps": 8}}},
    "scale_gradients": {"": {"default": {"BLOCK": 4096, "num_warps": 8}}},
    "embedding_fwd": {"": {"default": {"ROWS": 8, "BLOCK_C": 256, "num_warps": 4}}},
    "embedding_batch_sum": {"": {"default": {"ROWS": 4, "BLOCK_C": 256, "num_warps": 4}}},
    # Wide blocks: every program of a row reads the window's keys again.
    "embedding_segment_sum": {"": {"default": {"WINDOW": 32, "ROWS": 8, "BLOCK_C": 1024, "num_warps": 4}}},
    "column_sum": {"": {"default": {"BLOCK_P": 32, "BLOCK_C": 64, "num_warps": 4}}},
}


# Numbers that replace those of TABLE before a version of Triton, because with them these kernels would spill registers.
# The newest version first: each goes over those before it.
BEFORE_TRITON: dict[tuple[int, int], dict[tuple[str, str], dict[int | str, dict[str, int]]]] = {
    (3, 9): {
        ("attention_bwd", "16x64"): {80: {**TABLE["attention_bwd"]["16x64"]["default"], "num_stages": 2}},
        ("attention_bwd", "16x64 bounded"): {
            86: {"DKV_BLOCK_M": 16, "DKV_BLOCK_N": 32, "DQ_BLOCK_M": 32, "DQ_BLOCK_N": 16},
            89: {"DKV_BLOCK_M": 16, "DKV_BLOCK_N": 32, "DQ_BLOCK_M": 32, "DQ_BLOCK_N": 16},
        },
        ("attention_bwd", "16x64 dropout"): {90: {"num_stages": 2}},
        ("attention_fwd", "32x64 bounded"): {
            80: {"BLOCK_M": 16, "num_warps": 8, "num_stages": 3},
            86: {"BLOCK_M": 16, "num_warps": 8},
            89: {"BLOCK_M": 16, "num_warps": 8},
        },
        ("layer_norm_fwd", "4096 dropout"): {"default": {"num_warps": 4, "PROGRAMS_PER_SM": 4}},
    },
    (3, 7): {
        ("attention_fwd", "16x64"): {86: {"BLOCK_N": 32}, 89: {"BLOCK_N": 32}},
        ("gelu_bwd", "16"): {"default": {"ROWS": 4}},
    },
    (3, 6): {  # it multiplies no fewer than 16 columns
        ("decode_linear", variant): {"default": {"MIN_N": 16}} for variant in ("16x16", "16x32", "32x16", "32x32")
    },
    (3, 5): {("attention_bwd", "16x64"): {80: {"num_stages": 3}}},
}


@functools.cache
def _row(op: str, variant: str, architecture: int | str) -> dict[str, int]:
    if variant not in TABLE[op]:  # "16x64 dropout" has the numbers of "16x64" unless it has its own
        variant = variant.split(" ")[0]
    row = _of(TABLE[op][variant], architecture)
    for version, replaced in BEFORE_TRITON.items():
        if TRITON_VERSION < version:
            row = row | _of(replaced.get((op, variant), {}), architecture)
    # Contracting a * b + c into one rounding: the default that changes in Triton 3.10, so it is asked for.
    return row | {"enable_fp_fusion": True}


def _of(rows: dict[int | str, dict[str, int]], architecture: int | str) -> dict[str, int]:
    return rows.get(architecture, rows.get("default", {}))


def architecture(device: torch.device) -> int | str:
    """Key into the table: 80 ... 120, or "hip" (gfx942 says (9, 4), which no NVIDIA GPU does)."""
    major, minor = capability(device)
    return "hip" if torch.version.hip or (major, minor) == (9, 4) else 10 * major + minor


def config(op: str, device: torch.device, variant: str = "") -> dict[str, int]:
    """Block sizes and launch options of one op: `kernel[grid](..., **config("gelu_fwd", x.device))`."""
    return _row(op, variant, architecture(device))
