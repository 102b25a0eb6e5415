"""Products of 16-bit matrices with an fp32 result: a @ b, out = a @ b, or out += a @ b.

Tensor cores accumulate in fp32. From version 2.8 on, PyTorch can return these fp32 sums on GPUs (out_dtype), and from
2.11 on it can add them to an fp32 matrix. Where it has no such product, for example on a CPU, the operator
`fastgpt2::upcast_matmul` replaces it. It is slow, but it is one operator that reads a and b and writes out, so that
traffic counted on a CPU is what a GPU would move.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import _device
from ._trace import thread

PIECE = 4096  # rows of `out` that are computed at a time where a temporary result is needed


def matmul_(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """out = a @ b, or out += a @ b if `add`: out (M, N), a (M, K), b (K, N).

    out has the dtype of a and b, or is fp32 if theirs has 16 bits.
    """
    if out.dtype == a.dtype:
        out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    elif not add:
        _widening_matmul(a, b, out)
    elif _device.mixed_matmul(out.device) == "addmm":
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        for m in range(0, out.shape[0], PIECE):
            piece = torch.empty_like(out[m : m + PIECE])
            _widening_matmul(a[m : m + PIECE], b, piece)
            out[m : m + PIECE] += piece


def matmul_keeps_float32(device: torch.device) -> bool:
    """Whether `matmul` has the fp32 sums of 16-bit matrices here; also on a CPU whose traffic is that of a GPU."""
    return _device.INTERPRETED or _device.mixed_matmul(device) != ""


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a (M, K) @ b (K, N) -> (M, N) in `dtype`, in fp32 without a rounding to 16 bits where PyTorch has that product.

    Code that torch.compile traces has a product and a conversion: older versions of Inductor cannot compile the other.
    """
    if dtype == a.dtype:
        return torch.mm(a, b)
    if dtype == torch.float32 and a.dtype.itemsize == 2 and not thread.traced and a.numel() > 0:
        if _device.mixed_matmul(a.device):
            return _float32_mm(a, b)
        if _device.INTERPRETED:
            out = torch.empty(a.shape[0], b.shape[1], dtype=dtype, device=a.device)
            torch.ops.fastgpt2.upcast_matmul(a, b, out=out)
            return out
    return torch.mm(a, b).to(dtype)


_float32_mm = functools.partial(torch.mm, out_dtype=torch.float32)  # what bench/timing/no_device.py replaces


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """dy^T x, the gradient of weight (N, K) in y = x weight^T: dy (rows, N), x (rows, K) -> (N, K) in `dtype`.

    The gradient of the transpose of a contiguous matrix, such as the weight of transformers' Conv1D, is laid out as
    that. Autograd would copy any other one into the layout of the parameter.
    """
    if weight.is_contiguous() or not weight.t().is_contiguous():
        return matmul(dy.t(), x, dtype)
    return matmul(x.t(), dy, dtype).t()


def weight_gradient_fake(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor as `weight_gradient` returns it."""
    if weight.is_contiguous() or not weight.t().is_contiguous():
        return weight.new_empty(weight.shape, dtype=dtype)
    return weight.new_empty(weight.shape[::-1], dtype=dtype).t()


def _widening_matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    if _device.mixed_matmul(out.device):
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    else:
        torch.ops.fastgpt2.upcast_matmul(a, b, out=out)


def _upcast_matmul(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    b = b.to(out.dtype)
    for m in range(0, out.shape[0], PIECE):
        torch.mm(a[m : m + PIECE].to(out.dtype), b, out=out[m : m + PIECE])


_LIBRARY = torch.library.Library("fastgpt2", "FRAGMENT")
_LIBRARY.define("upcast_matmul(Tensor a, Tensor b, *, Tensor(a!) out) -> ()")
_LIBRARY.impl("upcast_matmul", _upcast_matmul, "CompositeExplicitAutograd")
