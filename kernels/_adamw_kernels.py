"""The two kernels of AdamW over many tensors (adamw.py has the formula), and what they find in their tables.

A row of the addresses, int64, is a parameter's: p, g, m, v, t, shadow and lr, 0 for one that is not there. Settings,
fp64, are max_norm and then for each group lr, beta1, beta2, eps, weight_decay. Factors, fp64, are for each parameter
1 - lr * weight_decay, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), t. Sizes, int64: its elements and its group. Chunks,
int32: for each program its parameter, and which part of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

ADDRESSES, SETTINGS, FACTORS = tl.constexpr(7), tl.constexpr(5), tl.constexpr(4)


@triton.jit
def _at(address, like_ptr, start, ALIGNED: tl.constexpr):
    """The pointer that a number is, to elements such as like_ptr's, `start` of them on."""
    ptr = address.to(tl.pointer_type(like_ptr.dtype.element_ty))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr + start


@triton.jit(do_not_specialize=["first"])
def _adamw_begin_kernel(
    any_p_ptr, addresses_ptr, sizes_ptr, chunks_ptr, settings_ptr, grad_scale_ptr, squares_ptr, factors_ptr, first,
    CLIP: tl.constexpr, ALIGNED: tl.constexpr, FP64: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program c: the squares of chunk c, and with the first chunk of a parameter its factors."""
    ACC = tl.float64 if FP64 else tl.float32
    pid = tl.program_id(0)
    i = tl.load(chunks_ptr + 2 * pid).to(tl.int64)
    part = tl.load(chunks_ptr + 2 * pid + 1).to(tl.int64)
    row = addresses_ptr + i * ADDRESSES
    if part == 0:
        settings = settings_ptr + 1 + tl.load(sizes_ptr + 2 * i + 1) * SETTINGS
        lr, beta1, beta2 = tl.load(settings), tl.load(settings + 1), tl.load(settings + 2)
        lr_address = tl.load(row + 6)
        if lr_address != 0:
            lr = tl.load(lr_address.to(tl.pointer_type(tl.float32))).to(tl.float64)
        t = tl.load(tl.load(row + 4).to(tl.pointer_type(tl.float32))) + 1.0
        # beta^t by squaring: 1 - beta^t needs all of fp64's digits, which not every GPU's exp2 gives.
        power1, power2, exponent = beta1 * 0.0 + 1.0, beta2 * 0.0 + 1.0, t.to(tl.int64)
        while exponent > 0:
            odd = exponent % 2 == 1
            power1, power2 = tl.where(odd, power1 * beta1, power1), tl.where(odd, power2 * beta2, power2)
            beta1, beta2, exponent = beta1 * beta1, beta2 * beta2, exponent // 2
        factors = factors_ptr + i * FACTORS
        tl.store(factors, 1.0 - lr * tl.load(settings + 4))
        tl.store(factors + 1, lr / (1.0 - power1))
        tl.store(factors + 2, 1.0 / tl.sqrt(1.0 - power2))
        tl.store(factors + 3, t.to(tl.float64))
    if CLIP:
        scale = tl.full((), 1.0, ACC)
        if grad_scale_ptr is not None:
            scale = 1.0 / tl.load(grad_scale_ptr).to(ACC)
        start = part * CHUNK
        N = tl.minimum(tl.load(sizes_ptr + 2 * i) - start, CHUNK).to(tl.int32)
        g_ptr = _at(tl.load(row + 1), any_p_ptr, start, ALIGNED)
        offs = tl.arange(0, BLOCK)
        acc = tl.zeros((BLOCK,), ACC)
        for tile in range(0, N // BLOCK):
            g = tl.load(g_ptr + tile * BLOCK + offs).to(ACC) * scale
            acc += g * g
        offs += N // BLOCK * BLOCK
        g = tl.load(g_ptr + offs, mask=offs < N, other=0.0).to(ACC) * scale
        acc += g * g
        tl.store(squares_ptr + first + pid, tl.sum(acc, 0).to(squares_ptr.dtype.element_ty))


@triton.jit
def _update_tile(
    p_ptr, g_ptr, m_ptr, v_ptr, shadow_ptr, shadow_address, offs, N,
    scale, decay, step_size, root, beta2, rest1, rest2, eps, MASKED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Without a mask accesses are as wide as they can be: of N, a number in memory, no divisor is known."""
    if MASKED:
        mask = offs < N
        p = tl.load(p_ptr + offs, mask=mask, other=0.0)
        g = tl.load(g_ptr + offs, mask=mask, other=0.0)
        m = tl.load(m_ptr + offs, mask=mask, other=0.0)
        v = tl.load(v_ptr + offs, mask=mask, other=0.0)
    else:
        p, g, m, v = tl.load(p_ptr + offs), tl.load(g_ptr + offs), tl.load(m_ptr + offs), tl.load(v_ptr + offs)
    g, m = g.to(ACC) * scale, m.to(ACC)
    m += rest1 * (g - m)
    v = beta2 * v.to(ACC) + rest2 * (g * g)
    p = (p.to(ACC) * decay - step_size * (m / (tl.sqrt(v) * root + eps))).to(p_ptr.dtype.element_ty)
    if MASKED:
        tl.store(p_ptr + offs, p, mask=mask)
        tl.store(m_ptr + offs, m.to(m_ptr.dtype.element_ty), mask=mask)
        tl.store(v_ptr + offs, v.to(v_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(p_ptr + offs, p)
        tl.store(m_ptr + offs, m.to(m_ptr.dtype.element_ty))
        tl.store(v_ptr + offs, v.to(v_ptr.dtype.element_ty))
    if shadow_ptr is not None:
        if shadow_address != 0:
            shadow = p.to(shadow_ptr.dtype.element_ty)
            if MASKED:
                tl.store(shadow_ptr + offs, shadow, mask=mask)
            else:
                tl.store(shadow_ptr + offs, shadow)


@triton.jit(do_not_specialize=["first", "n_squares"])
def _adamw_update_kernel(
    any_p_ptr, addresses_ptr, sizes_ptr, chunks_ptr, settings_ptr, grad_scale_ptr, found_inf_ptr, squares_ptr,
    factors_ptr, norm_ptr, any_shadow_ptr, first, n_squares,
    CLIP: tl.constexpr, ALIGNED: tl.constexpr, FP64: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program c: chunk c of p, m, v and the shadow, and with the first chunk of a parameter its t."""
    ACC = tl.float64 if FP64 else tl.float32
    pid = tl.program_id(0)
    i = tl.load(chunks_ptr + 2 * pid).to(tl.int64)
    part = tl.load(chunks_ptr + 2 * pid + 1).to(tl.int64)
    row, factors = addresses_ptr + i * ADDRESSES, factors_ptr + i * FACTORS
    settings = settings_ptr + 1 + tl.load(sizes_ptr + 2 * i + 1) * SETTINGS
    offs = tl.arange(0, BLOCK)
    scale = tl.full((), 1.0, ACC)
    if grad_scale_ptr is not None:
        scale = 1.0 / tl.load(grad_scale_ptr).to(ACC)
    if CLIP:
        acc = tl.zeros((BLOCK,), squares_ptr.dtype.element_ty)
        for begin in range(0, n_squares, BLOCK):
            acc += tl.load(squares_ptr + begin + offs, mask=begin + offs < n_squares, other=0.0)
        norm = tl.sqrt(tl.sum(acc, 0))
        if first + pid == 0:
            tl.store(norm_ptr, norm)
        ratio = (tl.load(settings_ptr) / (norm.to(tl.float64) + 1e-6)).to(ACC)
        scale = scale * tl.where(ratio > 1.0, 1.0, ratio)  # NaN stays NaN
    found = 0.0
    if found_inf_ptr is not None:
        found = tl.load(found_inf_ptr)
    if found == 0.0:
        beta1, beta2 = tl.load(settings + 1), tl.load(settings + 2)
        rest1, rest2 = (1.0 - beta1).to(ACC), (1.0 - beta2).to(ACC)
        beta2, eps = beta2.to(ACC), tl.load(settings + 3).to(ACC)
        decay, step_size = tl.load(factors).to(ACC), tl.load(factors + 1).to(ACC)
        root = tl.load(factors + 2).to(ACC)
        if part == 0:
            tl.store(tl.load(row + 4).to(tl.pointer_type(tl.float32)), tl.load(factors + 3).to(tl.float32))
        start = part * CHUNK
        N = tl.minimum(tl.load(sizes_ptr + 2 * i) - start, CHUNK).to(tl.int32)
        p_ptr = _at(tl.load(row), any_p_ptr, start, ALIGNED)
        g_ptr = _at(tl.load(row + 1), any_p_ptr, start, ALIGNED)
        m_ptr = _at(tl.load(row + 2), any_p_ptr, start, ALIGNED)
        v_ptr = _at(tl.load(row + 3), any_p_ptr, start, ALIGNED)
        shadow_address = tl.load(row + 5)
        shadow_ptr = None
        if any_shadow_ptr is not None:
            shadow_ptr = _at(shadow_address, any_shadow_ptr, start, ALIGNED)
        for tile in range(0, N // BLOCK):
            _update_tile(
                p_ptr, g_ptr, m_ptr, v_ptr, shadow_ptr, shadow_address, tile * BLOCK + offs, N,
                scale, decay, step_size, root, beta2, rest1, rest2, eps, False, ACC,
            )  # fmt: skip
        if N % BLOCK != 0:
            _update_tile(
                p_ptr, g_ptr, m_ptr, v_ptr, shadow_ptr, shadow_address, N // BLOCK * BLOCK + offs, N,
                scale, decay, step_size, root, beta2, rest1, rest2, eps, True, ACC,
            )  # fmt: skip
