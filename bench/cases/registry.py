"""The kernel cases: one list that the audit, the timings and the tests all read.

A case is one public kernel function at one shape and dtype: its inputs, the plain PyTorch beside it, and what it costs
at least. B batch, T time, N rows (B * T), C width, H heads, D head size, V vocabulary.

    for case in cases():
        inputs = case.inputs(device)             # random; inputs(device, torch.empty) where values do not matter
        outputs = case.forward(inputs)
        gradients = case.backward(inputs, outputs)

"minimum bytes": every tensor that the pass must read is read once and every tensor that it must write is written once;
products of matrices by PyTorch left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.bench.cases.case import Case, New
from fastgpt2.kernels import (
    attention,
    decode_attention,
    decode_linear,
    embedding,
    gelu,
    layer_norm,
    linear_cross_entropy,
    mlp,
)

WIDTHS = (768, 1024, 1280, 1600)  # gpt2, -medium, -large, -xl
VOCABULARY = 50257
HEAD_SIZE = 64
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def cases(rows: int = 4096) -> Iterator[Case]:
    """All cases at about `rows` rows; attention at a sequence of `rows` / 4, at most 1024."""
    for C in WIDTHS:
        yield from elementwise_cases(rows, C, BF16)
    for C in (WIDTHS[0], WIDTHS[-1]):
        yield from elementwise_cases(rows, C, BF16, autocast=True)
    for dtype in (FP16, FP32):
        yield from elementwise_cases(rows, WIDTHS[0], dtype)
    for dtype in (BF16, FP16, FP32):
        yield attention_case(4, rows // 4, WIDTHS[0], dtype)
        yield _decode_attention(8, min(rows // 2, 1024), WIDTHS[0], dtype)
        yield from _decode_linear(8, WIDTHS[0], dtype)
        yield _linear_cross_entropy(rows // 8, WIDTHS[0], dtype)
        yield embedding_case(4, rows // 4, WIDTHS[0], dtype)
        yield _mlp(rows, WIDTHS[0], dtype)
    yield attention_case(4, rows // 4, WIDTHS[-1], BF16)
    yield _decode_attention(8, min(rows // 2, 1024), WIDTHS[-1], BF16)
    yield from _decode_linear(8, WIDTHS[-1], BF16)
    for C in (WIDTHS[0], WIDTHS[-1]):
        yield from _decode_linear(1, C, BF16)
    yield from _decode_linear(1, WIDTHS[0], FP32)
    yield _linear_cross_entropy(rows // 8, WIDTHS[-1], BF16)
    yield embedding_case(4, rows // 4, WIDTHS[-1], BF16)
    yield _mlp(rows, WIDTHS[-1], BF16)
    yield _linear_cross_entropy(rows // 8, WIDTHS[0], BF16, autocast=True)
    yield _mlp(rows, WIDTHS[0], BF16, autocast=True)


def sized_cases(T: int, C: int, dtype: torch.dtype, tokens: int = 0, V: int | None = None) -> Iterator[Case]:
    """Every op once, at sequences of T tokens and width C: one sequence, attention and embedding as many as make
    `tokens`; decoding 8 sequences with caches of T; a vocabulary of V, by default GPT-2's."""
    B = max(1, tokens // T)
    yield from elementwise_cases(T, C, dtype)
    yield attention_case(B, T, C, dtype)
    yield _decode_attention(8, T, C, dtype)
    yield from _decode_linear(1, C, dtype)
    yield _linear_cross_entropy(T, C, dtype, V=V)
    yield embedding_case(B, T, C, dtype, V)
    yield _mlp(T, C, dtype)


def step_cases(B: int, T: int, C: int) -> dict[str, Case]:
    """The ops of one training step of GPT-2 under bf16 autocast, parameters in fp32, by name."""
    N = B * T
    gelus = (case for case in elementwise_cases(N, C, BF16) if case.op == "bias_gelu")
    rest = (
        attention_case(B, T, C, BF16),
        _linear_cross_entropy(N, C, BF16, autocast=True),
        embedding_case(B, T, C, FP32),
    )
    return {case.op: case for case in (*elementwise_cases(N, C, BF16, autocast=True), *gelus, *rest)}


def elementwise_cases(N: int, C: int, dtype: torch.dtype, autocast: bool = False) -> Iterator[Case]:
    """LayerNorm at width C and GELU at the MLP's width, 4 * C."""
    e = dtype.itemsize
    p = FP32.itemsize if autocast else e  # a parameter, an element of the residual stream
    parameter = FP32 if autocast else dtype
    statistics = 8 * N
    case = functools.partial(Case, dtype=dtype, rows=N, autocast=autocast)

    def columns(new, n: int = C, mean: float = 0.0) -> Tensor:
        return new(n, dtype=parameter, mean=mean, std=0.2)

    yield case(
        op="layer_norm",
        toggle="layer_norm",
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
        toggle="layer_norm",
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
    if autocast:  # what reaches GELU comes from a matrix product and has its dtype
        return
    yield case(
        op="gelu",
        toggle="mlp",
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
        toggle="mlp",
        shape=f"{N}x{4 * C}",
        make_inputs=lambda new: (new(N, 4 * C), columns(new, 4 * C)),
        ours=gelu.bias_gelu,
        reference=gelu.bias_gelu_reference,
        eager=lambda x, b: F.gelu(x + b, approximate="tanh"),
        forward_bytes=(2 * N + 1) * 4 * C * e,
        backward_bytes=(3 * N + 2) * 4 * C * e,
    )


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


def _decode_attention(B: int, S: int, C: int, dtype: torch.dtype) -> Case:
    """The last token that a cache of S tokens takes."""
    H, e = C // HEAD_SIZE, dtype.itemsize

    def make_inputs(new: New) -> tuple:
        lengths = torch.full_like(new(B, below=S), S - 1, dtype=torch.int32)
        return new(B, 1, 3 * C), new(2, B, H, S, HEAD_SIZE), lengths

    def eager(qkv: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
        q, k, v = qkv.view(B, 3, H, 1, HEAD_SIZE).unbind(1)
        keys, values = cache
        place = lengths.long()[:, None, None, None].expand_as(k)
        keys.scatter_(2, place, k)
        values.scatter_(2, place, v)
        seen = torch.arange(S, device=qkv.device) <= lengths[:, None, None, None]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen).view(B, 1, C)

    return Case(
        op="decode_attention",
        toggle="attention",
        shape=f"{B}x{S}x{H}x{HEAD_SIZE}",
        dtype=dtype,
        make_inputs=make_inputs,
        ours=lambda qkv, cache, lengths: decode_attention.decode_attention(qkv, cache, lengths, H),
        reference=lambda qkv, cache, lengths: decode_attention.decode_attention_reference(qkv, cache, lengths, H),
        eager=eager,
        # q, k, v and the S - 1 tokens before in, k and v stored, the output
        forward_bytes=(3 + 2 * (S - 1) + 2 + 1) * B * C * e + 4 * B,
        backward_bytes=None,
        rows=B * S,
        forward_flops=4 * B * C * S,
    )


def _decode_linear(M: int, C: int, dtype: torch.dtype) -> Iterator[Case]:
    """The MLP's two layers for one token in each of M rows of text, with all that a layer can have around it."""
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


def _linear_cross_entropy(N: int, C: int, dtype: torch.dtype, autocast: bool = False, V: int | None = None) -> Case:
    V, e = V or VOCABULARY, dtype.itemsize
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
        # Gradients are made in the forward: logits are read and written once. Backward scales both gradients.
        forward_bytes=2 * N * V * e + 16 * N,
        backward_bytes=2 * N * C * e + V * C * (kept + parameter.itemsize),
        rows=N,
        forward_flops=6 * N * C * V,
        autocast=autocast,
    )


def embedding_case(B: int, T: int, C: int, dtype: torch.dtype, V: int | None = None) -> Case:
    N, V, e = B * T, V or VOCABULARY, dtype.itemsize
    return Case(
        op="token_position_embedding",
        toggle="embedding",
        shape=f"{B}x{T}x{C}",
        dtype=dtype,
        make_inputs=lambda new: (new(B, T, below=V), new(V, C), new(T, C)),
        ours=embedding.token_position_embedding,
        reference=embedding.token_position_embedding_reference,
        eager=lambda idx, tokens, positions: F.embedding(idx, tokens) + positions[: idx.shape[1]],
        # Every token differs here. Zeros for the tokens that do not occur are PyTorch's, as is the sort.
        forward_bytes=8 * N + (2 * N + T) * C * e,
        backward_bytes=(4 + 8) * N + (2 * N + T) * C * e,
        rows=N,
    )


def _mlp(N: int, C: int, dtype: torch.dtype, autocast: bool = False) -> Case:
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


def chosen(wanted: str | None) -> tuple[str, ...]:
    """The functions that `--op` names, comma-separated; all without it. Raises ValueError for one that there is not."""
    names = tuple(wanted.split(",")) if wanted else tuple(operations())
    for name in names:
        if name not in operations():
            raise ValueError(f"--op is {name!r}, allowed are {', '.join(operations())}")
    return names


def operations() -> dict[str, Callable]:
    """Every public kernel function by name: those that have a `<name>_reference` in their file."""
    modules = (attention, decode_attention, decode_linear, embedding, gelu, layer_norm, linear_cross_entropy, mlp)
    return {
        name.removesuffix("_reference"): getattr(module, name.removesuffix("_reference"))
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_reference") and value.__module__ == module.__name__
    }
