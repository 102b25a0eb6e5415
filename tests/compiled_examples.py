"""Kernels with one fault each, for test_compiled.py: run as a script, it writes what the audit says of them.

python compiled_examples.py FILE
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

from fastgpt2.bench.audit import asm
from fastgpt2.bench.audit.compiled import ROWS_TO_COMPILE, recording


@triton.jit
def _good_kernel(x_ptr, y_ptr, stride_xn, N, C, BLOCK: tl.constexpr):
    offs_c = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    while row < N:
        x = tl.load(x_ptr + row * stride_xn + offs_c, mask=offs_c < C, other=0.0)
        tl.store(y_ptr + row * C + offs_c, x, mask=offs_c < C)
        row += tl.num_programs(0)


@triton.jit
def _int32_offsets_kernel(x_ptr, y_ptr, stride_xn, N, C, BLOCK: tl.constexpr):
    offs_c = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), N, tl.num_programs(0)):
        x = tl.load(x_ptr + row * stride_xn + offs_c, mask=offs_c < C, other=0.0)
        tl.store(y_ptr + row.to(tl.int64) * C + offs_c, x, mask=offs_c < C)


@triton.jit
def _int32_pointer_kernel(x_ptr, y_ptr, stride_xn, N, C, BLOCK: tl.constexpr):
    offs_c = tl.arange(0, BLOCK)
    x_ptr += tl.program_id(0) * stride_xn
    y_ptr += tl.program_id(0).to(tl.int64) * C
    for start in range(0, C, BLOCK):
        tl.store(y_ptr + start + offs_c, tl.load(x_ptr + start + offs_c))


@triton.jit
def _atomic_kernel(x_ptr, y_ptr, stride_xn, N, C, BLOCK: tl.constexpr):
    offs_c = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0).to(tl.int64) * stride_xn + offs_c, mask=offs_c < C, other=0.0)
    tl.atomic_add(y_ptr + offs_c, x.to(y_ptr.dtype.element_ty), mask=offs_c < C)


@triton.jit
def _tickets_kernel(x_ptr, tickets_ptr, stride_xn, N, C, BLOCK: tl.constexpr):
    """The last program to take a ticket does something. The fault is x's offsets, whose names are used again later."""
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        offs = n * stride_xn + tl.arange(0, BLOCK)
        tl.store(x_ptr + offs, tl.zeros((BLOCK,), x_ptr.dtype.element_ty))
    if tl.atomic_add(tickets_ptr, 1) == tl.num_programs(0) - 1:
        for start in range(0, C, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            tl.store(tickets_ptr + offs, tl.zeros((BLOCK,), tl.int32), mask=offs < C)


@triton.jit
def _block_of_tickets_kernel(x_ptr, tickets_ptr, stride_xn, N, C, BLOCK: tl.constexpr):
    """Adds up data under another name."""
    tl.atomic_add(tickets_ptr + tl.arange(0, BLOCK), 1)


@triton.jit
def _narrow_accesses_kernel(x_ptr, y_ptr, stride_xn, N, C, BLOCK: tl.constexpr):
    offs_c = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    mask = offs_c < C - N % 2  # not known to cover whole vectors
    x = tl.load(x_ptr + row * stride_xn + offs_c, mask=mask, other=0.0)
    tl.store(y_ptr + row * C + offs_c, x, mask=offs_c < C)


@triton.jit
def _dot_kernel(x_ptr, y_ptr, stride_xn, N, C, BLOCK: tl.constexpr):
    offs = tl.arange(0, 128)[:, None] * 128 + tl.arange(0, 128)[None, :]
    a = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, tl.dot(a, a).to(y_ptr.dtype.element_ty))


@triton.jit
def _plain_dot_kernel(x_ptr, y_ptr, stride_xn, N, C, BLOCK: tl.constexpr):
    offs = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    a = tl.load(x_ptr + offs)
    wide = a.to(tl.float32)
    wide = tl.dot(wide, wide, input_precision="ieee")
    tl.store(y_ptr + offs, tl.dot(a, wide.to(a.dtype)).to(y_ptr.dtype.element_ty))


def main(file: str) -> None:
    results = {}
    examples = {
        "good": (_good_kernel, {}),
        "int32_offsets": (_int32_offsets_kernel, {}),
        "int32_pointer": (_int32_pointer_kernel, {}),
        "atomic": (_atomic_kernel, {}),
        "tickets": (_tickets_kernel, {}),
        "block_of_tickets": (_block_of_tickets_kernel, {}),
        "narrow_accesses": (_narrow_accesses_kernel, {}),
        "dot": (_dot_kernel, {}),
        "plain_dot": (_plain_dot_kernel, {}),
        "spill": (_dot_kernel, {"maxnreg": 64}),
    }
    for architecture in ("80", "90", "gfx942"):
        for name, (kernel, options) in examples.items():
            if architecture != "80" and name not in ("good", "dot", "plain_dot"):
                continue
            x = torch.empty(ROWS_TO_COMPILE, 1024, dtype=torch.bfloat16)
            y = torch.empty(1024) if name == "atomic" else torch.empty_like(x)
            y = torch.empty(1024, dtype=torch.int32) if "tickets" in name else y
            with recording(architecture) as launches:
                kernel[(64,)](x, y, x.stride(0), ROWS_TO_COMPILE, 1024, BLOCK=1024, num_warps=4, **options)
            figures = dataclasses.asdict(launches[0].figures(ROWS_TO_COMPILE))
            figures["vector_share"] = asm.vector_share(figures["widths"], {})
            results[f"{name} {architecture}"] = figures
    Path(file).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
