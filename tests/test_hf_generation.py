"""hf.accelerate: new tokens, with the caches of transformers."""

import pytest
import torch
from hf_models import DEVICE
from hf_parity import IDS, LEFT, WAYS, Copies, pair, written
from transformers import CompileConfig, DynamicCache, StaticCache

from fastgpt2 import hf
from fastgpt2.gpt2 import ops

KERNELS = ["torch", "triton"]
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_greedy_text_is_eagers(kernels, way):
    eager, ours = pair(kernels)
    ours.set_attn_implementation("sdpa")  # another than eager's, whose masks are floating-point numbers
    assert torch.equal(written(ours, **WAYS[way]), written(eager, **WAYS[way]))


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_cache_is_filled_and_read_as_theirs(kernels):
    eager, ours = pair(kernels)
    for mask in (None, LEFT):
        caches = DynamicCache(config=eager.config), DynamicCache(config=eager.config)
        for first, last in ((0, 6), (6, 8), (8, 9)):
            seen = None if mask is None else mask[:, :last]
            found, expected = (
                model(IDS[:, first:last], cache=cache, attention_mask=seen, use_cache=True)
                for model, cache in zip((ours, eager), caches, strict=True)
            )
            torch.testing.assert_close(found.logits[1], expected.logits[1])
            assert found.cache is caches[0]
        real = slice(None) if mask is None else 0
        for one, other in zip(*(cache.layers for cache in caches), strict=True):
            torch.testing.assert_close(one.keys[real, :, 3:], other.keys[real, :, 3:])
            torch.testing.assert_close(one.values[real, :, 3:], other.values[real, :, 3:])


@pytest.mark.slow
@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("kernels", KERNELS)
@torch.no_grad()
def test_compiled_steps_over_a_static_cache_are_the_same(kernels, registered):
    """The prompt and the tokens after it, each one graph."""
    eager, ours = pair(kernels, n_layer=1)
    if registered:
        hf.register(kernels)
        hf.restore(ours).set_attn_implementation("fastgpt2")
    try:
        compiled = torch.compile(ours.forward, backend="aot_eager", fullgraph=True)
        cache = StaticCache(config=ours.config, max_cache_len=16)
        for first, last in ((0, 7), (7, 8), (8, 9)):
            logits = compiled(IDS[:, first:last], cache=cache, attention_mask=LEFT[:, :last], use_cache=True).logits
            expected = eager(IDS[:, :last], attention_mask=LEFT[:, :last], use_cache=False).logits
            torch.testing.assert_close(logits[:, -1], expected[:, -1])
    finally:
        hf.unregister()


@pytest.mark.slow
@pytest.mark.parametrize("kernels", KERNELS)
def test_generate_compiles_a_static_cache(kernels, monkeypatch):
    """As transformers does by itself on a GPU."""
    eager, ours = pair(kernels, n_layer=1)
    expected, compiled, graphs = written(eager), torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda *args, **more: graphs.append(args) or compiled(*args, **more))
    config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    found = written(ours, cache_implementation="static", compile_config=config, disable_compile=False)
    assert graphs and torch.equal(found, expected)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("mask", [None, LEFT], ids=["plain", "left"])
@torch.no_grad()
def test_a_new_token_meets_the_cache_where_it_is(static, mask, monkeypatch):
    """No copy of ours: a dynamic cache makes two by itself when it grows, a static one none."""
    eager, ours = pair("triton", n_layer=1)
    cache = StaticCache(config=ours.config, max_cache_len=16) if static else DynamicCache(config=ours.config)
    ours(IDS[:, :8], cache=cache, attention_mask=None if mask is None else mask[:, :8])
    met, op = [], ops.cached_attention
    monkeypatch.setattr(ops, "cached_attention", lambda *args: met.extend(args[1:3]) or op(*args))
    with Copies() as copies:
        logits = ours(IDS[:, 8:], cache=cache, attention_mask=mask).logits
    assert copies.found == ([] if static else ["cat", "cat"])
    layer = cache.layers[0]
    assert [t.data_ptr() for t in met] == [layer.keys.data_ptr(), layer.values.data_ptr()]
    torch.testing.assert_close(logits, eager(IDS, attention_mask=mask).logits[:, 8:])


def test_keys_and_values_that_lie_differently_are_copied():
    qkv, keys = torch.randn(2, 1, 96, device=DEVICE), torch.randn(2, 2, 7, 16, device=DEVICE)
    values, lengths = keys.flip(0), torch.tensor([6, 2], dtype=torch.int32, device=DEVICE)
    expected = ops.cached_attention(qkv, keys, values, lengths, None, 2, 0.25)
    for other in (values.transpose(1, 2).contiguous().transpose(1, 2), values.mT.contiguous().mT):
        assert torch.equal(ops.cached_attention(qkv, keys, other, lengths, None, 2, 0.25), expected)
