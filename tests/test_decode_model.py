"""Writing text with the kernels: the ids are those of PyTorch, of whole passes and of HuggingFace."""

import warnings
from unittest import mock

import pytest
import torch
from attention_inputs import multiprocessors
from hf_models import DEVICE, hf_gpt2
from interpreter import count_launches
from tiny_models import tiny

from fastgpt2 import GPT
from fastgpt2.bench.audit.dispatch import count_traffic
from fastgpt2.gpt2 import inputs, ops
from fastgpt2.gpt2.cache import KVCache
from fastgpt2.gpt2.generation.generate import generate

S = 9  # block_size


def prompts(B: int, T: int) -> torch.Tensor:
    return torch.randint(50, (B, T), device=DEVICE)


@pytest.mark.parametrize("kernels", ["attention", "triton"])
@pytest.mark.parametrize(
    "B, n", [(1, 20), *(pytest.param(B, 200, marks=pytest.mark.slow) for B in (1, 8))], ids=lambda n: str(n)
)
def test_text_is_huggingfaces(B, n, kernels):
    hf = hf_gpt2(n_positions=256, n_layer=1, n_embd=32, n_head=1).eval().to(DEVICE)
    idx = prompts(B, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = hf.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, do_sample=False)
    assert torch.equal(generate(GPT.from_huggingface(hf, kernels=kernels), idx, n, greedy=True), theirs)


@pytest.mark.filterwarnings("ignore:a prompt has")
@pytest.mark.parametrize("kernels", ["attention", "triton"])
@pytest.mark.parametrize("B", [1, 8])
@pytest.mark.parametrize("T, n", [(1, S - 1), (S - 1, 4), (S, 3), (S + 5, 3)])
def test_every_boundary(T, n, B, kernels):
    """Up to the last place of the cache, and past it, where every token is a whole pass."""
    model, idx = tiny(block_size=S, n_embd=32).to(DEVICE), prompts(B, T)
    expected = generate(model, idx, n, greedy=True)
    model.kernels = kernels
    assert torch.equal(generate(model, idx, n, greedy=True), expected)


@pytest.mark.parametrize("kernels", ["triton", "layer_norm,attention"])
def test_prompts_of_different_lengths(kernels):
    model = tiny(block_size=20, n_embd=32).to(DEVICE)
    rows = [prompts(1, T)[0] for T in (1, 7, 4)]
    expected = generate(model, rows, 5, greedy=True)
    model.kernels = kernels
    assert torch.equal(generate(model, rows, 5, greedy=True), expected)


@pytest.mark.parametrize("n, whole", [(1, False), (1000, False), (1000, True)], ids=["one-split", "splits", "whole"])
@torch.no_grad()
def test_logits_are_those_of_pytorch(n, whole):
    """Row by row, for a cache that is given whole too, of which most splits have nothing."""
    model = tiny(block_size=150, n_embd=32).to(DEVICE).eval()
    idx, lengths = prompts(3, 130), torch.tensor([1, 127, 64], device=DEVICE)
    caches = [KVCache(model, 3, 150, whole=whole) for _ in range(2)]
    for cache in caches:
        cache.start(lengths)
        model(idx[:, :127], cache=cache)
    for step in range(2):
        logits = []
        for kernels, cache in zip(("torch", "attention"), caches, strict=True):
            model.kernels = kernels
            with multiprocessors(n):
                logits.append(model(idx[:, step : step + 1], cache=cache)[0])
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(caches[1].lengths, lengths.int() + 2)


@torch.no_grad()
def test_a_token_is_five_or_six_launches_a_layer_and_waits_for_nothing():
    model = tiny(block_size=150, n_embd=32).to(DEVICE).eval()
    model.kernels = "triton"
    cache, token = KVCache(model, 1, 150, whole=True), prompts(1, 1)
    for n, merge in ((1, []), (1000, ["_decode_merge_kernel"])):
        with (
            mock.patch.object(inputs, "check_tokens"),
            multiprocessors(n),
            count_launches() as log,
            count_traffic() as traffic,
        ):
            model(token, cache=cache)
        layer = ["_decode_linear_kernel", "_decode_attention_kernel", *merge, *["_decode_linear_kernel"] * 3]
        expected = layer * model.config.n_layer + ["_decode_linear_kernel"]
        assert [launch.name for launch in log if "decode" in launch.name] == expected
        assert len(log) == len(expected) + 2  # the embedding, the last LayerNorm
        assert traffic.syncs == 0


@torch.no_grad()
def test_few_rows_are_computed_as_many_are():
    """Up to 32 rows take the launches for few; the numbers are those of the separate ones, rounding for rounding."""
    model = tiny(block_size=40, n_embd=32).to(DEVICE, torch.float16).eval()
    model.kernels = "triton"
    for B, T, few in ((1, 32, True), (4, 8, True), (1, 33, False), (33, 1, False)):
        idx = prompts(B, T)
        logits = []
        for at_once in (32, 0):
            with mock.patch.object(ops, "MOST_ROWS", at_once), count_launches() as log:
                logits.append(model(idx, cache=KVCache(model, B, 40))[0])
            assert any(launch.name == "_layer_norm_fwd_kernel" for launch in log)
            layers = [launch.name for launch in log].count("_decode_linear_kernel")
            assert layers == (4 * model.config.n_layer * few + (B <= 32)) * (at_once > 0)
        torch.testing.assert_close(*logits, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kernels", ["torch", "layer_norm,attention", "mlp"])
@torch.no_grad()
def test_few_rows_of_other_kernels_are_not_fused(kernels):
    model = tiny(block_size=20, n_embd=32).to(DEVICE).eval()
    model.kernels = kernels
    with count_launches() as log:
        model(prompts(1, 3), cache=KVCache(model, 1, 20))
    assert not any("decode_linear" in launch.name for launch in log)
    model.kernels = "triton"
    with count_launches() as log, torch.autocast(DEVICE.type, torch.bfloat16):
        model(prompts(1, 3), cache=KVCache(model, 1, 20))
    assert not any("decode_linear" in launch.name for launch in log)


@torch.no_grad()
def test_hooks_are_called_for_few_rows_too():
    model = tiny(block_size=20, n_embd=32, n_layer=3).to(DEVICE).eval()
    model.kernels = "triton"
    idx, seen = prompts(1, 3), []
    expected = model(idx, cache=KVCache(model, 1, 20))[0]
    for block, module in ((model.transformer.h[1], "mlp"), (model.transformer.h[0], "attn")):
        handle = getattr(block, module).register_forward_hook(lambda module, args, output: seen.append(module))
        with count_launches() as log:
            logits = model(idx, cache=KVCache(model, 1, 20))[0]
        handle.remove()
        assert seen.pop() is getattr(block, module) and not seen
        fused = {"mlp": 1, "attn": 0}[module]  # the blocks before it
        assert [launch.name for launch in log].count("_decode_linear_kernel") == 4 * fused + 1
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_module_of_ones_own_is_called_for_few_rows_too():
    class Silent(torch.nn.Module):
        def forward(self, h, context):
            return torch.zeros_like(h)

    model = tiny(block_size=20, n_embd=32).to(DEVICE).eval()
    model.kernels, idx = "triton", prompts(1, 3)
    model.transformer.h[1].mlp = Silent()
    logits = model(idx, cache=KVCache(model, 1, 20))[0]
    model.kernels = "torch"
    torch.testing.assert_close(logits, model(idx)[0], rtol=1e-4, atol=1e-5)


def test_gradients_through_a_cache_are_refused():
    model = tiny(block_size=S, n_embd=32).to(DEVICE).eval()
    model.kernels = "triton"
    with pytest.raises(ValueError, match=r"decode_attention: qkv is a tensor that requires grad.*torch.no_grad\(\)"):
        model(prompts(1, 1), cache=KVCache(model, 1, S))
