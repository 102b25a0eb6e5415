"""A linear layer under autocast whose parameters get the gradients that the products' fp32 sums are.

    y = x weight^T + bias,      dx = dy weight,      dweight = dy^T x,      dbias = sum of dy's rows

Autocast computes dweight and dbias in 16 bits and converts them to the parameter's fp32: 8 bytes an element where 4 are
written, one launch more for each, and a rounding. Here the products write fp32 (_matmul.py).

Shapes: x (..., K), weight (N, K), bias (N,), y (..., N). x, y and dx are in 16 bits; weight and bias are read in copies
of 16 bits, and x and the weight's copy are kept for backward, as by autocast. PyTorch computes the products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import _op
from ._matmul import matmul_keeps_float32, weight_gradient

NAME = "a linear layer under autocast"


def gains(x: Tensor, weight: Tensor) -> bool:
    """Whether `autocast_linear` computes the layer of this weight: it is fp32 and trained, x is in the 16 bits of the
    present autocast, and neither compiled code, torch.func, forward-mode derivatives nor other types take part."""
    kind = "cuda" if x.is_cuda else x.device.type
    return (
        weight.requires_grad
        and weight.dtype == torch.float32
        and x.dtype.itemsize == 2
        and type(x) in _op.PLAIN
        and type(weight) in _op.PLAIN
        and forward_ad._current_level < 0
        and torch.is_grad_enabled()
        and torch.is_autocast_enabled(kind)
        and torch.get_autocast_dtype(kind) == x.dtype
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and matmul_keeps_float32(x.device)
    )


def autocast_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, weight_copy: Tensor | None, bias_copy: Tensor | None
) -> Tensor:
    """x (..., K) -> (..., N) in the dtype of x. Only where it `gains`.

    weight_copy, bias_copy: weight and bias in that dtype, if the caller has them; otherwise they are cast here. Raises
    RuntimeError for a second derivative.
    """
    return _apply(x, weight, bias, weight_copy, bias_copy)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, weight_copy, bias_copy):  # type: ignore[override]
        weight_copy = weight.to(x.dtype) if weight_copy is None else weight_copy
        if bias is not None and bias_copy is None:
            bias_copy = bias.to(x.dtype)
        ctx.save_for_backward(x, weight_copy)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return F.linear(x, weight_copy, bias_copy)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[override]
        if torch.is_grad_enabled():  # here by create_graph=True alone
            raise RuntimeError(_op.no_second_derivative(NAME, "kernels"))
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
        weight_dtype, bias_dtype = ctx.dtypes
        dy = dy.reshape(-1, dy.shape[-1])  # (rows, N)
        return (
            torch.mm(dy, weight).view(x.shape) if needs_x else None,
            weight_gradient(dy, x.reshape(-1, x.shape[-1]), weight, weight_dtype) if needs_weight else None,
            dy.sum(0, dtype=bias_dtype) if needs_bias else None,
            None,
            None,
        )


_apply = super(torch.autograd.Function, _Linear).apply  # type: ignore[misc]  # without a search for functorch's transforms
