"""Checkpoints out, and live models both ways: what is saved comes back here and in transformers, bit for bit."""

import dataclasses
import json
import os

import pytest
import torch
from hf_models import hf_gpt2, same_weights
from safetensors import safe_open
from torch import nn
from transformers import GPT2LMHeadModel, GPT2Model

from fastgpt2 import GPT, GPTConfig
from fastgpt2.gpt2.weights import pretrained


def tiny(**settings) -> GPT:
    return GPT(GPTConfig(**{**dict(block_size=8, vocab_size=61, n_layer=2, n_head=2, n_embd=16), **settings}))


# -------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("settings", [dict(), dict(bias=False), dict(vocab_multiple=16), dict(dropout=0.2)], ids=str)
def test_a_saved_model_comes_back_here_and_in_transformers(tmp_path, settings):
    model = tiny(**settings).eval()
    idx = torch.arange(16).view(2, 8)
    model.save_pretrained(tmp_path / "new" / "folder")
    again = GPT.from_pretrained(tmp_path / "new" / "folder").eval()
    assert again.config == model.config
    assert torch.equal(again(idx, idx)[0], model(idx, idx)[0])

    theirs, info = GPT2LMHeadModel.from_pretrained(tmp_path / "new" / "folder", output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.config.vocab_size == 61 and theirs.get_input_embeddings().weight.shape == (61, 16)
    assert theirs.config.attn_pdrop == model.config.dropout
    torch.testing.assert_close(theirs(idx).logits, model(idx, idx)[0], atol=1e-5, rtol=1e-5)


def test_the_files_are_as_transformers_writes_them(tmp_path, hf):
    hf.save_pretrained(tmp_path / "theirs")
    GPT.from_huggingface(hf).save_pretrained(tmp_path / "ours")
    with (
        safe_open(tmp_path / "ours" / "model.safetensors", "pt") as ours,
        safe_open(tmp_path / "theirs" / "model.safetensors", "pt") as theirs,
    ):
        assert ours.metadata() == theirs.metadata() == {"format": "pt"}
        assert set(ours.keys()) == set(theirs.keys())
        assert all(torch.equal(ours.get_tensor(k), theirs.get_tensor(k)) for k in ours.keys())
    for file in ("config.json", "generation_config.json"):
        a, b = (json.loads((tmp_path / f / file).read_text()) for f in ("ours", "theirs"))
        assert a == b


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_saving_keeps_the_dtype(tmp_path, dtype):
    model = tiny(vocab_multiple=16).to(dtype)
    model.save_pretrained(tmp_path)
    assert {p.dtype for p in GPT2LMHeadModel.from_pretrained(tmp_path).parameters()} == {dtype}


def test_wrappers_are_taken_off(tmp_path):
    plain = tiny()
    plain.save_pretrained(tmp_path / "plain")
    wanted = (tmp_path / "plain" / "model.safetensors").read_bytes()

    class DataParallel(nn.Module):  # as DistributedDataParallel holds a model
        def __init__(self, module):
            super().__init__()
            self.module = module

    by_block = tiny()
    by_block.load_state_dict(plain.state_dict())
    for i, block in enumerate(by_block.transformer.h):
        by_block.transformer.h[i] = torch.compile(block)
    assert any("_orig_mod." in name for name in by_block.state_dict())
    compiled = torch.compile(plain)
    for model in (compiled, DataParallel(compiled), torch.compile(DataParallel(plain)), by_block):
        pretrained.save_pretrained(model, tmp_path / "wrapped")
        assert (tmp_path / "wrapped" / "model.safetensors").read_bytes() == wanted
    compiled.save_pretrained(tmp_path / "method")
    assert (tmp_path / "method" / "model.safetensors").read_bytes() == wanted
    with pytest.raises(TypeError, match="expected a GPT"):
        pretrained.save_pretrained(nn.Linear(2, 2), tmp_path)


@pytest.mark.parametrize("other_settings", [False, True])
@pytest.mark.parametrize("crash_at", ["save_file", "fsync", "replace 1", "config", "never"])
def test_a_crash_leaves_the_old_checkpoint_or_none_but_no_mix(tmp_path, monkeypatch, crash_at, other_settings):
    """Both models have tensors of the same shapes, so that weights of one with settings of the other would load."""
    old, new = tiny(n_head=2), tiny(n_head=4 if other_settings else 2)
    old.save_pretrained(tmp_path)
    calls = []

    def crash(where, function):
        def call(*args, **kwargs):
            calls.append(where)
            if crash_at in (where, f"{where} {calls.count(where)}"):
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(
            "safetensors.torch.save_file", crash("save_file", __import__("safetensors.torch").torch.save_file)
        )
        patch.setattr(os, "fsync", crash("fsync", os.fsync))
        patch.setattr(os, "replace", crash("replace", os.replace))
        patch.setattr(pretrained, "write_atomically", crash("config", pretrained.write_atomically))
        if crash_at == "never":
            new.save_pretrained(tmp_path)
        else:
            with pytest.raises(KeyboardInterrupt):
                new.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} <= {"config.json", "model.safetensors"}, "temporary files are left"
    try:
        found = GPT.from_pretrained(tmp_path)
    except FileNotFoundError:
        assert other_settings and crash_at in ("replace 1", "config")
        return
    whole = [m for m in (old, new) if torch.equal(m.lm_head.weight, found.lm_head.weight)]
    assert len(whole) == 1 and found.config == whole[0].config
    assert (whole[0] is new) == (crash_at in ("never", "config"))


def test_saved_files_can_be_read_by_others(tmp_path):
    tiny().save_pretrained(tmp_path)
    reference = tmp_path / "reference"
    reference.touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == reference.stat().st_mode


def test_a_file_in_the_folder_s_place_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file"):
        tiny().save_pretrained(tmp_path / "file")


def test_biases_that_transformers_trained_are_not_dropped_in_silence(tmp_path):
    tiny(bias=False).save_pretrained(tmp_path)
    hf = GPT2LMHeadModel.from_pretrained(tmp_path)
    hf.transformer.h[1].mlp.c_fc.bias.data[3] = 0.5
    hf.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'transformer.h.1.mlp.c_fc.bias' is not zero, but config.json says"):
        GPT.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------------- live models


def test_a_variant_that_huggingface_does_not_have_is_not_saved_as_theirs(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Variant(GPTConfig):
        parallel: bool = False

    sizes = dict(block_size=8, vocab_size=61, n_layer=1, n_head=2, n_embd=16)
    GPT(Variant(**sizes)).save_pretrained(tmp_path)
    model = GPT(Variant(**sizes, parallel=True))
    for convert in (model.to_huggingface, lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="parallel is True, and .* can only be False"):
            convert()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_live_models_are_converted_both_ways_bit_for_bit(dtype, idx):
    hf = hf_gpt2(dtype=dtype).eval()
    ours = GPT.from_huggingface(hf, kernels="torch")
    assert not ours.training and {p.dtype for p in ours.parameters()} == {dtype}
    before = torch.random.get_rng_state()
    back = ours.train().to_huggingface()
    assert torch.equal(before, torch.random.get_rng_state())
    assert back.training and back.lm_head.weight is back.transformer.wte.weight
    theirs = dict(hf.named_parameters())
    for name, parameter in back.named_parameters():
        assert parameter.dtype == dtype and parameter.is_contiguous() and parameter.requires_grad
        assert torch.equal(parameter, theirs[name]) and parameter.data_ptr() != theirs[name].data_ptr()
    atol = 4 * torch.finfo(dtype).eps  # another attention implementation
    torch.testing.assert_close(back.eval()(idx).logits, hf(idx).logits, atol=atol, rtol=atol)


def test_a_model_without_a_head_and_one_of_mixed_dtypes(idx, hf):
    body = GPT2Model(hf.config)
    body.load_state_dict(hf.transformer.state_dict())
    assert same_weights(GPT.from_huggingface(body), hf)
    mixed = hf_gpt2()
    mixed.transformer.h[0].to(torch.bfloat16)
    ours = GPT.from_huggingface(mixed)
    assert (
        ours.transformer.h[0].ln_1.weight.dtype == torch.bfloat16 and ours.transformer.wte.weight.dtype == torch.float32
    )
    assert ours.to_huggingface().transformer.h[0].mlp.c_fc.weight.dtype == torch.bfloat16


def test_live_models_that_are_no_such_gpt2_are_refused():
    with pytest.raises(ValueError, match="GPT2LMHeadModel.config: activation_function is 'relu'"):
        GPT.from_huggingface(hf_gpt2(activation_function="relu"))
    untied = hf_gpt2()
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight + 1)
    with pytest.raises(ValueError, match="GPT2LMHeadModel: tensor 'lm_head.weight' differs"):
        GPT.from_huggingface(untied)


def test_padding_is_cut_off_for_a_live_model(idx):
    model = tiny(vocab_multiple=64, bias=False)
    hf = model.to_huggingface()
    assert hf.transformer.wte.weight.shape == (61, 16) and not hf.transformer.ln_f.bias.any()
    again = GPT.from_huggingface(hf)
    assert again.config == model.config
    x = idx[:, :8]
    torch.testing.assert_close(hf.eval()(x).logits, model.eval()(x, x)[0], atol=1e-5, rtol=1e-5)
