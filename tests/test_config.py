"""GPTConfig: what it refuses, and that its counts are those of the model."""

import dataclasses

import pytest
import torch

from fastgpt2 import GPT, GPTConfig
from fastgpt2.gpt2.config import PRESETS

PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("settings", [{}, dict(bias=False), dict(vocab_multiple=128)], ids=str)
def test_parameters_are_counted_as_the_model_has_them(preset, settings):
    config = GPTConfig.preset(preset, **settings)
    with torch.device("meta"):
        model = GPT(config)
    counted = sum(p.numel() for p in model.parameters())
    assert config.num_params() == counted
    assert config.num_params(non_embedding=True) == counted - config.block_size * config.n_embd
    assert model.get_num_params() == config.num_params(non_embedding=True)
    assert model.get_num_params(non_embedding=False) == counted


@pytest.mark.parametrize("preset", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_presets_have_openai_s_sizes(preset):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPTConfig.preset(preset)
    assert config.num_params() == PARAMETERS[preset]
    assert (config.head_size, config.block_size, config.vocab_size) == (64, 1024, 50257)
    with torch.device("meta"):
        theirs = GPT2LMHeadModel(GPT2Config(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd))
    assert sum(p.numel() for p in theirs.parameters()) == PARAMETERS[preset]


def test_the_baby_is_nanogpt_s():
    config = GPTConfig.preset("baby")
    assert (config.n_layer, config.n_head, config.n_embd) == (6, 6, 384)
    assert (config.block_size, config.vocab_size, config.head_size) == (256, 85, 64)


def test_presets_take_single_fields_and_refuse_unknown_ones():
    assert GPTConfig.preset("gpt2", dropout=0.1) == GPTConfig(dropout=0.1)
    with pytest.raises(ValueError, match="preset 'gpt3' is unknown, there are gpt2, gpt2-medium"):
        GPTConfig.preset("gpt3")
    with pytest.raises(TypeError, match="n_layers"):
        GPTConfig.preset("gpt2", n_layers=3)


@pytest.mark.parametrize(
    "field, value",
    [
        ("n_layer", 0),
        ("n_head", -1),
        ("vocab_size", 0),
        ("block_size", 1.5),
        ("n_embd", "768"),
        ("n_embd", True),
        ("vocab_multiple", 0),
        ("n_embd", 100),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", float("nan")),
    ],
)
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value!r}"):
        GPTConfig(**{field: value})


def test_a_config_is_a_value():
    config = GPTConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_layer = 3
    assert GPTConfig(**dataclasses.asdict(config)) == config and hash(config) == hash(GPTConfig())
    names = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias"}  # nanoGPT's
    assert names <= {f.name for f in dataclasses.fields(GPTConfig)}


def test_the_vocabulary_is_padded_to_the_next_multiple():
    assert GPTConfig(vocab_multiple=128).padded_vocab_size == 50304
    assert GPTConfig(vocab_size=50304, vocab_multiple=128).padded_vocab_size == 50304
    assert GPTConfig().padded_vocab_size == 50257


def test_attention_scale_follows_huggingface():
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Config

    for by_layer in (False, True):
        for by_head in (False, True):
            switches = dict(scale_attn_weights=by_head, scale_attn_by_inverse_layer_idx=by_layer)
            theirs = GPT2Config(n_embd=96, n_head=4, **switches)
            ours = GPTConfig(n_embd=96, n_head=4, **switches)
            for layer in (0, 1, 5):
                assert ours.attention_scale(layer) == pytest.approx(GPT2Attention(theirs, layer_idx=layer).scaling)


def test_flops_and_cache_bytes():
    """nanoGPT's 6 N + 12 L H Q T, and two tensors of (B, T, C) a layer."""
    config = GPTConfig()
    N = 124_439_808 - 1024 * 768
    assert config.flops_per_token() == 6 * N + 12 * 12 * 12 * 64 * 1024
    assert config.flops_per_token(T=256) == 6 * N + 12 * 12 * 12 * 64 * 256
    assert config.kv_cache_bytes(B=3, T=100) == 2 * 12 * 3 * 100 * 768 * 2
    assert config.kv_cache_bytes(1, 1, element_bytes=4) == 2 * 12 * 768 * 4


@pytest.mark.parametrize("field", ["bias", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"])
def test_switches_are_true_or_false(field):
    with pytest.raises(ValueError, match=f"{field} is 'false', allowed are True and False"):
        GPTConfig(**{field: "false"})


def test_dropout_is_a_number():
    with pytest.raises(ValueError, match="dropout is '0.1'"):
        GPTConfig(dropout="0.1")
