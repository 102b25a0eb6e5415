"""Programmatic dependent launch: a kernel begins while the previous one is still running, on sm_90 and newer.

    if OVERLAP: start_next()               # the next kernel may begin
    ...                                    # read only what was written before the last launch without OVERLAP began
    if OVERLAP: wait_for_previous()        # all earlier kernels have ended and their writes are visible

A kernel with OVERLAP is launched with `launch_pdl=True`. Each of its programs waits before it writes anything or reads
what an earlier kernel of the chain wrote. Kernels without OVERLAP wait for all earlier kernels, as usual. A chain of
kernels therefore has its effects in order, but before its wait a kernel may run at the same time as any kernel of the
chain, not only the previous one. In that time it can load weights, which for one token is most of its work.

Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, griddepcontrol.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def start_next():
    tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def wait_for_previous():
    tl.inline_asm_elementwise("griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
