"""x W^T + bias. On AMD's CPUs oneDNN computes it where it is faster than PyTorch's linear layer.

PyTorch multiplies float32 matrices on a CPU with MKL. On AMD's processors oneDNN computes the forward faster, above all
that of the output head, and with AVX-512 the gradient of x too, where MKL reaches three quarters of its speed; without
AVX-512 it is oneDNN that reaches three quarters of MKL's. MKL computes the gradient of the weight, where it is faster
on both. On an Intel Xeon MKL was the faster one for all of them, and elsewhere neither was measured: there, as for
everything else (GPUs, other dtypes, autocast, compiled code, few rows), it is `torch.nn.functional.linear`. The choice
follows from the maker of the CPU and its instructions and not from a measurement, so that a run computes the same bits
every time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.gpt2.hardware import cpu_vendor

ONEDNN_IS_FASTER = cpu_vendor() == "AuthenticAMD"
FASTER_BACKWARD = torch.backends.cpu.get_cpu_capability() == "AVX512"  # for the gradient of x too
MIN_ROWS = 16  # with fewer rows, oneDNN takes as long to lay out the operands as to multiply them


def library() -> str:
    """Who multiplies float32 matrices on this CPU, and with which instructions: their sums are rounded differently."""
    name = "oneDNN" if ONEDNN_IS_FASTER and torch.backends.mkldnn.is_available() else "PyTorch"
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), bias (N,) -> (..., N). A weight that `packed.py` packed goes to oneDNN unchanged."""
    if weight.is_mkldnn:
        return _product(x, weight, bias)
    if _suits(x, weight, bias):
        return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else _product(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """gelu(x W^T + bias) in the tanh form: (..., K) -> (..., N).

    With a packed float32 weight oneDNN computes both in one pass. In 16 bits this would skip the rounding between them,
    and generation with a cache could then differ from generation without one.
    """
    if weight.is_mkldnn and weight.dtype == torch.float32:
        return _product(x, weight, bias, "gelu")
    return F.gelu(linear(x, weight, bias), approximate="tanh")


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.is_cpu  # several times as fast as x.device.type
        and ONEDNN_IS_FASTER
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # a trace cannot hold the operator's arguments
        and all(t.dtype == torch.float32 and type(t) in PLAIN for t in (x, weight, bias) if t is not None)
        and x.numel() >= MIN_ROWS * x.size(-1) > 0
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0  # `_Linear` has no forward-mode derivative
        and not torch._C._len_torch_dispatch_stack()  # modes such as FlopCounterMode know PyTorch's own operators
    )


PLAIN = (Tensor, torch.nn.Parameter)  # neither sharded nor traced


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, then: str = "none") -> Tensor:
    bias = None if bias is None else bias.contiguous()  # oneDNN ignores its stride
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
        dx = (linear(rows, weight.t()) if FASTER_BACKWARD else rows @ weight).view_as(x) if needs_x else None
        dweight = _weight_gradient(rows, x.reshape(-1, x.size(-1)), weight) if needs_weight else None
        return dx, dweight, rows.sum(0) if needs_bias else None


def _weight_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """dy^T x (N, K), laid out as the transpose of a contiguous matrix if weight is one: as in kernels/_matmul.py."""
    if weight.is_contiguous() or not weight.t().is_contiguous():
        return dy.t() @ x
    return (x.t() @ dy).t()
