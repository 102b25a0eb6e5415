"""Parts of LayerNorm's kernels: dropout, and how backward's tiles are loaded, stored and summed.

A tile is (CHUNKS, ROWS, SPAN): a row has CHUNKS * SPAN columns, and its lanes load a SPAN with one 128-bit access each.
Loads and stores use one dimension CHUNKS * ROWS, which Triton distributes so that warps differ in ROWS and a thread
holds all CHUNKS. With two dimensions the distribution would depend on Triton's version.

With more than one stage, the loads of the next rows are under way, into shared memory, while these rows are summed
and stored. Shared memory can be read in any distribution, so each tensor is copied in the one that is best for its
dtype. Triton however gives all tensors of one shape the distribution of the narrowest dtype, in which a lane's 128
bits of a wider one are not next to its neighbour's. Tensors of another dtype than `total` therefore get one more
dimension, of size 1: BITS is the width of total's elements, or 0 with one stage, where all have the same shape.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dropout_scale(seed_ptr, rows, offs_c, C, dropout_p: tl.constexpr):
    """0 where (row, column) is dropped, 1 / (1 - p) elsewhere, in fp32."""
    u = tl.rand(tl.load(seed_ptr), rows * C + offs_c)
    return tl.where(u >= dropout_p, 1.0 / (1.0 - dropout_p), 0.0)


@triton.jit
def load_tile(
    ptr, stride, rows, offs_c, mask,
    BITS: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Loads (CHUNKS * ROWS, SPAN) and returns it as (CHUNKS, ROWS, SPAN)."""
    offs = rows * stride + offs_c
    if BITS == 0 or ptr.dtype.element_ty.primitive_bitwidth == BITS:
        tile = tl.load(ptr + offs, mask=mask, other=0.0)
    else:
        tile = tl.load(ptr + tl.expand_dims(offs, 1), mask=tl.expand_dims(mask, 1), other=0.0)
    return tl.reshape(tile, (CHUNKS, ROWS, SPAN))


@triton.jit
def store_tile(
    ptr, stride, rows, offs_c, mask, tile,
    BITS: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    tile = tl.reshape(tile.to(ptr.dtype.element_ty), (CHUNKS * ROWS, SPAN))
    offs = rows * stride + offs_c
    if BITS == 0 or ptr.dtype.element_ty.primitive_bitwidth == BITS:
        tl.store(ptr + offs, tile, mask=mask)
    else:
        tl.store(ptr + tl.expand_dims(offs, 1), tl.expand_dims(tile, 1), mask=tl.expand_dims(mask, 1))


@triton.jit
def sum_rows(tile):
    """The sum of each row: (CHUNKS, ROWS, SPAN) -> (1, ROWS, 1)."""
    return tl.sum(tl.sum(tile, axis=0), axis=1)[None, :, None]


@triton.jit
def sum_columns(tile, CHUNKS: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr):
    """(CHUNKS, ROWS, SPAN) -> (CHUNKS, 1, SPAN). Adding halves takes a third of the instructions of tl.sum here."""
    rows = tl.permute(tile, (0, 2, 1))
    for i in tl.static_range(6):
        if ROWS >> i > 1:
            even, odd = tl.split(tl.reshape(rows, (CHUNKS, SPAN, ROWS >> (i + 1), 2)))
            rows = even + odd
    return tl.permute(rows, (0, 2, 1))
