"""The MLP as a whole, with GELU in a pass or in the products: its cases, the same by HuggingFace, its calls."""

from __future__ import annotations

import dataclasses
import functools
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
    """fused_mlp first, so that `bench tune` compares its best with `mlp`."""
    for case in (_fused_case, _case):
        for C, dtype in sizes.widths_and_dtypes():
            yield case(sizes.rows, C, dtype)
        yield case(sizes.rows, sizes.widths[0], BF16, autocast=True)


def sized(size: Size) -> Iterator[Case]:
    """One sequence."""
    yield _case(size.T, size.C, size.dtype)
    yield _fused_case(size.T, size.C, size.dtype)


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


def _fused_case(N: int, C: int, dtype: torch.dtype, autocast: bool = False) -> Case:
    """Its bytes include what our two products read and write: x or dout, a weight, pre, act and dpre."""
    case, e = _case(N, C, dtype, autocast), dtype.itemsize
    F_ = 4 * C
    inputs = (N + F_) * C * e
    bias = F_ * (FP32 if autocast else dtype).itemsize
    return dataclasses.replace(
        case,
        op="fused_mlp",
        ours=mlp.fused_mlp,
        forward_bytes=inputs + 2 * N * F_ * e + bias,
        backward_bytes=inputs + 3 * N * F_ * e + 2 * bias,
    )


def _huggingface(x: Tensor, w: Tensor, b: Tensor, v: Tensor, c: Tensor) -> Tensor:
    return F.linear(huggingface_gelu(F.linear(x, w, b)), v, c)


def calls() -> Iterator[Call]:
    for name, function in (("mlp", mlp.mlp), ("fused_mlp", mlp.fused_mlp)):
        yield Call(
            name, "sliced", lambda new: (new.sliced(9, 24), new(40, 24), new(40), new(24, 40), new(24)), function
        )
        yield Call(
            name,
            "frozen-weights",
            lambda new: (new(3, 5, 24), new(40, 24), new(40), new(24, 40)),
            functools.partial(_with_frozen_weights, function),
        )


def _with_frozen_weights(function, x, fc_weight, fc_bias, proj_weight):
    return function(x, fc_weight.detach(), fc_bias, proj_weight.detach())


HUGGINGFACE = {"mlp": _huggingface, "fused_mlp": _huggingface}
DESCRIPTION = Description(module=mlp, cases=cases, sized=sized, huggingface=HUGGINGFACE, calls=calls)
