"""LayerNorm over the last dimension, together with the preceding residual add, projection bias and dropout.

    total = residual + dropout(x + x_bias)
    y     = (total - mean) * rstd * weight + bias,    rstd = 1 / sqrt(var + eps)

    wdy   = dy * weight,   xhat = (total - mean) * rstd
    dtotal += rstd * (wdy - mean_C(wdy) - xhat * mean_C(wdy * xhat)),  dweight = sum_N(dy * xhat),  dbias = sum_N(dy)

Shapes: x, residual, total, y (..., C) = (N, C) rows with a contiguous last dimension and any row stride; weight, bias,
x_bias (C,); mean and rstd (N,), stored as one tensor (N, 2). Saved for backward: total (x without a residual) and both.

HBM traffic per element of 2 bytes: forward 4 bytes (8 with a residual: 2 reads, 2 writes) in 1 launch. Backward 6 bytes
(8 with a residual: reads of total, dy and the gradient of total, one write of dx, which is also dresidual) in 2
launches: the first keeps partial sums of parameter gradients in registers over 64 or more rows and adds less than 5%.
Where the tuning table has FOLD, the first one adds them up too, by tickets that forward has set to 0.

Numerics: statistics in fp32 (fp64 for fp64 tensors): first the mean, then mean and squares of the centred row, so that
a large mean does not cancel. They are computed from `total` rounded to its dtype, so that y is bitwise equal to
layer_norm(total). Dropout is Philox at (seed, row * C + column), recomputed in backward. No atomics on data.

Sources: Ba, Kiros, Hinton 2016 (arXiv 1607.06450); the two-stage reduction of Triton's layer-norm tutorial.
"""

from __future__ import annotations

import bisect

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import _device, _op, _tuning
from ._column_sum import column_sum, fold_columns, fold_groups, fold_options, fold_tickets
from ._frozen import Launch, planned
from ._layer_norm_tiles import dropout_scale, load_tile, store_tile, sum_columns, sum_rows
from ._op import empty_like, rows
from ._trace import is_traced

ROW_BYTES = (512, 1024, 1536, 2048, 4096, 8192, 16384, 32768, 65536)  # the widths in the tuning table


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """The reference for `layer_norm` in plain PyTorch: (..., C) -> (..., C)."""
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
    """The reference for `add_layer_norm` in plain PyTorch. keep: the dropout mask (..., C)."""
    x = x if x_bias is None else x + x_bias
    x = x if keep is None else x * keep / (1 - dropout_p)
    total = residual + x
    return total, layer_norm_reference(total, weight, bias, eps)


# Both kernels set columns past C to 0 with `tl.where`. The compiler knows C and removes registers that are past C in
# every lane, so that 768 columns cost three quarters of 1024.


@triton.jit(do_not_specialize=["N"])
def _layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, x_bias_ptr, seed_ptr, total_ptr, y_ptr, statistics_ptr, tickets_ptr,
    stride_xn, stride_rn, N, C: tl.constexpr, eps: tl.constexpr, dropout_p: tl.constexpr, BLOCK_C: tl.constexpr,
    TICKETS: tl.constexpr,
):  # fmt: skip
    """Computes one row at a time. At GPT-2's widths one warp computes a row, so that sums need no barrier."""
    if tickets_ptr is not None:  # for backward
        if tl.program_id(0) == 0:
            tl.store(tickets_ptr + tl.arange(0, TICKETS), tl.zeros((TICKETS,), tl.int32))
    ACC = statistics_ptr.dtype.element_ty
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
                total *= dropout_scale(seed_ptr, row, offs_c, C, dropout_p)
            stored = (residual + total).to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + row * C + offs_c, stored, mask=mask)
            total = stored.to(ACC)

        mean = tl.sum(total) / C
        centred = tl.where(mask, total - mean, 0.0)
        # A large mean is off by several of its last bits. The mean of the centred row corrects that.
        shift = tl.sum(centred) / C
        var = tl.maximum(tl.sum(centred * centred) / C - shift * shift, 0.0)
        rstd = tl.rsqrt(var + eps)
        y = (centred * rstd - shift * rstd) * weight
        if bias_ptr is not None:
            y += bias
        tl.store(y_ptr + row * C + offs_c, y.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(statistics_ptr + row * 2, mean + shift)
        tl.store(statistics_ptr + row * 2 + 1, rstd)


@triton.jit(do_not_specialize=["N"])
def _layer_norm_bwd_kernel(
    dy_ptr, dtotal_ptr, total_ptr, weight_ptr, statistics_ptr, seed_ptr, dx_ptr, dresidual_ptr, partials_ptr,
    tickets_ptr, out0_ptr, out1_ptr, out2_ptr,
    stride_dyn, stride_dtn, stride_tn, N, C: tl.constexpr, dropout_p: tl.constexpr, DWEIGHT: tl.constexpr,
    DBIAS: tl.constexpr, DX_BIAS: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
    STAGES: tl.constexpr, GROUP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partials (K, P, C): each program's sums for the K of dweight, dbias and dx_bias that are needed. With tickets,
    the last program adds them up: out0, out1, out2 (C,) are these K."""
    ACC = statistics_ptr.dtype.element_ty
    pid = tl.program_id(0)
    BITS: tl.constexpr = total_ptr.dtype.element_ty.primitive_bitwidth if STAGES > 1 else 0
    offs_c = tl.arange(0, CHUNKS)[:, None, None] * SPAN + tl.arange(0, SPAN)[None, None, :]
    mask_c = offs_c < C
    dweight = tl.zeros((CHUNKS, ROWS, SPAN), ACC)
    dbias = tl.zeros((CHUNKS, ROWS, SPAN), ACC)
    dx_bias = tl.zeros((CHUNKS, ROWS, SPAN), ACC)
    flat = tl.arange(0, CHUNKS * ROWS)[:, None]
    flat_c = flat // ROWS * SPAN + tl.arange(0, SPAN)[None, :]
    if STAGES > 1:  # in the distribution of the rows
        weight = load_tile(weight_ptr, 0, flat % ROWS, flat_c, flat_c < C, BITS, CHUNKS, ROWS, SPAN).to(ACC)
    else:
        weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)

    for start in tl.range(pid * ROWS, N, tl.num_programs(0) * ROWS, num_stages=STAGES):
        flat_n = start + flat % ROWS
        rows = flat_n.to(tl.int64)
        mask = (flat_n < N) & (flat_c < C)
        offs_n = start + tl.arange(0, ROWS)[None, :, None]
        mask_n = offs_n < N

        total = load_tile(total_ptr, stride_tn, rows, flat_c, mask, BITS, CHUNKS, ROWS, SPAN).to(ACC)
        dy = load_tile(dy_ptr, stride_dyn, rows, flat_c, mask, BITS, CHUNKS, ROWS, SPAN).to(ACC)
        if dtotal_ptr is not None:
            from_total = load_tile(dtotal_ptr, stride_dtn, rows, flat_c, mask, BITS, CHUNKS, ROWS, SPAN).to(ACC)
        mean = tl.load(statistics_ptr + offs_n.to(tl.int64) * 2, mask=mask_n, other=0.0)
        rstd = tl.load(statistics_ptr + offs_n.to(tl.int64) * 2 + 1, mask=mask_n, other=0.0)

        dy = tl.where(mask_c, dy, 0.0)
        xhat = tl.where(mask_c, (total - mean) * rstd, 0.0)
        wdy = tl.where(mask_c, dy * weight, 0.0)
        c1, c2 = sum_rows(wdy) / C, sum_rows(wdy * xhat) / C
        dtotal = wdy * rstd - (c1 * rstd + xhat * (c2 * rstd))
        if dtotal_ptr is not None:
            dtotal += from_total
        dtotal = tl.where(mask_c, dtotal, 0.0)
        if dresidual_ptr is not None:
            store_tile(dresidual_ptr, C, rows, flat_c, mask, dtotal, BITS, CHUNKS, ROWS, SPAN)
        dx = dtotal
        if dropout_p > 0.0:
            dx *= dropout_scale(seed_ptr, offs_n.to(tl.int64), offs_c, C, dropout_p)
        store_tile(dx_ptr, C, rows, flat_c, mask, dx, BITS, CHUNKS, ROWS, SPAN)

        dweight += dy * xhat
        dbias += dy
        dx_bias += dx

    partial = pid.to(tl.int64) * C + offs_c
    next_partial = tl.num_programs(0).to(tl.int64) * C
    if DWEIGHT:
        tl.store(partials_ptr + partial, sum_columns(dweight, CHUNKS, ROWS, SPAN), mask=mask_c)
        partial += next_partial
    if DBIAS:
        tl.store(partials_ptr + partial, sum_columns(dbias, CHUNKS, ROWS, SPAN), mask=mask_c)
        partial += next_partial
    if DX_BIAS:
        tl.store(partials_ptr + partial, sum_columns(dx_bias, CHUNKS, ROWS, SPAN), mask=mask_c)
    if tickets_ptr is not None:
        K: tl.constexpr = DWEIGHT + DBIAS + DX_BIAS
        fold_columns(partials_ptr, tickets_ptr, out0_ptr, out1_ptr, out2_ptr, K, C, GROUP, BLOCK_P, BLOCK_C)


def _options(op: str, C: int, itemsize: int, dropout: bool, device: torch.device) -> dict[str, int]:
    """The tuning table's options for the smallest width that is at least as wide as these rows."""
    narrowest = bisect.bisect_left(ROW_BYTES, C * itemsize)
    return _tuning.config(_tuning.Key(op, row_bytes=ROW_BYTES[narrowest], dropout=dropout), device)


@planned
def _fwd_plan(
    N: int, C: int, itemsizes: tuple[int, int], strides: tuple[int, int], eps: float, dropout_p: float,
    device: torch.device,
) -> tuple[int, Launch]:  # fmt: skip
    """The number of tickets that backward needs, and the launch. itemsizes: of x and total."""
    options = _options("layer_norm_fwd", C, itemsizes[0], dropout_p > 0.0, device)
    backward = _options("layer_norm_bwd", C, itemsizes[1], dropout_p > 0.0, device)
    sm_count = _device.sm_count(device)
    tickets = fold_tickets(sm_count * backward["PROGRAMS_PER_SM"], device) if backward["FOLD"] else 0
    programs = min(N, sm_count * options.pop("PROGRAMS_PER_SM"))
    options |= dict(BLOCK_C=_tuning.next_power_of_2(C), TICKETS=tickets)
    return tickets, Launch(_layer_norm_fwd_kernel, (programs,), *strides, N, C, eps, dropout_p, **options)


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
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """-> total (..., C), None without a residual; y (..., C) in `dtype`; statistics (N, 2), mean and rstd; tickets,
    None unless backward folds its sums: int32 zeros, which it leaves as they are."""
    total, y, statistics, tickets = _layer_norm_fwd_fake(x, residual, weight, bias, x_bias, seed, eps, dropout_p, dtype)
    N, C = statistics.shape[0], x.shape[-1]
    if N == 0:
        return total, y, statistics, tickets
    itemsizes = x.dtype.itemsize, (x if total is None else total).dtype.itemsize
    x, stride_xn = rows(x)
    residual, stride_rn = (None, 0) if residual is None else rows(residual)
    n_tickets, launch = _fwd_plan(N, C, itemsizes, (stride_xn, stride_rn), eps, dropout_p, x.device)
    if n_tickets and not is_traced():  # Inductor would copy what backward saved and writes to
        tickets = torch.empty(n_tickets, dtype=torch.int32, device=x.device)
    launch(x, residual, weight, bias, x_bias, seed, total, y, statistics, tickets)
    return total, y, statistics, tickets


def _layer_norm_fwd_fake(x, residual, weight, bias, x_bias, seed, eps, dropout_p, dtype):
    total, total_dtype = None, x.dtype
    if residual is not None:
        total_dtype = total_dtype if residual.dtype == x.dtype else torch.promote_types(x.dtype, residual.dtype)
        total = empty_like(x, total_dtype)
    accumulator = torch.float64 if total_dtype == torch.float64 else torch.float32
    statistics = torch.empty(x.numel() // x.shape[-1], 2, dtype=accumulator, device=x.device)
    return total, empty_like(x, dtype), statistics, None


@planned
def _bwd_plan(
    N: int, C: int, itemsizes: tuple[int, int], strides: tuple[int, ...], dropout_p: float, wanted: tuple,
    device: torch.device,
) -> tuple[int, Launch]:  # fmt: skip
    """The number of programs, and the launch. itemsizes: of total, statistics. wanted: dweight, dbias, dx_bias."""
    options = _options("layer_norm_bwd", C, itemsizes[0], dropout_p > 0.0, device)
    del options["FOLD"]
    span = options.pop("SPAN_BYTES") // itemsizes[0]
    programs = _device.sm_count(device) * options.pop("PROGRAMS_PER_SM")
    programs = min(programs, _tuning.cdiv(N, options.pop("MIN_ROWS")))
    options |= dict(CHUNKS=_tuning.next_power_of_2(_tuning.cdiv(C, span)), SPAN=span)
    options |= fold_options(C, itemsizes[1], options["num_warps"])
    return programs, Launch(_layer_norm_bwd_kernel, (programs,), *strides, N, C, dropout_p, *wanted, **options)


def layer_norm_bwd(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    statistics: Tensor,
    seed: Tensor | None,
    tickets: Tensor | None,
    dropout_p: float,
    dx_dtype: torch.dtype,
    dresidual_dtype: torch.dtype | None,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
    dx_bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """-> dx, dresidual (..., C), dweight, dbias, dx_bias (C,); None for each whose dtype is None."""
    N, C = statistics.shape[0], total.shape[-1]
    dtypes = (dweight_dtype, dbias_dtype, dx_bias_dtype)
    dx, dresidual = empty_like(total, dx_dtype), None if dresidual_dtype is None else empty_like(total, dresidual_dtype)
    if N == 0:
        dweight, dbias, dx_bias = (None if t is None else dx.new_zeros(C, dtype=t) for t in dtypes)
        return dx, dresidual, dweight, dbias, dx_bias
    dy, stride_dyn = rows(dy)
    dtotal, stride_dtn = (None, 0) if dtotal is None else rows(dtotal)
    total, stride_tn = rows(total)
    strides, wanted = (stride_dyn, stride_dtn, stride_tn), tuple([t is not None for t in dtypes])
    itemsizes = total.dtype.itemsize, statistics.dtype.itemsize
    programs, launch = _bwd_plan(N, C, itemsizes, strides, dropout_p, wanted, total.device)
    some = [t for t in dtypes if t is not None]
    fold = tickets is not None and some and tickets.numel() >= fold_tickets(programs, total.device)
    n_rows = programs + fold_groups(programs) if fold else programs
    partials = torch.empty(len(some), n_rows, C, dtype=statistics.dtype, device=total.device)
    tensors = (dy, dtotal, total, weight, statistics, seed, dx, dresidual, partials)
    if fold:
        outs = [partials.new_empty(C, dtype=t) for t in some]
        launch(*tensors, tickets, *outs, *(None,) * (3 - len(outs)))
    else:
        launch(*tensors, None, None, None, None)
        outs = column_sum(partials, some)
    sums = iter(outs)
    dweight, dbias, dx_bias = [None if t is None else next(sums) for t in dtypes]
    return dx, dresidual, dweight, dbias, dx_bias


def _layer_norm_bwd_fake(
    dy, dtotal, total, weight, statistics, seed, tickets, dropout_p,
    dx_dtype, dresidual_dtype, dweight_dtype, dbias_dtype, dx_bias_dtype,
):  # fmt: skip
    C, dtypes = total.shape[-1], (dweight_dtype, dbias_dtype, dx_bias_dtype)
    dx, dresidual = (None if t is None else empty_like(total, t) for t in (dx_dtype, dresidual_dtype))
    return dx, dresidual, *(None if t is None else weight.new_empty(C, dtype=t) for t in dtypes)


def _setup_context(ctx, inputs, output):
    x, residual, weight, bias, x_bias, seed, _, dropout_p, _ = inputs
    total, _, statistics, tickets = output
    ctx.set_materialize_grads(False)
    tickets = tickets if tickets is not None and tickets.numel() else None  # the operator returns none
    ctx.save_for_backward(x if residual is None else total, weight, statistics, seed, tickets)
    ctx.dropout_p = dropout_p
    ctx.dtypes = [None if t is None else t.dtype for t in (x, residual, weight, bias, x_bias)]


def _backward(ctx, dtotal, dy, *_):
    total, weight, statistics, seed, tickets = ctx.saved_tensors
    x_dtype, residual_dtype, *dtypes = ctx.dtypes
    dtotal = None if residual_dtype is None else dtotal  # without a residual, forward returned no total
    if dy is None and dtotal is None:
        return (None,) * 9
    if dy is None:
        dy = total.new_zeros(()).expand(total.shape)
    needs = ctx.needs_input_grad
    # The gradients of x and residual are one tensor if they are equal.
    shared = residual_dtype == x_dtype and ctx.dropout_p == 0.0
    wanted = [t if need else None for t, need in zip(dtypes, needs[2:5])]  # noqa: B905 (strict=True is slower)
    dx, dresidual, *parameters = _layer_norm_bwd(
        dy, dtotal, total, weight, statistics, seed, tickets, ctx.dropout_p,
        x_dtype, residual_dtype if needs[1] and not shared else None, *wanted,
    )  # fmt: skip
    grads = (dx, dx if shared else dresidual, *parameters)
    return *[g if need else None for g, need in zip(grads, needs)], None, None, None, None  # noqa: B905


_layer_norm_bwd = _op.op(layer_norm_bwd, _layer_norm_bwd_fake, toggle="layer_norm", strided=("dy", "dtotal", "total"))
_layer_norm_fwd = _op.op(
    layer_norm_fwd, _layer_norm_fwd_fake, toggle="layer_norm", strided=("x", "residual"),
    differentiable=2, eager_only=1, setup_context=_setup_context, backward=_backward,
)  # fmt: skip


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension: x (..., C), weight and bias (C,) -> (..., C) in x's dtype.

    Under autocast the output has autocast's dtype, which the next matrix product reads. Raises TypeError, ValueError.
    """
    _check("layer_norm", x, None, weight, bias, None)
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
    """-> total = residual + dropout(x + x_bias), and LayerNorm of total. Raises TypeError, ValueError.

    x, residual (..., C), weight, bias, x_bias (C,). total has the dtype of residual + x, the other output that of total
    or autocast's. seed: int64 () or (1,) on the device, by default drawn from the device's generator.
    """
    _check("add_layer_norm", x, residual, weight, bias, x_bias)
    seed = _op.dropout_seed("add_layer_norm", "layer_norm", dropout_p, seed, x.device)
    dtype = x.dtype if x.dtype == residual.dtype else torch.promote_types(x.dtype, residual.dtype)
    dtype = _op.autocast_dtype(x, dtype)
    total, y, *_ = _layer_norm_fwd(x, residual, weight, bias, x_bias, seed, eps, dropout_p, dtype)
    return total, y


@_op.check_once
def _check(name, x, residual, weight, bias, x_bias):
    columns = dict(weight=weight, bias=bias, x_bias=x_bias)
    _op.check_dtypes(name, "layer_norm", x=x, residual=residual, **columns)
    limit = ROW_BYTES[-1] // x.element_size()
    if x.dim() == 0 or not 1 <= x.shape[-1] <= limit:
        raise ValueError(
            f"{name}: x has shape {tuple(x.shape)}, its last dimension must be 1 to {limit} "
            f"for {x.dtype} (toggle: layer_norm='torch')"
        )
    _op.check_shape(name, "layer_norm", "residual", residual, x.shape)
    for argument, tensor in columns.items():
        _op.check_shape(name, "layer_norm", argument, tensor, x.shape[-1:])
