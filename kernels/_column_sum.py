"""Column sums of partial sums, which every backward pass needs that computes parameter gradients.

    out_k[c] = sum over p of partial_k[p, c]        for k = 0, 1, 2 in one launch

Shapes: each partial is (P, C) in the accumulation dtype, each out is (C,) in its parameter's dtype. P is the number of
programs of the first launch; each of them summed some rows in registers. HBM traffic for each k: P * C accumulators are
read and C elements written. Numerics: the order of the additions depends only on P and C, so the sums are bitwise
reproducible; data are never added by atomics. Source: the two-stage reduction of Triton's layer-norm tutorial, without
its locks.

`column_sum` is a second launch. `fold_columns` does the same at the end of the first one, to save that launch: the last
program of each group of GROUP adds up the group's rows, and the last of these programs adds up the groups' sums.
Programs know that they are the last by tickets, counters that each program of a group raises by an atomic addition.
Which program is the last varies, but not what it adds, nor in which order. Source: CUDA's sample threadFenceReduction.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _device, _tuning
from ._frozen import Launch, planned
from ._op import empty_like

GROUP = 16  # near the square root of P, so that both steps of `fold_columns` read about as many rows


@triton.jit
def _sum_partials(
    partials_ptr, out_ptr, P, C, offs_c, mask_c,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """out[c] = sum over p < P of partials[p, c], at the columns offs_c (BLOCK_C,)."""
    acc = tl.zeros((BLOCK_P, BLOCK_C), partials_ptr.dtype.element_ty)
    for start in range(0, P, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask = (offs_p < P)[:, None] & mask_c[None, :]
        offs = offs_p.to(tl.int64)[:, None] * C + offs_c[None, :]
        acc += tl.load(partials_ptr + offs, mask=mask, other=0.0, cache_modifier=CACHE)
    tl.store(out_ptr + offs_c, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def _sum_of_others(partials_ptr, out_ptr, P, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """All columns of rows that other programs of this launch stored: read from L2, as L1 may hold older lines."""
    for start in range(0, C, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        _sum_partials(partials_ptr, out_ptr, P, C, offs_c, offs_c < C, BLOCK_P, BLOCK_C, ".cg")


@triton.jit
def _is_last(ticket_ptr, programs):
    """Whether this program is the last of `programs` that call this with one ticket; puts the ticket back to 0 then.

    The last one sees what the others stored before they called: the barrier orders all of a program's stores before its
    addition, whose release publishes them on the whole GPU, and whose acquire, in the last program, comes before the
    loads of all threads, which wait for its result at a barrier of Triton's.
    """
    tl.debug_barrier()
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last


@triton.jit
def fold_columns(
    partials_ptr, tickets_ptr, out0_ptr, out1_ptr, out2_ptr, K: tl.constexpr, C: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`column_sum` of partials (K, P, C), of which this program, one of P, has stored row program_id(0).

    Behind the partials is room for the sums of the groups, (K, groups, C). tickets: zeros, one for all groups and one
    for each. They are zeros again at the end.
    """
    P = tl.num_programs(0)
    group, groups = tl.program_id(0) // GROUP, tl.cdiv(P, GROUP)
    sums_ptr = partials_ptr + tl.cast(K * P, tl.int64) * C
    rows = tl.minimum(P - group * GROUP, GROUP)
    if _is_last(tickets_ptr + 1 + group, rows):
        for k in range(K):
            rows_ptr = partials_ptr + (tl.cast(k, tl.int64) * P + group * GROUP) * C
            sum_ptr = sums_ptr + (tl.cast(k, tl.int64) * groups + group) * C
            _sum_of_others(rows_ptr, sum_ptr, rows, C, BLOCK_P, BLOCK_C)
        if _is_last(tickets_ptr, groups):
            size = tl.cast(groups, tl.int64) * C
            _sum_of_others(sums_ptr, out0_ptr, groups, C, BLOCK_P, BLOCK_C)
            if out1_ptr is not None:
                _sum_of_others(sums_ptr + size, out1_ptr, groups, C, BLOCK_P, BLOCK_C)
            if out2_ptr is not None:
                _sum_of_others(sums_ptr + 2 * size, out2_ptr, groups, C, BLOCK_P, BLOCK_C)


@triton.jit(do_not_specialize=["P"])
def _column_sum_kernel(
    partials_ptr, out0_ptr, out1_ptr, out2_ptr, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    k = tl.program_id(1)
    partials_ptr += k.to(tl.int64) * P * C
    if k == 0:
        _sum_partials(partials_ptr, out0_ptr, P, C, offs_c, mask_c, BLOCK_P, BLOCK_C, "")
    if out1_ptr is not None:
        if k == 1:
            _sum_partials(partials_ptr, out1_ptr, P, C, offs_c, mask_c, BLOCK_P, BLOCK_C, "")
    if out2_ptr is not None:
        if k == 2:
            _sum_partials(partials_ptr, out2_ptr, P, C, offs_c, mask_c, BLOCK_P, BLOCK_C, "")


@planned
def _plan(K: int, P: int, C: int, device: torch.device) -> Launch:
    options = _tuning.config(_tuning.Key("column_sum"), device)
    return Launch(_column_sum_kernel, (_tuning.cdiv(C, options["BLOCK_C"]), K), P, C, **options)


def column_sum(partials: Tensor, dtypes: list[torch.dtype]) -> list[Tensor]:
    """The K tensors `partials[k].sum(0)` (C,) in `dtypes[k]`, in one launch. partials: contiguous (K, P, C), K 0 to 3.

    The kernel receives all of `partials` and adds the offset itself, because torch.compile copies the base of a view
    that is passed to a kernel.
    """
    K, P, C = partials.shape
    if K == 0:
        return []
    outs = [torch.empty(C, dtype=dtypes[0], device=partials.device)]
    for dtype in dtypes[1:]:
        outs.append(empty_like(outs[0], dtype))
    _plan(K, P, C, partials.device)(partials, *outs, *(None,) * (3 - K))
    return outs


def fold_groups(programs: int) -> int:
    return _tuning.cdiv(programs, GROUP)


def fold_tickets(programs: int, device: torch.device) -> int:
    """The number of tickets for `fold_columns` in a launch of up to `programs` programs, a power of 2, or 0 on AMD.

    There a barrier does not wait until the stores of all warps are in L2 (gfx942's code has no s_waitcnt vmcnt before
    it), so that the release after it publishes those of the warp that takes the ticket alone.
    """
    if _device.architecture(device) == "hip":
        return 0
    return _tuning.next_power_of_2(1 + fold_groups(programs))


def fold_options(C: int, itemsize: int, num_warps: int) -> dict[str, int]:
    """The block sizes of `fold_columns`: of each of BLOCK_P rows, a thread loads 128 bits at once. With twice as many
    rows it would need more registers than the kernel that it ends."""
    block_c = min(_tuning.next_power_of_2(C), num_warps * 32 * 16 // itemsize)
    return dict(GROUP=GROUP, BLOCK_P=min(8, 128 // num_warps), BLOCK_C=block_c)
