"""A linear layer for the few rows of a decoding step, together with the operations of GPT-2 before and after it.

    h = LayerNorm(x) or x,    p = h W^T,    y = residual + gelu(p + bias)        all parts but the product are optional

Shapes: x (..., K) = (M, K) rows, weight (N, K), bias (N,), norm_weight and norm_bias (K,), residual, y (..., N). A
block of GPT-2 is four such launches and one of attention.

HBM traffic: the weight is read once. Each program reads some rows of the weight and up to 32 rows of x, few enough to
stay in L2. Every program computes the LayerNorm's statistics itself, which costs less than a launch.
Numerics: products, sums and statistics in fp32 (fp64 for fp64). h is rounded to x's dtype, and so is p if more than a
bias is added to it. The separate kernels round at the same places, so that decoding gives the numbers of a whole pass.
A large mean does not cancel: see `_statistics`.
One row is multiplied element by element, with the weight loaded to registers; more rows are multiplied on tensor cores.
For one row on sm_90 and newer, the weight is prefetched while the previous kernel still runs: see _overlap.py.

Sources: those of layer_norm.py and gelu.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import _device, _op, _tuning
from ._frozen import Launch, planned
from ._overlap import start_next, wait_for_previous
from .gelu import _sigmoid_2u

OP = "decode_linear"
TOGGLE = "layer_norm='torch' or mlp"  # either switch turns it off; errors append ='torch'
TO_TORCH = f" (toggle: {TOGGLE}='torch')"
MOST_ROWS = 32  # rows of x in one program


def decode_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """The reference for `decode_linear` in plain PyTorch: (..., K) -> (..., N)."""
    h = x if norm_weight is None else F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    y = F.linear(h, weight, bias)
    y = F.gelu(y, approximate="tanh") if gelu else y
    return y if residual is None else residual + y


# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _tile(row_ptrs, mask_rows, offs_k, K: tl.constexpr):
    """Loads (rows, BLOCK_K) of a matrix at columns offs_k. row_ptrs and mask_rows are (rows, 1)."""
    return tl.load(row_ptrs + offs_k[None, :], mask=mask_rows & (offs_k < K)[None, :], other=0.0)


@triton.jit
def _statistics(x, x_ptrs, mask_m, eps, K: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr):
    """-> pivot, shift and 1 / sqrt(var + eps) of each row, all (BLOCK_M, 1). The mean of a row is pivot + shift.

    x: the rows' first BLOCK_K elements. The pivot is their mean, which is at most sqrt(K / BLOCK_K) standard deviations
    from the mean of the row, so that the difference of squares below loses at most a factor K / BLOCK_K of precision.
    """
    offs_k = tl.arange(0, BLOCK_K)
    pivot = tl.sum(x.to(ACC), 1, keep_dims=True) / min(K, BLOCK_K)
    apart = tl.where((offs_k < K)[None, :], x.to(ACC) - pivot, 0.0)
    squares = apart * apart
    for start in tl.static_range(BLOCK_K, K, BLOCK_K):
        more = _tile(x_ptrs, mask_m, start + offs_k, K).to(ACC)
        more = tl.where((start + offs_k < K)[None, :], more - pivot, 0.0)
        apart += more
        squares += more * more
    shift = tl.sum(apart, 1, keep_dims=True) / K
    var = tl.maximum(tl.sum(squares, 1, keep_dims=True) / K - shift * shift, 0.0)
    return pivot, shift, tl.rsqrt(var + eps)


@triton.jit
def _fetch(row_ptrs, mask_n, K: tl.constexpr):
    """Prefetches the weight's rows, of K elements each, into L2."""
    LINE: tl.constexpr = 1024 // row_ptrs.dtype.element_ty.primitive_bitwidth  # 128 bytes
    LINES: tl.constexpr = triton.next_power_of_2((K + LINE - 1) // LINE)
    lines = tl.arange(0, LINES)[None, :] * LINE
    ask = mask_n[:, None] & (lines < K)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l,r",
        [(row_ptrs + lines).to(tl.int64), ask.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _columns(ptr, offs_k, otherwise: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr):
    """Loads (1, BLOCK_K) of a LayerNorm parameter, or returns the constant `otherwise` if ptr is None."""
    columns = tl.full(offs_k.shape, otherwise, ACC)
    if ptr is not None:
        columns = tl.load(ptr + offs_k, mask=offs_k < K, other=0.0).to(ACC)
    return columns[None, :]


@triton.jit(do_not_specialize=["M"])
def _decode_linear_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, residual_ptr, y_ptr, stride_xm, stride_wn, stride_rm,
    M, N, K: tl.constexpr, eps: tl.constexpr, GELU: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Computes y (BLOCK_M, BLOCK_N) from BLOCK_M rows of x and BLOCK_N rows of the weight."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n, mask_m = offs_n < N, (offs_m < M)[:, None]
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm
    weight_ptrs = weight_ptr + offs_n[:, None] * stride_wn
    pivot, shift, rstd = 0.0, 0.0, 1.0

    # Before the wait, only parameters are read: their loads overlap with the previous kernel.
    if OVERLAP:
        start_next()
        _fetch(weight_ptrs, mask_n, K)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
    if BLOCK_M == 1:
        weight = _tile(weight_ptrs, mask_n[:, None], offs_k, K)
        scale, offset = _columns(norm_weight_ptr, offs_k, 1.0, K, ACC), _columns(norm_bias_ptr, offs_k, 0.0, K, ACC)
    if OVERLAP:
        wait_for_previous()

    mask = mask_m & mask_n[None, :]
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + offs_m[:, None] * stride_rm + offs_n[None, :]
        residual = tl.load(residual_ptrs, mask=mask, other=0.0).to(ACC)
    if BLOCK_M == 1 or norm_weight_ptr is not None:
        x = _tile(x_ptrs, mask_m, offs_k, K)
    if norm_weight_ptr is not None:
        pivot, shift, rstd = _statistics(x, x_ptrs, mask_m, eps, K, BLOCK_K, ACC)
    if BLOCK_M == 1:
        acc = tl.zeros((BLOCK_N, BLOCK_K), ACC)
        for start in tl.static_range(0, K, BLOCK_K):
            if start > 0:
                weight = _tile(weight_ptrs, mask_n[:, None], start + offs_k, K)
                x = _tile(x_ptrs, mask_m, start + offs_k, K)
                scale = _columns(norm_weight_ptr, start + offs_k, 1.0, K, ACC)
                offset = _columns(norm_bias_ptr, start + offs_k, 0.0, K, ACC)
            h = x
            if norm_weight_ptr is not None:
                h = ((x.to(ACC) - pivot - shift) * rstd * scale + offset).to(DTYPE)
            acc += weight.to(ACC) * h.to(ACC)
        y = tl.sum(acc, 1)[None, :]
    else:
        y = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for start in range(0, K, BLOCK_K):
            weight = _tile(weight_ptrs, mask_n[:, None], start + offs_k, K)
            h = _tile(x_ptrs, mask_m, start + offs_k, K)
            if norm_weight_ptr is not None:
                normed = (h.to(ACC) - pivot - shift) * rstd * _columns(norm_weight_ptr, start + offs_k, 1.0, K, ACC)
                h = (normed + _columns(norm_bias_ptr, start + offs_k, 0.0, K, ACC)).to(DTYPE)
            y = tl.dot(h, tl.trans(weight), y, input_precision="ieee", out_dtype=ACC)

    if GELU or residual_ptr is not None:
        y = y.to(DTYPE).to(ACC)
    if bias_ptr is not None:
        y += bias
    if GELU:
        y *= _sigmoid_2u(y, y * y)
    if residual_ptr is not None:
        y += residual
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


# ----------------------------------------------------------------------------------------------- fake and launcher


def decode_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gelu: bool,
    residual: Tensor | None,
    overlap: bool,
) -> Tensor:
    """x (..., K), weight (N, K) -> y (..., N)."""
    y = _fwd_fake(x, weight, bias, norm_weight, norm_bias, eps, gelu, residual, overlap)
    if y.numel() == 0:
        return y
    x = _op.as_rows(x)
    if weight.stride(1) != 1:
        weight, overlap = weight.contiguous(), False  # the copy is written by the previous kernel
    residual = None if residual is None else _op.as_rows(residual)
    (M, K), N = x.shape, weight.shape[0]
    strides = x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0)
    launch = _plan(strides, M, N, K, x.element_size(), eps, gelu, overlap, x.device)
    launch(x, weight, bias, norm_weight, norm_bias, residual, y)
    return y


@planned
def _plan(
    strides: tuple[int, int, int], M: int, N: int, K: int, itemsize: int, eps: float, gelu: bool, overlap: bool,
    device: torch.device,
) -> Launch:  # fmt: skip
    block_m = 1 if M == 1 else min(max(_tuning.next_power_of_2(M), 16), MOST_ROWS)
    config = _tuning.config(_tuning.Key("decode_linear", bits=8 * itemsize, rows=block_m), device)
    multiprocessors = _device.sm_count(device)
    most, least = config["BLOCK_N"], config.pop("MIN_N")
    wanted = _tuning.next_power_of_2(_tuning.cdiv(N, config.pop("PER_SM") * multiprocessors))
    config["BLOCK_M"] = block_m
    config["BLOCK_N"] = min(max(wanted, least), most)
    block_k = min(max(_tuning.next_power_of_2(K), 16), config["BLOCK_K"])
    while M > 1 and block_k > 64 and 0 < K % block_k < block_k // 2:  # the last tile would be more than half empty
        block_k //= 2
    config["BLOCK_K"] = block_k
    programs = _tuning.cdiv(N, config["BLOCK_N"])
    # No overlap in two cases in which it was slower on an H200: with more programs than the GPU can hold at once, which
    # cannot begin early, and with several rows, where a waiting program takes resources that the previous kernel needs.
    config["OVERLAP"] = overlap and M == 1 and programs <= 8 * multiprocessors and _device.can_overlap(device)
    if config["OVERLAP"]:
        config["launch_pdl"] = True
    grid = (programs, _tuning.cdiv(M, block_m))
    return Launch(_decode_linear_kernel, grid, *strides, M, N, K=K, eps=eps, GELU=gelu, **config)


def _fwd_fake(x, weight, bias, norm_weight, norm_bias, eps, gelu, residual, overlap):
    return (x if residual is None else residual).new_empty(*x.shape[:-1], weight.shape[0])


def _flops(x, weight, *_):
    return 2 * math.prod(x) * weight[0]


# Opaque, because Inductor cannot launch with overlap.
_decode_linear = _op.op(
    decode_linear_fwd, _fwd_fake, toggle=TOGGLE, opaque=True, strided=("x", "weight", "residual"), flops=_flops
)


# ---------------------------------------------------------------------------------------------------------- public


def decode_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    gelu: bool = False,
    residual: Tensor | None = None,
    overlap: bool = False,
) -> Tensor:
    """residual + gelu(LayerNorm(x) weight^T + bias): x (..., K) -> (..., N), for few rows, without gradients.

    weight (N, K) of x's dtype; bias (N,). norm_weight, norm_bias (K,) and eps: of the LayerNorm, which is computed if
    norm_weight is given. residual (..., N): the result then has its dtype. The weight is read once for 32 rows.
    overlap: the kernel may read all parameters while earlier kernels still run. The caller guarantees that an ordinary
        launch lies between the kernel that wrote them and this one (see _overlap.py). No effect before sm_90.

    Raises TypeError for an unsupported dtype and ValueError for an argument that is not allowed. There is no gradient:
    while gradients are recorded, an input that requires one raises ValueError.
    """
    _op.check_dtypes(
        OP, TOGGLE, x=x, weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias, residual=residual
    )
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1] or not weight.shape[1]:
        shapes = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        raise ValueError(
            f"{OP}: x and weight have shapes {shapes}, expected (..., K) and (N, K), K at least 1{TO_TORCH}"
        )
    if weight.dtype != x.dtype:
        raise TypeError(f"{OP}: weight is {weight.dtype}, expected x's {x.dtype}{TO_TORCH}")
    if norm_bias is not None and norm_weight is None:
        raise ValueError(
            f"{OP}: norm_bias is given without norm_weight: allowed are both, or norm_weight alone{TO_TORCH}"
        )
    N, K = weight.shape
    _op.check_shape(OP, TOGGLE, "bias", bias, (N,))
    _op.check_shape(OP, TOGGLE, "norm_weight", norm_weight, (K,))
    _op.check_shape(OP, TOGGLE, "norm_bias", norm_bias, (K,))
    _op.check_shape(OP, TOGGLE, "residual", residual, (*x.shape[:-1], N))
    if torch.is_grad_enabled():
        _refuse_gradients(
            x=x, weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias, residual=residual
        )
    columns = [bias, norm_weight, norm_bias]
    if not all(t is None or t.is_contiguous() for t in columns):
        columns, overlap = [None if t is None else t.contiguous() for t in columns], False
    return _decode_linear(x, weight, *columns, float(eps), bool(gelu), residual, bool(overlap))


def _refuse_gradients(**tensors: Tensor | None) -> None:
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            wanted = "allowed is a call under torch.no_grad()"
            raise ValueError(f"{OP}: {argument} is a tensor that requires grad, {wanted}{TO_TORCH}")
