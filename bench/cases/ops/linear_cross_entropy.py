"""The head's product and the loss: its cases, the same by HuggingFace, its calls."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.bench.cases.call import Call
from fastgpt2.bench.cases.case import BF16, FP16, FP32, Case
from fastgpt2.bench.cases.description import Description, Size, Sizes
from fastgpt2.kernels import linear_cross_entropy


def cases(sizes: Sizes) -> Iterator[Case]:
    """At an eighth of the rows."""
    for C, dtype in sizes.widths_and_dtypes():
        yield loss_case(sizes.rows // 8, C, sizes.V, dtype)
    yield loss_case(sizes.rows // 8, sizes.widths[0], sizes.V, BF16, autocast=True)


def sized(size: Size) -> Iterator[Case]:
    """One sequence."""
    yield loss_case(size.T, size.C, size.V, size.dtype)


def loss_case(N: int, C: int, V: int, dtype: torch.dtype, autocast: bool = False) -> Case:
    e = dtype.itemsize
    parameter = FP32 if autocast else dtype
    kept = 4 if parameter == FP16 else parameter.itemsize  # dweight between forward and backward
    return Case(
        op="linear_cross_entropy",
        toggle="cross_entropy",
        shape=f"{N}x{C}x{V}",
        dtype=dtype,
        make_inputs=lambda new: (new(N, C), new(V, C, dtype=parameter, std=C**-0.5), new(N, below=V)),
        ours=linear_cross_entropy.linear_cross_entropy,
        reference=linear_cross_entropy.linear_cross_entropy_reference,
        eager=lambda x, w, t: F.cross_entropy(F.linear(x, w).float(), t),
        # The forward computes the gradients, for which it reads and writes logits once; the backward scales them.
        forward_bytes=2 * N * V * e + 16 * N,
        backward_bytes=2 * N * C * e + V * C * (kept + parameter.itemsize),
        rows=N,
        forward_flops=6 * N * C * V,
        autocast=autocast,
    )


def _huggingface(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


def calls() -> Iterator[Call]:
    def loss(what: str, N: int, C: int, V: int, ignored: int = -100, **options) -> Call:
        def make(new):
            targets = new.below(options.get("vocab_size", V), N)
            targets[1::3] = ignored
            return new(N, C), new(V, C), targets

        options = {"ignore_index": ignored} | options
        return Call(
            "linear_cross_entropy", what, make, functools.partial(linear_cross_entropy.linear_cross_entropy, **options)
        )

    yield loss("mean", 5, 24, 5003)
    yield loss("sum-smoothed", 5, 24, 67, ignored=3, reduction="sum", label_smoothing=0.1, z_loss=0.01)
    yield loss("none-chunks-padded", 7, 24, 67, reduction="none", vocab_size=61, chunk_bytes=1200)
    yield loss("mean-chunks", 7, 24, 67, chunk_bytes=1200)
    yield Call(
        "linear_cross_entropy",
        "frozen-weight",
        lambda new: (new.sliced(5, 24), new(67, 24), new.below(67, 5)),
        lambda x, weight, targets: linear_cross_entropy.linear_cross_entropy(x, weight.detach(), targets),
    )


DESCRIPTION = Description(
    module=linear_cross_entropy,
    cases=cases,
    sized=sized,
    huggingface={"linear_cross_entropy": _huggingface},
    calls=calls,
)
