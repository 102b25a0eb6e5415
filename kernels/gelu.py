"""GELU in its tanh form, together with the bias of the preceding linear layer.

    gelu(x) = x/2 * (1 + tanh(u)) = x * sigmoid(2u),    u = sqrt(2/pi) * (x + 0.044715 x^3)
    dgelu/dx = s + x * s * (1 - s) * 2u',               s = sigmoid(2u)

Shapes: x, y (..., C) = (N, C) rows with a contiguous last dimension and any row stride; bias (C,). x and bias are saved
for backward.

HBM traffic per element of 2 bytes: forward 4 bytes in 1 launch; backward 6 bytes in 1 launch, or with a bias in 2
launches: the first keeps partial sums of dbias in registers over at least 64 rows a program, which adds less than 3%.

Numerics: fp32 (fp64 for fp64 tensors) after the load, one rounding at the store. The sigmoid is computed with exp2,
which is portable and needs no tanh. It keeps the relative accuracy of the left tail, where 1 + tanh(u) cancels. The
bias is added in fp32, whatever its dtype, as in the epilogue of a GEMM. No atomics.

Source: Hendrycks, Gimpel 2016 (arXiv 1606.08415); the constants are those of OpenAI's GPT-2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import _device, _op, _tuning
from ._column_sum import column_sum
from ._frozen import Launch, planned
from ._op import empty_like, rows

# 2u * log2(e) = x * (LINEAR + CUBIC * x^2); its derivative without log2(e) = LINEAR_GRAD + CUBIC_GRAD * x^2.
LINEAR = tl.constexpr(2 * 0.7978845608028654 * 1.4426950408889634)
CUBIC = tl.constexpr(2 * 0.7978845608028654 * 1.4426950408889634 * 0.044715)
LINEAR_GRAD = tl.constexpr(2 * 0.7978845608028654)
CUBIC_GRAD = tl.constexpr(2 * 0.7978845608028654 * 0.044715 * 3)


def gelu_reference(x: Tensor) -> Tensor:
    """The reference for `gelu` in plain PyTorch: (..., C) -> (..., C)."""
    return F.gelu(x, approximate="tanh")


def bias_gelu_reference(x: Tensor, bias: Tensor) -> Tensor:
    """The reference for `bias_gelu` in plain PyTorch: (..., C), (C,) -> (..., C)."""
    return F.gelu(x + bias, approximate="tanh")


@triton.jit
def _sigmoid_2u(x, xx):
    return 1.0 / (1.0 + tl.exp2(-x * (LINEAR + CUBIC * xx)))


@triton.jit
def _gelu_grad(x, xx, s):
    # Beyond |x| = 10^4 the second term is 0, but the square may be infinite and 0 * inf is NaN: hence the minimum.
    return s + x * (s * (1.0 - s)) * (LINEAR_GRAD + CUBIC_GRAD * tl.minimum(xx, 1e8))


@triton.jit(do_not_specialize=["N"])
def _gelu_fwd_kernel(x_ptr, bias_ptr, y_ptr, stride_xn, N, C, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    ACC = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks_c = tl.cdiv(C, BLOCK_C)
    pid_n, pid_c = tl.program_id(0) // blocks_c, tl.program_id(0) % blocks_c
    offs_n = pid_n.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = (offs_n < N)[:, None] & mask_c[None, :]

    x = tl.load(x_ptr + offs_n[:, None] * stride_xn + offs_c[None, :], mask=mask, other=0.0).to(ACC)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)[None, :]
    y = x * _sigmoid_2u(x, x * x)
    tl.store(y_ptr + offs_n[:, None] * C + offs_c[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def _gelu_bwd_kernel(
    dy_ptr, x_ptr, bias_ptr, y_ptr, dx_ptr, dbias_ptr, stride_dyn, stride_xn, N, C,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes dx. Optionally also writes y = gelu(x + bias), recomputed, and partial sums of dbias (P, C)."""
    ACC = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks_c = tl.cdiv(C, BLOCK_C)
    pid_n, pid_c = tl.program_id(0) // blocks_c, tl.program_id(0) % blocks_c
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    dbias = tl.zeros((ROWS, BLOCK_C), ACC)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)[None, :]

    for start in range(pid_n * ROWS, N, tl.num_programs(0) // blocks_c * ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows < N)[:, None] & mask_c[None, :]
        offs = rows[:, None] * C + offs_c[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_xn + offs_c[None, :], mask=mask, other=0.0).to(ACC)
        dy = tl.load(dy_ptr + rows[:, None] * stride_dyn + offs_c[None, :], mask=mask, other=0.0).to(ACC)
        if bias_ptr is not None:
            x += bias
        xx = x * x
        s = _sigmoid_2u(x, xx)
        dx = dy * _gelu_grad(x, xx, s)
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if y_ptr is not None:
            tl.store(y_ptr + offs, (x * s).to(y_ptr.dtype.element_ty), mask=mask)
        dbias += dx  # 0 outside the mask, because dy is 0 there
    if dbias_ptr is not None:
        tl.store(dbias_ptr + pid_n.to(tl.int64) * C + offs_c, tl.sum(dbias, axis=0), mask=mask_c)


@planned
def _fwd_plan(N: int, C: int, itemsize: int, stride_xn: int, device: torch.device) -> Launch:
    options = _tuning.config(_tuning.Key("gelu_fwd", bits=8 * itemsize), device)
    grid = (_tuning.cdiv(N, options["ROWS"]) * _tuning.cdiv(C, options["BLOCK_C"]),)
    return Launch(_gelu_fwd_kernel, grid, stride_xn, N, C, **options)


def gelu_fwd(x: Tensor, bias: Tensor | None) -> Tensor:
    """-> gelu(x + bias) (..., C) in the dtype of x."""
    y = empty_like(x, x.dtype)
    size = x.numel()
    if size == 0:
        return y
    C = x.shape[-1] if x.dim() else 1
    N = size // C
    x, stride_xn = rows(x)
    _fwd_plan(N, C, x.element_size(), stride_xn, x.device)(x, bias, y)
    return y


def _gelu_fwd_fake(x, bias):
    return x.new_empty(x.shape)


@planned
def _bwd_plan(
    N: int, C: int, itemsize: int, strides: tuple[int, int], sums: bool, device: torch.device
) -> tuple[int, Launch]:
    """The number of programs that share the rows, and the launch."""
    options = _tuning.config(_tuning.Key("gelu_bwd", bits=8 * itemsize), device)
    programs_per_sm, min_rows = options.pop("PROGRAMS_PER_SM"), options.pop("MIN_ROWS")
    blocks_c = _tuning.cdiv(C, options["BLOCK_C"])
    programs = _tuning.cdiv(N, options["ROWS"])
    if sums:
        programs = _tuning.cdiv(_device.sm_count(device) * programs_per_sm, blocks_c)
        programs = min(programs, _tuning.cdiv(N, min_rows))
    return programs, Launch(_gelu_bwd_kernel, (programs * blocks_c,), *strides, N, C, **options)


def launch_gelu_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, y: Tensor | None, dx: Tensor, dbias_dtype: torch.dtype | None
) -> Tensor | None:
    """Fills dx, which may be dy itself, and y if it is given, both contiguous (..., C).

    -> dbias (C,), or None if dbias_dtype is None.
    """
    C = x.shape[-1] if x.dim() else 1
    size = x.numel()
    if size == 0:
        return None if dbias_dtype is None else dx.new_zeros(C, dtype=dbias_dtype)
    N = size // C
    dy, stride_dyn = rows(dy)
    x, stride_xn = rows(x)
    strides = (stride_dyn, stride_xn)
    programs, launch = _bwd_plan(N, C, x.element_size(), strides, dbias_dtype is not None, x.device)
    partials = None
    if dbias_dtype is not None:
        sums = torch.float64 if x.dtype == torch.float64 else torch.float32
        partials = torch.empty(1, programs, C, dtype=sums, device=x.device)
    launch(dy, x, bias, y, dx, partials)
    return None if partials is None or dbias_dtype is None else column_sum(partials, [dbias_dtype])[0]


def gelu_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, dbias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """-> dx (..., C) in the dtype of x, and dbias (C,), or None if dbias_dtype is None."""
    dx = empty_like(x, x.dtype)
    return dx, launch_gelu_bwd(dy, x, bias, None, dx, dbias_dtype)


def _gelu_bwd_fake(dy, x, bias, dbias_dtype):
    return x.new_empty(x.shape), None if dbias_dtype is None else x.new_empty(x.shape[-1], dtype=dbias_dtype)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    x, bias = ctx.saved_tensors
    need_bias = bias is not None and ctx.needs_input_grad[1]
    dx, dbias = _gelu_bwd(dy, x, bias, bias.dtype if need_bias else None)
    return dx, dbias if need_bias else None


_gelu_bwd = _op.op(gelu_bwd, _gelu_bwd_fake, toggle="mlp", strided=("dy", "x"))
_gelu_fwd = _op.op(
    gelu_fwd, _gelu_fwd_fake, toggle="mlp", strided=("x",), setup_context=_setup_context, backward=_backward
)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form: x (..., C) -> (..., C) in the dtype of x. Raises TypeError for an unsupported dtype."""
    _op.check_dtypes("gelu", "mlp", x=x)
    return _gelu_fwd(x, None)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias): x (..., C), bias (C,) of any floating dtype -> (..., C) in the dtype of x.

    Raises TypeError for an unsupported dtype, ValueError if the shapes do not fit.
    """
    _op.check_dtypes("bias_gelu", "mlp", x=x, bias=bias)
    _op.check_shape("bias_gelu", "mlp", "bias", bias, x.shape[-1:])
    return _gelu_fwd(x, bias)
