"""GELU at the MLP's width, alone and after the bias: cases, the same by HuggingFace, calls."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.bench.cases.call import Call
from fastgpt2.bench.cases.case import BF16, FP16, FP32, Case
from fastgpt2.bench.cases.description import Description, Size, Sizes
from fastgpt2.kernels import gelu


def cases(sizes: Sizes) -> Iterator[Case]:
    for C in sizes.widths:
        yield from gelu_cases(sizes.rows, C, BF16)
    for dtype in (FP16, FP32):
        yield from gelu_cases(sizes.rows, sizes.widths[0], dtype)


def sized(size: Size) -> Iterator[Case]:
    """One sequence."""
    yield from gelu_cases(size.T, size.C, size.dtype)


def gelu_cases(N: int, C: int, dtype: torch.dtype) -> Iterator[Case]:
    """Without autocast: GELU's input is a matrix product's output and has its dtype."""
    e = dtype.itemsize
    case = functools.partial(Case, toggle="mlp", dtype=dtype, rows=N)

    yield case(
        op="gelu",
        shape=f"{N}x{4 * C}",
        make_inputs=lambda new: (new(N, 4 * C),),
        ours=gelu.gelu,
        reference=gelu.gelu_reference,
        eager=functools.partial(F.gelu, approximate="tanh"),
        forward_bytes=2 * N * 4 * C * e,
        backward_bytes=3 * N * 4 * C * e,
    )
    yield case(
        op="bias_gelu",
        shape=f"{N}x{4 * C}",
        make_inputs=lambda new: (new(N, 4 * C), new(4 * C, std=0.2)),
        ours=gelu.bias_gelu,
        reference=gelu.bias_gelu_reference,
        eager=lambda x, b: F.gelu(x + b, approximate="tanh"),
        forward_bytes=(2 * N + 1) * 4 * C * e,
        backward_bytes=(3 * N + 2) * 4 * C * e,
    )


def huggingface_gelu(x: Tensor) -> Tensor:
    from transformers.activations import ACT2FN

    return ACT2FN["gelu_new"](x)


def calls() -> Iterator[Call]:
    yield Call("gelu", "sliced", lambda new: (new.sliced(9, 259),), gelu.gelu)
    yield Call("gelu", "scalar", lambda new: (new(),), gelu.gelu)
    # More rows than one program of the backward takes: two partial sums of the bias gradient.
    yield Call("bias_gelu", "many-rows", lambda new: (new(70, 259), new(259)), gelu.bias_gelu)


DESCRIPTION = Description(
    module=gelu,
    cases=cases,
    sized=sized,
    huggingface={"gelu": huggingface_gelu, "bias_gelu": lambda x, bias: huggingface_gelu(x + bias)},
    calls=calls,
)
