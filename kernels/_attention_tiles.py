"""Shared by attention's forward and backward: which keys a query sees, the tiles this needs, dropout's mask, loads and
stores, a product.

Query t of a row sees keys first(t) ... t with first(t) = max(0, t - window + 1, start of t's document), which never
decreases in t. Conversely, key j is seen by queries j ... last(j), and last(j) never decreases either. Therefore the
tiles that a tile of queries (or keys) needs are consecutive, and so are those among them that need no mask.
"""

from __future__ import annotations

import math
from typing import NoReturn

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuning

# The four parts of the key tiles that a tile of queries needs, in the order of the keys. FAR_END is masked by first(t),
# INSIDE needs no mask, DIAGONAL is masked by causality, and SECOND_DIAGONAL by the causality of a second tile of
# queries; the first tile of queries sees nothing there.
FAR_END = tl.constexpr(0)
INSIDE = tl.constexpr(1)
DIAGONAL = tl.constexpr(2)
SECOND_DIAGONAL = tl.constexpr(3)


@triton.jit
def _key_tiles(start, middle, stop, nearest_first, farthest_first, BLOCK_N):
    """The borders `cuts` of the key tiles that queries [start, stop) need: part p is tiles cuts[p] to cuts[p + 1] - 1.

    DIAGONAL belongs to queries [start, middle), SECOND_DIAGONAL to queries [middle, stop). nearest_first,
    farthest_first: the lowest and the highest first(t).
    """
    first = nearest_first // BLOCK_N
    last = max((stop + BLOCK_N - 1) // BLOCK_N, first)
    diagonal = min(max((start + 1) // BLOCK_N, first), last)
    second_diagonal = min(max(middle // BLOCK_N, diagonal), last)
    inside = max(min((farthest_first + BLOCK_N - 1) // BLOCK_N, diagonal), first)
    return first, inside, diagonal, second_diagonal, last


@triton.jit
def _query_tiles(start, stop, nearest_last, farthest_last, BLOCK_M):
    """The borders `cuts` of the query tiles that keys [start, stop) need: part p is tiles cuts[p + 1] to cuts[p] - 1.

    In the order of the queries, DIAGONAL comes first and FAR_END, masked by window, document or T, comes last.
    nearest_last, farthest_last: the lowest and the highest last(j) of these keys.
    """
    first = start // BLOCK_M
    last = max((farthest_last + BLOCK_M) // BLOCK_M, first)
    inside = min(max((stop + BLOCK_M - 2) // BLOCK_M, first), last)
    far_end = min(max((nearest_last + 1) // BLOCK_M, inside), last)
    return last, far_end, inside, first


@triton.jit
def _document(cu_ptr, n_documents, token):
    """(start, stop) of each token's document in the flattened batch, found by bisection.

    (token + 1, token) for a token outside all documents.
    """
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
    """first(t) of each query t in offs_m; t + 1 for a query that sees nothing.

    documents: (cu_ptr, n_documents, row of the batch), or None if attention crosses documents.
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
    """For queries offs_m, up to `stop`: a mask of those that see any key, and the lowest first(t), the highest first(t)
    and the end of the queries in that mask."""
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
    """(M, N), True where a query of offs_m sees a key of offs_n. first_keys: None without window and documents."""
    seen = offs_n[None, :] <= offs_m[:, None]
    if first_keys is not None:
        seen = seen & (offs_n[None, :] >= first_keys[:, None])
    return seen


@triton.jit
def _last_queries(offs_n, T, documents, window):
    """last(j) of each key j in offs_n; less than j for a key that no query sees. documents: as in `_first_keys`."""
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
    """(M, N), or (N, M) if TURNED: True where dropout keeps the weight of queries offs_m for keys key ... key + N - 1.

    dropout: (seed_ptr, threshold, row of the batch, head). One Philox call gives the numbers of four keys. Its counter
    is (key // 4, query, row, head), so that the mask does not depend on the tile sizes.
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
    keep = tl.join(even, odd) >= threshold  # the two dimensions added by tl.join count keys 0 to 3
    if TURNED:
        keep = tl.reshape(tl.permute(keep, (0, 2, 3, 1)), (BLOCK_N, BLOCK_M))
    else:
        keep = tl.reshape(keep, (BLOCK_M, BLOCK_N))
    return keep


def dropout_scalars(dropout_p: float) -> tuple[int, float]:
    """(threshold, scale): a weight is kept if its random int32 is at least threshold, and multiplied by scale."""
    return min(round(dropout_p * 2**32), 2**32 - 1) - 2**31, 1 / (1 - dropout_p)


@triton.jit
def _rows(ptr, first, stride, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers (BLOCK, BLOCK_D) to BLOCK rows of a matrix from row `first` on.

    32-bit offsets suffice inside a block: see `rows_contiguous`.
    """
    return ptr + first.to(tl.int64) * stride + (tl.arange(0, BLOCK) * stride)[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _load_rows(ptrs, mask_row, D: tl.constexpr, MASKED: tl.constexpr):
    """Loads a (rows, BLOCK_D) tile. Rows are masked if MASKED, columns only if the head size is padded to BLOCK_D."""
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
def _load_vector(ptrs, mask, MASKED: tl.constexpr):
    if MASKED:
        vector = tl.load(ptrs, mask=mask, other=0.0)
    else:
        vector = tl.load(ptrs)
    return vector


@triton.jit
def _dot_minus(a, b, c, PRECISION: tl.constexpr):
    """a b^T - c. The accumulator starts at -c, which saves a subtraction."""
    start = tl.broadcast_to(-c, (a.shape[0], b.shape[0]))
    return tl.dot(a, tl.trans(b), start, input_precision=PRECISION, out_dtype=start.dtype)


@triton.jit
def _store_rows(ptrs, value, mask_row, D: tl.constexpr):
    BLOCK_D: tl.constexpr = ptrs.shape[1]
    mask = mask_row[:, None]
    if D != BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D)[None, :] < D)
    tl.store(ptrs, value.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _store_sums(dbias_ptr, tile, first, T, C, D: tl.constexpr):
    """Stores the sum of the rows of a tile (rows, BLOCK_D), which begins at token `first`, at dbias_ptr (tiles of the
    batch, 3*C). Rows past T are 0. The place is computed here, so that it takes no registers before."""
    n_tiles = tl.cdiv(T, tile.shape[0])
    row, head = tl.program_id(0) // (2 * n_tiles), tl.program_id(1)  # there are as many tiles of keys as of queries
    dbias_ptr += (row * n_tiles + first // tile.shape[0]).to(tl.int64) * (3 * C) + head * D
    offs_d = tl.arange(0, tile.shape[1])
    tl.store(dbias_ptr + offs_d, tl.sum(tile, axis=0), mask=offs_d < D)


def rows_contiguous(x: Tensor) -> Tensor:
    """x (B, T, C) itself if the kernels can read it, else a contiguous copy. They need unit stride in a row and offsets
    inside a tile that fit in 32 bits."""
    _, stride_t, stride_c = x.stride()
    return x if stride_c == 1 and stride_t < 2**31 // 128 else x.contiguous()


def tuning_key(
    op: str, dtype: torch.dtype, head_size: int, bounded: bool = False, dropout: bool = False
) -> _tuning.Key:
    """The key of a row in the tuning table. bounded: with documents or a window; rows with dropout serve both cases.

    Heads whose size in bytes is not a multiple of 16 need narrow loads. The addresses of these take as many registers
    as float32 values do, so such heads use the rows of float32.
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
    """Returns the head size. Raises ValueError unless qkv is (B, T, 3*C) with heads of 16 to 128 and scale is positive
    or None."""
    if qkv.dim() != 3 or n_head < 1 or qkv.shape[2] % (3 * n_head):
        shape = f"of shape {tuple(qkv.shape)} with n_head {n_head}"
        refuse(op_name, toggle, "qkv", shape, "(B, T, 3 * n_head * head size)")
    head_size = qkv.shape[2] // (3 * n_head)
    if not 16 <= head_size <= 128:
        refuse(op_name, toggle, "the head size", head_size, "16 to 128")
    if scale is not None and not 0 < scale < math.inf:
        refuse(op_name, toggle, "scale", scale, "a positive number")
    return head_size
