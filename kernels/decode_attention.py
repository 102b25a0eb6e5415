"""Attention of one new token over the KV cache. The same launch appends the token's k and v to the cache.

    cache[0, b, h, lengths[b]] = k[b, h],   cache[1, b, h, lengths[b]] = v[b, h]
    s[j] = scale * q . cache[0, b, h, j] for j <= lengths[b],   out = softmax(s) cache[1, b, h]

qkv (B, 1, 3*C) = (B, 1, [q | k | v], H, D), cache (2, B, H, S, D) = [keys | values], lengths (B,) -> out (B, 1, C).
Keys and values may be two tensors of equal strides, and a row may begin at starts[b]: j runs from there.

HBM traffic: qkv and the filled part of the cache are read once; k, v and out are written once. The tokens of a head are
split over as many programs as fill the GPU; a short cache is not split. The number of splits depends only on shapes, so
that one CUDA graph serves every length; the device computes from the length how many tokens each split reads. Each
split writes its output and lse, D + 1 numbers in float32, and a second launch merges them. With one split there is one
launch.
Numerics: products and the softmax's state in float32 (float64 for float64 inputs), one rounding at the store.
Tiles: each row of a tile has its own online softmax (maximum, sum, sum of values) until the end of the loop, so that
threads exchange only the products q . k in the loop. The new token is read from qkv and not from the cache: the first
split computes with it and writes it to the cache.

Sources: Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023); FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _device, _tuning
from ._attention_tiles import _load_rows, _rows, block_d, check_heads, describe, refuse, tuning_key
from ._frozen import Launch, planned
from ._op import check_dtypes, op
from ._overlap import start_next, wait_for_previous

OP = "decode_attention"
TOGGLE = "attention"
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, so that merging rows without tokens computes no inf - inf


def decode_attention_reference(
    qkv: Tensor,
    cache: Tensor | tuple[Tensor, Tensor],
    lengths: Tensor,
    n_head: int,
    *,
    scale: float | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """The reference for `decode_attention` in plain PyTorch: qkv (B, 1, 3*C), lengths and starts (B,) -> (B, 1, C).

    cache (2, B, H, S, D), or two tensors (B, H, S, D), is changed in place.
    """
    B, _, C3 = qkv.shape
    q, k, v = qkv.reshape(B, 3, n_head, 1, C3 // (3 * n_head)).unbind(1)  # (B, H, 1, D) each
    place = torch.arange(cache[0].shape[2], device=qkv.device)
    seen = place < lengths[:, None]
    seen = (seen if starts is None else seen & (place >= starts[:, None]))[:, None, :, None]  # (B, 1, S, 1)
    keys, values = (torch.cat((c.masked_fill(~seen, 0.0), new), 2) for c, new in zip(cache, (k, v), strict=True))
    s = (keys @ q.mT).squeeze(3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    visible = torch.cat((seen, seen.new_ones(B, 1, 1, 1)), 2).squeeze(3)  # the last key is the token's own
    p = torch.softmax(s.masked_fill(~visible, float("-inf")), -1)
    here = (place == lengths[:, None])[:, None, :, None]
    for c, new in zip(cache, (k, v), strict=True):
        c.copy_(torch.where(here, new, c))
    return (p[:, :, None] @ values).reshape(B, 1, C3 // 3)


# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _meet(s, v, m_i, l_i, acc):
    """A step of each row's online softmax: weights exp2(s) with s (N,), values v (N, D) or (1, D)."""
    m_new = tl.maximum(m_i, s)
    alpha = tl.exp2(m_i - m_new)
    p = tl.exp2(s - m_new)
    return m_new, l_i * alpha + p, acc * alpha[:, None] + p[:, None] * v


@triton.jit
def _finish(m_i, l_i, acc):
    """Merges the rows' softmaxes: the weighted mean of the values (D,), and log2 of the sum of the weights."""
    m = tl.max(m_i, 0)
    w = tl.exp2(m_i - m)
    total = tl.sum(l_i * w, 0)
    total = tl.where(total > 0.0, total, 1.0)  # 0 for a split without tokens, whose result is not stored
    return tl.sum(acc * w[:, None], 0) / total, m + tl.log2(total)


@triton.jit
def _split_size(length, n_splits, S, BLOCK_N: tl.constexpr):
    """(number of tokens in the cache, number of tokens of each split)."""
    cached = tl.minimum(tl.maximum(length, 0), S)
    return cached, tl.maximum(tl.cdiv(tl.cdiv(cached, BLOCK_N), n_splits), 1) * BLOCK_N


@triton.jit(do_not_specialize=["S", "n_splits"])
def _decode_attention_kernel(
    qkv_ptr,
    cache_ptr,
    values_ptr,
    lengths_ptr,
    starts_ptr,
    out_ptr,
    lse_ptr,
    stride_qb,
    stride_cw,
    stride_cb,
    stride_ch,
    stride_cs,
    S,
    H,
    n_splits,
    scale: tl.float64,
    D: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Computes one split of one head: out (B, H, n_splits, D) and lse (B, H, n_splits). With one split there is no lse,
    because nothing is merged."""
    ACC: tl.constexpr = tl.float64 if qkv_ptr.dtype.element_ty == tl.float64 else tl.float32
    if OVERLAP:
        start_next()
        wait_for_previous()
    split = tl.program_id(0) % n_splits
    row = (tl.program_id(0) // (n_splits * H)).to(tl.int64)
    head = tl.program_id(0) // n_splits % H
    length = tl.load(lengths_ptr + row)
    if values_ptr is None:
        values_ptr = cache_ptr + stride_cw
    offset = row * stride_cb + head.to(tl.int64) * stride_ch
    if starts_ptr is not None:
        begin = tl.load(starts_ptr + row)
        offset += begin.to(tl.int64) * stride_cs
        length -= begin
        S -= begin
    cached, size = _split_size(length, n_splits, S, BLOCK_N)
    first = split * size
    last = tl.minimum(first + size, cached)
    is_first = split == 0
    qkv_ptr += row * stride_qb + head * D
    cache_ptr += offset
    values_ptr += offset

    offs_d = tl.arange(0, BLOCK_D)
    q = tl.load(qkv_ptr + offs_d, mask=offs_d < D, other=0.0).to(ACC) * (tl.full((), scale, ACC) * 1.4426950408889634)
    mask_new = offs_d < tl.where(is_first, D, 0)
    k_new = tl.load(qkv_ptr + H * D + offs_d, mask=mask_new, other=0.0)
    v_new = tl.load(qkv_ptr + 2 * H * D + offs_d, mask=mask_new, other=0.0)
    mask_stored = offs_d < tl.where(is_first & (length >= 0) & (length < S), D, 0)
    offs_new = length.to(tl.int64) * stride_cs + offs_d
    tl.store(cache_ptr + offs_new, k_new, mask=mask_stored)
    tl.store(values_ptr + offs_new, v_new, mask=mask_stored)

    m_i = tl.full((BLOCK_N,), LOWEST, ACC)
    l_i = tl.zeros((BLOCK_N,), ACC)
    acc = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    k_ptrs = _rows(cache_ptr, first, stride_cs, BLOCK_N, BLOCK_D)
    v_ptrs = _rows(values_ptr, first, stride_cs, BLOCK_N, BLOCK_D)
    # num_stages is given at the loop, because Triton otherwise does not pipeline loads that feed no tl.dot.
    for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        mask_n = start + tl.arange(0, BLOCK_N) < last
        k = _load_rows(k_ptrs, mask_n, D, True)
        v = _load_rows(v_ptrs, mask_n, D, True)
        s = tl.where(mask_n, tl.sum(q[None, :] * k.to(ACC), 1), float("-inf"))
        m_i, l_i, acc = _meet(s, v.to(ACC), m_i, l_i, acc)
        k_ptrs += BLOCK_N * stride_cs
        v_ptrs += BLOCK_N * stride_cs

    is_new = tl.arange(0, BLOCK_N) < tl.where(is_first, 1, 0)
    s = tl.where(is_new, tl.sum(q * k_new.to(ACC), 0), float("-inf"))
    m_i, l_i, acc = _meet(s, v_new.to(ACC)[None, :], m_i, l_i, acc)
    out, lse = _finish(m_i, l_i, acc)
    takes_part = is_first | (first < cached)
    place = tl.program_id(0).to(tl.int64)
    mask_out = offs_d < tl.where(takes_part, D, 0)
    tl.store(out_ptr + place * D + offs_d, out.to(out_ptr.dtype.element_ty), mask=mask_out)
    if lse_ptr is not None:
        tl.store(lse_ptr + place, lse, mask=takes_part)


@triton.jit(do_not_specialize=["S", "n_splits"])
def _decode_merge_kernel(
    parts_ptr,
    lse_ptr,
    lengths_ptr,
    starts_ptr,
    out_ptr,
    S,
    H,
    n_splits,
    D: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """out (B, H, D) = the mean of the splits' outputs with weights exp2(lse). A program computes one head."""
    if OVERLAP:
        start_next()
        wait_for_previous()
    ACC: tl.constexpr = parts_ptr.dtype.element_ty
    place = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths_ptr + place // H)
    if starts_ptr is not None:
        begin = tl.load(starts_ptr + place // H)
        length -= begin
        S -= begin
    cached, size = _split_size(length, n_splits, S, BLOCK_N)
    take_part = tl.maximum(tl.cdiv(cached, size), 1)
    lse_ptr += place * n_splits
    offs_d = tl.arange(0, BLOCK_D)
    part_ptrs = _rows(parts_ptr, place * n_splits, D, BLOCK_P, BLOCK_D)
    m_i = tl.full((BLOCK_P,), LOWEST, ACC)
    l_i = tl.zeros((BLOCK_P,), ACC)
    acc = tl.zeros((BLOCK_P, BLOCK_D), ACC)
    for start in range(0, take_part, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask_p = offs_p < take_part
        lse = tl.load(lse_ptr + offs_p, mask=mask_p, other=float("-inf"))
        part = _load_rows(part_ptrs, mask_p, D, True)
        m_i, l_i, acc = _meet(lse, part, m_i, l_i, acc)
        part_ptrs += BLOCK_P * D
    out, _ = _finish(m_i, l_i, acc)
    tl.store(out_ptr + place * D + offs_d, out.to(out_ptr.dtype.element_ty), mask=offs_d < D)


# ----------------------------------------------------------------------------------------------- fake and launcher


def decode_attention_fwd(
    qkv: Tensor,
    cache: Tensor,
    values: Tensor | None,
    lengths: Tensor,
    starts: Tensor | None,
    n_head: int,
    scale: float,
) -> Tensor:
    """qkv (B, 1, 3*C) -> out (B, 1, C). Writes k and v to the cache in place; with values, cache has the keys alone."""
    out = _fwd_fake(qkv, cache, values, lengths, starts, n_head, scale)
    if out.numel() == 0:
        return out
    B, _, C = out.shape
    S, D = cache.shape[-2:]
    qkv = qkv if qkv.stride(2) == 1 else qkv.contiguous()
    strides = (qkv.stride(0), *((0,) if values is not None else ()), *cache.stride()[:-1])
    n_splits, attend, merge = _plans(B, n_head, S, D, qkv.dtype, strides, scale, qkv.device)
    parts, lse = out, None
    if n_splits > 1:
        statistics = torch.float64 if qkv.dtype == torch.float64 else torch.float32
        parts = out.new_empty((B, n_head, n_splits, D), dtype=statistics)
        lse = out.new_empty((B, n_head, n_splits), dtype=statistics)
    attend(qkv, cache, values, lengths, starts, parts, lse)
    if lse is not None:
        merge(parts, lse, lengths, starts, out)
    return out


@planned
def _plans(
    B: int, n_head: int, S: int, D: int, dtype: torch.dtype, strides: tuple[int, ...], scale: float,
    device: torch.device,
) -> tuple[int, Launch, Launch]:  # fmt: skip
    """The number of splits of the cache, and the launches of attention and merge."""
    config = _tuning.config(tuning_key("decode_attention", dtype, D), device)
    programs, block_n = config.pop("PROGRAMS_PER_SM") * _device.sm_count(device), config["BLOCK_N"]
    splits = 1 if S <= config.pop("ONE_SPLIT") else _tuning.cdiv(S, block_n)
    n_splits = max(1, min(programs // (B * n_head), splits))
    shared: dict[str, Any] = dict(D=D, BLOCK_D=block_d(D))
    shared["OVERLAP"] = B == 1 and _device.can_overlap(device)  # as in decode_linear, before and after it
    if shared["OVERLAP"]:
        shared["launch_pdl"] = True
    grid = (B * n_head * n_splits,)
    attend = Launch(_decode_attention_kernel, grid, *strides, S, n_head, n_splits, scale, **shared, **config)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    config = _tuning.config(tuning_key("decode_merge", statistics, D), device)
    sizes = (S, n_head, n_splits)
    merge = Launch(_decode_merge_kernel, (B * n_head,), *sizes, BLOCK_N=block_n, **shared, **config)
    return n_splits, attend, merge


def _fwd_fake(qkv, cache, values, lengths, starts, n_head, scale):
    return qkv.new_empty((qkv.shape[0], 1, qkv.shape[2] // 3))


def _flops(qkv, cache, *_):
    """Two products for each head over all S positions of the cache: only the device knows how many are filled."""
    B, _, C3 = qkv
    return 4 * B * cache[-2] * (C3 // 3)


# Opaque, because Inductor would copy the cache, which is written to.
_decode_attention = op(
    decode_attention_fwd,
    _fwd_fake,
    toggle=TOGGLE,
    mutates=("cache", "values"),
    opaque=True,
    strided=("qkv",),
    flops=_flops,
)


# ---------------------------------------------------------------------------------------------------------- public


def decode_attention(
    qkv: Tensor,
    cache: Tensor | tuple[Tensor, Tensor],
    lengths: Tensor,
    n_head: int,
    *,
    scale: float | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """Attention of one new token a row: qkv (B, 1, 3*C) = [q | k | v] -> (B, 1, C), C = n_head * head size.

    cache: (2, B, n_head, S, head size) of qkv's dtype, keys then values, with head sizes 16 to 128; or keys and values
        as two tensors (B, n_head, S, head size) of equal strides. k and v are stored in it at position lengths[b]. The
        last dimension must be contiguous; positions from lengths[b] on are never read.
    lengths: int32 (B,) on qkv's device, the number of tokens in the cache before this one. The caller increments it. A
        row whose length is not in 0 ... S - 1 stores nothing; its token attends to the cached tokens and itself.
    scale: the factor on q . k, 1 / sqrt(head size) by default.
    starts: int32 (B,), the position at which each row's tokens begin, 0 ... lengths[b]; positions before it, which are
        padding, are not read. Default: 0.

    Raises TypeError for an unsupported dtype and ValueError for an argument that is not allowed. There is no gradient:
    while gradients are recorded, an input that requires one raises ValueError.
    """
    check_dtypes(OP, TOGGLE, qkv=qkv)
    keys, values = cache if isinstance(cache, tuple) else (cache, None)
    _check(qkv, keys, values, lengths, starts, n_head, scale)
    if scale is None:
        scale = keys.shape[-1] ** -0.5
    return _decode_attention(qkv, keys, values, lengths, starts, n_head, float(scale))


def _check(qkv, cache, values, lengths, starts, n_head, scale):
    D = check_heads(OP, TOGGLE, qkv, n_head, scale)
    B, T, _ = qkv.shape
    if T != 1:
        refuse(OP, TOGGLE, "qkv", f"of shape {tuple(qkv.shape)}", "(B, 1, 3 * C): one new token a row")
    shape, halves = tuple(cache.shape), (2,) if values is None else ()
    wanted = (*halves, B, n_head, *shape[-2:-1], D)
    if len(shape) < 4 or shape != wanted or not shape[-2] or cache.dtype != qkv.dtype:
        sizes = ", ".join(map(str, (*halves, B, n_head, "S", D)))
        refuse(OP, TOGGLE, "cache", describe(cache), f"{qkv.dtype} ({sizes}), S at least 1")
    shared = any(stride == 0 and size > 1 for stride, size in zip(cache.stride(), shape, strict=True))
    if cache.stride(-1) != 1 or shared or cache.stride(-2) >= 2**31 // 128:
        allowed = "a contiguous last dimension, no memory shared between elements, positions less than 2^24 apart"
        refuse(OP, TOGGLE, "cache", f"of strides {cache.stride()}", allowed)
    if values is not None:
        if tuple(values.shape) != shape or values.dtype != cache.dtype:
            refuse(OP, TOGGLE, "cache", f"keys and values {describe(values)}", f"values as keys, {describe(cache)}")
        if values.stride() != cache.stride():
            strides = f"of strides {cache.stride()} and {values.stride()}"
            refuse(OP, TOGGLE, "cache", strides, "the same strides for keys and values")
    for argument, places in (("lengths", lengths), ("starts", starts)):
        if places is not None and (places.dtype != torch.int32 or tuple(places.shape) != (B,)):
            refuse(OP, TOGGLE, argument, describe(places), f"torch.int32 ({B},) on {qkv.device}")
    if torch.is_grad_enabled():
        for argument, tensor in (("qkv", qkv), ("cache", cache), ("cache", values)):
            if tensor is not None and tensor.requires_grad:
                refuse(OP, TOGGLE, argument, "a tensor that requires grad", "a call under torch.no_grad()")
