"""Token and position embedding: its cases, the same by HuggingFace, its calls."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.bench.cases.call import Call
from fastgpt2.bench.cases.case import BF16, VOCABULARY, WIDTHS, Case, asked, dropout_of
from fastgpt2.bench.cases.description import Description, Size, Sizes
from fastgpt2.kernels import embedding
from fastgpt2.kernels.embedding import token_position_embedding


def cases(sizes: Sizes) -> Iterator[Case]:
    for C, dtype in sizes.widths_and_dtypes():
        yield embedding_case(4, sizes.rows // 4, C, sizes.V, dtype)


def sized(size: Size) -> Iterator[Case]:
    yield embedding_case(size.B, size.T, size.C, size.V, size.dtype)


def embedding_case(B: int, T: int, C: int, V: int, dtype: torch.dtype) -> Case:
    N, e = B * T, dtype.itemsize
    return Case(
        op="token_position_embedding",
        toggle="embedding",
        shape=f"{B}x{T}x{C}",
        dtype=dtype,
        make_inputs=lambda new: (new(B, T, below=V), new(V, C), new(T, C)),
        ours=embedding.token_position_embedding,
        reference=embedding.token_position_embedding_reference,
        eager=lambda idx, tokens, positions: F.embedding(idx, tokens) + positions[: idx.shape[1]],
        # All tokens differ here. PyTorch sorts, and writes zeros for tokens that do not occur: neither is counted.
        forward_bytes=8 * N + (2 * N + T) * C * e,
        backward_bytes=(4 + 8) * N + (2 * N + T) * C * e,
        rows=N,
    )


def variants(rows: int) -> Iterator[Case]:
    """Given positions, and dropout."""
    T = rows // 4
    plain = embedding_case(4, T, WIDTHS[0], VOCABULARY, BF16)
    yield asked(plain, "positions, dropout", positions=lambda idx: idx % T, **dropout_of(0.1))


def _huggingface(idx: Tensor, token_weight: Tensor, position_weight: Tensor) -> Tensor:
    positions = torch.arange(idx.size(1), device=idx.device)
    return F.embedding(idx, token_weight) + F.embedding(positions, position_weight)


def calls() -> Iterator[Call]:
    op = "token_position_embedding"
    yield Call(
        op, "plain", lambda new: (new.below(11, 3, 15), new.sliced(11, 259), new(20, 259)), token_position_embedding
    )
    yield Call(
        op,
        "one-token-dropout",  # one run of equal tokens, longer than a window of the segment sum
        lambda new: (new.below(1, 3, 25) + 4, new(11, 40), new(25, 40), new.values(3)),
        lambda idx, wte, wpe, seed: token_position_embedding(idx, wte, wpe, dropout_p=0.4, seed=seed),
    )
    yield Call(
        op,
        "positions",
        lambda new: (new.below(200, 15, 3).t(), new(200, 40), new(50, 40), new.below(50, 3, 15)),
        token_position_embedding,
    )


DESCRIPTION = Description(
    module=embedding,
    cases=cases,
    sized=sized,
    huggingface={"token_position_embedding": _huggingface},
    calls=calls,
    variants=variants,
)
