"""Causal attention's forward by descriptors (TMA): Hopper and newer, heads of 64 in 16 bits, no bounds, no dropout.

The formula, inputs and outputs are those of attention.py, whose kernel runs everywhere and is the reference for this
one. qkv (B, T, 3*C) is described as it is: q, k and v are blocks of it at columns head * D, C + head * D and
2 * C + head * D, and keys and queries past T are 0.

A program computes one tile of BLOCK_M queries of one head, by two groups of four warps if it has eight. It starts at
the diagonal, the only tiles with a mask, and goes down to the first key, so that each step can be written as

    s = q k^T of this tile;   acc += p v of the tile before;   p = softmax of s

Products are asynchronous on Hopper. The compiler waits for s, whose value the softmax needs, and for acc only at the
next step: the product p v of the tile before runs while the softmax of this one is computed.

HBM traffic: as attention.py. Numerics: as there, in another order of the tiles. One launch.
Source: FlashAttention-3 (arXiv 2407.08608), section 3.2, the overlap within one group of warps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _device, _tuning
from ._attention_tiles import _seen, tuning_key
from ._descriptors import DescribedLaunch
from ._frozen import Launch
from ._online_softmax import LOWEST, _finish, _softmax

HEAD_SIZE = 64  # of every GPT-2


@triton.jit
def _block(desc, row, token, column, BLOCK: tl.constexpr, D: tl.constexpr):
    """(BLOCK, D) of a described (B, T, C): tokens from `token` on, columns from `column` on."""
    return tl.reshape(desc.load([row, token, column]), (BLOCK, D))


@triton.jit(do_not_specialize=["T"])
def _attention_tma_fwd_kernel(
    q_desc,
    kv_desc,
    out_ptr,
    lse_ptr,
    T,
    H,
    scale: tl.float64,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tl.static_assert(BLOCK_M % BLOCK_N == 0, "BLOCK_N must divide BLOCK_M: the diagonal begins at a tile of keys")
    n_tiles = tl.cdiv(T, BLOCK_M)
    start = (n_tiles - 1 - tl.program_id(0) % n_tiles) * BLOCK_M  # the last queries see the most keys
    row = tl.program_id(0) // n_tiles
    head = tl.program_id(1)
    C = H * D
    k_column = C + head * D
    v_column = k_column + C
    scale_log2 = tl.full((), scale, tl.float32) * 1.4426950408889634

    q = _block(q_desc, row, start, head * D, BLOCK_M, D)
    offs_m = start + tl.arange(0, BLOCK_M)
    m_i = tl.full((BLOCK_M,), LOWEST, tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    key = start + BLOCK_M - BLOCK_N
    s = tl.dot(q, tl.trans(_block(kv_desc, row, key, k_column, BLOCK_N, D)))
    s = tl.where(_seen(offs_m, key + tl.arange(0, BLOCK_N), None), s, float("-inf"))
    p, alpha, m_i, l_i = _softmax(s, m_i, l_i, scale_log2)
    for _ in tl.static_range(1, BLOCK_M // BLOCK_N):
        v = _block(kv_desc, row, key, v_column, BLOCK_N, D)
        key -= BLOCK_N
        s = tl.dot(q, tl.trans(_block(kv_desc, row, key, k_column, BLOCK_N, D)))
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        s = tl.where(_seen(offs_m, key + tl.arange(0, BLOCK_N), None), s, float("-inf"))
        p, alpha, m_i, l_i = _softmax(s, m_i, l_i, scale_log2)
    for i in range(0, start // BLOCK_N):
        key = start - (i + 1) * BLOCK_N
        s = tl.dot(q, tl.trans(_block(kv_desc, row, key, k_column, BLOCK_N, D)))
        v = _block(kv_desc, row, key + BLOCK_N, v_column, BLOCK_N, D)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        p, alpha, m_i, l_i = _softmax(s, m_i, l_i, scale_log2)
    v = _block(kv_desc, row, 0, v_column, BLOCK_N, D)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])

    row = row.to(tl.int64)
    out_ptr += row * T * C + head * D
    lse_ptr += (row * H + head) * T
    _finish(out_ptr, lse_ptr, (m_i, l_i, acc), offs_m, start, offs_m < T, T, C, 1.0, D)


def tma_launch(
    B: int, T: int, n_head: int, D: int, dtype: torch.dtype, device: torch.device, scale: float
) -> Launch | None:
    """The launch for (qkv, qkv, out, lse); None if the tuning table has this kernel off, or if it does not serve the
    case: other head sizes or dtypes, or a GPU without descriptors."""
    if dtype.itemsize != 2 or D != HEAD_SIZE or not (_device.INTERPRETED or _device.has_tensor_descriptors(device)):
        return None
    config = _tuning.config(tuning_key("attention_tma_fwd", dtype, D), device)
    if not config.pop("ON"):
        return None
    M, N = config["BLOCK_M"], config["BLOCK_N"]
    grid = (_tuning.cdiv(T, M) * B, n_head)
    return DescribedLaunch(_attention_tma_fwd_kernel, grid, ((1, M, D), (1, N, D)), T, n_head, scale, D=D, **config)
