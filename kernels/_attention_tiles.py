"""What forward and backward of attention share: who sees whom, which tiles that takes, dropout's mask, loads, products.

Query t of a row sees keys first(t) ... t, where first(t) = max(0, t - window + 1, start of t's document) never falls
as t grows. Seen from the other side, key j is seen by queries j ... last(j), which never falls either. So the tiles
that a tile of queries (or keys) needs are one run, and the tiles in it that need no mask are one run inside it.
"""

from __future__ import annotations

import math
from typing import NoReturn

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuning

# The parts of the run of key tiles that a tile of queries needs, in the order of the keys. They are masked by first(t);
# by nothing; by the diagonal; by that of a second tile of queries, where the first one sees nothing.
FAR_END = tl.constexpr(0)
INSIDE = tl.constexpr(1)
DIAGONAL = tl.constexpr(2)
SECOND_DIAGONAL = tl.constexpr(3)


@triton.jit
def _key_tiles(start, middle, stop, nearest_first, farthest_first, BLOCK_N):
    """The run of key tiles that queries [start, stop) need: part p is tiles cuts[p] to cuts[p + 1] - 1.

    DIAGONAL is that of queries [start, middle), SECOND_DIAGONAL that of [middle, stop). nearest_first, farthest_first:
    the lowest and the highest first(t).
    """
    first = nearest_first // BLOCK_N
    last = max((stop + BLOCK_N - 1) // BLOCK_N, first)
    diagonal = min(max((start + 1) // BLOCK_N, first), last)
    second_diagonal = min(max(middle // BLOCK_N, diagonal), last)
    inside = max(min((farthest_first + BLOCK_N - 1) // BLOCK_N, diagonal), first)
    return first, inside, diagonal, second_diagonal, last


@triton.jit
def _query_tiles(start, stop, nearest_last, farthest_last, BLOCK_M):
    """The run of query tiles that keys [start, stop) need: part p is tiles cuts[p + 1] to cuts[p] - 1.

    Keys meet the diagonal first and what masks their FAR_END last: window, document or T. nearest_last, farthest_last:
    the lowest and the highest last(j) of these keys.
    """
    first = start // BLOCK_M
    last = max((farthest_last + BLOCK_M) // BLOCK_M, first)
    inside = min(max((stop + BLOCK_M - 2) // BLOCK_M, first), last)
    far_end = min(max((nearest_last + 1) // BLOCK_M, inside), last)
    return last, far_end, inside, first


@triton.jit
def _document(cu_ptr, n_documents, token):
    """(start, stop) of each token's document in the flattened batch, by bisection; (token + 1, token) for none."""
    place = token * 0
    step = 1
    while step <= n_documents:
        step *= 2
    while step > 1:
        step = step // 2
        candidate = place + step
        offset = tl.load(cu_ptr + candidate, mask=candidate <= n_documents, other=0).to(tl.int64)
        place = tl.where((candidate <= n_documents) & (offset <= token), candidate, place)
    start = tl.load(cu_ptr + place).to(tl.int64)
    stop = tl.load(cu_ptr + place + 1, mask=place < n_documents, other=0).to(tl.int64)
    inside = (start <= token) & (place < n_documents)
    return tl.where(inside, start, token + 1), tl.where(inside, stop, token)


@triton.jit
def _first_keys(offs_m, T, documents, window):
    """first(t) for each of the queries offs_m; t + 1 for a query that sees nothing.

    documents: (cu_ptr, n_documents, row of the batch), or None.
    """
    first = offs_m * 0
    if window is not None:
        first = tl.maximum(offs_m - window + 1, 0)
    if documents is not None:
        cu_ptr, n_documents, row = documents
        start, _ = _document(cu_ptr, n_documents, row * T + offs_m)
        first = tl.maximum(first, (start - row * T).to(tl.int32))
    return first


@triton.jit
def _span(offs_m, first_keys, stop, T):
    """Which of queries offs_m (up to `stop`) see anything; the lowest and the highest first(t) and the end of these."""
    sees = offs_m < T
    nearest, farthest, stop = 0, 0, tl.minimum(stop, T)
    if first_keys is not None:
        sees = sees & (first_keys <= offs_m)
        nearest = tl.min(tl.where(sees, first_keys, T), 0)
        farthest = tl.max(tl.where(sees, first_keys, 0), 0)
        stop = tl.max(tl.where(sees, offs_m + 1, 0), 0)
    return sees, nearest, farthest, stop


@triton.jit
def _seen(offs_m, offs_n, first_keys):
    """True where queries offs_m see keys offs_n: (M, N). first_keys: None without bounds."""
    seen = offs_n[None, :] <= offs_m[:, None]
    if first_keys is not None:
        seen = seen & (offs_n[None, :] >= first_keys[:, None])
    return seen


@triton.jit
def _last_queries(offs_n, T, documents, window):
    """last(j) for each of the keys offs_n; less than j for a key nobody sees. documents: as of `_first_keys`."""
    last = offs_n * 0 + (T - 1)
    if window is not None:
        last = tl.minimum(offs_n + (window - 1), last)
    if documents is not None:
        cu_ptr, n_documents, row = documents
        _, stop = _document(cu_ptr, n_documents, row * T + offs_n)
        last = tl.minimum(last, (stop - row * T).to(tl.int32) - 1)
    return last


@triton.jit
def _keep(dropout, offs_m, key, BLOCK_N: tl.constexpr, TURNED: tl.constexpr):
    """True where dropout keeps the weight of queries offs_m for keys key ... key + BLOCK_N: (M, N), TURNED: (N, M).

    dropout: (seed_ptr, threshold, row of the batch, head). One Philox call serves four keys. Its counter is
    (key // 4, query, row, head), whatever the tiles are.
    """
    seed_ptr, threshold, row, head = dropout
    BLOCK_M: tl.constexpr = offs_m.shape[0]
    quads = key // 4 + tl.arange(0, BLOCK_N // 4)
    if TURNED:
        quad = tl.broadcast_to(quads[:, None], (BLOCK_N // 4, BLOCK_M))
        query = tl.broadcast_to(offs_m[None, :], (BLOCK_N // 4, BLOCK_M))
    else:
        quad = tl.broadcast_to(quads[None, :], (BLOCK_M, BLOCK_N // 4))
        query = tl.broadcast_to(offs_m[:, None], (BLOCK_M, BLOCK_N // 4))
    r0, r1, r2, r3 = tl.philox(tl.load(seed_ptr), quad, query, quad * 0 + row.to(tl.int32), quad * 0 + head)
    even = tl.join(r0.to(tl.int32, bitcast=True), r2.to(tl.int32, bitcast=True))
    odd = tl.join(r1.to(tl.int32, bitcast=True), r3.to(tl.int32, bitcast=True))
    keep = tl.join(even, odd) >= threshold  # the two new dimensions count keys 0 to 3
    if TURNED:
        keep = tl.reshape(tl.permute(keep, (0, 2, 3, 1)), (BLOCK_N, BLOCK_M))
    else:
        keep = tl.reshape(keep, (BLOCK_M, BLOCK_N))
    return keep


def dropout_scalars(dropout_p: float) -> tuple[int, float]:
    """(what a random int32 must reach for its weight to be kept, what kept weights are multiplied by)."""
    return min(round(dropout_p * 2**32), 2**32 - 1) - 2**31, 1 / (1 - dropout_p)


@triton.jit
def _rows(ptr, first, stride, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers (BLOCK, BLOCK_D) to rows first ... of a matrix. Inside a block 32 bits do: see `rows_contiguous`."""
    return ptr + first.to(tl.int64) * stride + (tl.arange(0, BLOCK) * stride)[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _load_rows(ptrs, mask_row, D: tl.constexpr, MASKED: tl.constexpr):
    """A (rows, BLOCK_D) tile; with a mask on rows where MASKED, on columns only where the head size is padded."""
    BLOCK_D: tl.constexpr = ptrs.shape[1]
    if MASKED and D != BLOCK_D:
        mask = mask_row[:, None] & (tl.arange(0, BLOCK_D)[None, :] < D)
    elif MASKED:
        mask = mask_row[:, None]
    elif D != BLOCK_D:
        mask = tl.arange(0, BLOCK_D)[None, :] < D
    else:
        mask = None
    return tl.load(ptrs, mask=mask, other=None if mask is None else 0.0)


@triton.jit
def _store_rows(ptrs, value, mask_row, D: tl.constexpr):
    BLOCK_D: tl.constexpr = ptrs.shape[1]
    mask = mask_row[:, None]
    if D != BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D)[None, :] < D)
    tl.store(ptrs, value.to(ptrs.dtype.element_ty), mask=mask)


def rows_contiguous(x: Tensor) -> Tensor:
    """x (B, T, C) itself if the kernels can read it: unit stride in a row, offsets inside a tile that fit 32 bits."""
    return x if x.stride(2) == 1 and x.stride(1) < 2**31 // 128 else x.contiguous()


def tuning_key(
    op: str, dtype: torch.dtype, head_size: int, bounded: bool = False, dropout: bool = False
) -> _tuning.Key:
    """Which row of the table: that of dropout serves with and without bounds (documents, a window).

    A head that is no whole number of 16-byte pieces is read by narrow loads, whose addresses take the registers that
    float32 takes for its numbers: it has float32's rows.
    """
    bits = torch.finfo(dtype).bits
    if head_size * bits % 128:
        bits = max(bits, 32)
    padded = 128 if head_size > 64 else 64
    return _tuning.Key(op, bits=bits, head_size=padded, bounded=bounded and not dropout, dropout=dropout)


def block_d(head_size: int) -> int:
    return max(16, _tuning.next_power_of_2(head_size))


def refuse(op_name: str, toggle: str, argument: str, value: object, allowed: str) -> NoReturn:
    raise ValueError(f"{op_name}: {argument} is {value}, allowed is {allowed} (toggle: {toggle}='torch')")


def describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"


def check_heads(op_name: str, toggle: str, qkv: Tensor, n_head: int, scale: float | None) -> int:
    """The head size. Raises ValueError unless qkv is (B, T, 3*C) with heads of 16 to 128, and scale positive."""
    if qkv.dim() != 3 or n_head < 1 or qkv.shape[2] % (3 * n_head):
        shape = f"of shape {tuple(qkv.shape)} with n_head {n_head}"
        refuse(op_name, toggle, "qkv", shape, "(B, T, 3 * n_head * head size)")
    head_size = qkv.shape[2] // (3 * n_head)
    if not 16 <= head_size <= 128:
        refuse(op_name, toggle, "the head size", head_size, "16 to 128")
    if scale is not None and not 0 < scale < math.inf:
        refuse(op_name, toggle, "scale", scale, "a positive number")
    return head_size
