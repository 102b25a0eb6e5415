"""Column sums of partial sums: the second launch of every backward pass that computes parameter gradients.

    out_k[c] = sum over p of partial_k[p, c]        for k = 0, 1, 2 in one launch

Shapes: each partial is (P, C) in the accumulation dtype, each out is (C,) in its parameter's dtype. P is the number of
programs of the first launch; each of them summed some rows in registers. HBM traffic for each k: P * C accumulators are
read and C elements written. Numerics: the order of the additions depends only on P and C, so the sums are bitwise
reproducible; there are no atomics. Source: the two-stage reduction of Triton's layer-norm tutorial, without its locks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuning
from ._frozen import Launch, planned
from ._op import empty_like


@triton.jit
def _sum_columns(partials_ptr, out_ptr, first, offs_c, mask_c, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    acc = tl.zeros((BLOCK_P, BLOCK_C), partials_ptr.dtype.element_ty)
    for start in range(0, P, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask = (offs_p < P)[:, None] & mask_c[None, :]
        acc += tl.load(partials_ptr + (first + offs_p)[:, None] * C + offs_c[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + offs_c, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty), mask=mask_c)


@triton.jit(do_not_specialize=["P"])
def _column_sum_kernel(
    partials_ptr, out0_ptr, out1_ptr, out2_ptr, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    k = tl.program_id(1)
    first = k.to(tl.int64) * P  # the first row of partial k in (K * P, C)
    if k == 0:
        _sum_columns(partials_ptr, out0_ptr, first, offs_c, mask_c, P, C, BLOCK_P, BLOCK_C)
    if out1_ptr is not None:
        if k == 1:
            _sum_columns(partials_ptr, out1_ptr, first, offs_c, mask_c, P, C, BLOCK_P, BLOCK_C)
    if out2_ptr is not None:
        if k == 2:
            _sum_columns(partials_ptr, out2_ptr, first, offs_c, mask_c, P, C, BLOCK_P, BLOCK_C)


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
