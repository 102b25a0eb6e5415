"""Attention of one new token over the cache: its cases, the same by HuggingFace, its calls."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.bench.cases.call import Call
from fastgpt2.bench.cases.case import HEAD_SIZE, Case, New
from fastgpt2.bench.cases.description import Description, Size, Sizes
from fastgpt2.bench.cases.ops.attention import huggingface_attention
from fastgpt2.kernels import decode_attention


def cases(sizes: Sizes) -> Iterator[Case]:
    for C, dtype in sizes.widths_and_dtypes():
        yield _case(8, min(sizes.rows // 2, 1024), C, dtype)


def sized(size: Size) -> Iterator[Case]:
    """8 sequences with caches of T tokens."""
    yield _case(8, size.T, size.C, size.dtype)


def _case(B: int, S: int, C: int, dtype: torch.dtype) -> Case:
    """The last token that fits into a cache of S tokens."""
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


def _huggingface(qkv: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
    """The last token of each row, from a pass over all its tokens. The queries of the earlier ones do not matter."""
    rows = []
    for row, (new, length) in enumerate(zip(qkv, lengths.tolist(), strict=True)):
        k, v = cache[:, row, :, :length].transpose(1, 2).flatten(2)  # (length, C) each
        before = torch.cat((torch.zeros_like(k), k, v), 1)
        rows.append(huggingface_attention(torch.cat((before, new))[None])[:, -1:])
    return torch.cat(rows)


def calls() -> Iterator[Call]:
    def decode(what: str, H: int, S: int, D: int, *lengths: int) -> Call:
        def make(new):
            B = len(lengths)
            return new.sliced(B, 1, 3 * H * D), new(2, B, H, S, D), new.values(*lengths, dtype=torch.int32)

        def function(qkv, cache, lengths):
            cache = torch.empty_like(cache).copy_(cache)  # inputs stay as they are: the copy is a result
            return decode_attention.decode_attention(qkv, cache, lengths, H), cache

        return Call("decode_attention", what, make, function, differentiable=False)

    yield decode("one-split", 2, 37, 20, 0, 36)
    yield decode("splits", 1, 131, 16, 130)
    yield decode("full-cache", 1, 70, 128, 70)


DESCRIPTION = Description(
    module=decode_attention, cases=cases, sized=sized, huggingface={"decode_attention": _huggingface}, calls=calls
)
