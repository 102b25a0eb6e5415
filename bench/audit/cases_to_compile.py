"""The cases that the audit compiles: the registry's, and what else their functions can be asked for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastgpt2.bench.cases import registry as cases
from fastgpt2.bench.cases.registry import BF16, FP32, HEAD_SIZE, WIDTHS, Case
from fastgpt2.kernels import attention


def audited_cases(rows: int = 4096) -> Iterator[Case]:
    """`cases`, and what else their functions can be asked for: other code, which may spill where the plain one does
    not. Costs and references are the plain ones'."""
    yield from cases.cases(rows)
    B, T = 4, rows // 4

    def seed(like: Tensor) -> Tensor:
        return torch.zeros(1, dtype=torch.int64, device=like.device)

    def asked(case: Case, name: str, **more: Callable) -> Case:
        """`more`: keyword arguments of the function, made from its first input."""

        def ours(first: Tensor, *rest):
            return case.ours(first, *rest, **{argument: make(first) for argument, make in more.items()})

        return dataclasses.replace(case, shape=f"{case.shape} {name}".strip(), ours=ours)

    documents: dict[str, Callable] = dict(
        cu_seqlens=lambda qkv: torch.tensor([0, T // 3, B * T], dtype=torch.int32, device=qkv.device)
    )
    window: dict[str, Callable] = dict(window=lambda qkv: 256)
    dropout: dict[str, Callable] = dict(dropout_p=lambda first: 0.1, seed=seed)
    bounds = {"documents": documents, "dropout": dropout}
    both = {"documents, dropout": documents | dropout}
    for dtype, D, variants in (
        (BF16, HEAD_SIZE, {**bounds, "window": window, **both}),
        (BF16, 2 * HEAD_SIZE, {"": {}, "documents": documents, **both}),
        *((BF16, padded, {"": {}, **both}) for padded in (48, 96)),
        (FP32, HEAD_SIZE, bounds),
    ):
        plain = cases.attention_case(B, T, WIDTHS[0], dtype, D)
        plain = dataclasses.replace(plain, ours=functools.partial(_on_heads, WIDTHS[0] // D))
        for name, more in variants.items():
            yield asked(plain, name, **more)
    for C in WIDTHS:
        for autocast in (False, True):
            (plain,) = (c for c in cases.elementwise_cases(rows, C, BF16, autocast) if c.op == "add_layer_norm")
            bias = functools.partial(_column, FP32 if autocast else BF16)
            yield asked(plain, "bias, dropout", x_bias=bias, **dropout)
    yield asked(
        cases.embedding_case(B, T, WIDTHS[0], BF16), "positions, dropout", positions=lambda idx: idx % T, **dropout
    )


def _on_heads(H: int, qkv: Tensor, **more: Any) -> Tensor:
    return attention.causal_attention(qkv, H, **more)


def _column(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x.new_zeros(x.shape[-1:], dtype=dtype).requires_grad_()
