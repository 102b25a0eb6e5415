"""The MLP as a whole: its cases, the same by HuggingFace, its calls."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.bench.cases.call import Call
from fastgpt2.bench.cases.case import BF16, FP32, Case, New
from fastgpt2.bench.cases.description import Description, Size, Sizes
from fastgpt2.bench.cases.ops.gelu import huggingface_gelu
from fastgpt2.kernels import mlp


def cases(sizes: Sizes) -> Iterator[Case]:
    for C, dtype in sizes.widths_and_dtypes():
        yield _case(sizes.rows, C, dtype)
    yield _case(sizes.rows, sizes.widths[0], BF16, autocast=True)


def sized(size: Size) -> Iterator[Case]:
    """One sequence."""
    yield _case(size.T, size.C, size.dtype)


def _case(N: int, C: int, dtype: torch.dtype, autocast: bool = False) -> Case:
    F_, e = 4 * C, dtype.itemsize
    parameter = FP32 if autocast else dtype

    def make_inputs(new: New) -> tuple:
        weights = ((F_, C), C**-0.5), ((F_,), 0.5), ((C, F_), F_**-0.5), ((C,), 0.5)
        return new(N, C), *(new(*shape, dtype=parameter, std=std) for shape, std in weights)

    return Case(
        op="mlp",
        toggle="mlp",
        shape=f"{N}x{C}",
        dtype=dtype,
        make_inputs=make_inputs,
        ours=mlp.mlp,
        reference=mlp.mlp_reference,
        eager=lambda x, w, b, v, c: F.linear(F.gelu(F.linear(x, w, b), approximate="tanh"), v, c),
        forward_bytes=2 * N * F_ * e + F_ * parameter.itemsize,
        backward_bytes=4 * N * F_ * e + 2 * F_ * parameter.itemsize,
        rows=N,
        forward_flops=4 * N * C * F_,
        backward_flops=8 * N * C * F_,
        autocast=autocast,
    )


def _huggingface(x: Tensor, w: Tensor, b: Tensor, v: Tensor, c: Tensor) -> Tensor:
    return F.linear(huggingface_gelu(F.linear(x, w, b)), v, c)


def calls() -> Iterator[Call]:
    yield Call("mlp", "sliced", lambda new: (new.sliced(9, 24), new(40, 24), new(40), new(24, 40), new(24)), mlp.mlp)
    yield Call(
        "mlp",
        "frozen-weights",
        lambda new: (new(3, 5, 24), new(40, 24), new(40), new(24, 40)),
        lambda x, fc_weight, fc_bias, proj_weight: mlp.mlp(x, fc_weight.detach(), fc_bias, proj_weight.detach()),
    )


DESCRIPTION = Description(module=mlp, cases=cases, sized=sized, huggingface={"mlp": _huggingface}, calls=calls)
