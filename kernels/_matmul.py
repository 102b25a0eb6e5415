"""Products of 16-bit matrices with an fp32 result: out = a @ b, or out += a @ b.

Tensor cores accumulate in fp32. From version 2.8 on, PyTorch can return these fp32 sums on GPUs (out_dtype), and from
2.11 on it can add them to an fp32 matrix. Where it has no such product, for example on a CPU, the operator
`fastgpt2::upcast_matmul` replaces it. It is slow, but it is one operator that reads a and b and writes out, so that
traffic counted on a CPU is what a GPU would move.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _device

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
