"""Causal multi-head attention on packed qkv: flash attention that reads the output of c_attn without a copy.

    s[t, j] = scale * q[t] . k[j] where j <= t (and t - window < j, and j is in t's document), else -inf
    out = dropout(softmax(s)) v,   lse[t] = log2(sum over j of exp(s[t, j]))

qkv (B, T, 3*C) = (B, T, [q | k | v], H, D), with any strides of B and T -> out (B, T, C), and lse (B, H, T) in float32
(float64 for float64 inputs) for backward.

HBM traffic: q, k and v are read once, out and lse are written once; tiles read k and v again from L2. One launch.
Numerics: products and the softmax's state in float32 (float64 for float64 inputs). p is rounded once before p v, out
once at the end. A query that sees nothing gives 0 and a finite lse.
Tiles: a program loops over the key tiles that its queries see: masked at the far end (window or document), without a
mask in the middle, masked on the diagonal (_attention_tiles.py). Without window and documents it computes two tiles of
BLOCK_M queries of one head, so that each tile of k and v is read once for both. They need the same key tiles, except
that the first one stops at its diagonal. The programs with the most work start first.
_attention_tma.py has a second kernel for the case without bounds and dropout, which the tuning table switches on.

Sources: FlashAttention-2 (arXiv 2307.08691); Philox (Salmon et al., SC 2011).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuning
from ._attention_tiles import (
    DIAGONAL,
    FAR_END,
    INSIDE,
    SECOND_DIAGONAL,
    _first_keys,
    _keep,
    _key_tiles,
    _load_rows,
    _rows,
    _seen,
    _span,
    block_d,
    check_heads,
    describe,
    dropout_scalars,
    refuse,
    rows_contiguous,
    tuning_key,
)
from ._attention_tma import tma_launch
from ._descriptors import DescribedLaunch, describable
from ._frozen import Launch, planned
from ._online_softmax import LOWEST, _finish, _softmax
from ._op import check_dtypes, check_once, check_shape, op
from .attention_backward import causal_attention_bwd_op

OP = "causal_attention"
TOGGLE = "attention"


def causal_attention_reference(
    qkv: Tensor,
    n_head: int,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """The reference for `causal_attention` in plain PyTorch: qkv (B, T, 3*C) -> (B, T, C).

    keep (B, H, T, T): dropout's factors, 0 or 1 / (1 - p).
    """
    B, T, C3 = qkv.shape
    q, k, v = qkv.reshape(B, T, 3, n_head, C3 // (3 * n_head)).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    seen = visible(B, T, cu_seqlens, window, qkv.device)
    p = torch.softmax(s.masked_fill(~seen, -math.inf), -1)
    p = p.masked_fill(~seen, 0.0)  # the softmax of a row that sees nothing is NaN
    if keep is not None:
        p = p * keep
    return (p @ v).transpose(1, 2).reshape(B, T, C3 // 3)


def visible(
    B: int, T: int, cu_seqlens: Tensor | None = None, window: int | None = None, device: torch.device | None = None
) -> Tensor:
    """True where query t sees key j: (1, 1, T, T), or (B, 1, T, T) with documents."""
    t = torch.arange(T, device=device)
    seen = (t[:, None] >= t[None, :])[None, None]
    if window is not None:
        seen = seen & (t[:, None] - t[None, :] < window)
    if cu_seqlens is not None:
        tokens = torch.arange(B * T, device=device, dtype=cu_seqlens.dtype)
        document = torch.searchsorted(cu_seqlens, tokens, right=True).view(B, 1, T)  # 0: before the first document
        inside = (document > 0) & (document < cu_seqlens.numel())
        seen = seen & (document[..., :, None] == document[..., None, :]) & inside[..., :, None]
    return seen


# ---------------------------------------------------------------------------------------------------------- kernel


@triton.jit
def _attend(
    q, offs_m, first_keys, k, v, key, state, scale_log2, dropout, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """A step of the online softmax: queries q (M, D) attend to the keys k (N, D) and values v (N, D) from `key` on.

    first_keys: None without bounds. dropout: as in `_keep`, or None. state: (m_i, l_i, acc), returned updated.
    """
    m_i, l_i, acc = state
    BLOCK_N: tl.constexpr = k.shape[0]
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=acc.dtype)
    if MASKED:
        s = tl.where(_seen(offs_m, key + tl.arange(0, BLOCK_N), first_keys), s, float("-inf"))
    p, alpha, m_i, l_i = _softmax(s, m_i, l_i, scale_log2)
    if dropout is not None:
        p = tl.where(_keep(dropout, offs_m, key, BLOCK_N, False), p, 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION, out_dtype=acc.dtype)
    return m_i, l_i, acc


@triton.jit(do_not_specialize=["T", "n_documents", "window", "dropout_threshold"])
def _attention_fwd_kernel(
    qkv_ptr,
    cu_ptr,
    seed_ptr,
    out_ptr,
    lse_ptr,
    stride_qb,
    stride_qt,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tl.static_assert(
        BLOCK_M % BLOCK_N == 0, "BLOCK_N must divide BLOCK_M: the two tiles of queries part on a tile's edge"
    )
    BOUNDED: tl.constexpr = cu_ptr is not None or window is not None
    PAIR: tl.constexpr = not BOUNDED  # with bounds, two tiles of queries could need different keys
    QUERIES: tl.constexpr = 2 * BLOCK_M if PAIR else BLOCK_M
    ACC: tl.constexpr = tl.float64 if qkv_ptr.dtype.element_ty == tl.float64 else tl.float32
    n_tiles = tl.cdiv(T, QUERIES)
    start = (n_tiles - 1 - tl.program_id(0) % n_tiles) * QUERIES  # the last queries see the most keys
    row = (tl.program_id(0) // n_tiles).to(tl.int64)
    head = tl.program_id(1)
    C = H * D
    qkv_ptr += row * stride_qb + head * D
    out_ptr += row * T * C + head * D
    lse_ptr += (row * H + head) * T

    offs_0 = start + tl.arange(0, BLOCK_M)
    q_0 = _load_rows(_rows(qkv_ptr, start, stride_qt, BLOCK_M, BLOCK_D), offs_0 < T, D, True)
    documents = None
    if cu_ptr is not None:
        documents = (cu_ptr, n_documents, row)
    dropout = None
    if seed_ptr is not None:
        dropout = (seed_ptr, dropout_threshold, row, head)
    first_keys = None
    if BOUNDED:
        first_keys = _first_keys(offs_0, T, documents, window)
    sees_0, nearest, farthest, stop = _span(offs_0, first_keys, start + QUERIES, T)
    cuts = _key_tiles(start, start + BLOCK_M, stop, nearest, farthest, BLOCK_N)

    scale_log2 = tl.full((), scale, ACC) * 1.4426950408889634
    m_0 = tl.full((BLOCK_M,), LOWEST, ACC)
    l_0 = tl.zeros((BLOCK_M,), ACC)
    acc_0 = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    if PAIR:
        offs_1 = offs_0 + BLOCK_M
        q_1 = _load_rows(_rows(qkv_ptr, start + BLOCK_M, stride_qt, BLOCK_M, BLOCK_D), offs_1 < T, D, True)
        m_1, l_1, acc_1 = m_0, l_0, acc_0
    k_ptr = qkv_ptr + C + (cuts[0] * BLOCK_N).to(tl.int64) * stride_qt
    offsets = tl.arange(0, BLOCK_N)[:, None] * stride_qt + tl.arange(0, BLOCK_D)[None, :]
    for part in tl.static_range(FAR_END if BOUNDED else INSIDE, SECOND_DIAGONAL + PAIR):
        for tile in range(cuts[part], cuts[part + 1]):
            key = tile * BLOCK_N
            mask_n = key + tl.arange(0, BLOCK_N) < T
            k = _load_rows(k_ptr + offsets, mask_n, D, part >= DIAGONAL)
            v = _load_rows(k_ptr + C + offsets, mask_n, D, part >= DIAGONAL)
            if part < SECOND_DIAGONAL:
                state = (m_0, l_0, acc_0)
                m_0, l_0, acc_0 = _attend(
                    q_0, offs_0, first_keys, k, v, key, state, scale_log2, dropout, part != INSIDE, PRECISION
                )
            if PAIR:
                state = (m_1, l_1, acc_1)
                m_1, l_1, acc_1 = _attend(
                    q_1, offs_1, None, k, v, key, state, scale_log2, dropout, part == SECOND_DIAGONAL, PRECISION
                )
            k_ptr += BLOCK_N * stride_qt

    factor = tl.full((), dropout_scale, ACC)
    _finish(out_ptr, lse_ptr, (m_0, l_0, acc_0), offs_0, start, sees_0, T, C, factor, D)
    if PAIR:
        _finish(out_ptr, lse_ptr, (m_1, l_1, acc_1), offs_1, start + BLOCK_M, offs_1 < T, T, C, factor, D)


# --------------------------------------------------------------------------------------------- fakes and launchers


@planned
def _fwd_plan(
    B: int, T: int, n_head: int, D: int, dtype: torch.dtype, dropout: bool, tf32: bool, device: torch.device,
    strides: tuple[int, int], n_documents: int, window: int | None, dropout_p: float, scale: float, described: bool,
) -> Launch:  # fmt: skip
    bounded = n_documents > 0 or window is not None
    if described and not (bounded or dropout):
        if (launch := tma_launch(B, T, n_head, D, dtype, device, scale)) is not None:
            return launch
    config = _tuning.config(tuning_key("attention_fwd", dtype, D, bounded, dropout), device)
    queries = config["BLOCK_M"] if bounded else 2 * config["BLOCK_M"]
    return Launch(
        _attention_fwd_kernel, (_tuning.cdiv(T, queries) * B, n_head),
        *strides, T, n_head, n_documents, window, *dropout_scalars(dropout_p), scale,
        D=D, BLOCK_D=block_d(D), PRECISION="tf32" if tf32 else "ieee", **config,
    )  # fmt: skip


def causal_attention_fwd(
    qkv: Tensor,
    n_head: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int | None,
    tf32: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """qkv (B, T, 3*C) -> out (B, T, C), lse (B, H, T). bias is not read: it has a gradient."""
    out, lse = _fwd_fake(qkv, n_head, scale, dropout_p, seed, cu_seqlens, window, tf32)
    B, T, C = out.shape
    if out.numel() == 0:
        return out, lse
    qkv = rows_contiguous(qkv)
    n_documents = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
    launch = _fwd_plan(
        B, T, n_head, C // n_head, qkv.dtype, seed is not None, tf32, qkv.device,
        qkv.stride()[:2], n_documents, window, dropout_p, scale, qkv.dtype.itemsize == 2 and describable(qkv),
    )  # fmt: skip
    if isinstance(launch, DescribedLaunch):
        launch(qkv, qkv, out, lse)
    else:
        launch(qkv, cu_seqlens, seed, out, lse)
    return out, lse


def _fwd_fake(qkv, n_head, scale, dropout_p, seed, cu_seqlens, window, tf32, bias=None):
    B, T, C3 = qkv.shape
    statistics = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    out = torch.empty(B, T, C3 // 3, dtype=qkv.dtype, device=qkv.device)
    return out, torch.empty(B, n_head, T, dtype=statistics, device=qkv.device)


# -------------------------------------------------------------------------------------------------------- autograd


def _setup_context(ctx, inputs, output):
    qkv, *ctx.scalars, seed, cu_seqlens, ctx.window, ctx.tf32, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(qkv, *output, seed, cu_seqlens)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, *_):
    if dout is None:
        return (None,) * 9
    qkv, out, lse, seed, cu_seqlens = ctx.saved_tensors
    dbias_dtype = ctx.bias_dtype if ctx.needs_input_grad[-1] else None  # without a bias it may have been left out
    dqkv, dbias = causal_attention_bwd_op(
        dout, qkv, out, lse, *ctx.scalars, seed, cu_seqlens, ctx.window, ctx.tf32, dbias_dtype
    )
    return dqkv, *(None,) * 7, None if dbias_dtype is None else dbias


def _flops(qkv, *_):
    """Two products of (T, T, D) for each head. As in PyTorch's counter, causality is not discounted."""
    B, T, C3 = qkv
    return 4 * B * T * T * (C3 // 3)


_causal_attention = op(
    causal_attention_fwd, _fwd_fake, toggle=TOGGLE, strided=("qkv", "bias"), differentiable=1,
    setup_context=_setup_context, backward=_backward, flops=_flops,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- public


def causal_attention(
    qkv: Tensor,
    n_head: int,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    tf32: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """Causal self-attention: qkv (B, T, 3*C) = [q | k | v] -> (B, T, C) in qkv's dtype, C = n_head * head size.

    Any T, head sizes 16 to 128; bfloat16, float16, float32 or float64.
    scale: the factor on q . k, 1 / sqrt(head size) by default.
    dropout_p: the probability of dropping a weight of the softmax. seed: int64 tensor of one element on qkv's device,
        which determines the mask; by default it is drawn from the device's generator.
    cu_seqlens: int32 (n_documents + 1,), rising: the start of each document in the B*T flattened tokens, then the end
        of the last one. Tokens attend within their document and row; tokens outside all documents get 0.
    window: a token attends to itself and the window - 1 tokens before it.
    tf32: computes float32 products on tensor cores with 10 bits of mantissa.
    bias: (3*C,), the bias of the linear layer that computed qkv, which has added it. It gets its gradient here, the sum
        of qkv's, without a pass over that: give the layer the bias without its gradient (`bias.detach()`).
    Raises TypeError for an unsupported dtype, ValueError for an argument that is not allowed.
    """
    _check(qkv, n_head, scale, dropout_p, seed, cu_seqlens, window, bias)
    if dropout_p == 0.0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=qkv.device)
    if scale is None:
        scale = (qkv.shape[2] // (3 * n_head)) ** -0.5
    return _causal_attention(qkv, n_head, float(scale), float(dropout_p), seed, cu_seqlens, window, tf32, bias)[0]


@check_once
def _check(qkv, n_head, scale, dropout_p, seed, cu_seqlens, window, bias):
    check_dtypes(OP, TOGGLE, qkv=qkv, bias=bias)
    check_heads(OP, TOGGLE, qkv, n_head, scale)
    check_shape(OP, TOGGLE, "bias", bias, qkv.shape[2:])
    if not 0 <= dropout_p < 1:
        refuse(OP, TOGGLE, "dropout_p", dropout_p, "0 <= dropout_p < 1")
    if window is not None and window < 1:
        refuse(OP, TOGGLE, "window", window, "None or at least 1")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        refuse(OP, TOGGLE, "seed", describe(seed), f"one int64 on {qkv.device}")
    if cu_seqlens is not None and not (
        cu_seqlens.dtype == torch.int32 and cu_seqlens.dim() == 1 and cu_seqlens.numel() > 1
    ):
        refuse(OP, TOGGLE, "cu_seqlens", describe(cu_seqlens), f"int32 (n_documents + 1,) on {qkv.device}")
