"""Cross-entropy and its gradient of rows of logits that fit in a program's registers, where each is read once.

A whole row in registers is three tiles (LANES, VECTOR) of falling powers of 2, because one tile would be padded to a
single power of 2: 50257 columns take 32768 + 16384 + 2048 instead of 65536.
Off until a GPU has measured it beside `_cross_entropy.py`, whose formulas it has.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _tuning

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)  # finite, so that a lane with only padding does not compute inf - inf


@triton.jit
def _offsets(START: tl.constexpr, SIZE: tl.constexpr, VECTOR: tl.constexpr):
    return START + tl.arange(0, SIZE // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _load_logits(
    row_ptr, ACC: tl.constexpr, V: tl.constexpr, STRIDE: tl.constexpr,
    START: tl.constexpr, SIZE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The columns from START on, -inf beyond V."""
    offs_v = _offsets(START, SIZE, VECTOR)
    x = tl.load(row_ptr + offs_v, mask=offs_v < STRIDE, other=0.0).to(ACC)
    return tl.where(offs_v < V, x, float("-inf"))


@triton.jit
def _store_logits(
    row_ptr, dx, STRIDE: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    offs_v = _offsets(START, SIZE, VECTOR)
    tl.store(row_ptr + offs_v, dx.to(row_ptr.dtype.element_ty), mask=offs_v < STRIDE)


@triton.jit
def _sum_logits(x, V: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr, VECTOR: tl.constexpr):
    return tl.sum(tl.sum(tl.where(_offsets(START, SIZE, VECTOR) < V, x, 0.0), 1), 0)


@triton.jit
def _cross_entropy_row_kernel(
    logits_ptr, targets_ptr, scale_ptr, losses_ptr, STRIDE: tl.constexpr, stride_scalen, V: tl.constexpr,
    IGNORE_INDEX: tl.constexpr, LABEL_SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, WRITE_GRAD: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """As `_cross_entropy_kernel`, for rows that fit in a program's registers: each logit is read once, and each
    exponential is computed once. Tiles a, b, c have A, B, C columns."""
    ACC = losses_ptr.dtype.element_ty
    n = tl.program_id(0)
    row_ptr = logits_ptr + n.to(tl.int64) * STRIDE
    target = tl.load(targets_ptr + n)
    if (target < 0) | (target == IGNORE_INDEX):
        tl.store(losses_ptr + n, 0.0)
        if WRITE_GRAD:
            _store_logits(row_ptr, tl.zeros((A // VECTOR, VECTOR), ACC), STRIDE, 0, A, VECTOR)
            _store_logits(row_ptr, tl.zeros((B // VECTOR, VECTOR), ACC), STRIDE, A, B, VECTOR)
            _store_logits(row_ptr, tl.zeros((C // VECTOR, VECTOR), ACC), STRIDE, A + B, C, VECTOR)
    else:
        in_range = target < V
        target_logit = tl.load(row_ptr + target, mask=in_range, other=float("nan")).to(ACC)
        a = _load_logits(row_ptr, ACC, V, STRIDE, 0, A, VECTOR)
        b = _load_logits(row_ptr, ACC, V, STRIDE, A, B, VECTOR)
        c = _load_logits(row_ptr, ACC, V, STRIDE, A + B, C, VECTOR)
        m = tl.maximum(tl.max(tl.max(a, 1), 0), tl.max(tl.max(b, 1), 0))
        m = tl.maximum(tl.maximum(m, tl.max(tl.max(c, 1), 0)), LOWEST)
        if LABEL_SMOOTHING != 0:
            mean = _sum_logits(a, V, 0, A, VECTOR) + _sum_logits(b, V, A, B, VECTOR)
            mean = (mean + _sum_logits(c, V, A + B, C, VECTOR)) / V
        a = tl.exp2((a - m) * LOG2E)
        b = tl.exp2((b - m) * LOG2E)
        c = tl.exp2((c - m) * LOG2E)
        sum_i = tl.sum(tl.sum(a, 1), 0) + tl.sum(tl.sum(b, 1), 0) + tl.sum(tl.sum(c, 1), 0)
        log_l = tl.log2(sum_i) * LN2
        loss = (m - target_logit) + log_l
        lse = m + log_l
        if LABEL_SMOOTHING != 0:
            loss += LABEL_SMOOTHING * (target_logit - mean)
        if Z_LOSS != 0:
            loss += Z_LOSS * lse * lse
        tl.store(losses_ptr + n, loss)
        if WRITE_GRAD:
            scale = tl.load(scale_ptr + n * stride_scalen)
            scale = tl.where(in_range, scale, float("nan"))
            softmax_scale = scale * (1.0 + 2.0 * Z_LOSS * lse) / sum_i
            uniform = scale * LABEL_SMOOTHING / V
            _store_logits(row_ptr, a * softmax_scale - uniform, STRIDE, 0, A, VECTOR)
            _store_logits(row_ptr, b * softmax_scale - uniform, STRIDE, A, B, VECTOR)
            _store_logits(row_ptr, c * softmax_scale - uniform, STRIDE, A + B, C, VECTOR)
            # The target's column is stored again: comparing it with every column would spill registers.
            dx = tl.exp2((target_logit - m) * LOG2E) * softmax_scale - uniform - scale * (1.0 - LABEL_SMOOTHING)
            tl.debug_barrier()  # after what other threads stored there
            tl.store(row_ptr + target, dx.to(logits_ptr.dtype.element_ty), mask=in_range)


def row_tiles(V: int, vector: int) -> tuple[int, int, int]:
    """The powers of 2, each at least `vector`, whose sum covers V columns: the first two as large as fit in V."""
    left, sizes = V, []
    for _ in range(2):
        sizes.append(max(vector, 1 << max(left, 1).bit_length() - 1))
        left -= sizes[-1]
    return sizes[0], sizes[1], max(vector, _tuning.next_power_of_2(max(left, 1)))
