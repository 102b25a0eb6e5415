"""Causal attention: its cases, the same by HuggingFace, its calls."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt2.bench.cases.call import Call
from fastgpt2.bench.cases.case import BF16, FP32, HEAD_SIZE, WIDTHS, Case, asked, dropout_of
from fastgpt2.bench.cases.description import Description, Size, Sizes
from fastgpt2.bench.cases.rows import Config, overridden
from fastgpt2.kernels import _tuning, attention
from fastgpt2.kernels._attention_tiles import tuning_key
from fastgpt2.kernels.attention import causal_attention
from fastgpt2.kernels.attention_backward import causal_attention_bwd


def cases(sizes: Sizes) -> Iterator[Case]:
    for C, dtype in sizes.widths_and_dtypes():
        yield attention_case(4, sizes.rows // 4, C, dtype)


def sized(size: Size) -> Iterator[Case]:
    yield attention_case(size.B, size.T, size.C, size.dtype)


def attention_case(B: int, T: int, C: int, dtype: torch.dtype, D: int = HEAD_SIZE) -> Case:
    H, e = C // D, dtype.itemsize
    lse = 4 * B * H * T

    def eager(qkv: Tensor) -> Tensor:
        q, k, v = qkv.view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)

    return Case(
        op="causal_attention",
        toggle="attention",
        shape=f"{B}x{T}x{H}x{D}",
        dtype=dtype,
        make_inputs=lambda new: (new(B, T, 3 * C),),
        ours=lambda qkv: attention.causal_attention(qkv, H),
        reference=lambda qkv: attention.causal_attention_reference(qkv, H),
        eager=eager,
        forward_bytes=4 * B * T * C * e + lse,
        backward_bytes=(3 + 2 + 3) * B * T * C * e + lse,
        rows=B * T,
        # two products of the T * (T + 1) / 2 visible pairs; backward five
        forward_flops=2 * B * H * T * (T + 1) * D,
        backward_flops=5 * B * H * T * (T + 1) * D,
    )


def variants(rows: int) -> Iterator[Case]:
    """Documents, a window, dropout, heads of other sizes, c_attn's bias, and what the table has off: the kernels that
    read by descriptors, and dq from the diagonal on."""
    B, T = 4, rows // 4
    documents: dict[str, Callable] = dict(
        cu_seqlens=lambda qkv: torch.tensor([0, T // 3, B * T], dtype=torch.int32, device=qkv.device)
    )
    window: dict[str, Callable] = dict(window=lambda qkv: 256)
    dropout = dropout_of(0.1)
    bounds = {"documents": documents, "dropout": dropout}
    both = {"documents, dropout": documents | dropout}
    for dtype, D, asked_for in (
        (BF16, HEAD_SIZE, {**bounds, "window": window, **both}),
        (BF16, 2 * HEAD_SIZE, {"": {}, "documents": documents, **both}),
        *((BF16, padded, {"": {}, **both}) for padded in (48, 96)),
        (FP32, HEAD_SIZE, bounds),
    ):
        plain = attention_case(B, T, WIDTHS[0], dtype, D)
        plain = dataclasses.replace(plain, ours=functools.partial(_on_heads, WIDTHS[0] // D))
        for name, more in asked_for.items():
            yield asked(plain, name, **more)
    for dtype, D in ((BF16, HEAD_SIZE), (BF16, 2 * HEAD_SIZE), (FP32, HEAD_SIZE)):
        yield with_bias(attention_case(B, T, WIDTHS[0], dtype, D), WIDTHS[0] // D)
    plain = attention_case(B, T, WIDTHS[0], BF16)
    for name, function in (("TMA", by_tma), ("diagonal first", diagonal_first)):
        ours = functools.partial(function, WIDTHS[0] // HEAD_SIZE)
        yield dataclasses.replace(plain, shape=f"{plain.shape} {name}", ours=ours, asynchronous=True)


def with_bias(plain: Case, H: int) -> Case:
    """The same, and the gradient of the bias that qkv has."""

    def biased(function: Callable) -> Callable:
        return lambda qkv, bias: function(qkv + (bias - bias.detach()))

    def make_inputs(new: Callable) -> tuple:
        (qkv,) = plain.make_inputs(new)
        return qkv, new(qkv.size(-1))

    return dataclasses.replace(
        plain,
        shape=f"{plain.shape} bias",
        make_inputs=make_inputs,
        ours=lambda qkv, bias: causal_attention(qkv, H, bias=bias),
        reference=biased(plain.reference),
        eager=biased(plain.eager),
    )


def _on_heads(H: int, qkv: Tensor, **more: Any) -> Tensor:
    return causal_attention(qkv, H, **more)


def by_tma(H: int, qkv: Tensor) -> Tensor:
    """Attention by the kernels that read by descriptors (_attention_tma.py and _attention_tma_backward.py), where the
    GPU can run them, whether or not the table has them on."""
    return _ByChangedRows.apply(qkv, H, {"attention_tma_fwd": dict(ON=True), "attention_tma_bwd": dict(ON=True)})


def diagonal_first(H: int, qkv: Tensor) -> Tensor:
    """Attention whose dq begins on the diagonal, whether or not the table says so."""
    return _ByChangedRows.apply(qkv, H, {"attention_bwd": dict(DIAGONAL_FIRST=True)})


class _ByChangedRows(torch.autograd.Function):
    """Attention with `changes`, by op, to its rows of the tuning table. A function of its own, because backward runs
    later, when the table is as it was."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, H: int, changes: dict[str, Config]) -> Tensor:
        ctx.options = H, (qkv.size(2) // (3 * H)) ** -0.5, 0.0, None, None, None, False
        ctx.changes = changes
        with _changed(qkv, H, changes):
            out, lse = attention.causal_attention_fwd(qkv, *ctx.options)
        ctx.save_for_backward(qkv, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        qkv, out, lse = ctx.saved_tensors
        with _changed(qkv, ctx.options[0], ctx.changes):
            return causal_attention_bwd(dout, qkv, out, lse, *ctx.options)[0], None, None


def _changed(qkv: Tensor, H: int, changes: dict[str, Config]) -> contextlib.AbstractContextManager:
    keys = {tuning_key(op, qkv.dtype, qkv.size(2) // (3 * H)): change for op, change in changes.items()}
    return overridden({key: _tuning.config(key, qkv.device) | change for key, change in keys.items()})


def huggingface_attention(qkv: Tensor) -> Tensor:
    """HuggingFace's attention module without its two projections."""
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

    C = qkv.size(-1) // 3
    config = GPT2Config(n_embd=C, n_head=C // HEAD_SIZE, attn_pdrop=0.0, resid_pdrop=0.0)
    config._attn_implementation = "sdpa"
    module = GPT2Attention(config, layer_idx=0)
    module.c_attn = module.c_proj = nn.Identity()
    return module(qkv)[0]


def calls() -> Iterator[Call]:
    def attention(what: str, B: int, T: int, H: int, D: int, make: Callable | None = None, **options) -> Call:
        def default(new):
            return (new(B, T, 3 * H * D),)

        return Call("causal_attention", what, make or default, functools.partial(causal_attention, n_head=H, **options))

    yield attention("plain", 1, 150, 2, 16)
    yield attention("one-token", 2, 1, 2, 32)
    yield attention("padded-head-strided", 2, 37, 2, 20, lambda new: (new.sliced(2, 37, 120),))
    yield attention("window", 1, 150, 1, 16, window=17)
    yield attention("head-size-128", 1, 70, 1, 128)
    yield Call(
        "causal_attention",
        "bias",
        lambda new: (new(2, 37, 96), new(96)),
        lambda qkv, bias: causal_attention(qkv, 2, bias=bias),
    )
    yield Call(
        "causal_attention",
        "documents",
        # Some tokens are before the first and after the last one; one document crosses the end of a row.
        lambda new: (new(2, 75, 96), new.values(3, 40, 41, 80, 147, dtype=torch.int32)),
        lambda qkv, cu_seqlens: causal_attention(qkv, 2, cu_seqlens=cu_seqlens),
    )
    yield Call(
        "causal_attention",
        "dropout-window",
        lambda new: (new(1, 70, 96), new.values(5)),
        lambda qkv, seed: causal_attention(qkv, 2, dropout_p=0.3, seed=seed, window=40),
    )


DESCRIPTION = Description(
    module=attention,
    cases=cases,
    sized=sized,
    huggingface={"causal_attention": huggingface_attention},
    calls=calls,
    variants=variants,
)
