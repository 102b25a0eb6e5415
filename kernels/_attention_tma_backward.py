"""Gradient of causal attention by descriptors (TMA): Hopper and newer, heads of 64 in 16 bits, no bounds, no dropout.

The formula, inputs and outputs are those of attention_backward.py, whose kernel runs everywhere and is the reference
for this one; delta comes from the kernel there. qkv (B, T, 3*C) and dout (B, T, C) are described as they are; what lies
past T is 0.

A program computes either dk and dv of BLOCK keys or dq of BLOCK queries, and reads STEP rows of the other side at a
time. For dk and dv it goes from the last queries down to the diagonal, and a step is written as

    s = k q^T;   dk += ds q of the step before;   p = exp2(s);   dp = v dout^T;   dv += p dout;   ds = p * (dp - delta)

Products are asynchronous on Hopper. The compiler waits for s and for dp, whose values are needed, and for dk and dv
only at the next wait: dk is added to while p is computed, dv while ds is. For dq the program goes from the diagonal
down to the first key:

    s = q k^T;   dp = dout v^T;   dq += ds k of the step before;   p = exp2(s);   ds = p * (dp - delta)

The assembler for sm_90 keeps products asynchronous only if sums that begin as zeros go through a single loop that is
never skipped; otherwise it waits for every product of the kernel right after it (its message C7515). Therefore tiles on
the diagonal, the only ones with a mask, are unrolled, and the last keys get a step with queries past T.

HBM traffic: as attention_backward.py; tiles of q (for dk and dv) and of k (for dq) are read from L2 twice. Numerics: as
there, in another order of the tiles. Nothing is summed across programs. One launch after delta's.
Source: FlashAttention-3 (arXiv 2407.08608), section 3.2, the overlap within one group of warps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _device, _tuning
from ._attention_tiles import _rows, _seen, _store_rows, tuning_key
from ._attention_tma import HEAD_SIZE, _block
from ._descriptors import DescribedLaunch
from ._frozen import Launch


@triton.jit
def _dkv_step(
    sums,
    k,
    v,
    offs_n,
    qkv_step_desc,
    dout_step_desc,
    lse_ptr,
    delta_ptr,
    row,
    query,
    column,
    T,
    scale_log2,
    STEP: tl.constexpr,
    D: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """Queries `query` to query + STEP - 1. sums: (dk, dv, ds of the step before, which dk lacks), returned updated.
    Products are (keys, queries)."""
    dk, dv, ds = sums
    offs_m = query + tl.arange(0, STEP)
    s = tl.dot(k, tl.trans(_block(qkv_step_desc, row, query, column, STEP, D)))
    q_before = _block(qkv_step_desc, row, query + STEP, column, STEP, D)
    dk = tl.dot(ds.to(q_before.dtype), q_before, dk)
    p = tl.exp2(s * scale_log2 - tl.load(lse_ptr + offs_m, mask=offs_m < T, other=0.0)[None, :])
    if DIAGONAL:
        p = tl.where(offs_n[:, None] <= offs_m[None, :], p, 0.0)
    dout = _block(dout_step_desc, row, query, column, STEP, D)
    dp = tl.dot(v, tl.trans(dout))
    dv = tl.dot(p.to(dout.dtype), dout, dv)
    ds = p * (dp - tl.load(delta_ptr + offs_m, mask=offs_m < T, other=0.0)[None, :])
    return dk, dv, ds


@triton.jit
def _dq_step(
    sums,
    q,
    dout,
    offs_m,
    lse,
    delta,
    qkv_step_desc,
    row,
    key,
    column,
    C,
    scale_log2,
    STEP: tl.constexpr,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """Keys `key` to key + STEP - 1. sums: (dq, ds of the step before, which dq lacks), returned updated. FIRST: there
    is no step before. Products are (queries, keys)."""
    dq, ds = sums
    s = tl.dot(q, tl.trans(_block(qkv_step_desc, row, key, column + C, STEP, D)))
    dp = tl.dot(dout, tl.trans(_block(qkv_step_desc, row, key, column + 2 * C, STEP, D)))
    if not FIRST:
        k_before = _block(qkv_step_desc, row, key + STEP, column + C, STEP, D)
        dq = tl.dot(ds.to(k_before.dtype), k_before, dq)
    p = tl.exp2(s * scale_log2 - lse[:, None])
    if DIAGONAL:
        p = tl.where(_seen(offs_m, key + tl.arange(0, STEP), None), p, 0.0)
    return dq, p * (dp - delta[:, None])


@triton.jit(do_not_specialize=["T"])
def _attention_tma_bwd_kernel(
    qkv_desc,
    dout_desc,
    qkv_step_desc,
    dout_step_desc,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
    T,
    H,
    scale: tl.float64,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    tl.static_assert(BLOCK % STEP == 0, "STEP must divide BLOCK: the diagonal ends at a step")
    n_tiles = tl.cdiv(T, BLOCK)
    tile = tl.program_id(0) % (2 * n_tiles)
    row = tl.program_id(0) // (2 * n_tiles)
    head = tl.program_id(1)
    C = H * D
    column = head * D
    scale = tl.full((), scale, tl.float32)
    scale_log2 = scale * 1.4426950408889634
    wide_row = row.to(tl.int64)
    lse_ptr += (wide_row * H + head) * T
    delta_ptr += (wide_row * H + head) * T
    dqkv_ptr += wide_row * T * (3 * C) + column

    if tile < n_tiles:  # the first keys are seen by the most queries
        start = tile * BLOCK
        offs_n = start + tl.arange(0, BLOCK)
        k = _block(qkv_desc, row, start, column + C, BLOCK, D)
        v = _block(qkv_desc, row, start, column + 2 * C, BLOCK, D)
        dk = tl.zeros((BLOCK, D), tl.float32)
        dv = tl.zeros((BLOCK, D), tl.float32)
        ds = tl.zeros((BLOCK, STEP), tl.float32)  # of the step before the first one, whose queries are past T
        inside = start + BLOCK
        n_steps = tl.maximum(tl.cdiv(T - inside, STEP), 1)  # at least one: see above
        for i in tl.range(0, n_steps, num_stages=STAGES):
            query = inside + (n_steps - 1 - i) * STEP
            dk, dv, ds = _dkv_step(
                (dk, dv, ds), k, v, offs_n, qkv_step_desc, dout_step_desc, lse_ptr, delta_ptr,
                row, query, column, T, scale_log2, STEP, D, False,
            )  # fmt: skip
        for i in tl.static_range(1, BLOCK // STEP + 1):
            dk, dv, ds = _dkv_step(
                (dk, dv, ds), k, v, offs_n, qkv_step_desc, dout_step_desc, lse_ptr, delta_ptr,
                row, inside - i * STEP, column, T, scale_log2, STEP, D, True,
            )  # fmt: skip
        q_last = _block(qkv_step_desc, row, start, column, STEP, D)
        dk = tl.dot(ds.to(q_last.dtype), q_last, dk) * scale
        dk_ptrs = _rows(dqkv_ptr + C, start, 3 * C, BLOCK, D)
        _store_rows(dk_ptrs, dk, offs_n < T, D)
        _store_rows(dk_ptrs + C, dv, offs_n < T, D)
    else:  # the last queries see the most keys
        start = (2 * n_tiles - 1 - tile) * BLOCK
        offs_m = start + tl.arange(0, BLOCK)
        q = _block(qkv_desc, row, start, column, BLOCK, D)
        dout = _block(dout_desc, row, start, column, BLOCK, D)
        lse = tl.load(lse_ptr + offs_m, mask=offs_m < T, other=0.0)
        delta = tl.load(delta_ptr + offs_m, mask=offs_m < T, other=0.0)
        dq = tl.zeros((BLOCK, D), tl.float32)
        ds = tl.zeros((BLOCK, STEP), tl.float32)
        for i in tl.static_range(1, BLOCK // STEP + 1):
            dq, ds = _dq_step(
                (dq, ds), q, dout, offs_m, lse, delta, qkv_step_desc,
                row, start + BLOCK - i * STEP, column, C, scale_log2, STEP, D, i == 1, True,
            )  # fmt: skip
        for i in tl.range(1, start // STEP + 1, num_stages=STAGES):
            dq, ds = _dq_step(
                (dq, ds), q, dout, offs_m, lse, delta, qkv_step_desc,
                row, start - i * STEP, column, C, scale_log2, STEP, D, False, False,
            )  # fmt: skip
        k_last = _block(qkv_step_desc, row, 0, column + C, STEP, D)
        dq = tl.dot(ds.to(k_last.dtype), k_last, dq) * scale
        _store_rows(_rows(dqkv_ptr, start, 3 * C, BLOCK, D), dq, offs_m < T, D)


def tma_bwd_launch(
    B: int, T: int, n_head: int, D: int, dtype: torch.dtype, device: torch.device, scale: float
) -> Launch | None:
    """The launch for (qkv, dout, qkv, dout, lse, delta, dqkv); None if the tuning table has this kernel off, or if it
    does not serve the case: other head sizes or dtypes, or a GPU without descriptors."""
    if dtype.itemsize != 2 or D != HEAD_SIZE or not (_device.INTERPRETED or _device.has_tensor_descriptors(device)):
        return None
    config = _tuning.config(tuning_key("attention_tma_bwd", dtype, D), device)
    if not config.pop("ON"):
        return None
    own, step = (1, config["BLOCK"], D), (1, config["STEP"], D)
    grid = (2 * _tuning.cdiv(T, config["BLOCK"]) * B, n_head)
    return DescribedLaunch(_attention_tma_bwd_kernel, grid, (own, own, step, step), T, n_head, scale, D=D, **config)
