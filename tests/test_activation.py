"""The exact GELU, which nanoGPT and some of HuggingFace's models have: computed as such, or refused by name."""

import dataclasses
import json

import pytest
import torch
from hf_models import TINY, hf_gpt2, write_folder

from fastgpt2 import GPT, GPTConfig, Kernels
from fastgpt2.gpt2 import ops
from fastgpt2.gpt2.weights import huggingface


@pytest.mark.parametrize("name", huggingface.ERF_GELUS)
def test_a_model_of_the_exact_gelu_is_computed_by_it_and_saved_with_it(tmp_path, name):
    idx = torch.randint(TINY["vocab_size"], (2, 16), generator=torch.Generator().manual_seed(1))
    hf = hf_gpt2(activation_function=name)
    for block in hf.transformer.h:  # so that the two GELUs differ by more than rounding
        block.mlp.c_fc.weight.data *= 3
        block.mlp.c_proj.weight.data *= 10
    hf.transformer.ln_f.weight.data *= 10
    ours = GPT.from_pretrained(write_folder(tmp_path / "theirs", hf), kernels="auto").eval()
    with torch.no_grad():
        expected, got = hf.eval()(idx).logits[:, -1:], ours(idx)[0]
        torch.testing.assert_close(got, expected, atol=3e-5, rtol=1e-5)
        tanh = GPT(dataclasses.replace(ours.config, activation="gelu_tanh"))
        tanh.load_state_dict(ours.state_dict())
        assert (tanh.eval()(idx)[0] - expected).abs().max() > 1e-4, "this model would not tell the two apart"
        written = ours.generate(idx[:, :8], 8, greedy=True)  # through the cache, and laid out for few rows
        assert torch.equal(written, hf.generate(idx[:, :8], max_new_tokens=8, do_sample=False, pad_token_id=0))
    ours.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["activation_function"] == name
    assert GPT.from_pretrained(tmp_path / "ours").config == ours.config
    assert ours.to_huggingface().config.activation_function == name


@pytest.mark.skipif(not ops.TRITON_INSTALLED, reason="Triton is not installed")
def test_the_exact_gelu_is_left_to_pytorch_and_asked_of_triton_an_error(monkeypatch):
    config = GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=2, n_embd=32, activation="gelu_erf")
    with pytest.raises(ValueError, match="mlp on Triton, which computes GELU by tanh.*'gelu_erf'"):
        GPT(config, kernels="triton")
    model = GPT(config)
    monkeypatch.setattr(GPT, "device", torch.device("cuda"))  # what "auto" is there
    others = "attention,layer_norm,cross_entropy,embedding"
    assert model.kernels == Kernels.parse(others)
    model.kernels = others
    with pytest.raises(ValueError, match="mlp on Triton"), model.use_kernels(mlp="triton"):
        pass
    with pytest.raises(ValueError, match="activation is 'relu', allowed are gelu_tanh, gelu_erf"):
        dataclasses.replace(config, activation="relu")
