"""LayerNorm over the last dimension; residual add, the previous projection's bias and dropout ride in the same pass.

    total = residual + dropout(x + x_bias)
    y     = (total - mean) * rstd * weight + bias,    rstd = 1 / sqrt(var + eps)

    wdy   = dy * weight,   xhat = (total - mean) * rstd
    dtotal += rstd * (wdy - mean_C(wdy) - xhat * mean_C(wdy * xhat)),  dweight = sum_N(dy * xhat),  dbias = sum_N(dy)

Shapes: x, residual, total, y (..., C) = (N, C) rows, last dimension contiguous, rows at any stride; weight, bias,
x_bias (C,); mean, rstd (N,). What backward needs is kept once: total (without a residual: x itself), mean and rstd.

HBM traffic at 2 bytes an element: forward 4 B (with the residual 8 B: read 2, write 2), 1 launch. Backward 6 B (8 B:
read total, dy and the gradient of total, write one tensor that is both dx and dresidual), 2 launches: the main one
keeps partial sums of the parameter gradients in registers over 64 rows a program or more: they add less than 5%.

Numerics: fp32 (fp64 for fp64 tensors) statistics from registers: the mean, then mean and squares of what is left, so
that a large mean does not cancel. The statistics are those of `total` as stored, rounded to its dtype: y is bitwise
layer_norm(total). Dropout is Philox at (seed, row * C + column), drawn again in backward. No atomics.

Sources: Ba, Kiros, Hinton 2016 (arXiv 1607.06450); the two-stage reduction of Triton's layer-norm tutorial.
"""

from __future__ import annotations

import bisect

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, _op
from ._column_sum import column_sum
from ._frozen import launch
from ._op import as_rows

ROW_BYTES = (512, 1024, 1536, 2048, 4096, 8192, 16384, 32768, 65536)  # variants in the tuning table


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """The truth for `layer_norm`: (..., C) -> (..., C)."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The truth for `add_layer_norm`, with the dropout mask (..., C) given as `keep`."""
    x = x if x_bias is None else x + x_bias
    x = x if keep is None else x * keep / (1 - dropout_p)
    total = residual + x
    return total, layer_norm_reference(total, weight, bias, eps)


# In both kernels what lies past C is made 0 by `tl.where`: the compiler, which knows C, drops registers that lie there
# in every lane, and 768 columns cost three fourths of 1024.


@triton.jit
def _dropout_scale(seed_ptr, rows, offs_c, C, dropout_p: tl.constexpr):
    """0 where (row, column) is dropped, 1 / (1 - p) elsewhere, fp32."""
    u = tl.rand(tl.load(seed_ptr), rows * C + offs_c)
    return tl.where(u >= dropout_p, 1.0 / (1.0 - dropout_p), 0.0)


@triton.jit(do_not_specialize=["N"])
def _layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, x_bias_ptr, seed_ptr, total_ptr, y_ptr, mean_ptr, rstd_ptr,
    stride_xn, stride_rn, N, C: tl.constexpr, eps: tl.constexpr, dropout_p: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A row at a time: for GPT-2's widths in one warp, whose sums are shuffles without a barrier."""
    ACC = mean_ptr.dtype.element_ty
    offs_c = tl.arange(0, BLOCK_C)
    mask = offs_c < C
    weight = tl.load(weight_ptr + offs_c, mask=mask, other=0.0).to(ACC)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_c, mask=mask, other=0.0).to(ACC)
    if x_bias_ptr is not None:
        x_bias = tl.load(x_bias_ptr + offs_c, mask=mask, other=0.0).to(ACC)

    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        row = tl.cast(n, tl.int64)
        total = tl.load(x_ptr + row * stride_xn + offs_c, mask=mask, other=0.0).to(ACC)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + row * stride_rn + offs_c, mask=mask, other=0.0).to(ACC)
            if x_bias_ptr is not None:
                total = tl.where(mask, total + x_bias, 0.0)
            if dropout_p > 0.0:
                total *= _dropout_scale(seed_ptr, row, offs_c, C, dropout_p)
            stored = (residual + total).to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + row * C + offs_c, stored, mask=mask)
            total = stored.to(ACC)

        mean = tl.sum(total) / C
        centred = tl.where(mask, total - mean, 0.0)
        # The sum of a row with a large mean is off by several of its last bits: what they are is the mean of the rest.
        shift = tl.sum(centred) / C
        var = tl.maximum(tl.sum(centred * centred) / C - shift * shift, 0.0)
        rstd = tl.rsqrt(var + eps)
        y = (centred * rstd - shift * rstd) * weight
        if bias_ptr is not None:
            y += bias
        tl.store(y_ptr + row * C + offs_c, y.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(mean_ptr + row, mean + shift)
        tl.store(rstd_ptr + row, rstd)


# Tiles of backward are (CHUNKS, ROWS, SPAN): a row is CHUNKS * SPAN columns, a SPAN one 128-bit access of its lanes. In
# memory the first two are one dimension, which wraps over warps: ROWS are warps', CHUNKS lie in a thread. Which of two
# dimensions the warps get depends on Triton's version.


@triton.jit
def _load_tile(ptr, stride, rows, offs_c, mask, CHUNKS: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr):
    """(CHUNKS * ROWS, SPAN) in memory -> (CHUNKS, ROWS, SPAN)."""
    return tl.reshape(tl.load(ptr + rows * stride + offs_c, mask=mask, other=0.0), (CHUNKS, ROWS, SPAN))


@triton.jit
def _store_tile(ptr, stride, rows, offs_c, mask, tile, CHUNKS: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr):
    tile = tl.reshape(tile.to(ptr.dtype.element_ty), (CHUNKS * ROWS, SPAN))
    tl.store(ptr + rows * stride + offs_c, tile, mask=mask)


@triton.jit
def _sum_rows(tile):
    """(CHUNKS, ROWS, SPAN) -> (1, ROWS, 1)."""
    return tl.sum(tl.sum(tile, axis=0), axis=1)[None, :, None]


@triton.jit
def _sum_columns(tile, CHUNKS: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr):
    """(CHUNKS, ROWS, SPAN) -> (CHUNKS, 1, SPAN): halves added to halves, a third of the instructions of tl.sum here."""
    rows = tl.permute(tile, (0, 2, 1))
    for i in tl.static_range(6):
        if ROWS >> i > 1:
            even, odd = tl.split(tl.reshape(rows, (CHUNKS, SPAN, ROWS >> (i + 1), 2)))
            rows = even + odd
    return tl.permute(rows, (0, 2, 1))


@triton.jit(do_not_specialize=["N"])
def _layer_norm_bwd_kernel(
    dy_ptr, dtotal_ptr, total_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr,
    dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr, dx_bias_ptr,
    stride_dyn, stride_dtn, stride_tn, N, C: tl.constexpr, dropout_p: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    ACC = mean_ptr.dtype.element_ty
    pid = tl.program_id(0)
    offs_c = tl.arange(0, CHUNKS)[:, None, None] * SPAN + tl.arange(0, SPAN)[None, None, :]
    mask_c = offs_c < C
    weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)
    dweight = tl.zeros((CHUNKS, ROWS, SPAN), ACC)
    dbias = tl.zeros((CHUNKS, ROWS, SPAN), ACC)
    dx_bias = tl.zeros((CHUNKS, ROWS, SPAN), ACC)
    flat = tl.arange(0, CHUNKS * ROWS)[:, None]
    flat_c = flat // ROWS * SPAN + tl.arange(0, SPAN)[None, :]

    for start in range(pid * ROWS, N, tl.num_programs(0) * ROWS):
        flat_n = start + flat % ROWS
        rows = flat_n.to(tl.int64)
        mask = (flat_n < N) & (flat_c < C)
        offs_n = start + tl.arange(0, ROWS)[None, :, None]
        mask_n = offs_n < N

        total = _load_tile(total_ptr, stride_tn, rows, flat_c, mask, CHUNKS, ROWS, SPAN).to(ACC)
        dy = _load_tile(dy_ptr, stride_dyn, rows, flat_c, mask, CHUNKS, ROWS, SPAN).to(ACC)
        if dtotal_ptr is not None:
            from_total = _load_tile(dtotal_ptr, stride_dtn, rows, flat_c, mask, CHUNKS, ROWS, SPAN).to(ACC)
        mean = tl.load(mean_ptr + offs_n, mask=mask_n, other=0.0)
        rstd = tl.load(rstd_ptr + offs_n, mask=mask_n, other=0.0)

        dy = tl.where(mask_c, dy, 0.0)
        xhat = tl.where(mask_c, (total - mean) * rstd, 0.0)
        wdy = tl.where(mask_c, dy * weight, 0.0)
        c1, c2 = _sum_rows(wdy) / C, _sum_rows(wdy * xhat) / C
        dtotal = wdy * rstd - (c1 * rstd + xhat * (c2 * rstd))
        if dtotal_ptr is not None:
            dtotal += from_total
        dtotal = tl.where(mask_c, dtotal, 0.0)
        if dresidual_ptr is not None:
            _store_tile(dresidual_ptr, C, rows, flat_c, mask, dtotal, CHUNKS, ROWS, SPAN)
        dx = dtotal
        if dropout_p > 0.0:
            dx *= _dropout_scale(seed_ptr, offs_n.to(tl.int64), offs_c, C, dropout_p)
        _store_tile(dx_ptr, C, rows, flat_c, mask, dx, CHUNKS, ROWS, SPAN)

        dweight += dy * xhat
        dbias += dy
        dx_bias += dx

    partial = pid.to(tl.int64) * C + offs_c
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, _sum_columns(dweight, CHUNKS, ROWS, SPAN), mask=mask_c)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, _sum_columns(dbias, CHUNKS, ROWS, SPAN), mask=mask_c)
    if dx_bias_ptr is not None:
        tl.store(dx_bias_ptr + partial, _sum_columns(dx_bias, CHUNKS, ROWS, SPAN), mask=mask_c)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _config(op: str, rows: Tensor, dropout: bool) -> dict[str, int]:
    """What the table has for the narrowest rows that are as wide as these."""
    variant = ROW_BYTES[bisect.bisect_left(ROW_BYTES, rows.shape[1] * rows.element_size())]
    return dict(_launch.config(op, rows.device, f"{variant} dropout" if dropout else str(variant)))


def layer_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    x_bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> total (..., C), or (0,) without a residual; y (..., C) in `dtype`; mean, rstd (N,)."""
    total, y, mean, rstd = _layer_norm_fwd_fake(x, residual, weight, bias, x_bias, seed, eps, dropout_p, dtype)
    N, C = mean.shape[0], x.shape[-1]
    if N == 0:
        return total, y, mean, rstd
    x = as_rows(x)
    residual = None if residual is None else as_rows(residual)
    options = _config("layer_norm_fwd", x, dropout_p > 0.0)
    grid = (min(N, _launch.sm_count(x.device) * options.pop("PROGRAMS_PER_SM")),)
    launch(
        _layer_norm_fwd_kernel, grid,
        x, residual, weight, bias, x_bias, seed, total, y, mean, rstd,
        x.stride(0), 0 if residual is None else residual.stride(0), N, C, eps, dropout_p,
        BLOCK_C=_launch.next_power_of_2(C), **options,
    )  # fmt: skip
    return total, y, mean, rstd


def _layer_norm_fwd_fake(x, residual, weight, bias, x_bias, seed, eps, dropout_p, dtype):
    C = x.shape[-1]
    total_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    total = x.new_empty(0) if residual is None else x.new_empty(x.shape, dtype=total_dtype)
    mean, rstd = (x.new_empty(x.numel() // C, dtype=_accumulator(total_dtype)) for _ in range(2))
    return total, x.new_empty(x.shape, dtype=dtype), mean, rstd


def layer_norm_bwd(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    dx_dtype: torch.dtype,
    dresidual_dtype: torch.dtype | None,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
    dx_bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> dx, dresidual (..., C), dweight, dbias, dx_bias (C,); one whose dtype is None is (0,)."""
    N, C = mean.shape[0], total.shape[-1]
    dtypes = (dweight_dtype, dbias_dtype, dx_bias_dtype)
    dx, dresidual, *_ = _layer_norm_bwd_fake(
        dy, dtotal, total, weight, mean, rstd, seed, dropout_p, dx_dtype, dresidual_dtype, *dtypes
    )
    if N == 0:
        return dx, dresidual, *(dx.new_zeros(0 if t is None else C, dtype=t) for t in dtypes)
    dy, total = as_rows(dy), as_rows(total)
    dtotal = None if dtotal is None else as_rows(dtotal)
    options = _config("layer_norm_bwd", total, dropout_p > 0.0)
    span = options.pop("SPAN_BYTES") // total.element_size()
    programs = _launch.sm_count(total.device) * options.pop("PROGRAMS_PER_SM")
    programs = min(programs, _launch.cdiv(N, options.pop("MIN_ROWS")))
    wanted = [t for t in dtypes if t is not None]
    partials = [mean.new_empty(programs, C) for _ in wanted]
    slots = iter(partials)
    launch(
        _layer_norm_bwd_kernel, (programs,),
        dy, dtotal, total, weight, mean, rstd, seed,
        dx, None if dresidual_dtype is None else dresidual, *(None if t is None else next(slots) for t in dtypes),
        dy.stride(0), 0 if dtotal is None else dtotal.stride(0), total.stride(0), N, C, dropout_p,
        CHUNKS=_launch.next_power_of_2(_launch.cdiv(C, span)), SPAN=span, **options,
    )  # fmt: skip
    sums = iter(column_sum(partials, wanted))
    return dx, dresidual, *(dx.new_empty(0) if t is None else next(sums) for t in dtypes)


def _layer_norm_bwd_fake(
    dy, dtotal, total, weight, mean, rstd, seed, dropout_p,
    dx_dtype, dresidual_dtype, dweight_dtype, dbias_dtype, dx_bias_dtype,
):  # fmt: skip
    rows = [total.new_empty(0 if t is None else total.shape, dtype=t) for t in (dx_dtype, dresidual_dtype)]
    columns = [
        weight.new_empty(0 if t is None else total.shape[-1], dtype=t)
        for t in (dweight_dtype, dbias_dtype, dx_bias_dtype)
    ]
    return *rows, *columns


def _setup_context(ctx, inputs, output):
    x, residual, weight, bias, x_bias, seed, _, dropout_p, _ = inputs
    total, _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd, *((total,) if residual is None else ()))
    ctx.save_for_backward(x if residual is None else total, weight, mean, rstd, seed)
    ctx.dropout_p = dropout_p
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, residual, weight, bias, x_bias))


def _backward(ctx, dtotal, dy, *_):
    total, weight, mean, rstd, seed = ctx.saved_tensors
    if dy is None and dtotal is None:
        return (None,) * 9
    if dy is None:
        dy = total.new_zeros(()).expand(total.shape)
    x_dtype, residual_dtype, *parameter_dtypes = ctx.dtypes
    needs = ctx.needs_input_grad
    # One tensor is the gradient of x and of residual where they are equal.
    shared = residual_dtype == x_dtype and ctx.dropout_p == 0.0
    wanted = [t if need else None for t, need in zip(parameter_dtypes, needs[2:5], strict=True)]
    dx, dresidual, *parameters = _layer_norm_bwd(
        dy, dtotal, total, weight, mean, rstd, seed, ctx.dropout_p,
        x_dtype, residual_dtype if needs[1] and not shared else None, *wanted,
    )  # fmt: skip
    dresidual = dx if shared else dresidual
    grads = (dx, dresidual, *parameters)
    return *(g if need else None for g, need in zip(grads, needs, strict=False)), None, None, None, None


_layer_norm_bwd = _op.op(layer_norm_bwd, _layer_norm_bwd_fake, toggle="layer_norm")
_layer_norm_fwd = _op.op(
    layer_norm_fwd, _layer_norm_fwd_fake, toggle="layer_norm", setup_context=_setup_context, backward=_backward
)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension: x (..., C), weight and bias (C,) -> (..., C).

    The output has the dtype of x, or autocast's, in which the next matrix product will read it.
    """
    _check("layer_norm", x, weight=weight, bias=bias)
    dtype = _op.autocast_dtype(x, x.dtype)
    return _layer_norm_fwd(x, None, weight, bias, None, None, eps, 0.0, dtype)[1]


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-> total = residual + dropout(x + x_bias), and LayerNorm of total.

    x, residual (..., C), weight, bias and x_bias (C,). total has the dtype of residual + x, the second output that of
    total or autocast's. seed: int64 () or (1,) on the device, drawn there by torch's generator where it is None.
    """
    _check("add_layer_norm", x, weight=weight, bias=bias, x_bias=x_bias)
    _op.check_dtypes("add_layer_norm", "layer_norm", residual=residual)
    _op.check_shape("add_layer_norm", "layer_norm", "residual", residual, tuple(x.shape))
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"add_layer_norm: dropout_p is {dropout_p}, allowed is [0, 1) (toggle: layer_norm='torch')")
    if dropout_p == 0.0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    elif seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(
            f"add_layer_norm: seed is {seed.dtype} of shape {tuple(seed.shape)}, expected one int64 on the device "
            "(toggle: layer_norm='torch')"
        )
    dtype = _op.autocast_dtype(x, torch.promote_types(x.dtype, residual.dtype))
    total, y, *_ = _layer_norm_fwd(x, residual, weight, bias, x_bias, seed, eps, dropout_p, dtype)
    return total, y


def _check(name: str, x: Tensor, **columns: Tensor | None) -> None:
    _op.check_dtypes(name, "layer_norm", x=x, **columns)
    limit = ROW_BYTES[-1] // x.element_size()
    if x.dim() == 0 or not 1 <= x.shape[-1] <= limit:
        raise ValueError(
            f"{name}: x has shape {tuple(x.shape)}, its last dimension must be 1 to {limit} "
            f"for {x.dtype} (toggle: layer_norm='torch')"
        )
    for argument, tensor in columns.items():
        _op.check_shape(name, "layer_norm", argument, tensor, (x.shape[-1],))
