"""Attention of one new token over the cache: numbers, what is written, splits, layouts, launches."""

from unittest import mock

import pytest
import torch
from attention_inputs import DTYPES, interpreted, lengths_of, multiprocessors, token_and_cache
from hypothesis import given
from hypothesis import strategies as st
from interpreter import count_launches, far_apart, grid_order, red_zones
from numerics import check
from torch import Tensor

from fastgpt2.kernels import _device
from fastgpt2.kernels.attention import causal_attention_reference
from fastgpt2.kernels.decode_attention import decode_attention, decode_attention_reference


def unfilled(cache: Tensor, lengths: Tensor) -> Tensor:
    """The cache with NaN where no token was stored: nobody may look there."""
    beyond = torch.arange(cache.shape[3], device=cache.device) >= lengths[:, None]
    return cache.masked_fill(beyond[:, None, :, None], torch.nan)


def splits(n: int):
    """As many programs a head as `n` where the cache is long enough, whatever the machine."""
    return multiprocessors(n * 1000)


def rule(qkv: Tensor, cache: Tensor, lengths: Tensor, n_head: int, scale: float | None = None) -> None:
    """The 2x rule for the output; the cache holds the new token's bits where it belongs and its old ones elsewhere."""
    _, B, _, S, D = cache.shape
    results = []

    def on_a_copy(function):
        def run(qkv, cache):
            cache = torch.empty_like(cache).copy_(cache)  # made this way, it gets red zones too
            out = function(qkv, cache, lengths, n_head, scale=scale)
            results.append(cache)
            return out

        return run

    poisoned = unfilled(cache, lengths)
    check(
        on_a_copy(decode_attention),
        on_a_copy(decode_attention_reference),
        qkv,
        poisoned,
        names=("qkv", "cache"),
        grads=False,
        rows=True,
    )
    expected = poisoned.clone()
    k, v = qkv.view(B, 3, n_head, D)[:, 1:].unbind(1)
    for row, length in enumerate(lengths.tolist()):
        if 0 <= length < S:
            expected[:, row, :, length] = torch.stack((k[row], v[row]))
    for after in results[:2]:  # ours and eager's
        torch.testing.assert_close(after, expected, rtol=0, atol=0, equal_nan=True)


# --------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_head", (12, 16, 20, 25))
def test_rule_at_gpt2_heads(device, n_head, dtype):
    qkv, cache = token_and_cache(2, n_head, 66, 64, dtype, device)
    rule(qkv, cache, lengths_of(0, 65, device=device), n_head)


SHAPES = [(1, 1, 1, 16), (3, 2, 5, 17), (1, 3, 130, 24), (2, 1, 67, 100), (1, 2, 33, 128), (2, 2, 260, 32)]


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rule(device, shape, dtype):
    B, H, S, D = shape
    for last in {0, S // 2, S - 1}:
        lengths = (torch.arange(B, dtype=torch.int32, device=device) * 7 + last).clamp(max=S - 1)
        rule(*token_and_cache(B, H, S, D, dtype, device), lengths, H)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("n_splits", (1, 2, 3, 20))
def test_any_number_of_splits(device, n_splits, dtype):
    """Lengths on both sides of tiles' and splits' ends; most splits of short rows have nothing to do.

    In float64 as many splits as the merge takes in two steps.
    """
    qkv, cache = token_and_cache(6, 1, 300, 16, dtype, device)
    with multiprocessors(3 * n_splits):
        rule(qkv, cache, lengths_of(0, 1, 63, 64, 65, 299, device=device), 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_and_large_scores(device, dtype):
    """Scores in the hundreds: one key takes everything, in a split of its own too, and nothing overflows."""
    qkv, cache = token_and_cache(2, 2, 150, 32, dtype, device)
    with splits(9):
        rule(20 * qkv, 20 * cache, lengths_of(149, 66, device=device), 2, scale=0.5)
        rule(qkv, cache, lengths_of(149, 66, device=device), 2, scale=3.0)


def test_double_precision(device):
    """Nothing on the way is rounded to float32."""
    qkv, cache = token_and_cache(2, 2, 90, 20, torch.float64, device)
    lengths = lengths_of(89, 30, device=device)
    for n_splits in (1, 9):
        with splits(n_splits):
            ours = decode_attention(qkv, cache.clone(), lengths, 2, scale=0.3)
        truth = decode_attention_reference(qkv, cache.clone(), lengths, 2, scale=0.3)
        torch.testing.assert_close(ours, truth, atol=1e-13, rtol=1e-13)


def test_token_by_token_is_causal_attention(device):
    """From an empty cache, as text is written; rows at different places."""
    B, T, H, D = 2, 9, 2, 16
    qkv = torch.randn(B, T, 3 * H * D, device=device)
    truth = causal_attention_reference(qkv.double(), H)
    cache = torch.full((2, B, H, T, D), torch.nan, device=device)
    lengths = lengths_of(0, 0, device=device)
    for t in range(T):
        out = decode_attention(qkv[:, t : t + 1], cache, lengths, H)
        torch.testing.assert_close(out[:, 0].double(), truth[:, t], atol=2e-6, rtol=2e-6)
        lengths += 1
    assert torch.equal(cache.permute(1, 3, 0, 2, 4).reshape(B, T, -1), qkv[..., H * D :])


@pytest.mark.parametrize("length", (-(2**31), -1, 5, 6, 2**31 - 1))
def test_a_length_out_of_range_writes_nothing(device, length):
    """The token sees what the cache holds and itself; its neighbours in memory, of other rows, stay."""
    qkv, cache = token_and_cache(3, 2, 5, 16, torch.float32, device)
    lengths = lengths_of(2, length, 3, device=device)
    with red_zones() as zone:
        rule(zone(qkv), zone(cache), zone(lengths), 2)


def test_same_bits_every_time_and_for_every_order(device):
    qkv, cache = token_and_cache(2, 2, 200, 16, torch.float16, device)
    lengths = lengths_of(199, 80, device=device)
    with splits(9):
        first = decode_attention(qkv, cache, lengths, 2)
        assert torch.equal(decode_attention(qkv, cache, lengths, 2), first)
        if _device.INTERPRETED:
            with grid_order("reversed"):
                assert torch.equal(decode_attention(qkv, cache, lengths, 2), first)


@given(data=st.data())
def test_fuzz(device, data):
    B, H, S = (data.draw(st.integers(1, most), name) for name, most in (("B", 3), ("H", 2), ("S", 140)))
    D = data.draw(st.sampled_from((16, 20, 32, 64, 80, 128)), "D")
    dtype = data.draw(st.sampled_from((*DTYPES, torch.float64)), "dtype")
    lengths = data.draw(st.lists(st.integers(-2, S + 2), min_size=B, max_size=B), "lengths")
    n = data.draw(st.integers(1, 40), "multiprocessors")
    scale = data.draw(st.sampled_from((None, 0.5)), "scale")
    torch.manual_seed(data.draw(st.integers(0, 9), "seed"))
    with multiprocessors(n):
        rule(*token_and_cache(B, H, S, D, dtype, device), lengths_of(*lengths, device=device), H, scale)


# --------------------------------------------------------------------------------------------- layouts and launches


@pytest.mark.parametrize(
    "strided",
    [
        lambda B, N: torch.randn(B, 1, N + 24)[..., 8 : N + 8],
        lambda B, N: torch.randn(B, 7, N)[:, 3:4],
        lambda B, N: torch.randn(1, 1, N).expand(B, 1, N),
        lambda B, N: torch.randn(B, 1, 2 * N)[..., ::2],
    ],
    ids=["slice", "of-many-tokens", "one-row", "every-second"],
)
def test_strided_qkv(device, strided):
    _, cache = token_and_cache(3, 2, 40, 16, torch.float32, device)
    rule(strided(3, 96).to(device), cache, lengths_of(39, 3, 20, device=device), 2)


@pytest.mark.parametrize(
    "strided",
    [
        lambda B, H, S, D: torch.randn(2, B + 2, H, S + 3, D)[:, 1 : B + 1, :, :S],
        lambda B, H, S, D: torch.randn(2, B, S, H, D).transpose(2, 3),
        lambda B, H, S, D: torch.randn(B, H, S, 2, D + 5).permute(3, 0, 1, 2, 4)[..., :D],
    ],
    ids=["slice", "time-first", "keys-beside-values"],
)
def test_strided_cache(device, strided):
    """Written where it lies: no copy, and nothing between its elements changes."""
    cache = strided(3, 2, 40, 16).to(device)
    qkv, _ = token_and_cache(3, 2, 40, 16, torch.float32, device)
    lengths = lengths_of(39, 3, 20, device=device)
    storage = torch.empty(0, device=device).set_(cache.untyped_storage())
    before, expected = storage.clone(), cache.clone()
    truth = decode_attention_reference(qkv.double(), cache.double(), lengths, 2)
    torch.testing.assert_close(decode_attention(qkv, cache, lengths, 2).double(), truth, atol=2e-6, rtol=2e-6)
    decode_attention_reference(qkv, expected, lengths, 2)
    assert torch.equal(cache, expected)
    assert int((storage != before).sum()) == 2 * 3 * 2 * 16


@pytest.mark.parametrize("n_splits", (1, 9))
@pytest.mark.parametrize("begin", (None, (0, 3, 70)), ids=["from-0", "later"])
def test_keys_and_values_in_two_tensors_and_rows_that_begin_later(device, begin, n_splits):
    """As another library's cache has them: read and written where they lie, and nothing before a row's beginning."""
    qkv, cache = token_and_cache(3, 2, 150, 16, torch.float32, device)
    lengths = lengths_of(149, 3, 80, device=device)
    starts = None if begin is None else lengths_of(*begin, device=device)
    cache = unfilled(cache, lengths)
    if starts is not None:
        before = torch.arange(150, device=device) < starts[:, None]
        cache = cache.masked_fill(before[:, None, :, None], torch.nan)
    pair = tuple(half.transpose(1, 2).contiguous().transpose(1, 2) for half in cache)  # time first
    truth = decode_attention_reference(
        qkv.double(), tuple(half.double().nan_to_num() for half in pair), lengths, 2, starts=starts
    )
    with splits(n_splits):
        ours = decode_attention(qkv, pair, lengths, 2, starts=starts)
        joined = decode_attention(qkv, cache, lengths, 2, starts=starts)
    torch.testing.assert_close(ours.double(), truth, atol=2e-6, rtol=2e-6)
    assert torch.equal(ours, joined)
    for half, other in zip(pair, cache, strict=True):
        torch.testing.assert_close(half, other, atol=0, rtol=0, equal_nan=True)
    if starts is not None:  # the row without its beginning is the row
        short = cache[:, 2:, :, 70:].contiguous()
        with splits(n_splits):
            alone = decode_attention(qkv[2:], short, lengths_of(10, device=device), 2)
        torch.testing.assert_close(ours[2:], alone)


def test_no_tokens_beyond_the_room_of_a_row_that_begins_later(device):
    """A length out of range with a start: what lies behind the row, of other rows, is neither read nor written."""
    qkv, cache = token_and_cache(2, 1, 8, 16, torch.float32, device)
    starts = lengths_of(5, 0, device=device)
    expected = decode_attention(qkv, cache.clone(), lengths_of(8, 7, device=device), 1, starts=starts)
    kept = cache.clone()
    kept[:, 1] = torch.nan
    out = decode_attention(qkv, kept, lengths_of(11, 7, device=device), 1, starts=starts)
    assert torch.equal(out[0], expected[0]) and torch.equal(kept[:, 0], cache[:, 0])


@interpreted
@pytest.mark.parametrize("what", ("qkv", "rows", "heads", "tokens"))
def test_offsets_have_64_bits(device, what):
    """Rows of qkv, or the cache along one dimension, reach further than int32 offsets do."""
    B, H, S = 3, 3, 200 if what == "tokens" else 3
    qkv, cache = token_and_cache(B, H, S, 16, torch.bfloat16, device)
    lengths = lengths_of(S - 1, 2, 0, device=device)
    expected = decode_attention(qkv, near := cache.clone(), lengths, H)
    if what == "qkv":
        qkv = far_apart(qkv)
    else:
        dim = ("rows", "heads", "tokens").index(what) + 1
        cache = far_apart(cache.transpose(0, dim)).transpose(0, dim)
    assert torch.equal(decode_attention(qkv, cache, lengths, H), expected)
    assert torch.equal(cache, near)


def test_strided_lengths(device):
    qkv, cache = token_and_cache(3, 1, 20, 16, torch.float32, device)
    rule(qkv, cache, lengths_of(3, 9, 5, 9, 12, 9, device=device)[::2], 1)
    rule(qkv, cache, lengths_of(7, device=device).expand(3), 1)


def test_empty_batch(device):
    qkv, cache = token_and_cache(0, 2, 5, 16, torch.float32, device)
    assert decode_attention(qkv, cache, lengths_of(device=device), 2).shape == (0, 1, 32)


def test_a_short_cache_is_not_split(device):
    """Merging would take longer than reading a few tiles one after another."""
    for S, launches in ((256, 1), (257, 2)):
        qkv, cache = token_and_cache(1, 1, S, 16, torch.float16, device)
        with mock.patch.object(_device, "sm_count", lambda device: 1000), count_launches() as log:
            rule(qkv, cache, lengths_of(S - 1, device=device), 1)
        assert len(log) == launches


@interpreted
def test_launches(device):
    """One where one split does, else two, and the grid follows from shapes alone."""
    qkv, cache = token_and_cache(2, 3, 200, 16, torch.float16, device)
    seen = {}
    for name, n in (("one", 2), ("two", 6), ("all", 1000)):
        for length in (0, 199):
            with multiprocessors(n), count_launches() as log:
                decode_attention(qkv, cache, lengths_of(length, 5, device=device), 3)
            seen[name, length] = [(launch.name, launch.grid[0]) for launch in log]
    for name, programs in (("one", 6), ("two", 12), ("all", 24)):
        merge = [("_decode_merge_kernel", 6)] if programs > 6 else []
        assert seen[name, 0] == seen[name, 199] == [("_decode_attention_kernel", programs), *merge]


@interpreted
def test_bytes(device):
    """The filled part of the cache is read once; a token costs no traffic of the rest."""
    B, H, S, D, L = 2, 3, 512, 64, 256
    qkv, cache = token_and_cache(B, H, S, D, torch.bfloat16, device)
    element, merged = 2 * B * H * D, 4 * B * H * (D + 1)
    for n_splits in (1, 2):
        lengths = torch.full((B,), L, dtype=torch.int32, device=device)
        with multiprocessors(n_splits * B * H // 2):
            with count_launches() as log:
                decode_attention(qkv, cache, lengths, H)
        least = element * (2 * L + 3 + 2 + 1)
        partial = 2 * n_splits * merged * (n_splits > 1)
        small = 32 * (1 + n_splits) + 2 * 32 * B * H  # sectors of lengths and lse that are not filled
        assert least + partial <= sum(launch.bytes for launch in log) <= least + partial + small
