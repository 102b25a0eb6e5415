"""x W^T + bias, on a CPU by oneDNN where that is faster than PyTorch's linear layer.

PyTorch multiplies float32 on a CPU by MKL, which on AMD's processors reaches some three quarters of what oneDNN does:
forward and the gradient of x go to oneDNN, the gradient of the weight, where MKL is ahead, stays. Everything else
(GPUs, other dtypes, autocast, compiled code, a few rows) is `torch.nn.functional.linear`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_ROWS = 16  # below, laying operands out takes as long as the product


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., K) -> (..., N). A weight that `packed.py` laid out goes to oneDNN as it is."""
    if weight.is_mkldnn:
        return _product(x, weight, bias)
    if _suits(x, weight, bias):
        return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else _product(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """gelu(x W^T + bias), by tanh; with a laid-out float32 weight in one pass. In 16 bits that would leave out the
    rounding between the two, and not write what the model without a cache writes."""
    if weight.is_mkldnn and weight.dtype == torch.float32:
        return _product(x, weight, bias, "gelu")
    return F.gelu(linear(x, weight, bias), approximate="tanh")


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.is_cpu  # to ask for its device's type, by name, takes several times as long
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # the operator has arguments that no trace can hold
        and all(t.dtype == torch.float32 and type(t) in PLAIN for t in (x, weight, bias) if t is not None)
        and x.numel() >= MIN_ROWS * x.size(-1) > 0
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0  # forward-mode derivatives, which `_Linear` has not
        and not torch._C._len_torch_dispatch_stack()  # FlopCounterMode and its like know PyTorch's own operators
    )


PLAIN = (Tensor, torch.nn.Parameter)  # not sharded, not traced


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, then: str = "none") -> Tensor:
    bias = None if bias is None else bias.contiguous()  # oneDNN reads it as if it were
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "tanh" if then == "gelu" else "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x.contiguous(), weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.size(-1)).contiguous()
        dx = linear(rows, weight.t()).view_as(x) if needs_x else None
        dweight = rows.t() @ x.reshape(-1, x.size(-1)) if needs_weight else None
        return dx, dweight, rows.sum(0) if needs_bias else None
