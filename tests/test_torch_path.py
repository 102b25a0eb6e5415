"""PyTorch's side of the ops where it takes a way of its own on a CPU: same numbers, chosen when it may be."""

import pytest
import torch
import torch.nn.functional as F

from fastgpt2.gpt2 import ops
from fastgpt2.gpt2.cache import KVCache
from fastgpt2.gpt2.model import GPT, GPTConfig
from fastgpt2.gpt2.ops import ALL_TORCH, SHORT_ON_CPU


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "T, needs_gradient, wide", [(40, True, True), (SHORT_ON_CPU + 1, True, False), (40, False, False)]
)
def test_short_16_bit_attention_is_computed_in_float32(T, needs_gradient, wide, autocast, monkeypatch):
    seen = []
    sdpa = F.scaled_dot_product_attention

    def recorded(q, *args, **kwargs):
        seen.append((q.dtype, torch.is_autocast_enabled("cpu")))
        return sdpa(q, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    qkv = torch.randn(1, T, 3 * 32).bfloat16().requires_grad_(needs_gradient)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = ops.causal_attention(qkv, 2, 0.25, 0.0, ALL_TORCH)
    assert seen == [(torch.float32, False) if wide else (torch.bfloat16, autocast)]
    assert y.dtype == torch.bfloat16
    exact = ops.causal_attention(qkv.detach().double(), 2, 0.25, 0.0, ALL_TORCH)
    torch.testing.assert_close(y.double(), exact, rtol=0.01, atol=0.01)
    if wide:
        y.float().square().sum().backward()
        assert qkv.grad is not None and qkv.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("B", [1, 3])
def test_even_rows_need_no_mask(B):
    """The same tokens and the same cache as with one."""
    H, S, D = 2, 7, 16
    qkv, cache = torch.randn(B, 1, 3 * H * D), torch.randn(2, B, H, S, D)
    masked, full = cache.clone(), cache.clone()
    lengths = torch.full((B,), S - 1, dtype=torch.int32)
    expected = ops.decode_attention(qkv, masked, lengths, H, 0.25, ALL_TORCH)
    y = ops.decode_attention(qkv, full, lengths, H, 0.25, ALL_TORCH, full=True)
    torch.testing.assert_close(y, expected)
    assert torch.equal(masked, full) and not torch.equal(full, cache)


@pytest.mark.parametrize(
    "lengths, even", [(None, True), ((5, 5), True), ((5, 3), False)], ids=["whole rows", "equal", "ragged"]
)
def test_a_cache_knows_whether_its_rows_are_even(lengths, even, monkeypatch):
    model = GPT(GPTConfig(block_size=16, vocab_size=37, n_layer=1, n_head=2, n_embd=32), kernels="torch").eval()
    asked = []
    decode = ops.decode_attention

    def recorded(*args):
        asked.append(args[-1])
        return decode(*args)

    monkeypatch.setattr(ops, "decode_attention", recorded)
    cache = KVCache(model, 2, 8)
    cache.start(None if lengths is None else torch.tensor(lengths))
    idx = torch.randint(37, (2, 5))
    with torch.no_grad():
        model(idx, cache=cache)
        model(idx[:, :1], cache=cache)
    assert asked == [even]
    whole = KVCache(model, 2, 8, whole=True)
    with torch.no_grad():
        model(idx[:, :1], cache=whole)
    assert asked[-1] is False, "a cache that is given whole holds positions that nobody may see"
