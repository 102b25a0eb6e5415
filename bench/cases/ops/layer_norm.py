"""LayerNorm, alone and after the residual sum: cases, the same by HuggingFace, calls."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.bench.cases.call import Call
from fastgpt2.bench.cases.case import BF16, FP16, FP32, WIDTHS, Case, asked, dropout_of
from fastgpt2.bench.cases.description import Description, Size, Sizes
from fastgpt2.bench.cases.rows import overridden
from fastgpt2.gpt2.config import LAYER_NORM_EPS
from fastgpt2.kernels import _tuning, layer_norm
from fastgpt2.kernels._configurations import Key
from fastgpt2.kernels.layer_norm import add_layer_norm


def cases(sizes: Sizes) -> Iterator[Case]:
    for C in sizes.widths:
        yield from layer_norm_cases(sizes.rows, C, BF16)
    for C in (sizes.widths[0], sizes.widths[-1]):
        yield from layer_norm_cases(sizes.rows, C, BF16, autocast=True)
    for dtype in (FP16, FP32):
        yield from layer_norm_cases(sizes.rows, sizes.widths[0], dtype)


def sized(size: Size) -> Iterator[Case]:
    """One sequence."""
    yield from layer_norm_cases(size.T, size.C, size.dtype)


def layer_norm_cases(N: int, C: int, dtype: torch.dtype, autocast: bool = False) -> Iterator[Case]:
    e = dtype.itemsize
    p = FP32.itemsize if autocast else e  # a parameter, an element of the residual stream
    parameter = FP32 if autocast else dtype
    statistics = 8 * N
    case = functools.partial(Case, toggle="layer_norm", dtype=dtype, rows=N, autocast=autocast)

    def columns(new, mean: float = 0.0) -> Tensor:
        return new(C, dtype=parameter, mean=mean, std=0.2)

    yield case(
        op="layer_norm",
        shape=f"{N}x{C}",
        make_inputs=lambda new: (new(N, C, dtype=parameter), columns(new, mean=1.0), columns(new)),
        ours=layer_norm.layer_norm,
        reference=layer_norm.layer_norm_reference,
        eager=lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b),
        forward_bytes=N * C * (p + e) + statistics + 2 * C * p,
        backward_bytes=N * C * (p + e + p) + statistics + 3 * C * p,
    )
    yield case(
        op="add_layer_norm",
        shape=f"{N}x{C}",
        make_inputs=lambda new: (
            *(new(N, C), new(N, C, dtype=parameter, std=3.0)),
            *(columns(new, mean=1.0), columns(new)),
        ),
        ours=layer_norm.add_layer_norm,
        reference=layer_norm.add_layer_norm_reference,
        eager=lambda x, r, w, b: (s := r + x, F.layer_norm(s, x.shape[-1:], w, b)),
        forward_bytes=N * C * (e + 2 * p + e) + statistics + 2 * C * p,
        backward_bytes=N * C * (p + e + p + (p + e if autocast else e)) + statistics + 3 * C * p,
    )


def variants(rows: int) -> Iterator[Case]:
    """With the bias of the preceding projection, and dropout; of these, some whose backward is one launch."""
    for C in WIDTHS:
        for autocast in (False, True):
            _, plain = layer_norm_cases(rows, C, BF16, autocast)
            bias = functools.partial(_column, FP32 if autocast else BF16)
            yield asked(plain, "bias, dropout", x_bias=bias, **dropout_of(0.1))
            if C in (WIDTHS[0], WIDTHS[-1]):
                plain = dataclasses.replace(plain, ours=folded_add_layer_norm)
                yield asked(plain, "bias, dropout, one launch", x_bias=bias, **dropout_of(0.1))


def folded_add_layer_norm(x: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` whose backward adds up the gradients of parameters in its one launch, where the GPU can, whether
    or not the table says so."""
    with folded(x.device):  # while forward makes the tickets; backward folds where there are some
        return add_layer_norm(x, *rest, **more)


def folded(device: torch.device) -> contextlib.AbstractContextManager:
    keys = [Key("layer_norm_bwd", row_bytes=b, dropout=p) for b in layer_norm.ROW_BYTES for p in (False, True)]
    return overridden({key: {**_tuning.config(key, device), "FOLD": True} for key in keys})


def _column(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x.new_zeros(x.shape[-1:], dtype=dtype).requires_grad_()


def _huggingface(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, LAYER_NORM_EPS)


def _huggingface_add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, F.layer_norm(total, weight.shape, weight, bias, LAYER_NORM_EPS)


def calls() -> Iterator[Call]:
    yield Call("layer_norm", "sliced", lambda new: (new.sliced(7, 129), new(129), new(129)), layer_norm.layer_norm)
    yield Call("layer_norm", "no-bias", lambda new: (new(3, 2, 33), new(33)), layer_norm.layer_norm)
    yield Call("layer_norm", "many-rows", lambda new: (new(70, 20), new(20), new(20)), layer_norm.layer_norm)
    yield Call("layer_norm", "width-1600", lambda new: (new(5, 1600), new(1600), new(1600)), layer_norm.layer_norm)
    yield Call(
        "add_layer_norm",
        "plain",
        lambda new: (new.sliced(5, 127), new.sliced(5, 127), new(127), new(127)),
        add_layer_norm,
    )
    yield Call(
        "add_layer_norm",
        "bias-dropout-float32",
        lambda new: (
            new(70, 65),
            *(new(*shape, dtype=torch.float32) for shape in ((70, 65), (65,), (65,), (65,))),
            new.values(7),
        ),
        lambda x, r, w, b, x_bias, seed: add_layer_norm(x, r, w, b, x_bias=x_bias, dropout_p=0.3, seed=seed),
    )


DESCRIPTION = Description(
    module=layer_norm,
    cases=cases,
    sized=sized,
    huggingface={"layer_norm": _huggingface, "add_layer_norm": _huggingface_add},
    calls=calls,
    variants=variants,
)
