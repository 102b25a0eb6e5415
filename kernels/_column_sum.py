"""Column sums of partial sums: the second launch of every backward that has parameter gradients.

    out_k[c] = sum over p of partial_k[p, c]        for k = 0, 1, 2 in one launch

Shapes: each partial is (P, C) in the accumulation dtype, each out (C,) in its parameter's dtype. P is the number of
programs of the main launch, each of which summed its own rows in registers. HBM traffic: P * C accumulators read, C
written, per k. Numerics: the order of the additions depends on P and C alone, so the sums are bitwise reproducible; no
atomics. Source: the two-stage reduction of Triton's layer-norm tutorial, without its locks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._frozen import launch


@triton.jit
def _sum_columns(partial_ptr, out_ptr, offs_c, mask_c, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    acc = tl.zeros((BLOCK_P, BLOCK_C), partial_ptr.dtype.element_ty)
    for start in range(0, P, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask = (offs_p < P)[:, None] & mask_c[None, :]
        acc += tl.load(partial_ptr + offs_p.to(tl.int64)[:, None] * C + offs_c[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + offs_c, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty), mask=mask_c)


@triton.jit(do_not_specialize=["P"])
def _column_sum_kernel(
    partial0_ptr, partial1_ptr, partial2_ptr, out0_ptr, out1_ptr, out2_ptr,
    P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    k = tl.program_id(1)
    if k == 0:
        _sum_columns(partial0_ptr, out0_ptr, offs_c, mask_c, P, C, BLOCK_P, BLOCK_C)
    if partial1_ptr is not None:
        if k == 1:
            _sum_columns(partial1_ptr, out1_ptr, offs_c, mask_c, P, C, BLOCK_P, BLOCK_C)
    if partial2_ptr is not None:
        if k == 2:
            _sum_columns(partial2_ptr, out2_ptr, offs_c, mask_c, P, C, BLOCK_P, BLOCK_C)


def column_sum(partials: Sequence[Tensor], dtypes: list[torch.dtype]) -> list[Tensor]:
    """The tensors `partials[k].sum(0)` in `dtypes[k]`, for 0 to 3 contiguous `partials` (P, C), in one launch."""
    if not partials:
        return []
    K, (P, C) = len(partials), partials[0].shape
    outs = [partials[0].new_empty(C, dtype=dtype) for dtype in dtypes]
    options = _launch.config("column_sum", partials[0].device)
    missing = [None] * (3 - K)
    grid = (_launch.cdiv(C, options["BLOCK_C"]), K)
    launch(_column_sum_kernel, grid, *partials, *missing, *outs, *missing, P, C, **options)
    return outs
