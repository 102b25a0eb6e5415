"""Gradient of causal attention on packed qkv, for attention.py: dqkv from dout, qkv, out and lse.

    delta[t] = out[t] . dout[t]      p = exp2(s * log2(e) - lse)      keep: dropout's factors, 0 or 1 / (1 - dropout_p)
    dv = (p * keep)^T dout      ds = p * (keep * dout v^T - delta)      dq = scale * ds k      dk = scale * ds^T q

dout, out (B, T, C), qkv (B, T, 3*C), lse (B, H, T) -> dqkv (B, T, 3*C), packed. dout and qkv may have any strides of B
and T. dbias (3*C,), where wanted, is the sum of dqkv over rows, before the rounding of dqkv.

HBM traffic: out and dout are read once for delta; then qkv and dout are read once and dqkv is written once. Two
launches: delta, and a grid in which each program computes either dk and dv of a tile of keys or dq of a tile of
queries. Nothing is summed across programs, so there are no atomics and the result is bitwise reproducible. The price is
that s and dp are computed twice. For dbias each program also writes the sum of its tile's rows, and a third launch adds
these up (_column_sum.py): it moves 4 bytes a column for each tile of 64 rows or so, where a sum of dqkv would read it.
_attention_tma_backward.py has a second kernel for the gradients without bounds and dropout, which the tuning table
switches on.
Numerics: as in forward. Masked elements of p are set to 0 *after* exp2, so that no inf or NaN of a masked score
survives.

Sources: FlashAttention-2 (arXiv 2307.08691), p from lse; FlexAttention (arXiv 2412.05496), one grid for both halves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuning
from ._attention_tiles import (
    DIAGONAL,
    FAR_END,
    INSIDE,
    _dot_minus,
    _first_keys,
    _keep,
    _key_tiles,
    _last_queries,
    _load_rows,
    _load_vector,
    _query_tiles,
    _rows,
    _seen,
    _span,
    _store_rows,
    _store_sums,
    block_d,
    dropout_scalars,
    rows_contiguous,
    tuning_key,
)
from ._attention_tma_backward import tma_bwd_launch
from ._column_sum import column_sum
from ._descriptors import DescribedLaunch, describable
from ._frozen import Launch, planned
from ._op import empty_like, op


@triton.jit(do_not_specialize=["T"])
def _attention_delta_kernel(
    out_ptr,
    dout_ptr,
    delta_ptr,
    stride_ob,
    stride_ot,
    T,
    H,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    n_tiles = tl.cdiv(T, BLOCK_M)
    start = tl.program_id(0) % n_tiles * BLOCK_M
    row = (tl.program_id(0) // n_tiles).to(tl.int64)
    head = tl.program_id(1)
    offs_m = start + tl.arange(0, BLOCK_M)
    mask_m = offs_m < T
    out_ptrs = _rows(out_ptr + row * T * (H * D) + head * D, start, H * D, BLOCK_M, BLOCK_D)
    dout_ptrs = _rows(dout_ptr + row * stride_ob + head * D, start, stride_ot, BLOCK_M, BLOCK_D)
    out = _load_rows(out_ptrs, mask_m, D, True).to(ACC)
    dout = _load_rows(dout_ptrs, mask_m, D, True).to(ACC)
    tl.store(delta_ptr + (row * H + head) * T + offs_m, tl.sum(out * dout, 1), mask=mask_m)


@triton.jit
def _dkv_tile(
    tensors,
    first_key,
    T,
    C,
    scale,
    documents,
    window,
    dropout,
    dropout_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Computes dk and dv of one tile of keys. Products are (keys, queries).

    tensors: pointers to one head of one row of the batch, and strides, as unpacked below. documents: as in
    `_first_keys`. dropout: as in `_keep`, or None.
    """
    qkv_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, dbias_ptr, stride_qt, stride_ot = tensors
    BOUNDED: tl.constexpr = documents is not None or window is not None
    ACC: tl.constexpr = scale.dtype
    offs_n = first_key + tl.arange(0, BLOCK_N)
    mask_n = offs_n < T
    k_ptrs = _rows(qkv_ptr + C, first_key, stride_qt, BLOCK_N, BLOCK_D)
    k = _load_rows(k_ptrs, mask_n, D, True)
    v = _load_rows(k_ptrs + C, mask_n, D, True)

    start, nearest, farthest = first_key, T - 1, T - 1
    if BOUNDED:
        last_queries = _last_queries(offs_n, T, documents, window)
        seen_at_all = mask_n & (last_queries >= offs_n)
        nearest = tl.min(tl.where(seen_at_all, last_queries, T - 1), 0)
        farthest = tl.max(tl.where(seen_at_all, last_queries, -1), 0)
        start = tl.min(tl.where(seen_at_all, offs_n, T), 0)
    cuts = _query_tiles(start, first_key + BLOCK_N, nearest, farthest, BLOCK_M)

    scale_log2 = scale * 1.4426950408889634
    dk = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    dv = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    first_query = (cuts[DIAGONAL + 1] * BLOCK_M).to(tl.int64)
    q_ptr = qkv_ptr + first_query * stride_qt
    dout_ptr += first_query * stride_ot
    offs_d = tl.arange(0, BLOCK_D)
    q_offsets = tl.arange(0, BLOCK_M)[:, None] * stride_qt + offs_d[None, :]
    dout_offsets = tl.arange(0, BLOCK_M)[:, None] * stride_ot + offs_d[None, :]
    for part in tl.static_range(DIAGONAL, FAR_END - 1, -1):
        for tile in range(cuts[part + 1], cuts[part]):
            # Queries past T are loaded as 0, with dout and delta 0, and so add 0 to both sums.
            offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            q = _load_rows(q_ptr + q_offsets, offs_m < T, D, part != INSIDE)
            lse = _load_vector(lse_ptr + offs_m, offs_m < T, part != INSIDE)
            p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC) * scale_log2 - lse[None, :])
            if part == DIAGONAL or (BOUNDED and part == FAR_END):
                seen = offs_n[:, None] <= offs_m[None, :]
                if BOUNDED:
                    seen = seen & (offs_m[None, :] <= last_queries[:, None])
                p = tl.where(seen, p, 0.0)
            dout = _load_rows(dout_ptr + dout_offsets, offs_m < T, D, part != INSIDE)
            delta = _load_vector(delta_ptr + offs_m, offs_m < T, part != INSIDE)
            if dropout is None:
                dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION, out_dtype=ACC)
                ds = p * _dot_minus(v, dout, delta[None, :], PRECISION)
            else:
                kept = tl.where(_keep(dropout, offs_m, first_key, BLOCK_N, True), p * dropout_scale, 0.0)
                dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision=PRECISION, out_dtype=ACC)
                dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION, out_dtype=ACC)
                ds = kept * dp - p * delta[None, :]
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=ACC)
            q_ptr += BLOCK_M * stride_qt
            dout_ptr += BLOCK_M * stride_ot

    dk *= scale
    if documents is not None:  # a token may be outside all documents
        dk = tl.where(seen_at_all[:, None], dk, 0.0)
        dv = tl.where(seen_at_all[:, None], dv, 0.0)
    dk_ptrs = _rows(dqkv_ptr + C, first_key, 3 * C, BLOCK_N, BLOCK_D)
    _store_rows(dk_ptrs, dk, mask_n, D)
    _store_rows(dk_ptrs + C, dv, mask_n, D)
    if dbias_ptr is not None:
        _store_sums(dbias_ptr + C, dk, first_key, T, C, D)
        _store_sums(dbias_ptr + 2 * C, dv, first_key, T, C, D)


@triton.jit
def _dq_tile(
    tensors,
    first_query,
    T,
    C,
    scale,
    documents,
    window,
    dropout,
    dropout_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIAGONAL_FIRST: tl.constexpr,
):
    """Computes dq of one tile of queries. Products are (queries, keys). Arguments as for `_dkv_tile`."""
    qkv_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, dbias_ptr, stride_qt, stride_ot = tensors
    BOUNDED: tl.constexpr = documents is not None or window is not None
    ACC: tl.constexpr = scale.dtype
    offs_m = first_query + tl.arange(0, BLOCK_M)
    mask_m = offs_m < T
    q_ptrs = _rows(qkv_ptr, first_query, stride_qt, BLOCK_M, BLOCK_D)
    dout_ptrs = _rows(dout_ptr, first_query, stride_ot, BLOCK_M, BLOCK_D)
    q = _load_rows(q_ptrs, mask_m, D, True)
    dout = _load_rows(dout_ptrs, mask_m, D, True)
    lse = tl.load(lse_ptr + offs_m, mask=mask_m, other=0.0)
    delta = tl.load(delta_ptr + offs_m, mask=mask_m, other=0.0)

    first_keys = None
    if BOUNDED:
        first_keys = _first_keys(offs_m, T, documents, window)
    sees, nearest, farthest, stop = _span(offs_m, first_keys, first_query + BLOCK_M, T)
    # There is only one tile of queries, so its DIAGONAL extends to the last key tile.
    first, inside, diagonal, _, last = _key_tiles(first_query, first_query + BLOCK_M, stop, nearest, farthest, BLOCK_N)
    cuts = (first, inside, diagonal, tl.maximum(last, diagonal + 1) if DIAGONAL_FIRST else last)

    scale_log2 = scale * 1.4426950408889634
    dq = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    k_ptr = qkv_ptr + C + (first * BLOCK_N).to(tl.int64) * stride_qt
    offsets = tl.arange(0, BLOCK_N)[:, None] * stride_qt + tl.arange(0, BLOCK_D)[None, :]
    FIRST_PART: tl.constexpr = DIAGONAL if DIAGONAL_FIRST else (FAR_END if BOUNDED else INSIDE)
    AFTER_LAST: tl.constexpr = INSIDE - 1 if DIAGONAL_FIRST else DIAGONAL + 1
    for part in tl.static_range(FIRST_PART, AFTER_LAST, -1 if DIAGONAL_FIRST else 1):
        if DIAGONAL_FIRST:
            k_ptr = qkv_ptr + C + (cuts[part] * BLOCK_N).to(tl.int64) * stride_qt
        for tile in range(cuts[part], cuts[part + 1]):
            offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            k = _load_rows(k_ptr + offsets, offs_n < T, D, part == DIAGONAL)
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * scale_log2 - lse[:, None])
            if part != INSIDE:
                p = tl.where(_seen(offs_m, offs_n, first_keys), p, 0.0)
            v = _load_rows(k_ptr + C + offsets, offs_n < T, D, part == DIAGONAL)
            if dropout is None:
                ds = p * _dot_minus(dout, v, delta[:, None], PRECISION)
            else:
                keep = _keep(dropout, offs_m, tile * BLOCK_N, BLOCK_N, False)
                dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
                ds = p * (tl.where(keep, dp * dropout_scale, 0.0) - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=ACC)
            k_ptr += BLOCK_N * stride_qt

    dq *= scale
    if documents is not None:
        dq = tl.where(sees[:, None], dq, 0.0)
    _store_rows(_rows(dqkv_ptr, first_query, 3 * C, BLOCK_M, BLOCK_D), dq, mask_m, D)
    if dbias_ptr is not None:
        _store_sums(dbias_ptr, dq, first_query, T, C, D)


@triton.jit(do_not_specialize=["T", "n_documents", "window", "dropout_threshold"])
def _attention_bwd_kernel(
    qkv_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    cu_ptr,
    seed_ptr,
    dqkv_ptr,
    dbias_ptr,
    stride_qb,
    stride_qt,
    stride_ob,
    stride_ot,
    T,
    H,
    n_documents,
    window,
    dropout_threshold,
    dropout_scale: tl.float64,
    scale: tl.float64,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    DKV_BLOCK_M: tl.constexpr,
    DKV_BLOCK_N: tl.constexpr,
    DQ_BLOCK_M: tl.constexpr,
    DQ_BLOCK_N: tl.constexpr,
    DIAGONAL_FIRST: tl.constexpr,
):
    """dbias_ptr: where to write the sum of each tile's rows, (tile of the batch, 3*C), or None. DIAGONAL_FIRST: dq
    begins on the diagonal, as dk and dv do, with which sm_90's assembler keeps products asynchronous; and the compiler
    sees that the loop there is never skipped, without which sm_120 spills. Not with bounds: it may be empty then."""
    ACC: tl.constexpr = tl.float64 if qkv_ptr.dtype.element_ty == tl.float64 else tl.float32
    n_dkv = tl.cdiv(T, DKV_BLOCK_N)
    n_dq = tl.cdiv(T, DQ_BLOCK_M)
    tile = tl.program_id(0) % (n_dkv + n_dq)
    row = (tl.program_id(0) // (n_dkv + n_dq)).to(tl.int64)
    head = tl.program_id(1)
    C = H * D
    qkv_ptr += row * stride_qb + head * D
    dout_ptr += row * stride_ob + head * D
    dqkv_ptr += row * T * (3 * C) + head * D
    lse_ptr += (row * H + head) * T
    delta_ptr += (row * H + head) * T
    scale = tl.full((), scale, ACC)
    dropout_scale = tl.full((), dropout_scale, ACC)
    tensors = (qkv_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, dbias_ptr, stride_qt, stride_ot)
    documents = None
    if cu_ptr is not None:
        documents = (cu_ptr, n_documents, row)
    dropout = None
    if seed_ptr is not None:
        dropout = (seed_ptr, dropout_threshold, row, head)
    if tile < n_dkv:  # the first keys are seen by the most queries
        first_key = tile * DKV_BLOCK_N
        _dkv_tile(
            tensors, first_key, T, C, scale, documents, window, dropout, dropout_scale,
            D, BLOCK_D, PRECISION, DKV_BLOCK_M, DKV_BLOCK_N,
        )  # fmt: skip
    else:  # the last queries see the most keys
        first_query = (n_dkv + n_dq - 1 - tile) * DQ_BLOCK_M
        _dq_tile(
            tensors, first_query, T, C, scale, documents, window, dropout, dropout_scale,
            D, BLOCK_D, PRECISION, DQ_BLOCK_M, DQ_BLOCK_N, DIAGONAL_FIRST,
        )  # fmt: skip


# --------------------------------------------------------------------------------------------- fakes and launchers


@planned
def _plans(
    B: int, T: int, n_head: int, D: int, dtype: torch.dtype, dropout: bool, tf32: bool, device: torch.device,
    strides: tuple[int, int], dout_strides: tuple[int, int], n_documents: int, window: int | None, dropout_p: float,
    scale: float, described: bool,
) -> tuple[Launch, Launch, int | None]:  # fmt: skip
    """The launches of delta and of the gradients, and how many tiles have the rows of queries and those of keys; None
    where that is not the same number, and for the kernel with descriptors, which leaves sums out."""
    sizes = dict(D=D, BLOCK_D=block_d(D))
    config = _tuning.config(tuning_key("attention_delta", dtype, D), device)
    grid = (_tuning.cdiv(T, config["BLOCK_M"]) * B, n_head)
    delta = Launch(_attention_delta_kernel, grid, *dout_strides, T, n_head, **sizes, **config)
    bounded = n_documents > 0 or window is not None
    if described and not (bounded or dropout):
        if (launch := tma_bwd_launch(B, T, n_head, D, dtype, device, scale)) is not None:
            return delta, launch, None
    config = _tuning.config(tuning_key("attention_bwd", dtype, D, bounded, dropout), device)
    config["DIAGONAL_FIRST"] &= not bounded  # a tile outside all documents has an empty diagonal
    n_dkv, n_dq = _tuning.cdiv(T, config["DKV_BLOCK_N"]), _tuning.cdiv(T, config["DQ_BLOCK_M"])
    gradients = Launch(
        _attention_bwd_kernel, ((n_dkv + n_dq) * B, n_head),
        *strides, *dout_strides, T, n_head, n_documents, window, *dropout_scalars(dropout_p), scale,
        **sizes, PRECISION="tf32" if tf32 else "ieee", **config,
    )  # fmt: skip
    return delta, gradients, n_dq * B if n_dq == n_dkv else None


def causal_attention_bwd(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    n_head: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int | None,
    tf32: bool,
    dbias_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dout (B, T, C), qkv (B, T, 3*C), out (B, T, C), lse (B, H, T) -> dqkv (B, T, 3*C), and dbias (3*C,), or None if
    dbias_dtype is None."""
    dqkv = empty_like(qkv, qkv.dtype)
    B, T, C = out.shape
    if out.numel() == 0:
        return dqkv, None if dbias_dtype is None else dqkv.new_zeros(3 * C, dtype=dbias_dtype)
    qkv, dout = rows_contiguous(qkv), rows_contiguous(dout)
    n_documents = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
    launch_delta, launch_bwd, tiles = _plans(
        B, T, n_head, C // n_head, qkv.dtype, seed is not None, tf32, qkv.device,
        qkv.stride()[:2], dout.stride()[:2], n_documents, window, dropout_p, scale,
        qkv.dtype.itemsize == 2 and describable(qkv) and describable(dout),
    )  # fmt: skip
    delta = torch.empty_like(lse)
    launch_delta(out, dout, delta)
    partials = None
    if dbias_dtype is not None and tiles is not None:
        partials = torch.empty(1, tiles, 3 * C, dtype=lse.dtype, device=lse.device)
    if isinstance(launch_bwd, DescribedLaunch):
        launch_bwd(qkv, dout, qkv, dout, lse, delta, dqkv)
    else:
        launch_bwd(qkv, dout, lse, delta, cu_seqlens, seed, dqkv, partials)
    if dbias_dtype is None:
        return dqkv, None
    return dqkv, dqkv.sum((0, 1), dtype=dbias_dtype) if partials is None else column_sum(partials, [dbias_dtype])[0]


def _bwd_fake(dout, qkv, out, lse, n_head, scale, dropout_p, seed, cu_seqlens, window, tf32, dbias_dtype=None):
    return qkv.new_empty(qkv.shape), None if dbias_dtype is None else qkv.new_empty(qkv.shape[2], dtype=dbias_dtype)


def _flops(dout, *_):
    """Five products of (T, T, D) for each head, counted as in forward."""
    B, T, C = dout
    return 10 * B * T * T * C


causal_attention_bwd_op = op(causal_attention_bwd, _bwd_fake, toggle="attention", strided=("dout", "qkv"), flops=_flops)
