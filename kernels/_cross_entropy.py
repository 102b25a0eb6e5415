"""Cross-entropy of rows of logits, and its gradient, which overwrites them: the kernel of `linear_cross_entropy`.

    lse = log sum_c exp(x_c),   loss = lse - (1 - s) x_t - s/V sum_c x_c + z lse^2
    dx_c = scale ((1 + 2 z lse) exp(x_c - lse) - (1 - s) [c = t] - s/V)        t target, s label_smoothing, z z_loss

Shapes: logits x (R, V) with a row stride padded to whole vectors of 16 bytes; targets, losses (R,); scale (R,) or (1,).
HBM traffic with e bytes an element: each row is read once from memory, read again from L2 in reverse order, and written
once: 2 V e bytes a row, or V e without the gradient.
Where the tuning table says so, a row is held in registers instead and not read again, which takes half of the
exponentials, and nearly all registers of a multiprocessor.
Numerics: statistics in fp32 (fp64 for fp64 logits) in base 2. Each lane has an online maximum; the lanes are merged
once at the end of the row.

GPT-2's vocabulary size, 50257, is odd, and a mask that ends there would forbid every access wider than one element.
Masks here end at the padded stride instead, and columns beyond V are dropped after the load.

Source: Milakov and Gimelshein 2018 (arXiv 1805.02867), online softmax.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuning
from ._cross_entropy_row import LN2, LOG2E, LOWEST, _cross_entropy_row_kernel, row_tiles
from ._frozen import Launch, planned


@triton.jit
def _online_softmax(x, m_i, l_i):
    """Adds one block x (LANES, VECTOR) to each lane's maximum m_i and sum l_i of exp(x - m_i)."""
    m_new = tl.maximum(m_i, tl.max(x, 1))
    return m_new, l_i * tl.exp2((m_i - m_new) * LOG2E) + tl.sum(tl.exp2((x - m_new[:, None]) * LOG2E), 1)


@triton.jit
def _gradient(x, m, log2_l, softmax_scale, uniform, target_scale, target, offs_v, has_target):
    """softmax_scale * softmax(x) - uniform, minus target_scale at the target if the block has it (has_target)."""
    dx = tl.exp2((x - m) * LOG2E - log2_l) * softmax_scale - uniform
    if has_target:
        dx -= tl.where(offs_v == target, target_scale, 0.0)
    return dx


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, scale_ptr, losses_ptr, stride_logitsn, stride_scalen, V,
    IGNORE_INDEX: tl.constexpr, LABEL_SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, WRITE_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A program computes one row. In each block a lane reads VECTOR neighbours (16 bytes) and updates its maximum and
    sum."""
    ACC = losses_ptr.dtype.element_ty
    LANES: tl.constexpr = BLOCK_V // VECTOR
    n = tl.program_id(0)
    row_ptr = logits_ptr + n.to(tl.int64) * stride_logitsn
    offs = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    full = V // BLOCK_V  # blocks that need no mask; one masked block, possibly empty, follows
    offs_last = full * BLOCK_V + offs
    mask_last = offs_last < stride_logitsn
    target = tl.load(targets_ptr + n)
    if (target < 0) | (target == IGNORE_INDEX):
        tl.store(losses_ptr + n, 0.0)
        if WRITE_GRAD:
            zeros = tl.zeros((LANES, VECTOR), logits_ptr.dtype.element_ty)
            for block in range(0, full):
                tl.store(row_ptr + (block * BLOCK_V + offs), zeros)
            tl.store(row_ptr + offs_last, zeros, mask=mask_last)
    else:
        in_range = target < V
        target_logit = tl.load(row_ptr + target, mask=in_range, other=float("nan")).to(ACC)
        m_i = tl.full((LANES,), LOWEST, ACC)
        l_i = tl.zeros((LANES,), ACC)
        sum_i = tl.zeros((LANES,), ACC)
        for block in range(0, full):
            x = tl.load(row_ptr + (block * BLOCK_V + offs)).to(ACC)
            m_i, l_i = _online_softmax(x, m_i, l_i)
            if LABEL_SMOOTHING != 0:
                sum_i += tl.sum(x, 1)
        x = tl.load(row_ptr + offs_last, mask=mask_last, other=0.0).to(ACC)
        x_last = tl.where(offs_last < V, x, float("-inf"))
        m_i, l_i = _online_softmax(x_last, m_i, l_i)
        if LABEL_SMOOTHING != 0:
            sum_i += tl.sum(tl.where(offs_last < V, x, 0.0), 1)
        m = tl.max(m_i, 0)
        log2_l = tl.log2(tl.sum(l_i * tl.exp2((m_i - m) * LOG2E), 0))
        # The maximum is subtracted first everywhere, because lse is rounded at the magnitude of the logits.
        loss = (m - target_logit) + log2_l * LN2
        lse = m + log2_l * LN2
        if LABEL_SMOOTHING != 0:
            loss += LABEL_SMOOTHING * (target_logit - tl.sum(sum_i, 0) / V)
        if Z_LOSS != 0:
            loss += Z_LOSS * lse * lse
        tl.store(losses_ptr + n, loss)
        if WRITE_GRAD:
            dtype = logits_ptr.dtype.element_ty
            scale = tl.load(scale_ptr + n * stride_scalen)
            scale = tl.where(in_range, scale, float("nan"))
            softmax_scale = scale * (1.0 + 2.0 * Z_LOSS * lse)
            target_scale = scale * (1.0 - LABEL_SMOOTHING)
            uniform = scale * LABEL_SMOOTHING / V
            column = tl.where(in_range, target, -1).to(tl.int32)
            # In reverse order, because the caches still hold the blocks read last. x_last is still in registers.
            has_target = column >= full * BLOCK_V
            dx = _gradient(x_last, m, log2_l, softmax_scale, uniform, target_scale, column, offs_last, has_target)
            tl.store(row_ptr + offs_last, dx.to(dtype), mask=mask_last)
            for i in range(0, full):
                start = (full - 1 - i) * BLOCK_V
                offs_v = start + offs
                x = tl.load(row_ptr + offs_v).to(ACC)
                has_target = (column >= start) & (column < start + BLOCK_V)
                dx = _gradient(x, m, log2_l, softmax_scale, uniform, target_scale, column, offs_v, has_target)
                tl.store(row_ptr + offs_v, dx.to(dtype))


@triton.jit(do_not_specialize=["N"])
def _inverse_count_kernel(targets_ptr, inverse_ptr, N, IGNORE_INDEX: tl.constexpr, BLOCK_N: tl.constexpr):
    """Runs as one program: N integers are few, and one program adds in a fixed order."""
    count = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        targets = tl.load(targets_ptr + offs_n, mask=offs_n < N, other=-1)
        count += ((targets >= 0) & (targets != IGNORE_INDEX)).to(tl.int32)
    tl.store(inverse_ptr, 1.0 / tl.maximum(tl.sum(count, 0), 1).to(inverse_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["N"])
def _total_kernel(losses_ptr, factor_ptr, total_ptr, N, BLOCK_N: tl.constexpr):
    total = tl.zeros((BLOCK_N,), losses_ptr.dtype.element_ty)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        total += tl.load(losses_ptr + offs_n, mask=offs_n < N, other=0.0)
    tl.store(total_ptr, tl.sum(total, 0) * tl.load(factor_ptr))


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses, scales and sums for logits of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def padded_vocab(V: int) -> int:
    """The row stride of the logits in elements: V rounded up to a multiple of 64."""
    return _tuning.cdiv(V, 64) * 64


def cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    scale: Tensor,
    losses: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    write_grad: bool,
) -> None:
    """Fills losses (R,) and, if `write_grad`, overwrites logits (R, V) with their gradients times scale, (R,) or (1,).

    targets (R,) int64. The padding after the V logits of each row, including the last row, is read and may be
    overwritten.
    """
    R, V = logits.shape
    numbers = (logits.stride(0), 1 if scale.shape[0] == R else 0, V, ignore_index, label_smoothing, z_loss, write_grad)
    _plan(R, V, 8 * logits.element_size(), logits.device, *numbers)(logits, targets, scale, losses)


@planned
def _plan(R: int, V: int, bits: int, device: torch.device, *numbers) -> Launch:
    vector = 128 // bits
    options = _tuning.config(_tuning.Key("cross_entropy_row", bits=bits), device)
    if V <= options.pop("COLUMNS"):
        return Launch(_cross_entropy_row_kernel, (R,), *numbers, *row_tiles(V, vector), vector, **options)
    options = _tuning.config(_tuning.Key("cross_entropy", bits=bits), device)
    return Launch(_cross_entropy_kernel, (R,), *numbers, VECTOR=vector, **options)


@planned
def _sum_plan(kernel: Any, device: torch.device, *numbers: int) -> Launch:
    return Launch(kernel, (1,), *numbers, **_tuning.config(_tuning.Key("loss_total"), device))


def inverse_count(targets: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """1 / max(1, number of targets that are neither negative nor ignore_index), as a tensor (1,) of `dtype`."""
    inverse = torch.empty(1, dtype=dtype, device=targets.device)
    _sum_plan(_inverse_count_kernel, targets.device, targets.shape[0], ignore_index)(targets, inverse)
    return inverse


def total(losses: Tensor, factor: Tensor) -> Tensor:
    """factor * sum of losses (R,) as a scalar tensor, added in a fixed order."""
    result = torch.empty((), dtype=losses.dtype, device=losses.device)
    _sum_plan(_total_kernel, losses.device, losses.shape[0])(losses, factor, result)
    return result
