"""Programmatic dependent launch: a kernel begins while the one before it ends, on sm_90 and newer.

    if OVERLAP: start_next()               # the kernel launched after this one may begin
    (reads of what the last launch without OVERLAP found already written: neither its own writes nor the chain's)
    if OVERLAP: wait_for_previous()        # the kernel before has ended, and with it all before; its writes are seen

A kernel with OVERLAP is launched with `launch_pdl=True`, and waits in every program before it reads what others have
written or writes anything. Kernels without it wait for all before them, as ever. So a chain of them is in order; but
before its wait a kernel may run beside any of the chain, not only the one before. What it can do then is ask for
weights: for one token, most of its time.

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
