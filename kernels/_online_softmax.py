"""The softmax of flash attention: key tile by key tile, with a running maximum m_i and sum l_i of each query.

Source: FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._attention_tiles import _rows, _store_rows

# The lowest finite number of float32 instead of -inf, with which a row that sees nothing yet would compute
# inf - inf = NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _softmax(s, m_i, l_i, scale_log2):
    """Scores s (M, N) of a key tile -> (p, alpha, m_i, l_i): p (M, N) is not normalised; what was computed with the
    previous maximum must be multiplied by alpha (M,)."""
    m_new = tl.maximum(m_i, tl.max(s, 1) * scale_log2)
    alpha = tl.exp2(m_i - m_new)
    p = tl.exp2(s * scale_log2 - m_new[:, None])
    return p, alpha, m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit
def _finish(out_ptr, lse_ptr, state, offs_m, start, sees, T, C, factor, D: tl.constexpr):
    """Divides by the softmax's sum and stores the queries from `start` on of one head. Queries that see nothing get out
    0 and lse 0."""
    m_i, l_i, acc = state
    sees = sees & (l_i > 0.0)
    lse = tl.where(sees, m_i + tl.log2(tl.where(sees, l_i, 1.0)), 0.0)
    out = acc * tl.where(sees, factor / tl.where(sees, l_i, 1.0), 0.0)[:, None]
    _store_rows(_rows(out_ptr, start, C, acc.shape[0], acc.shape[1]), out, offs_m < T, D)
    tl.store(lse_ptr + offs_m, lse, mask=offs_m < T)
