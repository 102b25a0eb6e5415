"""Token plus position embedding with dropout in one launch, and its gradients without atomics.

    y[b, t] = dropout(token_weight[idx[b, t]] + position_weight[positions[b, t]])       positions: t where None
    dtoken_weight[v] = sum over (b, t) with idx[b, t] = v of dropout'(dy[b, t]),         dposition_weight likewise

Shapes: idx (B, T), token_weight (V, C), position_weight (P, C), positions (B, T) or (T,), y (B, T, C); N = B*T rows.
An index outside its table is never used as an address: its row of y is NaN, and it takes part in no gradient.

HBM traffic with e bytes an element: forward writes N C e and reads as much (position rows come from L2) in 1 launch.
Backward: the gradient of position_weight is a sum over the batch, 1 launch that reads dy once. The gradient of
token_weight is a sum over equal indices: the indices are sorted (stably), and a program for each run of equal ones adds
its rows of dy. Runs are cut at the end of each WINDOW of sorted positions, so that several programs add the rows of a
frequent token. The pieces of cut runs, at most two a window, go to fp32 partial sums, which a second launch adds. The
host does not know the number of different tokens: one program starts per sorted position and returns unless a piece
begins there. dy is read once, and V C e bytes are zeroed.

Numerics: sums in fp32 (fp64 for fp64 tensors), one rounding at the store. The sort fixes the order of every sum, so the
result is bitwise reproducible. Dropout is Philox at (seed, row * C + column), recomputed in backward.

Sources: the sort-and-segment scheme of PyTorch's embedding_dense_backward; Philox, Salmon et al. 2011.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import _op, _tuning
from ._frozen import Launch, planned

NAME = "token_position_embedding"
TOGGLE = "embedding"


def token_position_embedding_reference(
    idx: Tensor,
    token_weight: Tensor,
    position_weight: Tensor,
    positions: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
) -> Tensor:
    """The reference in plain PyTorch: idx (B, T) -> (B, T, C). keep: the dropout mask (B, T, C)."""
    positions = torch.arange(idx.shape[1], device=idx.device) if positions is None else positions
    y = F.embedding(idx, token_weight) + F.embedding(positions, position_weight)
    return y if keep is None else y * keep / (1 - dropout_p)


@triton.jit
def _dropout(x, seed_ptr, rows, offs_c, C, dropout_p: tl.constexpr):
    """x (ROWS, BLOCK_C) with dropped elements set to 0 and the others divided by 1 - p."""
    if dropout_p > 0.0:
        u = tl.rand(tl.load(seed_ptr), rows[:, None] * C + offs_c[None, :])
        x = tl.where(u >= dropout_p, x * (1.0 / (1.0 - dropout_p)), 0.0)
    return x


@triton.jit(do_not_specialize=["N", "T", "stride_ib"])
def _embedding_fwd_kernel(
    idx_ptr, positions_ptr, token_weight_ptr, position_weight_ptr, seed_ptr, y_ptr,
    stride_ib, stride_it, stride_pb, stride_pt, stride_tv, stride_wp, N, T, V, P, C: tl.constexpr,
    dropout_p: tl.constexpr, FP64: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    ACC = tl.float64 if FP64 else tl.float32
    offs_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_c < C)[None, :]
    b, t = (offs_n // T).to(tl.int64), (offs_n % T).to(tl.int64)
    token = tl.load(idx_ptr + b * stride_ib + t * stride_it, mask=mask_n, other=0)
    position = t
    if positions_ptr is not None:
        position = tl.load(positions_ptr + b * stride_pb + t * stride_pt, mask=mask_n, other=0)
    known = ((token >= 0) & (token < V) & (position >= 0) & (position < P))[:, None] & mask
    nan = float("nan")
    token_row = tl.load(token_weight_ptr + token[:, None] * stride_tv + offs_c[None, :], mask=known, other=nan)
    position_row = tl.load(position_weight_ptr + position[:, None] * stride_wp + offs_c[None, :], mask=known, other=nan)
    y = token_row.to(ACC) + position_row.to(ACC)
    rows = offs_n.to(tl.int64)
    y = _dropout(y, seed_ptr, rows, offs_c, C, dropout_p)
    tl.store(y_ptr + rows[:, None] * C + offs_c[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B", "T"])
def _batch_sum_kernel(
    dy_ptr, seed_ptr, dweight_ptr, stride_dyb, stride_dyt, B, T, P, C: tl.constexpr,
    dropout_p: tl.constexpr, FP64: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dweight (P, C) = sum over b of dy (B, T, C), with zeros for positions from T on."""
    ACC = tl.float64 if FP64 else tl.float32
    offs_t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = (offs_c < C)[None, :]
    mask = (offs_t < T)[:, None] & mask_c
    t = offs_t.to(tl.int64)
    acc = tl.zeros((ROWS, BLOCK_C), ACC)
    for b in range(0, B):
        row = tl.cast(b, tl.int64)
        offs = row * stride_dyb + t[:, None] * stride_dyt + offs_c[None, :]
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(ACC)
        acc += _dropout(dy, seed_ptr, row * T + t, offs_c, C, dropout_p)
    dweight = acc.to(dweight_ptr.dtype.element_ty)
    tl.store(dweight_ptr + t[:, None] * C + offs_c[None, :], dweight, mask=(offs_t < P)[:, None] & mask_c)


@triton.jit(do_not_specialize=["N", "T"])
def _segment_sum_kernel(
    keys_ptr, order_ptr, dy_ptr, seed_ptr, dweight_ptr, partial_ptr, stride_dyb, stride_dyt, N, T, V, C: tl.constexpr,
    dropout_p: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program i: if a piece of a run begins at sorted position i, writes its sum, to dweight if the piece is the whole
    run and to the partial sums otherwise."""
    ACC = partial_ptr.dtype.element_ty
    i = tl.program_id(0)
    key = tl.load(keys_ptr + i)
    before = tl.load(keys_ptr + i - 1, mask=i > 0, other=-1)
    window = i // WINDOW
    if ((before != key) | (i == window * WINDOW)) & (key >= 0) & (key < V):
        offs_w = window * WINDOW + tl.arange(0, WINDOW)
        in_window = tl.load(keys_ptr + offs_w, mask=offs_w < N, other=-1)
        end = i + tl.sum(((in_window == key) & (offs_w >= i)).to(tl.int32), 0)
        after = tl.load(keys_ptr + end, mask=end < N, other=-1)
        offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        acc = tl.zeros((BLOCK_C,), ACC)
        for start in range(i, end, ROWS):
            offs_i = start + tl.arange(0, ROWS)
            mask_i = offs_i < end
            n = tl.load(order_ptr + offs_i, mask=mask_i, other=0)
            row = (n // T) * stride_dyb + (n % T) * stride_dyt
            mask = mask_i[:, None] & mask_c[None, :]
            dy = tl.load(dy_ptr + row[:, None] + offs_c[None, :], mask=mask, other=0.0).to(ACC)
            acc += tl.sum(_dropout(dy, seed_ptr, n, offs_c, C, dropout_p), 0)
        if (before != key) & (after != key):
            dweight = acc.to(dweight_ptr.dtype.element_ty)
            tl.store(dweight_ptr + key.to(tl.int64) * C + offs_c, dweight, mask=mask_c)
        else:
            # A piece that begins with its window is piece 0; a later one that continues beyond the window is piece 1.
            piece = 2 * window.to(tl.int64) + (i != window * WINDOW).to(tl.int64)
            tl.store(partial_ptr + piece * C + offs_c, acc, mask=mask_c)


@triton.jit(do_not_specialize=["N"])
def _merge_pieces_kernel(
    keys_ptr, partial_ptr, dweight_ptr, N, V, C: tl.constexpr,
    WINDOW: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program w: if a run begins in window w and continues beyond it, writes the sum of its pieces."""
    window = tl.program_id(0)
    end = (window + 1) * WINDOW  # at most N - 1
    key = tl.load(keys_ptr + end - 1)
    after = tl.load(keys_ptr + end)
    before = tl.load(keys_ptr + window * WINDOW - 1, mask=window > 0, other=-1)
    if (key == after) & (key != before) & (key >= 0) & (key < V):
        first = tl.load(keys_ptr + window * WINDOW)
        offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        piece = 2 * window.to(tl.int64) + (first != key).to(tl.int64)
        acc = tl.load(partial_ptr + piece * C + offs_c, mask=mask_c, other=0.0)
        offs_w = window + 1 + tl.arange(0, ROWS)
        going = 1
        while going > 0:
            begins = offs_w.to(tl.int64) * WINDOW
            mine = tl.load(keys_ptr + begins, mask=begins < N, other=-1) == key
            pieces = tl.load(
                partial_ptr + offs_w.to(tl.int64)[:, None] * (2 * C) + offs_c[None, :],
                mask=mine[:, None] & mask_c[None, :],
                other=0.0,
            )
            acc += tl.sum(pieces, 0)
            going = tl.min(mine.to(tl.int32), 0)
            offs_w += ROWS
        dweight = acc.to(dweight_ptr.dtype.element_ty)
        tl.store(dweight_ptr + key.to(tl.int64) * C + offs_c, dweight, mask=mask_c)


@planned
def _plan(kernel: Any, op: str, rows: int, C: int, device: torch.device, *numbers: Any) -> Launch:
    """A launch of `kernel` with the tuning numbers of `op`, on a grid of blocks of rows and blocks of columns."""
    options = _tuning.config(_tuning.Key(op), device)
    grid = (_tuning.cdiv(rows, options["ROWS"]), _tuning.cdiv(C, options["BLOCK_C"]))
    return Launch(kernel, grid, *numbers, **options)


@planned
def _segment_plans(
    strides: tuple[int, int], B: int, T: int, V: int, C: int, dropout_p: float, device: torch.device
) -> tuple[int, Launch, Launch]:
    """The number of windows, and the launches of the segment sum and of the merge."""
    options = _tuning.config(_tuning.Key("embedding_segment_sum"), device)
    windows, column_blocks = _tuning.cdiv(B * T, options["WINDOW"]), _tuning.cdiv(C, options["BLOCK_C"])
    numbers = (*strides, B * T, T, V, C, dropout_p)
    merge = Launch(_merge_pieces_kernel, (windows - 1, column_blocks), B * T, V, C, **options)
    return windows, Launch(_segment_sum_kernel, (B * T, column_blocks), *numbers, **options), merge


def token_position_embedding_fwd(
    idx: Tensor,
    token_weight: Tensor,
    position_weight: Tensor,
    positions: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """-> y (B, T, C) in `dtype`, None: that of the weights' sum."""
    y = _fwd_fake(idx, token_weight, position_weight, positions, seed, dropout_p, dtype)
    (B, T), (V, C), P = idx.shape, token_weight.shape, position_weight.shape[0]
    if y.numel() == 0:
        return y
    token_weight, position_weight = _with_rows(token_weight), _with_rows(position_weight)
    launch = _plan(
        _embedding_fwd_kernel, "embedding_fwd", B * T, C, idx.device,
        *idx.stride(), *((0, 0) if positions is None else positions.stride()),
        token_weight.stride(0), position_weight.stride(0), B * T, T, V, P, C, dropout_p, y.dtype == torch.float64,
    )  # fmt: skip
    launch(idx, positions, token_weight, position_weight, seed, y)
    return y


def _fwd_fake(idx, token_weight, position_weight, positions, seed, dropout_p, dtype=None):
    dtype = torch.promote_types(token_weight.dtype, position_weight.dtype) if dtype is None else dtype
    return torch.empty(*idx.shape, token_weight.shape[1], dtype=dtype, device=token_weight.device)


def _with_rows(x: Tensor) -> Tensor:
    """x with a contiguous last dimension."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def token_position_embedding_bwd(
    dy: Tensor,
    idx: Tensor,
    positions: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    token_rows: int,
    position_rows: int,
    token_dtype: torch.dtype | None,
    position_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    """-> dtoken_weight (token_rows, C), dposition_weight (position_rows, C); None for each whose dtype is None."""
    dy = _with_rows(dy)
    dtoken = dposition = None
    if token_dtype is not None:
        dtoken = _segment_sum(dy, idx, seed, dropout_p, token_rows, token_dtype)
    if position_dtype is not None and positions is not None:
        dposition = _segment_sum(dy, positions, seed, dropout_p, position_rows, position_dtype)
    elif position_dtype is not None:
        dposition = _batch_sum(dy, seed, dropout_p, position_rows, position_dtype)
    return dtoken, dposition


def _bwd_fake(dy, idx, positions, seed, dropout_p, token_rows, position_rows, token_dtype, position_dtype):
    C = dy.shape[2]
    rows = (token_rows, token_dtype), (position_rows, position_dtype)
    return tuple(None if dtype is None else dy.new_empty((n, C), dtype=dtype) for n, dtype in rows)


def _batch_sum(dy: Tensor, seed: Tensor | None, dropout_p: float, P: int, dtype: torch.dtype) -> Tensor:
    """(P, C): the sum of dy (B, T, C) over the batch in rows 0 ... T-1, zeros in the other rows."""
    B, T, C = dy.shape
    dweight = torch.empty(P, C, dtype=dtype, device=dy.device)
    if dweight.numel() > 0:
        numbers = (dy.stride(0), dy.stride(1), B, T, P, C, dropout_p, dy.dtype == torch.float64)
        _plan(_batch_sum_kernel, "embedding_batch_sum", P, C, dy.device, *numbers)(dy, seed, dweight)
    return dweight


def _segment_sum(
    dy: Tensor, index: Tensor, seed: Tensor | None, dropout_p: float, V: int, dtype: torch.dtype
) -> Tensor:
    """(V, C): row v is the sum of the rows of dy (B, T, C) at which index (B, T) is v."""
    B, T, C = dy.shape
    dweight = torch.zeros(V, C, dtype=dtype, device=dy.device)
    if dy.numel() == 0:
        return dweight
    # 32-bit keys halve the passes of the sort. The clamp keeps indices outside the table outside.
    keys, order = torch.sort(index.reshape(-1).clamp(-1, V).to(torch.int32), stable=True)
    windows, launch, merge = _segment_plans(dy.stride()[:2], B, T, V, C, dropout_p, dy.device)
    sum_dtype = torch.float64 if dy.dtype == torch.float64 else torch.float32
    partial = torch.empty(windows, 2, C, dtype=sum_dtype, device=dy.device)
    launch(keys, order, dy, seed, dweight, partial)
    if windows > 1:
        merge(keys, partial, dweight)
    return dweight


def _setup_context(ctx, inputs, output):
    idx, token_weight, position_weight, positions, seed, dropout_p, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(idx, positions, seed)
    ctx.dropout_p = dropout_p
    ctx.rows = token_weight.shape[0], position_weight.shape[0]
    ctx.dtypes = token_weight.dtype, position_weight.dtype


def _backward(ctx, dy):
    if dy is None:
        return (None,) * 7
    needs = ctx.needs_input_grad[1:3]
    wanted = [dtype if need else None for dtype, need in zip(ctx.dtypes, needs, strict=True)]
    grads = _bwd(dy, *ctx.saved_tensors, ctx.dropout_p, *ctx.rows, *wanted)
    return None, *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None


_bwd = _op.op(token_position_embedding_bwd, _bwd_fake, toggle=TOGGLE, strided=("dy", "idx", "positions"))
_fwd = _op.op(
    token_position_embedding_fwd, _fwd_fake, toggle=TOGGLE,
    strided=("idx", "token_weight", "position_weight", "positions"), setup_context=_setup_context, backward=_backward,
)  # fmt: skip


def token_position_embedding(
    idx: Tensor,
    token_weight: Tensor,
    position_weight: Tensor,
    positions: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """dropout(token_weight[idx] + position_weight[positions]): idx (B, T) int64 -> (B, T, C).

    token_weight (V, C); position_weight (P, C); positions (B, T) or (T,) int64, by default 0 ... T-1, for which T must
    not exceed P. The output has `dtype`, by default that of the weights' sum, and is rounded once. Gradients are dense,
    in the weights' dtypes. Indices are not checked, because that would wait for the GPU: an index outside
    its table gives a row of NaN.
    seed: int64 () or (1,) on the device, by default drawn from the device's generator.
    Raises TypeError for an unsupported dtype, ValueError for shapes that do not fit and a dropout_p outside [0, 1).
    """
    _check(idx, token_weight, position_weight, positions, dtype)
    if positions is not None and positions.dim() == 1:
        positions = positions.expand(idx.shape)
    seed = _op.dropout_seed(NAME, TOGGLE, dropout_p, seed, idx.device)
    return _fwd(idx, token_weight, position_weight, positions, seed, dropout_p, dtype)


@_op.check_once
def _check(idx, token_weight, position_weight, positions, dtype):
    toggle = f"(toggle: {TOGGLE}='torch')"
    if dtype is not None and dtype not in _op.FLOATING:
        allowed = ", ".join(map(str, _op.FLOATING))
        raise TypeError(f"{NAME}: dtype is {dtype}, allowed are {allowed} and None {toggle}")
    _op.check_dtypes(NAME, TOGGLE, token_weight=token_weight, position_weight=position_weight)
    for argument, tensor in dict(idx=idx, positions=positions).items():
        if tensor is not None and tensor.dtype != torch.int64:
            raise TypeError(f"{NAME}: {argument} is {tensor.dtype}, allowed is torch.int64 {toggle}")
    if idx.dim() != 2:
        raise ValueError(f"{NAME}: idx has shape {tuple(idx.shape)}, expected (B, T) {toggle}")
    (B, T), P = idx.shape, position_weight.shape[0]
    _op.check_shape(NAME, TOGGLE, "position_weight", position_weight, (P, token_weight.shape[1]))
    if positions is None and T > P:
        raise ValueError(f"{NAME}: idx has {T} positions, position_weight {P} rows {toggle}")
    if positions is not None and positions.shape != (T,):
        _op.check_shape(NAME, TOGGLE, "positions", positions, (B, T))
