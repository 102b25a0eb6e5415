"""Two products of the MLP with GELU in their epilogue: computed while a tile of the result is in registers.

    forward     pre = a b,   act = gelu(pre + bias)                               a = x,    b = fc_weight^T
    backward    dpre = (a b) * gelu'(pre + bias),   dbias = sum_M(dpre),          a = dout, b = proj_weight
                act = gelu(pre + bias), computed again

Shapes: a (M, K), b (K, N); pre, act, dpre (M, N); bias, dbias (N,). a has contiguous rows, b rows or columns.

HBM traffic per element of pre of 2 bytes: forward 4 (write pre and act) or 2 without pre; backward 6 (read pre, write
dpre and act). A product and a pass of its own, as in mlp.py, take 6 and 10. The sums of dbias over each tile's rows are
written too, which adds 4 / BLOCK_M bytes, and added up by a second launch. a and b are read once from HBM if L2 holds
them long enough: programs take tiles in groups of GROUP_M tile rows, so that those running together share a and b.

Numerics: products in fp32 (fp64 for fp64) on tensor cores, float32 inputs as IEEE float32. pre is rounded before the
bias is added, as where GELU is a pass of its own. dact = a b is not rounded. No atomics.

Where the GPU loads tiles of a matrix by descriptors (TMA: sm_90 and later), 16-bit inputs with 16-byte aligned rows are
loaded so. There is then a program a multiprocessor, which computes tile after tile and loads the next while it finishes
one. All others are loaded through masked pointers by a program a tile, because Triton does not pipeline masked loads of
such a flattened loop.

Sources: Triton's tutorial on persistent matrix products; gelu.py.
"""

from __future__ import annotations

import contextvars

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _device, _op, _tuning
from ._column_sum import column_sum
from ._frozen import Launch, planned
from ._trace import is_traced
from .gelu import _gelu_grad, _sigmoid_2u


@triton.jit
def _columns_of(tile, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """The PIECE-th of so many equal parts of a tile's columns, found by halving: PIECES is 1, 2, 4, ..., 32."""
    for level in tl.static_range(5):
        if PIECES >> level > 1:
            halves = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
            left, right = tl.split(tl.permute(halves, (0, 2, 1)))
            tile = left if PIECE // (PIECES >> (level + 1)) % 2 == 0 else right
    return tile


@triton.jit
def _epilogue(acc, pid_m, offs_n, bias_ptr, pre_ptr, act_ptr, dpre_ptr, dbias_ptr, M, N, DTYPE: tl.constexpr):
    """Finishes columns offs_n of a tile of the product."""
    offs_m = pid_m.to(tl.int64) * acc.shape[0] + tl.arange(0, acc.shape[0])
    mask_n = offs_n < N
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    offs = offs_m[:, None] * N + offs_n[None, :]
    if dpre_ptr is None:
        pre = acc.to(DTYPE)
        if pre_ptr is not None:
            tl.store(pre_ptr + offs, pre, mask=mask)
    else:
        pre = tl.load(pre_ptr + offs, mask=mask, other=0.0)
    x = pre.to(acc.dtype)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(acc.dtype)[None, :]
    xx = x * x
    s = _sigmoid_2u(x, xx)
    if act_ptr is not None:
        tl.store(act_ptr + offs, (x * s).to(DTYPE), mask=mask)
    if dpre_ptr is not None:
        dpre = acc * _gelu_grad(x, xx, s)
        tl.store(dpre_ptr + offs, dpre.to(DTYPE), mask=mask)
        if dbias_ptr is not None:  # rows beyond M add 0, because their part of a is 0
            tl.store(dbias_ptr + pid_m.to(tl.int64) * N + offs_n, tl.sum(dpre, axis=0), mask=mask_n)


@triton.jit(do_not_specialize=["M"])
def _gelu_product_kernel(
    a_ptr, b_ptr, bias_ptr, pre_ptr, act_ptr, dpre_ptr, dbias_ptr, stride_a, stride_b, M, N, K,
    ROWS_OF_B: tl.constexpr, DESCRIPTORS: tl.constexpr, WHOLE_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Backward if dpre_ptr is given: then pre is read, else it is written. None for what is not wanted.

    stride_b: of b's rows if ROWS_OF_B, else of its columns. WHOLE_K: BLOCK_K divides K.
    """
    DTYPE: tl.constexpr = a_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    if DESCRIPTORS:
        a_tiles = tl.make_tensor_descriptor(a_ptr, [M, K], [stride_a, 1], [BLOCK_M, BLOCK_K])
        if ROWS_OF_B:
            b_tiles = tl.make_tensor_descriptor(b_ptr, [K, N], [stride_b, 1], [BLOCK_K, BLOCK_N])
        else:
            b_tiles = tl.make_tensor_descriptor(b_ptr, [N, K], [stride_b, 1], [BLOCK_N, BLOCK_K])
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)

    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=DESCRIPTORS):
        group, place = tile // (GROUP_M * tiles_n), tile % (GROUP_M * tiles_n)
        group_m = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)  # the last group may have fewer rows
        pid_m, pid_n = group * GROUP_M + place % group_m, place // group_m
        m, n = pid_m * BLOCK_M, pid_n * BLOCK_N
        offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for k in range(0, K, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_a, mask_b = (offs_m < M)[:, None], (offs_n < N)[None, :]
            if not WHOLE_K:
                mask_a &= (offs_k < K)[None, :]
                mask_b &= (offs_k < K)[:, None]
            a_ptrs = a_ptr + offs_m[:, None] * stride_a + offs_k[None, :]
            a = a_tiles.load([m, k]) if DESCRIPTORS else tl.load(a_ptrs, mask=mask_a, other=0.0)
            if ROWS_OF_B:
                b_ptrs = b_ptr + offs_k.to(tl.int64)[:, None] * stride_b + offs_n[None, :]
                b = b_tiles.load([k, n]) if DESCRIPTORS else tl.load(b_ptrs, mask=mask_b, other=0.0)
            else:
                b_ptrs = b_ptr + offs_n[None, :] * stride_b + offs_k[:, None]
                b = b_tiles.load([n, k]).T if DESCRIPTORS else tl.load(b_ptrs, mask=mask_b, other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=ACC)
        for piece in tl.static_range(PIECES):  # GELU of all columns at once would take more registers than there are
            offs_n = n + piece * (BLOCK_N // PIECES) + tl.arange(0, BLOCK_N // PIECES)
            part = _columns_of(acc, piece, PIECES)
            _epilogue(part, pid_m, offs_n, bias_ptr, pre_ptr, act_ptr, dpre_ptr, dbias_ptr, M, N, DTYPE)


# ------------------------------------------------------------------------------------------------------- launchers


@planned
def _plan(
    op: str, M: int, N: int, K: int, itemsize: int, strides: tuple[int, int], rows_of_b: bool, descriptors: bool,
    device: torch.device,
) -> tuple[int, Launch]:  # fmt: skip
    """-> the number of tile rows, and the launch."""
    options = _tuning.config(_tuning.Key(op, bits=8 * itemsize), device)
    tiles_m = _tuning.cdiv(M, options["BLOCK_M"])
    tiles = tiles_m * _tuning.cdiv(N, options["BLOCK_N"])
    programs = min(tiles, _device.sm_count(device)) if descriptors else tiles
    options |= dict(ROWS_OF_B=rows_of_b, DESCRIPTORS=descriptors, WHOLE_K=K % options["BLOCK_K"] == 0)
    return tiles_m, Launch(_gelu_product_kernel, (programs,), *strides, M, N, K, **options)


def gelu_product_fwd(a: Tensor, b: Tensor, bias: Tensor | None, keep_pre: bool) -> tuple[Tensor, Tensor | None]:
    """-> act (..., N), and pre (..., N) if keep_pre. a (..., K) and b (K, N) may have any strides."""
    act = a.new_empty(*a.shape[:-1], b.shape[1])
    pre = torch.empty_like(act) if keep_pre else None
    if act.numel() > 0:
        a, b, descriptors, _, launch = _prepared("gelu_product_fwd", a, b)
        _start(launch, descriptors, a, b, bias, pre, act, None, None)
    return act, pre


def gelu_product_bwd(
    a: Tensor, b: Tensor, bias: Tensor | None, pre: Tensor, want_act: bool, dbias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """-> dpre (M, N), act (M, N) if want_act, dbias (N,) if dbias_dtype is given. a (M, K) and b (K, N) may have any
    strides; pre is contiguous, with M * N elements."""
    dpre = a.new_empty(a.shape[0], b.shape[1])
    act = torch.empty_like(dpre) if want_act else None
    if dpre.numel() == 0:
        return dpre, act, None if dbias_dtype is None else dpre.new_zeros(b.shape[1], dtype=dbias_dtype)
    a, b, descriptors, tiles_m, launch = _prepared("gelu_product_bwd", a, b)
    sums = torch.float64 if a.dtype == torch.float64 else torch.float32
    partials = None
    if dbias_dtype is not None:
        partials = torch.empty(1, tiles_m, b.shape[1], dtype=sums, device=a.device)
    _start(launch, descriptors, a, b, bias, pre, act, dpre, partials)
    return dpre, act, None if partials is None or dbias_dtype is None else column_sum(partials, [dbias_dtype])[0]


def _prepared(op: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, bool, int, Launch]:
    """a and b as the kernel reads them, whether it loads them by descriptors, the number of tile rows, the launch."""
    a = _op.as_rows(a)
    if b.stride(1) != 1 and b.stride(0) != 1:
        b = b.contiguous()
    rows_of_b = b.stride(1) == 1
    (M, K), N = a.shape, b.shape[1]
    strides = a.stride(0), b.stride(0) if rows_of_b else b.stride(1)
    descriptors = _device.has_tensor_descriptors(a.device) and K > 0 and _described(a, strides[0], b, strides[1])
    tiles_m, launch = _plan(op, M, N, K, a.element_size(), strides, rows_of_b, descriptors, a.device)
    return a, b, descriptors, tiles_m, launch


def _described(a: Tensor, stride_a: int, b: Tensor, stride_b: int) -> bool:
    """Whether descriptors can hold both matrices: elements of 16 bits, rows that start at multiples of 16 bytes."""
    if a.element_size() != 2 or stride_a <= 0 or stride_a % 8 or stride_b <= 0 or stride_b % 8:
        return False
    if is_traced():  # a fake tensor has no address; Inductor aligns tensors that begin their storage
        return a.storage_offset() % 8 == 0 and b.storage_offset() % 8 == 0
    return a.data_ptr() % 16 == 0 and b.data_ptr() % 16 == 0


def _start(launch: Launch, descriptors: bool, *tensors: Tensor | None) -> None:
    if descriptors and not is_traced():  # compiled code sets PyTorch's allocator itself
        contextvars.copy_context().run(_start_with_memory, launch, *tensors)
    else:
        launch(*tensors)


def _start_with_memory(launch: Launch, *tensors: Tensor | None) -> None:
    """Starts a kernel that writes its descriptors to memory, which Triton asks this context's allocator for."""
    triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.uint8, device="cuda"))
    launch(*tensors)
