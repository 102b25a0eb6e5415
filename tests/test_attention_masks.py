"""Causal attention's masks: windows, documents, dropout, and the tiles that are visited for them."""

import itertools
from unittest import mock

import pytest
import torch
from attention_inputs import interpreted, offsets, packed, rule, tiles
from numerics import check
from torch import Tensor

from fastgpt2.kernels._attention_tiles import INSIDE, SECOND_DIAGONAL, _key_tiles, _query_tiles
from fastgpt2.kernels.attention import causal_attention, causal_attention_reference, visible

# Numpy warns where hardware does not: exp2 of a masked score may overflow before the mask sets it to 0, and some tests
# put NaN where nobody may look.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]


# ----------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("t", [1, 31, 32, 40, 69])
def test_causality(device, t):
    """The output before token t is a function of the tokens before t, and so is its gradient."""
    qkv = packed(1, 70, 2, 32, torch.float32, device)
    changed = qkv.clone()
    changed[:, t:] *= -100
    before, after = causal_attention(qkv, 2), causal_attention(changed, 2)
    assert torch.equal(before[:, :t], after[:, :t]) and not torch.isclose(before[:, t:], after[:, t:]).any()
    qkv.requires_grad_()
    out = causal_attention(qkv, 2)
    dqkv = torch.autograd.grad(out[:, :t].sum(), qkv)[0]
    assert (dqkv[:, t:] == 0).all() and (dqkv[:, :t].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 64, 69, 70, 1000])
def test_window(device, window, dtype):
    rule(packed(1, 70, 1, 16, dtype, device), 1, window=window)


def test_window_over_long_rows(device):
    with tiles(BLOCK_M=32, BLOCK_N=16, DKV_BLOCK_M=16, DKV_BLOCK_N=32, DQ_BLOCK_M=32, DQ_BLOCK_N=32):
        rule(packed(1, 210, 1, 16, torch.float16, device), 1, window=100)


DOCUMENTS = [  # offsets into 2 * 75 tokens
    (0, 150),
    (0, 75, 150),
    (0, 40, 41, 80, 150),  # one token alone; one document crosses the end of a row
    (0, 30, 30, 30, 110, 150),  # empty documents
    (3, 40, 41, 80, 147),  # tokens before the first and after the last one
    (60, 61),
    (100, 140),
    (0, *range(1, 151)),
]


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("documents", DOCUMENTS, ids=lambda d: f"{len(d) - 1} from {d[0]} to {d[-1]}")
def test_documents(device, documents, window):
    rule(packed(2, 75, 1, 16, torch.float32, device), 1, cu_seqlens=offsets(device, *documents), window=window)


def test_documents_are_like_rows(device):
    """Bit for bit: what is packed into a row knows nothing of its neighbours."""
    rows = packed(3, 64, 2, 16, torch.float32, device)
    documents = offsets(device, 0, 64, 128, 192)  # for both: without them a GPU takes other tiles
    together = causal_attention(rows.view(1, 192, -1), 2, cu_seqlens=documents)
    assert torch.equal(together.view(3, 64, -1), causal_attention(rows, 2, cu_seqlens=documents))


def test_tokens_in_no_document(device):
    """Whatever is in them reaches nobody; they get 0 and their gradient is 0."""
    qkv = packed(1, 90, 2, 16, torch.float32, device)
    inside = torch.zeros(90, dtype=torch.bool, device=device)
    inside[20:70] = True
    expected = causal_attention_reference(qkv[:, inside], 2)
    qkv = qkv.masked_fill(~inside[:, None], 4.0).requires_grad_()
    out = causal_attention(qkv, 2, cu_seqlens=offsets(device, 20, 70))
    dqkv = torch.autograd.grad(out.sum(), qkv)[0]
    torch.testing.assert_close(out[:, inside], expected, atol=1e-5, rtol=1e-5)
    assert (out[:, ~inside] == 0).all() and (dqkv[:, ~inside] == 0).all() and dqkv.isfinite().all()


# --------------------------------------------------------------------------------------------------------- dropout


def kept(T: int, H: int, p: float, seed: Tensor, **options) -> Tensor:
    """(1, H, T, T): what dropout multiplies the weights by, read off outputs: v picks keys, all scores are equal."""
    D, factors = 32, torch.zeros(1, H, T, T, device=seed.device)
    for first in range(0, T, D):
        qkv = torch.zeros(1, T, 3, H, D, device=seed.device)
        for d in range(min(D, T - first)):
            qkv[:, first + d, 2, :, d] = 1
        out = causal_attention(qkv.view(1, T, -1), H, dropout_p=p, seed=seed, **options).view(1, T, H, D)
        weights = out.transpose(1, 2) * torch.arange(1, T + 1, device=seed.device)[:, None]
        factors[..., first : first + D] = weights[..., : T - first]
    return factors


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_mask(device, p):
    T, H = 70, 2
    factors = kept(T, H, p, torch.tensor([3], device=device))
    seen = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    values = factors[..., seen]
    torch.testing.assert_close(values, torch.where(values > 0.5, 1 / (1 - p), 0.0), atol=1e-4, rtol=0)
    kept_share = (values > 0.5).double().mean()
    assert abs(kept_share - (1 - p)) < 5 * (p * (1 - p) / values.numel()) ** 0.5
    other = kept(T, H, p, torch.tensor([4], device=device))
    heads = [factors[0, 0] > 0.5, factors[0, 1] > 0.5, other[0, 0] > 0.5]
    for a, b in itertools.combinations(heads, 2):  # independent across heads and seeds
        agree = (a == b)[seen].double().mean()
        assert abs(agree - (p * p + (1 - p) ** 2)) < 0.08


def test_dropout_mask_is_a_function_of_the_seed_alone(device):
    """Not of the tiles: another GPU, or backward with its own tiles, draws the same."""
    seed = torch.tensor(3, device=device)
    one = kept(70, 1, 0.3, seed)
    with tiles(BLOCK_M=32, BLOCK_N=32):
        assert torch.equal(one > 0.5, kept(70, 1, 0.3, seed) > 0.5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 25}], ids=str)
def test_dropout(device, dtype, options):
    """Forward and backward against plain PyTorch that multiplies by the mask."""
    T, H, p, seed = 70, 2, 0.3, torch.tensor([2**40 + 1], device=device)
    keep = torch.where(kept(T, H, p, seed) > 0.5, 1 / (1 - p), 0.0)
    check(
        lambda x: causal_attention(x, H, dropout_p=p, seed=seed, **options),
        lambda x: causal_attention_reference(x, H, keep=keep.to(x.dtype), **options),
        packed(1, T, H, 32, dtype, device),
    )


def test_dropout_draws_its_seed(device):
    qkv = packed(1, 40, 1, 16, torch.float32, device)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return causal_attention(qkv, 1, dropout_p=0.5)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    assert torch.equal(
        causal_attention(qkv, 1, dropout_p=0.0, seed=torch.tensor(1, device=device)), causal_attention(qkv, 1)
    )


# ----------------------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("T, window", [(96, None), (100, None), (100, 1), (100, 30), (37, 5)])
@pytest.mark.parametrize("BLOCK_M, BLOCK_N", [(16, 16), (32, 16), (16, 32), (8, 4)])
def test_tiles_are_the_fewest(T, window, BLOCK_M, BLOCK_N):
    """Each run holds exactly the tiles in which somebody sees something, and its middle those where everybody does."""
    seen = visible(1, T, window=window)[0, 0]

    def whole(tile: Tensor, rows: int, columns: int) -> bool:
        return bool(tile.all()) and tile.shape == (rows, columns)

    for start in range(0, T, BLOCK_M):
        stop = min(start + BLOCK_M, T)
        firsts = [0 if window is None else max(0, t - window + 1) for t in (start, stop - 1)]
        cuts = _key_tiles.fn(start, start + BLOCK_M, stop, *firsts, BLOCK_N)
        inside = range(cuts[INSIDE.value], cuts[INSIDE.value + 1])
        split = [seen[start:stop, n : n + BLOCK_N] for n in range(0, T, BLOCK_N)]
        assert [*range(cuts[0], cuts[-1])] == [i for i, tile in enumerate(split) if tile.any()]
        assert [*cuts] == sorted(cuts) and all(split[i].all() for i in inside)
        if BLOCK_M % BLOCK_N == 0:  # what forward asks for: none of these tiles is beyond all of these queries
            assert cuts[SECOND_DIAGONAL.value] == cuts[-1]
        assert all(i in inside for i in range(cuts[0], cuts[-1]) if whole(split[i], BLOCK_M, BLOCK_N))

    for start in range(0, T, BLOCK_N):
        stop = min(start + BLOCK_N, T)
        lasts = [T - 1 if window is None else min(T - 1, j + window - 1) for j in (start, stop - 1)]
        cuts = _query_tiles.fn(start, start + BLOCK_N, *lasts, BLOCK_M)
        inside = range(cuts[INSIDE.value + 1], cuts[INSIDE.value])
        split = [seen[m : m + BLOCK_M, start:stop] for m in range(0, T, BLOCK_M)]
        assert [*range(cuts[-1], cuts[0])] == [i for i, tile in enumerate(split) if tile.any()]
        assert [*cuts] == sorted(cuts, reverse=True) and all(whole(split[i], BLOCK_M, stop - start) for i in inside)
        assert all(i in inside for i in range(cuts[-1], cuts[0]) if whole(split[i], BLOCK_M, BLOCK_N))


def fewest_products(seen: Tensor, M: int, N: int, DKV_M: int, DKV_N: int, DQ_M: int, DQ_N: int) -> tuple[int, int]:
    """tl.dot calls of forward and backward if no tile is visited in vain: seen (B or 1, 1, T, T)."""

    def count(rows: int, columns: int) -> int:
        return sum(
            bool(one[m : m + rows, n : n + columns].any())
            for one in seen[:, 0]
            for m in range(0, seen.shape[2], rows)
            for n in range(0, seen.shape[3], columns)
        )

    return 2 * count(M, N), 4 * count(DKV_M, DKV_N) + 3 * count(DQ_M, DQ_N)


@interpreted
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 1}, {"window": 40}, {"cu_seqlens": (0, 30, 100, 101, 192)}, {"cu_seqlens": (33, 70, 100, 150)}],
    ids=str,
)
def test_tiles_visited(device, options):
    """The kernels' own count of matrix products: none for a tile above the diagonal or outside window and document."""
    from triton.runtime.interpreter import InterpreterBuilder

    B, T, H, block = 2, 96, 1, 16
    if "cu_seqlens" in options:
        options = options | {"cu_seqlens": offsets(device, *options["cu_seqlens"])}
    seen = visible(B, T, **options).expand(B, 1, T, T)
    products, dot = [], InterpreterBuilder.create_dot

    def counted(self, *args):
        products.append(1)
        return dot(self, *args)

    blocks = dict(BLOCK_M=block, BLOCK_N=block, DKV_BLOCK_M=16, DKV_BLOCK_N=32, DQ_BLOCK_M=32, DQ_BLOCK_N=16)
    qkv = packed(B, T, H, 16, torch.float32, device).requires_grad_()
    with tiles(**blocks), mock.patch.object(InterpreterBuilder, "create_dot", counted):
        out = causal_attention(qkv, H, **options)
        forward = len(products)
        out.sum().backward()
    assert (forward, len(products) - forward) == fewest_products(seen, block, block, 16, 32, 32, 16)
