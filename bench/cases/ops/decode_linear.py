"""A linear layer for few rows: its cases, the same by HuggingFace, its calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.bench.cases.call import Call
from fastgpt2.bench.cases.case import BF16, FP16, FP32, Case, New
from fastgpt2.bench.cases.description import Description, Size, Sizes
from fastgpt2.bench.cases.ops.gelu import huggingface_gelu
from fastgpt2.gpt2.config import LAYER_NORM_EPS
from fastgpt2.kernels import decode_linear


def cases(sizes: Sizes) -> Iterator[Case]:
    narrow, wide = sizes.widths[0], sizes.widths[-1]
    for M, C, dtype in (
        *((8, narrow, dtype) for dtype in (BF16, FP16, FP32)),
        *((8, wide, BF16), (1, narrow, BF16), (1, wide, BF16), (1, narrow, FP32)),
    ):
        yield from _cases(M, C, dtype)


def sized(size: Size) -> Iterator[Case]:
    """One row."""
    yield from _cases(1, size.C, size.dtype)


def _cases(M: int, C: int, dtype: torch.dtype) -> Iterator[Case]:
    """The MLP's two layers for one token in each of M sequences, with the LayerNorm, GELU and sum that are fused."""
    e = dtype.itemsize

    def case(name: str, K: int, N: int, around: Callable[[New], tuple[Tensor, ...]], bytes_around: int, names, **more):
        def make_inputs(new: New) -> tuple:
            return new(M, K), new(N, K, std=K**-0.5), new(N, std=0.5), *around(new)

        def function(f: Callable) -> Callable:
            return lambda x, w, b, *rest: f(x, w, b, **dict(zip(names, rest, strict=True)), **more)

        return Case(
            op="decode_linear",
            toggle="layer_norm",
            shape=f"{M}x{K}x{N} {name}",
            dtype=dtype,
            make_inputs=make_inputs,
            ours=function(decode_linear.decode_linear),
            reference=function(decode_linear.decode_linear_reference),
            eager=function(decode_linear.decode_linear_reference),
            forward_bytes=(N * K + M * K + M * N + N) * e + bytes_around,
            backward_bytes=None,
            rows=N * K * C,  # nothing grows with the batch
            forward_flops=2 * M * N * K,
        )

    norms = "norm_weight", "norm_bias"
    columns = lambda new: (new(C, mean=1.0, std=0.2), new(C, std=0.2))  # noqa: E731
    yield case("norm, gelu", C, 4 * C, columns, 2 * C * e, norms, gelu=True)
    yield case("residual", 4 * C, C, lambda new: (new(M, C, std=3.0),), M * C * e, ("residual",))


def _huggingface(x: Tensor, weight: Tensor, bias: Tensor, *around: Tensor) -> Tensor:
    """HuggingFace's c_fc with the LayerNorm and GELU around it, or its c_proj and the sum after."""
    if len(around) == 1:
        return around[0] + F.linear(x, weight, bias)
    norm_weight, norm_bias = around
    return huggingface_gelu(
        F.linear(F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, LAYER_NORM_EPS), weight, bias)
    )


def calls() -> Iterator[Call]:
    def call(what: str, M: int, K: int, N: int) -> Call:
        def make(new):
            return new.sliced(M, K), new.sliced(N, K), new(N), new(K), new(K), new.sliced(M, N)

        def function(x, weight, bias, norm_weight, norm_bias, residual):
            norm = dict(norm_weight=norm_weight, norm_bias=norm_bias)
            return decode_linear.decode_linear(x, weight, bias, **norm, gelu=True, residual=residual)

        return Call("decode_linear", what, make, function, differentiable=False)

    yield call("one-row", 1, 1100, 9)
    yield call("rows", 3, 300, 35)
    yield Call(
        "decode_linear",
        "plain",
        lambda new: (new(40, 33), new(17, 33)),
        decode_linear.decode_linear,
        differentiable=False,
    )


DESCRIPTION = Description(
    module=decode_linear, cases=cases, sized=sized, huggingface={"decode_linear": _huggingface}, calls=calls
)
